"""Flax NNX: a model adapted in place, its classes and the paths of its parameters unchanged."""

from peftjax.nnx.attach import attach
from peftjax.nnx.held import Fixed, Trained, base
from peftjax.nnx.layout import layout
from peftjax.nnx.optimizer import optimizer
from peftjax.nnx.parameters import merge, params, trainable
from peftjax.nnx.pure import split

__all__ = [
  "Fixed",
  "Trained",
  "attach",
  "base",
  "layout",
  "merge",
  "optimizer",
  "params",
  "split",
  "trainable",
]
