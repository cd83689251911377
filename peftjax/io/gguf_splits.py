"""The ways in which byte-level vocabularies split texts, by the name in `tokenizer.ggml.pre`.

A split has some patterns, one after the other: each cuts the remainders of the ones before into its
matches and the text between them. They are those of the tokenizer.json files that llama.cpp takes
its names from, in the syntax of the tokenizers library.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Split(NamedTuple):
  """The split that a name implies.

  Attributes:
    patterns: regular expressions that cut texts into words.
    whole: True if a word that is a token is taken without merging ("ignore_merges").
    bos: True if a text begins with the BOS token unless the file says otherwise.
  """

  patterns: tuple[str, ...]
  whole: bool = False
  bos: bool = False


_SHORT = r"'s|'t|'re|'ve|'m|'ll|'d"
_ANY_SHORT = f"(?i:{_SHORT})"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_GPT2 = rf"{_SHORT}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+"


def _words(
  digits: str,
  letters: str = r"\p{L}+",
  signs: str = r"[^\s\p{L}\p{N}]+[\r\n]*",
  short: str = f"{_ANY_SHORT}|",
) -> str:
  """The kind of pattern that OpenAI's cl100k introduced."""
  return rf"{short}{_BEFORE}{letters}|{digits}| ?{signs}|{_SPACES}"


def _cased(digits: str, short: str = "") -> str:
  """The kind that o200k introduced: words of upper case, then of lower case."""
  return (
    rf"{_BEFORE}{_UPPER}*{_LOWER}+{short}|{_BEFORE}{_UPPER}+{_LOWER}*{short}|{digits}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
  )


# The letters of scripts with two cases, as DeepSeek's tokenizer.json lists them.
_CASED_LETTERS = (
  "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
  "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-"
  "\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-"
  "\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-"
  "\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc"
  "\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-"
  "\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-"
  "\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-"
  "\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-"
  "\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-"
  "\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-"
  "\U000118df\U0001e900-\U0001e943"
)
_CHINESE = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_ASCII_SIGNS = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"

_GROUPS: tuple[tuple[str, Split], ...] = (
  ("gpt-2 phi-2 gigachat a.x-4.0 mellum mpt olmo jais trillion exaone4", Split((_GPT2,))),
  (
    "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2",
    Split((r"\p{N}", _GPT2)),
  ),
  (
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2",
    Split((_words(r"\p{N}{1,3}"),), whole=True, bos=True),
  ),
  ("smaug-bpe dbrx glm4 chatglm-bpe", Split((_words(r"\p{N}{1,3}"),))),
  ("minicpm5", Split((r"\p{N}{1,3}", _words(r"\p{N}+")), whole=True)),
  (
    "qwen2 deepseek-r1-qwen megrez stablelm2 hunyuan solar-open grok-2 kormo f2llmv2",
    Split((_words(r"\p{N}"),)),
  ),
  ("qwen35", Split((_words(r"\p{N}", r"[\p{L}\p{M}]+", r"[^\s\p{L}\p{M}\p{N}]+[\r\n]*"),))),
  ("ufakzeka", Split((_words(r"\p{N}", short=""),))),
  ("seed-coder", Split((_words(r"\p{N}", signs=r"[^\s\p{L}\p{N}\r\n]+"),))),
  ("tekken", Split((_cased(r"\p{N}"),), whole=True, bos=True)),
  ("gpt-4o llama4 kanana2 talkie minimax-m2", Split((_cased(r"\p{N}{1,3}", f"{_ANY_SHORT}?"),))),
  (
    "deepseek-llm",
    Split(
      (
        r"[\r\n]",
        rf"\s?[{_CASED_LETTERS}]+",
        "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
        r"\s+$",
        _CHINESE,
        r"\p{N}+",
      )
    ),
  ),
  ("deepseek-coder", Split((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CHINESE, r"\p{N}"))),
  (
    "deepseek-v3 hunyuan-dense joyai-llm hy_v4",
    Split(
      (
        r"\p{N}{1,3}",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        rf"{_ASCII_SIGNS}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
        rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}",
      )
    ),
  ),
  ("poro-chat bloom gpt3-finnish", Split((_BLOOM,))),
  ("viking", Split((_BLOOM, r"\p{N}"))),
  ("falcon", Split((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]"))),
  ("default", Split((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"))),
)

SPLITS: Mapping[str, Split] = {name: split for names, split in _GROUPS for name in names.split()}
