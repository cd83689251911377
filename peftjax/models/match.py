"""Matches tensors of a checkpoint to a model's parameters, checked before any is read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from peftjax.core import paths
from peftjax.io import quantization
from peftjax.io.bnb_reader import BnbDir
from peftjax.io.gguf import GGUFFile
from peftjax.io.safetensors_dir import TensorDir, file_of
from peftjax.models.names import turned

Tensors = TensorDir | BnbDir | GGUFFile

# Tensors of heads of other tasks, which share the name of ours or have one of their own.
OTHER_HEADS = r"(pre_classifier|classifier|pooler|qa_outputs)\..*"


class Matched(NamedTuple):
  """Tensors by parameter, one per layer; `new` are parameters that the checkpoint lacks."""

  names: dict[str, list[str]]
  new: list[str]


def find(name: str, available: Iterable[str], body: str) -> str | None:
  """The tensor by its name in a full model, in a bare body, or by LayerNorm's old names."""
  old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
    "LayerNorm.bias", "LayerNorm.beta"
  )
  for candidate in (name, old):
    for spelled in (candidate, candidate.removeprefix(f"{body}.")):
      if spelled in available:
        return spelled
  return None


def body_of(family: Any, config: Any) -> str:
  """The prefix of the body's tensors in a full model."""
  return family.hf_name(config.table).partition(".")[0]


def check_sizes(tensors: Tensors, family: Any, config: Any, where: str, table: str | None) -> None:
  """Checks the number of layers and the table against the files, before a model is traced.

  Raises:
    ValueError: if the files have other numbers than `where`, the configuration, says.
  """
  found = map(re.compile(family.LAYER).fullmatch, tensors.names())
  numbers = {int(m[2]): m[0] for m in found if m}
  count = max(numbers, default=-1) + 1
  if count != config.layers:
    last = numbers.get(count - 1, "")
    raise ValueError(
      f"{where} says that there are {config.layers} layers, and {_holder(tensors, last)} has "
      f"{count}" + (f": the last is that of {last}" if last else "")
    )
  if table is not None:
    got, want = (
      tensors.info(table).shape,
      (config.vocab, getattr(config, "table_width", config.width)),
    )
    if got != want:
      raise ValueError(_misshapen(tensors, table, got, want, where))


def match(
  tensors: Tensors,
  family: Any,
  config: Any,
  abstract: Any,
  where: str,
  *,
  resize: bool = False,
  skip_head: bool = False,
  others: Mapping[str, str] | None = None,
) -> Matched:
  """The tensors of every parameter's layers, and the paths of permitted omissions.

  Args:
    tensors: opened files.
    family: a file of `models`.
    config: the model's.
    abstract: its parameters.
    where: the configuration's file, for messages.
    resize: a head of another size is drawn anew.
    skip_head: the head in the files is another task's.
    others: the tensors of parameters that have another's, by path.

  Raises:
    ValueError: naming file and tensor: a tensor missing, left over, of another shape or not of
      floats; a head of which only a part is there.
  """
  available = set(tensors.names())
  ignored = {n for n in available if skip_head and re.fullmatch(OTHER_HEADS, n)}
  usable, body = available - ignored, body_of(family, config)
  used: set[str] = set()
  missing: list[str] = []
  new: list[str] = []
  resized: list[str] = []
  matched: dict[str, list[str]] = {}
  for path, leaf in paths.leaves(abstract).items():
    stack = stack_of(path, leaf)
    want_names = [family.hf_name(p) for p in paths.layer_paths(path, stack)]
    given = (others or {}).get(path)
    found = [n for name in want_names if (n := given or find(name, usable, body)) is not None]
    used.update(found)
    may_be_new = re.fullmatch(family.NEW, path) is not None
    if len(found) < len(want_names):
      lacks = [n for n in want_names if find(n, usable, body) is None]
      new.append(path) if may_be_new else missing.extend(lacks)
      continue
    shape = leaf.shape[len(stack) :]
    if any(not _fits(tensors, family, path, n, shape, where, resize and may_be_new) for n in found):
      resized.append(path)
    else:
      matched[path] = found
  if missing:
    raise ValueError(_missing(tensors, missing, config, where))
  _check_whole(tensors, family, matched, new)
  extra = sorted(n for n in usable - used if not re.fullmatch(family.UNUSED, n))
  if extra:
    shown = "\n  ".join(extra[:10])
    told = quantization.hint(extra) or f"Is {where} the one the weights were saved with?"
    raise ValueError(
      f"{file_of(tensors, extra[0])}: {len(extra)} tensors of the checkpoint have no place in this "
      f"model:\n  {shown}\n{told}"
    )
  order = list(paths.leaves(abstract))
  return Matched(matched, sorted([*new, *resized], key=order.index))


def packed(tensors: Tensors) -> Mapping[str, Any]:
  """The tensors that have 4 bits in the files."""
  return tensors.states if isinstance(tensors, BnbDir) else {}


def stack_of(path: str, leaf: Any) -> tuple[int, ...]:
  """The leading axes of a parameter: scanned layers (below `layers`) and `experts`."""
  return leaf.shape[: paths.stacks(path)]


def layers_of(path: str, leaf: Any) -> list[tuple[str, tuple[int, ...]]]:
  """The path of each slice of a parameter and where it is, `()` for all of one without a stack."""
  stack = stack_of(path, leaf)
  return list(zip(paths.layer_paths(path, stack), np.ndindex(stack), strict=True))


def _fits(
  tensors: Tensors,
  family: Any,
  path: str,
  name: str,
  shape: tuple[int, ...],
  where: str,
  resize: bool,
) -> bool:
  """Tells if a tensor is this parameter; False only for one to be drawn anew in another size."""
  four_bits = name in packed(tensors)
  if four_bits and not path.endswith("kernel"):
    raise ValueError(
      f"{file_of(tensors, name)}: {name} has 4 bits; only the weights of linear layers are read so"
    )
  got, dtype = tensors.info(name)
  if not jnp.issubdtype(dtype, jnp.floating):
    told = quantization.hint(tensors.names()) or "Convert it to one of them."
    raise ValueError(
      f"{file_of(tensors, name)}: tensor {name} has the dtype {dtype}; weights are floats "
      f"(float32, bfloat16, float16, float64). {told}"
    )
  want = shape[::-1] if turned(family, path) or four_bits else shape
  if got == want:
    return True
  if not resize:
    raise ValueError(_misshapen(tensors, name, got, want, where))
  return False


def _check_whole(
  tensors: Tensors, family: Any, matched: Mapping[str, list[str]], new: list[str]
) -> None:
  """Raises ValueError if one part of the head is in the files and another is not."""
  there = [path for path in matched if re.fullmatch(family.NEW, path)]
  of = lambda path: path.rpartition("/")[0]
  for path in there:
    lacks = [p for p in new if path.startswith("head/") or of(p) == of(path)]
    if lacks:
      name = matched[path][0]
      raise ValueError(
        f"{file_of(tensors, name)} has {name} of a head, and not all of it: there is no "
        f"{', '.join(map(family.hf_name, lacks))}. Restore the file, or remove {name} and the "
        "rest of the head from it for a new one."
      )


def _missing(tensors: Tensors, missing: list[str], config: Any, where: str) -> str:
  shown = "\n  ".join(missing[:10])
  told = quantization.hint(tensors.names())
  if missing == ["lm_head.weight"]:
    told = (
      f"{where} says that the head is not tied to the table (tie_word_embeddings is false or left "
      "out). If it is, write tie_word_embeddings: true; a body alone has no head to load."
    )
  return (
    f"{_holder(tensors, '')}: {len(missing)} tensors are missing from the checkpoint:\n  {shown}"
    + (f"\n{told}" if told else "")
  )


def _misshapen(tensors: Tensors, name: str, got: Any, want: Any, where: str) -> str:
  return f"{file_of(tensors, name)}: tensor {name} has shape {got}; {where} means {want}"


def _holder(tensors: Tensors, name: str) -> Any:
  """The file of a tensor or, where it is in none, the first one or the folder."""
  return file_of(tensors, name or next(iter(tensors.names()), ""))
