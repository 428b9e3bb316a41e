"""History: which records a text names, git's order, and the commits that shift a level."""

import dataclasses
import json
import shutil
import subprocess

import pytest
from samples import failed, passed

from peftbench import load_records
from peftbench.commits import Commit, commits_in_order
from peftbench.history import History, HistoryError, Side, read_side, trace
from peftbench.metrics import METRICS
from peftbench.records import Predictions, Store, make_run_id
from peftbench.summary import Summary, phase_report

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
    side = History.from_outputs(store.outputs, folder).select(ids[0])
    left_out = f"1 with uncommitted changes left out (to use one, name its id): {dirty.run_id}"
    assert ([clean], f"commit {ids[0][:12]}; {left_out}") == (list(side.records), side.label)


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
            "'no-such' is not a file, a folder, 'latest', a run in .*, or a commit .*; runs are 20260101T000000Z-aaaaaa",
        ),
        ("--all", "is not a file"),
    ],
)
def test_what_names_nothing_is_said(repository, store, text, message):
    """With what there is."""
    folder, ids = repository
    keep(store, ids[0])
    with pytest.raises(HistoryError, match=message):
        History.from_outputs(store.outputs, folder).select(text)


def test_a_run_that_cannot_be_read_is_named(repository, store):
    """By its own id, and where its commit is looked for."""
    folder, ids = repository
    keep(store, ids[0])
    broken = store.record_path(keep(store, ids[1], day=2))
    broken.write_text("{")
    history = History.from_outputs(store.outputs, folder)
    with pytest.raises(HistoryError, match=f"no record in {broken.parent} can be read; the first problem: .*: not JSON"):
        history.select(broken.parent.name)
    with pytest.raises(HistoryError, match=f"no run .*; no record that can be read says the commit of {broken.parent.name}$"):
        history.select(ids[1])


def test_a_run_whose_folder_was_renamed_stays_in_its_place(store, tmp_path):
    """A name that a person gave it names it, and the latest is the run that began last."""
    first, last = keep(store, "c1", day=1), keep(store, "c2", day=2)
    store.record_path(first).parent.rename(store.runs / "the-baseline")
    history = History.from_outputs(store.outputs, tmp_path)
    assert ["the-baseline", last.run_id] == list(history.files)
    assert [first] == list(history.select("the-baseline").records)
    assert [last] == list(history.select("latest").records)


def test_a_run_that_was_copied_counts_once(store, tmp_path):
    """The copy can be named, too."""
    records = [keep(store, "c1", day=day) for day in (1, 2)]
    shutil.copytree(store.record_path(records[1]).parent, store.runs / "kept")
    history = History.from_outputs(store.outputs, tmp_path)
    assert records == sorted(history.everything().records, key=lambda record: record.run_id)
    assert f"latest run {records[1].run_id}" == history.select("latest").label
    assert [records[1]] == list(history.select("kept").records)


def test_what_a_renamed_run_has_resumed_stays_what_it_is(store, tmp_path):
    """Only its own records are its own: a case that failed in the run that it resumed does not take the place of its pass."""
    first = keep(store, "c1", day=1)
    lost = failed("C1-full", run=first.run_id)
    store.save(lost)
    repeated = keep(store, "c1", day=3, phase_id="C1-full")
    store.link(first, repeated.run_id)
    keep(store, "c1", day=2)
    store.record_path(repeated).parent.rename(store.runs / "final")
    history = History.from_outputs(store.outputs, tmp_path)
    assert [first, repeated] == list(history.select("final").records)
    assert [first, repeated] == list(history.select("latest").records)


def test_the_repository_is_where_git_knows_the_runs(repository, store, tmp_path, monkeypatch):
    """The current one, or else that of the outputs."""
    folder, ids = repository
    outputs = shutil.copytree(keep(store, ids[1]) and store.outputs, folder / "outputs")
    monkeypatch.chdir(tmp_path)
    assert 1 == len(History.from_outputs(outputs).select(ids[1][:8]).records)
    assert outputs == History.from_outputs(outputs).repository
    monkeypatch.chdir(folder)
    assert folder == History.from_outputs(store.outputs).repository.resolve()


def test_a_commit_that_was_not_measured_is_told_with_the_one_before_it_that_was(repository, store):
    """For a job whose base was never run."""
    folder, ids = repository
    keep(store, ids[1])
    with pytest.raises(HistoryError, match=f"the nearest commit before it that was measured is {ids[1][:12]}"):
        History.from_outputs(store.outputs, folder).select("HEAD")


def test_an_empty_text_is_told_to_be_empty():
    """As from a variable of a job that was never set."""
    with pytest.raises(HistoryError, match="got an empty text"):
        read_side("", History)


def test_a_run_that_is_named_can_be_given(store, tmp_path):
    """A message has the whole id."""
    run = make_run_id()
    store.save(passed(run=run))
    history = History.from_outputs(store.outputs, tmp_path)
    with pytest.raises(HistoryError) as caught:
        history.select("no-such")
    assert [run] == [record.run_id for record in history.select(str(caught.value).rpartition("runs are ")[2]).records]


def test_a_shallow_clone_is_told(repository, store, tmp_path):
    """As the commit may be one that it does not have."""
    folder, ids = repository
    keep(store, ids[-1])
    git(tmp_path, "clone", "-q", "--depth", "1", folder.as_uri(), "shallow")
    history = History.from_outputs(store.outputs, tmp_path / "shallow")
    assert 1 == len(history.select("HEAD").records)
    with pytest.raises(HistoryError, match="this clone is shallow: git fetch --unshallow"):
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
    bad.with_name("._y.json").write_bytes(b"\x00\x05\x16\x07")  # what macOS puts beside files on foreign disks is none
    assert 2 == len(list(store.records()))
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


@pytest.fixture
def report(store):
    """The report of a phase over three seeds, of which the last is much better; returns its path and the records."""
    records = [keep(store, "c" * 40, seed=seed, wrong=range(wrong)) for seed, wrong in ((42, 100), (43, 100), (44, 10))]
    return store.publish("B", phase_report(Summary(records))), records


def test_a_report_over_several_seeds_is_read_as_its_records(store, report):
    """Its figures are means beside the last seed's predictions; the folder of reports and the file name the same records."""
    path, records = report
    for text in (path, path.parent):
        side = read_side(str(text), lambda: None)
        assert records == list(side.records)
        assert [store.record_path(record) for record in records] == list(side.files.values())


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (
            "moved",
            r"phase_b_metrics\.json: a report over several seeds, whose record .*B-lora-mini-s42\.json is missing; give the run's",
        ),
        (None, "a report over several seeds that does not name its records; give the run's folder instead"),
        ([{"run_id": 3, "case": "x"}], "does not name its records"),
        ([{"run_id": "../..", "case": "x"}], "is missing"),
    ],
)
def test_a_report_without_its_records_is_said(report, records, message):
    """The file that is missing, and what to compare instead."""
    path, _ = report
    if records == "moved":
        (path.parent.parent / "runs").rename(path.parent.parent / "elsewhere")
    else:
        path.write_text(json.dumps({**json.loads(path.read_text()), "records": records}))
    with pytest.raises(HistoryError, match=message):
        read_side(str(path), lambda: None)


def test_of_a_report_the_seeds_that_failed_are_read_too(store):
    """One that passed and one that failed are two records, though the figures are those of the first."""
    records = [keep(store, "c" * 40), failed(seed=43, run="20260101T000000Z-aaaaaa")]
    store.save(records[1])
    path = store.publish("B", phase_report(Summary(records)))
    assert records == list(read_side(str(path), lambda: None).records)


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_that_only_tiny_runs_have_is_named(tmp_path, exists):
    """The folder of outputs or one in it, there or not; nothing is said of tiny folders without records."""
    Store(tmp_path / "outputs", "tiny").publish("B", phase_report(Summary([passed(scale="tiny")])))
    (tmp_path / "outputs/tiny/cache").mkdir()
    for name in ("reports", "cache") if exists else ():
        (tmp_path / "outputs" / name).mkdir()
    hints = {}
    for name in ("outputs", "outputs/reports", "outputs/cache"):
        with pytest.raises(HistoryError) as caught:
            read_side(str(tmp_path / name), lambda: History.from_outputs(tmp_path / "nowhere"))
        hints[name] = str(caught.value).partition("; there are records of the tiny scale in ")[2]
    tiny = tmp_path / "outputs/tiny"
    assert {"outputs": str(tiny), "outputs/reports": str(tiny / "reports"), "outputs/cache": ""} == hints


def test_what_was_interrupted_is_as_if_it_had_not_begun(tmp_path):
    """A later interruption replaces no result, and is no failure of its commit; where it is all there is, it is told."""
    ended = failed(run="20260109T000000Z-bbbbbb", error="KeyboardInterrupt", commit={"id": "c" * 40, "dirty": False})
    whole = at("c" * 40, 1)
    assert [whole] == Side("both", [whole, ended]).latest
    assert [ended] == Side("one", [ended]).latest
    [point] = points_of([whole, ended], "accuracy", COMMITS)
    assert ([], 1) == (point.marks, point.passed)


def points_of(records, metric, commits):
    [points] = trace(records, METRICS[metric], commits).values()
    return points


def at(commit, day, **changes):
    return passed(run=f"202601{day:02d}T000000Z-aaaaaa", commit={"id": commit, "dirty": False, "changes": None}, **changes)


COMMITS = [Commit(letter * 40, f"step {letter}") for letter in "abcde"]


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
    records = [at(commit.id, day, wrong=range(5 * day - 5)) for day, commit in enumerate(COMMITS, start=1)]
    assert [None, None, "worse", None, "worse"] == [point.shift for point in points_of(records, "accuracy", COMMITS)]


def test_a_slower_loop_shifts_the_level_of_time():
    """By half, where single measurements may differ by a quarter."""
    seconds = {"a": 60, "b": 66, "c": 93, "d": 90, "e": 95}
    records = [at(letter * 40, day, seconds=seconds[letter]) for day, letter in enumerate("abcde", start=1)]
    assert [None, None, "worse", None, None] == [point.shift for point in points_of(records, "train_runtime_seconds", COMMITS)]


def test_commits_of_other_branches_take_no_part_in_the_level(repository):
    """One that was never merged is shown and marked, and its loss is no shift; once merged, it is."""
    folder, ids = repository
    git(folder, "checkout", "-q", "-b", "experiment", "HEAD~2")
    git(folder, "commit", "-q", "--allow-empty", "-m", "experiment")
    experiment = git(folder, "rev-parse", "HEAD")
    git(folder, "checkout", "-q", "-")
    records = [at(one, day, wrong=LOST if one == experiment else ()) for day, one in enumerate([*ids, experiment], start=1)]
    points = points_of(records, "accuracy", commits_in_order(folder))
    assert [None] * 6 == [point.shift for point in points]
    assert {experiment: ["other branch"]} == {point.commit: point.marks for point in points if point.marks}

    git(folder, "merge", "-q", "--no-ff", "-m", "merge", "experiment")
    points = points_of(records, "accuracy", commits_in_order(folder))
    assert "worse" in [point.shift for point in points if point.commit == experiment]
    assert [] == [mark for point in points for mark in point.marks]


def test_machines_that_alternate_have_a_level_each():
    """The loop gets slower by half at the fourth commit: said once, though the other machine sees it at the fifth only."""
    machines, seconds = "mnmnmnmn", [60, 90, 61, 135, 90, 134, 91, 60]
    commits = [Commit(letter * 40, letter) for letter in "abcdefgh"]
    records = [
        at(commit.id, day, machine={"id": machine}, seconds=s)
        for day, (commit, machine, s) in enumerate(zip(commits, machines, seconds, strict=True), start=1)
    ]
    points = points_of(records, "train_runtime_seconds", commits)
    assert [None, None, None, "worse", None, None, None, "better"] == [point.shift for point in points]
    assert [[], *[["other machine"]] * 7] == [point.marks for point in points]


def test_a_commit_measured_on_two_machines_is_judged_on_each():
    """The second machine's runs do not hide that the first one got slower."""
    records = [at(c * 40, day, machine={"id": m}, seconds=s) for day, (c, m, s) in enumerate([("a", "m", 60), ("a", "n", 20)])]
    records += [at("b" * 40, day, machine={"id": m}, seconds=s) for day, (m, s) in enumerate([("m", 90), ("n", 20)], start=3)]
    assert [None, "worse"] == [point.shift for point in points_of(records, "train_runtime_seconds", COMMITS)]


def test_seeds_alternate_like_machines():
    """A nightly run of three seeds between runs of one: those that a commit shares with the level are compared."""
    records = []
    for day, commit in enumerate(COMMITS, start=1):
        records += [at(commit.id, day, seed=seed, wrong=LOST if day > 2 else ()) for seed in ((42, 43, 44) if day % 2 else (42,))]
    points = points_of(records, "accuracy", COMMITS)
    assert [None, None, "worse", None, None] == [point.shift for point in points]
    assert [[], *[["other seed set"]] * 4] == [point.marks for point in points]


def test_seeds_that_are_added_hide_no_loss():
    """One seed before, three from the commit on that loses; the second one failed once in between."""
    records = [at("a" * 40, 1), at("b" * 40, 2), *(at("c" * 40, 3, seed=seed, wrong=LOST) for seed in (42, 43, 44))]
    assert [None, None, "worse"] == [point.shift for point in points_of(records, "accuracy", COMMITS)]
    records = [at("a" * 40, 1, seed=seed) for seed in (42, 43, 44)]
    records += [at("b" * 40, 2, seed=seed, wrong=LOST) for seed in (42, 44)]
    records += [at("c" * 40, 3, seed=seed, wrong=LOST) for seed in (42, 43, 44)]
    assert [None, "worse", None] == [point.shift for point in points_of(records, "accuracy", COMMITS)]


def test_what_was_not_committed_moves_no_level():
    """A loss in an experiment, or at a commit that git does not know, and the next commit has it no more: nothing shifted."""
    experiment = dataclasses.replace(at("a" * 40, 2, wrong=LOST), commit={"id": "a" * 40, "dirty": True, "changes": "abc"})
    for odd, mark in ((experiment, "dirty"), (at("f" * 40, 2, wrong=LOST), "unknown")):
        points = points_of([at("a" * 40, 1), odd, at("b" * 40, 3), at("c" * 40, 4, wrong=LOST)], "accuracy", COMMITS)
        assert [None, None, None, "worse"] == [point.shift for point in points]
        assert [[], [mark], [], []] == [point.marks for point in points]


def test_where_nothing_is_committed_the_runs_have_levels():
    """Without git, and in a tree that is never clean, they are all there is."""
    records = [dataclasses.replace(at("x", day, wrong=LOST if day > 1 else ()), commit={"id": None}) for day in (1, 2, 3)]
    assert [None, "worse", None] == [point.shift for point in points_of(records, "accuracy", [])]
    records = [dataclasses.replace(one, commit={"id": "a" * 40, "changes": one.run_id}) for one in records]
    assert [None, "worse", None] == [point.shift for point in points_of(records, "accuracy", COMMITS)]


def test_a_loss_after_a_recovery_is_told_though_another_machine_told_the_one_before():
    """One machine got worse and better again before the other, which last measured before both, gets worse at the fifth commit."""
    days = [("a", "n", 60), ("b", "m", 60), ("c", "m", 90), ("d", "m", 60), ("e", "n", 90)]
    records = [at(c * 40, day, machine={"id": m}, seconds=s) for day, (c, m, s) in enumerate(days, start=1)]
    points = points_of(records, "train_runtime_seconds", COMMITS)
    assert [None, None, "worse", "better", "worse"] == [point.shift for point in points]


def test_repeats_of_a_commit_are_its_runs():
    """Ten percent shows in three steady runs a commit, and not in three seeds of one run."""
    for several_runs, expected in ((True, "worse"), (False, None)):
        records = [
            at(letter * 40, 3 * i + (j if several_runs else 0), seed=42 if several_runs else 42 + j, seconds=s + j / 10)
            for i, (letter, s) in enumerate([("a", 60), ("b", 66)])
            for j in (1, 2, 3)
        ]
        assert [None, expected] == [point.shift for point in points_of(records, "train_runtime_seconds", COMMITS)]


def test_other_memory_before_starts_another_level():
    """What earlier cases left behind counts towards the peak."""
    before = [2**20, 2**20, 2**29, 2**29]
    records = [at(c.id, day, memory_before_bytes=b) for day, (c, b) in enumerate(zip(COMMITS, before, strict=False), start=1)]
    points = points_of(records, "peak_memory_bytes", COMMITS)
    assert [[], [], ["other memory in use before the case"], []] == [point.marks for point in points]


def test_a_phase_that_is_always_wrong_is_shown():
    """Zero is a value."""
    useless = Predictions.from_labels([0] * 10, [1] * 5 + [0] * 5, split_fingerprint="x")
    [point] = points_of([at("a" * 40, 1, predictions={"dev": useless})], "f1", COMMITS)
    assert 0.0 == point.value


def test_a_seed_without_predictions_is_left_out_and_said():
    """It hides no loss of the other seed, there or later, and does not end the command where two commits share no other."""
    silent = {"seed": 43, "predictions": {}}
    records = [at("a" * 40, 1), at("a" * 40, 1, **silent), at("b" * 40, 2, seed=43), at("c" * 40, 3, wrong=LOST)]
    records += [at("c" * 40, 3, **silent), at("d" * 40, 4, **silent)]
    points = points_of(records, "accuracy", COMMITS)
    assert [None, None, "worse", None] == [point.shift for point in points]
    said = [[mark for mark in point.marks if "predictions" in mark] for point in points]
    assert [["no predictions for seed 43"], [], ["no predictions for seed 43"], ["no predictions for seed 43"]] == said
    assert [2, 1, 2, 1] == [point.passed for point in points]


def test_marks_tell_what_is_unusual():
    """Another machine, uncommitted changes, a failure, a commit that git does not know."""
    dirty = dataclasses.replace(at("b" * 40, 2), commit={"id": "b" * 40, "dirty": True, "changes": "abc"})
    broken = failed(run="20260104T000000Z-aaaaaa", commit={"id": "d" * 40, "dirty": False, "changes": None})
    records = [at("a" * 40, 1), dirty, at("c" * 40, 3, machine={"id": "m2"}), broken, at("f" * 40, 5, machine={"id": "m2"})]
    marks = [list(point.marks) for point in points_of(records, "latency_ms", COMMITS)]
    assert [[], ["dirty"], ["other machine"], ["failed"], ["unknown"]] == marks


def test_a_commit_at_which_seeds_newly_fail_shifts_the_level():
    """Even if none is left that the level has; where they fail on, nothing is new, and a recovery is none."""
    broken = [failed(run=f"2026010{day}T000000Z-aaaaaa", seed=1, commit={"id": id_ * 40}) for day, id_ in ((2, "b"), (3, "c"))]
    others = [at("b" * 40, 2, seed=2), at("c" * 40, 3, seed=2), at("d" * 40, 4, seed=1)]
    points = points_of([at("a" * 40, 1, seed=1), *broken, *others], "accuracy", COMMITS)
    assert [None, "worse", None, None] == [point.shift for point in points]
    first = failed(run="20260101T000000Z-aaaaaa", seed=1, commit={"id": "a" * 40})
    swapped = [at("b" * 40, 2, seed=1), at("b" * 40, 2, seed=2), failed(run="20260103T000000Z-a", seed=2, commit={"id": "c" * 40})]
    points = points_of([first, *swapped, at("c" * 40, 3, seed=1)], "accuracy", COMMITS)
    assert [None, None, "worse"] == [point.shift for point in points]


def test_a_run_whose_changes_git_did_not_tell_gives_way_to_a_clean_one(repository, store):
    """And makes no level."""
    folder, ids = repository
    unsure = {"id": ids[0], "dirty": None, "changes": None, "problem": "slow"}
    record = passed(run="20260101T000000Z-aaaaaa", commit=unsure)
    store.save(record)
    side = History.from_outputs(store.outputs, folder).select(ids[0])
    assert ([record], f"commit {ids[0][:12]}, perhaps with uncommitted changes") == (list(side.records), side.label)
    clean = keep(store, ids[0], day=2)
    assert [clean] == list(History.from_outputs(store.outputs, folder).select(ids[0]).records)
    points = points_of([record, clean], "accuracy", commits_in_order(folder))
    assert [[], ["perhaps dirty"]] == [list(point.marks) for point in points]


def test_a_commit_that_failed_last_has_the_value_of_what_passed():
    """A failed record's own figures are in no value."""
    low = dataclasses.replace(at("a" * 40, 2, wrong=LOST), outcome="failed", error="AssertionError")
    [point] = points_of([at("a" * 40, 1), low], "accuracy", COMMITS)
    assert (1.0, 1, ["failed"]) == (point.value, point.passed, point.marks)


def test_load_records_gives_flat_rows(store):
    """A row a record, as pandas takes them; a bad file is warned of; groups that are empty give no column of their own."""
    path = store.record_path(keep(store, "c" * 40))
    path.with_name("bad.json").write_text("{")
    with pytest.warns(UserWarning, match=r"left out: .*bad\.json"):
        [row] = load_records(store.outputs)
    assert ("B-lora", "B-lora-mini-s42") == (row["id"], row["case"])
    assert not {"memory_use", "teacher_cost", "predictions", "learning_curve"} & set(row)
    assert ("B", 1.0, 1000, "m1") == (row["phase"], row["dev.accuracy"], row["parameter_counts.trainable"], row["machine.id"])
    assert not any(isinstance(value, dict) for value in row.values())
    assert 2 == len(row["dev.accuracy_ci95"])


def test_a_folder_of_reports_is_the_phases_alone(tmp_path):
    """What else lies there, such as the throughput beside a Trainer, is no record that could not be read."""
    (tmp_path / "phase_b_metrics.json").write_text(json.dumps(phase_report(Summary([passed()]))))
    (tmp_path / "throughput.json").write_text("[]")
    side = read_side(str(tmp_path), history=None)
    assert (["B-lora"], []) == ([record.phase_id for record in side.records], list(side.problems))
