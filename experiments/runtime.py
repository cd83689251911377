"""What every command sets up first: the compilation cache, and errors a person can read."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator


def set_up(compilation_cache: str | None) -> None:
  """For a command: quiet logging, and `keep_programs`."""
  from absl import flags, logging

  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)  # which accelerators are absent is no news
  keep_programs(compilation_cache)


def keep_programs(directory: str | None) -> None:
  """Keeps compiled programs in `directory` between runs; nothing is kept if it is empty."""
  import jax

  if directory:
    jax.config.update("jax_compilation_cache_dir", os.path.expanduser(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


@contextlib.contextmanager
def readable_errors() -> Iterator[None]:
  """A mistake of the user's, or a diverged run, ends in its message and exit code 1, no trace."""
  from peftjax.train.loop import Stopped

  try:
    yield
  except (ValueError, FloatingPointError) as error:
    if os.environ.get("PEFTJAX_TRACEBACK"):
      raise
    print(f"error: {error}", file=sys.stderr)
    sys.exit(1)
  except Stopped as stopped:
    print(stopped)
    sys.exit(0)
