"""Folders of runs, against what the undamaged one predicts."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from peftjax.training.loop import train_and_evaluate
from peftjax.training.predict import Predictor
from tests import tiny
from tests.fuzz import damage


class Workdir:
  """Predicts from the folder of a finished run, and asks the run for its result again."""

  name, share = "workdir", 2

  def __init__(self) -> None:
    self._texts = [text for text, *_ in tiny.texts(6, seed=5)]
    self._config: Any = None
    self._logits: Any = None
    self._result: Any = None

  def prepare(self, folder: Path) -> None:
    beside = folder.parent / f"{folder.name}-given"
    beside.mkdir()
    model, table = tiny.model_dir(beside / "model"), tiny.corpus(beside / "texts.csv", count=60)
    self._config = tiny.config(model, table, train__epochs=1.0)
    self._result = train_and_evaluate(self._config, folder)
    self._logits = Predictor(folder).logits(self._texts)

  def damage(self, rng: random.Random, folder: Path) -> None:
    files = sorted(
      path for path in folder.rglob("*") if path.is_file() and ".lock" not in path.name
    )
    path = rng.choice(files)
    kind = rng.randrange(7)
    if kind == 0:
      path.unlink()
    elif kind == 1:
      path.write_bytes(rng.choice((b"", b"null", b"{}", b"[]", b"\xff\xfe", b"\n")))
    elif kind == 2:
      path.unlink()
      path.mkdir()
    elif kind == 3 and path.suffix in (".json", ".jsonl"):
      text = path.read_text()
      if path.suffix == ".json":
        path.write_bytes(damage.dumps(rng, damage.of_json(rng, json.loads(text))))
      else:
        lines = text.splitlines(keepends=True)
        del lines[rng.randrange(len(lines))]
        path.write_text("".join(lines))
    elif kind == 4:
      inside = rng.choice([p for p in folder.rglob("*") if p.is_dir()])
      shutil.rmtree(inside)
    elif kind == 5:
      path.unlink()
      os.mkfifo(path)
    else:
      path.write_bytes(damage.of_bytes(rng, path.read_bytes()))

  def read(self, folder: Path) -> Any:
    logits = Predictor(folder).logits(self._texts)
    return logits, train_and_evaluate(self._config, folder)

  def check(self, folder: Path, got: Any) -> str:
    logits, result = got
    if not np.array_equal(logits, self._logits):
      return "another adapter was read"
    if result["metrics"] != self._result["metrics"]:
      return f"result {result['metrics']} instead of {self._result['metrics']}"
    return ""
