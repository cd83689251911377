"""GGUF files, written with the gguf package as llama.cpp's converter does, or byte by byte."""

import io
import struct

import gguf
import sentencepiece
from gguf import GGMLQuantizationType as Type
from gguf import GGUFValueType

from peftjax.io import safetensors_dir

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
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)  # types of tokens
WORDS = ["<|end|>", "a", "b", "c", "ab", "Ġ", "1", "2", "Ġa", "12"]


def permute(w, heads):
  """llama.cpp's converter: rows of the two halves of a head, one after the other."""
  return w.reshape(heads, 2, w.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(w.shape)


def add(writer, values):
  """Metadata of any kind; None takes away what was there."""
  for key, value in values.items():
    for part in writer.kv_data:
      part.pop(key, None)
    if value is not None:
      kind = GGUFValueType.get_type(value)
      small = kind == GGUFValueType.INT32 and value >= 0
      writer.add_key_value(key, value, GGUFValueType.UINT32 if small else kind)


def finish(writer):
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def model(
  path, directory, kind=Type.F32, *, arch="llama", encode=None, skip=(), extra=(), **values
):
  """A Hugging Face directory of a Llama as a GGUF file.

  Args:
    kind: of the matrices, which `encode` (by default the package's) makes.
    skip, extra: names of tensors that are left out; names, arrays and types of more.
    values: metadata beside or instead of the usual, with two underscores for a dot.
  """
  config = safetensors_dir.read_config(directory)
  tensors = safetensors_dir.TensorDir(directory)
  writer = gguf.GGUFWriter(path, arch)
  writer.add_embedding_length(config["hidden_size"])
  writer.add_block_count(config["num_hidden_layers"])
  writer.add_head_count(config["num_attention_heads"])
  writer.add_head_count_kv(config["num_key_value_heads"])
  if config.get("head_dim"):
    writer.add_key_length(config["head_dim"])
  writer.add_feed_forward_length(config["intermediate_size"])
  writer.add_context_length(config["max_position_embeddings"])
  writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
  writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
  words = WORDS + [f"<{i}>" for i in range(config["vocab_size"] - len(WORDS))]
  writer.add_tokenizer_model("gpt2")
  writer.add_tokenizer_pre("smollm")
  writer.add_token_list(words)
  writer.add_token_types([3] + [1] * (len(words) - 1))
  writer.add_token_merges(["a b", "Ġ a", "1 2"])
  writer.add_eos_token_id(0)
  writer.add_chat_template("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<ai>")
  add(writer, {key.replace("__", "."): value for key, value in values.items()})
  for name in tensors.names():
    array = tensors.read(name)
    short = gguf_name(name)
    if arch == "llama" and short.split(".")[-2] in ("attn_q", "attn_k"):
      key = "num_attention_heads" if "attn_q" in short else "num_key_value_heads"
      array = permute(array, config[key])
    if short in skip:
      continue
    if kind != Type.F32 and array.ndim == 2:
      writer.add_tensor(short, gguf.quants.quantize(array, kind), raw_dtype=kind)
    else:
      writer.add_tensor(short, array)
  for name, array, raw in extra:
    writer.add_tensor(name, array, raw_dtype=raw)
  finish(writer)
  return path


def gguf_name(name):
  """llama.cpp's name of Hugging Face's tensor."""
  short = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
  }.get(name)
  if short is None:
    _, _, layer, rest = name.split(".", 3)
    module, _, last = rest.rpartition(".")
    short = f"blk.{layer}.{NAMES[module]}.{last}"
  return short


def vocabulary(path, tokens, kind="gpt2", arch="llama", **values):
  """A file of a vocabulary alone; `values` are more of `tokenizer.ggml`."""
  writer = gguf.GGUFWriter(path, arch)
  add(writer, {"tokenizer.ggml.model": kind, "tokenizer.ggml.tokens": tokens})
  add(writer, {f"tokenizer.ggml.{key}": value for key, value in values.items()})
  finish(writer)
  return path


def train_pieces(texts):
  """A SentencePiece model of Llama's kind: BPE, bytes, nothing normalised."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(texts),
    model_writer=model,
    model_type="bpe",
    vocab_size=500,
    byte_fallback=True,
    split_digits=True,
    normalization_rule_name="identity",
    remove_extra_whitespaces=False,
    allow_whitespace_only_pieces=True,
    num_threads=1,
    minloglevel=2,
  )
  return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def from_pieces(path, pieces, more=(), **values):
  """A SentencePiece model's vocabulary; `more` are user-defined tokens behind the others."""

  def kind(i):
    if pieces.is_unknown(i):
      return UNKNOWN
    return CONTROL if pieces.is_control(i) else BYTE if pieces.is_byte(i) else NORMAL

  number = range(pieces.get_piece_size())
  return vocabulary(
    path,
    [pieces.id_to_piece(i) for i in number] + list(more),
    "llama",
    scores=[pieces.get_score(i) for i in number] + [-1000.0] * len(more),
    token_type=[kind(i) for i in number] + [USER] * len(more),
    **values,
  )


def text(value):
  """A text as files hold it."""
  value = value.encode() if isinstance(value, str) else value
  return struct.pack("<Q", len(value)) + value


def entry(key, kind, body):
  """A value of the metadata, its body already in bytes."""
  return text(key) + struct.pack("<I", kind) + body


def array(kind, count, body=b""):
  return struct.pack("<IQ", kind, count) + body


def tensor(name, dims, kind=0, offset=0):
  """What a header says of a tensor."""
  return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def raw(entries=(), tensors=(), data=b"", *, counts=None, version=3, magic=b"GGUF"):
  """A file's bytes, with counts that need not be true."""
  number, values = counts or (len(tensors), len(entries))
  head = magic + struct.pack("<IQQ", version, number, values) + b"".join([*entries, *tensors])
  return head + bytes(-len(head) % 32) + data
