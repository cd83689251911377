"""The laws that every method obeys, on one tiny encoder, unrolled and scanned.

A new method is one line in `ENTRIES`.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import PartitionSpec as P

import peftjax as pj
from peftjax.core import paths
from peftjax.core.weight import Weight, children
from peftjax.models.bert import BertClassifier
from tests.core.jaxprs import producers
from tests.models import tiny

_QV = r".*/(query|value)/kernel/[ab]"
_LINEAR = r"bert/.*/kernel/[ab]"


@dataclasses.dataclass(frozen=True)
class Entry:
  """One method or nesting, and what is particular to it."""

  name: str
  method: Callable[[], Any]
  trains: str  # what exactly is trained, as one regex over the paths of arrays
  other: Callable[[], Any] | None = None  # the same with another rank and alpha, to swap with
  layers: tuple[str, ...] = ("unrolled", "scanned")
  dtype: Any = jnp.float32  # of activations
  identity: float = 2e-6  # largest change of the outputs by attach
  rounding: float = 2e-5  # two ways to compute one thing, relative


_UNROLLED, _SCANNED = ("unrolled",), ("scanned",)
lora, train, chain = pj.lora, pj.train, pj.chain
_patterns = dict(
  rank_pattern={".*layers_1/.*": 2, ".*/key/kernel": 5}, alpha_pattern={".*_0/.*": 3}
)
_fewer = dict(rank_pattern={".*layers_0/.*": 1}, alpha_pattern={".*/query/.*": 1})
_tables = ["word_embeddings", "position_embeddings"]
_embed = r".*/(word|position)_embeddings/embedding/[ab]"

ENTRIES = [
  Entry("lora", lambda: lora(4, 8), _QV, lambda: lora(2, 3)),
  Entry("all-linear", lambda: lora(4, 8, "all-linear"), _LINEAR, lambda: lora(3, 9, "all-linear")),
  Entry("rslora", lambda: lora(4, 8, rslora=True), _QV, lambda: lora(2, 3), _SCANNED),
  Entry("gaussian", lambda: lora(4, 8, init="gaussian"), _QV, lambda: lora(1, 5), _UNROLLED),
  Entry(
    "pissa", lambda: lora(4, 8, init="pissa"), _QV, lambda: lora(2, 3, init="pissa"), identity=5e-5
  ),
  Entry(
    "patterns",
    lambda: lora(4, 8, "all-linear", **_patterns),
    _LINEAR,
    lambda: lora(2, 6, "all-linear", **_fewer),
  ),
  Entry("embeddings", lambda: lora(3, 6, _tables), _embed, lambda: lora(2, 9, _tables), _SCANNED),
  Entry("dropout", lambda: lora(4, 8, dropout=0.2), _QV, lambda: lora(2, 3, dropout=0.2)),
  Entry(
    "bf16", lambda: lora(4, 8), _QV, lambda: lora(2, 3), _SCANNED, jnp.bfloat16, rounding=3e-2
  ),
  Entry("full", lambda: train(".*"), ".*", layers=_SCANNED),
  Entry("head", lambda: train("head/.*"), "head/.*", layers=_SCANNED),
  Entry("bitfit", lambda: train([".*/bias", "head/.*"]), ".*/bias|head/.*", layers=_UNROLLED),
  Entry(
    "lora + head", lambda: chain(lora(4, 8), train("head/.*")), f"{_QV}|head/.*", layers=_SCANNED
  ),
  Entry(
    "query | value",
    lambda: chain(lora(4, 8, "query"), lora(2, 3, "value", dropout=0.1)),
    _QV,
    lambda: chain(lora(1, 8, "query"), lora(2, 9, "value", dropout=0.1)),
    _UNROLLED,
  ),
]

KEY = jax.random.key(3)

# The laws are about values, so compiling fast is worth more than running fast.
jit = functools.partial(
  jax.jit,
  compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True},
)


def _loss(logits):
  return pj.losses.classification(logits, tiny.CLASSES, jnp.ones(len(logits)))


@functools.cache
def _model(scan, dtype):
  return BertClassifier(tiny.config(scan_layers=scan, dtype=dtype))


@functools.cache
def _plain(scan, dtype):
  """The model as linen knows it, on dense arrays."""
  model = _model(scan, dtype)
  return jit(lambda params: model.apply({"params": params}, tiny.TOKENS, tiny.MASK))


class Subject:
  """A method attached to the model, with the programs that its laws share."""

  def __init__(self, entry, scan):
    chex.clear_trace_counter()  # its counters are kept by place in the source
    self.entry, self.scan = entry, scan
    self.model = _model(scan, entry.dtype)
    self.plain = _plain(scan, entry.dtype)
    self.params = tiny.scanned_params() if scan else tiny.params()
    self.layout = pj.linen.layout(self.model, tiny.TOKENS)
    self.method = entry.method()
    self.attached = self.method.attach(KEY, self.params, self.layout)
    self.mask = self.method.trainable(self.attached)
    self.tx = self.method.optimizer(optax.adam(0.02), total_steps=10)

    def forward(params):
      return pj.apply(self.model, params, tiny.TOKENS, tiny.MASK)

    def step(train, frozen, state, key):
      loss, grads = jax.value_and_grad(self.loss)(train, frozen, key)
      updates, state = self.tx.update(grads, state, train)
      return optax.apply_updates(train, updates), state, loss, grads

    once = lambda fn: jit(chex.assert_max_traces(fn, n=1))
    self.forward, self.step = once(forward), once(step)
    # JAX traces again for arguments on a mesh: once more.
    self.sharded_forward, self.sharded_step = jit(forward), jit(step)

  def loss(self, train, frozen, key):
    """In training mode."""
    params = pj.combine(train, frozen) if frozen else train
    rngs = {"dropout": key}
    return _loss(pj.apply(self.model, params, tiny.TOKENS, tiny.MASK, train=True, rngs=rngs))

  def split(self, params):
    return pj.partition(params, self.mask)

  def run(self, params, steps=2):
    """`params` after some steps of training, and what the last one returned."""
    train, frozen = self.split(params)
    state = self.tx.init(train)
    for i in range(steps):
      train, state, *seen = self.step(train, frozen, state, jax.random.key(i))
    return pj.combine(train, frozen), *seen

  @functools.cached_property
  def trained(self):
    """Parameters after two steps, with loss and gradients of the second: nothing is zero now."""
    return self.run(self.attached)

  @property
  def live(self):
    return self.trained[0]

  @functools.cached_property
  def swapped(self):
    """Another adapter on the same base, in the same shapes; the adapters as they were before."""
    method = self.entry.other() if self.entry.other else self.method
    params = method.attach(jax.random.key(4), self.params, self.layout)
    return self.align(self.live, params)[1], params

  def align(self, one, two):
    """`two` with ranks padded as far as `one` needs, and the other way round."""
    (a, base), (b, other_base) = (self.adapters(tree) for tree in (one, two))
    a, b = pj.align_ranks(a, b)
    return pj.combine(a, base), pj.combine(b, other_base)

  def adapters(self, params):
    return pj.partition(params, pj.adapter_mask(params, self.mask))

  def weights(self, params):
    return {p: leaf for p, leaf in paths.leaves(params).items() if isinstance(leaf, Weight)}


def _ids():
  return [(entry, layers) for entry in ENTRIES for layers in entry.layers]


@pytest.fixture(scope="module", params=_ids(), ids=lambda p: f"{p[0].name}-{p[1]}")
def subject(request):
  entry, layers = request.param
  return Subject(entry, layers == "scanned")


def close(subject, one, two, scale=1.0):
  chex.assert_trees_all_close(
    one, two, rtol=scale * subject.entry.rounding, atol=scale * subject.entry.rounding
  )


def arrays(tree):
  """Arrays by path."""
  return {paths.name(p): x for p, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


def test_law_1_attach_is_the_identity_on_outputs(subject):
  """Attaching changes no output; training afterwards does."""
  before, after = subject.plain(subject.params), subject.forward(subject.attached)
  np.testing.assert_allclose(after, before, rtol=0, atol=subject.entry.identity)
  assert np.abs(subject.forward(subject.live) - before).max() > 0.03


def test_law_2_einsum_and_take_equal_those_of_the_dense_array(subject):
  """In the common equations, of every weight."""
  seen = set()
  for path, weight in subject.weights(subject.live).items():
    *stack, n_in, n_out = weight.shape
    if (kind := (type(weight), path.split("/")[-1], n_in == n_out)) in seen:
      continue
    seen.add(kind)
    x = jax.random.normal(KEY, (3, 5, n_in))
    y = jax.random.normal(KEY, (3, 5, n_out))
    if stack:
      xs, ys = jnp.stack([x, -x]), jnp.stack([y, 2 * y])
      cases = [("lbti,lio->lbto", xs), ("bti,lio->btlo", x), ("lbto,lio->lbti", ys)]
    else:
      ids = jnp.array([[0, 3], [1, 3]])
      if path.endswith("embedding"):
        chex.assert_trees_all_close(
          pj.take(weight, ids), weight.materialize()[ids], rtol=1e-5, atol=1e-5
        )
        chex.assert_trees_all_close(pj.attend(weight, y), y @ weight.base.T, rtol=1e-5, atol=1e-5)
      cases = [("...i,io->...o", x), ("bti,io->bot", x), ("...o,io->...i", y), ("bi,io->bo", x[0])]
    for eqn, value in cases:
      want = jnp.einsum(eqn, value, weight.materialize())
      chex.assert_trees_all_close(pj.einsum(eqn, value, weight), want, rtol=2e-5, atol=2e-5)


def test_law_3_merge_preserves_outputs_and_unmerge_gives_the_base_back(subject):
  """A merged tree is a plain tree of the model; unmerging it is attaching again."""
  merged = pj.merge(subject.live)
  assert not subject.weights(merged)
  chex.assert_trees_all_equal_shapes_and_dtypes(merged, subject.params)
  close(subject, subject.plain(merged), subject.forward(subject.live))
  back = pj.unmerge(merged, subject.live)
  chex.assert_trees_all_close(back, subject.live, atol=1e-6)


def test_law_4_exactly_what_is_trained_has_a_gradient(subject):
  """Structurally: no other leaf has one. Numerically: none that has one is zero."""
  _, _, grads = subject.trained
  expected = {p for p in arrays(subject.attached) if re.fullmatch(subject.entry.trains, p)}
  assert set(arrays(grads)) == expected
  train, frozen = subject.split(subject.attached)
  assert set(arrays(frozen)) == set(arrays(subject.attached)) - expected
  assert jax.tree.structure(grads) == jax.tree.structure(train)
  for path, grad in arrays(grads).items():
    # A bias on the keys adds one number to all scores of a query: softmax does not see it.
    assert np.isfinite(grad).all() and (np.any(grad) or path.endswith("key/bias")), path


def test_law_4_rows_beyond_the_rank_stay_zero(subject):
  """Padding to a common rank is not trained."""
  for params in (subject.live, subject.run(subject.swapped[0])[0]):
    for weight in (w for w in subject.weights(params).values() if hasattr(w, "rank")):
      beyond = np.arange(weight.a.shape[-2]) >= np.asarray(weight.rank)[..., None]
      assert not np.any(np.where(beyond[..., :, None], weight.a, 0))
      assert not np.any(np.where(beyond[..., None, :], weight.b, 0))


def test_law_5_combine_undoes_partition_and_a_step_keeps_the_structure(subject):
  """The very same arrays come back, and training changes neither treedef, shape nor dtype."""
  train, frozen = subject.split(subject.attached)
  back = pj.combine(train, frozen)
  assert jax.tree.structure(back) == jax.tree.structure(subject.attached)
  pairs = zip(jax.tree.leaves(back), jax.tree.leaves(subject.attached), strict=True)
  assert all(a is b for a, b in pairs)
  assert jax.tree.structure(subject.live) == jax.tree.structure(subject.attached)
  chex.assert_trees_all_equal_shapes_and_dtypes(subject.live, subject.attached)
  chex.assert_trees_all_equal(subject.split(subject.live)[1], frozen)


def test_law_6_scan_and_remat_give_the_same_loss_and_gradients(subject):
  """A rematerialised loss in a scan over two steps' keys, against those two steps."""
  train, frozen = subject.split(subject.live)

  @jit
  def scanned(train, frozen, keys):
    grad = jax.value_and_grad(jax.checkpoint(subject.loss))
    return jax.lax.scan(lambda carry, key: (carry, grad(train, frozen, key)), 0, keys)[1]

  keys = jax.random.split(jax.random.key(0))
  both = scanned(train, frozen, keys)
  for i in range(2):
    alone = subject.step(train, frozen, subject.tx.init(train), keys[i])[2:]
    close(subject, jax.tree.map(lambda x, i=i: x[i], both), alone, scale=2)


def test_law_6_an_adapter_is_swapped_without_tracing_again(subject):
  """Of another rank and alpha, by `align_ranks`; forward and step count their traces (chex)."""
  swapped, unaligned = subject.swapped
  assert jax.tree.structure(swapped) == jax.tree.structure(subject.attached)
  one, two = subject.forward(subject.live), subject.forward(swapped)
  assert np.abs(one - two).max() > 0.03
  moved = subject.run(swapped)[0]
  if subject.entry.other:
    assert pj.count(swapped, subject.mask) == pj.count(
      unaligned, subject.entry.other().trainable(unaligned)
    )
    assert pj.count(swapped, subject.mask) != pj.count(subject.attached, subject.mask)
    chex.assert_trees_all_close(pj.merge(swapped), pj.merge(unaligned), atol=1e-6)
  close(subject, subject.plain(pj.merge(moved)), subject.forward(moved))


def test_law_6_vmap_over_two_stacked_adapters_equals_the_two_alone(subject):
  """One base, two adapters of different rank."""
  other = subject.run(subject.swapped[0])[0]
  (a, base), (b, _) = subject.adapters(subject.live), subject.adapters(other)
  both = jax.tree.map(lambda *xs: jnp.stack(xs), a, b)

  @jit
  def forward(both, base):
    one = lambda adapter: pj.apply(subject.model, pj.combine(adapter, base), tiny.TOKENS, tiny.MASK)
    return jax.vmap(one)(both)

  close(
    subject, forward(both, base), jnp.stack([subject.forward(p) for p in (subject.live, other)])
  )


@pytest.mark.parametrize("shape", ["data:2,fsdp:2,tensor:2", "fsdp:2,tensor:4"])
def test_law_7_a_sharded_model_computes_the_same(subject, shape):
  """A whole step on one mesh, the outputs on another."""
  mesh = pj.make_mesh(shape)
  shardings = pj.shardings(subject.live, mesh)
  params = jax.device_put(subject.live, shardings)
  for path, x in arrays(params).items():
    assert x.sharding == arrays(shardings)[path]
  if shape == "fsdp:2,tensor:4":
    close(subject, subject.sharded_forward(params), subject.forward(subject.live))
  else:
    train, frozen = subject.split(params)
    state = subject.tx.init(train)
    new, _, loss, grads = subject.sharded_step(train, frozen, state, jax.random.key(1))
    train, frozen = subject.split(subject.live)
    want = subject.step(train, frozen, subject.tx.init(train), jax.random.key(1))
    close(subject, (loss, grads), want[2:], scale=2)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, train)


def test_law_7_children_lie_as_their_weight_does(subject):
  """A along the inputs, B along the outputs, the rank never, what is per layer by layer."""
  mesh = pj.make_mesh("data:2,fsdp:2,tensor:2")
  specs = pj.sharding.specs(subject.attached, mesh)
  is_spec = lambda x: isinstance(x, P)
  assert jax.tree.structure(specs, is_leaf=is_spec) == jax.tree.structure(subject.attached)
  dense = paths.leaves(pj.sharding.specs(subject.params, mesh))
  for path, weight in subject.weights(specs).items():
    *stack, n_in, n_out = (*dense[path], None, None)[
      : len(subject.layout[path].ins) + 1 + len(paths.leaves(subject.params)[path].shape) - 2
    ]
    assert tuple(weight.base) == tuple(dense[path])
    if isinstance(weight, pj.LoRA):
      assert weight.a == P(*stack, None, n_in) and weight.b == P(*stack, n_out, None)
      assert weight.scale == weight.rank == P(*stack)


def test_law_8_a_checkpoint_of_the_adapter_and_the_base_restore_the_model(subject, tmp_path):
  """Orbax keeps every array of the adapter tree and its structure, holes included."""
  adapters, base = subject.adapters(subject.live)
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "adapter", adapters)
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(tmp_path / "adapter", jax.eval_shape(lambda: adapters))
  params = pj.combine(restored, base)
  assert jax.tree.structure(params) == jax.tree.structure(subject.live)
  chex.assert_trees_all_equal(params, subject.live)
  # What is not saved is the model's own, untouched.
  flat = arrays(pj.merge(subject.params))
  for path, x in arrays(base).items():
    np.testing.assert_array_equal(x, flat[path.removesuffix("/base")])


def test_law_9_everything_works_on_shapes_alone(subject):
  """attach, trainable, describe, specs and count of `ShapeDtypeStruct`s."""
  abstract = subject.method.attach(
    jax.random.key(0), jax.eval_shape(lambda: subject.params), subject.layout
  )
  assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(abstract))
  assert jax.tree.structure(abstract) == jax.tree.structure(subject.attached)
  chex.assert_trees_all_equal_shapes_and_dtypes(abstract, subject.attached)
  mask = subject.method.trainable(abstract)
  chex.assert_trees_all_equal(mask, subject.mask)
  mesh = pj.make_mesh("fsdp:2,tensor:4")
  assert pj.sharding.specs(abstract, mesh) == pj.sharding.specs(subject.attached, mesh)
  ranks = [leaf.rank for leaf in subject.weights(subject.attached).values()]
  if all((rank == rank.max()).all() for rank in ranks):  # shapes do not say what is padding
    assert pj.describe(abstract, mask) == pj.describe(subject.attached, subject.mask)
    assert pj.count(abstract, mask) == pj.count(subject.attached, subject.mask)
  assert pj.count(abstract) >= pj.count(subject.attached)


def test_law_11_factored_means_factored(subject):
  """No equation of the loss and its gradients yields an array of a weight's shape."""
  shapes = set()
  for weight in subject.weights(subject.attached).values():
    shapes |= {weight.shape, weight.shape[-2:]}
  # Compute in another dtype casts the base, and nothing but the base.
  allow = ("convert_element_type", "scan") if subject.entry.dtype != jnp.float32 else ()
  args = (*subject.split(subject.attached), KEY)
  if shapes:
    assert producers(jax.value_and_grad(subject.loss), shapes, *args, allow=allow) == []
    # The same check sees what it looks for.
    dense = jax.value_and_grad(
      lambda t, f, key: subject.loss(pj.merge(pj.combine(t, f)), {}, key)
    )
    assert producers(dense, shapes, *args, allow=allow)


def test_law_13_dropout_draws_anew_each_step_and_never_in_evaluation(subject):
  """Evaluation needs no key and ignores the rate; two keys give two losses iff there is a rate."""
  train, frozen = subject.split(subject.live)
  state = subject.tx.init(train)
  one, two, again = (subject.step(train, frozen, state, jax.random.key(i))[2] for i in (5, 6, 5))
  rates = [getattr(leaf, "dropout", 0.0) for leaf in subject.weights(subject.live).values()]
  assert one == again
  assert (one != two) == any(rates)
  still = jax.tree.map(
    lambda leaf: leaf.replace(dropout=0.0) if isinstance(leaf, pj.LoRA) else leaf,
    subject.live,
    is_leaf=paths.is_leaf,
  )
  close(subject, subject.forward(subject.live), subject.plain(pj.merge(still)))


def test_weights_have_the_children_that_their_class_declares():
  """`children` and the pytree agree, so masks and specs reach every array."""
  weight = lora(2, targets="query").attach(KEY, {"query": {"kernel": jnp.ones((4, 6))}})["query"]["kernel"]
  arrays_of = [c for c in children(weight).values() if c is not None]
  assert len(arrays_of) == len(jax.tree.leaves(weight)) == 5
