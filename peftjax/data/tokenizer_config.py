"""The small files of a directory that describe its tokenizer, read as transformers 5 reads them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

from tokenizers import AddedToken

from peftjax.io import records

Token: TypeAlias = str | AddedToken

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclasses.dataclass(frozen=True)
class Switches:
  """The fields of `tokenizer_config.json` that decide ids, besides tokens; the format is open."""

  tokenizer_class: str | None = None
  add_bos_token: bool | None = None
  add_eos_token: bool | None = None
  add_prefix_space: bool | None = None
  do_lower_case: bool | None = None
  tokenize_chinese_chars: bool | None = None
  strip_accents: bool | None = None
  legacy: bool | None = None
  split_special_tokens: bool | None = None
  truncation_side: Literal["left", "right"] | None = None
  model_input_names: list[str] | None = None


@dataclasses.dataclass(frozen=True)
class _Written:
  """A token written as an object."""

  content: str
  single_word: bool = False
  lstrip: bool = False
  rstrip: bool = False
  normalized: bool | None = None  # by default, a normalizer sees only tokens that are not special
  special: bool = False


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
  """The files beside a vocabulary, as one.

  Attributes:
    switches: None where the files say nothing.
    roles: tokens by name, such as bos_token; None where a file says that there is none.
    extra: other special tokens; None if none are named.
    added: tokens by the id that a file gives them.
  """

  switches: Switches
  roles: Mapping[str, Token | None]
  extra: tuple[Token, ...] | None
  added: Mapping[int, AddedToken]


def read(folder: Path, vocabulary: Mapping[str, Any] | None) -> TokenizerConfig:
  """The settings of a directory.

  `tokenizer_config.json` comes first. Only if it has no `added_tokens_decoder` are the older files
  `special_tokens_map.json` and `added_tokens.json` read, and the added tokens of `tokenizer.json`.

  Args:
    vocabulary: the contents of `tokenizer.json`, if there is one: it alone then says how texts
      begin and end, and `add_bos_token` and `add_eos_token` are ignored.

  Raises:
    ValueError: naming the file and a field of the wrong type.
  """
  where = folder / "tokenizer_config.json"
  raw = records.read_object(where) if where.exists() else {}
  if vocabulary is not None:
    raw = {k: v for k, v in raw.items() if k not in ("add_bos_token", "add_eos_token")}
  switches = records.convert(raw, Switches, where)
  roles = _roles(raw, where)
  extra: Any = raw.get("extra_special_tokens") or raw.get("additional_special_tokens")
  if isinstance(extra, dict):
    roles |= {key: _token(value, where, key) for key, value in extra.items()}
    extra = None
  if "added_tokens_decoder" in raw:
    added = {
      _index(key, where): _added(value, where, f"added_tokens_decoder.{key}")
      for key, value in _object(raw["added_tokens_decoder"], where, "added_tokens_decoder").items()
    }
  else:
    older = folder / "special_tokens_map.json"
    said = records.read_object(older) if older.exists() else {}
    roles |= _roles(said, older)
    extra = [*(extra or []), *(said.get("extra_special_tokens") or [])]
    special = {str(token) for token in roles.values()} | {_content(token) for token in extra}
    added = _added_file(folder / "added_tokens.json", special) | _serialised(folder, vocabulary)
    extra = extra or said.get("additional_special_tokens")
  if not extra and {"extra_special_tokens", "additional_special_tokens"} & set(raw):
    extra = []  # an empty list takes those of a SentencePiece file away
  by_content = {token.content: token for token in added.values()}
  return TokenizerConfig(
    switches,
    {key: by_content.get(str(token), token) for key, token in roles.items()},
    None if extra is None else tuple(_token(token, where, "a special token") for token in extra),
    added,
  )


def _roles(raw: Mapping[str, Any], where: Path) -> dict[str, Token | None]:
  """Every field that ends in _token; a None is kept where it takes a default away."""
  found: dict[str, Token | None] = {}
  for key, value in raw.items():
    if not key.endswith("_token"):
      continue
    if (value is None or isinstance(value, bool)) and key not in ROLES:  # add_bos_token is a switch
      continue
    found[key] = None if value is None else _token(value, where, key)
  return found


def _token(value: Any, where: Path, field: str) -> Token:
  return value if isinstance(value, str) else _added(value, where, field)


def _added(value: Any, where: Path, field: str) -> AddedToken:
  """The token in an object such as {"content": "<s>", "lstrip": false, ...}."""
  if not isinstance(value, dict):
    raise ValueError(
      f'{where}: {field} is {records.clip(value)}; it must be a text or an object with "content".'
    )
  written = dataclasses.asdict(records.convert(value, _Written, f"{where}, {field}"))
  options = {key: option for key, option in written.items() if option is not None}
  return AddedToken(options.pop("content"), **options)


def _content(token: Any) -> str:
  return token.get("content", "") if isinstance(token, dict) else str(token)


def _object(value: Any, where: Path, field: str) -> dict[str, Any]:
  if not isinstance(value, dict):
    raise ValueError(f"{where}: {field} is {records.clip(value)}; it must be an object.")
  return value


def _index(value: Any, where: Path) -> int:
  """A token's id, which files write as a text or a number."""
  if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
    value = int(value)
  if type(value) is not int or not 0 <= value < 2**31:
    raise ValueError(f"{where}: {records.clip(value)} is not a token id; ids are 0 to 2**31 - 1.")
  return value


def _added_file(where: Path, special: set[str]) -> dict[int, AddedToken]:
  """The ids in added_tokens.json, by text."""
  if not where.exists():
    return {}
  return {
    _index(index, where): AddedToken(text, normalized=text not in special, special=text in special)
    for text, index in records.read_object(where).items()
  }


def _serialised(folder: Path, vocabulary: Mapping[str, Any] | None) -> dict[int, AddedToken]:
  """The added tokens of tokenizer.json."""
  where = folder / "tokenizer.json"
  tokens = (vocabulary or {}).get("added_tokens") or []
  if not isinstance(tokens, list):
    raise ValueError(f"{where}: added_tokens is {records.clip(tokens)}; it must be a list.")
  return {
    _index(_object(token, where, "an added token").get("id"), where): _added(
      token, where, "added_tokens"
    )
    for token in tokens
  }
