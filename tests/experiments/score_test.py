"""E2E's records, and scores of written texts by the libraries."""

import importlib.util
import json

import pytest

from peftjax import data
from peftjax.data import e2e
from peftjax.training import text_scores

MISSING = not all(importlib.util.find_spec(name) for name in ("sacrebleu", "rouge_score"))
needs_scores = pytest.mark.skipif(MISSING, reason="sacrebleu and rouge-score are not installed")
E2E = """mr,ref
"name[Blue Spice], eatType[coffee shop]","A coffee shop by the river, Blue Spice."
"name[Blue Spice], eatType[coffee shop]",Blue Spice is a coffee shop by the river.
"name[Bibimbap House], near[Clare Hall]",Bibimbap House lies near Clare Hall.
"""


@pytest.fixture
def file(tmp_path):
  (tmp_path / "set.csv").write_text(E2E)
  return str(tmp_path / "set.csv")


def test_e2e_s_files_are_prompts_and_completions(file, tmp_path):
  """In the splits of the three files; the completion begins with a space."""
  corpus = e2e.read({"train": file})
  first = "name : Blue Spice | eatType : coffee shop ||"
  assert corpus.splits["train"].texts[0] == first
  assert corpus.splits["train"].pairs[1] == " Blue Spice is a coffee shop by the river."
  with pytest.raises(ValueError, match="the record 'Blue Spice' is none of E2E's"):
    e2e.prompt("Blue Spice")
  with pytest.raises(ValueError, match="'e2e' has no classes"):
    data.load("e2e", seed=0, train_file=file)


def test_a_separator_is_put_behind_prompts(tmp_path):
  """As between a document and its summary, in XSum's fields."""
  names = ("train", "validation", "test")
  for name in names:
    rows = [{"document": f"{name} {i}", "summary": "s", "id": "1"} for i in range(3)]
    (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  files = {f"{name}_file": str(tmp_path / f"{name}.jsonl") for name in names}
  columns = dict(text_column="document", pair_column="summary", label_column=None)
  corpus = data.load("files", seed=0, **files, **columns, between="\nTL;DR:")
  assert corpus.splits["test"].texts == [f"test {i}\nTL;DR:" for i in range(3)]
  assert corpus.splits["test"].pairs == ["s"] * 3


def test_references_are_grouped_by_source(file):
  sources, references = text_scores.grouped(file, "mr", "ref")
  assert len(sources) == 2 and [len(own) for own in references] == [2, 1]


@needs_scores
def test_scores_of_the_libraries(file):
  """A text that is one of its references scores full; case counts but for E2E."""
  _, references = text_scores.grouped(file, "mr", "ref")
  texts = [references[0][1], references[1][0]]
  assert text_scores.bleu(texts, references)["bleu"] == pytest.approx(100)
  assert text_scores.rouge(texts, references) == pytest.approx(
    dict(rouge1=100, rouge2=100, rougeL=100, rougeLsum=100)
  )
  lower = [text.lower() for text in texts]
  assert text_scores.bleu(lower, references)["bleu"] < 90
  assert text_scores.e2e(lower, references) == pytest.approx(dict(bleu=100, rougeL=100))


@needs_scores
def test_the_command_scores_files(command, file, tmp_path, capsys, fails):
  _, references = text_scores.grouped(file, "mr", "ref")
  path = tmp_path / "written.jsonl"
  path.write_text("".join(json.dumps({"prompt": "", "text": own[0]}) + "\n" for own in references))
  flags = dict(references=file, source="mr", target="ref", metric="bleu")
  command("score", predictions=str(path), **flags)
  assert json.loads(capsys.readouterr().out)["bleu"] == pytest.approx(100)
  (tmp_path / "lines.txt").write_text("one\n")
  message = fails("score", predictions=str(tmp_path / "lines.txt"), **flags)
  assert "has 1 texts" in message and "has 2 different 'mr'" in message


def test_without_the_libraries_it_says_what_to_install(monkeypatch):
  monkeypatch.setitem(__import__("sys").modules, "sacrebleu.metrics", None)
  with pytest.raises(ValueError, match=r"sacrebleu is not installed: pip install 'peftjax\[scores"):
    text_scores.bleu(["a"], [["a"]])
