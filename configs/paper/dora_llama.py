"""DoRA on commonsense reasoning with LLaMA: Liu et al. 2024 (arXiv 2402.09353), tables 1 and 8.

  python -m experiments.train --config=configs/paper/dora_llama.py:model=llama-7b,rank=32 \\
    --config.model.directory=DIR --config.data.train_file=commonsense_170k.jsonl --workdir=runs/dora

The file has one text per row, in "text": the prompt of Alpaca around instruction and output, as the
release renders commonsense_170k.json.
model: llama-7b, llama-13b, llama2-7b, llama3-8b.
rank: 32, or 16, the rows marked †.
Seeds: not given.

Hardware, table 7: 28.2 GB of one GPU for LLaMA-7B (batches of 16 in 4 parts). Time: not given.
Expected, mean accuracy of eight tasks, table 1:
            llama-7b  llama-13b  llama2-7b  llama3-8b
  rank 16   77.5      80.8       80.5       85.0
  rank 32   78.4      81.5       79.7       85.2
The eight tasks are not here: this command ends with the perplexity of held-out texts.

Differences here: texts share rows of 256 tokens, where the release pads them, so a batch of 16
rows has more texts, and the run fewer updates. Computed in bfloat16, where the release has float16.
The loss counts the instruction too, weight decay is 0 and gradients are clipped at 1, as there.
"""

from ml_collections import ConfigDict

from configs import causal_lm
from configs.arguments import parse

RATES = {
  "llama-7b": {"32": 1e-4, "16": 2e-4},
  "llama-13b": {"32": 2e-4, "16": 3e-4},
  "llama2-7b": {"32": 2e-4, "16": 2e-4},
  "llama3-8b": {"32": 1e-4, "16": 1e-4},
}
CHOICES = {"model": tuple(RATES), "rank": ("32", "16")}


def get_config(arg: str = "") -> ConfigDict:
  """The configuration for `arg`, e.g. "model=llama3-8b,rank=16"."""
  given = parse("dora_llama.py", arg, CHOICES)
  config = causal_lm.get_config("data=files,quant=none,method=dora")
  rank = int(given["rank"])
  config.model.update(scan_layers=True, remat="layer", dtype="bfloat16")
  config.method.update(
    rank=rank,
    alpha=2.0 * rank,
    targets=("q_proj", "k_proj", "v_proj", "up_proj", "down_proj"),
    dropout=0.05,
  )
  config.data.update(max_length=256, loss="all", other="")
  config.optimizer.update(
    learning_rate=RATES[given["model"]][given["rank"]],
    schedule="linear",
    warmup=100,
    weight_decay=0.0,
    clip_norm=1.0,
  )
  config.train.update(batch_size=16, epochs=3.0, steps=None, save_every=80)
  return config
