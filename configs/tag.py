"""Fine-tunes an encoder to tag words, such as names, in files of CoNLL-2003's format.

  python -m experiments.train --config=configs/tag.py:method=lora --workdir=runs/ner \\
    --config.data.train_file=eng.train --config.data.validation_file=eng.testa \\
    --config.data.test_file=eng.testb

method: those of configs/classify.py.
Files: a word a line, its tag in the last column, an empty line between sentences. The first token
of each word is labelled. Scores are F1, precision and recall of whole names, by seqeval
(pip install 'peftjax[scores]'); the F1 of validation chooses the epoch.

Two CPU cores: MiniLM takes some minutes an epoch of CoNLL-2003. Its F1 has not been measured here.
"""

from ml_collections import ConfigDict

from configs import classify
from configs.arguments import parse
from peftjax.training import defaults


def get_config(arg: str = "") -> ConfigDict:
  """The configuration for `arg`, e.g. "method=lora"."""
  method = parse("tag.py", arg, {"method": classify.METHODS})["method"]
  rate = classify.LEARNING_RATES.get(method)
  return defaults.config(
    "tag",
    method,
    classify.CHANGES.get(method, {}),
    head=True,
    model=dict(name="minilm"),
    optimizer={} if rate is None else {"learning_rate": rate},
  )
