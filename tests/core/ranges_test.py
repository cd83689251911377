"""Numbers in range: of every function that takes some."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import peftjax as pj
from peftjax import optim

NAN, INF = float("nan"), float("inf")
FUNCTIONS = {
  "lora": (pj.lora, dict(rank=(0, True, 2.0, "8"), alpha=(NAN, -1.0, 0, INF), b_rate=(NAN, INF))),
  "lora's patterns": (
    pj.lora,
    dict(rank_pattern=({"q": 0}, {"q": 1.5}, ["q"]), alpha_pattern=({"q": NAN}, {"q": "8"})),
  ),
  "dora": (pj.dora, dict(rank=(0,), dropout=(NAN, 1.0), from_quantised=("no",), rslora=(1,))),
  "adalora": (
    pj.adalora,
    dict(
      rank=(0, 2.5), target_rank=(-1, NAN, "8"), interval=(0, 1.5), gamma=(NAN, INF, -0.1),
      beta1=(1.0, NAN), beta2=(-0.1,), warmup=(-1, INF), final=(NAN,), seed=(-1, 2**31),
    ),
  ),
  "ia3": (lambda **k: pj.ia3(**{"outputs": "key", **k}), dict(outputs=(3, [1]), inputs=(True,))),
  "adapters": (pj.adapters, dict(size=(0, 1.0, True, 2**40), scale=(0.0, NAN, -1), norms=(1,))),
  "vera": (
    pj.vera,
    dict(rank=(0, True), d_initial=(NAN, INF, "x"), dropout=(1,), projection_seed=(-1, 0.5)),
  ),
  "prefix": (pj.prefix, dict(length=(0, 2.0, True, 10**9), deviation=(NAN, -1.0))),
  "prompt": (pj.prompt, dict(length=(0, "20"))),
  "unfreeze": (pj.unfreeze, dict(targets=(3, None))),
  "adamw": (
    lambda **k: optim.adamw(**{"learning_rate": 1e-3, **k}),
    dict(
      learning_rate=(NAN, -1.0, INF, "1", True, None), b1=(1.0, 1e9, NAN), b2=(-1,),
      eps=(0, INF, NAN), weight_decay=(NAN, -0.1, INF),
    ),
  ),
  "adamw8bit": (
    lambda **k: optim.adamw8bit(**{"learning_rate": 1e-3, **k}),
    dict(learning_rate=(NAN, -1.0), b1=(1.0,), eps=(NAN,), min_8bit_size=(-1,)),
  ),
  "schedule": (
    lambda **k: optim.schedule(**{"kind": "linear", "peak": 1.0, "total_steps": 9, **k}),
    dict(peak=(NAN, -1.0, INF), total_steps=(0, 1.5, True), warmup_steps=(0.5, "1")),
  ),
  "at_rate": (lambda **k: optim.at_rate(optax.sgd(1.0), **k), dict(rate=(NAN, -1.0))),
  "optimizer": (
    lambda **k: pj.lora().optimizer(optax.sgd(1.0), **{"total_steps": 9, **k}),
    dict(
      total_steps=(0, 2.0, True), clip_norm=(-1, 0.0, NAN, INF), accumulate=(0, 1.5, True),
      batches=(0, 2.5),
    ),
  ),
  "wrap": (
    lambda **k: optim.wrap(optax.sgd(1.0), **{"clip_norm": None, "accumulate": 1, **k}),
    dict(clip_norm=(-1, NAN), accumulate=(0, True)),
  ),
  "nf4": (pj.quant.nf4, dict(block_size=(64.0, True, "64"), double_quant=("no", 1))),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_arguments_out_of_range_are_named(name):
  function, cases = FUNCTIONS[name]
  function() if name not in ("unfreeze", "at_rate") else None
  for argument, values in cases.items():
    for value in values:
      with pytest.raises(ValueError, match=rf"^{argument}=.*: write (a|true)"):
        function(**{argument: value})


def test_numbers_of_numpy_are_numbers_and_arrays_of_jax_may_be():
  """A learning rate that is injected is traced."""
  assert pj.lora(np.int64(4), np.float32(8)).rank == 4
  optim.adamw(np.float64(1e-3), b1=np.float32(0.5))
  tx = optax.inject_hyperparams(optim.adamw)(learning_rate=1e-3, b1=0.5)
  params = {"x": jnp.ones(2)}
  updates, _ = tx.update(params, tx.init(params), params)
  np.testing.assert_allclose(updates["x"], -1e-3, rtol=1e-5)


def test_batches_that_are_not_the_updates_are_refused():
  optimizer = lambda total, n: pj.lora().optimizer(optax.sgd(1.0), total, accumulate=4, batches=n)
  with pytest.raises(ValueError, match="7 batches, 4 to an update, are 2 updates and not .*=1"):
    optimizer(1, 7)
  optimizer(2, 7)
