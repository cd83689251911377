"""What must be in a PEFT directory: every tensor by name and shape, of its config and a model.

The config is held against the model and both against the headers of the file before anything is
read, so that no array is made whose size only a config claims.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from peftjax.core import paths
from peftjax.io import hf_peft_config, hf_peft_targets
from peftjax.io.hf_peft_fields import AdaLora, Common, Ia3, Lora, Targeted, Vera, Virtual
from peftjax.io.hf_peft_targets import Matcher, Modules
from peftjax.io.records import clip
from peftjax.io.safetensors_dir import TensorDir
from peftjax.models import names
from peftjax.models.pretrained import stack_of

STEM = "adapter_model"
EMBEDDINGS = "prompt_embeddings"  # of a prefix or a prompt
# The tensors beside a module's name: A and B, ...
FACTORS = {
  "kernel": ("lora_A.weight", "lora_B.weight"),
  "embedding": ("lora_embedding_A", "lora_embedding_B"),
}
TRIPLETS = ("lora_A", "lora_B", "lora_E")  # ... AdaLoRA's, ...
MAGNITUDE = "lora_magnitude_vector"  # ... DoRA's m, ...
SCALES = "ia3_l"  # ... IA3's l, [1, in] or [out, 1], ...
VECTORS = ("vera_lambda_d", "vera_lambda_b")  # ... and VeRA's d and b.
PROJECTIONS = ("base_model.vera_A", "base_model.vera_B")  # what those share, by their whole names
# A table or a head under its adapter, which peft saves with it, and without one.
BASES = ("base_layer.weight", "weight")
HEAD = "lm_head"
_TABLES = ("embed_tokens", "wte", "word_embeddings")  # of the tokens
_TIES = ("embed_tokens", HEAD)  # the names by which peft knows what it can tie


class Site(NamedTuple):
  """One layer of one parameter: its torch module, tensor, and the shape of its array here."""

  module: str
  tensor: str
  shape: tuple[int, ...]
  turned: bool  # torch has it transposed
  kind: str  # the last part of its path

  @property
  def stored(self) -> tuple[int, ...]:
    return self.shape[::-1] if self.turned else self.shape


class Want(NamedTuple):
  """A tensor that must be there, or may."""

  shape: tuple[int, ...]
  hint: str = ""
  needed: bool = True


class Plan:
  """What a directory holds for each parameter of a model.

  Attributes:
    config: as read.
    sites: of each path, its layers.
    targets: modules with an adapter.
    whole: modules that are saved whole.
    tied: the path of the table that the head is tied to, "" if it has an array.
    wants: tensors by name, less the adapter's own.
  """

  def __init__(self, directory: Any, tensors: TensorDir, params: Any, family: Any, virtual: Any):
    self.file = f"{directory}/{STEM}.safetensors"
    self.where = f"{directory}/{hf_peft_config.NAME}"
    self.config = hf_peft_config.read(directory)
    self.matcher = Matcher(self.where)
    self.sites, self.tied = sites_of(params, family)
    self.real = _names(tensors, self.file)  # the name in the file of each plain one
    self.prefix = self.config.prefix
    self.bare = _bare(self.sites, self.real, self.prefix)
    modules = self._modules()
    self.targets: frozenset[str] = frozenset()
    if isinstance(self.config, Targeted):
      self.targets = hf_peft_targets.targeted(self.config, modules, self.matcher)
    self.whole = hf_peft_targets.saved(self.config, modules)
    self.keeps_tie = False  # head and table are saved whole as one
    self._tie(modules)
    hf_peft_targets.tell_unused(self.config, modules, self.targets, self.matcher)
    self.wants = self._wanted(virtual)
    self._check(tensors)

  def name(self, site: Site) -> str:
    """The tensor of a parameter that is saved whole."""
    return self.prefix + site.tensor.removeprefix(self.bare)

  def module(self, site: Site) -> str:
    """As peft names it: of a bare model, without its body."""
    return site.module.removeprefix(self.bare)

  def is_whole(self, site: Site) -> bool:
    return self._inside(site) and any(
      f"{self.module(site)}.".startswith(f"{module}.") for module in self.whole
    )

  def is_targeted(self, site: Site) -> bool:
    return self._inside(site) and self.module(site) in self.targets

  def given(self, site: Site) -> list[str]:
    """The tensors in the file that are the base of a site: none, one, or of both names."""
    names = (f"{self.prefix}{self.module(site)}.{base}" for base in BASES)
    return [x for x in names if x in self.wants and not self.wants[x].needed and x in self.real]

  @property
  def unties(self) -> bool:
    """Whether head and table part: either is adapted or saved, and not both as one."""
    if not self.tied or self.keeps_tie:
      return False
    table, head = self.sites[self.tied][0], self.sites[f"{HEAD}/kernel"][0]
    return self.is_targeted(head) or self.is_whole(head) or self.is_whole(table)

  def _inside(self, site: Site) -> bool:
    return site.tensor.startswith(self.bare)

  def _modules(self) -> Modules:
    kinds = {site.tensor: site.kind for sites in self.sites.values() for site in sites}
    return hf_peft_targets.modules_of(kinds, self.bare, HEAD)

  def _tie(self, modules: Modules) -> None:
    """`ensure_weight_tying`: what is done to the table is done to the head; peft adds either."""
    config = self.config
    if not (isinstance(config, Lora) and config.ensure_weight_tying and self.tied and modules.head):
      return
    both = frozenset({HEAD, self.module(self.sites[self.tied][0])})
    targets = config.target_modules
    known = lambda names: any(name.rpartition(".")[2] in _TIES for name in names or ())
    if known(config.modules_to_save):
      self.whole |= both
      self.keeps_tie = True
    elif (
      any(self.matcher.fullmatch(targets, name) for name in _TIES)
      if isinstance(targets, str)
      else known(targets)
    ):
      self.targets |= both

  def _wanted(self, virtual: Any) -> dict[str, Want]:
    wants: dict[str, Want] = {}
    config, prefix = self.config, self.prefix
    every = [site for sites in self.sites.values() for site in sites if self._inside(site)]
    for site in every:
      module = self.module(site)
      if self.is_targeted(site) and site.kind in ("kernel", "embedding"):
        made = self._adapter(config, site)
        wants.update({f"{prefix}{module}.{x}": want for x, want in made.items()})
      if self.is_whole(site):
        hint = ""
        if module.startswith(("classifier", "score")):
          hint = " (another number of labels? load_pretrained(..., num_labels=...))"
        wants[self.name(site)] = Want(site.stored, hint)
      elif module == HEAD or module.rpartition(".")[2] in _TABLES:
        base = Want(site.stored, " (was the vocabulary resized?)", needed=False)
        wants[f"{prefix}{module}.{BASES[0 if self.is_targeted(site) else 1]}"] = base
    if isinstance(config, Vera):
      sizes = [site.shape for site in every if self.is_targeted(site) and site.kind == "kernel"]
      n_in, n_out = (max(shape[i] for shape in sizes) for i in (0, 1))
      shapes = ((config.r, n_in), (n_out, config.r))
      hint = f" with rank {config.r}, as {hf_peft_config.NAME} says"
      wants.update({x: Want(s, hint) for x, s in zip(PROJECTIONS, shapes, strict=True)})
    if isinstance(config, Virtual):
      wants[EMBEDDINGS] = Want(virtual(config, self.where), f", as {hf_peft_config.NAME} says")
    return wants

  def _adapter(self, config: Common, site: Site) -> dict[str, Want]:
    """The tensors of one module's adapter, by what stands behind its name."""
    n_in, n_out = site.shape
    if isinstance(config, Ia3):
      inputs = self.matcher.is_feedforward(config, self.module(site))
      hint = f", as {hf_peft_config.NAME} says: feedforward_modules are [1, in], others [out, 1]"
      return {SCALES: Want((1, n_in) if inputs else (n_out, 1), hint)}
    if isinstance(config, Vera):
      return dict(zip(VECTORS, (Want((config.r,)), Want((n_out,))), strict=True))
    rank = self.rank(site)
    shapes, names = ((rank, n_in), (n_out, rank), (rank, 1)), FACTORS[site.kind]
    if isinstance(config, AdaLora):
      names = TRIPLETS  # type: ignore[assignment]
    hint = f" with rank {rank}, as {hf_peft_config.NAME} says"
    made = {x: Want(s, hint) for x, s in zip(names, shapes, strict=False)}
    if isinstance(config, Lora) and config.use_dora:
      if site.kind == "embedding":
        raise ValueError(
          f"{self.where} has use_dora and targets {self.module(site)}, a table; DoRA is read of "
          "linear layers alone.\nMerge the adapter with peft (model.merge_and_unload()) and load "
          "the model it gives."
        )
      made[MAGNITUDE] = Want((n_out,))
    return made

  def rank(self, site: Site) -> int:
    config, module = self.config, self.module(site)
    if isinstance(config, AdaLora):
      flags = (config.rank_pattern or {}).get(f"{module}.lora_E")
      return config.init_r if flags is None else sum(flags)
    return self.matcher.value(config.rank_pattern, module, config.r)  # type: ignore[attr-defined]

  def _check(self, tensors: TensorDir) -> None:
    """Raises `ValueError` if a tensor is missing, of another shape or no floats, or too much."""
    config = self.config
    if isinstance(config, AdaLora):
      known = {f"{module}.lora_E" for module in self.targets}
      if strange := [key for key in config.rank_pattern or {} if key not in known]:
        raise ValueError(
          f"{self.where}: rank_pattern has {clip(strange[0])}, and target_modules names no such "
          "module of this model. Was the adapter trained on another model?"
        )
    missing = [x for x, want in self.wants.items() if want.needed and x not in self.real]
    extra = sorted(self.real.keys() - self.wants.keys())
    if missing:
      more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
      there = f"\nIt has {clip(extra[0])}, which has no place." if extra else ""
      raise ValueError(
        f"{self.file} lacks the tensor {missing[0]} of shape {self.wants[missing[0]].shape}{more}, "
        f"which {hf_peft_config.NAME} asks for.{there} Save the adapter again, or load it into the "
        "model it was trained on."
      )
    if extra:
      shown = "\n  ".join(clip(name, quote=False) for name in extra[:10])
      raise ValueError(
        f"{self.file}: {len(extra)} tensors have no place in this model and in what "
        f"{hf_peft_config.NAME} says of the adapter:\n  {shown}\n"
        "Was the adapter trained on another model?"
      )
    for name, want in self.wants.items():
      if name in self.real:
        info = tensors.info(self.real[name])
        if info.shape != want.shape or not jnp.issubdtype(info.dtype, jnp.floating):
          raise ValueError(
            f"{self.file}: tensor {self.real[name]} is {info.dtype} {info.shape}; the model means "
            f"floats of {want.shape}{want.hint}"
          )


def sites_of(params: Any, family: Any) -> tuple[dict[str, list[Site]], str]:
  """The layers of every parameter, and the table of a tied head, which has layers too."""
  found = {}

  def add(path: str, stack: tuple[int, ...], shape: tuple[int, ...]) -> None:
    turned, kind = names.turned(family, path), path.rpartition("/")[2]
    tensors = [family.hf_name(layer) for layer in paths.layer_paths(path, stack)]
    found[path] = [Site(x.rpartition(".")[0], x, shape, turned, kind) for x in tensors]

  flat = paths.leaves(params)
  for path, leaf in flat.items():
    stack = stack_of(path, leaf)
    add(path, stack, tuple(leaf.shape[len(stack) :]))
  table = ""
  for path, head in paths.tied(params).items():
    table = head.of
    add(path, (), tuple(flat[table].shape[::-1]))
  return found, table


def _names(tensors: TensorDir, file: str) -> Mapping[str, str]:
  """The names in the file, by what they are without an adapter's name.

  It is "default" in what `state_dict` gives, and peft reads such a file too.
  """
  real: dict[str, str] = {}
  for name in tensors.names():
    plain = re.sub(r"\.((?:lora|vera)_\w+|ia3_l)\.default(\.weight)?$", r".\1\2", name)
    if plain in real:
      raise ValueError(f"{file} has {clip(name)} and {clip(real[plain])}: which is meant?")
    real[plain] = name
  return real


def _bare(sites: Mapping[str, list[Site]], names: Mapping[str, str], prefix: str) -> str:
  """The body's name, such as "bert.", if the adapter is of the bare model, which has none."""
  body = next(
    (s[0].module.partition(".")[0] + "." for path, s in sites.items() if "/layers" in path), ""
  )
  inner = {
    site.tensor.removeprefix(body).partition(".")[0] + "."
    for sites_ in sites.values()
    for site in sites_
    if site.tensor.startswith(body)
  }
  short = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
  if any(name.startswith(body) for name in short):
    return ""
  return body if any(name.startswith(tuple(inner)) for name in short) else ""
