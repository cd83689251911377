"""Table `parameters`: what the papers print is counted again, and what cannot be is named."""

import jax
import pytest

import peftjax as pj
from experiments.tables import abstract_models, cells, counts, parameters, report
from experiments.tables.printed_counts import ROWS

# By the papers' own formulas: 2 L d r for each pair of factors, 2 m d + d + m for each adapter.
KNOWN = {
  "LoRA table 2, RoBERTa-base, LoRA": 2 * 2 * 12 * 768 * 8,
  "LoRA table 2, RoBERTa-large, LoRA": 2 * 2 * 24 * 1024 * 8,
  "LoRA table 2, RoBERTa-large, AdptH, size 8": 48 * (2 * 1024 * 8 + 8 + 1024),
  "LoRA table 2, RoBERTa-large, AdptP, size 16": 24 * (2 * 1024 * 16 + 16 + 1024),
  "LoRA table 2, DeBERTaV2-XXL, LoRA": 2 * 2 * 48 * 1536 * 8,
  "LoRA table 3, GPT-2 M, LoRA": 393_216,
  "LoRA table 3, GPT-2 L, LoRA": 737_280,
  "LoRA table 4, GPT-3 175B, LoRA, r = 8": 2 * 2 * 96 * 12288 * 8,
  "AdaLoRA table 1, DeBERTaV3-base, HAdapter, d = 32": 24 * (2 * 768 * 32 + 32 + 768),
  "AdaLoRA table 1, DeBERTaV3-base, PAdapter, d = 16": 12 * (2 * 768 * 16 + 16 + 768),
  "AdaLoRA table 1, DeBERTaV3-base, LoRA, r = 8": 1_327_104,
  "AdaLoRA table 1, DeBERTaV3-base, LoRA, r = 2": 331_776,
  "AdaLoRA table 1, DeBERTaV3-base, AdaLoRA, b = 576": 1_327_104 + 576,
  "IA3 table 4, T0-3B, IA3": 24 * (2 * 2048 + 5120) + 24 * (4 * 2048 + 5120),
}
# Of the released checkpoints, as published.
SIZES = {
  "GPT-2 M": 354_823_168,
  "GPT-2 L": 774_030_080,
  "BERT-large": 335_141_888,
  "LLaMA-7B": 6_738_415_616,
  "LLaMA-13B": 13_015_864_320,
  "LLaMA3-8B": 8_030_261_248,
  "DeBERTaV3-base": 183_831_552,
  "BART-large": 406_291_456,
}
# Source, model and method of every number that is not what the paper says was done.
MISPRINTS = {
  "LoRA table 2, DeBERTaV2-XXL, LoRA",
  "LoRA table 3, GPT-2 M, FT",
  "LoRA table 3, GPT-2 M, LoRA",
  "LoRA table 3, GPT-2 L, LoRA",
  "AdaLoRA table 1, DeBERTaV3-base, HAdapter, d = 32",
  *(f"AdaLoRA table 2, DeBERTaV3-base, LoRA, r = {r}" for r in (1, 2, 4)),
  "DoRA table 1, LLaMA3-8B, DoRA†, r = 16",
  "IA3 table 4, T0-3B, LoRA, r = 4",
  "He table 6, BART-large, LoRA (ffn), r = 102",
}


_ALL = pytest.mark.slow(reason="counts each of the 89 rows anew: 20 s")


@pytest.fixture(scope="module", params=["known", pytest.param("all", marks=_ALL)])
def rows(request):
  return {row.cell: row.run() for row in ROWS if request.param == "all" or row.cell in KNOWN}


def test_every_row_has_a_cell_of_its_own(tmp_path):
  names = {row.cell for row in ROWS}
  assert len(names) == len(ROWS) == len({cell.name for cell in parameters.cells(tmp_path)})
  assert {*KNOWN, *MISPRINTS} <= names


@pytest.mark.fast_for("GPT-2 L|LLaMA-7B|DeBERTaV3-base|BART-large")
@pytest.mark.parametrize("name", SIZES)
def test_abstract_model_has_the_size_of_the_release(name):
  params = abstract_models.shapes_of(name).params
  assert pj.count(params) == SIZES[name]
  assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(params))


def test_counts_are_those_of_the_formulas(rows):
  assert {name: rows[name]["count"] for name in KNOWN} == KNOWN


def test_misprints_are_flagged_and_no_others(rows):
  assert {name for name, row in rows.items() if row["verdict"] == "misprint"} == MISPRINTS & {*rows}


def test_agreeing_rows_print_the_paper_s_number(rows):
  """To the last digit, unless digits were cut off."""
  for row in rows.values():
    if row["verdict"] in ("exact", "rounds"):
      assert row["ours"].replace(",", "") == row["printed"].replace(",", "")
    elif row["verdict"] == "cut":
      assert row["ours"] != row["printed"]


def test_what_does_not_agree_says_why(rows):
  """In words, or by another setting that does print the paper's number."""
  for row in rows.values():
    if row["verdict"] not in ("exact", "rounds", "cut"):
      assert row["note"] or row["meant"]["verdict"]


@pytest.mark.parametrize(
  ("printed", "count", "whole", "expected"),
  [
    ("65,536", 65_536, 1, ("65,536", "exact")),
    ("0.3M", 294_912, 1, ("0.3M", "rounds")),
    ("1.18M", 1_189_632, 1, ("1.19M", "cut")),
    ("0.35M", 393_216, 1, ("0.39M", "")),
    ("0.84%", 8_385, 1_000_000, ("0.84%", "rounds")),
    ("3B", 2_849_757_184, 1, ("3B", "rounds")),
    ("540K", 540_000, 1, ("540K", "exact")),
  ],
)
def test_verdict(printed, count, whole, expected):
  assert counts.verdict(printed, count, whole) == expected


def test_what_is_no_number_raises():
  with pytest.raises(ValueError, match="about 3M"):
    counts.verdict("about 3M", 1, 1)


def test_table_goes_through_cells(tmp_path, capsys, monkeypatch):
  """A row is a cell: counted once, kept as a line, written with its note."""
  chosen = [row for row in ROWS if row.source == "LoRA table 2" and "DeBERTa" in row.model]
  monkeypatch.setattr(parameters, "ROWS", chosen)
  made = cells.compute(parameters.cells(tmp_path), tmp_path / "parameters.jsonl")
  for form in report.FORMATS:
    report.write(parameters.table(made), form)
    assert "misprint" in capsys.readouterr().out
  assert parameters.table(made).notes == ["1: 4.7M is r = 16, as in the scripts: 4,718,592."]
