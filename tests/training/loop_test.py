"""A run as a whole: what it writes, that it goes on exactly, and what it refuses."""

import json
import shutil

import jax
import numpy as np
import pytest

from peftjax.io import safetensors_dir
from peftjax.training import build, evaluate, loop, metrics
from peftjax.training.checkpoint import Checkpoints
from peftjax.training.predict import Predictor
from peftjax.training.run import Run
from peftjax.training.settings import from_config
from tests import tiny
from tests.training import runs


class Interrupted(Exception):
  """Stands for anything that ends a process in the middle."""


def interrupt(monkeypatch, at, error=Interrupted):
  """The batch of step `at`, counted from 1, never reaches the device."""
  place = Run.place

  def broken(self, batch):
    if self.steps_done + 1 == at:
      raise error
    return place(self, batch)

  monkeypatch.setattr(Run, "place", broken)


def test_run_writes_every_promised_file(finished, config):
  """A run leaves config, metrics, events, both checkpoints, the PEFT adapter and the result."""
  workdir, result = finished
  assert json.loads((workdir / "result.json").read_text()) == result
  assert json.loads((workdir / "config.json").read_text()) == json.loads(config().to_json())
  assert list((workdir / "tensorboard").glob("events.out.tfevents.*"))
  names = {path.name for path in (workdir / "peft").iterdir()}
  assert names >= {"adapter_config.json", "adapter_model.safetensors"}
  assert runs.arrays(workdir, "latest")[0] == result["steps"]
  assert runs.arrays(workdir, "best")[0] == result["best_step"]
  assert not list(workdir.rglob("*tmp*"))


def test_result_has_the_promised_fields(finished, config):
  """result.json says what was run, its counts, its scores, its cost and its code."""
  result = finished[1]
  assert result["config"] == json.loads(config().to_json())
  assert (result["method"], result["seed"], result["steps"]) == ("lora", 0, 8)
  # query and value of two layers, 4 x (16 + 16) each, and the head's 16 x 3 + 3.
  assert result["trainable_params"] == 4 * 4 * 32 + 51
  counted = sum(np.prod(value.shape) for value in tiny.weights(0).values()) - (16 * 2 + 2) + 51
  assert result["total_params"] == counted + 4 * 4 * 32
  for part in ("validation", "test"):
    assert set(result["metrics"][part]) == {"accuracy", "macro_f1"}
  assert result["examples"] == {"train": 64, "validation": 8, "test": 8}
  assert result["labels"] == ["business", "sport", "tech"]
  assert result["seconds"] >= result["seconds_to_first_step"] > 0
  assert result["peak_memory_mb"] > 0
  assert "commit" in result


def test_metrics_have_a_row_a_step_and_one_an_epoch(finished):
  """metrics.jsonl has loss, norm and rate at every `log_every` steps, scores after every epoch."""
  rows = [json.loads(line) for line in (finished[0] / "metrics.jsonl").read_text().splitlines()]
  steps = [row for row in rows if "loss" in row]
  epochs = [row for row in rows if "epoch" in row]
  assert [row["step"] for row in steps] == list(range(1, 9))
  assert [(row["step"], row["epoch"]) for row in epochs] == [(4, 1.0), (8, 2.0)]
  for row in steps:
    rates = {f"{what}_per_second" for what in ("examples", "tokens", "flops")}
    assert set(row) == {"step", "loss", "grad_norm", "learning_rate", *rates}
    assert np.isfinite(list(row.values())).all() and all(row[rate] > 0 for rate in rates)
    # Of a CPU neither the peak nor the bytes are known. Rows have 16 tokens.
    assert row["tokens_per_second"] == pytest.approx(16 * row["examples_per_second"])
  for row in epochs:
    assert set(row) == {"step", "epoch", "validation_accuracy", "validation_macro_f1"}


def test_second_run_returns_the_result_without_training(finished, config, run_once, monkeypatch):
  """Of a finished run, the same command only returns the result."""
  workdir, result = finished
  before = runs.contents(workdir)
  monkeypatch.setattr(loop, "Run", None)
  assert run_once(config(), workdir) == result
  assert runs.contents(workdir) == before


_SLOW = pytest.mark.slow(reason="the same law at other steps")


@pytest.mark.parametrize("at", [pytest.param(1, marks=_SLOW), 3, pytest.param(5, marks=_SLOW)])
def test_interrupted_run_goes_on_to_the_same_bits(
  finished, config, run_once, monkeypatch, tmp_path, at
):
  """An exception at any step, then the same call: metrics, parameters and result are the same."""
  with monkeypatch.context() as patch:
    interrupt(patch, at)
    with pytest.raises(Interrupted):
      run_once(config(train__save_every=2), tmp_path / "run")
  assert not (tmp_path / "run" / "result.json").exists()
  run_once(config(), tmp_path / "run")
  runs.assert_same(tmp_path / "run", finished[0])


def test_interrupted_between_best_and_latest(finished, config, run_once, monkeypatch, tmp_path):
  """A best checkpoint newer than the latest does no harm: it is reached again."""
  save = Checkpoints.save

  def broken(self, name, step, arrays, meta):
    if (name, step) == ("latest", 4):
      raise Interrupted
    save(self, name, step, arrays, meta)

  with monkeypatch.context() as patch:
    patch.setattr(Checkpoints, "save", broken)
    with pytest.raises(Interrupted):
      run_once(config(), tmp_path / "run")
  assert runs.arrays(tmp_path / "run", "best")[0] == 4
  run_once(config(), tmp_path / "run")
  runs.assert_same(tmp_path / "run", finished[0])


def test_interrupted_while_scoring_the_test_split(finished, config, unfinished, run_once):
  """A run that only lacks its result gets the same one."""
  run_once(config(), unfinished)
  runs.assert_same(unfinished, finished[0])


def in_place_of(path):
  if path.is_dir():
    shutil.rmtree(path)
  path.write_text("x")


def reworded(path, old, new):
  path.write_text(path.read_text().replace(old, new))


def renamed(workdir):
  """As another step, where no rows of metrics could tell."""
  (workdir / "checkpoints/latest/8").rename(workdir / "checkpoints/latest/6")
  (workdir / "metrics.jsonl").unlink()


@pytest.mark.parametrize(
  ("harm", "named"),
  [
    (lambda w: in_place_of(w / "checkpoints"), "checkpoints is not a folder"),
    (lambda w: in_place_of(w / "checkpoints" / "latest"), "latest is not a folder"),
    (lambda w: in_place_of(w / "checkpoints" / "latest" / "8"), "latest/8 is not a checkpoint"),
    (lambda w: shutil.rmtree(w / "checkpoints" / "best"), "best has no checkpoint"),
    (lambda w: (w / "config.json").unlink(), "config.json is not there"),
    (lambda w: (w / "config.json").write_text("null"), "config.json must hold"),
    (lambda w: (w / "config.json").write_text("{}"), "config.json: .*lacks"),
    (lambda w: (w / "result.json").write_text("{}"), "result.json: .*lacks"),
    (lambda w: (w / "metrics.jsonl").write_text(""), "0 rows instead of the 10"),
    (lambda w: reworded(w / "metrics.jsonl", '"step": 4', '"step": 3'), "other rows than the 10"),
    (lambda w: reworded(w / "metrics.jsonl", '"step": 4,', '"step": 4'), "metrics.jsonl line 4"),
    (renamed, "latest/6 holds step 8"),
  ],
)
def test_a_damaged_workdir_is_named_and_stays(unfinished, config, run_once, harm, named):
  """It is never taken for a short or a finished run, and nothing in it is changed."""
  harm(unfinished)
  before = runs.contents(unfinished)
  with pytest.raises(ValueError, match=named):
    run_once(config(), unfinished)
  assert runs.contents(unfinished) == before


def test_a_result_of_another_config_is_not_returned(finished, config, run_once, tmp_path):
  """Also where config.json is gone."""
  shutil.copy(finished[0] / "result.json", tmp_path)
  with pytest.raises(ValueError, match="seed: 0 there, 1 now"):
    run_once(config(seed=1), tmp_path)


@pytest.mark.parametrize(
  "change",
  [
    {"optimizer__learning_rate": 1e-4},
    {"seed": 1},
    {"method__rank": 2},
    {"train__epochs": 3.0},
    {"train__batch_size": 8},
    {"data__max_length": 12},
    {"model__dtype": "bfloat16"},
  ],
  ids=lambda change: next(iter(change)),
)
def test_resume_with_changed_mathematics_raises(unfinished, config, run_once, change):
  """A changed field is named with both values, and the workdir stays byte for byte as it was."""
  before = runs.contents(unfinished)
  [(key, value)] = change.items()
  with pytest.raises(ValueError, match=key.replace("__", r"\.")) as error:
    run_once(config(**change), unfinished)
  assert repr(value) in str(error.value) and "--workdir" in str(error.value)
  assert runs.contents(unfinished) == before


def test_resume_with_other_logging_goes_on(finished, unfinished, config, run_once):
  """How often is logged and saved changes no number, so it may change."""
  result = run_once(config(train__log_every=3, train__save_every=1), unfinished)
  assert result["metrics"] == finished[1]["metrics"]


def test_resume_with_another_base_raises(config, run_once, monkeypatch, tmp_path, model_dir):
  """Other weights in the same directory are refused, and nothing in the workdir changes."""
  own = tmp_path / "model"
  shutil.copytree(model_dir, own)
  settings = config(model__directory=str(own))
  with monkeypatch.context() as patch:
    interrupt(patch, 6)
    with pytest.raises(Interrupted):
      run_once(settings, tmp_path / "run")
  before = runs.contents(tmp_path / "run")
  shutil.rmtree(own)
  tiny.model_dir(own, seed=1)
  with pytest.raises(ValueError, match="another pretrained model"):
    run_once(settings, tmp_path / "run")
  assert runs.contents(tmp_path / "run") == before


def test_resume_with_changed_data_raises(config, run_once, monkeypatch, tmp_path):
  """Other examples in the same file are refused, and nothing in the workdir changes."""
  file = tiny.corpus(tmp_path / "corpus.csv", 80)
  settings = config(data__train_file=str(file))
  with monkeypatch.context() as patch:
    interrupt(patch, 6)
    with pytest.raises(Interrupted):
      run_once(settings, tmp_path / "run")
  before = runs.contents(tmp_path / "run")
  text = file.read_text()
  file.write_text(text.replace(",sport,", ",tech,", 1))
  with pytest.raises(ValueError, match="other data"):
    run_once(settings, tmp_path / "run")
  assert runs.contents(tmp_path / "run") == before


def test_nan_stops_with_the_step_and_keeps_the_last_good_checkpoint(
  finished, config, run_once, monkeypatch, tmp_path
):
  """A loss that turns NaN at step 7 is named; the checkpoint before is whole and goes on."""
  place = Run.place

  def poison(self, batch):
    if self.steps_done + 1 == 7:
      batch = {**batch, "weights": batch["weights"] * np.float32(np.nan)}
    return place(self, batch)

  with monkeypatch.context() as patch:
    patch.setattr(Run, "place", poison)
    with pytest.raises(FloatingPointError, match=r"step 7: loss nan.*last good .* step 6, is kept"):
      run_once(config(train__save_every=3), tmp_path / "run")
  step, arrays = runs.arrays(tmp_path / "run", "latest")
  assert step == 6 and all(np.isfinite(array).all() for array in arrays.values())
  assert [row["step"] for row in runs.rows(tmp_path / "run")][-1] == 6
  run_once(config(), tmp_path / "run")
  runs.assert_same(tmp_path / "run", finished[0])


def test_diverging_learning_rate_stops_the_run(config, run_once, tmp_path):
  """A learning rate of 1e30 ends in an error that names the step, not in a result."""
  settings = config(optimizer__learning_rate=1e30, optimizer__warmup=0.0)
  with pytest.raises(FloatingPointError, match="step 2.*learning_rate") as error:
    run_once(settings, tmp_path / "run")
  assert "is kept" not in str(error.value)  # for none was saved
  assert not (tmp_path / "run" / "result.json").exists()


def test_divergence_at_the_last_step_of_an_epoch_stops_the_run(config, run_once, tmp_path):
  """Parameters that only the evaluation shows to be broken are neither scored nor kept."""
  settings = config(optimizer__learning_rate=1e30, optimizer__warmup=0.0, train__steps=1)
  with pytest.raises(FloatingPointError, match="step 1"):
    run_once(settings, tmp_path / "run")
  assert not (tmp_path / "run" / "result.json").exists()
  assert not list((tmp_path / "run" / "checkpoints").glob("*/1"))


def test_regression_is_scored_by_correlations(config, run_once, tmp_path):
  """Numbers as labels make one output, trained by squared error, scored by correlation."""
  result = run_once(
    config("full", data__regression=True, data__label_column="number", train__epochs=1.0),
    tmp_path / "run",
  )
  assert set(result["metrics"]["test"]) == {"pearson", "spearman"}
  assert result["labels"] == []
  assert all(-1 <= value <= 1 for value in result["metrics"]["validation"].values())


@pytest.mark.slow(reason="a run of its own; collectives_test and the contract have the meshes")
def test_mesh_of_eight_devices_trains_to_the_same_numbers(finished, config, run_once, tmp_path):
  """data:2, fsdp:2, tensor:2 changes where arrays lie and nothing else."""
  run_once(config(), tmp_path / "run", mesh="data:2,fsdp:2,tensor:2")
  for got, want in zip(runs.rows(tmp_path / "run"), runs.rows(finished[0]), strict=True):
    assert set(got) == set(want)
    np.testing.assert_allclose(list(got.values()), list(want.values()), rtol=1e-3)


@pytest.mark.slow(reason="a run of its own, several seconds")
def test_run_goes_on_under_another_mesh(finished, config, run_once, monkeypatch, tmp_path):
  """A checkpoint of eight devices is a checkpoint of one."""
  with monkeypatch.context() as patch:
    interrupt(patch, 5)
    with pytest.raises(Interrupted):
      run_once(config(), tmp_path / "run", mesh="data:2,fsdp:2,tensor:2")
  run_once(config(), tmp_path / "run")
  last, want = runs.rows(tmp_path / "run")[-2], runs.rows(finished[0])[-2]
  np.testing.assert_allclose(last["loss"], want["loss"], rtol=1e-3)


@pytest.mark.slow(reason="a run of its own; bert_test has the equality")
def test_scanned_layers_train_to_the_same_numbers(finished, config, run_once, tmp_path):
  """scan_layers draws the same factors and dropout masks, so the losses are the same."""
  run_once(config(model__scan_layers=True), tmp_path / "run")
  for got, want in zip(runs.rows(tmp_path / "run"), runs.rows(finished[0]), strict=True):
    np.testing.assert_allclose(list(got.values()), list(want.values()), rtol=1e-3)


@pytest.mark.slow(reason="a run of its own, several seconds")
def test_bfloat16_computes_in_it_and_keeps_float32_parameters(finished, config, run_once, tmp_path):
  """bf16 changes the losses by a per cent at most, but no dtype of what is trained."""
  run_once(config(model__dtype="bfloat16"), tmp_path / "run")
  got, want = (
    np.array([row["loss"] for row in runs.rows(workdir) if "loss" in row])
    for workdir in (tmp_path / "run", finished[0])
  )
  assert (got != want).any()
  np.testing.assert_allclose(got, want, rtol=0.02)
  dtypes = {array.dtype for array in runs.arrays(tmp_path / "run", "latest")[1].values()}
  assert dtypes == {np.dtype(np.float32), np.dtype(np.int32)}


@pytest.mark.slow(reason="a run of its own, several seconds")
def test_accumulation_counts_updates_not_batches(config, run_once, tmp_path):
  """accumulate=2: the learning rate moves every second batch; interrupted between, it goes on."""
  run_once(config(optimizer__accumulate=2, optimizer__warmup=0.0), tmp_path / "run")
  rates = [row["learning_rate"] for row in runs.rows(tmp_path / "run") if "loss" in row]
  np.testing.assert_allclose(rates, np.repeat([2e-3, 1.5e-3, 1e-3, 0.5e-3], 2), rtol=1e-5)


@pytest.mark.parametrize(("steps", "updates"), [(3, [1, 1, 1]), (7, [1, 1, 1, 1, 2, 2, 2])])
@pytest.mark.slow(reason="a run of its own, several seconds")
def test_the_last_update_is_of_the_batches_that_are_left(config, steps, updates):
  """accumulate=4: none is dropped, and the rates are those of as many updates."""
  settings = config(train__steps=steps, optimizer__accumulate=4, optimizer__warmup=0.0)
  run = Run(from_config(settings), None)
  before = jax.device_get(run.state.train)
  for done in run.steps():
    if done in (2, 6):  # the moments of Adam have seen whole updates alone
      assert int(run.state.opt_state.gradient_step) == done // 4
  assert int(run.state.opt_state.gradient_step) == -(-steps // 4)
  pairs = zip(jax.tree.leaves(before), jax.tree.leaves(run.state.train), strict=True)
  assert any((x != y).any() for x, y in pairs)
  rates = [run.learning_rate(number) for number in range(1, steps + 1)]
  of = {update: 2e-3 * (1 - (update - 1) / max(updates)) for update in updates}
  np.testing.assert_allclose(rates, [of[update] for update in updates], rtol=1e-5)


@pytest.mark.slow(reason="a run of its own, several seconds")
def test_interrupted_between_two_batches_of_an_update(config, run_once, monkeypatch, tmp_path):
  """The gradient accumulated so far is part of the checkpoint."""
  settings = config(optimizer__accumulate=2, optimizer__warmup=0.0)
  run_once(settings, tmp_path / "whole")
  with monkeypatch.context() as patch:
    interrupt(patch, 4)
    with pytest.raises(Interrupted):
      often = config(optimizer__accumulate=2, optimizer__warmup=0.0, train__save_every=3)
      run_once(often, tmp_path / "run")
  assert runs.arrays(tmp_path / "run", "latest")[0] == 3
  run_once(settings, tmp_path / "run")
  runs.assert_same(tmp_path / "run", tmp_path / "whole")


@pytest.fixture
def adalora(config):
  """Eight updates: all 4 x 4 triplets until the second, half of them from the sixth on."""
  fields = dict(rank=4, target_rank=2.0, warmup=2.0, final=2.0, interval=1)
  fields["targets"] = ("query", "value")
  named = {f"method__{field}": value for field, value in fields.items()}
  return lambda **changes: config("adalora", **{**named, **changes})


@pytest.mark.slow(reason="a run of its own, several seconds")
def test_adalora_ends_within_its_budget(adalora, run_once, monkeypatch, tmp_path):
  """The result says which ranks were left; interrupted while the budget falls it is the same."""
  result = run_once(adalora(), tmp_path / "whole")
  assert len(result["ranks"]) == 4 and sum(result["ranks"].values()) == 8
  assert result["best_step"] == 8  # the first epoch's end had more triplets
  budgets = [row["budget"] for row in runs.rows(tmp_path / "whole") if "budget" in row]
  assert budgets[:3] == [16, 16, 16] and budgets[-2:] == [8, 8]
  assert budgets == sorted(budgets, reverse=True) and len(set(budgets)) > 2
  exported = json.loads((tmp_path / "whole" / "peft" / "adapter_config.json").read_text())
  assert sum(map(sum, exported["rank_pattern"].values())) == 8
  with monkeypatch.context() as patch:
    interrupt(patch, 6)
    with pytest.raises(Interrupted):
      run_once(adalora(train__save_every=5), tmp_path / "run")
  assert runs.arrays(tmp_path / "run", "latest")[0] == 5
  run_once(adalora(), tmp_path / "run")
  runs.assert_same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow(reason="a run of its own, several seconds")
def test_steps_go_before_epochs(config, run_once, tmp_path):
  """train.steps=5 is five batches: an epoch and a quarter, evaluated at both ends."""
  result = run_once(config(train__steps=5, train__epochs=9.0), tmp_path / "run")
  assert result["steps"] == 5
  epochs = [row["epoch"] for row in runs.rows(tmp_path / "run") if "epoch" in row]
  assert epochs == [1.0, 1.25]


def test_best_on_validation_is_what_is_scored(config, run_once, monkeypatch, tmp_path):
  """If the first epoch was the better one, its parameters are scored, exported and predict."""
  seen, compute = [], metrics.compute

  def worse_each_time(names, logits, labels):
    seen.append(logits)
    return compute(names, logits, labels) | {"accuracy": 1 / len(seen)}

  monkeypatch.setattr(metrics, "compute", worse_each_time)
  result = run_once(config(), tmp_path / "run")
  assert result["best_step"] == 4
  assert result["metrics"]["validation"]["accuracy"] == 1.0
  assert runs.arrays(tmp_path / "run", "best")[0] == 4
  assert runs.arrays(tmp_path / "run", "latest")[0] == 8
  test = build.task(from_config(config())).corpus.splits["test"].texts
  np.testing.assert_allclose(Predictor(tmp_path / "run").logits(test), seen[-1], atol=1e-5)
  latest = runs.arrays(tmp_path / "run", "latest")[1]
  best = runs.arrays(tmp_path / "run", "best")[1]
  exported = safetensors_dir.TensorDir(tmp_path / "run" / "peft", "adapter_model")
  [a] = [n for n in exported.names() if "layer.0." in n and "query.lora_A" in n]
  [path] = [p for p in best if "layers_0" in p and "query" in p and p.endswith("['a']")]
  np.testing.assert_array_equal(exported.read(a), best[path])
  assert (latest[path] != best[path]).any()


def test_test_split_is_scored_once(config, run_once, monkeypatch, tmp_path):
  """Logits of the test split are computed a single time, after training."""
  parts, whole = [], Run.evaluate
  monkeypatch.setattr(
    Run, "evaluate", lambda self, part, *rest: parts.append(part) or whole(self, part, *rest)
  )
  run_once(config(), tmp_path / "run")
  assert parts == ["validation", "validation", "test"]


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"method__targets": ("qeury",)}, "qeury"),
    ({"method__rank": 17}, "rank 17.*16 x 16"),
    ({"method__targets": ("query", "head/.*")}, "two methods claim head/"),
    ({"train__batch_size": 0}, "batch_size"),
    ({"train__epochs": 0.01}, "train.epochs"),
    ({"train__log_every": 0}, "train.log_every=0"),
    ({"train__eval_batch_size": 0}, "train.eval_batch_size=0"),
    ({"optimizer__accumulate": 0}, "optimizer.accumulate=0"),
    ({"optimizer__schedule": "sawtooth"}, "sawtooth"),
    ({"model__dtype": "float8"}, "float8"),
    ({"model__directory": "nowhere/at/all"}, "nowhere/at/all"),
    ({"data__text_column": "txet"}, "txet"),
  ],
  ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_settings_leave_no_workdir(config, run_once, tmp_path, change, message):
  """A mistake is a ValueError that names it, before the workdir is made."""
  with pytest.raises(ValueError, match=message):
    run_once(config(**change), tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_batch_that_a_mesh_cannot_split_raises(config, run_once, tmp_path):
  """Batch sizes are checked against the mesh before anything is written."""
  with pytest.raises(ValueError, match=r"train.batch_size=6 cannot be split 4 ways"):
    run_once(config(train__batch_size=6), tmp_path / "run", mesh="data:2,fsdp:2,tensor:2")
  assert not (tmp_path / "run").exists()


def test_logits_of_keeps_the_order_of_examples():
  """Whatever the buckets do, row i of the logits belongs to example i."""
  from peftjax.data import Tokens

  lengths = np.array([3, 20, 5, 17, 30, 1, 9])
  offsets = np.concatenate([[0], np.cumsum(lengths)])
  ids = np.repeat(np.arange(7, dtype=np.int32), lengths)
  tokens = Tokens(ids, np.zeros(len(ids), np.uint8), offsets)
  predict = lambda batch: jax.numpy.asarray(batch["tokens"][:, :1], jax.numpy.float32)
  got = evaluate.logits_of(predict, tokens, (16, 32), 2, 0)
  np.testing.assert_array_equal(got[:, 0], np.arange(7))
