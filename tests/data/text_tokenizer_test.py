"""Documents, prompts and continuations of small tokenizers of every kind."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from peftjax import data
from peftjax.data import text_tokenizer
from tests.golden import tokenizer_dirs
from tests.golden.tokenizer_texts import texts

# Of these, decoding gives a text back; BERT's and Qwen2's normalizers change it.
FAITHFUL = ("gpt2", "llama2", "llama2_eos", "llama2_json", "llama3", "mistral", "smollm2")


@pytest.fixture(scope="module")
def load(tmp_path_factory):
  """Loads a directory of `tokenizer_dirs` by name."""
  root = tmp_path_factory.mktemp("tokenizers")
  return lambda name: data.load_tokenizer(
    root / name if (root / name).exists() else tokenizer_dirs.write(name, root / name)
  )


def examples(texts, pairs=None):
  return data.Examples(texts, pairs, np.zeros(len(texts), np.int32))


@pytest.mark.parametrize("completions", [False, True])
@pytest.mark.parametrize(
  "name", ["llama2", "llama2_eos", "llama3", "qwen2", "gpt2_bos_eos", "bert"]
)
def test_a_document_is_the_whole_text_and_one_end(name, load, completions):
  """Wherever its lines end: the ids of the text as one, and an end unless there is one."""
  tokenizer, given = load(name), texts()
  end = tokenizer.backend.token_to_id(tokenizer.special.get("eos_token", "[SEP]"))
  documents, _ = data.documents(tokenizer, examples(given), (end,), completions=completions)
  for encoding, ids in zip(tokenizer.encodings(given), documents, strict=True):
    want = encoding.ids
    assert ids.tolist() == (want if want[-1:] == [end] else [*want, end])
    assert ids.dtype == np.int32


@pytest.mark.parametrize("name", ["llama2", "llama2_eos", "llama3", "qwen2", "roberta", "mistral"])
def test_a_completion_begins_with_the_first_token_that_has_any_of_it(name, load):
  """By arithmetic: no prompt token reaches the completion, and the first of the rest does."""
  tokenizer = load(name)
  one = [*texts()[60:260], "a ", "x", "", "🙃", "e", "fine\n", "x" * 300, "The", "<s>"]
  two = [*texts()[260:460], " b", "yz", "all of it", "🙃 b", "\u0301 b", "\n\nhe", "x", "", "</s>"]
  documents, prompts = data.documents(tokenizer, examples(one, two), (99,), completions=True)
  again, all_of_it = data.documents(tokenizer, examples(one, two), (99,), completions=False)
  assert all_of_it == [0] * len(one)
  split = 0
  for i, (prompt, completion) in enumerate(zip(one, two, strict=True)):
    np.testing.assert_array_equal(documents[i], again[i])
    encoding = tokenizer.encode(prompt + completion)
    ends = [stop for _, stop in encoding.offsets]
    n = prompts[i]
    assert all(stop <= len(prompt) for stop in ends[:n])
    if any(stop > len(prompt) for stop in ends):
      assert ends[n] > len(prompt)
      split += encoding.offsets[n][0] < len(prompt)
    else:
      assert n == len(documents[i]) - 1
  assert split > 0  # some tokens have characters of both


def test_spaces_belong_to_their_token(load):
  """RoBERTa's tokenizer leaves them out of offsets, by default, and they would be prompt."""
  tokenizer = load("roberta")
  pair = examples(["def f(x):\n"], ["    return x"])
  [ids], [prompt] = data.documents(tokenizer, pair, (2,), completions=True)
  pieces = [tokenizer.backend.id_to_token(i) for i in ids]
  assert pieces[prompt - 1 : prompt + 2] == ["):", "ĊĠĠĠ", "Ġreturn"]


@pytest.mark.parametrize("name", tokenizer_dirs.DIRECTORIES)
def test_prompt_and_continuation_are_the_text_of_all_ids(name, load):
  """Cut anywhere, in the middle of a character too."""
  tokenizer, stable = load(name), not name.startswith("bert")
  for text in texts()[:500:7]:
    ids = tokenizer.encode(text).ids
    for cut in {1, len(ids) // 2, max(len(ids) - 1, 0)}:
      whole, before = tokenizer.decode(ids), tokenizer.decode(ids[:cut])
      new = tokenizer.continuation(ids[:cut], ids[cut:])
      assert whole.endswith(new)
      if stable and not before.endswith("\ufffd"):
        assert before + new == whole


@pytest.mark.parametrize("name", FAITHFUL)
def test_a_prompt_is_given_back_with_the_space_at_the_seam(name, load):
  """SentencePiece leaves out the first space of a text: decoding new ids alone would lose one."""
  tokenizer = load(name)
  for prompt, new in (("the fuel prices", " rose, again"), ("return x", " + 1\n"), ("", "a")):
    ids, whole = tokenizer.prompts([prompt, prompt + new])
    assert whole[: len(ids)] == ids
    assert tokenizer.continuation(ids, whole[len(ids) :]) == new
    assert tokenizer.decode(whole) == prompt + new


def test_half_a_character_is_shown_as_such(load):
  tokenizer = load("llama3")
  ids = tokenizer.encode("so 🙃").ids
  assert tokenizer.continuation(ids[:2], ids[2:]).endswith(" 🙃")
  assert tokenizer.continuation(ids[:2], ids[2:-1]).endswith(" \ufffd")


def test_a_prompt_has_nothing_put_behind_it(load):
  """<s> stays, and </s> goes, but not that of the text; a chat brings its own <s>."""
  plain, ending, both = (load(name) for name in ("llama2", "llama2_eos", "gpt2_bos_eos"))
  for text in ("the film", "the </s>", "", "</s>"):
    assert ending.prompts([text]) == plain.prompts([text]) == [plain.encode(text).ids]
    assert both.prompts([text]) == [both.encode(text).ids[:-1]]
  assert plain.prompts(["the"], special=False) == [plain.encode("the").ids[1:]]


def test_memory_is_bounded_by_texts_and_characters(load, monkeypatch):
  """However a list is cut, the ids are the same."""
  tokenizer, given = load("llama3"), texts()
  whole = [e.ids for e in tokenizer.encodings(given)]
  monkeypatch.setattr("peftjax.data.text_tokenizer.CHUNK", 7)
  monkeypatch.setattr("peftjax.data.text_tokenizer.CHARACTERS", 250)
  assert [e.ids for e in tokenizer.encodings(given)] == whole
  cuts = list(text_tokenizer._chunks(given))
  assert [i for cut in cuts for i in range(*cut)] == list(range(len(given)))
  for start, stop in cuts:
    size = sum(map(len, given[start:stop]))
    assert stop - start <= 7 and (size <= 250 or stop - start == 1)


def test_what_cannot_be_encoded_is_one_sentence(load):
  """Half a surrogate pair, as Python has it for bytes that are no UTF-8."""
  with pytest.raises(ValueError, match="text .* is not Unicode at character 0: half a surrogate"):
    load("llama3").prompts(["\udce9t\udce9"])


def test_types_are_those_the_model_has(load):
  """Zeros, unless the model tells two texts apart."""
  for name, kinds in (("bert", {0, 1}), ("roberta", {0}), ("llama2_json", {0}), ("llama3", {0})):
    tokens = data.encode(load(name), examples(["the film"], ["it rose"]), 16)
    assert set(tokens.types.tolist()) == kinds


def test_a_text_is_cut_where_the_files_say(tmp_path):
  folder = tokenizer_dirs.write("bert", tmp_path / "model")
  right = data.encode(data.load_tokenizer(folder), examples(["the film rose again"]), 4)
  (folder / "tokenizer_config.json").write_text('{"truncation_side": "left"}')
  left = data.encode(data.load_tokenizer(folder), examples(["the film rose again"]), 4)
  words = [data.load_tokenizer(folder).backend.id_to_token(i) for i in (*right.ids, *left.ids)]
  assert words == ["[CLS]", "the", "film", "[SEP]", "[CLS]", "rose", "again", "[SEP]"]


def test_a_vocabulary_of_words_is_enough():
  """A tokenizer made in Python, without special tokens."""
  made = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
  made.pre_tokenizer = pre_tokenizers.Whitespace()
  tokenizer = data.TextTokenizer(made, "words")
  ids, prompts = data.documents(tokenizer, examples(["a\nb a"]), (7, 8), completions=True)
  assert ids[0].tolist() == [0, 1, 0, 7] and prompts == [1]
  ids, prompts = data.documents(tokenizer, examples(["", "b\n"]), (7,), completions=True)
  assert [one.tolist() for one in ids] == [[7], [1, 7]] and prompts == [0, 1]
