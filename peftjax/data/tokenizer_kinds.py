"""The kinds of tokenizer that transformers 5 has a class for, made from a directory's files.

It follows transformers' `AutoTokenizer` to the letter, surprises included: a class makes normalizer
and splitting anew and takes from `tokenizer.json` only vocabulary, merges and the frame of a text;
`tokenizer.json` is read whole where the class is none of these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from peftjax.data import sentencepiece_file
from peftjax.data.sentencepiece_file import SentencePieceFile
from peftjax.data.tokenizer_config import Switches
from peftjax.io import records

QWEN2_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
  r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Vocabulary(NamedTuple):
  """Texts of tokens with their ids, and for BPE the pairs to merge."""

  ids: dict[str, int]
  merges: list[tuple[str, str]]


class Kind(NamedTuple):
  """One class.

  Attributes:
    files: the vocabulary's files, where there is no tokenizer.json.
    build: makes the tokenizer without added tokens.
    roles: the special tokens that it has unless a file says otherwise.
    frame: the tokens around a text, whatever the files say; None if they say it.
    typed: True if the second text of a pair is told apart.
  """

  files: tuple[str, ...]
  build: Callable[[Vocabulary, Switches, Mapping[str, str]], Tokenizer]
  roles: Mapping[str, str | None]
  frame: Callable[[Mapping[str, tuple[str, int]]], Any] | None = None
  typed: bool = False


def name_of(model_type: str | None, declared: str | None, vocabulary: bytes) -> str:
  """The class that `AutoTokenizer` takes.

  Args:
    model_type: from config.json.
    declared: `tokenizer_class` of tokenizer_config.json or config.json.
    vocabulary: the bytes of tokenizer.json.
  """
  if model_type in _FIXED:
    return _FIXED[model_type]
  name = (declared or _REGISTERED.get(model_type or "", "")).removesuffix("Fast")
  if name == "LlamaTokenizer" and b'"ByteLevel"' in vocabulary:  # a Llama 3: not SentencePiece
    return ""
  return _ALIASES.get(name, name)


def from_files(kind: Kind, folder: Path) -> tuple[Vocabulary, SentencePieceFile | None]:
  """The vocabulary of a directory without tokenizer.json.

  Raises:
    ValueError: if a file is missing or cannot be read.
  """
  paths = [folder / name for name in kind.files]
  for path in paths:
    records.regular(path)
  if kind.files == ("tokenizer.model",):
    read = sentencepiece_file.read(paths[0])
    pieces = [piece for piece, _ in read.pieces]
    ids = {piece: id for id, piece in enumerate(pieces)}
    return Vocabulary(ids, sentencepiece_file.merges(pieces)), read
  for path in paths:
    records.read_bytes(path)  # not more than is allowed
  if len(paths) == 1:
    return Vocabulary(models.WordPiece.read_file(str(paths[0])), []), None
  return Vocabulary(*models.BPE.read_file(*map(str, paths))), None


def from_json(parsed: Mapping[str, Any]) -> Vocabulary:
  """The vocabulary in a tokenizer.json."""
  model: Any = parsed.get("model")
  model = model if isinstance(model, dict) else {}
  ids, merges = model.get("vocab"), model.get("merges", [])
  if isinstance(ids, list):  # unigrams, with scores
    ids = {item[0] if isinstance(item, list) else item: id for id, item in enumerate(ids)}
  pairs: Any = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in merges]
  return Vocabulary(ids, pairs)


def _bert(vocabulary: Vocabulary, switches: Switches, roles: Mapping[str, str]) -> Tokenizer:
  made = Tokenizer(models.WordPiece(vocabulary.ids, unk_token=roles.get("unk_token", "[UNK]")))
  made.normalizer = normalizers.BertNormalizer(
    clean_text=True,
    handle_chinese_chars=switches.tokenize_chinese_chars is not False,
    strip_accents=switches.strip_accents,
    lowercase=switches.do_lower_case is not False,
  )
  made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  made.decoder = decoders.WordPiece(prefix="##")
  return made


def _bert_frame(roles: Mapping[str, tuple[str, int]]) -> Any:
  """The frame [CLS] a [SEP] b [SEP]."""
  (cls, _), (sep, _) = roles["cls_token"], roles["sep_token"]
  return processors.TemplateProcessing(
    single=f"{cls}:0 $A:0 {sep}:0",
    pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
    special_tokens=[roles["cls_token"], roles["sep_token"]],
  )


def _byte_level(vocabulary: Vocabulary, switches: Switches, roles: Mapping[str, str]) -> Tokenizer:
  """The tokenizer of GPT-2 and RoBERTa."""
  made = Tokenizer(
    models.BPE(*vocabulary, continuing_subword_prefix="", end_of_word_suffix="", fuse_unk=False)
  )
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(switches.add_prefix_space))
  made.decoder = decoders.ByteLevel()
  return made


def _roberta_frame(roles: Mapping[str, tuple[str, int]]) -> Any:
  """The frame <s> a </s></s> b </s>, all of type 0."""
  return processors.RobertaProcessing(roles["sep_token"], roles["cls_token"])


def _qwen2(vocabulary: Vocabulary, switches: Switches, roles: Mapping[str, str]) -> Tokenizer:
  made = _byte_level(vocabulary, switches, roles)
  made.normalizer = normalizers.NFC()
  prefix = bool(switches.add_prefix_space)
  made.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(Regex(QWEN2_WORDS), "isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False),
    ]
  )
  return made


def _llama(vocabulary: Vocabulary, switches: Switches, roles: Mapping[str, str]) -> Tokenizer:
  """Llama 2's tokenizer: BPE on the whole text, characters without a token as their bytes."""
  made = Tokenizer(models.BPE(*vocabulary, fuse_unk=True, byte_fallback=True))
  prefix = switches.add_prefix_space is not False
  scheme = ("always" if switches.legacy else "first") if prefix else "never"
  made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
  steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
  if prefix:
    steps.append(decoders.Strip(content=" ", left=1))
  made.decoder = decoders.Sequence(steps)
  return made


def _gemma(vocabulary: Vocabulary, switches: Switches, roles: Mapping[str, str]) -> Tokenizer:
  """Gemma's tokenizer: BPE on the whole text, whose spaces are ▁, without one before it."""
  model = models.BPE(*vocabulary, unk_token=roles["unk_token"], fuse_unk=True, byte_fallback=True)
  made = Tokenizer(model)
  made.normalizer = normalizers.Replace(" ", "▁")
  made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
  made.decoder = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
  )
  return made


_END = "<|endoftext|>"

KINDS: dict[str, Kind] = {
  "BertTokenizer": Kind(
    ("vocab.txt",),
    _bert,
    dict(
      unk_token="[UNK]",
      sep_token="[SEP]",
      pad_token="[PAD]",
      cls_token="[CLS]",
      mask_token="[MASK]",
    ),
    _bert_frame,
    typed=True,
  ),
  "RobertaTokenizer": Kind(
    ("vocab.json", "merges.txt"),
    _byte_level,
    dict(
      bos_token="<s>",
      eos_token="</s>",
      sep_token="</s>",
      cls_token="<s>",
      unk_token="<unk>",
      pad_token="<pad>",
      mask_token="<mask>",
    ),
    _roberta_frame,
  ),
  "GPT2Tokenizer": Kind(
    ("vocab.json", "merges.txt"),
    _byte_level,
    dict(bos_token=_END, eos_token=_END, unk_token=_END, pad_token=None),
  ),
  "Qwen2Tokenizer": Kind(
    ("vocab.json", "merges.txt"), _qwen2, dict(eos_token=_END, unk_token=_END, pad_token=_END)
  ),
  "LlamaTokenizer": Kind(
    ("tokenizer.model",), _llama, dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")
  ),
  "GemmaTokenizer": Kind(
    ("tokenizer.json",),
    _gemma,
    dict(
      unk_token="<unk>",
      bos_token="<bos>",
      eos_token="<eos>",
      pad_token="<pad>",
      mask_token="<mask>",
    ),
  ),
}

KINDS["DistilBertTokenizer"] = KINDS["BertTokenizer"]._replace(typed=False)

# Classes of model types, whatever the directory says, and where it says nothing.
_FIXED = {"qwen2": "Qwen2Tokenizer", "mistral": "", "phi3": ""}
_REGISTERED = {
  **dict.fromkeys(("bert", "distilbert", "electra"), "BertTokenizer"),
  "roberta": "RobertaTokenizer",
  "xlm-roberta": "XLMRobertaTokenizer",
  "camembert": "CamembertTokenizer",
  "deberta-v2": "DebertaV2Tokenizer",
  "gpt2": "GPT2Tokenizer",
  "qwen3": "Qwen2Tokenizer",
  "gemma2": "GemmaTokenizer",
  "gemma3_text": "GemmaTokenizer",
}
_ALIASES = {
  **dict.fromkeys(
    ("ElectraTokenizer", "MobileBertTokenizer", "SqueezeBertTokenizer", "LayoutLMTokenizer"),
    "BertTokenizer",
  ),
  **dict.fromkeys(
    ("BartTokenizer", "LEDTokenizer", "LongformerTokenizer", "MvpTokenizer"), "RobertaTokenizer"
  ),
  "Phi3Tokenizer": "LlamaTokenizer",
  "TokenizersBackend": "",
  "PreTrainedTokenizer": "",
}
