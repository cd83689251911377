import json

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
    ("x.jsonl", '{"text": "a", "label": 1}\n{"text": \n', ["x.jsonl line 2", "not JSON"]),
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
  ],
)
def test_a_bad_file_is_named_with_its_line(read, name, content, named):
  with pytest.raises(ValueError) as error:
    read(name, content)
  for part in named:
    assert part in str(error.value)


def test_a_missing_file_is_named(tmp_path):
  with pytest.raises(ValueError, match="none.csv: cannot be read"):
    tables.read(str(tmp_path / "none.csv"), "text", None, "label")


def test_a_missing_pair_column_is_named(read):
  with pytest.raises(ValueError, match="no column 'other'"):
    read("x.csv", "text,label\nok,a\n", "other")
