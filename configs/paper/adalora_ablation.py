"""AdaLoRA less its parts on GLUE: Zhang et al. 2023 (arXiv 2303.10512), tables 4 and 5.

  python -m experiments.train --config=configs/paper/adalora_ablation.py:variant=magnitude \\
    --config.model.directory=DIR --config.data.glue_dir=GLUE --workdir=runs/ablation_rte

variant: adalora; prune-lora (pairs of LoRA's columns are pruned), sensitivity (s = I), magnitude
(S = |λ|), of table 4; lora-regu (LoRA with the penalty), svd-lora (nothing is pruned), no-penalty
(γ = 0), of table 5.
task: sst2, rte, cola, mnli.
budget: 72, 144, 288, 576, which is .08, .16, .32 and .65 % of the parameters.
Seeds: taken to be the five of table 1: --config.seed=0 to 4. DIR is DeBERTaV3-base.

Hardware: one V100. Time, table 15, of MNLI: 117 minutes an epoch. Expected, SST-2, .16 %, tables 4
and 5: adalora 95.80, prune-lora 94.50, sensitivity 95.30, magnitude 95.41, lora-regu 94.61,
svd-lora 95.18, no-penalty 95.10.

Differences here: as in adalora_glue.py, whose settings these are.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.arguments import parse
from configs.paper import adalora_glue

VARIANTS: dict[str, dict[str, Any]] = {
  "adalora": {},
  "prune-lora": dict(form="lora"),
  "sensitivity": dict(score="sensitivity"),
  "magnitude": dict(score="magnitude"),
  "lora-regu": dict(form="lora"),
  "svd-lora": {},
  "no-penalty": dict(gamma=0.0),
}
UNPRUNED = ("lora-regu", "svd-lora")
CHOICES = {
  "variant": tuple(VARIANTS),
  "task": ("sst2", "rte", "cola", "mnli"),
  "budget": ("72", "144", "288", "576"),
}


def get_config(arg: str = "") -> ConfigDict:
  """The configuration for `arg`, e.g. "variant=svd-lora,task=cola,budget=144"."""
  given = parse("adalora_ablation.py", arg, CHOICES)
  variant = given["variant"]
  config = adalora_glue.get_config(f"task={given['task']},budget={given['budget']}")
  config.method.update(VARIANTS[variant])
  if variant in UNPRUNED:
    config.method.rank = int(config.method.target_rank)
  return config
