"""The records of a workdir: typed, whole, or refused; and nothing removed that is not ours."""

import dataclasses
import json

import pytest

from peftjax.training import logs, workdir
from tests.training import runs

RESULT = {
  "config": {},
  "method": "lora",
  "seed": 0,
  "trainable_params": 1,
  "total_params": 2,
  "metrics": {"validation": {"accuracy": 0.5}, "test": {"accuracy": 0.5}},
  "best_step": 1,
  "steps": 2,
  "seconds": 1.5,
}
CONFIG = {
  "seed": 0,
  **{name: {} for name in ("model", "data", "method", "optimizer", "train")},
}


@pytest.mark.parametrize(
  ("read", "value"), [(workdir.result, RESULT), (workdir.config, CONFIG)], ids=["result", "config"]
)
def test_a_record_is_read_whole_or_named(tmp_path, read, value):
  """Torn, empty, no object, of other types, not UTF-8: by file, with what to do."""
  path = tmp_path / "record.json"
  assert read(path) is None
  text = json.dumps(value)
  path.write_text(text)
  assert read(path) == value
  torn = [text[: len(text) * i // 7].encode() for i in range(7)]
  lacking = [json.dumps({k: v for k, v in value.items() if k != key}) for key in value]
  wrong = [json.dumps({**value, key: None}) for key in value]
  twice = text[:-1] + ', "seed": 1}'
  others = [b"null", b"{}", b"[]", b"3", text.encode("utf-16"), text.encode() + b"\0", b"\xff"]
  for damaged in (*torn, *lacking, *wrong, twice, *others):
    path.write_bytes(damaged if isinstance(damaged, bytes) else damaged.encode())
    with pytest.raises(ValueError, match="record.json") as error:
      read(path)
    assert "from a copy" in str(error.value) and len(str(error.value).splitlines()) <= 2
  path.unlink()
  path.mkdir()
  with pytest.raises(ValueError, match="record.json is not a regular file"):
    read(path)


@pytest.mark.parametrize(
  "change",
  [
    {"metrics": {}},
    {"metrics": {"validation": {"a": 1.0}, "test": {}}},
    {"metrics": {"validation": {"a": "1"}, "test": {"a": 1.0}}},
    {"trainable_params": -1},
    {"seed": 1.5},
    {"seconds": "1"},
    {"best_step": True},
  ],
)
def test_a_result_of_other_types_is_none(tmp_path, change):
  (tmp_path / "result.json").write_text(json.dumps({**RESULT, **change}))
  with pytest.raises(ValueError, match=r"result.json: .*remove it"):
    workdir.result(tmp_path / "result.json")


ROWS = [{"step": s, "loss": 1 / s} for s in (1, 2, 2, 3)]
TEXT = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.mark.parametrize(
  ("text", "line"),
  [
    (TEXT.replace('"loss"', "loss", 2), 1),
    (TEXT.replace('{"step": 2, "loss": 0.5}\n', '{"step": 2, "lo\n', 1), 2),
    (TEXT.replace('"step": 3', '"step": 1'), 4),
    (TEXT.replace('"step": 2', '"step": "2"', 1), 2),
    (TEXT.replace('"step": 2', '"step": true', 1), 2),
    (TEXT.replace('"step": 2, ', "", 1), 2),
    (TEXT.replace('{"step": 1, "loss": 1.0}', "null"), 1),
    (TEXT.replace('{"step": 1, "loss": 1.0}', "[]"), 1),
    (TEXT.replace("0.5", "null", 1), 2),
    (TEXT.replace("\n", "\n\n", 1), 2),
  ],
)
def test_rows_are_numbers_in_order(tmp_path, text, line):
  """Only of a last line without an end may a kill be the cause."""
  path = tmp_path / "metrics.jsonl"
  path.write_text(TEXT + '{"step": 4, "lo')
  assert workdir.metrics(path) == ROWS
  path.write_text(text)
  with pytest.raises(ValueError, match=f"metrics.jsonl line {line}"):
    workdir.metrics(path)


def test_rows_that_are_not_utf8_are_named(tmp_path):
  (tmp_path / "metrics.jsonl").write_bytes(TEXT.encode()[:30] + b"\xff" + TEXT.encode()[30:])
  with pytest.raises(ValueError, match="metrics.jsonl is not UTF-8"):
    workdir.metrics(tmp_path / "metrics.jsonl")


def test_a_checkpoint_knows_the_rows_before_it(tmp_path, monkeypatch):
  """Lost, changed or made up, they are named; those after it may be gone."""
  monkeypatch.setattr(logs.Logs, "_events", None)  # which import torch where it is
  monkeypatch.setattr(logs.Logs, "_emit", lambda self, *row: None)
  monkeypatch.setattr(logs.Logs, "close", lambda self: self._file.close())
  out, path = logs.Logs(tmp_path, 0), tmp_path / "metrics.jsonl"
  for row in ROWS[:3]:
    out.write(row)
  log = workdir.Log(**out.mark())
  assert log == workdir.log_of([json.dumps(row) + "\n" for row in ROWS[:3]])
  out.write(ROWS[3])
  out.close()
  assert path.read_text() == TEXT
  workdir.check_log(path, log, 2)
  lines = TEXT.splitlines(keepends=True)
  path.write_text("".join(lines[:3]))
  workdir.check_log(path, log, 2)
  damages = ["", "".join(lines[:2]), "".join(lines[1:]), TEXT.replace("1.0", "1.5")]
  for text in (*damages, "".join([lines[0], *lines])):
    path.write_text(text)
    with pytest.raises(ValueError, match="metrics.jsonl has .*the 3 up to step 2.*remove it"):
      workdir.check_log(path, log, 2)
  path.unlink()
  workdir.check_log(path, log, 2)  # as it says


def test_a_line_is_added_in_place_of_a_torn_one(tmp_path):
  path = tmp_path / "rows.jsonl"
  for before, after in (("", ""), (TEXT, TEXT), (TEXT + '{"st', TEXT), (TEXT[:-1], TEXT)):
    path.write_text(before)
    workdir.append(path, {"ä": 1})
    assert path.read_text() == after + '{"\\u00e4": 1}\n'


def some_run(folder):
  for name, step in (("latest", "8"), ("best", "4"), ("latest", "9.orbax-checkpoint-tmp")):
    (folder / "checkpoints" / name / step / "meta").mkdir(parents=True)
  (folder / "tensorboard").mkdir()
  for name in ("config.json", "tensorboard/events.out.tfevents.1", "metrics.jsonl", "result.json"):
    (folder / name).write_text("x")


def test_only_what_a_run_writes_is_removed(tmp_path):
  some_run(tmp_path / "run")
  workdir.clear(tmp_path / "run")
  assert [path.name for path in (tmp_path / "run").rglob("*")] == ["tensorboard"]
  some = tmp_path / "mixed"
  mine = ["notes.txt", "tensorboard/notes", "checkpoints/notes", "checkpoints/latest/old/a"]
  mine += ["checkpoints/best/7/thesis.tex", "checkpoints/mine/8/meta"]
  for name in mine:
    (some / name).parent.mkdir(parents=True, exist_ok=True)
    (some / name).write_text("mine")
  kept = runs.contents(some)
  (some / "tensorboard" / "notes").unlink()
  (some / "tensorboard").rmdir()
  some_run(some)
  (some / "tensorboard" / "notes").write_text("mine")
  workdir.clear(some)
  assert runs.contents(some) == kept


@pytest.mark.parametrize(
  "place", ["checkpoints", "checkpoints/latest", "checkpoints/best", "checkpoints/latest/8"]
)
def test_a_file_in_place_of_checkpoints_is_named(tmp_path, place):
  (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
  (tmp_path / place).write_text("x")
  with pytest.raises(ValueError, match=f"{place} is not a .*Move it away"):
    workdir.check_checkpoints(tmp_path / "checkpoints")


def test_a_record_of_a_checkpoint_is_typed(tmp_path):
  meta = {"base": "a", "data": "b", "labels": ["x"], "best": {}, "before": {}, "seconds": 1}
  assert workdir.Meta.of(meta, tmp_path) == workdir.Meta("a", "b", ["x"], seconds=1.0)
  best = {"step": 4, "value": 0.5, "metrics": {"accuracy": 0.5}}
  assert dataclasses.asdict(workdir.Meta.of({**meta, "best": best}, tmp_path).best) == best
  for change in ({"base": 3}, {"labels": "x"}, {"best": {"step": -1}}, {"seconds": None}):
    with pytest.raises(ValueError, match="from a copy"):
      workdir.Meta.of({**meta, **change}, tmp_path)
