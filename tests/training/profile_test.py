"""Traces of some steps, the names of stages in them, and how much a step computes."""

import gzip
import json
import math
import re
import types

import jax
import pytest

from peftjax.models import llama
from peftjax.training import flops, profile
from peftjax.training import process as processes
from peftjax.training.run import Run
from peftjax.training.settings import from_config
from tests import tiny_lm
from tests.core import programs
from tests.training import runs


class Interrupted(Exception):
  """Stands for anything that ends a process in the middle."""


def traced(workdir):
  """Steps in each Perfetto file of a run, the oldest first; TensorBoard's files lie beside them."""
  found = []
  for path in sorted((workdir / "profile").glob("plugins/profile/*/perfetto_trace.json.gz")):
    assert list(path.parent.glob("*.xplane.pb"))
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    found.append(sorted({int(e["args"]["step_num"]) for e in events if e.get("name") == "train"}))
  return found


@pytest.mark.slow(reason="two runs, 6 s")
def test_a_trace_changes_no_number(finished, config, run_once, tmp_path, capsys):
  """Steps 3 to 5, once the program is warm; all else is that of a run without."""
  run_once(config(), tmp_path / "run", traced=3)
  assert traced(tmp_path / "run") == [[3, 4, 5]]
  runs.assert_same(tmp_path / "run", finished[0])
  assert "traced steps 3 to 5: " in (told := capsys.readouterr().out)
  assert "xprof" in told and "Perfetto" in told


@pytest.mark.slow(reason="6 s")
def test_a_trace_ends_with_the_run_and_is_no_part_of_it(
  finished, config, run_once, monkeypatch, tmp_path, capsys
):
  """Interrupted, what was traced is written; the rest goes on to the same bits, traced or not."""
  place = Run.place

  def broken(self, batch):
    if self.steps_done == 5:
      raise Interrupted
    return place(self, batch)

  with monkeypatch.context() as patch:
    patch.setattr(Run, "place", broken)
    with pytest.raises(Interrupted):
      run_once(config(), tmp_path / "run", traced=4)
  assert [steps[:3] for steps in traced(tmp_path / "run")] == [[3, 4, 5]]
  assert "traced steps 3 to 5: " in capsys.readouterr().out
  for path in (tmp_path / "run" / "profile").glob("plugins/profile/*"):
    path.rename(path.with_name("first"))  # the next may begin in the same second
  run_once(config(), tmp_path / "run", traced=4)  # of steps 5 to 8
  assert traced(tmp_path / "run")[0] == [7, 8]
  assert "--profile=4: 2 steps are left to trace" in capsys.readouterr().out
  runs.assert_same(tmp_path / "run", finished[0])


@pytest.mark.parametrize("count", [-1, 7])
def test_more_steps_than_there_are_to_trace_are_refused(count, config, run_once, tmp_path):
  """Before anything is written."""
  with pytest.raises(ValueError, match=rf"--profile={count}: the run has 8 steps.* to 6\."):
    run_once(config(), tmp_path / "run", traced=count)
  assert not (tmp_path / "run").exists()
  profile.check(0, 1)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
  """A config of a tiny decoder."""
  folder = tmp_path_factory.mktemp("decoder")
  model, rows = tiny_lm.model_dir(folder / "model"), tiny_lm.corpus(folder / "rows.jsonl")
  return lambda argument, **changes: tiny_lm.config(model, rows, argument, **changes)


def step_of(settings):
  """A run, and what its first step takes."""
  run = Run(from_config(settings), None)
  return run, (run.state, run.frozen, next(iter(run.stream.iterate(0, 1))), run.dropout_key)


@pytest.mark.slow(reason="a whole program, fused as users have it; 10 s")
def test_every_stage_has_its_name(config, decoder):
  """In what a profile says of an operation, forward and backward."""
  common = ("loss", "optimizer/clip", "optimizer/update")
  here = r"(cond/branch_\d_fun/)?"  # of this platform
  weights = (f"q_proj/{here}dequantise", "q_proj/adapter")
  decodes = ("embed_tokens", "self_attn", "mlp", *weights, "lm_head")
  encodes = ("embeddings", "attention/self", "intermediate", "residual/adapter", "pooler", "head")
  for settings, stages in (
    (decoder("quant=nf4,method=lora"), decodes),
    (config("adapters"), encodes),
  ):
    run, arguments = step_of(settings)
    names = re.findall(r'op_name="([^"]*)"', run._step.lower(*arguments).compile().as_text())
    named = lambda stage, names: any(re.search(rf"[/(]{stage}[/.)]", name) for name in names)
    assert [stage for stage in (*stages, *common) if not named(stage, names)] == []
    backward = [name for name in names if "transpose(jvp" in name]
    passed = [stage for stage in (*stages[1:], "loss") if not named(stage, backward)]
    assert passed == []


def multiplied(run, arguments):
  """Operations of all products in the jaxpr of a step, whose layers are not scanned."""
  total = 0
  for eqn in programs.equations(jax.make_jaxpr(run._step)(*arguments)):
    if eqn.primitive.name == "dot_general":
      (axes, _), _ = eqn.params["dimension_numbers"]
      inner = (eqn.invars[0].aval.shape[axis] for axis in axes)
      total += 2 * math.prod(inner) * math.prod(eqn.outvars[0].aval.shape)
  return total


@pytest.mark.slow(reason="traces many programs; 6 s")
def test_operations_are_those_of_the_products(config, decoder, monkeypatch):
  """Exactly, but for what lies below all that is trained, and for half of causal attention."""
  here = lambda *args, default, cpu=None, tpu=None: (cpu or default)(*args)
  monkeypatch.setattr(jax.lax, "platform_dependent", here)
  cases = [(config(method), least) for method, least in (("full", 1), ("head", 1), ("prompt", 1))]
  cases.append((config("vera"), 0.9))
  cases.append(
    (decoder("quant=nf4,method=lora", model__scan_layers=False, model__remat="none"), 0.9)
  )
  for settings, least in cases:
    run, arguments = step_of(settings)
    rows, length = arguments[2]["tokens"].shape
    c = run.module.config
    work = flops.step_work(c, run.state.train, run.frozen, rows, length)
    found = multiplied(run, arguments)
    if settings.task == "causal_lm":  # forward and twice backward, of q kᵀ and of p v
      found -= 3 * 2 * 2 * rows * length * length / 2 * c.heads * c.head_size * c.layers
    assert least <= found / work.model <= 1, (settings.method.name, found, work)
    assert work.done == work.model


def test_layers_without_a_window_count_as_such():
  """One of two layers: half of what all and none of them would be."""

  def model_work(**windows):
    config = llama.LlamaConfig.from_hf({"model_type": "llama"}, layers=2, **windows)
    return flops.step_work(config, {}, {}, 1, 1024).model

  narrow, mixed, wide = model_work(window=8), model_work(window=8, global_layers=(1,)), model_work()
  assert narrow < wide and mixed == (narrow + wide) / 2


def test_shares_of_peak_and_bytes_where_a_device_tells(monkeypatch):
  """By its name; of one that is not known there is no such field."""
  assert flops.peak("TPU v5 lite") == flops.peak("TPU v5e") == 197e12
  assert flops.peak("NVIDIA A100-SXM4-80GB") == 312e12
  assert flops.peak("TPU v4 lite") is flops.peak(None) is None
  clock = processes.Clock(None)
  clock.rates({"flops": 1.0})
  rates = clock.rates({"flops": 5.0}, peak=2.0)
  assert rates["share_of_peak"] == rates["flops_per_second"] / 2.0 > 0
  assert processes.memory_in_use() == {}
  stats = {"bytes_in_use": 3, "peak_bytes_in_use": 7, "num_allocs": 1}
  device = types.SimpleNamespace(memory_stats=lambda: stats)
  monkeypatch.setattr(jax, "local_devices", lambda: [device])
  assert processes.memory_in_use() == {"bytes_in_use": 3, "peak_bytes_in_use": 7}
