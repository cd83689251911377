"""Worker: LoRA on one family by Hugging Face PEFT on torch. Arguments as for family_ours."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
  AutoModelForCausalLM,
  AutoModelForImageClassification,
  AutoModelForSeq2SeqLM,
)

from experiments.benchmarks import batch
from experiments.benchmarks.turns import serve


def main(family: str, directory: str, rows: int, length: int) -> None:
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  model, inputs = {"decoder": decoder, "t5": t5, "vit": vit}[family](directory, rows, length)
  # Its "all-linear" takes a classifier too where the task is not named.
  targets = {"decoder": "all-linear", "t5": "all-linear", "vit": ["q_proj", "v_proj"]}[family]
  model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets))
  model.train()
  trained = [p for p in model.parameters() if p.requires_grad]
  optimizer = torch.optim.AdamW(trained, lr=1e-3)

  def once() -> float:
    loss = model(**inputs).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()

  serve(once)


def decoder(directory: str, rows: int, length: int) -> Any:
  path = Path(directory)
  model = AutoModelForCausalLM.from_pretrained(
    str(path.parent), gguf_file=path.name, dtype=torch.float32
  )
  tokens = batch.packed(rows, length, model.config.vocab_size)["tokens"]
  tokens = torch.from_numpy(tokens).long()
  return model, {"input_ids": tokens, "labels": tokens, "use_cache": False}


def t5(directory: str, rows: int, length: int) -> Any:
  model = AutoModelForSeq2SeqLM.from_pretrained(directory)
  source, target = batch.pairs(rows, length, model.config.vocab_size)
  source, target = torch.from_numpy(source).long(), torch.from_numpy(target).long()
  return model, {"input_ids": source, "labels": target, "use_cache": False}


def vit(directory: str, rows: int, length: int) -> Any:
  model = AutoModelForImageClassification.from_pretrained(directory)
  images, labels = batch.images(rows, model.config.image_size)
  pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
  return model, {"pixel_values": pixels, "labels": torch.from_numpy(labels).long()}


if __name__ == "__main__":
  main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
