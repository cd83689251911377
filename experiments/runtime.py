"""What every command sets up first: the compilation cache, and errors a person can read."""

from __future__ import annotations

import contextlib
import difflib
import os
import runpy
import sys
import traceback
from collections.abc import Iterator
from typing import Any


def set_up(compilation_cache: str | None) -> None:
  """For a command: quiet logging, and `keep_programs`."""
  from absl import flags, logging

  if not flags.FLAGS["verbosity"].present:
    # Which accelerators are absent, and how Orbax reads its own options, is no news.
    logging.set_verbosity(logging.ERROR)
  keep_programs(compilation_cache)


def parse_flags(argv: list[str]) -> list[str]:
  """For `app.run(flags_parser=...)`: what is wrong with flags is a message and not a trace."""
  from absl import flags

  try:
    rest = flags.FLAGS(argv)
    if "config" in flags.FLAGS:
      hasattr(flags.FLAGS.config, "seed")  # of a config file that is not there, any use raises
    return rest
  except flags.Error as error:
    if os.environ.get("PEFTJAX_TRACEBACK"):
      raise
    if refused := _raised_in("get_config", error):
      sys.exit(f"error: {refused}")
    sys.exit(f"error: {error}\nPass --helpshort to see all flags.")
  except OSError as error:
    sys.exit(f"error: {error}")
  except (AttributeError, KeyError):
    given = dict(part.lstrip("-").partition("=")[::2] for part in argv)
    path, _, argument = given["config"].partition(":")
    config = runpy.run_path(path)["get_config"](argument)
    for field in given:
      if field.startswith("config."):
        try:
          check_field(config, field.removeprefix("config."))
        except ValueError as refused:
          sys.exit(f"error: {refused}")
    raise


def _raised_in(function: str, error: BaseException | None) -> BaseException | None:
  """The exception that led to `error`, if one came out of that function."""
  while error and all(x.name != function for x in traceback.extract_tb(error.__traceback__)):
    error = error.__context__
  return error


def check_field(config: Any, field: str, here: str = "config") -> None:
  """Raises ValueError, naming what is near, if `config` has no field of that dotted path."""
  for part in field.split("."):
    has = list(config) if hasattr(config, "keys") else []
    if part not in has:
      near = difflib.get_close_matches(part, has, n=1)
      hint = f"; did you mean {near[0]!r}?" if near else "."
      raise ValueError(f"{here} has no field {part!r}{hint} It has: {', '.join(has) or 'none'}")
    config, here = config[part], f"{here}.{part}"


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
  from peftjax.training.loop import Stopped

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
