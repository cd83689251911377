"""Other libraries broadcast as they like."""

import jax
import pytest


@pytest.fixture(autouse=True)
def broadcasting():
  with jax.numpy_rank_promotion("allow"):
    yield
