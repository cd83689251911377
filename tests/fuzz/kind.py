"""What is fuzzed: a kind of input, how it is damaged, what reads it, and who checks the reader."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Protocol


class Kind(Protocol):
  """Inputs of one kind.

  Attributes:
    name: on the command line.
    share: of all inputs, by weight.
  """

  name: str
  share: int

  def prepare(self, folder: Path) -> None:
    """Writes a sound input; done once by each worker, and copied for every case."""
    ...

  def damage(self, rng: random.Random, folder: Path) -> None:
    """Damages the copy."""
    ...

  def read(self, folder: Path) -> Any:
    """The product, as a user reaches it; refuses by a ValueError that names the file."""
    ...

  def check(self, folder: Path, got: Any) -> str:
    """What is wrong with an input that was accepted, by a parser of its own; "" if nothing is."""
    ...


def names_file(message: str, folder: Path) -> bool:
  """Whether a message says which file it is about."""
  names = [path.name for path in folder.rglob("*")] + [folder.name]
  return any(name in message for name in names)
