import csv
import json
import os

import pytest

from peftjax.data import tables


@pytest.fixture
def read(tmp_path):
  """Writes a file and reads it."""

  def write_and_read(name, content, pair_column=None):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return tables.read(str(path), "text", pair_column, "label")

  return write_and_read


def test_csv_rows_have_the_line_they_begin_on(read):
  content = 'id,text,label\r\n1,"two\nlines, quoted ""so""",a\r\n\r\n2,plain,b\r\n'
  assert read("x.csv", content) == [
    (2, 'two\nlines, quoted "so"', None, "a"),
    (5, "plain", None, "b"),
  ]


def test_a_byte_order_mark_is_not_part_of_the_first_column(read):
  assert read("x.csv", b"\xef\xbb\xbftext,label\nhi,a\n") == [(2, "hi", None, "a")]


def test_a_quote_in_tsv_is_a_quote(read):
  rows = read("x.tsv", 'label\ttext\tother\na\t"open\tp\nb\tnext\tq\n', "other")
  assert rows == [(2, '"open', "p", "a"), (3, "next", "q", "b")]


def test_jsonl_keeps_line_separators_inside_strings_and_types_of_labels(read):
  lines = [{"text": "a\u2028b", "label": 3}, {"label": "x", "text": None, "more": []}]
  content = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
  assert read("x.jsonl", content) == [(1, "a\u2028b", None, 3), (2, "", None, "x")]


@pytest.mark.parametrize(
  "name, content, named",
  [
    ("x.csv", b"text,label\nok,a\n\xa35 off,b\n", ["x.csv line 3", "0xa3", "offset 16", "iconv"]),
    ("x.csv", "body,label\nok,a\n", ["x.csv", "'text'", "'body', 'label'", "text_column"]),
    ("x.tsv", "text\tclass\nok\ta\n", ["x.tsv", "'label'", "'text', 'class'", "label_column"]),
    ("x.jsonl", '{"text": "a", "label": 1}\n{"text": "b"}\n', ["line 2", "'label'", "'text'"]),
    ("x.jsonl", '{"text": "a", "label": 1}\n{"text": \n', ["line 2", "readable JSON", "column 10"]),
    ("x.jsonl", "[1]\n", ["x.jsonl line 1", "list", "object"]),
    ("x.jsonl", '{"text": 5, "label": 1}\n', ["line 1", "'text'", "5", "double quotes"]),
    ("x.jsonl", '{"text": "\\ud83d", "label": 1}\n', ["line 1", "surrogate", "ud83d"]),
    ("x.csv", "text,label\nhello, world,a\n", ["x.csv line 2", "3 fields", "2 columns", "comma"]),
    ("x.tsv", "text\tlabel\nhello\n", ["x.tsv line 2", "1 fields", "tabs"]),
    ("x.csv", 'text,label\nok,a\n"open" end,b\n', ["x.csv line 3", "malformed", ".jsonl"]),
    ("x.csv", 'text,label\nok,a\n"never closed,b\n', ["x.csv line 3", "malformed", "quotes"]),
    ("x.csv", "text,label\nok, \n", ["x.csv line 2", "'label' is empty"]),
    ("x.csv", "", ["x.csv", "no examples"]),
    ("x.csv", "text,label\n", ["x.csv", "no examples"]),
    ("x.jsonl", "\n", ["x.jsonl", "no examples"]),
    ("x.txt", "text,label\n", ["x.txt", ".csv, .tsv, .jsonl"]),
    # Ambiguous: which of the two?
    ("x.csv", "text,label,label\nok,a,b\n", ["x.csv", "'label' 2 times", "columns 2, 3"]),
    ("x.csv", b'\xef\xbb\xbf"text",text,label\na,b,c\n', ["x.csv", "'text' 2 times"]),
    ("x.tsv", "text\tlabel\tlabel \nok\ta\tb\n", ["x.tsv", "'label' 2 times"]),
    (
      "x.csv",
      "text" + ",label" * 50_000 + "\n",
      ["'label' 50000 times, as columns 2, 3, 4", "..."],
    ),
    ("x.csv", "id,text,id,label\n1,ok,2,a\n", ["x.csv", "'id' 2 times", "columns 1, 3"]),
    (
      "x.jsonl",
      '{"text": "a", "label": 1}\n{"text": "a", "label": 1, "label": 2}\n',
      ["x.jsonl line 2", "'label' comes twice"],
    ),
    ("x.jsonl", '{"text": "a", "label": 1, "of": {"x": 1, "x": 2}}', ["line 1", "'x' comes twice"]),
    # No scalars, no numbers.
    ("x.jsonl", '{"text": "a", "label": {"id": 1}}', ["line 1", "'label'", "{'id': 1}"]),
    ("x.jsonl", '{"text": "a", "label": [1]}', ["line 1", "'label'", "[1]"]),
    ("x.jsonl", '{"text": "a", "label": NaN}', ["line 1", "NaN"]),
    ("x.jsonl", '{"text": "a", "label": 1, "w": -Infinity}', ["line 1", "-Infinity"]),
    ("x.jsonl", '{"text": "a", "label": 1e400}', ["line 1", "inf"]),
    ("x.jsonl", '{"text": "a", "label": %s}' % ("7" * 5000), ["line 1", "5000 digits"]),
    ("x.jsonl", '{"text": "a", "label": "\\ud83d"}', ["line 1", "'label'", "surrogate"]),
    ("x.jsonl", '{"text": "a", "n": %s}' % ("[" * 2000 + "]" * 2000), ["line 1", "too deeply"]),
    ("x.jsonl", '{"a": %s}' % ('{"a":' * 2000 + "1" + "}" * 2000), ["line 1", "too deeply"]),
    # No text.
    ("x.csv", "text,label\nok,a\n".encode("utf-16-le"), ["line 1", "0x00", "UTF-16"]),
    ("x.csv", "text,label\nok,a\n".encode("utf-16"), ["line 1", "0xff", "UTF-16"]),
    ("x.jsonl", b'{"text": "a", "label": 1}\n\0\0\0\0', ["line 2", "0x00"]),
    ("x.jsonl", '{"text": "a", "label": 1}\r\ufeff{"text": "a"}', ["line 1", "column"]),
  ],
)
def test_a_bad_file_is_named_with_its_line(read, name, content, named):
  with pytest.raises(ValueError) as error:
    read(name, content)
  for part in named:
    assert part in str(error.value)


def test_columns_that_are_not_read_may_have_no_name(read):
  """As spreadsheets leave them."""
  assert read("x.csv", "text,label,,\nhi,a,,\n") == [(2, "hi", None, "a")]


def test_fields_of_any_length_are_read(read):
  """Python's csv module stops at 131,072 characters, a limit that is the whole process's."""
  before, long = csv.field_size_limit(), "word " * 100_000
  assert read("x.csv", f'text,label\n"{long}",a\n') == [(2, long, None, "a")]
  assert read("x.tsv", f"text\tlabel\n{long}\ta\n") == [(2, long, None, "a")]
  assert csv.field_size_limit() == before


@pytest.mark.parametrize("content", ["text,label\n", '{"text": "a", "label": "b"}\n'])
def test_a_byte_order_mark_is_no_content(read, content):
  name = "x.jsonl" if content.startswith("{") else "x.csv"
  rows = read(name, b"\xef\xbb\xbf" + (content + "c,d\n" * (name == "x.csv")).encode())
  assert [row.text for row in rows] == (["a"] if name == "x.jsonl" else ["c"])


def test_what_is_no_regular_file_is_not_opened(tmp_path):
  """A pipe that nobody writes to would never end."""
  os.mkfifo(tmp_path / "pipe.csv")
  (tmp_path / "folder.csv").mkdir()
  for name in ("pipe.csv", "folder.csv"):
    with pytest.raises(ValueError, match=f"{name} is not a regular file"):
      tables.read(str(tmp_path / name), "text", None, "label")


def test_a_missing_file_is_named(tmp_path):
  with pytest.raises(ValueError, match="none.csv cannot be read"):
    tables.read(str(tmp_path / "none.csv"), "text", None, "label")


def test_a_missing_pair_column_is_named(read):
  with pytest.raises(ValueError, match="no column 'other'"):
    read("x.csv", "text,label\nok,a\n", "other")
