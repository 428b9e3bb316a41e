"""--peft-seeds: a case each, one report."""

import json
import statistics

import pytest

from peftbench.history import read_side


@pytest.mark.parametrize("seeds", ["", ",", "1,1", "-1", "x", "1.5", "4294967296", "٣"])
def test_a_seed_that_is_none_is_a_usage_error(study, seeds):
    """Seeds are different whole numbers that fit 32 bits; an empty option falls back to the default."""
    result = study(f"--peft-seeds={seeds}", "--collect-only", "-q")
    if seeds:
        assert pytest.ExitCode.USAGE_ERROR == result.ret
        result.stderr.fnmatch_lines([f"*--peft-seeds must be different whole numbers*, got '{seeds}'"])
    else:
        assert pytest.ExitCode.OK == result.ret


def test_each_seed_is_a_case_and_the_report_holds_mean_and_spread(study, records, pytester):
    """Two seeds give two records and one report with mean, deviation and the single values."""
    result = study("-k", "small", "--peft-seeds", "7,8")
    result.assert_outcomes(passed=2, deselected=10)
    left = records()
    assert ["S-small-tiny-s7.json", "S-small-tiny-s8.json"] == list(left)
    values = [record["dev"]["accuracy"] for record in left.values()]
    report = json.loads((pytester.path / "outputs/tiny/reports/phase_s_metrics.json").read_text())
    assert [7, 8] == report["seeds"]
    assert values == report["spread"]["dev.accuracy"]["values"]
    assert report["dev"]["accuracy"] == pytest.approx(statistics.mean(values))
    assert report["spread"]["dev.accuracy"]["sd"] == pytest.approx(statistics.stdev(values))
    result.stdout.fnmatch_lines(["*S-small ×2*±*"])


def test_a_seed_that_failed_is_in_the_report_of_those_that_passed(pytester, data_folder):
    """Whether it ran before the other or after it; a phase of which none passed has no report."""
    pytester.makepyfile("""
        from peftbench.phases import Phase

        def test_half(run_phase, peft_seed):
            record = run_phase(Phase(id="S-half", role="student", subset=16, epochs=1))
            assert peft_seed == 8

        def test_never(run_phase):
            run_phase(Phase(id="N-never", role="student", subset=10**6, epochs=1))
    """)
    result = pytester.runpytest_inprocess("-m", "tiny", f"--peft-data={data_folder}", "--peft-seeds", "7,8,9")
    result.assert_outcomes(passed=1, failed=5, deselected=6)
    [path] = (pytester.path / "outputs/tiny/reports").iterdir()
    report = json.loads(path.read_text())
    assert ("half", "passed", 8) == (report["name"], report["outcome"], report["seed"])
    assert ([7, 8, 9], [7, 9]) == (report["seeds"], report["failed_seeds"])
    records = read_side(str(path), lambda: None).records
    assert ["failed", "passed", "failed"] == [record.outcome for record in records]
