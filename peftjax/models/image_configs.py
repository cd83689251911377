"""The `config.json` of models of images: fields, ranges and defaults, as of `encoder_configs`."""

from __future__ import annotations

import dataclasses
from typing import Annotated, ClassVar

from msgspec import Meta

from peftjax.core.ranges import Fraction, Size
from peftjax.models.config_fields import Eps, Faults, Labelled
from peftjax.nn.ffn import ACTIVATIONS

Pixels = Annotated[int, Meta(ge=1, le=2**14)]
# A square's side, or height and width.
Area = Pixels | Annotated[list[Pixels], Meta(min_length=2, max_length=2)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViT(Labelled):
  """`ViTConfig`."""

  hidden_size: Size = 768
  num_hidden_layers: Size = 12
  num_attention_heads: Size = 12
  intermediate_size: Size = 3072
  hidden_act: str = "gelu"
  hidden_dropout_prob: Fraction = 0.0
  attention_probs_dropout_prob: Fraction = 0.0
  layer_norm_eps: Eps = 1e-12
  image_size: Area = 224
  patch_size: Area = 16
  num_channels: Size = 3
  qkv_bias: bool = True

  labels_of: ClassVar[tuple[str, ...]] = ("image",)

  def faults(self) -> Faults:
    if self.hidden_size % self.num_attention_heads:
      yield "num_attention_heads", f"it must divide hidden_size {self.hidden_size}"
    if self.hidden_act not in ACTIVATIONS:
      yield "hidden_act", f"it must be one of {', '.join(ACTIVATIONS)}"
    if any(size % patch for size, patch in zip(self.image, self.patch, strict=True)):
      yield "patch_size", f"it must divide image_size {self.image_size}"
    yield from super().faults()

  @property
  def image(self) -> tuple[int, int]:
    """Height and width."""
    return _sides(self.image_size)

  @property
  def patch(self) -> tuple[int, int]:
    """As `image`."""
    return _sides(self.patch_size)


def _sides(area: Area) -> tuple[int, int]:
  height, width = (area, area) if isinstance(area, int) else area
  return height, width
