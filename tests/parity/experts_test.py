"""peft loads adapters of experts that `pj.save_peft` wrote; what it writes itself is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft import LoraConfig, PeftModel, get_peft_model

import peftjax as pj
from peftjax import hf_peft
from tests.parity.reference import GOLDEN, compute, decoder, inputs

pytestmark = [
  pytest.mark.parity,
  pytest.mark.filterwarnings("ignore"),  # peft's, of patterns that it makes itself
]
_TOKENS = inputs(96, length=9)[0][:2]
METHODS = {
  "all-linear": pj.lora(2, 4, "all-linear"),
  "divided": pj.lora(6, 4, "all-linear", divide_rank=True),
  "down": pj.lora(2, 4, [".*/experts/down_proj/kernel", "q_proj"]),
  "router": pj.lora(2, 4, [".*/experts/.*", "router"]),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("base", ["qwen3_moe_tiny", "mixtral_tiny"])
def test_adapters_of_experts_have_the_same_logits_in_peft(base, name, tmp_path):
  """It turns a module for each expert into its own `target_parameters`."""
  model, params = pj.load_pretrained(GOLDEN / base, scan_layers=True)
  method, rng = METHODS[name], np.random.default_rng(3)
  attached = method.attach(jax.random.key(0), params)
  draw = lambda m, x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype) if m else x
  live = jax.tree.map(draw, method.trainable(attached), attached)
  hf_peft.save(tmp_path, live, model, task_type="CAUSAL_LM")
  want = np.asarray(jax.jit(lambda p: pj.apply(model, p, _TOKENS))(live))
  theirs = PeftModel.from_pretrained(decoder(GOLDEN / base), tmp_path)
  got = compute(theirs, [_TOKENS]).logits.numpy()
  np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max(), rtol=0)
  assert np.abs(compute(decoder(GOLDEN / base), [_TOKENS]).logits.numpy() - want).max() > 0.05


def test_pefts_own_files_of_experts_are_refused_by_their_field(tmp_path):
  fields = dict(target_modules=["q_proj"], target_parameters=["experts.down_proj"])
  get_peft_model(decoder(GOLDEN / "mixtral_tiny"), LoraConfig(**fields)).save_pretrained(tmp_path)
  model, params = pj.load_pretrained(GOLDEN / "mixtral_tiny")
  with pytest.raises(ValueError, match="target_parameters"):
    hf_peft.load(tmp_path, params, model)
