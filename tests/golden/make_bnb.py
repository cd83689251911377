"""Writes a tiny Llama in bitsandbytes' 4 bits, and weights with the codes bitsandbytes gives them.

Run:   python -m tests.golden.make_bnb
With:  bitsandbytes 0.50.2, torch 2.13.0 (CPU), transformers 5.23.0, safetensors 0.8.0, numpy 2.4.6

`bnb_tiny/` is as transformers' `save_pretrained` writes a model loaded with `BitsAndBytesConfig`,
NF4 with double quantisation, and holds `expected.safetensors` besides: `tokens`, `mask` int32
[4, 14], padded on the left, `logits` float32 [4, 14, 96] computed in float32, and `weight`, the
dequantised `model.layers.1.mlp.down_proj.weight` [128, 192].

`bnb_codes.safetensors` holds for each kind of weights `KIND.w` float32 [out, in], and for each
format and block size `KIND.FORMAT.BLOCK.codes` uint8, `.absmax` and `.dequantised` float32, as
`quantize_4bit` and `dequantize_4bit` give them.
"""

import shutil
from pathlib import Path

import bitsandbytes.functional as bnb
import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.golden.make_decoders import batch, make

GOLDEN = Path(__file__).parent
# A Llama whose matrices are whole numbers of blocks of 64.
CONFIG = {
  "vocab_size": 96,
  "hidden_size": 128,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "intermediate_size": 192,
  "max_position_embeddings": 32,
  "rms_norm_eps": 1e-2,
}
KINDS = ("normal", "uniform", "heavy", "zeros", "outlier", "ties")


def weights(kind: str, shape: tuple[int, int], seed: int = 0) -> np.ndarray:
  """Float32 weights [out, in] of one kind.

  "zeros" has blocks of them, "outlier" single ones; "ties" lie within two last bits of where one
  code ends and the next begins, in blocks of 32 or of any multiple.
  """
  rng = np.random.default_rng(seed)
  normal = rng.normal(0, 0.02, shape)
  made = {
    "normal": normal,
    "uniform": rng.uniform(-1, 1, shape),
    "heavy": rng.standard_t(2, shape),
    "zeros": normal * (np.arange(shape[1]) // 64 % 2),
    "outlier": np.where(rng.random(shape) < 0.002, 50.0, normal),
    "ties": _ties(rng, shape),
  }
  return made[kind].astype(np.float32)


def _ties(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
  tables = [np.unique(bnb.get_4bit_type(name, "cpu").numpy()) for name in ("nf4", "fp4")]
  bounds = np.concatenate([(table[1:] + table[:-1]) / np.float32(2) for table in tables])
  absmax = rng.uniform(0.5, 2, (shape[0], 1)).astype(np.float32)
  w = rng.choice(bounds, shape) * absmax
  w += rng.integers(-2, 3, shape).astype(np.float32) * np.spacing(w)
  w[:, ::32] = absmax
  return w


def bnb_model(base: Path, kind: str, nested: bool, dtype: str = "float32") -> torch.nn.Module:
  """The model in `base`, its linear layers quantised by bitsandbytes on the CPU."""
  how = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type=kind,
    bnb_4bit_use_double_quant=nested,
    bnb_4bit_compute_dtype=dtype,
  )
  return AutoModelForCausalLM.from_pretrained(
    base, quantization_config=how, dtype=dtype, attn_implementation="eager"
  )


def _model(directory: Path) -> None:
  shutil.rmtree(directory, ignore_errors=True)
  make("llama", CONFIG, seed=0).save_pretrained(directory / "base")
  model = bnb_model(directory / "base", "nf4", True)
  shutil.rmtree(directory / "base")
  model.save_pretrained(directory)
  (directory / "generation_config.json").unlink()
  inputs = batch(0)
  mask = torch.from_numpy(inputs["mask"])
  down = model.model.layers[1].mlp.down_proj.weight
  weight = bnb.dequantize_4bit(down.data, down.quant_state).numpy()
  with torch.no_grad():
    # Training mode: in evaluation bitsandbytes computes in bfloat16 on CPUs that can.
    logits = model.train()(
      input_ids=torch.from_numpy(inputs["tokens"]),
      attention_mask=mask,
      position_ids=(mask.cumsum(1) - 1).clamp(min=0),
    ).logits.numpy()
  expected = {**inputs, "logits": logits, "weight": weight}
  save_file(expected, directory / "expected.safetensors")


def _codes(path: Path) -> None:
  tensors = {}
  for kind in KINDS:
    w = weights(kind, (8, 256))
    tensors[f"{kind}.w"] = w
    for fmt in ("nf4", "fp4"):
      for block_size in (32, 64, 256):
        codes, state = bnb.quantize_4bit(torch.from_numpy(w), blocksize=block_size, quant_type=fmt)
        name = f"{kind}.{fmt}.{block_size}"
        tensors[f"{name}.codes"] = codes.numpy()
        tensors[f"{name}.absmax"] = state.absmax.numpy()
        tensors[f"{name}.dequantised"] = bnb.dequantize_4bit(codes, state).numpy()
  save_file(tensors, path)


def main() -> None:
  _model(GOLDEN / "bnb_tiny")
  _codes(GOLDEN / "bnb_codes.safetensors")


if __name__ == "__main__":
  main()
