"""Trains on the nodes of a Ray cluster, one process per node. Flags are those of experiments.train.

  ray job submit --address=http://HEAD:8265 --working-dir=. -- \\
    python launch/ray_job.py 4 GPU:8 --config=configs/causal_lm.py:quant=nf4,method=lora \\
    --workdir=/shared/run --mesh=fsdp:-1

The first two arguments say how many nodes, and what the process on each takes there: GPU:8, TPU:4,
CPU:16. Nodes have this project's packages, and share the file system of the workdir. If a node is
lost, or a process told to stop, all start again and go on there; after three failures in a row the
job fails. With --dry_run as the first flag it prints its commands, and needs no Ray.
"""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time

_SAVED = 75  # exit code of launch/container.sh: asked to stop, it has saved and is not at the end
_FAILURES = 3
_PATIENCE = 15.0  # seconds for a process that is asked to stop


def command(address, count, index, flags):
  """The command of process `index`; a copy that Ray makes of the script may not be executable."""
  return ["bash", "launch/container.sh", f"--distributed={address},{count},{index}", *flags]


def free_address():
  """HOST:PORT of this node where process 0 can listen."""
  import ray

  with socket.create_server(("", 0)) as free:
    return f"{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"


def train(words):
  """The exit code of that command. It ends with the task, as where Ray cancels it."""
  environment = {**os.environ, "PYTHON": sys.executable}
  process = subprocess.Popen(words, env=environment, start_new_session=True)
  try:
    while process.poll() is None:  # wait() would not notice that the task is cancelled
      time.sleep(0.2)
  finally:
    if process.poll() is None:
      os.killpg(process.pid, signal.SIGTERM)
      try:
        process.wait(_PATIENCE)
      except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
  return process.returncode


def attempt(count, resource, amount, flags):
  """The first exit code of processes that run at once that is not 0; `_SAVED` if a node is lost."""
  import ray
  from ray.util.placement_group import placement_group, remove_placement_group
  from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

  group = placement_group([{resource: amount}] * count, strategy="STRICT_SPREAD")
  print(f"waiting for {count} nodes with {resource}:{amount:g} free", flush=True)
  ray.get(group.ready())

  def on(index, function, **taken):
    where = PlacementGroupSchedulingStrategy(group, index)
    return ray.remote(function).options(
      **{"num_cpus": 0, **taken}, scheduling_strategy=where, max_retries=0
    )

  named = {"CPU": "num_cpus", "GPU": "num_gpus"}
  taken = {named[resource]: amount} if resource in named else {"resources": {resource: amount}}
  try:
    address = ray.get(on(0, free_address).remote())
    running = [
      on(i, train, **taken).remote(command(address, count, i, flags)) for i in range(count)
    ]
    while running:
      [ended], running = ray.wait(running)
      if code := ray.get(ended):
        break
    else:
      return 0
    for other in running:
      ray.cancel(other)
    ray.wait(running, num_returns=len(running), timeout=2 * _PATIENCE)
    return code
  except ray.exceptions.RayError as error:
    print(f"a node is lost: {error}", file=sys.stderr, flush=True)
    return _SAVED
  finally:
    remove_placement_group(group)


def main(argv):
  dry_run = argv[:1] == ["--dry_run"]
  count, takes, *flags = argv[dry_run:] if len(argv) >= 2 + dry_run else ("", "")
  asked = re.fullmatch(r"(CPU|GPU|TPU):([1-9]\d{0,5})", takes)
  if not (re.fullmatch(r"[1-9]\d{0,5}", count) and asked):
    sys.exit(
      "ray_job.py: write how many nodes and what each gives, CPU, GPU or TPU: "
      "ray_job.py 4 GPU:8 FLAGS"
    )
  if not any(flag.startswith("--workdir=") for flag in flags):
    sys.exit("ray_job.py: write --workdir=DIR, on a file system of all nodes, or gs://")
  if own := [flag for flag in flags if flag.lstrip("-").startswith("distributed")]:
    sys.exit(f"ray_job.py: leave out {own[0]}: this script says how the processes find each other")
  if dry_run:
    for index in range(int(count)):
      print(f"{takes}: {shlex.join(command('HOST:PORT', count, index, flags))}")
    return
  try:
    import ray
  except ImportError:
    sys.exit("ray_job.py: Ray is not installed here: pip install 'peftjax[ray]'")
  ray.init()
  failures = 0
  while code := attempt(int(count), asked[1], float(asked[2]), flags):
    failures = 0 if code == _SAVED else failures + 1
    if failures == _FAILURES:
      sys.exit(f"ray_job.py: failed {failures} times in a row, with exit code {code}")
    print("ray_job.py: starting again", file=sys.stderr, flush=True)


if __name__ == "__main__":
  main(sys.argv[1:])
