"""`local`: the folder of a model that is named as on the Hugging Face hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from peftjax.io import records

_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w.-]+(?:/[\w.-]+)*))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
# Files that `load_pretrained` and `load_tokenizer` read; no pickles, no other frameworks' weights.
_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja", "tokenizer.model")


def local(name: str | Path) -> Path:
  """The folder of `org/name` or `org/name@revision`; an existing path is its own folder.

  A path that exists goes first; then the Hugging Face cache (`$HF_HUB_CACHE`, `$HF_HOME/hub` or
  `~/.cache/huggingface/hub`), whose snapshot is taken as it is; then `huggingface_hub` is asked to
  download it, if that is installed.

  Args:
    revision: a branch, a tag or a commit; by default `main`.

  Raises:
    ValueError: if the model is in none of these places.
  """
  path = Path(name).expanduser()
  found = _NAME.fullmatch(str(name))
  if path.exists() or found is None or path.suffix == ".gguf" or ".." in path.parts:
    return path
  repository, revision = found[1], found[2] or "main"
  folder = _cache() / f"models--{repository.replace('/', '--')}"
  snapshot = _snapshot(folder, revision)
  if snapshot is not None and any(snapshot.glob("*.safetensors")):
    return snapshot
  try:
    return _download(repository, revision)
  except Exception as error:  # of many classes: the network's, the server's, the library's own
    if snapshot is not None:  # a tokenizer may be all that is wanted
      return snapshot
    why = records.clip(str(error).partition("\n")[0], quote=False)
  raise ValueError(
    f"there is no folder {name}, no {folder}/refs/{revision} that names a snapshot, and "
    f"huggingface_hub cannot download it ({why}). Where there is a network, write `pip install "
    f"huggingface_hub` and `hf download {repository} --revision {revision}`; else put config.json, "
    "the *.safetensors and the tokenizer's files into a folder and give its path."
  )


def _cache() -> Path:
  """The folder where the hub's own library keeps its downloads."""
  if given := os.environ.get("HF_HUB_CACHE"):
    return Path(given).expanduser()
  caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  home = os.environ.get("HF_HOME") or f"{caches}/huggingface"
  return Path(home).expanduser() / "hub"


def _snapshot(folder: Path, revision: str) -> Path | None:
  """The snapshot of a revision, if it is there with its configuration."""
  reference = folder / "refs" / revision
  commit = revision
  if ".." not in reference.parts and reference.is_file():
    commit = records.read_bytes(reference).decode(errors="replace").strip()
  snapshot = folder / "snapshots" / commit
  whole = _COMMIT.fullmatch(commit) and (snapshot / "config.json").is_file()
  return snapshot if whole else None


def _download(repository: str, revision: str) -> Path:
  from huggingface_hub import snapshot_download

  patterns = list(_FILES)
  return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
