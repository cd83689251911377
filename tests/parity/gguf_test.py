"""GGUF files as transformers' loader reads them: ids and logits; its faults are named."""

import json

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer

import peftjax as pj
from peftjax.io.gguf import GGUFFile, special_tokens, tokenizer
from peftjax.io.gguf_splits import SPLITS
from tests import gguf_files
from tests.gguf_files import CONTROL, USER
from tests.gguf_texts import CORPUS, MARKED, TEXTS

pytestmark = pytest.mark.parity

ADDED = {
  "<|im_start|>": CONTROL,
  "<|im_end|>": CONTROL,
  "<|end|>": CONTROL,
  "<think>": USER,
  "</think>": USER,
}


def trained(path, pre, **values):
  """A byte-level vocabulary trained with a split, with added tokens behind."""
  base = Tokenizer(models.BPE())
  cuts = [pre_tokenizers.Split(Regex(p), "isolated") for p in SPLITS[pre].patterns]
  byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  base.pre_tokenizer = pre_tokenizers.Sequence([*cuts, byte])
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  base.train_from_iterator(
    CORPUS,
    trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False),
  )
  state = json.loads(base.to_str())["model"]
  tokens = [*sorted(state["vocab"], key=state["vocab"].get), *ADDED]
  return gguf_files.vocabulary(
    path,
    tokens,
    pre=pre,
    token_type=[1] * (len(tokens) - len(ADDED)) + list(ADDED.values()),
    merges=[" ".join(merge) for merge in state["merges"]],
    bos_token_id=tokens.index("<|im_start|>"),
    eos_token_id=tokens.index("<|im_end|>"),
    **values,
  )


def theirs_of(path):
  return AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2", "qwen35", "tekken", "gpt-4o"])
@pytest.mark.parametrize("ends", [(False, False), (True, False), (True, True)])
def test_byte_level_ids(pre, ends, tmp_path):
  """Of all texts, whole tokens in them, with BOS and EOS as the file says."""
  path = trained(tmp_path / "m.gguf", pre, add_bos_token=ends[0], add_eos_token=ends[1])
  theirs, ours = theirs_of(path), tokenizer(path)
  for text in TEXTS + MARKED:
    for special in (False, True):
      want = theirs(text, add_special_tokens=special)["input_ids"]
      assert ours.encode(text, add_special_tokens=special).ids == want, text
    for skip in (False, True):
      want = theirs.decode(theirs(text)["input_ids"], skip_special_tokens=skip)
      assert ours.decode(ours.encode(text).ids, skip_special_tokens=skip) == want
  named = special_tokens(path)
  assert (named["bos_token"], named["eos_token"]) == (theirs.bos_token, theirs.eos_token)


def test_what_transformers_leaves_out_of_byte_level_files(tmp_path):
  """llama.cpp's rules that its loader does not follow.

  "smollm" splits before digits, "default" is not GPT-2's split, "llama-bpe" takes a word that is
  a token whole and has BOS by default, and a control token need not be spelled in bytes.
  """
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  tokens = [*alphabet, "<｜end｜>", "abc", "ab", "12"]
  values = dict(merges=["a b", "1 2"], token_type=[1] * 256 + [CONTROL, 1, 1, 1], bos_token_id=0)
  pair = lambda pre: (
    (
      path := gguf_files.vocabulary(tmp_path / f"{pre}.gguf", tokens, pre=pre, **values),
      theirs_of(path),
    )[1:]
    + (tokenizer(path),)
  )
  theirs, ours = pair("llama-bpe")
  assert ours.encode("abc<｜end｜>").ids == [0, 257, 256]
  assert theirs("abc")["input_ids"] == [258, alphabet.index("c")]
  assert len(theirs("<｜end｜>")["input_ids"]) > 1
  theirs, ours = pair("smollm")
  assert ours.encode("12").ids == [alphabet.index("1"), alphabet.index("2")]
  assert theirs("12")["input_ids"] == [259]


def test_sentencepiece_ids(tmp_path):
  """Of texts that begin with no space and hold nothing whole.

  The others are as SentencePiece and llama.cpp have them: before a space, and behind a whole
  token, transformers' loader leaves the prefix space out.
  """
  pieces = gguf_files.train_pieces(CORPUS)
  path = gguf_files.from_pieces(
    tmp_path / "m.gguf", pieces, bos_token_id=1, eos_token_id=2, unknown_token_id=0
  )
  theirs, ours = theirs_of(path), tokenizer(path)
  for text in TEXTS:
    want, got = theirs(text)["input_ids"], ours.encode(text).ids
    if text.startswith(" "):
      assert got == [1, *pieces.encode(text)] and got != want
    else:
      assert got == want, text
      assert ours.decode(got) == theirs.decode(want, skip_special_tokens=True)
  space = pieces.encode("a")
  assert ours.encode("a</s>a").ids == [1, *space, 2, *space]
  assert theirs("a</s>a")["input_ids"] != [1, *space, 2, *space]


def write(path, kind):
  """A Llama of one layer whose rows are of 256, its matrices of any type drawn at random."""
  draw = np.random.default_rng(3)
  writer = gguf.GGUFWriter(path, "llama")
  vocab, width, ffn = 64, 256, 512
  gguf_files.add(
    writer,
    {
      "general.name": "tiny",
      "llama.embedding_length": width,
      "llama.block_count": 1,
      "llama.attention.head_count": 8,
      "llama.attention.head_count_kv": 4,
      "llama.feed_forward_length": ffn,
      "llama.context_length": 64,
      "llama.attention.layer_norm_rms_epsilon": 1e-5,
      "llama.rope.freq_base": 1000.0,
      "llama.rope.dimension_count": 32,
      "llama.vocab_size": vocab,
      "tokenizer.ggml.model": "gpt2",
      "tokenizer.ggml.tokens": [f"t{i}" for i in range(vocab)],
    },
  )
  for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
    writer.add_tensor(f"{name}.weight", draw.uniform(0.5, 1.5, width).astype(np.float32))
  shapes = {
    "token_embd": (vocab, width),
    "output": (vocab, width),
    "blk.0.attn_q": (width, width),
    "blk.0.attn_k": (width // 2, width),
    "blk.0.attn_v": (width // 2, width),
    "blk.0.attn_output": (width, width),
    "blk.0.ffn_gate": (ffn, width),
    "blk.0.ffn_up": (ffn, width),
    "blk.0.ffn_down": (width, ffn),
  }
  for name, (rows, columns) in shapes.items():
    array = draw.normal(0, 0.1, (rows, columns)).astype(np.float32)
    try:
      blocks = gguf.quants.quantize(array, kind)
    except NotImplementedError:  # drawn bytes, with scales of a sensible size
      block, size = gguf.GGML_QUANT_SIZES[kind]
      blocks = draw.integers(0, 256, (rows * columns // block, size), np.uint8)
      scale = np.frombuffer(np.float16(0.0005).tobytes(), np.uint8)
      at = {Type.Q6_K: (208,), Type.Q4_K: (0, 2), Type.Q2_K: (80, 82)}[kind]
      for start in at:
        blocks[:, start : start + 2] = scale
      blocks = blocks.reshape(rows, -1)
    writer.add_tensor(f"{name}.weight", blocks, raw_dtype=kind)
  gguf_files.finish(writer)
  return path


@pytest.mark.parametrize("kind", [Type.F16, Type.BF16, Type.Q8_0, Type.Q4_K, Type.Q6_K, Type.Q2_K])
def test_logits(kind, tmp_path):
  path = write(tmp_path / "m.gguf", kind)
  theirs = AutoModelForCausalLM.from_pretrained(
    str(tmp_path), gguf_file=path.name, dtype=torch.float32
  ).eval()
  tokens = np.random.default_rng(4).integers(0, 64, (2, 16)).astype(np.int32)
  with torch.no_grad():
    want = theirs(torch.from_numpy(tokens).long()).logits.numpy()
  model, params = pj.load_pretrained(path)
  got = pj.apply(model, params, tokens)
  assert np.isfinite(want).all() and want.std() > 0.1
  state = {name: x.numpy().copy() for name, x in theirs.state_dict().items()}
  with torch.no_grad():
    exact = theirs.double()(torch.from_numpy(tokens).long()).logits.numpy()
  rounding = np.abs(want - exact).max()  # of float32, by transformers
  assert 0 < rounding < 2e-5 * np.abs(want).max()
  np.testing.assert_allclose(got, exact, rtol=0, atol=2 * rounding)
  file = GGUFFile(path)
  for name in file.names():
    np.testing.assert_array_equal(file.read(name), state[name])
