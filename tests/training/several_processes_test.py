"""Several processes that share a run compute what one does."""

import contextlib
import functools
import json
import os
import re
import signal
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from peftjax.training import lock
from tests import tiny, tiny_lm
from tests.training import runs, several_processes

MESHES = ("data:4", "fsdp:4", "tensor:4", "fsdp:2,tensor:2")


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
  """A classifier and a language model, dense and in four bits, of three steps each."""
  folder = tmp_path_factory.mktemp("several")
  texts = tiny.model_dir(folder / "bert"), tiny.corpus(folder / "texts.csv", 80)
  rows = tiny_lm.model_dir(folder / "llama"), tiny_lm.corpus(folder / "rows.jsonl")
  common = dict(train__steps=3, train__batch_size=8, train__eval_batch_size=8)
  made = {}
  for quant in ("none", "nf4"):
    made["classify", quant] = tiny.config(*texts, quant__name=quant, **common)
    made["causal_lm", quant] = tiny_lm.config(*rows, f"quant={quant}", **common)
  return made


@functools.cache
def of_one(config):
  """`numbers` of a run of one process on one device."""
  return several_processes.numbers(json.loads(config), None)


def check(configs, cases):
  found = several_processes.together([(configs[kind], mesh) for kind, mesh in cases])
  alone = {kind: of_one(configs[kind].to_json()) for kind, _ in cases}
  for (kind, mesh), (rows, scores) in zip(cases, found, strict=True):
    want, want_scores = alone[kind]
    for got, row in zip(rows, want, strict=True):
      assert got.keys() == row.keys()
      for name in row:
        np.testing.assert_allclose(got[name], row[name], rtol=1e-5, err_msg=f"{kind} {mesh} {name}")
    for name, value in want_scores.items():
      np.testing.assert_allclose(scores[name], value, rtol=1e-5, err_msg=f"{kind} {mesh} {name}")


def test_two_processes_train_as_one(configs):
  """This mesh does not split a batch: each process needs all of its rows."""
  check(configs, [(("classify", "none"), "tensor:4")])


@pytest.mark.slow(reason="every mesh with every kind of run and base")
@pytest.mark.parametrize("mesh", MESHES)
def test_two_processes_train_as_one_on_every_mesh(mesh, configs):
  check(configs, [(kind, mesh) for kind in configs])


@pytest.fixture(scope="module")
def command(tmp_path_factory):
  """The arguments of `python -m` for a run of a classifier in a workdir."""
  folder = tmp_path_factory.mktemp("command")
  model, corpus = tiny.model_dir(folder / "model"), tiny.corpus(folder / "texts.csv", 80)
  return lambda workdir, mesh, *more: [
    "experiments.train",
    f"--workdir={workdir}",
    *tiny.flags(model, corpus),
    "--config.train.epochs=4",
    f"--mesh={mesh}",
    *more,
  ]


def pair(command, workdir, mesh, *more):
  """Two processes of that command."""
  return several_processes.start(
    lambda address, index: command(workdir, mesh, f"--distributed={address},2,{index}", *more)
  )


def prints_nothing(printed):
  """But for what Gloo's threads say of their ranks, piece by piece and through each other."""
  pieces = r"\[Gloo\] Rank|is connected to|Expected number of|connected|peer ranks|\.|is :|\d+|\s"
  return not re.sub(pieces, "", printed)


def check_same(workdir, other):
  """But for rounding: each row of metrics once, the scores, the exported adapter."""
  rows, wanted = runs.rows(workdir), runs.rows(other)
  assert [row.keys() for row in rows] == [row.keys() for row in wanted]
  for got, want in zip(rows, wanted, strict=True):
    np.testing.assert_allclose(list(got.values()), list(want.values()), rtol=1e-4)
  assert runs.result(workdir)["metrics"] == runs.result(other)["metrics"]
  name = "peft/adapter_model.safetensors"
  got, want = load_file(workdir / name), load_file(other / name)
  assert got.keys() == want.keys()
  for key in want:
    np.testing.assert_allclose(got[key], want[key], atol=2e-4, err_msg=key)


@pytest.fixture(scope="module")
def alone(command, tmp_path_factory):
  """The workdir of the run of one process."""
  workdir = tmp_path_factory.mktemp("alone") / "run"
  [(code, _, errors)] = several_processes.ended(
    several_processes.start(lambda *_: command(workdir, "data:2"), 1)
  )
  assert code == 0, errors
  return workdir


@pytest.mark.slow(reason="starts six processes, which compile")
@pytest.mark.parametrize("mesh", ["fsdp:4", "data:2,tensor:2"])
def test_a_run_of_two_processes_leaves_what_one_leaves(mesh, command, alone, tmp_path):
  """One of them writes and prints, each its trace; the same command again returns the result."""
  (code, printed, errors), other = several_processes.ended(
    pair(command, tmp_path / "run", mesh, "--profile=2")
  )
  assert code == 0, errors
  assert other[0] == 0, other
  assert prints_nothing(other[1]), other
  assert "All of it" in printed
  check_same(tmp_path / "run", alone)
  traces = (tmp_path / "run" / "profile").rglob("perfetto_trace.json.gz")
  assert sorted(path.parts[-5] for path in traces) == ["process_0", "process_1"]
  again, other = several_processes.ended(pair(command, tmp_path / "run", mesh))
  assert again[0] == other[0] == 0 and "epoch" not in again[1]


@pytest.mark.slow(reason="starts five processes, which compile")
@pytest.mark.parametrize("asked", [0, 1])
def test_asked_to_stop_one_of_them_they_all_save_and_go_on_elsewhere(
  asked, command, alone, tmp_path
):
  """At one step, with exit code 0; one process goes on with what two saved."""
  workdir = tmp_path / "run"
  processes = pair(command, workdir, "fsdp:2,tensor:2")
  while processes[0].poll() is None and not _rows(workdir):
    time.sleep(0.01)
  processes[asked].send_signal(signal.SIGTERM)
  found = several_processes.ended(processes)
  assert [code for code, *_ in found] == [0, 0], found
  assert "SIGTERM: saved step" in found[0][1] and not (workdir / "result.json").exists()
  step, _ = runs.arrays(workdir, "latest")
  assert step == json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])["step"]
  [(code, _, errors)] = several_processes.ended(
    several_processes.start(lambda *_: command(workdir, "data:2"), 1)
  )
  assert code == 0, errors
  check_same(workdir, alone)


def _rows(workdir, more=2):
  path = workdir / "metrics.jsonl"
  return path.exists() and path.read_text().count("\n") > more


@pytest.mark.slow(reason="starts six processes, which compile")
def test_two_processes_share_a_run_in_a_bucket(command, alone, tmp_path):
  """One of them alone has the bucket; stopped, they go on from what it had put there."""
  workdir = tmp_path / "bucket" / "run"

  def pair():
    return several_processes.start(
      lambda address, index: [
        *("tests.buckets", str(tmp_path), str(index)),
        *command("gs://bucket/run", "fsdp:2,tensor:2", "--config.train.save_every=1")[1:],
        f"--distributed={address},2,{index}",
      ]
    )

  processes = pair()
  while processes[0].poll() is None and not _rows(workdir):
    time.sleep(0.01)
  processes[1].send_signal(signal.SIGTERM)
  found = several_processes.ended(processes)
  assert [code for code, *_ in found] == [0, 0], found
  assert "SIGTERM: saved step" in found[0][1] and not (workdir / "result.json").exists()
  found = several_processes.ended(pair())
  assert [code for code, *_ in found] == [0, 0], found
  assert "going on after step" in found[0][1] and prints_nothing(found[1][1]), found
  check_same(workdir, alone)
  again, other = several_processes.ended(pair())
  assert again[0] == other[0] == 0 and "epoch" not in again[1]


@pytest.mark.slow(reason="starts four processes, which compile")
def test_a_run_goes_on_with_fewer_processes_and_other_devices(command, alone, tmp_path):
  """Two of two devices, then one of eight, then one of one."""
  workdir, epochs = tmp_path / "run", "--config.train.epochs=4"
  begun = pair(command, workdir, "fsdp:4")
  for wanted, (processes, mesh) in zip(
    (2, 22), ((begun, ""), (None, "fsdp:4,tensor:2")), strict=True
  ):
    processes = processes or several_processes.start(
      lambda *_, mesh=mesh: command(workdir, mesh, epochs), 1, devices=8
    )
    while processes[0].poll() is None and not _rows(workdir, wanted):
      time.sleep(0.01)
    processes[-1].send_signal(signal.SIGTERM)
    found = several_processes.ended(processes)
    assert {code for code, *_ in found} == {0} and "SIGTERM: saved step" in found[0][1], found
  [(code, _, errors)] = several_processes.ended(
    several_processes.start(lambda *_: command(workdir, "", epochs), 1, devices=1)
  )
  assert code == 0, errors
  check_same(workdir, alone)


def _holds(workdir, process):
  """Whether it has the lock, which the first takes when all have found each other."""
  with contextlib.suppress(OSError):
    return f'"pid": {process.pid}' in (workdir / lock.NAME).read_text()
  return False


@pytest.mark.slow(reason="starts two processes for every kill")
def test_one_of_two_killed_at_any_moment(command, alone, tmp_path):
  """Once they have found each other. The other ends too, and the same command goes on to the end.

  A run that gets through is compared, and a new one begun; PEFTJAX_KILLS says how many kills.
  """
  rng, number, struck = np.random.default_rng(0), 0, []
  kills, seconds = int(os.environ.get("PEFTJAX_KILLS", "2")), 8.0  # what a run takes here
  programs = f"--config.compilation_cache={tmp_path / 'programs'}"
  while len(struck) < kills or (tmp_path / f"{number}").exists():
    workdir = tmp_path / f"{number}"
    processes = pair(command, workdir, "fsdp:2,tensor:2", programs)
    running = lambda processes=processes: all(p.poll() is None for p in processes)
    which, moment = int(rng.integers(2)), float(rng.uniform(0, seconds))
    while running() and not _holds(workdir, processes[0]):
      time.sleep(0.01)
    begun = time.monotonic()
    while running() and (len(struck) == kills or time.monotonic() < begun + moment):
      time.sleep(0.01)
    if killed := running():
      processes[which].kill()
      struck.append((which, round(moment, 1), _rows(workdir)))
    found = several_processes.ended(processes)
    if killed:
      assert found[1 - which][0] != 0, found
    else:
      assert [code for code, *_ in found] == [0, 0], found
      check_same(workdir, alone)
      number += 1
  print(f"{number} runs; of each kill the process, the second, whether steps were done: {struck}")


@pytest.mark.slow(reason="starts two processes")
def test_processes_that_disagree_are_refused(command, tmp_path):
  """Before anything is written."""
  processes = several_processes.start(
    lambda address, index: command(
      tmp_path / "run", "data:4", f"--distributed={address},2,{index}", f"--config.seed={index}"
    )
  )
  for code, _, errors in several_processes.ended(processes):
    assert code == 1 and "process 1 of 2 has another config than process 0" in errors, errors
  assert not (tmp_path / "run").exists()
