"""`save_pretrained`: a model's parameters as a Hugging Face directory that transformers loads."""

from __future__ import annotations

import functools
import json
import operator
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from peftjax.core import paths, shared, tied, tree
from peftjax.core.adapted import Adapted, bare
from peftjax.core.params import Params
from peftjax.core.weight import materialize
from peftjax.io import gguf, new_directory, records, shards
from peftjax.io.shards import Tensor
from peftjax.models import heads, hf_config
from peftjax.models.configuration import config_of
from peftjax.models.families import FAMILIES
from peftjax.models.match import layers_of
from peftjax.models.names import turned
from peftjax.models.pretrained import abstract_params

DTYPES = ("float32", "bfloat16", "float16")
# Files beside the weights that say how texts or images go in and come out.
BESIDE = (
  *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
  *("vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model"),
  *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
  *("generation_config.json", "preprocessor_config.json"),
)


def save_pretrained(
  directory: str | Path,
  params: Params,
  *,
  of: str | Path,
  dtype: Any = None,
  shard_size: int | str = "5GB",
  labels: Sequence[str] | None = None,
) -> None:
  """Writes a model as a Hugging Face directory, which transformers and `load_pretrained` load.

  Every weight is written as the dense array it stands for: adapters merged, codes dequantised. The
  logits of the loaded model are those of `params`. A head that is tied to an adapted table gets a
  tensor of its own, as with `pj.merge`. No more than one shard of dense arrays is in memory.

  Args:
    directory: new or empty; it appears whole or not at all.
    params: parameters of a model of `load_pretrained`, with or without adapters, its layers
      unrolled or scanned, its base quantised or not.
    of: the Hugging Face directory or `.gguf` file that the base came from: its configuration,
      tokenizer and generation settings are written too.
    dtype: float32, bfloat16 or float16, for all tensors; by default each keeps its own.
    shard_size: bytes per file, at most, as a number or as in "5GB".
    labels: names of a classifier's outputs; by default those of `of`, if they are as many.

  Raises:
    ValueError: before anything is written: a directory that holds something; unmergeable nodes
      (bottleneck adapters, prefixes, prompts); a leaf that the format has no place for, one that is
      missing or of another shape than `of` means; another dtype, size or number of labels. Without
      leaving anything behind: an entry that is NaN, infinite, or becomes so in `dtype`.
  """
  new_directory.check(directory)
  size = shards.bytes_of(shard_size)
  made = plan(params, of, dtype, labels)
  with new_directory.writing(directory) as folder:
    write(folder, made, of, size)


class Plan(NamedTuple):
  """The contents of `config.json`, and the tensors."""

  config: dict[str, Any]
  tensors: list[Tensor]


def plan(
  params: Params, of: str | Path, dtype: Any = None, labels: Sequence[str] | None = None
) -> Plan:
  """The files that `save_pretrained` writes. Everything it raises is checked, nothing computed."""
  source, want = config_of(of), _dtype(dtype)
  dense = jax.eval_shape(functools.partial(tree.merge, dense=True), params)
  flat = {path: bare(leaf) for path, leaf in paths.leaves(dense).items()}
  is_tied = "lm_head/kernel" not in flat
  family, outputs, labels_of = _check(flat, source, of, is_tied)
  kinds = {path: want or np.dtype(leaf.dtype) for path, leaf in flat.items()}
  if strange := next((p for p, kind in kinds.items() if kind.name not in DTYPES), None):
    raise ValueError(
      f"{strange} is {kinds[strange]}; weights are written in {', '.join(DTYPES)}: choose a dtype"
    )
  config = {key: value for key, value in source.items() if key != "quantization_config"}
  config["architectures"] = [heads.architecture(source["model_type"], labels_of)]
  spelled = "torch_dtype" if "torch_dtype" in source else "dtype"
  config[spelled] = functools.reduce(jnp.promote_types, kinds.values()).name
  if outputs is None:
    if is_tied and not paths.tied(params):
      _check_table(paths.leaves(params), family.CONFIG.from_hf(source, str(of)).table)
    if not getattr(family.CONFIG, "free_head", False):
      config["tie_word_embeddings"] = is_tied
    if labels is not None:
      raise ValueError("labels are of a classifier's outputs, and this is a language model")
  else:
    config |= _labels(source, outputs, labels)
    config.pop("num_labels", None)  # transformers derives it
  return Plan(config, list(_tensors(params, flat, kinds, family)))


def write(folder: Path, made: Plan, of: str | Path, size: int) -> None:
  """All files of a plan, in shards of `size` bytes at most."""
  (folder / "config.json").write_text(json.dumps(made.config, indent=2, sort_keys=True) + "\n")
  shards.write(folder, made.tensors, size)
  _copy_beside(Path(of), folder)


def _dtype(dtype: Any) -> np.dtype | None:
  if dtype is None:
    return None
  try:
    found = jnp.dtype(dtype)
  except TypeError:
    found = None
  if found is None or found.name not in DTYPES:
    raise ValueError(f"dtype is {records.clip(dtype)}; write {', '.join(DTYPES)}")
  return found


def _check(
  flat: Mapping[str, Any], source: Mapping[str, Any], of: str | Path, is_tied: bool
) -> tuple[Any, int | None, str | None]:
  """Checks the leaves against the model that `source` means.

  Returns:
    Its family, and for a classifier its number of outputs and what it labels; see `heads.Head`.

  Raises:
    ValueError: naming a leaf that only one of them has, or that differs in shape.
  """
  family = FAMILIES[source["model_type"]]
  kinds = hf_config.SCHEMAS[source["model_type"]].labels_of  # of an encoder
  head = [x.shape[-1] for path, x in flat.items() if path.startswith("head/")]
  outputs = head[-1] if head else 1 if kinds else None
  options: dict[str, Any] = {"scan_layers": any("layers" in path.split("/") for path in flat)}
  options |= {"tied": is_tied} if outputs is None else {"labels": outputs}
  wanted: dict[str, Any] = {}
  labels_of = None if outputs is None else "text"
  for kind in kinds[::-1] or (labels_of,):  # a tree is told by its leaves
    own = {"labels_of": kind} if kinds else {}
    model = family.MODEL(family.CONFIG.from_hf(source, str(of), **options, **own))
    wanted, labels_of = paths.leaves(abstract_params(model)), kind
    if wanted.keys() == flat.keys():
      break
  told = f"Was the base loaded from {of}?"
  for path, leaf in flat.items():
    if path not in wanted:
      raise ValueError(f"{path} has no place in a {source['model_type']} as {of} has it. {told}")
    if leaf.shape != wanted[path].shape:
      raise ValueError(
        f"{path} has shape {leaf.shape}, and {of} means {wanted[path].shape}. {told}"
      )
  if lacking := [path for path in wanted if path not in flat]:
    raise ValueError(f"params has no {lacking[0]}, which {of} means: pass the whole tree. {told}")
  return family, outputs, labels_of


def _check_table(flat: Mapping[str, Any], table: str) -> None:
  """Raises ValueError if a head that the tree does not mention is tied to an adapted table.

  `tree.merge` gives a head that the tree marks as tied an array of its own. Here it would change.
  """
  if isinstance(flat[table], Adapted):
    raise ValueError(
      f"{table} has an adapter, which changes the lookup alone, and params says nothing of "
      "lm_head, which would change with it: take the tree that load_pretrained returned, or merge "
      "first, pj.merge(params)"
    )


def _labels(
  source: Mapping[str, Any], outputs: int, labels: Sequence[str] | None
) -> dict[str, Any]:
  """The fields that name a head's outputs."""
  if labels is not None and (len(labels) != outputs or len({*labels}) != outputs):
    raise ValueError(f"labels has {len({*labels})} names, and the head has {outputs} outputs")
  if labels is None:
    if hf_config.read(source).labels == outputs and "id2label" in source:
      return {}
    labels = [f"LABEL_{i}" for i in range(outputs)]
  return {
    "id2label": {str(i): label for i, label in enumerate(labels)},
    "label2id": {label: i for i, label in enumerate(labels)},
  }


def _tensors(
  params: Any, flat: Mapping[str, Any], kinds: Mapping[str, np.dtype], family: Any
) -> Any:
  """A tensor for each layer of each leaf of `flat`, the dense tree that `params` stands for."""
  tables = paths.leaves(params)
  whole = paths.leaves(shared.without(tree.tie(params)))
  for path, head in paths.tied(params).items():
    if isinstance(tables.get(head.of), Adapted):
      whole[path] = tied.kernel(tables[head.of])
  for path, leaf in flat.items():
    for layer, at in layers_of(path, leaf):
      shape, flip = leaf.shape[len(at) :], turned(family, path)
      make = functools.partial(_dense, layer, bare(whole[path]), at, kinds[path], flip)
      yield Tensor(family.hf_name(layer), shape[::-1] if flip else shape, kinds[path], make)


_materialized = jax.jit(materialize)


def _dense(path: str, leaf: Any, at: tuple[int, ...], dtype: np.dtype, flip: bool) -> np.ndarray:
  """A weight, or one layer of it, as the array to write."""
  one = jax.tree.map(operator.itemgetter(at), leaf) if at else leaf
  with np.errstate(over="ignore"):  # told below
    array = np.asarray(_materialized(one)).astype(dtype)
  if not np.isfinite(array).all():
    raise ValueError(
      f"{path} has entries that are NaN or infinite as {dtype.name}, so all outputs would be NaN."
    )
  return array.T if flip else array


def _copy_beside(of: Path, folder: Path) -> None:
  """The tokenizer's files and the generation settings."""
  if of.suffix == ".gguf":
    return _write_tokenizer(of, folder)
  for pattern in BESIDE:
    for path in sorted(of.glob(pattern)):
      target = folder / path.relative_to(of)
      target.parent.mkdir(exist_ok=True)
      shutil.copyfile(records.regular(path), target)


def _write_tokenizer(file: Path, folder: Path) -> None:
  """Writes the tokenizer of a GGUF file in the form that `AutoTokenizer` reads."""
  gguf.tokenizer(file).save(str(folder / "tokenizer.json"))
  config = {"tokenizer_class": "PreTrainedTokenizerFast", **gguf.special_tokens(file)}
  if (template := gguf.chat_templates(file).get("default")) is not None:
    config["chat_template"] = template
  text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
  (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
