"""Texts of many kinds that tokenizers must agree on, and some to train small ones on."""

CORPUS = [
  "The quick brown fox jumps over the lazy dog, and then it doesn't jump any more.",
  "In 1984 there were 12345 people; by 2021 there were 3.14159 times as many (about 40,000).",
  "def function(argument):\n    return [value for value in argument if value is not None]\n",
  "    for (int i = 0; i < 10; ++i) {\n        total += array[i] * 2;\n    }\n\n",
  "naïve café über straße señor Łódź état œuvre façade",
  "Привет, мир! Как дела? Это тест.  Γειά σου Κόσμε",
  "你好，世界。这是一个测试。 こんにちは世界 안녕하세요",
  "He said: \"I'm sure they'll've done it - we'd think so; they're 100% OK!!!\"",
  "the them then there these they this those though through",
  "\t\tindented\twith\ttabs\n\n\n  and   several    spaces     here",
  "https://example.com/path?query=1&other=two#fragment user@example.org",
  "<|start|>user<|end|> <think>perhaps</think> [INST] hello [/INST]",
] * 3

_STEMS = [
  "hello",
  "Hello World",
  "it's I'M we'LL you'Ve don't 'tis 's",
  "a1b22c333d4444 12345678 1,234.5 ３４ ٣٤ Ⅷ ½ x²",
  "naïve café e\u0301 über ÀÉÎ ǅ ʼn",
  "日本語テスト 你好，世界。 한국어",
  "مرحبا بالعالم 123 שלום",
  "हिन्दी भाषा ภาษาไทย",
  "🙂🙃 👨\u200d👩\u200d👧 🇩🇪 ❤\ufe0f",
  "def f(x):\n    return x**2  # square\n",
  "if (a<=b && c!=d) { e->f(); }\r\n",
  "$100 + 5% = ~€50 ^_^ `code` |x| <tag>",
  "tab\tand\nnew\r\nlines\r\rend",
  "a\u00a0b\u2003c\u3000d\u200be",
  "\u0000\u0001\u007f\ufeff\ufffd",
  "ALLCAPS camelCase snake_case kebab-case",
  "...!!!???---___***",
  "Straße STRASSE ﬁ ﬂ µ Ω Å",
  "<s>not</s> <unk> <pad> [INST]",
  "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
]
TEXTS = (
  [
    "",
    " ",
    "  ",
    "   ",
    "\n",
    "\n\n",
    "\t",
    " \n",
    "\n ",
    " \n \n  ",
    "\r\n",
    "a",
    " a",
    "  a",
    "a ",
  ]
  + _STEMS[:-2]
  + [_STEMS[-1]]
  + [f" {text}" for text in _STEMS[:-2]]
  + [f"{text}  \n" for text in _STEMS[:-2]]
  + [f"\n\n  {text} {text}" for text in _STEMS[:-2]]
  + CORPUS[:11]
)
# Texts that hold what is matched whole in some vocabularies.
MARKED = [
  "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n",
  "<think>so</think>\n\nanswer",
  " <think> so </think> ",
  "a<|end|>b <|end|> c<|end|><|end|>",
  "<s>[INST] hi [/INST] yes </s>",
  _STEMS[-2],
]
