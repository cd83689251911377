"""GGUF files: written here with the gguf package as llama.cpp's converter does, read as a model."""

import json

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from safetensors.numpy import load_file

import peftjax as pj
from peftjax import data
from peftjax.core import paths
from peftjax.data import chat
from peftjax.io import safetensors_dir
from peftjax.io.gguf import GGUFFile, hf_name
from peftjax.models import llama
from peftjax.quant import stream

NAMES = {
  "self_attn.q_proj": "attn_q",
  "self_attn.k_proj": "attn_k",
  "self_attn.v_proj": "attn_v",
  "self_attn.o_proj": "attn_output",
  "mlp.gate_proj": "ffn_gate",
  "mlp.up_proj": "ffn_up",
  "mlp.down_proj": "ffn_down",
  "input_layernorm": "attn_norm",
  "post_attention_layernorm": "ffn_norm",
}
WORDS = ["<|end|>", "a", "b", "c", "ab", "Ġ", "1", "2", "Ġa", "12"]


def permute(w, heads):
  """llama.cpp's converter: rows of the two halves of a head, one after the other."""
  return w.reshape(heads, 2, w.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(w.shape)


def write(path, directory, kind=Type.F32, arch="llama", extra=None, tokens=96, skip=()):
  """A Hugging Face directory of a Llama as a GGUF file."""
  config = safetensors_dir.read_config(directory)
  tensors = safetensors_dir.TensorDir(directory)
  writer = gguf.GGUFWriter(path, arch)
  writer.add_embedding_length(config["hidden_size"])
  writer.add_block_count(config["num_hidden_layers"])
  writer.add_head_count(config["num_attention_heads"])
  writer.add_head_count_kv(config["num_key_value_heads"])
  writer.add_feed_forward_length(config["intermediate_size"])
  writer.add_context_length(config["max_position_embeddings"])
  writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
  writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
  words = WORDS + [f"<{i}>" for i in range(tokens - len(WORDS))]
  writer.add_tokenizer_model("gpt2")
  writer.add_tokenizer_pre("smollm")
  writer.add_token_list(words)
  writer.add_token_types([3] + [1] * (len(words) - 1))
  writer.add_token_merges(["a b", "Ġ a", "1 2"])
  writer.add_eos_token_id(0)
  writer.add_chat_template("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<ai>")
  for name in tensors.names():
    array = tensors.read(name)
    short = {
      "model.embed_tokens.weight": "token_embd.weight",
      "model.norm.weight": "output_norm.weight",
      "lm_head.weight": "output.weight",
    }.get(name)
    if short is None:
      _, _, layer, rest = name.split(".", 3)
      module, _, last = rest.rpartition(".")
      short = f"blk.{layer}.{NAMES[module]}.{last}"
      if NAMES[module] in ("attn_q", "attn_k"):
        key = "num_attention_heads" if NAMES[module] == "attn_q" else "num_key_value_heads"
        array = permute(array, config[key])
    if short in skip:
      continue
    if kind != Type.F32 and array.ndim == 2:
      writer.add_tensor(short, gguf.quants.quantize(array, kind), raw_dtype=kind)
    else:
      writer.add_tensor(short, array)
  for name, array, raw in extra or ():
    writer.add_tensor(name, array, raw_dtype=raw)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


@pytest.fixture(scope="module")
def directory(pytestconfig):
  return pytestconfig.rootpath / "tests" / "golden" / "llama_tiny"


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_a_file_gives_the_model_it_was_made_from(directory, scan, tmp_path):
  """Query and key rows are put back in order: the logits are transformers'."""
  path = write(tmp_path / "m.gguf", directory)
  model, params = pj.load_pretrained(path, scan_layers=scan)
  expected = load_file(directory / "expected.safetensors")
  got = pj.apply(model, params, expected["tokens"], expected["mask"])
  real = expected["mask"] > 0
  np.testing.assert_allclose(got[real], expected["logits"][real], atol=1e-4)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
  """A Llama whose rows are of 32, as ggml's blocks are."""
  folder = tmp_path_factory.mktemp("wide")
  config = dict(
    model_type="llama",
    vocab_size=96,
    hidden_size=64,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=96,
    max_position_embeddings=32,
    rms_norm_eps=1e-5,
    rope_parameters={"rope_theta": 100.0, "rope_type": "default"},
  )
  (folder / "config.json").write_text(json.dumps(config))
  model = llama.MODEL(llama.CONFIG.from_hf(config))
  params = model.init(jax.random.key(0), jnp.ones((1, 4), jnp.int32))["params"]
  tensors = {
    llama.hf_name(p): np.ascontiguousarray(np.asarray(x).T if p.endswith("kernel") else x)
    for p, x in paths.leaves(params).items()
  }
  safetensors_dir.write(folder / "model.safetensors", tensors)
  return folder


@pytest.mark.parametrize("kind", [Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1])
def test_every_type_is_dequantised_as_the_package_does(wide, kind, tmp_path):
  """Through its own quantise and dequantise, tensor by tensor."""
  file = GGUFFile(write(tmp_path / "m.gguf", wide, kind))
  tensors = safetensors_dir.TensorDir(wide)
  for name in tensors.names():
    array = tensors.read(name)
    if array.ndim == 2 and "q_proj" not in name and "k_proj" not in name:
      array = gguf.quants.dequantize(gguf.quants.quantize(array, kind), kind)
      np.testing.assert_array_equal(file.read(name), array.reshape(tensors.info(name).shape))
    assert file.info(name).shape == tensors.info(name).shape
    assert np.abs(file.read(name) - tensors.read(name)).max() < 0.02


@pytest.mark.parametrize("kind", [Type.F32, Type.Q8_0, Type.Q4_1])
def test_rows_are_rows_of_the_tensor(wide, kind, tmp_path, monkeypatch):
  """Of every tensor, query and key included, whatever the size of the pieces."""
  file = GGUFFile(write(tmp_path / "m.gguf", wide, kind))
  whole = {name: file.read(name) for name in file.names()}
  monkeypatch.setattr(stream, "PIECE", 7 * 64)
  for name, array in whole.items():
    np.testing.assert_array_equal(file.read(name), array)
    np.testing.assert_array_equal(file.read_rows(name, 3, 30), array[3:30])
    assert file.read_rows(name, 3, 30).base is None and array.dtype == np.float32


def test_a_quantised_load_is_quantising_what_was_loaded(wide, tmp_path, monkeypatch):
  """Bit for bit, though no matrix is dequantised as a whole."""
  path = write(tmp_path / "m.gguf", wide, Type.Q8_0)
  _, dense = pj.load_pretrained(path)
  want = pj.quantize(dense, pj.nf4(32))
  monkeypatch.setattr(stream, "PIECE", 7 * 64)
  _, got = pj.load_pretrained(path, quant=pj.nf4(32))
  assert jax.tree.structure(got) == jax.tree.structure(want)
  jax.tree.map(np.testing.assert_array_equal, got, want)


def test_the_tokenizer_splits_digits_and_knows_control_tokens(wide, tmp_path):
  """Byte-level BPE; digits stand alone, so "12" is never merged."""
  path = write(tmp_path / "m.gguf", wide)
  tokenizer = data.load_tokenizer(str(path))
  ids = tokenizer.encode("ab a12<|end|>", add_special_tokens=False).ids
  assert [WORDS[i] for i in ids] == ["ab", "Ġa", "1", "2", "<|end|>"]
  assert tokenizer.decode([4, 8]) == "ab a"


def test_the_chat_template_is_rendered(wide, tmp_path):
  path = write(tmp_path / "m.gguf", wide)
  messages = [{"role": "user", "content": "hello"}]
  assert chat.render(chat.template(path), messages) == "<user>hello<ai>"
  with pytest.raises(ValueError, match="has no chat template"):
    chat.template(wide)
  with pytest.raises(ValueError, match="no system role"):
    chat.render("{{ raise_exception('no system role') }}", messages)


def test_unsupported_files_are_refused(wide, tmp_path):
  """Another type, another architecture, stretched frequencies, half a file, none at all."""
  odd = np.zeros((4, 144), np.uint8)
  path = write(tmp_path / "q.gguf", wide, extra=[("blk.0.x.weight", odd, Type.Q4_K)])
  with pytest.raises(ValueError, match="blk.0.x.weight has type Q4_K.*llama-quantize"):
    GGUFFile(path)
  with pytest.raises(ValueError, match="architecture 'gemma'"):
    GGUFFile(write(tmp_path / "a.gguf", wide, arch="gemma"))
  path = write(tmp_path / "r.gguf", wide, extra=[("rope_freqs.weight", np.ones(8, "f4"), None)])
  with pytest.raises(ValueError, match="rope_freqs.weight"):
    GGUFFile(path)
  good = write(tmp_path / "g.gguf", wide).read_bytes()
  for size in (0, 3, 100, len(good) // 2):
    half = tmp_path / f"half{size}.gguf"
    half.write_bytes(good[:size])
    with pytest.raises(ValueError, match="not a sound GGUF file"):
      GGUFFile(half)
  with pytest.raises(ValueError, match="no file"):
    GGUFFile(tmp_path / "none.gguf")
  with pytest.raises(ValueError, match="(?s)1 tensors are missing.*model.norm.weight"):
    pj.load_pretrained(write(tmp_path / "m.gguf", wide, skip=("output_norm.weight",)))


def test_names():
  assert hf_name("output.weight") == "lm_head.weight"
  assert hf_name("blk.10.ffn_down.bias") == "model.layers.10.mlp.down_proj.bias"
