"""Model directories with the small tokenizers of `tokenizers/` and what can be said beside them."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).with_name("tokenizers")


class Directory(NamedTuple):
  """Which files to copy, and which to write."""

  base: str
  model_type: str | None
  files: tuple[str, ...]
  config: dict[str, Any] | None
  others: dict[str, Any] = {}


def token(content: str, special: bool = True, **options: Any) -> dict[str, Any]:
  """A token as an object, as transformers writes it."""
  made = dict(content=content, lstrip=False, normalized=not special, rstrip=False)
  return {**made, "single_word": False, "special": special, **options}


def _typed(content: str, **options: Any) -> dict[str, Any]:
  return {"__type": "AddedToken", **token(content, **options)}


_WORDPIECE = ("vocab.txt",)
_PAIR = ("vocab.json", "merges.txt")
_JSON = ("tokenizer.json",)
_SPM = ("tokenizer.model",)
_NONE: dict[str, Any] = {}
_LLAMA = dict(tokenizer_class="LlamaTokenizer", bos_token="<s>", eos_token="</s>")
_FAST = dict(tokenizer_class="PreTrainedTokenizerFast")
_L3 = dict(bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>", **_FAST)
_QWEN = dict(tokenizer_class="Qwen2Tokenizer", bos_token=None, eos_token="<|im_end|>")
_GEMMA = dict(tokenizer_class="GemmaTokenizer", add_bos_token=True, add_eos_token=False)
_QWEN_ADDED = {str(600 + i): token(t) for i, t in enumerate(("<|endoftext|>", "<|im_start|>"))}
_ENT = dict(additional_special_tokens=["<ent>", _typed("<think>")])

DIRECTORIES: dict[str, Directory] = {
  "bert": Directory("bert_uncased", "bert", _WORDPIECE, _NONE),
  "bert_cased": Directory("bert_cased", "bert", _WORDPIECE, dict(do_lower_case=False)),
  "bert_no_config": Directory("bert_cased", "bert", _WORDPIECE, None),
  "bert_accents": Directory(
    "bert_uncased", "bert", _WORDPIECE, dict(strip_accents=False, tokenize_chinese_chars=False)
  ),
  "bert_electra": Directory(
    "bert_uncased", "bert", _WORDPIECE, dict(tokenizer_class="ElectraTokenizer")
  ),
  "roberta": Directory("roberta", "roberta", _PAIR, dict(tokenizer_class="RobertaTokenizer")),
  "roberta_prefix": Directory("roberta", "roberta", _PAIR, dict(add_prefix_space=True)),
  "roberta_mask": Directory(
    "roberta", "roberta", _PAIR, dict(mask_token=_typed("<mask>", lstrip=True))
  ),
  "gpt2": Directory("gpt2", "gpt2", _PAIR, _NONE),
  "gpt2_bos_eos": Directory("gpt2", "gpt2", _PAIR, dict(add_bos_token=True, add_eos_token=True)),
  "gpt2_extra": Directory("gpt2", "gpt2", _PAIR, dict(pad_token="<pad>", **_ENT)),
  "gpt2_split": Directory("gpt2", "gpt2", _PAIR, dict(split_special_tokens=True, bos_token=None)),
  "llama2": Directory("llama2", "llama", _SPM, dict(add_bos_token=True, **_LLAMA)),
  "llama2_no_bos": Directory("llama2", "llama", _SPM, dict(add_bos_token=False, **_LLAMA)),
  "llama2_eos": Directory(
    "llama2", "llama", _SPM, dict(add_bos_token=True, add_eos_token=True, legacy=True, **_LLAMA)
  ),
  "llama2_no_prefix": Directory(
    "llama2", "llama", _SPM, dict(add_bos_token=True, add_prefix_space=False, **_LLAMA)
  ),
  "llama2_silent": Directory("llama2", "llama", _SPM, None),
  "llama2_objects": Directory(
    "llama2",
    "llama",
    _SPM,
    dict(
      tokenizer_class="LlamaTokenizer",
      add_bos_token=True,
      bos_token=_typed("<s>", normalized=True),
      eos_token=_typed("</s>", rstrip=True),
      added_tokens_decoder={
        "0": token("<unk>"),
        "1": token("<s>"),
        "2": token("</s>", rstrip=True),
      },
      **_ENT,
    ),
  ),
  "llama2_json": Directory("llama2", "llama", _JSON, dict(add_eos_token=True, **_LLAMA)),
  "llama2_json_fast": Directory("llama2", "llama", _JSON, _FAST),
  "llama2_json_extra": Directory(
    "llama2", "llama", _JSON, dict(pad_token="[PAD]", image_token="<image>", **_LLAMA)
  ),
  "mistral": Directory("llama2", "mistral", _JSON, _LLAMA),
  "mistral_spm": Directory("llama2", "mistral", _SPM, dict(add_bos_token=True, **_LLAMA)),
  "mistral_ent": Directory(
    "llama2",
    "mistral",
    _SPM,
    dict(added_tokens_decoder={"1": token("<s>"), "3": token("<ent>")}, add_eos_token=True),
  ),
  "unigram": Directory("unigram", "llama", _SPM, dict(add_bos_token=True)),
  "llama3": Directory("llama3", "llama", _JSON, _L3),
  "llama3_as_llama": Directory(
    "llama3", "llama", _JSON, dict(_L3, tokenizer_class="LlamaTokenizer")
  ),
  "llama3_added": Directory(
    "llama3",
    "llama",
    _JSON,
    dict(
      _L3,
      added_tokens_decoder={"603": token("<think>", special=False, normalized=False)},
      cls_token="<cls>",
    ),
  ),
  "qwen2": Directory("qwen2", "qwen2", _JSON, _QWEN),
  "qwen2_fast": Directory("qwen2", "qwen2", _JSON, _FAST),
  "qwen2_slow": Directory("qwen2", "qwen2", _PAIR, dict(_QWEN, added_tokens_decoder=_QWEN_ADDED)),
  "qwen3": Directory("qwen2", "qwen3", _JSON, _QWEN),
  "qwen3_silent": Directory("qwen2", "qwen3", _JSON, None),
  "phi3": Directory("llama2", "phi3", _JSON, _LLAMA),
  "phi3_spm": Directory("llama2", "phi3", _SPM, dict(add_bos_token=True, **_LLAMA)),
  "gemma": Directory("gemma", "gemma2", _JSON, _GEMMA),
  "gemma_silent": Directory("gemma", "gemma3_text", _JSON, None),
  "gemma_fast": Directory("gemma", "gemma2", _JSON, _FAST),
  "smollm2": Directory("smollm2", "llama", _JSON, dict(tokenizer_class="GPT2Tokenizer")),
  "smollm2_fast": Directory("smollm2", "llama", _JSON, _FAST),
  "bert_added": Directory(
    "bert_uncased",
    "bert",
    _WORDPIECE,
    _NONE,
    {"added_tokens.json": {"<ent>": 700, "[mask]": 701}, "special_tokens_map.json": _ENT},
  ),
  "bert_map": Directory(
    "bert_uncased",
    "bert",
    _WORDPIECE,
    _NONE,
    {"special_tokens_map.json": dict(unk_token="[UNK]", mask_token=token("[MASK]", lstrip=True))},
  ),
  "roberta_added": Directory(
    "roberta", "roberta", _PAIR, _NONE, {"added_tokens.json": {"<think>": 600, "<ent>": 601}}
  ),
  "gpt2_map": Directory(
    "gpt2",
    "gpt2",
    _PAIR,
    dict(add_bos_token=True, bos_token="<|endoftext|>"),
    {"special_tokens_map.json": dict(bos_token=token("<s>"), eos_token="</s>")},
  ),
}


def write(name: str, folder: Path) -> Path:
  """Makes the directory `folder`."""
  made = DIRECTORIES[name]
  folder.mkdir(parents=True)
  for file in made.files:
    if (ROOT / made.base / file).exists():
      shutil.copyfile(ROOT / made.base / file, folder / file)
    else:  # the older files of what is kept as tokenizer.json
      model = json.loads((ROOT / made.base / "tokenizer.json").read_text())["model"]
      merges = "\n".join(" ".join(merge) for merge in model["merges"])
      text = json.dumps(model["vocab"]) if file == "vocab.json" else f"#version: 0.2\n{merges}\n"
      (folder / file).write_text(text)
  contents = {"tokenizer_config.json": made.config, **made.others}
  if made.model_type:
    contents["config.json"] = {"model_type": made.model_type}
  for file, content in contents.items():
    if content is not None:
      (folder / file).write_text(json.dumps(content))
  return folder
