"""All claims, in the order of the text."""

from experiments.claims import (
  activations,
  adalora,
  adapters,
  backprop,
  beginning,
  deployment,
  finetuning,
  gated,
  lora,
  memory,
  qlora,
  quantization,
  scaling,
)
from experiments.claims.claim import Claim

CLAIMS: tuple[Claim, ...] = (
  *activations.CLAIMS,
  *gated.CLAIMS,
  *backprop.CLAIMS,
  *lora.CLAIMS,
  *beginning.CLAIMS,
  *scaling.CLAIMS,
  *deployment.CLAIMS,
  *finetuning.CLAIMS,
  *quantization.CLAIMS,
  *qlora.CLAIMS,
  *memory.CLAIMS,
  *adalora.CLAIMS,
  *adapters.CLAIMS,
)
