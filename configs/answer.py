"""Fine-tunes an encoder to find answers in passages, in the files of SQuAD v1.1 or v2.0.

  python -m experiments.train --config=configs/answer.py:method=lora --workdir=runs/squad \\
    --config.data.train_file=train-v2.0.json --config.data.validation_file=dev-v2.0.json

method: those of configs/classify.py.
A passage is cut into windows of --config.data.max_length tokens, which have --config.data.stride
tokens in common.
Where the train file has questions without an answer, the first token stands for none, and
--config.data.no_answer_threshold says when it is taken. Scores are the official exact match and F1;
the F1 of validation chooses the epoch.

Two CPU cores: MiniLM takes hours an epoch of SQuAD, and minutes with
--config.data.train_examples=1000 --config.data.eval_examples=500. Its F1 has not been measured.
"""

from ml_collections import ConfigDict

from configs import classify
from configs.arguments import parse
from peftjax.training import defaults


def get_config(arg: str = "") -> ConfigDict:
  """The configuration for `arg`, e.g. "method=lora"."""
  method = parse("answer.py", arg, {"method": classify.METHODS})["method"]
  rate = classify.LEARNING_RATES.get(method)
  return defaults.config(
    "answer",
    method,
    classify.CHANGES.get(method, {}),
    head=True,
    model=dict(name="minilm"),
    optimizer={} if rate is None else {"learning_rate": rate},
  )
