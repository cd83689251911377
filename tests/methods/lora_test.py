"""LoRA leaves: products in every layout, initial values, scales, errors."""

import functools
import math

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import peftjax as pj
from peftjax.core.einsum import attend, take
from peftjax.core.layout import Axes
from peftjax.core.tree import with_dropout_keys
from peftjax.methods.lora_weight import LoRA
from tests.core.programs import jit, producers
from tests.models import tiny

KEY = jax.random.key(0)
MATRIX = Axes()
TREE = {
  "query": {"kernel": jnp.ones((12, 8)), "bias": jnp.ones(8)},
  "key": {"kernel": jnp.ones((12, 8))},
}


@functools.partial(jit, static_argnums=(0, 1, 2, 3))
def live(shape, axes=MATRIX, rank=3, dropout=0.0):
  """A LoRA weight with nothing zero in it."""
  keys = jax.random.split(KEY, 3)
  base = jax.random.normal(keys[0], shape)
  method = pj.lora(rank, 7, targets="kernel", dropout=dropout)
  weight = method.attach(KEY, {"kernel": base}, {"kernel": axes})["kernel"]
  b = jax.random.normal(keys[1], weight.b.shape)
  scale = weight.scale * (1 + jnp.arange(weight.scale.size).reshape(weight.scale.shape))
  return weight.replace(b=b, scale=scale)


# Shape, axes, and equations with the shape of x: the branch is factored in all of these.
_HEADS_OUT, _HEADS_IN = Axes((-3,), (-2, -1)), Axes((-3, -2), (-1,))
FACTORED = {
  "matrix": ((12, 8), MATRIX, "...i,io->...o", (2, 5, 12)),
  "matrix, named axes moved": ((12, 8), MATRIX, "bti,io->obt", (2, 5, 12)),
  "matrix, input axis first": ((12, 8), MATRIX, "ib,io->bo", (12, 5)),
  "matrix, transposed": ((12, 8), MATRIX, "...o,io->...i", (2, 5, 8)),
  "matrix, kept out x in": ((8, 12), Axes((-1,), (-2,)), "...i,oi->...o", (5, 12)),
  "stack, one x each": ((2, 12, 8), MATRIX, "lbi,lio->lbo", (2, 5, 12)),
  "stack, one x for all": ((2, 12, 8), MATRIX, "bi,lio->lbo", (5, 12)),
  "stack of stacks": ((2, 3, 12, 8), MATRIX, "kbi,klio->klbo", (2, 5, 12)),
  "heads out": ((12, 4, 2), _HEADS_OUT, "btd,dnh->btnh", (2, 5, 12)),
  "heads out, transposed": ((12, 4, 2), _HEADS_OUT, "btnh,dnh->btd", (2, 5, 4, 2)),
  "heads in": ((4, 2, 12), _HEADS_IN, "btnh,nhd->btd", (2, 5, 4, 2)),
  "heads in, stacked": ((3, 4, 2, 12), _HEADS_IN, "lbnh,lnhd->lbd", (3, 5, 4, 2)),
  "heads out, stacked": ((3, 12, 4, 2), _HEADS_OUT, "lbd,ldnh->lbnh", (3, 5, 12)),
  "outputs before inputs": ((4, 2, 12), Axes((-1,), (-3, -2)), "bd,nhd->bnh", (5, 12)),
}


@pytest.mark.parametrize("case", FACTORED)
def test_einsum_equals_that_of_the_dense_array_and_builds_none(case):
  """In every layout of the kernel, both ways through it."""
  shape, axes, eqn, x_shape = FACTORED[case]
  weight = live(shape, axes)
  x = np.random.default_rng(0).standard_normal(x_shape, np.float32)

  @jit
  def three(x, w):
    return (
      pj.einsum(eqn, x, w),
      jnp.einsum(eqn, x, w.materialize()),
      jnp.einsum(eqn, x, w.base),
    )

  got, want, without = three(x, weight)
  chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-4)
  assert np.abs(want - without).max() > 0.1
  shapes = {shape, (math.prod(weight._dims(axes.ins)), math.prod(weight._dims(axes.outs)))}
  assert producers(lambda x, w: pj.einsum(eqn, x, w), shapes, x, weight) == []


@pytest.mark.parametrize("eqn", ["bi,io->bio", "bo,io->bio", "b,io->bio", "lbi,io->lbio"])
def test_an_equation_that_keeps_the_matrix_falls_back_to_the_dense_array(eqn):
  weight = live((12, 8))
  shape = {"b": 2, "i": 12, "o": 8, "l": 3}
  x = np.random.default_rng(0).standard_normal([shape[c] for c in eqn.split(",")[0]], np.float32)
  two = jit(lambda x, w: (pj.einsum(eqn, x, w), jnp.einsum(eqn, x, w.materialize())))
  chex.assert_trees_all_close(*two(x, weight), rtol=1e-5)


@pytest.mark.parametrize("case", FACTORED)
def test_the_dense_array_is_the_papers_product(case):
  """W = base + s · B A, written down per layer with NumPy."""
  shape, axes, _, _ = FACTORED[case]
  w = live(shape, axes)
  n_stack = len(axes.stack(shape))
  order = [*range(n_stack), *(len(shape) + i for i in (*axes.ins, *axes.outs))]
  got = np.asarray(jit(pj.merge)(w)).transpose(order).reshape(-1, w.a.shape[-1], w.b.shape[-2])
  base = np.asarray(w.base).transpose(order).reshape(got.shape)
  a, b, s = (np.asarray(x, np.float64) for x in (w.a, w.b, w.scale))
  a, b, s = a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:]), s.reshape(-1)
  for i in range(len(got)):
    np.testing.assert_allclose(got[i], base[i] + s[i] * (b[i] @ a[i]).T, rtol=1e-4, atol=1e-5)


def test_take_looks_rows_up_and_builds_no_table():
  """Also in batches; an id outside gives NaN, as on a plain table."""
  weight = live((30, 8))
  ids = jnp.array([[0, 29], [7, 7]])
  chex.assert_trees_all_close(take(weight, ids), weight.materialize()[ids], rtol=1e-5, atol=1e-5)
  assert np.isnan(take(weight, jnp.array(30))).all()
  assert producers(take, {(30, 8)}, weight, ids) == []
  scanned = live((2, 30, 8))
  got = jax.lax.scan(lambda c, w: (c, take(w, ids)), 0, scanned)[1]
  chex.assert_trees_all_close(got, scanned.materialize()[:, ids], rtol=1e-5, atol=1e-5)


def test_an_adapter_on_a_tied_table_changes_the_lookup_only():
  weight = live((30, 8))
  x = jax.random.normal(KEY, (5, 8))
  want = x @ weight.base.T
  chex.assert_trees_all_close(attend(weight, x), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["scan", "vmap"])
def test_the_dropout_of_a_stack_is_that_of_its_layers(how):
  """A key per layer, from the path of the unrolled twin; one mask for A, none for the base."""
  weight = live((2, 12, 8), MATRIX, 3, 0.5)
  x = jax.random.normal(KEY, (5, 12))
  keyed = with_dropout_keys({"layers": {"kernel": weight}}, KEY)["layers"]["kernel"]
  assert keyed.key.shape == (2,)
  each = jax.tree.map(lambda leaf: leaf[0], weight), jax.tree.map(lambda leaf: leaf[1], weight)
  tree = with_dropout_keys({f"layers_{i}": {"kernel": each[i]} for i in range(2)}, KEY)
  want = [pj.einsum("bi,io->bo", x, tree[f"layers_{i}"]["kernel"]) for i in range(2)]
  one = lambda w: pj.einsum("bi,io->bo", x, w)
  got = (
    jax.vmap(one)(keyed) if how == "vmap" else jax.lax.scan(lambda c, w: (c, one(w)), 0, keyed)[1]
  )
  chex.assert_trees_all_close(got, jnp.stack(want), rtol=1e-5, atol=1e-5)
  assert np.abs(want[0] - one(each[0])).max() > 0.1


def test_dropout_acts_on_the_branch_alone():
  """Its mean over many keys is the output without it; with A = 0 it does nothing."""
  weight = live((12, 8), MATRIX, 3, 0.3)
  x = jax.random.normal(KEY, (3, 12))
  keyed = lambda key: weight.with_key(key, "w").einsum("bi,io->bo", x)
  many = jit(jax.vmap(keyed))(jax.random.split(KEY, 4000))
  np.testing.assert_allclose(many.mean(0), weight.einsum("bi,io->bo", x), atol=6 * many.std() / 60)
  assert many.std(0).min() > 0.01
  still = weight.replace(a=jnp.zeros_like(weight.a)).with_key(KEY, "w")
  np.testing.assert_allclose(still.einsum("bi,io->bo", x), x @ weight.base, rtol=1e-5, atol=1e-5)


def test_a_weight_with_a_dropout_key_has_no_dense_form():
  weight = live((12, 8), MATRIX, 3, 0.5).with_key(KEY, "w")
  with pytest.raises(ValueError, match="would skip its dropout"):
    weight.materialize()
  with pytest.raises(ValueError, match="would skip its dropout"):
    pj.einsum("b,io->bio", jnp.ones(2), weight)
  with pytest.raises(ValueError, match="whole stack"):
    stack = live((2, 12, 8), MATRIX, 3, 0.5).with_key(KEY, "layers/kernel")
    pj.einsum("bi,lio->lbo", jnp.ones((3, 12)), stack)


def test_bfloat16_activations_compute_in_bfloat16_on_float32_factors():
  weight = live((12, 8))
  x = jax.random.normal(KEY, (5, 12), jnp.bfloat16)
  y = pj.einsum("bi,io->bo", x, weight)
  assert y.dtype == jnp.bfloat16
  want = x.astype(jnp.float32) @ weight.materialize()
  np.testing.assert_allclose(y.astype(jnp.float32), want, rtol=0.05, atol=0.2)


def test_factors_keep_their_own_dtype_on_a_bfloat16_base():
  base = {"kernel": jnp.ones((12, 8), jnp.bfloat16)}
  weight = pj.lora(2, targets="kernel").attach(KEY, base)["kernel"]
  assert (weight.a.dtype, weight.b.dtype) == (jnp.float32, jnp.float32)
  assert weight.dtype == weight.materialize().dtype == jnp.bfloat16
  half = pj.lora(2, targets="kernel", dtype=jnp.bfloat16).attach(KEY, base)["kernel"]
  assert (half.a.dtype, half.b.dtype) == (jnp.bfloat16, jnp.bfloat16)


# Initial values


def _kernel(n_in=400, n_out=300, **how):
  base = jnp.asarray(np.random.default_rng(0).standard_normal((n_in, n_out), np.float32))
  return jit(pj.lora(targets="kernel", **how).attach)(KEY, {"kernel": base})["kernel"], base


def test_kaiming_draws_a_from_the_uniform_of_one_over_root_in():
  weight, _ = _kernel(rank=50)
  bound = 1 / math.sqrt(400)
  assert weight.a.shape == (50, 400) and weight.b.shape == (300, 50)
  assert 0.99 * bound < np.abs(weight.a).max() <= bound
  np.testing.assert_allclose(weight.a.std(), bound / math.sqrt(3), rtol=0.02)
  assert not np.any(weight.b)


def test_gaussian_draws_a_with_deviation_one_over_rank():
  weight, _ = _kernel(rank=50, init="gaussian")
  np.testing.assert_allclose(weight.a.std(), 1 / 50, rtol=0.03)
  assert np.abs(weight.a).max() > 3 / 50 and not np.any(weight.b)


def test_a_table_starts_with_a_zero_and_b_normal():
  table = {"embedding": jnp.ones((300, 400))}
  weight = pj.lora(50, targets="embedding").attach(KEY, table)["embedding"]
  assert weight.a.shape == (50, 300) and not np.any(weight.a)
  np.testing.assert_allclose(weight.b.std(), 1.0, rtol=0.02)


def test_a_table_cannot_learn_with_its_a_frozen():
  """A = 0 then stays; one that PiSSA drew is not 0."""
  table = {"embedding": jax.random.normal(KEY, (9, 8))}
  with pytest.raises(ValueError, match="embedding is a table, whose A starts at zero.*=False"):
    pj.lora(2, targets="embedding", freeze_a=True).attach(KEY, table)
  weight = pj.lora(2, targets="embedding", freeze_a=True, init="pissa").attach(KEY, table)
  assert np.any(weight["embedding"].a)


def test_pissa_takes_the_principal_part_out_of_the_base():
  """s · B A is the best rank-r part of W; the residual has the other singular values."""
  weight, base = _kernel(40, 30, rank=6, alpha=12.0, init="pissa")
  singular = np.linalg.svd(np.asarray(base), compute_uv=False)
  np.testing.assert_allclose(
    np.linalg.svd(np.asarray(weight.delta()), compute_uv=False)[:7],
    [*singular[:6], 0],
    rtol=1e-4,
    atol=1e-4,
  )
  rest = np.linalg.svd(np.asarray(weight.base), compute_uv=False)
  np.testing.assert_allclose(rest[:24], singular[6:], rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(weight.materialize(), base, atol=1e-5)
  # Both factors share the singular values evenly (eq. 2-3).
  np.testing.assert_allclose(
    np.linalg.norm(weight.a, axis=1), np.linalg.norm(weight.b, axis=0), rtol=1e-4
  )


def test_pissa_of_a_stack_respects_each_layers_rank():
  base = jax.random.normal(KEY, (2, 12, 8))
  method = pj.lora(3, targets="kernel", init="pissa", rank_pattern={r"kernel\[1\]": 1})
  weight = jit(lambda p: method.attach(KEY, p, {"kernel": MATRIX}))({"kernel": base})["kernel"]
  for i, rank in enumerate((3, 1)):
    one = pj.lora(rank, targets="kernel", init="pissa")
    alone = jit(one.attach)(KEY, {"kernel": base[i]})["kernel"]
    np.testing.assert_allclose(weight.base[i], alone.base, atol=1e-5)
    assert not np.any(weight.a[i, rank:]) and not np.any(weight.b[i, :, rank:])


def test_attach_inside_jit_is_attach():
  """Sharded birth is `jit(attach, out_shardings=...)`."""
  for init in ("kaiming", "pissa"):
    method = pj.lora(2, targets="kernel", init=init)
    eager = method.attach(KEY, TREE)
    jitted = jax.jit(method.attach)(KEY, TREE)
    assert jax.tree.structure(eager) == jax.tree.structure(jitted)
    chex.assert_trees_all_close(pj.merge(jitted), pj.merge(eager), atol=1e-5)


# Scales and patterns


@pytest.mark.parametrize("rslora, scale", [(False, 16 / 4), (True, 16 / 2)])
def test_the_scale_is_alpha_over_the_rank_or_its_root(rslora, scale):
  weight = pj.lora(4, 16, "query", rslora=rslora).attach(KEY, TREE)["query"]["kernel"]
  assert weight.scale == scale and weight.scale.dtype == jnp.float32
  chained = pj.chain(pj.unfreeze(".*"), pj.lora(4, 16, "query", rslora=rslora))
  assert chained.peft_options() == {"rslora": rslora}


def test_patterns_set_rank_and_alpha_per_module_and_the_first_match_wins():
  method = pj.lora(
    4, 16, ["query", "key"], rank_pattern={"query": 2, ".*kernel": 5}, alpha_pattern={"key": 10}
  )
  tree = method.attach(KEY, TREE)
  query, key = tree["query"]["kernel"], tree["key"]["kernel"]
  assert (query.rank, query.scale, query.a.shape) == (2, 8, (2, 12))
  assert (key.rank, key.scale, key.a.shape) == (5, 2, (5, 12))


def test_patterns_tell_the_layers_of_a_stack_apart():
  """By the unrolled model's names; padded with zeros to the widest."""
  method = pj.lora(
    4, 8, ".*/query/kernel", rank_pattern={".*layers_1/.*": 2}, alpha_pattern={".*layers_1/.*": 6}
  )
  path = "bert/encoder/layers/attention/self/query/kernel"
  scanned = method.attach(KEY, tiny.scanned_params(), {path: MATRIX})
  weight = scanned["bert"]["encoder"]["layers"]["attention"]["self"]["query"]["kernel"]
  unrolled = method.attach(KEY, tiny.params())["bert"]["encoder"]
  assert weight.rank.tolist() == [4, 2] and weight.scale.tolist() == [2, 3]
  for i in range(2):
    twin = unrolled[f"layers_{i}"]["attention"]["self"]["query"]["kernel"]
    np.testing.assert_array_equal(weight.a[i, : twin.a.shape[0]], twin.a)
    assert not np.any(weight.a[i, twin.a.shape[0] :]) and weight.scale[i] == twin.scale


# Swapping and unmerging


def test_align_ranks_pads_with_zeros_and_changes_no_weight():
  one, two = (pj.lora(r, targets="query").attach(KEY, TREE) for r in (2, 5))
  one["query"]["kernel"] = one["query"]["kernel"].replace(b=jnp.ones((8, 2)))
  a, b = pj.tree.align_ranks(one, two)
  assert jax.tree.structure(a) == jax.tree.structure(b)
  chex.assert_trees_all_equal_shapes(a, b)
  chex.assert_trees_all_close(pj.merge(a), pj.merge(one), rtol=1e-6)
  assert a["query"]["kernel"].rank == 2 and pj.count(a) == pj.count(one)


def test_a_compiled_program_takes_adapters_of_any_rank_and_alpha_once_aligned():
  """One trace for three adapters; unaligned ones need one each."""
  made = [pj.lora(r, alpha, "query").attach(KEY, TREE) for r, alpha in ((1, 3), (5, 8), (2, 99))]
  x = jnp.ones((3, 12))

  def use(params):
    return pj.einsum("...i,io->...o", x, params["query"]["kernel"])

  once = jax.jit(chex.assert_max_traces(use, n=1))
  for params in pj.tree.align_ranks(*made):
    once(params)
  with pytest.raises(AssertionError, match="traced > 1 times"):
    once(made[0])


def test_unmerge_does_not_read_the_base():
  params = pj.lora(2, targets="query").attach(KEY, TREE)
  weight = live((12, 8))
  params["query"]["kernel"] = weight
  merged = pj.merge(params)
  hollow = {
    **params,
    "query": {**params["query"], "kernel": weight.replace(base=jnp.zeros((12, 8)))},
  }
  chex.assert_trees_all_close(pj.tree.unmerge(merged, hollow), params, atol=1e-5)


# Boxes


def test_attach_opens_a_box_and_keeps_its_names():
  """Its spec, and those of the children, come from the names."""
  box = nn.Partitioned(jnp.ones((12, 8)), names=("fsdp", "tensor"))
  weight = pj.lora(2, targets="kernel").attach(KEY, {"kernel": box})["kernel"]
  assert isinstance(weight, LoRA) and isinstance(weight.base, jax.Array)
  assert weight.names == ("fsdp", "tensor")
  specs = nn.get_partition_spec({"kernel": weight})["kernel"]
  assert (specs.base, specs.a, specs.b) == (P("fsdp", "tensor"), P(None, "fsdp"), P("tensor", None))
  assert specs.scale == P()
  mesh = pj.sharding.make_mesh("data:2,fsdp:2,tensor:2")
  sharding = nn.get_sharding({"kernel": weight}, mesh)["kernel"]
  assert sharding.a.spec == P(None, "fsdp") and sharding.base.mesh == mesh
  assert pj.sharding.specs({"kernel": weight}, mesh)["kernel"].b == P(("tensor", "fsdp"), None)


@pytest.mark.filterwarnings("ignore:.*read without pj.apply")
def test_unbox_merges():
  weight = live((12, 8))
  tree = nn.unbox({"kernel": weight, "plain": jnp.ones(2)})
  np.testing.assert_array_equal(tree["kernel"], weight.materialize())


def test_a_weight_cannot_be_overwritten_with_a_dense_array():
  with pytest.raises(TypeError, match="cannot be overwritten"):
    live((12, 8)).replace_boxed(jnp.ones((12, 8)))


# Errors


def attach(method, tree=TREE, layout=None):
  return method.attach(KEY, tree, layout)


def test_a_rank_above_the_matrixs_raises():
  with pytest.raises(ValueError, match=r"query/kernel: rank 9 does not fit a 12 x 8 matrix"):
    attach(pj.lora(9, targets="query"))
  with pytest.raises(ValueError, match=r"layers_1/kernel: rank 9 does not fit a 12 x 8"):
    tree = {"layers": {"kernel": jnp.ones((2, 12, 8))}}
    method = pj.lora(2, targets="all-linear", rank_pattern={"layers_1/.*": 9})
    attach(method, tree, {"layers/kernel": MATRIX})
  attach(pj.lora(8, targets="query"))


def test_two_methods_on_one_leaf_raise():
  method = pj.chain(pj.lora(2, targets="query"), pj.unfreeze("query/kernel"))
  with pytest.raises(ValueError, match="two methods claim query/kernel"):
    attach(method)
  with pytest.raises(ValueError, match="two methods claim query/kernel"):
    attach(pj.chain(pj.lora(2, targets="query"), pj.lora(2, targets=["query", "key"])))


def test_attaching_twice_raises():
  once = attach(pj.lora(2, targets="query"))
  with pytest.raises(ValueError, match="query/kernel has an adapter already; merge it first"):
    attach(pj.lora(2, targets=["key", "query"]), once)
  attach(pj.lora(2, targets="query"), pj.merge(once))


def test_a_vector_is_no_target():
  with pytest.raises(ValueError, match=r"query/bias \(8,\) is not a matrix"):
    attach(pj.lora(2, targets="query/bias"))


def test_a_kernel_of_three_axes_needs_a_layout_and_the_error_names_the_call():
  tree = {"heads": {"kernel": jnp.ones((4, 12, 8))}}
  with pytest.raises(ValueError, match=r"layout = peftjax.linen.layout\(model, \*example_inputs\)"):
    attach(pj.lora(2, targets="heads"), tree)
  with pytest.raises(ValueError, match="is in no module that layout"):
    attach(pj.lora(2, targets="heads"), tree, {"other/kernel": MATRIX})


def test_pissa_needs_a_plain_float_matrix():
  tree = {"kernel": jnp.ones((4, 12, 8))}
  with pytest.raises(ValueError, match="init='pissa' needs a plain matrix"):
    attach(pj.lora(2, targets="kernel", init="pissa"), tree, {"kernel": Axes((-3, -2), (-1,))})


@pytest.mark.parametrize(
  "how, text",
  [
    (dict(init="zeros"), "init 'zeros' is not one of kaiming, gaussian, pissa"),
    (dict(dropout=1.0), "dropout=1.0: write a number of at least 0 and below 1"),
    (dict(dropout=-0.1), "dropout=-0.1: write"),
    (dict(rank=0), "rank=0: write a whole number of at least 1"),
    (dict(rank=2.0), "rank=2.0: write a whole number"),
    (dict(rank=True), "rank=True: write a whole number"),
    (dict(rank_pattern={"query": -1}), "rank_pattern=.*-1.*: write a whole number"),
  ],
)
def test_bad_arguments_raise_at_once(how, text):
  with pytest.raises(ValueError, match=text):
    pj.lora(**how)


def test_b_learns_faster_by_its_rate():
  """LoRA+: B's update is b_rate times that of LoRA, A's and all others are LoRA's."""
  tree = {"query": {"kernel": jnp.ones((12, 8))}, "bias": jnp.ones(8)}
  updates = {}
  for rate in (1.0, 16.0):
    method = pj.chain(pj.lora(4, targets="query", b_rate=rate), pj.unfreeze("bias"))
    params = method.attach(jax.random.key(0), tree)
    train, _ = pj.partition(params, method.trainable(params))
    tx = method.optimizer(optax.adamw(1e-2, weight_decay=0.1), 10, clip_norm=1.0, accumulate=2)
    state = tx.init(train)
    for _ in range(2):
      got, state = tx.update(jax.tree.map(jnp.ones_like, train), state, train)
    updates[rate] = got
  one, fast = updates[1.0], updates[16.0]
  weight = fast["query"]["kernel"]
  chex.assert_trees_all_close(weight.b, 16.0 * one["query"]["kernel"].b, rtol=1e-6)
  chex.assert_trees_all_equal(weight.a, one["query"]["kernel"].a)
  chex.assert_trees_all_equal(fast["bias"], one["bias"])
  mask = method.trainable(params)
  frozen_too = pj.optim.freeze(method.optimizer(optax.sgd(1.0), 10), mask)
  got, _ = frozen_too.update(jax.tree.map(jnp.ones_like, params), frozen_too.init(params), params)
  np.testing.assert_array_equal(got["query"]["kernel"].b, jnp.full((8, 4), -16.0))  # once
  with pytest.raises(ValueError, match="b_rate=0: write a number of at least"):
    pj.lora(4, b_rate=0)
