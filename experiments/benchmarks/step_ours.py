"""Worker: our training step. Arguments: query_value | all_linear | full, model, batch, length."""

import os
import sys

import peftjax as pj
from experiments import runtime
from experiments.benchmarks.batch import example
from experiments.benchmarks.stepping import stepping
from experiments.benchmarks.turns import serve
from peftjax.methods.base import Method
from peftjax.training.classification import CLASSES


def main(case: str, directory: str, batch_size: int, length: int) -> None:
  runtime.keep_programs(os.environ.get("PEFTJAX_BENCHMARK_CACHE"))
  model, params = pj.load_pretrained(directory, num_labels=2)
  targets = {"query_value": ["query", "value"], "all_linear": "all-linear"}
  method: Method
  if case == "full":
    method = pj.unfreeze(".*")
  else:
    method = pj.chain(pj.lora(rank=8, alpha=16, targets=targets[case]), pj.unfreeze("head/.*"))
  batch = example(batch_size, length)
  once = stepping(model, params, method, CLASSES, batch, total=1_000)
  serve(lambda: float(once()["loss"]))


if __name__ == "__main__":
  main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
