"""Worker: a LoRA run by Hugging Face PEFT. Arguments: model train validation test epochs result."""

import copy
import csv
import json
import os
import sys

import numpy as np
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import (
  AutoModelForSequenceClassification,
  AutoTokenizer,
  DataCollatorWithPadding,
  get_linear_schedule_with_warmup,
)


def main(directory: str, files: list[str], epochs: int, result: str) -> None:
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  torch.manual_seed(0)
  tokenizer = AutoTokenizer.from_pretrained(directory)
  train, validation, test = (read(tokenizer, path) for path in files)
  model = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=3)
  lora = LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], task_type="SEQ_CLS")
  model = get_peft_model(model, lora)
  trained = [p for p in model.parameters() if p.requires_grad]
  optimizer = torch.optim.AdamW(trained, lr=2e-3, weight_decay=0.01)
  collate = DataCollatorWithPadding(tokenizer)
  batches = torch.utils.data.DataLoader(train, 32, shuffle=True, collate_fn=collate)
  total = epochs * len(batches)
  schedule = get_linear_schedule_with_warmup(optimizer, int(0.06 * total), total)
  best, kept = -1.0, None
  for _ in range(epochs):
    model.train()
    for batch in batches:
      model(**batch).loss.backward()
      torch.nn.utils.clip_grad_norm_(trained, 1.0)
      optimizer.step()
      schedule.step()
      optimizer.zero_grad()
    accuracy = score(model, validation, collate)
    if accuracy > best:
      best, kept = accuracy, copy.deepcopy(get_peft_model_state_dict(model))
  set_peft_model_state_dict(model, kept)
  with open(result, "w", encoding="utf-8") as file:
    json.dump({"accuracy": score(model, test, collate)}, file)


def read(tokenizer, path: str) -> list[dict]:
  with open(path, newline="", encoding="utf-8") as file:
    rows = list(csv.DictReader(file))
  encoded = tokenizer([row["text"] for row in rows], truncation=True, max_length=64)
  return [
    {**{key: encoded[key][i] for key in encoded}, "labels": int(row["label"])}
    for i, row in enumerate(rows)
  ]


def score(model, rows: list[dict], collate) -> float:
  model.eval()
  rows = sorted(rows, key=lambda row: len(row["input_ids"]))  # as little padding as can be
  right = []
  with torch.no_grad():
    for batch in torch.utils.data.DataLoader(rows, 64, collate_fn=collate):
      labels = batch.pop("labels")
      right.append((model(**batch).logits.argmax(-1) == labels).numpy())
  return float(np.concatenate(right).mean())


if __name__ == "__main__":
  main(sys.argv[1], sys.argv[2:5], int(sys.argv[5]), sys.argv[6])
