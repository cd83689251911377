"""The command that writes a fine-tuned model in another format."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peftjax as pj
from peftjax.io.gguf import GGUFFile
from peftjax.training.predict import Predictor
from tests import gguf_files

GOLDEN = Path(__file__).parents[1] / "golden"
FLAGS = dict(
  workdir=None, base=None, adapter=None, dtype=None, shard_size="5GB", rank=None, output=""
)
TOKENS = np.arange(12, dtype=np.int32).reshape(2, 6)


def _drawn(base, method):
  """A model with an adapter whose trained arrays are drawn, and its mask."""
  model, params = pj.load_pretrained(base)
  attached = method.attach(jax.random.key(0), params)
  rng, mask = np.random.default_rng(3), method.trainable(attached)
  draw = lambda m, x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype) if m else x
  return model, jax.tree.map(draw, mask, attached), mask


def _logits(model, params):
  return np.asarray(jax.jit(lambda p: pj.apply(model, p, TOKENS))(params))


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
  """A PEFT directory of DoRA, and the logits with it."""
  made = tmp_path_factory.mktemp("adapted") / "dora"
  model, params, mask = _drawn(GOLDEN / "llama_tiny", pj.dora(3, 6, ["q_proj", "down_proj"]))
  pj.save_peft(made, params, model, trained=mask)
  return made, _logits(model, params)


def test_a_run_becomes_a_model_with_its_labels(trained, command, capsys, tmp_path):
  output = tmp_path / "made"
  command("convert", **{**FLAGS, "workdir": str(trained[0]), "format": "hf", "output": str(output)})
  assert capsys.readouterr().out == f"wrote {output}\n"
  model, params = pj.load_pretrained(output)
  predictor = Predictor(trained[0])
  np.testing.assert_allclose(
    _logits(model, params), _logits(predictor.model, predictor.params), atol=1e-5
  )
  config = json.loads((output / "config.json").read_text())
  assert list(config["id2label"].values()) == predictor.labels
  assert (output / "tokenizer.json").exists()


def test_a_run_becomes_a_peft_directory(trained, command, tmp_path):
  """The same as the run left behind itself."""
  given = {"workdir": str(trained[0]), "format": "peft", "output": str(tmp_path / "made")}
  command("convert", **{**FLAGS, **given})
  name = "adapter_model.safetensors"
  assert (tmp_path / "made" / name).read_bytes() == (trained[0] / "peft" / name).read_bytes()


def test_an_adapter_is_merged_into_its_base(adapted, command, tmp_path):
  files, want = adapted
  given = {"base": str(GOLDEN / "llama_tiny"), "adapter": str(files), "format": "hf"}
  command("convert", **{**FLAGS, **given, "output": str(tmp_path / "made")})
  model, params = pj.load_pretrained(tmp_path / "made")
  np.testing.assert_allclose(_logits(model, params), want, atol=1e-4)


@pytest.mark.slow(reason="four models are compiled")
def test_an_adapter_becomes_lora_with_its_errors(adapted, command, capsys, tmp_path):
  """At a rank that is enough nothing is lost; at a lower one what is printed."""
  files, want = adapted
  given = {"base": str(GOLDEN / "llama_tiny"), "adapter": str(files), "format": "lora"}
  model, params = pj.load_pretrained(GOLDEN / "llama_tiny")
  for rank in (48, 2):
    command("convert", **{**FLAGS, **given, "rank": rank, "output": str(tmp_path / str(rank))})
    loaded, _ = pj.load_peft(tmp_path / str(rank), params, model)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "relative error of each matrix:" and lines[-1].startswith("wrote ")
    errors = {path: float(error) for error, path in (line.split("\t") for line in lines[1:-1])}
    assert len(errors) == 4 and "model/layers_1/mlp/down_proj/kernel" in errors
    off = np.abs(_logits(model, loaded) - want).max()
    assert (off < 1e-3 and not any(errors.values())) if rank == 48 else all(errors.values())


@pytest.mark.slow(reason="four models are compiled")
def test_a_gguf_base_becomes_a_gguf_file(command, tmp_path):
  base = gguf_files.model(tmp_path / "base.gguf", GOLDEN / "llama_tiny")
  model, params, mask = _drawn(base, pj.lora(3, 6, ["q_proj", "k_proj"]))
  pj.save_peft(tmp_path / "lora", params, model, trained=mask)
  given = {"base": str(base), "adapter": str(tmp_path / "lora"), "format": "gguf"}
  output = str(tmp_path / "made.gguf")
  command("convert", **{**FLAGS, **given, "output": output})
  again, merged = pj.load_pretrained(output)
  np.testing.assert_allclose(_logits(again, merged), _logits(model, params), atol=1e-4)
  assert GGUFFile(output).config == GGUFFile(base).config
  command("convert", **{**FLAGS, **given, "output": f"{output}.gguf", "dtype": "bfloat16"})
  half = pj.load_pretrained(f"{output}.gguf")[1]["model"]["layers_0"]["self_attn"]["q_proj"]
  want = merged["model"]["layers_0"]["self_attn"]["q_proj"]["kernel"]
  np.testing.assert_array_equal(half["kernel"], want.astype(jnp.bfloat16).astype(jnp.float32))


_REFUSED = {
  "nothing": ({}, "write one of --workdir=DIR"),
  "both": ({"workdir": "a", "base": "b"}, "write one of --workdir=DIR"),
  "adapter of a run": ({"workdir": "a", "adapter": "b"}, "--adapter belongs to a --base"),
  "no adapter": ({"base": "b", "format": "peft"}, "--format=peft writes an adapter"),
  "no rank": ({"workdir": "a", "format": "lora"}, "--rank=R goes with --format=lora"),
  "rank": ({"workdir": "a", "rank": 3}, "--rank=R goes with --format=lora"),
  "dtype": ({"workdir": "a", "format": "peft", "dtype": "float16"}, "--dtype is for a whole model"),
  "size": ({"base": "b", "shard_size": "big"}, "shard_size is 'big'"),
  "no gguf file": ({"base": "b.gguf", "format": "gguf"}, "name one that ends in .gguf"),
  "gguf of a directory": (
    {"base": "b", "format": "gguf", "output": "c.gguf"},
    "convert_hf_to_gguf.py",
  ),
  "no run": ({"workdir": "not/there"}, "not/there holds no evaluated run"),
  "no base": ({"base": "not/there"}, "not/there"),
}


@pytest.mark.parametrize("name", _REFUSED)
def test_flags_that_are_refused(name, fails, tmp_path):
  given, told = _REFUSED[name]
  values = {**FLAGS, "format": "hf", "output": str(tmp_path / "made"), **given}
  assert told in fails("convert", **values)
  assert not list(tmp_path.iterdir())


def test_what_a_format_cannot_hold_is_refused(fails, tmp_path):
  """IA3 with biases is no LoRA; a virtual prompt is no weight. Nothing is left behind."""
  model, params, mask = _drawn(GOLDEN / "qwen2_tiny", pj.ia3(["k_proj"]))
  pj.save_peft(tmp_path / "ia3", params, model, trained=mask)
  model, params, mask = _drawn(GOLDEN / "qwen2_tiny", pj.prompt(2, init="normal"))
  pj.save_peft(tmp_path / "prompt", params, model, trained=mask)
  cases = (("ia3", "lora", "is a vector with IA3"), ("prompt", "hf", "cannot be merged"))
  for name, kind, told in cases:
    given = {"adapter": str(tmp_path / name), "format": kind, "rank": 2 if kind == "lora" else None}
    values = {**FLAGS, "base": str(GOLDEN / "qwen2_tiny"), **given}
    assert told in fails("convert", **{**values, "output": str(tmp_path / "made")})
  assert sorted(path.name for path in tmp_path.iterdir()) == ["ia3", "prompt"]
