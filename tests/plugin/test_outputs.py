"""--peft-outputs: records, reports and what happens to them."""

import functools
import json
import re
import time

import pytest

from peftbench.phases import Phase
from peftbench.plugin.session import SESSION
from peftbench.records import RecordError
from peftbench.store import Store

CONTRACT = {
    *("schema_version", "run_id", "phase", "name", "scale", "seed", "outcome", "checkpoint", "dev", "test"),
    *("parameter_counts", "train_runtime_seconds", "efficiency", "kd_path", "evaluation_seconds", "samples_per_second"),
    *("tokens_per_second", "peak_memory_bytes", "artifact_bytes", "latency_ms", "majority_accuracy", "teacher_cost"),
    *("config", "data", "machine", "versions", "commit", "predictions", "fingerprint"),
}


def test_a_study_leaves_records_reports_and_kd_subsets(study, records, pytester):
    """Every phase leaves a record and a report with the contract's keys, all below the tiny tree."""
    result = study("--peft-outputs", "results")
    result.assert_outcomes(passed=3, deselected=3)
    left = records("results/tiny")
    assert ["A-teacher-tiny-s42.json", "K-kd-tiny-s42.json", "S-small-tiny-s42.json"] == sorted(left)
    for name in ("phase_a_metrics.json", "phase_s_metrics.json", "phase_k_metrics.json"):
        report = json.loads((pytester.path / "results/tiny/reports" / name).read_text())
        assert set() == CONTRACT - set(report)
    assert {"kd_1000", "kd_500", "kd_64"} == {path.name for path in (pytester.path / "results/tiny/kd").glob("kd_*")}
    assert ["tiny"] == [path.name for path in (pytester.path / "results").iterdir()]
    result.stdout.fnmatch_lines(["phase*dev acc*front*", "A-teacher*", "K-kd*", "S-small*", "records: results/tiny/runs/*"])


def test_the_session_says_what_was_neither_training_nor_evaluation(pytester, data_folder, records):
    """A second lost before training and half of one after it show in both figures; the training between them in neither."""
    pytester.makepyfile("""
        import time
        from peftbench.phases import Phase

        def test_late(run_phase, peft_workbench):
            time.sleep(1)
            run_phase(Phase(id="S-small", role="student", epochs=2))
            time.sleep(0.5)
    """)
    began = time.monotonic()
    arguments = ["-m", "tiny", f"--peft-data={data_folder}", "-p", "no:hypothesispytest"]  # whose own end of a session takes long
    result = pytester.runpytest_inprocess(*arguments)
    total = time.monotonic() - began
    [line] = [line for line in result.outlines if "first optimizer step" in line]
    first, other, said = map(float, re.fullmatch(r"(\S+) s from .*; (\S+) s of (\S+) s neither .*", line).groups())
    [record] = records().values()
    work = record["train_runtime_seconds"] + record["evaluation_seconds"]
    assert work > 0.3
    assert 1 <= first <= total - 0.5 - work + 0.1
    assert 1.5 <= other == pytest.approx(said - work, abs=0.6)  # of ten seconds and more, tenths are not told
    assert said == pytest.approx(total, abs=1.0)


def test_outputs_that_cannot_be_written_are_a_usage_error(study, pytester):
    """The session ends before any training, naming the folder and the option."""
    pytester.makefile("", occupied="a file")
    result = study("--peft-outputs", "occupied")
    assert pytest.ExitCode.USAGE_ERROR == result.ret
    result.stderr.fnmatch_lines(["*cannot write to the outputs folder *occupied*--peft-outputs DIR"])


def test_a_part_that_cannot_be_written_is_a_usage_error(study, pytester):
    """Such as the runs of another user, in a folder that is our own."""
    (pytester.path / "outputs/tiny/runs").write_text("")
    result = study("-k", "small")
    assert pytest.ExitCode.USAGE_ERROR == result.ret
    result.stderr.fnmatch_lines(["*cannot write to the outputs folder *outputs/tiny/runs*--peft-outputs DIR"])


def test_a_report_that_cannot_be_written_fails_the_session(study, records, monkeypatch):
    """The record is there, and the session says what is not."""

    def refuse(*_):
        raise OSError("no space left")

    monkeypatch.setattr(Store, "publish", refuse)
    result = study("-k", "small")
    assert pytest.ExitCode.TESTS_FAILED == result.ret
    result.stdout.fnmatch_lines(["the report of S-small-tiny-s42 was not written: no space left"])
    assert ["S-small-tiny-s42.json"] == list(records())


def test_folders_of_the_ini_file_are_seen_from_it(study, pytester, data_folder, monkeypatch):
    """Wherever pytest was started; those of the command line are seen from there."""
    study("--collect-only", "-q")
    pytester.makeini("[pytest]\npeft_data = ../glue\npeft_outputs = results")
    (pytester.path.parent / "glue").symlink_to(data_folder)
    (pytester.path / "sub").mkdir()
    monkeypatch.chdir(pytester.path / "sub")
    run = functools.partial(pytester.runpytest_inprocess, "-m", "tiny", "-k", "small", "..")
    assert [0, 0] == [run().ret, run("--peft-outputs", "own").ret]
    assert [1, 1] == [len(list((pytester.path / at / "tiny/runs").glob("*/*.json"))) for at in ("results", "sub/own")]


def test_a_failed_assertion_makes_a_failed_record(pytester, data_folder, records):
    """What the test makes of a record decides its outcome."""
    pytester.makepyfile("""
        from peftbench.phases import Phase

        def test_too_strict(run_phase):
            record = run_phase(Phase(id="S-small", role="student", subset=64, epochs=1))
            assert record.dev.accuracy > 1
    """)
    result = pytester.runpytest_inprocess("-m", "tiny", f"--peft-data={data_folder}")
    assert pytest.ExitCode.TESTS_FAILED == result.ret
    [record] = records().values()
    assert ("failed", True) == (record["outcome"], record["error"].startswith("AssertionError: assert "))
    assert not (pytester.path / "outputs/tiny/reports").exists()
    result.stdout.fnmatch_lines(["S-small*failed*"])


def test_an_error_leaves_a_failed_record_and_one_clear_message(pytester, data_folder, records):
    """A phase that cannot run fails with its message alone, and says so in its record."""
    pytester.makepyfile("""
        from peftbench.phases import Phase

        def test_no_such_module(run_phase):
            peft = {"peft_type": "LORA", "target_modules": ["nowhere"]}
            run_phase(Phase(id="S-small", role="student", subset=64, epochs=1, peft=peft))
    """)
    result = pytester.runpytest_inprocess("-m", "tiny", f"--peft-data={data_folder}")
    assert pytest.ExitCode.TESTS_FAILED == result.ret
    result.stdout.fnmatch_lines(["ModelError: S-small: peft cannot apply *nowhere*"])
    assert "Traceback" not in result.stdout.str()
    [record] = records().values()
    assert ("failed", "ModelError") == (record["outcome"], record["error"].partition(":")[0])


def test_two_phases_of_one_letter_are_refused(pytester, data_folder):
    """Two phases that would replace each other's report fail by name."""
    pytester.makepyfile("""
        import pytest
        from peftbench.phases import Phase

        @pytest.mark.parametrize("name", ["S-one", "S-two"])
        def test_phase(run_phase, name):
            run_phase(Phase(id=name, role="student", subset=16, epochs=1))
    """)
    result = pytester.runpytest_inprocess("-m", "tiny", f"--peft-data={data_folder}", "--peft-seeds", "1,2")
    result.assert_outcomes(passed=2, failed=2, deselected=4)
    report = json.loads((pytester.path / "outputs/tiny/reports/phase_s_metrics.json").read_text())
    assert ("one", [1, 2]) == (report["name"], report["seeds"])
    result.stdout.fnmatch_lines(["*phases S-one and S-two differ in id but would share phase_s_metrics.json; rename one*"])


def test_phases_of_one_letter_may_differ_where_their_reports_do(pytester):
    """The tiny scale has a folder of its own; the others share one."""
    session = pytester.parseconfigure().stash[SESSION]
    short, long = (Phase(id="S-one", role="student", subset=16, epochs=n) for n in (1, 2))
    session.check_phase(short, "tiny")
    session.check_phase(long, "mini")
    with pytest.raises(RecordError, match=r"phases S-one and S-one differ in epochs but would share phase_s_metrics.json"):
        session.check_phase(short, "thesis")


def test_history_is_never_replaced(pytester, data_folder, records):
    """A second test of the same phase in one run fails; the first record stays."""
    pytester.makepyfile("""
        import pytest
        from peftbench.phases import Phase

        @pytest.mark.parametrize("again", [False, True])
        def test_phase(run_phase, again):
            run_phase(Phase(id="S-one", role="student", subset=16, epochs=1))
    """)
    result = pytester.runpytest_inprocess("-m", "tiny", f"--peft-data={data_folder}")
    result.assert_outcomes(passed=1, failed=1, deselected=2)
    result.stdout.fnmatch_lines(["RecordError: S-one-tiny-s42 has run already in this run, and a phase is a case of one test*"])
    assert ["passed"] == [record["outcome"] for record in records().values()]
