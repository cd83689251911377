"""Names of the Hugging Face hub, from a path, from the cache, or not at all."""

import shutil
import sys
import types

import pytest

import peftjax as pj
from peftjax.io import hub
from tests.tiny_lm import GOLDEN

COMMIT, OTHER = "a" * 40, "b" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """A cache with one model, `main` and the tag `v/1`; no network, in an empty folder."""
  monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
  monkeypatch.delenv("HF_HUB_CACHE", raising=False)
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # an import of it fails
  (tmp_path / "here").mkdir()
  monkeypatch.chdir(tmp_path / "here")
  folder = tmp_path / "home/hub/models--org--tiny"
  for commit, name in ((COMMIT, "llama_tiny"), (OTHER, "gpt2_tiny")):
    shutil.copytree(GOLDEN / name, folder / "snapshots" / commit)
  (folder / "refs/v").mkdir(parents=True)
  (folder / "refs/main").write_text(COMMIT)
  (folder / "refs/v/1").write_text(f"{OTHER}\n")
  return folder


@pytest.mark.parametrize(
  "name, commit",
  [("org/tiny", COMMIT), ("org/tiny@v/1", OTHER), (f"org/tiny@{OTHER}", OTHER)],
)
def test_the_cache_has_it(cache, name, commit):
  assert hub.local(name) == cache / "snapshots" / commit


def test_a_model_is_loaded_by_its_name(cache):
  assert type(pj.load_pretrained("org/tiny")[0]).__name__ == "LlamaForCausalLM"
  assert type(pj.load_pretrained("org/tiny@v/1")[0]).__name__ == "GPT2LMHeadModel"


def test_a_path_of_that_name_goes_first(cache, tmp_path):
  shutil.copytree(GOLDEN / "gpt2_tiny", tmp_path / "here/org/tiny")
  assert type(pj.load_pretrained("org/tiny")[0]).__name__ == "GPT2LMHeadModel"


@pytest.mark.parametrize(
  "name", ["org/other", "org/tiny@none", "org/tiny@../main", f"org/tiny@{'c' * 40}"]
)
def test_what_is_nowhere_says_what_to_put_where(cache, name):
  if ".." not in name:
    with pytest.raises(ValueError, match=r"no folder org/\w+.*hub/models--org.*hf download.*path"):
      hub.local(name)
  with pytest.raises(ValueError, match=r"org/"):
    pj.load_pretrained(name)


def test_a_reference_leads_nowhere_else(cache):
  (cache / "refs/main").write_text("../../../elsewhere")
  with pytest.raises(ValueError, match="there is no folder org/tiny"):
    hub.local("org/tiny")


def test_the_librarys_download_is_asked_last(cache, monkeypatch, tmp_path):
  asked = []
  download = lambda *given, **more: asked.append((given, more)) or str(tmp_path)
  monkeypatch.setitem(
    sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=download)
  )
  assert hub.local("org/tiny") != tmp_path and not asked
  assert hub.local("org/new@v2") == tmp_path
  assert asked[0][0] == ("org/new",) and asked[0][1]["revision"] == "v2"
  assert "*.bin" not in asked[0][1]["allow_patterns"]


@pytest.mark.parametrize("path", ["model", "/a/b", "./a/b", "a/b/c", "a/b.gguf", "../a"])
def test_paths_stay_paths(cache, path):
  assert str(hub.local(path)) == str(hub.Path(path))
