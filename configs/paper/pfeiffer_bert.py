"""Single adapters of AdapterFusion: Pfeiffer et al. 2020 (arXiv 2005.00247), tables 3 and 4.

  python -m experiments.train --config=configs/paper/pfeiffer_bert.py:factor=16,task=mnli \\
    --config.model.directory=DIR --config.data.glue_dir=GLUE --workdir=runs/pfeiffer_mnli

factor: 16, 2, 64, by which the width of the model is reduced.
task: mnli, qqp, sst2, mrpc, rte, those of the paper's sixteen tasks that are GLUE's.
Seeds: not given. DIR is BERT-base (table 3) or RoBERTa-base (table 4), 768 wide.

Hardware and time: not given. Expected, dev accuracy of MNLI with a factor of 16: 84.32 (BERT),
86.06 (RoBERTa).

Differences here: the paper stops early, and here the best of 30 epochs is kept. Batch and tokens
are not verified. Half of the dev set chooses the epoch and the other half is reported.
"""

from ml_collections import ConfigDict

from configs import classify
from configs.arguments import parse

CHOICES = {"factor": ("16", "2", "64"), "task": ("mnli", "qqp", "sst2", "mrpc", "rte")}


def get_config(arg: str = "") -> ConfigDict:
  """The configuration for `arg`, e.g. "factor=64,task=rte"."""
  given = parse("pfeiffer_bert.py", arg, CHOICES)
  config = classify.get_config(f"method=adapters,data=glue/{given['task']}")
  config.method.update(size=768 // int(given["factor"]), placement="pfeiffer")
  config.data.max_length = 128
  config.optimizer.update(learning_rate=1e-4, schedule="linear", warmup=0.0)
  config.train.update(batch_size=32, epochs=30.0)
  return config
