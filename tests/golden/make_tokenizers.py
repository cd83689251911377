"""Trains small tokenizers of every kind, and writes down the ids that transformers gives with them.

Run:   python -m tests.golden.make_tokenizers [--only-ids]
With:  transformers 5.23.0, tokenizers 0.23.3, sentencepiece 0.2.3, numpy 2.4.6, safetensors 0.8.0

`tokenizers/KIND/...`: the vocabularies. `tokenizers/ids.safetensors`: for each directory of
`tokenizer_dirs.DIRECTORIES`, uint32 [500], the CRC-32 of the int32 ids of each of
`tokenizer_texts.texts()`, and for the first 20 texts that are longer than 20 characters the ids
themselves, one after the other, as `KIND/ids` and `KIND/lengths`.
"""

import io
import json
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import sentencepiece
from safetensors.numpy import save_file
from sentencepiece import sentencepiece_model_pb2
from tokenizers import (
  AddedToken,
  Regex,
  Tokenizer,
  decoders,
  models,
  normalizers,
  pre_tokenizers,
  processors,
  trainers,
)
from transformers import AutoTokenizer
from transformers.tokenization_utils_base import generate_merges

from tests.golden import tokenizer_dirs
from tests.golden.tokenizer_texts import plain, texts

ROOT = Path(__file__).with_name("tokenizers")
WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
  r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def wordpiece(lowercase: bool) -> Tokenizer:
  made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
  made.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
  made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
  made.train_from_iterator(
    plain(), trainers.WordPieceTrainer(vocab_size=700, special_tokens=special, show_progress=False)
  )
  return made


def byte_level(split: list, special: list[str], first: bool = False) -> Tokenizer:
  """Byte-level BPE whose special tokens come first in the vocabulary, or after it."""
  made = Tokenizer(models.BPE())
  made.pre_tokenizer = pre_tokenizers.Sequence(split)
  made.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=600,
    special_tokens=special if first else [],
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  made.train_from_iterator(plain(), trainer)
  if not first:
    made.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
  return made


def sentencepiece_model(kind: str, **options) -> bytes:
  """As Llama 2 made its own; spaces stay, and unknown characters become bytes."""
  written = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(plain()),
    model_writer=written,
    model_type=kind,
    byte_fallback=True,
    remove_extra_whitespaces=False,
    character_coverage=0.9995,
    split_digits=True,
    allow_whitespace_only_pieces=True,
    minloglevel=2,
    **options,
  )
  proto = sentencepiece_model_pb2.ModelProto()
  proto.ParseFromString(written.getvalue())
  proto.normalizer_spec.ClearField("normalization_rule_tsv")  # a path of this machine
  return proto.SerializeToString()


def llama_json(data: bytes) -> Tokenizer:
  """As the file of Llama 2 and Mistral on the Hub: a prefix by the normalizer, no splitting."""
  proto = sentencepiece_model_pb2.ModelProto()
  proto.ParseFromString(data)
  vocab = {piece.piece: i for i, piece in enumerate(proto.pieces)}
  model = models.BPE(
    vocab, generate_merges(vocab), unk_token="<unk>", fuse_unk=True, byte_fallback=True
  )
  made = Tokenizer(model)
  made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
  made.decoder = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1)]
  )
  made.post_processor = processors.TemplateProcessing(
    single="<s>:0 $A:0", pair="<s>:0 $A:0 <s>:1 $B:1", special_tokens=[("<s>", 1)]
  )
  if "<s>" in vocab:
    made.add_special_tokens([AddedToken(t, normalized=False) for t in ("<unk>", "<s>", "</s>")])
  return made


def gemma() -> Tokenizer:
  """As the file of Gemma on the Hub: BPE of spaces that were replaced, <bos> before a text."""
  names = dict(zip(("pad", "eos", "bos", "unk"), range(4), strict=True))
  ids = {f"{name}_id": i for name, i in names.items()} | {f"{n}_piece": f"<{n}>" for n in names}
  made = llama_json(
    sentencepiece_model(
      "bpe",
      vocab_size=700,
      normalization_rule_name="identity",
      add_dummy_prefix=False,
      user_defined_symbols=["<mask>", "<start_of_turn>"],
      **ids,
    )
  )
  made.normalizer = normalizers.Replace(" ", "▁")
  made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
  made.decoder = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
  )
  made.post_processor = processors.TemplateProcessing(
    single="<bos>:0 $A:0", pair="<bos>:0 $A:0 <bos>:1 $B:1", special_tokens=[("<bos>", 2)]
  )
  special = [f"<{name}>" for name in (*names, "mask", "start_of_turn")]
  made.add_special_tokens([AddedToken(text, normalized=False) for text in special])
  return made


def write(folder: str, name: str, content: str | bytes) -> None:
  (ROOT / folder).mkdir(parents=True, exist_ok=True)
  content = content.encode() if isinstance(content, str) else content
  (ROOT / folder / name).write_bytes(content)


def files(folder: str, made: Tokenizer) -> None:
  """tokenizer.json, without the white space."""
  write(folder, "tokenizer.json", json.dumps(json.loads(made.to_str()), separators=(",", ":")))


def pair(folder: str, made: Tokenizer) -> None:
  """vocab.json and merges.txt."""
  parsed = json.loads(made.to_str())["model"]
  write(folder, "vocab.json", json.dumps(parsed["vocab"], separators=(",", ":")))
  merges = "\n".join(" ".join(merge) for merge in parsed["merges"])
  write(folder, "merges.txt", f"#version: 0.2\n{merges}\n")


def train() -> None:
  for name, lowercase in (("bert_uncased", True), ("bert_cased", False)):
    vocab = wordpiece(lowercase).get_vocab()
    write(name, "vocab.txt", "\n".join(sorted(vocab, key=vocab.__getitem__)) + "\n")
  level = lambda regex: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
  pair("roberta", byte_level([level(True)], ["<s>", "<pad>", "</s>", "<unk>", "<mask>"], True))
  pair("gpt2", byte_level([level(True)], ["<|endoftext|>"], True))
  words = pre_tokenizers.Split(Regex(WORDS), "isolated")
  special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
  llama3 = byte_level([words, level(False)], special)
  begin = llama3.token_to_id("<|begin_of_text|>")
  llama3.model.ignore_merges = True
  llama3.post_processor = processors.Sequence(
    [
      processors.ByteLevel(trim_offsets=False),
      processors.TemplateProcessing(
        single="<|begin_of_text|>:0 $A:0",
        pair="<|begin_of_text|>:0 $A:0 <|begin_of_text|>:1 $B:1",
        special_tokens=[("<|begin_of_text|>", begin)],
      ),
    ]
  )
  files("llama3", llama3)
  words = pre_tokenizers.Split(Regex(WORDS.replace("{1,3}", "")), "isolated")
  qwen2 = byte_level([words, level(False)], ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
  qwen2.normalizer = normalizers.NFC()
  qwen2.post_processor = processors.ByteLevel(trim_offsets=False, use_regex=False)
  files("qwen2", qwen2)
  digits = pre_tokenizers.Digits(individual_digits=True)
  special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
  files("smollm2", byte_level([digits, level(True)], special, True))
  bpe = sentencepiece_model("bpe", vocab_size=700, normalization_rule_name="identity")
  write("llama2", "tokenizer.model", bpe)
  files("llama2", llama_json(bpe))
  files("gemma", gemma())
  with tempfile.NamedTemporaryFile("w", suffix=".tsv") as rules:
    rules.write("FB01\t66 69\nFF21\t41\n301\t\n")  # ﬁ, full-width A, and an accent
    rules.flush()
    options = dict(normalization_rule_tsv=rules.name, user_defined_symbols=["<ent>"])
    write("unigram", "tokenizer.model", sentencepiece_model("unigram", vocab_size=500, **options))


def ids() -> None:
  found, given = {}, texts()
  for name in tokenizer_dirs.DIRECTORIES:
    with tempfile.TemporaryDirectory() as folder:
      tokenizer = AutoTokenizer.from_pretrained(tokenizer_dirs.write(name, Path(folder) / "model"))
    rows = [np.asarray(row, np.int32) for row in tokenizer(given)["input_ids"]]
    found[name] = np.asarray([zlib.crc32(row.tobytes()) for row in rows], np.uint32)
    shown = [row for text, row in zip(given, rows, strict=True) if len(text) > 20][:20]
    found[f"{name}/ids"] = np.concatenate(shown).astype(np.int16)
    found[f"{name}/lengths"] = np.asarray([len(row) for row in shown], np.int16)
  save_file(found, ROOT / "ids.safetensors")


if __name__ == "__main__":
  if "--only-ids" not in sys.argv:
    train()
  ids()
