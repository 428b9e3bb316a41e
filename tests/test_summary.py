"""Summaries: means and spread over seeds, the report of a phase, and the phases that are worth their cost."""

import dataclasses
import json
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import NOTHING
from samples import passed as measured
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from peftbench.intervals import wilson_interval
from peftbench.records import Efficiency, ParameterCounts, Record, SplitMetrics
from peftbench.summary import FIGURES, Summary, pareto_front, phase_report, summarize


def quality(accuracy, f1=0.5, n=100):
    return SplitMetrics(accuracy=accuracy, f1=f1, n=n, accuracy_ci95=wilson_interval(accuracy * n, n))


def passed(phase_id="B-lora", *, seed=42, accuracy=0.9, test_accuracy=0.8, trainable=1000, seconds=60.0, scale="mini", **changes):
    phase, _, name = phase_id.partition("-")
    return Record(
        **{
            **NOTHING,
            "run_id": "20250102T030405Z-abcdef",
            "phase": phase,
            "name": name,
            "scale": scale,
            "seed": seed,
            "outcome": "passed",
            "fingerprint": "f" * 64,
            "config": {},
            "dev": quality(accuracy),
            "test": quality(test_accuracy),
            "parameter_counts": ParameterCounts(total=10_000, trainable=trainable),
            "train_runtime_seconds": seconds,
            "efficiency": Efficiency.from_costs(accuracy=accuracy, trainable=trainable, seconds=seconds),
            "peak_memory_bytes": 1024,
            **changes,
        }
    )


def failed(phase_id="B-lora", *, seed=42, scale="mini"):
    phase, _, name = phase_id.partition("-")
    return Record(
        **NOTHING,
        run_id="20250102T030405Z-abcdef",
        phase=phase,
        name=name,
        scale=scale,
        seed=seed,
        outcome="failed",
        fingerprint=None,
        config={},
        error="RuntimeError: no",
    )


def front_of(*records):
    return pareto_front(summarize(records))


THREE = [
    passed(seed=42, accuracy=0.90, seconds=10.0),
    passed(seed=43, accuracy=0.92, seconds=12.0),
    passed(seed=44, accuracy=0.88, seconds=17.0),
]


def test_mean_and_deviation_of_three_seeds():
    """0.90, 0.92 and 0.88: mean 0.9 and, as a sample, deviation 0.02; worked out by hand."""
    summary = Summary(THREE)
    assert pytest.approx(0.9) == summary.mean("dev.accuracy")
    assert pytest.approx(0.02) == summary.deviation("dev.accuracy")
    assert (pytest.approx(13.0), pytest.approx(13**0.5)) == (
        summary.mean("train_runtime_seconds"),
        summary.deviation("train_runtime_seconds"),
    )


@given(accuracies=st.lists(st.floats(0, 1), min_size=2, max_size=6))
@settings(deadline=None, max_examples=40)
def test_mean_and_deviation_are_those_of_statistics(accuracies):
    """The sample's, not the population's."""
    summary = Summary([passed(seed=seed, accuracy=accuracy) for seed, accuracy in enumerate(accuracies)])
    assert pytest.approx(statistics.mean(accuracies)) == summary.mean("dev.accuracy")
    assert pytest.approx(statistics.stdev(accuracies)) == summary.deviation("dev.accuracy")


def test_one_seed_has_no_deviation():
    """Null, and not zero: nothing is known about the spread."""
    summary = Summary([passed(accuracy=0.9)])
    assert (0.9, None) == (summary.mean("dev.accuracy"), summary.deviation("dev.accuracy"))


def test_a_figure_that_nobody_measured_has_no_mean():
    """Null, and not zero."""
    assert (None, None) == (Summary(THREE).mean("latency_ms"), Summary(THREE).deviation("latency_ms"))


@pytest.mark.parametrize("figure", ["train_runtime_seconds", "samples_per_second", "peak_memory_bytes"])
def test_a_measured_zero_counts(figure):
    """Zero is a value; only null is none."""
    assert [0.0] == Summary([passed(**({"seconds": 0.0} if figure == "train_runtime_seconds" else {figure: 0}))]).values(figure)


def test_an_accuracy_of_zero_counts():
    """The worst result pulls the mean down instead of dropping out."""
    assert pytest.approx(0.45) == Summary([passed(accuracy=0.9), passed(seed=43, accuracy=0.0)]).mean("dev.accuracy")


def test_failed_seeds_without_figures_are_left_out_of_the_mean():
    """The summary still lists them."""
    summary = Summary([passed(accuracy=0.9), failed(seed=43)])
    assert (2, 1, 0.9) == (len(summary.records), len(summary.measured), summary.mean("dev.accuracy"))


def test_a_seed_whose_test_found_it_wanting_is_in_the_mean():
    """Without it, the mean would leave out a figure because it is low."""
    low = dataclasses.replace(passed(accuracy=0.7, seed=43), outcome="failed", error="AssertionError")
    summary = Summary([passed(accuracy=0.9), low])
    assert (2, 1, pytest.approx(0.8)) == (len(summary.measured), len(summary.failed), summary.mean("dev.accuracy"))
    report = phase_report(summary)
    assert ("passed", 42, [42, 43], [43]) == (report["outcome"], report["seed"], report["seeds"], report["failed_seeds"])
    assert pytest.approx(0.8) == report["dev"]["accuracy"]
    assert set() == pareto_front([summary])


def test_a_phase_of_which_all_seeds_failed_has_no_means():
    """Every figure is null."""
    assert {None} == {Summary([failed()]).mean(figure) for figure in FIGURES}


def test_every_figure_is_found_at_its_place_in_the_record():
    """The figure's name is the path of keys in the record's JSON."""
    values = {name: float(i) for i, name in enumerate(FIGURES, start=1)}
    flat = {name: int(value) if name.endswith("_bytes") else value for name, value in values.items() if "." not in name}
    record = dataclasses.replace(
        passed(),
        dev=quality(0.0, values["dev.f1"]),
        test=quality(0.0, values["test.f1"]),
        efficiency=Efficiency(
            accuracy_per_million_params=values["efficiency.accuracy_per_million_params"],
            accuracy_per_minute=values["efficiency.accuracy_per_minute"],
        ),
        **flat,
    )
    content = record.to_json()
    for figure in FIGURES:
        place = content
        for key in figure.split("."):
            place = place[key]
        assert [place] == Summary([record]).values(figure), figure


def test_records_are_summarized_by_phase_and_scale():
    """A summary each, in the order of the ids; its records in the order of the seeds."""
    records = [passed("D-hybrid"), passed("B-lora", seed=43), passed("B-lora", scale="tiny"), passed("B-lora", seed=42)]
    found = [(s.first.scale, s.first.phase, [r.seed for r in s.records]) for s in summarize(records)]
    assert [("mini", "B", [42, 43]), ("mini", "D", [42]), ("tiny", "B", [42])] == found


def test_no_records_are_no_summaries():
    """An empty history is no error."""
    assert [] == summarize([])


@given(order=st.permutations(range(4)))
@settings(deadline=None, max_examples=10)
def test_summaries_do_not_depend_on_the_order_of_records(order):
    """Files may come in any order."""
    records = [*THREE, passed("C1-full")]
    assert summarize(records) == summarize([records[i] for i in order])


def test_the_report_of_one_seed_is_its_record():
    """All keys and values of the record, with the seed listed and a spread that is null."""
    report = phase_report(Summary([passed(accuracy=0.9)]))
    assert [42] == report["seeds"]
    assert {"mean": 0.9, "sd": None, "values": [0.9]} == report["spread"]["dev.accuracy"]
    assert [{"run_id": "20250102T030405Z-abcdef", "case": "B-lora-mini-s42"}] == report["records"]
    added = {"seeds", "failed_seeds", "records", "spread"}
    assert passed(accuracy=0.9).to_json() == {key: value for key, value in report.items() if key not in added}


def test_the_report_of_several_seeds_holds_means_where_the_record_holds_values():
    """Means at the record's places, every value under `spread`; of failed seeds that there were."""
    report = phase_report(Summary([*THREE, failed(seed=45)]))
    assert ([42, 43, 44], [45]) == (report["seeds"], report["failed_seeds"])
    assert [f"B-lora-mini-s{seed}" for seed in (42, 43, 44, 45)] == [one["case"] for one in report["records"]]
    assert pytest.approx(0.9) == report["dev"]["accuracy"]
    assert pytest.approx(13.0) == report["train_runtime_seconds"]
    per_minute = statistics.mean([0.90 / 10 * 60, 0.92 / 12 * 60, 0.88 / 17 * 60])
    assert pytest.approx(per_minute) == report["efficiency"]["accuracy_per_minute"]
    spread = report["spread"]["dev.accuracy"]
    assert (pytest.approx(0.9), pytest.approx(0.02), [0.90, 0.92, 0.88]) == (spread["mean"], spread["sd"], spread["values"])
    assert "passed" == report["outcome"]


@pytest.mark.parametrize("spread", [0, 30])
def test_the_interval_of_a_mean_accuracy_is_over_seeds_and_examples(spread):
    """Wilson's of as many examples as have the variance of both, by Student's t; alike seeds leave the interval of the examples."""
    wrong = [set(range(100)) | set(range(200, 200 + spread * i)) for i in range(3)]
    records = [measured(seed=seed, wrong=positions) for seed, positions in zip((42, 43, 44), wrong, strict=True)]
    correct = np.array([[i not in positions for i in range(900)] for positions in wrong], float)
    by_example, by_seed = correct.mean(axis=0).var() / 900, correct.mean(axis=1).var(ddof=1) / 3
    freedom = (by_example + by_seed) ** 2 / (by_example**2 / 899 + by_seed**2 / 2)
    share, t = correct.mean(), stats.t.ppf(0.975, freedom)
    alike = share * (1 - share) / (by_example + by_seed)
    ends = proportion_confint(share * alike, alike, alpha=2 * stats.norm.sf(t), method="wilson")
    assert pytest.approx(ends) == phase_report(Summary(records))["dev"]["accuracy_ci95"]


def test_an_interval_near_the_end_holds_the_truth():
    """Of 1,000 with three seeds that agree on every example, of which 97% are right: 95%, up to chance, as for one seed."""
    rng = np.random.default_rng(7)
    held = []
    for _ in range(1000):
        wrong = set(np.flatnonzero(rng.random(100) < 0.03).tolist())
        low, high = Summary([measured(seed=seed, wrong=wrong, n=100) for seed in (1, 2, 3)]).accuracy_ci95("dev")
        held.append(low <= 0.97 <= high)
    assert 0.93 < np.mean(held) < 0.99


def test_one_example_and_several_seeds_are_summarized():
    """Rounding leaves it a variance, and n - 1 is zero."""
    for wrong in range(8):
        records = [measured(seed=seed, wrong=range(seed < wrong), n=1) for seed in range(7)]
        low, high = Summary(records).accuracy_ci95("dev")
        assert 0 <= low <= 1 - wrong / 7 + 1e-9
        assert 1 - wrong / 7 - 1e-9 <= high <= 1


def test_the_interval_of_one_seed_is_wilsons():
    """Of dev, and of dev and test together."""
    summary = Summary([measured(wrong=range(90))])
    for splits, n in ((("dev",), 900), (("dev", "test"), 1800)):
        reference = stats.binomtest(n - 90, n).proportion_ci(method="wilson")
        assert (pytest.approx(reference.low), pytest.approx(reference.high)) == summary.accuracy_ci95(*splits)
    assert summary.accuracy_ci95("train") is None


def test_the_interval_of_seeds_that_are_all_right_is_that_of_one():
    """What no example got wrong was not shown to be certain."""
    summary = Summary([measured(seed=seed, wrong=()) for seed in (1, 2, 3)])
    reference = stats.binomtest(900, 900).proportion_ci(method="wilson")
    assert (pytest.approx(reference.low), 1.0) == summary.accuracy_ci95("dev")


def test_figures_that_nobody_measured_are_not_in_the_spread():
    """The record's own key stays, as null."""
    report = phase_report(Summary(THREE))
    assert "latency_ms" not in report["spread"]
    assert report["latency_ms"] is None


def test_the_report_of_an_untrained_phase_has_null_efficiency():
    """Several seeds of a phase that trains nothing are averaged, too."""
    teacher = [passed("A-teacher", seed=seed, trainable=0, seconds=0.0) for seed in (1, 2)]
    report = phase_report(Summary(teacher))
    assert {"accuracy_per_million_params": None, "accuracy_per_minute": None} == report["efficiency"]
    assert 0.0 == report["train_runtime_seconds"]


@pytest.mark.parametrize("records", [THREE[:1], THREE], ids=["one", "several"])
def test_a_report_is_json(records):
    """It survives a round trip, without NaN."""
    report = phase_report(Summary(records))
    assert report == json.loads(json.dumps(report, allow_nan=False))


def test_the_front_holds_those_that_no_other_beats():
    """Better at one thing is enough to stay; worse at all is out."""
    best = passed("B-best", accuracy=0.95, trainable=1000, seconds=60)
    small = passed("C-small", accuracy=0.90, trainable=10, seconds=60)
    fast = passed("D-fast", accuracy=0.90, trainable=1000, seconds=6)
    beaten = passed("E-beaten", accuracy=0.90, trainable=1000, seconds=60)
    assert {"B-best", "C-small", "D-fast"} == front_of(best, small, fast, beaten)


@pytest.mark.parametrize("worse", [{"accuracy": 0.89}, {"trainable": 1001}, {"seconds": 61.0}])
def test_a_tie_in_two_is_decided_by_the_third(worse):
    """Equal but for one figure: the better one alone is on the front."""
    assert {"B-a"} == front_of(passed("B-a", accuracy=0.9), passed("C-b", **{"accuracy": 0.9, **worse}))


def test_a_full_tie_leaves_both_on_the_front():
    """Neither beats the other."""
    assert {"B-a", "C-b"} == front_of(passed("B-a"), passed("C-b"))


def test_a_phase_that_trains_nothing_is_on_no_front_and_beats_nobody():
    """It would be on every front for free."""
    teacher = passed("A-teacher", accuracy=0.99, trainable=0, seconds=0.0)
    assert {"B-lora"} == front_of(teacher, passed("B-lora", accuracy=0.5))


def test_always_answering_the_same_is_on_no_front():
    """However cheap: half of dev is of the more frequent label."""
    useless = passed("C-positive", accuracy=0.5, trainable=1, seconds=1.0, majority_accuracy=0.5)
    assert {"B-lora"} == front_of(useless, passed("B-lora", majority_accuracy=0.5))


def test_what_may_be_chance_is_on_no_front():
    """Of 900 examples 52% right are above a majority of half, and their interval is not."""
    chance, better = measured("C-chance", wrong=range(432), trainable=1), measured("B-lora", wrong=range(90))
    assert 0.52 == chance.dev.accuracy
    assert {"B-lora"} == pareto_front(summarize([chance, better]))
    sure = measured("C-sure", wrong=range(396), trainable=1)
    assert {"B-lora", "C-sure"} == pareto_front(summarize([sure, better]))


def test_a_failed_phase_is_on_no_front():
    """And with nobody left the front is empty."""
    assert {"C1-full"} == front_of(failed("B-lora"), passed("C1-full"))
    assert set() == front_of(failed("B-lora"))


def test_the_front_goes_by_means_over_seeds():
    """One lucky seed does not put a phase on it."""
    lucky = [passed("B-lucky", seed=1, accuracy=0.99), passed("B-lucky", seed=2, accuracy=0.5)]
    assert {"C-steady"} == front_of(*lucky, passed("C-steady", accuracy=0.9))


@given(points=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=6))
@settings(deadline=None, max_examples=60)
def test_the_front_is_that_of_a_plain_search(points):
    """Against the definition, pair by pair: on the front is whom nobody equals in all and exceeds in one."""
    records = [passed(f"P{i}-x", accuracy=a / 4, trainable=t, seconds=float(s)) for i, (a, t, s) in enumerate(points)]

    def beats(one, other):
        at_least = one[0] >= other[0] and one[1] <= other[1] and one[2] <= other[2]
        return at_least and (one[0] > other[0] or one[1] < other[1] or one[2] < other[2])

    expected = {f"P{i}-x" for i, point in enumerate(points) if not any(beats(other, point) for other in points)}
    assert expected == front_of(*records)
    assert expected


def test_a_phase_of_which_a_seed_failed_is_not_on_the_front():
    """The mean of the seeds that survived is no figure of the phase."""
    seeds = [measured(seed=42), measured(seed=43, wrong=[1])]
    failed = dataclasses.replace(seeds[0], seed=44, outcome="failed", error="E: x")
    assert {"B-lora"} == pareto_front(summarize(seeds))
    assert set() == pareto_front(summarize([*seeds, failed]))


def test_seeds_of_a_phase_that_trains_nothing_are_one_measurement():
    """Its interval is that of one of them, however often the same model was evaluated; a phase trains if it takes a step."""
    still = [measured("A-teacher", seed=seed, wrong=range(90), optimizer_steps=0) for seed in (42, 43, 44)]
    assert not Summary(still).trains
    assert wilson_interval(810, 900) == Summary(still).accuracy_ci95("dev")
    assert Summary([dataclasses.replace(one, optimizer_steps=1) for one in still]).trains
