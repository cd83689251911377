"""`load_pretrained(quant=...)`: what it returns, where it puts it, what it refuses beforehand."""

import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import peftjax as pj
from peftjax.core import paths
from peftjax.io.safetensors_dir import TensorDir
from peftjax.models import gpt2, llama
from peftjax.quant import stream

LLAMA = {
  "model_type": "llama",
  "vocab_size": 64,
  "hidden_size": 128,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "intermediate_size": 192,
  "max_position_embeddings": 32,
  "rms_norm_eps": 1e-5,
}
GPT2 = {
  "model_type": "gpt2",
  "vocab_size": 64,
  "n_embd": 128,
  "n_layer": 2,
  "n_head": 4,
  "n_positions": 32,
  "layer_norm_epsilon": 1e-5,
  "embd_pdrop": 0.0,
  "attn_pdrop": 0.0,
  "resid_pdrop": 0.0,
}
UP = "model.layers.1.mlp.up_proj.weight"


def _write(directory, config, dtype=np.float32, **changes):
  """A checkpoint of random weights."""
  family = {"llama": llama, "gpt2": gpt2}[config["model_type"]]
  config = {**config, **changes}
  model = family.MODEL(family.CONFIG.from_hf(config))
  abstract = jax.eval_shape(
    lambda: model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
  )
  rng, tensors = np.random.default_rng(0), {}
  for path, leaf in paths.leaves(abstract).items():
    shape = leaf.shape[::-1] if path.endswith("kernel") and family.OUT_FIRST else leaf.shape
    tensors[family.hf_name(path)] = rng.standard_normal(shape).astype(dtype)
  directory.mkdir()
  save_file(tensors, directory / "model.safetensors")
  (directory / "config.json").write_text(json.dumps(config))
  return directory


def _assert_equal(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert one.dtype == other.dtype
    np.testing.assert_array_equal(one, other)


@pytest.fixture
def small_pieces(monkeypatch):
  monkeypatch.setattr(stream, "PIECE", 4000)


@pytest.mark.fast_for("llama-bfloat16-scanned|gpt2-float32-(un)?(scanned|rolled)")
@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_it_is_quantising_what_was_loaded(config, dtype, scan, small_pieces, tmp_path):
  """Bit for bit, layers unrolled or scanned, read in pieces, table included."""
  directory = _write(tmp_path / "model", config, dtype)
  where = ["all-linear", r".*(embed_tokens|wte)/embedding"]
  _, dense = pj.load_pretrained(directory)
  want = pj.quantize(dense, pj.quant.nf4(), where)
  _, got = pj.load_pretrained(directory, quant=pj.quant.nf4(), where=where, scan_layers=scan)
  if not scan:
    return _assert_equal(got, want)
  root = "model" if config is LLAMA else "transformer"
  layers = [want[root].pop(f"layers_{i}") for i in range(2 + (config is LLAMA))]
  want[root]["layers"] = jax.tree.map(lambda *xs: jnp.stack(xs), *layers)
  _assert_equal(got, want)


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("quant", [None, pj.quant.nf4()], ids=["dense", "nf4"])
def test_on_a_mesh(quant, scan, tmp_path):
  """The same numbers, each leaf where `pj.sharding.shardings` puts it."""
  directory = _write(tmp_path / "model", LLAMA)
  mesh = pj.sharding.make_mesh("data:2,fsdp:2,tensor:2")
  _, want = pj.load_pretrained(directory, quant=quant, scan_layers=scan)
  _, got = pj.load_pretrained(directory, quant=quant, scan_layers=scan, mesh=mesh)
  _assert_equal(got, want)
  put = pj.sharding.shardings(want, mesh)
  assert all(jax.tree.leaves(jax.tree.map(lambda x, s: x.sharding == s, got, put)))
  body = got["model"]["layers"] if scan else got["model"]["layers_1"]
  kernel = body["mlp"]["up_proj"]["kernel"]
  assert not jax.tree.leaves(kernel)[0].sharding.is_fully_replicated


@pytest.fixture
def no_reads(monkeypatch):
  """Fails as soon as a weight is read."""

  def read(*args):
    raise RuntimeError("a weight was read")

  monkeypatch.setattr(TensorDir, "read", read)
  monkeypatch.setattr(TensorDir, "read_rows", read)


def test_a_read_would_be_seen(no_reads, tmp_path):
  """The control of the tests below."""
  with pytest.raises(RuntimeError, match="a weight was read"):
    pj.load_pretrained(_write(tmp_path / "model", LLAMA), quant=pj.quant.nf4())


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_an_odd_contraction_size_is_refused_before_anything_is_read(scan, no_reads, tmp_path):
  directory = _write(tmp_path / "model", LLAMA, intermediate_size=81)
  with pytest.raises(ValueError, match=r"down_proj/kernel \(81, 128\) has the odd .*pj.quant.int8"):
    pj.load_pretrained(directory, quant=pj.quant.nf4(), scan_layers=scan)


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda t: t.pop(UP), rf"1 tensors are missing .*{UP}"),
    (lambda t: t.update({UP: t[UP].T.copy()}), rf"{UP} has shape"),
    (lambda t: t.update(extra=t[UP]), "no place in this model:.*extra"),
  ],
)
def test_a_wrong_tensor_is_refused_before_anything_is_read(change, message, no_reads, tmp_path):
  directory = _write(tmp_path / "model", LLAMA)
  tensors = load_file(directory / "model.safetensors")
  change(tensors)
  save_file(tensors, directory / "model.safetensors")
  with pytest.raises(ValueError, match=f"(?s){message}"):
    pj.load_pretrained(directory, quant=pj.quant.nf4())


def test_a_missing_shard_is_refused_before_anything_is_read(no_reads, tmp_path):
  directory = _write(tmp_path / "model", LLAMA)
  tensors = load_file(directory / "model.safetensors")
  where = {name: f"{name[:14]}.safetensors" for name in tensors}
  for shard in set(where.values()):
    part = {name: tensors[name] for name in tensors if where[name] == shard}
    save_file(part, directory / shard)
  (directory / "model.safetensors").unlink()
  (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
  (directory / where[UP]).unlink()
  with pytest.raises(ValueError, match=f"lists the shard '{where[UP]}', which is not there"):
    pj.load_pretrained(directory, quant=pj.quant.nf4())


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_a_nan_is_named_with_its_layer(scan, tmp_path):
  directory = _write(tmp_path / "model", LLAMA)
  tensors = load_file(directory / "model.safetensors")
  tensors[UP][190, 127] = np.nan
  save_file(tensors, directory / "model.safetensors")
  with pytest.raises(ValueError, match="model/layers_1/mlp/up_proj/kernel has NaN or infinite"):
    pj.load_pretrained(directory, quant=pj.quant.nf4(), scan_layers=scan)


def test_rows_are_rows_of_the_tensor(tmp_path):
  """In every dtype; a file that was cut since is refused by name."""
  directory = _write(tmp_path / "model", LLAMA, ml_dtypes.bfloat16)
  tensors = TensorDir(directory)
  np.testing.assert_array_equal(tensors.read_rows(UP, 5, 77), tensors.read(UP)[5:77])
  assert tensors.read_rows(UP, 0, 3).dtype == ml_dtypes.bfloat16
  path = directory / "model.safetensors"
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  with pytest.raises(ValueError, match="changed while the file was in use|cannot be read"):
    [tensors.read_rows(name, 0, 1) for name in tensors.names()]
  shutil.rmtree(directory)
  with pytest.raises(ValueError, match="cannot be read"):
    tensors.read_rows(UP, 0, 1)
