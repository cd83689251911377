"""Paths of leaves, and rules that select them: full matches only, and never silently nothing."""

from __future__ import annotations

import difflib
import itertools
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from flax.core import meta

from peftjax.core import given, patterns
from peftjax.core.adapted import Adapted, bare
from peftjax.core.attachment import is_attachment
from peftjax.core.layout import Axes, ConvAxes, Layout, TableAxes
from peftjax.core.shared import is_shared
from peftjax.core.tied import Tied, is_tied

# Names of the weight inside a module: Flax's own.
_WEIGHT_NAMES = ("kernel", "embedding")
_NO_KERNELS = ("embedding", "bias", "scale")
# Modules whose leaves have a leading axis of layers or of experts; one slice is `layers_0`.
STACKS = ("layers", "experts")
# The module that chooses among experts; "all-linear" leaves it out.
_ROUTER = "router"
# Top-level modules that are a task's or a vocabulary's head, not the body that "all-linear" means.
_HEADS = ("head", "classifier", "score", "lm_head", "mlm_head", "qa_outputs", "regressor")


def is_leaf(node: Any) -> bool:
  """Tells whether a node is a leaf: weights and Flax boxes count as one leaf."""
  return isinstance(node, meta.AxisMetadata)


def name(key_path: tuple[Any, ...]) -> str:
  """The path `a/b/c` for a JAX key path."""
  return "/".join(
    str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in key_path
  )


def leaves(params: Any) -> dict[str, Any]:
  """Every leaf of `params` by path, in tree order; a `Weight` is one leaf."""
  flat, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_leaf)
  return {name(path): leaf for path, leaf in flat}


def map_leaves(fn: Callable[[str, Any], Any], params: Any) -> Any:
  """`fn(path, leaf)` on every leaf of `params`; a `Weight` is one leaf."""
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: fn(name(path), leaf), params, is_leaf=is_leaf
  )


def tied(params: Any) -> dict[str, Tied]:
  """Every head that is tied to a table, by path; these heads are not leaves."""
  flat, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_tied)
  return {name(path): node for path, node in flat if is_tied(node)}


def matches(pattern: str, path: str) -> bool:
  """Tells whether a target names a leaf.

  A plain word is the name of a module or parameter: `query` matches `a/query/kernel`,
  `a/query/embedding` and `a/query`. Anything else is a regular expression that must match the
  whole path.
  """
  if re.fullmatch(r"\w+", pattern):
    parts = path.split("/")
    return parts[-1] == pattern or (parts[-1] in _WEIGHT_NAMES and parts[-2:-1] == [pattern])
  return patterns.fullmatch(pattern, path)


def is_body_linear(path: str, leaf: Any, layout: Layout | None = None) -> bool:
  """Tells whether "all-linear" means this leaf: a kernel of the body, not of a head or of a router.

  A leaf is a kernel if its name says so or the layout has seen a product with it; without a layout,
  also if a method has adapted it. A leaf that the layout has seen in a convolution or a lookup is
  not.
  """
  parts = path.split("/")
  name = parts[-1]
  if parts[0] in _HEADS or name in _NO_KERNELS or len(bare(leaf).shape) < 2:
    return False
  if parts[-2:-1] == [_ROUTER]:
    return False
  axes = (layout or {}).get(path)
  if isinstance(axes, Axes):
    return not isinstance(axes, ConvAxes | TableAxes)
  return name == "kernel" or isinstance(leaf, Adapted)


def select(
  params: Any,
  targets: str | Sequence[str],
  *,
  arrays: bool = False,
  layout: Layout | None = None,
) -> list[str]:
  """Paths that `targets` name, in tree order; never arrays of an `Attachment` or a `Shared` node.

  Args:
    params: any parameter tree.
    targets: `"all-linear"` (every linear kernel of the body, those of experts too: no embedding, no
      router, no task or language-model head; no convolution that `layout` knows as one), one
      pattern, or several (see `matches`).
    layout: axes of the kernels, if known; see `peftjax.linen.layout`.
    arrays: select arrays as such, to be trained or quantised. A tied head is then selected along
      with its table, if the same pattern names both.

  Raises:
    ValueError: if any one pattern matches nothing; near misses are listed. If it names a tied head,
      which has no array; if `params` are an object of NNX.
  """
  check_no_nnx(params)
  given.check_params(params)
  flat = _of_modules(params)
  patterns = [targets] if isinstance(targets, str) else list(targets)
  if not patterns:
    raise ValueError(
      'targets is empty; name modules (["query", "value"]), a regex, or "all-linear"'
    )
  chosen: set[str] = set()
  for pattern in patterns:
    if pattern == "all-linear":
      found = [p for p, leaf in flat.items() if is_body_linear(p, leaf, layout)]
    else:
      found = [p for p in flat if matches(pattern, p)]
    if not found:
      raise ValueError(_nothing_matched(pattern, flat))
    for path in [p for p in found if is_tied(flat[p])]:
      if not arrays or flat[path].of not in found:
        raise ValueError(
          f"target {pattern!r} names {path}, which is tied: it has no array but that of "
          f"{flat[path].of}. Write params = pj.tree.untie(params) first, which makes it one of its "
          "own, or name the table."
        )
      found.remove(path)
    chosen.update(found)
  return [p for p in flat if p in chosen]


def check_no_nnx(params: Any) -> None:
  """Raises ValueError if a tree of parameters, or a linen module, is in fact one of NNX."""
  made = {".".join(of.__module__.split(".")[:2]) for of in type(params).__mro__}
  if "flax.nnx" in made and "flax.linen" not in made:  # `nnx.bridge.ToLinen` is of both
    raise ValueError(
      f"a {type(params).__name__} of Flax NNX came where peftjax takes linen modules and plain "
      "trees; write pj.nnx.attach(key, model, method, *example_inputs), or pj.nnx.split(model)"
    )


def _of_modules(params: Any) -> dict[str, Any]:
  """The model's own leaves and tied heads, without the nodes that methods put beside them."""
  made = lambda node: is_attachment(node) or is_shared(node)
  whole = lambda node: is_leaf(node) or is_tied(node) or made(node)
  flat, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=whole)
  return {name(path): leaf for path, leaf in flat if not made(leaf)}


def _nothing_matched(pattern: str, flat: Mapping[str, Any]) -> str:
  words = sorted({part for path in flat for part in path.split("/")[:-1]})
  near = difflib.get_close_matches(pattern, [*words, *flat], n=5, cutoff=0.5)
  lines = [f"target {pattern!r} matches no parameter."]
  if near:
    lines.append(f"Did you mean: {', '.join(near)}?")
  lines.append(
    'Write a module name ("query"), a regex for a whole path, or "all-linear". Paths are:'
  )
  kernels = [p for p, leaf in flat.items() if len(getattr(bare(leaf), "shape", ())) >= 2]
  lines += [f"  {p}" for p in kernels[:12]]
  if len(kernels) > 12:
    lines.append(f"  ... and {len(kernels) - 12} more")
  return "\n".join(lines)


def stacks(path: str) -> int:
  """The number of modules on a path that are `STACKS`."""
  return sum(part in STACKS for part in path.split("/"))


def experts(path: str, stack: tuple[int, ...]) -> int:
  """The number of experts of a leaf whose leading axes are `stack`; 0 without experts."""
  found = [part for part in path.split("/") if part in STACKS]
  return dict(zip(found, stack, strict=True)).get("experts", 0) if len(found) == len(stack) else 0


def layer_paths(path: str, stack: tuple[int, ...]) -> list[str]:
  """The path of each slice of a stacked leaf, in C order.

  A scanned `layers/attn/kernel` is named as its unrolled twin, `layers_0/attn/kernel`, ..., and
  `experts/up_proj/kernel` as `experts_0/up_proj/kernel`, ...; a stack under another name gets
  `path[0]`, ... An unstacked leaf is its own only slice. Rules and keys use these names, so scanned
  and unrolled models are treated alike.
  """
  if not stack:
    return [path]
  indices = itertools.product(*map(range, stack))
  parts = path.split("/")
  if len(stack) != stacks(path):
    return [path + "".join(f"[{i}]" for i in index) for index in indices]

  def numbered(index: Iterable[int]) -> str:
    of = iter(index)
    return "/".join(f"{part}_{next(of)}" if part in STACKS else part for part in parts)

  return list(map(numbered, indices))


def fold_in_path(key: jax.Array, path: str) -> jax.Array:
  """A key for `path`: the same in every process (crc32, not `hash`), whatever else exists."""
  return jax.random.fold_in(key, zlib.crc32(path.encode()))


def first_match(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
  """The value of the first pattern that matches `path`, or `default`."""
  return next((value for pattern, value in patterns.items() if matches(pattern, path)), default)


def check_all_used(patterns: Iterable[str], candidates: Iterable[str], what: str) -> None:
  """Raises `ValueError` if a pattern of `what` matches none of `candidates`."""
  candidates = list(candidates)
  for pattern in patterns:
    if not any(matches(pattern, path) for path in candidates):
      shown = "\n  ".join(candidates[:8])
      raise ValueError(
        f"{what}: {pattern!r} matches none of the targeted weights. They are (first 8):\n  {shown}"
      )
