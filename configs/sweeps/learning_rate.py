"""The learning rate of each method, by the best score on validation.

  python -m experiments.sweep --config=configs/sweeps/learning_rate.py --workdir=runs/learning_rate
  python -m experiments.sweep --config=configs/sweeps/learning_rate.py:task=causal_lm \\
    --workdir=runs/learning_rate_lm

task=classify: accuracy of MiniLM on sentiment, 4,000 examples, 250 steps of at most 1,024 tokens.
task=causal_lm: perplexity of SmolLM2 in four bits on bbc, 60 steps of 512 tokens.

Rates are a factor of about three apart, with one seed that no table uses. configs/classify.py and
configs/causal_lm.py have the best of each. Some two hours each on two CPU cores.
"""

from typing import Any

from ml_collections import ConfigDict

LORA, ADAPTERS = (6e-4, 2e-3, 6e-3), (3e-4, 1e-3, 3e-3, 1e-2)
HIGH = (3e-3, 1e-2, 3e-2, 1e-1)
# By task: arguments of its config, fields that differ from the defaults, and rates.
LINES: dict[str, tuple[tuple[str, dict[str, Any], tuple[float, ...]], ...]] = {
  "classify": (
    ("vera", {}, HIGH),
    ("prefix", {}, (*HIGH, 3e-1)),
    ("prompt", {}, (*HIGH, 3e-1)),
    # Ablations of AdaLoRA that its own rate does not suit.
    ("adalora", {"rank": 3, "target_rank": 2.0, "gamma": 0.0}, (2e-4, *LORA)),
    ("adalora", {"rank": 2, "target_rank": 2.0, "form": "lora"}, (6e-5, 2e-4, 6e-4)),
    ("adapters", {"placement": "scaled_parallel", "size": 64}, ADAPTERS),
    ("adapters", {"placement": "parallel", "size": 64}, ADAPTERS),
    ("adapters", {"placement": "pfeiffer", "size": 64}, ADAPTERS),
    ("adapters", {"placement": "houlsby", "size": 32}, ADAPTERS),
    ("ia3", {}, HIGH),
    ("adalora", {}, (*LORA, 2e-2, 6e-2)),
    ("lora", {}, LORA),
    ("lora", {"targets": ("all-linear",), "dropout": 0.0}, LORA),
    ("dora", {}, LORA),
    ("full", {}, (6e-5, 2e-4, 6e-4)),
    ("head", {}, HIGH),
    ("bitfit", {}, (6e-4, 2e-3, 6e-3, 2e-2)),
  ),
  "causal_lm": (
    ("adalora", {}, (1e-3, *HIGH)),
    ("vera", {}, HIGH),
    ("ia3", {}, (1e-2, 3e-2)),
    ("lora", {}, ADAPTERS[1:]),
    ("adapters", {}, ADAPTERS),
  ),
}
ARGUMENTS = {"classify": "data=sentiment", "causal_lm": "data=bbc,quant=nf4"}
BUDGETS: dict[str, dict[str, Any]] = {
  "classify": dict(
    seed=(100,),
    data=dict(max_length=(64,), split_seed=(0,), train_examples=(4000,), eval_examples=(1000,)),
    train=dict(batch_size=(16,), eval_batch_size=(100,), steps=(250,)),
  ),
  "causal_lm": dict(
    seed=(100,),
    data=dict(max_length=(128,), other=("",)),
    train=dict(batch_size=(4,), steps=(60,), save_every=(60,)),
  ),
}


def get_config(arg: str = "") -> ConfigDict:
  """The sweep of `arg`, "task=classify" (also without) or "task=causal_lm"."""
  key, _, task = (arg or "task=classify").partition("=")
  if key != "task" or task not in LINES:
    raise ValueError(
      f"learning_rate.py takes {' or '.join(f'task={name}' for name in LINES)}, not {arg!r}"
    )
  trials = tuple(
    {
      "base": f"configs/{task}.py:method={method},{ARGUMENTS[task]}",
      "optimizer.learning_rate": rate,
      **{f"method.{field}": value for field, value in changes.items()},
    }
    for method, changes, rates in LINES[task]
    for rate in rates
  )
  return ConfigDict(dict(trials=trials, grid=BUDGETS[task]))
