"""Fine-tuning of T5 after its pretraining: Shazeer 2020 (arXiv 2002.05202), tables 2, 3 and 4.

  python -m experiments.train --config=configs/paper/glu_t5.py \\
    --config.model.directory=DIR --config.data.train_file=mixture.jsonl --workdir=runs/glu_t5

The file is a mixture of SQuAD, GLUE and SuperGLUE as texts to texts. DIR is T5 1.1 base, the public
model with the paper's GEGLU; those with the other blocks would have to be pretrained first, and
that is not here: `python -m experiments.tables ffn` compares the blocks at a small scale.
Seeds: one.

Hardware and time: not given. Expected of GEGLU: GLUE 84.12 (table 2), SuperGLUE 73.96 (table 3),
SQuAD 83.55/91.12 (table 4), each task at its best checkpoint.

Differences here: AdamW stands for Adafactor. A batch has 128 rows, which were 512 tokens each in
pretraining (65,536 tokens). The paper freezes the embeddings in fine-tuning, as is done here. The
dropout of 0.1 is the checkpoint's.
"""

from ml_collections import ConfigDict

from configs.arguments import parse
from peftjax.training import defaults

CHOICES: dict[str, tuple[str, ...]] = {}


def get_config(arg: str = "") -> ConfigDict:
  """The configuration; it takes no argument."""
  parse("glu_t5.py", arg, CHOICES)
  config = defaults.config(
    "seq2seq",
    "full",
    {},
    head=False,
    optimizer=dict(learning_rate=1e-3, schedule="constant", warmup=0.0, weight_decay=0.0),
    train=dict(batch_size=128, steps=131_072),
  )
  config.method.targets = (r"(?!.*embedding$).*",)
  return config
