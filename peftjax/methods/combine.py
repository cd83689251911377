"""One LoRA adapter from several of the same base."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peftjax.core import paths, ranges
from peftjax.core.adapted import Adapted, bare
from peftjax.core.attachment import attachments
from peftjax.core.ranges import Finite, Size, checked
from peftjax.methods import arithmetic
from peftjax.methods.lora_weight import LoRA
from peftjax.methods.stack import check_same

# Ways to make one array from [N, ...] of N adapters: (arrays, weights, density, draw) to an array.
_Rule = Callable[[np.ndarray, np.ndarray, float, arithmetic.Draw], np.ndarray]
_RULES: Mapping[str, _Rule] = {
  "linear": lambda x, w, density, draw: arithmetic.weighted(x, w),
  "magnitude_prune": lambda x, w, d, draw: arithmetic.weighted(arithmetic.trimmed(x, d), w),
  "ties": lambda x, w, d, draw: arithmetic.elected(arithmetic.trimmed(x, d), w),
  "dare_linear": lambda x, w, d, draw: arithmetic.weighted(arithmetic.dropped(x, d, draw), w),
  "dare_ties": lambda x, w, d, draw: arithmetic.elected(arithmetic.dropped(x, d, draw), w),
}
_DENSE = {f"{name}_svd": rule for name, rule in _RULES.items() if name != "linear"}
KINDS = ("svd", "cat", *_RULES, *_DENSE)


@dataclasses.dataclass(frozen=True)
class _Layer:
  """One adapter's part of one matrix: A `[r, in]`, B `[out, r]`, s and w, in float32."""

  a: np.ndarray
  b: np.ndarray
  scale: float
  weight: float


@checked
def combine_adapters(
  adapters: Any,
  weights: Sequence[Finite],
  kind: str = "svd",
  *,
  density: float | None = None,
  rank: Size | None = None,
  key: Any = None,
) -> Any:
  """One LoRA adapter for Σ_i w_i ΔW_i, or near it, from several on one base.

  It computes what Hugging Face PEFT's `add_weighted_adapter` does, for each matrix, with the scales
  s_i of the adapters; the scale of the result is 1.

  * `"cat"`: A and B of all side by side, w_i s_i in A. Exact; the rank is the sum of the ranks.
  * `"svd"`: the best product of rank `rank` for the exact sum.
  * `"linear"`: A = Σ ± √|w_i s_i| A_i and B = Σ √|w_i s_i| B_i, with the sign of w_i s_i. B A then
    has products B_i A_j of different adapters too, and is far from the sum.
  * `"magnitude_prune"`: as linear, with the `density` largest entries of each A_i and B_i.
  * `"ties"`: the mean of these over the adapters that have the majority's sign (`arithmetic`).
  * `"dare_linear"`, `"dare_ties"`: random entries in place of the largest, divided by `density`.
  * `"ties_svd"` and so on: the same on w_i and ΔW_i, then the best product of rank `rank`. It makes
    one dense matrix for each adapter at a time.

  Args:
    adapters: whole trees with LoRA on one base, concrete. An adapter missing on a matrix counts as
      0 there; kinds that add A to A need equal ranks of the others.
    weights: w_i, one each, of either sign.
    kind: one of the above.
    density: share of entries that is kept, above 0 and at most 1; for the kinds that prune.
    rank: rank for the svd kinds; by default the largest of all adapters, at most the matrix's.
    key: random key for the dare kinds.

  Returns:
    The first tree with the new adapter, dropout and dtypes from the first adapter on a matrix.

  Raises:
    ValueError: naming the argument or tree that does not fit.
  """
  trees = _trees(adapters)
  _check_options(kind, trees, weights, density, rank, key)
  flats = [paths.leaves(params) for params in trees]
  most = max(int(np.max(x.rank)) for flat in flats for x in flat.values() if isinstance(x, LoRA))

  def of(path: str, first: Any) -> Any:
    found = [(flat[path], w) for flat, w in zip(flats, weights, strict=True)]
    check_same(path, [bare(x.base if isinstance(x, LoRA) else x) for x, _ in found])
    own = [(x, float(w)) for x, w in found if isinstance(x, LoRA)]
    if not own:
      return first
    make = lambda layers, name: _combined(layers, kind, density or 1.0, rank or most, name, key)
    return _leaf(path, own, make)

  return paths.map_leaves(of, trees[0])


def _leaf(path: str, own: list[tuple[LoRA, float]], make: Callable[..., Any]) -> LoRA:
  """The leaf that `make` gives for each layer of several leaves."""
  first = own[0][0]
  stack = first.stack
  names = paths.layer_paths(path, stack)
  made = []
  for i, name in enumerate(names):
    made.append(make([_layer(leaf, weight, i) for leaf, weight in own], name))
  ranks = [len(a) for a, _ in made]
  width = max(ranks)
  a = np.stack([np.pad(a, ((0, width - len(a)), (0, 0))) for a, _ in made])
  b = np.stack([np.pad(b, ((0, 0), (0, width - b.shape[1]))) for _, b in made])
  shaped = lambda x, dtype: jnp.asarray(x.reshape((*stack, *x.shape[1:])), dtype)
  return first.replace(
    a=shaped(a, first.a.dtype),
    b=shaped(b, first.b.dtype),
    scale=shaped(np.ones(len(names)), jnp.float32),
    rank=shaped(np.asarray(ranks), jnp.int32),
  )


def _layer(leaf: LoRA, weight: float, i: int) -> _Layer:
  """Layer i of a leaf, without the rows of its padding."""
  flat = lambda x, ndim: np.asarray(x).reshape((-1, *x.shape[x.ndim - ndim :]))[i]
  rank = int(flat(leaf.rank, 0))
  a, b = (flat(x, 2).astype(np.float32) for x in (leaf.a, leaf.b))
  return _Layer(a[:rank], b[:, :rank], float(flat(leaf.scale, 0)), weight)


def _combined(
  layers: list[_Layer], kind: str, density: float, rank: int, path: str, key: Any
) -> tuple[np.ndarray, np.ndarray]:
  """A and B of one matrix."""
  n_in, n_out = layers[0].a.shape[1], len(layers[0].b)
  rank = min(rank, n_in, n_out)
  if kind in ("cat", "svd"):
    a = np.concatenate([x.a * np.float32(x.weight * x.scale) for x in layers])
    b = np.concatenate([x.b for x in layers], axis=1)
    return (a, b) if kind == "cat" else arithmetic.truncated(b, a, rank)
  draw = _draw(key, path)
  weights = np.asarray([x.weight for x in layers], np.float32)
  if kind in _DENSE:
    deltas = np.stack([x.b @ x.a * np.float32(x.scale) for x in layers])
    return arithmetic.truncated_dense(_DENSE[kind](deltas, weights, density, draw), rank)
  if len({len(x.a) for x in layers}) > 1:
    raise ValueError(
      f"{path} has ranks {', '.join(str(len(x.a)) for x in layers)}, and {kind!r} adds row to row; "
      'write kind="cat" or kind="svd"'
    )
  signed = weights * np.asarray([x.scale for x in layers], np.float32)
  root = np.sqrt(np.abs(signed))
  # The sign on one side alone: on both it would be lost.
  a = _RULES[kind](np.stack([x.a for x in layers]), np.copysign(root, signed), density, draw)
  b = _RULES[kind](np.stack([x.b for x in layers]), root, density, draw)
  return a, b


def _draw(key: Any, path: str) -> arithmetic.Draw:
  """A source of random numbers, different for each matrix and each call."""
  calls = iter(range(2**31))

  def draw(shape: tuple[int, ...]) -> np.ndarray:
    own = jax.random.fold_in(paths.fold_in_path(key, path), next(calls))
    return np.random.default_rng(np.asarray(jax.random.key_data(own))).random(shape, np.float32)

  return draw


def _trees(adapters: Any) -> list[Any]:
  if not isinstance(adapters, Sequence) or not adapters:
    raise ValueError(
      "combine_adapters takes a list of parameter trees, at least one, and got "
      f"{'none' if isinstance(adapters, Sequence) else f'a {type(adapters).__name__}'}"
    )
  shapes = []
  for i, params in enumerate(adapters, 1):
    flat = paths.leaves(params)
    kinds = [type(x).__name__ for x in flat.values() if isinstance(x, Adapted)]
    kinds += [type(x).__name__ for x in attachments(params)]
    if other := [kind for kind in kinds if kind != LoRA.__name__]:
      raise ValueError(
        f"tree {i} has adapters of the kind {other[0]}, and LoRA alone can be combined; one of "
        "AdaLoRA becomes LoRA by pj.tree.to_lora(params)"
      )
    if not kinds:
      raise ValueError(f"tree {i} has no adapters; write pj.load_peft(folder, params, model)")
    if lacks := [p for p, x in flat.items() if isinstance(x, LoRA) and x.base is None]:
      raise ValueError(
        f"tree {i} lacks the base of {lacks[0]}; give whole trees: pj.combine(adapter, base)"
      )
    if any(isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct) for x in jax.tree.leaves(params)):
      raise ValueError(f"tree {i} has no numbers: call combine_adapters outside jit, on arrays")
    shapes.append({path: tuple(bare(x).shape) for path, x in flat.items()})
  for i, own in enumerate(shapes[1:], 2):
    if differ := sorted({p for p, _ in shapes[0].items() ^ own.items()}):
      raise ValueError(
        f"at {differ[0]} the first tree has {shapes[0].get(differ[0], 'nothing')} and tree {i} "
        f"{own.get(differ[0], 'nothing')}: adapters of one model, all scanned or all unrolled, "
        "can be combined"
      )
  return list(adapters)


def _check_options(
  kind: str, trees: list[Any], weights: Sequence[float], density: Any, rank: Any, key: Any
) -> None:
  ranges.one_of("kind", kind, KINDS)
  if len(weights) != len(trees):
    raise ValueError(f"{len(weights)} weights for {len(trees)} adapters; write one for each")
  prunes = kind in _DENSE or (kind in _RULES and kind != "linear")
  if prunes and (density is None or not 0 < density <= 1):
    raise ValueError(f"kind={kind!r} keeps a share of the entries; write density=0.5, above 0 to 1")
  if not prunes and density is not None:
    raise ValueError(f"kind={kind!r} keeps all entries and takes no density; leave it out")
  if not kind.endswith("svd") and rank is not None:
    raise ValueError(f"kind={kind!r} has a rank of its own; leave rank out, or write kind='svd'")
  if kind.startswith("dare") != (key is not None):
    raise ValueError(
      f"kind={kind!r} draws what it drops: pass key=jax.random.key(0)"
      if key is None
      else f"kind={kind!r} draws nothing and takes no key; leave it out"
    )
