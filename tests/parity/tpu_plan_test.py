"""A plan for TPUs that are not there: one layer of a 7B, its base in four bits, on four chips."""

import json
import subprocess
import sys

import pytest

from tests.parity import tpu

pytestmark = [pytest.mark.parity, tpu.needed]

CONFIG = {
  "model_type": "llama",
  "vocab_size": 32_000,
  "hidden_size": 4096,
  "num_hidden_layers": 1,
  "num_attention_heads": 32,
  "intermediate_size": 11008,
  "eos_token_id": 2,
}
# Bytes of the layer's codes and of a byte a block of 64 for its scales.
CODES = (4 * 4096 * 4096 + 3 * 4096 * 11008) // 2
SCALES = CODES // 32


def test_one_layer_by_the_command(tmp_path):
  """It compiles for a mesh, and sends what is quantised as it is, not dense."""
  (tmp_path / "config.json").write_text(json.dumps(CONFIG))
  ended = subprocess.run(
    [
      *(sys.executable, "-m", "experiments.plan", "--mesh=fsdp:2,tensor:2", "--topology=v5e:2x2"),
      "--config=configs/causal_lm.py:quant=nf4,method=lora",
      f"--config.model.directory={tmp_path}",
      "--config.model.dtype=bfloat16",
      "--config.train.batch_size=4",
      "--config.data.max_length=512",
      "--config.compilation_cache=",
      f"--out={tmp_path / 'plan.jsonl'}",
    ],
    cwd=tpu.ROOT,
    env=tpu.environment(),
    capture_output=True,
    text=True,
    check=False,
  )
  assert ended.returncode == 0, ended.stderr[-3000:]
  row = json.loads((tmp_path / "plan.jsonl").read_text())
  sizes = row["bytes"]
  assert sizes["codes"] == CODES / 4 and SCALES / 4 < sizes["scales"] < 1.1 * SCALES / 4
  # The half that "tensor" leaves of each weight is gathered forward, again, and backward; the table
  # and the head are bfloat16.
  codes, tables = (CODES + SCALES) / 2, 2 * 2 * 32_000 * 4096 / 2
  assert codes < row["sent_bytes"]["all-gather"] < 3.3 * codes + 2 * tables, row["sent_bytes"]
  assert sizes["peak"] < sum(sizes[name] for name in ("codes", "scales", "dense base")) + 2**29
