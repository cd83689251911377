"""Tokenizers of GGUF files: SentencePiece is the reference of its kind, llama.cpp of the rest."""

import json

import gguf
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from peftjax.data import chat
from peftjax.io import gguf_tokenizer
from peftjax.io.gguf import GGUFFile, chat_templates, special_tokens, tokenizer
from peftjax.io.gguf_splits import SPLITS
from tests import gguf_files
from tests.gguf_files import CONTROL, NORMAL, UNUSED, USER
from tests.gguf_texts import CORPUS, TEXTS

BYTES = pre_tokenizers.ByteLevel.alphabet()


def ids(made, text, special=False):
  return made.encode(text, add_special_tokens=special).ids


@pytest.fixture(scope="module")
def pieces():
  return gguf_files.train_pieces(CORPUS)


def test_sentencepiece_ids_are_sentencepieces(pieces, tmp_path):
  """And texts come back; BOS stands before them by default."""
  made = tokenizer(gguf_files.from_pieces(tmp_path / "m.gguf", pieces))
  for text in TEXTS:
    want = pieces.encode(text)
    assert ids(made, text) == want, text
    assert ids(made, text, special=True) == [1, *want]
    assert made.decode([1, *want]) == text, text


def test_every_stretch_between_whole_tokens_gets_a_space(pieces, tmp_path):
  """As in llama.cpp, and in the tokenizer.json of Llama 2; each stretch is SentencePiece's."""
  made = tokenizer(gguf_files.from_pieces(tmp_path / "m.gguf", pieces, more=["<think>", "[INST]"]))
  think, inst = pieces.get_piece_size() + 0, pieces.get_piece_size() + 1
  want = [*pieces.encode("a b"), think, *pieces.encode("the"), *[2, inst], *pieces.encode(" x")]
  assert ids(made, "a b<think>the</s>[INST] x") == want
  assert made.decode([think, 2, inst], skip_special_tokens=True) == "<think>[INST]"
  assert ids(made, "<unk>") == [0] and made.decode([0, 1, 2]) == ""


def test_without_a_prefix_no_space_is_added_or_lost(pieces, tmp_path):
  """add_space_prefix of false, as Llama files made of newer tokenizers have."""
  made = tokenizer(gguf_files.from_pieces(tmp_path / "m.gguf", pieces, add_space_prefix=False))
  for text in TEXTS:
    assert made.decode(ids(made, text)) == text
    if text:
      assert [0, *ids(made, f"<unk> {text}")[1:]] == [0, *pieces.encode(text)]


def test_sentencepiece_defaults_are_llama_cpps(tmp_path):
  """Ids 1, 2 and 0 where the file names none; no byte tokens: the unknown token."""
  tokens = ["<unk>", "<s>", "</s>", "▁", "a", "▁a"]
  types, scores = [2, 3, 3, 1, 1, 1], [0.0, 0.0, 0.0, -2.0, -3.0, -1.0]
  path = gguf_files.vocabulary(
    tmp_path / "m.gguf", tokens, "llama", token_type=types, scores=scores, add_eos_token=True
  )
  assert ids(tokenizer(path), "a?! a", special=True) == [1, 5, 0, 5, 2]
  assert special_tokens(path) == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def byte_level(path, tokens=(), merges=(), types=(), **values):
  """A byte-level vocabulary of all bytes and then `tokens`, the first of which is number 256."""
  types = [NORMAL] * 256 + list(types or [NORMAL] * len(tokens))
  values = {"pre": "gpt-2", "merges": list(merges) or ["a b"], "token_type": types, **values}
  extra = [] if "ab" in tokens else ["ab"]
  values["token_type"] = values["token_type"] and values["token_type"] + [NORMAL] * len(extra)
  return gguf_files.vocabulary(path, [*sorted(BYTES), *tokens, *extra], **values)


def test_user_defined_and_control_tokens_are_matched_whole(tmp_path):
  """Before anything is split, spaces and all; control tokens are skipped in decoding, others not.

  Among them tokens of characters that spell bytes ("über"), and ones that do not ("<｜end｜>").
  """
  tokens = ["<think>", "a  b", "über", "<｜end｜>", "<|start|>", "ab"]
  types = [USER, USER, USER, CONTROL, CONTROL, NORMAL]
  made = tokenizer(byte_level(tmp_path / "m.gguf", tokens, ["a b"], types))
  text = "ab<think>ab a  b über<｜end｜><|start|>ab"
  space = made.token_to_id("Ġ")
  want = [261, 256, 261, space, 257, space, 258, 259, 260, 261]
  assert ids(made, text) == want
  assert made.decode(want) == "ab<think>ab a  b überab"
  assert made.decode(want, skip_special_tokens=False) == text
  assert [made.get_added_tokens_decoder()[i].special for i in (256, 258, 259)] == [
    False,
    False,
    True,
  ]


def test_names_of_control_tokens_are_known_whatever_their_type(tmp_path):
  """llama.cpp's list; other tokens of a normal type are split."""
  tokens = ["<|im_end|>", "<|other|>", "[PAD7]"]
  made = tokenizer(byte_level(tmp_path / "m.gguf", tokens, types=[NORMAL, NORMAL, UNUSED]))
  assert ids(made, "<|im_end|>") == [256] and made.decode([256]) == ""
  assert len(ids(made, "<|other|>")) == 9 and len(ids(made, "[PAD7]")) == 6
  assert made.decode([258, 257, 258]) == "<|other|>"
  made = tokenizer(byte_level(tmp_path / "m.gguf", tokens, token_type=None))
  assert ids(made, "<|im_end|>") == [256]


@pytest.mark.parametrize("pre", ["llama-bpe", "tekken", "smaug-bpe", "gpt-2"])
def test_llama_3s_words_are_taken_whole_and_bos_comes_first(pre, tmp_path):
  """A word that is a token is not merged; without "ignore_merges" it is."""
  tokens = ["<s>", "abc", "ab"]
  path = byte_level(
    tmp_path / "m.gguf", tokens, ["a b"], [CONTROL, NORMAL, NORMAL], pre=pre, bos_token_id=256
  )
  made = tokenizer(path)
  split = [258, made.token_to_id("c")]
  if pre in ("llama-bpe", "tekken"):
    assert ids(made, "abc", special=True) == [256, 257] and ids(made, "abc") == [257]
  else:
    assert ids(made, "abc", special=True) == ids(made, "abc") == split
  assert ids(made, "abca")[:2] == split


BOS = [
  # what the file says of BOS, of EOS, what is added before and behind
  (None, None, 0, 0),
  (True, None, 1, 0),
  (False, True, 0, 1),
  (True, True, 1, 1),
]


@pytest.mark.parametrize(("bos", "eos", "before", "behind"), BOS)
@pytest.mark.parametrize("pre", ["gpt-2", "llama3"])
def test_bos_and_eos_are_added_as_the_file_says(pre, bos, eos, before, behind, tmp_path):
  """Its name may be anything; the second text of a pair is treated as the first."""
  path = byte_level(
    tmp_path / "m.gguf",
    ["a:0 $A", "$B"],
    types=[CONTROL, CONTROL],
    pre=pre,
    **{"add_bos_token": bos, "add_eos_token": eos, "bos_token_id": 256, "eos_token_id": 257},
  )
  before = 1 if pre == "llama3" and bos is None else before
  made = tokenizer(path)
  text = [256] * before + [258] + [257] * behind
  assert made.encode("ab").ids == text and ids(made, "ab") == [258]
  assert made.encode("ab", "ab").ids == 2 * text
  assert made.num_special_tokens_to_add(False) == before + behind
  assert special_tokens(path) == {"bos_token": "a:0 $A", "eos_token": "$B"}


# Of every kind of split, the words of one text; by hand from llama.cpp's patterns.
PROBE = "I'M 12345 don't (x)\r\n\n\ty  z٣ naïveÉtat—ok!!"
WORDS = {
  "gpt-2": "I|'|M| 12345| don|'t| (|x|)|\r\n\n|\t|y| | z|٣| naïveÉtat|—|ok|!!",
  "smollm": "I|'|M| |1|2|3|4|5| don|'t| (|x|)|\r\n\n|\t|y| | z|٣| naïveÉtat|—|ok|!!",
  "llama-bpe": "I|'M| |123|45| don|'t| (|x|)\r\n\n|\ty| | z|٣| naïveÉtat|—ok|!!",
  "smaug-bpe": "I|'M| |123|45| don|'t| (|x|)\r\n\n|\ty| | z|٣| naïveÉtat|—ok|!!",
  "qwen2": "I|'M| |1|2|3|4|5| don|'t| (|x|)\r\n\n|\ty| | z|٣| naïveÉtat|—ok|!!",
  "qwen35": "I|'M| |1|2|3|4|5| don|'t| (|x|)\r\n\n|\ty| | z|٣| naïveÉtat|—ok|!!",
  "ufakzeka": "I|'M| |1|2|3|4|5| don|'t| (|x|)\r\n\n|\ty| | z|٣| naïveÉtat|—ok|!!",
  "seed-coder": "I|'M| |1|2|3|4|5| don|'t| (|x|)|\r\n\n|\ty| | z|٣| naïveÉtat|—ok|!!",
  "minicpm5": "I|'M| |123|45| don|'t| (|x|)\r\n\n|\ty| | z|٣| naïveÉtat|—ok|!!",
  "tekken": "I|'M| |1|2|3|4|5| don|'t| (|x|)\r\n\n|\ty| | z|٣| naïve|État|—ok|!!",
  "gpt-4o": "I'M| |123|45| don't| (|x|)\r\n\n|\ty| | z|٣| naïve|État|—ok|!!",
  "deepseek-llm": "I|'|M| |12345| don|'|t| (|x|)|\r|\n|\n|\ty| | z|٣| na|ï|ve|É|tat|—|ok|!!",
  "deepseek-coder": "I|'|M| |1|2|3|4|5| don|'|t| (|x|)|\r|\n|\n|\ty| | z|٣| naïveÉtat|—|ok|!!",
  "deepseek-v3": "I|'M| |123|45| don|'t| (|x|)\r\n\n|\ty| | z|٣| naïveÉtat|—|ok|!!",
  "poro-chat": "I'M| 12345| don't| (|x|)\r\n\n\t|y| | z٣| naïveÉtat—ok|!!",
  "viking": "I'M| |1|2|3|4|5| don't| (|x|)\r\n\n\t|y| | z|٣| naïveÉtat—ok|!!",
  "falcon": "I|'|M| |123|45| don|'|t| |(|x|)|\r\n\n|\t|y| | z|٣| naïveÉtat|—|ok|!!",
  "default": "I|'|M| |123|45| don|'|t| |(|x|)|\r\n\n|\t|y| | z|٣| naïveÉtat|—|ok|!!",
}


@pytest.mark.parametrize("pre", WORDS)
def test_every_split_cuts_where_llama_cpp_does(pre, tmp_path):
  made = tokenizer(byte_level(tmp_path / "m.gguf", pre=pre, add_bos_token=False, bos_token_id=0))
  got = [PROBE[start:end] for _, (start, end) in made.pre_tokenizer.pre_tokenize_str(PROBE)]
  assert got == WORDS[pre].split("|")


def test_every_name_of_a_split_is_one_of_those():
  assert {SPLITS[name] for name in WORDS} == {*SPLITS.values()}


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "gpt-2", "smollm"])
def test_trained_vocabularies_give_their_own_ids(pre, tmp_path):
  """A tokenizer trained with that split, its file, and back: 400 merges, and all texts."""
  trained = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
  reference = tokenizer(byte_level(tmp_path / "r.gguf", pre=pre, add_bos_token=False))
  trained.pre_tokenizer, trained.decoder = reference.pre_tokenizer, decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=600, initial_alphabet=BYTES, special_tokens=["<s>"], show_progress=False
  )
  trained.train_from_iterator(CORPUS, trainer)
  state = json.loads(trained.to_str())["model"]
  tokens = sorted(state["vocab"], key=state["vocab"].get)
  path = gguf_files.vocabulary(
    tmp_path / "m.gguf",
    tokens,
    pre=pre,
    token_type=[CONTROL] + [NORMAL] * (len(tokens) - 1),
    merges=[" ".join(merge) for merge in state["merges"]],
    add_bos_token=True,
    bos_token_id=0,
  )
  made = tokenizer(path)
  for text in TEXTS:
    assert ids(made, text) == ids(trained, text)
    assert ids(made, text, special=True) == [0, *ids(trained, text)]
    assert made.decode(ids(made, text), skip_special_tokens=False) == text


def test_of_a_merge_that_comes_twice_the_first_counts(tmp_path):
  """As in llama.cpp; the library alone would take the last."""
  tokens = ["ab", "bc"]
  made = tokenizer(byte_level(tmp_path / "m.gguf", tokens, ["a b", "b c", "a b"]))
  assert ids(made, "abc") == [256, made.token_to_id("c")]


def test_a_file_without_a_split_says_so(tmp_path):
  with pytest.warns(UserWarning, match=r"m\.gguf does not say how .*tokenizer\.ggml\.pre"):
    made = tokenizer(byte_level(tmp_path / "m.gguf", pre=None))
  assert len(made.pre_tokenizer.pre_tokenize_str("12345")) == 2


def test_empty_tokens_have_llama_cpps_names(tmp_path):
  made = tokenizer(byte_level(tmp_path / "m.gguf", ["", ""]))
  assert made.id_to_token(256) == "[EMPTY_256]" and made.id_to_token(257) == "[EMPTY_257]"


BAD = {
  "lacks tokenizer.ggml.model": dict(model=None),
  "model is 7; it must be a text": dict(model=7),
  r"model is \[1, 2\]; it must be a text": dict(model=[1, 2]),
  "of kind 'bert'; only 'gpt2'.*'llama'": dict(model="bert"),
  "split as 'gemma4'.*those read are gpt-2.*llama-bpe": dict(pre="gemma4"),
  "pre is 3; it must be a text": dict(pre=3),
  "tokens must be a list of texts, not None": dict(tokens=None),
  "tokens must be a list of texts, not 'a'": dict(tokens="a"),
  r"tokens must be a list of texts, not \[1, 2\]": dict(tokens=[1, 2]),
  "the token 'a' twice": dict(tokens=["a", "b", "a"], token_type=None, merges=["a b"]),
  "merges must be a list of texts, not None": dict(merges=None),
  "the merge 'ab' must be two tokens": dict(merges=["ab"]),
  "the merge 'a b c' must": dict(merges=["a b c"]),
  "the merge ' a' must": dict(merges=[" a"]),
  "the merge 'a ' must": dict(merges=["a "]),
  "the merge '' must": dict(merges=["a b", ""]),
  "the merge 'a c' must be .* together are a token": dict(merges=["a c"]),
  "the merge 'a xyz' must": dict(merges=["a xyz"]),
  "token_type has 3 entries for a vocabulary of 257": dict(token_type=[1, 1, 1]),
  "type must be a list of whole numbers, not 'x'": dict(token_type="x"),
  "has the type 9; there are 1 to 6": dict(token_type=[9] * 257),
  "has the type -1;": dict(token_type=[-1] * 257),
  "names token 257 as bos, and its vocabulary has 257": dict(bos_token_id=257),
  "bos_token_id is -1": dict(bos_token_id=-1),
  "eos_token_id is '2'": dict(eos_token_id="2"),
  "add_bos_token is 1; it must be true or false": dict(add_bos_token=1),
  "add_eos_token is 'yes'": dict(add_eos_token="yes"),
  "wants BOS added .*lacks tokenizer.ggml.bos_token_id": dict(add_bos_token=True),
  "wants EOS added": dict(add_eos_token=True, add_bos_token=False),
  "wants BOS": dict(pre="llama-bpe"),
  "scores must be a list of numbers, not None": dict(model="llama"),
  "scores has 2 entries for a vocabulary of 257": dict(model="llama", scores=[0.5, 1.5]),
  "scores has entries that are not finite": dict(model="llama", scores=[float("nan")] * 257),
  "space_prefix is 0; it must be true or false": dict(model="llama", add_space_prefix=0),
  "up to 20000 characters: too long": dict(
    model="llama", tokens=["a" * 20000, "b"], scores=[0.5, 0.5], token_type=None
  ),
}


@pytest.mark.parametrize("told", BAD)
def test_a_malformed_vocabulary_is_named(told, tmp_path):
  """Not by the library's error, nor by its panic."""
  values = {"model": "gpt2", "tokens": [*sorted(BYTES), "ab"], **BAD[told]}
  tokens, kind = values.pop("tokens"), values.pop("model")
  values = {"pre": "gpt-2", "merges": ["a b"], "token_type": [1] * 257, **values}
  path = gguf_files.vocabulary(tmp_path / "m.gguf", tokens, kind, **values)
  with pytest.raises(ValueError, match=rf"(?s)m\.gguf.*{told}"):
    tokenizer(path)


def test_no_tokens_are_no_vocabulary(tmp_path):
  """Which the gguf package does not even write."""
  values = [
    gguf_files.entry("tokenizer.ggml.model", 8, gguf_files.text("gpt2")),
    gguf_files.entry("tokenizer.ggml.tokens", 9, gguf_files.array(8, 0)),
  ]
  (tmp_path / "m.gguf").write_bytes(gguf_files.raw(values))
  with pytest.raises(ValueError, match=r"m\.gguf has 0 tokens; 1 to 524288 are read"):
    tokenizer(tmp_path / "m.gguf")


def test_what_the_library_cannot_do_is_a_sentence(tmp_path, monkeypatch):
  """Its errors are bare exceptions, and its panics are none; an interrupt is neither."""

  class Panic(BaseException):
    pass

  path = byte_level(tmp_path / "m.gguf")
  for kind in (Exception, ValueError, Panic, KeyboardInterrupt):

    def fail(*args, kind=kind, **options):
      raise kind("oh")

    monkeypatch.setattr(gguf_tokenizer.models, "BPE", fail)
    with pytest.raises(KeyboardInterrupt if kind is KeyboardInterrupt else ValueError) as raised:
      tokenizer(path)
    if kind is not KeyboardInterrupt:
      assert "m.gguf: its vocabulary cannot be used: oh" in str(raised.value)


def test_chat_templates_have_names(tmp_path):
  """The default one, and others as the gguf package writes them."""
  writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
  writer.add_chat_template(
    [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}]
  )
  gguf_files.finish(writer)
  assert chat_templates(tmp_path / "m.gguf") == {"default": "A", "tool_use": "B"}
  assert chat.template(tmp_path / "m.gguf") == "A"
  assert chat.template(tmp_path / "m.gguf", "tool_use") == "B"
  writer = gguf.GGUFWriter(tmp_path / "n.gguf", "llama")
  gguf_files.add(writer, {"tokenizer.chat_template": 5})
  gguf_files.finish(writer)
  with pytest.raises(ValueError, match=r"n\.gguf: tokenizer\.chat_template is 5; .* is a text"):
    chat_templates(tmp_path / "n.gguf")


def test_a_vocabulary_alone_is_no_model(tmp_path):
  with pytest.raises(ValueError, match=r"m\.gguf: llama: it lacks the field"):
    GGUFFile(byte_level(tmp_path / "m.gguf"))
