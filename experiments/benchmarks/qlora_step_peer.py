"""Worker: QLoRA by Hugging Face PEFT and bitsandbytes. Arguments as for qlora_step_ours."""

import os
import sys
from typing import Any

import bitsandbytes as bnb
import torch
from accelerate import init_empty_weights
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from experiments.benchmarks import shapes, turns
from experiments.benchmarks.batch import packed
from peftjax.data import samples


def main(name: str, batch_size: int, length: int, device: str) -> None:
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  model = base(name, device)
  # As `prepare_model_for_kbit_training` does, which would also turn bfloat16 into float32.
  model.is_loaded_in_4bit = True
  model.gradient_checkpointing_enable({"use_reentrant": False})
  lora = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
  model = get_peft_model(model, lora)
  model.train()
  trained = [p for p in model.parameters() if p.requires_grad]
  optimizer = torch.optim.AdamW(trained, lr=1e-4)
  drawn = packed(batch_size, length, shapes.config(name)["vocab_size"])["tokens"]
  tokens = torch.from_numpy(drawn).long().to(device)

  def once() -> float:
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
      loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()

  turns.serve(once, peak_allocated if device == "cuda" else turns.peak_resident)


def base(name: str, device: str) -> Any:
  """The model on the device, its linear layers quantised one by one."""
  dtype = torch.bfloat16 if device == "cuda" else torch.float32
  if name in shapes.RANDOM:
    with init_empty_weights():
      config = AutoConfig.for_model(**shapes.RANDOM[name])
      model = AutoModelForCausalLM.from_config(config, dtype=dtype)
  else:
    path = samples.model(name)
    model = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=dtype)
  for at, module in list(model.named_modules()):
    if isinstance(module, torch.nn.Linear) and at != "lm_head":
      model.set_submodule(at, quantized(module, device))
  for module in model.modules():
    for at, weight in list(module.named_parameters(recurse=False)):
      if weight.is_meta:
        setattr(module, at, torch.nn.Parameter(made(weight, device)))
  return model.to(device)


def quantized(linear: torch.nn.Linear, device: str) -> bnb.nn.Linear4bit:
  """The layer in NF4 with double quantisation."""
  layer = bnb.nn.Linear4bit(
    linear.in_features,
    linear.out_features,
    bias=False,
    compute_dtype=linear.weight.dtype,
    device="meta",
  )
  layer.weight = bnb.nn.Params4bit(
    made(linear.weight.data, device),
    requires_grad=False,
    compress_statistics=True,
    quant_type="nf4",
  )
  return layer.to(device)


def made(weight: torch.Tensor, device: str) -> torch.Tensor:
  """The weight; for one that is a shape alone, ones for a norm and else random numbers."""
  if not weight.is_meta:
    return weight
  if weight.ndim == 1:
    return torch.ones(weight.shape, dtype=weight.dtype, device=device)
  return torch.randn(weight.shape, dtype=weight.dtype, device=device).mul_(0.02)


def peak_allocated() -> float:
  """The most of the GPU's memory that torch has allocated, in MiB."""
  return torch.cuda.max_memory_allocated() / 2**20


if __name__ == "__main__":
  main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
