"""LoRA against AdaLoRA at equal budgets of ranks.

  python -m experiments.sweep --config=configs/sweeps/rank_budget.py --workdir=runs/rank_budget

The budget is the mean rank of a matrix at the end: 1, 2, 4 or 8. LoRA has that rank everywhere;
AdaLoRA starts from one and a half times as many, as its paper does (of 1 from 2), and gives back
the rest. Both adapt every linear layer of MiniLM, without dropout, and learn sentiment from 4,000
examples in 250 steps of at most 1,024 tokens, with three seeds: the runs of `experiments.tables
rank_budget`.
"""

import math

from ml_collections import ConfigDict

BUDGETS = (1, 2, 4, 8)


def get_config(arg: str = "") -> ConfigDict:
  """The sweep; it takes no argument."""
  if arg:
    raise ValueError(f"rank_budget.py takes no argument, not {arg!r}")
  lora, adalora = (
    f"configs/classify.py:method={name},data=sentiment" for name in ("lora", "adalora")
  )
  trials: list[dict[str, object]] = []
  for budget in BUDGETS:
    start = math.ceil(1.5 * budget)
    trials.append({"base": lora, "method.rank": budget})
    trials.append({"base": adalora, "method.rank": start, "method.target_rank": float(budget)})
  return ConfigDict(
    dict(
      trials=tuple(trials),
      together=8,  # trials in one compiled step, at most
      grid=dict(
        seed=(0, 1, 2),
        method=dict(targets=(("all-linear",),), dropout=(0.0,)),
        data=dict(max_length=(64,), split_seed=(0,), train_examples=(4000,), eval_examples=(1000,)),
        train=dict(batch_size=(16,), steps=(250,)),
      ),
    )
  )
