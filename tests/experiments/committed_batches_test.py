"""The committed results of language models are of the batches that this code trains on.

Digests of the tokens, segments and weights of 60 steps, then of the held-out rows, as commit
2fddd06 made them: before texts were tokenised whole and with their special tokens.
"""

import hashlib

import numpy as np
import pytest

from configs import causal_lm
from peftjax.training import build
from peftjax.training.settings import from_config

_SLOW = pytest.mark.slow(reason="the same of other seeds; 4 s each")


@pytest.mark.parametrize(
  ("seed", "length", "eval_rows", "digest"),
  [
    (
      0,
      256,
      64,
      "245ed7f18ba4685529ad62a44f129546802103f2e1ff48a23b9763c3db1eda42",
    ),  # of experiments.tables qlora_vs_lora
    pytest.param(
      1, 256, 64, "f9350ce9dace77a907c13571ff3958878ac4a1dd3473ef19d41d38bd46f14af8", marks=_SLOW
    ),
    pytest.param(
      2, 256, 64, "217f2a935f698e5ab17066a52057f40f68ef0ed6265dde67587991896fdd38d0", marks=_SLOW
    ),
    # Of configs/sweeps/learning_rate.py:task=causal_lm.
    pytest.param(
      100, 128, 32, "06c34217da566aac198d06d74727748d2bf3ab57003640835be87fce8ffca447", marks=_SLOW
    ),
  ],
)
def test_batches_are_those_of_the_committed_results(seed, length, eval_rows, digest):
  config = causal_lm.get_config("model=smollm2,quant=none,method=lora")
  config.update_from_flattened_dict(
    {"seed": seed, "data.max_length": length, "data.other": "", "data.eval_rows": eval_rows}
  )
  task = build.task(from_config(config))
  stream = task.stream(config.train.batch_size, seed)
  batches = [stream.batch(step) for step in range(config.train.steps)]
  found = hashlib.sha256()
  for field in ("tokens", "segments", "weights"):
    found.update(np.stack([batch[field] for batch in batches]).tobytes())
  for part in ("validation", "test"):
    found.update(np.ascontiguousarray(task.rows[part].tokens).tobytes())
  assert found.hexdigest() == digest
