"""QLoRA on GLUE with RoBERTa-large: Dettmers et al. 2023 (arXiv 2305.14314), table 3.

  python -m experiments.train --config=configs/paper/qlora_glue.py:quant=fp4,task=rte \\
    --config.model.directory=DIR --config.data.glue_dir=GLUE --workdir=runs/qlora_rte

quant: none, int8, fp4. The paper did not run NF4 on GLUE.
task: rte, mrpc, cola, stsb, sst2, qnli, qqp, mnli.
Seeds: not given.

Hardware and time: not given. Expected, the mean of accuracies, table 3: LoRA in 16 bits 88.8, int8
88.8, fp4 88.6.

Differences here: the paper's settings for GLUE are not known. All are those of LoRA for
RoBERTa-large, lora_roberta.py, but for the layers: all linear ones, as QLoRA has them elsewhere.
"""

from ml_collections import ConfigDict

from configs.arguments import parse
from configs.paper import lora_roberta

CHOICES = {"quant": ("none", "int8", "fp4"), "task": lora_roberta.TASKS}


def get_config(arg: str = "") -> ConfigDict:
  """The configuration for `arg`, e.g. "quant=int8,task=cola"."""
  given = parse("qlora_glue.py", arg, CHOICES)
  config = lora_roberta.get_config(f"model=large,task={given['task']}")
  config.method.targets = ("all-linear",)
  config.quant.update(name=given["quant"], double_quant=False)
  return config
