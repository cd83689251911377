"""The collectives that devices run in a compiled program, read from its text."""

from __future__ import annotations

import collections
import math
import re
from typing import NamedTuple

import jax

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_RESULT = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_CALLED = re.compile(
  r"(?:body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)"
  r"|branch_computations=\{([^}]*)\}"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
_BELOW = re.compile(r"ROOT .* compare\([^)]*%([\w.\-]+)\), direction=LT")
# A collective that XLA:TPU spreads over several fusions is written down in each of them.
_CHAIN = re.compile(r'channel_id=(\d+).*chain_id="(\d+)"')
_DTYPES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8}


class Collective(NamedTuple):
  """One instruction.

  Attributes:
    kind: one of `KINDS`.
    dtype: dtype of the result on each device, as XLA writes it: "f32", "u8".
    shapes: shapes of the result on one device.
    bytes: size of the result on one device.
    times: how often it runs: the trips of the loops around it, 1 for a loop of unknown length.
      A loop of JAX counts from 0 to a number that its condition compares with.
  """

  kind: str
  dtype: str
  shapes: tuple[tuple[int, ...], ...]
  bytes: int
  times: int


def collectives(compiled: jax.stages.Compiled | str) -> list[Collective]:
  """The collectives of a compiled program, or of its text."""
  text = compiled if isinstance(compiled, str) else compiled.as_text()
  bodies, entry = _computations(text or "")
  times: collections.Counter[str] = collections.Counter({entry: 1})
  # XLA prints callees before callers.
  for name in reversed(bodies):
    for line in bodies[name]:
      trips = _trips(line, bodies)
      for one, several in _CALLED.findall(line):
        for called in (one, *re.findall(r"[\w.\-]+", several)):
          times[called] += times[name] * trips
  chains = set[tuple[str, ...]]()
  return [made for name, lines in bodies.items() for made in _read(lines, times[name], chains)]


def sent(found: list[Collective]) -> dict[str, int]:
  """Bytes of the results on a device, by kind; each counts as often as it is done."""
  total: collections.Counter[str] = collections.Counter()
  for one in found:
    total[one.kind] += one.bytes * one.times
  return dict(total)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
  """Lines by computation, and the name of the first that runs."""
  bodies: dict[str, list[str]] = {}
  entry = ""
  lines: list[str] = []
  for line in text.splitlines():
    if head := _COMPUTATION.match(line):
      lines = bodies[head[2]] = []
      entry = head[2] if head[1] else entry
    else:
      lines.append(line)
  return bodies, entry


def _trips(line: str, bodies: dict[str, list[str]]) -> int:
  """The trip count of the loop in a line; 1 if the line is not a loop."""
  if found := _TRIPS.search(line):
    return int(found[1])
  condition = _CONDITION.search(line)
  lines = bodies.get(condition[1], []) if condition else []
  for root in filter(None, map(_BELOW.search, lines)):
    constant = re.compile(rf"%{re.escape(root[1])} = s32\[\]\S* constant\((\d+)\)")
    if found := constant.search("\n".join(lines)):
      return int(found[1])
  return 1


def _read(lines: list[str], times: int, chains: set[tuple[str, ...]]) -> list[Collective]:
  """The collectives in some lines, without those of a chain that was found before."""
  found = []
  for line in lines:
    if not (match := _RESULT.search(line)):
      continue
    if chain := _CHAIN.search(line):
      if chain.groups() in chains:
        continue
      chains.add(chain.groups())
    arrays = [
      (dtype, tuple(map(int, filter(None, axes.split(",")))))
      for dtype, axes in _ARRAY.findall(match[1])
    ]
    if match[3] and len(arrays) > 1:  # a pair: the operands and the results
      arrays = arrays[len(arrays) // 2 :]
    size = sum(math.prod(shape) * _bytes(dtype) for dtype, shape in arrays)
    found.append(Collective(match[2], arrays[0][0], tuple(s for _, s in arrays), size, times))
  return found


def _bytes(dtype: str) -> int:
  if dtype in _DTYPES:
    return _DTYPES[dtype]
  digits = re.match(r"[a-z]+(\d+)", dtype)
  return max(1, int(digits[1]) // 8) if digits else 4
