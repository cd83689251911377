"""A dataclass as a section of a config, and back."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from peftjax.core.ranges import DType, Positive, Size
from peftjax.methods.registry import METHODS
from peftjax.training.sections import arguments, section


@dataclasses.dataclass(frozen=True)
class Example:
  targets: str | Sequence[str]
  rank: Size = 4
  alpha: Positive = 16
  steps: Size | None = None
  name: str | None = None
  pattern: Mapping[str, Size] = dataclasses.field(default_factory=dict)
  dtype: DType = jnp.float32


def test_every_field_is_a_flag_of_its_type():
  """None too, which a flag may replace by what the field takes."""
  made = ConfigDict(section(Example, targets="all-linear", pattern={"query": 2}))
  types = {name: made.get_type(name) for name in made}
  kinds = dict(targets=tuple, rank=int, alpha=float, steps=int, name=str, pattern=tuple, dtype=str)
  assert types == kinds
  assert (made.targets, made.pattern, made.dtype) == (("all-linear",), ("query=2",), "float32")
  made.update(steps=3, name="x")
  assert arguments(Example, made.to_dict(), "method") == dict(
    targets=("all-linear",), rank=4, alpha=16.0, steps=3, name="x",
    pattern={"query": 2}, dtype=jnp.dtype("float32"),
  )  # fmt: skip


@pytest.mark.parametrize("changes", [{}, {"targets": "x", "rnak": 2}])
def test_fields_that_are_missing_or_unknown_raise(changes):
  with pytest.raises(ValueError, match="Example has the fields targets, rank"):
    section(Example, **changes)


@pytest.mark.parametrize("name", METHODS)
def test_the_defaults_of_a_method_come_back(name):
  """As a section of a config, and from there."""
  given = {"unfreeze": {"targets": ".*"}, "ia3": {"outputs": "key"}}.get(name, {})
  made = ConfigDict(section(METHODS[name], **given))
  again = METHODS[name](**arguments(METHODS[name], made.to_dict(), "method"))
  assert ConfigDict(section(METHODS[name], **dataclasses.asdict(again))).to_json() == made.to_json()
