"""Fine-tunes an encoder-decoder to make texts of texts: summaries, translations, answers.

  python -m experiments.train --config=configs/seq2seq.py:method=lora \\
    --config.model.directory=DIR --config.data.train_file=train.jsonl --workdir=runs/t5

DIR: a Hugging Face directory of a T5, T5 1.1, Flan-T5 or mT5.
method: lora, dora, adalora, ia3, adapters, vera, loha, lokr, full.
quant: none, nf4, nf4_textbook, lloyd_max, fp4, fp4_e3m0, int4, int8.
The files, .jsonl, .csv or .tsv, have a text in --config.data.source_column=source and what is to be
made of it in --config.data.target_column=target; a task's prefix ("summarize: ") is part of the
source. At most --config.data.max_length and --config.data.target_length tokens of each are read.
Every field of the method (help(pj.lora)) and of the sections in peftjax/training/settings.py is a
flag: --config.method.rank=4.

Two CPU cores, beside other work: a step of t5-small's shape on 8 pairs of 128 and 32 tokens took 6
seconds, so 100 of them take ten minutes. The perplexity of the test part's targets is printed
before and after. No T5 installs from the package index, so no rate has been swept.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.arguments import parse
from peftjax.methods.registry import METHODS as REGISTRY
from peftjax.training import defaults

# An encoder-decoder has no place for virtual tokens.
METHODS = (*(name for name in defaults.names() if name not in ("prefix", "prompt")), "full")
# What differs from the methods' own defaults, besides their targets.
CHANGES: dict[str, dict[str, Any]] = {
  "ia3": dict(outputs=("k", "v"), inputs=("wo",)),
}
QUANTS = ("none", "nf4", "nf4_textbook", "lloyd_max", "fp4", "fp4_e3m0", "int4", "int8")


def get_config(arg: str = "") -> ConfigDict:
  """The configuration for `arg`, e.g. "method=lora,quant=nf4"."""
  given = parse("seq2seq.py", arg, {"method": METHODS, "quant": QUANTS})
  method, quant = given["method"], given["quant"]
  return defaults.config(
    "seq2seq",
    method,
    {**_targets(method), **CHANGES.get(method, {})},
    head=False,
    model=dict(scan_layers=True),
    # Scales of eight bits would be coarser than the weights of int8.
    quant=dict(name=quant, double_quant=quant != "int8"),
    optimizer=dict(learning_rate=1e-4 if method == "full" else 1e-3, weight_decay=0.0),
    train=dict(batch_size=8, eval_batch_size=8),
  )


def _targets(method: str) -> dict[str, Any]:
  """Queries and values by T5's names, where the method's own targets have those of encoders."""
  own = getattr(REGISTRY.get(method), "targets", None)
  return {"targets": ("q", "v")} if own == ("query", "value") else {}
