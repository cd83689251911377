"""Methods on MNLI and SST-2 with RoBERTa-base: He et al. 2021 (arXiv 2110.04366), tables 2 and 8.

  python -m experiments.train --config=configs/paper/unified_roberta.py:method=adapter,task=sst2 \\
    --config.model.directory=DIR --config.data.glue_dir=GLUE --workdir=runs/unified_sst2

method: full, bitfit, prefix, lora, adapter.
task: mnli, sst2.
Seeds: the paper has the median of five: --config.seed=0 to 4.

Hardware and time: not given. Expected, dev set, table 2: MNLI/SST-2 full 87.6/94.6, bitfit
84.7/93.7, prefix 86.3/94.0, lora 87.2/94.2, adapter 87.2/94.2.

Differences here: the sizes of prefix, LoRA and adapters are 16, 8 and 16, of which only the last
is from the release; those of table 2 are not verified. MAM, of a prefix and of parallel adapters at
once, is no method of a config. The release scores 1,600 examples of the dev set; here half of it
chooses the epoch and the other half is reported.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import classify
from configs.arguments import parse

# A method of configs/classify.py, and what it changes there.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
  "full": ("full", {}),
  "bitfit": ("bitfit", {}),
  "prefix": ("prefix", dict(length=16)),
  "lora": ("lora", dict(rank=8, alpha=16.0, targets=("query", "value"), dropout=0.0)),
  "adapter": ("adapters", dict(size=16, placement="pfeiffer")),
}
CHOICES = {"method": tuple(METHODS), "task": ("mnli", "sst2")}


def get_config(arg: str = "") -> ConfigDict:
  """The configuration for `arg`, e.g. "method=lora,task=mnli"."""
  given = parse("unified_roberta.py", arg, CHOICES)
  name, changes = METHODS[given["method"]]
  config = classify.get_config(f"method={name},data=glue/{given['task']}")
  config.method.update(changes)
  config.data.max_length = 512
  config.optimizer.update(
    learning_rate=1e-4,
    schedule="linear",
    warmup=0.06,
    weight_decay=0.1,
    b2=0.98,
    eps=1e-6,
    clip_norm=1.0,
  )
  config.train.update(batch_size=32, epochs=10.0)
  return config
