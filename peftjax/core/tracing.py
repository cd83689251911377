"""`Call`: loans to a model's modules, and notes about them, while the model is called."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
  from peftjax.core.shared import Shared
  from peftjax.core.view import Uses


class Call(NamedTuple):
  """Values that pass between the call of a model and the weights and modules deep in it.

  Attributes:
    unboxing: how a module may read a weight as an array: with a warning ("warn"), inside
      `linen.bridge` ("bridge"), or never if it is a matrix ("refuse"), as `core.factored` does
      better.
    lent: the shared nodes of the parameters, by path. Scanned layers thus use them from outside
      the scan, as constants of all its steps. In a stacked weight there would be as many copies as
      layers.
    read: paths of the prefixes and prompts that have been read so far; None if nobody asks.
    kernels: the names of `nn.attention.KERNELS` that attention has taken so far; likewise.
    uses: is told the fate of weights that the bridge does not know; likewise.
  """

  unboxing: str = "warn"
  lent: Mapping[str, Shared] = {}
  read: set[str] | None = None
  kernels: set[str] | None = None
  uses: Uses | None = None


_current: ContextVar[Call] = ContextVar("call")


def current() -> Call:
  """The innermost call that is being traced; outside of any, one that notes nothing."""
  return _current.get(Call())


@contextlib.contextmanager
def within(**changes: Any) -> Iterator[Call]:
  """A context in which `current` is the surrounding call with other fields."""
  token = _current.set(current()._replace(**changes))
  try:
    yield current()
  finally:
    _current.reset(token)
