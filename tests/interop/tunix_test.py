"""Tunix's own models and trainer, their code untouched: adapted, trained a step, merged."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import peftjax as pj
from peftjax.core import paths
from tests.core.programs import producers

qwen3 = pytest.importorskip("tunix.models.qwen3.model", reason="needs google-tunix")
peft_trainer = pytest.importorskip("tunix.sft.peft_trainer", reason="needs google-tunix")

# Tunix still reads `Param.value`; what it imports has warnings of its own.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")

IDS = jnp.asarray(np.random.default_rng(0).integers(1, 32, (2, 6)))
POSITIONS = jnp.tile(jnp.arange(6), (2, 1))
MASK = jnp.tril(jnp.ones((2, 6, 6), bool))
INPUTS = (IDS, POSITIONS, None, MASK)
SIZES = dict(
  num_layers=2,
  vocab_size=32,
  embed_dim=16,
  hidden_dim=24,
  num_heads=2,
  head_dim=8,
  num_kv_heads=1,
  rope_theta=10_000,
  norm_eps=1e-6,
)
MODELS = {
  "qwen3": {},
  "qwen3, tied, remat": dict(use_tied_embedding=True, remat_config=qwen3.RematConfig.BLOCK),
  "qwen3-moe": dict(num_experts=3, num_experts_per_tok=2),
}
ALL = "all-linear"
# How each is trained: a method, and its optimizer of a model.
PLAIN = lambda model, method: optax.adam(1e-2)
OWN = lambda model, method: pj.nnx.optimizer(model, method.optimizer(optax.adam(1e-2), 20))
METHODS = {
  "lora": (pj.lora(2, targets=ALL), PLAIN),
  "dora": (pj.dora(2, targets=ALL), PLAIN),
  "vera": (pj.vera(4, targets=ALL), PLAIN),
  "adalora": (pj.adalora(2, target_rank=1, targets=ALL), OWN),
}


def build(name):
  """The model, its arrays neither zero nor one."""
  rng = np.random.default_rng(0)
  model = qwen3.Qwen3(qwen3.ModelConfig(**SIZES, **MODELS[name]), rngs=nnx.Rngs(0))
  draw = lambda x: jnp.asarray(0.2 * rng.standard_normal(x.shape) + (x.ndim == 1), x.dtype)
  nnx.update(model, jax.tree.map(draw, nnx.state(model, nnx.Param)))
  return model


def base(model):
  return {path: np.asarray(x[...]) for path, x in nnx.to_flat_state(nnx.state(model, pj.nnx.base))}


def train(model, tx, steps=2, **config):
  """By Tunix's own trainer."""
  config = peft_trainer.TrainingConfig(eval_every_n_steps=100, max_steps=steps, **config)
  trainer = peft_trainer.PeftTrainer(model, tx, config)
  trainer.with_gen_model_input_fn(
    lambda x: dict(
      input_tokens=x.input_tokens,
      input_mask=x.input_mask,
      positions=POSITIONS,
      attention_mask=MASK,
    )
  )
  batch = peft_trainer.TrainingInput(input_tokens=IDS, input_mask=jnp.ones((2, 6)))
  trainer.train([batch] * steps)
  trainer.close()


CASES = [*((name, "lora") for name in MODELS), *(("qwen3-moe", method) for method in METHODS)]


@pytest.mark.parametrize(("name", "method"), list(dict.fromkeys(CASES)))
def test_tunix_trains_what_was_attached(name, method):
  """By its `PeftTrainer`; then merged, it is the same model of its own classes."""
  model, plain = build(name), build(name)
  before = model(*INPUTS)[0]
  how, make = METHODS[method]
  pj.nnx.attach(jax.random.key(0), model, how, *INPUTS)
  np.testing.assert_allclose(model(*INPUTS)[0], before, rtol=1e-4, atol=1e-5)
  kinds = {path: type(leaf).__name__ for path, leaf in paths.leaves(pj.nnx.params(model)).items()}
  adapted = {path for path, kind in kinds.items() if kind in ("LoRA", "DoRA", "VeRA", "SVDLoRA")}
  experts = {"layers/0/mlp/gate_proj", "layers/1/mlp/down_proj", "layers/0/mlp/router/kernel"}
  assert {"layers/0/attn/q_proj/w", "layers/1/attn/o_proj/w"} <= adapted
  assert (experts <= adapted) == (name == "qwen3-moe")
  assert not {"lm_head/w", "embedder/input_embedding"} & adapted
  frozen = base(model)
  train(model, make(model, how))
  after = base(model)
  assert frozen.keys() == after.keys()
  assert all((frozen[path] == after[path]).all() for path in frozen)
  y = model(*INPUTS)[0]
  assert np.abs(y - before).max() > 1e-3
  pj.nnx.merge(model)
  assert nnx.graphdef(model) == nnx.graphdef(plain)
  np.testing.assert_allclose(model(*INPUTS)[0], y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_no_equation_has_the_shape_of_a_weight(name):
  """Law 11, forward and backward; a stack of experts is sliced as the model slices it."""
  model = build(name)
  pj.nnx.attach(jax.random.key(0), model, METHODS["lora"][0], *INPUTS)
  leaves = paths.leaves(pj.nnx.params(model)).values()
  shapes = {x.shape for x in leaves if isinstance(x, pj.Weight)}
  graph, trained, rest = nnx.split(model, pj.nnx.Trained, ...)
  loss = lambda t: (nnx.merge(graph, t, rest, copy=True)(*INPUTS)[0] ** 2).sum()
  assert producers(jax.value_and_grad(loss), shapes, trained) == []


def test_qlora_goes_on_from_a_checkpoint_of_tunix(tmp_path):
  """Two steps and two more are four; of the model it keeps what is trained alone."""
  where = dict(quant=pj.quant.nf4(block_size=32), where=".*/mlp/.*")

  def adapted():
    return pj.nnx.attach(jax.random.key(0), build("qwen3"), METHODS["lora"][0], *INPUTS, **where)

  whole, first, second = adapted(), adapted(), adapted()
  kinds = [row.type for row in pj.describe(pj.nnx.params(whole))]
  assert kinds.count("LoRA(Quantized)") == 6 and kinds.count("LoRA") == 8
  train(whole, optax.adam(1e-2), 4)
  train(first, optax.adam(1e-2), 2, checkpoint_root_directory=str(tmp_path))
  assert max(path.name for path in tmp_path.iterdir() if path.name.isdigit()) == "2"
  train(second, optax.adam(1e-2), 4, checkpoint_root_directory=str(tmp_path))
  np.testing.assert_allclose(second(*INPUTS)[0], whole(*INPUTS)[0], rtol=1e-4, atol=1e-5)
  assert np.abs(second(*INPUTS)[0] - first(*INPUTS)[0]).max() > 1e-3
