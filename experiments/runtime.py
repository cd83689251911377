"""What every command sets up first: the compilation cache, and errors a person can read."""

from __future__ import annotations

import _thread
import contextlib
import difflib
import logging as stdlib_logging
import os
import re
import runpy
import shlex
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

_PATIENCE = 300.0  # seconds for the processes of a run to find each other, as JAX has it


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
  """Ctrl-C while a command is still being imported is no trace either."""
  if issubclass(kind, KeyboardInterrupt) and not os.environ.get("PEFTJAX_TRACEBACK"):
    print(str(error) or "stopped", file=sys.stderr)
  else:
    sys.__excepthook__(kind, error, trace)


def _unraisable(swallowed: sys.UnraisableHookArgs) -> None:
  """A Ctrl-C that came inside a callback, where it is lost, comes again a moment later."""
  if issubclass(swallowed.exc_type, KeyboardInterrupt):
    threading.Timer(0.1, _thread.interrupt_main).start()
  else:
    sys.__unraisablehook__(swallowed)


sys.excepthook, sys.unraisablehook = _uncaught, _unraisable


def set_up(compilation_cache: str | None) -> None:
  """For a command: quiet logging, and `keep_programs`."""
  from absl import flags, logging

  if not flags.FLAGS["verbosity"].present:
    # Which accelerators are absent, and how Orbax reads its own options, is no news; what its
    # threads fail at, and gcsfs in the end, is raised here too.
    logging.set_verbosity(logging.FATAL)
    stdlib_logging.getLogger("gcsfs").setLevel(stdlib_logging.CRITICAL)
  keep_programs(compilation_cache)


def join(distributed: str) -> None:
  """Makes this process one of several that share a run, before JAX does anything.

  Args:
    distributed: "off", "auto", or "ADDRESS,COUNT,ID": where process 0 listens (HOST:PORT), how many
      processes there are, and which one this is.

  Raises:
    ValueError: it is none of these, no cluster is found, or the others do not come.
  """
  if distributed == "off":
    return
  import jax

  match = re.fullmatch(r"([^,/\s]+:\d{1,5}),(\d{1,6}),(\d{1,6})", distributed)
  given: dict[str, Any] = {}
  if match:
    given = dict(
      coordinator_address=match[1], num_processes=int(match[2]), process_id=int(match[3])
    )
    if not given["process_id"] < given["num_processes"]:
      raise ValueError(
        f"--distributed={distributed}: the {match[2]} processes are numbered from 0 to "
        f"{int(match[2]) - 1}"
      )
    if int(match[1].rpartition(":")[2]) not in range(1, 2**16):
      raise ValueError(f"--distributed={distributed}: ports are numbered from 1 to 65535")
    if given["process_id"]:
      _find(match[1])
  elif distributed != "auto":
    raise ValueError(
      f"--distributed={distributed} is not off, auto or ADDRESS,COUNT,ID, such as "
      "--distributed=localhost:9876,2,0"
    )
  # Without it JAX aborts where a peer is gone; so its collectives fail, and `watch` sees the rest.
  jax.config.update("jax_enable_recoverability", True)
  try:
    jax.distributed.initialize(**given)
  except ValueError as error:
    raise ValueError(
      f"--distributed={distributed} finds no cluster ({error}). Write --distributed=off, or "
      "ADDRESS,COUNT,ID in each process."
    ) from None
  except RuntimeError as error:
    told = (str(error).splitlines() or [""])[0][:300]
    raise ValueError(
      f"--distributed={distributed}: the other processes are not there: {told}"
    ) from None
  from peftjax.training import peers

  peers.watch(_end_alone)


def _end_alone(why: str = "") -> None:
  """Ends this process where a peer is gone: at once, as JAX would wait for it in the end."""
  _say(
    f"error: a process that shares this run is gone{why}, and without it this one ends. Run the "
    f"same command in every process again to go on from the last checkpoint: {_command()}"
  )
  os._exit(1)


def _command() -> str:
  module = getattr(sys.modules.get("__main__"), "__spec__", None)
  named = ["python", "-m", module.name] if module else ["python", sys.argv[0]]
  return shlex.join([*named, *sys.argv[1:]])


def _find(address: str) -> None:
  """Waits until somebody listens at HOST:PORT; JAX would end this process without a word of ours.

  Raises:
    ValueError: nobody does in `_PATIENCE` seconds.
  """
  host, _, port = address.rpartition(":")
  until = time.monotonic() + _PATIENCE
  told = False
  while True:
    try:
      socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
      return
    except OSError as error:
      if time.monotonic() > until:
        raise ValueError(
          f"no process 0 listens at {address} ({error}), {_PATIENCE:.0f} s long. Start it, or name "
          "where it is: --distributed=ADDRESS,COUNT,ID"
        ) from None
    if not told and time.monotonic() > until - _PATIENCE + 5:
      _say(f"waiting for process 0 at {address}, at most {_PATIENCE:.0f} s ...")
      told = True
    time.sleep(0.2)


def is_main() -> bool:
  """Whether this process speaks for all that share a run."""
  import jax

  return jax.process_index() == 0


def shared() -> bool:
  """Whether several processes share this run."""
  import jax

  return jax.distributed.is_initialized()


def _leave(code: int) -> None:
  """Before a command ends with this exit code."""
  if "jax" in sys.modules and shared():
    from peftjax.training import peers

    peers.leave(code)


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
  """Of a command: what the user can mend ends in its message and exit code 1, without a trace.

  A saved run that was asked to stop ends with 0, Ctrl-C with 130, a closed pipe quietly. Anything
  else is a bug, with its trace and where it belongs. PEFTJAX_TRACEBACK=1 lets everything through.
  """
  try:
    yield
    sys.stdout.flush()
    _leave(0)
  except BaseException as error:
    if os.environ.get("PEFTJAX_TRACEBACK"):
      raise
    code = _end(error)
    if code is None:
      raise
    with contextlib.suppress(OSError):
      sys.stderr.flush()
    _leave(code)
    sys.exit(code)


def _end(error: BaseException) -> int | None:
  """Tells what ended a command; its exit code, or None if that is not for us to say."""
  from absl import app, flags

  loop = sys.modules.get("peftjax.training.loop")
  if loop is not None and isinstance(error, loop.Stopped):
    if is_main():
      _say(str(error), sys.stdout)
    return 0
  if isinstance(error, BrokenPipeError):  # whoever read has had enough; Python flushes once more
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
  if isinstance(error, KeyboardInterrupt):
    _say(str(error) or "stopped")
    return 130
  if isinstance(error, app.UsageError | flags.Error) or not isinstance(error, Exception):
    return None
  if isinstance(error, OSError):
    from peftjax.io import disk

    _say(f"error: {disk.sentence(error)}")
  elif isinstance(error, ValueError | FloatingPointError):
    _say(f"error: {error}")
  elif type(error).__name__ == "JaxRuntimeError" and shared():
    _end_alone(f" ({(str(error).splitlines() or [''])[0][:200]})")
  elif isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
    told = (str(error).splitlines() or [""])[0][:300]
    _say(f"error: out of memory. Try a smaller batch or model. {told}".rstrip())
  else:
    _say("".join(traceback.format_exception(error)))
    _say(
      f"error: this is a bug of peftjax ({type(error).__name__}). Please report it, with the lines "
      "above and the command, in the issue tracker of the repository it came from."
    )
  return 1


def _say(text: str, file: Any = None) -> None:
  with contextlib.suppress(OSError):  # of a terminal that is closed
    print(text, file=file or sys.stderr)


@readable_errors()
def parse_flags(argv: list[str]) -> list[str]:
  """For `app.run(flags_parser=...)`: what is wrong with flags is a message and not a trace."""
  from absl import flags

  given = _given(argv)
  config = None
  if "config" in flags.FLAGS and given.get("config"):
    path, colon, argument = given["config"].partition(":")
    config = load_config(path, *([argument] if colon else []))
  try:
    return flags.FLAGS(argv)
  except (flags.Error, AttributeError, KeyError) as error:
    for field in given:
      if config is not None and field.startswith("config."):
        check_field(config, field.removeprefix("config."))
    raise ValueError(f"{error}\nPass --helpshort to see all flags.") from error


def _given(argv: list[str]) -> dict[str, str]:
  """The flags of a command line, `--name=value` or `--name value`, by name."""
  given: dict[str, str] = {}
  for part, after in zip(argv, [*argv[1:], ""], strict=True):
    if part.startswith("-"):
      name, equals, value = part.lstrip("-").partition("=")
      given[name] = value if equals else after
  return given


def check_output(flag: str, path: str | None, kinds: Sequence[str] = ()) -> None:
  """Of a file that a command writes in the end: told before its work what cannot be.

  Args:
    flag: that names it.
    path: None for no file.
    kinds: endings of names that it may have; none for any.

  Raises:
    ValueError: it is no name of a file, of another kind, or in a folder that is not there.
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
    ValueError: naming file and line of what is wrong with it; what `get_config` refuses, as it is.
  """
  from ml_collections import ConfigDict

  if not Path(path).is_file():
    raise ValueError(f"{path} is no file. Name a configs/NAME.py[:ARGUMENT].")
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
    raise ValueError(f"{path}: get_config returns {type(made).__name__}, and not a ConfigDict.")
  return made


def check_field(config: Any, field: str, here: str = "config") -> None:
  """Raises ValueError, naming what is near, if `config` has no field of that dotted path."""
  for part in field.split("."):
    has = list(config) if hasattr(config, "keys") else []
    if part not in has:
      near = difflib.get_close_matches(part, has, n=1)
      hint = f"; did you mean {near[0]!r}?" if near else "."
      raise ValueError(f"{here} has no field {part!r}{hint} It has: {', '.join(has) or 'none'}")
    config, here = config[part], f"{here}.{part}"
