"""The cost of a data type: quality with the linear layers quantised, nothing else trained.

SmolLM2's weights come from a Q4_1 file, so its "dense" is a 4-bit model widened; MiniLM's are true
float32. QLoRA's table 2 (Dettmers et al. 2023) is the mean perplexity on Pile-CC of models of 125 M
to 13 B. The code entropy says how evenly the codes are used: 4 bits (8 of int8) if all equally.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import peftjax as pj
from configs import causal_lm, classify
from experiments.tables.cells import Cell
from experiments.tables.report import Report
from peftjax.core import paths
from peftjax.methods.lora_weight import LoRA
from peftjax.quant import blockwise
from peftjax.quant.formats import Format
from peftjax.quant.transform import quantize_leaf
from peftjax.training import build, classification, step
from peftjax.training.loop import train_and_evaluate
from peftjax.training.predict import Predictor, probabilities
from peftjax.training.settings import from_config

RESULTS = "datatypes"
# Name, double quantisation, QLoRA's table 2.
TYPES = (
  ("int8", False, None),
  ("int4", False, 34.34),
  ("fp4", False, 31.07),
  ("fp4_e3m0", False, 29.48),
  ("nf4", False, None),
  ("nf4", True, 27.41),
  ("nf4_textbook", False, None),
  ("lloyd_max", False, None),
)
BLOCKS = (32, 64, 128, 256, 512)  # above 512 a column of SmolLM2's narrowest matrix is one block
SEED = 0
ROWS = 64  # rows of 256 tokens: held-out BBC news


def cells(folder: Path) -> list[Cell]:
  made = []
  for model, load in _SCORES.items():
    score = functools.cache(functools.partial(load, folder))
    made.append(Cell(f"{model}-dense", functools.partial(_dense, model, score)))
    for (name, double, paper), block in itertools.product(TYPES, BLOCKS):
      fmt = Format(name, block, double)
      label = f"{model}-{name}{'-dq' if double else ''}-{block}"
      made.append(Cell(label, functools.partial(_quantised, model, score, fmt, paper)))
  return made


def _dense(model: str, score: Callable[[], Any]) -> dict[str, Any]:
  params, measure = score()
  return {"model": model, "format": "dense", "bits": 32.0, "error": 0.0, **measure(params)}


def _quantised(
  model: str, score: Callable[[], Any], fmt: Format, paper: float | None
) -> dict[str, Any]:
  params, measure = score()
  chosen = set(pj.select(params, "all-linear"))
  off = total = stored = count = 0.0
  used = np.zeros(256)

  def quantise(path: str, leaf: Any) -> Any:
    nonlocal off, total, stored, count, used
    if path not in chosen:
      return leaf
    base = leaf.base if isinstance(leaf, LoRA) else leaf
    weight = quantize_leaf(path, base, fmt)
    off += float(jnp.square(weight.materialize() - base).sum())
    total += float(jnp.square(base).sum())
    stored += 8 * sum(x.nbytes for x in jax.tree.leaves(weight))
    count += base.size
    codes = weight.codes if fmt.bits == 8 else blockwise.unpack(weight.codes, weight.axis)
    used += np.bincount(np.asarray(codes).ravel(), minlength=256)
    return leaf.replace(base=weight) if isinstance(leaf, LoRA) else weight

  quantised = paths.map_leaves(quantise, params)
  share = used[used > 0] / count
  return {
    "model": model,
    "format": fmt.name,
    "block_size": fmt.block_size,
    "double_quant": fmt.double_quant,
    "bits": stored / count,
    "error": math.sqrt(off / total),
    "code_entropy": float(-(share * np.log2(share)).sum()),  # of 4 or 8 bits
    "qlora_table_2": paper,
    **measure(quantised),
  }


def _smollm2(folder: Path) -> tuple[Any, Callable[[Any], dict[str, float]]]:
  """Dense parameters, and perplexity on held-out BBC news."""
  config = causal_lm.get_config("model=smollm2,quant=none,method=lora,data=bbc")
  config.seed, config.data.eval_rows, config.data.other = SEED, ROWS, ""
  settings = from_config(config)
  task = build.task(settings)
  model, params = pj.load_pretrained(settings.model.path(), scan_layers=False)

  def measure(params: Any) -> dict[str, float]:
    run = jax.jit(functools.partial(step.outputs, model, task.kind))
    scores = task.evaluate(lambda batch: run(params, batch), "test", 4)
    return {**(scores or {"perplexity": math.inf}), "seed": SEED}

  return params, measure


def _minilm(folder: Path) -> tuple[Any, Callable[[Any], dict[str, float]]]:
  """Parameters with LoRA trained on BBC on the dense base, and accuracy on its test split."""
  config = classify.get_config("method=lora,data=bbc")
  config.seed = SEED
  train_and_evaluate(config, folder / "minilm_lora")
  predictor = Predictor(folder / "minilm_lora")
  test = classification.load(from_config(config)).corpus.splits["test"]

  def measure(params: Any) -> dict[str, float]:
    logits = predictor.logits(test.texts, params=params)
    chosen = probabilities(logits)[np.arange(len(test)), test.labels]
    right = (logits.argmax(1) == test.labels).mean()
    return {"accuracy": float(right), "loss": float(-np.log(chosen).mean()), "seed": SEED}

  return predictor.params, measure


_SCORES = {"smollm2": _smollm2, "minilm": _minilm}


def table(rows: list[dict[str, Any]]) -> Report:
  """The report: one line per model and type, one column per block size."""
  lines = []
  for model, key in (("smollm2", "perplexity"), ("minilm", "accuracy")):
    own = {row["cell"]: row for row in rows if row["model"] == model}
    dense = f"{own[f'{model}-dense'][key]:.4g}"
    lines.append([model, "dense", *[dense] * len(BLOCKS), "", "", "", ""])
    for name, double, paper in TYPES:
      line = [own[f"{model}-{name}{'-dq' if double else ''}-{block}"] for block in BLOCKS]
      at_64 = line[BLOCKS.index(64)]
      lines.append(
        [
          model,
          name + (" + DQ" if double else ""),
          *(f"{row[key]:.4g}" for row in line),
          f"{at_64['bits']:.3f}",
          f"{at_64['error']:.4f}",
          f"{at_64['code_entropy']:.3f}",
          "" if paper is None else f"{paper}",
        ]
      )
  columns = ["model", "type", *(f"block {b}" for b in BLOCKS)]
  columns += ["bits", "error", "entropy", "QLoRA t. 2"]
  return Report(
    "Linear layers in each data type: SmolLM2-135M (from Q4_1), perplexity of held-out BBC news; "
    "MiniLM (float32) with LoRA, accuracy on BBC news.",
    columns,
    lines,
    ("bits per parameter, relative error and entropy of the codes in bits: at blocks of 64.",),
  )
