"""Rotary parameters of a `config.json`: their kinds, what each needs, and older names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from msgspec import Meta

from peftjax.core.ranges import Positive, Size
from peftjax.io import records
from peftjax.io.records import clip
from peftjax.models.config_fields import Faults, Theta, refused


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
  """`rope_parameters`, or `rope_scaling` of older files."""

  rope_type: str | None = None
  type: str | None = None  # the older name of `rope_type`
  rope_theta: Theta | None = None
  factor: Positive | None = None
  original_max_position_embeddings: Size | None = None
  low_freq_factor: Positive | None = None
  high_freq_factor: Positive | None = None
  beta_fast: Positive | None = None
  beta_slow: Positive | None = None
  attention_factor: Positive | None = None
  mscale: Annotated[float, Meta(ge=0, lt=1e30)] | None = None
  mscale_all_dim: Annotated[float, Meta(ge=0, lt=1e30)] | None = None
  truncate: bool | None = None
  partial_rotary_factor: Positive | None = None

  # Required fields of each kind.
  kinds: ClassVar[Mapping[str, tuple[str, ...]]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
  }

  @property
  def kind(self) -> str:
    return self.rope_type or self.type or "default"

  def faults(self) -> Faults:
    """Fields that do not go together; see `Common.faults`."""
    for field in self.kinds[self.kind]:
      if getattr(self, field) is None:
        yield field, f'rope_type "{self.kind}" needs a number there'
    low, high = self.low_freq_factor or 0.0, self.high_freq_factor or 0.0
    if self.kind == "llama3" and high <= low:
      yield "high_freq_factor", f"it must be above low_freq_factor {low}"

  def items(self) -> dict[str, Any]:
    """The fields that are given, for `nn.rope.frequencies`."""
    given = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
    rest = {k: v for k, v in given.items() if k not in ("type", "rope_theta")}
    return {**rest, "rope_type": self.kind}


def read(fields: Any, where: str = "config.json") -> tuple[float, dict[str, Any]]:
  """θ and the other rotary parameters; `rope_scaling` goes before `rope_parameters`, as there.

  Raises:
    ValueError: on an unknown kind, fields that it lacks, or fields that no kind has.
  """
  name = "rope_scaling" if fields.rope_scaling else "rope_parameters"
  return _typed(fields, getattr(fields, name) or {}, name, fields.rope_theta, where)


def read_of_layers(
  fields: Any, kind: str, theta: float, where: str = "config.json"
) -> tuple[float, dict[str, Any]]:
  """Reads the parameters of one kind of layers, where each kind has `rope_parameters` of its own.

  Args:
    fields: in which `rope_scaling` of older files is meant for layers that see all tokens.
    kind: an entry of `layer_types`.
    theta: used where the parameters name none.
    where: the file, for messages.
  """
  kinds = ("full_attention", "sliding_attention")
  nested = fields.rope_parameters or {}
  if strange := [key for key in nested if key not in kinds]:
    told = f"of this model type it has {' and '.join(kinds)}, with parameters in each"
    raise refused(
      where, f"rope_parameters.{clip(strange[0], quote=False)}", nested[strange[0]], told
    )
  name, given = f"rope_parameters.{kind}", nested.get(kind)
  if not isinstance(given, dict | None):
    raise refused(where, name, given, "it must be an object")
  if kind == kinds[0] and fields.rope_scaling:
    name, given = "rope_scaling", {**(given or {}), **fields.rope_scaling}
  return _typed(fields, given or {}, name, theta, where)


def _typed(
  fields: Any, given: Mapping[str, Any], name: str, theta: float, where: str
) -> tuple[float, dict[str, Any]]:
  """θ and the other parameters of one object, `name` in the file."""
  made = records.convert(given, Rope, f"{where}: {name}")
  if made.kind not in Rope.kinds:
    raise refused(
      where, f"{name}.rope_type", made.kind, f"it must be one of {', '.join(Rope.kinds)}"
    )
  if strange := records.unknown(given, Rope):
    raise refused(
      where, f"{name}.{next(iter(strange))}", given[next(iter(strange))], "it is unknown"
    )
  for field, allowed in made.faults():
    raise refused(where, f"{name}.{field}", getattr(made, field), allowed)
  part = made.partial_rotary_factor or fields.partial_rotary_factor or 1.0
  if part != 1.0 and not fields.partial:
    raise refused(where, "partial_rotary_factor", part, "only whole heads are rotated")
  theta = theta if made.rope_theta is None else made.rope_theta
  items, outside = made.items(), fields.original_max_position_embeddings
  if fields.partial:
    items["partial_rotary_factor"] = part
  if outside is not None and made.kind in ("llama3", "yarn"):  # goes before the one inside
    items["original_max_position_embeddings"] = outside
  return float(theta), items
