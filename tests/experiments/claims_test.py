"""`experiments.claims`: the cheap claims hold, and a verdict that changes is not missed."""

import ast
import importlib
import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import pytest

from experiments.claims import adalora, catalogue, finetuning, results
from experiments.claims.claim import CORRECTED, FAILS, HOLDS, VERDICTS, Claim, by_test, claim, found
from experiments.claims.products import products_like
from experiments.sweeping import trials
from experiments.tables import methods, qlora_vs_lora, rank_budget, runs

CHEAP = (
  r"^backprop\.|lora\.(param|break|shape)|finetuning\.|better_than|^memory\."
  r"|quantiles|formula$"
)


@pytest.fixture
def claims_command(command, monkeypatch):
  """Runs the command over some claims, by default all; SystemExit's code."""

  def run(claims=None, only="", results=""):
    if claims is not None:
      monkeypatch.setattr(catalogue, "CLAIMS", tuple(claims))
    try:
      command("claims.__main__", only=only, results=results)
    except SystemExit as ended:
      return ended.code
    return 0

  return run


def made(name, holds, expected):
  return Claim(name, "it is so", "a look", "it is", expected, lambda: found({"n": 1}, holds=holds))


def failing():
  raise RuntimeError("no model")


def test_every_claim_has_its_fields():
  names = [claim.name for claim in catalogue.CLAIMS]
  assert len(set(names)) == len(names) > 60
  for each in catalogue.CLAIMS:
    assert each.expected in VERDICTS
    assert min(map(len, (each.says, each.measured_by, each.holds_if))) > 5
    if each.tests:
      continue
    assert each.name == f"{each.run.__module__.rpartition('.')[2]}.{each.run.__name__}"
    if each.expected == CORRECTED:
      assert "mended" in each.holds_if, each.name


def test_every_test_that_a_claim_names_exists():
  cited = [(each.name, test) for each in catalogue.CLAIMS for test in each.tests]
  assert len(cited) > 10
  for name, test in cited:
    path, function = test.split("::")
    tree = ast.parse((pathlib.Path(__file__).parents[2] / path).read_text())
    assert function in {x.name for x in tree.body if isinstance(x, ast.FunctionDef)}, name


def test_a_claim_by_a_test_is_computed_nowhere():
  made = by_test("a.b", says="it is so", tests=("tests/a_test.py::test_b",), verdict=FAILS)
  assert made.measured_by == "by tests/a_test.py::test_b" and made.holds_if == "it passes"
  assert made.run().verdict == made.expected == FAILS and not made.run().numbers


def test_the_committed_rows_are_those_of_the_catalogue():
  """`make claims ARGS=--results=experiments/results/claims/claims.jsonl` writes them."""
  path = results.FOLDER.parent / "claims" / "claims.jsonl"
  lines = path.read_text(encoding="utf-8").splitlines()
  fields = ("name", "says", "measured_by", "holds_if")
  written = [(*(row[f] for f in fields), row["verdict"]) for row in map(json.loads, lines)]
  assert written == [(*(getattr(c, f) for f in fields), c.expected) for c in catalogue.CLAIMS]


def test_no_claim_is_left_out():
  """A function with the decorator is in its file's list, and the file in the catalogue."""
  listed = set(catalogue.CLAIMS)
  for theme in {each.name.partition(".")[0] for each in catalogue.CLAIMS}:
    module = importlib.import_module(f"experiments.claims.{theme}")
    assert {x for x in vars(module).values() if isinstance(x, Claim)} <= listed


@pytest.mark.slow(reason="every cheap claim, 10 s")
def test_cheap_claims_are_as_expected(claims_command, capsys):
  assert claims_command(only=CHEAP) == 0
  out = capsys.readouterr().out
  assert "CHANGED" not in out and "lora.parameter_count" in out


def test_only_picks_by_name(claims_command, tmp_path, capsys):
  path = tmp_path / "claims.jsonl"
  claims = [made("one.a", True, HOLDS), made("one.b", True, HOLDS), made("two.a", False, FAILS)]
  assert claims_command(claims, only="^one", results=str(path)) == 0
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  assert [row["name"] for row in rows] == ["one.a", "one.b"]
  assert {"command", "commit", "machine", "versions", "numbers", "expected"} <= set(rows[0])
  assert "two.a" not in capsys.readouterr().out


def test_only_leaves_the_other_rows_of_the_file(claims_command, tmp_path):
  path = tmp_path / "claims.jsonl"
  claims = [made("one.a", True, HOLDS), made("one.b", True, HOLDS), made("two.a", False, FAILS)]
  assert claims_command(claims[1:], results=str(path)) == 0
  before = path.read_text().splitlines()
  assert claims_command(claims, only="one.a", results=str(path)) == 0
  assert path.read_text().splitlines()[1:] == before
  claims[2] = made("two.a", True, FAILS)
  assert claims_command(claims, only="two", results=str(path)) == 1
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  assert [row["name"] for row in rows] == ["one.a", "one.b", "two.a"]
  assert [row["verdict"] for row in rows] == [HOLDS, HOLDS, HOLDS]


@pytest.mark.parametrize("only, message", [("nothing", "found in no name"), ("(", "regular expr")])
def test_an_only_that_picks_nothing_says_so(claims_command, only, message, capsys):
  assert claims_command([made("one.a", True, HOLDS)], only=only) == 1
  assert message in capsys.readouterr().err


@pytest.mark.parametrize("holds, expected", [(True, FAILS), (False, HOLDS), (True, CORRECTED)])
def test_a_changed_verdict_fails_and_is_named(claims_command, holds, expected, capsys):
  claims = [made("same.a", True, HOLDS), made("other.b", holds, expected)]
  assert claims_command(claims) == 1
  out = capsys.readouterr().out
  assert "CHANGED other.b" in out and "CHANGED same.a" not in out


def test_a_claim_that_cannot_be_measured_fails_and_the_rest_go_on(claims_command, capsys):
  broken = Claim("broken.a", "it is so", "a look", "it is", HOLDS, failing)
  assert claims_command([broken, made("same.a", True, HOLDS)]) == 1
  out = capsys.readouterr().out
  assert "CHANGED broken.a: 'RuntimeError: no model'" in out and "same.a" in out


def test_brackets_are_shown_and_numbers_may_be_none(claims_command, capsys):
  numbers = {"share of [n]": float("nan"), "[b]most[/b]": float("inf")}
  finding = lambda: found(numbers, holds=False, mended=True, correction="[/red] too")
  claims = [Claim("odd.a", "in [bold]", "of [n]", "[0, 1]", HOLDS, finding)]
  claims.append(Claim("odd.b", "in [bold]", "of [n]", "[0, 1]", HOLDS, bracketed))
  assert claims_command(claims) == 1
  out = capsys.readouterr().out
  shown = ("in [bold]", "of [n]", "[0, 1]", "share of [n]: nan", "[b]most[/b]: inf", "[/red] too")
  for text in (*shown, "KeyError: '[red]'"):
    assert text in out


def bracketed():
  raise KeyError("[red]")


def lines_of(wanted, accuracy):
  """Results of trials, as the tables write them, with `accuracy(number)` of three seeds."""
  made = trials.expand(runs.sweep(wanted))
  return [
    {
      "config": json.loads(one.config.to_json()),
      "metrics": {"test": {"accuracy": accuracy(i % len(wanted))[one.config.seed]}},
      "trainable_params": 1,
    }
    for i, one in enumerate(made)
  ]


@pytest.fixture
def committed(tmp_path, monkeypatch):
  """Writes results files in place of the committed ones."""
  monkeypatch.setattr(results, "FOLDER", tmp_path)

  def write(name, lines):
    (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

  return write


@pytest.mark.parametrize(
  "ahead, spread, verdict",
  [(0.03, 0.001, HOLDS), (0.01, 0.001, CORRECTED), (0.01, 0.03, FAILS), (-0.01, 0.001, FAILS)],
)
def test_adalora_is_compared_at_equal_and_at_twice_the_budget(committed, ahead, spread, verdict):
  """LoRA gains 0.02 by twice the budget."""
  wanted, scores = [], []
  for i, budget in enumerate(rank_budget.BUDGETS):
    own = 0.6 + 0.02 * i + ahead
    wanted += [of(rank_budget.DATA, budget) for of in (methods.lora_all, methods.adalora)]
    scores += [[0.6 + 0.02 * i] * 3, [own - spread, own, own + spread]]
  committed("trials", lines_of(wanted, scores.__getitem__))
  assert adalora.better_than_lora.run().verdict == verdict


@pytest.mark.parametrize(
  "few, every, over, verdict",
  [
    (0.95, 1.0, 1.01, HOLDS),
    (0.8, 1.0, 1.01, CORRECTED),
    (0.95, 1.0, 1.05, FAILS),
    (0.95, 0.8, 1.01, FAILS),
  ],
)
def test_lora_is_compared_with_what_full_fine_tuning_gains(committed, few, every, over, verdict):
  share = {"head only": 0.0, "full fine-tuning": 1.0}
  share |= dict(zip(finetuning.LORAS, (few, every), strict=True))
  pairs = [(line, data) for line in methods.LINES if line.name in share for data in methods.CORPORA]
  wanted = [line.of(data) for line, data in pairs]
  committed("trials", lines_of(wanted, lambda i: [0.6 + 0.2 * share[pairs[i][0].name]] * 3))
  value = {"full fine-tuning": 20.0, "LoRA, dense": 20.0 * over}
  names = itertools.cycle(base.name for base in qlora_vs_lora.BASES)
  line = lambda one, name: {
    "config": json.loads(one.config.to_json()),
    "metrics": {"test": {"perplexity": value.get(name, 90.0)}},
  }
  made = trials.expand(qlora_vs_lora.get_config())
  committed("qlora_vs_lora", list(map(line, made, names)))
  assert finetuning.near_full.run().verdict == verdict


def test_a_run_that_is_missing_is_named_with_its_command(committed):
  made = trials.expand(rank_budget.get_config())
  lines = [{"config": json.loads(one.config.to_json())} for one in made]
  committed("trials", lines[:-2])
  with pytest.raises(ValueError, match="2 runs .* lora-rank8-seed2.*`python -m .* rank_budget`"):
    adalora.better_than_lora.run()
  committed("trials", [*lines, lines[0]])
  with pytest.raises(ValueError, match="line 25 is the run of .* line 1 again"):
    adalora.better_than_lora.run()


def test_weight_gradients_are_found_in_inner_programs():
  w, x = jnp.ones((3, 5)), jnp.ones((7, 3))
  step = jax.checkpoint(lambda w, x: jax.lax.map(lambda row: (row[None] @ w)[0], x).sum())
  loss = jax.jit(lambda w, x: jax.lax.cond(x.sum() > 0, step, lambda w, x: 0.0, w, x))
  assert products_like([w], loss, w, x) == 0
  assert products_like([w], jax.grad(loss), w, x) == 1
  assert products_like([w.T], jax.grad(loss), w, x) == 1
  assert products_like([w], jax.grad(loss, argnums=1), w, x) == 0


def test_verdicts_come_from_the_rule():
  verdict = lambda **rule: found({}, correction="mended", **rule).verdict
  assert verdict(holds=True) == HOLDS
  assert verdict(holds=False, mended=True) == CORRECTED
  assert verdict(holds=False) == FAILS
  assert found({}, holds=True, correction="mended").correction == ""


def test_the_decorator_names_a_claim_by_its_place():
  @claim(says="it is so", measured_by="a look", holds_if="it is", expected=HOLDS)
  def here():
    return found({"n": 1}, holds=True)

  assert here.name == "claims_test.here" and here.run().verdict == HOLDS
