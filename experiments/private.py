"""Folders of code that only their owner may write to, as ssh has it for keys."""

from __future__ import annotations

import grp
import os
import pwd
import stat
from pathlib import Path

_OTHER = (
  "It holds compiled programs, which are run as they are. Name another folder, such as"
  " --config.compilation_cache=~/.cache/peftjax, or none: --config.compilation_cache="
)


def folder(path: Path) -> Path:
  """`path`, made for its owner alone if it is not there, and checked up to the root.

  Raises:
    ValueError: it is not a folder, or somebody else may write into it, or put another in its place.
  """
  try:
    path = path.expanduser().absolute()
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    places = {*path.parents, *path.resolve().parents}
    _check(path.resolve(), inside=False)
    for place in sorted(places):
      _check(place, inside=True)
    for entry in os.scandir(path):
      if entry.stat(follow_symlinks=False).st_uid not in (0, os.geteuid()):
        raise ValueError(
          f"{entry.path} belongs to {_user(entry.stat(follow_symlinks=False).st_uid)}. Remove it:"
          f"\n  rm -r {path}"
        )
  except (OSError, RuntimeError) as error:
    told = getattr(error, "strerror", None) or error
    raise ValueError(f"{path} cannot keep compiled programs ({told}). {_OTHER}") from None
  return path


def _check(path: Path, inside: bool) -> None:
  """Checks an entry; `inside`: whether the folder matters only for its contents."""
  state = path.stat()
  if state.st_uid not in (0, os.geteuid()):
    raise ValueError(f"{path} belongs to {_user(state.st_uid)}. {_OTHER}")
  others = state.st_mode & stat.S_IWOTH
  group = state.st_mode & stat.S_IWGRP and not _own_group(state.st_gid)
  if (others or group) and not (inside and state.st_mode & stat.S_ISVTX):
    raise ValueError(
      f"{path} can be written to by others. It holds compiled programs, which are run as they are."
      f" Remove what they may have put there, and write:\n  chmod go-w {path}"
    )


def _own_group(group: int) -> bool:
  """Tells whether a group is the user's private one, which many systems make for each user."""
  try:
    me = pwd.getpwuid(os.geteuid())
    own = grp.getgrgid(group)
  except KeyError:
    return False
  return group == me.pw_gid and own.gr_name == me.pw_name and set(own.gr_mem) <= {me.pw_name}


def _user(number: int) -> str:
  try:
    return f"the user {pwd.getpwuid(number).pw_name}"
  except KeyError:
    return f"the user of number {number}"
