"""PEFT directories of decoders: tables, heads, tied or not, and kernels that lie as `Conv1D`'s.

The `peft_decoder_*` directories were written by the real library (tests/golden/make_peft.py);
tests/parity does the same live, with many more.
"""

import json
import shutil
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import peftjax as pj
from peftjax import hf_peft
from peftjax.core import paths
from peftjax.core.tied import is_tied

_GOLDEN = Path(__file__).parents[1] / "golden"
_BASES = {
  "peft_decoder_square": "gpt2_tiny",
  "peft_decoder_tied": "qwen2_tiny",
  "peft_decoder_table_head": "llama_tiny",
}
_ROOT = "base_model.model."


def _load(name, scan=False):
  model, params = pj.load_pretrained(_GOLDEN / _BASES[name], scan_layers=scan)
  return model, params, *hf_peft.load(_GOLDEN / name, params, model)


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("name", _BASES)
def test_a_real_adapter_gives_pefts_logits_and_comes_back(name, scan, tmp_path):
  model, params, loaded, mask = _load(name, scan)
  want = load_file(_GOLDEN / name / "expected.safetensors")
  logits = jax.jit(lambda p: pj.apply(model, p, want["tokens"], want["mask"]))
  real = want["mask"].astype(bool)  # what stands at padding is no one's
  near = lambda got: np.testing.assert_allclose(
    np.asarray(got)[real], want["logits"][real], atol=2e-5, rtol=0
  )
  near(logits(loaded))
  if not scan and "tied" in name:  # a compilation each
    near(logits(pj.merge(loaded)))
    assert np.abs(np.asarray(logits(params))[real] - want["logits"][real]).max() > 0.1
  hf_peft.save(tmp_path, loaded, model, trained=mask, task_type="CAUSAL_LM")
  chex.assert_trees_all_equal(hf_peft.load(tmp_path, params, model), (loaded, mask))
  one, two = (load_file(d / "adapter_model.safetensors") for d in (_GOLDEN / name, tmp_path))
  assert {x for x in one if "base_layer" not in x} == set(two)  # the base has those already
  for key, value in two.items():
    np.testing.assert_array_equal(value, one[key], err_msg=key)


def _copy(name, directory, change=None, **fields):
  shutil.copytree(_GOLDEN / name, directory, dirs_exist_ok=True)
  config = directory / "adapter_config.json"
  config.write_text(json.dumps(json.loads(config.read_text()) | fields))
  if change:
    tensors = load_file(directory / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, directory / "adapter_model.safetensors")
  return directory


def test_a_table_that_lies_beside_its_adapter_is_its_base(tmp_path):
  """As peft loads it; it is then part of what came from the directory, and is written again."""
  name = f"{_ROOT}model.embed_tokens.base_layer.weight"
  model, params, _, _ = _load("peft_decoder_table_head")
  directory = _copy("peft_decoder_table_head", tmp_path, lambda t: t.update({name: t[name] + 1}))
  loaded, mask = hf_peft.load(directory, params, model)
  table = params["model"]["embed_tokens"]["embedding"]
  weight = loaded["model"]["embed_tokens"]["embedding"]
  np.testing.assert_array_equal(weight.base, table + 1)
  flags = mask["model"]["embed_tokens"]["embedding"]
  assert flags.base and flags.a and not flags.scale
  assert not mask["lm_head"]["kernel"].base
  hf_peft.save(tmp_path / "again", loaded, model, trained=mask, task_type="CAUSAL_LM")
  assert name in load_file(tmp_path / "again" / "adapter_model.safetensors")
  chex.assert_trees_all_equal(hf_peft.load(tmp_path / "again", params, model), (loaded, mask))


def test_of_a_tied_model_one_table_may_be_saved_and_the_head_stays(tmp_path):
  model, params, loaded, mask = _load("peft_decoder_tied")
  assert is_tied(params["lm_head"]["kernel"])
  old = params["model"]["embed_tokens"]["embedding"]
  np.testing.assert_array_equal(loaded["lm_head"]["kernel"], old.T)
  assert np.abs(loaded["model"]["embed_tokens"]["embedding"] - old).max() > 0.1
  assert mask["model"]["embed_tokens"]["embedding"] and not mask["lm_head"]["kernel"]


def test_head_and_table_that_are_to_stay_one_must_be_one(tmp_path):
  model, params, _, _ = _load("peft_decoder_tied")
  table, head = f"{_ROOT}model.embed_tokens.weight", f"{_ROOT}lm_head.weight"

  def both(add):
    return lambda t: t.update({head: t[table] + add})

  tie = {"ensure_weight_tying": True}
  directory = _copy("peft_decoder_tied", tmp_path / "one", both(0), **tie)
  loaded, mask = hf_peft.load(directory, params, model)
  assert is_tied(loaded["lm_head"]["kernel"])
  hf_peft.save(tmp_path / "again", loaded, model, trained=mask, task_type="CAUSAL_LM")
  assert head in load_file(tmp_path / "again" / "adapter_model.safetensors")
  chex.assert_trees_all_equal(hf_peft.load(tmp_path / "again", params, model), (loaded, mask))
  directory = _copy("peft_decoder_tied", tmp_path / "two", both(1), **tie)
  with pytest.raises(ValueError, match="lm_head.weight differ, and ensure_weight_tying"):
    hf_peft.load(directory, params, model)
  # Without it peft has two.
  directory = _copy(
    "peft_decoder_tied", tmp_path / "3", both(1), modules_to_save=["embed_tokens", "lm_head"]
  )
  loaded, _ = hf_peft.load(directory, params, model)
  embed = loaded["model"]["embed_tokens"]["embedding"]
  np.testing.assert_array_equal(loaded["lm_head"]["kernel"], embed.T + 1)


def test_a_resized_vocabulary_is_told(tmp_path):
  model, params, _, _ = _load("peft_decoder_tied")
  table = f"{_ROOT}model.embed_tokens.weight"
  directory = _copy(
    "peft_decoder_tied",
    tmp_path,
    lambda t: t.update({table: np.ones((97, 48), np.float32)}),
    modules_to_save=None,
  )
  with pytest.raises(ValueError, match=r"embed_tokens.*\(97, 48\).*\(96, 48\).*resized"):
    hf_peft.load(directory, params, model)


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_what_a_decoder_trains_beside_its_adapter_comes_back(scan, tmp_path):
  """Norms, biases, kernels as `Conv1D` has them, and the table that the head is tied to."""
  model, params = pj.load_pretrained(_GOLDEN / "gpt2_tiny", scan_layers=scan)
  method = pj.chain(
    pj.lora(2, 4, "c_fc"), pj.unfreeze([".*ln_f/.*", ".*attn/c_proj/bias", ".*wte/embedding"])
  )
  layout = pj.linen.layout(model, np.zeros((1, 4), np.int32))
  attached = method.attach(jax.random.key(0), params, layout)
  mask = method.trainable(attached)
  rng = np.random.default_rng(0)
  new = lambda m, x: jnp.asarray(rng.normal(size=x.shape), x.dtype) if m else x
  attached = jax.tree.map(new, mask, attached)
  hf_peft.save(tmp_path, attached, model, trained=mask)
  config = json.loads((tmp_path / "adapter_config.json").read_text())
  projections = [f"transformer.h.{i}.attn.c_proj" for i in (0, 1)]
  rest = ["transformer.ln_f", "transformer.wte"]
  assert config["modules_to_save"] == ["lm_head", *projections, *rest]
  assert config["fan_in_fan_out"] and config["task_type"] == "CAUSAL_LM"
  stored = load_file(tmp_path / "adapter_model.safetensors")
  kernel = params["transformer"]["layers" if scan else "layers_1"]["attn"]["c_proj"]["kernel"]
  name = f"{_ROOT}{projections[1]}.weight"
  np.testing.assert_array_equal(stored[name], kernel[1] if scan else kernel)
  loaded, _ = hf_peft.load(tmp_path, params, model)
  assert config["ensure_weight_tying"] and is_tied(loaded["lm_head"]["kernel"])
  for path, leaf in paths.leaves(attached).items():
    chex.assert_trees_all_equal(paths.leaves(loaded)[path], leaf)


def test_an_adapter_on_a_quantised_base():
  """Its kernels have the shapes of those they stand for; the head is that of the dense table."""
  model, params, loaded, _ = _load("peft_decoder_tied")
  packed = pj.quantize(params, pj.quant.nf4(), where="all-linear")
  got, _ = hf_peft.load(_GOLDEN / "peft_decoder_tied", packed, model)
  weight, plain = (x["model"]["layers_1"]["self_attn"]["k_proj"]["kernel"] for x in (got, loaded))
  assert isinstance(weight.base, pj.Weight)
  np.testing.assert_array_equal(weight.a, plain.a)
  np.testing.assert_array_equal(got["lm_head"]["kernel"], loaded["lm_head"]["kernel"])


def test_an_adapter_of_a_bare_decoder(tmp_path):
  """Saved from `AutoModel`: its modules do not name the body."""
  model, params, loaded, _ = _load("peft_decoder_tied")
  bare = lambda t: [t.update({k.replace(".model.model.", ".model."): t.pop(k)}) for k in list(t)]
  directory = _copy("peft_decoder_tied", tmp_path, bare, task_type="FEATURE_EXTRACTION")
  got, _ = hf_peft.load(directory, params, model)
  chex.assert_trees_all_equal(got["model"], loaded["model"])
