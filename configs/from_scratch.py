"""A small byte-level decoder from scratch, with any feed-forward block.

  python -m experiments.from_scratch --config=configs/from_scratch.py --config.variant=swiglu

Reads BBC news. Every field below is a flag: --config.use_bias, --config.learn_beta. Half a minute
on two CPU cores.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
  """The configuration for `arg`, a variant of `peftjax.nn.feed_forward`."""
  return ConfigDict(
    dict(
      seed=0,
      variant=arg or "relu",  # gelu, gelu_tanh, swish, glu, bilinear, reglu, geglu, swiglu
      use_bias=False,  # in the feed-forward blocks
      beta=1.0,  # for swish and swiglu, fixed or, with learn_beta, at first
      learn_beta=False,
      ffn=768,  # F for a block that is not gated; gated ones get two thirds
      width=192,
      layers=3,
      heads=6,
      length=256,  # bytes per row
      batch_size=4,
      steps=250,
      learning_rate=3e-3,
      eval_rows=128,
    )
  )
