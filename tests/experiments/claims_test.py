"""`experiments.claims`: the cheap claims hold, and a verdict that changes is not missed."""

import importlib
import json

import pytest

from experiments.claims import catalogue
from experiments.claims.claim import CORRECTED, FAILS, HOLDS, VERDICTS, Claim, claim, found

CHEAP = (
  r"^backprop\.|lora\.(param|break|shape)|scaling\.alpha_over|finetuning\.|^memory\.|quantiles"
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
    assert each.name == f"{each.run.__module__.rpartition('.')[2]}.{each.run.__name__}"
    if each.expected != HOLDS:
      assert len(each.says) > 5


def test_no_claim_is_left_out():
  """A function with the decorator is in its file's list, and the file in the catalogue."""
  listed = set(catalogue.CLAIMS)
  for theme in {each.run.__module__ for each in catalogue.CLAIMS}:
    module = importlib.import_module(theme)
    assert {x for x in vars(module).values() if isinstance(x, Claim)} <= listed


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
