"""Baselines of AdaLoRA on GLUE: Zhang et al. 2023 (arXiv 2303.10512), tables 1 and 14.

  python -m experiments.train --config=configs/paper/adalora_baselines.py:method=lora,task=rte \\
    --config.model.directory=DIR --config.data.glue_dir=GLUE --workdir=runs/baseline_rte

method: lora, lora-qv (queries and values alone, table 14), houlsby, pfeiffer, bitfit, full.
task: rte, mrpc, cola, stsb, sst2, qnli, qqp, mnli.
budget: 576, 288, 144, the budgets of adalora_glue.py that they have as many parameters as.
Seeds: the paper has the mean of five: --config.seed=0 to 4. DIR is DeBERTaV3-base.

Hardware: one V100. Time: not given. Expected, dev set, table 1 (MNLI m/mm, QQP accuracy/F1):
                 MNLI         SST-2  CoLA   QQP          QNLI   RTE    MRPC   STS-B
  full           89.90/90.12  95.63  69.19  92.40/89.80  94.03  83.75  89.46  91.60
  bitfit         89.37/89.91  94.84  66.96  88.41/84.95  92.24  78.70  87.75  91.35
  houlsby, 576   90.13/90.17  95.53  68.64  91.91/89.27  94.11  84.48  89.95  91.48
  pfeiffer, 576  90.33/90.39  95.61  68.77  92.04/89.40  94.29  85.20  89.46  91.54
  lora, 576      90.65/90.69  94.95  69.82  91.99/89.38  93.87  85.20  89.95  91.60
  lora, 144      90.30/90.38  94.95  68.71  91.61/88.91  94.03  85.56  89.71  91.68

Differences here: the learning rates of the baselines are not verified: LoRA's are those of
adalora_glue.py, the others' those of configs/classify.py. Epochs, batch, tokens and sizes are the
paper's. Half of the dev set chooses the epoch and the other half is reported.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import classify
from configs.arguments import parse
from configs.paper.adalora_glue import ROWS

# By the budget: size of Houlsby's and of Pfeiffer's adapters, rank of LoRA on all six matrices.
SIZES = {"576": (32, 64, 8), "288": (16, 32, 4), "144": (8, 16, 2)}
METHODS = ("lora", "lora-qv", "houlsby", "pfeiffer", "bitfit", "full")
CHOICES = {"method": METHODS, "task": tuple(ROWS), "budget": tuple(SIZES)}


def get_config(arg: str = "") -> ConfigDict:
  """The configuration for `arg`, e.g. "method=pfeiffer,task=cola,budget=144"."""
  given = parse("adalora_baselines.py", arg, CHOICES)
  row, changes = ROWS[given["task"]], method(given["method"], *SIZES[given["budget"]])
  name = changes.pop("name")
  config = classify.get_config(f"method={name},data=glue/{given['task']}")
  config.method.update(changes)
  config.data.max_length = row.tokens
  config.optimizer.update(schedule="linear", warmup=row.warmup, weight_decay=row.decay)
  if name == "lora":
    config.method.alpha = row.alpha
    config.optimizer.learning_rate = row.rate
  config.train.update(batch_size=32, epochs=row.epochs)
  return config


def method(name: str, houlsby: int, pfeiffer: int, rank: int) -> dict[str, Any]:
  """A method of configs/classify.py, its "name", and what it changes there."""
  if name == "lora":
    return dict(name="lora", rank=rank, targets=("all-linear",), dropout=0.0)
  if name == "lora-qv":  # 2 of 6 matrices, whose sides are a third of those of all
    return dict(name="lora", rank=4 * rank, targets=("query", "value"), dropout=0.0)
  if name in ("houlsby", "pfeiffer"):
    size = houlsby if name == "houlsby" else pfeiffer
    return dict(name="adapters", placement=name, size=size, norms=False)
  return dict(name=name)
