"""AdaLoRA and others on SQuAD: Zhang et al. 2023 (arXiv 2303.10512), tables 2 and 9.

  python -m experiments.train --config=configs/paper/adalora_squad.py:version=1.1,budget=576 \\
    --config.model.directory=DIR --config.data.train_file=train-v1.1.json \\
    --config.data.validation_file=dev-v1.1.json --workdir=runs/adalora_squad

version: 1.1, 2.0, whose files are given.
method: adalora, lora, houlsby, pfeiffer, full.
budget: 576, 288, 144, 72: .65, .32, .16 and .08 % of the parameters.
Seeds: not given. DIR is DeBERTaV3-base.

Hardware and time: not given. Expected, dev set, exact match/F1, table 2 (full: 86.0/92.7 of 1.1
and 85.4/88.4 of 2.0):
               72         144        288        576
  1.1 houlsby  84.4/91.5  85.3/92.1  86.1/92.7  86.7/92.9
  1.1 pfeiffer 84.4/91.7  85.9/92.5  86.2/92.8  86.6/93.0
  1.1 lora     86.4/92.8  86.6/92.9  86.7/93.1  86.7/93.1
  1.1 adalora  87.2/93.4  87.5/93.6  87.5/93.7  87.6/93.7
  2.0 houlsby  83.4/86.6  84.3/87.3  84.9/87.9  85.4/88.3
  2.0 pfeiffer 84.2/87.2  84.5/87.6  84.9/87.8  84.5/87.5
  2.0 lora     84.7/87.5  83.6/86.7  84.5/87.4  85.0/88.0
  2.0 adalora  85.6/88.7  85.7/88.8  85.5/88.6  86.0/88.9

Differences here: α, windows and the warm-up of the learning rate are those of the release's script
for 2.0, for 1.1 too. The learning rates of what is not AdaLoRA are not verified: LoRA's is
AdaLoRA's, the others' are those of configs/classify.py. Weight decay is configs/answer.py's.
"""

from typing import NamedTuple

from ml_collections import ConfigDict

from configs import answer
from configs.arguments import parse
from configs.paper import adalora_baselines
from configs.paper.adalora_glue import BUDGETS


class Row(NamedTuple):
  """Epochs, the last updates with a fixed pattern, and all updates, by examples and not windows."""

  epochs: float
  final: int
  total: int


ROWS = {"1.1": Row(10.0, 25000, 54_750), "2.0": Row(12.0, 50000, 97_740)}
SIZES = {**adalora_baselines.SIZES, "72": (4, 8, 1)}
CHOICES = {
  "version": tuple(ROWS),
  "method": ("adalora", "lora", "houlsby", "pfeiffer", "full"),
  "budget": tuple(SIZES),
}


def get_config(arg: str = "") -> ConfigDict:
  """The configuration for `arg`, e.g. "version=2.0,method=lora,budget=72"."""
  given = parse("adalora_squad.py", arg, CHOICES)
  row, (target, rank) = ROWS[given["version"]], BUDGETS[given["budget"]]
  if given["method"] == "adalora":
    config = answer.get_config("method=adalora")
    config.method.update(
      rank=rank,
      target_rank=target,
      targets=("all-linear",),
      warmup=5000,
      final=row.final,
      interval=100,
      penalty="norm",
      gamma=0.1,
      dropout=0.0,
    )
  else:
    changes = adalora_baselines.method(given["method"], *SIZES[given["budget"]])
    config = answer.get_config(f"method={changes.pop('name')}")
    config.method.update(changes)
  if given["method"] in ("adalora", "lora"):
    config.method.alpha = 16.0
    config.optimizer.learning_rate = 1e-3
  config.data.update(max_length=384, stride=128)
  config.optimizer.update(schedule="linear", warmup=1000)
  config.train.update(batch_size=16, epochs=row.epochs)
  return config
