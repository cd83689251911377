"""launch/local.sh and launch/container.sh: they pass signals on, and tell how processes ended."""

import functools
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from tests import tiny
from tests.training import runs

ROOT = pathlib.Path(__file__).parents[1]
# In place of Python: notes its number and every SIGTERM, ends when told, with the code it is told.
STUB = """#!/usr/bin/env bash
[[ $1 == -c ]] && exec {python} "$@"
number=$(sed -n 's/.*--distributed=[^ ]*,\\([0-9]*\\) .*/\\1/p' <<< "$* ")
me={folder}/process-${{number:-0}}
trap 'echo TERM >> $me.signals' TERM
echo "complaint of $number" >&2
echo $$ > $me
until [[ -s $me.code ]]; do read -rt 0.02 <> <(:) || true; done
exit "$(< $me.code)"
"""


@pytest.fixture
def start(tmp_path):
  """Starts a script of launch/ with the stub for Python and without patience."""
  for name, text in {
    "python": STUB.format(python=sys.executable, folder=tmp_path),
    "sleep": "#!/bin/sh\nexec /bin/sleep 0.02\n",
  }.items():
    (tmp_path / name).write_text(text)
    (tmp_path / name).chmod(0o755)
  env = {"PYTHON": str(tmp_path / "python"), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
  return lambda *command: subprocess.Popen(
    [ROOT / "launch" / command[0], *command[1:], f"--workdir={tmp_path}"],
    cwd=ROOT,
    env={**os.environ, **env},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    # Under nohup a shell could not trap it.
    preexec_fn=functools.partial(signal.signal, signal.SIGHUP, signal.SIG_DFL),
  )


def wait_for(condition, seconds=300):
  until = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < until
    time.sleep(0.01)


def end(folder, number, code):
  (folder / f"process-{number}.code").write_text(str(code))


def started(folder, count):
  paths = [folder / f"process-{number}" for number in range(count)]
  wait_for(lambda: all(path.exists() and path.read_text() for path in paths))
  return [int(path.read_text()) for path in paths]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_reaches_each_process_once_and_what_they_say_has_their_number(
  name, start, tmp_path
):
  script = start("local.sh", "2")
  started(tmp_path, 2)
  script.send_signal(signal.Signals[name])
  signals = [tmp_path / f"process-{number}.signals" for number in range(2)]
  wait_for(lambda: all(path.exists() for path in signals))
  for number in range(2):
    end(tmp_path, number, 0)
  _, errors = script.communicate(timeout=300)
  assert script.returncode == 0 and [path.read_text() for path in signals] == ["TERM\n"] * 2
  assert sorted(errors.splitlines()) == ["1: complaint of 1", "complaint of 0"]


def test_if_one_dies_the_others_are_ended_and_the_worst_code_is_the_script_s(start, tmp_path):
  script = start("local.sh", "3")
  started(tmp_path, 3)
  end(tmp_path, 1, 3)
  _, errors = script.communicate(timeout=300)
  assert script.returncode == 128 + signal.SIGKILL
  assert "process 1 ended with 3; the others end now, and the same command goes on" in errors


def test_one_that_dies_of_itself_is_not_awaited(start, tmp_path):
  """The others have ended before they had to be: nothing is left of the script."""
  script = start("local.sh", "2")
  started(tmp_path, 2)
  end(tmp_path, 0, 1)
  end(tmp_path, 1, 2)
  script.communicate(timeout=300)
  assert script.returncode == 2


@pytest.mark.parametrize(("ended", "result", "code"), [(0, True, 0), (0, False, 75), (1, False, 1)])
def test_a_container_fails_until_its_run_has_a_result(ended, result, code, start, tmp_path):
  script = start("container.sh", "--distributed=h:1,2,0")
  started(tmp_path, 1)
  script.send_signal(signal.SIGTERM)
  wait_for((tmp_path / "process-0.signals").exists)
  if result:
    (tmp_path / "result.json").touch()
  end(tmp_path, 0, ended)
  script.communicate(timeout=300)
  assert script.returncode == code


def processes(script):
  """Ids of experiments.train that the script has started, by number."""
  children = subprocess.run(
    ["pgrep", "-P", str(script.pid), "-af", "experiments.train"], capture_output=True, text=True
  )
  return {
    int(line.split(",2,")[1].split()[0]): int(line.split()[0])
    for line in children.stdout.splitlines()
  }


@pytest.mark.slow(reason="starts eight processes, which compile")
@pytest.mark.parametrize("name", ["SIGKILL of one", "SIGINT of all"])
def test_two_processes_interrupted_end_in_the_same_bits(name, tmp_path):
  """One is killed, or Ctrl-C in the terminal; the same command goes on, as if nothing had been."""
  flags = tiny.flags(tiny.model_dir(tmp_path / "model"), tiny.corpus(tmp_path / "texts.csv", 80))
  devices = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2")

  def start(workdir):
    return subprocess.Popen(
      ["launch/local.sh", "2", *flags, "--config.train.epochs=16", "--mesh=fsdp:-1",
       "--config.train.save_every=3", f"--workdir={workdir}"],
      cwd=ROOT,
      env={**os.environ, "PYTHON": sys.executable, "XLA_FLAGS": devices},
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      start_new_session=True,
    )  # fmt: skip

  def finish(script):
    output, _ = script.communicate(timeout=300)
    assert script.returncode == 0, output
    return output

  whole, struck = tmp_path / "whole", tmp_path / "struck"
  finish(start(whole))
  script, metrics = start(struck), struck / "metrics.jsonl"
  wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 4, 300)
  if name == "SIGKILL of one":
    os.kill(processes(script)[1], signal.SIGKILL)
    output, _ = script.communicate(timeout=300)
    # The other one may tell that it is alone, and end, before it is noticed here.
    assert script.returncode >= 128 and "; the others end now" in output
  else:
    os.killpg(script.pid, signal.SIGINT)  # as a terminal does: to the script's group alone
    assert "SIGTERM: saved step" in finish(script)
  assert not (struck / "result.json").exists()
  finish(start(struck))
  runs.assert_same(struck, whole)
