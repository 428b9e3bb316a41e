"""Fixtures that a user's own tests may take."""

import pytest
from samples import REWRITTEN

IN_A_FIXTURE = """
    import pytest
    from peftbench.phases import Phase

    @pytest.fixture
    def record(run_phase):
        return run_phase(Phase(id="S-small", role="student", subset={subset}, epochs=1))

    def test_record(record):
        assert 60 == record.dev.n
"""


def test_session_fixtures_give_splits_logits_and_subsets(pytester, data_folder):
    """The splits, the teacher's logits and the standard KD subsets agree with each other."""
    pytester.makepyfile("""
        from datasets import load_from_disk

        def test_contract(sst2, teacher_logits, kd_subsets):
            assert (1120, 60, 60) == (len(sst2.train), len(sst2.dev), len(sst2.test))
            assert (1000, 2) == tuple(teacher_logits.values.shape)
            assert ["kd_1000", "kd_500"] == list(kd_subsets)
            large, small = (load_from_disk(path)[:] for path in kd_subsets.values())
            assert ["sentence", "label", "idx", "teacher_logits"] == list(large)
            for column in large:
                assert large[column][:500] == small[column]
            assert teacher_logits.values.tolist() == large["teacher_logits"]
            by_id = dict(zip(sst2.train.ids, sst2.train.sentences))
            assert large["sentence"] == [by_id[i] for i in large["idx"]]
    """)
    result = pytester.runpytest_inprocess("-m", "tiny", f"--peft-data={data_folder}")
    result.assert_outcomes(passed=1, deselected=1)


def test_a_case_that_a_fixture_runs_is_a_case(pytester, data_folder, records):
    """Its record is written, resumed and compared as another's, without a warning."""
    pytester.makepyfile(IN_A_FIXTURE.format(subset=16))
    arguments = ["-m", "tiny", f"--peft-data={data_folder}", "-W", "error", "-W", "ignore::FutureWarning", *REWRITTEN]
    pytester.runpytest_inprocess(*arguments).assert_outcomes(passed=1, deselected=1)
    [[name, record]] = records().items()
    assert ("S-small-tiny-s42.json", "passed") == (name, record["outcome"])
    result = pytester.runpytest_inprocess(*arguments, "--peft-resume")
    result.assert_outcomes(skipped=1, deselected=1)
    result.stdout.fnmatch_lines(["resumed, not run again: S-small at tiny scale, seed 42, passed in run *"])


def test_a_phase_is_a_case_of_one_test(pytester, data_folder, records):
    """A second test is refused before it trains, when the case is resumed, too, so that its failure is not passed over."""
    pytester.makepyfile(IN_A_FIXTURE.format(subset=16) + "\n    def test_other(record):\n        assert record.dev.n < 0\n")
    arguments = ["-m", "tiny", f"--peft-data={data_folder}"]
    for more, outcomes in (([], {"passed": 1}), (["--peft-resume"], {"skipped": 1})):
        result = pytester.runpytest_inprocess(*arguments, *more)
        result.assert_outcomes(errors=1, deselected=2, **outcomes)
        result.stdout.fnmatch_lines(
            ["RecordError: S-small-tiny-s42 has run already in this run, and a phase is a case of one test*"]
        )
        assert "could not write" not in result.stdout.str()
    assert ["passed"] == [record["outcome"] for record in records().values()]


def test_a_case_that_fails_in_a_fixture_leaves_its_record(pytester, data_folder, records):
    """It says so, and why."""
    pytester.makepyfile(IN_A_FIXTURE.format(subset=5000))
    result = pytester.runpytest_inprocess("-m", "tiny", f"--peft-data={data_folder}")
    result.assert_outcomes(errors=1, deselected=1)
    [record] = records().values()
    assert "failed" == record["outcome"]
    assert record["error"].startswith("DataError: ")
    result.stdout.fnmatch_lines(["*= peftbench =*", "S-small seed 42 failed: DataError: *"])


@pytest.mark.parametrize(
    "seeds",
    [
        "@pytest.fixture(params=[1, 2])\n    def peft_seed(request):\n        return request.param",
        "def pytest_generate_tests(metafunc):\n        metafunc.parametrize('peft_seed', [1, 2], indirect=True)",
        "pytestmark = pytest.mark.parametrize('peft_seed', [1, 2], indirect=True)",
    ],
    ids=["fixture", "hook", "marker"],
)
def test_seeds_that_a_suite_gives_itself_are_its_seeds(pytester, seeds):
    """However pytest lets it say so."""
    pytester.makepyfile(f"""
    import pytest

    {seeds}

    def test_seed(peft_seed):
        assert peft_seed in (1, 2)
    """)
    pytester.runpytest_inprocess("--peft-seeds", "7").assert_outcomes(passed=2)
