"""A finished run, or a pretrained model, as a function from prompts to texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from peftjax import data
from peftjax.core.ranges import Count
from peftjax.data import chat
from peftjax.io import records
from peftjax.models import configuration
from peftjax.models.generate import generate
from peftjax.training import finished


class Writer:
  """The best checkpoint of a `causal_lm` or `seq2seq` run in `workdir`, ready to write.

  Args:
    workdir: workdir of the run.
    adapted: False for the model as it was before training.

  Attributes:
    path: path of the pretrained model.
    model, params: with the trained adapter.
    answers: True if the model reads a prompt, and does not go on from it.

  Raises:
    ValueError: see `finished.load`.
  """

  def __init__(self, workdir: str | Path, *, adapted: bool = True):
    run = finished.load(
      workdir,
      "causal_lm",
      "seq2seq",
      ours="which keeps no cache of keys and values to write with; this writes with models of this "
      "library",
      adapted=adapted,
    )
    self.settings, self.path = run.settings, run.base
    self.model, self.params = run.model, run.params
    self._read_tokenizer()

  def _read_tokenizer(self) -> None:
    self._tokenizer = data.load_tokenizer(self.path)
    self._end = configuration.end_ids(self.path)
    self._stop = _stop_ids(self.path) or self._end
    self.answers = configuration.reads_source(self.path)

  def prompts(self, part: str) -> list[str]:
    """The prompts of a part of the data that the run was made on, each once, in their order.

    Raises:
      ValueError: its texts are not prompts with completions.
    """
    wanted = self.settings.data
    corpus = data.load(seed=self.settings.seed, **wanted.corpus_arguments())
    examples = corpus.splits[part]
    if examples.pairs is None:
      raise ValueError(f"the run was made on whole texts of {wanted.name}, which have no prompts")
    return list(dict.fromkeys(examples.texts))

  def write(
    self,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    as_chat: bool = False,
  ) -> list[str]:
    """The continuation of each prompt; with `as_chat`, the answer to it as a user's message.

    A prompt and its continuation are together the text of all ids. For an encoder-decoder, which
    reads a prompt as a whole text, the answer is a text of its own.

    Raises:
      ValueError: if a prompt has no ids, or the model has no chat template for it.
    """
    if as_chat:
      text = chat.template(self.path)
      said = [[{"role": "user", "content": prompt}] for prompt in prompts]
      prompts = [chat.render(text, messages, self._tokenizer.special) for messages in said]
    if self.answers:
      ids = [encoding.ids for encoding in self._tokenizer.encodings(prompts, special=not as_chat)]
    else:
      ids = self._tokenizer.prompts(prompts, special=not as_chat)
    if not all(ids):
      raise ValueError(
        f"the prompt {prompts[ids.index([])]!r} has no tokens of {self.path}: write some text"
      )
    # Each length of its own would be a program of its own.
    length = -(-max(map(len, ids)) // 16) * 16
    tokens = np.full((len(ids), length), self._end[0], np.int32)
    mask = np.zeros((len(ids), length), bool)
    for row, one in enumerate(ids):
      tokens[row, length - len(one) :], mask[row, length - len(one) :] = one, True
    new, counts = generate(
      self.model,
      self.params,
      jnp.asarray(tokens),
      jnp.asarray(mask),
      max_new_tokens=max_new_tokens,
      temperature=temperature,
      top_p=top_p,
      stop=self._stop,
      pad_id=self._end[0],
      key=jax.random.key(seed),
    )
    written = [row[:count].tolist() for row, count in zip(np.asarray(new), counts, strict=True)]
    if self.answers:
      return list(map(self._tokenizer.decode, written))
    return [self._tokenizer.continuation(one, two) for one, two in zip(ids, written, strict=True)]


@dataclasses.dataclass(frozen=True)
class _Generation:
  """The fields that are read of `generation_config.json`."""

  eos_token_id: Count | list[Count] | None = None


def _stop_ids(path: Path) -> tuple[int, ...]:
  """The ids that end a text, by `generation_config.json`: chat models have more than one."""
  where = path / "generation_config.json"
  if path.suffix == ".gguf" or not where.exists():
    return ()
  ids = records.convert(records.read_object(where), _Generation, where).eos_token_id
  return () if ids is None else tuple(ids) if isinstance(ids, list) else (ids,)
