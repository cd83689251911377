"""`experiments.tables`: what is missing is computed once; the committed results are whole."""

import json
from pathlib import Path

import pytest

from experiments.sweeping import trials, worker
from experiments.tables import __main__ as command
from experiments.tables import cells, report, runs
from experiments.tables.runs import SEEDS, found, sweep, trial

RESULTS = Path(__file__).parents[2] / "experiments" / "results" / "tables"


def counting(name, calls, fails=False):
  def run():
    if fails:
      raise ValueError(name)
    calls.append(name)
    return {"value": len(calls)}

  return cells.Cell(name, run)


def test_a_killed_table_goes_on_where_it_was(tmp_path):
  """Rows are in the file as soon as they are known, and none is computed twice."""
  calls, path = [], tmp_path / "folder" / "table.jsonl"
  todo = [counting("one", calls), counting("two", calls, fails=True), counting("three", calls)]
  with pytest.raises(ValueError, match="two"):
    cells.compute(todo, path)
  assert [cell.name for cell in cells.left(todo, path)] == ["two", "three"]
  rows = cells.compute([counting(cell.name, calls) for cell in todo], path)
  assert calls == ["one", "two", "three"]
  assert [(row["cell"], row["value"]) for row in rows] == [("one", 1), ("two", 2), ("three", 3)]
  assert {"command", "commit", "machine", "versions"} <= set(rows[0])
  assert cells.compute(todo, path) == rows
  assert len(path.read_text().splitlines()) == 3


def row_of(config):
  return {"config": json.loads(config.to_json())}


def write(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_rows_are_found_by_their_config(tmp_path):
  """Whatever differs is another run's; a field that the row is older than had its default."""
  path = tmp_path / "rows.jsonl"
  one, *_ = trials.expand(sweep([trial("sentiment", "lora", rank=4)]))
  other, *_ = trials.expand(sweep([trial("sentiment", "lora", rank=4, b_rate=16.0)]))
  row = row_of(one.config)
  write(path, [row])
  assert found([other, one], path) == [None, row]
  del row["config"]["method"]["b_rate"]
  write(path, [row])
  assert found([other, one], path) == [None, row]
  write(path, [row, row])
  with pytest.raises(ValueError, match="line 2 is the run of .* line 1 again"):
    found([one], path)


def test_a_table_runs_what_its_file_lacks_as_a_sweep(monkeypatch, tmp_path):
  """And adds its rows; a line that was taken out comes back from the folder of its run."""
  ran, path = [], tmp_path / "rows.jsonl"

  def run(config, folder):
    ran.append(config.seed)
    kept = dict.fromkeys(("trainable_params", "total_params", "best_step", "steps", "seconds"), 1)
    scores = dict.fromkeys(("validation", "test"), {"accuracy": 0.5})
    result = {**kept, **row_of(config), "metrics": scores, "commit": "abc"}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(
      json.dumps({**result, "method": "lora", "seed": config.seed})
    )

  monkeypatch.setattr(worker.loop, "train_and_evaluate", run)
  asked = sweep([trial("sentiment", "lora")])
  write(path, [row_of(trials.expand(asked)[0].config)])
  rows = runs.rows(asked, path, tmp_path / "runs")
  assert ran == [1, 2] and [row["config"]["seed"] for row in rows] == list(SEEDS)
  assert {"command", "commit", "run_commit", "machine", "versions"} <= set(rows[1])
  write(path, rows[:2])
  assert runs.rows(asked, path, tmp_path / "runs")[2]["run_commit"] == "abc" and ran == [1, 2]
  assert runs.left(asked, path, tmp_path / "runs") is None


@pytest.mark.parametrize("name", command.NAMES)
def test_committed_results_are_whole_and_say_where_they_are_from(name, capsys, tmp_path):
  table = command.of(name)
  file = RESULTS / f"{table.RESULTS}.jsonl"
  before = file.read_bytes()
  rows = command.rows(table, file, tmp_path)
  assert rows and file.read_bytes() == before
  if table.RESULTS == name:  # of runs that tables share each shows some
    assert len(before.splitlines()) == len(rows)
  for row in rows:
    assert "python -m experiments.tables " in row["command"]
    assert row["commit"] and "seed" in row and row["machine"]
  made = table.table(rows)
  for form in report.FORMATS:
    report.write(made, form)
    assert made.lines[0][0] in capsys.readouterr().out.replace("\\", "")
  if hasattr(table, "pictures"):
    table.pictures(rows, tmp_path)
    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert drawn == {path.name for path in RESULTS.glob(f"{name}_*.png")}
