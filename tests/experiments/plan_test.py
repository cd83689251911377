"""Plans against the runs that they are plans of."""

import json

import jax
import pytest

from experiments.planning import chips, costs, show
from experiments.planning.model import planned
from peftjax import sharding
from peftjax.quant.weight import Quantized
from peftjax.training.run import Run
from peftjax.training.settings import from_config
from tests import tiny_lm

FEW = dict(train__batch_size=8, train__eval_batch_size=8)


@pytest.fixture(scope="module")
def make(tmp_path_factory):
  """A config with changes."""
  folder = tmp_path_factory.mktemp("plan")
  model, rows = tiny_lm.model_dir(folder / "model"), tiny_lm.corpus(folder / "rows.jsonl")
  return lambda **fields: tiny_lm.config(model, rows, "quant=nf4", **FEW, **fields)


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
  given = settings(model__scan_layers=False, model__remat=False)
  step = planned(given, "", "float32", 8, 24, sharding.make_mesh("", jax.devices()[:1]))
  compiled = step.compile()
  done = costs.work(step)
  assert done.model == done.done
  assert 0.8 < done.model / compiled.cost_analysis()["flops"] < 1.1
  sizes = costs.memory(step, compiled)
  assert sizes["peak"] >= sum(costs.held(step).values()) and sizes["temporaries"] > 0


@pytest.mark.slow(reason="compiles for two devices, and imports the drawing")
def test_a_plan_by_the_command(make, command, capsys, tmp_path):
  """JSON, a picture, a table."""
  out, drawn = tmp_path / "plan.jsonl", tmp_path / "plan.svg"
  given = dict(model="", topology="local", base_dtype="float32", devices=2, mesh="fsdp:2")
  command("plan", config=make(data__max_length=24), out=str(out), picture=str(drawn), **given)
  row = json.loads(out.read_text())
  assert row["devices"] == 2 and row["sent_bytes"]["all-gather"] > 0
  assert "TFLOP a step" in capsys.readouterr().out and drawn.stat().st_size > 1000


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


def test_chips_that_are_not_known_are_refused():
  with pytest.raises(ValueError, match="--topology=v9:2x2: write local, or CHIP:SHAPE"):
    chips.prepare("v9:2x2")
  with pytest.raises(ValueError, match="--devices=9: local has 8"):
    chips.devices_of("local", 9)
