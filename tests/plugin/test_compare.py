"""``--peft-compare`` and ``--peft-fail``: one job runs and judges."""

import pytest

from peftbench.records import read_record


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--peft-compare", "no-such-commit"), "*'no-such-commit' is no file, no folder, not 'latest', no run*"),
        (("--peft-compare", "latest", "--peft-fail", "speed:3%"), "*--peft-fail must name one of accuracy, f1*got 'speed:3%'*"),
        (("--peft-fail", "accuracy:1pt"), "*--peft-fail accuracy:1pt judges a comparison; name what to compare with*"),
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
        content = content.replace(predictions.predicted, predictions.gold)
    path.write_text(content)
    result = study("-k", "small", "--peft-compare", "latest", "--peft-fail", "accuracy:0.5pt")
    result.assert_outcomes(passed=1, deselected=5)
    assert 1 == result.ret
    result.stdout.fnmatch_lines(["*S-small: accuracy is worse by more than 0.005*"])


def test_phases_that_were_not_asked_for_are_not_missing(study):
    """With -k the others of the base are left alone; without, a phase that is gone leaves the gate open."""
    study("-k", "small or teacher")
    limits = ("--peft-compare", "latest", "--peft-fail", "accuracy:0.5pt")
    assert 0 == study("-k", "small", *limits).ret
    study("-k", "small or teacher")
    result = study(
        "--deselect", "test_study.py::test_phase[A-teacher-tiny]", "--deselect", "test_study.py::test_phase[K-kd-tiny]", *limits
    )
    assert 2 == result.ret
    result.stdout.fnmatch_lines(["*A-teacher: outcome: missing: no record in the head*"])


def test_what_cannot_be_told_is_neither(study, pytester):
    """Other seeds: exit status 2."""
    study("-k", "small", "--peft-seeds", "1")
    result = study("-k", "small", "--peft-compare", "latest", "--peft-fail", "accuracy:0.5pt")
    assert 2 == result.ret
    result.stdout.fnmatch_lines(["*S-small: accuracy: not comparable: other seed set: 1 and 42*"])
