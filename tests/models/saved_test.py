"""`pj.save_pretrained`: what is written is loaded again, and what cannot be is refused in time.

That transformers loads it with the same logits is shown in tests/parity.
"""

import json
import shutil
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peftjax as pj
from peftjax.core import paths
from peftjax.io.safetensors_dir import TensorDir

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def llama():
  return pj.load_pretrained(GOLDEN / "llama_tiny", scan_layers=True)[1]


def _lora(params, targets):
  attached = pj.lora(2, 4, targets).attach(jax.random.key(0), params)
  ones = lambda m, x: jnp.full_like(x, 0.1) if m else x
  return jax.tree.map(ones, pj.lora(2, 4, targets).trainable(attached), attached)


@pytest.mark.parametrize("base", ["bert_tiny", "roberta_tiny", "llama_tiny", "qwen2_tiny"])
def test_a_model_is_written_as_it_was_read(base, tmp_path):
  source = GOLDEN / base
  _, params = pj.load_pretrained(source)
  pj.save_pretrained(tmp_path / "made", params, of=source)
  _, again = pj.load_pretrained(tmp_path / "made")
  chex.assert_trees_all_equal(again, params)
  was, now = (json.loads((x / "config.json").read_text()) for x in (source, tmp_path / "made"))
  assert now == was


def test_shards_hold_the_merged_layers(llama, tmp_path):
  params = _lora(llama, "all-linear")
  pj.save_pretrained(tmp_path / "made", params, of=GOLDEN / "llama_tiny", shard_size="50KB")
  made = tmp_path / "made"
  names = sorted(path.name for path in made.glob("*.safetensors"))
  assert len(names) > 2 and names[0] == f"model-00001-of-{len(names):05}.safetensors"
  assert all(path.stat().st_size < 52_000 for path in made.glob("*.safetensors"))
  index = json.loads((made / "model.safetensors.index.json").read_text())
  assert index["metadata"]["total_size"] == 4 * pj.count(llama)
  want = pj.merge(params)["model"]["layers"]["self_attn"]["q_proj"]["kernel"][1].T
  got = TensorDir(made).read("model.layers.1.self_attn.q_proj.weight")
  np.testing.assert_allclose(got, want, atol=1e-6)


def test_an_adapted_tied_table_unties_the_head(tmp_path):
  source = GOLDEN / "qwen2_tiny"
  _, params = pj.load_pretrained(source)
  pj.save_pretrained(tmp_path / "made", _lora(params, ["embed_tokens"]), of=source)
  _, again = pj.load_pretrained(tmp_path / "made")
  table = params["model"]["embed_tokens"]["embedding"]
  np.testing.assert_array_equal(again["lm_head"]["kernel"], table.T)
  assert np.abs(again["model"]["embed_tokens"]["embedding"] - table).max() > 1e-3
  assert not json.loads((tmp_path / "made" / "config.json").read_text())["tie_word_embeddings"]


def test_a_tied_head_that_the_tree_does_not_mark_is_not_changed_in_silence(tmp_path):
  source = GOLDEN / "qwen2_tiny"
  _, params = pj.load_pretrained(source)
  bare = {name: x for name, x in params.items() if name != "lm_head"}
  with pytest.raises(ValueError, match="embed_tokens/embedding has an adapter"):
    pj.save_pretrained(tmp_path / "made", _lora(bare, ["embed_tokens"]), of=source)
  assert not (tmp_path / "made").exists()
  pj.save_pretrained(tmp_path / "made", bare, of=source)


def test_labels_and_files_beside_the_weights(tmp_path):
  shutil.copytree(GOLDEN / "bert_tiny", source := tmp_path / "source")
  for name in ("tokenizer.json", "vocab.txt", "README.md", "pytorch_model.bin"):
    (source / name).write_text(name)
  _, params = pj.load_pretrained(source, num_labels=2)
  pj.save_pretrained(tmp_path / "made", params, of=source, labels=["no", "yes"])
  config = json.loads((tmp_path / "made" / "config.json").read_text())
  assert config["id2label"] == {"0": "no", "1": "yes"}
  assert config["label2id"] == {"no": 0, "yes": 1}
  assert config["architectures"] == ["BertForSequenceClassification"]
  files = {path.name for path in (tmp_path / "made").iterdir()}
  assert files == {"config.json", "model.safetensors", "tokenizer.json", "vocab.txt"}
  with pytest.raises(ValueError, match="labels has 3 names, and the head has 2 outputs"):
    pj.save_pretrained(tmp_path / "other", params, of=source, labels=["a", "b", "c"])


def _without_norm(params):
  return {**params, "model": {k: v for k, v in params["model"].items() if k != "norm"}}


_REFUSED = {
  "prompt": (lambda p: pj.prompt(2).attach(jax.random.key(0), p), {}, "cannot be merged"),
  "a leaf too many": (lambda p: {**p, "more": jnp.ones(2)}, {}, "more has no place in a llama"),
  "a leaf too few": (_without_norm, {}, "params has no model/norm/scale"),
  "a shape": (lambda p: {**p, "lm_head": {"kernel": jnp.ones((48, 9))}}, {}, r"\(48, 9\)"),
  "another base": (lambda p: p, {"of": GOLDEN / "gpt2_tiny"}, "no place in a gpt2"),
  "a dtype": (lambda p: p, {"dtype": "int8"}, "dtype is 'int8'; write float32"),
  "no dtype": (lambda p: p, {"dtype": "float31"}, "dtype is 'float31'; write float32"),
  "integers": (lambda p: {**p, "lm_head": {"kernel": jnp.ones((48, 96), int)}}, {}, "is int32"),
  "a size": (lambda p: p, {"shard_size": "5 apples"}, "'5 apples'; write a number of bytes"),
  "no size": (lambda p: p, {"shard_size": 0}, "shard_size is 0"),
  "labels": (lambda p: p, {"labels": ["a"]}, "this is a language model"),
}


@pytest.mark.parametrize("name", _REFUSED)
def test_what_cannot_be_written_is_refused_first(llama, name, tmp_path):
  change, options, message = _REFUSED[name]
  with pytest.raises(ValueError, match=message):
    pj.save_pretrained(tmp_path / "made", change(llama), **{"of": GOLDEN / "llama_tiny", **options})
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("scale", [np.nan, 1e30])
def test_entries_that_are_not_finite_leave_nothing_behind(llama, scale, tmp_path):
  params = {**llama, "lm_head": {"kernel": llama["lm_head"]["kernel"] * scale}}
  with pytest.raises(ValueError, match="lm_head/kernel has entries that are NaN or infinite as f"):
    pj.save_pretrained(tmp_path / "made", params, of=GOLDEN / "llama_tiny", dtype="float16")
  assert not list(tmp_path.iterdir())


def test_a_directory_that_holds_something_is_kept(llama, tmp_path):
  (tmp_path / "mine").write_text("mine")
  with pytest.raises(ValueError, match="is not an empty directory: give a new one"):
    pj.save_pretrained(tmp_path, llama, of=GOLDEN / "llama_tiny")
  assert [path.name for path in tmp_path.iterdir()] == ["mine"]
  (empty := tmp_path / "empty").mkdir()
  pj.save_pretrained(empty, llama, of=GOLDEN / "llama_tiny", dtype=jnp.bfloat16)
  found = pj.load_pretrained(empty)[1]
  assert {str(x.dtype) for x in paths.leaves(found).values()} == {"bfloat16"}
