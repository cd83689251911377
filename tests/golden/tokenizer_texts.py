"""500 texts that tokenizers differ on, made here: the same at every call and on every machine."""

import random

_WORDS = (
  "the a of to in and said shares market airline fuel prices rose fell after minister report match"
  " won lost goal striker film great terrible boring loved it never again don't can't I'm they'll"
  " CEO iPhone NATO x1 café naïve Zürich über señor İstanbul ﬁne Ⅳ e\u0301clair co-operate 3rd"
).split()
_OTHER = (
  "مرحبا بالعالم|שלום עולם|你好,世界|東京都は日本の首都です|안녕하세요 세계|Привет, мир!"
  "|สวัสดีชาวโลก|नमस्ते दुनिया|👋🌍|👨\u200d👩\u200d👧\u200d👦|🇩🇪🇫🇷|é|e\u0301|Å|ﷺ|𝔘𝔫𝔦"
  "|\u202eabc\u202c|ⅷ½|ｆｕｌｌ|🙃🙃🙃🙃🙃"
).split("|")
_CODE = (
  "def f(x):\n    return x + 1\n",
  'if (a >= b && c != d) {\n\tprintf("%d\\n", a[i]);\n}',
  "  - item: 1\n    - nested: [a, b]\n",
  "SELECT * FROM t WHERE id=42; -- note",
  '<div class="x">\r\n  <p>Hi</p>\r\n</div>',
  "x = '''a\n\n\n        b'''",
  "a\t\tb\t c",
  "for i in range(10):\n  print(i)  # 0..9\n\n\n",
)
_SPECIAL = (
  "<s>", "</s>", "<unk>", "<pad>", "<mask>", "[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]", "[mask]",
  "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|eot_id|>", "<think>",
  "<ent>", "<ENT>", "[Mask]", "<0x0A>", "▁", "Ġ", "##s", "[INST]",
)  # fmt: skip
_SPACES = (
  ""
  "| |  |\n|\n\n|\r\n|\r|\t| \n |\n \n|\u00a0|\u3000|\u2028|\u200b|\ufeff|\x0b\x0c|\x85"
  "|   \n\n\n   "
  "|\x00|a\x00b|\x01\x1f\x7f|\ufffd|\ufffe"
).split("|")


def texts() -> list[str]:
  """News-like, opinions, code, white space of every kind, scripts, special tokens, long words."""
  draw = random.Random(0)
  words = lambda n: " ".join(draw.choice(_WORDS) for _ in range(n))
  made = [*_SPACES, *_OTHER, *_CODE, *_SPECIAL]
  made += [f" {text}" for text in _OTHER] + [f"{text}\n" for text in _CODE]
  made += [f"{words(2)} {token} {words(2)}" for token in _SPECIAL]
  made += [f"{words(1)}{token}{words(1)}" for token in _SPECIAL]
  made += [f"{token}\n{token} {token}{token}" for token in _SPECIAL]
  made += [f"a{space}b{space}{space}1" for space in _SPACES]
  made += ["x" * 300, "ab" * 200, "1234567890" * 20, "a," * 100, "é" * 150, "\n" * 70, " " * 90]
  made += [f"{draw.randrange(10 ** (k % 12 + 1))}.{k:03d}  {k}" for k in range(30)]
  made += [f"https://www.site{k}.org/a?b={k}&c=%20#d me@mail{k}.com" for k in range(10)]
  while len(made) < 420:
    kind = len(made) % 4
    if kind == 0:
      made.append(f"{words(4).title()}\n\n{words(12).capitalize()}. {words(9)}, {words(3)}.")
    elif kind == 1:
      made.append(f"{words(6)}!!! :-) {words(2).upper()}")
    elif kind == 2:
      made.append(draw.choice(_CODE) + draw.choice(_SPACES) + draw.choice(_CODE))
    else:
      made.append(" ".join(draw.choice((*_OTHER, *_WORDS, *_SPECIAL)) for _ in range(8)))
  alphabet = [
    *map(chr, range(32, 127)),
    *"\n\t\r  éßñ€£’“”—…中文あ한мдыשםعر",
    "🙂",
    "\u0301",
    "\u200d",
  ]
  while len(made) < 500:
    made.append("".join(draw.choice(alphabet) for _ in range(draw.randrange(1, 80))))
  return made


def plain() -> list[str]:
  """What the small tokenizers are trained on: words and code, without anything unusual."""
  draw = random.Random(1)
  words = lambda n: " ".join(draw.choice(_WORDS) for _ in range(n))
  made = [f"{words(9).capitalize()}. {words(7)}, {words(3)} {k}!" for k in range(400)]
  return [*made, *(text.replace("\r", "") for text in _CODE * 20), *_OTHER[:8] * 3]
