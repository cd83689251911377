"""bitsandbytes' 4-bit files without bitsandbytes: golden ones, damaged ones, our own."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import peftjax as pj
from peftjax.core import paths
from peftjax.io.safetensors_dir import read_config
from peftjax.models import bnb
from peftjax.quant import blockwise
from peftjax.quant.weight import Quantized
from tests.core.programs import jit

GOLDEN = Path(__file__).parents[1] / "golden"
DOWN = "model.layers.1.mlp.down_proj.weight"
STATE = f"{DOWN}.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_a_file_of_transformers_gives_its_logits(scan):
  """Within 1e-4; the linear layers stay in four bits, and the head as it was."""
  want = load_file(GOLDEN / "bnb_tiny" / "expected.safetensors")
  model, params = pj.load_pretrained(GOLDEN / "bnb_tiny", scan_layers=scan)
  kinds = {path: type(leaf) for path, leaf in paths.leaves(params).items()}
  packed = [path for path, kind in kinds.items() if kind is Quantized]
  assert packed == pj.select(params, "all-linear")
  got = jit(lambda p: pj.apply(model, p, want["tokens"], want["mask"]))(params)
  real = want["mask"] > 0
  np.testing.assert_allclose(np.asarray(got)[real], want["logits"][real], atol=1e-4)
  mlp = params["model"]["layers"]["mlp"] if scan else params["model"]["layers_1"]["mlp"]
  dense = mlp["down_proj"]["kernel"].materialize()
  np.testing.assert_array_equal(dense[1] if scan else dense, want["weight"].T)


@pytest.mark.parametrize("block_size", [32, 64, 256])
@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("kind", ["normal", "uniform", "heavy", "zeros", "outlier", "ties"])
def test_codes_are_those_of_bitsandbytes(kind, name, block_size):
  """So are scales and dequantised values, bit for bit; FP4's two zeros count as one."""
  want = load_file(GOLDEN / "bnb_codes.safetensors")
  part = lambda what: want[f"{kind}.{name}.{block_size}.{what}"]
  w = want[f"{kind}.w"]
  fmt = pj.quant.nf4(block_size, False) if name == "nf4" else pj.quant.fp4(block_size, False)
  made = pj.quantize({"kernel": jnp.asarray(w.T)}, fmt)["kernel"]
  turned = lambda flat: jnp.asarray(flat.reshape(len(w), -1).T)
  codes = [np.asarray(blockwise.unpack(c, -2)) for c in (made.codes, turned(part("codes")))]
  if name == "fp4":
    codes = [np.where(c == 8, 0, c) for c in codes]
  np.testing.assert_array_equal(*codes)
  np.testing.assert_array_equal(made.scales, turned(part("absmax")))
  np.testing.assert_array_equal(made.materialize(), part("dequantised").T)


@pytest.fixture
def copy(tmp_path):
  """A copy of the golden directory, and a way to change its tensors."""
  directory = tmp_path / "model"
  shutil.copytree(GOLDEN / "bnb_tiny", directory)

  def change(fn):
    tensors = load_file(directory / "model.safetensors")
    fn(tensors)
    save_file(tensors, directory / "model.safetensors")
    return directory

  return change


def _state(tensors, **fields):
  """Writes fields into the JSON; None removes one."""
  state = {**json.loads(tensors[STATE].tobytes()), **fields}
  text = json.dumps({k: v for k, v in state.items() if v is not None})
  tensors[STATE] = np.frombuffer(text.encode(), np.uint8)


def _raw(text):
  return lambda t: t.update({STATE: np.frombuffer(text, np.uint8)})


def _shifted(tensors, part, by):
  tensors[f"{DOWN}.{part}"] = tensors[f"{DOWN}.{part}"] + np.float32(by)


@pytest.mark.parametrize(
  "change, message",
  [
    (_raw(b'{"quant_type": '), "is not readable JSON"),
    (_raw(b"\x80\x04\x95pickle"), "is not readable JSON"),
    (_raw(b"[" * 100_000), "is not readable JSON"),
    (_raw(b"[1, 2]"), "is a JSON list"),
    (lambda t: _state(t, blocksize=None), "lacks blocksize"),
    (lambda t: _state(t, nested_offset=None), "lacks nested_offset"),
    (lambda t: _state(t, nested_offset=float("nan")), "has nested_offset 'nan'"),
    (lambda t: _state(t, nested_blocksize=128), "has nested_blocksize '128'"),
    (lambda t: _state(t, blocksize=48), "has blocksize '48'"),
    (lambda t: _state(t, blocksize=[64]), r"has blocksize '\[64\]'"),
    (lambda t: _state(t, dtype="int8"), "has dtype 'int8'"),
    (lambda t: _state(t, quant_type="fp4"), "has quant_type 'fp4'"),
    (lambda t: _state(t, shape=[128]), r"has shape '\[128\]'"),
    (lambda t: _state(t, shape=[128, -192]), "has shape"),
    (lambda t: _state(t, shape=[128, 191]), "has shape"),
    (lambda t: _state(t, shape=[128, 194]), r"12288 bytes, .*\(128, 194\) needs 12416"),
    (lambda t: _state(t, blocksize=32), r"absmax is uint8 \(384,\).* means uint8 \(768,\)"),
    (lambda t: t.update({DOWN: t[DOWN][:-1].copy()}), "has 12287 bytes"),
    (lambda t: t.pop(DOWN), "has 0 bytes"),
    (lambda t: t.pop(f"{DOWN}.quant_map"), "there is no .*quant_map"),
    (lambda t: t.pop(f"{DOWN}.nested_absmax"), "there is no .*nested_absmax"),
    (lambda t: t.pop(STATE), "there is .*absmax, but no .*bitsandbytes__nf4"),
    (lambda t: t.update({STATE[:-3] + "nf5": t.pop(STATE)}), "quant_type 'nf5' is not one of nf4"),
    (lambda t: _shifted(t, "quant_map", 2e-6), "quant_map is not the one"),
    (lambda t: _shifted(t, "nested_quant_map", 2e-6), "nested_quant_map is not the one"),
    (lambda t: _shifted(t, "nested_absmax", np.nan), "not all finite and positive"),
    (lambda t: _shifted(t, "nested_absmax", -9), "not all finite and positive"),
  ],
)
def test_a_damaged_state_is_refused(copy, change, message):
  """By the tensor's name, with what to do."""
  directory = copy(change)
  with pytest.raises(ValueError, match=f"(?s){DOWN}.*{message}.*Save the model again") as error:
    pj.load_pretrained(directory)
  assert len(str(error.value)) < 700


def test_a_difference_of_rounding_in_the_maps_is_none(copy):
  pj.load_pretrained(copy(lambda t: _shifted(t, "quant_map", 5e-7)))


def test_four_bits_are_not_quantised_again():
  with pytest.raises(ValueError, match="has 4 bits already: load .* without `quant`"):
    pj.load_pretrained(GOLDEN / "bnb_tiny", quant=pj.quant.nf4())


def test_another_shape_than_the_config_means(copy):
  """A state that is sound, but not of this model."""
  directory = copy(lambda t: _state(t, shape=[192, 128]))
  with pytest.raises(ValueError, match=rf"{DOWN} has shape \(192, 128\); .*config.json means"):
    pj.load_pretrained(directory)


def test_rows_that_are_no_whole_number_of_blocks(copy):
  """Quantised again, with the error in a warning; nothing else changes."""
  dense = load_file(GOLDEN / "bnb_tiny" / "expected.safetensors")["weight"]
  fmt = pj.quant.nf4(128, False)  # 192 = 128 + 64
  flat = pj.quantize({"kernel": jnp.asarray(dense.reshape(-1, 1))}, fmt)["kernel"]

  def change(tensors):
    del tensors[f"{DOWN}.nested_absmax"], tensors[f"{DOWN}.nested_quant_map"]
    tensors[DOWN] = np.asarray(flat.codes)
    tensors[f"{DOWN}.absmax"] = np.asarray(flat.scales).reshape(-1)
    _state(tensors, blocksize=128, nested_offset=None)

  with pytest.warns(UserWarning, match=rf"{DOWN} .*relative error of (0.0\d+)") as seen:
    params = pj.load_pretrained(copy(change))[1]
  assert len(seen) == 1
  got = params["model"]["layers_1"]["mlp"]["down_proj"]["kernel"]
  assert got.fmt == fmt
  was = np.asarray(flat.materialize()).reshape(128, 192).T
  off = np.linalg.norm(got.materialize() - was) / np.linalg.norm(was)
  assert 0 < off < 0.1 and f"{off:.4f}" in str(seen[0].message)


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_what_is_written_is_read_back(scan, tmp_path):
  """Every array; the tensors are byte for byte those of transformers."""
  model, params = pj.load_pretrained(GOLDEN / "bnb_tiny", scan_layers=scan)
  bnb.save(tmp_path / "made", params, model, read_config(GOLDEN / "bnb_tiny"))
  again = pj.load_pretrained(tmp_path / "made", scan_layers=scan)[1]
  assert jax.tree.structure(again) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, again, params)
  got, want = (load_file(d / "model.safetensors") for d in (tmp_path / "made", GOLDEN / "bnb_tiny"))
  assert set(got) == set(want)
  for name, value in want.items():
    assert (got[name].dtype, got[name].shape) == (value.dtype, value.shape), name
    np.testing.assert_array_equal(got[name], value, name)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["made"]


def _dense():
  """The golden model, its kernels dense."""
  model, params = pj.load_pretrained(GOLDEN / "bnb_tiny")
  dense = lambda _, leaf: leaf.materialize() if isinstance(leaf, Quantized) else leaf
  return model, paths.map_leaves(dense, params)


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda p: p, "has no quantised kernel"),
    (
      lambda p: pj.quantize(p, pj.quant.int8()),
      "is in int8; bitsandbytes has kernels in nf4 and fp4",
    ),
    (lambda p: pj.quantize(p, pj.quant.nf4(codebook="textbook")), "is in nf4_textbook"),
    (lambda p: pj.quantize(p, pj.quant.nf4(), "embed_tokens"), "embed_tokens/embedding is a table"),
    (
      lambda p: pj.quantize(p, pj.quant.nf4(128)),
      r"layers_0/mlp/down_proj/kernel \(192, 128\) has 192 inputs, not a multiple .* 128",
    ),
    (
      lambda p: pj.quantize(pj.quantize(p, pj.quant.nf4(), "q_proj"), pj.quant.nf4(32), "k_proj"),
      "one file has one format",
    ),
    (
      lambda p: pj.lora(2, targets="q_proj").attach(
        jax.random.key(0), pj.quantize(p, pj.quant.nf4())
      ),
      "is a LoRA, and this writes no adapters.*pj.save_peft",
    ),
  ],
)
def test_what_cannot_be_written_is_refused(change, message, tmp_path):
  """Before anything is."""
  model, params = _dense()
  with pytest.raises(ValueError, match=message):
    bnb.save(tmp_path / "made", change(params), model, read_config(GOLDEN / "bnb_tiny"))
  assert not list(tmp_path.iterdir())


def test_a_directory_appears_whole_or_not_at_all(tmp_path, monkeypatch):
  """Nothing is left of a write that fails, and nothing is written over."""
  model, params = pj.load_pretrained(GOLDEN / "bnb_tiny")
  config = read_config(GOLDEN / "bnb_tiny")

  def fail(*args):
    raise OSError("no space left")

  with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
    patch.setattr("peftjax.io.safetensors_dir.write", fail)
    bnb.save(tmp_path / "made", params, model, config)
  assert not list(tmp_path.iterdir())
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "notes").write_text("mine")
  with pytest.raises(ValueError, match="full is not an empty directory: give a new one"):
    bnb.save(tmp_path / "full", params, model, config)
