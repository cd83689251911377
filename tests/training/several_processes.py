"""Runs in several processes at once, two CPU devices in each, that speak over gloo.

  python -m tests.training.several_processes ADDRESS COUNT INDEX WHAT < CASES

CASES is a list of [config, mesh] in JSON; process 0 prints, in JSON, what the function WHAT of this
module is of each.
"""

import json
import os
import pathlib
import socket
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
DEVICES = 2  # of each process


def numbers(config, mesh):
  """Loss and gradient norm of every step, and the scores of the validation part afterwards."""
  run, rows = _trained(config, mesh)
  return [rows, run.evaluate("validation")]


def steps(config, mesh):
  """Loss and gradient norm of every step."""
  return _trained(config, mesh)[1]


def _trained(config, mesh):
  from ml_collections import ConfigDict

  from peftjax.training.run import Run
  from peftjax.training.settings import from_config

  run, rows = Run(from_config(ConfigDict(config)), mesh), []
  for _ in run.steps():
    rows += run.fetch(all_of_them=True)
  return run, rows


def start(command, count=2, devices=DEVICES):
  """Starts `command(address, index)` of each of `count` processes."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")
  return [
    subprocess.Popen(
      [sys.executable, "-m", *command(address, index)],
      cwd=ROOT,
      env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for index in range(count)
  ]


def ended(processes, given=""):
  """What each printed and complained of, once all have ended; and their exit codes."""
  try:
    for process in processes:
      process.stdin.write(given)
      process.stdin.close()
      process.stdin = None
    told = [process.communicate(timeout=300) for process in processes]
  finally:
    for process in processes:
      process.kill()
  return [(process.returncode, *texts) for process, texts in zip(processes, told, strict=True)]


def together(cases, count=2, what="numbers"):
  """`numbers` or `steps` of each of some (config, mesh), by `count` processes."""
  name = "tests.training.several_processes"
  processes = start(lambda address, index: [name, address, str(count), str(index), what], count)
  given = json.dumps([[json.loads(config.to_json()), mesh] for config, mesh in cases])
  found = ended(processes, given)
  for code, _, errors in found:
    assert code == 0, errors
  return json.loads(found[0][1].splitlines()[-1])


def main(address, count, index, what):
  import jax

  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.distributed.initialize(address, int(count), int(index))
  found = [globals()[what](*case) for case in json.load(sys.stdin)]
  if jax.process_index() == 0:
    print(json.dumps(found))


if __name__ == "__main__":
  main(*sys.argv[1:])
