"""Files in the official formats of the papers' tasks: CoNLL-2003 and SQuAD."""

import json

import numpy as np
import pytest

from peftjax import data
from peftjax.data import conll, squad

CONLL = """-DOCSTART- -X- -X- O

EU NNP B-NP B-ORG
rejects VBZ B-VP O
German JJ B-NP B-MISC
call NN I-NP O

Peter\tNNP\tB-NP\tI-PER
Blackburnish NNP I-NP I-PER
"""


@pytest.fixture
def conll_file(tmp_path):
  path = tmp_path / "eng.train"
  path.write_text(CONLL)
  return path


def test_sentences_are_words_and_their_last_column(conll_file):
  one, two = conll.read(conll_file)
  assert one == conll.Sentence(("EU", "rejects", "German", "call"), ("B-ORG", "O", "B-MISC", "O"))
  assert two.words == ("Peter", "Blackburnish") and two.tags == ("I-PER", "I-PER")
  assert conll.names([one, two]) == ("O", "B-MISC", "B-ORG", "I-PER")


@pytest.mark.parametrize(
  "text, message",
  [
    ("EU NNP B-NP B-ORG\nrejects\n", "line 2: 'rejects' does not end in a tag"),
    ("EU NNP B-NP ORG\n", "line 1: .* does not end in a tag"),
    ("EU B-\n", "does not end in a tag"),
    ("-DOCSTART- -X- -X- O\n\n", "holds no words"),
  ],
)
def test_a_file_of_another_form_is_refused(text, message, tmp_path):
  (tmp_path / "file").write_text(text)
  with pytest.raises(ValueError, match=message):
    conll.read(tmp_path / "file")


def test_the_first_token_of_each_word_has_its_tag(minilm, conll_file):
  """And no other, special ones neither; a word that is cut off has none."""
  sentences = conll.read(conll_file)
  words = [sentence.words for sentence in sentences]
  tokens, firsts = conll.encode(minilm, words, 16)
  assert [list(first) for first in firsts] == [[1, 2, 3, 4], [1, 2]]
  tags = [np.array([5, 6, 7, 8]), np.array([9, 10])]
  labels = conll.labels_of(firsts, tags, 16)
  pieces = minilm.encode("Peter Blackburnish").tokens
  assert tokens.lengths.tolist() == [6, len(pieces)] and pieces[3].startswith("##")
  assert labels[0, :6].tolist() == [-1, 5, 6, 7, 8, -1]
  assert labels[1].tolist() == [-1, 9, 10] + [-1] * (labels.shape[1] - 3)
  assert [list(first) for first in conll.encode(minilm, words, 4)[1]] == [[1, 2, -1, -1], [1, 2]]
  assert minilm.backend.truncation is None


PASSAGE = "The Normans were the people who gave their name to Normandy, a region in France."


def squad_file(path, **changes):
  ask = lambda name, text, *answers, **more: {
    "id": name,
    "question": text,
    "answers": [{"text": a, "answer_start": PASSAGE.index(a)} for a in answers],
    **more,
  }
  qas = [
    ask("1", " In what country is Normandy?", "France", "in France", is_impossible=False),
    ask("2", "Who gave their name?", "The Normans"),
    ask("3", "When was it?", is_impossible=True, plausible_answers=[]),
  ]
  paragraph = {"context": PASSAGE, "qas": [{**qa, **changes} for qa in qas]}
  data = {"version": "v2.0", "data": [{"title": "Normans", "paragraphs": [paragraph]}]}
  path.write_text(json.dumps(data))
  return path


def test_questions_of_both_versions(tmp_path):
  one, two, three = squad.read(squad_file(tmp_path / "dev.json"))
  assert one.text == "In what country is Normandy?" and one.context == PASSAGE
  assert [answer.text for answer in one.answers] == ["France", "in France"]
  assert two.id == "2" and two.answers and three.answers == ()


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"answers": [{"text": "Paris", "answer_start": 3}]}, "'Paris' is not at character 3"),
    ({"answers": [{"text": "The", "answer_start": -80}]}, "not at character -80"),
    ({"id": "1"}, "the id '1' comes twice"),
    ({"question": 3}, r"question is 3; it must be a text"),
  ],
)
def test_other_files_are_refused(changes, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    squad.read(squad_file(tmp_path / "dev.json", **changes))


def test_windows_overlap_and_find_every_answer(minilm, tmp_path):
  """Each window has the question and at most so many tokens; labels give the answer's text."""
  questions = squad.read(squad_file(tmp_path / "dev.json"))
  made = squad.windows(minilm, questions, 20, 4)
  assert made.tokens.lengths.max() == 20 and set(made.question) == {0, 1, 2}
  labels = squad.labels_of(made, questions, 20)
  found = {0: [], 1: [], 2: []}
  for row, owner, span in zip(labels, made.question, made.spans, strict=True):
    start, end = (row & squad.START > 0).argmax(), (row & squad.END > 0).argmax()
    assert np.count_nonzero(row & squad.START) == np.count_nonzero(row & squad.END) == 1
    found[owner].append(PASSAGE[span[start, 0] : span[end, 1]] if start else "")
  assert set(found[0]) == {"", "France"} and set(found[1]) == {"The Normans", ""}
  assert set(found[2]) == {""}
  places = [
    span[span[:, 0] >= 0] for span, q in zip(made.spans, made.question, strict=True) if not q
  ]
  assert (places[0][-4:] == places[1][:4]).all()
  with pytest.raises(ValueError, match="cannot encode"):
    squad.windows(minilm, questions, 12, 8)


def test_the_best_span_over_all_windows_is_the_answer(minilm, tmp_path):
  questions = squad.read(squad_file(tmp_path / "dev.json"))
  made = squad.windows(minilm, questions, 20, 4)
  labels = squad.labels_of(made, questions, 20)
  logits = [np.stack([row & 1, row >> 1], -1).astype(np.float32) for row in labels]
  answer = lambda threshold, longest=5: squad.answers_of(
    made, logits, questions, max_answer=longest, no_answer_threshold=threshold
  )
  # The windows without the answer give no answer 2, the least over all is 0 where one has it.
  assert answer(0.0) == ["France", "The Normans", ""]
  assert answer(2.0)[2] != "" and answer(None)[2] != ""
  assert answer(-3.0) == ["", "", ""]
  assert len(answer(None, 1)[1].split()) == 1


def test_scores_are_those_of_the_official_rules(tmp_path):
  """Computed by hand: articles, case and punctuation do not count; the best answer does."""
  questions = squad.read(squad_file(tmp_path / "dev.json"))
  assert squad.scores(questions, ["the france!", "Normans", ""]) == {
    **{"f1": 1.0, "exact_match": 1.0, "answerable_f1": 1.0, "unanswerable_f1": 1.0}
  }
  got = squad.scores(questions, ["in of France", "", "x"])
  assert got["exact_match"] == 0 and got["f1"] == pytest.approx(0.8 / 3)
  assert "answerable_f1" not in squad.scores(questions[:2], ["", ""])
  assert squad.normalised(" An  apple-a, The day") == "applea day"


def hand_made(*spans):
  """Windows of one question whose tokens stand for these characters of its passage."""
  spans = [np.array([(-1, -1), *own, (-1, -1)], np.int32) for own in spans]
  offsets = np.cumsum([0, *map(len, spans)])
  tokens = data.Tokens(np.zeros(offsets[-1], np.int32), np.zeros(offsets[-1], np.uint8), offsets)
  return squad.Windows(tokens, np.zeros(len(spans), np.int64), spans)


def test_spans_by_hand():
  """The longest that is allowed, the least score of no answer, and answers that a window cuts."""
  question = squad.Question("1", "?", "aa bb cc", (squad.Answer("bb cc", 3),))
  made = hand_made([(0, 2), (3, 5), (6, 8)], [(6, 8)])
  scores = [np.zeros((5, 2), np.float32), np.zeros((3, 2), np.float32)]
  scores[0][0], scores[1][0] = (4, 4), (1, 1)
  scores[0][1, 0], scores[0][3, 1] = 5, 3  # from aa to cc: 8
  answer = lambda **how: squad.answers_of(made, scores, [question], **how)[0]
  assert answer(max_answer=3, no_answer_threshold=None) == "aa bb cc"
  assert answer(max_answer=2, no_answer_threshold=None) == "aa"
  # No answer has 2 at the least: less 8, or less 5, that is -6, or -3.
  assert answer(max_answer=3, no_answer_threshold=-6.0) == "aa bb cc"
  assert answer(max_answer=3, no_answer_threshold=-6.5) == ""
  labels = squad.labels_of(made, [question], 5)
  assert labels.tolist() == [[0, 0, 1, 2, 0], [3, 0, 0, 0, 0]]
  assert squad.labels_of(hand_made([(0, 2), (3, 5)]), [question], 4).tolist() == [[3, 0, 0, 0]]
