"""ViT (Dosovitskiy et al. 2020, arXiv 2010.11929): an encoder of image patches, and its head."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from peftjax.core.dropout import dropout
from peftjax.models import hf_config
from peftjax.models.encoder_heads import Head
from peftjax.models.names import torch_name
from peftjax.models.stack import layer_keys, run_layers
from peftjax.nn.encoder import Intermediate, SelfAttention
from peftjax.nn.linear import Linear, normal
from peftjax.nn.mask import AttentionMask
from peftjax.nn.norm import LayerNorm
from peftjax.nn.patches import Patches
from peftjax.nn.residual import Residual

# As of `bert`; what a body has for pretraining, or for no head, is not used.
NEW = r"head/.*"
UNUSED = r"(vit\.)?(pooler\..*|embeddings\.mask_token)|decoder\..*"
OUT_FIRST = True
LAYERS = {r"(.*\.)?encoder\.layer\.(\d+)\..*": "layers"}

# Modules of transformers, from its version 5.23 on, by their names in files.
_MODULES = (
  (".encoder.layer.", ".layers."),
  (".attention.attention.query.", ".attention.q_proj."),
  (".attention.attention.key.", ".attention.k_proj."),
  (".attention.attention.value.", ".attention.v_proj."),
  (".attention.output.dense.", ".attention.o_proj."),
  (".intermediate.dense.", ".mlp.fc1."),
  (".output.dense.", ".mlp.fc2."),
)


def hf_name(path: str) -> str:
  """The Hugging Face tensor of a parameter.

  >>> hf_name("vit/encoder/layers_0/attention/self/query/kernel")
  'vit.encoder.layer.0.attention.attention.query.weight'
  """
  name = torch_name(path.removeprefix("head/"), "layer.").replace(".self.", ".attention.")
  return name.replace(".patch_embeddings.", ".patch_embeddings.projection.")


def module_name(path: str) -> str:
  """The same in a model of transformers, so in PEFT's directories.

  >>> module_name("vit/encoder/layers_0/attention/self/query/kernel")
  'vit.layers.0.attention.q_proj.weight'
  """
  name = hf_name(path)
  for file, module in _MODULES:
    name = name.replace(file, module)
  return name


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig:
  """The shape of a model; one letter is what the shapes in this file are named by."""

  family: ClassVar[str] = "vit"
  table: ClassVar[str] = "vit/embeddings/position_embeddings"  # the path of the positions
  head_dropout: ClassVar[float] = 0.0
  image: tuple[int, int, int]  # height, width and channels C of what it was trained on
  patch: tuple[int, int]  # height and width
  width: int  # D
  layers: int  # L
  heads: int  # N
  ffn: int  # F
  activation: str
  eps: float
  dropout: float
  attention_dropout: float
  qkv_bias: bool
  labels: int  # outputs of the head; 1 is a regression
  labels_of: str = "image"
  scan_layers: bool = False
  dtype: Any = jnp.float32  # of activations; parameters stay as they are

  @classmethod
  def from_hf(
    cls, config: Mapping[str, Any], where: str = "config.json", **overrides: Any
  ) -> ViTConfig:
    """Reads a Hugging Face `config.json`; see `bert.BertConfig.from_hf`."""
    said = hf_config.read(config, where)
    fields = dict(
      image=(*said.image, said.num_channels),
      patch=said.patch,
      width=said.hidden_size,
      layers=said.num_hidden_layers,
      heads=said.num_attention_heads,
      ffn=said.intermediate_size,
      activation=said.hidden_act,
      eps=said.layer_norm_eps,
      dropout=said.hidden_dropout_prob,
      attention_dropout=said.attention_probs_dropout_prob,
      qkv_bias=said.qkv_bias,
      labels=said.labels,
    )
    return cls(**{**fields, **overrides})

  @property
  def table_shape(self) -> tuple[int, ...]:
    """The shape of the positions: one for the class token, and one per patch."""
    rows, columns = (size // patch for size, patch in zip(self.image, self.patch, strict=False))
    return 1, 1 + rows * columns, self.width


class Embeddings(nn.Module):
  """The class token and a projection of every patch, `[B, T, D]`, with their positions."""

  config: ViTConfig

  @nn.compact
  def __call__(self, x_BHWC: jax.Array, key: jax.Array | None) -> jax.Array:
    c = self.config
    patches = Patches(c.width, c.patch, name="patch_embeddings")(x_BHWC)
    first = self.param("cls_token", normal, (1, 1, c.width), jnp.float32)
    positions = self.param("position_embeddings", normal, c.table_shape, jnp.float32)
    first = jnp.broadcast_to(first.astype(c.dtype), (len(patches), 1, c.width))
    x = jnp.concatenate([first, patches], axis=1) + positions.astype(c.dtype)
    return dropout(key, x, c.dropout)


class Output(nn.Module):
  """residual + dropout(dense(x))."""

  config: ViTConfig

  @nn.compact
  def __call__(self, x: jax.Array, residual: jax.Array, key: jax.Array | None) -> jax.Array:
    y = dropout(key, Linear(self.config.width, name="dense")(x), self.config.dropout)
    return Residual(name="residual")(y, residual)


class Attention(nn.Module):
  """Self-attention to what a norm gives of the stream, added to it."""

  config: ViTConfig

  @nn.compact
  def __call__(self, x: jax.Array, stream: jax.Array, mask: Any, keys: Any) -> jax.Array:
    y = SelfAttention(self.config, self.config.qkv_bias, name="self")(x, mask, keys[0])
    return Output(self.config, name="output")(y, stream, keys[1])


class Layer(nn.Module):
  """One block, norms first; a scan step: (x, key, mask) to (x, None)."""

  config: ViTConfig

  @nn.compact
  def __call__(self, x: jax.Array, key: jax.Array | None, mask: AttentionMask) -> Any:
    c = self.config
    keys = (None,) * 3 if key is None else jax.random.split(key, 3)
    norm = lambda name: LayerNorm(c.eps, name=name)
    x = Attention(c, name="attention")(norm("layernorm_before")(x), x, mask, keys[:2])
    y = Intermediate(c, name="intermediate")(norm("layernorm_after")(x))
    return Output(c, name="output")(y, x, keys[2]), None


class Encoder(nn.Module):
  """The stack of layers, unrolled or scanned: `layers_0`, `layers_1`, ... or `layers`."""

  config: ViTConfig

  @nn.compact
  def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
    c = self.config
    mask = AttentionMask(jnp.ones(x.shape[:2], bool))
    return run_layers(Layer, c, x, (layer_keys(key, c.layers),), (mask,))[0]


class Body(nn.Module):
  """Images to the normalised last hidden state `[B, T, D]`, the class token first."""

  config: ViTConfig

  @nn.compact
  def __call__(self, x_BHWC: jax.Array, key: jax.Array | None) -> jax.Array:
    c = self.config
    keys = (None, None) if key is None else jax.random.split(key)
    x = Embeddings(c, name="embeddings")(x_BHWC.astype(c.dtype), keys[0])
    return LayerNorm(c.eps, name="layernorm")(Encoder(c, name="encoder")(x, keys[1]))


class ViTClassifier(nn.Module):
  """An encoder of images and a task head; parameters `{"vit": ..., "head": ...}`."""

  config: ViTConfig

  @nn.compact
  def __call__(
    self,
    pixel_values: Float[Array, "B height width C"],
    *,
    train: bool = False,
    hidden: bool = False,
  ) -> Float[Array, "B K"] | tuple[Float[Array, "B T D"], Float[Array, "B D"]]:
    """Logits of each image by its class token, float32. For a regression K = 1.

    Args:
      pixel_values: scaled and normalised as the checkpoint's `preprocessor_config.json` says, the
        channels last, of the size it was trained on: positions are not interpolated.
      train: applies dropout, from the `"dropout"` rng.
      hidden: return the last hidden state and the head's input instead.

    Raises:
      ValueError: pixels of another shape, or that are no floats.
    """
    c = self.config
    _check(pixel_values, c.image)
    keys = jax.random.split(self.make_rng("dropout")) if train else (None, None)
    x_BTD = Body(c, name="vit")(pixel_values, keys[0])
    read = x_BTD[:, 0]
    logits = Head(c, name="head")(read, keys[1]).astype(jnp.float32)
    return (x_BTD, read) if hidden else logits


def _check(pixels: Any, image: tuple[int, int, int]) -> None:
  *size, channels = image
  shape = tuple(pixels.shape)
  if shape[1:] != image or len(shape) != 4:
    hint = f"Resize the images to {image[0]} x {image[1]}: positions are not interpolated."
    if shape[1:] == (channels, *size):
      hint = "The channels go last: write pixel_values.transpose(0, 2, 3, 1)."
    raise ValueError(
      f"pixel_values have the shape {shape}, and this model takes [B, {', '.join(map(str, image))}]"
      f", height, width and channels. {hint}"
    )
  if not jnp.issubdtype(pixels.dtype, jnp.floating):
    raise ValueError(
      f"pixel_values are {pixels.dtype}; give floats, scaled and normalised as the "
      "preprocessor_config.json of the checkpoint says"
    )


# What `pretrained` makes a model of this family with.
CONFIG, MODEL = ViTConfig, ViTClassifier
