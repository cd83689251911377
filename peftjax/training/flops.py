"""Floating-point operations: the number in a training step, and a device's most per second."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from peftjax.core import paths, tree
from peftjax.core.adapted import Adapted
from peftjax.core.weight import Weight, children
from peftjax.nn import virtual

# FLOP/s of dense bfloat16 products by JAX's name of the device, from the makers' data sheets:
# Cloud TPU's documentation of system architectures; NVIDIA's H100, H200, A100 and L4.
PEAKS: Mapping[str, float] = {
  "TPU v4": 275e12,
  "TPU v5e": 197e12,
  "TPU v5 lite": 197e12,
  "TPU v5p": 459e12,
  "TPU v5": 459e12,
  "TPU v6e": 918e12,
  "TPU v6 lite": 918e12,
  "NVIDIA H100 80GB HBM3": 989e12,
  "NVIDIA H100 PCIe": 756e12,
  "NVIDIA H200": 989e12,
  "NVIDIA A100*": 312e12,
  "NVIDIA L4": 121e12,
}


def peak(device: str | None) -> float | None:
  """The most FLOP/s in bfloat16 of a device of that kind; None if it is not known.

  >>> peak("NVIDIA A100-SXM4-40GB"), peak("cpu")
  (312000000000000.0, None)
  """
  return next(
    (most for name, most in PEAKS.items() if fnmatch.fnmatchcase(device or "", name)), None
  )


class Work(NamedTuple):
  """Floating-point operations of a step on all devices.

  Attributes:
    model: operations of the forward and the backward pass: a share of peak is measured by them.
    done: the same with operations that are computed again, under rematerialisation.
  """

  model: float
  done: float


class _Part(NamedTuple):
  """The matrices of the body, of a decoder's head, or of the head on an encoder's first token.

  Attributes:
    tokens: number of tokens that are multiplied by them.
    entries, trained: N and A of `step_work`.
  """

  tokens: int
  entries: int
  trained: int


def step_work(config: Any, train: Any, frozen: Any, rows: int, length: int) -> Work:
  """Operations of products with matrices and of attention; a scan's count once per iteration.

  With N entries in the matrices that each of n tokens is multiplied by, A of them trained, and s
  keys that a query sees in each of L layers with heads of D numbers together,

    forward 2 n N + 4 n s D L,   backward 2 n (N + A) + 8 n s D L

  (Chowdhery et al. 2022, arXiv 2204.02311, appendix B, where all is trained, so that N = A, and
  s = n: 6 N + 12 L D s per token). For a causal mask s is the average it leaves. A frozen matrix
  has no gradient of its own, and a body without anything trained no backward pass. All tokens
  count, padding and other texts in a packed row as well: the hardware computes them. Norms,
  softmax, lookups, dequantisation and the optimizer do not. XLA's own count (`cost_analysis`)
  takes the body of a scan once.

  Args:
    config: config of the model, an encoder or decoder of this library.
    train, frozen: the two halves of the parameters; shapes will do.
    rows, length: size of the batch's tokens.
  """
  c = config
  whole = tree.combine(train, frozen)
  prompt = virtual.prompt_length(whole)
  seen_length = length + prompt
  body, *heads = _parts(c, whole, train, rows, length, seen_length)
  seen: float = seen_length
  if _decodes(c):
    seen = _seen_in_layers(c, seen_length) / c.layers
  seen += virtual.length(whole) - prompt  # every key of a prefix is seen
  width = c.heads * getattr(c, "head_size", c.width // c.heads)
  attention = 4 * body.tokens * seen * width * c.layers
  products = lambda part: 2 * part.tokens * part.entries
  gradients = lambda part: 2 * part.tokens * part.trained
  forward = attention + sum(map(products, (body, *heads)))
  backward = sum(map(gradients, (body, *heads)))
  if _trains_body(train):
    backward += 2 * attention + sum(map(products, (body, *heads)))
  remat = getattr(c, "remat", False)
  again = (attention if remat else 0) + (products(body) if remat not in (False, "products") else 0)
  return Work(forward + backward, forward + backward + again)


def _seen_in_layers(c: Any, length: int) -> float:
  """Keys that a query sees on average, summed over a decoder's layers, some with a window."""
  wide = len(getattr(c, "global_layers", ()))
  window = min(length, getattr(c, "window", None) or length)
  of = lambda most: most - most * most / (2 * length)
  return (c.layers - wide) * of(window) + wide * of(length)


def _decodes(config: Any) -> bool:
  return hasattr(config, "tied")


def _parts(
  c: Any, whole: Any, train: Any, rows: int, length: int, seen_length: int
) -> tuple[_Part, _Part, _Part]:
  """The body, the decoder's head, and the part on the first token or that labels every one."""
  tied = jax.eval_shape(tree.tie, whole)  # VeRA's factors are shared
  trained = paths.leaves(train)
  sums = {part: [0, 0] for part in ("body", "head", "first")}
  for path, leaf in paths.leaves(tied).items():
    found = _matrices(path, leaf)
    own = _arrays(trained.get(path))
    if "experts" in path.split("/"):  # of which a token takes a few
      found = {name: size * c.routed // c.experts for name, size in found.items()}
    part = "head" if path.startswith("lm_head/") else "first" if _of_first(path) else "body"
    sums[part][0] += sum(found.values())
    sums[part][1] += sum(size for name, size in found.items() if name in own)
  words = _decodes(c) and not getattr(c, "labels", None)
  if words and not any(path.startswith("lm_head/kernel") for path in paths.leaves(tied)):
    sums["head"][0] += c.vocab * c.width
    sums["head"][1] += c.vocab * c.width * bool(_arrays(trained.get(c.table)) & {"", "base"})
  labelled = length if getattr(c, "labels_of", "text") != "text" else 1
  tokens = {"body": rows * seen_length, "head": rows * length, "first": rows * labelled}
  body, head, first = (_Part(tokens[part], *sums[part]) for part in sums)
  return body, head, first


def _of_first(path: str) -> bool:
  return path.startswith("head/") or "/pooler/" in path


def _trains_body(train: Any) -> bool:
  found = jax.tree_util.tree_leaves_with_path(train)
  names = (paths.name(path) for path, _ in found)
  return any(not (name.startswith("lm_head/") or _of_first(name)) for name in names)


def _matrices(path: str, leaf: Any) -> dict[str, int]:
  """Entries of a leaf's matrices that activations are multiplied by, by child; "" is the leaf.

  Tables are looked up.
  """
  if not path.endswith(("/kernel", "/adapter/down", "/adapter/up")) or len(leaf.shape) < 2:
    return {}
  if not isinstance(leaf, Adapted):
    return {"": math.prod(leaf.shape)}
  factors = {
    name: x.size
    for name, x in children(leaf).items()
    if name != "base" and getattr(x, "ndim", 0) == len(leaf.stack) + 2
  }
  return {"base": math.prod(leaf.shape), **factors}


def _arrays(leaf: Any) -> set[str]:
  """The children of a leaf that are here, "" for the leaf itself."""
  if not isinstance(leaf, Weight):
    return set() if leaf is None else {""}
  return {name for name, x in children(leaf).items() if jax.tree.leaves(x)}
