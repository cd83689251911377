"""DistilBERT: BERT's layers under other names in files, without types and without a pooler."""

from __future__ import annotations

from peftjax.models import bert

# As in `bert`.
NEW = r"head/.*"
UNUSED = r".*position_ids|vocab_(transform|layer_norm|projector)\..*"
OUT_FIRST = True
LAYER = r"(.*\.)?transformer\.layer\.(\d+)\..*"
CONFIG, MODEL = bert.BertConfig, bert.BertClassifier

_NAMES = (
  (".encoder.", ".transformer."),
  (".attention.self.query.", ".attention.q_lin."),
  (".attention.self.key.", ".attention.k_lin."),
  (".attention.self.value.", ".attention.v_lin."),
  (".attention.output.dense.", ".attention.out_lin."),
  (".attention.output.LayerNorm.", ".sa_layer_norm."),
  (".intermediate.dense.", ".ffn.lin1."),
  (".output.dense.", ".ffn.lin2."),
  (".output.LayerNorm.", ".output_layer_norm."),
)


def hf_name(path: str) -> str:
  """The name of a parameter's Hugging Face tensor.

  >>> hf_name("distilbert/encoder/layers_0/attention/self/query/kernel")
  'distilbert.transformer.layer.0.attention.q_lin.weight'
  """
  name = bert.hf_name(path)
  for ours, theirs in _NAMES:
    name = name.replace(ours, theirs)
  return name
