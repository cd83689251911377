"""PEFT directories: real ones give peft's logits, ours come back bit for bit, wrong ones raise.

The `peft_*` directories and what they must give were written by the real library
(tests/golden/make_peft.py); tests/parity does the same live.
"""

import json
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import peftjax as pj
from peftjax import hf_peft
from peftjax.core import paths
from peftjax.hf_peft.build import suffixes
from peftjax.hf_peft.targets import Matcher
from peftjax.methods.adalora_weight import SVDLoRA
from peftjax.methods.lora_weight import LoRA

_GOLDEN = Path(__file__).parents[1] / "golden"
_ADAPTERS = ("peft_query_value", "peft_patterns", "peft_rslora", "peft_embedding")
_ROOT = "base_model.model."


@pytest.fixture(scope="module", params=[False, True], ids=["unrolled", "scanned"])
def tiny(request):
  return pj.load_pretrained(_GOLDEN / "bert_tiny", scan_layers=request.param)


@pytest.fixture(scope="module")
def unrolled():
  return pj.load_pretrained(_GOLDEN / "bert_tiny")


def _draw(params, mask):
  """Every trained array redrawn, padding kept at zero."""
  rng = np.random.default_rng(7)
  draw = lambda x: jnp.asarray(0.2 * rng.standard_normal(x.shape), x.dtype)
  drawn = jax.tree.map(lambda m, x: draw(x) if m else x, mask, params)

  def pad(_, leaf):
    if not isinstance(leaf, LoRA):
      return leaf
    kept = np.arange(leaf.a.shape[-2]) < np.asarray(leaf.rank)[..., None]
    return leaf.replace(a=leaf.a * kept[..., :, None], b=leaf.b * kept[..., None, :])

  return paths.map_leaves(pad, drawn)


def _layout(model):
  return pj.linen.layout(model, np.zeros((1, 4), np.int32))


def _attach(model, params, *methods):
  method = pj.chain(*methods)
  attached = method.attach(jax.random.key(0), params, _layout(model))
  mask = method.trainable(attached)
  return _draw(attached, mask), mask


def _config(directory):
  return json.loads((directory / "adapter_config.json").read_text())


def _copy(name, directory, tensors=None, **fields):
  """A golden adapter in `directory`, with other tensors or config fields."""
  source = _GOLDEN / name
  (directory / "adapter_config.json").write_text(json.dumps({**_config(source), **fields}))
  stored = load_file(source / "adapter_model.safetensors")
  save_file(stored if tensors is None else tensors(stored), directory / "adapter_model.safetensors")
  return directory


@pytest.mark.parametrize("name", _ADAPTERS)
def test_a_real_adapter_gives_pefts_logits(tiny, name):
  model, params = tiny
  loaded, _ = hf_peft.load(_GOLDEN / name, params, model)
  want = load_file(_GOLDEN / name / "expected.safetensors")
  inputs = [want[key] for key in ("tokens", "mask", "types")]
  logits = jax.jit(lambda p: pj.apply(model, p, *inputs))(loaded)
  base = load_file(_GOLDEN / "bert_tiny" / "expected.safetensors")["logits"]
  assert np.abs(base - want["logits"]).max() > 0.1  # the adapter shows at all
  np.testing.assert_allclose(logits, want["logits"], atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", _ADAPTERS)
def test_a_real_adapter_saved_again_has_the_same_tensors_and_meaning(tiny, name, tmp_path):
  model, params = tiny
  loaded, mask = hf_peft.load(_GOLDEN / name, params, model)
  theirs = _config(_GOLDEN / name)
  hf_peft.save(
    tmp_path,
    loaded,
    model,
    trained=mask,
    task_type=theirs["task_type"],
    rslora=theirs["use_rslora"],
  )
  ours, real = (load_file(d / "adapter_model.safetensors") for d in (tmp_path, _GOLDEN / name))
  assert sorted(ours) == sorted(real)
  for key in real:
    np.testing.assert_array_equal(ours[key], real[key], err_msg=key)
  chex.assert_trees_all_equal(hf_peft.load(tmp_path, params, model), (loaded, mask))
  alphas = {theirs["lora_alpha"], *theirs["alpha_pattern"].values()}
  config = _config(tmp_path)
  assert {config["lora_alpha"], *config["alpha_pattern"].values()} <= alphas


def test_the_mask_trains_what_was_loaded(tiny):
  model, params = tiny
  loaded, mask = hf_peft.load(_GOLDEN / "peft_query_value", params, model)
  method = pj.chain(pj.lora(4, 8, dropout=0.1), pj.unfreeze("head/.*"))
  chex.assert_trees_all_equal(mask, method.trainable(loaded))
  attached = method.attach(jax.random.key(0), params, _layout(model))
  chex.assert_trees_all_equal_shapes_and_dtypes(loaded, attached)
  assert jax.tree.structure(loaded) == jax.tree.structure(attached)


_METHODS = {
  "plain": pj.lora(3, 7.5, dropout=0.25),
  "ranks differ by layer": pj.lora(
    4, 8, "all-linear", rank_pattern={".*layers_1/.*query/kernel": 2, ".*layers_0/output.*": 5}
  ),
  "alphas too": pj.lora(
    4, 8, rank_pattern={".*layers_1.*": 7}, alpha_pattern={".*layers_0.*query.*": 0.3}
  ),
  "rslora": pj.lora(3, 10, rslora=True, rank_pattern={"query": 6}),
  "embedding": pj.lora(3, 6, ["word_embeddings", "position_embeddings", "query"]),
}


@pytest.mark.fast_for("scanned-.*|unrolled-ranks differ by layer")
@pytest.mark.parametrize("name", _METHODS)
def test_saved_and_loaded_is_equal_bit_for_bit(tiny, name, tmp_path):
  model, params = tiny
  method = _METHODS[name]
  attached, mask = _attach(model, params, method, pj.unfreeze("head/.*"))
  hf_peft.save(tmp_path, attached, model, trained=mask, rslora=method.rslora)
  loaded, loaded_mask = hf_peft.load(tmp_path, params, model)
  chex.assert_trees_all_equal(loaded, attached)
  chex.assert_trees_all_equal(loaded_mask, mask)
  assert jax.tree.structure(loaded) == jax.tree.structure(attached)  # dropout among others


def test_adalora_that_was_loaded_pruned_can_be_saved_again(tiny, tmp_path):
  """Every matrix has a rank of its own then, all at one scale."""
  model, params = tiny
  attached, _ = _attach(model, params, pj.adalora(4, 8.0, ["query", "value"], target_rank=2))
  rng = np.random.default_rng(0)
  some = lambda x: jnp.asarray(rng.normal(size=x.shape) * (rng.random(x.shape) < 0.6), jnp.float32)
  attached = paths.map_leaves(
    lambda _, x: x.replace(e=some(x.e)) if isinstance(x, SVDLoRA) else x, attached
  )
  hf_peft.save(tmp_path / "first", attached, model)
  first, _ = hf_peft.load(tmp_path / "first", params, model)
  assert len(set(pj.tree.ranks(first).values())) > 1 and pj.tree.ranks(first) == pj.tree.ranks(
    attached
  )
  hf_peft.save(tmp_path / "again", first, model)
  again, _ = hf_peft.load(tmp_path / "again", params, model)
  chex.assert_trees_all_equal(pj.merge(again), pj.merge(first))
  left = [{path: rank for path, rank in pj.tree.ranks(x).items() if rank} for x in (first, again)]
  assert left[0] == left[1]  # a matrix without a triplet is not written the second time


def test_scanned_and_unrolled_write_the_same_files(tmp_path):
  for scan in (False, True):
    model, params = pj.load_pretrained(_GOLDEN / "bert_tiny", scan_layers=scan)
    method = pj.lora(4, 8, rank_pattern={".*layers_1.*query/kernel": 2}, init="gaussian")
    attached = method.attach(jax.random.key(0), params, _layout(model))
    hf_peft.save(tmp_path / str(scan), attached, model)
  assert _config(tmp_path / "True") == _config(tmp_path / "False")
  one, two = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("True", "False"))
  chex.assert_trees_all_equal(one, two)


@pytest.mark.parametrize("method", [pj.prefix(3), pj.prompt(3, init="normal")], ids=repr)
def test_virtual_tokens_saved_and_loaded_are_equal_bit_for_bit(tiny, method, tmp_path):
  model, params = tiny
  attached, mask = _attach(model, params, method, pj.unfreeze("head/.*"))
  hf_peft.save(tmp_path, attached, model, trained=mask)
  loaded, loaded_mask = hf_peft.load(tmp_path, params, model)
  chex.assert_trees_all_equal(loaded, attached)
  chex.assert_trees_all_equal(loaded_mask, mask)
  with pytest.raises(ValueError, match="already"):
    hf_peft.load(tmp_path, attached, model)
  for field, value, message in (
    ("num_virtual_tokens", 4, "prompt_embeddings is float32.*adapter_config.json says"),
    ("num_virtual_tokens", 0, "num_virtual_tokens is 0"),
    ("num_virtual_tokens", None, "num_virtual_tokens is None"),
  ):
    (tmp_path / "adapter_config.json").write_text(json.dumps(_config(tmp_path) | {field: value}))
    with pytest.raises(ValueError, match=message):
      hf_peft.load(tmp_path, params, model)


def test_layers_without_an_adapter_have_rank_zero(tmp_path, tiny):
  model, params = tiny
  drop = lambda tensors: {k: v for k, v in tensors.items() if ".layer.0." not in k}
  directory = _copy("peft_query_value", tmp_path, drop, layers_to_transform=[1])
  loaded, mask = hf_peft.load(directory, params, model)
  flat = paths.leaves(loaded)
  if model.config.scan_layers:
    query = flat["bert/encoder/layers/attention/self/query/kernel"]
    assert query.rank.tolist() == [0, 4] and query.scale.tolist() == [0, 2]
  else:
    assert not isinstance(flat["bert/encoder/layers_0/attention/self/query/kernel"], LoRA)
  again = tmp_path / "again"
  hf_peft.save(again, loaded, model, trained=mask)
  assert _config(again)["target_modules"] == ["1.attention.self.query", "1.attention.self.value"]
  chex.assert_trees_all_equal(hf_peft.load(again, params, model)[0], loaded)


def test_what_is_written(unrolled, tmp_path):
  model, params = unrolled
  method = pj.lora(4, 8, rank_pattern={".*layers_1.*query/kernel": 2}, dropout=0.1)
  hf_peft.save(tmp_path, method.attach(jax.random.key(0), params), model, base_model="some/bert")
  assert sorted(x.name for x in tmp_path.iterdir()) == [
    "adapter_config.json",
    "adapter_model.safetensors",
  ]
  assert _config(tmp_path) == {
    "alpha_pattern": {},
    "base_model_name_or_path": "some/bert",
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "lora_alpha": 8,
    "lora_dropout": 0.1,
    "modules_to_save": ["classifier"],
    "peft_type": "LORA",
    "r": 4,
    "rank_pattern": {r"^bert\.encoder\.layer\.1\.attention\.self\.query": 2},
    "target_modules": ["query", "value"],
    "task_type": "SEQ_CLS",
    "use_dora": False,
    "use_rslora": False,
  }


def test_without_a_task_type_an_untrained_head_stays_out(unrolled, tmp_path):
  model, params = unrolled
  attached, mask = _attach(model, params, pj.lora(4, 8))
  hf_peft.save(tmp_path, attached, model, trained=mask, task_type=None)
  assert _config(tmp_path)["modules_to_save"] is None
  assert all("lora" in name for name in load_file(tmp_path / "adapter_model.safetensors"))


def test_a_trained_pooler_is_a_module_to_save(unrolled, tmp_path):
  model, params = unrolled
  attached, mask = _attach(
    model, params, pj.lora(2), pj.unfreeze(["head/.*", ".*pooler/dense/bias"])
  )
  hf_peft.save(tmp_path, attached, model, trained=mask)
  assert _config(tmp_path)["modules_to_save"] == ["bert.pooler.dense", "classifier"]
  chex.assert_trees_all_equal(hf_peft.load(tmp_path, params, model)[0], attached)


def test_roberta_saves_its_whole_head(tmp_path):
  model, params = pj.load_pretrained(_GOLDEN / "roberta_tiny")
  attached, mask = _attach(model, params, pj.lora(2, 4, "all-linear"), pj.unfreeze("head/.*"))
  hf_peft.save(tmp_path, attached, model, trained=mask)
  config = _config(tmp_path)
  assert config["modules_to_save"] == ["classifier"]
  assert "dense" not in config["target_modules"]  # it would hit classifier.dense
  chex.assert_trees_all_equal(hf_peft.load(tmp_path, params, model)[0], attached)


def test_an_adapter_of_the_bare_encoder(tiny, tmp_path):
  model, params = tiny
  body = f"{_ROOT}bert."
  bare = lambda t: {_ROOT + k.removeprefix(body): v for k, v in t.items() if k.startswith(body)}
  config = {"rank_pattern": {r"^encoder\.layer.*": 4}, "r": 99, "modules_to_save": None}
  directory = _copy("peft_query_value", tmp_path, bare, task_type="FEATURE_EXTRACTION", **config)
  want = hf_peft.load(_GOLDEN / "peft_query_value", params, model)
  for loaded, expected in zip(hf_peft.load(directory, params, model), want, strict=True):
    chex.assert_trees_all_equal(loaded["bert"], expected["bert"])


def test_half_precision_files_give_float32_factors(unrolled, tmp_path):
  model, params = unrolled
  half = lambda tensors: {k: v.astype(np.float16) for k, v in tensors.items()}
  loaded, _ = hf_peft.load(_copy("peft_query_value", tmp_path, half), params, model)
  assert {x.dtype for x in jax.tree.leaves(loaded)} == {jnp.float32.dtype, jnp.int32.dtype}


@pytest.mark.parametrize(
  "pattern, hit",
  [
    ("query", True),
    ("self.query", True),
    ("uery", False),
    ("self", False),
    ("layer.[01].attention.self.query", True),
    (r"^bert\.encoder\.layer\.0\.attention\.self\.query", True),
    (r"^encoder\.layer\.0\.attention\.self\.query", False),
  ],
)
def test_patterns_match_as_in_peft(pattern, hit):
  module = "bert.encoder.layer.0.attention.self.query"
  assert Matcher("file").value({pattern: 1}, module, 0) == hit


def test_the_first_pattern_that_matches_wins():
  assert Matcher("file").value({"b": 1, "a.b": 2}, "x.a.b", 0) == 1


@pytest.mark.parametrize(
  "targets, names",
  [
    ({"m.0.q", "m.1.q"}, ["q"]),
    ({"m.0.q"}, ["0.q"]),
    ({"m.1.q"}, ["1.q"]),
    ({"m.11.q"}, ["11.q"]),
    ({"m.0.q", "m.1.q", "m.11.q", "m.0.o.d"}, ["0.o.d", "q"]),
    ({"d"}, ["d"]),
  ],
)
def test_target_names_hit_the_targets_only(targets, names):
  modules = {"m", "m.0", "m.0.q", "m.0.o", "m.0.o.d", "m.1", "m.1.q", "m.1.o.d", "m.11.q", "d"}
  modules -= set() if "d" in targets else {"d"}
  if targets == {"m.0.q", "m.1.q"}:
    modules.remove("m.11.q")
  if targets == {"d"}:
    modules -= {"m.0.o.d", "m.1.o.d"}
  assert suffixes(targets, modules) == names


@pytest.mark.parametrize(
  "methods, message",
  [
    ([pj.lora(2, init="pissa")], "PiSSA adapter.*pj.merge"),
    ([pj.unfreeze("head/.*")], "no adapter that PEFT knows"),
    ([pj.adapters(4)], "no adapter that PEFT knows"),
    ([pj.lora(2), pj.prefix(2)], "one kind of adapter.*LoRA and Prefix"),
    ([pj.prompt(2), pj.prefix(2)], "one kind of adapter.*Prefix and Prompt"),
    ([pj.lora(2), pj.unfreeze(".*query/bias")], "query/bias is trained.*no place.*pj.merge"),
    ([pj.lora(2, targets=".*head/classifier/kernel")], "classifier, which is saved whole"),
    ([pj.lora(2), pj.lora(2, targets="key", dropout=0.1)], r"lora_dropout \[0.0, 0.1\]"),
  ],
)
def test_what_the_format_cannot_say_is_not_saved(unrolled, methods, message, tmp_path):
  model, params = unrolled
  method = pj.chain(*methods)
  attached = method.attach(jax.random.key(0), params, _layout(model))
  with pytest.raises(ValueError, match=f"(?s){message}"):
    hf_peft.save(tmp_path / "new", attached, model, trained=method.trainable(attached))
  assert not (tmp_path / "new").exists()


def test_a_trained_base_under_an_adapter_is_not_saved(unrolled, tmp_path):
  model, params = unrolled
  attached = pj.lora(2).attach(jax.random.key(0), params)
  kernels = lambda p, leaf: jax.tree.map(lambda _: p.endswith("query/kernel"), leaf)
  with pytest.raises(ValueError, match="query/kernel is trained"):
    hf_peft.save(tmp_path, attached, model, trained=paths.map_leaves(kernels, attached))


def test_an_adapter_on_an_adapter_raises(unrolled):
  model, params = unrolled
  attached = pj.lora(2).attach(jax.random.key(0), params)
  with pytest.raises(ValueError, match="has an adapter already"):
    hf_peft.load(_GOLDEN / "peft_query_value", attached, model)


def test_a_failed_save_leaves_the_old_files(unrolled, tmp_path):
  model, params = unrolled
  attached = pj.lora(2).attach(jax.random.key(0), params)
  hf_peft.save(tmp_path, attached, model)
  before = {x.name: x.read_bytes() for x in tmp_path.iterdir()}
  bad = jax.tree.map(lambda x: x.astype(jnp.float8_e4m3fn) if x.ndim == 2 else x, attached)
  with pytest.raises(ValueError, match="float8"):
    hf_peft.save(tmp_path, bad, model)
  assert {x.name: x.read_bytes() for x in tmp_path.iterdir()} == before


def test_trained_norms_come_back_bit_for_bit(unrolled, tmp_path):
  """As peft's LNTuningConfig, the head beside them; other modules are not read so."""
  model, params = unrolled
  mask = pj.unfreeze([".*LayerNorm/(scale|bias)", "head/.*"]).trainable(params)
  moved = jax.tree.map(lambda m, x: x + 1 if m else x, mask, params)
  hf_peft.save(tmp_path, moved, model, trained=mask)
  config = json.loads((tmp_path / "adapter_config.json").read_text())
  assert (config["peft_type"], config["target_modules"]) == ("LN_TUNING", ["LayerNorm"])
  loaded, read = hf_peft.load(tmp_path, params, model)
  jax.tree.map(np.testing.assert_array_equal, loaded, moved)
  assert read == mask
  config["target_modules"] = ["query"]
  (tmp_path / "adapter_config.json").write_text(json.dumps(config))
  with pytest.raises(ValueError, match=r"self\.query, which is not a norm: only norms are read"):
    hf_peft.load(tmp_path, params, model)
