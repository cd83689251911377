"""Texts to token ids, by the tokenizer in a pretrained model's directory."""

import dataclasses
import json
import pathlib
from collections.abc import Iterator

import numpy as np
from tokenizers import (
  AddedToken,
  Tokenizer,
  decoders,
  models,
  normalizers,
  pre_tokenizers,
  processors,
)

from peftjax.data.examples import Examples
from peftjax.io import gguf

_CHUNK = 4096  # texts at a time: the library's own encodings take over 100 bytes a token


@dataclasses.dataclass(frozen=True, eq=False)
class Tokens:
  """The token ids of N texts of different lengths, one after the other.

  Attributes:
    ids: int32 [offsets[N]].
    types: uint8 [offsets[N]]: 1 in the second text of a pair (if the tokenizer tells them apart).
    offsets: int64 [N+1]; text i is ids[offsets[i]:offsets[i+1]].
  """

  ids: np.ndarray
  types: np.ndarray
  offsets: np.ndarray

  def __len__(self) -> int:
    return len(self.offsets) - 1

  @property
  def lengths(self) -> np.ndarray:
    """int64 [N]: the number of tokens of each text."""
    return np.diff(self.offsets)


def load_tokenizer(directory: str) -> Tokenizer:
  """The tokenizer of a Hugging Face model directory or GGUF file; it neither pads nor truncates.

  Reads `tokenizer.json`; without that, `vocab.txt` (BERT's WordPiece) or `vocab.json` with
  `merges.txt` (RoBERTa's byte-level BPE), both with the options in `tokenizer_config.json`.

  Raises:
    ValueError: if the directory has none of them, or the file cannot be read.
  """
  folder = pathlib.Path(directory)
  if folder.suffix == ".gguf":
    return gguf.tokenizer(folder)
  if (folder / "tokenizer.json").is_file():
    build = _from_json
  elif (folder / "vocab.txt").is_file():
    build = _bert
  elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
    build = _roberta
  else:
    raise ValueError(
      f"{directory}: no tokenizer. Allowed: tokenizer.json, vocab.txt (BERT), or vocab.json with"
      " merges.txt (RoBERTa). Copy these files from where the model came from."
    )
  try:
    tokenizer = build(folder)
  except Exception as error:  # the library raises bare Exception
    raise ValueError(f"{directory}: the tokenizer cannot be read: {error}") from error
  # Files carry settings of their own, such as MiniLM's fixed 128: every text would be that long.
  tokenizer.no_padding()
  tokenizer.no_truncation()
  return tokenizer


def encode(tokenizer: Tokenizer, examples: Examples, max_length: int) -> Tokens:
  """Token ids with the special tokens, at most `max_length` a text (of pairs, a pair).

  Longer texts lose their last tokens but not the special ones; of a pair the longer text loses
  first.

  Raises:
    ValueError: if `max_length` leaves no room beside the special tokens.
  """
  pairs = examples.pairs is not None
  special = tokenizer.num_special_tokens_to_add(pairs)
  # Below this the library would, without a word, not truncate at all.
  if max_length <= special + pairs:
    raise ValueError(
      f"max_length {max_length} is too short: the tokenizer adds {special} special tokens. Allowed:"
      f" {special + pairs + 1} or more."
    )
  tokenizer.enable_truncation(max_length, strategy="longest_first")
  try:
    chunks = list(_encode_chunks(tokenizer, examples))
  finally:
    tokenizer.no_truncation()
  ids, types, lengths = (np.concatenate(arrays) for arrays in zip(*chunks, strict=True))
  return Tokens(ids, types, np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]))


def documents(
  tokenizer: Tokenizer, examples: Examples, end_id: int, *, completions: bool
) -> tuple[list[np.ndarray], list[int]]:
  """Each text, or prompt and completion one after the other, as ids that end in `end_id`.

  Returns:
    int32 arrays, and how many ids of each are prompt: with `completions` the first text of a pair,
    or the first line of a text, which is the title in BBC's articles; else none.
  """
  firsts, seconds = examples.texts, examples.pairs
  if seconds is None:
    parts = [text.partition("\n") for text in firsts]
    firsts = [head + newline for head, newline, _ in parts]
    seconds = [tail for _, _, tail in parts]
  encode_all = lambda texts: tokenizer.encode_batch_fast(texts, add_special_tokens=False)
  ids, prompts = [], []
  for one, two in zip(encode_all(firsts), encode_all(seconds), strict=True):
    ids.append(np.asarray([*one.ids, *two.ids, end_id], np.int32))
    prompts.append(len(one.ids) if completions else 0)
  return ids, prompts


def _encode_chunks(tokenizer: Tokenizer, examples: Examples) -> Iterator[tuple[np.ndarray, ...]]:
  """Ids, types and lengths of one chunk after the other."""
  pairs = examples.pairs
  inputs = examples.texts if pairs is None else list(zip(examples.texts, pairs, strict=True))
  for start in range(0, max(len(inputs), 1), _CHUNK):  # of no texts, one chunk of no texts
    encodings = tokenizer.encode_batch_fast(inputs[start : start + _CHUNK])
    yield (
      np.asarray([id for encoding in encodings for id in encoding.ids], np.int32),
      np.asarray([type for encoding in encodings for type in encoding.type_ids], np.uint8),
      np.asarray([len(encoding) for encoding in encodings], np.int64),
    )


def _from_json(folder: pathlib.Path) -> Tokenizer:
  return Tokenizer.from_file(str(folder / "tokenizer.json"))


def _options(folder: pathlib.Path) -> dict:
  """The settings in tokenizer_config.json, if there is one."""
  file = folder / "tokenizer_config.json"
  return json.loads(file.read_text("utf-8")) if file.is_file() else {}


def _bert(folder: pathlib.Path) -> Tokenizer:
  """WordPiece as BERT has it: lower case unless its options say no, [CLS] a [SEP] b [SEP]."""
  options = _options(folder)
  vocabulary = models.WordPiece.read_file(str(folder / "vocab.txt"))
  tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
  tokenizer.normalizer = normalizers.BertNormalizer(
    lowercase=options.get("do_lower_case", True),
    strip_accents=options.get("strip_accents"),
    handle_chinese_chars=options.get("tokenize_chinese_chars", True),
  )
  tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  tokenizer.post_processor = processors.BertProcessing(
    ("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"])
  )
  tokenizer.decoder = decoders.WordPiece()
  tokenizer.add_special_tokens(
    [token for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if token in vocabulary]
  )
  return tokenizer


def _roberta(folder: pathlib.Path) -> Tokenizer:
  """Byte-level BPE as RoBERTa has it: <s> a </s></s> b </s>, all of type 0."""
  prefix = _options(folder).get("add_prefix_space", False)
  files = str(folder / "vocab.json"), str(folder / "merges.txt")
  vocabulary, merges = models.BPE.read_file(*files)
  tokenizer = Tokenizer(models.BPE(vocabulary, merges))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
  tokenizer.post_processor = processors.RobertaProcessing(
    ("</s>", vocabulary["</s>"]), ("<s>", vocabulary["<s>"]), add_prefix_space=prefix
  )
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_special_tokens(
    [token for token in ("<s>", "<pad>", "</s>", "<unk>") if token in vocabulary]
  )
  if "<mask>" in vocabulary:
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True)])
  return tokenizer
