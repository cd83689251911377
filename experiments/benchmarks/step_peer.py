"""Worker: Hugging Face PEFT's training step on torch. Arguments as for step_ours."""

import os
import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

from experiments.benchmarks.batch import example
from experiments.benchmarks.turns import serve


def main(case: str, directory: str, batch_size: int, length: int) -> None:
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  model = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=2)
  if case != "full":
    targets = ["query", "value"] if case == "query_value" else "all-linear"
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="SEQ_CLS")
    model = get_peft_model(model, lora)
  model.train()
  trained = [p for p in model.parameters() if p.requires_grad]
  optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.01)
  batch = {name: torch.from_numpy(array) for name, array in example(batch_size, length).items()}

  def once() -> float:
    out = model(
      input_ids=batch["tokens"].long(),
      attention_mask=batch["mask"].long(),
      labels=batch["labels"].long(),
    )
    out.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return out.loss.item()

  serve(once)


if __name__ == "__main__":
  main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
