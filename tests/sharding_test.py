"""Meshes, rules, and the specs of children."""

import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

import peftjax as pj
from configs.causal_lm import get_config
from experiments.planning.model import LLAMA, shapes
from peftjax import sharding
from peftjax.core import paths
from peftjax.core.layout import Axes
from peftjax.sharding import AXES, RULES, arranged, batch_shardings, make_mesh, specs
from peftjax.training.settings import from_config
from tests.models import tiny

MESH = "data:2,fsdp:2,tensor:2"


def sizes(text, devices=None):
  return tuple(make_mesh(text, devices).shape.values())


def test_a_mesh_from_text():
  mesh = make_mesh(MESH)
  assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "sequence": 1, "tensor": 2}
  assert sizes(" tensor:4 ,fsdp:2") == (1, 2, 1, 4)
  assert sizes("sequence:4,data:2") == (2, 1, 4, 1)
  assert sizes("", jax.devices()[:1]) == (1, 1, 1, 1)


@pytest.mark.parametrize("text", ["model:8", "data:0", "data", "data:2;fsdp:4", "data:-8", "8"])
def test_a_mesh_that_is_not_written_so_raises(text):
  with pytest.raises(ValueError, match="is not AXIS:SIZE with an axis of data, fsdp, sequence"):
    make_mesh(text)


def test_one_axis_may_be_what_is_left():
  assert sizes("fsdp:-1") == (1, 8, 1, 1)
  assert sizes("fsdp:-1,tensor:2") == (1, 4, 1, 2)
  for text, told in (
    ("data:-1,tensor:3", "has 6 places for 8 devices"),
    ("data:-1,tensor:16", "has 16 places for 8 devices"),
    ("data:-1,fsdp:-1", "only one axis can be -1, not data and fsdp"),
    ("data:-1,data:-1", "names data twice"),
  ):
    with pytest.raises(ValueError, match=told):
      make_mesh(text)


def test_a_mesh_of_another_size_than_the_devices_raises():
  with pytest.raises(
    ValueError, match="has 4 places for 8 devices; write sizes whose product is 8"
  ):
    make_mesh("data:2,tensor:2")
  with pytest.raises(ValueError, match="names data twice; write it once"):
    make_mesh("data:2,tensor:2,data:2")


def test_some_devices_of_a_slice_that_have_no_such_shape_raise():
  """Three of the four corners of a square."""
  kind = dict(platform="tpu", device_kind="TPU v5 lite", process_index=0, core_on_chip=0)
  devices = [
    types.SimpleNamespace(id=i, coords=(i % 2, i // 2, 0), slice_index=0, **kind) for i in range(3)
  ]
  with pytest.raises(ValueError, match="'fsdp:3' cannot be laid over these 3 TPUs"):
    make_mesh("fsdp:3", devices)


def test_between_slices_go_rows_alone():
  """On the axis of the data that they divide; each slice is a block of the mesh."""
  kind = dict(platform="cpu", device_kind="cpu", process_index=0)
  devices = [types.SimpleNamespace(id=i, slice_index=i // 4, **kind) for i in range(8)]

  def slices(**given):
    found = arranged("", {"data": 1, "fsdp": 1, "sequence": 1, "tensor": 1, **given}, devices)
    assert found.shape == (*(given.get(a, 1) for a in ("data", "fsdp", "sequence", "tensor")),)
    return np.vectorize(lambda device: device.slice_index)(found)

  assert slices(data=2, fsdp=2, tensor=2)[:, 0, 0, 0].tolist() == [0, 1]
  assert slices(data=4, tensor=2)[:, 0, 0, 0].tolist() == [0, 0, 1, 1]
  assert slices(fsdp=2, tensor=4)[0, :, 0].tolist() == [[0] * 4, [1] * 4]
  for axis in ("tensor", "sequence"):
    with pytest.raises(ValueError, match=r"on 2 slices of devices: data or fsdp has to be"):
      slices(**{axis: 8})


def test_the_rules_of_the_encoder():
  """Wide projections split outputs, narrow ones inputs; norms and odd biases are everywhere."""
  found = paths.leaves(specs(tiny.params(), make_mesh(MESH)))
  layer = "bert/encoder/layers_0"
  assert found[f"{layer}/attention/self/query/kernel"] == P("fsdp", "tensor")
  assert found[f"{layer}/attention/self/value/bias"] == P("tensor")
  assert found[f"{layer}/attention/output/dense/kernel"] == P("tensor", "fsdp")
  assert found[f"{layer}/attention/output/dense/bias"] == P(None)
  assert found[f"{layer}/intermediate/dense/kernel"] == P("fsdp", "tensor")
  assert found[f"{layer}/output/dense/kernel"] == P("tensor", "fsdp")
  assert found[f"{layer}/output/LayerNorm/scale"] == P(None)
  assert found["bert/embeddings/word_embeddings/embedding"] == P("tensor", "fsdp")
  assert found["bert/pooler/dense/kernel"] == P("fsdp", None)
  assert found["head/classifier/kernel"] == P("fsdp", None)


@pytest.mark.parametrize(
  ("path", "want"),
  [
    ("model/layers/self_attn/k_proj/kernel", P(None, "fsdp", "tensor")),
    ("model/layers/self_attn/o_proj/kernel", P(None, "tensor", "fsdp")),
    ("model/layers/mlp/up_proj/kernel", P(None, "fsdp", "tensor")),
    ("model/layers/mlp/down_proj/kernel", P(None, "tensor", "fsdp")),
    ("model/embed_tokens/embedding", P("tensor", "fsdp")),
    ("lm_head/kernel", P("fsdp", "tensor")),
    ("transformer/h/attn/c_attn/kernel", P(None, "fsdp", None)),
    ("transformer/h/mlp/c_fc/kernel", P(None, "fsdp", "tensor")),
    ("transformer/h/mlp/c_proj/kernel", P(None, "tensor", "fsdp")),
  ],
)
def test_the_rules_of_the_decoders(path, want):
  rank = 2 if want[0] else 3
  tree = unflatten_dict({path: jnp.ones((8,) * rank)}, sep="/")
  assert paths.leaves(specs(tree, make_mesh(MESH))) == {path: want}


def test_a_stack_of_layers_is_not_split():
  found = paths.leaves(specs(tiny.scanned_params(), make_mesh(MESH)))
  layer = "bert/encoder/layers"
  assert found[f"{layer}/attention/self/query/kernel"] == P(None, "fsdp", "tensor")
  assert found[f"{layer}/attention/self/query/bias"] == P(None, "tensor")


def test_children_derive_their_specs_from_the_kernels():
  """A along the inputs, B along the outputs, over both axes; the rank never; also stacked."""
  tree = {"query": {"kernel": jnp.ones((3, 12, 8))}}
  method = pj.lora(4, targets="query")
  params = method.attach(jax.random.key(0), tree, {"query/kernel": Axes()})
  rules = [("query/kernel", ("fsdp", "tensor"))]
  got = specs(params, make_mesh(MESH), rules)["query"]["kernel"]
  assert got.base == P(None, "fsdp", "tensor")
  assert got.a == P(None, None, ("tensor", "fsdp")) and got.b == P(None, ("tensor", "fsdp"), None)
  assert got.scale == got.rank == P(None) and got.key is None


def test_a_flattened_group_of_axes_is_split_as_its_first():
  tree = {"heads": {"kernel": jnp.ones((12, 4, 2))}}
  axes = {"heads/kernel": Axes((-3,), (-2, -1))}
  params = pj.lora(2, targets="heads").attach(jax.random.key(0), tree, axes)
  got = specs(params, make_mesh(MESH), [(".*", ("fsdp", "tensor", None))])["heads"]["kernel"]
  both = ("tensor", "fsdp")
  assert (got.base, got.a, got.b) == (P("fsdp", "tensor", None), P(None, both), P(both, None))


def test_a_mesh_axis_that_does_not_divide_is_dropped_there_only():
  tree = {"w": jnp.ones((6, 8)), "v": jnp.ones((8, 3))}
  got = specs(tree, make_mesh("fsdp:4,tensor:2"), [(".*", ("fsdp", "tensor"))])
  assert got == {"w": P(None, "tensor"), "v": P("fsdp", None)}
  rules = [(".*", (("fsdp", "tensor"), None))]  # one axis over two
  for rows, want in ((4, "fsdp"), (5, None), (16, ("fsdp", "tensor"))):
    got = specs({"w": jnp.ones((rows, 6))}, make_mesh("fsdp:4,tensor:2"), rules)
    assert got == {"w": P(want, None)}
  for params in (tree, tiny.params()):  # nothing left to refuse
    jax.device_put(params, pj.sharding.shardings(params, make_mesh("tensor:8")))


@pytest.mark.parametrize(
  ("mesh", "shape", "want"),
  [
    ("fsdp:4,tensor:2", (256, 64), ("fsdp", "tensor")),
    ("fsdp:8", (256, 64), (None, ("tensor", "fsdp"))),  # four blocks, eight devices
    ("fsdp:2,tensor:4", (96, 64), (None, ("tensor", "fsdp"))),  # a short last block
    ("fsdp:8", (256, 60), (None, "tensor")),  # neither way
    ("tensor:8", (256, 64), ("fsdp", "tensor")),
  ],
)
def test_blocks_of_a_quantised_matrix_stay_whole(mesh, shape, want):
  mesh = make_mesh(mesh)
  tree = {"query": {"kernel": jnp.ones(shape)}}
  tree = pj.quantize(tree, pj.quant.nf4(64, double_quant=False), "query")
  params = pj.lora(2, targets="query").attach(jax.random.key(0), tree)
  rules = [(".*", ("fsdp", "tensor"))]
  (got,) = paths.leaves(specs(params, mesh, rules)).values()
  assert got.base.codes == got.base.scales == P(*want)
  both = ("tensor", "fsdp")
  assert (got.a, got.b) == (
    P(None, want[0] and both),
    P(both if shape[1] == 64 else "tensor", None),
  )
  placed = jax.device_put(params, pj.sharding.shardings(params, mesh, rules))["query"][
    "kernel"
  ].base
  ways = shape[0] * shape[1] // 2 // placed.codes.addressable_shards[0].data.size
  assert ways == (1 if want == (None, "tensor") else 8)


def test_the_first_rule_wins_and_a_leaf_without_one_raises():
  tree = {"a": jnp.ones((8, 8)), "b": jnp.ones((8, 8))}
  mesh = make_mesh(MESH)
  rules = [("a", ("fsdp", None)), (".*", ("tensor", None))]
  assert specs(tree, mesh, rules) == {"a": P("fsdp", None), "b": P("tensor", None)}
  with pytest.raises(ValueError, match="no sharding rule matches b"):
    specs(tree, mesh, rules[:1])
  with pytest.raises(ValueError, match="rule for a names the axis 'model'; the mesh has"):
    specs(tree, mesh, [(".*", ("model", None))])


def test_parameters_can_be_born_sharded():
  """`jit(init, out_shardings=...)` from shapes alone."""
  mesh = make_mesh(MESH)
  init = lambda key: {"block": {"query": {"kernel": jax.random.normal(key, (12, 8))}}}
  method = pj.lora(2, targets="query")
  make = lambda key: method.attach(key, init(key))
  shardings = pj.sharding.shardings(jax.eval_shape(make, jax.random.key(0)), mesh)
  params = jax.jit(make, out_shardings=shardings)(jax.random.key(0))
  assert jax.tree.map(lambda x: x.sharding, params) == shardings
  weight = params["block"]["query"]["kernel"]
  assert weight.base.addressable_shards[0].data.shape == (6, 4)
  assert weight.a.addressable_shards[0].data.shape == (2, 3)


def test_rows_of_a_batch_are_split_over_both_data_axes_and_tokens_over_their_own():
  batch = {"tokens": jnp.ones((8, 6)), "labels": jnp.ones(8)}
  for mesh, width in ((MESH, 6), ("data:2,fsdp:2,sequence:2", 3)):
    x = jax.device_put(batch, batch_shardings(batch, make_mesh(mesh)))
    assert x["tokens"].addressable_shards[0].data.shape == (2, width)
    assert x["labels"].addressable_shards[0].data.shape == (2,)


def test_what_blocks_keep_whole_splits_the_other_axis_in_one_order():
  """Three blocks along the inputs divide by neither axis: whatever the rule, fsdp comes last."""
  tree = {name: {"kernel": jnp.ones((96, 64))} for name in ("q_proj", "o_proj")}
  tree = pj.quantize({"layer": tree}, pj.quant.nf4(32, double_quant=False), ".*")
  found = paths.leaves(specs(tree, make_mesh(MESH)))
  for name in ("q_proj", "o_proj"):
    assert found[f"layer/{name}/kernel"].codes == P(None, ("tensor", "fsdp"))


@functools.cache
def large(name, quant):
  """The shapes of a LLaMA with LoRA on every kernel."""
  settings = from_config(get_config(f"quant={quant},method=lora"))
  return shapes(settings, name, "bfloat16", 512)[-1]


@pytest.mark.fast_for("llama-65b-.*|llama-7b-none")
@pytest.mark.parametrize("quant", ["none", "nf4"])
@pytest.mark.parametrize("name", LLAMA)
def test_every_kernel_of_large_models_is_split_by_all_devices(name, quant):
  """Of 7B to 65B on 8 to 256 devices: kernels evenly, factors as far as a rank of 16 allows."""
  params = large(name, quant)
  for fsdp, tensor in ((8, 1), (4, 2), (16, 1), (4, 4), (64, 1), (8, 8), (256, 1), (32, 8)):
    mesh = AbstractMesh((1, fsdp, 1, tensor), AXES)
    sharding.check_split(params, mesh)
    for place in sharding.places(params, mesh):
      whole = math.prod(place.shape) * jnp.dtype(place.dtype).itemsize
      if place.path.endswith(("kernel", "base", "codes", "embedding")):
        assert place.bytes * fsdp * tensor == whole, (place, fsdp, tensor)
      assert place.bytes < sharding.LARGE or place.bytes < whole


@pytest.mark.parametrize("rule", ["kernel", "=fsdp", "(=fsdp", "kernel=model", "kernel=fsdp,,x"])
def test_a_rule_that_is_not_written_so_raises(rule):
  with pytest.raises(ValueError, match=r"rules: .* is not PATTERN=AXIS,AXIS"):
    sharding.rules([rule])


@pytest.mark.parametrize(
  ("rule", "told"),
  [
    ("kernel=fsdp,fsdp", "'kernel=fsdp,fsdp' names an axis twice"),
    ("up/krnel=fsdp", "'up/krnel' matches no path of this model, such as up/kernel"),
    (".*=fsdp,tensor", r"'\.\*' names 2 axes and matches up/bias, whose shape is \[8\]"),
  ],
)
def test_a_rule_that_does_nothing_or_too_much_raises(rule, told):
  params = {"up": {"kernel": jnp.zeros((8, 8)), "bias": jnp.zeros(8)}}
  with pytest.raises(ValueError, match=told):
    sharding.check_split(params, make_mesh(MESH), sharding.rules([rule]))


def test_rules_of_a_config_come_before_the_usual():
  made = sharding.rules(["lm_head/kernel=-,tensor", ".*/norm/scale=fsdp", "x=y=fsdp"])
  assert made[:3] == (
    ("lm_head/kernel", (None, "tensor")),
    (".*/norm/scale", ("fsdp",)),
    ("x=y", ("fsdp",)),
  )
  assert made[3:] == RULES
  config = get_config("quant=none,method=lora")
  config.rules = ("lm_head/kernel=-,tensor",)
  assert from_config(config).sharding_rules()[0] == made[0]


def test_a_large_array_lies_whole_only_if_a_rule_says_so():
  """A vocabulary and a width that nothing divides; small ones are no matter."""
  kernel = jax.ShapeDtypeStruct((4095, 8191), jnp.float32)
  params = {"layers": {"up_proj": {"kernel": kernel, "bias": jnp.zeros(8191)}}}
  for mesh in (make_mesh("data:8"), make_mesh("fsdp:8", jax.devices())):
    if mesh.shape["data"] == 8:
      sharding.check_split(params, mesh)
      continue
    told = r"layers/up_proj/kernel \[4095, 8191\] float32, 128 MiB, would lie whole on each of 8 "
    with pytest.raises(ValueError, match=told):
      sharding.check_split(params, mesh)
    sharding.check_split(params, mesh, sharding.rules(["layers/up_proj/kernel="]))
    sharding.check_split(params, make_mesh("tensor:8"), sharding.rules([".*/kernel=-,fsdp"]))
  quantised = jax.eval_shape(
    lambda: pj.quantize(
      {"up_proj": {"kernel": jnp.zeros((64 * 81, 32767))}}, pj.quant.nf4(), where=".*"
    )
  )
  with pytest.raises(ValueError, match=r"up_proj/kernel/codes .* \(?'?.*'up_proj/kernel='"):
    sharding.check_split(quantised, make_mesh("fsdp:8"))
