"""The learning rate of each method, by the accuracy of validation.

  python -m experiments.sweep --config=configs/sweeps/learning_rate.py --workdir=runs/learning_rate

Rates a factor of about three apart, on sentiment: 4,000 examples, 250 steps of at most 1,024
tokens, one seed that no table uses. configs/classify.py has the best of each. Some 80 minutes on
two CPU cores.
"""

from typing import Any

from ml_collections import ConfigDict

LORA, ADAPTERS = (6e-4, 2e-3, 6e-3), (3e-4, 1e-3, 3e-3, 1e-2)
# Arguments of configs/classify.py, fields that differ from the defaults, and rates.
LINES: tuple[tuple[str, dict[str, Any], tuple[float, ...]], ...] = (
  ("full", {}, (6e-5, 2e-4, 6e-4)),
  ("head", {}, (3e-3, 1e-2, 3e-2, 1e-1)),
  ("bitfit", {}, (6e-4, 2e-3, 6e-3, 2e-2)),
  ("adapters", {"placement": "houlsby", "size": 32}, ADAPTERS),
  ("adapters", {"placement": "pfeiffer", "size": 64}, ADAPTERS),
  ("adapters", {"placement": "parallel", "size": 64}, ADAPTERS),
  ("adapters", {"placement": "scaled_parallel", "size": 64}, ADAPTERS),
  ("lora", {}, LORA),
  ("lora", {"targets": ("all-linear",), "dropout": 0.0}, LORA),
  ("dora", {}, LORA),
  ("ia3", {}, (3e-3, 1e-2, 3e-2, 1e-1)),
  ("adalora", {}, (*LORA, 2e-2, 6e-2)),
)


def get_config(arg: str = "") -> ConfigDict:
  """The sweep; it takes no argument."""
  if arg:
    raise ValueError(f"learning_rate.py takes no argument, not {arg!r}")
  trials = tuple(
    {
      "base": f"configs/classify.py:method={method},data=sentiment",
      "optimizer.learning_rate": rate,
      **{f"method.{field}": value for field, value in changes.items()},
    }
    for method, changes, rates in LINES
    for rate in rates
  )
  return ConfigDict(
    dict(
      trials=trials,
      grid=dict(
        seed=(100,),
        data=dict(max_length=(64,), split_seed=(0,), train_examples=(4000,), eval_examples=(1000,)),
        train=dict(batch_size=(16,), eval_batch_size=(100,), steps=(250,)),
      ),
    )
  )
