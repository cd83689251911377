"""How commands end: what a person can mend is a sentence, anything else a bug with its trace."""

import errno
import os
import signal
import socket
import types

import pytest
from absl import app, flags
from ml_collections import config_flags

from experiments import private, processes, runtime
from experiments.sweeping import trials
from peftjax.io import disk
from peftjax.training import loop, process


def ends(capsys, error):
  """Exit code, standard output and standard error of a command that raises this."""

  @runtime.readable_errors()
  def main():
    raise error

  with pytest.raises(SystemExit) as ended:
    main()
  return ended.value.code, *capsys.readouterr()


@pytest.mark.parametrize(
  ("error", "code", "out", "told"),
  [
    (ValueError("rank 0"), 1, "", "error: rank 0\n"),
    (FloatingPointError("step 3"), 1, "", "error: step 3\n"),
    (disk.DiskError("/a: the disk is full."), 1, "", "error: /a: the disk is full.\n"),
    (PermissionError(errno.EACCES, "no", "/a"), 1, "", "error: /a: permission is denied\n"),
    (FileNotFoundError(errno.ENOENT, "None there", "/a"), 1, "", "error: /a: None there\n"),
    (MemoryError(), 1, "", "error: out of memory. Try a smaller batch or model.\n"),
    (loop.Stopped("saved step 3"), 0, "saved step 3\n", ""),
    (KeyboardInterrupt(), 130, "", "stopped\n"),
    (process.Again("stopped at once"), 130, "", "stopped at once\n"),
  ],
  ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_a_sentence_and_an_exit_code(capsys, error, code, out, told):
  assert ends(capsys, error) == (code, out, told)


@pytest.mark.parametrize("error", [KeyError("x"), TypeError("no"), RuntimeError("odd")])
def test_anything_else_is_a_bug(capsys, error):
  """With its trace, and what to do with it."""
  code, _, told = ends(capsys, error)
  assert code == 1 and "Traceback" in told and "in main" in told
  assert f"bug of peftjax ({type(error).__name__})" in told and "report" in told


@pytest.mark.parametrize("error", [app.UsageError("which?"), SystemExit(3), GeneratorExit()])
def test_what_others_tell_goes_through(error):
  with pytest.raises(type(error)), runtime.readable_errors():
    raise error


def test_memory_of_a_device_is_no_bug(capsys):
  error = RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.\nmore")
  code, _, told = ends(capsys, error)
  assert code == 1 and told.startswith("error: out of memory") and "more" not in told.splitlines()


def test_a_closed_pipe_ends_quietly(capfd, monkeypatch):
  reader, writer = os.pipe()
  os.close(reader)
  with open(writer, "w") as out:
    monkeypatch.setattr("sys.stdout", out)
    with pytest.raises(SystemExit) as ended, runtime.readable_errors():
      print("x" * 10, flush=True)
  assert ended.value.code == 1 and capfd.readouterr().err == ""


FILES = {
  "none": ("def get_config(x=0):\n  return None\n", "returns NoneType"),
  "dict": ("def get_config(x=0):\n  return {}\n", "returns dict"),
  "syntax": ("x = 1\ndef get_config(:\n", "syntax.py line 2: invalid syntax"),
  "missing": ("x = 1\n", "has no function get_config"),
  "number": ("get_config = 1\n", "get_config"),
  "zero": ("def get_config(x=0):\n  return 1 / 0\n", "zero.py line 2: ZeroDivisionError"),
  "top": ("y = 1\nint('a')\n", "top.py line 2: ValueError"),
  "imports": ("import not_there_at_all\n", "imports.py line 1: ModuleNotFoundError"),
  "takes": ("def get_config():\n  pass\n", "takes.py: TypeError"),
  "exits": ("import sys\nsys.exit(3)\n", "exits.py line 2: SystemExit"),
  "key": ("def get_config(x=0):\n  return {}['seed']\n", "key.py line 2: KeyError: 'seed'"),
  "deep": ("def get_config(x=0):\n  return get_config(x)\n", "deep.py line 2: RecursionError"),
  "bytes": (b"\xff\xfe\0", "bytes.py"),
  "refuses": ("def get_config(x=0):\n  raise ValueError('only this')\n", "only this"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_config_file_is_refused_by_file_and_line(tmp_path, capsys, name):
  """For --config before flags are parsed, and for the base of a sweep."""
  content, told = FILES[name]
  path = tmp_path / f"{name}.py"
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  values = flags.FlagValues()
  config_flags.DEFINE_config_file("config", None, "", flag_values=values)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(flags, "FLAGS", values)
    for given in ([f"--config={path}:x"], ["--config", f"{path}:x", "--config.seed=1"]):
      with pytest.raises(SystemExit) as ended:
        runtime.parse_flags(["train", *given])
      out, err = capsys.readouterr()
      assert ended.value.code == 1 and out == "" and told in err and "Traceback" not in err
  sweep = trials.ConfigDict(dict(base=f"{path}:x"))
  with pytest.raises(ValueError, match="base") as error:
    trials.expand(sweep)
  assert told in str(error.value)


@pytest.mark.parametrize(
  ("given", "told"),
  [
    ("--count=x", "--count=x cannot be: write a positive integer"),
    ("--count=0", "--count=0 cannot be: write a positive integer"),
    ("--share=", "--share= cannot be: write a number"),
    ("--dry=perhaps", "--dry=perhaps cannot be: write true or false"),
    ("--where=here", "value should be one of <local|ray>"),
    ("here", "unknown arguments ['here']: write a flag as --NAME=VALUE"),
  ],
)
def test_a_flag_that_is_no_number(capsys, given, told):
  """What came, and what to write, in place of Python's words; likewise of a word without a flag."""
  values = flags.FlagValues()
  flags.DEFINE_integer("count", 1, "", lower_bound=1, flag_values=values)
  flags.DEFINE_float("share", 1.0, "", flag_values=values)
  flags.DEFINE_bool("dry", False, "", flag_values=values)
  flags.DEFINE_enum("where", "local", ["local", "ray"], "", flag_values=values)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(flags, "FLAGS", values)
    with pytest.raises(SystemExit):
      runtime.parse_flags(["plan", given])
  assert told in capsys.readouterr().err


@pytest.mark.parametrize(
  ("path", "told"),
  [
    ("", "--out= cannot be written; name a file in an existing folder"),
    (".", "cannot be written"),
    ("not/there/a.svg", "cannot be written"),
    ("a.txt", "--out=a.txt: name a file that ends in .png, .svg"),
  ],
)
def test_what_cannot_be_written_in_the_end_is_told_at_once(path, told):
  runtime.check_output("--out", None, (".png",))
  runtime.check_output("--out", "a.png", (".png",))
  with pytest.raises(ValueError, match=told):
    runtime.check_output("--out", path, (".png", ".svg"))


def test_a_config_that_is_no_file(tmp_path):
  for path in (tmp_path, tmp_path / "none.py"):
    with pytest.raises(ValueError, match="is not a file"):
      runtime.load_config(str(path))


def mode(path):
  return path.stat().st_mode & 0o777


def test_a_folder_of_programs_is_made_for_its_owner_alone(tmp_path):
  assert private.folder(tmp_path / "a" / "programs") == tmp_path / "a" / "programs"
  assert mode(tmp_path / "a" / "programs") == 0o700
  (tmp_path / "older").mkdir(mode=0o755)
  assert private.folder(tmp_path / "older") == tmp_path / "older"


@pytest.mark.parametrize("bits", [0o777, 0o757, 0o1777, 0o722])
def test_a_folder_that_others_can_write_to_is_refused(tmp_path, bits):
  """Itself, or one that it lies in and could be replaced in."""
  open_to_all = tmp_path / "open"
  (open_to_all / "programs").mkdir(parents=True, mode=0o700)
  open_to_all.chmod(bits)
  with pytest.raises(ValueError, match=f"chmod go-w {open_to_all}$"):
    private.folder(open_to_all)
  if bits & 0o1000:  # as /tmp is: others cannot touch what is mine in it
    private.folder(open_to_all / "programs")
  else:
    with pytest.raises(ValueError, match=f"chmod go-w {open_to_all}$"):
      private.folder(open_to_all / "programs")
  link = tmp_path / "link"
  link.symlink_to(open_to_all)
  with pytest.raises(ValueError, match="chmod go-w"):
    private.folder(link)


def test_a_folder_of_somebody_else_is_refused(tmp_path, monkeypatch):
  (tmp_path / "programs").mkdir(mode=0o700)
  monkeypatch.setattr(private.os, "geteuid", lambda: 4321)
  if tmp_path.stat().st_uid:
    with pytest.raises(ValueError, match="belongs to"):
      private.folder(tmp_path / "programs")
  (tmp_path / "file").write_text("x")
  monkeypatch.undo()
  with pytest.raises(ValueError, match="cannot keep compiled programs"):
    private.folder(tmp_path / "file")


@pytest.fixture
def terminal():
  """SIGHUP means what it does in a terminal, though the tests may run under nohup."""
  before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
  yield
  signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("terminal")
def test_signals_that_ask():
  """SIGHUP asks as SIGTERM does; a Ctrl-C after it interrupts; all is as before in the end."""
  kinds = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
  before = [signal.getsignal(kind) for kind in kinds]
  for kind in kinds:
    with process.stop_signals() as stop:
      signal.raise_signal(kind)
      assert stop.asked == kind.name
      with pytest.raises(process.Again, match="without saving"):
        signal.raise_signal(signal.SIGINT)
  with process.interrupts() as asked:
    with pytest.raises(KeyboardInterrupt):
      signal.raise_signal(signal.SIGHUP)
    assert asked() and not asked()
  assert [signal.getsignal(kind) for kind in kinds] == before


def test_nohup_stays():
  """A signal that is ignored at the start is ignored to the end."""
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  try:
    with process.stop_signals() as stop, process.interrupts():
      signal.raise_signal(signal.SIGHUP)
      assert not stop.asked and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
  finally:
    signal.signal(signal.SIGHUP, before)


def test_an_interrupt_is_not_lost_in_a_callback(monkeypatch):
  """Python only reports what is raised while it collects garbage, and goes on."""
  again = []
  monkeypatch.setattr(runtime.threading, "Timer", lambda seconds, call: again.append(call) or quiet)
  quiet = types.SimpleNamespace(start=lambda: None)
  runtime._unraisable(types.SimpleNamespace(exc_type=KeyboardInterrupt))
  assert again == [runtime._thread.interrupt_main]


def test_an_interrupted_import_is_no_trace(capsys):
  runtime._uncaught(KeyboardInterrupt, KeyboardInterrupt(), None)
  assert capsys.readouterr().err == "stopped\n"


@pytest.mark.parametrize(
  "given, told",
  [
    ("on", "is not off, auto or ADDRESS,COUNT,ID"),
    ("", "is not off, auto or"),
    ("localhost,2,0", "is not off, auto or"),
    ("localhost:9876,2", "is not off, auto or"),
    ("localhost:9876,two,0", "is not off, auto or"),
    ("localhost:9876,2,2", "the 2 processes are numbered from 0 to 1"),
    ("localhost:9876,0,0", "numbered"),
    ("localhost:99999,2,1", "ports are numbered from 1 to 65535"),
    ("http://localhost:9876,2,1", "is not off, auto or"),
    ("no.such.invalid:9876,2,0", "process 0 cannot listen there .* Name this machine"),
  ],
)
def test_processes_that_cannot_be_joined(given, told):
  with pytest.raises(ValueError, match=told):
    processes.join(given)


def test_no_cluster_is_a_sentence(monkeypatch):
  def initialize(**given):
    raise ValueError("coordinator_address should be defined.")

  monkeypatch.setattr("jax.distributed.initialize", initialize)
  with pytest.raises(ValueError, match="--distributed=auto finds no cluster .coordinator_address"):
    processes.join("auto")


def test_a_port_that_is_taken():
  """JAX crashes on it."""
  with socket.create_server(("", 0)) as taken:
    port = taken.getsockname()[1]
    with pytest.raises(ValueError, match=rf"localhost:{port},2,0: .*a port that is free"):
      processes.join(f"localhost:{port},2,0")


def test_nobody_listens(monkeypatch):
  monkeypatch.setattr(processes, "_PATIENCE", 0.0)
  with pytest.raises(ValueError, match="no process 0 listens at localhost:1 .*refused"):
    processes.join("localhost:1,2,1")
