"""Eight CPU devices, no silent broadcasting, quick compilation, and the mark of slow tests.

Compiling is most of what the tests do. XLA optimises little here (`tests.core.programs` has what
laws about memory and bits need), and all processes of a session share a folder of the programs they
compiled, so that each is compiled once. The folder is new in every session and its keys are the
programs themselves: it hides no change.
"""

import gc
import os
import re
import shutil
import tempfile
import zlib
from importlib import metadata

import pytest

CONTRACT = "method_contract_test.py"
IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ  # of pytest-xdist: its controller has set all this

# Before jax is imported.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
for flag in (
  "--xla_force_host_platform_device_count=8",
  "--xla_backend_optimization_level=0",
  "--xla_llvm_disable_expensive_passes=true",
  "--xla_cpu_parallel_codegen_split_count=1",
  # Newer ones have no such flag, and end the process where they meet it.
  *(["--xla_cpu_use_fusion_emitters=false"] if metadata.version("jaxlib") < "0.11" else []),
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


def pytest_collection_finish():
  """Imported objects stay and tracing leaves little garbage: collect it less often."""
  gc.freeze()
  gc.set_threshold(200_000, 20, 100)


def pytest_addoption(parser):
  parser.addoption(
    "--part",
    metavar="I/N",
    help="Of N parts of the tests take the I-th, I from 0, or I modulo N; a number in hexadecimal.",
  )


@pytest.hookimpl(tryfirst=True)  # before `-m "not slow"` is looked at
def pytest_collection_modifyitems(config, items):
  """Slow tests say why; the contract comes last, as its groups are small: workers end together."""
  for item in items:
    if (mark := item.get_closest_marker("fast_for")) and hasattr(item, "callspec"):
      if not re.fullmatch(mark.args[0], item.callspec.id):
        item.add_marker(pytest.mark.slow(reason="repeats a law for more settings"))
  if part := config.getoption("--part"):
    number, _, count = part.partition("/")
    mine = int(number, 16) % int(count)
    # All cases of a test, and all laws of a subject, are in one part: they share what they build.
    kept = [item for item in items if zlib.crc32(_group(item.nodeid).encode()) % int(count) == mine]
    config.hook.pytest_deselected(items=[item for item in items if item not in {*kept}])
    items[:] = kept
  items.sort(key=lambda item: item.path.name == CONTRACT)
  for item in items:
    for mark in item.iter_markers("slow"):
      if mark.args or set(mark.kwargs) != {"reason"} or not str(mark.kwargs["reason"]).strip():
        raise pytest.UsageError(f"{item.nodeid}: write pytest.mark.slow(reason='...')")


def _group(nodeid):
  """A test with all its cases; of the contract a subject with all its laws."""
  file, _, test = nodeid.partition("::")
  subject = re.search(r"\[(.+?-(scanned|unrolled))", test) if file.endswith(CONTRACT) else None
  return f"{file} {subject[1]}" if subject else nodeid.partition("[")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
  """Workers take whole files, but of the contract one subject after the other.

  pytest-xdist's own loadgroup sets a private name that pytest 9.2 no longer reads.
  """
  from xdist.scheduler import LoadScopeScheduling

  class Groups(LoadScopeScheduling):
    def _split_scope(self, nodeid):
      file = nodeid.partition("::")[0]
      return _group(nodeid) if file.endswith(CONTRACT) else file

  return Groups(config, log)


@pytest.fixture(scope="module", autouse=True)
def programs_end_before_they_are_too_many():
  yield
  programs.drop()
