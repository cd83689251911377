"""ViTs equal transformers', for models made on the spot: outputs, files, and PEFT's directories."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import ViTForImageClassification, ViTForMaskedImageModeling, ViTModel

import peftjax as pj
from peftjax import hf_peft
from tests.golden import make_bert
from tests.golden.make_vit import images, make, run

pytestmark = [
  pytest.mark.parity,
  pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]

_VIT = dict(
  hidden_size=24,
  num_hidden_layers=4,
  num_attention_heads=3,
  intermediate_size=40,
  image_size=12,
  patch_size=4,
  num_labels=4,
)
_CASES = [
  _VIT,
  {**_VIT, "qkv_bias": False, "hidden_act": "gelu_new", "num_labels": 1},
  {**_VIT, "image_size": [8, 20], "patch_size": [2, 5], "num_channels": 1},
  {**_VIT, "num_hidden_layers": 6, "num_attention_heads": 1, "hidden_act": "relu"},
  {**_VIT, "image_size": 4, "num_attention_heads": 12, "hidden_act": "silu", "num_channels": 5},
  {**_VIT, "image_size": [6, 4], "patch_size": 2, "hidden_act": "gelu_pytorch_tanh"},
]


def _load(directory):
  return ViTForImageClassification.from_pretrained(directory, attn_implementation="eager")


def _ours(model, params, pixels):
  return np.asarray(jax.jit(lambda p: pj.apply(model, p, pixels))(params))


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("seed, case", list(enumerate(_CASES)))
def test_tiny_random_models(seed, case, scan, tmp_path):
  """Within 2e-5 of what is near 1 or less."""
  theirs = make(case, seed)
  theirs.save_pretrained(tmp_path)
  ours, params = pj.load_pretrained(tmp_path, scan_layers=scan)
  assert ours.config.layers >= 4
  want = run(theirs, images(theirs.config, 3, seed))
  both = jax.jit(lambda p, x: (pj.apply(ours, p, x), pj.apply(ours, p, x, hidden=True)[0]))
  for got, name in zip(both(params, want["pixels"]), ("logits", "hidden"), strict=True):
    atol = 2e-5 * max(1, np.abs(want[name]).max())
    np.testing.assert_allclose(got, want[name], atol=atol, rtol=0)


@pytest.mark.parametrize("kind", [ViTModel, ViTForMaskedImageModeling])
def test_bodies_of_other_classes_get_a_new_head(kind, tmp_path):
  whole = make({**_VIT, "encoder_stride": 4}, 0)
  whole.save_pretrained(tmp_path / "whole")
  kind.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "body")
  model, params = pj.load_pretrained(tmp_path / "body", num_labels=3)
  want = run(whole, images(whole.config, 2, 1))
  hidden = pj.apply(model, params, want["pixels"], hidden=True)[0]
  np.testing.assert_allclose(hidden, want["hidden"], atol=5e-5)
  assert params["head"]["classifier"]["kernel"].shape == (24, 3)


def _drawn(method, params, layout=None):
  attached = method.attach(jax.random.key(0), params, layout)
  mask, rng = method.trainable(attached), np.random.default_rng(5)
  draw = lambda on, x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype) if on else x
  return jax.tree.map(draw, mask, attached), mask


@pytest.mark.parametrize("four_bits", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("case", [_CASES[i] for i in (0, 2)])
def test_what_is_saved_has_the_same_logits(case, scan, four_bits, tmp_path):
  make(case, 2).save_pretrained(tmp_path / "base")
  quant = pj.quant.nf4(block_size=32) if four_bits else None
  model, params = pj.load_pretrained(tmp_path / "base", scan_layers=scan, quant=quant, num_labels=5)
  patches = pj.lora(2, 4, "vit/embeddings/patch_embeddings/filters")
  method = pj.chain(pj.lora(2, 4, "all-linear"), patches, pj.unfreeze("head/.*"))
  layout = pj.linen.layout(model, np.zeros((1, *model.config.image), np.float32))
  params, _ = _drawn(method, params, layout)
  pj.save_pretrained(tmp_path / "made", params, of=tmp_path / "base", labels=[*"abcde"])
  theirs = _load(tmp_path / "made")
  assert theirs.config.id2label == dict(enumerate("abcde"))
  want = run(theirs, images(theirs.config, 3, 1))
  np.testing.assert_allclose(_ours(model, params, want["pixels"]), want["logits"], atol=2e-4)


@pytest.mark.parametrize("targets", ["default", "all-linear", "patches"])
@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_lora_goes_to_peft_and_comes_back(scan, targets, tmp_path):
  make(_CASES[2], 3).save_pretrained(tmp_path / "base")
  model, params = pj.load_pretrained(tmp_path / "base", scan_layers=scan)
  method = pj.lora(2, 4) if targets == "default" else pj.lora(2, 4, "all-linear")
  if targets == "patches":  # saved whole
    method = pj.chain(method, pj.unfreeze("vit/embeddings/patch_embeddings/.*"))
  drawn, mask = _drawn(pj.chain(method, pj.unfreeze("head/.*")), params)
  hf_peft.save(tmp_path / "ours", drawn, model, trained=mask)
  adapted = PeftModel.from_pretrained(_load(tmp_path / "base"), tmp_path / "ours")
  base = run(_load(tmp_path / "base"), images(adapted.config, 3, 1))
  want = run(adapted.base_model.model, base["pixels"])["logits"]
  np.testing.assert_allclose(_ours(model, drawn, base["pixels"]), want, atol=1e-4)
  assert np.abs(want - base["logits"]).max() > 0.05
  loaded, again = hf_peft.load(tmp_path / "ours", params, model)
  jax.tree.map(np.testing.assert_array_equal, loaded, drawn)
  assert again == mask


def _older(directory):
  """The directory with the names that modules had in earlier releases, as in files of models."""
  config = json.loads((directory / "adapter_config.json").read_text())
  names = {"q_proj": "query", "v_proj": "value"}
  config["target_modules"] = [names[x] for x in config["target_modules"]]
  (directory / "adapter_config.json").write_text(json.dumps(config))
  tensors = load_file(path := directory / "adapter_model.safetensors")
  for new, old in {"q_proj": "attention.query", "v_proj": "attention.value"}.items():
    tensors = {name.replace(new, old): x for name, x in tensors.items()}
  tensors = {name.replace("vit.layers", "vit.encoder.layer"): x for name, x in tensors.items()}
  save_file(tensors, path)


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_pefts_lora_in_ours(scan, older, tmp_path):
  make(_VIT, 4).save_pretrained(tmp_path / "base")
  names = ["q_proj", "v_proj"]
  config = LoraConfig(r=3, target_modules=names, modules_to_save=["classifier"])
  theirs = get_peft_model(_load(tmp_path / "base"), config)
  make_bert.draw(theirs, 5, "lora_")
  make_bert.draw(theirs, 6, "modules_to_save")
  theirs.save_pretrained(tmp_path / "theirs")
  if older:
    _older(tmp_path / "theirs")
  model, params = pj.load_pretrained(tmp_path / "base", scan_layers=scan)
  loaded, mask = hf_peft.load(tmp_path / "theirs", params, model)
  want = run(theirs.base_model.model, images(theirs.config, 2, 2))
  np.testing.assert_allclose(_ours(model, loaded, want["pixels"]), want["logits"], atol=1e-4)
  trained = sum(x.numel() for x in theirs.parameters() if x.requires_grad)
  assert pj.count(loaded, mask) == trained
