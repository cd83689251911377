"""QLoRA on Super-NaturalInstructions with T5 1.1: Dettmers et al. 2023 (arXiv 2305.14314), table 3.

  python -m experiments.train --config=configs/paper/qlora_t5.py:size=small,quant=nf4 \\
    --config.model.directory=DIR --config.data.train_file=sni.jsonl --workdir=runs/qlora_t5

size: small, base, large, xl, xxl (80M, 250M, 780M, 3B, 11B), that of the directory.
quant: nf4, fp4, int8, none.
Seeds: not given.

Hardware and time: not given. Expected, ROUGE-L, table 3, 80M to 11B: LoRA in 16 bits 40.5 42.6
47.1 55.4 60.7, int8 40.4 42.9 45.4 56.5 60.7, fp4 40.3 42.4 47.5 55.6 60.9, nf4 40.4 42.7 47.7
55.3 60.9.

Differences here: rank (16, of xl and xxl 64), α (64) and no dropout are from notes on the paper;
learning rate, steps and batch are not known, and are those of configs/paper/qlora_llama.py for 7B.
"""

from ml_collections import ConfigDict

from configs.arguments import parse
from peftjax.training import defaults

RANKS = {"small": 16, "base": 16, "large": 16, "xl": 64, "xxl": 64}
CHOICES = {"size": tuple(RANKS), "quant": ("nf4", "fp4", "int8", "none")}


def get_config(arg: str = "") -> ConfigDict:
  """The configuration for `arg`, e.g. "size=xl,quant=fp4"."""
  given = parse("qlora_t5.py", arg, CHOICES)
  method = dict(rank=RANKS[given["size"]], alpha=64.0, targets=("all-linear",), dropout=0.0)
  return defaults.config(
    "seq2seq",
    "lora",
    method,
    head=False,
    model=dict(dtype="bfloat16"),
    quant=dict(name=given["quant"], double_quant=given["quant"] == "nf4"),
    optimizer=dict(
      learning_rate=2e-4, schedule="constant", warmup=0.0, weight_decay=0.0, clip_norm=0.3
    ),
    train=dict(batch_size=16, steps=10000),
  )
