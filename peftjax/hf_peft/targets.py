"""The modules that an `adapter_config.json` names, by PEFT's own rules.

They are those of `check_target_module_exists`, `_maybe_include_all_linear_layers`,
`get_pattern_key`, `_set_trainable` and IA3's `_check_target_module_feedforward` in PEFT 0.21.2, odd
ones too: a name in `modules_to_save` or `feedforward_modules` is the end of a module's path
wherever it begins ("norm" is "input_layernorm"), and to exclude targets it is a pattern.
"""

from __future__ import annotations

import functools
import re
import time
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

from peftjax.core import patterns
from peftjax.io.records import clip
from peftjax.methods.codec import END, Codec, Common, Targeted

UNDER = r"(^|.*\.){}($|\..*)"  # a module in modules_to_save
LAYER = r"(?:^|.*?\.){}\.(?P<idx>\d+)\."  # for an entry of layers_pattern
_ANY_LAYER = re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")
# What peft adds to modules_to_save by the task, whichever there is.
_HEADS = ("score", "classifier")
_OF_TASK = {"SEQ_CLS": _HEADS, "TOKEN_CLS": _HEADS, "QUESTION_ANS": ("qa_outputs",)}
SECONDS = 5.0  # for all patterns of a config together


class Matcher:
  """Matches patterns of one file, with a bound on the time they take together."""

  def __init__(self, where: str):
    self.where, self.spent = where, 0.0

  def match(self, pattern: str, text: str) -> bool:
    return self._run(patterns.match, pattern, text)

  def fullmatch(self, pattern: str, text: str) -> bool:
    return self._run(patterns.fullmatch, pattern, text)

  def groups(self, pattern: str, text: str) -> dict[str, Any] | None:
    return self._run(patterns.groups, pattern, text)

  def value(self, table: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first key that matches the end of a module's path."""
    return next((x for key, x in (table or {}).items() if self.ends(key, module)), default)

  def ends(self, key: str, module: str) -> bool:
    """Tells whether a key of rank_pattern or alpha_pattern means a module."""
    exact = _exact(key)
    return self.match(END.format(key), module) if exact is None else exact == module

  def _run(self, how: Any, pattern: str, text: str) -> Any:
    start = time.process_time()
    try:
      found = how(pattern, text)
    except ValueError as error:
      raise ValueError(f"{self.where}: {error}") from None
    self.spent += time.process_time() - start
    if self.spent > SECONDS:
      raise ValueError(
        f"{self.where}: its patterns take more than {SECONDS} s, {pattern[:200]!r} among them. "
        "Write them without a repetition inside another."
      )
    return found


class Modules(NamedTuple):
  """The modules of a model as torch names them.

  Attributes:
    every: all modules, those that hold others included.
    linear: linear layers, `Conv1D` included.
    tables: embeddings.
    head: the modules of the logits, if the model is a decoder with such a head.
    norms: LayerNorm and RMSNorm.
  """

  every: tuple[str, ...]
  linear: frozenset[str]
  tables: frozenset[str]
  head: str = ""
  norms: frozenset[str] = frozenset()


def modules_of(names: Mapping[str, str], bare: str = "", head: str = "") -> Modules:
  """The modules of a model, from each tensor's name and kind ("kernel", "scale").

  Args:
    bare: prefix that names have here but not in an adapter of the bare model.
    head: the language-model head.
  """
  inside = {n.removeprefix(bare): kind for n, kind in names.items() if n.startswith(bare)}
  parents = {name.rpartition(".")[0]: kind for name, kind in inside.items() if kind != "bias"}
  every: dict[str, None] = {}
  for module in parents:
    parts = module.split(".")
    every.update(dict.fromkeys(".".join(parts[: n + 1]) for n in range(len(parts))))
  of = lambda kind: frozenset(module for module, x in parents.items() if x == kind)
  return Modules(
    tuple(every), of("kernel"), of("embedding"), head if head in every else "", of("scale")
  )


def targeted(
  config: Targeted, modules: Modules, matcher: Matcher, *, tables: bool = False, norms: bool = False
) -> frozenset[str]:
  """The modules that peft would give an adapter.

  Args:
    tables: True if the method adapts tables, too.
    norms: True if it trains norms and nothing else.

  Raises:
    ValueError: no module is named, or one that peft gives no adapter of this kind, or one that is
      saved whole.
  """
  targets, where = config.target_modules, matcher.where
  if isinstance(targets, str) and targets.lower() == "all-linear":
    targets = sorted(modules.linear - _heads(config, modules))
  found = frozenset(m for m in modules.every if _is_targeted(config, targets, m, matcher))
  allowed = modules.linear | (modules.tables if tables else frozenset())
  kinds = "linear layer or table" if tables else "linear layer"
  if norms:
    allowed, kinds = modules.norms, "norm"
  if wrong := sorted(found - allowed):
    told = "only norms are read" if norms else "peft gives it no adapter"
    raise ValueError(
      f"{where}: target_modules names {wrong[0]}, which is not a {kinds}: {told}. Name one that is."
    )
  whole = tuple(f"{module}." for module in saved(config, modules))
  if clash := sorted(m for m in found if f"{m}.".startswith(whole)):
    raise ValueError(
      f"{where}: {clash[0]} would have an adapter and be saved whole, by target_modules and by "
      "modules_to_save, a name in which is the end of a path wherever it begins. Name it in one."
    )
  if not found:
    fields = ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
    less = [f"{x}={_shown(y)}" for x in fields if (y := getattr(config, x)) not in (None, [])]
    raise ValueError(
      f"{where}: target_modules={_shown(config.target_modules)}"
      f"{' less ' + ', '.join(less) if less else ''} names no module of this model. It has "
      f"{_shown(sorted({m.rpartition('.')[2] for m in allowed}))}.\n"
      "Was the adapter trained on another model?"
    )
  return found


def saved(config: Common, modules: Modules) -> frozenset[str]:
  """The modules that peft trains and saves whole."""
  names = [*(config.modules_to_save or ())]
  names += [name for name in _OF_TASK.get(config.task_type or "", ()) if name not in names]
  return frozenset(m for m in modules.every if m.endswith(tuple(names)))


def tell_unused(
  config: Common, codec: Codec | None, modules: Modules, found: frozenset[str], matcher: Matcher
) -> None:
  """Warns of names and patterns that match no module, as peft does of some of them."""
  ends = lambda name: any(m == name or m.endswith(f".{name}") for m in modules.every)
  unused = {}
  if isinstance(config, Targeted):
    unused["target_modules"] = [x for x in listed(config.target_modules, True) if not ends(x)]
    unused["exclude_modules"] = [x for x in listed(config.exclude_modules, True) if not ends(x)]
  unused["modules_to_save"] = [
    x
    for x in config.modules_to_save or ()
    if x not in (*_HEADS, "qa_outputs") and not any(m.endswith(x) for m in modules.every)
  ]
  for field in codec.exceptions.values() if codec else ():
    keys = getattr(config, field) or {}
    unused[field] = [k for k in keys if not any(matcher.ends(k, m) for m in found)]
  for field, keys in unused.items():
    if keys:
      warnings.warn(
        f"{matcher.where}: {field} has {_shown(keys)}, which no module of this model matches; it "
        "is left out, as peft does",
        stacklevel=5,
      )


@functools.lru_cache(maxsize=4096)
def _exact(key: str) -> str | None:
  """The one path that an escaped key means, as `save` writes it for each matrix of a model."""
  return re.sub(r"\\(\W)", r"\1", key[1:]) if re.fullmatch(r"\^(\w|\\\W)+", key) else None


def listed(value: list[str] | str | None, lists_only: bool = False) -> list[str]:
  """One value or several, as a list."""
  if isinstance(value, str):
    return [] if lists_only else [value]
  return value or []


def _is_targeted(config: Targeted, targets: Any, module: str, matcher: Matcher) -> bool:
  within = lambda names: module in names or module.endswith(tuple(f".{name}" for name in names))
  excluded = config.exclude_modules
  if excluded and (
    matcher.fullmatch(excluded, module) if isinstance(excluded, str) else within(excluded)
  ):
    return False
  whole = [*(config.modules_to_save or ()), *_OF_TASK.get(config.task_type or "", ())]
  if any(matcher.match(UNDER.format(name), module) for name in whole):
    return False
  if isinstance(targets, str):
    return matcher.fullmatch(targets, module)
  if module in targets:
    return True
  return within(targets) and _in_layers(config, module, matcher)


def _in_layers(config: Targeted, module: str, matcher: Matcher) -> bool:
  """Tells whether a module's layer, after a name in `layers_pattern` or at all, is to transform."""
  layers = config.layers_to_transform
  if layers is None or layers == []:
    return True
  names = listed(config.layers_pattern)
  if names:
    tries = (matcher.groups(LAYER.format(name), module) for name in names)
    found = next((x for x in tries if x), None)
  else:
    match = _ANY_LAYER.match(module)
    found = match.groupdict() if match else None
  index = found["idx"] if found and found["idx"] else None
  return index is not None and int(index) in ([layers] if isinstance(layers, int) else layers)


def _heads(config: Targeted, modules: Modules) -> frozenset[str]:
  """The heads that "all-linear" leaves out."""
  if modules.head:
    return frozenset({modules.head})
  if config.task_type == "SEQ_CLS":
    return frozenset([x for x in _HEADS if x in modules.every][:1])
  return frozenset()


def _shown(values: Any) -> str:
  if not isinstance(values, list | frozenset):
    return clip(values)
  text = ", ".join(repr(str(x)[:200]) for x in list(values)[:8])
  return f"[{text}{', ...' if len(values) > 8 else ''}]"
