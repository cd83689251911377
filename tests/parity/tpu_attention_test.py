"""That a decoder's long rows go through the TPU's attention kernel, by its compiler.

As a program (`python tests/parity/tpu_attention_test.py`) it prints what it found, as JSON.
"""

import json
import re

import pytest

from tests.parity import tpu

pytestmark = [pytest.mark.parity, tpu.needed]


def test_a_layer_on_a_mesh_has_the_kernels_and_no_scores():
  """Forward and backward in bfloat16, on four chips, of one text a row and of packed ones."""
  # Forward, and dq, and dk and dv.
  got = tpu.compiled(__file__)
  assert got.pop("whole")["scores"] > 0  # they would be found
  assert got == {
    "text": {"kernels": 3, "scores": 0},
    "packed": {"kernels": 3, "scores": 0},
    "prefix": {"kernels": 0, "scores": 0},  # in blocks
  }


def main() -> None:
  import jax
  import jax.numpy as jnp
  from jax.experimental import topologies
  from jax.sharding import NamedSharding
  from jax.sharding import PartitionSpec as P

  from peftjax import sharding
  from peftjax.nn import attention as module
  from peftjax.nn.mask import AttentionMask

  chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
  mesh = sharding.make_mesh("data:2,tensor:2", chips)

  length, row = 4096, ("data", "fsdp")
  given = lambda *shape, dtype, spec: jax.ShapeDtypeStruct(
    shape, dtype, sharding=NamedSharding(mesh, spec)
  )
  q, k, v = (
    given(2, length, n * 64, dtype=jnp.bfloat16, spec=P(row, None, "tensor")) for n in (8, 4, 4)
  )
  valid = given(2, length, dtype=jnp.bool_, spec=P(row))
  segments = given(2, length, dtype=jnp.int32, spec=P(row))

  def one(visible: AttentionMask, prefix: int = 0) -> dict[str, int]:
    def loss(q, k, v, mask):
      k, v = (jnp.pad(x, [(0, 0), (prefix, 0), (0, 0)]) for x in (k, v))
      mask = mask.behind_prefix(prefix) if prefix else mask
      return module.attention(q, k, v, mask, 8, 4).astype(jnp.float32).sum()

    with jax.set_mesh(mesh):
      program = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(q, k, v, visible).compile()
    text = program.as_text()
    kernels = text.count('custom_call_target="tpu_custom_call"')
    return dict(kernels=kernels, scores=len(re.findall(r"\d{4,},\d{4,}\]", text)))

  decoder = AttentionMask(valid, causal=True)
  packed = AttentionMask(valid, segments, causal=True)
  found = dict(text=one(decoder), packed=one(packed), prefix=one(decoder, 16))
  module.MANY_SCORES = length**3
  print(json.dumps(found | dict(whole=one(decoder))))


if __name__ == "__main__":
  main()
