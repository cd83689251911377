"""`experiments.tables`: cells are computed once, and the committed results make whole tables."""

import importlib
import json
import threading
from pathlib import Path

import pytest

from experiments.tables import cells, report, trials

RESULTS = Path(__file__).parents[2] / "experiments" / "results" / "tables"
TABLES = (
  "datatypes",
  "qlora_vs_lora",
  "parameters",
  "which_matrices",
  "rank",
  "rank_budget",
  "adalora_ablation",
  "methods",
  "ffn",
)


def counting(name, calls, fails=False):
  def run():
    if fails:
      raise ValueError(name)
    calls.append(name)
    return {"value": len(calls)}

  return cells.Cell(name, run, 1.5)


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


def test_two_processes_share_the_cells(tmp_path):
  """While the first is at a cell, a second one computes the others and waits for that one."""
  calls, path, second, rows = [], tmp_path / "table.jsonl", [], []

  def slow():
    second.append(threading.Thread(target=lambda: rows.extend(cells.compute(todo, path))))
    second[0].start()
    while len(calls) < 2:
      assert second[0].is_alive()
    return {"value": 0}

  todo = [cells.Cell("slow", slow, 1), counting("one", calls), counting("two", calls)]
  cells.compute(todo, path)
  second[0].join()
  assert calls == ["one", "two"] and len(path.read_text().splitlines()) == 3
  assert [row["cell"] for row in rows] == ["slow", "one", "two"]


def test_one_that_is_asked_to_stop_ends_after_its_cell(tmp_path):
  """A signal at the last step of a run does not end that run; the next cell is not begun."""
  calls, path = [], tmp_path / "table.jsonl"
  todo = [counting("one", calls), counting("two", calls)]
  with pytest.raises(KeyboardInterrupt):
    cells.compute(todo, path, asked=lambda: True)
  assert calls == ["one"] and list(cells.rows(path)) == ["one"]
  cells.compute(todo, path)
  assert calls == ["one", "two"]


def test_runs_of_another_config_are_not_mixed_into_a_table():
  """Whatever differs is named; a field that the row is older than had its default."""
  one, other = (trials.trial("sentiment", "lora", rank=4, **x) for x in ({}, {"b_rate": 16.0}))
  row = {"cell": "it", "config": json.loads(one.config(0).to_json())}
  trials.check(row, one.config(0), one.default())
  del row["config"]["method"]["b_rate"]
  trials.check(row, one.config(0), one.default())
  with pytest.raises(ValueError, match=r"it: .*method.b_rate=1.0, but the table now asks for 16.0"):
    trials.check(row, other.config(0), other.default())
  row["config"]["optimizer"]["learning_rate"] = 0.5
  with pytest.raises(ValueError, match=r"it: .*optimizer.learning_rate=0.5.*Take its line out"):
    trials.check(row, one.config(0), one.default())
  row = {"cell": "it", "config": json.loads(one.config(1).to_json())}
  with pytest.raises(ValueError, match=r"seed=1"):
    trials.check(row, one.config(0), one.default())


def test_rows_of_another_config_stop_a_table_before_it_computes(tmp_path):
  def refuse(row):
    raise ValueError(f"{row['cell']} is old")

  calls, path = [], tmp_path / "table.jsonl"
  path.write_text(json.dumps({"cell": "two"}) + "\n")
  todo = [counting("one", calls), counting("two", calls)._replace(check=refuse)]
  with pytest.raises(ValueError, match="two is old"):
    cells.compute(todo, path)
  assert not calls


def test_a_line_that_was_taken_out_is_computed_again(monkeypatch, tmp_path):
  """Though its run has finished and left its folder."""
  seen = []

  def run(config, workdir):
    seen.append((workdir / "result.json").exists())
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "result.json").write_text("{}")
    kept = ("trainable_params", "total_params", "metrics", "best_step", "seed", "seconds")
    return {**dict.fromkeys((*kept, "commit"), 0), "config": json.loads(config.to_json())}

  monkeypatch.setattr(trials, "train_and_evaluate", run)
  [todo, *_] = trials.cells([trials.trial("sentiment", "lora")], tmp_path / "runs")
  for _ in range(2):
    [row] = cells.compute([todo], tmp_path / "trials.jsonl")
    (tmp_path / "trials.jsonl").unlink()
  assert seen == [False, False] and row["config"]["method"]["name"] == "lora"


def test_what_is_left_is_told(tmp_path, capsys):
  path = tmp_path / "table.jsonl"
  path.write_text(json.dumps({"cell": "one"}) + "\n")
  cells.show_left("table", [counting(name, []) for name in ("one", "two", "three")], path)
  out = capsys.readouterr().out
  assert "two  1.5 min" in out and "one  " not in out
  assert "table: 2 of 3 cells left, about 0.1 hours" in out


@pytest.mark.parametrize("name", TABLES)
def test_committed_results_are_whole_and_say_where_they_are_from(name, capsys, tmp_path):
  table = importlib.import_module(f"experiments.tables.{name}")
  kept = getattr(table, "RESULTS", name)  # runs that tables share are in one file
  todo, rows = table.cells(tmp_path), cells.rows(RESULTS / f"{kept}.jsonl")
  wanted = {cell.name for cell in todo}
  assert wanted and (wanted == set(rows) if kept == name else wanted <= set(rows))
  for row in rows.values():
    assert "python -m experiments.tables " in row["command"]
    assert row["commit"] and "seed" in row and row["machine"]
  listed = [rows[cell.name] for cell in todo]
  made = table.table(listed)
  for form in report.FORMATS:
    report.write(made, form)
    assert made.lines[0][0] in capsys.readouterr().out.replace("\\", "")
  if hasattr(table, "pictures"):
    table.pictures(listed, tmp_path)
    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert drawn == {path.name for path in RESULTS.glob(f"{name}_*.png")}
