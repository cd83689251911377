"""LoRA, DoRA and AdaLoRA in directories of Hugging Face's PEFT library (0.21)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, ClassVar

import jax.numpy as jnp
import numpy as np
from msgspec import Meta

from peftjax.core.adapted import axis_names
from peftjax.core.ranges import Fraction, Size
from peftjax.io.records import clip
from peftjax.methods.adalora_weight import SVDLoRA
from peftjax.methods.codec import (
  Adapter,
  Alpha,
  Codec,
  Flag,
  Module,
  Nested,
  Number,
  Source,
  Targeted,
  Text,
  Want,
  alpha,
  layers,
  padded,
)
from peftjax.methods.dora_weight import DoRA, squares
from peftjax.methods.lora_weight import LoRA

# The tensors beside a module's name: A [r, in] and B [out, r], as our factors lie, too, ...
FACTORS = {
  "kernel": ("lora_A.weight", "lora_B.weight"),
  "embedding": ("lora_embedding_A", "lora_embedding_B"),
}
TRIPLETS = ("lora_A", "lora_B", "lora_E")  # ... AdaLoRA's triplets left, λ as [r, 1], ...
MAGNITUDE = "lora_magnitude_vector"  # ... and DoRA's m [out].
# Initialisations that leave the base as it was; all others of peft (PiSSA, OLoRA, ...) change it.
_INITS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig(Targeted):
  """Fields of LoRA and DoRA."""

  r: Size = 8
  lora_alpha: Alpha = 8.0
  lora_dropout: Fraction = 0.0
  use_rslora: Flag = False
  use_dora: Flag = False
  rank_pattern: dict[str, Size] | None = None
  alpha_pattern: dict[str, Alpha] | None = None
  init_lora_weights: bool | str | None = True
  ensure_weight_tying: Flag = False
  # Fields of initialisations, ...
  corda_config: Nested = None
  eva_config: Nested = None
  loftq_config: Nested = None
  lora_ga_config: Nested = None
  # ... of parts that are not read, or of run time, and, to 0.2, whether evaluation merges.
  megatron_core: Text = None
  qalora_group_size: Number = None
  runtime_config: Nested = None
  merge_weights: Flag = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaLoraConfig(LoraConfig):
  """Fields of AdaLoRA: the scale is alpha over `init_r`; `rank_pattern` has the triplets left."""

  init_r: Size = 12
  lora_alpha: Annotated[float, Meta(gt=0, lt=1e30)] = 8.0  # peft takes the rank for what is not
  rank_pattern: dict[str, list[bool]] | None = None  # type: ignore[assignment]
  beta1: Number = None
  beta2: Number = None
  deltaT: Number = None
  orth_reg_weight: Number = None
  target_r: Number = None
  tfinal: Number = None
  tinit: Number = None
  total_step: Number = None


class LoraCodec(Codec):
  """LoRA of linear layers and tables; a stacked layer without an adapter has rank and scale 0."""

  kind = "LORA"
  leaf = LoRA
  schema: ClassVar[type[Targeted]] = LoraConfig
  reads = frozenset(FACTORS)
  of_experts: ClassVar[bool] = True
  fixed: ClassVar[Mapping[str, tuple[Any, ...]]] = {
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),  # {} is one with its defaults
    "bias": ("none",),
    "enable_lora": (None,),  # to 0.2, a list for matrices of several projections
    "kasa_config": (None,),
    "layer_replication": (None, []),
    "lora_bias": (None, False),
    "megatron_config": (None,),
    "monteclora_config": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "use_bdlora": (None,),
    "use_qalora": (None, False),
    "velora_config": (None,),
  }
  exceptions: ClassVar[Mapping[str, str]] = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}
  constants: ClassVar[Mapping[str, Any]] = {
    "bias": "none",
    "init_lora_weights": True,
    "use_dora": False,
  }

  def takes(self, config: Any) -> bool:
    return not config.use_dora

  def check(self, config: Any, where: str) -> None:
    init = config.init_lora_weights
    if (init.lower() if isinstance(init, str) else init) not in _INITS:
      raise ValueError(
        f"{where} has init_lora_weights={clip(init)}: such an adapter belongs to a base "
        "that the initialisation changed, not to the pretrained one.\nConvert it with peft, which "
        "saves the initial adapter at the start and then writes plain LoRA:\n"
        "  model.save_pretrained(NEW, path_initial_model_for_weight_conversion=INITIAL)"
      )

  def wants(self, config: Any, module: Module, matcher: Any) -> dict[str, Want]:
    rank = self._rank(config, module, matcher)
    shapes = ((rank, module.n_in), (module.n_out, rank), (rank, 1))
    hint = f" with rank {rank}, as adapter_config.json says"
    return {x: Want(s, hint) for x, s in zip(self._names(module.kind), shapes, strict=False)}

  def read(self, source: Source) -> Any:
    n_in, n_out = source.leaf.shape[-2:]
    stack, kind = source.stack, source.path.rpartition("/")[2]
    names = self._names(kind)
    empty = [np.zeros(s, np.float32) for s in ((0, n_in), (n_out, 0), (0, 1))][: len(names)]
    found, scales = [], []
    for module in source.modules:
      found.append(empty if module is None else [source.tensor(module, x) for x in names])
      scales.append(0.0 if module is None else self._scale(source.config, module, source.matcher))
    a, b, *rest = (list(factor) for factor in zip(*found, strict=True))
    weight = self.leaf(
      base=source.leaf,
      a=padded(a, stack, 0),
      b=padded(b, stack, 1),
      scale=jnp.asarray(scales, jnp.float32).reshape(stack),
      rank=jnp.asarray([len(x) for x in a], jnp.int32).reshape(stack),
      dropout=source.config.lora_dropout,
      names=axis_names(source.leaf),
    )
    return self._completed(weight, source, rest)

  def write(self, path: str, leaf: Any, *, rslora: bool) -> dict[str, Adapter]:
    """One adapter per layer, padding stripped; a layer of rank 0 has none."""
    if leaf.residual:
      raise ValueError(
        f"{path} is a PiSSA adapter: its base is no longer the pretrained one, which readers of "
        "this format add B A to.\nSave the whole model instead, from pj.merge(params), or train "
        'with pj.lora(..., init="kaiming").'
      )
    found = {}
    for layer, rank, scale, a, b, *rest in layers(
      path, leaf.stack, leaf.rank, leaf.scale, leaf.a, leaf.b, *self._more(path, leaf)
    ):
      if r := int(rank):
        fields = {"r": r, "lora_alpha": alpha(scale, math.sqrt(r) if rslora else r)}
        tensors, note = self._tensors(path.rpartition("/")[2], a[:r], b[:, :r], *rest)
        fields |= {"lora_dropout": leaf.dropout, "use_rslora": rslora}
        found[layer] = Adapter(tensors, fields, note)
    return found

  # The parts in which DoRA and AdaLoRA differ.

  def _names(self, kind: str) -> tuple[str, ...]:
    return FACTORS[kind]

  def _rank(self, config: Any, module: Module, matcher: Any) -> int:
    return matcher.value(config.rank_pattern, module.name, config.r)

  def _scale(self, config: Any, module: Module, matcher: Any) -> float:
    rank = self._rank(config, module, matcher)
    own = matcher.value(config.alpha_pattern, module.name, config.lora_alpha)
    return own / (math.sqrt(rank) if config.use_rslora else rank)

  def _completed(self, weight: Any, source: Source, rest: list[Any]) -> Any:
    return weight

  def _more(self, path: str, leaf: Any) -> tuple[Any, ...]:
    """Arrays whose layers `_tensors` is given."""
    return ()

  def _tensors(self, kind: str, a: Any, b: Any, *rest: Any) -> tuple[dict[str, Any], Any]:
    return dict(zip(FACTORS[kind], (a, b), strict=True)), None


class DoraCodec(LoraCodec):
  """DoRA; a layer of a stack without an adapter has the magnitude of its base."""

  leaf = DoRA
  of_experts = False
  constants = {**LoraCodec.constants, "use_dora": True}

  def takes(self, config: Any) -> bool:
    return bool(config.use_dora)

  def wants(self, config: Any, module: Module, matcher: Any) -> dict[str, Want]:
    if module.kind == "embedding":
      raise ValueError(
        f"{matcher.where} has use_dora and targets {module.name}, a table; DoRA is read for "
        "linear layers alone.\nMerge the adapter with peft (model.merge_and_unload()) and load "
        "the model it gives."
      )
    return {**super().wants(config, module, matcher), MAGNITUDE: Want((module.n_out,))}

  def _completed(self, weight: Any, source: Source, rest: list[Any]) -> Any:
    square = squares(weight.base, weight.axes, weight.stack)
    rows = np.array(jnp.sqrt(square)).reshape(len(source.modules), -1)
    for i, module in enumerate(source.modules):
      if module is not None:
        rows[i] = source.tensor(module, MAGNITUDE)
    return weight.replace(m=jnp.asarray(rows.reshape(square.shape)), square=square)

  def _more(self, path: str, leaf: Any) -> tuple[Any, ...]:
    return (leaf.m,)

  def _tensors(self, kind: str, a: Any, b: Any, *rest: Any) -> tuple[dict[str, Any], Any]:
    tensors, _ = super()._tensors(kind, a, b)
    return {**tensors, MAGNITUDE: rest[0]}, None


class AdaLoraCodec(LoraCodec):
  """AdaLoRA's triplets that are left, at one scale, α over the initial rank."""

  kind = "ADALORA"
  leaf = SVDLoRA
  of_experts = False
  schema = AdaLoraConfig
  reads = frozenset({"kernel"})
  fixed = {field: values for field, values in LoraCodec.fixed.items() if field != "enable_lora"}
  lacks = ("merge_weights",)
  exceptions = {}

  def takes(self, config: Any) -> bool:
    return True

  def check(self, config: Any, where: str) -> None:
    super().check(config, where)
    if config.use_dora:
      raise ValueError(f"{where} has use_dora=True, which peft's AdaLoRA does not support")
    for key, flags in (config.rank_pattern or {}).items():
      if len(flags) != config.init_r or not key.endswith(".lora_E"):
        raise ValueError(
          f"{where}: rank_pattern of AdaLoRA must be {{'MODULE.lora_E': [true, false, ...]}} with "
          f"init_r = {config.init_r} flags, and has {len(flags)} at {clip(key)}"
        )

  def check_modules(self, config: Any, targets: Collection[str], where: str) -> None:
    known = {f"{module}.lora_E" for module in targets}
    if strange := [key for key in config.rank_pattern or {} if key not in known]:
      raise ValueError(
        f"{where}: rank_pattern has {clip(strange[0])}, and target_modules names no such "
        "module of this model. Was the adapter trained on another model?"
      )

  def write(self, path: str, leaf: Any, *, rslora: bool) -> dict[str, Adapter]:
    if leaf.e is None or path.endswith("embedding"):
      raise ValueError(f"{path}: peft has no such AdaLoRA adapter; save pj.tree.to_lora(params)")
    return super().write(path, leaf, rslora=False)  # peft divides by the rank whatever it says

  def together(self, adapters: Mapping[str, Adapter]) -> Mapping[str, Adapter]:
    """Adapters at the same scales, all of the largest rank: missing triplets count as pruned.

    So an adapter that was loaded pruned can be saved again.
    """
    rank = max((x.fields["r"] for x in adapters.values()), default=0)
    made = {}
    for module, x in adapters.items():
      scale = np.float32(x.fields["lora_alpha"] / x.fields["r"])
      fields = {**x.fields, "lora_alpha": alpha(scale, rank), "r": rank}
      made[module] = x._replace(fields=fields, note=[*x.note, *(rank - len(x.note)) * [False]])
    if len({x.fields["lora_alpha"] for x in made.values()}) > 1:
      raise ValueError(
        "a PEFT AdaLoRA directory has one scale, alpha over the initial rank, and these weights "
        "have several; save pj.tree.to_lora(params), which is the same adapter as plain LoRA"
      )
    return made

  def finish(
    self,
    config: dict[str, Any],
    adapters: Mapping[str, Adapter],
    names: Callable[[set[str]], list[str]],
  ) -> dict[str, Any]:
    left = sum(sum(x.note) for x in adapters.values())
    fields = {
      "alpha_pattern": {},
      "init_r": config["r"],
      "r": 8,  # unused; peft warns at any other number
      "target_r": round(left / len(adapters)),
      "rank_pattern": {f"{module}.lora_E": list(x.note) for module, x in adapters.items()},
      # Training is over; peft asks for a schedule that fits.
      "tinit": 0,
      "tfinal": 0,
      "deltaT": 1,
      "total_step": 1,
    }
    return {**config, **fields}

  def _names(self, kind: str) -> tuple[str, ...]:
    return TRIPLETS

  def _rank(self, config: Any, module: Module, matcher: Any) -> int:
    flags = (config.rank_pattern or {}).get(f"{module.name}.lora_E")
    return config.init_r if flags is None else sum(flags)

  def _scale(self, config: Any, module: Module, matcher: Any) -> float:
    return config.lora_alpha / config.init_r

  def _completed(self, weight: Any, source: Source, rest: list[Any]) -> Any:
    return weight.replace(e=padded([x[:, 0] for x in rest[0]], source.stack, 0))

  def _more(self, path: str, leaf: Any) -> tuple[Any, ...]:
    return (leaf.e,)

  def _tensors(self, kind: str, a: Any, b: Any, *rest: Any) -> tuple[dict[str, Any], Any]:
    e = rest[0][: len(a)]
    on = e != 0
    tensors = dict(zip(TRIPLETS, (a[on], b[:, on], e[on, None]), strict=True))
    return tensors, on.tolist()
