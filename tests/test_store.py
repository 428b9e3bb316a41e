"""The store: paths, reports, and a history to which runs are added."""

import dataclasses
import json
import os
import re

import pytest
from samples import passed

from peftbench.records import RecordError
from peftbench.store import OutputsError, Store, make_run_id

PASSED = passed("D-hybrid", run="20250102T030405Z-abcdef")


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "outputs", "mini")


def test_paths_are_the_contracts(tmp_path):
    """Each path under the outputs folder is the one that the design page names."""
    store = Store(tmp_path, "mini")
    paths = [store.report_path("C1"), store.kd_path(500), store.runs, store.cache_path("logits", "abc"), store.assets]
    expected = ["reports/phase_c1_metrics.json", "kd/kd_500", "runs", "cache/logits/abc", "cache/assets"]
    assert expected == [path.relative_to(tmp_path).as_posix() for path in paths]


def test_tiny_runs_live_apart(tmp_path):
    """The same tree below `tiny`; fetched archives alone are shared."""
    tiny, mini = Store(tmp_path, "tiny"), Store(tmp_path, "mini")
    assert tmp_path / "tiny" / "runs" == tiny.runs
    assert tmp_path / "tiny" / "reports" / "phase_a_metrics.json" == tiny.report_path("A")
    assert tmp_path / "tiny" / "kd" / "kd_500" == tiny.kd_path(500)
    assert mini.assets == tiny.assets


def test_a_record_is_filed_by_run_and_case(store):
    """A folder per run, a file per phase, scale and seed."""
    assert store.outputs / "runs" / PASSED.run_id / "D-hybrid-mini-s42.json" == store.save(PASSED)


def test_the_history_comes_by_run_and_case(store):
    """In the order of run ids, which begin with the time."""
    later = dataclasses.replace(PASSED, run_id="20260102T030405Z-000000")
    for record in (later, PASSED, dataclasses.replace(PASSED, phase="B", name="lora")):
        store.save(record)
    assert [("20250102", "B"), ("20250102", "D"), ("20260102", "D")] == [(r.run_id[:8], r.phase) for r in store.records()]


def test_an_empty_history_is_no_error(store):
    """Before the first run there are no records."""
    assert [] == list(store.records())


def test_a_file_that_is_no_record_does_not_hide_the_others(store):
    """It comes as its error, in its place."""
    path = store.save(PASSED)
    path.with_name("A-broken.json").write_text("{")
    error, record = store.records()
    assert PASSED == record
    assert isinstance(error, RecordError) and "A-broken.json" in str(error)


def test_a_report_replaces_the_one_before(store):
    """The latest result alone lies under `reports`, as JSON that ends in a line break."""
    store.publish("C1", {"accuracy": 0.1, "only": "old"})
    path = store.publish("C1", {"accuracy": 0.2})
    assert {"accuracy": 0.2} == json.loads(path.read_text())
    assert path.read_text().endswith("\n")


def test_a_report_with_nan_leaves_the_one_before(store):
    """NaN is refused and the old report stays."""
    path = store.publish("A", {"accuracy": 0.1})
    with pytest.raises(ValueError):
        store.publish("A", {"accuracy": float("nan")})
    assert {"accuracy": 0.1} == json.loads(path.read_text())


@pytest.mark.parametrize("scale", ["mini", "tiny"])
def test_outputs_that_can_be_written_are_left_as_they_were(tmp_path, scale):
    """The trial leaves no file."""
    Store(tmp_path, scale).check_writable()
    assert [] == [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("outputs", ["file", "file/below"])
@pytest.mark.parametrize("scale", ["mini", "tiny"])
def test_outputs_that_cannot_be_written_are_refused_with_the_option(tmp_path, outputs, scale):
    """Before hours are spent, the error names the folder, the reason and the option."""
    (tmp_path / "file").write_text("in the way")
    store = Store(tmp_path / outputs, scale)
    with pytest.raises(OSError) as caught:
        store.check_writable()
    message = str(caught.value)
    assert [] == [part for part in (str(store.root), "--peft-outputs DIR") if part not in message]
    assert "in the way" == (tmp_path / "file").read_text()


def test_outputs_that_libraries_cannot_name_are_refused(tmp_path):
    """A name that is not UTF-8, as an old archive may leave, in which nothing could be saved after hours."""
    with pytest.raises(OutputsError, match=r"must have a name in UTF-8, got .*udce4.*--peft-outputs DIR"):
        Store(tmp_path / os.fsdecode(b"\xe4"), "mini").check_writable()


def test_run_ids_sort_by_time_and_do_not_collide(monkeypatch):
    """Two runs within a second: the later is the greater, so that 'latest' is. Runs of the same moment differ."""
    second = 1_800_000_000 * 10**9
    moments = [0, 1, 1_000, 250_000_000, 999_999_999, 10**9]
    ids = []
    for moment in moments:
        monkeypatch.setattr("time.time_ns", lambda moment=moment: second + moment)
        ids.append(make_run_id())
    assert all(re.fullmatch(r"\d{8}T\d{6}Z-[0-9a-f]{8}", run_id) for run_id in ids)
    assert ids[2:] == sorted(ids[2:])
    assert max(ids[:2]) < ids[2]
    assert [run_id[:21] for run_id in ids[3:]] == ["20270115T080000Z-4000", "20270115T080000Z-ffff", "20270115T080001Z-0000"]
    assert 3 <= len({make_run_id() for _ in range(5)})


def test_a_case_is_added_once(store):
    """A second record is refused and the first stays; a further attempt keeps it beside its own."""
    path = store.save(PASSED)
    first = path.read_text()
    with pytest.raises(RecordError, match="D-hybrid-mini-s42 has run already in this run"):
        store.save(dataclasses.replace(PASSED, latency_ms=1.0))
    assert first == path.read_text()
    store.save(dataclasses.replace(PASSED, latency_ms=1.0), attempted=path)
    assert first == path.with_name(f"{path.name}.attempt-1").read_text() != path.read_text()


def test_a_case_that_was_resumed_is_not_added(store):
    """It is the record of the run that measured it."""
    store.link(PASSED, "20260102T030405Z-abcdef")
    with pytest.raises(RecordError, match="has run already"):
        store.save(dataclasses.replace(PASSED, run_id="20260102T030405Z-abcdef"))


@pytest.mark.parametrize("name", ["runs", "reports", "kd", "cache"])
def test_a_folder_of_the_outputs_that_cannot_be_written_is_named(store, name):
    """What is there is tried before hours are spent; what is not yet there is not made."""
    store.root.mkdir(parents=True)
    (store.root / name).write_text("in the way")
    with pytest.raises(OSError, match=f"cannot write to the outputs folder .*{name}"):
        store.check_writable()
    assert [name] == [path.name for path in store.root.iterdir()]


def test_a_record_that_could_not_be_read_again_is_not_saved(store):
    """Such as one that passed and lacks what every passed case has; nothing is left of it."""
    with pytest.raises(RecordError, match="record is of a case that passed, but has null for dev"):
        store.save(dataclasses.replace(PASSED, dev=None))
    assert [] == list(store.records())
