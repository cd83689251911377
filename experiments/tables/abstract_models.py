"""The papers' models at full size as trees of shapes; no array is made.

Families of this library go through their modules. BART, T5 and DeBERTa, of which one has a
convolution that ours lack, are described kernel by kernel: a method is a transform of a tree, so
that is all it needs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import peftjax as pj
from experiments.benchmarks.shapes import llama as llama_config
from peftjax.core.layout import Axes, Layout, Site
from peftjax.models import bert, gpt2, llama

Shapes = Iterator[tuple[str, tuple[int, ...]]]


class Abstract(NamedTuple):
  """A model without a task's head: `jax.ShapeDtypeStruct` at every leaf, and where modules lie."""

  params: Any
  layout: Layout


@functools.cache
def shapes_of(name: str) -> Abstract:
  """A model of `MODELS`."""
  return MODELS[name]()


def _init(model: Any) -> Abstract:
  tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
  params = dict(jax.eval_shape(model.init, jax.random.key(0), tokens)["params"])
  params.pop("head", None)
  return Abstract(params, pj.linen.layout(model, tokens))


def _bert(family: str, width: int, layers: int, vocab: int, positions: int, types: int) -> Abstract:
  """Sizes of the releases by Devlin et al. 2019 and Liu et al. 2019."""
  config = bert.BertConfig(
    family=family,
    vocab=vocab,
    width=width,
    layers=layers,
    heads=width // 64,
    ffn=4 * width,
    positions=positions,
    types=types,
    activation="gelu",
    eps=1e-5,
    dropout=0.1,
    attention_dropout=0.1,
    head_dropout=0.1,
    pad_id=1,
    labels=2,
    scan_layers=True,
  )
  return _init(bert.BertClassifier(config))


def _gpt2(
  width: int, layers: int, heads: int, positions: int = 1024, scan: bool = True
) -> Abstract:
  """GPT-2 (Radford et al. 2019), GPT-3 (Brown et al. 2020), the kernel of attention in three.

  LoRA's release gives query and value a pair of factors each (`MergedLinear`), as if they were
  apart; the number of parameters of the model is the same.
  """
  config = gpt2.GPT2Config(
    vocab=50257,
    width=width,
    layers=layers,
    heads=heads,
    ffn=4 * width,
    positions=positions,
    activation="gelu_new",
    eps=1e-5,
    dropout=0.1,
    attention_dropout=0.1,
    residual_dropout=0.1,
    scan_layers=scan,
  )
  params, layout = _init(gpt2.GPT2LMHeadModel(config))
  third = lambda x: jax.ShapeDtypeStruct((*x.shape[:-1], width), x.dtype)
  apart = {}
  for name, layer in params["transformer"].items():
    if name.startswith("layers"):
      fused = layer["attn"].pop("c_attn")
      for part in ("query", "key", "value"):
        layer["attn"][part] = jax.tree.map(third, fused)
        apart[f"transformer/{name}/attn/{part}/kernel"] = Axes()
  return Abstract(params, {**layout, **apart})


def _llama(*sizes: int, **others: int) -> Abstract:
  """LLaMA by Touvron et al. 2023 (table 2) and, with fewer heads of keys, Llama 3."""
  config = llama.LlamaConfig.from_hf(llama_config(*sizes, **others), scan_layers=True)
  return _init(llama.LlamaForCausalLM(config))


def _linear(path: str, n_in: int, n_out: int) -> Shapes:
  yield f"{path}/kernel", (n_in, n_out)
  yield f"{path}/bias", (n_out,)


def _norm(path: str, width: int) -> Shapes:
  yield f"{path}/scale", (width,)
  yield f"{path}/bias", (width,)


def _deberta(width: int) -> Shapes:
  """DeBERTaV3-base's body, whose relative positions share the projections of keys and queries.

  DeBERTaV2-XXL has a convolution and projections besides, none of which a row of a table counts.
  """
  yield "deberta/embeddings/word_embeddings/embedding", (128100, width)
  yield from _norm("deberta/embeddings/LayerNorm", width)
  yield "deberta/encoder/rel_embeddings/embedding", (512, width)
  yield from _norm("deberta/encoder/LayerNorm", width)
  layer = "deberta/encoder/layers"
  for name in ("self/query", "self/key", "self/value", "output/dense"):
    yield from _linear(f"{layer}/attention/{name}", width, width)
  yield from _norm(f"{layer}/attention/output/LayerNorm", width)
  yield from _linear(f"{layer}/intermediate/dense", width, 4 * width)
  yield from _linear(f"{layer}/output/dense", 4 * width, width)
  yield from _norm(f"{layer}/output/LayerNorm", width)


def _bart(width: int) -> Shapes:
  """BART-large (Lewis et al. 2020), as many layers in the encoder as in the decoder."""
  yield "model/shared/embedding", (50265, width)
  for half, attentions in (("encoder", ("self",)), ("decoder", ("self", "encoder"))):
    yield f"model/{half}/embed_positions/embedding", (1026, width)
    yield from _norm(f"model/{half}/layernorm_embedding", width)
    layer = f"model/{half}/layers"
    for kind in attentions:
      for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        yield from _linear(f"{layer}/{kind}_attn/{name}", width, width)
      yield from _norm(f"{layer}/{kind}_attn_layer_norm", width)
    yield from _linear(f"{layer}/fc1", width, 4 * width)
    yield from _linear(f"{layer}/fc2", 4 * width, width)
    yield from _norm(f"{layer}/final_layer_norm", width)


def _t5(width: int, ffn: int) -> Shapes:
  """T5 1.1 XL, which T0-3B is: no biases, a gated feed-forward, tables of 32 positions per head."""
  yield "shared/embedding", (32128, width)
  yield "lm_head/kernel", (width, 32128)
  for half, attentions in (("encoder", ("self",)), ("decoder", ("self", "cross"))):
    yield f"{half}/relative_attention_bias/embedding", (32, width // 64)
    yield f"{half}/final_layer_norm/scale", (width,)
    layer = f"{half}/layers"
    for kind in attentions:
      for name in ("q", "k", "v", "o"):
        yield f"{layer}/{kind}_attention/{name}/kernel", (width, width)
      yield f"{layer}/{kind}_layer_norm/scale", (width,)
    for name in ("wi_0", "wi_1"):
      yield f"{layer}/{name}/kernel", (width, ffn)
    yield f"{layer}/wo/kernel", (ffn, width)
    yield f"{layer}/ffn_layer_norm/scale", (width,)


def _tree(layers: int, shapes: Shapes, width: int = 0, modules: Sequence[str] = ()) -> Abstract:
  """Nested dictionaries of float32 shapes, those of `layers` stacked as in a scanned model.

  Args:
    layers: how many there are.
    shapes: shapes of every parameter, in one layer.
    width: width that `modules` read and return.
    modules: modules that adapters lie beside, named as in our models.
  """
  tree: dict[str, Any] = {}
  layout: dict[str, Axes | Site] = {
    path: Site((width, width), width, (layers,)) for path in modules
  }
  for path, shape in shapes:
    *parents, last = path.split("/")
    node = tree
    for name in parents:
      node = node.setdefault(name, {})
    stack = (layers,) if "layers" in parents else ()
    node[last] = jax.ShapeDtypeStruct((*stack, *shape), jnp.float32)
    if last == "kernel":
      layout[path] = Axes()
  return Abstract(tree, layout)


# Modules of a DeBERTa and of a BART.
_ENCODER = tuple(
  f"deberta/encoder/layers/{end}"
  for end in ("attention/output/residual", "output/residual", "output/LayerNorm")
)
_HALVES = ("model/encoder/layers/mlp_residual", "model/decoder/layers/mlp_residual")

MODELS: Mapping[str, Callable[[], Abstract]] = {
  "RoBERTa-base": lambda: _bert("roberta", 768, 12, 50265, 514, 1),
  "RoBERTa-large": lambda: _bert("roberta", 1024, 24, 50265, 514, 1),
  "BERT-large": lambda: _bert("bert", 1024, 24, 30522, 512, 2),
  "GPT-2 M": lambda: _gpt2(1024, 24, 16, scan=False),  # a row trains two layers of it
  "GPT-2 L": lambda: _gpt2(1280, 36, 20),
  "GPT-3 175B": lambda: _gpt2(12288, 96, 96, 2048),
  "LLaMA-7B": lambda: _llama(4096, 32, 32, 11008),
  "LLaMA-13B": lambda: _llama(5120, 40, 40, 13824),
  "LLaMA-65B": lambda: _llama(8192, 80, 64, 22016),
  "LLaMA3-8B": lambda: _llama(4096, 32, 32, 14336, vocab=128_256, kv_heads=8),
  "DeBERTaV3-base": lambda: _tree(12, _deberta(768), 768, _ENCODER),
  "DeBERTaV2-XXL": lambda: _tree(48, _deberta(1536)),
  "BART-large": lambda: _tree(12, _bart(1024), 1024, _HALVES),
  "T0-3B": lambda: _tree(24, _t5(2048, 5120)),
}
