"""``--peft-compare`` and ``--peft-fail``: one job runs and judges."""

import base64
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from peftbench.records import read_record


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--peft-compare", "no-such-commit"), "*'no-such-commit' is not a file, a folder, 'latest', a run*"),
        (("--peft-compare", "latest", "--peft-fail", "speed:3%"), "*--peft-fail must name one of accuracy, f1*got 'speed:3%'*"),
        (("--peft-fail", "accuracy:1pt"), "*--peft-fail accuracy:1pt needs a comparison; name what to compare with*"),
    ],
)
def test_wrong_use_is_said_before_anything_runs(study, pytester, arguments, message):
    """Exit status 4, which is pytest's for wrong use."""
    assert 0 == study("-k", "small").ret
    result = study("-k", "small", *arguments)
    assert pytest.ExitCode.USAGE_ERROR == result.ret
    result.stderr.fnmatch_lines([message])
    assert 1 == len(list((pytester.path / "outputs/tiny/runs").glob("*/*.json")))


def test_the_same_again_is_fine(study, pytester):
    """The comparison is printed, the gate holds."""
    study("-k", "small")
    result = study("-k", "small", "--peft-compare", "latest", "--peft-fail", "accuracy:0.5pt")
    assert 0 == result.ret
    result.stdout.fnmatch_lines(["compared with latest run *", "S-small *accuracy *no difference shown*"])


def test_worse_fails_the_session(study, pytester):
    """A base that was better than anything: the gate says so and the exit status is 1, though the test passed."""
    study("-k", "small")
    [path] = (pytester.path / "outputs/tiny/runs").glob("*/*.json")
    content = path.read_text()
    for predictions in read_record(path).predictions.values():
        content = content.replace(*(base64.b64encode(bits).decode() for bits in (predictions.predicted, predictions.gold)))
    path.write_text(content)
    result = study("-k", "small", "--peft-compare", "latest", "--peft-fail", "accuracy:0.5pt")
    result.assert_outcomes(passed=1, deselected=5)
    assert 1 == result.ret
    result.stdout.fnmatch_lines(["*S-small: accuracy is worse by more than 0.5pt*"])


LIMITS = ("--peft-compare", "latest", "--peft-fail", "accuracy:0.5pt")
SMALL = "test_study.py::test_phase[S-small-tiny]"


@pytest.mark.parametrize(
    "choice",
    [
        ["-k", "small"],
        [SMALL],
        ["-m", "tiny and mine"],
        ["-k", "small", "-n", "1"],
        [f"--deselect=test_study.py::test_phase[{phase}-tiny]" for phase in ("A-teacher", "K-kd")],
    ],
    ids=["expression", "id", "marker", "worker", "deselected"],
)
def test_phases_that_were_not_asked_for_are_not_missing(study, pytester, data_folder, choice):
    """However the command line leaves them out."""
    study("-k", "small or teacher")
    pytester.makeini("[pytest]\nmarkers = mine")
    suite = pytester.path / "test_study.py"
    mine = 'pytest.param(Phase(id="S-small", role="student", subset=64, epochs=1, learning_rate=1e-3), marks=pytest.mark.mine)'
    of_small = 'Phase(id="S-small", role="student", subset=64, epochs=1, learning_rate=1e-3)'
    suite.write_text(suite.read_text().replace(of_small, mine).replace("phase: phase.id", "phase: getattr(phase, 'id', None)"))
    command = [sys.executable, "-m", "pytest", "-m", "tiny", f"--peft-data={data_folder}", *choice, *LIMITS]
    done = subprocess.run(command, cwd=pytester.path, capture_output=True, text=True, check=False)
    assert 0 == done.returncode, done.stdout + done.stderr
    assert "accuracy:0.5pt" in done.stdout


@pytest.mark.parametrize("choice", [[], ["-m", "tiny and not other"], ["--deselect=test_other.py::test_other"], ["-n", "1"]])
def test_a_phase_that_is_gone_leaves_the_gate_open(study, pytester, data_folder, choice):
    """Where no option left out a case, all of them were asked for."""
    study("-k", "small or teacher")
    pytester.makeini("[pytest]\nmarkers = other")
    pytester.makepyfile(test_other="import pytest\n@pytest.mark.tiny\ndef test_other(): pass\n")
    suite = pytester.path / "test_study.py"
    lines = suite.read_text().splitlines(keepends=True)
    suite.write_text("".join(line for line in lines if "A-teacher" not in line and "K-kd" not in line))
    command = [sys.executable, "-m", "pytest", "-m", "tiny", f"--peft-data={data_folder}", *choice, *LIMITS]
    done = subprocess.run(command, cwd=pytester.path, capture_output=True, text=True, check=False)
    assert 2 == done.returncode, done.stdout + done.stderr
    assert "A-teacher: outcome: missing: no finished record in the head" in done.stdout


def test_a_case_whose_name_does_not_say_its_phase_is_asked_for_too(study, pytester):
    """It has run in the base; skipping itself now, it may be what is missing."""
    own = pytester.path / "test_own.py"
    text = "from peftbench.phases import Phase\ndef test_small_one(run_phase):\n    "
    own.write_text(text + "run_phase(Phase(id='E-one', role='student', subset=16, epochs=1))\n")
    assert 0 == study("-k", "small").ret
    own.write_text("import pytest\n" + text + "pytest.skip('not today')\n")
    result = study("-k", "small", *LIMITS)
    assert 2 == result.ret
    result.stdout.fnmatch_lines(["1 of the tests asked for left no record, such as test_own.py::test_small_one[[]tiny]"])


def test_a_test_that_is_skipped_for_good_is_no_concern_of_a_choice_of_others(study, pytester):
    """It has no phase that the base knows."""
    study("-k", "small or teacher")
    (pytester.path / "test_gpu.py").write_text("import pytest\n@pytest.mark.skip\ndef test_small_gpu(run_phase): pass\n")
    result = study("-k", "small", *LIMITS)
    result.assert_outcomes(passed=1, skipped=1, deselected=6)
    assert 0 == result.ret


@pytest.mark.parametrize("choice", [["-k", "phase"], ["test_study.py::test_phase"], ["-n", "2", "-k", "small or teacher"]])
def test_a_case_asked_for_that_was_skipped_leaves_the_gate_open(study, pytester, data_folder, choice):
    """Its phase is not among those that were left out, where any were."""
    study("-k", "small or teacher")
    pytester.makeconftest("""
        import pytest

        def pytest_runtest_setup(item):
            if "A-teacher" in item.name:
                pytest.skip("not today")
    """)
    command = [sys.executable, "-m", "pytest", "-m", "tiny", f"--peft-data={data_folder}", *choice, *LIMITS]
    done = subprocess.run(command, cwd=pytester.path, capture_output=True, text=True, check=False)
    assert 2 == done.returncode, done.stdout + done.stderr
    left_out = "1 of the tests asked for left no record, such as test_study.py::test_phase[A-teacher-tiny]"
    assert ("A-teacher: outcome: missing" if "phase" in choice else left_out) in done.stdout


def test_the_base_of_an_ini_file_is_seen_from_there(study, pytester, monkeypatch):
    """As its other folders are, and with ~ for the home folder; commits and runs stay what they are."""
    study("-k", "small")
    [run] = (pytester.path / "outputs/tiny/runs").iterdir()
    home, below = pytester.path / "home", pytester.mkdir("below")
    shutil.copytree(run, pytester.path / "baseline")
    shutil.copytree(run, home / "baseline")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(below)
    for base, label in (
        ("baseline", "folder ../baseline"),
        ("~/baseline", "folder ../home/baseline"),
        (run.name, f"run {run.name}"),
    ):
        pytester.makeini(f"[pytest]\npeft_compare = {base}\npeft_outputs = outputs")
        result = study("-k", "small", str(pytester.path / "test_study.py"))
        assert 0 == result.ret
        result.stdout.fnmatch_lines([f"compared with {label}:"])


def test_phases_that_did_not_fail_last_are_not_missing_from_what_lf_runs_again(study, pytester):
    """As with -k."""
    study("-k", "small or teacher")
    suite = pytester.path / "test_study.py"
    sound = suite.read_text()
    suite.write_text(sound.replace(".dev.n >= 60", ".phase != 'S'"))
    study("-k", "small or teacher").assert_outcomes(passed=1, failed=1, deselected=4)
    suite.write_text(sound)
    [first, _] = sorted((pytester.path / "outputs/tiny/runs").iterdir())
    result = study("--lf", "--peft-compare", first.name, "--peft-fail", "accuracy:0.5pt")
    assert 0 == result.ret
    result.stdout.fnmatch_lines(["S-small *accuracy *no difference shown*"])


def test_with_resume_the_latest_is_of_other_code(study, pytester, commit):
    """The run of this code that was interrupted is gone on with, and compared with what came before it."""
    study("--collect-only", "-q")
    commit()
    study("-k", "small or teacher")
    (pytester.path / "test_study.py").write_text((pytester.path / "test_study.py").read_text() + "\n# changed\n")
    study("-k", "small")
    result = study("-k", "small or teacher", "--peft-resume", "--peft-compare", "latest", "--peft-fail", "accuracy:0.5pt")
    assert 0 == result.ret
    result.assert_outcomes(passed=1, skipped=1, deselected=4)
    result.stdout.fnmatch_lines(["A-teacher *accuracy *no difference*", "S-small *accuracy *no difference*"])


def test_what_cannot_be_told_is_neither(study, pytester):
    """Other seeds: exit status 2."""
    study("-k", "small", "--peft-seeds", "1")
    result = study("-k", "small", "--peft-compare", "latest", "--peft-fail", "accuracy:0.5pt")
    assert 2 == result.ret
    result.stdout.fnmatch_lines(["*S-small: accuracy: not comparable: other seed set: 1 and 42*"])


@pytest.mark.parametrize("workers", [[], ["-n", "1"]])
def test_a_history_that_cannot_be_read_is_said_before_anything_runs(study, monkeypatch, workers):
    """As where a container has left folders of another user."""
    iterdir = Path.iterdir

    def refuse(folder):
        if folder.parent.name == "runs":
            raise PermissionError(13, "Permission denied", str(folder))
        return iterdir(folder)

    study("-k", "small")
    monkeypatch.setattr(Path, "iterdir", refuse)
    result = study("-k", "small", *workers, "--peft-compare", "latest")
    assert pytest.ExitCode.USAGE_ERROR == result.ret
    result.stderr.fnmatch_lines(["*peftbench: *Permission denied: '*outputs/tiny/runs/*"])


def test_a_base_of_another_scale_is_said_before_anything_runs(study, pytester):
    """Where there is nothing to compare with, no gate can hold."""
    study("-k", "small")
    runs = pytester.path / "outputs/tiny/runs"
    for path in runs.glob("*/*.json"):
        path.write_text(path.read_text().replace('"scale": "tiny"', '"scale": "mini"'))
    result = study("-k", "small", "--peft-compare", "latest", "--peft-fail", "accuracy:0.5pt")
    assert pytest.ExitCode.USAGE_ERROR == result.ret
    result.stderr.fnmatch_lines(["*--peft-compare latest: latest run * has no record of the tiny scale"])


def test_a_phase_that_the_base_lacks_leaves_the_gate_open(study):
    """A phase alone, which the base never had: the gate was held to nothing."""
    study("-k", "small")
    result = study("-k", "teacher", "--peft-compare", "latest", "--peft-fail", "accuracy:0.5pt")
    assert 2 == result.ret
    result.stdout.fnmatch_lines(["accuracy:0.5pt: compared in no phase"])


def test_records_of_the_base_that_cannot_be_read_are_said(study, pytester):
    """The gate cannot tell what was in them; their names steer no terminal."""
    study("-k", "small or teacher")
    [path] = (pytester.path / "outputs/tiny/runs").glob("*/A-*.json")
    path.rename(path.with_name("\x1b[31m.json")).write_text("{")
    result = study("-k", "small", "--peft-compare", "latest", "--peft-fail", "accuracy:0.5pt")
    assert 2 == result.ret
    result.stdout.fnmatch_lines(["1 file of the base could not be read", "left out of the history: *[?][[]31m.json*"])


def test_a_resumed_case_is_not_compared_with_itself(study):
    """It says nothing about this run."""
    study("-k", "small")
    result = study("-k", "small", "--peft-resume", "--peft-compare", "latest", "--peft-fail", "accuracy:0.5pt")
    assert 2 == result.ret
    said = "1 of 1 records of the head are also in the base, and so compared with themselves"
    result.stdout.fnmatch_lines([said])
    result = study("-k", "small", "--peft-resume", "--peft-compare", "latest")
    assert 0 == result.ret
    result.stdout.fnmatch_lines([said])


def test_a_gate_over_no_record_is_open(study):
    """All cases were skipped: nothing was compared."""
    study("-k", "small")
    result = study("-k", "small", "--benchmark-skip", "--peft-compare", "latest", "--peft-fail", "accuracy:1pt")
    assert 2 == result.ret
    result.stdout.fnmatch_lines(["nothing to compare: no case has left a record"])


@pytest.mark.parametrize("other", [["--collect-only"], ["--fixtures"], ["--setup-plan"]])
def test_where_nothing_runs_no_gate_is_asked(study, other):
    """Nor is anything said of it."""
    study("-k", "small")
    result = study("-k", "small", *other, "--peft-compare", "latest", "--peft-fail", "accuracy:1pt")
    assert 0 == result.ret
    assert "nothing to compare" not in result.stdout.str()


def test_a_gate_of_the_ini_file_asks_nothing_of_other_tests(pytester):
    """Where no case was run there is nothing to judge; a gate on the command line is never passed over."""
    pytester.makeini("[pytest]\npeft_compare = nowhere\npeft_fail = accuracy:1pt")
    pytester.makepyfile("def test_other(): pass")
    assert 0 == pytester.runpytest_inprocess().ret
    assert 2 == pytester.runpytest_inprocess("--peft-fail", "accuracy:1pt").ret
