"""A number of parameters that a paper prints, and the same counted on a model of shapes alone."""

from __future__ import annotations

import dataclasses
import re
from decimal import ROUND_DOWN, ROUND_HALF_UP, Decimal
from typing import Any

import jax

import peftjax as pj
from experiments.tables.abstract_models import shapes_of
from peftjax.methods.base import Method

UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}
WHOLE = {"model": r".*", "layers": r".*/layers(_\d+)?/.*"}


@dataclasses.dataclass(frozen=True)
class Cell:
  """A number of a table.

  Attributes:
    source: paper and table.
    model: one of `abstract_models.MODELS`.
    name: the method as the paper calls it.
    printed: the number, e.g. "0.3M" or "0.84%".
    method: the method that the paper describes.
    note: a remark on it.
    of: the whole of a share: the "model", its "layers", or "all" with the method's own.
    meant: where the number belongs to another setting, its name and method.
    off: the kind of number it is if it does not agree.
  """

  source: str
  model: str
  name: str
  printed: str
  method: Method
  note: str = ""
  of: str = "model"
  meant: tuple[str, Method] | None = None
  off: str = "misprint"

  @property
  def cell(self) -> str:
    return f"{self.source}, {self.model}, {self.name}"

  def run(self) -> dict[str, Any]:
    """The fields of a line of the results."""
    count, whole = self.count(self.method)
    shown, found = verdict(self.printed, count, whole)
    meant = None
    if self.meant is not None:
      name, method = self.meant
      other, its_whole = self.count(method)
      meant = {"name": name, "count": other, "verdict": verdict(self.printed, other, its_whole)[1]}
    return {
      "source": self.source,
      "model": self.model,
      "method": self.name,
      "printed": self.printed,
      "count": count,
      "of": whole,
      "ours": shown,
      "verdict": found or self.off,
      "meant": meant,
      "note": self.note,
      "seed": None,  # nothing is drawn
    }

  def count(self, method: Method) -> tuple[int, int]:
    """The trained parameters, and those that a share is of."""
    params, layout = shapes_of(self.model)
    attached = method.attach(jax.random.key(0), params, layout)
    trained = pj.count(attached, method.trainable(attached))
    if self.of == "all":
      return trained, pj.count(attached)
    rule = re.compile(WHOLE[self.of])
    kept = jax.tree_util.tree_map_with_path(
      lambda path, _: rule.fullmatch("/".join(key.key for key in path)) is not None, params
    )
    return trained, pj.count(params, kept)


def verdict(printed: str, count: int, whole: int) -> tuple[str, str]:
  """Our count in the form of `printed`, and how the two agree: "" if they do not.

  Raises:
    ValueError: if `printed` is not a number with K, M, B or % behind it.
  """
  found = re.fullmatch(r"([\d,]+(?:\.\d+)?)([KMB%]?)", printed)
  if found is None:
    raise ValueError(f'{printed!r} is not of the form "0.3M", "540K", "0.84%" or "65,536"')
  value, unit = Decimal(found[1].replace(",", "")), found[2]
  ours = Decimal(100 * count) / whole if unit == "%" else Decimal(count) / UNITS[unit]
  step = Decimal(1).scaleb(int(value.as_tuple().exponent))
  rounded = ours.quantize(step, ROUND_HALF_UP)
  kind = ""
  if ours == value:
    kind = "exact"
  elif rounded == value:
    kind = "rounds"
  elif ours.quantize(step, ROUND_DOWN) == value:
    kind = "cut"
  return f"{rounded:,}{unit}", kind
