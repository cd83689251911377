"""Plans against the runs that they are plans of."""

import json
import pathlib

import jax
import pytest

from experiments.planning import cache, chips, costs, report, search, show
from experiments.planning.model import planned
from peftjax import sharding
from peftjax.quant.weight import Quantized
from peftjax.training import process
from peftjax.training.run import Run
from peftjax.training.settings import from_config
from tests import tiny, tiny_lm

FEW = dict(train__batch_size=8, train__eval_batch_size=8)


@pytest.fixture(scope="module")
def make(tmp_path_factory):
  """A config with changes."""
  folder = tmp_path_factory.mktemp("plan")
  model, rows = tiny_lm.model_dir(folder / "model"), tiny_lm.corpus(folder / "rows.jsonl")
  return lambda **fields: tiny_lm.config(model, rows, "quant=nf4", **{**FEW, **fields})


@pytest.fixture(scope="module")
def settings(make):
  return lambda **fields: from_config(make(**fields))


def bytes_of(arrays):
  """Of the first device."""
  return sum(
    shard.data.nbytes
    for x in jax.tree.leaves(arrays)
    for shard in x.addressable_shards
    if shard.device == jax.devices()[0]
  )


def test_a_plan_counts_what_the_run_holds(settings):
  """By class, on each device of a mesh; and the compiler is given the program of the run."""
  given, mesh = settings(), "fsdp:2,tensor:4"
  run = Run(given, mesh)
  batch = run.place(next(iter(run.stream.iterate(0, 1))))
  step = planned(given, "", "float32", *batch["tokens"].shape, sharding.make_mesh(mesh))
  found = costs.held(step)
  quantised = lambda x: isinstance(x, Quantized)
  leaves = jax.tree.leaves(run.frozen, is_leaf=quantised)
  assert found == {
    "codes": bytes_of([x.codes for x in leaves if quantised(x)]),
    "scales": bytes_of([x.scales for x in leaves if quantised(x)]),
    "dense base": bytes_of([x for x in leaves if not quantised(x)]),
    "adapters": bytes_of(run.state.train),
    "optimizer": bytes_of((run.state.opt_state, run.state.step)),
    "batch": bytes_of(batch),
  }
  same = lambda x: (x.shape, x.dtype, x.sharding)
  for one, two in ((step.state, run.state), (step.frozen, run.frozen), (step.batch, batch)):
    assert jax.tree.map(same, one) == jax.tree.map(same, two)


@pytest.mark.slow(reason="compiles unrolled layers as users do")
def test_operations_are_those_of_the_compiled_program(settings):
  """Of unrolled layers, which XLA counts once each; it counts the masked half of attention too."""
  given = settings(model__scan_layers=False, model__remat="none")
  step = planned(given, "", "float32", 8, 24, sharding.make_mesh("", jax.devices()[:1]))
  compiled = step.compile()
  done = costs.work(step)
  assert done.model == done.done
  assert 0.8 < done.model / compiled.cost_analysis()["flops"] < 1.1
  sizes = costs.memory(step, compiled)
  assert sizes["peak"] >= sum(costs.held(step).values()) and sizes["temporaries"] > 0


@pytest.mark.slow(reason="compiles for two devices, and imports the drawing")
def test_a_plan_by_the_command(make, command, capsys, monkeypatch, tmp_path):
  """JSON, a picture, a table."""
  out, drawn = tmp_path / "plan.jsonl", tmp_path / "plan.svg"
  given = dict(
    model="", suggest=0, leaves=3, topology="local", base_dtype="float32", devices=2, mesh="fsdp:2"
  )
  monkeypatch.setattr(process, "commit", lambda: "1234567890ab")  # so that it is kept
  config = make(data__max_length=24, compilation_cache=str(tmp_path))
  command("plan", config=config, out=str(out), picture=str(drawn), **given)
  command("plan", config=config, out=str(out), picture=None, **given)
  row, again = map(json.loads, out.read_text().splitlines())
  assert row == again and len(list(tmp_path.glob("plan-*.json"))) == 1
  assert row["devices"] == 2 and row["sent_bytes"]["all-gather"] > 0
  assert "TFLOP per step" in capsys.readouterr().out and drawn.stat().st_size > 1000


def test_what_cannot_fit_is_refused_before_it_is_compiled(settings):
  step = planned(settings(), "", "float32", 8, 24, sharding.make_mesh("fsdp:8"))
  small = chips.CHIPS["v5e"]._replace(memory=2**15)
  with pytest.raises(ValueError, match=r"more than a TPU v5e has.* Most are .* GiB: "):
    show.before(step, small)
  sizes = {"peak": 100, "temporaries": 30, "batch": 10}
  assert costs.fits(sizes, 8, small._replace(memory=100)) == {
    "usable": 94,
    "fits": False,
    "rows_that_fit": 6,
  }


def test_candidates_make_the_same_updates(settings):
  """Every mesh that the rows can be split over, every split of the rows, all that can be kept."""
  given = settings(train__batch_size=4, optimizer__accumulate=2)
  found = search.candidates(given, 4)
  assert len(found) == len(set(found))
  assert {c.rows * c.accumulate for c in found} == {8}
  for c in found:
    mesh = sharding.make_mesh(c.mesh, jax.devices()[:4])
    assert c.rows % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0
    made = c.of(given)
    assert (made.train.batch_size, made.optimizer.accumulate) == (c.rows, c.accumulate)
  assert {(c.fsdp, c.tensor) for c in found} == {(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (1, 4)}


def test_the_search_ends_with_the_best_that_fits(settings):
  """It compiles no program that could not be better, and none that needs what did not fit."""
  given = settings(train__batch_size=8)
  one = sharding.make_mesh("", jax.devices()[:1])
  whole = planned(given, "", "float32", 8, 24, one)
  ordered = search.best_first(search.candidates(given, 4), whole, chips.CHIPS["v5e"])
  bounds = [bound for bound, _ in ordered]
  assert bounds == sorted(bounds, reverse=True)
  real = {c: bound * (0.5 if c.tensor > 1 else 0.9) for bound, c in ordered}
  fits = {c: c.rows <= 4 and c.kept != "none" for _, c in ordered}
  compiled = []

  def plan(c):
    compiled.append(c)
    return {"fits": fits[c], "rows_that_fit": 5, "tokens_per_second": real[c], "bytes": {"peak": 1}}

  found = list(search.search(ordered, plan, 1000))
  best = max(row["tokens_per_second"] for _, row in found if row["fits"])
  assert best == max(real[c] for c in real if fits[c])
  assert len(compiled) == len(found) < len(ordered) / 2
  for i, c in enumerate(compiled):
    for other in compiled[:i]:
      same = c.mesh == other.mesh and c.kept == other.kept
      assert fits[other] or not same or c.rows < other.rows
  assert len(list(search.search(ordered, plan, 3))) == 3


def test_a_plan_is_computed_once_for_a_commit(monkeypatch, tmp_path):
  """Of code that no commit has, every time; a file that is not whole is written again."""
  made = []
  compute = lambda: made.append(len(made)) or {"peak": len(made)}
  ask = lambda folder=tmp_path, **asked: cache.cached(folder, asked, compute)
  monkeypatch.setattr(process, "commit", lambda: "1234567890ab")
  assert [ask(mesh="a"), ask(mesh="a"), ask(mesh="b")] == [{"peak": 1}, {"peak": 1}, {"peak": 2}]
  for path in tmp_path.iterdir():
    path.write_text(path.read_text()[:5])
  assert [ask(mesh="a"), ask(mesh="a"), ask(None, mesh="a")] == [{"peak": i} for i in (3, 3, 4)]
  monkeypatch.setattr(process, "commit", lambda: "1234567890ab-dirty")
  assert ask(mesh="a") == {"peak": 5}


@pytest.mark.parametrize(
  ("change", "told"),
  [
    (dict(name="llama-70b"), "--model=llama-70b is none of llama-7b"),
    (dict(rows=6), r"6 rows cannot be split 4 ways \(data x fsdp\)"),
    (dict(length=23), r"23 tokens cannot be split 2 ways \(sequence\)"),
    (dict(length=10**6), "positions, fewer than 1000000"),
    (dict(base_dtype="int4"), "base_dtype"),
  ],
)
def test_what_no_step_can_be_is_refused(change, told, settings):
  arguments = dict(name="", base_dtype="float32", rows=8, length=24) | change
  with pytest.raises(ValueError, match=told):
    planned(settings(), **arguments, mesh=sharding.make_mesh("fsdp:4,sequence:2"))


def test_an_encoder_is_no_language_model(settings, tmp_path):
  given = settings(model__directory=str(tiny.model_dir(tmp_path / "bert")))
  with pytest.raises(ValueError, match="is of a bert, which is not a language model; .* llama"):
    planned(given, "", "float32", 8, 24, sharding.make_mesh("data:8"))


def test_chips_that_are_not_known_are_refused():
  for topology in ("", "v9:2x2", "v5e", "v5e:", "v5e:0x2", "v5e:-1x2", "v5e:2X4", "v5e:9999x9999"):
    with pytest.raises(ValueError, match=f"--topology={topology}: write local, or CHIP:SHAPE"):
      chips.prepare(topology)
  for count in (0, -1, 9):
    with pytest.raises(ValueError, match=f"--devices={count}: local has 8; write a number from 1"):
      chips.devices_of("local", count)


def test_what_accumulates_says_nothing_of_what_does_not():
  """It holds float32 sums of the gradients too."""
  few = search.Candidate("data:1", 1, 1, "layer", 2, 4)
  needs = search._needs_as_much(few, 1)
  assert needs(few._replace(rows=4, accumulate=2))
  assert not needs(few._replace(rows=8, accumulate=1))
  assert search._needs_as_much(few._replace(accumulate=1), 1)(few)


def test_the_documentation_has_the_committed_plans():
  """All of one commit, each with what the table and the picture go by."""
  root = pathlib.Path(__file__).parents[2]
  text = (root / "experiments" / "results" / "plans" / "plan.jsonl").read_text()
  rows = [json.loads(line) for line in text.splitlines()]
  assert "{include} generated/parts/plan.md" in (root / "docs" / "plan.md").read_text()
  assert report.table(rows).count("\n") == len(rows) + 1
  assert len({row["commit"] for row in rows}) == 1
  assert report.series(rows, "length")[-1] == (8192, pytest.approx(11.07, abs=0.01))
  for axis in ("model", "rank", "devices"):
    assert len(report.series(rows, axis)) >= 3
