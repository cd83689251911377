"""transformers loads what `pj.save_pretrained` wrote, with the same logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import peftjax as pj
from peftjax import data
from peftjax.core import paths
from peftjax.core.layout import Axes
from peftjax.core.weight import Weight
from peftjax.data import samples
from peftjax.io import gguf_writer
from peftjax.models import saved
from tests import gguf_files, tiny
from tests.parity.reference import GOLDEN, classifier, compute, decoder, inputs

pytestmark = pytest.mark.parity

_ENCODERS = {
  "bert_tiny": inputs(120),
  "bert_tiny_regression": inputs(120),
  "roberta_tiny": inputs(120, pad=1, types=1),
}
_DECODERS = ("llama", "llama3", "llama_linear", "llama_yarn", "mistral", "qwen2", "gpt2")
_DECODERS = (*_DECODERS, "qwen3_moe", "mixtral")
_BASES = [*_ENCODERS, *(f"{name}_tiny" for name in _DECODERS)]
_METHODS = {
  "none": None,
  "lora": pj.lora(2, 4, "all-linear"),
  "dora": pj.dora(2, 4, "all-linear", from_quantised=True),
}
_TOKENS = inputs(96, length=9)[0][:2]


def _drawn(params, method):
  """Attached, with every trained array drawn."""
  layout = dict.fromkeys(paths.leaves(params), Axes())  # what has more axes are layers
  attached = method.attach(jax.random.key(0), params, layout)
  rng = np.random.default_rng(3)
  draw = lambda m, x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype) if m else x
  return jax.tree.map(draw, method.trainable(attached), attached)


def _theirs(directory, base):
  read = classifier if base in _ENCODERS else decoder
  return compute(read(directory), _ENCODERS.get(base, [_TOKENS])).logits.numpy()


def _ours(model, params, base):
  batch = _ENCODERS.get(base, [_TOKENS])
  return np.asarray(jax.jit(lambda p: pj.apply(model, p, *batch))(params))


def _assert_near(got, want):
  np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max(), rtol=0)


@pytest.mark.parametrize("scan, size", [(False, "5GB"), (True, 20_000)], ids=["one", "shards"])
@pytest.mark.parametrize("name", _METHODS)
@pytest.mark.parametrize("four_bits", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("base", _BASES)
def test_logits_of_what_is_written(base, four_bits, name, scan, size, tmp_path):
  model, params = pj.load_pretrained(GOLDEN / base, scan_layers=scan)
  if four_bits:
    layout = dict.fromkeys(paths.leaves(params), Axes())
    params = pj.quantize(params, pj.quant.nf4(block_size=32), layout=layout)
  if method := _METHODS[name]:
    params = _drawn(params, method)
  pj.save_pretrained(tmp_path / "made", params, of=GOLDEN / base, shard_size=size)
  assert (tmp_path / "made" / "model.safetensors").exists() == (size == "5GB")
  want = _ours(model, params, base)
  _assert_near(_theirs(tmp_path / "made", base), want)
  if name != "none" or four_bits:
    assert np.abs(_theirs(GOLDEN / base, base) - want).max() > 1e-3
  again, dense = pj.load_pretrained(tmp_path / "made")
  assert not any(isinstance(x, Weight) for x in paths.leaves(dense).values())
  _assert_near(_ours(again, dense, base), want)


_OTHERS = {
  "ia3": ("bert_tiny", pj.ia3(["key", "value"], r".*/layers(_\d+)?/output/dense/kernel")),
  "vera": ("bert_tiny", pj.vera(6, ["query", "value"])),
  "adalora": ("llama_tiny", pj.adalora(2, 4, target_rank=1.0, targets=["q_proj", "down_proj"])),
  "loha": ("llama_tiny", pj.loha(2, 4, targets=["q_proj"])),
  "lokr": ("llama_tiny", pj.lokr(2, 4, targets=["q_proj"])),
  "tied table": ("qwen2_tiny", pj.lora(2, 4, ["embed_tokens", "q_proj"])),
  "gpt2's tied table": ("gpt2_tiny", pj.lora(2, 4, ["wte", "c_attn"])),
  "tables": ("bert_tiny", pj.lora(2, 4, ["word_embeddings", "position_embeddings"])),
}


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("name", _OTHERS)
def test_other_methods_and_tables(name, scan, tmp_path):
  base, method = _OTHERS[name]
  model, params = pj.load_pretrained(GOLDEN / base, scan_layers=scan)
  params = _drawn(params, method)
  pj.save_pretrained(tmp_path / "made", params, of=GOLDEN / base)
  want = _ours(model, params, base)
  _assert_near(_theirs(tmp_path / "made", base), want)
  assert np.abs(_theirs(GOLDEN / base, base) - want).max() > 1e-3


def test_an_untied_head_and_another_number_of_labels(tmp_path):
  model, params = pj.load_pretrained(GOLDEN / "qwen2_tiny")
  params = _drawn(pj.tree.untie(params), pj.unfreeze("lm_head/.*"))
  pj.save_pretrained(tmp_path / "untied", params, of=GOLDEN / "qwen2_tiny")
  _assert_near(_theirs(tmp_path / "untied", "qwen2_tiny"), _ours(model, params, "qwen2_tiny"))
  model, params = pj.load_pretrained(GOLDEN / "roberta_tiny", num_labels=5)
  names = [*"abcde"]
  pj.save_pretrained(tmp_path / "five", params, of=GOLDEN / "roberta_tiny", labels=names)
  _assert_near(_theirs(tmp_path / "five", "roberta_tiny"), _ours(model, params, "roberta_tiny"))
  assert classifier(tmp_path / "five").config.id2label == dict(enumerate(names))


def test_a_pipeline_of_transformers_takes_the_directory(tmp_path):
  source = tiny.model_dir(tmp_path / "source")
  _, params = pj.load_pretrained(source, num_labels=3)
  pj.save_pretrained(tmp_path / "made", params, of=source, labels=["x", "y", "z"])
  found = pipeline("text-classification", str(tmp_path / "made"))("market shares")
  assert found[0]["label"] in "xyz"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtypes(dtype, tmp_path):
  model, params = pj.load_pretrained(GOLDEN / "llama_tiny")
  pj.save_pretrained(tmp_path / "made", params, of=GOLDEN / "llama_tiny", dtype=dtype)
  theirs = decoder(tmp_path / "made")
  assert {str(x.dtype) for x in theirs.parameters()} == {f"torch.{dtype}"}
  rounded = jax.tree.map(lambda x: x.astype(dtype).astype(x.dtype), params)
  got = compute(theirs.float(), [_TOKENS]).logits.numpy()
  _assert_near(got, _ours(model, rounded, "llama_tiny"))


def test_a_gguf_file_becomes_a_directory(tmp_path):
  """SmolLM2, its tokenizer too."""
  path = samples.model("smollm2")
  model, params = pj.load_pretrained(path, scan_layers=True)
  pj.save_pretrained(tmp_path / "made", params, of=path, dtype="float32", shard_size="200MB")
  tokens = np.random.default_rng(0).integers(0, model.config.vocab, (1, 8), dtype=np.int32)
  want = jax.jit(lambda p: pj.apply(model, p, tokens))(params)
  _assert_near(compute(decoder(tmp_path / "made"), [tokens]).logits.numpy(), np.asarray(want))
  text = "Shares in the airline rose 12 % on Monday."
  ours = data.load_tokenizer(path).prompts([text], special=True)[0]
  theirs = AutoTokenizer.from_pretrained(tmp_path / "made")
  assert theirs(text)["input_ids"] == ours
  assert theirs.eos_token and theirs.chat_template


def test_a_gguf_file_that_is_written_gives_transformers_the_logits(tmp_path):
  base = gguf_files.model(tmp_path / "base.gguf", GOLDEN / "llama_tiny")
  model, params = pj.load_pretrained(base)
  params = _drawn(params, _METHODS["lora"])
  gguf_writer.write(tmp_path / "made.gguf", base, saved.plan(params, base).tensors)
  theirs = AutoModelForCausalLM.from_pretrained(
    tmp_path, gguf_file="made.gguf", attn_implementation="eager"
  )
  got = compute(theirs, [_TOKENS]).logits.numpy()
  _assert_near(got, _ours(model, params, "llama_tiny"))
