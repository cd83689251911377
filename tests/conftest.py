"""Eight CPU devices, no silent broadcasting, quick compilation, and the mark of slow tests.

Compiling is most of what the tests do. XLA optimises little here (`tests.core.programs` has what
laws about memory and bits need), and all processes of a session share a folder of the programs they
compiled, so that each is compiled once. The folder is new in every session and its keys are the
programs themselves: it hides no change.
"""

import os
import shutil
import tempfile

import pytest

IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ  # of pytest-xdist: its controller has set all this

# Before jax is imported.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
for flag in (
  "--xla_force_host_platform_device_count=8",
  "--xla_backend_optimization_level=0",
  "--xla_llvm_disable_expensive_passes=true",
  "--xla_cpu_use_fusion_emitters=false",
  "--xla_cpu_parallel_codegen_split_count=1",
):
  given = os.environ.get("XLA_FLAGS", "")
  if flag.partition("=")[0] not in given:
    os.environ["XLA_FLAGS"] = f"{given} {flag}".strip()
if not IS_WORKER:
  os.environ |= {
    "JAX_COMPILATION_CACHE_DIR": tempfile.mkdtemp(prefix="peftjax-tests-"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
  }

import jax

from tests.core import programs

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_unconfigure():
  if not IS_WORKER:
    shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


def pytest_collection_modifyitems(items):
  """Workers take whole files, but of a file that names its groups one group after the other.

  Those come last: they are small, so that all workers end together.
  """
  grouped = lambda item: item.get_closest_marker("xdist_group") is not None
  items.sort(key=grouped)
  for item in items:
    for mark in item.iter_markers("slow"):
      if mark.args or set(mark.kwargs) != {"reason"} or not str(mark.kwargs["reason"]).strip():
        raise pytest.UsageError(f"{item.nodeid}: write pytest.mark.slow(reason='...')")
    if not grouped(item):
      item.add_marker(pytest.mark.xdist_group(item.path.stem))


@pytest.fixture(scope="module", autouse=True)
def programs_end_before_they_are_too_many():
  yield
  programs.drop()
