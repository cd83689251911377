"""`of_stacks`: the axes of scanned kernels that a tree shows by itself."""

from __future__ import annotations

from typing import Any

from peftjax.core import paths
from peftjax.core.adapted import bare
from peftjax.core.layout import Axes, Layout, Site


def of_stacks(params: Any, layout: Layout | None) -> Layout:
  """`layout` with the axes of stacked kernels, as far as the tree alone tells them.

  Below a module called `layers` all arrays have one first axis, among them a bias or a scale with
  two axes: that axis is then the stack's, and below one called `experts` all have one as well. The
  rest of a kernel is a matrix `[in, out]` per layer and expert. Models of this library are so.
  Other kernels stay ambiguous.
  """
  groups: dict[str, dict[str, tuple[int, ...]]] = {}
  for path, leaf in paths.leaves(params).items():
    parts = path.split("/")
    if found := [i for i, part in enumerate(parts) if part in paths.STACKS]:
      groups.setdefault("/".join(parts[: found[0] + 1]), {})[path] = tuple(bare(leaf).shape)
  known: dict[str, Axes | Site] = {}
  for head, shapes in groups.items():
    vector = lambda path, shape: len(shape) == 2 and path.endswith(("/bias", "/scale"))
    one = len({shape[:1] for shape in shapes.values()}) == 1
    if one and (head.endswith("experts") or any(vector(p, s) for p, s in shapes.items())):
      known |= {
        p: Axes()
        for p, s in shapes.items()
        if len(s) == 2 + paths.stacks(p) and p.endswith("/kernel")
      }
  return {**known, **(layout or {})}
