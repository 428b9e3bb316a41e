"""Together with pytest-benchmark and pytest-xdist, or without them."""

import itertools
import json
import subprocess
import sys

import pytest
from samples import REWRITTEN, passed

from peftbench.plugin.session import SESSION
from peftbench.store import Store


def test_each_case_is_one_entry_trained_once(study, pytester, records):
    """The JSON has one round a case, its time is the loop's, and the record lies in extra_info."""
    result = study("--benchmark-json=b.json")
    result.assert_outcomes(passed=3, deselected=3)
    entries = json.loads((pytester.path / "b.json").read_text())["benchmarks"]
    assert ["test_phase[A-teacher-tiny]", "test_phase[S-small-tiny]", "test_phase[K-kd-tiny]"] == [e["name"] for e in entries]
    assert ["no training", "training", "training"] == [e["group"] for e in entries]
    by_phase = {record["phase"]: record for record in records().values()}
    for entry in entries:
        record = entry["extra_info"]["peftbench"]
        assert by_phase[record["phase"]] == record
        assert (1, 1) == (entry["stats"]["rounds"], entry["stats"]["iterations"])
        assert entry["stats"]["mean"] == pytest.approx(record["train_runtime_seconds"])
    compare = [sys.executable, "-m", "pytest_benchmark", "compare", "b.json"]
    assert 0 == subprocess.run(compare, cwd=pytester.path, capture_output=True, check=False).returncode


@pytest.mark.parametrize("arguments", [["--benchmark-disable"], ["-p", "no:benchmark"]])
def test_cases_run_and_leave_records_without_pytest_benchmark(study, records, arguments):
    """Switched off or not loaded, pytest-benchmark is not needed."""
    study("-k", "small", *arguments).assert_outcomes(passed=1, deselected=5)
    assert ["S-small-tiny-s42.json"] == list(records())


BY_NAME = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}, ["-p", "pytest_benchmark.plugin", "-p", "peftbench.plugin"]


@pytest.mark.parametrize(
    ("environment", "arguments"), [BY_NAME, ({}, ["-p", "no:benchmark", "-p", "mine"])], ids=["by its module", "of another plugin"]
)
def test_fixtures_of_that_name_stay_what_they_are(pytester, monkeypatch, data_folder, records, environment, arguments):
    """Other tests keep theirs; a case takes pytest-benchmark's alone."""
    pytester.makepyfile(mine="import pytest\n@pytest.fixture\ndef benchmark():\n    return lambda function: function()")
    pytester.makeconftest("def benchmark():\n    'Which is no fixture.'")
    pytester.makepyfile(
        test_both="""
        import pytest
        from peftbench.phases import Phase

        @pytest.mark.tiny
        def test_mine(benchmark):
            assert 2 == benchmark(lambda: 1 + 1)

        def test_phase(run_phase):
            run_phase(Phase(id="S-one", role="student", subset=16, epochs=1))
    """
    )
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    pytester.syspathinsert()
    result = pytester.runpytest_subprocess("-m", "tiny", f"--peft-data={data_folder}", *arguments)
    result.assert_outcomes(passed=2, deselected=1)
    assert ["S-one-tiny-s42.json"] == list(records())


def test_a_fixture_asked_for_by_name_leaves_its_record_in_the_json(pytester, data_folder, records):
    """As one that the test takes as an argument."""
    pytester.makepyfile("""
        import pytest
        from peftbench.phases import Phase

        @pytest.mark.tiny
        def test_phase(request):
            request.getfixturevalue("run_phase")(Phase(id="S-one", role="student", subset=16, epochs=1))
    """)
    result = pytester.runpytest_inprocess(
        "-m", "tiny", "--peft-scale=tiny", f"--peft-data={data_folder}", "--benchmark-json=b.json"
    )
    result.assert_outcomes(passed=1)
    [entry] = json.loads((pytester.path / "b.json").read_text())["benchmarks"]
    assert list(records().values()) == [entry["extra_info"]["peftbench"]]


def test_a_profile_that_would_train_twice_is_refused(study):
    """pytest-benchmark calls the function again for it."""
    result = study("-k", "small", "--benchmark-cprofile=tottime")
    assert pytest.ExitCode.USAGE_ERROR == result.ret
    result.stderr.fnmatch_lines(["*--benchmark-cprofile would train each phase a second time; use python -m cProfile*"])


def test_a_test_that_fails_before_it_trains_is_told_of_its_own_error_alone(study, pytester):
    """Not of a clock that was never started, where warnings are errors."""
    text = "from peftbench.phases import Phase\ndef test_x(run_phase):\n    run_phase(Phase(id='E-x', role='studnt'))\n"
    (pytester.path / "test_own.py").write_text(text)
    result = study("test_own.py", "-W", "error", *REWRITTEN)
    result.assert_outcomes(failed=1, deselected=1)
    result.stdout.fnmatch_lines(["*E-x: role must be one of teacher, backbone, student, got 'studnt'*"])


def in_two_workers(pytester, data_folder, *arguments):
    command = [sys.executable, "-m", "pytest", "-m", "tiny", "-n", "2", f"--peft-data={data_folder}", *arguments]
    return subprocess.run(command, cwd=pytester.path, capture_output=True, text=True, check=False)


def test_workers_of_xdist_write_one_run(study, records, pytester, data_folder):
    """Cases in two processes share run, teacher and machine; table and reports have all of them, and what was resumed."""
    assert 0 == study("-k", "small", "--peft-seeds", "7").ret
    before = set(records())
    done = in_two_workers(pytester, data_folder, "--peft-seeds", "7,8", "--peft-resume")
    assert 0 == done.returncode, done.stdout + done.stderr
    new = {name: record for name, record in records().items() if name not in before}
    assert {f"{phase}-tiny-s{seed}.json" for phase in ("A-teacher", "S-small", "K-kd") for seed in (7, 8)} - before == set(new)
    assert 1 == len({record["run_id"] for record in new.values()})
    assert {2} == {record["machine"]["workers"] for record in new.values()}
    assert 1 == len(list((pytester.path / "outputs/tiny/cache/teachers").glob("[!.]*")))
    assert all(f"{phase} ×2" in done.stdout for phase in ("S-small", "K-kd"))
    assert "A-teacher ×" not in done.stdout  # it trains nothing, and is the same for every seed
    for letter in "ask":
        report = json.loads((pytester.path / f"outputs/tiny/reports/phase_{letter}_metrics.json").read_text())
        assert [7, 8] == report["seeds"]


@pytest.mark.parametrize(
    ("arguments", "message", "outcome"),
    [
        (["--peft-device=abacus"], "DeviceError: device must be one that torch can use here, such as cpu, got 'abacus'", "1 error"),
        (["--peft-outputs=occupied"], "OutputsError: cannot write to the outputs folder", "1 error"),
        (["--peft-data=bad"], "train.tsv, line 3: split 'train' has label '-1'; wanted 0 or 1", "1 failed"),
    ],
)
def test_what_workers_of_xdist_cannot_use_fails_their_cases_before_training(
    study, pytester, data_folder, arguments, message, outcome
):
    """In one line each, as the session that they work for does not collect and cannot know."""
    study("--collect-only", "-q")
    pytester.makefile("", occupied="a file")
    (pytester.path / "bad").mkdir()
    (pytester.path / "bad/train.tsv").write_text("sentence\tlabel\ngood\t1\nbad\t-1\n")
    (pytester.path / "bad/dev.tsv").write_text("sentence\tlabel\ngood\t1\nbad\t0\n")
    done = in_two_workers(pytester, data_folder, "-k", "small", *arguments)
    assert 1 == done.returncode, done.stdout + done.stderr
    assert message in done.stdout
    assert "Traceback" not in done.stdout
    assert outcome in done.stdout.splitlines()[-1]


def test_a_gate_judges_what_workers_of_xdist_measured(study, pytester, data_folder):
    """By what the base was before they began; a base that is none is said before they do."""
    gate = ["-k", "small", "--peft-fail", "accuracy:1pt", "--peft-fail", "accuracy:50pt", "--peft-compare"]
    assert 0 == study("-k", "small").ret
    done = in_two_workers(pytester, data_folder, *gate, "outputs/tiny/reports")
    assert 0 == done.returncode, done.stdout + done.stderr
    assert "accuracy:1pt: S-small may be up to " in done.stdout  # as 120 examples cannot tell
    assert "accuracy:50pt: kept in 1 phase" in done.stdout
    done = in_two_workers(pytester, data_folder, *gate, "no-such")
    assert pytest.ExitCode.USAGE_ERROR == done.returncode
    assert "'no-such' is not a file, a folder" in done.stderr
    assert 2 == len(list((pytester.path / "outputs/tiny/runs").glob("*/*.json")))


def test_workers_of_xdist_say_what_one_process_says(study, pytester, data_folder, commit):
    """Why a case runs again, and which records cannot be read."""
    study("--collect-only", "-q")
    commit()
    study("-k", "small or kd")
    [path] = (pytester.path / "outputs/tiny/runs").glob("*/K-*.json")
    path.write_text("{")
    (pytester.path / "test_study.py").write_text((pytester.path / "test_study.py").read_text() + "\n# changed\n")
    done = in_two_workers(pytester, data_folder, "-n", "1", "-k", "small or kd", "--peft-resume")
    assert 0 == done.returncode, done.stdout + done.stderr
    assert 1 == done.stdout.count("S-small with seed 42 runs again: it passed in run ")
    assert 1 == done.stdout.count("left out of the history: ")


def test_phases_of_one_letter_in_two_workers_are_said(pytester):
    """Neither worker knows of the other's: their session keeps the first one's report and fails."""
    session = pytester.parseconfigure().stash[SESSION]
    store = Store(session.options.outputs, "mini")
    paths = [store.save(record) for record in (passed("S-one"), passed("S-two"))]
    for when, path in itertools.product(("call", "teardown"), paths):
        properties = [("peftbench_case", True), ("peftbench_record", str(path))]
        report = pytest.TestReport("x", ("x", 0, "x"), {}, "passed", None, when, user_properties=properties)
        session.pytest_runtest_logreport(report)
    assert ["the report of S-two-mini-s42 was not written: phases S-two and S-one would share it; rename one"] == list(
        session.unpublished.values()
    )
    assert "one" == json.loads(store.report_path("S").read_text())["name"]


def test_a_marker_of_the_test_keeps_the_clock_of_the_loop(pytester, data_folder, records):
    """Whoever groups benchmarks by a marker of their own still gets the time of the training loop."""
    pytester.makepyfile("""
        import pytest
        from peftbench.phases import Phase

        @pytest.mark.benchmark(group="mine")
        def test_phase(run_phase):
            run_phase(Phase(id="S-one", role="student", subset=16, epochs=1))
    """)
    result = pytester.runpytest_inprocess("-m", "tiny", f"--peft-data={data_folder}", "--benchmark-json=b.json")
    result.assert_outcomes(passed=1, deselected=1)
    [entry] = json.loads((pytester.path / "b.json").read_text())["benchmarks"]
    [record] = records().values()
    assert ("mine", pytest.approx(record["train_runtime_seconds"])) == (entry["group"], entry["stats"]["mean"])
