"""Ways to damage a file: its bytes, its JSON, its lines."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

# What a field may be changed to: other types, ends of ranges, and what runs away.
VALUES: tuple[Any, ...] = (
  *(None, True, False, 0, 1, -1, 2, 3, 7, 64, 2**31, 2**63, -(2**31), 10**400, 0.5, -0.5, 1e308),
  *(float("nan"), float("inf"), -float("inf"), "", "64", "false", "true", "null", "x" * 5000),
  *("(", "((.+)+)+\\d", "../x", "\x00", "é\ud800", [], [None], [1, "a"], [[]], {}, {"a": {}}),
  *({"0": []}, [[[[[[[[]]]]]]]]),
)


def of_bytes(rng: random.Random, data: bytes) -> bytes:
  """A few bytes changed, cut, doubled or put in; often near the beginning, where headers are."""
  data = bytearray(data)
  for _ in range(rng.choice((1, 1, 1, 2, 5, 20))):
    size = len(data)
    at = rng.randrange(min(size, rng.choice((16, 200, 2000, 10**9)))) if size else 0
    kind = rng.randrange(7)
    if kind == 0 and size:
      data[at] = rng.randrange(256)
    elif kind == 1 and size:
      data[at] ^= 1 << rng.randrange(8)
    elif kind == 2:
      del data[at:]
    elif kind == 3:
      del data[at : at + rng.choice((1, 2, 8, 100))]
    elif kind == 4:
      data[at:at] = rng.randbytes(rng.choice((1, 4, 8, 50)))
    elif kind == 5:
      end = at + rng.choice((4, 8, 64))
      data[at:at] = data[at:end]
    elif size:
      width = rng.choice((1, 2, 4, 8))
      number = rng.choice((0, 1, 2 ** (8 * width) - 1, 2 ** (8 * width - 1), 2**20))
      data[at : at + width] = (number % 2 ** (8 * width)).to_bytes(width, "little")
  return bytes(data)


def of_json(rng: random.Random, value: Any) -> Any:
  """A copy of which one or two places hold something else, or are gone, or renamed."""
  value = copy.deepcopy(value)
  for _ in range(rng.choice((1, 1, 1, 2))):
    holder, key = _place(rng, value)
    if holder is None:
      return rng.choice(VALUES)
    kind = rng.randrange(6)
    if kind < 3:
      holder[key] = copy.deepcopy(rng.choice(VALUES))
    elif kind == 3:
      del holder[key]
    elif kind == 4 and isinstance(holder, dict):
      holder[f"zz_{key}"] = holder.pop(key)
    elif isinstance(holder[key], bool | int | float):
      holder[key] = rng.choice((-holder[key], holder[key] + 1, holder[key] * 2, str(holder[key])))
    else:
      holder[key] = [holder[key]]
  return value


def dumps(rng: random.Random, value: Any) -> bytes:
  """JSON, now and then with a key twice, nesting, digits or a byte-order mark."""
  text = json.dumps(value)
  kind = rng.randrange(20)
  if kind == 0 and isinstance(value, dict) and value:
    key = rng.choice(list(value))
    text = "{" + f"{json.dumps(key)}: {json.dumps(rng.choice(VALUES))}, " + text[1:]
  elif kind == 1:
    text = "[" * 3000 + "]" * 3000
  elif kind == 2:
    text = text.replace("1", "1" * 5000, 1)
  elif kind == 3:
    text = "\ufeff" + text
  elif kind == 4:
    return of_bytes(rng, text.encode("utf-8", "surrogatepass"))
  return text.encode("utf-8", "surrogatepass")


def _place(rng: random.Random, value: Any) -> tuple[Any, Any]:
  """A container somewhere in `value`, and a key or index of it."""
  found: list[tuple[Any, Any]] = []

  def walk(node: Any, depth: int) -> None:
    if depth > 6:
      return
    keys = list(node) if isinstance(node, dict) else range(len(node))
    for key in list(keys)[:200]:
      found.append((node, key))
      if isinstance(node[key], dict | list):
        walk(node[key], depth + 1)

  if isinstance(value, dict | list):
    walk(value, 0)
  top = [pair for pair in found if pair[0] is value]
  return rng.choice(rng.choice((found, top))) if found else (None, None)
