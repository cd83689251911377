"""Sweeps whose trials Optuna proposes: what may be asked, and what is left in the folder."""

import importlib.util
import json

import pytest

from experiments.sweeping import plan, search
from experiments.sweeping.folder import Folder
from peftjax.training import loop
from tests.experiments import sweep_test
from tests.experiments.executor_test import Silent
from tests.experiments.sweep_test import sweep_of

if importlib.util.find_spec("optuna") is None:
  pytest.skip("needs Optuna: pip install 'peftjax[optuna]'", allow_module_level=True)

RATES = dict(
  optimizer=dict(learning_rate=("log", 1e-4, 1e-1)), method=dict(rank=("uniform", 1, 64))
)


def asked(trials=6, fields=RATES, **sections):
  return sweep_of(optuna=dict(trials=trials, fields=fields), **sections)


@pytest.fixture
def order(monkeypatch):
  """Runs are over at once and the better the nearer their rank is to 40; the ids, as they ran."""
  made = []

  def run(config, workdir):
    made.append(workdir.name)
    result = sweep_test.pretend(config, workdir)
    result["metrics"]["validation"] = {"accuracy": 1 - abs(config.method.rank - 40) / 100}
    (workdir / "result.json").write_text(json.dumps(result))

  monkeypatch.setattr(loop, "train_and_evaluate", run)
  return made


@pytest.fixture
def call(command, tmp_path):
  def sweep(config, dry_run=False, retry_failed=False):
    workdir = tmp_path / "sweep"
    given = dict(workdir=str(workdir), dry_run=dry_run, retry_failed=retry_failed)
    command("sweep", config=config, **given)
    return workdir

  return sweep


def rows(workdir):
  return [json.loads(line) for line in (workdir / "summary.jsonl").read_text().splitlines()]


def test_a_search_learns_and_goes_on(call, order, capsys):
  """Later trials are nearer the best; a second run adds to the first; the folder lists them all."""
  workdir = call(asked(4))
  assert len(order) == 4
  call(asked(4))
  assert len(order) == 4
  call(asked(30))
  assert len(order) == len(set(order)) == len(rows(workdir)) and 28 <= len(order) <= 30
  ranks = [row["overrides"]["method.rank"] for row in rows(workdir)]
  far = lambda some: sum(abs(rank - 40) for rank in some) / len(some)
  assert far(ranks[10:]) < far(ranks[:10])
  told = capsys.readouterr().out
  assert "trials: 4 done" in told
  call(asked(40), dry_run=True)
  assert f"{len(order)} trials: {len(order)} done of 40" in capsys.readouterr().out


class Killed(BaseException):
  """Ends a worker as a kill would."""


def test_what_a_killed_worker_had_drawn_runs_once_more(call, order, monkeypatch, tmp_path):
  """Killed while its trial trained, and between the proposal and its listing."""
  whole = loop.train_and_evaluate

  def kill(*told):
    raise Killed

  monkeypatch.setattr(loop, "train_and_evaluate", kill)
  with pytest.raises(Killed):
    call(asked(3))
  [first] = Folder(tmp_path / "sweep").listed()
  monkeypatch.setattr(loop, "train_and_evaluate", whole)
  with monkeypatch.context() as patch:
    calls = []
    patch.setattr(
      Folder, "add", lambda self, x: (calls.append(x), kill())[0] if len(x) > 1 else None
    )
    with pytest.raises(Killed):
      call(asked(3))
  assert order == [first]
  workdir = call(asked(3))
  assert len(order) == 3 and order[0] == first and len(rows(workdir)) == 3


def test_two_workers_share_a_search(order, tmp_path, monkeypatch):
  """A second one, in the midst of the first one's trial, takes others and tells what ended."""
  mine, other = (plan.of(asked(5), Folder(tmp_path / "sweep")) for _ in range(2))
  whole, inside = loop.train_and_evaluate, []

  def meanwhile(config, workdir):
    if not inside:
      inside.append(workdir.name)
      other.work(Silent())
      assert workdir.name not in order and len(order) == 4
    whole(config, workdir)

  monkeypatch.setattr(loop, "train_and_evaluate", meanwhile)
  mine.work(Silent())
  assert len(order) == len(set(order)) == 5 and not mine.left()
  study = mine._study()
  assert [one.state.name for one in study.trials] == ["COMPLETE"] * 5


def test_a_failed_trial_is_no_value(call, order, monkeypatch, capsys):
  """Optuna is told so; the rest go on; it runs again where that is asked for."""
  whole = loop.train_and_evaluate

  def fail(config, workdir):
    if not order:
      order.append(workdir.name)
      raise FloatingPointError("the loss is not finite")
    whole(config, workdir)

  monkeypatch.setattr(loop, "train_and_evaluate", fail)
  with pytest.raises(SystemExit):
    call(asked(3))
  assert "3 trials: 2 done, 1 failed" in capsys.readouterr().out
  workdir = call(asked(3), retry_failed=True)
  assert order.count(order[0]) == 2 and len(rows(workdir)) == 3


def test_less_perplexity_is_better(order, tmp_path, monkeypatch):
  """Optuna's value grows where the metric that counts falls."""

  def run(config, workdir):
    result = sweep_test.pretend(config, workdir)
    result["metrics"]["validation"] = {"perplexity": 3.0, "loss": 1.0}
    (workdir / "result.json").write_text(json.dumps(result))

  monkeypatch.setattr(loop, "train_and_evaluate", run)
  made = plan.of(asked(1), Folder(tmp_path / "sweep"))
  made.work(Silent())
  assert [one.value for one in made._study().trials] == [-3.0]


@pytest.mark.parametrize(
  ("config", "named"),
  [
    (asked(fields=dict(method=dict(rnk=("choice", 1)))), ["'rnk'", "'rank'"]),
    (asked(fields=dict(method=dict(rank=("choice", 2, "x")))), ["method.rank='x'"]),
    (asked(fields=dict(method=dict(rank=(2, 4)))), ["('choice', A, B)"]),
    (asked(fields=dict(method=dict(rank=("uniform", 4, 2)))), ["('uniform', LOW, HIGH)"]),
    (asked(fields=dict(optimizer=dict(learning_rate=("log", 0.0, 1.0)))), ["above 0"]),
    (asked(fields=dict(train=dict(batch_size=("choice", 2, 4)))), ["do not compare"]),
    (asked(fields=dict()), ["fields is empty"]),
    (asked(trials=0), ["trials"]),
    (sweep_of(optuna=dict(trial=3)), ["trial"]),
    (asked(grid=dict(seed=(0, 1))), ["not 2 trials"]),
    (asked(grid=dict(method=dict(rank=(3,)))), ["method.rank", "leave one out"]),
    (asked(together=2), ["together"]),
  ],
)
def test_a_search_that_makes_no_sense(fails, tmp_path, order, config, named):
  """It is refused before anything has run or is written."""
  given = dict(workdir=str(tmp_path / "sweep"), dry_run=False, retry_failed=False)
  message = fails("sweep", config=config, **given)
  assert all(part in message for part in named), message
  assert not (tmp_path / "sweep").exists() and not order


def test_another_search_wants_another_folder(call, fails, order):
  """What earlier trials were drawn from is told beside what is asked for now."""
  workdir = call(asked(2))
  given = dict(workdir=str(workdir), dry_run=False, retry_failed=False)
  more = asked(fields=dict(RATES, method=dict(rank=("uniform", 1, 8))))
  message = fails("sweep", config=more, **given)
  assert "high=64" in message and "high=8" in message and "another --workdir" in message
  assert len(order) == 2


def test_seeds_differ_by_trial():
  """Two workers that ask one after the other do not draw the same."""
  first, second = (search._sampler(seed)._rng.rng.uniform() for seed in (0, 1))
  assert first != second
