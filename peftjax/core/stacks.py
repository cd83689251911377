"""`of_stacks`: the axes of scanned kernels that a tree shows by itself."""

from __future__ import annotations

from typing import Any

from peftjax.core import paths
from peftjax.core.adapted import bare
from peftjax.core.layout import Axes, Layout, Site


def of_stacks(params: Any, layout: Layout | None) -> Layout:
  """`layout` with the axes of scanned kernels, as far as the tree alone tells them.

  Below a module called `layers` all arrays have one first axis, and some bias or scale among them
  has two axes: that axis is then the stack's, and a kernel of three axes has a matrix `[in, out]`
  per layer. Scanned models of this library are so. Other kernels stay ambiguous.
  """
  groups: dict[str, dict[str, tuple[int, ...]]] = {}
  for path, leaf in paths.leaves(params).items():
    head, found, _ = f"/{path}".partition("/layers/")
    if found:
      groups.setdefault(head, {})[path] = tuple(bare(leaf).shape)
  known: dict[str, Axes | Site] = {}
  for shapes in groups.values():
    vector = lambda path, shape: len(shape) == 2 and path.endswith(("/bias", "/scale"))
    one = len({shape[:1] for shape in shapes.values()}) == 1
    if one and any(vector(path, shape) for path, shape in shapes.items()):
      known |= {p: Axes() for p, s in shapes.items() if len(s) == 3 and p.endswith("/kernel")}
  return {**known, **(layout or {})}
