"""Trained norms go to peft's `LNTuningConfig` and come from it, with the same logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft import LNTuningConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file

import peftjax as pj
from tests.golden.make_bert import draw
from tests.parity.reference import GOLDEN, assert_near, classifier, compute, decoder, inputs

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

_BATCHES = {"bert_tiny": inputs(120), "roberta_tiny": inputs(120, pad=1, types=1)}
_CASES = [
  ("bert_tiny", {"target_modules": ["LayerNorm"], "task_type": "SEQ_CLS"}),
  ("bert_tiny", {"target_modules": ["output.LayerNorm"], "modules_to_save": ["pooler"]}),
  ("roberta_tiny", {"target_modules": r".*layer\.1.*LayerNorm", "task_type": "SEQ_CLS"}),
  ("llama_tiny", {"target_modules": ["input_layernorm", "norm"], "task_type": "CAUSAL_LM"}),
  ("qwen2_tiny", {"target_modules": ["norm"], "exclude_modules": ["layers"]}),
  ("gpt2_tiny", {"target_modules": ["ln_1", "ln_f"], "task_type": "CAUSAL_LM"}),
]


def _base(base):
  return (classifier if base in _BATCHES else decoder)(GOLDEN / base)


def _batch(base):
  return _BATCHES.get(base) or [inputs(96, length=9)[0][:2]]


def _logits(model, base):
  return compute(model, _batch(base)).logits.numpy()


def _ours(model, params, base):
  return np.asarray(jax.jit(lambda p: pj.apply(model, p, *_batch(base)))(params))


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("base, fields", _CASES, ids=lambda x: str(x)[:40])
def test_pefts_in_ours_and_back(base, fields, scan, tmp_path):
  theirs = get_peft_model(_base(base), LNTuningConfig(**fields))
  draw(theirs, 5, "ln_tuning_layers")
  draw(theirs, 6, "modules_to_save")
  theirs.save_pretrained(tmp_path / "theirs")
  want = _logits(PeftModel.from_pretrained(_base(base), tmp_path / "theirs"), base)
  assert np.abs(_logits(_base(base), base) - want).max() > 0.01
  model, params = pj.load_pretrained(GOLDEN / base, scan_layers=scan)
  loaded, mask = pj.load_peft(tmp_path / "theirs", params, model)
  assert_near(_ours(model, loaded, base), want)
  pj.save_peft(tmp_path / "ours", loaded, model, trained=mask)
  again = PeftModel.from_pretrained(_base(base), tmp_path / "ours")
  assert_near(_logits(again, base), want)
  one, two = (load_file(tmp_path / x / "adapter_model.safetensors") for x in ("theirs", "ours"))
  if not scan:  # a mask over a stack has all of its layers
    assert {*one} <= {*two}
  for name, value in one.items():
    np.testing.assert_array_equal(two[name], value, err_msg=name)


@pytest.mark.parametrize("base, norms", [("bert_tiny", "LayerNorm"), ("llama_tiny", "norm")])
def test_unfrozen_norms_in_peft(base, norms, tmp_path):
  model, params = pj.load_pretrained(GOLDEN / base)
  method = pj.unfreeze(rf".*{norms}/(scale|bias)")
  rng, mask = np.random.default_rng(0), method.trainable(params)
  move = lambda m, x: x + jnp.asarray(rng.normal(size=x.shape), x.dtype) if m else x
  params = jax.tree.map(move, mask, params)
  pj.save_peft(tmp_path, params, model, trained=mask)
  theirs = PeftModel.from_pretrained(_base(base), tmp_path)
  assert_near(_ours(model, params, base), _logits(theirs, base))
  assert theirs.peft_config["default"].peft_type == "LN_TUNING"
