"""What the `config.json` of every model type has, and the ranges of what many have."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar

from msgspec import Meta

from peftjax.core.ranges import Count, Size
from peftjax.io.records import clip

Eps = Annotated[float, Meta(gt=0, lt=1)]
Theta = Annotated[float, Meta(gt=1, lt=1e15)]
MOST_OF_A_HEAD = 2**16  # features: their frequencies are computed before any tensor is looked at
HeadSize = Annotated[int, Meta(ge=1, le=MOST_OF_A_HEAD)]
Labels = Annotated[int, Meta(ge=1, le=2**20)]
# Padding of -1 is none. Whether an id has a row in the table is seen where the table is.
PadId = Annotated[int, Meta(ge=-1, lt=2**31)]
Ids = Count | list[Count] | None
# Pairs of a field and what is allowed in it.
Faults = Iterator[tuple[str, str]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Common:
  """What every model type has."""

  model_type: str = ""
  architectures: tuple[str, ...] | None = None
  vocab_size: Size
  pad_token_id: PadId | None = None
  eos_token_id: Ids = None
  tie_word_embeddings: bool = True  # of decoders

  # Other names of the same fields, which some files use.
  aliases: ClassVar[Mapping[str, str]] = {}

  def faults(self) -> Faults:
    """Fields whose values do not go together with others, and what is allowed."""
    if self.eos_token_id == []:
      yield "eos_token_id", "it must name a token, or be left out"

  @property
  def end_ids(self) -> tuple[int, ...]:
    ids = self.eos_token_id
    return () if ids is None else tuple(ids) if isinstance(ids, list) else (ids,)

  @property
  def padding(self) -> int:
    """The id that pads a batch: any will do where files name none, as padding is masked."""
    known = self.pad_token_id is not None and 0 <= self.pad_token_id < self.vocab_size
    return self.pad_token_id if known else 0  # type: ignore[return-value]


def refused(where: str, field: str, value: Any, why: str) -> ValueError:
  """The error of a field: the file, what it holds, and what is allowed."""
  return ValueError(f"{where}: {field} is {clip(value)}; {why}.")
