"""Writes what Hugging Face PEFT's AdaLoRA allocator does with given gradients.

Run:   python -m tests.golden.make_adalora
With:  torch 2.13.0 (CPU), peft 0.21.2, safetensors 0.8.0, numpy 2.4.6

`adalora.safetensors`, of `problem()`: `e_l0`, `e_l1`, `e_l2`, float32 [24, 4], λ of each matrix
after each of 24 steps of plain gradient descent and `update_and_allocate`, and `score_l0`, ...,
float32 [24, 4], S of its triplets where that step ranked them, else NaN.
"""

from pathlib import Path

import numpy as np
import torch
from peft import AdaLoraConfig, get_peft_model
from safetensors.numpy import save_file

SHAPES = {"l0": (12, 8), "l1": (8, 20), "l2": (20, 6)}  # in, out
RANK, TARGET, STEPS, LR = 4, 2, 24, 0.1
TINIT, TFINAL, DELTA = 4, 6, 2
BETA1, BETA2 = 0.85, 0.8


def problem() -> tuple[dict, list[dict]]:
  """Q `a`, P `b` and λ `e` of each matrix, and their gradients in each step: no two are equal."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.standard_normal(shape, np.float32)

  def factors(n_in: int, n_out: int) -> dict[str, np.ndarray]:
    return {"a": draw(RANK, n_in), "b": draw(n_out, RANK), "e": draw(RANK)}

  start = {name: factors(*shape) for name, shape in SHAPES.items()}
  return start, [{name: factors(*shape) for name, shape in SHAPES.items()} for _ in range(STEPS)]


class Model(torch.nn.Module):
  def __init__(self) -> None:
    super().__init__()
    for name, (n_in, n_out) in SHAPES.items():
      setattr(self, name, torch.nn.Linear(n_in, n_out, bias=False))


def reference(gradients: list[dict] | None = None) -> dict[str, np.ndarray]:
  """λ and S after each step, by peft."""
  start, given = problem()
  config = AdaLoraConfig(
    init_r=RANK,
    target_r=TARGET,
    tinit=TINIT,
    tfinal=TFINAL,
    deltaT=DELTA,
    total_step=STEPS,
    beta1=BETA1,
    beta2=BETA2,
    lora_alpha=8,
    target_modules=list(SHAPES),
    orth_reg_weight=0.0,
  )
  model = get_peft_model(Model(), config)
  allocator = model.base_model.rankallocator
  layers = {name: getattr(model.base_model.model, name) for name in SHAPES}
  parameters = {
    name: {"a": x.lora_A["default"], "b": x.lora_B["default"], "e": x.lora_E["default"]}
    for name, x in layers.items()
  }
  with torch.no_grad():
    for name, factors in parameters.items():
      for part, p in factors.items():
        p.copy_(torch.from_numpy(start[name][part]).reshape(p.shape))
  optimizer = torch.optim.SGD([p for x in parameters.values() for p in x.values()], lr=LR)
  seen: dict[str, list] = {f"{kind}_{name}": [] for name in SHAPES for kind in ("e", "score")}
  for step, grads in enumerate(gradients or given):
    for name, factors in parameters.items():
      for part, p in factors.items():
        p.grad = torch.from_numpy(grads[name][part]).reshape(p.shape)
    optimizer.step()
    model.base_model.update_and_allocate(step)
    optimizer.zero_grad()
    ranked = TINIT < step < STEPS - TFINAL and step % DELTA == 0
    for name, factors in parameters.items():
      seen[f"e_{name}"].append(factors["e"].detach().numpy().ravel().copy())
      seen[f"score_{name}"].append(_score(allocator, name) if ranked else np.full(RANK, np.nan))
  return {key: np.stack(rows).astype(np.float32) for key, rows in seen.items()}


def _score(allocator, name: str) -> np.ndarray:
  part = lambda letter: allocator._element_score(f"{name}.lora_{letter}.default").numpy()
  return part("E").ravel() + part("A").mean(1) + part("B").mean(0)


if __name__ == "__main__":
  save_file(reference(), Path(__file__).parent / "adalora.safetensors")
