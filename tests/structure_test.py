"""The structure that the architecture page draws: imports go one way, files stay short."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Each imports only from those before it, and within itself.
LAYERS = (
  *("core", "quant", "losses", "collectives", "io", "data", "nn", "optim", "sharding", "methods"),
  *("tree", "linen", "nnx", "models", "describe", "hf_peft", "training", "__init__"),
)
TREES = {
  path.relative_to(ROOT): ast.parse(path.read_text())
  for top in ("peftjax", "experiments", "configs")
  for path in sorted((ROOT / top).rglob("*.py"))
}
OURS = ("peftjax.", "experiments.", "configs.")
# Of named tuples and of the standard library: public in spite of their names.
PUBLIC = {"_replace", "_fields", "_asdict", "_exit"}


def imported(tree: ast.AST) -> Iterator[str]:
  """The modules and names that are imported, as `peftjax.core.paths`."""
  for node in ast.walk(tree):
    if isinstance(node, ast.ImportFrom) and node.module:
      yield from (f"{node.module}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)


def test_imports_go_one_way():
  for path, tree in TREES.items():
    top, here, *_ = path.with_suffix("").parts
    for name in imported(tree):
      other, _, rest = name.partition(".")
      if other in ("experiments", "configs", "tests"):
        assert top != "peftjax" and other != "tests", (path, name)
      if other == top == "peftjax":
        assert LAYERS.index(rest.split(".")[0]) <= LAYERS.index(here), (path, name)


def test_a_file_has_at_most_400_lines():
  long = [path for path in TREES if len((ROOT / path).read_text().splitlines()) > 400]
  assert not long


def test_docstrings_open_with_a_verb_or_a_noun_phrase():
  stumbles = re.compile(r"(As of|By|How|Of|What|Where|Whether|Which) ")
  documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
  for path, tree in TREES.items():
    texts = [ast.get_docstring(x) or "" for x in ast.walk(tree) if isinstance(x, documented)]
    assert not [text for text in texts if stumbles.match(text)], path


def test_no_private_name_of_another_module_is_used():
  private = lambda name: name.startswith("_") and not name.endswith("__") and name not in PUBLIC
  for path, tree in TREES.items():
    ours = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    ours |= {node.target.id for node in ast.walk(tree) if _is_field(node)}
    ours |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and _is_set(n)}
    used = [x for x in imported(tree) if x.startswith(OURS) and private(x.rpartition(".")[2])]
    used += [
      f"{node.value.id}.{node.attr}"
      for node in ast.walk(tree)
      if isinstance(node, ast.Attribute) and private(node.attr) and node.attr not in ours
      if isinstance(node.value, ast.Name) and node.value.id not in ("self", "cls")
    ]
    assert not used, path


def _is_field(node: ast.AST) -> bool:
  return isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)


def _is_set(node: ast.Attribute) -> bool:
  return isinstance(node.ctx, ast.Store)
