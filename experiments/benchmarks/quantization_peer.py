"""Worker: bitsandbytes' side. Arguments as for quantization_ours."""

import ctypes
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from bitsandbytes import functional as bnb
from bitsandbytes.cextension import lib

from experiments.benchmarks.turns import serve


def main(operation: str, dtype: str, size: int, device: str) -> None:
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  if device == "cuda":
    torch.set_float32_matmul_precision("high")  # TF32, as XLA has it on GPUs
  torch.manual_seed(0)
  dense = (0.02 * torch.randn(size, size)).to(device, getattr(torch, dtype))
  quantize = lambda: bnb.quantize_4bit(
    dense, blocksize=64, quant_type="nf4", compress_statistics=True
  )
  codes, state = quantize()
  buffer = torch.empty_like(dense)
  into(buffer, codes, state)
  if not torch.equal(buffer, bnb.dequantize_4bit(codes, state)):
    raise RuntimeError("this version of bitsandbytes calls its kernel in another way")
  x = torch.randn(2048, size).to(dense)
  run: dict[str, Callable[[], Any]] = {
    "quantize": quantize,
    "dequantize_fresh": lambda: bnb.dequantize_4bit(codes, state),
    "dequantize_warm": lambda: into(buffer, codes, state),
    "matmul": lambda: torch.nn.functional.linear(x, bnb.dequantize_4bit(codes, state)),
  }

  def once() -> float:
    with torch.no_grad():
      run[operation]()
    if device == "cuda":
      torch.cuda.synchronize()
    return 0.0

  serve(once)


def into(buffer: torch.Tensor, codes: torch.Tensor, state: bnb.QuantState) -> None:
  """`dequantize_4bit(out=buffer)`, which it does not offer on CPUs: there its kernel itself."""
  if buffer.is_cuda:
    bnb.dequantize_4bit(codes, state, out=buffer)
    return
  absmax = bnb.dequantize_blockwise(state.absmax, state.state2)
  absmax += state.offset
  kind = "fp32" if buffer.dtype == torch.float32 else "bf16"
  pointers = (ctypes.c_void_p(t.data_ptr()) for t in (codes, absmax, buffer))
  sizes = (ctypes.c_longlong(n) for n in (state.blocksize, *buffer.shape))
  getattr(lib, f"cdequantize_blockwise_cpu_nf4_{kind}")(*pointers, *sizes)


if __name__ == "__main__":
  main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
