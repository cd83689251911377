"""What a workdir already holds, and whether this run may go on with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peftjax.training.checkpoint import Checkpoints

# Settings that may change between a run and its continuation: they change no number.
FREE = ("compilation_cache", "train.log_every", "train.save_every", "train.eval_batch_size")


def latest_meta(workdir: Path) -> dict[str, Any] | None:
  """What the latest checkpoint says of itself, without creating anything."""
  if not (workdir / "checkpoints" / "latest").is_dir():
    return None
  checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
  try:
    return checkpoints.meta("latest")
  finally:
    checkpoints.close()


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
  if not isinstance(config, dict):
    return {prefix[:-1]: config}
  return {k: v for key, sub in config.items() for k, v in flat(sub, f"{prefix}{key}.").items()}


def check_config(path: Path, config: dict[str, Any]) -> None:
  if not path.exists():
    return
  old, new = flat(json.loads(path.read_text())), flat(config)
  differ = [k for k in sorted({*old, *new} - {*FREE}) if old.get(k) != new.get(k)]
  if differ:
    rows = "\n".join(f"  {k}: {old.get(k)!r} there, {new.get(k)!r} now" for k in differ)
    raise ValueError(
      f"{path.parent} holds a run of another config:\n{rows}\n"
      "Give the same values to go on with it, or another --workdir."
    )


def check_inputs(workdir: Path, saved: dict[str, Any] | None, now: dict[str, Any]) -> None:
  for name, what in (("base", "another pretrained model"), ("data", "other data")):
    if saved is not None and saved[name] != now[name]:
      raise ValueError(
        f"{workdir} was trained on {what}: digest {saved[name][:12]} there, {now[name][:12]} now. "
        "Put the same files back to go on with it, or give another --workdir."
      )
