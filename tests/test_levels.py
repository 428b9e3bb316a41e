"""A metric over commits: git's order, and the commits that shift a level."""

import dataclasses

from samples import failed, git, passed

from peftbench.commits import Commit, commits_in_order
from peftbench.levels import trace
from peftbench.metrics import METRICS
from peftbench.records import Predictions

LOST = range(45)


def points_of(records, metric, commits):
    [points] = trace(records, METRICS[metric], commits).values()
    return points


def at(commit, day, **changes):
    return passed(run=f"202601{day:02d}T000000Z-aaaaaa", commit={"id": commit, "dirty": False, "changes": None}, **changes)


COMMITS = [Commit(id=letter * 40, subject=f"step {letter}") for letter in "abcde"]


def test_commits_stand_in_gits_order_and_shifts_are_named():
    """Measured in another order than committed; the third commit loses 2.5 points and the fifth wins them back."""
    wrong = {"a": (), "b": range(2), "c": LOST, "d": range(46), "e": ()}
    records = [at(letter * 40, day, wrong=wrong[letter]) for day, letter in enumerate("edcba", start=1)]
    points = points_of(records, "accuracy", COMMITS)
    assert list("abcde") == [point.commit[0] for point in points]
    assert [None, None, "worse", None, "better"] == [point.shift for point in points]
    assert ["step a", 1.0] == [points[0].subject, points[0].value]


def test_a_slow_drift_shifts_the_level():
    """No commit loses enough to show beside the one before it: five more examples each, p of 0.06."""
    records = [at(commit.id, day, wrong=range(5 * day - 5)) for day, commit in enumerate(COMMITS, start=1)]
    assert [None, None, "worse", None, "worse"] == [point.shift for point in points_of(records, "accuracy", COMMITS)]


def test_a_slower_loop_shifts_the_level_of_time():
    """By half, where single measurements may differ by a quarter."""
    seconds = {"a": 60, "b": 66, "c": 93, "d": 90, "e": 95}
    records = [at(letter * 40, day, seconds=seconds[letter]) for day, letter in enumerate("abcde", start=1)]
    assert [None, None, "worse", None, None] == [point.shift for point in points_of(records, "train_runtime_seconds", COMMITS)]


def test_commits_of_other_branches_take_no_part_in_the_level(repository):
    """One that was never merged is shown and marked, and its loss is no shift; once merged, it is."""
    folder, ids = repository
    git(folder, "checkout", "-q", "-b", "experiment", "HEAD~2")
    git(folder, "commit", "-q", "--allow-empty", "-m", "experiment")
    experiment = git(folder, "rev-parse", "HEAD")
    git(folder, "checkout", "-q", "-")
    records = [at(one, day, wrong=LOST if one == experiment else ()) for day, one in enumerate([*ids, experiment], start=1)]
    points = points_of(records, "accuracy", commits_in_order(folder))
    assert [None] * 6 == [point.shift for point in points]
    assert {experiment: ["other branch"]} == {point.commit: point.marks for point in points if point.marks}

    git(folder, "merge", "-q", "--no-ff", "-m", "merge", "experiment")
    points = points_of(records, "accuracy", commits_in_order(folder))
    assert "worse" in [point.shift for point in points if point.commit == experiment]
    assert [] == [mark for point in points for mark in point.marks]


def test_machines_that_alternate_have_a_level_each():
    """The loop gets slower by half at the fourth commit: said once, though the other machine sees it at the fifth only."""
    machines, seconds = "mnmnmnmn", [60, 90, 61, 135, 90, 134, 91, 60]
    commits = [Commit(id=letter * 40, subject=letter) for letter in "abcdefgh"]
    records = [
        at(commit.id, day, machine={"id": machine}, seconds=s)
        for day, (commit, machine, s) in enumerate(zip(commits, machines, seconds, strict=True), start=1)
    ]
    points = points_of(records, "train_runtime_seconds", commits)
    assert [None, None, None, "worse", None, None, None, "better"] == [point.shift for point in points]
    assert [[], *[["other machine"]] * 7] == [point.marks for point in points]


def test_a_commit_measured_on_two_machines_is_judged_on_each():
    """The second machine's runs do not hide that the first one got slower."""
    records = [at(c * 40, day, machine={"id": m}, seconds=s) for day, (c, m, s) in enumerate([("a", "m", 60), ("a", "n", 20)])]
    records += [at("b" * 40, day, machine={"id": m}, seconds=s) for day, (m, s) in enumerate([("m", 90), ("n", 20)], start=3)]
    assert [None, "worse"] == [point.shift for point in points_of(records, "train_runtime_seconds", COMMITS)]


def test_seeds_alternate_like_machines():
    """A nightly run of three seeds between runs of one: those that a commit shares with the level are compared."""
    records = []
    for day, commit in enumerate(COMMITS, start=1):
        records += [at(commit.id, day, seed=seed, wrong=LOST if day > 2 else ()) for seed in ((42, 43, 44) if day % 2 else (42,))]
    points = points_of(records, "accuracy", COMMITS)
    assert [None, None, "worse", None, None] == [point.shift for point in points]
    assert [[], *[["other seed set"]] * 4] == [point.marks for point in points]


def test_seeds_that_are_added_hide_no_loss():
    """One seed before, three from the commit on that loses; the second one failed once in between."""
    records = [at("a" * 40, 1), at("b" * 40, 2), *(at("c" * 40, 3, seed=seed, wrong=LOST) for seed in (42, 43, 44))]
    assert [None, None, "worse"] == [point.shift for point in points_of(records, "accuracy", COMMITS)]
    records = [at("a" * 40, 1, seed=seed) for seed in (42, 43, 44)]
    records += [at("b" * 40, 2, seed=seed, wrong=LOST) for seed in (42, 44)]
    records += [at("c" * 40, 3, seed=seed, wrong=LOST) for seed in (42, 43, 44)]
    assert [None, "worse", None] == [point.shift for point in points_of(records, "accuracy", COMMITS)]


def test_what_was_not_committed_moves_no_level():
    """A loss in an experiment, or at a commit that git does not know, and the next commit has it no more: nothing shifted."""
    experiment = dataclasses.replace(at("a" * 40, 2, wrong=LOST), commit={"id": "a" * 40, "dirty": True, "changes": "abc"})
    for odd, mark in ((experiment, "dirty"), (at("f" * 40, 2, wrong=LOST), "unknown")):
        points = points_of([at("a" * 40, 1), odd, at("b" * 40, 3), at("c" * 40, 4, wrong=LOST)], "accuracy", COMMITS)
        assert [None, None, None, "worse"] == [point.shift for point in points]
        assert [[], [mark], [], []] == [point.marks for point in points]


def test_where_nothing_is_committed_the_runs_have_levels():
    """Without git, and in a tree that is never clean, they are all there is."""
    records = [dataclasses.replace(at("x", day, wrong=LOST if day > 1 else ()), commit={"id": None}) for day in (1, 2, 3)]
    assert [None, "worse", None] == [point.shift for point in points_of(records, "accuracy", [])]
    records = [dataclasses.replace(one, commit={"id": "a" * 40, "changes": one.run_id}) for one in records]
    assert [None, "worse", None] == [point.shift for point in points_of(records, "accuracy", COMMITS)]


def test_a_loss_after_a_recovery_is_told_though_another_machine_told_the_one_before():
    """One machine got worse and better again before the other, which last measured before both, gets worse at the fifth commit."""
    days = [("a", "n", 60), ("b", "m", 60), ("c", "m", 90), ("d", "m", 60), ("e", "n", 90)]
    records = [at(c * 40, day, machine={"id": m}, seconds=s) for day, (c, m, s) in enumerate(days, start=1)]
    points = points_of(records, "train_runtime_seconds", COMMITS)
    assert [None, None, "worse", "better", "worse"] == [point.shift for point in points]


def test_repeats_of_a_commit_are_its_runs():
    """Ten percent shows in three steady runs a commit, and not in three seeds of one run."""
    for several_runs, expected in ((True, "worse"), (False, None)):
        records = [
            at(letter * 40, 3 * i + (j if several_runs else 0), seed=42 if several_runs else 42 + j, seconds=s + j / 10)
            for i, (letter, s) in enumerate([("a", 60), ("b", 66)])
            for j in (1, 2, 3)
        ]
        assert [None, expected] == [point.shift for point in points_of(records, "train_runtime_seconds", COMMITS)]


def test_other_memory_before_starts_another_level():
    """What earlier cases left behind counts towards the peak."""
    before = [2**20, 2**20, 2**29, 2**29]
    records = [at(c.id, day, memory_before_bytes=b) for day, (c, b) in enumerate(zip(COMMITS, before, strict=False), start=1)]
    points = points_of(records, "peak_memory_bytes", COMMITS)
    assert [[], [], ["other memory in use before the case"], []] == [point.marks for point in points]


def test_a_phase_that_is_always_wrong_is_shown():
    """Zero is a value."""
    useless = Predictions.from_labels([0] * 10, [1] * 5 + [0] * 5, split_fingerprint="x")
    [point] = points_of([at("a" * 40, 1, predictions={"dev": useless})], "f1", COMMITS)
    assert 0.0 == point.value


def test_a_seed_without_predictions_is_left_out_and_said():
    """It hides no loss of the other seed, there or later, and does not end the command where two commits share no other."""
    silent = {"seed": 43, "predictions": {}}
    records = [at("a" * 40, 1), at("a" * 40, 1, **silent), at("b" * 40, 2, seed=43), at("c" * 40, 3, wrong=LOST)]
    records += [at("c" * 40, 3, **silent), at("d" * 40, 4, **silent)]
    points = points_of(records, "accuracy", COMMITS)
    assert [None, None, "worse", None] == [point.shift for point in points]
    said = [[mark for mark in point.marks if "predictions" in mark] for point in points]
    assert [["no predictions for seed 43"], [], ["no predictions for seed 43"], ["no predictions for seed 43"]] == said
    assert [2, 1, 2, 1] == [point.passed for point in points]


def test_marks_tell_what_is_unusual():
    """Another machine, uncommitted changes, a failure, a commit that git does not know."""
    dirty = dataclasses.replace(at("b" * 40, 2), commit={"id": "b" * 40, "dirty": True, "changes": "abc"})
    broken = failed(run="20260104T000000Z-aaaaaa", commit={"id": "d" * 40, "dirty": False, "changes": None})
    records = [at("a" * 40, 1), dirty, at("c" * 40, 3, machine={"id": "m2"}), broken, at("f" * 40, 5, machine={"id": "m2"})]
    marks = [list(point.marks) for point in points_of(records, "latency_ms", COMMITS)]
    assert [[], ["dirty"], ["other machine"], ["failed"], ["unknown"]] == marks


def test_a_commit_at_which_seeds_newly_fail_shifts_the_level():
    """Even if none is left that the level has; where they fail on, nothing is new, and a recovery is none."""
    broken = [failed(run=f"2026010{day}T000000Z-aaaaaa", seed=1, commit={"id": id_ * 40}) for day, id_ in ((2, "b"), (3, "c"))]
    others = [at("b" * 40, 2, seed=2), at("c" * 40, 3, seed=2), at("d" * 40, 4, seed=1)]
    points = points_of([at("a" * 40, 1, seed=1), *broken, *others], "accuracy", COMMITS)
    assert [None, "worse", None, None] == [point.shift for point in points]
    first = failed(run="20260101T000000Z-aaaaaa", seed=1, commit={"id": "a" * 40})
    swapped = [at("b" * 40, 2, seed=1), at("b" * 40, 2, seed=2), failed(run="20260103T000000Z-a", seed=2, commit={"id": "c" * 40})]
    points = points_of([first, *swapped, at("c" * 40, 3, seed=1)], "accuracy", COMMITS)
    assert [None, None, "worse"] == [point.shift for point in points]


def test_what_a_failed_test_has_measured_is_in_the_value():
    """The count is of those that passed."""
    low = dataclasses.replace(at("a" * 40, 2, wrong=LOST), outcome="failed", error="AssertionError")
    [point] = points_of([at("a" * 40, 1), low], "accuracy", COMMITS)
    assert (0.975, 1, ["failed"]) == (point.value, point.passed, point.marks)


def test_a_commit_with_several_data_has_the_value_of_the_latest():
    """A mean over both would be of neither."""
    other = {"fingerprint": "e" * 64, "source": "others"}
    [point] = points_of([at("a" * 40, 1), at("a" * 40, 2, seconds=30.0, data=other)], "train_runtime_seconds", COMMITS)
    assert (30.0, 2, ["mixed data"]) == (point.value, point.passed, point.marks)
    [point] = points_of([at("a" * 40, 1), at("a" * 40, 2, seconds=30.0)], "train_runtime_seconds", COMMITS)
    assert (45.0, []) == (point.value, point.marks)


def test_times_of_single_runs_beside_other_work_shift_no_level():
    """One run tells nothing of how much that work takes."""
    for waits, shifts in ((0.5, [None, None]), (0.0, [None, "worse"])):
        runs = [
            at(letter * 40, day, seconds=s, processor_wait_fraction=waits) for letter, day, s in (("a", 1, 60.0), ("b", 2, 200.0))
        ]
        assert shifts == [point.shift for point in points_of(runs, "train_runtime_seconds", COMMITS)]


def test_what_was_interrupted_is_as_if_it_had_not_begun():
    """It is no failure of its commit."""
    ended = failed(run="20260109T000000Z-bbbbbb", error="KeyboardInterrupt", commit={"id": "c" * 40, "dirty": False})
    [point] = points_of([at("c" * 40, 1), ended], "accuracy", COMMITS)
    assert ([], 1) == (point.marks, point.passed)


def test_a_run_whose_changes_git_did_not_tell_makes_no_level():
    """It stands behind the clean one of its commit, and says why."""
    unsure = at("a" * 40, 1, wrong=LOST)
    unsure = dataclasses.replace(unsure, commit={"id": "a" * 40, "dirty": None, "changes": None, "problem": "slow"})
    points = points_of([unsure, at("a" * 40, 2), at("b" * 40, 3)], "accuracy", COMMITS)
    assert [([], None), (["perhaps dirty"], None), ([], None)] == [(list(point.marks), point.shift) for point in points]


def test_a_level_of_times_is_the_mean_of_all_its_commits():
    """The first was lucky; a fifth that is slower than it by a third is not slower than the four by a quarter."""
    seconds = {"a": 60, "b": 72, "c": 72, "d": 72, "e": 80}
    records = [at(letter * 40, day, seconds=seconds[letter]) for day, letter in enumerate("abcde", start=1)]
    assert [None] * 5 == [point.shift for point in points_of(records, "train_runtime_seconds", COMMITS)]


def test_the_last_run_of_a_commit_counts_in_whichever_order_they_come():
    """By the time of the run, not by its place among the files."""
    [point] = points_of([at("a" * 40, 2, wrong=LOST), at("a" * 40, 1)], "accuracy", COMMITS)
    assert 1 - 45 / 1800 == point.value


def test_a_commit_that_failed_hides_no_change_of_machine():
    """The next one is marked as if the failure had not been."""
    broken = failed(run="20260102T000000Z-aaaaaa", commit={"id": "b" * 40, "dirty": False, "changes": None})
    records = [at("a" * 40, 1), broken, at("c" * 40, 3, machine={"id": "m2"})]
    assert [[], ["failed"], ["other machine"]] == [list(point.marks) for point in points_of(records, "latency_ms", COMMITS)]
