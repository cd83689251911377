"""The tokenizer of a model's directory or GGUF file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, processors

from peftjax.data import sentencepiece_file, tokenizer_config, tokenizer_kinds
from peftjax.data.text_tokenizer import TextTokenizer, refusing
from peftjax.data.tokenizer_config import ROLES, Token, TokenizerConfig
from peftjax.data.tokenizer_kinds import KINDS, Kind, Vocabulary
from peftjax.io import gguf, records

_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
# Characters that few vocabularies have: a tokenizer that cannot do without shows at once.
_PROBE = "a 0.\n\u0378\U0010fffd"


def load_tokenizer(directory: str | Path) -> TextTokenizer:
  """The tokenizer of a Hugging Face model directory or GGUF file; it neither pads nor truncates.

  Reads what transformers' `AutoTokenizer` reads: `tokenizer.json`, or the vocabulary of the model's
  class (`vocab.txt`, `vocab.json` with `merges.txt`, SentencePiece's `tokenizer.model`), and
  `config.json`, `tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json`.

  Raises:
    ValueError: if a file is missing, damaged or says something that is not supported.
  """
  folder = Path(directory)
  if folder.suffix == ".gguf":
    return TextTokenizer(gguf.tokenizer(folder), str(folder), gguf.special_tokens(folder))
  path = folder / "tokenizer.json"
  data = records.read_bytes(path) if path.exists() else None
  parsed = None if data is None else records.parse_object(data, path)
  with refusing(folder, "the tokenizer cannot be read"):
    config = tokenizer_config.read(folder, parsed)
    name, kind = _kind(folder, config, data)
  files = "tokenizer.json" if parsed is not None else " with ".join(_files(kind))
  with refusing(folder, f"{files} cannot be read"):
    made, roles = _build(folder, name, kind, config, data, parsed)
  typed = kind is not None and kind.typed
  if config.switches.model_input_names is not None:
    typed = "token_type_ids" in config.switches.model_input_names
  side = config.switches.truncation_side
  side = side or _setting(parsed, "truncation").get("direction", "right").lower()
  # Files carry settings of their own, such as MiniLM's fixed 128: every text would be that long.
  made.no_padding()
  made.no_truncation()
  with refusing(folder, f"the tokenizer in {files} cannot encode every text"):
    made.encode(_PROBE)
  special = {role: str(token) for role, token in roles.items() if token is not None}
  return TextTokenizer(made, str(folder), special, typed, side)


def digest(directory: str | Path) -> str:
  """SHA-256 of the files that decide the ids of a text; chat templates in them do not count.

  For a GGUF file it is "": the file is all there is.
  """
  folder, total = Path(directory), hashlib.sha256()
  if folder.suffix == ".gguf":
    return ""
  for name in sorted({*_SETTINGS, "tokenizer.json", *(f for k in KINDS.values() for f in k.files)}):
    path = folder / name
    if path.exists():
      data = records.read_bytes(path)
      if name in _SETTINGS:
        said = records.parse_object(data, path)
        said.pop("chat_template", None)
        if not said:
          continue
        data = json.dumps(said, sort_keys=True).encode()
      total.update(name.encode() + hashlib.sha256(data).digest())
  return total.hexdigest()


# Classes whose ids differ from those that a tokenizer.json gives.
_REBUILT = ("CodeLlamaTokenizer", "CohereTokenizer")


def _kind(folder: Path, config: TokenizerConfig, data: bytes | None) -> tuple[str, Kind | None]:
  """The class by name; None is the one that takes its files as they are."""
  where = folder / "config.json"
  said = records.read_object(where) if where.exists() else {}
  declared = config.switches.tokenizer_class or said.get("tokenizer_class")
  model_type = said.get("model_type")
  if not declared and not model_type and data is None:
    declared = _by_files(folder)
  for field, value in (("tokenizer_class", declared), ("model_type", model_type)):
    if not isinstance(value, str | None):
      raise ValueError(f"{where}: {field} is {records.clip(value)}; it must be a text.")
  name = tokenizer_kinds.name_of(model_type, declared, data or b"")
  kind = KINDS.get(name)
  if name in _REBUILT:
    raise ValueError(
      f"{folder} has a {name}, which transformers builds anew, whatever tokenizer.json says, and "
      'this library does not. To have tokenizer.json as it is, write "tokenizer_class": '
      '"PreTrainedTokenizerFast" into tokenizer_config.json.'
    )
  if data is not None:
    return name, kind
  if name and kind is None:
    raise ValueError(
      f"{folder} has a {records.clip(name)}, which is read from a tokenizer.json; without one,"
      f" these are read: {', '.join(KINDS)}. Make one with transformers:"
      " AutoTokenizer.from_pretrained(...).save_pretrained(...)."
    )
  files = _files(kind)
  if not all((folder / file).exists() for file in files):
    raise ValueError(
      f"{folder}: no tokenizer. Allowed: tokenizer.json or, of this model,"
      f" {' with '.join(files)}. Copy these files from where the model came from."
    )
  return name, kind


def _files(kind: Kind | None) -> tuple[str, ...]:
  """The files that a directory without tokenizer.json must have."""
  return kind.files if kind else ("tokenizer.model",)


def _by_files(folder: Path) -> str:
  """The class of a directory that names none, by the files it has."""
  for name, kind in KINDS.items():
    if all((folder / file).exists() for file in kind.files):
      return name
  raise ValueError(
    f"{folder}: no tokenizer. Allowed: tokenizer.json, vocab.txt (BERT), vocab.json with merges.txt"
    " (RoBERTa, GPT-2, Qwen2) or tokenizer.model (Llama). Copy these files from where the model"
    " came from."
  )


def _build(
  folder: Path,
  name: str,
  kind: Kind | None,
  config: TokenizerConfig,
  data: bytes | None,
  parsed: Mapping[str, Any] | None,
) -> tuple[Tokenizer, dict[str, Token | None]]:
  """The tokenizer with its added tokens and the frame of a text, and the named tokens."""
  roles: dict[str, Token | None] = {**(kind.roles if kind else {}), **config.roles}
  if pad := _setting(parsed, "padding").get("pad_token"):
    roles.setdefault("pad_token", pad)
  extra = config.extra
  framed = None
  if kind is None and data is not None:
    made = Tokenizer.from_str(data.decode("utf-8-sig"))
    framed = made.post_processor
  else:
    if kind is None:
      spm = sentencepiece_file.read(folder / "tokenizer.model")
      made = sentencepiece_file.tokenizer(spm, {i: t.content for i, t in config.added.items()})
      roles = {**spm.roles, **roles}
    else:
      vocabulary, spm = _vocabulary(kind, folder, parsed)
      texts = {role: str(token) for role, token in roles.items() if token is not None}
      made = kind.build(vocabulary, config.switches, texts)
      framed = _frame_of(parsed)
    if spm is not None and extra is None:
      extra = tuple(spm.added)
  ordered = {role: roles.get(role) for role in ROLES} | roles
  added = _add(made, config.added, ordered, extra or ())
  if parsed is None:
    _check_ids(folder, made, config.added)
  texts = {role: str(token) for role, token in ordered.items() if token is not None}
  found = {role: (text, made.token_to_id(text)) for role, text in texts.items()}
  ids = {role: (text, id) for role, (text, id) in found.items() if id is not None}
  if kind is not None and kind.frame is not None:
    framed = _own_frame(folder, kind.frame, ids)
  elif framed is None:
    framed = _begin_and_end(config, ids)
  if name == "Qwen2Tokenizer":
    made.add_tokens([AddedToken(text, special=True) for text in added])
  made.post_processor = _untrimmed(framed)
  made.encode_special_tokens = bool(config.switches.split_special_tokens)
  return made, ordered


def _own_frame(folder: Path, frame: Callable[..., Any], ids: Mapping[str, Any]) -> Any:
  try:
    return frame(ids)
  except KeyError as role:
    raise ValueError(f"{folder}: the files take away {role}, which goes around texts") from None


def _vocabulary(
  kind: Kind, folder: Path, parsed: Mapping[str, Any] | None
) -> tuple[Vocabulary, Any]:
  if parsed is None:
    return tokenizer_kinds.from_files(kind, folder)
  return tokenizer_kinds.from_json(parsed), None


def _frame_of(parsed: Mapping[str, Any] | None) -> Any:
  """The post-processor of a tokenizer.json, read without its vocabulary."""
  if parsed is None or not parsed.get("post_processor"):
    return None
  return _processor(json.dumps(parsed["post_processor"]))


def _setting(parsed: Mapping[str, Any] | None, name: str) -> Mapping[str, Any]:
  found = (parsed or {}).get(name)
  return found if isinstance(found, dict) else {}


def _processor(state: str) -> Any:
  """A post-processor from its JSON, whatever its class."""
  made = processors.ByteLevel()
  made.__setstate__(state.encode())
  return made


def _untrimmed(frame: Any) -> Any:
  """The same, with offsets that have every character of a token, spaces too; ids do not change."""
  state = frame.__getstate__().decode()
  return _processor(state.replace('"trim_offsets":true', '"trim_offsets":false'))


def _add(
  made: Tokenizer,
  declared: Mapping[int, AddedToken],
  roles: Mapping[str, Token | None],
  extra: Iterable[Token],
) -> list[str]:
  """Adds the tokens that `made` lacks, in transformers' order; returns the special ones' texts."""
  have = made.get_added_tokens_decoder().values()
  seen = {repr(token) for token in have}
  new: list[Token] = [t for _, t in sorted(declared.items()) if repr(t) not in seen]
  known = {token.content for token in have} | {str(token) for token in new}
  named = [token for token in roles.values() if token is not None]
  special = dict.fromkeys(str(token) for token in (*named, *extra))
  for token in (*named, *extra):
    if str(token) not in known:
      new.append(token)
      known.add(str(token))
  texts = {str(token) for token in named}
  for i, token in enumerate(new):
    if isinstance(token, str):
      new[i] = AddedToken(token, special=True)
    elif not token.special and str(token) in texts:
      token.special = True
  made.add_tokens(new)
  return list(special)


def _check_ids(folder: Path, made: Tokenizer, declared: Mapping[int, AddedToken]) -> None:
  """Raises ValueError if a token did not get the id that the files give it."""
  for index, token in declared.items():
    if (got := made.token_to_id(token.content)) != index:
      raise ValueError(
        f"{folder}: the files give the added token {records.clip(token.content)} the id {index},"
        f" but after the vocabulary it comes at {got}. Put the model's tokenizer.json there."
      )


def _begin_and_end(config: TokenizerConfig, ids: Mapping[str, tuple[str, int]]) -> Any:
  """The tokens that `add_bos_token` and `add_eos_token` put around a text."""
  bos = ids.get("bos_token") if config.switches.add_bos_token else None
  eos = ids.get("eos_token") if config.switches.add_eos_token else None
  single = [*([f"{bos[0]}:0"] if bos else []), "$A:0", *([f"{eos[0]}:0"] if eos else [])]
  second = [*([f"{bos[0]}:1"] if bos else []), "$B:1", *([f"{eos[0]}:1"] if eos else [])]
  return processors.TemplateProcessing(
    single=single, pair=single + second, special_tokens=[token for token in (bos, eos) if token]
  )
