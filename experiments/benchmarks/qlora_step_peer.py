"""Worker: QLoRA by Hugging Face PEFT and bitsandbytes. Arguments as for qlora_step_ours."""

import os
import sys

import bitsandbytes as bnb
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM

from experiments.benchmarks.batch import packed
from experiments.benchmarks.turns import serve
from peftjax.training.settings import Model


def main(batch_size: int, length: int) -> None:
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  path = Model(name="smollm2").path()
  model = AutoModelForCausalLM.from_pretrained(
    str(path.parent), gguf_file=path.name, dtype=torch.float32
  )
  for name, module in list(model.named_modules()):
    if isinstance(module, torch.nn.Linear) and name != "lm_head":
      replace(model, name, quantized(module))
  model.is_loaded_in_4bit = True
  model = prepare_model_for_kbit_training(
    model, gradient_checkpointing_kwargs={"use_reentrant": False}
  )
  lora = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
  model = get_peft_model(model, lora)
  model.train()
  trained = [p for p in model.parameters() if p.requires_grad]
  optimizer = torch.optim.AdamW(trained, lr=1e-4)
  tokens = torch.from_numpy(packed(batch_size, length)["tokens"]).long()

  def once() -> float:
    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()

  serve(once)


def quantized(linear: torch.nn.Linear) -> bnb.nn.Linear4bit:
  """The layer in NF4 with double quantisation."""
  made = bnb.nn.Linear4bit(
    linear.in_features,
    linear.out_features,
    bias=False,
    compute_dtype=torch.float32,
    compress_statistics=True,
    quant_type="nf4",
  )
  made.weight = bnb.nn.Params4bit(
    linear.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4"
  )
  return made.to("cpu")


def replace(model: torch.nn.Module, name: str, module: torch.nn.Module) -> None:
  parent, _, child = name.rpartition(".")
  setattr(model.get_submodule(parent), child, module)


if __name__ == "__main__":
  main(int(sys.argv[1]), int(sys.argv[2]))
