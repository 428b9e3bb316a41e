"""--peft-resume: what has passed at this commit is not run again."""

import json
import shutil
import subprocess

import pytest
from samples import REWRITTEN

from peftbench.cli import main


def test_passed_cases_are_skipped_and_said_so(study, pytester, records, commit):
    """The second session runs only what is missing and shows all of it."""
    study("--collect-only", "-q")
    commit()
    study("-k", "small").assert_outcomes(passed=1, deselected=5)
    result = study("-k", "small or kd", "--peft-resume")
    result.assert_outcomes(passed=1, skipped=1, deselected=4)
    result.stdout.fnmatch_lines(["K-kd*", "S-small*", "resumed, not run again: S-small at tiny scale, seed 42, passed in run *"])
    assert ["K-kd-tiny-s42.json", "S-small-tiny-s42.json"] == sorted(records())


def test_a_run_whose_folder_was_renamed_is_not_resumed(study, pytester, commit):
    """Its record is not where the session would look for it."""
    study("--collect-only", "-q")
    commit()
    study("-k", "small").assert_outcomes(passed=1, deselected=5)
    [run] = (pytester.path / "outputs/tiny/runs").iterdir()
    run.rename(run.with_name("baseline"))
    result = study("-k", "small", "--peft-resume")
    assert 0 == result.ret
    result.assert_outcomes(passed=1, deselected=5)
    result.stdout.fnmatch_lines(["*S-small with seed 42 runs again: it passed in run *only cases of runs whose folders were not*"])


def test_other_content_is_not_resumed(study, pytester, commit):
    """Another precision, seed or change of a tracked file makes it another case."""
    study("--collect-only", "-q")
    commit()
    arguments = ["-k", "small", "--peft-resume", "--peft-precision", "fp32"]
    study(*arguments).assert_outcomes(passed=1, deselected=5)
    study(*arguments).assert_outcomes(skipped=1, deselected=5)
    study(*arguments, "--peft-seeds", "7").assert_outcomes(passed=1, deselected=5)
    study(*arguments[:-1], "bf16").assert_outcomes(passed=1, deselected=5)
    (pytester.path / "test_study.py").write_text((pytester.path / "test_study.py").read_text() + "\n# changed\n")
    study(*arguments).assert_outcomes(passed=1, deselected=5)


def test_a_resumed_phase_has_its_subsets(study, pytester):
    """Also where somebody has deleted them since."""
    study("-k", "teacher").assert_outcomes(passed=1, deselected=5)
    shutil.rmtree(pytester.path / "outputs/tiny/kd")
    study("-k", "teacher", "--peft-resume").assert_outcomes(skipped=1, deselected=5)
    assert ["kd_1000", "kd_500"] == sorted(path.name for path in (pytester.path / "outputs/tiny/kd").glob("[!.]*"))


def test_another_version_of_the_package_is_not_resumed(study, pytester, commit):
    """Which the commit of a study elsewhere does not tell."""
    study("--collect-only", "-q")
    commit()
    study("-k", "small").assert_outcomes(passed=1, deselected=5)
    [path] = (pytester.path / "outputs/tiny/runs").glob("*/*.json")
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "commit": {**record["commit"], "peftbench": "0" * 16}}))
    result = study("-k", "small", "--peft-resume")
    result.assert_outcomes(passed=1, deselected=5)
    result.stdout.fnmatch_lines(["*runs again: it passed in run *, and only cases of this very code of peftbench are resumed"])


def test_a_corrupt_record_is_left_out_and_named(study, pytester):
    """A truncated record in the history does not stop the session."""
    study("-k", "small").assert_outcomes(passed=1, deselected=5)
    [path] = (pytester.path / "outputs/tiny/runs").glob("*/*.json")
    path.write_text(path.read_text()[:100])
    result = study("-k", "small", "--peft-resume", "-W", "error", "-W", "ignore::FutureWarning", *REWRITTEN)
    result.assert_outcomes(passed=1, deselected=5)
    result.stdout.fnmatch_lines(["*left out of the history: *S-small-tiny-s42.json*"])


def test_a_resumed_seed_stands_in_the_report(study, pytester, records):
    """The report covers what this run measured and what it resumed."""
    study("-k", "small", "--peft-seeds", "7").assert_outcomes(passed=1, deselected=5)
    study("-k", "small", "--peft-seeds", "8,7", "--peft-resume").assert_outcomes(passed=1, skipped=1, deselected=10)
    report = json.loads((pytester.path / "outputs/tiny/reports/phase_s_metrics.json").read_text())
    assert [7, 8] == report["seeds"]
    assert 2 == len(records())


def test_after_a_resume_the_latest_run_has_all_of_it(study, pytester, capsys):
    """What the session showed, the commands show."""
    study("-k", "small")
    study("-k", "small or kd", "--peft-resume").assert_outcomes(passed=1, skipped=1, deselected=4)
    outputs = str(pytester.path / "outputs/tiny")
    capsys.readouterr()
    assert 0 == main(["report", "--outputs", outputs, "--format", "json"])
    assert ["K-kd", "S-small"] == sorted(row["id"] for row in json.loads(capsys.readouterr().out))
    assert 0 == main(["history", "--outputs", outputs, "--format", "json"])
    assert {1} == {point["passed"] for point in json.loads(capsys.readouterr().out)}
    latest = max((pytester.path / "outputs/tiny/runs").iterdir())
    for arguments in ([str(latest)], [latest.name, "--outputs", "outputs"], [latest.name, "--outputs", outputs]):
        assert 0 == main(["report", *arguments, "--format", "json"])
        assert ["K-kd", "S-small"] == sorted(row["id"] for row in json.loads(capsys.readouterr().out))


def test_a_record_with_fewer_evaluations_than_asked_for_is_not_resumed(study):
    """None, or two where each step has one; more than there are steps is as many."""
    arguments = ["-k", "small or teacher", "--peft-resume"]
    study(*arguments).assert_outcomes(passed=2, deselected=4)
    study(*arguments, "--peft-evaluations", "2").assert_outcomes(passed=1, skipped=1, deselected=4)  # A trains nothing
    study(*arguments, "--peft-evaluations", "1000").assert_outcomes(passed=1, skipped=1, deselected=4)
    for fewer in ("1000", "2"):
        study(*arguments, "--peft-evaluations", fewer).assert_outcomes(skipped=2, deselected=4)


@pytest.mark.parametrize(("group", "fact"), [("machine", "processor"), ("versions", "torch")])
def test_what_was_measured_elsewhere_is_run_again(study, pytester, group, fact):
    """On another machine, or with other libraries; the device's number makes no other one."""
    study("-k", "small")
    study("-k", "small", "--peft-resume", "--peft-device", "cpu:0").assert_outcomes(skipped=1, deselected=5)
    [path] = (pytester.path / "outputs/tiny/runs").glob("*/*.json")
    content = json.loads(path.read_text())
    content[group][fact] = "another"
    path.write_text(json.dumps(content))
    study("-k", "small", "--peft-resume").assert_outcomes(passed=1, deselected=5)


def test_what_keeps_a_passed_case_from_being_resumed_is_said(study, pytester, commit):
    """That it passed at another commit, and where."""
    study("--collect-only", "-q")
    commit()
    study("-k", "small").assert_outcomes(passed=1, deselected=5)
    (pytester.path / "test_other.py").write_text("")
    for arguments in (
        ["add", "test_other.py"],
        ["-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "-q", "-m", "other"],
    ):
        subprocess.run(["git", *arguments], cwd=pytester.path, check=True)
    result = study("-k", "small", "--peft-resume")
    result.assert_outcomes(passed=1, deselected=5)
    result.stdout.fnmatch_lines(
        ["peftbench: S-small with seed 42 runs again: it passed in run * at commit *, and only cases of this commit *"]
    )


def test_where_git_does_not_answer_nothing_is_resumed(study, pytester):
    """A repository that is there and cannot be read: nobody knows whether the code is the same."""
    (pytester.path / ".git").mkdir()
    study("-k", "small")
    result = study("-k", "small", "--peft-resume")
    result.assert_outcomes(passed=1, deselected=5)
    result.stdout.fnmatch_lines(["peftbench: records will name no commit*git does not read the repository*"])
