"""Adapters go to the real peft library and come from it, with the same logits on both sides."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft import IA3Config, LoraConfig, PeftModel, VeraConfig, get_peft_model
from safetensors.numpy import load_file
from transformers import BertModel

import peftjax as pj
from peftjax import hf_peft
from peftjax.core import paths
from peftjax.methods.lora_weight import LoRA
from tests.golden.make_bert import draw
from tests.golden.texts import minilm_dir
from tests.parity.reference import (
  GOLDEN,
  TOLERANCE,
  assert_near,
  classifier,
  compute,
  decoder,
  inputs,
  logits,
)

pytestmark = [
  pytest.mark.parity,
  pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]

_BASES = {
  "bert": (lambda: GOLDEN / "bert_tiny", 3, inputs(120)),
  "roberta": (lambda: GOLDEN / "roberta_tiny", 3, inputs(120, pad=1, types=1)),
  "minilm": (minilm_dir, 5, inputs(30_000)),
}
_HEAD = pj.unfreeze("head/.*")


def _ours(base, scan):
  directory, labels, batch = _BASES[base]
  model, params = pj.load_pretrained(directory(), num_labels=labels, scan_layers=scan)
  return model, params, batch


def _theirs(base, **config):
  directory, labels, batch = _BASES[base]
  return classifier(directory(), num_labels=labels, **config), batch


_FFN = r".*/layers(_\d+)?/output/dense/kernel"


def _drawn(model, params, method):
  """Attached, every trained array drawn, and the mask; a rank is cut to its layer's."""
  attached = method.attach(
    jax.random.key(0), params, pj.linen.layout(model, np.zeros((1, 4), np.int32))
  )
  mask = method.trainable(attached)
  rng = np.random.default_rng(3)
  # Larger on wide models saturates attention, where float32 itself is 3e-3 off (torch's too).
  deviation = 12.8 / model.config.width
  new = lambda x: jnp.asarray(deviation * rng.standard_normal(x.shape), x.dtype)
  drawn = jax.tree.map(lambda m, x: new(x) if m else x, mask, attached)

  def cut(_, leaf):
    if not isinstance(leaf, LoRA):
      return leaf
    kept = np.arange(leaf.a.shape[-2]) < np.asarray(leaf.rank)[..., None]
    return leaf.replace(a=leaf.a * kept[..., :, None], b=leaf.b * kept[..., None, :])

  return paths.map_leaves(cut, drawn), mask


_PATTERNS = {
  "rank_pattern": {".*layers_1/.*query/kernel": 2, ".*layers_0/output.*": 6},
  "alpha_pattern": {".*layers_1/attention/.*": 3.7, ".*intermediate.*": 20},
}
_METHODS = {
  "plain": pj.lora(4, 8),
  "patterns": pj.lora(4, 8, "all-linear", **_PATTERNS),
  "rslora": pj.lora(4, 16, ["query", "key"], rslora=True, rank_pattern={"key": 8}),
  "embedding": pj.lora(3, 6, ["word_embeddings", "position_embeddings", "value"]),
  "all-linear": pj.lora(2, 4, "all-linear"),
  "dora": pj.dora(4, 8, "all-linear"),
  "ia3": pj.ia3(["key", "value"], _FFN),
  "vera": pj.vera(6, ["query", _FFN, r".*/intermediate/dense/kernel"]),
  "one layer": pj.lora(2, 4, [".*layers_1/output/dense/kernel", ".*layers_0/.*key/kernel"]),
}
_TO_PEFT = [
  *(("bert", name, scan) for name in _METHODS for scan in (False, True) if name != "one layer"),
  ("bert", "one layer", False),
  *(("roberta", name, False) for name in ("patterns", "embedding")),
  ("minilm", "plain", False),
  ("minilm", "patterns", True),
  ("minilm", "rslora", True),
]


@pytest.mark.parametrize("base, name, scan", _TO_PEFT)
def test_ours_in_peft(base, name, scan, tmp_path):
  model, params, batch = _ours(base, scan)
  method = _METHODS[name]
  attached, mask = _drawn(model, params, pj.chain(method, _HEAD))
  hf_peft.save(tmp_path, attached, model, trained=mask, rslora=getattr(method, "rslora", False))
  theirs, _ = _theirs(base)
  plain = logits(theirs, batch)
  adapted = PeftModel.from_pretrained(theirs, tmp_path)
  ours = jax.jit(lambda p: pj.apply(model, p, *batch))(attached)
  assert_near(ours, logits(adapted, batch))
  assert np.abs(plain - ours).max() > 100 * TOLERANCE
  # Every module peft made an adapter for is in the file, and the other way round.
  adapted.save_pretrained(tmp_path / "again")
  again = load_file(tmp_path / "again" / "adapter_model.safetensors")
  stored = load_file(tmp_path / "adapter_model.safetensors")
  assert sorted(again) == sorted(stored)
  for key, value in stored.items():
    np.testing.assert_array_equal(again[key], value, err_msg=key)


_CONFIGS = {
  "plain": dict(task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=["query", "value"]),
  "regex": dict(task_type="SEQ_CLS", r=4, lora_alpha=3, target_modules=r".*\.[01]\..*\.dense"),
  "all-linear": dict(
    r=4,
    lora_alpha=8,
    target_modules="all-linear",
    # In the order they are saved in: the first that matches wins, and saving sorts them.
    rank_pattern={"attention.*": 2, "encoder.layer.0.output.dense": 5, "layer.1.*dense": 6},
    alpha_pattern={"layer.[01].intermediate.dense": 16, "output.dense": 0.7, "query": 3},
    modules_to_save=["classifier"],
  ),
  "rslora": dict(r=4, lora_alpha=16, use_rslora=True, target_modules=["key"], bias="none"),
  "dora": dict(r=4, lora_alpha=8, use_dora=True, target_modules=["query", "dense"]),
  "dora layer": dict(r=4, use_dora=True, target_modules=["query"], layers_to_transform=[1]),
  "embedding": dict(r=3, lora_alpha=6, target_modules=["word_embeddings", "query"]),
  "layers": dict(r=3, target_modules=["query", "dense"], layers_to_transform=[1]),
  "excluded": dict(r=3, target_modules=["dense"], exclude_modules=r".*layer\.0.*|.*classifier.*"),
  "pooler": dict(r=3, target_modules=["query"], modules_to_save=["pooler", "classifier", "score"]),
  "norms": dict(r=3, target_modules=["query"], modules_to_save=["LayerNorm"]),
  "gaussian": dict(r=3, target_modules=["query"], init_lora_weights="gaussian"),
  "orthogonal": dict(r=4, target_modules=["query"], init_lora_weights="orthogonal"),
}
_FROM_PEFT = [
  *(("bert", name) for name in _CONFIGS),
  *(("roberta", name) for name in ("plain", "regex", "all-linear", "rslora")),
  ("minilm", "plain"),
  ("minilm", "all-linear"),
]


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("feedforward", [["output.dense"], []], ids=["ffn", "no ffn"])
def test_pefts_ia3_in_ours(feedforward, scan, tmp_path):
  model, params, batch = _ours("bert", scan)
  config = IA3Config(
    task_type="SEQ_CLS",
    target_modules=["key", "value", *feedforward],
    feedforward_modules=feedforward,
  )
  theirs = get_peft_model(_theirs("bert")[0], config)
  draw(theirs, 5, "ia3_l")
  theirs.save_pretrained(tmp_path)
  loaded, mask = hf_peft.load(tmp_path, params, model)
  want = logits(theirs, batch)
  assert_near(pj.apply(model, loaded, *batch), want)
  assert np.abs(pj.apply(model, params, *batch) - want).max() > 0.05
  assert pj.count(loaded, mask) == sum(x.numel() for x in theirs.parameters() if x.requires_grad)


_VERA = {
  "one size": dict(target_modules=["query", "value"]),
  "three sizes": dict(target_modules=["query", "intermediate.dense", "output.dense"]),
  "one layer": dict(target_modules=["query", "output.dense"], layers_to_transform=[1]),
}


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("name", _VERA)
def test_pefts_vera_in_ours_and_back(name, scan, tmp_path):
  model, params, batch = _ours("bert", scan)
  config = VeraConfig(task_type="SEQ_CLS", r=6, vera_dropout=0.1, **_VERA[name])
  theirs = get_peft_model(_theirs("bert")[0], config)
  draw(theirs, 5, "vera_lambda")
  theirs.save_pretrained(tmp_path / "theirs")
  loaded, mask = hf_peft.load(tmp_path / "theirs", params, model)
  want = logits(theirs, batch)
  assert_near(jax.jit(lambda p: pj.apply(model, p, *batch))(loaded), want)
  assert np.abs(pj.apply(model, params, *batch) - want).max() > 0.05
  trained = sum(x.numel() for x in theirs.parameters() if x.requires_grad)
  assert pj.count(loaded, mask) == trained or (scan and name == "one layer")
  hf_peft.save(tmp_path / "ours", loaded, model, trained=mask)
  one, two = (load_file(tmp_path / x / "adapter_model.safetensors") for x in ("theirs", "ours"))
  assert sorted(one) == sorted(two)
  for key, value in one.items():
    np.testing.assert_array_equal(two[key], value, err_msg=key)
  again = PeftModel.from_pretrained(_theirs("bert")[0], tmp_path / "ours")
  np.testing.assert_allclose(logits(again, batch), want, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Specified to not save vera_A and vera_B:UserWarning")
def test_vera_without_its_projections_is_refused(tmp_path):
  model, params, _ = _ours("bert", False)
  config = VeraConfig(r=6, target_modules=["query"], save_projection=False)
  get_peft_model(_theirs("bert")[0], config).save_pretrained(tmp_path)
  with pytest.raises(ValueError, match="save_projection=False"):
    hf_peft.load(tmp_path, params, model)


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("base, name", _FROM_PEFT)
def test_pefts_in_ours(base, name, scan, tmp_path):
  model, params, batch = _ours(base, scan)
  config = dict(_CONFIGS[name])
  if base == "minilm":  # its head is new, so it has to be saved
    config["modules_to_save"] = ["classifier"]
  theirs = get_peft_model(_theirs(base)[0], LoraConfig(**config))
  draw(theirs, 5, "lora_")
  draw(theirs, 6, "modules_to_save")
  theirs.save_pretrained(tmp_path)
  loaded, mask = hf_peft.load(tmp_path, params, model)
  ours = jax.jit(lambda p: pj.apply(model, p, *batch))(loaded)
  want = logits(theirs, batch)
  assert_near(ours, want)
  assert np.abs(pj.apply(model, params, *batch) - want).max() > 0.05
  trained = sum(x.numel() for x in theirs.parameters() if x.requires_grad)
  some = ("layers", "excluded", "dora layer")
  assert pj.count(loaded, mask) == trained or (scan and name in some)


def test_an_adapter_of_the_bare_encoder(tmp_path):
  model, params = pj.load_pretrained(GOLDEN / "bert_tiny")
  bare = BertModel.from_pretrained(GOLDEN / "bert_tiny_bare", attn_implementation="eager")
  config = LoraConfig(task_type="FEATURE_EXTRACTION", target_modules=["query", "output.dense"])
  theirs = get_peft_model(bare, config)
  draw(theirs, 5, "lora_")
  theirs.save_pretrained(tmp_path)
  loaded, _ = hf_peft.load(tmp_path, params, model)
  batch = inputs(120)
  want = compute(theirs, batch).pooler_output.numpy()
  assert_near(pj.apply(model, loaded, *batch, hidden=True)[1], want)


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights:UserWarning")
def test_pissa_comes_in_once_peft_has_converted_it(tmp_path):
  theirs, batch = _theirs("bert")
  config = LoraConfig(r=4, target_modules=["query"], init_lora_weights="pissa")
  theirs = get_peft_model(theirs, config)
  theirs.peft_config["default"].init_lora_weights = True
  theirs.save_pretrained(tmp_path / "initial")
  theirs.peft_config["default"].init_lora_weights = "pissa"
  draw(theirs, 5, "lora_B")
  model, params, _ = _ours("bert", False)
  theirs.save_pretrained(tmp_path / "raw")
  with pytest.raises(ValueError, match="init_lora_weights='pissa'.*\n.*"):
    hf_peft.load(tmp_path / "raw", params, model)
  want = logits(theirs, batch)
  theirs.save_pretrained(
    tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
  )
  assert json.loads((tmp_path / "plain" / "adapter_config.json").read_text())["r"] == 8
  loaded, _ = hf_peft.load(tmp_path / "plain", params, model)
  assert_near(pj.apply(model, loaded, *batch), want)


_VIRTUAL = {"prefix": pj.prefix(3), "prompt": pj.prompt(3, init="normal")}


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("name", _VIRTUAL)
def test_virtual_tokens_of_decoders(name, scan, tmp_path):
  """Both ways, with grouped heads and rotated positions."""
  model, params = pj.load_pretrained(GOLDEN / "llama_tiny", scan_layers=scan)
  attached, mask = _drawn(model, params, _VIRTUAL[name])
  hf_peft.save(tmp_path / "ours", attached, model, trained=mask, task_type="CAUSAL_LM")
  tokens = inputs(model.config.vocab)[0][:1]
  theirs = decoder(GOLDEN / "llama_tiny")
  plain = compute(theirs, [tokens]).logits.numpy()
  adapted = PeftModel.from_pretrained(theirs, tmp_path / "ours")
  # Logits of the virtual tokens of a prompt come first there, and not at all here.
  want = compute(adapted, [tokens]).logits.numpy()[:, -tokens.shape[1] :]
  assert_near(jax.jit(lambda p: pj.apply(model, p, tokens))(attached), want)
  assert np.abs(plain - want).max() > 100 * TOLERANCE
  adapted.save_pretrained(tmp_path / "theirs")
  loaded, read = hf_peft.load(tmp_path / "theirs", params, model)
  jax.tree.map(np.testing.assert_array_equal, loaded, attached)
  assert read == mask


@pytest.mark.parametrize("name", _VIRTUAL)
def test_virtual_tokens_of_classifiers(name, tmp_path):
  model, params, batch = _ours("bert", False)
  attached, mask = _drawn(model, params, pj.chain(_VIRTUAL[name], _HEAD))
  hf_peft.save(tmp_path / "ours", attached, model, trained=mask)
  theirs, _ = _theirs("bert")
  adapted = PeftModel.from_pretrained(theirs, tmp_path / "ours")
  want = logits(adapted, batch)
  assert_near(pj.apply(model, attached, *batch), want)
  untuned = {**attached, "bert": params["bert"]}
  assert np.abs(pj.apply(model, untuned, *batch) - want).max() > 100 * TOLERANCE
