"""--peft-scale and the cases it makes."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest


def collected(result):
    return [line.partition("::")[2] for line in result.outlines if "::" in line]


def test_a_scale_that_does_not_exist_is_a_usage_error(study):
    """An unknown scale names the choices."""
    result = study("--peft-scale", "huge")
    assert pytest.ExitCode.USAGE_ERROR == result.ret
    result.stderr.fnmatch_lines(["*--peft-scale must be one of auto, tiny, mini, thesis, got 'huge'"])


def test_the_ini_key_is_checked_like_the_option(study, pytester):
    """An ini key sets the option's default and is checked the same way."""
    pytester.makeini("[pytest]\npeft_scale = huge")
    assert pytest.ExitCode.USAGE_ERROR == study().ret


def test_tiny_cases_run_only_when_asked_for(pytester, study):
    """Without -m tiny the phases are collected once, at the session's scale."""
    study("--collect-only", "-q")
    plain = pytester.runpytest_inprocess("--collect-only", "-q")
    assert ["test_phase[A-teacher]", "test_phase[S-small]", "test_phase[K-kd]"] == collected(plain)


@pytest.mark.parametrize("arguments", [["-m", "tiny"], ["--peft-scale", "tiny"], ["-k", "tiny"], ["-k", "TINY"]])
def test_tiny_cases_carry_the_suffix(pytester, study, arguments):
    """However they are asked for, the smoke versions end in -tiny and come alone."""
    study("--collect-only", "-q")
    result = pytester.runpytest_inprocess("--collect-only", "-q", *arguments)
    assert ["test_phase[A-teacher-tiny]", "test_phase[S-small-tiny]", "test_phase[K-kd-tiny]"] == collected(result)


def test_comparisons_with_peers_run_only_when_asked_for(pytester):
    """A case marked `peer` is left out of the default run; the marker's name, in -m or -k, brings it in."""
    pytester.makepyfile("""
        import pytest

        @pytest.mark.peer
        def test_race(peft_workbench):
            pass

        def test_phase(peft_workbench):
            pass
    """)
    for arguments, expected in (((), ["test_phase"]), (("-m", "peer"), ["test_race"]), (("-m", "tiny"), ["test_phase[tiny]"])):
        assert expected == collected(pytester.runpytest_inprocess("--collect-only", "-q", *arguments))
    assert ["test_race[tiny]"] == collected(pytester.runpytest_inprocess("--collect-only", "-q", "-m", "peer and tiny"))


def test_a_tiny_case_that_failed_is_run_by_last_failed(pytester, study):
    """--lf means it, so that nobody needs to name it again, nor gets its large sister in its place."""
    study("--collect-only", "-q")
    cache = pytester.path / ".pytest_cache/v/cache"
    cache.mkdir(parents=True)
    (cache / "lastfailed").write_text('{"test_study.py::test_phase[S-small-tiny]": true}')
    result = pytester.runpytest_inprocess("--collect-only", "-q", "--lf")
    assert ["test_phase[S-small-tiny]"] == collected(result)


def test_a_test_may_be_parametrized_over_scale_and_seed_itself(pytester, data_folder, records):
    """Its own values are taken as they are, whatever the options say, and the header names the scale."""
    pytester.makepyfile("""
        import pytest
        from peftbench.phases import Phase

        @pytest.mark.parametrize("peft_scale", ["tiny"], indirect=True)
        @pytest.mark.parametrize("peft_seed", [1, 2], indirect=True)
        def test_phase(run_phase):
            run_phase(Phase(id="S-small", role="student", subset=16, epochs=1))
    """)
    result = pytester.runpytest_inprocess(f"--peft-data={data_folder}", "--peft-seeds=7")
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["peftbench: scale tiny; *"])
    assert ["S-small-tiny-s1.json", "S-small-tiny-s2.json"] == list(records())


def test_a_scale_that_a_test_asks_for_must_exist(pytester):
    """Else the case fails in one line, with the choices."""
    pytester.makepyfile("""
        import pytest

        @pytest.mark.parametrize("peft_scale", ["huge"], indirect=True)
        def test_phase(peft_scale):
            pass
    """)
    result = pytester.runpytest_inprocess()
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["peft_scale must be parametrized with main or one of tiny, mini, thesis, got 'huge'"])


def test_an_override_of_the_scale_holds_for_the_tests_beside_and_below_it(pytester, data_folder, records):
    """In whichever order they run, in one session, though pytest keeps a session's fixtures."""
    study = """
        from peftbench.phases import Phase

        def test_phase(run_phase, sst2):
            record = run_phase(Phase(id="{}-small", role="student", subset=16, epochs=1))
            assert len(sst2.dev) == record.dev.n
    """
    override = """
        import dataclasses
        import pytest
        from peftbench.phases import SCALES, Untrained

        @pytest.fixture(scope="session")
        def peft_scale({}):
            own = Untrained(architecture="distilbert", layers=1, hidden_size=32, attention_heads=4)
            return dataclasses.replace({}, student=own)
    """
    scales = {"one": "peft_scale", "three": "SCALES['tiny']"}
    for letter, folder in zip("XYZ", ("one", "two", "three"), strict=True):
        pytester.mkdir(folder)
        (pytester.path / folder / f"test_{folder}.py").write_text(textwrap.dedent(study.format(letter)))
    for folder, scale in scales.items():
        argument = "peft_scale" if scale == "peft_scale" else ""
        (pytester.path / folder / "conftest.py").write_text(textwrap.dedent(override.format(argument, scale)))
    for order in (["one", "two", "three"], ["three", "two", "one"]):
        result = pytester.runpytest_inprocess("-m", "tiny", f"--peft-data={data_folder}", *order)
        result.assert_outcomes(passed=3, deselected=3)
        latest = {name: record["checkpoint"] for name, record in records().items()}  # later runs come last
        small, usual = "random distilbert, 1 layers of 32", "random distilbert, 2 layers of 64"
        assert [small, usual, small] == [latest[f"{letter}-small-tiny-s42.json"] for letter in "XYZ"]


def test_a_test_that_pytest_does_not_parametrize_is_refused_under_another_override(pytester, data_folder):
    """A class of unittest would get the fixtures of whichever test came before it."""
    pytester.makepyfile("""
        import dataclasses
        import unittest
        import pytest
        from peftbench.phases import Phase, Untrained

        class TestFirst(unittest.TestCase):
            @pytest.fixture(autouse=True)
            def give(self, run_phase):
                self.run_phase = run_phase

            def test_phase(self):
                self.run_phase(Phase(id="S-small", role="student", subset=16, epochs=1))

        class TestSecond(TestFirst):
            @pytest.fixture(scope="session")
            def peft_scale(self, peft_scale):
                own = Untrained(architecture="distilbert", layers=1, hidden_size=32, attention_heads=4)
                return dataclasses.replace(peft_scale, student=own)

            def test_phase(self):
                self.run_phase(Phase(id="T-small", role="student", subset=16, epochs=1))
    """)
    result = pytester.runpytest_inprocess("--peft-scale", "tiny", f"--peft-data={data_folder}")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*RuntimeError: peft_scale is overridden here, and pytest has made the other fixtures *"])


@pytest.mark.parametrize("parameters", ["", ", params=[1, 2]"])
def test_the_workbench_may_be_overridden(pytester, parameters):
    """With whatever parameters, and without the scale."""
    pytester.makepyfile(f"""
        import pytest

        @pytest.fixture(scope="session"{parameters})
        def peft_workbench():
            return "mine"

        def test_mine(peft_workbench):
            assert "mine" == peft_workbench
    """)
    pytester.runpytest_inprocess().assert_outcomes(passed=2 if parameters else 1)


def test_an_override_keeps_the_name_of_its_scale(pytester):
    """By it go the phases' changes, the folders and what a run is compared with."""
    pytester.makepyfile("""
        import dataclasses
        import pytest

        @pytest.fixture(scope="session")
        def peft_scale(peft_scale):
            return dataclasses.replace(peft_scale, name="mine")

        def test_phase(peft_workbench):
            pass
    """)
    result = pytester.runpytest_inprocess("-m", "tiny")
    result.assert_outcomes(errors=1, deselected=1)
    result.stdout.fnmatch_lines(["*peft_scale must keep the name of one of the scales, tiny, mini, thesis, *; got 'mine'"])


def test_help_needs_no_ini_file_that_is_right(pytester):
    """What is wrong is said where tests are to be run."""
    pytester.makeini("[pytest]\npeft_scale = huge")
    shown = pytester.runpytest_inprocess("--help")
    assert pytest.ExitCode.OK == shown.ret
    shown.stdout.fnmatch_lines(["*--peft-fail=METRIC:LIMIT", "*train_runtime_seconds:20%.*"])
    result = pytester.runpytest_inprocess()
    assert pytest.ExitCode.USAGE_ERROR == result.ret
    result.stderr.fnmatch_lines(["*the ini key peft_scale must be one of auto, tiny, mini, thesis, got 'huge'"])


def test_a_folder_whose_name_has_tiny_in_it_asks_for_nothing(pytester, study):
    """Only what stands behind the file in a node id, in -k or in -m does."""
    study("--collect-only", "-q")
    (pytester.path / "destiny").mkdir()
    (pytester.path / "test_study.py").rename(pytester.path / "destiny/test_study.py")
    result = pytester.runpytest_inprocess("--collect-only", "-q", "destiny/test_study.py::test_phase")
    assert ["test_phase[A-teacher]", "test_phase[S-small]", "test_phase[K-kd]"] == collected(result)


def test_a_tiny_case_can_be_named(pytester, study):
    """A node id that says tiny selects that case."""
    study("--collect-only", "-q")
    result = pytester.runpytest_inprocess("--collect-only", "-q", "test_study.py::test_phase[S-small-tiny]")
    assert ["test_phase[S-small-tiny]"] == collected(result)


def test_the_header_says_what_was_chosen_and_why(study):
    """Scale, device and precision stand in one line, with the reason."""
    result = study("-k", "small", "--peft-device", "cpu", "--peft-precision", "fp32")
    assert pytest.ExitCode.OK == result.ret
    result.stdout.fnmatch_lines(["peftbench: scale tiny; device cpu, precision fp32 (as asked; precision as asked); run *"])


@pytest.mark.parametrize("whose", ["a user's study", "the project's benchmarks"])
def test_collecting_imports_no_tensor_library(pytester, study, whose):
    """Loading the plugin and collecting cases leave torch and its kin alone."""
    study("--collect-only", "-q")
    folder = pytester.path if whose == "a user's study" else Path(__file__).parents[2] / "benchmarks"
    code = (
        "import sys, pytest; status = pytest.main(['--collect-only', '-q', '-p', 'no:cacheprovider']); "
        "print('loaded', sorted({'torch', 'transformers', 'datasets', 'peft'} & set(sys.modules))); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert "loaded []" in done.stdout
    assert 0 == done.returncode
