"""Directories of 4-bit models: transformers and bitsandbytes read ours, and we read theirs."""

import bitsandbytes.functional as bnb
import jax
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import peftjax as pj
from peftjax.core import paths
from peftjax.io.safetensors_dir import read_config
from peftjax.models import bnb as ours
from peftjax.models.families import FAMILIES
from peftjax.models.match import stack_of
from peftjax.quant.weight import Quantized
from tests.golden.make_bnb import CONFIG, bnb_model
from tests.golden.make_decoders import batch, make
from tests.parity.reference import assert_near

pytestmark = pytest.mark.parity

_GPT2 = {"vocab_size": 96, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 32}
_GPT2 |= {"bos_token_id": 0, "eos_token_id": 0}
_GPT2 |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def base(request, tmp_path_factory):
  """A dense model's directory."""
  directory = tmp_path_factory.mktemp(request.param)
  fields = CONFIG if request.param == "llama" else _GPT2
  make(request.param, fields, seed=0).save_pretrained(directory)
  return directory


_compiled = jax.jit(lambda leaf: leaf.materialize())


def _theirs(model):
  """Their dequantised weights [in, out], float32, by name; the model is not changed."""
  found = {}
  for name, module in model.named_modules():
    if type(module).__name__ == "Linear4bit":
      state = module.weight.quant_state
      found[f"{name}.weight"] = bnb.dequantize_4bit(module.weight.data, state).float().numpy().T
  return found


def _ours(params, model):
  """Our dequantised weights, float32, by the same names."""
  found = {}
  for path, leaf in paths.leaves(params).items():
    if isinstance(leaf, Quantized):
      dense = np.asarray(_compiled(leaf), np.float32)
      stack = stack_of(path, dense)
      name = FAMILIES[model.config.family].hf_name
      layers = paths.layer_paths(path, stack)
      found.update(zip(map(name, layers), dense if stack else [dense], strict=True))
  return found


def _assert_same(model, params, theirs):
  """The same weights bit for bit, but that FP4's −0 is 0 there; logits within 1e-4, in float32."""
  want, got = _theirs(theirs), _ours(params, model)
  assert set(got) == set(want) and len(want) >= 8
  for name, value in want.items():
    np.testing.assert_array_equal(got[name], value, name)
  inputs = batch(3)
  real = inputs["mask"] > 0
  mask = torch.from_numpy(inputs["mask"])
  with torch.no_grad():
    # Training mode: in evaluation bitsandbytes computes in bfloat16 on CPUs that can.
    logits = theirs.train()(
      input_ids=torch.from_numpy(inputs["tokens"]),
      attention_mask=mask,
      position_ids=(mask.cumsum(1) - 1).clamp(min=0),
    ).logits.numpy()
  run = jax.jit(lambda p: pj.apply(model, p, inputs["tokens"], inputs["mask"]))
  assert_near(np.asarray(run(params))[real], logits[real])


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_we_read_what_transformers_writes(base, kind, nested, scan, tmp_path):
  """Quantised and saved by them, in float32."""
  theirs = bnb_model(base, kind, nested)
  theirs.save_pretrained(tmp_path)
  model, params = pj.load_pretrained(tmp_path, scan_layers=scan)
  _assert_same(model, params, theirs)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(base, dtype, tmp_path):
  """Weights dequantise to the dtype they were quantised from, with the same rounding."""
  theirs = bnb_model(base, "nf4", True, dtype)
  theirs.save_pretrained(tmp_path)
  model, params = pj.load_pretrained(tmp_path)
  got, want = _ours(params, model), _theirs(theirs)
  assert set(got) == set(want)
  for name, value in want.items():
    np.testing.assert_array_equal(got[name], value, name)
  assert {leaf.dtype.name for leaf in paths.leaves(params).values()} == {dtype}


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize(
  "fmt",
  [pj.quant.nf4(), pj.quant.nf4(32, False), pj.quant.fp4(), pj.quant.fp4(128, False)],
  ids=str,
)
def test_transformers_reads_what_we_write(base, fmt, scan, tmp_path):
  """Quantised and saved by us."""
  model, params = pj.load_pretrained(base, scan_layers=scan, quant=fmt, where=_where(fmt))
  ours.save(tmp_path / "made", params, model, read_config(base))
  theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
  assert type(theirs.lm_head).__name__ == "Linear"
  _assert_same(model, params, theirs)


def _where(fmt):
  """What 192 inputs, of no block of 128, leaves out stays dense for transformers too."""
  return "all-linear" if fmt.block_size != 128 else r".*/(?!down_proj)\w+/kernel"
