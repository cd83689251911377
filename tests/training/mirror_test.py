"""A workdir in a bucket: what a local one holds, whole whenever a process is killed."""

import importlib.util
import json
import shutil

import numpy as np
import pytest

from peftjax.io import bucket, disk
from peftjax.training import build, lock, loop, mirror
from peftjax.training.checkpoint import Checkpoints
from peftjax.training.mirror import Mirror
from peftjax.training.peers import Peers
from peftjax.training.predict import Predictor
from peftjax.training.run import Run
from tests import buckets
from tests.training import runs

URL = "gs://bucket/some/run"


@pytest.fixture
def fake():
  with buckets.made() as made:
    yield made


@pytest.fixture
def no_folder_stays(tmp_path, monkeypatch):
  """Copies are made in `tmp_path / "tmp"`, where none is left."""
  (tmp_path / "tmp").mkdir()
  monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
  yield
  assert not list((tmp_path / "tmp").iterdir())


def test_a_run_leaves_in_a_bucket_what_one_leaves_here(
  fake, finished, config, run_once, tmp_path, no_folder_stays, capsys
):
  """To the bit, named in its contents; again it returns the result, and it labels as it did."""
  result = run_once(config(), URL, traced=3)
  assert f"traced steps 3 to 5: {URL}/profile for" in capsys.readouterr().out
  held = fake.objects(URL)
  assert json.loads(held["result.json"]) == result
  contents = json.loads(held.pop(mirror.RECORD))
  assert contents["files"] == sorted(held) and not {*contents["loose"]} & {*held}
  assert fake.asked[-1] == ("write", "/bucket/some/run/result.json")
  runs.assert_same(fake.copy_to(URL, tmp_path / "copy"), finished[0])
  for name in ("tensorboard", "profile/plugins/profile"):
    assert len(list((tmp_path / "copy" / name).iterdir())) == 1
  asked = len(fake.asked)
  assert run_once(config(), URL + "/") == result
  texts = ["the match was won", "shares of the bank"]
  np.testing.assert_array_equal(Predictor(URL).logits(texts), Predictor(finished[0]).logits(texts))
  assert {kind for kind, _ in fake.asked[asked:]} == {"read"}


def states(folder):
  """What a run leaves one after the other, small: makes each in `folder` when it is asked for."""
  checkpoints = folder / "checkpoints"

  def save(name, step):
    for old in (checkpoints / name).glob("*"):
      shutil.rmtree(old)
    for file in ("arrays/d/data", "meta/metadata"):
      path = checkpoints / name / str(step) / file
      path.parent.mkdir(parents=True)
      path.write_text(f"{name} {step}")

  for step in (4, 8, 12):
    save("latest", step)
    if step != 8:
      save("best", step)
    with (folder / "metrics.jsonl").open("a") as file:
      file.write(f'{{"step": {step}}}\n')
    (folder / "run.lock").write_text("this machine's")
    (checkpoints / "latest" / f"{step}.orbax-checkpoint-tmp").mkdir()
    yield
  (folder / "result.json").write_text("{}")
  yield


def trained(folder):
  """Goes through all states, each kept; returns what `Mirror` pulls before, and of each."""
  folder.mkdir()
  place = Mirror(URL, folder, Peers())
  place.claim()
  for _ in states(folder):
    place.keep(lambda: None)


def pulled(folder):
  """What a start would find, without rows after its checkpoint; nothing may be loose for good."""
  folder.mkdir()
  place = Mirror(URL, folder, Peers())
  found = runs.contents(folder)
  step = place.newest() or 0
  rows = found.pop("metrics.jsonl", b"").decode().splitlines()
  kept = [row for row in rows if json.loads(row)["step"] <= step]
  return {name: x for name, x in found.items() if x is not None}, kept, step


def test_killed_at_any_call_it_leaves_the_state_before_or_after(fake, tmp_path):
  """Never a part of one; and no object that its contents do not name."""
  trained(tmp_path / "whole")
  count = len(fake.asked)
  assert count > 40
  wanted = {}  # what each step leaves
  for names, step in (((), 0), ((4, 4), 4), ((8, 4), 8), ((12, 12), 12)):
    wanted[step] = {
      f"checkpoints/{name}/{at}/{file}": f"{name} {at}".encode()
      for name, at in zip(("latest", "best"), names, strict=False)
      for file in ("arrays/d/data", "meta/metadata")
    }
  reached = []
  for at in range(count + 1):
    fake.store.clear()
    fake.asked, fake.kill_at = [], at
    if at < count:
      with pytest.raises(buckets.Killed):
        trained(tmp_path / f"killed{at}")
    else:
      trained(tmp_path / f"killed{at}")
    fake.kill_at = None
    found, rows, step = pulled(tmp_path / f"found{at}")
    result = found.pop("result.json", None)
    assert found == wanted[step], at
    assert len(rows) == step / 4 and (result is None or step == 12)
    held = fake.objects(URL)
    if held:
      contents = json.loads(held.pop(mirror.RECORD))
      assert {*held} <= {*contents["files"], *contents["loose"]}, at
      assert "result.json" not in held or held.keys() == {*contents["files"]}  # it comes last
    reached.append((step, result is not None))
  assert reached == sorted(reached) and {*reached} == {(s, False) for s in wanted} | {(12, True)}


_SLOW = pytest.mark.slow(reason="3 s each")


@_SLOW
@pytest.mark.parametrize("at", range(0, 600, 19))
def test_a_killed_run_goes_on_to_the_same_bits(
  at, fake, finished, config, run_once, tmp_path, no_folder_stays
):
  """Killed once more on the way."""
  for kill in (at, at + 30):
    fake.asked, fake.kill_at = [], kill
    try:
      run_once(config(train__save_every=1), URL)
      break
    except buckets.Killed:
      continue
  fake.kill_at = None
  run_once(config(train__save_every=1), URL)
  copy = fake.copy_to(URL, tmp_path / "copy")
  change = {"config": json.loads(config(train__save_every=1).to_json())}
  assert runs.result(copy) == {**runs.result(finished[0]), **change}
  assert runs.rows(copy) == runs.rows(finished[0])
  held = fake.objects(URL)
  assert {*held} - {mirror.RECORD} == {*json.loads(held[mirror.RECORD])["files"]}


@pytest.mark.slow(reason="a law of killed runs, for a failure of another kind")
def test_a_run_that_failed_between_best_and_latest_begins_anew(
  fake, finished, config, run_once, monkeypatch, tmp_path
):
  """Its best, which is there without a latest, is none to go on from."""
  save = Checkpoints.save

  def broken(self, name, step, arrays, meta):
    if name == "latest":
      raise RuntimeError
    save(self, name, step, arrays, meta)

  with monkeypatch.context() as patch:
    patch.setattr(Checkpoints, "save", broken)
    with pytest.raises(RuntimeError):
      run_once(config(), URL)
  assert any(name.startswith("checkpoints/best/4/") for name in fake.objects(URL))
  run_once(config(), URL)
  runs.assert_same(fake.copy_to(URL, tmp_path / "copy"), finished[0])


def test_rows_of_a_run_that_fails_are_kept(fake, config, run_once, monkeypatch, no_folder_stays):
  """With the name of the bucket, and what is left there, in its message."""
  place = Run.place

  def broken(self, batch):
    if self.steps_done == 6:
      raise FloatingPointError("the loss is not finite.")
    return place(self, batch)

  monkeypatch.setattr(Run, "place", broken)
  with pytest.raises(FloatingPointError, match="last good checkpoint, of step 4, is kept"):
    run_once(config(), URL)
  rows = fake.objects(URL)["metrics.jsonl"].decode().splitlines()
  assert json.loads(rows[-1])["step"] > 4


def test_the_one_that_was_started_last_goes_on(fake, tmp_path):
  """The other one ends at its next save, and changes nothing; so does one that starts too late."""
  (tmp_path / "a").mkdir()
  (tmp_path / "b").mkdir()
  first, late = Mirror(URL, tmp_path / "a", Peers()), Mirror(URL, tmp_path / "b", Peers())
  first.claim()
  with pytest.raises(lock.Held, match=r"has changed since.*: process \d+ on .* Start it again"):
    late.claim()
  second = Mirror(URL, tmp_path / "b", Peers())
  second.claim()
  (tmp_path / "a" / "metrics.jsonl").write_text("{}\n")
  before = fake.objects(URL)
  with pytest.raises(lock.Held, match=r"no longer this process's: process \d+") as error:
    first.keep(lambda: None)
  assert len(str(error.value).splitlines()) == 1 and fake.objects(URL) == before
  second.keep(lambda: None)


@pytest.mark.parametrize("refused", ["read", "write"])
def test_a_bucket_that_refuses_is_a_sentence_before_the_first_step(
  refused, fake, config, run_once, monkeypatch, no_folder_stays
):
  monkeypatch.setattr(Run, "steps", lambda self: pytest.fail("it trains"))
  fake.refused = (refused,)
  with pytest.raises(disk.DiskError, match=r"gs://bucket/.* cannot be .*403.*gcloud auth") as error:
    run_once(config(), URL)
  assert len(str(error.value).splitlines()) == 1 and not fake.store


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_what_is_not_installed_is_named(scheme, config, no_folder_stays):
  name = {"gs": "gcsfs", "s3": "s3fs"}[scheme]
  if importlib.util.find_spec(name) or importlib.util.find_spec("tensorflow"):
    pytest.skip(f"{name} is installed")
  extra = bucket.SCHEMES[scheme][0]
  for start in (lambda url: loop.train_and_evaluate(config(), url), Predictor):
    with pytest.raises(ValueError, match=rf"pip install 'peftjax\[{extra}\]'"):
      start(f"{scheme}://bucket/run")


@pytest.mark.parametrize(
  ("change", "told"),
  [
    (lambda fake: fake.pipe(f"{URL}/{mirror.RECORD}", b"{"), "readable JSON"),
    (lambda fake: fake.pipe(f"{URL}/{mirror.RECORD}", b'{"files": []}'), "it lacks"),
    (lambda fake: fake.rm_file(f"{URL}/checkpoints/latest/8/meta/metadata"), "metadata is gone"),
    (lambda fake: fake.rm_file(f"{URL}/{mirror.RECORD}"), "there is a config.json"),
    (
      lambda fake: fake.pipe(
        f"{URL}/{mirror.RECORD}",
        fake.cat(f"{URL}/{mirror.RECORD}").replace(b'"config.json"', b'"../config.json"'),
      ),
      "is not a name of a file of a run",
    ),
    (lambda fake: fake.pipe(f"{URL}/result.json", b"[]"), f"{URL}/result.json must hold"),
  ],
)
def test_what_is_damaged_in_a_bucket_is_named(change, told, fake, config, no_folder_stays, kept):
  fake.store |= kept
  change(fake)
  before = fake.objects(URL)
  with pytest.raises(ValueError, match=told) as error:
    loop.train_and_evaluate(config(), URL)
  assert URL in str(error.value) and fake.objects(URL) == before


@pytest.fixture(scope="module")
def kept(run_once, config):
  """The objects of a finished run."""
  with buckets.made() as fake:
    run_once(config(), URL)
    return dict(fake.store)


def test_what_is_removed_in_a_bucket_is_made_again_as_here(
  fake, config, run_once, kept, finished, tmp_path
):
  fake.store |= kept
  fake.rm_file(f"{URL}/result.json")
  run_once(config(), URL)
  runs.assert_same(fake.copy_to(URL, tmp_path / "copy"), finished[0])


def test_an_empty_bucket_holds_no_run(fake):
  with pytest.raises(ValueError, match=f"^{URL} holds no evaluated run") as error:
    Predictor(URL)
  assert f"--workdir={URL}" in str(error.value)


def test_commands_that_need_a_folder_refuse_a_bucket():
  with pytest.raises(ValueError, match="works in a local folder") as error:
    build.resolve(URL)
  assert len(str(error.value).splitlines()) == 1
