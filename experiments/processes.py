"""The processes that share a run, for a command: how they find each other, speak and end."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import socket
import sys
import threading
import time
from typing import Any

_PATIENCE = 300.0  # seconds for them to find each other, JAX's default


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
  given = _given(distributed)
  import jax

  # Without it JAX aborts where a peer is gone; so its collectives fail, and `watch` sees the rest.
  jax.config.update("jax_enable_recoverability", True)
  alone = threading.Timer(_PATIENCE, _give_up, [distributed])
  alone.daemon = True
  alone.start()
  try:
    # JAX would abort when its own patience ends.
    jax.distributed.initialize(**given, initialization_timeout=2 * int(_PATIENCE))
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
  finally:
    alone.cancel()
  if given and jax.process_count() != given["num_processes"]:
    raise ValueError(
      f"--distributed={distributed}: process 0 was told of {jax.process_count()} processes. Write "
      "the same ADDRESS and COUNT in all of them"
    )
  from peftjax.training import peers

  peers.watch(end_alone)


def _given(distributed: str) -> dict[str, Any]:
  """JAX's arguments for "ADDRESS,COUNT,ID"; none for "auto".

  Raises:
    ValueError: it is neither, process 0 cannot listen at ADDRESS, or nobody does.
  """
  if distributed == "auto":
    return {}
  match = re.fullmatch(r"([^,/\s]+:\d{1,5}),(\d{1,6}),(\d{1,6})", distributed)
  if not match:
    raise ValueError(
      f"--distributed={distributed} is not off, auto or ADDRESS,COUNT,ID, such as "
      "--distributed=localhost:9876,2,0"
    )
  address, count, number = match[1], int(match[2]), int(match[3])
  if not number < count:
    raise ValueError(
      f"--distributed={distributed}: the {count} processes are numbered from 0 to {count - 1}"
    )
  if int(address.rpartition(":")[2]) not in range(1, 2**16):
    raise ValueError(f"--distributed={distributed}: ports are numbered from 1 to 65535")
  if number:
    _find(address)
  else:
    _check_free(distributed, address)
  return dict(coordinator_address=address, num_processes=count, process_id=number)


def _check_free(distributed: str, address: str) -> None:
  """Raises ValueError if process 0 cannot listen at HOST:PORT, on which JAX would crash."""
  host, _, port = address.rpartition(":")
  try:
    socket.getaddrinfo(host.strip("[]"), int(port))
    with socket.socket() as probe:  # does not listen, lest another process take it for JAX
      probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
      probe.bind(("", int(port)))
  except OSError as error:
    raise ValueError(
      f"--distributed={distributed}: process 0 cannot listen there ({error.strerror}). Name this "
      "machine as the others know it, and a port that is free, in all of them"
    ) from None


def _give_up(distributed: str) -> None:
  say(
    f"error: --distributed={distributed}: not all processes found each other in {_PATIENCE:.0f} s. "
    "Start all of them within that time, with the same ADDRESS and COUNT, each with its own ID"
  )
  os._exit(1)


def end_alone(why: str = "") -> None:
  """Ends this process when a peer is gone: at once, as JAX would wait for it in the end."""
  say(
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
      say(f"waiting for process 0 at {address}, at most {_PATIENCE:.0f} s ...")
      told = True
    time.sleep(0.2)


def is_main() -> bool:
  """Tells whether this process speaks for all that share a run."""
  import jax

  return jax.process_index() == 0


def shared() -> bool:
  """Tells whether several processes share this run."""
  import jax

  return jax.distributed.is_initialized()


def leave(code: int) -> None:
  """Prepares the end of a command with this exit code."""
  if "jax" in sys.modules and shared():
    from peftjax.training import peers

    peers.leave(code)


def say(text: str, file: Any = None) -> None:
  with contextlib.suppress(OSError):  # from a terminal that is closed
    print(text, file=file or sys.stderr)
