"""Plans that were computed before, since a program takes minutes to compile."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from peftjax.training import process
from peftjax.training.logs import write_atomic

_COMPILERS = ("jax", "jaxlib", "libtpu")


def cached(
  folder: Path | None, asked: Mapping[str, Any], compute: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
  """The result of `compute`, or its earlier one for the same question, code and compilers.

  Args:
    folder: where such files are kept; None for nowhere.
    asked: everything that the plan depends on, as JSON.
    compute: makes a plan, as JSON.
  """
  commit = process.commit()
  if folder is None or commit is None or commit.endswith("-dirty"):
    return compute()
  versions = {name: _version(name) for name in _COMPILERS}
  text = json.dumps({**asked, "commit": commit, "versions": versions}, sort_keys=True)
  path = folder / f"plan-{hashlib.sha256(text.encode()).hexdigest()}.json"
  try:
    found = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError):  # not there, or not whole
    found = None
  if isinstance(found, dict):
    return found
  made = compute()
  write_atomic(path, json.dumps(made, sort_keys=True) + "\n")
  return made


def _version(name: str) -> str:
  try:
    return metadata.version(name)
  except metadata.PackageNotFoundError:
    return ""
