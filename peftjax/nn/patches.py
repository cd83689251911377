"""Images to one vector a patch."""

from __future__ import annotations

import flax.linen as nn
import jax

from peftjax.core.einsum import conv
from peftjax.nn.linear import normal, shift, weight


class Patches(nn.Module):
  """y = W p + b of every patch p, row by row: a convolution with its window for a stride.

  Its `filters` `[patch width, patch height, C, D]` are those of torch with all axes turned round.
  They are no `kernel`: "all-linear" means no convolution.

  Attributes:
    features: D.
    size: height and width of a patch, which divide those of the image.
  """

  features: int
  size: tuple[int, int]

  @nn.compact
  def __call__(self, x_BHWC: jax.Array) -> jax.Array:
    """`[B, patches, D]`, in the dtype of x."""
    window = self.size[::-1]  # in the order of the filters' axes
    filters = weight(self, "filters", normal, (*window, x_BHWC.shape[-1], self.features))
    y = conv(
      x_BHWC,
      filters,
      window_strides=window,
      padding="VALID",
      dimension_numbers=jax.lax.conv_dimension_numbers(
        x_BHWC.shape, filters.shape, ("NHWC", "WHIO", "NHWC")
      ),
      feature_group_count=1,
      batch_group_count=1,
    )
    y = y.reshape(len(y), -1, self.features)
    return shift(y, weight(self, "bias", nn.initializers.zeros, (self.features,)))
