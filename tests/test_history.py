"""History: which records a text names, git's order, and the commits that shift a level."""

import dataclasses
import json
import subprocess

import pytest
from samples import failed, passed

from peftbench import load_records
from peftbench.history import History, HistoryError, read_side, trace
from peftbench.metrics import METRICS
from peftbench.records import Store

LOST = range(45)


def git(folder, *arguments):
    command = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org", *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path):
    """A repository of five commits; returns it and their ids."""
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "-q")
    ids = []
    for number in range(5):
        git(folder, "commit", "-q", "--allow-empty", "-m", f"step {number}")
        ids.append(git(folder, "rev-parse", "HEAD"))
    return folder, ids


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "outputs", "mini")


def keep(store, commit, *, day=1, dirty=False, **changes):
    facts = {"id": commit, "dirty": dirty, "changes": "abc" if dirty else None}
    record = passed(run=f"202601{day:02d}T000000Z-aaaaaa", commit=facts, **changes)
    store.save(record)
    return record


def test_a_text_names_a_commit_a_run_the_latest_a_folder_or_a_file(repository, store):
    """Each gives the same record."""
    folder, ids = repository
    record = keep(store, ids[1])
    path = store.record_path(record)
    history = History.from_outputs(store.outputs, folder)
    for text in ("HEAD~3", ids[1], ids[1][:8], record.run_id, "latest", str(path.parent), str(path), str(store.outputs)):
        assert [record] == list(read_side(text, lambda: history).records), text


def test_a_commits_clean_runs_come_before_its_dirty_ones(repository, store):
    """Uncommitted changes count only where there is nothing else, and the label says so."""
    folder, ids = repository
    dirty = keep(store, ids[0], day=1, dirty=True)
    side = History.from_outputs(store.outputs, folder).select(ids[0])
    assert ([dirty], f"commit {ids[0][:12]}, with uncommitted changes") == (list(side.records), side.label)
    clean = keep(store, ids[0], day=2)
    assert [clean] == list(History.from_outputs(store.outputs, folder).select(ids[0]).records)


def test_a_folder_of_runs_is_a_side_and_so_is_a_run_of_the_tiny_scale(store):
    """By the folder that holds the runs, and by the run's id where the outputs have other runs, too."""
    record = keep(store, "c" * 40)
    tiny = dataclasses.replace(record, scale="tiny", run_id="20260102T000000Z-bbbbbb")
    Store(store.outputs, "tiny").save(tiny)
    history = History.from_outputs(store.outputs)
    assert [record] == list(read_side(str(store.runs), lambda: history).records)
    assert [tiny] == list(read_side(str(store.outputs / "tiny"), lambda: history).records)
    assert [tiny] == list(history.select(tiny.run_id).records)


def test_a_commit_means_its_other_runs(repository, store):
    """Those that are not to be compared with; if there are no others, those."""
    folder, ids = repository
    first, second = (keep(store, ids[0], day=day) for day in (1, 2))
    history = History.from_outputs(store.outputs, folder)
    assert [first, second] == list(history.select(ids[0]).records)
    assert [first] == list(history.select(ids[0], without={second.run_id}).records)
    assert [first, second] == list(history.select(ids[0], without={first.run_id, second.run_id}).records)


def test_without_git_a_record_tells_its_commit(store, tmp_path):
    """By the beginning of its id."""
    record = keep(store, "deadbeef" * 5)
    assert [record] == list(History.from_outputs(store.outputs, tmp_path).select("deadbee").records)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("HEAD", "no run in .* is of commit"),
        (
            "no-such",
            "'no-such' is no file, no folder, not 'latest', no run in .*, and no commit .*; runs are 20260101T000000Z-aaaaa",
        ),
        ("--all", "is no file"),
    ],
)
def test_what_names_nothing_is_said(repository, store, text, message):
    """With what there is."""
    folder, ids = repository
    keep(store, ids[0])
    with pytest.raises(HistoryError, match=message):
        History.from_outputs(store.outputs, folder).select(text)


def test_a_shallow_clone_is_told(repository, store, tmp_path):
    """As the commit may be one that it does not have."""
    folder, ids = repository
    keep(store, ids[-1])
    git(tmp_path, "clone", "-q", "--depth", "1", folder.as_uri(), "shallow")
    history = History.from_outputs(store.outputs, tmp_path / "shallow")
    assert 1 == len(history.select("HEAD").records)
    with pytest.raises(HistoryError, match="this clone is shallow, and git fetch --unshallow"):
        history.select("HEAD~3")


def test_a_folder_without_records_is_said(tmp_path):
    """With what to do."""
    with pytest.raises(HistoryError, match=r"no records in .*runs; run pytest benchmarks first"):
        History.from_outputs(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"benchmarks": []}',
        '{"schema_version": 99, "outcome": "passed"}',
        '{"a": NaN}',
        "9" * 5000,
        "[" * 100_000,
        "\x00",
    ],
)
def test_a_file_that_is_no_record_is_said(tmp_path, content):
    """And leaves no traceback."""
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(HistoryError, match=r"x\.json"):
        read_side(str(path), lambda: None)


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    """200 MB, which nobody's record has."""
    path = tmp_path / "x.json"
    with path.open("wb") as stream:
        stream.truncate(200_000_000)
    with pytest.raises(HistoryError, match="200000000 bytes are more than"):
        read_side(str(path), lambda: None)


def test_good_records_are_used_beside_bad_ones(store):
    """Each bad one is a problem that names its file."""
    record = keep(store, "c" * 40)
    bad = store.record_path(record).with_name("x.json")
    bad.write_text('{"outcome"')
    side = History.from_outputs(store.outputs).select("latest")
    assert [record] == list(side.records)
    [problem] = side.problems
    assert problem.startswith(str(bad))


def test_a_file_of_pytest_benchmark_gives_our_records(tmp_path):
    """From the entries' extra_info; entries of other tests are left alone."""
    record = passed()
    entries = [{"extra_info": {"peftbench": record.to_json()}}, {"extra_info": {}}, 3]
    path = tmp_path / "b.json"
    path.write_text(json.dumps({"benchmarks": entries}))
    assert [record] == list(read_side(str(path), lambda: None).records)


def points_of(records, metric, commits):
    [points] = trace(records, METRICS[metric], commits).values()
    return points


def at(commit, day, **changes):
    return passed(run=f"202601{day:02d}T000000Z-aaaaaa", commit={"id": commit, "dirty": False, "changes": None}, **changes)


COMMITS = [(letter * 40, f"step {letter}") for letter in "abcde"]


def test_commits_stand_in_gits_order_and_shifts_are_named():
    """Measured in another order than committed; the third commit loses 2.5 points and the fifth wins them back."""
    wrong = {"a": (), "b": range(2), "c": LOST, "d": range(46), "e": ()}
    records = [at(letter * 40, day, wrong=wrong[letter]) for day, letter in enumerate("edcba", start=1)]
    points = points_of(records, "accuracy", COMMITS)
    assert list("abcde") == [point.commit[0] for point in points]
    assert [None, None, "worse", None, "better"] == [point.shift for point in points]
    assert ["step a", 1.0] == [points[0].subject, points[0].value]


def test_a_slow_drift_shifts_the_level():
    """No commit loses enough to show beside the one before it: five more examples each, p of 0.06."""
    records = [at(commit, day, wrong=range(5 * day - 5)) for day, (commit, _) in enumerate(COMMITS, start=1)]
    assert [None, None, "worse", None, "worse"] == [point.shift for point in points_of(records, "accuracy", COMMITS)]


def test_a_slower_loop_shifts_the_level_of_time():
    """By half, where single measurements may differ by a quarter."""
    seconds = {"a": 60, "b": 66, "c": 93, "d": 90, "e": 95}
    records = [at(letter * 40, day, seconds=seconds[letter]) for day, letter in enumerate("abcde", start=1)]
    assert [None, None, "worse", None, None] == [point.shift for point in points_of(records, "train_runtime_seconds", COMMITS)]


def test_marks_tell_what_is_unusual():
    """Another machine, uncommitted changes, a failure, a commit that git does not know."""
    dirty = dataclasses.replace(at("b" * 40, 2), commit={"id": "b" * 40, "dirty": True, "changes": "abc"})
    broken = failed(run="20260104T000000Z-aaaaaa", commit={"id": "d" * 40, "dirty": False, "changes": None})
    records = [at("a" * 40, 1), dirty, at("c" * 40, 3, machine={"id": "m2"}), broken, at("f" * 40, 5, machine={"id": "m2"})]
    marks = [list(point.marks) for point in points_of(records, "latency_ms", COMMITS)]
    assert [[], ["dirty"], ["other machine"], ["failed"], ["unknown"]] == marks


def test_a_commit_that_failed_last_has_the_value_of_what_passed():
    """A failed record's own figures are in no value."""
    low = dataclasses.replace(at("a" * 40, 2, wrong=LOST), outcome="failed", error="AssertionError")
    [point] = points_of([at("a" * 40, 1), low], "accuracy", COMMITS)
    assert (1.0, ["failed"]) == (point.value, point.marks)


def test_load_records_gives_flat_rows(store):
    """A row a record, as pandas takes them; a bad file is warned of; groups that are empty give no column of their own."""
    path = store.record_path(keep(store, "c" * 40))
    path.with_name("bad.json").write_text("{")
    with pytest.warns(UserWarning, match=r"left out: .*bad\.json"):
        [row] = load_records(store.outputs)
    assert ("B-lora", "B-lora-mini-s42") == (row["id"], row["case"])
    assert not {"memory_use", "teacher_cost", "predictions", "learning_curve"} & set(row)
    assert ("B", 1.0, 1000, "m1") == (row["phase"], row["dev.accuracy"], row["parameter_counts.trainable"], row["machine.id"])
    assert not any(isinstance(value, dict | list) for value in row.values())
