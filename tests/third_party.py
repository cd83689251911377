"""Flax modules as other projects write them, small and in our own words.

Each shows one way of holding and using a kernel that linen's own layers do not have.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.standard_normal((2, 5, 12)), jnp.float32)
IDS = jnp.asarray(RNG.integers(0, 20, (2, 5)))
IMAGE = jnp.asarray(RNG.standard_normal((2, 8, 8, 3)), jnp.float32)
normal = nn.initializers.normal(0.2)


class RawEinsum(nn.Module):
  """A parameter of its own shape and an equation, as in DeepMind's gemma."""

  shape: tuple
  name_of_weight: str = "w"

  @nn.compact
  def __call__(self, eqn, x):
    return jnp.einsum(eqn, x, self.param(self.name_of_weight, normal, self.shape))


class GemmaBlock(nn.Module):
  """Attention with stacked keys and values, and a gated feed-forward with stacked gates."""

  heads: int = 4
  size: int = 3

  @nn.compact
  def __call__(self, x):
    n, h, d = self.heads, self.size, x.shape[-1]
    q = RawEinsum((n, d, h), name="q_einsum")("BTD,NDH->BTNH", x)
    k, v = RawEinsum((2, 1, d, h), name="kv_einsum")("BSD,CKDH->CBSKH", x)
    logits = jnp.einsum("BTNH,BSKH->BTNS", q, k)
    mixed = jnp.einsum("BTNS,BSKH->BTNH", nn.softmax(logits), v)
    x = x + RawEinsum((n, h, d), name="attn_vec_einsum")("BTNH,NHD->BTD", mixed)
    gating = self.param("gating_einsum", normal, (2, d, 16))
    linear = self.param("linear", normal, (16, d))
    return x + jnp.dot(nn.gelu(jnp.dot(x, gating[0])) * jnp.dot(x, gating[1]), linear)


class Gemma(nn.Module):
  """Scanned and rematerialised blocks, tables looked up by index and used as the head."""

  @nn.compact
  def __call__(self, ids):
    table = self.param("input_embedding", normal, (20, 12))
    x = table[ids] * jnp.sqrt(12.0)

    class Step(nn.Module):
      @nn.compact
      def __call__(self, x, _):
        return GemmaBlock(name="block")(x), None

    step = nn.remat(Step, prevent_cse=False)
    scan = nn.scan(step, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
    x, _ = scan(name="layers")(x, None)
    return jnp.dot(x, table.T)


class T5Dense(nn.Module):
  """A kernel kept flat, boxed with names of its axes, reshaped at its use, as in t5x."""

  features: tuple
  axis: tuple = (-1,)

  @nn.compact
  def __call__(self, x):
    axis = tuple(a % x.ndim for a in self.axis)
    ins = tuple(x.shape[a] for a in axis)
    flat = (int(np.prod(ins)), int(np.prod(self.features)))
    init = nn.with_partitioning(normal, ("embed", "joined"))
    kernel = jnp.asarray(self.param("kernel", init, flat), x.dtype).reshape(*ins, *self.features)
    return jax.lax.dot_general(x, kernel, ((axis, tuple(range(len(axis)))), ((), ())))


class T5Block(nn.Module):
  @nn.compact
  def __call__(self, x):
    q, k, v = (T5Dense((4, 3), name=name)(x) for name in ("query", "key", "value"))
    weights = nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
    mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
    x = x + T5Dense((x.shape[-1],), (-2, -1), name="out")(mixed)
    return x + T5Dense((x.shape[-1],), name="wo")(nn.gelu(T5Dense((16,), name="wi_0")(x)))


class T5(nn.Module):
  """A table looked up as a product with rows of the identity."""

  @nn.compact
  def __call__(self, ids):
    table = self.param("embedding", nn.with_partitioning(normal, ("vocab", "embed")), (20, 12))
    x = jnp.dot(jax.nn.one_hot(ids, 20), jnp.asarray(table, jnp.float32))
    for i in range(2):
      x = T5Block(name=f"layers_{i}")(x)
    return x


class OwnDense(nn.Dense):
  """A subclass that does something more."""

  @nn.compact
  def __call__(self, x):
    return 2 * super().__call__(x)


class Subclass(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(6, name="after")(OwnDense(12, name="own")(x))


class OwnProducts(nn.Module):
  """Linen's layers with products, precision and promotion of the user's own."""

  @nn.compact
  def __call__(self, x):
    halved = lambda x, w, dims, precision=None, preferred_element_type=None: (
      0.5 * jax.lax.dot_general(x, w, dims, precision)
    )
    x = nn.Dense(12, dot_general=halved, name="halved")(x)
    x = nn.DenseGeneral((3, 4), dot_general=halved, name="general")(x)
    x = nn.Dense(4, precision="highest", name="precise")(x)
    promote = lambda *args, dtype, inexact=True: [3 * args[0], *args[1:]]
    return nn.Dense(4, use_bias=False, promote_dtype=promote, name="promoted")(x)


class Experts(nn.Module):
  """One module mapped over experts, each with its kernels."""

  @nn.compact
  def __call__(self, x):
    gates = nn.softmax(nn.Dense(3, name="router")(x))

    class Expert(nn.Module):
      @nn.compact
      def __call__(self, x):
        return RawEinsum((16, 12), name="down")("btf,fd->btd", nn.gelu(nn.Dense(16, name="up")(x)))

    mapped = nn.vmap(Expert, {"params": 0}, {"params": True}, None, -1, axis_size=3)
    return jnp.einsum("btde,bte->btd", mapped(name="experts")(x), gates)


class Recurrent(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.RNN(nn.OptimizedLSTMCell(8, name="cell"), name="rnn")(x)


class ConvNet(nn.Module):
  """Convolutions, running means, and a switch for training without a default."""

  @nn.compact
  def __call__(self, x, *, train):
    x = nn.Conv(6, (3, 3), name="conv")(x)
    x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
    x = nn.Conv(6, (3, 3), strides=2, feature_group_count=2, name="grouped")(x)
    return nn.Dense(5, name="dense")(x.mean((1, 2)))


class Normalised(nn.Module):
  """Kernels that are divided by a norm before their use."""

  @nn.compact
  def __call__(self, x):
    x = nn.WeightNorm(nn.Dense(8, name="weight"))(x)
    return nn.SpectralNorm(nn.Dense(8, name="spectral"))(x, update_stats=False)


class Boxed(nn.Module):
  """Kernels and biases in boxes, as in flax's lm1b example."""

  @nn.compact
  def __call__(self, x):
    boxed = functools.partial(
      nn.Dense,
      kernel_init=nn.with_logical_partitioning(normal, ("embed", "mlp")),
      bias_init=nn.with_logical_partitioning(nn.initializers.normal(1.0), ("mlp",)),
    )
    return boxed(12, name="out")(nn.gelu(boxed(16, name="wi")(x)))


class ScalableT5(nn.Module):
  """Its blocks scanned, their kernels in boxes whose names have one more for the layers."""

  @nn.compact
  def __call__(self, x):
    class Step(nn.Module):
      @nn.compact
      def __call__(self, x, _):
        return T5Block(name="block")(x), None

    scan = nn.scan(
      nn.remat(Step, prevent_cse=False),
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=2,
      metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return scan(name="encoder")(x, None)[0]


class VitBlock(nn.Module):
  @nn.compact
  def __call__(self, x, _=None):
    y = nn.LayerNorm(name="norm_1")(x)
    x = x + nn.MultiHeadDotProductAttention(3, name="attention")(y, y)
    y = nn.gelu(nn.Dense(16, name="up")(nn.LayerNorm(name="norm_2")(x)))
    return x + nn.Dense(12, name="down")(y), None


class Vit(nn.Module):
  """Patches by a convolution, blocks scanned or not, as big_vision's."""

  scan: bool = False

  @nn.compact
  def __call__(self, image):
    x = nn.Conv(12, (4, 4), 4, name="embedding_patches")(image)
    x = x.reshape(len(x), -1, 12)
    if self.scan:
      scan = nn.scan(VitBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
      x, _ = scan(name="blocks")(x, None)
    else:
      for i in range(2):
        x, _ = VitBlock(name=f"block_{i}")(x)
    return nn.Dense(5, name="head")(x.mean(1))


class Translator(nn.Module):
  """An encoder, a decoder that attends to it, and one table for both and for the head, as wmt's."""

  @nn.compact
  def __call__(self, ids):
    table = nn.Embed(20, 12, name="shared_embedding")
    attend = lambda name: nn.MultiHeadDotProductAttention(3, use_bias=False, name=name)
    x = table(ids)
    x = x + attend("encoder_attention")(nn.LayerNorm(name="norm_x")(x))
    y = table(jnp.roll(ids, 1, 1))
    y = y + attend("self_attention")(y, mask=nn.make_causal_mask(ids))
    y = y + attend("cross_attention")(nn.LayerNorm(name="norm_y")(y), x)
    return table.attend(y) / jnp.sqrt(12.0)


class UNet(nn.Module):
  """Convolutions down and up, attention between them, as in diffusion models."""

  @nn.compact
  def __call__(self, image):
    x = nn.silu(nn.Conv(8, (3, 3), name="first")(image))
    y = nn.Conv(12, (3, 3), 2, name="down")(nn.GroupNorm(4, name="norm")(x))
    flat = y.reshape(len(y), -1, 12)
    y = y + nn.MultiHeadDotProductAttention(2, name="attention")(flat, flat).reshape(y.shape)
    y = nn.Conv(8, (3, 3), name="up")(jnp.repeat(jnp.repeat(y, 2, 1), 2, 2))
    return nn.Conv(3, (3, 3), name="last")(jnp.concatenate([x, y], -1))


class Shared(nn.Module):
  """One layer called twice, one of them remade in the backward pass, and cells of other kinds."""

  @nn.compact
  def __call__(self, x):
    twice = nn.Dense(12, name="twice")
    x = nn.remat(nn.Dense)(12, name="remade")(jnp.tanh(twice(jnp.tanh(twice(x)))))
    x = nn.RNN(nn.LSTMCell(8, name="lstm"), name="first")(x)
    return nn.RNN(nn.GRUCell(8, name="gru"), name="second")(x)


# By name: the model, its input, and other arguments.
MODELS = {
  "gemma": (GemmaBlock(), X, {}),
  "gemma, scan of remat": (Gemma(), IDS, {}),
  "t5x": (T5(), IDS, {}),
  "subclass of Dense": (Subclass(), X, {}),
  "own products": (OwnProducts(), X, {}),
  "vmapped experts": (Experts(), X, {}),
  "OptimizedLSTMCell": (Recurrent(), X, {}),
  "convolutions": (ConvNet(), IMAGE, {"train": False}),
  "lm1b": (Boxed(), X, {}),
  "scalable t5x": (ScalableT5(), X, {}),
  "ViT": (Vit(), IMAGE, {}),
  "ViT, scan": (Vit(scan=True), IMAGE, {}),
  "wmt": (Translator(), IDS, {}),
  "UNet": (UNet(), IMAGE, {}),
  "shared, remat, cells": (Shared(), X, {}),
}
# Those that are whole networks.
WHOLE = ("scalable t5x", "ViT", "ViT, scan", "wmt", "UNet", "shared, remat, cells")
