"""`Call`: what a model's modules are lent, and what is noted of them, while the model is called."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
  from peftjax.core.shared import Shared
  from peftjax.core.view import Uses


class Call(NamedTuple):
  """What reaches from the call of a model to weights and modules deep in it, and back.

  Attributes:
    unboxing: how a module may read a weight as an array: with a warning ("warn"), inside
      `linen.bridge` ("bridge"), or not at all where it is a matrix ("refuse"), for `core.factored`
      to do it better.
    lent: the shared nodes of the parameters, by path. So a scanned layer uses them from outside
      the scan, as constants of all its steps; put into a stacked weight they would be as many
      copies as it has layers.
    read: paths of the prefixes and prompts that were read so far; None if nobody asks.
    kernels: names of `nn.attention.KERNELS` that attention computed with so far; likewise.
    uses: is told what became of weights that the bridge does not know; likewise.
  """

  unboxing: str = "warn"
  lent: Mapping[str, Shared] = {}
  read: set[str] | None = None
  kernels: set[str] | None = None
  uses: Uses | None = None


_current: ContextVar[Call] = ContextVar("call")


def current() -> Call:
  """The innermost call that this is traced for; outside of any, one that notes nothing."""
  return _current.get(Call())


@contextlib.contextmanager
def within(**changes: Any) -> Iterator[Call]:
  """Within it, `current` is the call around it with other fields."""
  token = _current.set(current()._replace(**changes))
  try:
    yield current()
  finally:
    _current.reset(token)
