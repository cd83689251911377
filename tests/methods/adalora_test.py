"""AdaLoRA: the penalty, the budget, the allocator against PEFT's, and what is left in the end."""

import math
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

import peftjax as pj
from peftjax.core import paths
from peftjax.core.layout import Axes
from peftjax.methods import budget
from peftjax.methods.adalora_ranks import kept
from peftjax.methods.allocator import AllocatorState, weights
from peftjax.methods.orthogonality import penalty
from peftjax.quant.weight import Quantized
from tests.core.programs import jit

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "adalora.safetensors")
KEY = jax.random.key(0)
SHAPES = {"l0": (12, 8), "l1": (8, 20), "l2": (20, 6)}
RANK, STEPS, LR = 4, 24, 0.1


def problem():
  """As in tests/golden/make_adalora.py, which needs torch."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.standard_normal(shape, np.float32)
  factors = lambda n_in, n_out: dict(a=draw(RANK, n_in), b=draw(n_out, RANK), e=draw(RANK))
  start = {name: factors(*shape) for name, shape in SHAPES.items()}
  return start, [{name: factors(*shape) for name, shape in SHAPES.items()} for _ in range(STEPS)]


def base():
  return {name: {"kernel": jnp.ones(shape)} for name, shape in SHAPES.items()}


def method(**changes):
  settings = dict(warmup=4, final=6, interval=2, gamma=0.0, beta1=0.85, beta2=0.8)
  return pj.adalora(RANK, 8.0, list(SHAPES), target_rank=2, **{**settings, **changes})


def attached(m=None):
  """The base with the golden's factors, split in two."""
  m = m or method()
  params = m.attach(KEY, base())
  start, _ = problem()
  for name, factors in start.items():
    factors = factors if params[name]["kernel"].e is not None else {**factors, "e": None}
    params[name]["kernel"] = params[name]["kernel"].replace(
      **{part: None if x is None else jnp.asarray(x) for part, x in factors.items()}
    )
  return pj.partition(params, m.trainable(params))


def as_grads(train, given):
  """Arrays by layer and factor in the structure of `train`."""
  return {
    name: {
      "kernel": node["kernel"].replace(
        **{part: x for part, x in given[name].items() if getattr(node["kernel"], part) is not None}
      )
    }
    for name, node in train.items()
  }


def run(m, gradients, lr=LR, accumulate=1, clip_norm=None, tx=optax.sgd):
  """Trained trees and allocator states after each step of gradient descent, or of another `tx`."""
  train, _ = attached(m)
  tx = m.optimizer(tx(lr), STEPS, accumulate=accumulate, clip_norm=clip_norm)
  state = tx.init(train)

  @jit
  def step(train, state, grads):
    updates, state = tx.update(grads, state, train)
    return optax.apply_updates(train, updates), state

  seen = []
  for given in gradients:
    train, state = step(train, state, as_grads(train, given))
    seen.append((train, state))
  return seen


@pytest.fixture(scope="module")
def golden_run():
  return run(method(), problem()[1])


def alive(train):
  return {path: np.asarray(w.e) != 0 for path, w in weights(train).items()}


def scores(state):
  """Equations 9 and 13 in NumPy."""
  found = {}
  for path, mean in state.mean.items():
    spread = state.spread[path]
    s = {part: np.asarray(getattr(mean, part) * getattr(spread, part)) for part in "abe"}
    found[path] = s["e"] + s["a"].mean(-1) + s["b"].mean(-2)
  return found


def test_masks_and_scores_equal_pefts_step_for_step(golden_run):
  """λ after each of 24 steps, and S where it was ranked, on the same gradients."""
  for step, (train, state) in enumerate(golden_run):
    for name in SHAPES:
      want = GOLDEN[f"e_{name}"][step]
      got = np.asarray(train[name]["kernel"].e)
      np.testing.assert_array_equal(got != 0, want != 0, err_msg=f"{name}, step {step}")
      np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
      score = GOLDEN[f"score_{name}"][step]
      if np.isfinite(score).all():
        np.testing.assert_allclose(scores(state)[f"{name}/kernel"], score, rtol=1e-4)


def test_as_many_triplets_are_left_as_the_budget_says(golden_run):
  """At every allocation; in between masked ones learn again; at the end the choice is fixed."""
  counts = [sum(int(x.sum()) for x in alive(train).values()) for train, _ in golden_run]
  budgets = [int(state.budget) for _, state in golden_run]
  for step, (count, b) in enumerate(zip(counts, budgets, strict=True)):
    masked = step > 4 and (step % 2 == 0 or step >= 18)
    assert count == (b if masked else 12)
  assert budgets[4] == 12 and budgets[18:] == [6] * 6
  chex.assert_trees_all_equal(*[alive(train) for train, _ in golden_run[18:]])
  assert len({tuple(np.concatenate(list(alive(t).values()))) for t, _ in golden_run[6:18:2]}) > 1


def test_only_lambda_is_masked(golden_run):
  """P and Q are those of plain gradient descent."""
  start, gradients = problem()
  for name in SHAPES:
    for part in ("a", "b"):
      want = start[name][part] - LR * sum(g[name][part] for g in gradients)
      got = getattr(golden_run[-1][0][name]["kernel"], part)
      np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_a_masked_triplet_can_come_back(golden_run):
  """λ, masked at one allocation, is left at a later one."""
  at = [np.concatenate(list(alive(train).values())) for train, _ in golden_run[6:18:2]]
  assert any((~one & two).any() for one, two in zip(at, at[1:], strict=False))


def test_a_zeroed_triplet_has_no_gradient_and_can_come_back_only_if_redrawn():
  """With P, λ and Q at zero, each one's gradient has a factor of zero.

  By gradient descent without momentum, which would carry them away from zero once more.
  """
  x = 1e-3 * jax.random.normal(KEY, (5, 12))

  def train_for(regrow):
    m = method(regrow=regrow, gamma=0.01)
    train, frozen = attached(m)
    tx = m.optimizer(optax.sgd(0.05), STEPS)
    state, dead, back = tx.init(train), np.zeros(12, bool), 0

    @jit
    def step(train, state):
      def loss(t):
        h = x
        for layer in pj.combine(t, frozen).values():
          h = pj.einsum("bi,io->bo", h, layer["kernel"])
        return h.mean()

      updates, state = tx.update(jax.grad(loss)(train), state, train)
      return optax.apply_updates(train, updates), state

    for i in range(STEPS):
      train, state = step(train, state)
      now = np.concatenate(list(alive(train).values()))
      if 4 < i < 18 and i % 2 == 0:
        dead = ~now
      elif 4 < i < 18:
        back += int((dead & now).sum())
    return back

  assert train_for("zero") == 0
  assert train_for("random") > 20
  assert train_for("kept") > 20


def test_redrawn_factors_have_the_deviation_they_start_with():
  """P and Q of masked triplets, until the final steps; the others learn on."""
  seen = run(method(regrow="random"), problem()[1], lr=1e-9)
  before, after = seen[15][0], seen[16][0]
  for path, w in weights(after).items():
    on = np.asarray(w.e) != 0
    np.testing.assert_allclose(w.a[on], weights(before)[path].a[on], atol=1e-6)
    assert (~on).any() and np.abs(w.a[~on]).max() < 0.1 and np.abs(w.b[:, ~on]).max() < 0.1
  chex.assert_trees_all_close(seen[17][0], seen[23][0], atol=1e-6)


@pytest.mark.parametrize("kind", ["squared", "norm"])
@pytest.mark.parametrize("stack", [(), (3,)])
def test_the_penaltys_gradient_is_its_derivative(kind, stack):
  """In closed form against autodiff, with a row of padding, which has none."""
  keys = jax.random.split(KEY)
  valid = jnp.broadcast_to(jnp.arange(5) < 4, (*stack, 5))
  p = jax.random.normal(keys[0], (*stack, 9, 5)) * valid[..., None, :]
  q = jax.random.normal(keys[1], (*stack, 5, 7)) * valid[..., :, None]

  def value(p, q):
    p, q = p[..., :4], q[..., :4, :]
    grams = (jnp.swapaxes(p, -1, -2) @ p, q @ jnp.swapaxes(q, -1, -2))
    off = [g - jnp.broadcast_to(jnp.eye(4), g.shape) for g in grams]
    norms = [jnp.linalg.norm(x, axis=(-1, -2)) for x in off]
    return sum((n**2 if kind == "squared" else n).sum() for n in norms)

  got, to_p, to_q = penalty(kind, p, q, valid)
  want, (want_p, want_q) = jax.value_and_grad(value, argnums=(0, 1))(p, q)
  chex.assert_trees_all_close((got, to_p, to_q), (want, want_p, want_q), rtol=1e-5, atol=1e-5)
  orthogonal = jnp.broadcast_to(jnp.eye(5), (*stack, 5, 5)) * valid[..., None, :]
  value, to_p, to_q = penalty(kind, orthogonal, orthogonal, valid)
  assert value == 0 and not np.any(to_p) and not np.any(to_q)


@pytest.mark.parametrize(("kind", "factor"), [("squared", 1.0), ("norm", 1 / 6)])
def test_the_penalty_is_in_the_gradient_and_its_value_in_the_state(kind, factor):
  """γ times its gradient, of the sum over matrices or, of norms, the mean over factors."""
  zero = jax.tree.map(np.zeros_like, problem()[1][0])
  train, _ = attached()
  parts = {p: penalty(kind, w.b, w.a, jnp.ones(RANK, bool)) for p, w in weights(train).items()}
  ((after, state),) = run(method(penalty=kind, gamma=0.3), [zero], lr=0.01)
  np.testing.assert_allclose(state.penalty, factor * sum(x[0] for x in parts.values()), rtol=1e-5)
  for path, w in weights(train).items():
    moved = weights(after)[path]
    scale = 0.01 * 0.3 * factor
    np.testing.assert_allclose(w.b - moved.b, scale * parts[path][1], rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(w.a - moved.a, scale * parts[path][2], rtol=1e-3, atol=1e-6)
    np.testing.assert_array_equal(w.e, moved.e)


@pytest.mark.parametrize("total", [30, 1000, 85_904])
def test_the_budget_is_the_released_codes(total):
  """int(b_T + (b_0 − b_T) (1 − (t − t_i) / (T − t_f − t_i))³) in double precision."""
  s = budget.schedule(total, 0.1, 0.5, 1)
  start, end = round(0.1 * total), total - round(0.5 * total)
  steps = np.unique(np.linspace(0, total, 500).astype(int))
  got = jax.vmap(lambda t: s.budget(t, jnp.int32(864), jnp.int32(576)))(jnp.asarray(steps))
  for t, b in zip(steps, got, strict=True):
    left = min(max(1 - (t - start) / (end - start), 0.0), 1.0)
    exact = 288 * left**3 + 576
    assert int(b) == int(exact) or abs(exact - round(exact)) < 1e-3
  assert got[0] == 864 and got[-1] == 576


def test_the_largest_of_all_matrices_are_kept_and_the_first_of_equal_ones():
  valid = {"a": jnp.ones(3, bool), "b": jnp.array([[True, False], [True, True]])}
  ranked = {"a": jnp.array([1.0, 5.0, 1.0]), "b": jnp.array([[2.0, 9.0], [1.0, 1.0]])}
  for b, want in (
    (0, [0, 0, 0, 0, 0, 0, 0]),
    (1, [0, 1, 0, 0, 0, 0, 0]),
    (3, [1, 1, 0, 1, 0, 0, 0]),  # the first of four with a score of 1
    (4, [1, 1, 1, 1, 0, 0, 0]),
    (6, [1, 1, 1, 1, 0, 1, 1]),
    (7, [1, 1, 1, 1, 0, 1, 1]),  # never padding
  ):
    masks = budget.largest(ranked, valid, jnp.int32(b))
    np.testing.assert_array_equal(np.concatenate([x.ravel() for x in masks.values()]), want)


def test_a_schedule_in_fractions_scales_with_the_run_and_one_that_does_not_fit_raises():
  assert budget.schedule(100, 0.1, 0.5, 5) == budget.Schedule(10, 50, 5)
  assert budget.schedule(1000, 0.1, 0.5, 5) == budget.Schedule(100, 500, 5)
  assert budget.schedule(100, 20, 30, 5) == budget.Schedule(20, 70, 5)
  with pytest.raises(ValueError, match=r"a warm-up of 60 and 40 final steps do not fit into 100"):
    method(warmup=60, final=40).optimizer(optax.sgd(0.1), 100)


@pytest.mark.parametrize(("target", "want"), [(0, 0), (1 / 3, 1), (RANK, 12), (None, 12)], ids=str)
def test_budgets_at_the_ends(target, want):
  """Nothing is left, one triplet in all, everything; a matrix may end with rank 0."""
  m = pj.adalora(RANK, 8.0, list(SHAPES), target_rank=target, warmup=4, final=6, interval=2)
  train, state = run(m, problem()[1])[-1]
  params = pj.combine(train, attached(m)[1])
  assert sum(pj.tree.ranks(params).values()) == want == int(state.budget)
  plain = pj.tree.to_lora(params)
  chex.assert_trees_all_close(pj.merge(plain), pj.merge(params), atol=1e-5)
  if want == 0:
    chex.assert_trees_all_equal(plain, base())


@pytest.mark.parametrize("final", [0, 0.01])
def test_without_final_steps_the_last_one_keeps_to_the_budget(final):
  train, state = run(method(final=final), problem()[1])[-1]
  assert sum(on.sum() for on in alive(train).values()) == state.budget == 6


@pytest.mark.parametrize("score", ["sensitivity", "magnitude"])
def test_other_scores_rank_by_what_they_say(score):
  """The last allocation, from the definitions."""
  m = method(score=score)
  gradients = problem()[1]
  seen = run(m, gradients)
  train = seen[18][0]  # its choice is the last
  before, _ = seen[17]
  ranked = {}
  for name in SHAPES:
    w = weights(before)[f"{name}/kernel"]
    g = {part: gradients[18][name][part] for part in "abe"}
    new = {part: np.asarray(getattr(w, part)) - LR * g[part] for part in "abe"}
    s = {part: np.abs(new[part] * g[part]) for part in "abe"}
    whole = s["e"] + s["a"].mean(-1) + s["b"].mean(-2)
    ranked[name] = np.abs(new["e"]) if score == "magnitude" else whole
  values = np.concatenate(list(ranked.values()))
  want = values >= np.sort(values)[-6]
  np.testing.assert_array_equal(np.concatenate(list(alive(train).values())), want)
  chex.assert_trees_all_equal(*[alive(train) for train, _ in seen[18:]])  # and stays


def test_pairs_of_lora_are_pruned_for_good_and_without_a_target_only_regularised():
  m = method(form="lora")
  seen = run(m, problem()[1])
  params = pj.combine(seen[-1][0], attached(m)[1])
  assert all(w.e is None for w in weights(seen[-1][0]).values())
  assert sum(pj.tree.ranks(params).values()) == 6
  chex.assert_trees_all_close(pj.merge(pj.tree.to_lora(params)), pj.merge(params), atol=1e-5)
  m = pj.adalora(RANK, 8.0, list(SHAPES), target_rank=None, form="lora", gamma=0.1)
  train, state = run(m, 2 * problem()[1])[-1]  # twice as many steps as it was told
  assert sum(pj.tree.ranks(pj.combine(train, attached(m)[1])).values()) == 12 and state.penalty > 0


def test_momentum_brings_no_pruned_pair_back():
  """Nor does a gradient, which a pair of zeros has only where it is made up, as here."""
  seen = [
    {path: (np.asarray(w.a) != 0).any(-1) for path, w in weights(train).items()}
    for train, _ in run(method(form="lora"), problem()[1], tx=optax.adam)
  ]
  for before, after in zip(seen, seen[1:], strict=False):
    assert all((before[path] | ~after[path]).all() for path in before)
  assert sum(on.sum() for on in seen[-1].values()) == 6


def test_pairs_on_a_table_whose_a_starts_at_zero_are_no_padding():
  m = pj.adalora(3, 8.0, ["embedding"], target_rank=2, form="lora", warmup=4, final=6)
  params = m.attach(jax.random.key(0), {"embed": {"embedding": jnp.ones((12, 8))}})
  train, _ = pj.partition(params, m.trainable(params))
  state = m.optimizer(optax.sgd(LR), STEPS).init(train)
  assert all(np.asarray(valid).all() for valid in state.valid.values()) and state.budget == 3


def test_accumulated_batches_count_as_one_step():
  """Two calls with halves of a gradient: masks as of one with the whole."""
  gradients = problem()[1]
  halves = [jax.tree.map(lambda x, w=w: w * x, g) for g in gradients for w in (0.5, 1.5)]
  one, two = run(method(), gradients), run(method(), halves, accumulate=2)
  chex.assert_trees_all_close(two[-1][0], one[-1][0], rtol=1e-4, atol=1e-5)
  chex.assert_trees_all_equal(alive(two[-1][0]), alive(one[-1][0]))
  assert int(two[-1][1].inner_opt_state.step) == STEPS


def test_scores_see_clipped_gradients():
  """As the released code, which scores after clipping."""
  gradients = problem()[1]
  norm = optax.tree.norm(gradients[0])
  scaled = [jax.tree.map(lambda x, g=g: x / optax.tree.norm(g), g) for g in gradients]
  clipped, wanted = run(method(), gradients, clip_norm=1.0), run(method(), scaled)
  assert norm > 1
  chex.assert_trees_all_close(clipped[-1], wanted[-1], rtol=1e-3, atol=1e-5)


def test_a_stack_of_layers_is_as_many_matrices():
  """Ranks may differ by layer; padding of `rank_pattern` is in no penalty, score or budget."""
  layout = {"layers/kernel": Axes()}
  m = pj.adalora(
    4,
    8.0,
    "kernel",
    target_rank=2,
    warmup=2,
    final=6,
    interval=1,
    rank_pattern={".*layers_1/.*": 1},
  )
  params = m.attach(KEY, {"layers": {"kernel": jnp.ones((3, 12, 8))}}, layout)
  train, frozen = pj.partition(params, m.trainable(params))
  tx = m.optimizer(optax.adam(0.1), STEPS)
  state = tx.init(train)
  assert int(state.budget) == 9

  @jit
  def step(train, state, grads):
    updates, state = tx.update(grads, state, train)
    return optax.apply_updates(train, updates), state

  for i in range(STEPS):
    g = jax.tree.map(lambda x, i=i: jax.random.normal(jax.random.key(i), x.shape), train)
    # The loss has no gradient on padding.
    on = np.arange(4) < np.array([4, 1, 4])[:, None]
    w = g["layers"]["kernel"]
    g["layers"]["kernel"] = w.replace(a=w.a * on[..., None], b=w.b * on[:, None, :], e=w.e * on)
    train, state = step(train, state, g)
  params = pj.combine(train, frozen)
  left = pj.tree.ranks(params)
  assert list(left) == [f"layers_{i}/kernel" for i in range(3)]
  assert sum(left.values()) == 6 and left["layers_1/kernel"] <= 1
  weight = params["layers"]["kernel"]
  assert not np.any(weight.a[1, 1:]) and not np.any(weight.b[1, :, 1:])
  plain = pj.tree.to_lora(params)["layers"]["kernel"]
  assert plain.rank.tolist() == list(left.values()) and plain.a.shape[-2] == max(left.values())
  np.testing.assert_allclose(plain.materialize(), weight.materialize(), atol=1e-5)
  np.testing.assert_array_equal(kept(weight).sum(-1), list(left.values()))


def test_the_budget_holds_over_scanned_layers_in_four_bits():
  """A whole run; the codes of the base are what they were."""
  key, x = jax.random.key(1), jax.random.normal(jax.random.key(2), (8, 64))
  layout = {"layers/kernel": Axes()}
  dense = {"layers": {"kernel": jax.random.normal(key, (3, 64, 64)) / 8}}
  m = pj.adalora(4, 8.0, "kernel", target_rank=2, warmup=2, final=6, interval=1)
  params = m.attach(KEY, pj.quantize(dense, pj.quant.nf4(32), layout=layout), layout)
  train, frozen = pj.partition(params, m.trainable(params))
  tx = m.optimizer(optax.adam(0.02), STEPS)
  state = tx.init(train)

  def loss(train, frozen):
    weight = pj.combine(train, frozen)["layers"]["kernel"]
    layer = lambda x, w: (jnp.tanh(pj.einsum("ti,io->to", x, w)), None)
    return jnp.square(jax.lax.scan(layer, x, weight)[0] - 0.5).mean()

  @jit
  def step(train, state):
    value, grads = jax.value_and_grad(loss)(train, frozen)
    updates, state = tx.update(grads, state, train)
    return optax.apply_updates(train, updates), state, value

  values = []
  for _ in range(STEPS):
    train, state, value = step(train, state)
    values.append(float(value))
  after = pj.combine(train, frozen)
  left = pj.tree.ranks(after)
  assert len(left) == 3 and sum(left.values()) == 6 == int(state.budget)
  assert values[-1] < 0.9 * values[0]
  before = params["layers"]["kernel"].base
  chex.assert_trees_all_equal(after["layers"]["kernel"].base, before)
  plain = pj.tree.to_lora(after)["layers"]["kernel"]
  assert isinstance(plain.base, Quantized)
  np.testing.assert_allclose(
    plain.materialize(), after["layers"]["kernel"].materialize(), atol=1e-5
  )


def test_another_optimizer_raises():
  """Whatever method it is of; AdaLoRA's own works in a chain with others."""
  train, _ = attached()
  for tx in (
    pj.lora(2).optimizer(optax.sgd(0.1), 10),
    pj.chain(pj.lora(2), pj.unfreeze("head/.*")).optimizer(optax.sgd(0.1), 10, accumulate=2),
    pj.optim.freeze(optax.sgd(0.1), jax.tree.map(lambda _: True, train)),
  ):
    with pytest.raises(ValueError, match=r"l0/kernel \(SVDLoRA\) is to be trained by"):
      tx.init(train)
  state = pj.chain(pj.unfreeze("head/.*"), method()).optimizer(optax.sgd(0.1), 30).init(train)
  assert isinstance(state, AllocatorState)
  with pytest.raises(ValueError, match="each of these methods has to be the outermost"):
    pj.chain(method(), method()).optimizer(optax.sgd(0.1), 30)
  tx = method().optimizer(optax.sgd(0.1), 30)
  with pytest.raises(ValueError, match="needs the trained tree"):
    tx.update(train, tx.init(train))
  with pytest.raises(ValueError, match="instead of an optax.MultiSteps"):
    method().optimizer(optax.MultiSteps(optax.sgd(0.1), 2), 30)


def test_a_frozen_weight_needs_no_allocator():
  """What was loaded and is not trained, beside a head or beside AdaLoRA on other weights."""
  params = pj.adalora(RANK, target_rank=2, targets=["l0"]).attach(KEY, base())
  params["head"] = {"kernel": jnp.ones((6, 2))}
  head = pj.unfreeze("head/.*")
  train, _ = pj.partition(params, head.trainable(params))
  head.optimizer(optax.sgd(0.1), 10).init(train)
  other = pj.adalora(RANK, target_rank=2, targets=["l1"], warmup=4, final=6)
  params = other.attach(KEY, params)
  frozen = jax.tree.map(lambda _: False, params["l0"])
  train, _ = pj.partition(params, {**other.trainable(params), "l0": frozen})
  state = other.optimizer(optax.sgd(0.1), STEPS).init(train)
  assert list(state.valid) == ["l1/kernel"] and state.budget == RANK


def test_attach_inside_jit_is_attach():
  m = method()
  chex.assert_trees_all_close(jax.jit(m.attach)(KEY, base()), m.attach(KEY, base()), atol=1e-6)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(penalty="cubed"), "penalty 'cubed' is not one of squared, norm"),
    (dict(score="best"), "score 'best' is not one of"),
    (dict(regrow="yes"), "regrow 'yes' is not one of"),
    (dict(form="qr"), "form 'qr' is not one of"),
    (dict(beta1=1.0), "beta1=1.0: write a number of at least 0 and below 1"),
    (dict(gamma=-1.0), "gamma=-1.0: write a number of at least 0"),
    (dict(interval=0), "interval=0: write a whole number of at least 1"),
    (dict(target_rank=5), "target_rank 5 is not between 0 and the initial rank 4"),
    (dict(form="lora", score="magnitude"), 'score "magnitude" is that of λ'),
    (dict(warmup=4.5), "warmup=4.5: write a fraction below 1 or a whole number of updates"),
    (dict(rank=0), "rank=0: write a whole number of at least 1"),
  ],
)
def test_bad_arguments_raise(changes, message):
  settings = dict(rank=4, target_rank=2, targets=list(SHAPES))
  with pytest.raises(ValueError, match=message):
    pj.adalora(**{**settings, **changes})


def test_a_target_above_what_the_pattern_leaves_raises():
  m = pj.adalora(4, target_rank=3, targets=list(SHAPES), rank_pattern={"l0/.*": 1, "l1/.*": 1})
  with pytest.raises(ValueError, match="target_rank 3 on 3 matrices is more than the 6 triplets"):
    m.attach(KEY, base())


def test_lambda_starts_at_zero_between_random_factors():
  """N(0, 0.02²), drawn apart for P and Q and for each matrix."""
  params = pj.adalora(64, target_rank=8, targets=".*").attach(KEY, {"w": jnp.zeros((400, 300))})
  w = params["w"]
  assert not np.any(w.e) and math.isclose(float(w.scale), 16 / 64)
  for factor in (w.a, w.b):
    assert abs(float(factor.std()) - 0.02) < 1e-3 and abs(float(factor.mean())) < 1e-3
  assert abs(np.corrcoef(w.a[:, :300].ravel(), w.b.T.ravel())[0, 1]) < 0.05
  assert pj.count(params) == 400 * 300 + 64 * 701
  assert paths.leaves(params)["w"].true_size() == pj.count(params)


def test_on_a_mesh_the_same_triplets_are_left(golden_run):
  """Averages lie as their factors do, and the step is traced once for every budget."""
  mesh = pj.sharding.make_mesh("fsdp:4,tensor:2")
  rules = [("l0/.*", ("fsdp", "tensor")), ("l1/.*", ("tensor", "fsdp")), (".*", ("fsdp", "tensor"))]
  m = method()
  train, frozen = attached(m)
  params = jax.device_put(
    pj.combine(train, frozen), pj.sharding.shardings(pj.combine(train, frozen), mesh, rules)
  )
  train, _ = pj.partition(params, m.trainable(params))
  tx = m.optimizer(optax.sgd(LR), STEPS)
  state = jax.jit(tx.init)(train)
  places = pj.optim.state_shardings(state, train, mesh)
  state = jax.device_put(state, places)
  assert state.mean["l0/kernel"].a.sharding == train["l0"]["kernel"].a.sharding
  assert state.spread["l1/kernel"].b.sharding == train["l1"]["kernel"].b.sharding
  assert len(train["l0"]["kernel"].a.sharding.device_set) == 8

  @jax.jit
  @chex.assert_max_traces(1)
  def step(train, state, grads):
    updates, state = tx.update(grads, state, train)
    return optax.apply_updates(train, updates), state

  places = (jax.tree.map(lambda x: x.sharding, train), places)
  for number, given in enumerate(problem()[1]):
    grads = jax.device_put(as_grads(train, given), places[0])
    train, state = jax.device_put(step(train, state, grads), places)
    chex.assert_trees_all_close(
      jax.device_get(train), jax.device_get(golden_run[number][0]), rtol=1e-5, atol=1e-5
    )
