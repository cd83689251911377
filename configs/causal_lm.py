"""Fine-tunes a decoder on texts, its frozen base in four bits or dense.

  python -m experiments.train --config=configs/causal_lm.py:model=smollm2,quant=nf4,method=lora \\
    --workdir=runs/qlora

model: smollm2 (a sample), or with --config.model.directory=DIR any Llama, Mistral, Qwen2 or GPT-2.
quant: none, nf4, nf4_textbook, lloyd_max, fp4, fp4_e3m0, int4, int8.
method: lora, dora, adalora, ia3, adapters, vera, prefix, prompt, full.
data: bbc, sentiment, e2e with the official CSV files of E2E NLG in --config.data.train_file and so
  on, or files with --config.data.train_file=train.jsonl, one text per row in
  --config.data.text_column=text, or prompts there and completions in --config.data.pair_column,
  which are put together as they are: a space between them belongs to one of the two, or to
  --config.data.between. Summaries, as XSum's: text_column=document, pair_column=summary,
  between=" TL;DR:" and a max_length that documents fit in, as of what is longer the rest comes
  without its beginning.
Every field of the method (help(pj.lora)) and of the sections in peftjax/training/settings.py is a
flag: --config.method.rank=4, --config.method.rank_pattern='("q_proj=16",)'.

Two CPU cores: nf4 and lora on bbc take six minutes; the perplexity of held-out news falls from 48
to 33 (`make qlora` measures it).
"""

from typing import Any

from ml_collections import ConfigDict

from configs.arguments import parse
from peftjax.methods.registry import METHODS as REGISTRY
from peftjax.training import defaults

METHODS = (*defaults.names(), "full")
# Differences from the methods' own defaults, besides their targets.
CHANGES: dict[str, dict[str, Any]] = {
  "lora": dict(rank=16),
  "dora": dict(rank=16, from_quantised=True),
  "ia3": dict(outputs=("k_proj", "v_proj"), inputs=("down_proj",)),
}

# The best of configs/sweeps/learning_rate.py:task=causal_lm on validation, the lower of two whose
# perplexities are within a percent. DoRA has LoRA's; full, prefix and prompt have not been swept.
LEARNING_RATES = {
  "lora": 1e-3,
  "dora": 1e-3,
  "adalora": 3e-2,
  "ia3": 1e-2,
  "adapters": 1e-3,
  "vera": 3e-2,
  "prefix": 1e-2,
  "prompt": 1e-2,
  "full": 5e-5,
}


def get_config(arg: str = "") -> ConfigDict:
  """The configuration for `arg`, e.g. "model=smollm2,quant=nf4,method=lora"."""
  given = parse("causal_lm.py", arg, {"method": METHODS}, model="smollm2", quant="nf4", data="bbc")
  method, quant, data = given["method"], given["quant"], given["data"]
  rate = {"learning_rate": LEARNING_RATES[method]} if method in LEARNING_RATES else {}
  return defaults.config(
    "causal_lm",
    method,
    {**_targets(method), **CHANGES.get(method, {})},
    head=False,
    model=dict(name=given["model"], scan_layers=True, remat="layer"),
    # Scales of eight bits would be coarser than the weights of int8.
    quant=dict(name=quant, double_quant=quant != "int8"),
    data=dict(name=data, eval_rows=32),
    optimizer=dict(schedule="cosine", warmup=0.1, weight_decay=0.0, **rate),
    train=dict(
      batch_size=4,
      epochs=1.0,
      steps=None if data in ("files", "e2e") else 60,  # goes before epochs
      eval_batch_size=4,
      log_every=5,
      save_every=20,
    ),
  )


def _targets(method: str) -> dict[str, Any]:
  """The targets: all linear layers, where the method's own targets have the names in encoders."""
  own = getattr(REGISTRY.get(method), "targets", None)
  return {"targets": "all-linear"} if own == ("query", "value") else {}
