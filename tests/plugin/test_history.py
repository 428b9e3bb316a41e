"""Five commits of a study, one of which unlearns, one slows down and one breaks: the commands name exactly these."""

import itertools
import json

import pytest
from samples import git

from peftbench.cli import main

STUDY = """
    import pytest
    from peftbench.phases import Phase

    PHASES = [
        Phase(id="S-small", role="student", epochs=5, learning_rate={rate}, warmup_fraction=0.1),
        Phase(id="K-short", role="student", subset=64, epochs=1, learning_rate={short_rate}),
    ]

    @pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.id)
    def test_phase(phase, run_phase):
        run_phase(phase)
"""

CLOCK = """
    import functools

    import pytest
    import peftbench.training
    from peftbench.measure import ProcessorWait, Stopwatch
    from peftbench.packing import Batches

    @pytest.fixture(autouse=True)
    def one_second_a_step(monkeypatch):
        steps = [0.0]
        collate = Batches.collate

        def slow(batches, rows):
            steps[0] += {seconds}
            return collate(batches, rows)

        monkeypatch.setattr(Batches, "collate", slow)
        monkeypatch.setattr(ProcessorWait, "read_fraction", lambda _: 0.0)  # whatever else runs on this machine
        monkeypatch.setattr(peftbench.training, "Stopwatch", functools.partial(Stopwatch, clock=lambda: steps[0]))
"""

COMMITS = {
    "base": {},
    "nothing that matters": {},
    "lower the learning rate": {"rate": "1e-6"},
    "slow the loop": {"seconds": 1.5},
    "break a phase": {"short_rate": "1e18"},
}


@pytest.fixture
def reviews(tmp_path):
    """One clause without negation, which a tiny model learns in a second: every third sentence to dev and test."""
    good, bad = ("wonderful", "brilliant", "moving", "funny", "superb"), ("dull", "awful", "boring", "clumsy", "stale")
    strengths, subjects = ("", "very ", "truly "), ("plot", "acting", "music", "dialogue", "ending", "camera", "story", "cast")
    rows = [
        f"the {subject} is {strength}{adjective}\t{int(adjective in good)}"
        for adjective, strength, subject in itertools.product([*good, *bad], strengths, subjects)
    ]
    parts = {"dev": rows[::6], "test": rows[1::6], "train": [row for i, row in enumerate(rows) if i % 6 > 1]}
    for name, part in parts.items():
        (tmp_path / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *part]) + "\n")
    return tmp_path


@pytest.fixture
def commits(pytester, reviews, monkeypatch):
    """Run the study at each commit; their ids by subject."""
    monkeypatch.chdir(pytester.path)
    git(pytester.path, "init", "-q")
    ids = {}
    for subject, changes in COMMITS.items():
        facts = {"rate": "3e-3", "short_rate": "1e-3", "seconds": 1.0, **changes}
        pytester.makepyfile(test_study=STUDY.format(**facts))
        pytester.makeconftest(CLOCK.format(**facts))
        (pytester.path / ".gitignore").write_text("outputs\n")
        git(pytester.path, "add", ".")
        git(pytester.path, "commit", "-q", "--allow-empty", "-m", subject)
        ids[subject] = git(pytester.path, "rev-parse", "HEAD")
        result = pytester.runpytest_inprocess("-m", "tiny", f"--peft-data={reviews}")
        result.assert_outcomes(passed=2 - (subject == "break a phase"), failed=int(subject == "break a phase"))
    return ids


def run(capsys, *arguments):
    status = main([*arguments, "--outputs", "outputs/tiny"])
    return status, json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_the_commands_name_what_each_commit_did(commits, capsys):
    """Against the base: nothing, accuracy of one phase, time of both, a phase that newly fails; and the gate's exit status."""
    expected = {
        "nothing that matters": (0, set()),
        "lower the learning rate": (1, {("S-small", "accuracy", "worse"), ("S-small", "f1", "worse")}),
        "slow the loop": (
            1,
            {
                (phase, metric, "worse")
                for phase in ("S-small", "K-short")
                for metric in ("train_runtime_seconds", "samples_per_second")
            },
        ),
        "break a phase": (1, {("K-short", "outcome", "newly failing")}),
    }
    gates = ["--fail", "accuracy:1pt", "--fail", "train_runtime_seconds:20%"]
    told = ("accuracy", "f1", "train_runtime_seconds", "samples_per_second", "outcome")  # other times are this machine's
    for subject, (status, changes) in expected.items():
        found, rows = run(capsys, "compare", commits["base"], commits[subject], "--format", "json", *gates)
        different = {(row["phase"], row["metric"], row["verdict"]) for row in rows if row["metric"] in told}
        assert changes == {one for one in different if one[2] != "no difference shown"}
        assert status == found, subject

    shifts = {}
    for metric in ("accuracy", "train_runtime_seconds"):
        _, points = run(capsys, "history", metric, "--format", "json")
        assert list(COMMITS) == [point["subject"] for point in points if point["phase"] == "S-small"]
        shifts[metric] = {(point["phase"], point["subject"], point["shift"]) for point in points if point["shift"]}
        assert {("K-short", "break a phase")} == {
            (point["phase"], point["subject"]) for point in points if "failed" in point["marks"]
        }
    broken, recovered = ("K-short", "break a phase", "worse"), ("S-small", "slow the loop", "better")
    assert {("S-small", "lower the learning rate", "worse"), recovered, broken} == shifts["accuracy"]
    slowed = {(phase, "slow the loop", "worse") for phase in ("S-small", "K-short")}
    assert {*slowed, ("S-small", "break a phase", "better"), broken} == shifts["train_runtime_seconds"]
