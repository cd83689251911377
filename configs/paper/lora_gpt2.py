"""LoRA on E2E, WebNLG and DART with GPT-2: Hu et al. 2021 (arXiv 2106.09685v2), tables 3 and 11.

  python -m experiments.train --config=configs/paper/lora_gpt2.py:task=e2e \\
    --config.model.directory=DIR --config.data.train_file=trainset.csv --workdir=runs/lora_e2e \\
    --config.data.validation_file=devset.csv --config.data.test_file=testset_w_refs.csv

task: e2e, whose files are the official CSV files; webnlg, dart, whose files have a record in
"prompt" and its description in "completion" on every row. The model, GPT-2 medium or large, is that
of the directory.
rank: 4, or another of table 18: 1, 2, 8, 16, ..., 1024.
Seeds: the paper has the mean of three at the best epoch: --config.seed=0 to 2.

Hardware and time: not given. Expected on E2E, table 3: BLEU 70.4 (medium, and large), by beams of
10 and the official scorer, neither of which is here: this command ends with the perplexity of the
descriptions. `python -m experiments.generate --part=test` and `python -m experiments.score` give
the BLEU of greedy ones. Others who ran the release report a BLEU of 68.7 to 68.9 for medium.

Differences here: the paper adapts query and value apart, and here one pair of factors of the same
size adapts the one kernel of query, key and value. There is no label smoothing (0.1 for E2E and
WebNLG in the paper). Texts share rows of 512 tokens, so a batch of 8 rows has more than 8 texts,
and the 500 updates of warm-up are a larger part of the run.
"""

from ml_collections import ConfigDict

from configs import causal_lm
from configs.arguments import parse

# Weight decay, dropout of the branch.
TASKS = {"e2e": (0.01, 0.1), "webnlg": (0.01, 0.1), "dart": (0.0, 0.0)}
RANKS = ("4", "1", "2", "8", "16", "32", "64", "128", "256", "512", "1024")
CHOICES = {"task": tuple(TASKS), "rank": RANKS}


def get_config(arg: str = "") -> ConfigDict:
  """The configuration for `arg`, e.g. "task=dart"."""
  given = parse("lora_gpt2.py", arg, CHOICES)
  data = "e2e" if given["task"] == "e2e" else "files"
  config = causal_lm.get_config(f"data={data},quant=none,method=lora")
  decay, dropout = TASKS[given["task"]]
  config.method.update(rank=int(given["rank"]), alpha=32.0, targets=("c_attn",), dropout=dropout)
  config.data.update(
    max_length=512, text_column="prompt", pair_column="completion", loss="completions", other=""
  )
  config.optimizer.update(learning_rate=2e-4, schedule="linear", warmup=500, weight_decay=decay)
  config.train.update(batch_size=8, epochs=5.0, steps=None, save_every=None)
  return config
