"""Text to token ids and back, in one place for training, perplexity, prediction, generation."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tokenizers import Encoding, Tokenizer

from peftjax.io import records

# Texts per call: the library's own encodings take over 100 bytes per token.
CHUNK, CHARACTERS = 4096, 2**22

Text = str | tuple[str, str]


@dataclasses.dataclass(frozen=True, eq=False)
class TextTokenizer:
  """The ids that transformers' `AutoTokenizer` gives for the same directory.

  A whole text is tokenised at once and gets the special tokens that the model was made for (<s> of
  a Llama, [CLS] and [SEP] of a BERT). Special tokens written in the text count as such.

  Attributes:
    backend: neither pads nor truncates.
    source: the file or directory, for messages.
    special: special tokens by the name that chat templates have for them, such as bos_token.
    typed: whether the model tells the second text of a pair from the first.
    truncation_side: where a text that is too long is cut.
  """

  backend: Tokenizer
  source: str
  special: Mapping[str, str] = dataclasses.field(default_factory=dict)
  typed: bool = False
  truncation_side: str = "right"

  def encodings(
    self, texts: Sequence[Text], *, special: bool = True, offsets: bool = False
  ) -> Iterator[Encoding]:
    """One encoding per text, or pair of texts; a few thousand at a time are in memory.

    Args:
      special: add the special tokens; False for a text that has them already, as a rendered chat.
      offsets: find out which characters a token stands for, which takes longer.

    Raises:
      ValueError: if the library cannot encode one of them.
    """
    encode = self.backend.encode_batch if offsets else self.backend.encode_batch_fast
    for start, stop in _chunks(texts):
      some = list(texts[start:stop])
      try:
        with refusing(self.source, "the tokenizer cannot encode a text"):
          found = encode(some, add_special_tokens=special)
      except ValueError:
        _check_unicode(some)
        raise
      yield from found

  def encode(self, text: Text, add_special_tokens: bool = True) -> Encoding:
    """The encoding of one text."""
    return next(self.encodings([text], special=add_special_tokens, offsets=True))

  def prompts(self, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
    """The ids of each text as a prompt, without the special tokens that the tokenizer appends."""
    behind = self._behind() if special else 0
    return [e.ids[: len(e.ids) - behind] for e in self.encodings(texts, special=special)]

  def continuation(self, prompt: Sequence[int], new: Sequence[int]) -> str:
    """The text of `new` ids after those of a prompt, special tokens left out.

    decode(prompt + new) = decode(prompt) + continuation, with the space that SentencePiece leaves
    out at a beginning, and with U+FFFD where the last character's bytes are not all there. If a
    decoder changes text that came before (WordPiece's moves spaces), it is the part that differs.
    """
    whole, before = self.decode([*prompt, *new]), self.decode(prompt)
    return whole[len(os.path.commonprefix([whole, before])) :]

  def decode(self, ids: Sequence[int]) -> str:
    """The text of some ids, special tokens left out."""
    with refusing(self.source, "the tokenizer cannot decode"):
      return self.backend.decode(list(ids), skip_special_tokens=True)

  def id(self, role: str) -> int | None:
    """The id of a special token, such as eos_token; None if there is none."""
    text = self.special.get(role)
    return None if text is None else self.backend.token_to_id(text)

  def _behind(self) -> int:
    """The number of special tokens that come after a text."""
    mask = self.encode("a").special_tokens_mask
    return mask[::-1].index(0) if 0 in mask else 0


@contextlib.contextmanager
def refusing(source: str | Path, what: str) -> Iterator[None]:
  """A context in which any failure of the Rust library, even a panic, is one ValueError."""
  try:
    yield
  except BaseException as error:
    if isinstance(error, ValueError) and str(source) in str(error):
      raise
    # A panic is no Exception, and its class is in no module; the library's own are bare ones.
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
      raise
    raise ValueError(f"{source}: {what}: {records.clip(str(error), quote=False)}") from None


def _check_unicode(texts: Sequence[Text]) -> None:
  """Raises ValueError on half a surrogate pair, which Python makes of bytes that are not UTF-8."""
  for text in texts:
    try:
      str(text if isinstance(text, str) else "".join(text)).encode()
    except UnicodeEncodeError as error:
      raise ValueError(
        f"the text {records.clip(text)} is not Unicode at character {error.start}: half a surrogate"
        " pair. Write it in UTF-8."
      ) from None


def _chunks(texts: Sequence[Text]) -> Iterator[tuple[int, int]]:
  """Start and stop of parts of a list, none of which has many texts or characters."""
  start = size = 0
  for i, text in enumerate(texts):
    length = len(text) if isinstance(text, str) else sum(map(len, text))
    if i > start and (i - start == CHUNK or size + length > CHARACTERS):
      yield start, i
      start, size = i, 0
    size += length
  if start < len(texts):
    yield start, len(texts)
