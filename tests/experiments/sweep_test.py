"""`experiments.sweep`: ids, claims, failures, stops, and what is left of it on disk."""

import errno
import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest
from ml_collections import ConfigDict

from experiments import plots
from experiments.sweeping import summary, trials
from experiments.sweeping.folder import Folder
from experiments.tables import rank_budget
from peftjax.io import disk
from peftjax.training import loop, process
from tests.training import runs

ROOT = pathlib.Path(__file__).parents[2]
BASE = f"{ROOT}/configs/classify.py:method=lora,data=bbc"
ADALORA = f"{ROOT}/configs/classify.py:method=adalora,data=bbc"


def sweep_of(base=BASE, **sections):
  return ConfigDict(dict(base=base, **sections))


FOUR = sweep_of(grid=dict(seed=(0, 1), method=dict(rank=(2, 4))))


def pretend(config, workdir):
  """A run that is over at once: better with rank, and a little with the seed."""
  workdir.mkdir(parents=True, exist_ok=True)
  settings = json.loads(config.to_json())
  (workdir / "config.json").write_text(json.dumps(settings))
  rank = settings["method"]["rank"]
  result = {
    "config": settings,
    "method": config.method.name,
    "seed": config.seed,
    "metrics": {
      "test": {"accuracy": rank / 10 + config.seed / 100},
      "validation": {"accuracy": 0.5},
    },
    "trainable_params": 100 * rank,
    "total_params": 10_000,
    "best_step": 1,
    "steps": 2,
    "seconds": 1.5,
    "commit": "abc",
  }
  (workdir / "result.json").write_text(json.dumps(result))
  return result


@pytest.fixture
def calls(monkeypatch):
  """The ids of trials in the order in which they ran, each by `pretend` or by what is put here."""
  made = []
  made_by = {}

  def run(config, workdir):
    made.append(workdir.name)
    return made_by.get(workdir.name, pretend)(config, workdir)

  monkeypatch.setattr(loop, "train_and_evaluate", run)
  monkeypatch.setattr("jax.clear_caches", lambda: None)
  return made, made_by


@pytest.fixture
def sweep(command, tmp_path):
  """Calls the command on a folder."""

  def call(config=FOUR, workdir=tmp_path / "sweep", dry_run=False, retry_failed=False):
    command(
      "sweep", config=config, workdir=str(workdir), dry_run=dry_run, retry_failed=retry_failed
    )
    return workdir

  return call


def ids(config=FOUR):
  return [trial.id for trial in trials.expand(config)]


def test_an_id_tells_what_can_change_a_result():
  """The same for the same result, in whatever sweep; another for any other."""
  [one] = trials.expand(sweep_of())
  assert one.id.startswith("lora-rank8-seed0-")
  free = dict(compilation_cache=("",), train=dict(log_every=(1,), eval_batch_size=(2,)))
  assert ids(sweep_of(grid=dict(method=dict(rank=(8,)), **free))) == [one.id]
  grid = [dict(seed=(1,)), dict(method=dict(alpha=(8.0,))), dict(data=dict(max_length=(32,)))]
  assert len({one.id, *(ids(sweep_of(grid=fields))[0] for fields in grid)}) == 4


def test_trials_are_bases_times_list_times_grid():
  """Every combination once, the seed slowest; a listed trial may have a base of its own."""
  listed = (
    {"method.rank": 2},
    {"base": ADALORA, "method": {"rank": 3, "target_rank": 2.0}},
    {"method.rank": 2},
  )
  made = trials.expand(sweep_of(trials=listed, grid=dict(seed=(0, 1), train=dict(steps=(5,)))))
  told = [(x.config.method.name, x.config.method.rank, x.config.seed) for x in made]
  assert told == [("lora", 2, 0), ("adalora", 3, 0), ("lora", 2, 1), ("adalora", 3, 1)]
  assert all(x.config.train.steps == x.overrides["train.steps"] == 5 for x in made)
  assert [x.config.seed for x in trials.expand(FOUR)] == [0, 0, 1, 1]
  assert len(ids(sweep_of(base=(BASE, ADALORA), grid=dict(seed=(0, 1, 2))))) == 6


def test_budgets_are_equal(monkeypatch):
  """LoRA's rank is AdaLoRA's target, which starts from at least 1.5 times as many."""
  monkeypatch.chdir(ROOT)
  made = trials.expand(rank_budget.get_config())
  lora = {(x.config.method.rank, x.config.seed) for x in made if x.config.method.name == "lora"}
  methods = [(x.config.method, x.config.seed) for x in made if x.config.method.name == "adalora"]
  assert len(lora) == 4 * 3 and lora == {(m.target_rank, seed) for m, seed in methods}
  assert all(0 <= m.rank - 1.5 * m.target_rank < 1 for m, _ in methods)


@pytest.mark.parametrize(
  ("config", "named"),
  [
    (sweep_of(grid=dict(method=dict(rnk=(1,)))), ["'rnk'", "'rank'", BASE]),
    (sweep_of(grid=dict(optimiser=dict(eps=(1,)))), ["'optimiser'", "'optimizer'"]),
    (sweep_of(trials=({"seed.x": 1},)), ["'x'", "seed"]),
    (sweep_of(grid=dict(method=("lora", "dora"))), ["method='lora'", "does not fit"]),
    (sweep_of(grid=dict(train=dict(steps=("many",)))), ["train.steps='many'"]),
    (sweep_of(grid=dict(optimizer=dict(name=("adam",)))), ["'adam'", "adamw8bit"]),
    (sweep_of(grid=dict(seed=3)), ["seed is 3", "(3,)"]),
    (sweep_of(grid=dict(seed=())), ["no trial"]),
    (sweep_of(grid=dict(seed=(0,)), trials=({"seed": 1},)), ["seed", "leave one out"]),
    (sweep_of(gird=dict(seed=(0,))), ["'gird'", "'grid'"]),
    (sweep_of(base="configs/nothing.py"), ["configs/nothing.py"]),
    (ConfigDict(dict(grid=dict(seed=(0,)))), ["no base"]),
    (ConfigDict(), ["no base"]),
    (sweep_of(together=0), ["together is 0", ">= 1"]),
    (sweep_of(together="8"), ["together is '8'", "whole number"]),
    (sweep_of(together=True), ["together is True", "whole number"]),
    (sweep_of(together=None), ["together is None"]),
    (sweep_of(base=3), ["base is 3"]),
    (sweep_of(base=(BASE, 3)), ["base"]),
    (sweep_of(grid=3), ["grid is 3"]),
    (sweep_of(grid=("seed", 1)), ["grid is ('seed', 1)"]),
    (sweep_of(grid=dict(seed="01")), ["seed is '01'", "tuple"]),
    (sweep_of(trials=3), ["trials is 3"]),
    (sweep_of(trials=dict(seed=1)), ["trials is"]),
    (sweep_of(trials=(1, 2)), ["trials[0] is 1"]),
  ],
)
def test_a_sweep_that_makes_no_sense(fails, tmp_path, calls, config, named):
  """It is refused before anything has run or is written."""
  given = dict(workdir=str(tmp_path / "sweep"), dry_run=False, retry_failed=False)
  message = fails("sweep", config=config, **given)
  assert all(part in message for part in named), message
  assert not (tmp_path / "sweep").exists() and not calls[0]


def test_dry_run_writes_nothing(sweep, calls, capsys):
  """It names what is left, by id and by what differs, and runs none of it."""
  workdir = sweep(dry_run=True)
  out = capsys.readouterr().out
  assert not workdir.exists() and not calls[0]
  assert all(name in out for name in ids()) and "seed 1, rank 4" in out
  assert "4 trials: 4 waiting" in out


class Killed(BaseException):
  """Ends a sweep as a kill would, without a word."""


def test_a_killed_sweep_repeats_no_finished_trial(sweep, calls, tmp_path):
  """Finished trials keep every byte and date; the one that was killed and the rest then run."""
  order, made_by = calls

  def kill(config, workdir):
    raise Killed

  made_by[ids()[2]] = kill
  with pytest.raises(Killed):
    sweep()
  finished = [Folder(tmp_path / "sweep").trial(name) for name in ids()[:2]]
  dates = lambda: [path.stat().st_mtime_ns for x in finished for path in sorted(x.rglob("*"))]
  before, written = [runs.contents(x) for x in finished], dates()
  made_by.clear()
  workdir = sweep()
  assert order == [*ids()[:3], *ids()[2:]]
  assert [runs.contents(x) for x in finished] == before and dates() == written
  rows = [json.loads(line) for line in (workdir / "summary.jsonl").read_text().splitlines()]
  assert [row["id"] for row in rows] == ids()
  sweep()
  assert len(order) == 5


# A worker that finishes its first trial and hangs in its second.
WORKER = """
import pathlib, sys
from experiments.sweeping import folder, trials, worker
from tests.experiments import sweep_test

class Silent:
  begins = ends = lambda self, trials: None

def run(trial, workdir):
  if workdir.name == sweep_test.ids()[1]:
    print("hangs", flush=True)
    sys.stdin.read()
  sweep_test.pretend(trial.config, workdir)

todo, where = trials.expand(sweep_test.FOUR), folder.Folder(pathlib.Path(sys.argv[1]))
where.add(todo)
worker.work(todo, where, Silent(), run)
"""


def test_a_second_worker_takes_other_trials_until_the_first_is_killed(
  sweep, calls, tmp_path, capsys
):
  """What another process runs is left to it; its claim ends with it, though nothing tidied up."""
  first = subprocess.Popen(
    [sys.executable, "-c", WORKER, str(tmp_path / "sweep")],
    env={**os.environ, "PYTHONPATH": str(ROOT)},
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  with first:
    try:
      assert first.stdout.readline() == "hangs\n"
      sweep()
      assert calls[0] == ids()[2:]
      out = capsys.readouterr().out
      assert "3 done, 1 running elsewhere" in out and "1 still run elsewhere" in out
    finally:
      first.kill()
  sweep()
  assert calls[0] == [*ids()[2:], ids()[1]]
  assert "4 trials: 4 done" in capsys.readouterr().out


def test_a_failed_trial_is_recorded_and_the_rest_go_on(sweep, calls, capsys):
  """Type, message and trace are kept; it runs again when that is asked for, and only then."""
  order, made_by = calls

  def fail(config, workdir):
    raise FloatingPointError("the loss is not finite")

  made_by[ids()[1]] = fail
  for _ in range(2):
    with pytest.raises(SystemExit) as ended:
      sweep()
    assert ended.value.code == 1 and order == ids()
  told = capsys.readouterr()
  assert "4 trials: 3 done, 1 failed" in told.out
  assert "--retry_failed" in told.err and "the loss is not finite" in told.err
  failed = Folder(sweep(dry_run=True)).trial(ids()[1])
  error = json.loads((failed / "error.json").read_text())
  assert (error["type"], error["message"]) == ("FloatingPointError", "the loss is not finite")
  assert "in fail" in error["traceback"]
  made_by.clear()
  workdir = sweep(retry_failed=True)
  assert order == [*ids(), ids()[1]] and not (failed / "error.json").exists()
  assert len((workdir / "summary.jsonl").read_text().splitlines()) == 4


def saves_and_stops(config, workdir):
  with process.stop_signals() as stop:
    signal.raise_signal(signal.SIGTERM)
  raise loop.Stopped(f"{stop.asked}: saved step 1 of 2; run again to go on")


def just_finishes(config, workdir):
  with process.stop_signals():
    signal.raise_signal(signal.SIGTERM)
  return pretend(config, workdir)


def is_interrupted(config, workdir):
  signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize(
  ("how", "said"),
  [(saves_and_stops, "saved step 1 of 2"), (just_finishes, "stopped"), (is_interrupted, "stopped")],
)
def test_a_signal_ends_the_sweep(sweep, calls, capsys, how, said):
  """While a trial trains, at its last step and at any other moment; the sweep says how to go on."""
  order, made_by = calls
  before = signal.getsignal(signal.SIGTERM)
  made_by[ids()[0]] = how
  with pytest.raises(SystemExit) as ended:
    sweep()
  assert ended.value.code == 0 and order == ids()[:1]
  out = capsys.readouterr().out
  assert said in out and "run the same command to go on" in out
  assert signal.getsignal(signal.SIGTERM) is before and signal.set_wakeup_fd(-1) == -1


def test_a_sweep_may_grow(sweep, calls):
  """More seeds in the same folder: the old trials stay, and the summary has all."""
  sweep()
  more = sweep_of(grid=dict(seed=(2,), method=dict(rank=(2, 4))))
  workdir = sweep(more)
  assert calls[0] == [*ids(), *ids(more)]
  rows = [json.loads(line) for line in (workdir / "summary.jsonl").read_text().splitlines()]
  assert [row["id"] for row in rows] == [*ids(), *ids(more)]
  assert rows[0]["overrides"] == {"base": BASE, "seed": 0, "method.rank": 2}
  wanted = {"metrics", "trainable_params", "seconds", "commit", "config", "seed", "method"}
  assert wanted <= set(rows[0])


def test_results_that_do_not_compare_are_kept_apart(sweep, fails, calls):
  """Other data or another length of training in the same folder is refused by field and values."""
  workdir = sweep()
  before = runs.contents(workdir)
  other = sweep_of(grid=dict(train=dict(steps=(5,)), data=dict(name=("sentiment",))))
  message = fails("sweep", config=other, workdir=str(workdir), dry_run=False, retry_failed=False)
  assert "data.name: 'bbc' there, 'sentiment' now" in message
  assert "train.steps: None there, 5 now" in message and "another --workdir" in message
  assert runs.contents(workdir) == before


def test_a_trial_folder_with_another_config(sweep, fails, calls):
  """A folder whose config is not its id's is named, with what to do."""
  workdir = sweep()
  path = Folder(workdir).trial(ids()[0]) / "config.json"
  path.write_text(path.read_text().replace('"rank": 2', '"rank": 3'))
  message = fails("sweep", config=FOUR, workdir=str(workdir), dry_run=False, retry_failed=False)
  assert str(path.parent) in message and "method.rank: 3 there, 2 now" in message
  assert "remove that folder" in message


@pytest.mark.parametrize("content", ["", "null", "[]", '{"a": 1}', '{"a": {"overrides": {}}}', "{"])
def test_a_damaged_listing_is_named(fails, tmp_path, calls, content):
  """It is not taken for an empty one."""
  workdir = tmp_path / "sweep"
  workdir.mkdir()
  (workdir / "sweep.json").write_text(content)
  given = dict(workdir=str(workdir), dry_run=False, retry_failed=False)
  message = fails("sweep", config=FOUR, **given)
  assert "sweep.json" in message and "from a copy" in message and not calls[0]
  assert (workdir / "sweep.json").read_text() == content


@pytest.mark.parametrize("name", ["result.json", "error.json"])
@pytest.mark.parametrize("content", ["", "null", "{}", '{"type": 1}', "\ud800"])
def test_a_damaged_record_of_a_trial_is_named(fails, tmp_path, calls, name, content):
  """It is not taken for a finished or a failed trial."""
  path = tmp_path / "sweep" / "trials" / ids()[0] / name
  path.parent.mkdir(parents=True)
  path.write_bytes(content.encode("utf-8", "surrogatepass"))
  given = dict(workdir=str(tmp_path / "sweep"), dry_run=False, retry_failed=False)
  message = fails("sweep", config=FOUR, **given)
  assert name in message and "emove it" in message and not calls[0]


def test_a_full_disk_ends_the_sweep(fails, tmp_path, calls):
  """No other trial could write either; none is recorded as failed."""
  order, made_by = calls

  def full(config, workdir):
    raise disk.refusal(OSError(errno.ENOSPC, "full"), workdir)

  made_by[ids()[0]] = full
  given = dict(workdir=str(tmp_path / "sweep"), dry_run=False, retry_failed=False)
  message = fails("sweep", config=FOUR, **given)
  assert "the disk is full" in message and order == ids()[:1]
  assert not list((tmp_path / "sweep").rglob("error.json"))


def real(made, model_dir, corpus):
  """The grid of one trial that trains a tiny model."""
  return dict(
    model=dict(directory=(str(model_dir),)),
    data=dict(train_file=(str(corpus),), max_length=(16,)),
    train={key: (made.train[key],) for key in ("steps", "batch_size", "log_every", "epochs")},
    method=dict(rank=(made.method.rank,)),
    compilation_cache=("",),
  )


@pytest.mark.slow(reason="several groups of runs, 10 s")
def test_trials_that_fit_are_trained_together(
  sweep, config, model_dir, corpus, capsys, monkeypatch, tmp_path
):
  """Three learning rates in one step, of which one diverges; where it does not go, one by one."""
  grid = real(config(), model_dir, corpus)
  grid["optimizer"] = dict(learning_rate=(1e-3, 1e-2, 1e30))
  given = sweep_of(base=BASE.replace("bbc", "files"), grid=grid, together=3)
  with pytest.raises(SystemExit):
    sweep(given, tmp_path / "all")
  shown = capsys.readouterr()
  assert "1 failed" in shown.err and "not finite" in shown.err and "elsewhere" not in shown.out
  rows = [json.loads(x) for x in (tmp_path / "all" / "summary.jsonl").read_text().splitlines()]
  assert [row["together"] for row in rows] == [3, 3]

  def no_memory(configs, folders):
    raise RuntimeError("out of memory")

  monkeypatch.setattr("experiments.sweeping.worker.train_together", no_memory)
  grid["optimizer"] = dict(learning_rate=(1e-3, 1e-2))
  sweep(sweep_of(base=BASE.replace("bbc", "files"), grid=grid, together=3), tmp_path / "apart")
  again = [json.loads(x) for x in (tmp_path / "apart" / "summary.jsonl").read_text().splitlines()]
  assert [row["id"] for row in again] == [row["id"] for row in rows]
  assert not any("together" in row for row in again)


def test_a_trial_is_a_run_of_train(sweep, config, model_dir, corpus):
  """A real one: its config is that of experiments.train with these fields, and so its result."""
  made = config()
  same = real(made, model_dir, corpus)
  workdir = sweep(sweep_of(base=BASE.replace("bbc", "files"), grid=same))
  [row] = map(json.loads, (workdir / "summary.jsonl").read_text().splitlines())
  assert row["config"] == json.loads(made.to_json()) and row["id"] == trials.trial_id(made)
  result = Folder(workdir).result(row["id"])
  assert {key: result[key] for key in row if key not in ("id", "overrides")} == {
    key: value for key, value in row.items() if key not in ("id", "overrides")
  }
  assert (Folder(workdir).trial(row["id"]) / "peft" / "adapter_config.json").exists()


def test_pictures_are_drawn(sweep, calls):
  """The Pareto plot always, the heat map if a result has ranks."""
  order, made_by = calls

  def allocates(config, workdir):
    result = {**pretend(config, workdir), "ranks": {"m/layers_0/q/kernel": 2}}
    (workdir / "result.json").write_text(json.dumps(result))

  workdir = sweep()
  assert not (workdir / "ranks.png").exists()
  more = sweep_of(base=ADALORA)
  made_by[ids(more)[0]] = allocates
  sweep(more)
  for name in ("pareto.png", "ranks.png"):
    png = (workdir / name).read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n") and len(png) > 5_000


def row_of(rank, seed, value, metric="accuracy", **more):
  config = {"seed": seed, "data": {"name": "bbc"}, "method": {"name": "lora", "rank": rank}}
  scores = {"test": {metric: value, "zzz": 0.0}}
  return {"config": config, "metrics": scores, "trainable_params": 10 * rank, **more}


def test_points_are_means_over_seeds():
  rows = [row_of(1, 0, 0.5), row_of(2, 0, 0.9), row_of(1, 1, 0.7)]
  low, high = plots.points(rows)
  assert (low.parameters, low.mean, low.std) == (10, pytest.approx(0.6), pytest.approx(0.02**0.5))
  assert (high.parameters, high.mean, high.std) == (20, 0.9, 0.0)


@pytest.mark.parametrize("less", [False, True])
def test_the_front_is_what_nothing_smaller_beats(less):
  """A point is on it if and only if all that are no larger are worse."""
  values = [3, 1, 4, 1, 5, 9, 2, 6, 5]
  points = [plots.Point("m", 1 + i // 2, v, 0.0) for i, v in enumerate(values)]
  better = lambda a, b: a.mean < b.mean if less else a.mean > b.mean
  wanted = [
    p for p in points if all(q == p or q.parameters > p.parameters or better(p, q) for q in points)
  ]
  assert plots.front(points, less) == wanted and wanted


def test_perplexity_is_what_a_language_model_is_compared_by():
  assert plots.metric(row_of(1, 0, 30.0, "perplexity")) == ("perplexity", 30.0)
  assert plots.metric({"metrics": {"test": {"loss": 1.0, "perplexity": 2.0}}})[1] == 2.0
  assert plots.metric(row_of(1, 0, 0.5)) == ("accuracy", 0.5)


def drawn(monkeypatch, tmp_path, draw, rows):
  """The figure that a plot function has saved."""
  import matplotlib.pyplot as plt

  kept = []
  monkeypatch.setattr(plt, "close", kept.append)
  draw(rows, tmp_path / "a.png")
  monkeypatch.undo()
  plt.close(kept[0])
  return kept[0]


def test_ranks_are_drawn_by_layer_and_matrix(monkeypatch, tmp_path):
  """Mean over seeds, layers in the order of their numbers, a panel a config."""
  paths = ["m/layers_2/q/kernel", "m/layers_10/q/kernel", "m/layers_2/v/kernel", "pool/kernel"]
  left = lambda *numbers: dict(zip(paths, numbers, strict=True))
  rows = [row_of(4, 0, 0.5, ranks=left(1, 2, 3, 4)), row_of(4, 1, 0.5, ranks=left(3, 2, 1, 0))]
  figure = drawn(monkeypatch, tmp_path, plots.ranks, [*rows, row_of(2, 0, 0.5)])
  axis = figure.axes[0]
  assert [x.get_text() for x in axis.get_xticklabels()] == ["q", "v", "pool"]
  assert [x.get_text() for x in axis.get_yticklabels()] == ["-", "2", "10"]
  image = axis.get_images()[0].get_array().filled(-1).tolist()
  assert image == [[-1, -1, 2], [2, 2, -1], [2, -1, -1]]
  more = [*rows, row_of(2, 0, 0.5, ranks=left(1, 1, 1, 1))]
  panels = [a for a in drawn(monkeypatch, tmp_path, plots.ranks, more).axes if a.get_images()]
  assert [panel.get_title() for panel in panels] == ["rank 4, 2 seeds", "rank 2, 1 seed"]
  with pytest.raises(ValueError, match="method=adalora"):
    plots.ranks([row_of(2, 0, 0.5)], tmp_path / "none.png")


def test_results_of_other_data_get_a_panel_of_their_own(monkeypatch, tmp_path):
  rows = [row_of(1, 0, 0.5), row_of(2, 0, 0.9), row_of(1, 1, 0.7)]
  rows[2]["config"]["data"]["name"] = "sentiment"
  figure = drawn(monkeypatch, tmp_path, plots.pareto, rows)
  assert [axis.get_title() for axis in figure.axes] == ["dataset: bbc", "dataset: sentiment"]


@pytest.mark.parametrize("at", range(6))
def test_a_table_that_is_too_high_shows_what_runs(at):
  """As many lines as fit, among them the running trial's."""
  names = [f"trial{i}" for i in range(6)]
  listed = {name: {"overrides": {}, "config": {"seed": 0}} for name in names}
  states = {name: {"status": "waiting"} for name in names}
  states[names[at]]["status"] = "running"
  shown = list(summary.table(listed, states, 3).columns[0].cells)
  assert len(shown) == 3 and names[at] in shown
  assert len(list(summary.table(listed, states).columns[0].cells)) == 6
