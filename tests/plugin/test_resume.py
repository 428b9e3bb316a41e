"""--peft-resume: what has passed at this commit is not run again."""

import subprocess


def commit(folder):
    for arguments in (["init", "-q"], ["add", "test_study.py"], ["commit", "-q", "-m", "study"]):
        identity = ["-c", "user.name=tester", "-c", "user.email=tester@localhost"]
        subprocess.run(["git", *identity, *arguments], cwd=folder, check=True)


def test_passed_cases_are_skipped_and_said_so(study, pytester, records):
    """The second session runs only what is missing and shows all of it."""
    study("--collect-only", "-q")
    commit(pytester.path)
    study("-k", "small").assert_outcomes(passed=1, deselected=5)
    result = study("-k", "small or kd", "--peft-resume", "-rs")
    result.assert_outcomes(passed=1, skipped=1, deselected=4)
    result.stdout.fnmatch_lines(
        ["K-kd*", "S-small*", "*resumed: passed with this fingerprint at this commit in run *"], consecutive=False
    )
    assert ["K-kd-tiny-s42.json", "S-small-tiny-s42.json"] == sorted(records())


def test_other_content_is_not_resumed(study, pytester):
    """Another precision, seed or change of a tracked file makes it another case."""
    study("--collect-only", "-q")
    commit(pytester.path)
    arguments = ["-k", "small", "--peft-resume", "--peft-precision", "fp32"]
    study(*arguments).assert_outcomes(passed=1, deselected=5)
    study(*arguments).assert_outcomes(skipped=1, deselected=5)
    study(*arguments, "--peft-seeds", "7").assert_outcomes(passed=1, deselected=5)
    study(*arguments[:-1], "bf16").assert_outcomes(passed=1, deselected=5)
    (pytester.path / "test_study.py").write_text((pytester.path / "test_study.py").read_text() + "\n# changed\n")
    study(*arguments).assert_outcomes(passed=1, deselected=5)


def test_a_corrupt_record_is_left_out_and_named(study, pytester):
    """A truncated record in the history does not stop the session."""
    study("-k", "small").assert_outcomes(passed=1, deselected=5)
    [path] = (pytester.path / "outputs/tiny/runs").glob("*/*.json")
    path.write_text(path.read_text()[:100])
    result = study("-k", "small", "--peft-resume")
    result.assert_outcomes(passed=1, deselected=5, warnings=1)
    result.stdout.fnmatch_lines(["*left out of the history: *S-small-tiny-s42.json*"])
