"""The vocabulary of a SentencePiece file, `tokenizer.model`, as the Rust library takes it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from peftjax.io import records

_UNIGRAM, _BPE = 1, 2  # trainer_spec.model_type
_CONTROL, _USER_DEFINED = 3, 4  # a piece's type


@dataclasses.dataclass(frozen=True)
class SentencePieceFile:
  """Pieces with their scores, and the settings that the trainer wrote down.

  Attributes:
    pieces: text and score, in the order of ids.
    added: control pieces, such as <s>, which are special, and those that a user defined.
    unigram: whether texts are split by scores; otherwise by merges.
    byte_fallback: whether a character without a piece becomes its bytes.
    charsmap: the normalizer, compiled; empty if there is none.
    unk_id: id of the unknown piece.
    roles: bos_token, eos_token and unk_token, as far as they exist.
  """

  pieces: list[tuple[str, float]]
  added: list[AddedToken]
  unigram: bool
  byte_fallback: bool
  charsmap: bytes
  unk_id: int
  roles: dict[str, str]


def read(path: Path) -> SentencePieceFile:
  """The file's contents; ValueError if it is none (Llama 3's, of that name, is for tiktoken)."""
  try:
    from sentencepiece import sentencepiece_model_pb2
  except Exception as error:  # it refuses a protobuf older than itself by an error of its own
    raise ValueError(
      f"{path} is read with sentencepiece and protobuf ({records.clip(str(error), quote=False)}):"
      " pip install -U sentencepiece protobuf"
    ) from None
  model: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
  data = records.read_bytes(path)
  try:
    model.ParseFromString(data)
    trainer = model.trainer_spec
    pieces = [(piece.piece, piece.score) for piece in model.pieces]
    if not pieces:
      raise ValueError("it holds no pieces")
  except Exception as error:  # protobuf has its own class, in another module in each version
    raise ValueError(
      f"{path} is not a SentencePiece model ({records.clip(str(error), quote=False)}). Put the"
      " model's tokenizer.json beside it."
    ) from None
  if sum(len(piece) ** 2 for piece, _ in pieces) > 2**30:
    raise ValueError(f"{path} has pieces of thousands of characters; download it again.")
  if trainer.model_type not in (_UNIGRAM, _BPE):
    raise ValueError(
      f"{path} is a SentencePiece model of type {trainer.model_type}; only unigram"
      f" ({_UNIGRAM}) and BPE ({_BPE}) are read. Put the model's tokenizer.json beside it."
    )
  roles = (
    ("bos_token", trainer.bos_id, trainer.bos_piece or "<s>"),
    ("eos_token", trainer.eos_id, trainer.eos_piece or "</s>"),
    ("unk_token", trainer.unk_id, trainer.unk_piece or "<unk>"),
  )
  return SentencePieceFile(
    pieces,
    [
      AddedToken(piece.piece, normalized=False, special=piece.type == _CONTROL)
      for piece in model.pieces
      if piece.type in (_CONTROL, _USER_DEFINED)
    ],
    trainer.model_type == _UNIGRAM,
    trainer.byte_fallback,
    model.normalizer_spec.precompiled_charsmap,
    trainer.unk_id,
    {name: piece for name, id, piece in roles if id >= 0},
  )


def merges(pieces: list[str]) -> list[tuple[str, str]]:
  """Every way to make a piece of two, in the order of the pieces' ids, shorter first parts first.

  Pieces stand by falling score, so this is the order in which SentencePiece merges.
  """
  ids = {piece: id for id, piece in enumerate(pieces)}
  return [
    (piece[:k], piece[k:])
    for piece in sorted(ids, key=ids.__getitem__)
    for k in range(1, len(piece))
    if piece[:k] in ids and piece[k:] in ids
  ]


def tokenizer(file: SentencePieceFile, renamed: dict[int, str]) -> Tokenizer:
  """The tokenizer of a directory whose files name no class: spaces are "▁", and none is prepended.

  Args:
    renamed: texts of placeholder pieces by id, where other files of the directory rename them.
  """
  made = Tokenizer(_model(file, renamed))
  steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", "▁")]
  if file.charsmap:
    steps.insert(0, normalizers.Precompiled(file.charsmap))
  made.normalizer = normalizers.Sequence(steps)
  back: list[decoders.Decoder] = [decoders.Replace("▁", " ")]
  if file.byte_fallback:
    back += [decoders.ByteFallback(), decoders.Fuse()]
  made.decoder = decoders.Sequence(back)
  return made


def _model(file: SentencePieceFile, renamed: dict[int, str]) -> models.Model:
  if file.unigram:
    return models.Unigram(file.pieces, unk_id=file.unk_id, byte_fallback=file.byte_fallback)
  pieces = [piece for piece, _ in file.pieces]
  made = merges(pieces)
  taken = set(pieces)
  for id, text in renamed.items():
    if id < len(pieces) and text not in taken:
      pieces[id] = text
  return models.BPE(
    vocab={piece: id for id, piece in enumerate(pieces)},
    merges=made,
    unk_token=file.roles.get("unk_token", "<unk>"),
    fuse_unk=True,
    byte_fallback=file.byte_fallback,
  )
