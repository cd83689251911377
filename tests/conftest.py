"""Eight CPU devices for the sharding tests, and no silent broadcasting between ranks."""

import os

# Before jax is imported. The compilation cache would hide what a change does to a program.
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
  os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
  ).strip()

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module", autouse=True)
def programs_end_with_their_module():
  """A process may have only so many memory maps, and every compiled program takes some."""
  yield
  jax.clear_caches()
