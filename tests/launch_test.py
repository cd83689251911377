"""Scripts that start runs: what they would run, and a real SLURM of one node."""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import time

import pytest
import yaml

from tests import tiny
from tests.training import runs

ROOT = pathlib.Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SLURM = LAUNCH / "slurm.sh"
# Of what they take: a workdir, and a value that a shell would split.
FLAGS = ["--config=a.py", "--workdir=/s/run", "--config.data.name=c d"]
# And what they make of it.
GIVEN = "--config=a.py --workdir=/s/run --config.data.name=c\\ d"
CACHE = "--config.compilation_cache=/s/run.programs"
TRAIN = ".venv/bin/python -m experiments.train"
TPU = dict(TPU_NAME="pod", TPU_PROJECT="p", TPU_ZONE="z", TPU_TYPE="v5litepod-16", TPU_RUNTIME="r")


def shell(*command, env=None):
  inherited = {key: value for key, value in os.environ.items() if key != "PYTHON"}
  return subprocess.run(
    [*map(str, command)],
    cwd=ROOT,
    env={**inherited, **(env or {})},
    capture_output=True,
    text=True,
  )


def would_run(script, *flags, env=None):
  """The lines that it prints."""
  told = shell(LAUNCH / script, "--dry_run", *flags, env=env)
  assert (told.returncode, told.stderr) == (0, "")
  return told.stdout.splitlines()


def test_what_scripts_that_need_nothing_else_would_run():
  """Flags go to experiments.train as they are, and programs are kept beside the workdir."""
  assert would_run("slurm.sh", *FLAGS) == [f"srun {TRAIN} --distributed=auto {GIVEN} {CACHE}"]
  assert would_run("local.sh", 2, *FLAGS) == [
    f"{TRAIN} --distributed=localhost:PORT\\,2\\,{index} {GIVEN} {CACHE}" for index in range(2)
  ]
  assert would_run("container.sh", "--distributed=auto", *FLAGS, env={"PYTHON": "python"}) == [
    f"python -m experiments.train --distributed=auto {GIVEN} {CACHE}"
  ]


@pytest.mark.parametrize(
  "flags", [["--workdir=gs://b/run"], [FLAGS[1], "--config.compilation_cache="]]
)
def test_where_programs_are_kept_is_left_to_who_says_it_and_to_the_config_in_a_bucket(flags):
  assert would_run("slurm.sh", *flags) == [" ".join([f"srun {TRAIN} --distributed=auto", *flags])]


def tpus(*words):
  """A line of `gcloud compute tpus`, as a shell reads it."""
  return ["gcloud", "compute", "tpus", *words[:2], "--project=p", "--zone=z", *words[2:]]


def test_what_the_script_of_cloud_tpus_would_run():
  asked = tpus(
    *("queued-resources", "create", "pod", "--node-id=pod"),
    "--accelerator-type=v5litepod-16",
    "--runtime-version=r",
    "--spot",
    "--async",
  )
  brought = tpus("tpu-vm", "scp", "peftjax.bundle", "pod:peftjax.bundle", "--worker=all")
  set_up = tpus(
    *("tpu-vm", "ssh", "pod", "--worker=all"),
    "--command=git init -q peftjax && cd peftjax && git fetch -q ../peftjax.bundle HEAD && "
    "git checkout -q --detach FETCH_HEAD && launch/tpu_worker.sh install",
  )

  def on(worker, words):
    command = f"--command=cd peftjax && launch/tpu_worker.sh {words}"
    return tpus("tpu-vm", "ssh", "pod", f"--worker={worker}", command)

  start, follow = on("all", f"start {GIVEN}"), on(0, "follow")
  finished = on(0, f"finished {GIVEN}")
  wanted = {
    ("create",): [asked],
    ("setup",): [brought, set_up],
    ("run", *FLAGS): [start, follow],
    ("logs",): [follow],
    ("logs", "3"): [on(3, "follow")],
    ("resume", *FLAGS): [asked, brought, set_up, start, follow, finished],
    ("delete",): [tpus("queued-resources", "delete", "pod", "--force", "--quiet")],
  }
  for words, lines in wanted.items():
    told = would_run("tpu_vm.sh", *words, env={**TPU, "TPU_SPOT": "true"})
    assert [shlex.split(line) for line in told] == lines
  plain, mounts = (
    would_run("tpu_vm.sh", "create", env={**TPU, **more})
    for more in ({}, {"TPU_STARTUP": "a b.sh"})
  )
  spot = asked.index("--spot")
  assert shlex.split(plain[0]) == asked[:spot] + asked[spot + 1 :]
  assert "--metadata-from-file=startup-script=a b.sh" in shlex.split(mounts[0])


def test_what_the_job_of_ray_would_run():
  """Without Ray."""
  told = shell(sys.executable, LAUNCH / "ray_job.py", "--dry_run", 2, "GPU:8", *FLAGS)
  assert told.returncode == 0, told.stderr
  assert [shlex.split(line) for line in told.stdout.splitlines()] == [
    ["GPU:8:", "bash", "launch/container.sh", f"--distributed=HOST:PORT,2,{index}", *FLAGS]
    for index in range(2)
  ]


def test_the_commands_of_the_page_are_there():
  """Each line of docs/launch.md that starts a script prints what it would run."""
  page = (ROOT / "docs" / "launch.md").read_text()
  blocks = re.findall(r"^```sh\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
  lines = "".join(blocks).replace("\\\n", " ").splitlines()
  scripts = [re.search(r"launch/([\w.]+(?:sh|py)) (.*)", line) for line in lines]
  found = {match[1]: shlex.split(match[2]) for match in scripts if match}
  assert set(found) == {"local.sh", "slurm.sh", "tpu_vm.sh", "ray_job.py"}
  for script, words in found.items():
    python = [sys.executable] if script.endswith(".py") else []
    told = shell(*python, LAUNCH / script, "--dry_run", *words, env=TPU)
    assert told.returncode == 0 and "--workdir=" in told.stdout, told.stderr
  for file in re.findall(r"launch/[\w.]+", page):
    assert (ROOT / file.rstrip(".")).exists(), file


@pytest.mark.parametrize(
  ("command", "told"),
  [
    (["slurm.sh", "--config=a.py"], "slurm.sh: write --workdir=DIR"),
    (["local.sh", "2", "--config=a.py"], "local.sh: write --workdir=DIR"),
    (["local.sh", *FLAGS], "write how many processes first"),
    (["local.sh", "99999999", *FLAGS], "write how many processes first, 1 to 999"),
    (["local.sh", "2", *FLAGS, "--distributed=auto"], "local.sh: leave out --distributed=auto"),
    (["slurm.sh", *FLAGS, "--distributed=auto"], "slurm.sh: leave out --distributed=auto"),
    (["container.sh"], "write --workdir=DIR"),
    (["tpu_vm.sh", "start"], "tpu_vm.sh create "),
    (["tpu_vm.sh", "create"], "TPU_NAME is not set"),
    (["tpu_worker.sh"], "tpu_worker.sh install "),
    (["ray_job.py", "GPU:8", "2", *FLAGS], "write how many nodes and what each gives"),
    (["ray_job.py", "2", "GPU:8"], "write --workdir=DIR"),
    (["ray_job.py", "2", "DISK:8", *FLAGS], "what each gives, CPU, GPU or TPU"),
    (["ray_job.py", "2", "GPU:8", *FLAGS, "--distributed=off"], "leave out --distributed=off"),
  ],
)
def test_what_is_missing_is_told(command, told):
  python = [sys.executable] if command[0].endswith(".py") else []
  found = shell(*python, LAUNCH / command[0], *command[1:], env={"TPU_NAME": ""})
  assert found.returncode != 0 and told in found.stderr and found.stdout == ""


def test_the_manifest_starts_what_the_image_does():
  """Its fields have the names of JobSet and Job; its flags are those of experiments.train."""
  manifest = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
  assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
  assert set(manifest["spec"]) == {"failurePolicy", "replicatedJobs"}
  [jobs] = manifest["spec"]["replicatedJobs"]
  assert set(jobs) == {"name", "replicas", "template"}
  job = jobs["template"]["spec"]
  assert job["parallelism"] == job["completions"] and job["backoffLimit"] == 0
  pod = job["template"]["spec"]
  [container] = pod["containers"]
  assert pod["restartPolicy"] == "Never"
  [_, code] = job["podFailurePolicy"]["rules"]
  assert code["onExitCodes"]["containerName"] == container["name"]
  [saved] = code["onExitCodes"]["values"]
  assert f"exit {saved}\n" in (LAUNCH / "container.sh").read_text()
  [mount], [volume] = container["volumeMounts"], pod["volumes"]
  assert mount["name"] == volume["name"]
  [workdir] = [x for x in container["args"] if x.startswith(f"--workdir={mount['mountPath']}/")]
  # On GPUs the nodes name process 0 themselves, by the name that JobSet gives its node.
  head = f"{manifest['metadata']['name']}-{jobs['name']}-0-0.{manifest['metadata']['name']}"
  assert (
    f"--distributed={head}:8476,{job['completions']},$(JOB_COMPLETION_INDEX)"
    in (LAUNCH / "jobset.yaml").read_text()
  )
  assert "command" not in container
  assert '\nENTRYPOINT ["launch/container.sh"]\n' in (LAUNCH / "Dockerfile").read_text()
  assert would_run("container.sh", *container["args"])[0].startswith(f"{TRAIN} --distributed=auto")


@pytest.fixture
def slurm(tmp_path):
  """The environment of commands that speak to a cluster of this machine."""
  if os.geteuid() or not shutil.which("slurmd") or not shutil.which("munged"):
    pytest.skip("needs root, slurm-wlm and munge")
  folder = tmp_path / "slurm"
  made = shell(ROOT / "launch" / "slurm_local.sh", "start", folder)
  assert made.returncode == 0, made.stderr
  flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2")
  yield {"SLURM_CONF": str(folder / "slurm.conf"), "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
  shell(ROOT / "launch" / "slurm_local.sh", "stop", folder)


def state_of_the_cluster(slurm, folder):
  shown = [shell("scontrol", "show", what, env=slurm).stdout for what in ("job", "node")]
  logs = [*folder.glob("*.log"), *folder.glob("slurm/slurm*.log")]
  return "\n".join([*shown, *(path.read_text()[-3000:] for path in logs)])


@pytest.mark.slow(reason="a cluster; four processes that compile; a minute")
def test_a_job_of_two_tasks_saves_when_asked_and_goes_on_by_itself(slurm, tmp_path):
  """scancel --signal=TERM; the job queues itself again, and ends as one that was let alone."""
  model, corpus = tiny.model_dir(tmp_path / "model"), tiny.corpus(tmp_path / "texts.csv", 80)

  def submit(workdir):
    job = shell(
      *("sbatch", "--parsable", "--ntasks=2", f"--output={workdir}.log", SLURM),
      f"--workdir={workdir}",
      *tiny.flags(model, corpus),
      "--mesh=fsdp:-1",
      env=slurm,
    )
    assert job.returncode == 0, job.stderr
    return job.stdout.strip()

  def wait_for(condition, what, seconds=600):
    until = time.monotonic() + seconds
    while not condition():
      assert time.monotonic() < until, f"no {what}: {state_of_the_cluster(slurm, tmp_path)}"
      time.sleep(0.05)

  job, asked, alone = submit(tmp_path / "asked"), tmp_path / "asked", tmp_path / "alone"
  metrics = asked / "metrics.jsonl"
  wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 2, "rows of metrics")
  assert shell("scancel", "--signal=TERM", job, env=slurm).returncode == 0
  wait_for(lambda: (asked / "result.json").exists(), "result of the job that was asked to stop")
  log = (tmp_path / "asked.log").read_text()
  assert log.count("SIGTERM: saved step") == 1 and "going on after step" in log
  submit(alone)
  wait_for(lambda: (alone / "result.json").exists(), "result of the job that was let alone")
  runs.assert_same(asked, alone)
