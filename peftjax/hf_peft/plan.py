"""The expected contents of a PEFT directory: every tensor by name and shape, from config and model.

The config is checked against the model and both against the file's header before any array is
read, so that no array is made whose size only a config claims.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from peftjax.core import paths
from peftjax.hf_peft import codecs, config, targets
from peftjax.hf_peft.fields import Norms, Virtual
from peftjax.hf_peft.targets import Matcher, Modules
from peftjax.io.records import clip
from peftjax.io.safetensors_dir import TensorDir
from peftjax.methods.codec import Module, Targeted, Want
from peftjax.models import names
from peftjax.models.match import stack_of

STEM = "adapter_model"
EMBEDDINGS = "prompt_embeddings"  # the tensor of a prefix or a prompt
# A table or a head under its adapter, which peft saves with it, and without one.
BASES = ("base_layer.weight", "weight")
HEAD = "lm_head"
_TABLES = ("embed_tokens", "wte", "word_embeddings")  # tables of the tokens
_TIES = ("embed_tokens", HEAD)  # names by which peft finds the modules it can tie


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


class Plan:
  """The tensors that a directory holds for each parameter of a model.

  Attributes:
    config, codec: as read, and its reader; prefixes, prompts and norms have no codec.
    sites: the layers of each path.
    targets: modules with an adapter.
    whole: modules that are saved whole.
    norms: modules that `LNTuningConfig` names, saved whole under names of their own.
    tied: the path of the table that the head is tied to, "" if it has an array.
    wants: tensors by name, without the adapter's own.
  """

  def __init__(self, directory: Any, tensors: TensorDir, params: Any, family: Any, virtual: Any):
    self.file = f"{directory}/{STEM}.safetensors"
    self.where = f"{directory}/{config.NAME}"
    self.config = config.read(directory)
    self.codec = codecs.reader_of(self.config)
    self.matcher = Matcher(self.where)
    self.sites, self.tied = sites_of(params, family, of_files=_has_files_names(tensors, family))
    self.real = _names(tensors, self.file)  # the name in the file of each plain one
    self.prefix = self.config.prefix
    self.bare = _bare(self.sites, self.real, self.prefix)
    modules = self._modules()
    self.targets: frozenset[str] = frozenset()
    if self.codec and isinstance(self.config, Targeted):
      tables = "embedding" in self.codec.reads
      self.targets = targets.targeted(self.config, modules, self.matcher, tables=tables)
    self.norms: frozenset[str] = frozenset()
    if isinstance(self.config, Norms):
      self.norms = targets.targeted(self.config, modules, self.matcher, norms=True)
    self.whole = targets.saved(self.config, modules)
    self.keeps_tie = False  # head and table are saved whole as one
    self._tie(modules)
    check_copied(self.targets | self.whole, family, self.where)
    found = self.targets | self.norms
    targets.tell_unused(self.config, self.codec, modules, found, self.matcher)
    self.wants = self._wanted(virtual)
    self._check(tensors)

  def name(self, site: Site) -> str:
    """The name of the tensor of a parameter that is saved whole."""
    if (module := self.module(site)) in self.norms:
      last = site.tensor.rpartition(".")[2]
      return f"{self.prefix}{module}.{Norms.inside}.{last}"
    return self.prefix + site.tensor.removeprefix(self.bare)

  def module(self, site: Site) -> str:
    """The module's name in peft; for a bare model, without its body."""
    return site.module.removeprefix(self.bare)

  def is_whole(self, site: Site) -> bool:
    under = f"{self.module(site)}."
    whole = self.whole | self.norms
    return self._inside(site) and any(under.startswith(f"{module}.") for module in whole)

  def is_targeted(self, site: Site) -> bool:
    return self._inside(site) and self.module(site) in self.targets

  def adapted(self, site: Site) -> Module:
    """A targeted layer in the form its codec takes."""
    n_in, n_out = (1, *site.shape)[-2:]  # a bias has outputs alone
    return Module(self.module(site), site.kind, n_in, n_out)

  def given(self, site: Site) -> list[str]:
    """The tensors in the file that are the base of a site: none, one, or both names."""
    names = (f"{self.prefix}{self.module(site)}.{base}" for base in BASES)
    return [x for x in names if x in self.wants and not self.wants[x].needed and x in self.real]

  @property
  def unties(self) -> bool:
    """True if head and table part: either is adapted or saved, and not both as one."""
    if not self.tied or self.keeps_tie:
      return False
    table, head = self.sites[self.tied][0], self.sites[f"{HEAD}/kernel"][0]
    return self.is_targeted(head) or self.is_whole(head) or self.is_whole(table)

  def _inside(self, site: Site) -> bool:
    return site.tensor.startswith(self.bare)

  def _modules(self) -> Modules:
    kinds = {site.tensor: site.kind for sites in self.sites.values() for site in sites}
    return targets.modules_of(kinds, self.bare, HEAD)

  def _tie(self, modules: Modules) -> None:
    """Applies `ensure_weight_tying`: the head is treated as the table; peft adds either."""
    given: Any = self.config
    if not (getattr(given, "ensure_weight_tying", False) and self.tied and modules.head):
      return
    both = frozenset({HEAD, self.module(self.sites[self.tied][0])})
    named = given.target_modules
    known = lambda names: any(name.rpartition(".")[2] in _TIES for name in names or ())
    if known(given.modules_to_save):
      self.whole |= both
      self.keeps_tie = True
    elif (
      any(self.matcher.fullmatch(named, name) for name in _TIES)
      if isinstance(named, str)
      else known(named)
    ):
      self.targets |= both

  def _wanted(self, virtual: Any) -> dict[str, Want]:
    wants: dict[str, Want] = {}
    prefix, adapted = self.prefix, []
    for site in (site for sites in self.sites.values() for site in sites if self._inside(site)):
      module = self.module(site)
      if self.codec and self.is_targeted(site) and site.kind in ("kernel", "embedding"):
        adapted.append(self.adapted(site))
        made = self.codec.wants(self.config, adapted[-1], self.matcher)
        wants.update({f"{prefix}{module}.{x}": want for x, want in made.items()})
      if self.is_whole(site):
        hint = ""
        if module.startswith(("classifier", "score")):
          hint = " (another number of labels? load_pretrained(..., num_labels=...))"
        wants[self.name(site)] = Want(site.stored, hint)
      elif module == HEAD or module.rpartition(".")[2] in _TABLES:
        base = Want(site.stored, " (was the vocabulary resized?)", needed=False)
        wants[f"{prefix}{module}.{BASES[0 if self.is_targeted(site) else 1]}"] = base
    if self.codec:
      wants.update(self.codec.wants_shared(self.config, adapted))
    if isinstance(self.config, Virtual):
      shape = virtual(self.config, self.where)
      wants[EMBEDDINGS] = Want(shape, f", as {config.NAME} says")
    return wants

  def _check(self, tensors: TensorDir) -> None:
    """Raises ValueError if a tensor is missing, superfluous, of another shape or not of floats."""
    if self.codec:
      self.codec.check_modules(self.config, self.targets, self.where)
    missing = [x for x, want in self.wants.items() if want.needed and x not in self.real]
    extra = sorted(self.real.keys() - self.wants.keys())
    if missing:
      more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
      there = f"\nIt has {clip(extra[0])}, which has no place." if extra else ""
      raise ValueError(
        f"{self.file} lacks the tensor {missing[0]} of shape {self.wants[missing[0]].shape}{more}, "
        f"which {config.NAME} asks for.{there} Save the adapter again, or load it into the "
        "model it was trained on."
      )
    if extra:
      shown = "\n  ".join(clip(name, quote=False) for name in extra[:10])
      raise ValueError(
        f"{self.file}: {len(extra)} tensors have no place in this model with the "
        f"adapter of {config.NAME}:\n  {shown}\n"
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


def check_copied(modules: Collection[str], family: Any, where: str) -> None:
  """Raises ValueError if an adapter or a whole module is one of which transformers reads copies."""
  if found := sorted(getattr(family, "COPIED", frozenset()) & {*modules}):
    raise ValueError(
      f"{where}: {found[0]} has an adapter or is saved whole, and transformers' models of this "
      "family read copies of it, one in each stack, which would stay as they are. Leave it out, or "
      "save the whole model: pj.save_pretrained(...)"
    )


def sites_of(
  params: Any, family: Any, *, of_files: bool = False
) -> tuple[dict[str, list[Site]], str]:
  """The layers of every parameter, and the table of a tied head, which has layers too.

  Args:
    of_files: their modules have the names of the family's files, where transformers has others.
  """
  named = family.hf_name if of_files else functools.partial(names.module_name, family)
  found = {}

  def add(path: str, stack: tuple[int, ...], shape: tuple[int, ...]) -> None:
    turned, kind = names.turned(family, path), path.rpartition("/")[2]
    tensors = [named(layer) for layer in paths.layer_paths(path, stack)]
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


def _has_files_names(tensors: TensorDir, family: Any) -> bool:
  """True where layers are numbered as in files, which older releases named their modules by."""
  return any(re.fullmatch(at, name) for at in family.LAYERS for name in tensors.names())


def _names(tensors: TensorDir, file: str) -> Mapping[str, str]:
  """The names in the file, by the names they have without an adapter's name.

  The adapter's name is "default" in files made from `state_dict`, which peft reads too.
  """
  real: dict[str, str] = {}
  for name in tensors.names():
    plain = re.sub(
      r"\.((?:lora|vera)_\w+|ia3_l|ln_tuning_layers)\.default(\.weight)?$", r".\1\2", name
    )
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
