"""The set-up of every command: the compilation cache, and errors a person can read."""

from __future__ import annotations

import _thread
import contextlib
import difflib
import logging as stdlib_logging
import os
import re
import runpy
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from experiments import processes


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
  """Hides the trace of Ctrl-C while a command is still being imported, too."""
  if issubclass(kind, KeyboardInterrupt) and not os.environ.get("PEFTJAX_TRACEBACK"):
    print(str(error) or "stopped", file=sys.stderr)
  else:
    sys.__excepthook__(kind, error, trace)


def _unraisable(swallowed: sys.UnraisableHookArgs) -> None:
  """Raises a Ctrl-C again that came inside a callback, where it is lost, a moment later."""
  if issubclass(swallowed.exc_type, KeyboardInterrupt):
    threading.Timer(0.1, _thread.interrupt_main).start()
  else:
    sys.__unraisablehook__(swallowed)


sys.excepthook, sys.unraisablehook = _uncaught, _unraisable


def set_up(compilation_cache: str | None) -> None:
  """Sets up a command: quiet logging, and `keep_programs`."""
  quiet()
  keep_programs(compilation_cache)


def quiet() -> None:
  """Silences libraries: absent accelerators, and how Orbax reads its own options, are no news.

  Failures of their threads, and of gcsfs in the end, are raised here too.
  """
  from absl import flags, logging

  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.FATAL)
    stdlib_logging.getLogger("gcsfs").setLevel(stdlib_logging.CRITICAL)


def keep_programs(directory: str | None) -> None:
  """Keeps compiled programs in `directory` between runs; nothing is kept if it is empty.

  Raises:
    ValueError: somebody else may write there.
  """
  import jax

  from experiments import private

  if directory:
    folder = private.folder(Path(directory))
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


@contextlib.contextmanager
def readable_errors() -> Iterator[None]:
  """A context for a command: errors that users can mend end in a message and exit code 1.

  A saved run that was asked to stop ends with 0, Ctrl-C with 130, a closed pipe quietly. Anything
  else is a bug, with its trace and where it belongs. PEFTJAX_TRACEBACK=1 lets everything through.
  """
  try:
    yield
    sys.stdout.flush()
    processes.leave(0)
  except BaseException as error:
    if os.environ.get("PEFTJAX_TRACEBACK"):
      raise
    code = _end(error)
    if code is None:
      raise
    with contextlib.suppress(OSError):
      sys.stderr.flush()
    processes.leave(code)
    sys.exit(code)


def _end(error: BaseException) -> int | None:
  """Tells the user what ended a command; its exit code, or None if that is not for us to say."""
  from absl import app, flags

  loop = sys.modules.get("peftjax.training.loop")
  if loop is not None and isinstance(error, loop.Stopped):
    if processes.is_main():
      processes.say(str(error), sys.stdout)
    return 0
  if isinstance(error, BrokenPipeError):  # whoever read has had enough; Python flushes once more
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
  if isinstance(error, KeyboardInterrupt):
    processes.say(str(error) or "stopped")
    return 130
  if isinstance(error, app.UsageError | flags.Error) or not isinstance(error, Exception):
    return None
  if isinstance(error, OSError):
    from peftjax.io import disk

    processes.say(f"error: {disk.sentence(error)}")
  elif isinstance(error, ValueError | FloatingPointError):
    processes.say(f"error: {error}")
  elif type(error).__name__ == "JaxRuntimeError" and processes.shared():
    processes.end_alone(f" ({(str(error).splitlines() or [''])[0][:200]})")
  elif isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
    told = (str(error).splitlines() or [""])[0][:300]
    processes.say(f"error: out of memory. Try a smaller batch or model. {told}".rstrip())
  else:
    processes.say("".join(traceback.format_exception(error)))
    processes.say(
      f"error: this is a bug of peftjax ({type(error).__name__}). Please report it, with the lines "
      "above and the command, in the issue tracker of the repository it came from."
    )
  return 1


@readable_errors()
def parse_flags(argv: list[str], *, names: bool = False) -> list[str]:
  """Parses flags for `app.run(flags_parser=...)`: wrong flags give a message and not a trace.

  Args:
    argv: arguments of the command.
    names: True if it takes words beside flags; otherwise they are refused.
  """
  from absl import flags

  given = _given(argv)
  config = None
  if "config" in flags.FLAGS and given.get("config"):
    path, colon, argument = given["config"].partition(":")
    config = load_config(path, *([argument] if colon else []))
  try:
    rest = flags.FLAGS(argv)
  except (flags.Error, AttributeError, KeyError) as error:
    for field in given:
      if config is not None and field.startswith("config."):
        check_field(config, field.removeprefix("config."))
    raise ValueError(f"{_in_words(str(error))}\nPass --helpshort to see all flags.") from error
  if rest[1:] and not names:
    raise ValueError(
      f"unknown arguments {rest[1:]}: write a flag as --NAME=VALUE, a field of the config as "
      '--config.FIELD=VALUE, and quotes around a value with spaces, --NAME="..."'
    )
  return rest


def _in_words(told: str) -> str:
  """absl's "flag --NAME=VALUE: invalid literal ...", with allowed values in place of Python's."""
  from absl import flags

  match = re.match(r"flag (--([\w.]+)=.*?): ", told, re.DOTALL)
  flag = flags.FLAGS[match[2]] if match and match[2] in flags.FLAGS else None
  allowed = ""
  if flag is not None:
    allowed = "true or false" if flag.boolean else flag.parser.syntactic_help
  return f"{match[1]} cannot be: write {allowed}" if match and allowed else told


def _given(argv: list[str]) -> dict[str, str]:
  """The flags of a command line, `--name=value` or `--name value`, by name."""
  given: dict[str, str] = {}
  for part, after in zip(argv, [*argv[1:], ""], strict=True):
    if part.startswith("-"):
      name, equals, value = part.lstrip("-").partition("=")
      given[name] = value if equals else after
  return given


def check_output(flag: str, path: str | None, kinds: Sequence[str] = ()) -> None:
  """Checks an output file before a command's work begins.

  Args:
    flag: the flag that names it.
    path: None for no file.
    kinds: endings of names that it may have; none for any.

  Raises:
    ValueError: it is not a file's name, of another kind, or in a folder that is not there.
  """
  if path is None:
    return
  if not path or Path(path).is_dir() or not os.access(Path(path).absolute().parent, os.W_OK):
    raise ValueError(f"{flag}={path} cannot be written; name a file in an existing folder")
  if kinds and Path(path).suffix not in kinds:
    raise ValueError(f"{flag}={path}: name a file that ends in {', '.join(kinds)}")


def load_config(path: str, *arguments: str, run: Any = runpy.run_path) -> Any:
  """The `ConfigDict` that `get_config(*arguments)` of a file returns.

  Raises:
    ValueError: naming file and line of an error in it; refusals of `get_config`, as they are.
  """
  from ml_collections import ConfigDict

  if not Path(path).is_file():
    raise ValueError(f"{path} is not a file. Name a configs/NAME.py[:ARGUMENT].")
  try:
    make = run(path).get("get_config")
    made = make(*arguments) if callable(make) else None
  except SyntaxError as error:
    where = f"{error.filename} line {error.lineno}" if error.lineno else path
    raise ValueError(f"{where}: {error.msg}") from error
  except (Exception, SystemExit) as error:
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, ValueError) and any(x.name == "get_config" for x in frames):
      raise
    lines = [x.lineno for x in frames if x.filename == path]
    where = f"{path} line {lines[-1]}" if lines else path
    raise ValueError(f"{where}: {type(error).__name__}: {error}") from error
  if make is None:
    raise ValueError(f"{path} has no function get_config.")
  if not isinstance(made, ConfigDict):
    raise ValueError(f"{path}: get_config returns {type(made).__name__}, not a ConfigDict.")
  return made


def check_field(config: Any, field: str, here: str = "config") -> None:
  """Raises ValueError, naming near fields, if `config` has no field of that dotted path."""
  for part in field.split("."):
    has = list(config) if hasattr(config, "keys") else []
    if part not in has:
      near = difflib.get_close_matches(part, has, n=1)
      hint = f"; did you mean {near[0]!r}?" if near else "."
      raise ValueError(f"{here} has no field {part!r}{hint} It has: {', '.join(has) or 'none'}")
    config, here = config[part], f"{here}.{part}"
