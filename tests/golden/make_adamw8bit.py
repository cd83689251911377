"""Writes what bitsandbytes' AdamW8bit does on a CPU.

Run:   python -m tests.golden.make_adamw8bit
With:  torch 2.13.0 (CPU), bitsandbytes 0.50.2, safetensors 0.8.0, numpy 2.4.6

bitsandbytes' CPU library finds codes in a table of 65536 steps of [-1, 1]; every other back end of
bitsandbytes takes the nearest value. `reference("nearest")` makes the CPU one do so too, by
bitsandbytes' own code for types that the library does not know; `reference("table")` is as shipped.

`adamw8bit.safetensors`, of three steps of one array [65, 64] (a short last block) from `problem()`:
`params` float32 [3, 65, 64] after each step; for W in `nearest`, `table`, the ways to find codes,
and M in 1, 2, the moments, `W_stateM` uint8 [3, 65, 64] and `W_absM` float32 [3, 17] after each
step; and `losses` float32 [100] of `losses()`, as shipped.
"""

import contextlib
import warnings
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

with warnings.catch_warnings():
  warnings.simplefilter("ignore")
  import bitsandbytes as bnb
  from bitsandbytes.backends.cpu import ops

STEPS, SHAPE = 3, (65, 64)
SETTINGS = dict(lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)


def problem(steps: int = STEPS, shape: tuple[int, ...] = SHAPE) -> tuple[np.ndarray, np.ndarray]:
  """A start and gradients, some of them much larger than others."""
  rng = np.random.default_rng(0)
  start = rng.standard_normal(shape, np.float32)
  sizes = np.exp(rng.standard_normal((steps, *shape), np.float32))
  return start, rng.standard_normal((steps, *shape), np.float32) * sizes


def regression() -> tuple[np.ndarray, ...]:
  """Rows x [256, 64], targets y [256, 4] and starts of kernels [64, 128] and [128, 4]."""
  rng = np.random.default_rng(1)
  x, teacher = rng.standard_normal((256, 64), np.float32), rng.standard_normal((64, 4), np.float32)
  first = rng.standard_normal((64, 128), np.float32) / np.float32(8)
  second = rng.standard_normal((128, 4), np.float32) / np.float32(11)
  return x, np.tanh(x @ teacher / np.float32(8)), first, second


@contextlib.contextmanager
def reference(way: str):
  """bitsandbytes with codes found by `"nearest"` or `"table"`."""

  def nearest(array, code, absmax, out, blocksize):
    codes, scales = torch.ops.bitsandbytes.quantize_blockwise(array.double(), code, blocksize)
    out.copy_(codes)
    absmax.copy_(scales)

  shipped = ops._quant_blockwise_fp32_direct
  try:
    ops._quant_blockwise_fp32_direct = nearest if way == "nearest" else shipped
    yield
  finally:
    ops._quant_blockwise_fp32_direct = shipped


def run(start: np.ndarray, grads: np.ndarray) -> dict[str, np.ndarray]:
  """Parameters, codes and scales after each step."""
  weight = torch.nn.Parameter(torch.tensor(start))
  optimizer = bnb.optim.AdamW8bit([weight], **SETTINGS)
  rows = []
  for grad in grads:
    weight.grad = torch.tensor(grad)
    optimizer.step()
    state = optimizer.state[weight]
    fields = dict(state1="state1", state2="state2", abs1="absmax1", abs2="absmax2")
    row = {name: state[field].numpy().copy() for name, field in fields.items()}
    rows.append({"params": weight.detach().numpy().copy(), **row})
  return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def losses(steps: int = 100) -> np.ndarray:
  """Of an MLP with one hidden layer; its second kernel is too small for eight bits."""
  x, y, *kernels = map(torch.tensor, regression())
  first, second = map(torch.nn.Parameter, kernels)
  optimizer = bnb.optim.AdamW8bit([first, second], **SETTINGS)
  out = []
  for _ in range(steps):
    loss = torch.square(torch.tanh(x @ first) @ second - y).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    out.append(loss.item())
  return np.array(out, np.float32)


def main() -> None:
  arrays = {"losses": losses()}
  for way in ("nearest", "table"):
    with reference(way):
      got = run(*problem())
    if way == "nearest":
      arrays["params"] = got["params"]
    arrays |= {f"{way}_{name}": value for name, value in got.items() if name != "params"}
  save_file(arrays, Path(__file__).with_name("adamw8bit.safetensors"))


if __name__ == "__main__":
  main()
