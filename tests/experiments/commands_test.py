"""Commands on a tiny model: train, predict, quickstart's helpers, benchmark rows."""

import json
import shutil
import types

import numpy as np
import pytest

from configs.classify import get_config
from experiments.benchmarks import batch, report
from peftjax.data import tokenizer_digest
from peftjax.training import predict
from peftjax.training.predict import Predictor
from tests.experiments.conftest import load


def test_train_prints_its_result(trained):
  """The last thing printed is the result in short, and where all of it is."""
  workdir, printed = trained
  result = json.loads((workdir / "result.json").read_text())
  shown = ("method", "trainable_params", "total_params", "metrics", "best_step", "seconds")
  text = printed[printed.index("\n{\n") : printed.rindex("}") + 1]
  assert json.loads(text) == {key: result[key] for key in shown}
  assert str(workdir / "result.json") in printed


def test_predict_labels_texts_of_flag_and_file(trained, command, capsys, tmp_path):
  """A line a text: label, probability, text; all probabilities go to the JSON lines."""
  (tmp_path / "texts.txt").write_text("the goal in the league cup\n\n  the bank and the market \n")
  given = dict(
    workdir=str(trained[0]), text=["new software"], pair=[], file=str(tmp_path / "texts.txt")
  )
  command("predict", **given, output=str(tmp_path / "out.jsonl"))
  texts = ["new software", "the goal in the league cup", "the bank and the market"]
  lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
  rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
  assert [line[2] for line in lines] == [row["text"] for row in rows] == texts
  for line, row in zip(lines, rows, strict=True):
    p = row["probabilities"]
    assert list(p) == ["business", "sport", "tech"]
    assert sum(p.values()) == pytest.approx(1, abs=1e-5)
    assert line[0] == row["label"] == max(p, key=p.get)
    assert line[1] == f"{max(p.values()):.3f}"
  # One text at a time and all at once are the same, whatever they are padded to.
  predictor = Predictor(trained[0])
  alone = np.concatenate([predictor.logits([text]) for text in texts])
  np.testing.assert_allclose(predictor.logits(texts), alone, atol=1e-5)


def test_predict_tags_words(command, capsys, monkeypatch, tmp_path):
  """A word and its tag a line, as in the files that it was trained on."""
  run = types.SimpleNamespace(
    settings=types.SimpleNamespace(task="tag"),
    columns=["text"],
    tags=lambda texts: [["B-PER" if word.istitle() else "O" for word in t.split()] for t in texts],
  )
  monkeypatch.setattr(predict, "Predictor", lambda workdir, factory: run)
  given = dict(workdir="run", text=["Peter left", "ok"], pair=[], file=None)
  command("predict", **given, output=str(tmp_path / "out.jsonl"))
  assert capsys.readouterr().out == "Peter\tB-PER\nleft\tO\n\nok\tO\n\n"
  rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
  assert rows[0] == {"words": ["Peter", "left"], "tags": ["B-PER", "O"]}


def test_predict_refuses_another_base(trained, fails, model_dir, monkeypatch):
  """A run does not predict with weights it was not trained on."""
  monkeypatch.setattr("peftjax.training.workdir.digest", lambda directory: "another")
  message = fails("predict", workdir=str(trained[0]), text=["a"], pair=[], file=None, output=None)
  assert str(model_dir) in message


def test_predict_refuses_another_tokenizer(trained, fails, model_dir):
  """The weights are the same, and texts would be other tokens; a chat template is none of it."""
  path, before = model_dir / "tokenizer_config.json", tokenizer_digest(model_dir)
  try:
    path.write_text(json.dumps({"chat_template": "x"}))
    assert tokenizer_digest(model_dir) == before
    path.write_text(json.dumps({"do_lower_case": False, "tokenizer_class": "BertTokenizer"}))
    message = fails("predict", workdir=str(trained[0]), text=["a"], pair=[], file=None, output=None)
  finally:
    path.unlink()
  assert "another tokenizer" in message and str(model_dir) in message


def test_predict_without_a_run(fails, tmp_path):
  """A folder without a run is named, with the command that makes one; it is not created."""
  message = fails(
    "predict", workdir=str(tmp_path / "none"), text=["a text"], pair=[], file=None, output=None
  )
  assert str(tmp_path / "none") in message and "experiments.train" in message
  assert not (tmp_path / "none").exists()


def test_predict_before_the_first_evaluation(fails, trained, tmp_path):
  """A run that stopped before it was evaluated is no run yet."""
  (tmp_path / "checkpoints" / "best").mkdir(parents=True)
  shutil.copy(trained[0] / "config.json", tmp_path)
  message = fails(
    "predict", workdir=str(tmp_path), text=["a text"], pair=[], file=None, output=None
  )
  assert "no evaluated run" in message


def test_predict_without_a_text(fails, tmp_path):
  """No text is a message and not an empty answer."""
  message = fails("predict", workdir=str(tmp_path), text=[], pair=[], file=None, output=None)
  assert "--text" in message and "--file" in message


@pytest.mark.parametrize(
  ("content", "named"), [(None, "texts.txt"), (b"na\xefve", "UTF-8"), (b"\n \n", "no text")]
)
def test_predict_from_a_bad_file(fails, tmp_path, content, named):
  """A file that is missing, in another encoding or empty is a message."""
  path = tmp_path / "texts.txt"
  if content is not None:
    path.write_bytes(content)
  assert named in fails(
    "predict", workdir=str(tmp_path), text=[], pair=[], file=str(path), output=None
  )


class Single:
  """Stands for a predictor of a run on single texts."""

  labels, columns = ["no", "yes"], ["text"]
  settings = types.SimpleNamespace(task="classify")

  def __init__(self, workdir, factory=None):
    pass

  def logits(self, texts, pairs):
    return np.array([[0.0, len(text)] for text in texts])


class Pairs(Single):
  """Stands for one of a run on pairs."""

  columns = ["one", "two"]

  def logits(self, texts, pairs):
    return np.array([[0.0, len(a) - len(b)] for a, b in zip(texts, pairs, strict=True)])


def test_predict_reads_the_columns_of_its_run(command, capsys, monkeypatch, tmp_path):
  """Of a table no row is left out; of lines the empty ones are, which is said."""
  monkeypatch.setattr("peftjax.training.predict.Predictor", Single)
  given = dict(workdir="w", text=[], pair=[], output=None)
  (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbfid,text\n1,"the goal,\nthe cup"\n2,\n')
  (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "the goal"}\n{"text": ""}\n')
  (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfthe goal\r\n \r\nthe cup\rthe bank")
  texts = {
    "a.csv": ["the goal, the cup", ""],
    "a.jsonl": ["the goal", ""],
    "a.txt": ["the goal", "the cup", "the bank"],
  }
  for name, wanted in texts.items():
    command("predict", **given, file=str(tmp_path / name))
    out, err = capsys.readouterr()
    assert [line.split("\t")[2] for line in out.splitlines()] == wanted
    assert err == (f"1 empty lines of {tmp_path / name} are left out\n" if name == "a.txt" else "")


@pytest.mark.parametrize(
  ("content", "named"),
  [
    ("body\nx\n", "no column 'text'"),
    ("text,text\na,b\n", "'text' 2 times"),
    ("text\n", "no exam"),
  ],
)
def test_predict_from_a_bad_table(fails, monkeypatch, tmp_path, content, named):
  monkeypatch.setattr("peftjax.training.predict.Predictor", Single)
  (tmp_path / "a.csv").write_text(content)
  given = dict(workdir="w", text=[], pair=[], output=None)
  assert named in fails("predict", **given, file=str(tmp_path / "a.csv"))


def test_predict_labels_pairs(command, capsys, monkeypatch, tmp_path):
  """From flags and from the run's columns, both texts on a line."""
  monkeypatch.setattr("peftjax.training.predict.Predictor", Pairs)
  (tmp_path / "a.tsv").write_text("two\tone\nb\tlonger\n")
  command(
    "predict",
    workdir="w",
    text=["a"],
    pair=["much"],
    file=str(tmp_path / "a.tsv"),
    output=str(tmp_path / "out.jsonl"),
  )
  lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
  assert [(x[0], *x[2:]) for x in lines] == [("no", "a", "much"), ("yes", "longer", "b")]
  row = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[1])
  assert (row["text"], row["pair"], row["label"]) == ("longer", "b", "yes")


@pytest.mark.parametrize(
  ("given", "named"),
  [
    (dict(text=["a"]), ["--pair=SECOND", "'one' and 'two'"]),
    (dict(text=["a", "b"], pair=["c"]), ["2 --text and 1 --pair"]),
    (dict(file="a.txt"), [".csv, .tsv or .jsonl", "'one' and 'two'"]),
    (dict(file="a.csv"), ["no column 'two'"]),
  ],
)
def test_a_run_on_pairs_takes_no_single_texts(fails, monkeypatch, tmp_path, given, named):
  monkeypatch.setattr("peftjax.training.predict.Predictor", Pairs)
  monkeypatch.chdir(tmp_path)
  (tmp_path / "a.txt").write_text("a\n")
  (tmp_path / "a.csv").write_text("one\na\n")
  message = fails(
    "predict", **{**dict(workdir="w", text=[], pair=[], file=None, output=None), **given}
  )
  assert all(part in message for part in named)


def test_a_run_on_single_texts_takes_no_pairs(fails, trained):
  given = dict(workdir=str(trained[0]), text=["a"], pair=["b"], file=None, output=None)
  assert "leave --pair out" in fails("predict", **given)
  with pytest.raises(ValueError, match="trained on single texts"):
    Predictor(trained[0]).logits(["a"], ["b"])


def test_predict_says_before_its_work_where_it_cannot_write(fails, tmp_path):
  (tmp_path / "in.txt").write_text("a\n")
  given = dict(workdir="w", text=[], pair=[], file=str(tmp_path / "in.txt"))
  for output, named in (
    (tmp_path, "cannot"),
    (tmp_path / "no" / "x", "cannot"),
    ("in.txt", "read"),
  ):
    assert named in fails("predict", **given, output=str(tmp_path / output))
  assert (tmp_path / "in.txt").read_text() == "a\n"


RESULT = {
  "trainable_params": 10,
  "total_params": 1000,
  "metrics": {"test": {"accuracy": 0.95, "macro_f1": 0.94}, "validation": {}},
  "seconds": 12.345,
}


def test_quickstart_summary_row():
  """A row of summary.json: method, counts, test scores, seconds."""
  assert load("quickstart").summary_row("lora", RESULT) == {
    "method": "lora",
    "trainable_params": 10,
    "total_params": 1000,
    "accuracy": 0.95,
    "macro_f1": 0.94,
    "seconds": 12.3,
  }


def test_quickstart_runs_its_three_methods(monkeypatch, tmp_path, command, capsys):
  """It trains LoRA, head only and in full on BBC, writes table and curves, shows how to predict."""
  called = []

  def pretend(config, workdir, **options):
    called.append((config.method.to_dict(), config.data.name))
    workdir.mkdir(parents=True)
    rows = [{"step": s, "loss": 1 / s} for s in (1, 2)] + [{"step": 2, "validation_accuracy": 0.9}]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return RESULT

  monkeypatch.setattr("peftjax.training.loop.train_and_evaluate", pretend)
  command("quickstart", workdir=str(tmp_path / "quick"))
  names = ["lora", "head", "full"]
  assert called == [
    (get_config(f"method={name},data=bbc").method.to_dict(), "bbc") for name in names
  ]
  summary = json.loads((tmp_path / "quick" / "summary.json").read_text())
  assert [row["method"] for row in summary["rows"]] == names
  png = (tmp_path / "quick" / "learning_curves.png").read_bytes()
  assert png.startswith(b"\x89PNG\r\n\x1a\n") and len(png) > 5_000
  printed = capsys.readouterr().out
  assert "0.9500" in printed and "experiments.predict --workdir=" in printed


def test_benchmark_rows(tmp_path, capsys):
  """A row has the promised fields; the ratio is the peer's cost over ours; a file is added to."""
  rows = [report.Row("step_full", 50.0, 100.0, "ms"), report.Row("peak_mem", 200.0, 100.0, "MiB")]
  report.show("title", rows)
  assert "step_full" in capsys.readouterr().out
  for _ in range(2):
    report.write(str(tmp_path / "out.jsonl"), rows)
  lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
  assert [line["ratio"] for line in lines] == [2.0, 0.5] * 2
  for line in lines:
    assert {"case", "ours", "peer", "unit", "ratio", "machine", "versions"} <= set(line)
  assert lines[0]["versions"]["jax"] and "cores" in lines[0]["machine"]


def test_benchmark_batch_is_the_same_for_both_sides():
  """Both sides' processes draw the same batch, full of real tokens."""
  first, second = batch.example(4, 8), batch.example(4, 8)
  for name, array in first.items():
    np.testing.assert_array_equal(array, second[name])
  assert first["tokens"].shape == (4, 8) and first["mask"].all()
