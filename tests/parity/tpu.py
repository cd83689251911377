"""The TPU compiler in a process of its own: it needs no TPU, only the library.

`make parity` puts it beside the other packages, since jax prints warnings wherever it finds it.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).parents[2]
FOLDER = pathlib.Path(sys.prefix) / "tpu"

needed = pytest.mark.skipif(
  not (FOLDER / "libtpu").is_dir() and importlib.util.find_spec("libtpu") is None,
  reason="libtpu, which has the TPU compiler, is not installed: make parity",
)

# What the library would otherwise ask of the machine it believes to be on.
_ENVIRONMENT = {
  "JAX_PLATFORMS": "cpu",
  "JAX_ENABLE_COMPILATION_CACHE": "false",
  "XLA_FLAGS": "",  # not the quick compilation of tests/conftest.py
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no TPU is taken, so another process may compile too
}


def environment() -> dict[str, str]:
  """Of a process that compiles for a TPU."""
  return {**os.environ, **_ENVIRONMENT, "PYTHONPATH": f"{ROOT}{os.pathsep}{FOLDER}"}


def compiled(*command: str) -> Any:
  """What Python prints last, as JSON, when run with `command`."""
  ended = subprocess.run(
    [sys.executable, *command],
    env=environment(),
    capture_output=True,
    text=True,
    check=False,
  )
  assert ended.returncode == 0, ended.stderr[-3000:]
  return json.loads(ended.stdout.splitlines()[-1])
