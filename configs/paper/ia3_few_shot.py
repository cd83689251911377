"""IA3 by the recipe of T-Few: Liu et al. 2022 (arXiv 2205.05638), section 3.5 and table 4.

  python -m experiments.train --config=configs/paper/ia3_few_shot.py \\
    --config.model.directory=DIR --config.data.train_file=train.jsonl --workdir=runs/ia3

The file has a prompt in "prompt" and its answer in "completion" on every row, 20 to 70 of them.
Seeds: the paper has the median of five subsets of examples.

The paper's model, T0 (an encoder and a decoder), is in no family here. Give a decoder of the Llama
family: places of the vectors (keys, values, the input of the second feed-forward matrix), steps,
batch, learning rate and schedule are the paper's, the scores are not. Hardware: one GPU of 48 GB
for T0-3B. Time: an hour. The paper's numbers, accuracy of T0-3B, table 4: COPA 87.0, H-SWAG 49.4,
Story Cloze 94.7, Winogrande 59.8. This command ends with the perplexity of held-out answers.

Differences besides: AdamW stands for Adafactor; the losses against wrong answers and for their
length are not here, nor is the pretraining of the vectors; a batch has 8 rows that texts share.
"""

from ml_collections import ConfigDict

from configs import causal_lm
from configs.arguments import parse

CHOICES: dict[str, tuple[str, ...]] = {}


def get_config(arg: str = "") -> ConfigDict:
  """The configuration; it takes no argument."""
  parse("ia3_few_shot.py", arg, CHOICES)
  config = causal_lm.get_config("data=files,quant=none,method=ia3")
  config.method.update(outputs=("k_proj", "v_proj"), inputs=("down_proj",))
  config.data.update(text_column="prompt", pair_column="completion", loss="completions", other="")
  config.optimizer.update(learning_rate=3e-3, schedule="linear", warmup=60)
  config.train.update(batch_size=8, steps=1000, save_every=250)
  return config
