"""Names of other quantised formats: checkpoints in them are refused by name, not misread."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from peftjax.io.records import clip

_NAMES: Mapping[str, str] = {
  "gptq": "GPTQ",
  "awq": "AWQ",
  "fp8": "FP8 in blocks",
  "fbgemm_fp8": "FBGEMM FP8",
  "hqq": "HQQ",
  "compressed-tensors": "compressed-tensors",
  "compressed_tensors": "compressed-tensors",
  "mxfp4": "MXFP4",
  "aqlm": "AQLM",
  "quanto": "Quanto",
  "torchao": "torchao",
  "eetq": "EETQ",
  "vptq": "VPTQ",
  "spqr": "SpQR",
  "higgs": "HIGGS",
  "bitnet": "BitNet",
  "auto-round": "AutoRound",
  "quark": "Quark",
  "modelopt": "ModelOpt",
}
# Endings of the tensors that lie beside such weights.
_SUFFIXES: Mapping[str, str] = {
  ".SCB": "LLM.int8 (bitsandbytes' 8 bits)",
  ".g_idx": "GPTQ",
  ".qzeros": "GPTQ or AWQ",
  ".qweight": "GPTQ or AWQ",
  ".weight_scale_inv": "FP8 in blocks",
  ".weight_packed": "compressed-tensors",
  ".weight_scale": "compressed-tensors or FP8",
  ".weight_blocks": "MXFP4",
  "_blocks": "MXFP4",
}
_ADVICE = (
  "Only bitsandbytes' 4 bits (nf4, fp4) are read. Load the model it was made from, with "
  "quant=pj.quant.nf4() for four bits; or save it dense: AutoModelForCausalLM.from_pretrained(OLD)"
  ".dequantize().save_pretrained(NEW)."
)


def check(config: Mapping[str, Any], where: str) -> None:
  """Raises ValueError if `quantization_config` says anything but bitsandbytes' 4 bits."""
  name = "quantization_config" if "quantization_config" in config else "compression_config"
  said = config.get(name)
  if said is None:
    return
  if not isinstance(said, dict):
    raise ValueError(f"{where}: {name} is {clip(said)}; it must be an object {{...}}.")
  for field in ("load_in_4bit", "load_in_8bit"):
    if not isinstance(said.get(field, False), bool):
      raise ValueError(f"{where}: {name}.{field} is {clip(said[field])}; it must be true or false.")
  method = said.get("quant_method")
  if method is None and {"load_in_4bit", "load_in_8bit"} & set(said):
    method = "bitsandbytes"  # as in its first files
  if method == "bitsandbytes" and said.get("load_in_8bit"):
    raise ValueError(f"{where} says that the weights are in LLM.int8 (load_in_8bit). {_ADVICE}")
  if method == "bitsandbytes":
    return
  called = _NAMES.get(method, clip(method)) if isinstance(method, str) else clip(method)
  raise ValueError(f"{where} says that the weights are quantised by {called}. {_ADVICE}")


def hint(names: Iterable[str]) -> str:
  """The kind of quantised file that has tensors of such names; empty if none is known."""
  names = tuple(names)
  for suffix, kind in _SUFFIXES.items():
    if any(name.endswith(suffix) for name in names):
      return f"They look like those of {kind}. {_ADVICE}"
  return ""
