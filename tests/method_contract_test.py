"""The laws that every method obeys, on one tiny model, its layers scanned or unrolled.

A new method is one line in `ENTRIES`. `make test` takes every kind of leaf, of base and of place to
attach once, and both layouts; `make test-all` what nests and repeats them.
"""

import collections
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
from peftjax import hf_peft
from peftjax.core import paths, shared
from peftjax.core.adapted import Adapted
from peftjax.core.attachment import attachments
from peftjax.core.einsum import attend, ragged_dot, take
from peftjax.core.tree import tie
from peftjax.core.weight import Weight, children
from peftjax.methods.lora_weight import LoRA
from peftjax.quant.weight import Quantized
from tests.core.programs import drop, jit, producers
from tests.models import tiny, tiny_experts

_QV = r".*/(query|value)/kernel/[ab]"
_LINEAR = r"bert/.*/kernel/[ab]"
_QV_M = r".*/(query|value)/kernel/[abm]"
_FFN = r".*/layers(_\d+)?/output/dense/kernel"
_SCALES = rf".*/(key|value)/kernel/l|{_FFN}/l"
_TRIPLETS = r"bert/.*/kernel/[abe]"
_BOTTLENECKS = r".*/adapter/(down|up)(_bias)?"
_NORMS = r".*/LayerNorm/(scale|bias)"
_VECTORS = r"bert/.*/kernel/[bd]"


@dataclasses.dataclass(frozen=True)
class Entry:
  """One method or nesting, and what is particular to it."""

  name: str
  method: Callable[[], Any]
  trains: str  # what exactly is trained, as one regex over the paths of arrays
  other: Callable[[], Any] | None = None  # the same with another rank and alpha, to swap with
  layers: tuple[str, ...] = ("scanned",)
  slow: tuple[str, ...] = ()  # layouts that only `make test-all` takes
  dtype: Any = jnp.float32  # of activations
  identity: float = 2e-6  # largest change of the outputs by attach
  rounding: float = 2e-5  # two ways to compute one thing, relative
  base: Any = None  # format the linear layers of the base are quantised in
  world: Any = tiny  # the model and its batch


_BOTH = ("unrolled", "scanned")
_ONE = dict(slow=("unrolled",))
_NONE = dict(layers=(), slow=("scanned",))
lora, adalora, dora, ia3, adapters = pj.lora, pj.adalora, pj.dora, pj.ia3, pj.adapters
prefix, prompt = pj.prefix, pj.prompt
vera, unfreeze, chain = pj.vera, pj.unfreeze, pj.chain
_patterns = dict(
  rank_pattern={".*layers_1/.*": 2, ".*/key/kernel": 5}, alpha_pattern={".*_0/.*": 3}
)
_fewer = dict(rank_pattern={".*layers_0/.*": 1}, alpha_pattern={".*/query/.*": 1})
_QK = ["query", "key"]
_tables = ["word_embeddings", "position_embeddings"]
_embed = r".*/(word|position)_embeddings/embedding/[ab]"

ENTRIES = [
  Entry("lora", lambda: lora(4, 8), _QV, lambda: lora(2, 3), _BOTH),
  Entry(
    "all-linear",
    lambda: lora(4, 8, "all-linear"),
    _LINEAR,
    lambda: lora(3, 9, "all-linear"),
    **_NONE,
  ),
  Entry("rslora", lambda: lora(4, 8, rslora=True), _QV, lambda: lora(2, 3), **_NONE),
  Entry("gaussian", lambda: lora(4, 8, init="gaussian"), _QV, lambda: lora(1, 5), **_NONE),
  Entry(
    "pissa",
    lambda: lora(4, 8, init="pissa"),
    _QV,
    lambda: lora(2, 3, init="pissa"),
    identity=5e-5,
    **_NONE,
  ),
  Entry(
    "patterns",
    lambda: lora(4, 8, _QK, **_patterns),
    r".*/(query|key)/kernel/[ab]",
    lambda: lora(2, 6, _QK, **_fewer),
    **_NONE,
  ),
  Entry("embeddings", lambda: lora(3, 6, _tables), _embed, lambda: lora(2, 9, _tables)),
  Entry("dropout", lambda: lora(4, 8, dropout=0.2), _QV, lambda: lora(2, 3, dropout=0.2)),
  Entry("bf16", lambda: lora(4, 8), _QV, lambda: lora(2, 3), dtype=jnp.bfloat16, rounding=3e-2),
  Entry("nf4", lambda: lora(4, 8), _QV, lambda: lora(2, 3), base=pj.quant.nf4(), **_ONE),
  Entry(
    "int8",
    lambda: lora(4, 8, dropout=0.2),
    _QV,
    lambda: lora(2, 3, dropout=0.2),
    base=pj.quant.int8(32),
    **_NONE,
  ),
  Entry(
    "fp4 all-linear",
    lambda: lora(4, 8, "all-linear"),
    _LINEAR,
    lambda: lora(3, 9, "all-linear"),
    base=pj.quant.fp4(32, double_quant=False),
    **_NONE,
  ),
  Entry(
    "nf4 bf16",
    lambda: lora(4, 8),
    _QV,
    dtype=jnp.bfloat16,
    rounding=3e-2,
    base=pj.quant.nf4(32),
    **_NONE,
  ),
  Entry(
    "adalora",
    lambda: adalora(4, 400.0, target_rank=2),
    _TRIPLETS,
    lambda: adalora(3, 500.0, target_rank=2),
    **_ONE,
  ),
  Entry(
    "adalora nf4",
    lambda: adalora(4, 400.0, ["query", "value"], target_rank=2, dropout=0.2),
    r".*/(query|value)/kernel/[abe]",
    base=pj.quant.nf4(),
    **_NONE,
  ),
  Entry("lora-fa", lambda: lora(4, 8, freeze_a=True), r".*/(query|value)/kernel/b", **_NONE),
  Entry("lora+", lambda: lora(4, 8, b_rate=4.0), _QV, lambda: lora(2, 3, b_rate=4.0), **_NONE),
  Entry(
    "ia3",
    lambda: ia3(["key", "value"], _FFN),
    _SCALES,
    layers=(),
    slow=("unrolled", "scanned"),
  ),
  Entry("ia3 int8", lambda: ia3(["key", "value"], _FFN), _SCALES, base=pj.quant.int8(32)),
  Entry("dora", lambda: dora(4, 8), _QV_M, lambda: dora(2, 3), identity=5e-6, **_ONE),
  Entry(
    "dora all-linear",
    lambda: dora(4, 8, "all-linear", dropout=0.2),
    r"bert/.*/kernel/[abm]",
    lambda: dora(3, 9, "all-linear", dropout=0.2),
    identity=5e-6,
    **_NONE,
  ),
  Entry(
    "dora nf4",
    lambda: dora(4, 8, from_quantised=True),
    _QV_M,
    base=pj.quant.nf4(),
    identity=5e-6,
    **_NONE,
  ),
  Entry("houlsby", lambda: adapters(8), f"{_BOTTLENECKS}|{_NORMS}", None, identity=5e-3, **_ONE),
  Entry(
    "pfeiffer",
    lambda: adapters(8, "pfeiffer"),
    _BOTTLENECKS,
    None,
    identity=3e-2,
    layers=(),
    slow=("unrolled", "scanned"),
  ),
  Entry("parallel", lambda: adapters(8, "parallel"), _BOTTLENECKS, identity=2e-2, **_NONE),
  Entry(
    "scaled parallel nf4",
    lambda: adapters(8, "scaled_parallel"),
    _BOTTLENECKS,
    base=pj.quant.nf4(),
    **_NONE,
  ),
  Entry(
    "after residual", lambda: adapters(8, "after_residual"), _BOTTLENECKS, identity=5e-3, **_NONE
  ),
  Entry(
    "adapters bf16",
    lambda: adapters(8, targets="intermediate", init="lora", norms=False),
    _BOTTLENECKS,
    dtype=jnp.bfloat16,
    rounding=3e-2,
    **_NONE,
  ),
  # A prefix takes its share of the attention at once, a prompt also its place before the text.
  Entry("prefix", lambda: prefix(3), r".*/prefix/(keys|values)", None, identity=1.0, **_ONE),
  Entry(
    "prefix nf4",
    lambda: prefix(3),
    r".*/prefix/(keys|values)",
    base=pj.quant.nf4(),
    identity=1.0,
    **_NONE,
  ),
  Entry("prompt", lambda: prompt(3), r".*/prompt/embeddings", identity=10.0),
  Entry("vera", lambda: vera(6, "all-linear", d_initial=1.0), _VECTORS, None, **_ONE),
  Entry(
    "vera nf4",
    lambda: vera(6, "all-linear", d_initial=1.0, dropout=0.2),
    _VECTORS,
    base=pj.quant.nf4(32),
    **_NONE,
  ),
  Entry(
    "loha",
    lambda: pj.loha(4, 8),
    r".*/(query|value)/kernel/[ab][12]",
    lambda: pj.loha(2, 3),
    **_NONE,
  ),
  Entry(
    "loha nf4",
    lambda: pj.loha(2, 4, "all-linear", dropout=0.2),
    r"bert/.*/kernel/[ab][12]",
    lambda: pj.loha(1, 9, "all-linear", dropout=0.2),
    base=pj.quant.nf4(32),
    **_NONE,
  ),
  Entry("lokr", lambda: pj.lokr(3, 6), r".*/(query|value)/kernel/w[12](_[ab])?"),
  Entry(
    "lokr both nf4",
    lambda: pj.lokr(2, 4, "all-linear", dropout=0.2, decompose_both=True),
    r"bert/.*/kernel/w[12](_[ab])?",
    base=pj.quant.nf4(32),
    **_NONE,
  ),
  Entry(
    "experts",
    lambda: lora(8, 16, "all-linear", divide_rank=True, dropout=0.2),
    r"model/.*_proj/kernel/[ab]",
    lambda: lora(4, 9, "all-linear", divide_rank=True, dropout=0.2),
    world=tiny_experts,
    **_NONE,
  ),
  Entry("full", lambda: unfreeze(".*"), ".*"),
  Entry("head", lambda: unfreeze("head/.*"), "head/.*", **_NONE),
  Entry("bitfit", lambda: unfreeze([".*/bias", "head/.*"]), ".*/bias|head/.*", **_NONE),
  Entry("lora + head", lambda: chain(lora(4, 8), unfreeze("head/.*")), f"{_QV}|head/.*", **_NONE),
  Entry(
    "query | value",
    lambda: chain(lora(4, 8, "query", dropout=0.1), lora(2, 3, "value", dropout=0.1)),
    _QV,
    lambda: chain(lora(1, 8, "query", dropout=0.1), lora(2, 9, "value", dropout=0.1)),
    **_NONE,
  ),
]

KEY = jax.random.key(3)


class Programs:
  """What is computed with one model: compiled once for each structure of parameters."""

  def __init__(self, world, scan, dtype):
    self.world, self.model = world, world.model(scan_layers=scan, dtype=dtype)
    self.layout = pj.linen.layout(self.model, world.TOKENS)
    self.traces = collections.Counter()
    self.plain = jit(self._plain)
    self.forward = jit(self._forward)
    self.grad = jit(self._grad)
    self.scanned_grad = jit(self._scanned_grad)
    self.vmapped_forward = jit(self._vmapped_forward)

  def _plain(self, params):
    """The model as linen knows it, on dense arrays."""
    return self.model.apply({"params": params}, self.world.TOKENS, self.world.MASK)

  def _forward(self, params, **how):
    self.traces["forward"] += 1
    return pj.apply(self.model, params, self.world.TOKENS, self.world.MASK, **how)

  def loss(self, train, frozen, key):
    """In training mode."""
    params = pj.combine(train, frozen) if frozen else train
    logits = self._forward(params, train=True, rngs={"dropout": key})
    return pj.losses.classification(logits, self.world.CLASSES, jnp.ones(len(logits)))

  def _grad(self, train, frozen, key):
    return jax.value_and_grad(self.loss)(train, frozen, key)

  def _scanned_grad(self, train, frozen, keys):
    grad = jax.value_and_grad(jax.checkpoint(self.loss))
    return jax.lax.scan(lambda carry, key: (carry, grad(train, frozen, key)), 0, keys)[1]

  def _vmapped_forward(self, adapters, base):
    return jax.vmap(lambda adapter: self._forward(pj.combine(adapter, base)))(adapters)


_programs = functools.cache(Programs)


class Subject:
  """A method attached to the model."""

  def __init__(self, entry, scan):
    self.entry, self.scan = entry, scan
    self.programs = _programs(entry.world, scan, entry.dtype)
    self.model, self.layout = self.programs.model, self.programs.layout
    self.plain, self.forward = self.programs.plain, self.programs.forward
    self.params = entry.world.scanned_params() if scan else entry.world.params()
    if entry.base:
      self.params = pj.quantize(self.params, entry.base, layout=self.layout)
    self.method = entry.method()
    self.attached = self.method.attach(KEY, self.params, self.layout)
    self.mask = self.method.trainable(self.attached)
    self.tx = self.method.optimizer(optax.adam(0.02), total_steps=10)
    self.update = jit(self._update)

  def _update(self, train, state, grads):
    updates, state = self.tx.update(grads, state, train)
    return optax.apply_updates(train, updates), state

  def step(self, train, frozen, state, key):
    loss, grads = self.programs.grad(train, frozen, key)
    return *self.update(train, state, grads), loss, grads

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
    a, b = pj.tree.align_ranks(a, b)
    return pj.combine(a, base), pj.combine(b, other_base)

  def adapters(self, params):
    return pj.partition(params, pj.tree.adapter_mask(params, self.mask))

  def apart(self, params):
    """The outputs by linen's own modules, where the method is a change of weights."""
    return self.forward(params) if attachments(params) else self.plain(merge(params))

  def weights(self, params):
    """The weights a method attached."""
    flat = {p: leaf for p, leaf in paths.leaves(params).items() if isinstance(leaf, Weight)}
    # A bias of IA3 is no weight without its kernel.
    whole = lambda leaf: not isinstance(leaf, Quantized) and getattr(leaf, "l", 0) is not None
    return {p: leaf for p, leaf in flat.items() if whole(leaf)}


def _subjects():
  """Each goes to one worker."""
  slow = pytest.mark.slow(reason="nests or repeats what other entries are; 10 s each")
  for entry in ENTRIES:
    for layers in (*entry.layers, *entry.slow):
      name = f"{entry.name}-{layers}"
      marks = [slow] * (layers in entry.slow)
      yield pytest.param((entry, layers), id=name, marks=marks)


@pytest.fixture(scope="module", params=_subjects())
def subject(request):
  entry, layers = request.param
  yield Subject(entry, layers == "scanned")
  drop()


def merge(params):
  return pj.merge(params, dense=True)


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
  tied = paths.leaves(tie(subject.live))
  for path in subject.weights(subject.live):
    weight = tied[path]
    if len(weight.stack) > 1:  # of layers with experts, of which one is enough
      weight = jax.tree.map(lambda x: x[0], weight)
    *stack, n_in, n_out = weight.shape
    if (kind := (type(weight), path.split("/")[-1], n_in == n_out)) in seen:
      continue
    seen.add(kind)
    x = jax.random.normal(KEY, (3, 5, n_in))
    y = jax.random.normal(KEY, (3, 5, n_out))
    if stack:
      xs, ys = np.stack([x, -x]), np.stack([y, 2 * y])
      xs, ys = (np.resize(x, (stack[0], *x.shape[1:])) for x in (xs, ys))
      cases = [("lbti,lio->lbto", xs), ("bti,lio->btlo", x), ("lbto,lio->lbti", ys)]
      sizes = jnp.bincount(jnp.arange(15) % stack[0], length=stack[0])
      want = jax.lax.ragged_dot(x.reshape(15, -1), weight.materialize(), sizes)
      got = ragged_dot(x.reshape(15, -1), weight, sizes)
      chex.assert_trees_all_close(got, want, rtol=2e-5, atol=2e-5)
    else:
      ids = jnp.array([[0, 3], [1, 3]])
      if path.endswith("embedding"):
        chex.assert_trees_all_close(
          take(weight, ids), weight.materialize()[ids], rtol=1e-5, atol=1e-5
        )
        chex.assert_trees_all_close(attend(weight, y), y @ weight.base.T, rtol=1e-5, atol=1e-5)
      cases = [("...i,io->...o", x), ("bti,io->bot", x), ("...o,io->...i", y), ("bi,io->bo", x[0])]
    for eqn, value in cases:
      want = jnp.einsum(eqn, value, weight.materialize())
      chex.assert_trees_all_close(pj.einsum(eqn, value, weight), want, rtol=2e-5, atol=2e-5)


def test_law_3_merge_preserves_outputs_and_unmerge_gives_the_base_back(subject, record_property):
  """A merged tree is a plain tree of the model; unmerging it is attaching again.

  What changes no weight is refused.
  """
  if attachments(subject.live):
    with pytest.raises(ValueError, match="cannot be merged"):
      merge(subject.live)
    record_property("refused", "no change of a weight")
    return
  merged = merge(subject.live)
  assert not any(isinstance(leaf, Weight) for leaf in paths.leaves(merged).values())
  chex.assert_trees_all_equal_shapes_and_dtypes(merged, merge(subject.params))
  close(subject, subject.plain(merged), subject.forward(subject.live))
  back = pj.tree.unmerge(merged, subject.live)
  if subject.entry.base:  # its base is dense then, and only its dense form the same
    with pytest.raises(ValueError, match="is quantised"):
      pj.merge(subject.live)
    back, subject_live = merge(back), merge(subject.live)
    chex.assert_trees_all_close(back, subject_live, atol=1e-6)
  else:
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
    grad = np.asarray(grad)
    assert np.isfinite(grad).all() and (grad.any() or path.endswith("key/bias")), path


def test_law_4_rows_beyond_the_rank_stay_zero(subject):
  """Padding to a common rank is not trained."""
  for params in (subject.live, subject.run(subject.swapped[0])[0]):
    for weight in (w for w in subject.weights(params).values() if w.rank is not None):
      for layer in np.ndindex(np.shape(weight.rank)):
        for name, axis in weight.ranked.items():
          rows = np.moveaxis(np.asarray(getattr(weight, name))[layer], axis, 0)
          assert not np.any(rows[int(weight.rank[layer]) :]), name


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


@pytest.mark.fast_for("(lora|nf4|adalora|prefix|houlsby|embeddings)-.*")
def test_law_6_scan_and_remat_give_the_same_loss_and_gradients(subject):
  """A rematerialised loss in a scan over two steps' keys, against those two steps."""
  train, frozen = subject.split(subject.live)
  keys = jax.random.split(jax.random.key(0))
  both = subject.programs.scanned_grad(train, frozen, keys)
  for i in range(2):
    alone = subject.programs.grad(train, frozen, keys[i])
    close(subject, jax.tree.map(lambda x, i=i: np.asarray(x)[i], both), alone, scale=2)


def test_law_6_an_adapter_is_swapped_without_tracing_again(subject):
  """Of another rank and alpha, by `align_ranks`: forward and step are traced no second time."""
  swapped, unaligned = subject.swapped
  assert jax.tree.structure(swapped) == jax.tree.structure(subject.attached)
  one = subject.forward(subject.live)
  before = dict(subject.programs.traces)
  assert before["forward"]
  two, moved = subject.forward(swapped), subject.run(swapped)[0]
  assert dict(subject.programs.traces) == before
  assert np.abs(one - two).max() > 0.03
  if subject.entry.other:
    assert pj.count(swapped, subject.mask) == pj.count(
      unaligned, subject.entry.other().trainable(unaligned)
    )
    assert pj.count(swapped, subject.mask) != pj.count(subject.attached, subject.mask)
    chex.assert_trees_all_close(merge(swapped), merge(unaligned), atol=1e-6)
  close(subject, subject.apart(moved), subject.forward(moved))


@pytest.mark.fast_for("(lora|nf4|adalora|prefix|houlsby|embeddings)-.*")
def test_law_6_vmap_over_two_stacked_adapters_equals_the_two_alone(subject):
  """One base, two adapters of different rank."""
  other = subject.run(subject.swapped[0])[0]
  (a, base), (b, _) = subject.adapters(subject.live), subject.adapters(other)
  both = jax.tree.map(lambda *xs: np.stack(xs), a, b)
  alone = np.stack([subject.forward(params) for params in (subject.live, other)])
  close(subject, subject.programs.vmapped_forward(both, base), alone)


@pytest.mark.fast_for("(lora|nf4|adalora|prefix|houlsby|embeddings)-.*")
@pytest.mark.parametrize(
  "shape",
  [
    "data:2,fsdp:2,tensor:2",
    pytest.param("fsdp:2,tensor:4", marks=pytest.mark.slow(reason="another mesh; 4 s a subject")),
  ],
)
def test_law_7_a_sharded_model_computes_the_same(subject, shape):
  """Loss and gradients on one mesh, the outputs on another."""
  mesh = pj.sharding.make_mesh(shape)
  shardings = pj.sharding.shardings(subject.live, mesh)
  params = jax.device_put(jax.device_get(subject.live), shardings)
  for path, x in arrays(params).items():
    assert x.sharding == arrays(shardings)[path]
  params = pj.sharding.named(params, mesh)
  if shape == "fsdp:2,tensor:4":
    want = subject.forward(subject.live)
    with jax.set_mesh(mesh):
      close(subject, subject.forward(params), want)
  else:
    train, frozen = pj.partition(params, subject.method.trainable(params))
    with jax.set_mesh(mesh):
      got = subject.programs.grad(train, frozen, KEY)
    want = subject.programs.grad(*subject.split(subject.live), KEY)
    close(subject, arrays(got), arrays(want), scale=2)


def test_law_7_children_lie_as_their_weight_does(subject):
  """A along the inputs, B along the outputs, the rank never, what is per layer by layer."""
  mesh = pj.sharding.make_mesh("data:2,fsdp:2,tensor:2")
  specs = pj.sharding.specs(subject.attached, mesh)
  is_spec = lambda x: isinstance(x, P)
  assert jax.tree.structure(specs, is_leaf=is_spec) == jax.tree.structure(subject.attached)
  dense = paths.leaves(pj.sharding.specs(subject.params, mesh))
  for path, weight in subject.weights(specs).items():
    spec = dense[path].codes if isinstance(weight.base, Quantized) else dense[path]
    *stack, n_in, n_out = (*spec, None, None)[
      : len(subject.layout[path].ins) + 1 + len(paths.leaves(subject.params)[path].shape) - 2
    ]
    assert getattr(weight.base, "codes", weight.base) == spec
    if isinstance(weight, LoRA) and not any(stack):  # experts are split themselves
      over = lambda names: names and ("tensor", "fsdp")
      assert weight.a == P(*stack, None, over(n_in)) and weight.b == P(*stack, over(n_out), None)
      assert weight.scale == weight.rank == P(*stack)


def test_law_8_a_checkpoint_of_the_adapter_and_the_base_restore_the_model(subject, tmp_path):
  """Orbax keeps every array of the adapter tree and its structure, holes included."""
  adapters, base = subject.adapters(subject.live)
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "adapter", adapters)
    checkpointer.wait_until_finished()
    like = jax.tree.map(ocp.utils.to_shape_dtype_struct, adapters)
    restored = checkpointer.restore(tmp_path / "adapter", like)
  params = pj.combine(restored, base)
  assert jax.tree.structure(params) == jax.tree.structure(subject.live)
  chex.assert_trees_all_equal(params, subject.live)
  # What is not saved is the model's own, untouched.
  flat = arrays(subject.params)
  for path, x in arrays(base).items():
    np.testing.assert_array_equal(x, flat[re.sub("/base($|/)", r"\1", path)])


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
  mesh = pj.sharding.make_mesh("fsdp:2,tensor:4")
  assert pj.sharding.specs(abstract, mesh) == pj.sharding.specs(subject.attached, mesh)
  weights = subject.weights(subject.attached).values()
  ranks = [leaf.rank for leaf in weights if leaf.rank is not None]
  if all((rank == rank.max()).all() for rank in ranks):  # shapes do not say what is padding
    assert pj.describe(abstract, mask) == pj.describe(subject.attached, subject.mask)
    assert pj.count(abstract, mask) == pj.count(subject.attached, subject.mask)
  assert pj.count(abstract) >= pj.count(subject.attached)


def test_law_10_the_files_of_a_method_give_the_model_back(subject, tmp_path, record_property):
  """Where a file format exists: PEFT directories. The others are refused, saying why."""
  weights = subject.weights(subject.live).values()
  save = lambda: hf_peft.save(tmp_path, subject.live, subject.model, rslora=True)
  changed = any(weight.residual for weight in weights)
  if changed or not hf_peft.has_adapter(subject.live):
    with pytest.raises(ValueError, match="PiSSA" if changed else "no adapter that PEFT knows"):
      save()
    assert not list(tmp_path.iterdir())
    record_property("refused", "no file of PEFT's says it")
    return
  save()
  loaded, mask = hf_peft.load(tmp_path, subject.params, subject.model)
  if not attachments(loaded):
    chex.assert_trees_all_close(merge(loaded), merge(subject.live), atol=1e-6)
  chex.assert_trees_all_equal(attachments(loaded), attachments(subject.live))
  assert set(subject.weights(loaded)) == set(subject.weights(subject.live))
  trained = {p for p, on in arrays(mask).items() if on}
  assert trained >= {p for p, on in arrays(subject.mask).items() if on}


def test_law_11_factored_means_factored(subject):
  """No equation of the loss and its gradients yields an array of a weight's shape."""
  shapes = set()
  for weight in subject.weights(subject.attached).values():
    shapes |= {weight.shape, weight.shape[-2:]}
  # Compute in another dtype casts the base, and nothing but the base; a quantised one is
  # looked up, scaled and reshaped, but nothing is added to it, nor is it a product.
  allow = ("convert_element_type", "scan") if subject.entry.dtype != jnp.float32 else ()
  decoding = "gather select_n cond sub div broadcast_in_dim reshape jit"
  decoding += " convert_element_type bitcast_convert_type"
  allow += tuple(decoding.split()) if subject.entry.base else ()
  args = (*subject.split(subject.attached), KEY)
  if shapes:
    assert producers(jax.value_and_grad(subject.programs.loss), shapes, *args, allow=allow) == []
    # The same check sees what it looks for.
    dense = jax.value_and_grad(
      lambda t, f, key: subject.programs.loss(merge(pj.combine(t, f)), {}, key)
    )
    assert producers(dense, shapes, *args, allow=allow)


def test_law_13_dropout_draws_anew_each_step_and_never_in_evaluation(subject):
  """Evaluation needs no key and ignores the rate; two keys give two losses iff there is a rate."""
  train, frozen = subject.split(subject.live)
  state = subject.tx.init(train)
  one, two, again = (subject.step(train, frozen, state, jax.random.key(i))[2] for i in (5, 6, 5))
  rates = [leaf.dropout for leaf in subject.weights(subject.live).values()]
  assert one == again
  assert (one != two) == any(rates)
  still = jax.tree.map(
    lambda leaf: leaf.replace(dropout=0.0) if isinstance(leaf, Adapted) and leaf.dropout else leaf,
    subject.live,
    is_leaf=paths.is_leaf,
  )
  close(subject, subject.forward(subject.live), subject.apart(still))


def test_law_14_weights_say_what_other_files_ask_of_them(subject):
  """Every attribute of `Adapted` is there and of its kind, and has what it promises."""
  params = subject.attached
  lenders = {**paths.leaves(params), **shared.nodes(params)}
  for path, weight in subject.weights(params).items():
    assert isinstance(weight, Adapted)
    layers = weight.stack
    assert layers == weight.shape[: len(layers)] and len(paths.layer_paths(path, layers)) >= 1
    assert 0 <= weight.dropout < 1 and isinstance(weight.residual, bool)
    assert weight.key is None and (weight.rank is None or weight.rank.shape == layers)
    assert weight.rates.keys() <= children(weight).keys() - weight.pretrained
    if weight.dropout:
      assert weight.with_key(KEY, path).key.shape == layers
    if weight.of:
      assert weight.borrow(lenders[weight.of]).shape == weight.shape
  found = set(pj.optim.metrics(subject.tx.init(subject.split(params)[0])))
  assert bool(found) == any(w.owned for w in subject.weights(params).values())


def test_weights_have_the_children_that_their_class_declares():
  """`children` and the pytree agree, so masks and specs reach every array."""
  weight = lora(2, targets="query").attach(KEY, {"query": {"kernel": jnp.ones((4, 6))}})["query"][
    "kernel"
  ]
  arrays_of = [c for c in children(weight).values() if c is not None]
  assert len(arrays_of) == len(jax.tree.leaves(weight)) == 5
