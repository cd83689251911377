"""GGUF files: written here with the gguf package as llama.cpp's converter does, read as a model."""

import dataclasses
import json
import math

import gguf
import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from safetensors.numpy import load_file

import peftjax as pj
from peftjax import data
from peftjax.data import chat
from peftjax.io import safetensors_dir
from peftjax.io.gguf import GGUFFile, hf_name, types
from peftjax.models import llama
from peftjax.nn import rope
from peftjax.quant import stream
from tests import gguf_files
from tests.gguf_files import WORDS


@pytest.fixture(scope="module")
def golden(pytestconfig):
  return pytestconfig.rootpath / "tests" / "golden"


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_a_file_gives_the_model_it_was_made_from(golden, scan, tmp_path):
  """Query and key rows are put back in order: the logits are transformers'."""
  directory = golden / "llama_tiny"
  path = gguf_files.model(tmp_path / "m.gguf", directory)
  model, params = pj.load_pretrained(path, scan_layers=scan)
  expected = load_file(directory / "expected.safetensors")
  got = pj.apply(model, params, expected["tokens"], expected["mask"])
  real = expected["mask"] > 0
  np.testing.assert_allclose(got[real], expected["logits"][real], atol=1e-4)


@pytest.mark.parametrize(
  ("name", "arch"),
  [("llama_tiny", "llama"), ("llama_linear_tiny", "llama"), ("qwen2_tiny", "qwen2")],
)
def test_tensors_and_configuration_are_the_directorys(golden, name, arch, tmp_path):
  """With biases too, of which query's and key's are put back in order; Qwen2's never left it."""
  directory = golden / name
  values = {"llama__rope__scaling__factor": 2.0} if "linear" in name else {}
  file = GGUFFile(gguf_files.model(tmp_path / "m.gguf", directory, arch=arch, **values))
  tensors = safetensors_dir.TensorDir(directory)
  assert file.names() == tuple(sorted(tensors.names()))
  for tensor in tensors.names():
    np.testing.assert_array_equal(file.read(tensor), tensors.read(tensor))
  want = llama.CONFIG.from_hf(safetensors_dir.read_config(directory))
  got = llama.CONFIG.from_hf(file.config)
  assert got.frequencies()[0] == pytest.approx(want.frequencies()[0], rel=1e-6)
  assert got.eps == pytest.approx(want.eps, rel=1e-6)  # of float32
  assert dataclasses.replace(got, rope_scaling=(), eps=0.0) == dataclasses.replace(
    want, rope_scaling=(), eps=0.0
  )


def test_a_linear_stretch_is_llama_cpps_default_where_there_is_a_factor(golden, tmp_path):
  """Its old name is read too; with type "none" there is none."""
  write = lambda **how: gguf_files.model(tmp_path / "m.gguf", golden / "llama_tiny", **how)
  linear = {"rope_type": "linear", "factor": 2.0}
  assert GGUFFile(write(llama__rope__scaling__factor=2.0)).config["rope_scaling"] == linear
  assert GGUFFile(write(llama__rope__scale_linear=2.0)).config["rope_scaling"] == linear
  none = write(llama__rope__scaling__factor=2.0, llama__rope__scaling__type="none")
  assert "rope_scaling" not in GGUFFile(none).config


def test_llama_3s_stretch_is_read_from_its_tensor(golden, tmp_path):
  """rope_freqs.weight, by the formula of llama.cpp's converter; another tensor is refused."""
  size, theta = 12, 500.0
  omega = theta ** -(np.arange(0, size, 2) / size)
  write = lambda values: gguf_files.model(
    tmp_path / "m.gguf",
    golden / "llama3_tiny",
    extra=[("rope_freqs.weight", np.array(values, np.float32), None)],
  )
  for length, factor in ((8, 8.0), (32, 32.0)):
    divisors = []
    for wave in 2 * math.pi / omega:
      smooth = (length / wave - 1) / (4 - 1)
      divisors.append(np.clip(1 / ((1 - smooth) / factor + smooth), 1, factor))
      if smooth < 0:
        divisors[-1] = factor
    assert any(1 < divisor < factor for divisor in divisors)  # in the ramp
    said = dict(factor=factor, low_freq_factor=1.0, high_freq_factor=4.0)
    said |= {"rope_type": "llama3", "original_max_position_embeddings": length}
    got = GGUFFile(write(divisors)).config["rope_scaling"]
    np.testing.assert_allclose(
      rope.frequencies(size, theta, got)[0], rope.frequencies(size, theta, said)[0], rtol=1e-6
    )
    np.testing.assert_allclose(rope.frequencies(size, theta, got)[0], omega / divisors, rtol=1e-6)
  for values in (np.linspace(1, 8, 6), [np.nan] * 6, [0] * 6, [-1] * 6, [1] * 5):
    with pytest.raises(ValueError, match=r"m\.gguf .*rope_freqs\.weight"):
      GGUFFile(write(values))


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
  layer, draw = "model.layers.0", np.random.default_rng(0)
  shapes = {
    "model.embed_tokens": (96, 64),
    "lm_head": (96, 64),
    f"{layer}.self_attn.q_proj": (64, 64),
    f"{layer}.self_attn.k_proj": (32, 64),
    f"{layer}.self_attn.v_proj": (32, 64),
    f"{layer}.self_attn.o_proj": (64, 64),
    f"{layer}.mlp.gate_proj": (96, 64),
    f"{layer}.mlp.up_proj": (96, 64),
    f"{layer}.mlp.down_proj": (64, 96),
    f"{layer}.input_layernorm": (64,),
    f"{layer}.post_attention_layernorm": (64,),
    "model.norm": (64,),
  }
  tensors = {
    f"{name}.weight": draw.normal(0, 0.05, shape).astype(np.float32)
    for name, shape in shapes.items()
  }
  safetensors_dir.write(folder / "model.safetensors", tensors)
  return folder


@pytest.mark.parametrize("kind", [Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1])
def test_what_is_quantised_is_near_what_was(wide, kind, tmp_path):
  """Through the package's own quantise and dequantise, tensor by tensor."""
  file = GGUFFile(gguf_files.model(tmp_path / "m.gguf", wide, kind))
  tensors = safetensors_dir.TensorDir(wide)
  for name in tensors.names():
    array = tensors.read(name)
    if array.ndim == 2 and "q_proj" not in name and "k_proj" not in name:
      array = gguf.quants.dequantize(gguf.quants.quantize(array, kind), kind)
      np.testing.assert_array_equal(file.read(name), array.reshape(tensors.info(name).shape))
    assert file.info(name).shape == tensors.info(name).shape
    assert np.abs(file.read(name) - tensors.read(name)).max() < 0.02


def test_every_type_of_the_package_is_read_by_rows(tmp_path, monkeypatch):
  """Bytes drawn at random are blocks of any type: what is read is what the package makes of all."""
  assert {"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q5_0", "Q5_1", "IQ4_XS", "TQ1_0"} <= {*types()}
  draw = np.random.default_rng(0)
  norm, table = np.ones(256, np.float32), np.ones((len(WORDS), 256), np.float32)
  monkeypatch.setattr(stream, "PIECE", 7 * 256)
  for name in types():
    kind = Type[name]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    gguf_files.add(
      writer,
      {
        "llama.embedding_length": 256,
        "llama.block_count": 1,
        "llama.attention.head_count": 2,
        "llama.feed_forward_length": 256,
        "llama.context_length": 8,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.tokens": WORDS,
      },
    )
    writer.add_tensor("token_embd.weight", table)
    for tensor in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
      writer.add_tensor(f"{tensor}.weight", norm)
    for module in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
      drawn = draw.integers(0, 256, (256, 256 // block * size), np.uint8)
      writer.add_tensor(f"blk.0.{module}.weight", drawn, raw_dtype=kind)
    gguf_files.finish(writer)
    file = GGUFFile(tmp_path / "m.gguf")
    with np.errstate(all="ignore"):
      want = gguf.quants.dequantize(drawn, kind)
    down = "model.layers.0.mlp.down_proj.weight"
    np.testing.assert_array_equal(file.read(down), want)
    np.testing.assert_array_equal(file.read_rows(down, 100, 111), want[100:111])
    query = "model.layers.0.self_attn.q_proj.weight"
    np.testing.assert_array_equal(file.read_rows(query, 3, 90), file.read(query)[3:90])


@pytest.mark.parametrize("kind", [Type.F32, Type.Q8_0, Type.Q4_1])
def test_rows_are_rows_of_the_tensor(wide, kind, tmp_path, monkeypatch):
  """Of every tensor, query and key included, whatever the size of the pieces."""
  file = GGUFFile(gguf_files.model(tmp_path / "m.gguf", wide, kind))
  whole = {name: file.read(name) for name in file.names()}
  monkeypatch.setattr(stream, "PIECE", 7 * 64)
  for name, array in whole.items():
    np.testing.assert_array_equal(file.read(name), array)
    np.testing.assert_array_equal(file.read_rows(name, 3, 30), array[3:30])
    assert file.read_rows(name, 3, 30).base is None and array.dtype == np.float32
    assert file.read_rows(name, 5, 5).shape == (0, *array.shape[1:])


def test_a_quantised_load_is_quantising_what_was_loaded(wide, tmp_path, monkeypatch):
  """Bit for bit, though no matrix is dequantised as a whole."""
  path = gguf_files.model(tmp_path / "m.gguf", wide, Type.Q8_0)
  _, dense = pj.load_pretrained(path)
  want = pj.quantize(dense, pj.quant.nf4(32))
  monkeypatch.setattr(stream, "PIECE", 7 * 64)
  _, got = pj.load_pretrained(path, quant=pj.quant.nf4(32))
  assert jax.tree.structure(got) == jax.tree.structure(want)
  jax.tree.map(np.testing.assert_array_equal, got, want)


def test_the_tokenizer_splits_digits_and_knows_control_tokens(wide, tmp_path):
  """Byte-level BPE; digits stand alone, so "12" is never merged."""
  path = gguf_files.model(tmp_path / "m.gguf", wide)
  tokenizer = data.load_tokenizer(str(path))
  ids = tokenizer.encode("ab a12<|end|>", add_special_tokens=False).ids
  assert [WORDS[i] for i in ids] == ["ab", "Ġa", "1", "2", "<|end|>"]
  assert tokenizer.decode([4, 8]) == "ab a"


def test_the_chat_template_is_rendered(wide, tmp_path):
  path = gguf_files.model(tmp_path / "m.gguf", wide)
  messages = [{"role": "user", "content": "hello"}]
  assert chat.render(chat.template(path), messages) == "<user>hello<ai>"
  with pytest.raises(ValueError, match="has no chat template"):
    chat.template(wide)
  with pytest.raises(ValueError, match="no system role"):
    chat.render("{{ raise_exception('no system role') }}", messages)


def test_a_file_that_changed_is_read_again(golden, tmp_path):
  path = gguf_files.model(tmp_path / "m.gguf", golden / "llama_tiny")
  assert GGUFFile(path).config["eos_token_id"] == 0
  gguf_files.model(path, golden / "llama_tiny", tokenizer__ggml__eos_token_id=7)
  assert GGUFFile(path).config["eos_token_id"] == 7
  ends = dict(tokenizer__ggml__eos_token_id=7, tokenizer__ggml__eot_token_id=9)  # a chat's turn
  gguf_files.model(path, golden / "llama_tiny", **ends)
  assert GGUFFile(path).config["eos_token_id"] == [7, 9]


BAD = {
  "architecture 'gemma'": dict(general__architecture="gemma"),
  "general: architecture is 5; it must be a text": dict(general__architecture=5),
  "general.type is 'adapter'": dict(general__type="adapter"),
  "one of 3 parts .* llama-gguf-split": dict(split__count=3),
  r"llama\.block_count is 4294967295|block_count is 4294967295": dict(llama__block_count=2**32 - 1),
  "block_count is 1048576, and there are tensors of 2 layers": dict(llama__block_count=2**20),
  "block_count is 1, and there are tensors of 2 layers": dict(llama__block_count=1),
  "block_count is 0": dict(llama__block_count=0),
  "block_count is -2": dict(llama__block_count=-2),
  "block_count is 2.0": dict(llama__block_count=2.0),
  "block_count is '2'": dict(llama__block_count="2"),
  "block_count is True": dict(llama__block_count=True),
  r"block_count is \[2, 2\]": dict(llama__block_count=[2, 2]),
  "lacks the field block_count": dict(llama__block_count=None),
  "embedding_length is 0": dict(llama__embedding_length=0),
  "the metadata mean \\(96, 2147483640\\)": dict(llama__embedding_length=2**31 - 8),
  "embedding_length 50 does not divide into 6 heads": dict(
    llama__embedding_length=50, llama__attention__key_length=None
  ),
  "attention.head_count is 0": dict(llama__attention__head_count=0),
  "attention.head_count_kv is 0": dict(llama__attention__head_count_kv=0),
  "6 heads .* do not divide into 5 groups": dict(llama__attention__head_count_kv=5),
  r"attention.head_count_kv is \[6, 6\]": dict(llama__attention__head_count_kv=[6, 6]),
  "key_length is 0": dict(llama__attention__key_length=0),
  "a head has size 7; rotary": dict(llama__attention__key_length=7),
  "value_length is 4 though a head has size 8": dict(llama__attention__value_length=4),
  "dimension_count is 4 though a head has size 8": dict(llama__rope__dimension_count=4),
  "feed_forward_length is 0": dict(llama__feed_forward_length=0),
  "context_length is 0": dict(llama__context_length=0),
  "epsilon is nan": dict(llama__attention__layer_norm_rms_epsilon=float("nan")),
  "epsilon is -1.0": dict(llama__attention__layer_norm_rms_epsilon=-1.0),
  "freq_base is inf": dict(llama__rope__freq_base=float("inf")),
  "freq_base is 0.0": dict(llama__rope__freq_base=0.0),
  "scaling.type is 'yarn'": dict(llama__rope__scaling__type="yarn"),
  "scaling.factor is -2.0": dict(
    llama__rope__scaling__type="linear", llama__rope__scaling__factor=-2.0
  ),
  "is not causal": dict(llama__attention__causal=False),
  "no vocabulary": dict(tokenizer__ggml__tokens=None),
  "names token 96 as eos, and its vocabulary has 96": dict(tokenizer__ggml__eos_token_id=96),
  "bos_token_id is 4294967295": dict(tokenizer__ggml__bos_token_id=2**32 - 1),
  "padding_token_id is 1.5": dict(tokenizer__ggml__padding_token_id=1.5),
}


@pytest.mark.parametrize("told", BAD)
def test_metadata_are_typed_ranged_and_held_against_the_tensors(golden, told, tmp_path):
  """Before anything is traced: a model of 2^32 layers is refused at once."""
  path = gguf_files.model(tmp_path / "m.gguf", golden / "llama_tiny", **BAD[told])
  with pytest.raises(ValueError, match=rf"m\.gguf.*({told})"):
    pj.load_pretrained(path)


def test_tensors_are_the_architectures(golden, tmp_path, monkeypatch):
  """All of every layer, no others, of the shape that is meant, of types that are read."""
  directory = golden / "llama_tiny"
  write = lambda **how: gguf_files.model(tmp_path / "m.gguf", directory, **how)
  with pytest.raises(ValueError, match=r"(?s)1 tensors are missing.*output_norm\.weight"):
    GGUFFile(write(skip=("output_norm.weight",)))
  with pytest.raises(ValueError, match=r"(?s)1 tensors are missing.*blk\.1\.attn_q\.weight"):
    GGUFFile(write(skip=("blk.1.attn_q.weight",)))
  for name in ("blk.0.ffn_gate_inp.weight", "blk.00.attn_norm.weight", "lm_head.weight"):
    with pytest.raises(ValueError, match=rf"(?s)no place in this model:\n  {name}|3 layers"):
      GGUFFile(write(extra=[(name, np.ones(48, np.float32), None)]))
  extra = [("blk.0.attn_q.bias", np.ones(48, np.float32), None)]
  with pytest.raises(ValueError, match=r"(?s)7 tensors are missing.*attn_k\.bias"):
    GGUFFile(write(extra=extra))
  extra = [("output_norm.weight", np.ones(47, np.float32), None)]
  with pytest.raises(ValueError, match=r"shape \(47,\); the metadata mean \(48,\)"):
    GGUFFile(write(skip=("output_norm.weight",), extra=extra))
  extra = [("output_norm.weight", np.ones(48, np.int32), None)]
  with pytest.raises(ValueError, match=r"output_norm\.weight has type I32; only F32.*quantize"):
    GGUFFile(write(skip=("output_norm.weight",), extra=extra))


def test_names():
  assert hf_name("output.weight") == "lm_head.weight"
  assert hf_name("blk.10.ffn_down.bias") == "model.layers.10.mlp.down_proj.bias"
