"""Verdicts: what got better or worse, what cannot be told, and why."""

import dataclasses

import numpy as np
import pytest
from samples import failed, passed, predictions

from peftbench.compare import compare, compare_phases, estimate_runs, set_up_changes
from peftbench.gates import Gate, judge
from peftbench.metrics import METRICS
from peftbench.records import TeacherCost
from peftbench.sample import Sample

LOST = range(45)  # of 1,800 examples, 2.5 points


def verdicts(base, head):
    return {(row.phase, row.metric): row.verdict for row in compare(base, head)}


def row_of(base, head, metric):
    [row] = [row for row in compare(base, head) if row.metric == metric]
    return row


def test_a_loss_of_accuracy_is_worse():
    """45 of 1,800 examples lost and none won: 2.5 points, by McNemar's test."""
    row = row_of([passed()], [passed(wrong=LOST)], "accuracy")
    assert ("worse", 1.0, 1 - 45 / 1800) == (row.verdict, row.base, row.head)
    assert -45 / 1800 == pytest.approx(row.difference)
    assert row.ci95[0] < row.difference < row.ci95[1] < 0
    assert "p = 5.7e-14" == row.reason  # 2 / 2**45


def test_a_gain_is_better():
    """The same the other way round."""
    assert "better" == verdicts([passed(wrong=LOST)], [passed()])["B-lora", "accuracy"]


def test_a_difference_within_noise_is_not_shown():
    """Ten lost and ten won."""
    row = row_of([passed(wrong=range(10))], [passed(wrong=range(10, 25))], "accuracy")
    assert "no difference shown" == row.verdict
    assert row.ci95[0] < 0 < row.ci95[1]


def test_more_phases_ask_for_more():
    """Eight of eight lost: p is 0.008, and for seven phases, by Holm, 0.055."""
    ids = ["A-teacher", "B-lora", "C1-full", "C2-kd", "D-hybrid", "E-ia3", "F-x"]
    base, head = [passed(i) for i in ids], [passed(i, wrong=range(8) if i == "B-lora" else ()) for i in ids]
    assert "worse" == verdicts(base[1:2], head[1:2])["B-lora", "accuracy"]
    assert "no difference shown" == verdicts(base, head)["B-lora", "accuracy"]


def test_a_phase_without_the_metric_leaves_the_others_theirs():
    """A comes first and trains nothing; B's time is still judged by B's own."""
    runs = [f"2026010{day}T000000Z-aaaaaa" for day in range(1, 5)]
    base = [
        passed(i, run=run, seconds=s * (60 + n / 10)) for n, run in enumerate(runs) for i, s in (("A-teacher", 0), ("B-lora", 1))
    ]
    head = [
        passed(i, run=run, seconds=s * (90 + n / 10)) for n, run in enumerate(runs) for i, s in (("A-teacher", 0), ("B-lora", 1))
    ]
    found = verdicts(base, head)
    assert ("A-teacher", "train_runtime_seconds") not in found
    assert "worse" == found["B-lora", "train_runtime_seconds"]


def test_several_seeds_are_compared_as_one():
    """The mean over seeds; what each seed loses counts."""
    base = [passed(seed=seed) for seed in (42, 43, 44)]
    head = [passed(seed=seed, wrong=range(40 + seed)) for seed in (42, 43, 44)]
    row = row_of(base, head, "accuracy")
    assert "worse" == row.verdict
    assert -83 / 1800 == pytest.approx(row.difference)


@pytest.mark.parametrize("error", ["KeyboardInterrupt", "KeyboardInterrupt: ", "Exit: enough"])
def test_what_was_interrupted_neither_passed_nor_failed(error):
    """Beside a result it is nothing; alone it leaves open what came of the case."""
    ended = failed(run="20260102T000000Z-bbbbbb", error=error)
    for base, head in (([passed(), ended], [passed(wrong=LOST)]), ([passed()], [passed(wrong=LOST), ended])):
        row = row_of(base, head, "accuracy")
        assert ("worse", "p = 5.7e-14") == (row.verdict, row.reason)
    [row] = compare([passed()], [ended])
    assert ("missing", "no finished record in the head") == (row.verdict, row.reason)


def test_the_last_run_of_a_seed_counts():
    """A later run of the same case replaces the earlier one's predictions."""
    later = passed(run="20260102T000000Z-bbbbbb", wrong=LOST)
    assert "worse" == verdicts([passed()], [later, passed()])["B-lora", "accuracy"]


def test_a_rerun_of_the_base_that_failed_hides_no_loss():
    """What has passed is compared, whatever came after it; only what never passed is fixed."""
    broken = failed(run="20260102T000000Z-bbbbbb")
    broken = dataclasses.replace(broken, phase="B", name="lora")
    row = row_of([passed(), broken], [passed(wrong=LOST)], "accuracy")
    assert "worse" == row.verdict
    assert "p = 5.7e-14; failed in the base: RuntimeError: no" == row.reason
    other_seed = dataclasses.replace(broken, seed=43)
    head = [passed(wrong=LOST), passed(seed=43, wrong=LOST)]
    assert "worse" == row_of([passed(), other_seed], head, "accuracy").verdict
    assert {("B-lora", "outcome"): "fixed"} == verdicts([broken], [passed()])
    elsewhere = dataclasses.replace(broken, data={"fingerprint": "e" * 64})
    assert "p = 5.7e-14" == row_of([passed(), elsewhere], [passed(wrong=LOST)], "accuracy").reason  # it failed on other data
    unknown = failed(seed=43)  # before its data were loaded
    both = [passed(), dataclasses.replace(elsewhere, seed=43)]
    assert "not comparable" == row_of(both, [passed(), unknown], "outcome").verdict
    assert 0.5 == row_of(both, [], "outcome").base


def test_what_fails_in_the_head_is_new_where_the_base_has_passed():
    """With that seed, or without a record of it; a seed that has always failed is no news."""
    broken = dataclasses.replace(failed(error="ValueError"), phase="B", name="lora", seed=43)
    assert {("B-lora", "outcome"): "newly failing"} == verdicts([passed(), passed(seed=43)], [passed(), broken])
    assert {("B-lora", "outcome"): "newly failing"} == verdicts([passed()], [passed(), broken])
    assert {("B-lora", "outcome"): "not comparable"} == verdicts([passed(), broken], [passed(), broken])
    elsewhere = passed(seed=43, data={"fingerprint": "e" * 64})
    here = dataclasses.replace(broken, data={"fingerprint": "f" * 64})
    assert {("B-lora", "outcome"): "not comparable"} == verdicts([elsewhere, here], [here])  # that it has passed on
    assert {("B-lora", "outcome"): "not comparable"} == verdicts([elsewhere], [here])  # on data that the base does not know


@pytest.mark.parametrize(
    ("changes", "metric", "why"),
    [
        ({"data": {"fingerprint": "e" * 64}}, "accuracy", "other data"),
        ({"data": {"fingerprint": "e" * 64}}, "train_runtime_seconds", "other data"),
        ({"seed": 43}, "accuracy", "other seed set: 42 and 43"),
        ({"metrics_version": 2}, "accuracy", "other metric code: 1 and 2"),
        ({"machine": {"id": "m2"}}, "train_runtime_seconds", "other machine: m1 and m2"),
        ({"machine": {"id": "m2"}}, "peak_memory_bytes", "other machine"),
        ({"predictions": passed(n=800).predictions}, "accuracy", "other data"),
        ({"predictions": {**passed().predictions, "dev": predictions(900, (), seed=1)}}, "accuracy", "other data"),
        (
            {"predictions": {"dev": passed().predictions["dev"]}},
            "accuracy",
            "other data: the predictions are of dev or of dev and test",
        ),
        ({"predictions": {}}, "f1", "no predictions were recorded in the head for seed 42"),
        ({"machine": {"id": "m1 with 2 workers"}}, "evaluation_seconds", "other machine"),
        ({"peak_memory_bytes": None}, "peak_memory_bytes", "not measured in the head"),
        (
            {"memory_before_bytes": 2**30},
            "peak_memory_bytes",
            "other memory in use before the case: 512 MiB and 1024 MiB",
        ),
    ],
)
def test_what_cannot_be_compared_says_why(changes, metric, why):
    """Never a number where the two sides are of different things."""
    row = row_of([passed(memory_before_bytes=2**29)], [passed(**{"memory_before_bytes": 2**29, **changes})], metric)
    assert ("not comparable", None, None) == (row.verdict, row.difference, row.ci95)
    assert row.reason.startswith(why)


def test_quality_compares_across_machines():
    """A prediction is a prediction."""
    assert "no difference shown" == verdicts([passed()], [passed(machine={"id": "m2"})])["B-lora", "accuracy"]


@pytest.mark.parametrize(("seconds", "verdict"), [(74.0, "no difference shown"), (76.0, "worse"), (44.0, "better")])
def test_single_times_go_by_the_tolerance(seconds, verdict):
    """A quarter, as there is nothing else to go by."""
    row = row_of([passed()], [passed(seconds=seconds)], "train_runtime_seconds")
    assert (verdict, None, "one run a side, tolerance 25%") == (row.verdict, row.ci95, row.reason)


def test_the_seeds_of_one_run_are_no_repeats():
    """They share the machine's hour: their mean is one measurement, and a steady 5% within them tells nothing."""
    base, head = ([passed(seed=seed, seconds=s + seed / 100) for seed in (42, 43, 44)] for s in (60, 63))
    row = row_of(base, head, "train_runtime_seconds")
    assert ("no difference shown", None, "one run a side, tolerance 25%") == (row.verdict, row.ci95, row.reason)
    assert (60.43, 63.43) == (pytest.approx(row.base), pytest.approx(row.head))


@pytest.mark.parametrize("runs", [1, 2, 3])
def test_runs_that_differ_raise_no_false_alarms(runs):
    """Of 2,000 comparisons at most 5%, up to chance, where runs differ by 2% and the three seeds of each by 1%."""
    metric, rng = METRICS["train_runtime_seconds"], np.random.default_rng(7)
    one = passed()
    alarms = 0
    for _ in range(2000):
        logs = 0.02 * rng.standard_normal((2, runs, 1)) + 0.01 * rng.standard_normal((2, runs, 3))
        base, head = (
            Sample(
                [
                    dataclasses.replace(one, run_id=f"{run}", seed=seed, train_runtime_seconds=float(seconds))
                    for run, seeds in enumerate(60 * np.exp(side))
                    for seed, seconds in enumerate(seeds)
                ]
            )
            for side in logs
        )
        found = estimate_runs(metric, base.values(metric), head.values(metric))
        alarms += found is not None and found.p < 0.05
    assert alarms / 2000 <= (0.06 if runs > 1 else 0)


def test_a_seed_without_predictions_is_not_left_out_unsaid():
    """On both sides or one; the other seed alone would have shown a loss."""
    silent = passed(seed=43, predictions={})
    row = row_of([passed(), silent], [passed(wrong=LOST), silent], "accuracy")
    assert ("not comparable", "no predictions were recorded in the base for seed 43") == (row.verdict, row.reason)
    row = row_of([passed(), passed(seed=43)], [passed(wrong=LOST), silent], "accuracy")
    assert "no predictions were recorded in the head for seed 43" == row.reason


def test_repeated_times_go_by_the_interval():
    """Five percent shows in four steady repeats a side."""
    runs = [f"2026010{day}T000000Z-aaaaaa" for day in range(1, 5)]
    base = [passed(run=run, seconds=60 + i / 10) for i, run in enumerate(runs)]
    head = [passed(run=run, seconds=63 + i / 10) for i, run in enumerate(runs)]
    row = row_of(base, head, "train_runtime_seconds")
    assert "worse" == row.verdict
    assert row.ci95[0] < 3 < row.ci95[1]


def test_sizes_are_exact():
    """One more trained parameter is worse; direction is the metric's."""
    found = verdicts([passed()], [passed(trainable=1001, artifact_bytes=2**19)])
    assert ("worse", "better") == (found["B-lora", "trainable_parameters"], found["B-lora", "artifact_bytes"])


def test_faster_is_better_whichever_way_it_is_measured():
    """Seconds down and examples a second up are both gains."""
    found = verdicts([passed()], [passed(seconds=30.0)])
    assert ("better", "better") == (found["B-lora", "train_runtime_seconds"], found["B-lora", "samples_per_second"])


@pytest.mark.parametrize(
    ("base", "head", "verdict", "why"),
    [
        ([passed()], [failed()], "newly failing", "RuntimeError: no"),
        ([failed()], [passed()], "fixed", "failed in the base"),
        ([failed()], [failed()], "not comparable", "fails on both sides"),
        ([passed()], [], "missing", "no finished record in the head"),
        ([], [passed()], "new", "no finished record in the base"),
        ([passed(), passed(seed=43)], [passed(), failed(seed=43)], "newly failing", "seed 43: RuntimeError"),
    ],
)
def test_outcomes(base, head, verdict, why):
    """One row, and no metric, for a phase that has no figures on one of the sides."""
    [row] = compare(base, head)
    assert ("B-lora", "outcome", verdict) == (row.phase, row.metric, row.verdict)
    assert row.reason.startswith(why)


def test_what_a_failed_test_has_measured_is_compared():
    """Beside the outcome, so that a gate says how much was lost; not where another seed has no figures, as after a crash."""
    wanting = passed(wrong=LOST, outcome="failed", error="AssertionError: too low")
    rows = {row.metric: row for row in compare([passed()], [wanting])}
    assert ("newly failing", 1.0, 0.0) == (rows["outcome"].verdict, rows["outcome"].base, rows["outcome"].head)
    assert ("worse", pytest.approx(-len(LOST) / 1800)) == (rows["accuracy"].verdict, rows["accuracy"].difference)
    [*lines] = judge([*rows.values()], [Gate.from_text("accuracy:1pt")]).lines
    assert ["B-lora: newly failing: AssertionError: too low", "B-lora: accuracy is worse by more than 1pt"] == [
        line.partition(" (p")[0] for line in lines
    ]
    [row] = compare([passed(), passed(seed=43)], [wanting, failed(seed=43)])
    assert ("outcome", "newly failing") == (row.metric, row.verdict)


def test_times_of_single_runs_beside_other_work_show_nothing():
    """The tolerance is for a machine that is left alone; several runs show by their own spread how much they vary."""
    sides = [[passed(seconds=seconds, processor_wait_fraction=0.5)] for seconds in (60.0, 200.0)]
    row = row_of(*sides, "train_runtime_seconds")
    assert ("no difference shown", 140.0, None) == (row.verdict, row.difference, row.ci95)
    assert "one run a side, while other work ran" == row.reason
    notes = judge([row], [Gate.from_text("train_runtime_seconds:20%")])
    assert (0, "train_runtime_seconds:20%: B-lora is 2:20 min worse, which is not shown to be a difference") == (
        notes.status,
        notes.lines[0].partition(" (")[0],
    )
    assert "worse" == row_of([passed(seconds=60.0)], [passed(seconds=200.0)], "train_runtime_seconds").verdict
    within = row_of(*[[passed(seconds=s, processor_wait_fraction=0.5)] for s in (60.0, 61.0)], "train_runtime_seconds")
    assert ["train_runtime_seconds:30%: no loss can be shown in B-lora (one run a side, while other work ran)"] == [
        *judge([within], [Gate.from_text("train_runtime_seconds:30%")]).lines
    ]
    several = [
        [passed(seconds=seconds + i, run=f"2026010{i}T000000Z-aaaaaa", processor_wait_fraction=0.5) for i in range(1, 6)]
        for seconds in (60.0, 200.0)
    ]
    assert "worse" == row_of(*several, "train_runtime_seconds").verdict


def test_a_phase_beside_another():
    """Within a run, by letter, name or id; the same statistics."""
    records = [passed("B-lora"), passed("D-hybrid", wrong=LOST)]
    for first, second in (("B", "D"), ("lora", "hybrid"), ("b-lora", "d-hybrid")):
        rows = {row.metric: row for row in compare_phases(records, first, second)}
        assert ("B-lora → D-hybrid", "worse") == (rows["accuracy"].phase, rows["accuracy"].verdict)
    elsewhere = failed("D-hybrid", run="20260102T000000Z-bbbbbb", data={"fingerprint": "e" * 64})
    assert "outcome" not in {row.metric for row in compare_phases([passed("B-lora"), passed("D-hybrid"), elsewhere], "B", "D")}
    [row] = compare_phases([passed("B-lora"), failed("D-hybrid")], "B", "D")
    assert ("outcome", "not comparable") == (row.metric, row.verdict)
    assert row.reason.startswith("D-hybrid failed: RuntimeError")
    with pytest.raises(ValueError, match=r"a phase must be one of B-lora, D-hybrid; got 'X'; give another run as BASE"):
        compare_phases(records, "B", "X")


def test_phases_beside_each_other_are_each_pair_once():
    """Lists and `all` give every pair once, in the order asked for, with p-values adjusted for the number of pairs."""
    records = [passed("B-lora"), passed("C1-full", wrong=LOST), passed("D-hybrid", wrong=LOST)]

    def pairs(first, second):
        rows = compare_phases(records, first, second)
        return list(dict.fromkeys(row.phase for row in rows)), {row.phase: row for row in rows if row.metric == "accuracy"}

    assert ["B-lora → D-hybrid", "B-lora → C1-full"] == pairs("B", "D, C1")[0]
    assert ["B-lora → C1-full", "B-lora → D-hybrid"] == pairs("b", "all")[0]
    names, rows = pairs("all", "ALL")
    assert ["B-lora → C1-full", "B-lora → D-hybrid", "C1-full → D-hybrid"] == names
    assert ["worse", "worse", "no difference shown"] == [rows[name].verdict for name in names]
    single = [row for row in compare_phases(records, "B", "C1") if row.metric == "accuracy"]
    p = float(single[0].reason.removeprefix("p = "))
    assert f"p = {p:.2g}, {3 * p:.2g} adjusted for 3 pairs" == rows["B-lora → C1-full"].reason
    tiny = dataclasses.replace(records[0], scale="tiny")
    assert names == [
        phase.replace("-mini", "") for phase in dict.fromkeys(row.phase for row in compare_phases([*records, tiny], "all", "all"))
    ]
    broken = [*records, failed("A-teacher")]
    assert ["A-teacher → B-lora", "A-teacher → C1-full", "A-teacher → D-hybrid", *names] == list(
        dict.fromkeys(row.phase for row in compare_phases(broken, "all", "all"))
    )
    with pytest.raises(ValueError, match=r"'B' and 'lora' are the same phase; name two of B-lora, C1-full, D-hybrid"):
        compare_phases(records, "B", "lora")


def test_a_phase_that_trains_nothing_stands_beside_every_seed():
    """Its model is the same for all of them: with other seeds on the other side it is compared with each."""
    still = passed("A-teacher", optimizer_steps=0, seed=42)
    trained = [passed("B-lora", wrong=LOST[: 10 + seed], optimizer_steps=9, seed=seed) for seed in (1, 2, 3)]
    [row] = [row for row in compare_phases([still, *trained], "A", "B") if row.metric == "accuracy"]
    copies = [dataclasses.replace(still, name="copy", phase="X", optimizer_steps=9, seed=seed) for seed in (1, 2, 3)]
    [same] = [row for row in compare_phases([*copies, *trained], "X", "B") if row.metric == "accuracy"]
    assert (same.difference, same.ci95) == (row.difference, row.ci95)
    again = [dataclasses.replace(still, seed=seed, run_id="20260102T000000Z-bbbbbb") for seed in (1, 2, 3)]
    assert "no difference shown" == row_of([still], again, "accuracy").verdict


def test_times_of_a_busy_machine_are_compared_with_such_alone():
    """Where other work took the processor on one side, times are not comparable; runs that were alone are, if there are any."""
    alone, busy = passed(processor_wait_fraction=0.01), passed(seconds=120.0, processor_wait_fraction=0.47)
    row = row_of([alone], [busy], "train_runtime_seconds")
    assert ("not comparable", "other load: waited for a processor 1% in the base and 47% in the head") == (row.verdict, row.reason)
    assert "no difference shown" == row_of([alone], [busy], "accuracy").verdict
    later = dataclasses.replace(alone, run_id="20260103T000000Z-cccccc")
    row = row_of([alone], [busy, later], "train_runtime_seconds")
    assert ("no difference shown", 60.0) == (row.verdict, row.head)
    assert "1 of the head's 2 records left out: other load" in row.reason


def test_scales_are_never_mixed():
    """A phase at two scales is two phases."""
    tiny = dataclasses.replace(passed(), scale="tiny")
    assert {"B-lora-mini", "B-lora-tiny"} == {row.phase for row in compare([passed(), tiny], [passed(), tiny])}


def test_a_phase_that_does_not_train_has_no_training_time():
    """Zero seconds on both sides is no row, and beside a phase that trains no number."""
    still = passed(seconds=0.0)
    assert "train_runtime_seconds" not in {row.metric for row in compare([still], [still])}
    row = row_of([still], [passed()], "train_runtime_seconds")
    assert ("not comparable", None, "not measured in the base") == (row.verdict, row.base, row.reason)


def test_a_training_time_says_what_it_leaves_out():
    """The teacher's, where one side alone needed one."""
    cost = TeacherCost(training_seconds=77.0, logit_seconds=2.0, cache="hit")
    rows = compare_phases([passed("B-lora"), passed("D-hybrid", teacher_cost=cost)], "B", "D")
    [reason] = [row.reason for row in rows if row.metric == "train_runtime_seconds"]
    assert reason.endswith("; the teacher's 79 s in the head not counted")
    assert "teacher" not in row_of([passed(teacher_cost=cost)], [passed(teacher_cost=cost)], "train_runtime_seconds").reason


def test_a_mean_beside_one_measurement_is_not_called_single():
    """Nothing tells how far one varies, though the other side has two."""
    base = [passed(), passed(run="20260102T000000Z-bbbbbb")]
    assert "one run in the head, tolerance 25%" == row_of(base, [passed()], "train_runtime_seconds").reason
    assert "one run in the base, tolerance 25%" == row_of([passed()], base, "train_runtime_seconds").reason


@pytest.mark.parametrize(
    ("odd", "metric", "why"),
    [
        ({"machine": {"id": "m2"}}, "train_runtime_seconds", "1 of the base's 3 records left out: other machine"),
        ({"data": {"fingerprint": "e" * 64}}, "accuracy", "1 of the base's 3 records left out: other data"),
        ({"metrics_version": 2}, "f1", "1 of the base's 3 records left out: other metric code"),
        ({"peak_memory_scope": "device"}, "peak_memory_bytes", "1 of the base's 3 records left out: other scope of memory"),
    ],
)
def test_an_odd_run_in_the_base_is_left_out(odd, metric, why):
    """The last of three was elsewhere; the other two are compared, and the reason says so."""
    base = [passed(run=f"2026010{day}T000000Z-aaaaaa", **(odd if day == 3 else {})) for day in (1, 2, 3)]
    row = row_of(base, [passed(run="20260104T000000Z-aaaaaa", wrong=LOST)], metric)
    assert row.verdict != "not comparable"
    assert row.reason.endswith(f"; {why}")


def test_of_several_machines_the_one_on_both_sides_counts():
    """That of most of the head's runs; a base that is of none of the head's cannot be compared."""
    base = [passed(run=f"2026010{day}T000000Z-aaaaaa", machine={"id": f"m{day}"}) for day in (1, 2)]
    head = [passed(run=f"2026020{day}T000000Z-aaaaaa", machine={"id": machine}) for day, machine in ((1, "m3"), (2, "m2"))]
    row = row_of(base, head, "train_runtime_seconds")
    left = "; 1 of the base's 2 records left out: other machine; 1 of the head's 2 records left out: other machine"
    assert ("no difference shown", f"one run a side, tolerance 25%{left}") == (row.verdict, row.reason)
    row = row_of(base, [passed(machine={"id": "m3"})], "train_runtime_seconds")
    assert ("not comparable", "other machine: m1 and m3; 1 of the base's 2 records left out: other machine") == (
        row.verdict,
        row.reason,
    )


def test_what_is_the_same_on_both_sides_is_no_reason():
    """Of runs on several data those on the head's remain, and what is left is said alone, in words where the records have them."""
    machine = {"id": "m1", "processor": "x", "threads": 2}
    base = [
        passed(run="20260101T000000Z-aaaaaa", machine=machine),
        passed(run="20260102T000000Z-aaaaaa", machine=machine, data={"fingerprint": "e" * 64, "source": "others"}),
    ]
    head = passed(run="20260103T000000Z-aaaaaa", machine={**machine, "id": "m2", "workers": 2})
    row = row_of(base, [head], "train_runtime_seconds")
    assert ("not comparable", 60.0) == (row.verdict, row.base)
    assert row.reason.startswith("other machine: workers 1 and 2; 1 of the base's 2 records left out: other data")
    row = row_of(base[1:], [passed()], "accuracy")
    assert "other data: others (eeeeee) and samples (dddddd)" == row.reason


def test_of_different_seed_sets_the_seeds_on_both_sides_count():
    """Paired on those alone, which the reason says; with none in common there is nothing to pair."""
    base, run = [passed(seed=seed) for seed in (42, 43, 44)], "20260104T000000Z-aaaaaa"
    expected = row_of([passed(seed=42)], [passed(seed=42, run=run, wrong=LOST)], "accuracy")
    row = row_of(base, [passed(seed=42, run=run, wrong=LOST)], "accuracy")
    assert (expected.difference, expected.ci95, expected.verdict) == (row.difference, row.ci95, row.verdict)
    assert f"{expected.reason}; over the seeds of both sides: 42" == row.reason
    row = row_of(base, [passed(seed=45, run=run)], "accuracy")
    assert ("not comparable", "other seed set: 42, 43, 44 and 45") == (row.verdict, row.reason)


def test_what_was_set_up_differently_is_told():
    """Hyperparameters of one phase, versions of all; what did not change is not, nor what a phase that failed does not know."""
    ids = ("B-lora", "C1-full")
    base = [passed(i) for i in ids]
    head = [passed(i, config={"epochs": 3 if i == "B-lora" else 2}, versions={"torch": "3"}) for i in ids]
    assert ["B-lora: config.epochs 2 → 3", "all phases: versions.torch 2 → 3"] == set_up_changes(base, head)
    assert [] == set_up_changes(base, base)
    older = [passed(i, config={"epochs": 2}, versions={}) for i in ids]  # which recorded fewer packages
    assert [] == set_up_changes(older, base)
    assert [] == set_up_changes(base, [failed(i) for i in ids])
    broken = failed("B-lora", config={"epochs": 3}, versions=base[0].versions)
    assert ["B-lora: config.epochs 2 → 3"] == set_up_changes(base, [broken])


def test_long_settings_are_compared_whole():
    """What they differ in is shown, though it stands behind what they share."""
    before, after = ("a-model-in-a-folder/" + "0" * 80 + end for end in ("one", "two" + "2" * 80))
    [line] = set_up_changes([passed(checkpoint=before)], [passed(checkpoint=after)])
    assert f"B-lora: checkpoint …{'0' * 20}one → …{'0' * 20}two{'2' * 37}…" == line


def test_a_phase_is_not_compared_with_itself():
    """However it is named."""
    with pytest.raises(ValueError, match="'B' and 'lora' are the same phase; name two of B-lora, C1-full"):
        compare_phases([passed(), passed("C1-full")], "B", "lora")


def test_a_teacher_that_was_tuned_otherwise_is_said():
    """But nothing of it where the records of one side are of a version that did not keep how it was tuned."""
    old, one, three = (
        passed("C2-kd", config={"epochs": 2, **({"teacher": {"epochs": epochs, "dropout": 0.1}} if epochs else {})})
        for epochs in (None, 1, 3)
    )
    assert ["C2-kd: config.teacher.epochs 1 → 3"] == set_up_changes([one], [three])
    assert [] == set_up_changes([old], [three])


def test_a_loss_of_less_than_one_unit_is_a_loss():
    """Half a second more, of one: in whichever unit, its sign decides."""
    assert "worse" == row_of([passed(evaluation_seconds=1.0)], [passed(evaluation_seconds=1.5)], "evaluation_seconds").verdict


def test_a_certain_difference_may_be_too_small_to_matter():
    """Three runs a side show 50 ms of evaluation; below a tenth of a second that is no difference, and the reason says why."""
    sides = [[passed(run=f"{day}", evaluation_seconds=s + day / 1e4) for day in (1, 2, 3)] for s in (0.2, 0.25)]
    row = row_of(*sides, "evaluation_seconds")
    assert ("no difference shown", True) == (row.verdict, row.reason.endswith(", but too small to matter"))


@pytest.mark.parametrize(
    ("metric", "tolerance"),
    [("samples_per_second", 0.25), ("evaluation_seconds", 0.25), ("latency_ms", 0.5), ("peak_memory_bytes", 0.1)],
)
def test_each_metric_has_its_tolerance(metric, tolerance):
    """A hundredth less is no difference, a hundredth more is one."""
    for share, shown in ((tolerance - 0.01, False), (tolerance + 0.01, True)):
        row = row_of([passed(**{metric: 2**30})], [passed(**{metric: round((1 + share) * 2**30)})], metric)
        assert shown == (row.verdict != "no difference shown"), share


@pytest.mark.parametrize("figures", [True, False])
def test_what_failed_on_data_that_the_other_side_does_not_know_tells_nothing(figures):
    """With figures or without; it is neither new nor fixed, and leaves gates open."""
    wanting = passed(outcome="failed", error="AssertionError") if figures else failed(data=passed().data)
    elsewhere = dataclasses.replace(wanting, data={"fingerprint": "e" * 64})
    row = row_of([elsewhere], [wanting], "outcome")
    assert ("not comparable", True) == (row.verdict, row.reason.startswith("other data, on which it failed in the head: "))
    assert 2 == judge([row], [Gate.from_text("accuracy:1pt")]).status
    row = row_of([elsewhere], [passed()], "outcome")
    assert ("not comparable", True) == (row.verdict, row.reason.startswith("other data, on which it failed in the base: "))
    assert "not comparable" == row_of([passed(data=elsewhere.data)], [wanting], "outcome").verdict


def test_runs_that_were_left_alone_are_preferred():
    """Then those of which the head has more."""
    machine = {"id": "m2"}
    head = [
        passed(run="20260104T000000Z-aaaaaa", seconds=100.0),
        passed(run="20260105T000000Z-aaaaaa", processor_wait_fraction=0.5),
    ]
    base = [passed(), passed(run="20260102T000000Z-aaaaaa", processor_wait_fraction=0.5)]
    assert (
        100.0 == row_of(base, [*head, dataclasses.replace(head[1], run_id="20260106T000000Z-aaaaaa")], "train_runtime_seconds").head
    )
    elsewhere = [passed(run=f"2026010{day}T000000Z-aaaaaa", seconds=80.0, machine=machine) for day in (4, 5)]
    both = [passed(), passed(run="20260102T000000Z-aaaaaa", machine=machine)]
    assert 80.0 == row_of(both, [head[0], *elsewhere], "train_runtime_seconds").head


def test_a_failure_that_the_base_has_got_over_is_new():
    """It failed there once, and passed later on the data that the head failed on."""
    data = passed().data
    first, again = (failed(run=f"2026010{day}T000000Z-aaaaaa", data=data) for day in (1, 3))
    later = passed(run="20260102T000000Z-aaaaaa")
    assert {("B-lora", "outcome"): "newly failing"} == verdicts([first, later], [again])


def test_a_failure_of_what_the_base_once_passed_says_so():
    """It failed there, too, in the end."""
    data = passed().data
    base = [passed(run="20260101T000000Z-aaaaaa"), failed(run="20260102T000000Z-aaaaaa", data=data)]
    [row] = compare(base, [failed(run="20260103T000000Z-aaaaaa", data=data)])
    assert ("newly failing", 0.0, 0.0) == (row.verdict, row.base, row.head)
    assert row.reason.startswith("passed in the base before it failed there, too: ")


def test_a_failure_of_another_seed_is_not_said_to_be_the_same():
    """Each seed that newly fails is asked for by itself."""
    data = passed().data
    base = [failed(data=data), passed(seed=43)]
    [row] = [row for row in compare(base, [passed(), failed(seed=43, data=data)]) if row.metric == "outcome"]
    assert ("newly failing", "seed 43: RuntimeError: no") == (row.verdict, row.reason)


def test_an_outcome_is_the_share_of_seeds_that_passed():
    """Of the last run of each; none where a side has no record."""
    seeds = [passed(seed=seed) for seed in (42, 43, 44)]
    [row] = compare(seeds, [*seeds[:2], failed(seed=44)])
    assert (1.0, pytest.approx(2 / 3)) == (row.base, row.head)
    [row] = compare(seeds, [])
    assert (1.0, None) == (row.base, row.head)


def test_the_seed_of_a_phase_that_trains_nothing_leaves_out_none():
    """It has seed 42, the other side 1 and 2: nothing is said of seeds that both have."""
    still = passed("A-teacher", optimizer_steps=0, seed=42)
    trained = [passed("B-lora", wrong=LOST, optimizer_steps=9, seed=seed) for seed in (1, 2)]
    [row] = [row for row in compare_phases([still, *trained], "A", "B") if row.metric == "accuracy"]
    assert "over the seeds of both sides" not in row.reason


def test_the_reason_of_a_size_is_that_it_is_exact():
    """It has no tolerance."""
    assert "exact" == row_of([passed()], [passed(trainable=1001)], "trainable_parameters").reason
