"""The records that a run leaves in its workdir: read once, typed, and only those ever removed."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from peftjax import data
from peftjax.core.ranges import Count
from peftjax.io import disk, records
from peftjax.training.checkpoint import digest
from peftjax.training.settings import Model, Settings, from_config

CHECKPOINTS = ("latest", "best")
_RESTORE = "Put it back from a copy, or start anew in another --workdir."
_AGAIN = "Put it back from a copy, or remove it: the same command makes it from the checkpoint."
_INSIDE = {"arrays", "meta", "_CHECKPOINT_METADATA", "commit_success.txt"}  # in a checkpoint
_UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a checkpoint that is being written


@dataclasses.dataclass(frozen=True)
class Config:
  """The fields that `config.json` has at least."""

  seed: int
  model: dict[str, Any]
  data: dict[str, Any]
  method: dict[str, Any]
  optimizer: dict[str, Any]
  train: dict[str, Any]
  quant: dict[str, Any] = dataclasses.field(default_factory=dict)
  task: str = "classify"
  compilation_cache: str = ""


@dataclasses.dataclass(frozen=True)
class Result:
  """The fields of every `result.json`."""

  config: dict[str, Any]
  method: str
  seed: int
  trainable_params: Count
  total_params: Count
  metrics: dict[str, dict[str, float]]
  best_step: Count
  steps: Count
  seconds: float
  commit: str | None = None
  ranks: dict[str, Count] | None = None

  def __post_init__(self) -> None:
    for part in ("validation", "test"):
      if not self.metrics.get(part):
        raise ValueError(f"it lacks the scores of {part!r}")


@dataclasses.dataclass(frozen=True)
class Best:
  """The best checkpoint, as the latest one knows it."""

  step: Count
  value: float
  metrics: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Log:
  """The number of rows in `metrics.jsonl` when a checkpoint was saved, and their digest."""

  rows: Count
  sha256: str


@dataclasses.dataclass(frozen=True)
class Meta:
  """A checkpoint's record of itself; fields from `best` on are the latest one's alone."""

  base: str
  data: str
  labels: list[str]
  tokenizer: str = ""  # "" if it is part of the base, or was not recorded yet
  best: Best | None = None
  before: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
  seconds: float = 0.0
  log: Log | None = None

  @classmethod
  def of(cls, value: Mapping[str, Any], where: Path) -> Meta:
    fields = {key: x for key, x in value.items() if x != {}}  # no best yet
    return _typed(fields, cls, where, _RESTORE)


def check_model(meta: Meta, model: Model, folder: Path) -> None:
  """Raises ValueError if a run was trained on other weights than `model` has, or on other tokens.

  The weights of a factory's model are known once it was called; see `check_base`.
  """
  path = model.path()
  if not model.factory:
    check_base(meta, digest(path), path, folder)
  if meta.tokenizer and meta.tokenizer != data.tokenizer_digest(path):
    raise ValueError(
      f"{path} has another tokenizer than {folder} was trained with, so texts would become other "
      "tokens. Put its files back."
    )


def check_base(meta: Meta, found: str, named: Any, folder: Path) -> None:
  """Raises ValueError if `found` is not the digest of the model that a run was trained on."""
  if meta.base != found:
    raise ValueError(f"{named} is not the model {folder} was trained on")


def as_json(config: ConfigDict) -> dict[str, Any]:
  """A config in the form of `config.json`; ValueError if it lacks a section, or is not for JSON."""
  try:
    made = json.loads(config.to_json())
  except (TypeError, ValueError) as error:
    raise ValueError(f"config: {error}. Its fields are numbers, texts and tuples.") from None
  records.convert(made, Config, "config")
  return made


def config(path: Path) -> dict[str, Any] | None:
  """The contents of `config.json`; None if there is none."""
  return record(path, Config, _RESTORE)


def settings(workdir: Path) -> Settings:
  """The settings of the run in `workdir`.

  Raises:
    ValueError: naming the file, if there is none or it holds no config of this version.
  """
  path = workdir / "config.json"
  found = config(path)
  if found is None:
    raise ValueError(f"{path} is not there, though {workdir} holds checkpoints. {_RESTORE}")
  try:
    return from_config(ConfigDict(found))
  except (ValueError, TypeError, AttributeError, KeyError) as error:
    raise ValueError(f"{path}: {records.clip(str(error), 1000, quote=False)}") from None


def result(path: Path) -> dict[str, Any] | None:
  """The contents of `result.json`; None if there is none."""
  return record(path, Result, _AGAIN)


def lines(path: Path) -> list[str]:
  """The whole lines of a JSON lines file, with their ends; none if there is no file.

  A last line without an end was cut short by a kill: it is left out, unless only the end is
  missing.
  """
  if not _there(path):
    return []
  try:
    text = records.read_bytes(path, 2**40).decode("utf-8")
  except UnicodeDecodeError as error:
    raise ValueError(f"{path} is not UTF-8 (byte {error.start}). {_RESTORE}") from None
  *whole, rest = text.split("\n")
  with contextlib.suppress(ValueError):
    records.parse_object(rest, path)
    whole.append(rest)
  return [line + "\n" for line in whole]


def rows(path: Path, advice: str = _RESTORE) -> Iterator[tuple[str, dict[str, Any]]]:
  """The objects of a JSON lines file, each with its place, for messages."""
  for number, line in enumerate(lines(path), 1):
    where = f"{path} line {number}"
    yield where, records.parse_object(line, where, advice)


def append(path: Path, row: Mapping[str, Any]) -> None:
  """Adds a line to a JSON lines file, in place of one that a kill cut short."""
  whole = "".join(lines(path)).encode()
  with disk.told(path), path.open("ab") as file:
    if file.tell() < len(whole):  # only the end of the last line is missing
      file.write(b"\n")
    else:
      file.truncate(len(whole))
    file.write(json.dumps(row).encode() + b"\n")


def metrics(path: Path) -> list[dict[str, Any]]:
  """The rows of `metrics.jsonl`: numbers by name, with the steps in order.

  Raises:
    ValueError: naming the line that is damaged or out of order.
  """
  found: list[dict[str, Any]] = []
  for where, row in rows(path):
    step = row.get("step")
    if not all(isinstance(x, int | float) and not isinstance(x, bool) for x in row.values()):
      raise ValueError(f"{where}: not all values are numbers. {_RESTORE}")
    if not isinstance(step, int) or step < (found[-1]["step"] if found else 0):
      raise ValueError(
        f"{where}: the step is {records.clip(step)}, which does not follow on. {_RESTORE}"
      )
    found.append(row)
  return found


def log_of(lines: list[str]) -> Log:
  return Log(len(lines), hashlib.sha256("".join(lines).encode()).hexdigest())


def check_log(path: Path, log: Log | None, step: int) -> None:
  """Compares `metrics.jsonl` with the record of it in the checkpoint of a step.

  Raises:
    ValueError: if rows up to that step are damaged or gone. (If there is no file, that is for the
      run to tell: it goes on without.)
  """
  found = metrics(path)
  if log is None or not path.exists():
    return
  kept = [line for line, row in zip(lines(path), found, strict=True) if row["step"] <= step]
  if log_of(kept) != log:
    what = "other rows than" if len(kept) == log.rows else f"{len(kept)} rows instead of"
    raise ValueError(
      f"{path} has {what} the {log.rows} up to step {step} that the checkpoint of that step knows"
      f" of. Put it back from a copy, or remove it to go on without these rows."
    )


def passing(name: str) -> bool:
  """Tells whether a file of that name is there only while a process writes."""
  last = name.rpartition("/")[2]
  return last == "run.lock" or _UNFINISHED in name or (last[0] == "." and last.endswith(".tmp"))


def check_checkpoints(folder: Path) -> None:
  """Raises ValueError for anything in the place of a checkpoint that is not one."""
  for path in (folder, *(folder / name for name in CHECKPOINTS)):
    if _there(path) and not path.is_dir():
      raise ValueError(f"{path} is not a folder of checkpoints. Move it away, or {_other()}")
  for name in CHECKPOINTS:
    for path in _children(folder / name):
      if path.name.isdecimal() and not _is_checkpoint(path):
        raise ValueError(f"{path} is not a checkpoint of peftjax. Move it away, or {_other()}")


def newest(folder: Path, name: str = "latest") -> int | None:
  """The step of the newest checkpoint, by the names of folders."""
  steps = [int(path.name) for path in _children(folder / name) if path.name.isdecimal()]
  return max(steps, default=None)


def clear_checkpoints(folder: Path) -> None:
  """Removes the checkpoints, whole and unfinished ones, and nothing else that may be there."""
  for name in CHECKPOINTS:
    for path in _children(folder / name):
      if path.is_symlink() or not path.is_dir():
        continue
      if _UNFINISHED in path.name or (path.name.isdecimal() and _is_checkpoint(path)):
        shutil.rmtree(path)
    with contextlib.suppress(OSError):  # not empty, or not there
      (folder / name).rmdir()
  with contextlib.suppress(OSError):
    folder.rmdir()


def clear(folder: Path) -> None:
  """Removes what a run has written into its workdir, so that the run begins anew."""
  clear_checkpoints(folder / "checkpoints")
  clear_events(folder / "tensorboard")
  for name in ("result.json", "metrics.jsonl", "config.json"):
    (folder / name).unlink(missing_ok=True)


def clear_events(folder: Path) -> None:
  """Removes TensorBoard's event files."""
  for path in _children(folder):
    if path.name.startswith("events.out.tfevents.") and path.is_file():
      path.unlink()


def record(path: Path, schema: type, advice: str) -> dict[str, Any] | None:
  """The JSON object of a file, typed by the dataclass `schema`; None if there is no file."""
  if not _there(path):
    return None
  value = records.read_object(path, advice)
  _typed(value, schema, path, advice)
  return value


def _typed(value: Mapping[str, Any], schema: type, where: Path, advice: str) -> Any:
  try:
    return records.convert(value, schema, where)
  except ValueError as error:
    raise ValueError(f"{error} {advice}") from None


def _other() -> str:
  return "give another --workdir."


def _there(path: Path) -> bool:
  """Tells whether anything has that name, even a link that leads nowhere."""
  return path.is_symlink() or path.exists()


def _children(folder: Path) -> list[Path]:
  return sorted(folder.iterdir()) if folder.is_dir() else []


def _is_checkpoint(path: Path) -> bool:
  inside = {child.name for child in _children(path)}
  return bool(inside) and inside <= _INSIDE
