"""AdamW with 8-bit moments: codes, updates and losses are those of bitsandbytes on a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from peftjax.optim import Moment, adamw8bit
from tests.golden import make_adamw8bit as reference

pytestmark = pytest.mark.parity

_SETTINGS = {
  "learning_rate": reference.SETTINGS["lr"],
  "weight_decay": reference.SETTINGS["weight_decay"],
}


@pytest.mark.parametrize("shape", [(300, 333), (128, 256), (4097,)], ids=str)
@pytest.mark.parametrize("way", ["nearest", "table"])
def test_a_step_from_its_state(way, shape):
  """Four steps, each from bitsandbytes' state: codes where it takes the nearest, updates always."""
  start, grads = reference.problem(4, shape)
  with reference.reference(way):
    theirs = reference.run(start, grads)
  tx = adamw8bit(**_SETTINGS)
  update = jax.jit(tx.update)
  state = tx.init({"kernel": start})
  for t, grad in enumerate(grads):
    if t:
      mu, nu = (
        {"kernel": Moment(theirs[f"state{i}"][t - 1], theirs[f"abs{i}"][t - 1])} for i in (1, 2)
      )
      state = (state[0].replace(mu=mu, nu=nu), *state[1:])
    before = theirs["params"][t - 1] if t else start
    updates, state = update({"kernel": grad}, state, {"kernel": before})
    change = theirs["params"][t] - before
    assert np.linalg.norm(updates["kernel"] - change) < 1e-4 * np.linalg.norm(change)
    for i, moment in ((1, state[0].mu["kernel"]), (2, state[0].nu["kernel"])):
      np.testing.assert_allclose(moment.absmax, theirs[f"abs{i}"][t], rtol=1e-6)
      if way == "nearest":
        distance = np.abs(np.int32(moment.codes) - theirs[f"state{i}"][t])
        # Within an ulp of the middle between two values, which is none of float32's, both are near.
        assert distance.max() <= 1 and distance.sum() <= 3


@pytest.mark.parametrize("way", ["nearest", "table"])
def test_a_hundred_losses(way):
  """Within 1 % all the way."""
  x, y, first, second = reference.regression()
  params = {"first": {"kernel": first}, "second": {"kernel": second}}
  tx = adamw8bit(**_SETTINGS)
  state = tx.init(params)

  def loss_fn(p):
    return jnp.square(jnp.tanh(x @ p["first"]["kernel"]) @ p["second"]["kernel"] - y).mean()

  @jax.jit
  def step(params, state):
    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss

  with reference.reference(way):
    theirs = reference.losses()
  ours = []
  for _ in theirs:
    params, state, loss = step(params, state)
    ours.append(float(loss))
  np.testing.assert_allclose(ours, theirs, rtol=1e-2)
