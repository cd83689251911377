"""The generated parts of pages: tables of results, the capability matrix, the API, llms.txt."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "results"
BENCHMARKS = (
  *("attention", "family_step", "feed_forward", "many_adapters", "methods", "processes"),
  *("qlora_long", "qlora_step", "quantization", "together", "traced", "train_step", "whole_run"),
)
# Modules whose public names are in the reference beside those of `peftjax` itself.
MODULES = (
  *("peftjax.linen", "peftjax.nnx", "peftjax.losses", "peftjax.optim", "peftjax.sharding"),
  *("peftjax.core.attachment", "peftjax.nn.feed_forward"),
  *("peftjax.training.settings", "peftjax.training.loop"),
)


def result(name: str) -> Path:
  """The committed results file of that name, in whichever folder it lies.

  Raises:
    ValueError: if there is none, or more than one.
  """
  found = list(RESULTS.rglob(name))
  if len(found) != 1:
    raise ValueError(f"{len(found)} files {name} lie below {RESULTS}; there has to be one")
  return found[0]


def write(folder: Path) -> None:
  """Makes everything that pages include, anew."""
  shutil.rmtree(folder, ignore_errors=True)
  for part in ("tables", "benchmarks", "parts", "api"):
    (folder / part).mkdir(parents=True)
  for name, text in tables().items():
    (folder / "tables" / f"{name}.md").write_text(text)
  for name in BENCHMARKS:
    (folder / "benchmarks" / f"{name}.md").write_text(benchmark(name))
  parts = {"plan": plans(), "claims": claims(), "matrix": matrix(), "interop": interop()}
  for name, text in parts.items():
    (folder / "parts" / f"{name}.md").write_text(text)
  for name, text in api().items():
    (folder / "api" / f"{name}.md").write_text(text)


def tables() -> dict[str, str]:
  """Every table of `experiments.tables`, as that command prints it."""
  from experiments.tables import __main__ as command

  made = {}
  for name in command.NAMES:
    module = command.of(name)
    rows = command.rows(module, result(f"{module.RESULTS}.jsonl"), Path("runs/tables"))
    made[name] = markdown(module.table(rows))
  return made


def markdown(report: Any) -> str:
  from experiments.tables.report import write as write_report

  printed = io.StringIO()
  with contextlib.redirect_stdout(printed):
    write_report(report, "markdown")
  # The line above a table would be a part of it, and each note is a paragraph.
  title, _, rest = printed.getvalue().partition("\n")
  lines = [line.rstrip() for line in rest.splitlines()]
  body = "\n".join(line if line.startswith("|") else f"\n{line}" for line in lines)
  return f"{title.strip()}\n\n{body.strip()}\n"


def benchmark(name: str) -> str:
  from experiments.benchmarks import report

  return report.markdown(str(result(f"{name}.jsonl"))) + "\n"


def plans() -> str:
  from experiments.planning import report

  return report.table(rows("plan.jsonl")) + "\n"


def claims() -> str:
  from experiments.tables.report import Report

  lines = [
    [row["says"], row["verdict"], row.get("correction") or ""] for row in rows("claims.jsonl")
  ]
  counts = {verdict: sum(line[1] == verdict for line in lines) for _, verdict, _ in lines}
  told = ", ".join(f"{verdict}: {count}" for verdict, count in sorted(counts.items()))
  title = f"{len(lines)} claims: {told}"
  clean = [[cell.replace("|", r"\|") for cell in line] for line in lines]
  return markdown(Report(title, ["claim", "verdict", "correction"], clean))


def rows(name: str) -> list[dict[str, Any]]:
  return [json.loads(line) for line in result(name).read_text(encoding="utf-8").splitlines()]


def matrix() -> str:
  """docs/matrix.json as two tables: the contract's laws, and the steps on eight devices."""
  found = json.loads((ROOT / "docs" / "matrix.json").read_text())
  return contract(found) + "\n" + steps(found.get("every_step_test", {}))


def contract(found: dict[str, Any]) -> str:
  """One line per subject of the contract. A law without an outcome stays empty."""
  from experiments.tables.report import Report

  columns = {
    "sharded": "test_law_7_a_sharded_model_computes_the_same",
    "swap, vmap": "test_law_6_vmap_over_two_stacked_adapters_equals_the_two_alone",
    "merge": "test_law_3_merge_preserves_outputs_and_unmerge_gives_the_base_back",
    "PEFT file": "test_law_10_the_files_of_a_method_give_the_model_back",
    "checkpoint": "test_law_8_a_checkpoint_of_the_adapter_and_the_base_restore_the_model",
    "shapes alone": "test_law_9_everything_works_on_shapes_alone",
  }
  together = found["together_test"]
  subjects: dict[str, dict[str, dict[str, str]]] = {}
  for subject, laws in found["method_contract_test"].items():
    name, _, layers = subject.rpartition("-")
    subjects.setdefault(name, {})[layers] = laws
  lines = []
  for name, layouts in subjects.items():
    laws = next(iter(layouts.values()))
    whole = [
      verdict(set(layouts[layers].values()) - {"refused"}) if layers in layouts else ""
      for layers in ("unrolled", "scanned")
    ]
    cells = [verdict([laws[test]]) for test in columns.values()]
    lines.append([name, *whole, *cells, verdict(together.get(name, {}).values())])
  heads = ["subject", "unrolled", "scanned", *columns, "together"]
  return markdown(Report("The contract, on the tiny encoder", heads, lines))


def steps(found: dict[str, dict[str, str]]) -> str:
  """One line per model family and method, one column per base."""
  from experiments.tables.report import Report

  bases = ("float32", "bfloat16", "nf4")
  pairs = dict.fromkeys(tuple(case.rsplit("-", 1)[0].split("-")) for case in found)
  lines = [
    [*pair, *(verdict(found.get("-".join((*pair, base)), {}).values()) for base in bases)]
    for pair in pairs
  ]
  return markdown(
    Report("Two steps on eight devices against one", ["family", "method", *bases], lines)
  )


def interop() -> str:
  """docs/interop.json as a table a section of `tests.interop.rows`."""
  from experiments.tables.report import Report
  from tests.interop.rows import ROWS, Refused, names

  found = json.loads((ROOT / "docs" / "interop.json").read_text())
  made = []
  for section, rows in ROWS.items():
    lines = []
    for what, row in rows.items():
      seen = {test: outcome for test, outcome in found.items() if names(row, test)}
      files = Counter(Path(test.partition("::")[0]).stem for test in seen)
      tests = ", ".join(f"{count} of `{file}`" for file, count in files.items())
      outcome = became(seen.values(), refused=isinstance(row, Refused), tried=bool(row))
      # Sentences of programs, in which nothing is a mark of Markdown.
      lines.append([*(re.sub(r"([*_<`$|\[])", r"\\\1", x) for x in (what, outcome)), tests])
    made.append(markdown(Report(section, ["what", "outcome", "tests"], lines)))
  return "\n".join(made)


def became(outcomes: Iterable[str], *, refused: bool, tried: bool) -> str:
  """What the outcomes of a row's tests say together; the sentence of a refusal."""
  seen = [outcome for outcome in outcomes if outcome != "skipped"]
  sentences = [outcome for outcome in seen if outcome.startswith("refused: ")]
  if not seen:
    return "not run" if tried else "not tried"
  if "failed" in seen or (refused and len(sentences) < len(seen)):
    return "FAILS"
  return sentences[0] if refused else "works"


def verdict(outcomes: Iterable[str]) -> str:
  """The common verdict of several outcomes; "" of none."""
  seen = set(outcomes)
  return next((x for x in ("failed", "refused", "passed", "skipped") if x in seen), "").replace(
    "passed", "yes"
  )


def api() -> dict[str, str]:
  """A page for each part of the package with the names of `peftjax` made there, and for modules."""
  import peftjax

  parts: dict[str, list[str]] = {}
  for name in peftjax.__all__:
    value = getattr(peftjax, name)
    if not isinstance(value, ModuleType):
      parts.setdefault(value.__module__.split(".")[1], []).append(f"peftjax.{name}")
  intro = "Public names of `peftjax` that `peftjax.{}` makes.".format
  pages = {part: page(f"peftjax: {part}", names, intro(part)) for part, names in parts.items()}
  for module in MODULES:
    names = [f"{module}.{name}" for name in public(importlib.import_module(module))]
    told = (importlib.import_module(module).__doc__ or "").strip()
    pages[module.removeprefix("peftjax.")] = page(module, names, told)
  return pages


def public(module: ModuleType) -> list[str]:
  """The functions and classes made in a module, or below it where it is a package."""
  own = lambda x: (
    (inspect.isfunction(x) or inspect.isclass(x)) and x.__module__.startswith(module.__name__)
  )
  return [n for n, x in vars(module).items() if own(x) and not n.startswith("_")]


def page(title: str, names: list[str], intro: str = "") -> str:
  """A reference page: a summary of the names, then each with its docstring."""
  entries = []
  for name in names:
    module, _, attribute = name.rpartition(".")
    is_class = inspect.isclass(getattr(importlib.import_module(module), attribute))
    entries.append(f".. auto{'class' if is_class else 'function'}:: {name}\n")
  summary = "".join(f"   {name}\n" for name in names)
  rest = f".. autosummary::\n\n{summary}\n" + "\n".join(entries)
  return f"# {title}\n\n{intro}\n\n```{{eval-rst}}\n{rest}```\n"


def write_llms(app: Any, error: Exception | None) -> None:
  """llms.txt beside the built pages: each by title, with its source."""
  if error is not None or app.builder.format != "html":
    return
  from docutils import nodes

  import peftjax

  lines = ["# peftjax", "", f"> {(peftjax.__doc__ or '').strip()}", "", "## Pages", ""]
  for name in sorted(app.env.found_docs):
    tree = app.env.get_doctree(name)
    first = next(iter(tree.findall(nodes.paragraph)), None)
    told = " ".join(first.astext().split())[:160] if first else ""
    title = app.env.titles[name].astext()
    suffix = Path(app.env.doc2path(name)).suffix
    lines.append(f"- [{title}](_sources/{name}{suffix}.txt): {told}")
  (Path(app.outdir) / "llms.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
