"""Language-model runs: a tiny Llama in four bits on a tiny corpus of prompts and completions."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.flax import load_file

from peftjax.core import paths, tree
from peftjax.training import build, loop
from peftjax.training.run import Run
from peftjax.training.settings import from_config
from peftjax.training.writer import Writer
from tests import tiny_lm
from tests.training import runs


class Interrupted(Exception):
  """Stands for anything that ends a process in the middle."""


@pytest.fixture(scope="module")
def lm_config(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tiny_lm")
  made = tiny_lm.model_dir(folder / "model"), tiny_lm.corpus(folder / "rows.jsonl")
  return functools.partial(tiny_lm.config, *made)


@pytest.fixture(scope="module")
def trained(run_once, lm_config, tmp_path_factory):
  """The workdir and result of a run, and the `Run` as it was at the end."""
  workdir, made = tmp_path_factory.mktemp("lm") / "run", []
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, "Run", lambda *given: made.append(Run(*given)) or made[-1])
    return workdir, run_once(lm_config(), workdir), *made


@pytest.fixture(scope="module")
def finished(trained):
  return trained[:2]


def test_perplexity_falls_and_is_compared_with_before(finished):
  """The result has the test split before and after; the logs have them too."""
  workdir, result = finished
  before, after = (result[key]["test"] for key in ("before", "metrics"))
  assert after["perplexity"] < 0.5 * before["perplexity"]
  for scores in (before, after):
    assert scores["perplexity"] == pytest.approx(np.exp(scores["loss"]))
  first = runs.rows(workdir)[0]
  assert first["step"] == 0 and first["test_perplexity"] == before["perplexity"]
  assert result["rows"]["train"] > result["rows"]["test"] > 0
  assert (workdir / "peft" / "adapter_config.json").exists()
  config = json.loads((workdir / "peft" / "adapter_config.json").read_text())
  assert config["task_type"] == "CAUSAL_LM"


def test_the_base_is_quantised_and_in_no_checkpoint(finished, lm_config):
  settings = from_config(lm_config())
  flat = paths.leaves(build.attached(settings, None).params)
  assert {type(leaf.base).__name__ for p, leaf in flat.items() if hasattr(leaf, "base")} == {
    "Quantized"
  }
  _, saved = runs.arrays(finished[0], "latest")
  assert saved and not any("codes" in name or "embedding" in name for name in saved)


def test_a_run_leaves_the_base_as_it_was_loaded(trained, lm_config):
  """Codes, scales and all else that is frozen, byte for byte; what is trained has changed."""
  made = build.attached(from_config(lm_config()), None)
  train, frozen = tree.partition(made.params, made.mask)
  before, after = _bytes(frozen), _bytes(trained[2].frozen)
  assert after == before
  for part in ("/codes", "/scales"):
    assert sum(part in name for name in before) >= 7
  assert {kind for name, (kind, _) in before.items() if name.endswith("/codes")} == {"uint8"}
  before, after = _bytes(train), _bytes(trained[2].state.train)
  assert before.keys() == after.keys() and not any(before[name] == after[name] for name in before)


def _bytes(params):
  """Dtype and bytes of every array by path."""
  flat, _ = jax.tree_util.tree_flatten_with_path(params)
  return {paths.name(path): (x.dtype.name, np.asarray(x).tobytes()) for path, x in flat}


@pytest.mark.slow(reason="three runs; the classifier's twin is in the fast tests")
def test_a_stopped_run_goes_on_to_the_same_bits(
  finished, run_once, lm_config, tmp_path, monkeypatch
):
  """Stopped at step 9 after the checkpoint at 6; before and after stay what they were."""
  place, count = Run.place, [0]

  def stop(self, batch):
    count[0] += 1
    if count[0] == 2 + 6 + 2 + 3:  # before, an epoch, its evaluation, three steps of the next
      raise Interrupted
    return place(self, batch)

  workdir = tmp_path / "run"
  monkeypatch.setattr(Run, "place", stop)
  with pytest.raises(Interrupted):
    run_once(lm_config(), workdir)
  monkeypatch.undo()
  run_once(lm_config(), workdir)
  runs.assert_same(workdir, finished[0])


def test_loss_on_completions_counts_only_these(lm_config):
  """Five digits and the end of each answer; with "all", everything but first tokens."""
  task = build.task(from_config(lm_config()))
  everything = build.task(from_config(lm_config(data__loss="all")))
  for part in ("train", "test"):
    n = task.rows[part].documents
    assert task.rows[part].weights.sum() == 6 * n
    pieces = sum(int(row.max()) for row in everything.rows[part].segments)
    assert everything.rows[part].weights.sum() == 11 * n - (pieces if pieces > n else n)


@pytest.mark.slow(reason="a run of its own, several seconds")
def test_factors_of_bfloat16_learn_too(run_once, lm_config, finished, tmp_path):
  """With products kept, and written as they are for Hugging Face."""
  how = dict(method__dtype="bfloat16", model__remat="products")
  result = run_once(lm_config(**how), tmp_path / "run")
  got, wanted = (r["metrics"]["test"]["perplexity"] for r in (result, finished[1]))
  assert got == pytest.approx(wanted, rel=0.1) and got != wanted
  tensors = load_file(tmp_path / "run" / "peft" / "adapter_model.safetensors")
  assert {x.dtype.name for x in tensors.values()} == {"bfloat16"}


def test_full_fine_tuning_of_a_dense_base_and_not_of_four_bits(run_once, lm_config, tmp_path):
  """The control run works; asked for on codes, it is refused before anything is written."""
  short = dict(train__steps=2, optimizer__learning_rate=1e-4)
  result = run_once(lm_config("method=full,quant=none", **short), tmp_path / "full")
  assert result["trainable_params"] == result["total_params"]
  with pytest.raises(ValueError, match="pj.unfreeze cannot train .*Quantized"):
    run_once(lm_config("method=full", **short), tmp_path / "refused")
  assert not (tmp_path / "refused").exists()


def test_the_writer_continues_with_the_adapter(finished):
  """After training it counts on; before, it does not; padding and batches change nothing."""
  writer = Writer(finished[0])
  asked = ["1 2 3 4 4", "9 8 7 7"]
  got = writer.write(asked, max_new_tokens=6)
  assert got == [writer.write([one], max_new_tokens=6)[0] for one in asked]
  base = Writer(finished[0], adapted=False)
  assert base.write(asked, max_new_tokens=6) != got
  leaves = zip(
    jax.tree.leaves(tree.partition(writer.params, _codes(writer.params))[0]),
    jax.tree.leaves(tree.partition(base.params, _codes(base.params))[0]),
    strict=True,
  )
  assert all((a == b).all() for a, b in leaves)


def _codes(params):
  """True on codes."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: paths.name(path).endswith("/codes"), params
  )


def test_a_run_without_evaluation_or_of_another_task_is_no_language_model(
  finished, tmp_path, lm_config
):
  with pytest.raises(ValueError, match="no evaluated run of task=causal_lm"):
    Writer(tmp_path)
  shutil.copytree(finished[0], tmp_path / "copy")
  config = json.loads((tmp_path / "copy" / "config.json").read_text())
  config["model"]["directory"] = str(tmp_path / "other")
  shutil.copytree(finished[1]["config"]["model"]["directory"], tmp_path / "other")
  (tmp_path / "other" / "config.json").write_text(
    (tmp_path / "other" / "config.json").read_text() + " "
  )
  (tmp_path / "copy" / "config.json").write_text(json.dumps(config))
  with pytest.raises(ValueError, match="is not the model"):
    Writer(tmp_path / "copy")


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(quant__name="nf5"), "quant.name 'nf5' is not one of none, nf4"),
    (dict(quant__block_size=48), "block_size 48 is not one of"),
    (dict(data__loss="some"), "data.loss 'some' is not one of all, completions"),
    (dict(data__max_length=64), "32 positions"),
    (dict(model__directory="", model__name="gpt5"), "model.name 'gpt5' is not one of minilm"),
    (dict(quant__targets=("nothing",)), "matches no parameter"),
  ],
)
def test_bad_settings_are_refused_before_anything_is_written(
  changes, message, run_once, lm_config, tmp_path
):
  with pytest.raises(ValueError, match=message):
    run_once(lm_config(**changes), tmp_path / "run")
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
@pytest.mark.slow(reason="a run of its own, several seconds")
def test_a_paged_run_is_the_run(name, run_once, lm_config, tmp_path, capsys):
  """Its state in host memory, decided by the program's size, changes no number."""
  short = dict(train__steps=4, optimizer__name=name)
  run_once(lm_config(**short), tmp_path / "plain")
  auto = dict(optimizer__paged="auto", optimizer__device_memory_bytes=1000)
  capsys.readouterr()
  run_once(lm_config(**short, **auto), tmp_path / "paged")
  assert "optimizer state paged: the step would need" in capsys.readouterr().out
  plain, paged = (runs.rows(tmp_path / folder) for folder in ("plain", "paged"))
  assert [row.keys() for row in plain] == [row.keys() for row in paged]
  for one, two in zip(plain, paged, strict=True):
    for key in one:
      assert two[key] == pytest.approx(one[key], rel=1e-5)


@pytest.mark.slow(reason="a run of its own, several seconds")
def test_a_step_that_fits_is_not_paged(run_once, lm_config, tmp_path, capsys):
  auto = dict(optimizer__paged="auto", optimizer__device_memory_bytes=10**12)
  run_once(lm_config(train__steps=1, **auto), tmp_path / "run")
  assert "optimizer state not paged: the step needs" in capsys.readouterr().out
