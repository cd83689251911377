"""The tokenizer in a GGUF file's metadata: byte-level BPE, or SentencePiece's BPE.

Where llama.cpp and transformers' GGUF loader differ, llama.cpp is followed; but tokens that are
matched whole are the longest at the leftmost place, as in the library that the models were made
with (llama.cpp takes the longest anywhere first), and a text's unknown bytes become unknown tokens.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import (
  AddedToken,
  Regex,
  Tokenizer,
  decoders,
  models,
  normalizers,
  pre_tokenizers,
  processors,
)

from peftjax.io import gguf_config, gguf_header, records
from peftjax.io.gguf_splits import SPLITS, Split
from peftjax.io.records import clip

MAX_TOKENS = 2**19  # the largest vocabularies have 2^18
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(2, 7)  # types; 1 is a normal token
_MARK = "\ufdd0\ufdd1"  # no characters, and not used in bytes' spelling

# Names that llama.cpp takes for control tokens, whatever the file says of their type.
_CONTROL_NAMES = frozenset(
  "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn>"
  " <|endoftext|> </s> <|eom_id|> <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos>"
  " <｜end▁of▁sentence｜> <|fim_prefix|> <fim-prefix> <fim_prefix> <｜fim▁begin｜> <PRE> ▁<PRE>"
  " <|code_prefix|> <|fim_suffix|> <fim-suffix> <fim_suffix> <｜fim▁hole｜> <SUF> ▁<SUF>"
  " <|code_suffix|> <|fim_middle|> <fim-middle> <fim_middle> <｜fim▁end｜> <MID> ▁<MID>"
  " <|code_middle|> <|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD] <|fim_repo|> <|repo_name|>"
  " <fim-repo> <REPO> <reponame> <|file_sep|>".split(" ")
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Said:
  """The metadata that begin with `tokenizer.ggml`, except for the lists and the ids."""

  model: str
  pre: str = ""
  add_bos_token: bool | None = None
  add_eos_token: bool | None = None
  add_space_prefix: bool = True  # SentencePiece's default; byte-level vocabularies do not use it


@dataclasses.dataclass(frozen=True)
class _Vocabulary:
  tokens: list[str]
  types: list[int]

  def __iter__(self) -> Iterator[tuple[str, int]]:
    return zip(self.tokens, self.types, strict=True)

  def added(self) -> Iterator[AddedToken]:
    """Tokens matched whole, before any splitting: special, unless they are user-defined."""
    for token, kind in self:
      special = kind in (_UNKNOWN, _CONTROL) or token in _CONTROL_NAMES
      if special or kind == _USER_DEFINED:
        yield AddedToken(token, normalized=False, special=special)


def tokenizer(path: str | Path) -> Tokenizer:
  """The tokenizer of a file; it neither pads nor truncates.

  Its special tokens are BOS before a text and EOS after it as in llama.cpp:
  `add_bos_token` and `add_eos_token`, and where the file does not say, BOS in SentencePiece
  vocabularies and those split as Llama 3's and Mistral's newer ones.

  Raises:
    ValueError: on another kind of vocabulary or of split; on tokens that are empty, too many or
      repeated, lists of other lengths, merges that are not pairs or name no token, ids beyond the
      vocabulary; if BOS or EOS is to be added and is not named.
  """
  path = Path(path)
  metadata = gguf_header.read(path).metadata
  fields = gguf_config.nested(metadata, "tokenizer.ggml")
  if "model" not in fields:
    raise ValueError(f"{path} has no vocabulary: it lacks tokenizer.ggml.model.")
  said = records.convert(fields, _Said, f"{path}: tokenizer.ggml")
  if said.model not in ("gpt2", "llama"):
    raise ValueError(
      f"{path} has a vocabulary of kind {clip(said.model)}; only 'gpt2' (byte-level BPE) and "
      "'llama' (SentencePiece) are read. Load the model's Hugging Face directory instead."
    )
  vocabulary = _vocabulary(path, fields)
  ids = gguf_config.token_ids(path, metadata)
  try:
    if said.model == "gpt2":
      split = _split(path, said.pre)
      made = _byte_level(path, vocabulary, fields, split)
    else:
      split = Split((), bos=True)
      made = _sentencepiece(path, vocabulary, fields, said.add_space_prefix, ids["unk"])
    added = list(vocabulary.added())
    made.add_special_tokens([token for token in added if token.special])
    made.add_tokens([token for token in added if not token.special])
    bos = split.bos if said.add_bos_token is None else said.add_bos_token
    before, behind = ["bos"] * bos, ["eos"] * bool(said.add_eos_token)
    made.post_processor = _template(path, vocabulary.tokens, ids, before, behind)
  except (KeyboardInterrupt, SystemExit):
    raise
  except BaseException as error:  # the library's bare Exception, and its panics, which are not one
    told = clip(str(error), quote=False)
    if isinstance(error, ValueError) and str(error).startswith(str(path)):
      raise  # ours
    raise ValueError(f"{path}: its vocabulary cannot be used: {told}.") from None
  return made


def special_tokens(path: str | Path) -> dict[str, str]:
  """The texts of `bos_token`, `eos_token`, `pad_token` and `unk_token`, as far as they exist."""
  path = Path(path)
  metadata = gguf_header.read(path).metadata
  tokens = metadata.get("tokenizer.ggml.tokens", ())
  ids = gguf_config.token_ids(path, metadata)
  return {f"{name}_token": tokens[id] for name, id in ids.items() if id is not None}


def chat_templates(path: str | Path) -> dict[str, str]:
  """The file's chat templates by name; the nameless one is "default".

  Raises:
    ValueError: if one is not a text.
  """
  prefix, found = "tokenizer.chat_template", {}
  for key, value in gguf_header.read(path).metadata.items():
    if key == prefix or key.startswith(prefix + "."):
      if not isinstance(value, str):
        raise ValueError(f"{path}: {key} is {clip(value)}; a chat template is a text.")
      found[key.removeprefix(prefix).removeprefix(".") or "default"] = value
  return found


def _vocabulary(path: Path, fields: Mapping[str, Any]) -> _Vocabulary:
  tokens = _list(path, fields, "tokens", str)
  if not 1 <= len(tokens) <= MAX_TOKENS:
    raise ValueError(f"{path} has {len(tokens)} tokens; 1 to {MAX_TOKENS} are read.")
  tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]  # llama.cpp's names
  if len(set(tokens)) < len(tokens):
    [(twice, _)] = Counter(tokens).most_common(1)
    raise ValueError(f"{path} has the token {clip(twice)} twice in its vocabulary.")
  types = [1] * len(tokens)
  if "token_type" in fields:
    types = _list(path, fields, "token_type", int, len(tokens))
  vocabulary = _Vocabulary(tokens, types)
  for token, kind in vocabulary:
    if not 0 <= kind <= _BYTE:
      raise ValueError(f"{path}: token {clip(token)} has the type {kind}; there are 1 to {_BYTE}.")
  return vocabulary


def _list(
  path: Path, fields: Mapping[str, Any], name: str, kind: type, length: int | None = None
) -> list[Any]:
  """A list of the vocabulary, with values of one kind, as long as the vocabulary."""
  value = fields.get(name)
  what = {str: "texts", int: "whole numbers", float: "numbers"}[kind]
  kinds = (int, float) if kind is float else (kind,)
  if not isinstance(value, list) or (value and type(value[0]) not in kinds):
    raise ValueError(f"{path}: tokenizer.ggml.{name} must be a list of {what}, not {clip(value)}.")
  if length is not None and len(value) != length:
    raise ValueError(
      f"{path}: tokenizer.ggml.{name} has {len(value)} entries for a vocabulary of {length}."
    )
  return value


def _split(path: Path, name: str) -> Split:
  if not name:
    warnings.warn(
      f"{path} does not say how its vocabulary splits texts (tokenizer.ggml.pre); 'default' is "
      "taken, as llama.cpp does, and token ids may differ from the model's own. Convert it again.",
      stacklevel=3,
    )
  if name and name not in SPLITS:
    raise ValueError(
      f"{path} has a vocabulary split as {clip(name)} (tokenizer.ggml.pre); those read are "
      f"{', '.join(SPLITS)}. Load the model's Hugging Face directory instead."
    )
  return SPLITS[name or "default"]


def _byte_level(
  path: Path, vocabulary: _Vocabulary, fields: Mapping[str, Any], split: Split
) -> Tokenizer:
  """BPE on bytes, each spelled as a character as in GPT-2."""
  ids = {token: i for i, token in enumerate(vocabulary.tokens)}
  # If a merge comes twice the first counts; the library would take the last.
  merges = list(dict.fromkeys(_pairs(path, _list(path, fields, "merges", str), ids)))
  made = Tokenizer(models.BPE(ids, merges, ignore_merges=split.whole))
  cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in split.patterns]
  spelling = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  made.pre_tokenizer = pre_tokenizers.Sequence([*cuts, spelling])
  # A token that is matched whole spells no bytes, even if it has only such characters ("über"):
  # a mark of other characters keeps it as it is.
  alphabet = set(pre_tokenizers.ByteLevel.alphabet())
  whole = [token.content for token in vocabulary.added()]
  whole = [text for text in whole if alphabet.issuperset(text) and not text.isascii()]
  marked = [decoders.Replace(Regex(rf"\A(?={_any(whole)}\z)"), _MARK)] if whole else []
  unmarked = [decoders.Replace(_MARK, "")] if whole else []
  hidden = _hidden(vocabulary)
  made.decoder = decoders.Sequence([*hidden, *marked, decoders.ByteLevel(), *unmarked])
  return made


def _any(texts: Sequence[str]) -> str:
  """A pattern for any of these texts."""
  return f"(?:{'|'.join(map(re.escape, texts))})"


def _hidden(vocabulary: _Vocabulary) -> list[Any]:
  """Decoders that turn unused tokens, such as the padding of a vocabulary, into nothing."""
  unused = [token for token, kind in vocabulary if kind == _UNUSED]
  return [decoders.Replace(Regex(rf"\A{_any(unused)}\z"), "")] if unused else []


def _pairs(path: Path, merges: Sequence[str], ids: Mapping[str, int]) -> Iterator[tuple[str, str]]:
  for merge in merges:
    at = merge.find(" ", 1)
    left, right = merge[:at], merge[at + 1 :]
    if at < 0 or not {left, right, left + right} <= ids.keys():
      raise ValueError(
        f"{path}: the merge {clip(merge)} must be two tokens with a space between, which together "
        "are a token. Convert the model again."
      )
    yield left, right


def _sentencepiece(
  path: Path, vocabulary: _Vocabulary, fields: Mapping[str, Any], prefix: bool, unknown: int | None
) -> Tokenizer:
  """BPE that merges the pair whose token has the best score, and falls back on bytes.

  As in llama.cpp, with `prefix` a space is put before every stretch of text, so also after a token
  that is matched whole. transformers' loader does so at the beginning alone, and not before a
  space; the Llama tokenizers that such files are made of do as llama.cpp. Of pairs with equal
  scores llama.cpp merges the leftmost, this one that with the longest left part.
  """
  tokens = vocabulary.tokens
  scores = _list(path, fields, "scores", float, len(tokens))
  if not np.isfinite(scores).all():
    raise ValueError(f"{path}: tokenizer.ggml.scores has entries that are not finite numbers.")
  if sum(len(token) ** 2 for token in tokens) > 2**26:
    raise ValueError(f"{path} has tokens of up to {max(map(len, tokens))} characters: too long.")
  ids = {token: i for i, token in enumerate(tokens)}
  made = Tokenizer(
    models.BPE(
      ids,
      _merges(ids, scores),
      unk_token=None if unknown is None else tokens[unknown],
      fuse_unk=True,
      byte_fallback=True,
    )
  )
  space = normalizers.Replace(" ", "▁")
  made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space]) if prefix else space
  spelled = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
  first = [decoders.Strip(" ", 1, 0)] if prefix else []
  made.decoder = decoders.Sequence([*_hidden(vocabulary), *spelled, *first])
  return made


def _merges(ids: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
  """Every way to make a token of two others, that of the best score first."""
  found = []
  for token, score in zip(ids, scores, strict=True):
    for at in range(1, len(token)):
      if token[:at] in ids and token[at:] in ids:
        found.append((score, at, len(token) - at, token))
  found.sort(key=lambda merge: merge[:3], reverse=True)
  return [(token[:at], token[at:]) for _, at, _, token in found]


def _template(
  path: Path,
  tokens: Sequence[str],
  ids: Mapping[str, int | None],
  before: list[str],
  behind: list[str],
) -> processors.TemplateProcessing | None:
  """The frame of one text and of two, with the tokens before and after each, by name."""
  used = {}
  for name in before + behind:
    id = ids[name]
    if id is None:
      raise ValueError(
        f"{path} wants {name.upper()} added to texts, and does not name it: it lacks "
        f"tokenizer.ggml.{name}_token_id. Convert the model again."
      )
    used[name] = {"id": name, "ids": [id], "tokens": [tokens[id]]}
  around = lambda text, kind: [f"{part}:{kind}" for part in (*before, text, *behind)]
  single, second = around("$A", 0), around("$B", 1)
  if not used:
    return None
  return processors.TemplateProcessing(
    single=single, pair=single + second, special_tokens=list(used.values())
  )
