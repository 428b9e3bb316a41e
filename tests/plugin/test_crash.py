"""Nothing is lost when a session dies."""

import json
import os
import pty
import signal
import subprocess
import sys

import pytest

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
    command = [sys.executable, "-m", "pytest", "-m", "tiny", f"--peft-data={data_folder}", *arguments]
    return subprocess.run(command, cwd=pytester.path, capture_output=True, text=True, check=False)


def test_after_sigkill_the_records_before_are_whole_and_resume_runs_the_rest(pytester, data_folder, records):
    """A killed session keeps what had ended; the next one runs only what is missing."""
    pytester.makepyfile(test_study=STUDY.replace("{signal}", "SIGKILL"))
    assert -signal.SIGKILL == run(pytester, data_folder).returncode
    assert {"S-small-tiny-s42.json": "passed"} == {name: record["outcome"] for name, record in records().items()}
    done = run(pytester, data_folder, "--peft-resume", "--deselect", "test_study.py::test_second")
    assert "1 passed, 1 skipped" in done.stdout
    assert ["S-small-tiny-s42.json", "X-third-tiny-s42.json"] == sorted(records())


def test_ctrl_c_in_training_leaves_a_failed_record_and_the_table(pytester, data_folder, records):
    """An interrupt ends the session as pytest does, with what was measured so far in the table."""
    pytester.makepyfile(test_study=STUDY.replace("{signal}", "SIGINT"))
    done = run(pytester, data_folder)
    assert pytest.ExitCode.INTERRUPTED == done.returncode
    outcomes = {name: record["outcome"] for name, record in records().items()}
    assert {"S-small-tiny-s42.json": "passed", "K-killed-tiny-s42.json": "failed"} == outcomes
    assert "KeyboardInterrupt" in records()["K-killed-tiny-s42.json"]["error"]
    assert "S-small" in done.stdout.partition("= peftbench =")[2]


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
