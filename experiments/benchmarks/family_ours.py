"""Worker: LoRA on one family. Arguments: decoder | t5 | vit, model, batch, length."""

import os
import sys
from typing import Any

import numpy as np

import peftjax as pj
from experiments import runtime
from experiments.benchmarks import batch
from experiments.benchmarks.stepping import stepping
from experiments.benchmarks.turns import serve
from peftjax.training import causal_lm, seq2seq
from peftjax.training.classification import CLASSES

# What is asked of images: the loss of classes, the logits by pixels alone.
IMAGES = CLASSES._replace(inputs=lambda given: {"pixel_values": given["pixel_values"]})


def main(family: str, directory: str, rows: int, length: int) -> None:
  runtime.keep_programs(os.environ.get("PEFTJAX_BENCHMARK_CACHE"))
  options = {"num_labels": 10} if family == "vit" else {"scan_layers": False}
  model, params = pj.load_pretrained(directory, **options)
  kind, given = {"decoder": decoder, "t5": t5, "vit": vit}[family](model.config, rows, length)
  targets: Any = ["query", "value"] if family == "vit" else "all-linear"
  method = pj.lora(rank=8, alpha=16, targets=targets)
  once = stepping(model, params, method, kind, given, total=1_000)
  serve(lambda: float(once()["loss"]))


def decoder(config: Any, rows: int, length: int) -> Any:
  return causal_lm.KIND, batch.packed(rows, length, config.vocab)


def t5(config: Any, rows: int, length: int) -> Any:
  source, target = batch.pairs(rows, length, config.vocab)
  start = np.full((rows, 1), config.start_id, np.int32)
  return seq2seq.KIND, {
    "tokens": source,
    "mask": np.ones(source.shape, bool),
    "targets": np.concatenate([start, target], axis=1),
    "weights": np.ones((rows, target.shape[1] + 1), np.float32),
  }


def vit(config: Any, rows: int, length: int) -> Any:
  images, labels = batch.images(rows, config.image[0])
  return IMAGES, {
    "pixel_values": images,
    "labels": labels,
    "weights": np.ones(rows, np.float32),
  }


if __name__ == "__main__":
  main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
