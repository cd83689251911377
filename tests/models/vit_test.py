"""ViT: transformers' outputs, training on images, and what is refused."""

import collections
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file

import peftjax as pj
from peftjax import sharding
from peftjax.core import paths
from peftjax.core.layout import ConvAxes
from peftjax.models import configuration, families, vit
from peftjax.models.pretrained import load
from peftjax.nn import encoder
from peftjax.quant.weight import Quantized
from tests.core.programs import jit

VIT = Path(__file__).parents[1] / "golden" / "image_vit"


@pytest.fixture(scope="module")
def want():
  return load_file(VIT / "expected.safetensors")


@pytest.fixture
def change(tmp_path):
  """The golden directory with its config changed."""

  def make(**fields):
    shutil.copytree(VIT, tmp_path / "vit")
    path = tmp_path / "vit" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return tmp_path / "vit"

  return make


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_outputs_are_those_of_transformers(scan, want):
  model, params, new = load(VIT, scan_layers=scan)

  @jit
  def run(params, x):
    return pj.apply(model, params, x), pj.apply(model, params, x, hidden=True)[0]

  for got, name in zip(run(params, want["pixels"]), ("logits", "hidden"), strict=True):
    np.testing.assert_allclose(got, want[name], atol=2e-5)
    assert got.dtype == jnp.float32
  assert not new and model.config.labels_of == "image"


def test_targets_rules_and_layout():
  """All-linear is all kernels but the head's, without a layout and with; filters are no kernel."""
  model, params = pj.load_pretrained(VIT)
  layout = pj.linen.layout(model, jax.ShapeDtypeStruct((1, 8, 12, 2), jnp.float32))
  kernels = [path for path in paths.leaves(params) if path.endswith("kernel")]
  assert len(pj.lora(2, 4).claims(params)) == 4
  linear = [path for path in kernels if not path.startswith("head/")]
  for given in (None, layout):
    assert sorted(pj.lora(2, 4, "all-linear").claims(params, given)) == sorted(linear)
  patches = "vit/embeddings/patch_embeddings/filters"
  assert layout[patches] == ConvAxes((-4, -3, -2), (-1,))
  attached = pj.lora(2, 4, patches).attach(jax.random.key(0), params, layout)
  assert attached["vit"]["embeddings"]["patch_embeddings"]["filters"].a.shape == (2, 6 * 4 * 2)
  mesh = jax.sharding.AbstractMesh((2, 2), ("fsdp", "tensor"))
  specs = paths.leaves(sharding.specs(params, mesh))
  assert all(any(specs[path]) for path in kernels)
  assert specs["vit/encoder/layers_0/attention/self/query/kernel"] == P("fsdp", "tensor")


@pytest.mark.slow(reason="trains, writes and reads")
def test_a_scanned_base_in_four_bits_trains_on_images_and_is_saved(want, tmp_path):
  """The loss of two steps falls; the directory holds what was trained, merged."""
  quant = pj.quant.nf4(block_size=32)
  model, params = pj.load_pretrained(VIT, scan_layers=True, quant=quant)
  codes = [path for path, leaf in paths.leaves(params).items() if isinstance(leaf, Quantized)]
  assert len(codes) == 6 and all(path.endswith("kernel") for path in codes)
  method = pj.chain(pj.lora(2, 4), pj.unfreeze("head/.*"))
  attached = method.attach(jax.random.key(0), params)
  train, frozen = pj.partition(attached, method.trainable(attached))
  labels = np.arange(4) % 3

  def loss(train):
    logits = pj.apply(model, pj.combine(train, frozen), want["pixels"])
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

  step = jit(jax.value_and_grad(loss))
  before, grads = step(train)
  train = jax.tree.map(lambda x, g: x - 0.1 * g, train, grads)
  assert step(train)[0] < before - 1e-3
  pj.save_pretrained(tmp_path / "made", pj.combine(train, frozen), of=VIT)
  again, dense = pj.load_pretrained(tmp_path / "made")
  got = jit(lambda p: pj.apply(again, p, want["pixels"]))(dense)
  logits = jit(lambda t, f: pj.apply(model, pj.combine(t, f), want["pixels"]))(train, frozen)
  np.testing.assert_allclose(got, logits, atol=1e-4)
  said = json.loads((tmp_path / "made" / "config.json").read_text())
  assert said["architectures"] == ["ViTForImageClassification"]


@pytest.mark.slow(reason="a run")
def test_fit_takes_arrays_of_images(want):
  model, params = pj.load_pretrained(VIT, num_labels=2)
  assert "classifier" in params["head"] and not families.ours(model)
  data = want["pixels"], np.arange(4) % 2
  _, history = pj.fit(model, params, pj.unfreeze("head/.*"), data, steps=2, batch_size=2)
  assert np.isfinite(history.rows[-1]["loss"])


def test_every_place_of_dropout_has_its_own_key_and_rate(change, want, monkeypatch):
  """As transformers has them: embeddings, probabilities and two outputs a layer."""
  seen = []

  def note(key, x, rate):
    seen.extend([] if key is None else [(rate, jax.random.key_data(key).tobytes())])
    return x

  attention = lambda q, k, v, mask, heads, *, key, rate: note(key, v, rate)
  monkeypatch.setattr(vit, "dropout", note)
  monkeypatch.setattr(encoder, "attention", attention)
  directory = change(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.2)
  model, params = pj.load_pretrained(directory)
  pj.apply(model, params, want["pixels"], train=True, rngs={"dropout": jax.random.key(0)})
  assert collections.Counter(rate for rate, _ in seen) == {0.1: 1 + 2 * 2, 0.2: 2}
  assert len(set(seen)) == len({key for _, key in seen}) == len(seen)


@pytest.mark.parametrize(
  "pixels, message",
  [
    (np.ones((2, 2, 8, 12), np.float32), r"go last: write pixel_values.transpose\(0, 2, 3, 1\)"),
    (np.ones((2, 16, 24, 2), np.float32), r"takes \[B, 8, 12, 2\], .* are not interpolated"),
    (np.ones((8, 12, 2), np.float32), r"shape \(8, 12, 2\)"),
    (np.ones((2, 8, 12, 2), np.uint8), "are uint8; give floats"),
  ],
)
def test_pixels_of_another_form_are_refused(pixels, message):
  model, params = pj.load_pretrained(VIT)
  with pytest.raises(ValueError, match=message):
    pj.apply(model, params, pixels)


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"image_size": 12}, r"position_embeddings has shape \(1, 5, 16\); .* means \(1, 7, 16\)"),
    ({"image_size": [8, 12, 3]}, r"image_size is \[8, 12, 3\]"),
    ({"patch_size": 5}, "patch_size is 5; it must divide image_size"),
    ({"num_attention_heads": 3}, "num_attention_heads is 3; it must divide"),
    ({"hidden_act": "mish"}, "hidden_act is 'mish'; it must be one of"),
    ({"num_hidden_layers": 3}, "says that there are 3 layers, .* has 2"),
    ({"architectures": ["DeiTForImageClassification"]}, "model_type 'vit' means ViT"),
  ],
)
def test_configurations_that_are_not_computed_are_refused(fields, message, change, monkeypatch):
  monkeypatch.setattr(jax, "eval_shape", None)
  with pytest.raises(ValueError, match=message):
    load(change(**fields))


def test_heads_of_images_and_of_texts_are_not_taken_for_each_other():
  with pytest.raises(ValueError, match="labels_of.*image"):
    load(VIT, labels_of="text")
  with pytest.raises(ValueError, match="labels_of"):
    load(VIT.parent / "encoder_bert_token", labels_of="image")


def test_what_peft_has_no_place_for_is_refused(want, tmp_path):
  """Adapters of the convolution, and prefixes; nothing is written."""
  model, params = pj.load_pretrained(VIT)
  layout = pj.linen.layout(model, want["pixels"])
  patches = pj.lora(2, 4, "vit/embeddings/patch_embeddings/filters")
  for method, message in ((patches, "a convolution with a LoRA"), (pj.prefix(2), "images")):
    with pytest.raises(ValueError, match=message):
      pj.save_peft(tmp_path, method.attach(jax.random.key(0), params, layout), model)
  assert not list(tmp_path.iterdir())


def test_commands_that_read_texts_refuse_it():
  for refuse in (configuration.pad_id, configuration.end_ids, configuration.check_decoder):
    with pytest.raises(ValueError, match="is of a vit, which reads images: .* pj.fit"):
      refuse(VIT)
