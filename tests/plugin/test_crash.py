"""Nothing is lost when a session dies."""

import functools
import gc
import json
import os
import pty
import signal
import subprocess
import sys
import weakref

import pytest

from peftbench.errors import PeftbenchError
from peftbench.plugin.fixtures import explained

STUDY = """
    import os, signal
    import pytest
    from peftbench.phases import Phase
    import peftbench.training

    def test_first(run_phase):
        run_phase(Phase(id="S-small", role="student", subset=64, epochs=1))

    def test_second(run_phase, monkeypatch):
        factor = peftbench.training.rate_factor

        def rate_factor(step, **plan):
            if step == 2:
                os.kill(os.getpid(), signal.{signal})
            return factor(step, **plan)

        monkeypatch.setattr(peftbench.training, "rate_factor", rate_factor)
        run_phase(Phase(id="K-killed", role="student", subset=64, epochs=1))

    def test_third(run_phase):
        run_phase(Phase(id="X-third", role="student", subset=64, epochs=1))
"""


def run(pytester, data_folder, *arguments):
    """In a process that hears Ctrl-C, which one does not that a shell's script has started in the background."""
    command = [sys.executable, "-m", "pytest", "-m", "tiny", f"--peft-data={data_folder}", *arguments]
    hear = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.run(command, cwd=pytester.path, capture_output=True, text=True, check=False, preexec_fn=hear)


def test_after_sigkill_the_records_before_are_whole_and_resume_runs_the_rest(pytester, data_folder, records):
    """A killed session keeps what had ended; the next one runs only what is missing."""
    pytester.makepyfile(test_study=STUDY.replace("{signal}", "SIGKILL"))
    assert -signal.SIGKILL == run(pytester, data_folder).returncode
    assert {"S-small-tiny-s42.json": "passed"} == {name: record["outcome"] for name, record in records().items()}
    done = run(pytester, data_folder, "--peft-resume", "--deselect", "test_study.py::test_second")
    assert "1 passed, 1 skipped" in done.stdout
    assert ["S-small-tiny-s42.json", "X-third-tiny-s42.json"] == sorted(records())


@pytest.mark.parametrize(("sent", "error"), [("SIGINT", "KeyboardInterrupt"), ("SIGTERM", "KeyboardInterrupt: SIGTERM")])
def test_an_interrupt_in_training_leaves_a_failed_record_and_the_table(pytester, data_folder, records, sent, error):
    """Ctrl-C, or a batch system whose time is up, ends the session as pytest does, with what was measured so far in the table."""
    pytester.makepyfile(test_study=STUDY.replace("{signal}", sent))
    done = run(pytester, data_folder)
    assert pytest.ExitCode.INTERRUPTED == done.returncode
    outcomes = {name: record["outcome"] for name, record in records().items()}
    assert {"S-small-tiny-s42.json": "passed", "K-killed-tiny-s42.json": "failed"} == outcomes
    assert error == records()["K-killed-tiny-s42.json"]["error"]
    summary = done.stdout.partition("= peftbench =")[2]
    assert "S-small" in summary
    assert "interrupted: run the same command with --peft-resume for what has not passed" in summary


def test_sigterm_to_the_main_process_of_several_leaves_the_table(pytester, data_folder):
    """Under pytest-xdist, where it is not the main process that runs cases."""
    pytester.makepyfile("""
        import os, signal, time
        from pathlib import Path
        from peftbench.phases import Phase

        def test_ended(run_phase):
            run_phase(Phase(id="S-small", role="student", subset=16, epochs=1))

        def test_waits():
            report = Path("outputs/tiny/reports/phase_s_metrics.json")  # which the main process writes at the other's end
            end = time.monotonic() + 60
            while not report.exists() and time.monotonic() < end:
                time.sleep(0.1)
            os.kill(os.getppid(), signal.SIGTERM)
    """)
    done = run(pytester, data_folder, "-n", "2", "-m", "", "--peft-scale", "tiny")
    assert pytest.ExitCode.INTERRUPTED == done.returncode
    assert "S-small" in done.stdout.partition("= peftbench =")[2]


def test_sigterm_to_the_main_process_of_tests_without_cases_is_what_it_always_was(pytester, data_folder):
    """A project that has none ends as it would without the plugin."""
    pytester.makepyfile("""
        import os, signal, time

        def test_other():
            os.kill(os.getppid(), signal.SIGTERM)
            time.sleep(1)
    """)
    assert -signal.SIGTERM == run(pytester, data_folder, "-n", "2", "-m", "").returncode


def test_a_seed_that_was_interrupted_is_in_the_report(pytester, data_folder):
    """As in the table, though pytest makes no report of its test."""
    pytester.makepyfile("""
        from peftbench.phases import Phase

        def test_ended(run_phase, peft_seed):
            run_phase(Phase(id="S-small", role="student", subset=16, epochs=1))
            if peft_seed == 8:
                raise KeyboardInterrupt
    """)
    done = run(pytester, data_folder, "--peft-seeds", "7,8,9")
    assert pytest.ExitCode.INTERRUPTED == done.returncode
    assert "S-small ×2, 1 failed" in done.stdout
    report = json.loads((pytester.path / "outputs/tiny/reports/phase_s_metrics.json").read_text())
    assert ([7, 8], [8]) == (report["seeds"], report["failed_seeds"])


def test_an_error_that_explains_itself_keeps_nothing_of_what_led_to_it():
    """pytest keeps the error of a fixture for the session, and a model in its frames would stay on a GPU as long."""

    class Model:
        pass

    def train(model):
        raise PeftbenchError("diverged")

    def fixture():
        model = Model()
        models.append(weakref.ref(model))
        train(model)

    models = []
    with pytest.raises(pytest.fail.Exception, match="PeftbenchError: diverged") as kept, explained():
        fixture()
    assert kept.value.__context__ is not None
    gc.collect()
    assert [None] == [model() for model in models]


def test_a_terminal_shows_progress(pytester, data_folder):
    """On a terminal the step, the total and the time left stand in one line that changes."""
    pytester.makepyfile("""
        from peftbench.phases import Phase

        def test_slow(run_phase):
            run_phase(Phase(id="S-small", role="student", epochs=2))
    """)
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "pytest", "-m", "tiny", f"--peft-data={data_folder}"]
    with subprocess.Popen(command, cwd=pytester.path, stdout=slave, stderr=slave) as process:
        os.close(slave)
        shown = b""
        while True:
            try:
                chunk = os.read(master, 4096)
            except OSError:
                break
            shown += chunk
        process.wait()
    os.close(master)
    assert 0 == process.returncode
    assert b"S-small: step " in shown
    assert b" of 140, " in shown


def test_reports_survive_as_json(pytester, data_folder, study):
    """The reports of two sessions at once are whole JSON."""
    study("--collect-only", "-q")
    command = [sys.executable, "-m", "pytest", "-m", "tiny", "-q", f"--peft-data={data_folder}"]
    sessions = [subprocess.Popen(command, cwd=pytester.path, stdout=subprocess.PIPE) for _ in range(2)]
    assert [0, 0] == [session.wait() for session in sessions if session.communicate()]
    reports = list((pytester.path / "outputs/tiny/reports").glob("*.json"))
    assert 3 == len([json.loads(report.read_text()) for report in reports])
    assert 6 == len(list((pytester.path / "outputs/tiny/runs").glob("*/*.json")))


@pytest.mark.parametrize(
    ("when", "ending", "outcome", "error"),
    [
        ("in training", "raise KeyboardInterrupt", "failed", "KeyboardInterrupt"),
        ("in training", "pytest.exit('enough')", "failed", "Exit: enough"),
        ("in training", "pytest.fail('too slow')", "failed", "Failed: too slow"),
        ("in training", "raise SystemExit(3)", "failed", "SystemExit: 3"),
        ("afterwards", "raise KeyboardInterrupt", "failed", "KeyboardInterrupt"),
        ("afterwards", "pytest.exit('enough')", "failed", "Exit: enough"),
        ("afterwards", "pytest.fail('too slow')", "failed", "Failed: too slow"),
        ("afterwards", "raise SystemExit(3)", "failed", "SystemExit: 3"),
        ("afterwards", "pytest.skip('no matter')", "passed", None),
        ("afterwards", "raise unittest.SkipTest('no matter')", "passed", None),
    ],
)
def test_however_a_test_ends_there_is_one_record(pytester, data_folder, records, when, ending, outcome, error):
    """Whether training is left by it or the test after that; the figures of a phase that was measured stay."""
    pytester.makepyfile(
        f"""
        import unittest

        import pytest
        from peftbench.phases import Phase
        from peftbench.workbench import Workbench

        def end():
            {ending}

        def test_phase(run_phase, monkeypatch):
            if {when == "in training"}:
                monkeypatch.setattr(Workbench, "train", lambda *_, **__: end())
            run_phase(Phase(id="S-small", role="student", subset=16, epochs=1))
            end()
        """
    )
    result = pytester.runpytest_inprocess("-m", "tiny", f"--peft-data={data_folder}", no_reraise_ctrlc=True)
    assert "could not write" not in result.stdout.str()
    [record] = records().values()
    assert outcome == record["outcome"]
    assert error == record["error"]
    assert (when == "in training") == (record["dev"] is None)
    assert "S-small" in result.stdout.str().partition("= peftbench =")[2]


@pytest.mark.parametrize(
    ("strict", "fixtures", "check", "error"),
    [
        (False, "subtests", "with subtests.test('good'): assert not record", "AssertionError: "),
        (False, "late", "pass", "RuntimeError: too late"),
        (True, "", "pass", "[XPASS(strict)] not yet"),
    ],
    ids=["subtest", "teardown", "strict"],
)
def test_a_record_has_failed_where_its_test_has(pytester, data_folder, records, strict, fixtures, check, error):
    """However late pytest says so: nothing is published, and the case is not resumed."""
    pytester.makepyfile(f"""
        import pytest
        from peftbench.phases import Phase

        @pytest.fixture
        def late():
            yield
            raise RuntimeError("too late")

        @pytest.mark.xfail({strict}, strict=True, reason="not yet")
        def test_phase(run_phase, {fixtures}):
            record = run_phase(Phase(id="S-small", role="student", subset=16, epochs=1))
            {check}
    """)
    for more in ([], ["--peft-resume"], ["-n", "2"]):
        done = run(pytester, data_folder, *more)
        assert pytest.ExitCode.TESTS_FAILED == done.returncode, done.stdout
        assert "resumed" not in done.stdout
        assert {"failed"} == {record["outcome"] for record in records().values()}
        assert records()["S-small-tiny-s42.json"]["error"].startswith(error)
        assert records()["S-small-tiny-s42.json"]["dev"]
    assert not (pytester.path / "outputs/tiny/reports/phase_s_metrics.json").exists()


def test_a_record_that_cannot_be_changed_is_not_published(pytester, data_folder):
    """It says passed of a test that has failed, and the message says so."""
    pytester.makepyfile("""
        import pytest
        from pathlib import Path
        from peftbench.phases import Phase

        @pytest.fixture
        def late():
            yield
            [path] = Path("outputs/tiny/runs").glob("*/*.json")
            path.write_text("{")
            raise RuntimeError("too late")

        def test_phase(run_phase, late):
            run_phase(Phase(id="S-small", role="student", subset=16, epochs=1))
    """)
    result = pytester.runpytest_inprocess("-m", "tiny", f"--peft-data={data_folder}")
    result.stdout.fnmatch_lines(["*S-small-tiny-s42 failed (RuntimeError: too late), but its record could not be changed: *"])
    assert not (pytester.path / "outputs/tiny/reports").exists()


@pytest.mark.parametrize(
    ("expected", "body"),
    [
        ("@pytest.mark.xfail", "assert not record"),
        ("", "pytest.xfail('not yet')"),
        ("@pytest.mark.xfail", "with subtests.test(): assert not record"),
    ],
)
def test_a_failure_that_was_expected_is_one(pytester, data_folder, records, expected, body):
    """The session passes; the phase has not."""
    pytester.makepyfile(f"""
        import pytest
        from peftbench.phases import Phase

        {expected}
        def test_phase(run_phase, subtests):
            record = run_phase(Phase(id="S-small", role="student", subset=16, epochs=1))
            {body}
    """)
    result = pytester.runpytest_inprocess("-m", "tiny", f"--peft-data={data_folder}")
    assert pytest.ExitCode.OK == result.ret
    assert ["failed"] == [record["outcome"] for record in records().values()]


def test_other_tests_may_fail_as_they_like(pytester):
    """With an exception that cannot even be printed."""
    pytester.makepyfile("""
        class Bad(Exception):
            def __str__(self):
                raise RuntimeError("no")

        def test_bad():
            raise Bad

        def test_good():
            pass
    """)
    pytester.runpytest_inprocess().assert_outcomes(failed=1, passed=1)


def test_a_case_that_a_fixture_runs_in_the_end_leaves_its_record(pytester, data_folder, records):
    """As anywhere else, though its test has ended."""
    pytester.makepyfile("""
        import pytest
        from peftbench.phases import Phase

        @pytest.fixture
        def late(run_phase):
            yield
            run_phase(Phase(id="S-small", role="student", subset=16, epochs=1))

        def test_phase(late):
            pass
    """)
    result = pytester.runpytest_inprocess("-m", "tiny", f"--peft-data={data_folder}")
    result.assert_outcomes(passed=1, deselected=1)
    assert ["S-small-tiny-s42.json"] == list(records())
    assert (pytester.path / "outputs/tiny/reports/phase_s_metrics.json").exists()


def test_a_failed_test_that_is_run_again_leaves_its_last_attempt(pytester, data_folder, records):
    """As pytest-rerunfailures does it: the record and the report are of the attempt that passed, the first one stays beside it."""
    pytester.makeconftest("""
        import pytest
        from _pytest.runner import runtestprotocol

        @pytest.hookimpl(tryfirst=True)
        def pytest_runtest_protocol(item, nextitem):
            item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
            for attempt in (1, 2):
                item._initrequest()
                reports = runtestprotocol(item, nextitem=nextitem, log=False)
                if attempt == 1:
                    for report in reports:
                        report.outcome = "passed"
                for report in reports:
                    item.ihook.pytest_runtest_logreport(report=report)
            return True
    """)
    pytester.makepyfile("""
        from peftbench.phases import Phase
        attempts = []

        def test_phase(run_phase):
            run_phase(Phase(id="S-small", role="student", subset=16, epochs=1))
            attempts.append(1)
            assert len(attempts) == 2
    """)
    result = pytester.runpytest_inprocess("-m", "tiny", f"--peft-data={data_folder}")
    assert pytest.ExitCode.OK == result.ret, result.stdout.str()
    [(name, record)] = records().items()
    assert ("S-small-tiny-s42.json", "passed") == (name, record["outcome"])
    [run] = (pytester.path / "outputs/tiny/runs").iterdir()
    first = json.loads((run / f"{name}.attempt-1").read_text())
    assert ("failed", "assert 1 == 2") == (first["outcome"], first["error"].splitlines()[0].removeprefix("AssertionError: "))
    report = json.loads((pytester.path / "outputs/tiny/reports/phase_s_metrics.json").read_text())
    assert ([42], []) == (report["seeds"], report["failed_seeds"])


def test_what_cannot_be_written_fails_its_test_alone(pytester, data_folder, records):
    """A number that no reader takes: the message says so before it trains, and the next case runs."""
    pytester.makepyfile("""
        import pytest
        from peftbench.phases import Phase

        @pytest.mark.parametrize("name, alpha", [("S-large", 2**70), ("T-fine", 8)])
        def test_phase(run_phase, name, alpha):
            peft = {"peft_type": "LORA", "lora_alpha": alpha, "target_modules": ["q_lin"]}
            run_phase(Phase(id=name, role="student", subset=16, epochs=1, peft=peft))
    """)
    result = pytester.runpytest_inprocess("-m", "tiny", f"--peft-data={data_folder}")
    result.assert_outcomes(passed=1, failed=1, deselected=2)
    result.stdout.fnmatch_lines(["RecordError: record.config must have numbers within 2^63*"])
    assert ["T-fine-tiny-s42.json"] == list(records())
