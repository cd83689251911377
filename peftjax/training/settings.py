"""Reads a `ConfigDict` into frozen dataclasses, once; an unknown key is an error."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import jax.numpy as jnp
from ml_collections import ConfigDict
from msgspec import Meta

from peftjax import optim, sharding
from peftjax.core import ranges
from peftjax.core.ranges import Count, Fraction, Length, NotNegative, Positive, RowLength, Size
from peftjax.data import samples
from peftjax.data.corpora import FROM_FILES
from peftjax.io.records import clip
from peftjax.methods.base import Method, chain
from peftjax.methods.registry import METHODS
from peftjax.methods.unfreeze import unfreeze
from peftjax.models import stack
from peftjax.quant.formats import FORMATS, Format
from peftjax.training import sections
from peftjax.training.official import Answers, Tags
from peftjax.training.sections import Section

T = TypeVar("T")

# Names of optimizers in a config, and the functions that build them.
OPTIMIZERS: Mapping[str, Callable[..., Any]] = {
  "adamw": optim.adamw,
  "adamw8bit": optim.adamw8bit,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model(Section):
  """The pretrained model, and how it computes."""

  section = "model"

  name: str = ""  # a sample model, of `data.samples.MODELS`
  directory: str = ""  # instead: a Hugging Face directory, or a .gguf file
  # package.module:function that returns a model of one's own; the tokenizer is still of the above.
  factory: str | None = None
  scan_layers: bool = False
  # Gradient checkpointing, for decoders: none, or what each layer keeps (`models.stack.REMAT`).
  remat: bool | str = "none"
  dtype: str = "float32"  # of activations: float32 or bfloat16

  def options(self) -> dict[str, Any]:
    """The options for `pretrained.load`."""
    ranges.one_of("model.dtype", self.dtype, sections.DTYPES)
    options = dict(scan_layers=self.scan_layers, dtype=jnp.dtype(self.dtype))
    # The flag's text: before there were names, it was true or false.
    remat = {"true": "layer", "false": "none"}.get(str(self.remat).lower(), self.remat)
    ranges.one_of("model.remat", remat, ("none", *stack.REMAT))
    return options if remat == "none" else {**options, "remat": remat}

  def path(self) -> Path:
    return Path(self.directory).expanduser() if self.directory else samples.model(self.name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quant(Section):
  """The quantisation of the frozen base, if any."""

  section = "quant"

  name: str = "none"  # or nf4, nf4_textbook, lloyd_max, fp4, fp4_e3m0, int4, int8
  block_size: Size = 64
  double_quant: bool = True
  targets: str | Sequence[str] = "all-linear"

  def format(self) -> Format | None:
    if self.name == "none":
      return None
    ranges.one_of("quant.name", self.name, ("none", *FORMATS))
    if self.name == "int8" and self.double_quant:
      raise ValueError(
        "quant.name=int8 with double_quant: scales of eight bits would be coarser than the weights "
        "they scale. Write --config.quant.double_quant=false"
      )
    return Format(self.name, self.block_size, self.double_quant)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data(Section):
  """The texts of a classifier; see `peftjax.data.load`."""

  section = "data"

  name: str = "bbc"
  max_length: Length = 64  # tokens, special ones included
  train_file: str | None = None
  validation_file: str | None = None
  test_file: str | None = None
  text_column: str = "text"
  pair_column: str | None = None
  label_column: str = "label"
  regression: bool = False
  glue_dir: str | None = None
  split_seed: Count | None = None  # for splits and subsets, by default the run's
  train_examples: Size | None = None  # a random subset of at most this many
  eval_examples: Size | None = None  # likewise for validation and for test

  def corpus_arguments(self) -> dict[str, Any]:
    fields = dataclasses.asdict(self)
    for name in ("max_length", "split_seed", "train_examples", "eval_examples"):
      del fields[name]
    return fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text(Section):
  """The texts that a language model is trained on; see `peftjax.data.load`."""

  section = "data"

  name: str = "bbc"
  max_length: RowLength = 256  # tokens per row
  train_file: str | None = None
  validation_file: str | None = None
  test_file: str | None = None
  text_column: str = "text"
  pair_column: str | None = None  # the completion, if text_column is a prompt
  between: str = ""  # behind each prompt, as "\nTL;DR:"
  loss: str = "all"  # tokens, or those of "completions"
  other: str = "sentiment"  # another corpus, to see what is forgotten; "" for none
  eval_rows: Size | None = None  # of each held-out part, at most

  def __post_init__(self) -> None:
    super().__post_init__()
    ranges.one_of("data.loss", self.loss, ("all", "completions"))

  def corpus_arguments(self) -> dict[str, Any]:
    fields = dataclasses.asdict(self)
    for name in ("max_length", "loss", "other", "eval_rows"):
      del fields[name]
    bare = self.name in FROM_FILES
    return {**fields, "label_column": None} if bare else fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pairs(Section):
  """Sources and the targets to be made of them; see `peftjax.data.load`."""

  section = "data"

  max_length: Length = 128  # tokens of a source, special ones included
  target_length: Length = 64  # likewise of a target
  train_file: str | None = None
  validation_file: str | None = None
  test_file: str | None = None
  source_column: str = "source"
  target_column: str = "target"
  eval_examples: Size | None = None  # of validation and of test, a random subset of at most so many

  def corpus_arguments(self) -> dict[str, Any]:
    names = ("train_file", "validation_file", "test_file")
    columns = dict(text_column=self.source_column, pair_column=self.target_column)
    files = {name: getattr(self, name) for name in names}
    return {"name": "files", "label_column": None, **columns, **files}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer(Section):
  """AdamW and its schedule."""

  section = "optimizer"

  name: str = "adamw"  # or adamw8bit
  paged: str = "never"  # keep its state in host memory: never, always, or auto: if it has to be
  # For auto, where the device does not report its own.
  device_memory_bytes: Annotated[int, Meta(ge=1, le=2**62)] | None = None
  learning_rate: Positive = 5e-4
  schedule: str = "linear"  # after the warm-up: linear, cosine or constant
  warmup: NotNegative = 0.06  # fraction of all updates, or, from 1 on, a number of updates
  weight_decay: NotNegative = 0.01
  b1: Fraction = 0.9
  b2: Fraction = 0.999
  eps: optim.Epsilon = 1e-8
  clip_norm: Positive | None = 1.0
  accumulate: Size = 1  # batches per update

  def __post_init__(self) -> None:
    super().__post_init__()
    ranges.one_of("optimizer.name", self.name, OPTIMIZERS)
    ranges.one_of("optimizer.paged", self.paged, ("never", "always", "auto"))

  def updates(self, batches: int) -> int:
    """The number of updates; the last one may be of fewer batches than the others."""
    return -(-batches // self.accumulate)

  def warmup_steps(self, updates: int) -> int:
    """The number of warm-up steps, fewer than all.

    Raises:
      ValueError: if there is no update after it.
    """
    steps = int(self.warmup if self.warmup >= 1 else self.warmup * updates)
    if steps >= updates or self.warmup >= 1 and self.warmup != steps:
      raise ValueError(
        f"--config.optimizer.warmup={self.warmup} of {updates} updates: write a fraction below 1, "
        f"or a whole number below {updates}"
      )
    return steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train(Section):
  """The length of training, its batches, and when files are written."""

  section = "train"

  batch_size: Length = 32
  epochs: Positive = 3.0
  steps: Size | None = None  # batches; goes before `epochs`
  eval_batch_size: Length = 64
  log_every: Size = 10  # steps
  save_every: Size | None = None  # steps; besides once per epoch

  def total_steps(self, steps_per_epoch: int) -> int:
    """Batches in all.

    Raises:
      ValueError: if there are none, or more than can be counted.
    """
    total = self.steps if self.steps is not None else round(self.epochs * steps_per_epoch)
    if not 1 <= total < 2**31:
      many = "no step at all" if total < 1 else "more than 2147483647 steps"
      raise ValueError(
        f"--config.train.epochs={self.epochs} of {steps_per_epoch} batches is {many}; "
        "write another number, or --config.train.steps"
      )
    return total


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """All settings of a run."""

  seed: Count
  task: str = "classify"  # or another of `DATA`
  model: Model
  quant: Quant
  data: Any  # of the class that `DATA` has for the task
  method: Mapping[str, Any]
  optimizer: Optimizer
  train: Train
  compilation_cache: str
  rules: Sequence[str] = ()  # sharding rules before `sharding.RULES`: see `sharding.rules`

  def __post_init__(self) -> None:
    ranges.check(type(self), vars(self), "--config.")
    self.sharding_rules()

  def sharding_rules(self) -> sharding.Rules:
    return sharding.rules(self.rules)

  def own_method(self) -> Method:
    """The method alone, with the run's seed if it draws something of its own."""
    fields = {key: x for key, x in self.method.items() if key not in ("name", "head")}
    name: Any = self.method.get("name")
    ranges.one_of("method.name", name, METHODS)
    method = METHODS[name]
    fields = sections.arguments(method, fields, "method")
    if "seed" in _parameters(method):
      fields.setdefault("seed", self.seed)
    ranges.check(method, fields, "--config.method.")
    return _build(method, fields, f"method ({name})")

  def build_method(self) -> Method:
    """The method with, unless `head` is false, the task head trained beside it."""
    head = self.method.get("head", True)
    ranges.check_one("--config.method.head", head, bool)
    method = self.own_method()
    return chain(method, unfreeze("head/.*")) if head else method


# The sections of a config but the method's, and the data's of each task.
SECTIONS: Mapping[str, Any] = {
  "model": Model,
  "quant": Quant,
  "optimizer": Optimizer,
  "train": Train,
}
DATA: Mapping[str, Any] = {
  "classify": Data,
  "causal_lm": Text,
  "seq2seq": Pairs,
  "tag": Tags,
  "answer": Answers,
}


def from_config(config: ConfigDict) -> Settings:
  """The typed settings of a config.

  Raises:
    ValueError: on a key no section has, naming near ones.
  """
  fields = config.to_dict()
  task = fields.get("task", "classify")
  ranges.one_of("task", task, DATA)
  classes = {**SECTIONS, "data": DATA[task]}
  typed = {name: _build(cls, fields.pop(name, {}), name) for name, cls in classes.items()}
  fields.setdefault("compilation_cache", "")
  return _build(Settings, {**fields, **typed}, "config")


def _build(cls: Callable[..., T], fields: Mapping[str, Any], where: str) -> T:
  allowed = _parameters(cls)
  if not isinstance(fields, Mapping):
    raise ValueError(f"config: {where} is {clip(fields)}; it has the keys {', '.join(allowed)}")
  for key in fields:
    if key not in allowed:
      near = difflib.get_close_matches(key, allowed, n=1)
      hint = f"; did you mean {near[0]!r}?" if near else ""
      raise ValueError(f"config: {where} has no key {key!r}{hint} It has: {', '.join(allowed)}")
  return cls(**fields)


def _parameters(cls: Callable[..., Any]) -> list[str]:
  return list(inspect.signature(cls).parameters)
