"""Meshes, and the place of every leaf of a parameter tree on one."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.extend.core import jaxpr_as_fun
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from peftjax.core import paths
from peftjax.core.adapted import axis_names
from peftjax.core.mesh import DATA, SEQUENCE, divisible, group, ways
from peftjax.core.params import Params
from peftjax.core.weight import Weight, children
from peftjax.quant.weight import Quantized

# The last vary fastest over the devices, so the axes that talk most are nearest.
AXES = (*DATA, SEQUENCE, "tensor")

Rules = Sequence[tuple[str, tuple[str | None, ...]]]

# Path pattern to the mesh axes of the *last* axes of the dense array; stacked layers before them
# are not split. Megatron's pairing: widening kernels split their outputs, narrowing ones inputs.
RULES: Rules = (
  (r".*/(pos_)?(query|key|value)/kernel", ("fsdp", "tensor")),
  (r".*/intermediate/dense/kernel", ("fsdp", "tensor")),
  (r".*/((pos_)?(query|key|value)|intermediate/dense)/bias", ("tensor",)),
  (r".*/output/dense/kernel", ("tensor", "fsdp")),
  # Each device has some of the experts, whole but for what "fsdp" splits.
  (r".*/experts/(gate|up)_proj/kernel", ("tensor", "fsdp", None)),
  (r".*/experts/down_proj/kernel", ("tensor", None, "fsdp")),
  (r".*/(q|k|v|qkv|gate|up|gate_up)_proj/kernel", ("fsdp", "tensor")),
  (r".*/(q|k|v|wi|wi_0|wi_1)/kernel", ("fsdp", "tensor")),
  (r".*/(o|wo)/kernel", ("tensor", "fsdp")),
  (r".*/(q|k|v|gate|up)_proj/bias", ("tensor",)),
  (r".*/(o|down)_proj/kernel", ("tensor", "fsdp")),
  (r".*/c_fc/kernel", ("fsdp", "tensor")),
  (r".*/c_fc/bias", ("tensor",)),
  (r".*/c_proj/kernel", ("tensor", "fsdp")),
  (r"lm_head/kernel", ("fsdp", "tensor")),
  (r"(.*/)?(word_embeddings|embed_tokens|wte)/embedding", ("tensor", "fsdp")),
  (r"(.*/)?kernel", ("fsdp", None)),
  (r".*", ()),
)


# Bytes from which an array lies whole on every device only if a rule says so.
LARGE = 2**26


def rules(given: Sequence[str]) -> Rules:
  """`("lm_head/kernel=fsdp,tensor", "wte/.*=")` and, after them, `RULES`.

  The axes are those of the last axes of the dense array; "-" and nothing at all split none.

  Raises:
    ValueError: a rule without "=", with an invalid pattern, or with an axis that is unknown or
      named twice.
  """
  made = []
  for rule in given:
    pattern, equals, names = rule.rpartition("=")
    axes = tuple(None if name == "-" else name for name in names.split(",") if name)
    try:
      re.compile(pattern)
    except re.error:
      equals = ""
    if not equals or not pattern or not {*axes} <= {*AXES, None}:
      raise ValueError(
        f"rules: {rule[:200]!r} is not PATTERN=AXIS,AXIS, with a pattern of paths and axes of "
        f'{", ".join(AXES)}, or "-" for none'
      )
    if len(set(split := [name for name in axes if name])) < len(split):
      raise ValueError(f"rules: {rule[:200]!r} names an axis twice; an array is split over it once")
    made.append((pattern, axes))
  return (*made, *RULES)


def make_mesh(text: str, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A mesh from `"data:2,fsdp:2,tensor:2"`; axes left out have size 1, one of -1 takes the rest.

  Devices stand so that neighbours along an axis are neighbours physically. Between slices of
  TPUs, whose network is slow, only "data" goes, or "fsdp" where there is no other.

  Raises:
    ValueError: on an unknown axis, one that is named twice, a bad size, a product that is not the
      number of devices, or slices of whose number no data axis is a multiple.
  """
  devices = jax.devices() if devices is None else devices
  given: dict[str, int] = {}
  for part in text.split(",") if text else []:
    match = re.fullmatch(r"\s*(\w+):(-1|[1-9]\d{0,6})\s*", part)
    if not match or match[1] not in AXES:
      raise ValueError(
        f"mesh {text!r}: {part!r} is not AXIS:SIZE with an axis of {', '.join(AXES)}; "
        'write e.g. "data:2,fsdp:2,tensor:2", or -1 for the rest'
      )
    if match[1] in given:
      raise ValueError(f"mesh {text!r} names {match[1]} twice; write it once, with one size")
    given[match[1]] = int(match[2])
  sizes = {axis: given.get(axis, 1) for axis in AXES}
  rest = [axis for axis, size in sizes.items() if size == -1]
  if len(rest) > 1:
    raise ValueError(f"mesh {text!r}: only one axis can be -1, not {' and '.join(rest)}")
  for axis in rest:
    sizes[axis] = max(1, len(devices) // -math.prod(sizes.values()))
  if math.prod(sizes.values()) != len(devices):
    more = "XLA_FLAGS=--xla_force_host_platform_device_count=8 makes eight of a CPU"
    raise ValueError(
      f"mesh {text!r} has {math.prod(sizes.values())} places for {len(devices)} devices; write "
      f"sizes whose product is {len(devices)}, or -1 for the rest"
      + (f" ({more})" if devices[0].platform == "cpu" else "")
    )
  return Mesh(arranged(text, sizes, devices), AXES)


def arranged(text: str, sizes: Mapping[str, int], devices: Sequence[Any]) -> np.ndarray:
  """The devices of `make_mesh`, by axis; see there."""
  slices = len({getattr(device, "slice_index", 0) for device in devices})
  if slices == 1:
    if devices[0].platform == "tpu":
      try:
        return mesh_utils.create_device_mesh([*sizes.values()], devices)
      except (AssertionError, NotImplementedError, ValueError):
        raise ValueError(
          f"mesh {text!r} cannot be laid over these {len(devices)} TPUs so that neighbours stay "
          "neighbours; write other sizes, or take all devices of a slice"
        ) from None
    return np.asarray(devices).reshape(tuple(sizes.values()))
  across = next((axis for axis in DATA if sizes[axis] % slices == 0), None)
  if across is None:
    raise ValueError(
      f"mesh {text!r} on {slices} slices of devices: data or fsdp has to be a multiple of "
      f"{slices}, since only rows of a batch may go between slices"
    )
  between = [slices if axis == across else 1 for axis in sizes]
  within = [size // n for size, n in zip(sizes.values(), between, strict=True)]
  return mesh_utils.create_hybrid_device_mesh(within, between, devices)


def specs(params: Params, mesh: Mesh, rules: Rules = RULES) -> Any:
  """A `PartitionSpec` for every array of `params`.

  The first rule that matches a leaf's path gives the spec of its dense array; the children of a
  `Weight` derive theirs from it, and a method's arrays are split over "tensor" and "fsdp" both:
  a factor has one of the kernel's axes. A mesh axis that does not divide an array's axis is dropped
  there; one that would cut the blocks of a quantised matrix splits its other axis. An array that a
  model annotated (`nn.Partitioned`) keeps its own axes.

  Raises:
    ValueError: if no rule matches a leaf, or a rule names an axis the mesh lacks.
  """

  def of(path: str, leaf: Any) -> Any:
    names = axis_names(leaf) or _rule(path, rules)
    for name in jax.tree.leaves(tuple(names)):  # one axis may be split over several: a tuple
      if name not in mesh.shape:
        raise ValueError(f"rule for {path} names the axis {name!r}; the mesh has {mesh.axis_names}")
    spec = P(*[None] * (len(leaf.shape) - len(names)), *names)
    spec = _along_blocks(spec, leaf, mesh) if isinstance(leaf, Weight) else spec
    tree = _spread(leaf.child_specs(spec), mesh) if isinstance(leaf, Weight) else spec
    return jax.tree.map(lambda s, x: divisible(s, x.shape, mesh), tree, leaf, is_leaf=_is_spec)

  return paths.map_leaves(of, params)


def shardings(params: Params, mesh: Mesh, rules: Rules = RULES) -> Any:
  """`specs` as `NamedSharding`: for `jax.device_put` or the `out_shardings` of an init."""
  return jax.tree.map(
    lambda spec: NamedSharding(mesh, spec),
    specs(params, mesh, rules),
    is_leaf=lambda x: isinstance(x, P),
  )


def named(params: Params, mesh: Mesh, rules: Rules = RULES) -> Any:
  """`params` in which each quantised matrix knows how `specs` splits it; arrays stay."""

  def name(leaf: Any, spec: Any) -> Any:
    return leaf.replace(names=tuple(spec.codes)[-2:]) if isinstance(leaf, Quantized) else leaf

  whole = lambda leaf: isinstance(leaf, Quantized)
  return jax.tree.map(name, params, specs(params, mesh, rules), is_leaf=whole)


class Place(NamedTuple):
  """The place of an array.

  Attributes:
    path: path in the tree of parameters.
    leaf: the path that rules match: that of the array, or of the weight that it is a part of.
    shape, dtype: shape and dtype of the whole array.
    spec: by axis, which axes of the mesh split it.
    bytes: its bytes on a device.
  """

  path: str
  leaf: str
  shape: tuple[int, ...]
  dtype: str
  spec: P
  bytes: int


def places(params: Params, mesh: Mesh, rules: Rules = RULES) -> list[Place]:
  """Every array of `params`, the largest on a device first; shapes will do."""
  lies, made = paths.leaves(specs(params, mesh, rules)), []
  for leaf, weight in paths.leaves(params).items():
    found = jax.tree_util.tree_leaves_with_path(weight)
    by_array = jax.tree.leaves(lies[leaf], is_leaf=_is_spec)
    for (part, x), spec in zip(found, by_array, strict=True):
      local = NamedSharding(mesh, spec).shard_shape(x.shape)
      path = "/".join(filter(None, (leaf, paths.name(part))))
      size = math.prod(local) * x.dtype.itemsize
      made.append(Place(path, leaf, tuple(x.shape), str(x.dtype), spec, size))
  return sorted(made, key=lambda place: -place.bytes)


def check_split(params: Params, mesh: Mesh, rules: Rules = RULES) -> None:
  """Raises ValueError if a large array lies whole on devices that should split it between them.

  It may where a rule before `RULES` matches its path. Each such rule has to match one, and arrays
  that have the axes it names.
  """
  own = rules[: len(rules) - len(RULES)]
  _check_rules(own, params)
  if ways(("fsdp", "tensor"), mesh) == 1:
    return
  for path, leaf, shape, dtype, spec, size in places(params, mesh, rules):
    split = any(ways(names, mesh) > 1 for names in spec)
    if size < LARGE or split or any(re.fullmatch(pattern, leaf) for pattern, _ in own):
      continue
    cut = ", ".join(f"{name}:{n}" for name, n in mesh.shape.items() if n > 1)
    raise ValueError(
      f"{path} {list(shape)} {dtype}, {size / 2**20:,.0f} MiB, would lie whole on each of "
      f"{mesh.size} devices: {cut} divides none of the axes that its rule splits. Take another "
      f"mesh, or say so by a rule for it: --config.rules=\"('{leaf}=',)\""
    )


def _check_rules(own: Rules, params: Any) -> None:
  leaves = paths.leaves(params)
  for pattern, names in own:
    shapes = {path: x.shape for path, x in leaves.items() if re.fullmatch(pattern, path)}
    if not shapes:
      raise ValueError(
        f"rules: {pattern!r} matches no path of this model, such as {max(leaves, key=len)}"
      )
    path, shape = min(shapes.items(), key=lambda item: len(item[1]))
    if len(shape) < len(names):
      raise ValueError(
        f"rules: {pattern!r} names {len(names)} axes and matches {path}, whose shape is "
        f"{list(shape)}; write one that matches larger arrays alone"
      )


def batch_shardings(batch: Any, mesh: Mesh) -> Any:
  """Rows of a batch are split over both data axes, and its tokens over "sequence"."""
  return jax.tree.map(lambda x: NamedSharding(mesh, P(*(DATA, SEQUENCE)[: np.ndim(x)])), batch)


def on(mesh: Mesh | None, fn: Callable[..., Any]) -> Callable[..., Any]:
  """`fn`, to be jitted, in which activations and quantised weights lie on the mesh as they should.

  Without it, or `jax.set_mesh` around the call, XLA decides from the parameters alone.
  """
  if mesh is None:
    return fn

  @functools.wraps(fn)
  def placed(*args: Any, **kwargs: Any) -> Any:
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return fn(*args, **kwargs)

  return placed


def put(arrays: Any, where: Any) -> Any:
  """Places `arrays`, which every process has whole and equal, as `where` says.

  With several processes each takes the parts of its own devices and no other; nothing is sent.

  Args:
    arrays: a tree of arrays.
    where: a sharding for each, or one for all of them.
  """
  if jax.process_count() == 1:
    return jax.device_put(arrays, where)
  if isinstance(where, jax.sharding.Sharding):
    where = jax.tree.map(lambda _: where, arrays)

  def one(x: Any, place: Any) -> jax.Array:
    whole = np.asarray(x)
    return jax.make_array_from_callback(whole.shape, place, lambda index: whole[index])

  return jax.tree.map(one, arrays, where)


def put_parts(
  shape: tuple[int, ...], place: NamedSharding, read: Callable[[tuple[slice, ...]], np.ndarray]
) -> jax.Array:
  """An array of which this process reads its devices' part, from the first to the last row."""
  ends_of = lambda at: [part.indices(n)[:2] for part, n in zip(at, shape, strict=True)]
  bounds = [ends_of(at) for at in place.addressable_devices_indices_map(shape).values()]
  hull = [(min(a for a, _ in axis), max(b for _, b in axis)) for axis in zip(*bounds, strict=True)]
  own = read(tuple(slice(*ends) for ends in hull))

  def of_device(at: Any) -> np.ndarray:
    ends = zip(ends_of(at), hull, strict=True)
    return own[tuple(slice(start - low, stop - low) for (start, stop), (low, _) in ends)]

  return jax.make_array_from_callback(shape, place, of_device)


def born(fn: Callable[..., Any], mesh: Mesh, *args: Any, rules: Rules = RULES) -> Any:
  """`fn(*args)`, with each array made where `shardings` says, and nowhere whole.

  An array that `fn` returns as it came stays the same array.
  """
  jaxpr, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
  flat = jax.tree.leaves(args)
  given = {id(var): x for var, x in zip(jaxpr.jaxpr.invars, flat, strict=True)}
  kept = {i: given[id(var)] for i, var in enumerate(jaxpr.jaxpr.outvars) if id(var) in given}
  lies = jax.tree.leaves(shardings(shapes, mesh, rules))
  new = [i for i in range(len(lies)) if i not in kept]
  whole = jaxpr_as_fun(jaxpr)
  run = jax.jit(lambda *flat: [whole(*flat)[i] for i in new], out_shardings=[lies[i] for i in new])
  made = {**kept, **dict(zip(new, run(*flat), strict=True))}
  return jax.tree.unflatten(jax.tree.structure(shapes), [made[i] for i in range(len(lies))])


def gathered(x: Any) -> np.ndarray:
  """All of an array, on every process, each of which has to ask for it."""
  if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
  return np.asarray(x)


def _is_spec(x: Any) -> bool:
  return isinstance(x, P)


def _spread(weight: Weight, mesh: Mesh) -> Weight:
  """Specs of a weight, in which the arrays of its method use the axes that its base uses too."""

  def wider(spec: P) -> P:
    free = {"tensor", "fsdp"} & set(mesh.axis_names)
    free -= {name for names in spec for name in group(names)}
    return P(*[_both(group(names), free, mesh) if names else None for names in spec])

  own = {name: x for name, x in children(weight).items() if name not in weight.pretrained}
  return weight.replace(**jax.tree.map(wider, own, is_leaf=_is_spec))


def _both(names: Iterable[str], more: Iterable[str], mesh: Mesh) -> tuple[str, ...]:
  """One entry of a spec, in one order for all arrays.

  XLA of jaxlib 0.11 aborts where embeddings that are split over fsdp meet activations that are
  split over fsdp first and then over another axis.
  """
  return tuple(sorted((*names, *more), key=mesh.axis_names.index, reverse=True))


def _rule(path: str, rules: Rules) -> tuple[str | None, ...]:
  for pattern, names in rules:
    if re.fullmatch(pattern, path):
      return names
  raise ValueError(f'no sharding rule matches {path}; end the rules with (".*", ())')


def _along_blocks(spec: P, weight: Weight, mesh: Mesh) -> P:
  """The spec, with axes that cannot split one axis of a quantised matrix moved to the other."""
  names, cuts = list(spec), weight.cuts
  if cuts == weight.shape:
    return spec
  for i, j in ((-2, -1), (-1, -2)):
    if cuts[i] != weight.shape[i] and cuts[i] % ways(names[i], mesh):
      both = _both(group(names[j]), group(names[i]), mesh)
      names[i] = None
      names[j] = both if cuts[j] % ways(both, mesh) == 0 else names[j]
  return P(*names)
