"""Texts to batches: corpora, splits, token ids, batch plans and the pipeline."""

from peftjax.data.corpora import load
from peftjax.data.examples import Corpus, Examples
from peftjax.data.pipeline import Batch, Stream, batches
from peftjax.data.plan import Plan, batch_plan, buckets
from peftjax.data.text_tokenizer import TextTokenizer
from peftjax.data.tokenise import Tokens, documents, encode
from peftjax.data.tokenizer_files import digest as tokenizer_digest
from peftjax.data.tokenizer_files import load_tokenizer

__all__ = [
  "Batch",
  "Corpus",
  "Examples",
  "Plan",
  "Stream",
  "TextTokenizer",
  "Tokens",
  "batch_plan",
  "batches",
  "buckets",
  "documents",
  "encode",
  "load",
  "load_tokenizer",
  "tokenizer_digest",
]
