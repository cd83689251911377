"""BitFit on GLUE with BERT: Ben Zaken et al. 2021 (arXiv 2106.10199), as released.

  python -m experiments.train --config=configs/paper/bitfit_bert.py:task=rte \\
    --config.model.directory=DIR --config.data.glue_dir=GLUE --workdir=runs/bitfit_rte

task: rte, mrpc, cola, stsb, sst2, qnli, qqp, mnli. The model is that of the directory.
Seeds: not given.

Hardware and time: not given. Expected with RoBERTa-base, dev set, as LoRA's table 2 prints it
(accuracy, Matthews' correlation of CoLA, Pearson's of STS-B): MNLI 84.7, SST-2 93.7, MRPC 92.7,
CoLA 62.0, QNLI 91.8, QQP 84.0, RTE 81.5, STS-B 90.8; with DeBERTaV3-base, AdaLoRA's table 1.
The learning rate is the release's default, which its authors search per task.

Differences here: half of the dev set chooses the epoch and the other half is reported.
"""

from ml_collections import ConfigDict

from configs import classify
from configs.arguments import parse

CHOICES = {"task": ("rte", "mrpc", "cola", "stsb", "sst2", "qnli", "qqp", "mnli")}


def get_config(arg: str = "") -> ConfigDict:
  """The configuration for `arg`, e.g. "task=cola"."""
  given = parse("bitfit_bert.py", arg, CHOICES)
  config = classify.get_config(f"method=bitfit,data=glue/{given['task']}")
  config.data.max_length = 128
  config.optimizer.update(learning_rate=1e-3, schedule="constant", warmup=0.0, clip_norm=1.0)
  config.train.update(batch_size=8, epochs=16.0)
  return config
