"""metrics.jsonl and TensorBoard events, cut to the step that a run goes on from."""

import json
import struct

import pytest
from tensorboardX.proto import event_pb2

from peftjax.training import logs

ROWS = [{"step": s, "loss": 1 / s, "learning_rate": 1e-3} for s in range(1, 6)]


def written(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def events(folder):
  """(tag, step, value) of every scalar: records of length, its CRC, the event, its CRC."""
  [path] = folder.glob("events.out.tfevents.*")
  data, at, found = path.read_bytes(), 0, []
  while at < len(data):
    (length,) = struct.unpack_from("<Q", data, at)
    event = event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
    found += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
    at += 12 + length + 4
  return found


@pytest.fixture
def full(tmp_path):
  """A workdir with five rows."""
  out = logs.Logs(tmp_path, 0)
  for row in ROWS:
    out.write(row)
  out.close()
  return tmp_path


def test_rows_are_on_disk_at_once(tmp_path):
  """A row can be read as soon as it is written."""
  out = logs.Logs(tmp_path, 0)
  out.write(ROWS[0])
  assert written(tmp_path / "metrics.jsonl") == ROWS[:1]
  out.close()


def test_logs_are_cut_at_the_step(full):
  """Going on after step 3 keeps rows 1 to 3, in the events too, and adds the new ones."""
  out = logs.Logs(full, 3)
  out.write({"step": 4, "loss": 0.5})
  out.close()
  assert written(full / "metrics.jsonl") == [*ROWS[:3], {"step": 4, "loss": 0.5}]
  losses = [(step, value) for tag, step, value in events(full / "tensorboard") if tag == "loss"]
  assert [step for step, _ in losses] == [1, 2, 3, 4]
  assert losses[-1][1] == 0.5


def test_half_written_last_line_is_cut(full):
  """What a kill left of a line disappears, whatever byte it ends at."""
  path = full / "metrics.jsonl"
  whole = path.read_bytes()
  for cut in (1, 2, 20):
    path.write_bytes(whole[:-cut])
    logs.Logs(full, 5).close()
    assert written(path) == (ROWS if cut == 1 else ROWS[:4])


def test_events_hold_every_number_by_step(full):
  """TensorBoard gets each field but step and epoch, as its own curve."""
  found = events(full / "tensorboard")
  assert {tag for tag, _, _ in found} == {"loss", "learning_rate"}
  assert [(s, v) for tag, s, v in found if tag == "loss"] == [
    (row["step"], pytest.approx(row["loss"])) for row in ROWS
  ]


def test_failed_write_leaves_the_old_file(tmp_path):
  """A file is replaced whole or not at all."""
  path = tmp_path / "result.json"
  logs.write_atomic(path, "old")
  with pytest.raises(UnicodeEncodeError):
    logs.write_atomic(path, "new \ud800")
  assert path.read_text() == "old"
  logs.write_atomic(path, "new")
  assert path.read_text() == "new"
  assert [p.name for p in tmp_path.iterdir()] in (["result.json"], [".result.json.tmp"])


def test_bar_prints_plain_lines_without_a_terminal(capsys):
  """Redirected, a run prints its lines unwrapped and no bar."""
  with logs.Bar("lora", 0, 10) as bar:
    bar.update(1, 0.5, 100.0)
    bar.print("x" * 200)
    bar.scores("epoch 1", {"accuracy": 0.5})
  lines = capsys.readouterr().out.splitlines()
  assert lines[0] == "x" * 200
  assert lines[1].split() == ["epoch", "1", "accuracy", "0.5000"]
