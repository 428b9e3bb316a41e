"""History: which records a text names."""

import dataclasses
import json
import shutil

import pytest
from samples import failed, git, passed

from peftbench import load_records
from peftbench.history import History, HistoryError, Side, read_side
from peftbench.store import Store, make_run_id
from peftbench.summary import Summary, phase_report


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
    for name in ("the-baseline", "2027-01"):
        next(path.parent for path in store.runs.glob("*/*.json") if path.parent.name != last.run_id).rename(store.runs / name)
        history = History.from_outputs(store.outputs, tmp_path)
        assert [name, last.run_id] == list(history.files)
        assert [first] == list(history.select(name).records)
        assert [last] == list(history.select("latest").records)


def test_a_renamed_head_is_no_run_of_its_base(store, tmp_path):
    """By its records, not by its folder's name."""
    base, head = keep(store, "c" * 40, day=1), keep(store, "c" * 40, day=2)
    store.record_path(head).parent.rename(store.runs / "candidate")
    history = History.from_outputs(store.outputs, tmp_path)
    assert [base] == list(history.select("c" * 40, without={head.run_id}).records)


def test_what_was_resumed_is_found_in_a_renamed_folder(store, tmp_path):
    """The run that resumed it names the run, not the folder."""
    first, second = keep(store, "c1", day=1), keep(store, "c1", day=2, phase_id="C1-full")
    store.link(first, second.run_id)
    store.record_path(first).parent.rename(store.runs / "baseline")
    history = History.from_outputs(store.outputs, tmp_path)
    assert [first, second] == list(history.select("latest").records)
    side = history.select(first.run_id)
    assert ([first], f"run {first.run_id}, in folder baseline") == (list(side.records), side.label)


def test_what_a_record_says_of_itself_leads_nowhere_else(store, tmp_path):
    """A run's id that is a path, or too long for one, and a commit that no system takes."""
    for number, run_id in enumerate(("../../elsewhere", "x" * 300)):
        (store.runs / f"odd-{number}").mkdir(parents=True)
        record = passed(run=run_id, commit={"id": "a\0b"})
        (store.runs / f"odd-{number}" / f"{record.case}.json").write_text(json.dumps(record.to_json()))
    assert {"odd-0", "odd-1"} == set(History.from_outputs(store.outputs).files)
    assert 2 == len(History.from_outputs(store.outputs).everything().records)


def test_a_run_that_was_copied_counts_once(store, tmp_path):
    """The copy can be named, too."""
    records = [keep(store, "c1", day=day) for day in (1, 2)]
    original = store.record_path(records[1])
    shutil.copytree(original.parent, store.runs / "kept")
    history = History.from_outputs(store.outputs, tmp_path)
    assert records == sorted(history.everything().records, key=lambda record: record.run_id)
    assert f"latest run {records[1].run_id}" == history.select("latest").label
    assert [records[1]] == list(history.select("kept").records)
    original.write_text("{")
    assert [records[1]] == list(History.from_outputs(store.outputs, tmp_path).select("kept").records)
    original.parent.rename(store.runs / "original")
    shutil.copy(store.runs / "kept" / original.name, store.runs / "original")
    everything = History.from_outputs(store.outputs, tmp_path).everything()
    assert (2, "all 2 runs") == (len(everything.records), everything.label[:10])


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
    """The current one if it does, or else that of the outputs."""
    folder, ids = repository
    keep(store, ids[1])
    outputs = shutil.copytree(store.outputs, folder / "outputs")
    monkeypatch.chdir(tmp_path)
    assert outputs == History.from_outputs(outputs).repository
    assert 1 == len(History.from_outputs(outputs).select(ids[1][:8]).records)
    for current in (folder, shutil.copytree(folder / ".git", tmp_path / "clone" / ".git").parent):
        monkeypatch.chdir(current)
        assert current == History.from_outputs(outputs).repository.resolve()


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


def test_of_several_attempts_in_a_file_of_pytest_benchmark_the_last_counts(tmp_path):
    """It holds an entry for each, where a plugin runs a failed test again."""
    attempts = [passed(outcome="failed", error="RuntimeError: no"), passed()]
    path = tmp_path / "b.json"
    path.write_text(json.dumps({"benchmarks": [{"extra_info": {"peftbench": record.to_json()}} for record in attempts]}))
    assert attempts[1:] == list(read_side(str(path), lambda: None).records)


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


def test_what_was_interrupted_gives_way(tmp_path):
    """A later interruption replaces no result; where it is all there is, it is told."""
    ended, whole = failed(run="20260109T000000Z-bbbbbb", error="KeyboardInterrupt"), passed()
    ended = dataclasses.replace(ended, phase=whole.phase, name=whole.name)
    assert [whole] == Side(label="both", records=[whole, ended]).latest
    assert [ended] == Side(label="one", records=[ended]).latest


def test_a_run_whose_changes_git_did_not_tell_gives_way_to_a_clean_one(repository, store):
    """It counts only where there is no other of the commit."""
    folder, ids = repository
    unsure = {"id": ids[0], "dirty": None, "changes": None, "problem": "slow"}
    record = passed(run="20260101T000000Z-aaaaaa", commit=unsure)
    store.save(record)
    side = History.from_outputs(store.outputs, folder).select(ids[0])
    assert ([record], f"commit {ids[0][:12]}, perhaps with uncommitted changes") == (list(side.records), side.label)
    clean = keep(store, ids[0], day=2)
    assert [clean] == list(History.from_outputs(store.outputs, folder).select(ids[0]).records)


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


def test_a_run_is_of_its_commit_though_its_first_record_cannot_be_read(store, tmp_path):
    """The next one says it."""
    record = keep(store, "deadbeef" * 5)
    store.record_path(record).with_name("A-broken.json").write_text("{")
    side = History.from_outputs(store.outputs, tmp_path).select("deadbeef")
    assert ([record], 1) == (list(side.records), len(side.problems))


def test_a_bad_record_in_a_file_of_pytest_benchmark_is_a_problem(tmp_path):
    """Beside a good one, which is used; the problem names the file, and leaves gates open."""
    record = passed()
    entries = [{"extra_info": {"peftbench": content}} for content in (record.to_json(), {"outcome": "passed"})]
    path = tmp_path / "b.json"
    path.write_text(json.dumps({"benchmarks": entries}))
    side = read_side(str(path), lambda: None)
    [problem] = side.problems
    assert ([record], True) == (list(side.records), problem.startswith(str(path)))


def test_a_folder_of_which_nothing_can_be_read_is_not_the_latest(store, tmp_path):
    """Whatever its name, which tells no time."""
    record = keep(store, "c1")
    (store.runs / "scratch").mkdir()
    (store.runs / "scratch" / "x.json").write_text("{")
    assert [record] == list(History.from_outputs(store.outputs, tmp_path).select("latest").records)


def test_a_run_can_be_left_out_of_the_history(store, tmp_path):
    """As the session's own, which the latest does not mean."""
    first, last = keep(store, "c1", day=1), keep(store, "c1", day=2)
    history = History.from_outputs(store.outputs, tmp_path, without=last.run_id)
    assert ([first.run_id], [first]) == (list(history.files), list(history.select("latest").records))


def test_of_a_commit_that_has_dirty_runs_alone_all_are_counted(repository, store):
    """As the label of clean ones does."""
    folder, ids = repository
    for day in (1, 2):
        keep(store, ids[0], day=day, dirty=True)
    label = History.from_outputs(store.outputs, folder).select(ids[0]).label
    assert f"commit {ids[0][:12]}, with uncommitted changes, 2 runs" == label


def test_a_commit_that_is_the_head_is_compared_with_itself(repository, store):
    """Rather than with a run of it that had uncommitted changes."""
    folder, ids = repository
    keep(store, ids[0], day=1, dirty=True)
    clean = keep(store, ids[0], day=2)
    side = History.from_outputs(store.outputs, folder).select(ids[0], without={clean.run_id})
    assert [clean] == list(side.records)
