"""A workdir belongs to one process at a time."""

import json
import os
import socket
import threading

import pytest

from peftjax.io import disk
from peftjax.training import lock, loop
from tests.training import runs


def test_a_second_one_is_told_who_has_it_and_touches_nothing(tmp_path):
  """Process, host and since when; also for a run of the whole framework."""
  with lock.hold(tmp_path / "run"):
    before = runs.contents(tmp_path)
    record = json.loads((tmp_path / "run" / "run.lock").read_text())
    assert (record["pid"], record["host"]) == (os.getpid(), socket.gethostname())
    with pytest.raises(lock.Held) as error, lock.hold(tmp_path / "run"):
      pass
    told = str(error.value)
    assert f"process {os.getpid()} on {socket.gethostname()}" in told and record["since"] in told
    assert len(told.splitlines()) == 1 and runs.contents(tmp_path) == before


def test_a_run_takes_it(config, tmp_path):
  with lock.hold(tmp_path / "run"):
    with pytest.raises(lock.Held, match="is in use: process"):
      loop.train_and_evaluate(config(), tmp_path / "run")


def test_of_many_starts_at_once_one_runs(tmp_path):
  barrier, counted, held = threading.Barrier(8), [], []

  def start():
    barrier.wait()
    try:
      with lock.hold(tmp_path / "a" / "run"):
        counted.append(1)
        inside.wait()
    except lock.Held:
      held.append(1)
      if len(held) == 7:
        inside.set()

  inside = threading.Event()
  threads = [threading.Thread(target=start) for _ in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(counted) == 1 and len(held) == 7
  assert not list(tmp_path.rglob(lock.NAME))


def test_a_folder_stays_only_if_something_was_kept(tmp_path):
  (tmp_path / "mine").mkdir()
  for name, kept in (("a/b", False), ("c", True), ("mine", False)):
    with lock.hold(tmp_path / name) as held:
      held.kept = kept
  assert sorted(path.name for path in tmp_path.rglob("*")) == ["c", "mine"]


def test_what_a_dead_process_left_does_not_block(tmp_path):
  """Its record stays, whole or torn, and the lock does not."""
  record = {"pid": 1, "host": "gone", "since": "2026-01-01T00:00:00+00:00", "command": "train"}
  for left in (json.dumps(record), ""):
    (tmp_path / "run.lock").write_text(left)
    with lock.hold(tmp_path):
      assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
    assert not (tmp_path / "run.lock").exists()


def test_a_file_of_that_name_that_is_another_stays(tmp_path):
  (tmp_path / "run.lock").write_text("the notes of a river journey")
  with pytest.raises(ValueError, match=r"run.lock(.|\n)*Move it away"), lock.hold(tmp_path):
    pass
  assert (tmp_path / "run.lock").read_text().startswith("the notes")


@pytest.mark.parametrize(
  ("name", "told"),
  [("file", "a file"), ("file/below/it", "is a file"), ("long" * 100, "too long")],
)
def test_a_workdir_that_cannot_be_is_a_sentence(tmp_path, name, told):
  (tmp_path / "file").write_text("x")
  with pytest.raises(disk.DiskError, match=told) as error, lock.hold(tmp_path / name):
    pass
  assert len(str(error.value).splitlines()) == 1
  assert [path.name for path in tmp_path.iterdir()] == ["file"]
