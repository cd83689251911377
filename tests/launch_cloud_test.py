"""launch/tpu_vm.sh against a gcloud of ours, and launch/ray_job.py on a real Ray of two nodes."""

import os
import pathlib
import shutil
import subprocess

ROOT = pathlib.Path(__file__).parents[1]
# One worker, whose home is a folder here, and which is preempted during the first run.
GCLOUD = """#!/usr/bin/env bash
echo "${*:3:2}" >> {folder}/calls
case "${*:3:2}" in
  "queued-resources describe") cat {folder}/state 2> /dev/null || { echo NOT_FOUND >&2; exit 1; } ;;
  "queued-resources create") echo ACTIVE > {folder}/state; mkdir {folder}/home ;;
  "queued-resources delete") rm -r {folder}/state {folder}/home ;;
  "tpu-vm scp") cp "$7" {folder}/home/peftjax.bundle ;;
  "tpu-vm ssh")
    [[ $(cat {folder}/state) == ACTIVE ]] || exit 255
    command=${@: -1:1}
    cd {folder}/home && bash -c "${command#--command=}" < /dev/null
    code=$?
    [[ $command != *follow || -e {folder}/run/result.json ]] || echo SUSPENDED > {folder}/state
    exit $code ;;
esac
"""
# In place of pip, uv and the interpreter that uv brings.
PYTHON3 = """#!/usr/bin/env bash
if [[ $* == *venv* ]]; then
  mkdir -p .venv/bin && cp {folder}/bin/train .venv/bin/python
fi
"""
TRAIN = """#!/usr/bin/env bash
echo "trains: $*"
if [[ -e {folder}/run/checkpoint ]]; then
  touch {folder}/run/result.json
else # it is asked to stop, and has saved
  mkdir -p {folder}/run && touch {folder}/run/checkpoint
fi
"""


def commands(folder, **texts):
  """A folder of commands; `{folder}` in them is replaced."""
  (folder / "bin").mkdir()
  for name, text in texts.items():
    path = folder / "bin" / name
    path.write_text(text.replace("{folder}", str(folder)))
    path.chmod(0o755)
  return {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}


def clone(folder):
  """A repository of what is needed to launch."""
  shutil.copytree(ROOT / "launch", folder / "launch")
  for name in ("Makefile", "requirements.lock"):
    shutil.copy(ROOT / name, folder)
  git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(folder)]
  for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "all"]):
    subprocess.run([*git, *words], check=True)
  return folder


def test_a_tpu_that_is_preempted_is_asked_for_again_and_the_run_goes_on(tmp_path):
  """Resumed until there is a result, by the same command, on a machine that is set up anew."""
  env = commands(
    tmp_path, gcloud=GCLOUD, python3=PYTHON3, train=TRAIN, sleep="#!/bin/sh\nexec /bin/sleep 0.01\n"
  )
  env |= dict(TPU_NAME="pod", TPU_PROJECT="p", TPU_ZONE="z", TPU_TYPE="t", TPU_RUNTIME="r")
  env.pop("PYTHON", None)
  flags = [f"--workdir={tmp_path}/run", "--config.data.name=c d"]

  def tpu_vm(*words):
    return subprocess.run(
      ["launch/tpu_vm.sh", *words],
      cwd=clone_of_it,
      env=env,
      capture_output=True,
      text=True,
      timeout=60,
    )

  clone_of_it = clone(tmp_path / "clone")
  told = tpu_vm("resume", *flags)
  assert told.returncode == 0, told.stderr
  trains = (
    f"trains: -m experiments.train --distributed=auto {' '.join(flags)} "
    f"--config.compilation_cache={tmp_path}/run.programs"
  )
  assert told.stdout.splitlines().count(trains) == 2
  ssh, made = ["tpu-vm ssh"], ["queued-resources create", "tpu-vm scp"]
  calls = (tmp_path / "calls").read_text().splitlines()
  assert [x for x in calls if "describe" not in x] == [
    *made, *ssh * 4, "queued-resources delete", *made, *ssh * 4
  ]  # fmt: skip
  assert "pod is NONE" in told.stderr and "pod is SUSPENDED" in told.stderr
  assert trains in tpu_vm("logs").stdout
  (clone_of_it / "Makefile").write_text("")
  assert "commit your changes first" in tpu_vm("setup").stderr
