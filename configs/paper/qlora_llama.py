"""QLoRA on instructions with LLaMA: Dettmers et al. 2023 (arXiv 2305.14314), tables 4, 5 and 9.

  python -m experiments.train --config=configs/paper/qlora_llama.py:size=7b,data=oasst1 \\
    --config.model.directory=DIR --config.data.train_file=train.jsonl --workdir=runs/qlora_7b

size: 7b, 13b, 33b, 65b.
data: oasst1 and hh-rlhf, whole conversations in "text"; longform and all (Alpaca, FLAN v2, Chip2,
Self-Instruct, Unnatural Instructions), a "prompt" and a "completion" on every row.
quant: nf4, or fp4 and none, the other lines of table 4, whose data are Alpaca and FLAN v2.
Seeds: one.

Hardware: one GPU of 48 GB for 65b; the four sizes take 5, 10, 21 and 41 GB. Time: not given.
Expected, 5-shot MMLU, table 5:
             7B    13B   33B   65B
  no tuning  35.1  46.9  57.8  63.4
  OASST1     36.6  46.4  57.0  62.2
  HH-RLHF    34.9  44.6  55.8  60.1
  Longform   32.1  43.2  56.6  59.7
  Alpaca     38.8  47.8  57.3  62.5
  FLAN v2    44.5  51.4  59.2  63.9
There is no MMLU here: this command ends with the perplexity of held-out texts.

Differences here: texts share rows of as many tokens as a source and a target may have, where the
paper sorts them by length and pads, so a batch has more texts and a run of as many steps more
epochs. A batch is in one piece; in 16, as the script has it: --config.train.batch_size=1
--config.optimizer.accumulate=16 and 16 times --config.train.steps. The optimizer's state lies in
host memory all the time; only where it has to: --config.optimizer.paged=auto. Factors are float32,
there bfloat16. The paper does not choose among checkpoints, and this command keeps the best.
"""

from ml_collections import ConfigDict

from configs import causal_lm
from configs.arguments import parse

# Batch, learning rate, steps.
SMALL = {
  "oasst1": (16, 2e-4, 1875),
  "all": (16, 2e-4, 10000),
  "hh-rlhf": (16, 2e-4, 10000),
  "longform": (16, 2e-4, 4000),
}
SIZES = {
  "7b": SMALL,
  "13b": SMALL,
  "33b": {
    "oasst1": (16, 1e-4, 1875),
    "all": (32, 1e-4, 5000),
    "hh-rlhf": (32, 1e-4, 5000),
    "longform": (32, 1e-4, 2343),
  },
  "65b": {
    "oasst1": (16, 1e-4, 1875),
    "all": (64, 1e-4, 2500),
    "hh-rlhf": (64, 1e-4, 2500),
    "longform": (32, 1e-4, 2343),
  },
}
# Tokens of source and target.
LENGTHS = {"oasst1": (0, 512), "all": (384, 128), "hh-rlhf": (0, 768), "longform": (512, 1024)}
CHOICES = {"size": tuple(SIZES), "data": tuple(LENGTHS), "quant": ("nf4", "fp4", "none")}


def get_config(arg: str = "") -> ConfigDict:
  """The configuration for `arg`, e.g. "size=65b,data=all"."""
  given = parse("qlora_llama.py", arg, CHOICES)
  config = causal_lm.get_config(f"data=files,quant={given['quant']},method=lora")
  batch, rate, steps = SIZES[given["size"]][given["data"]]
  source, target = LENGTHS[given["data"]]
  dropout = 0.1 if given["size"] in ("7b", "13b") else 0.05
  config.model.update(scan_layers=True, remat="layer", dtype="bfloat16")
  config.quant.update(block_size=64, double_quant=given["quant"] == "nf4", targets=("all-linear",))
  config.method.update(rank=64, alpha=16.0, targets=("all-linear",), dropout=dropout)
  config.data.update(max_length=source + target, other="")
  if source:
    config.data.update(text_column="prompt", pair_column="completion", loss="completions")
  config.optimizer.update(
    paged="always",
    learning_rate=rate,
    schedule="constant",
    warmup=0.0,
    weight_decay=0.0,
    b2=0.999,
    clip_norm=0.3,
  )
  config.train.update(batch_size=batch, steps=steps, save_every=250)  # lost at most, if killed
  return config
