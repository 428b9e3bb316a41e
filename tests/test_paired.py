"""Paired statistics: against scipy and statsmodels, and by simulation where no formula is at hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from peftbench.paired import holm, mcnemar_exact, paired_difference, ratio_difference, score


def simulate(rng, *, n, seeds=1, discordance=0.06, effect=0.0, seed_effect=0.0, shared=0.5):
    """
    Labels that a base and a head predict.

    Examples differ in how often the sides disagree on them, some the same way in each seed; the seeds differ by a normal effect.
    """
    gold = rng.integers(0, 2, n).astype(np.uint8)
    right = np.tile(rng.random(n) < 0.85, (seeds, 1))
    of_examples = rng.random(n)
    base, head = [], []
    for row in right:
        tilt = (effect + seed_effect * rng.standard_normal()) / discordance
        draw = np.where(rng.random(n) < shared, of_examples, rng.random(n))
        lost = draw < discordance * (1 - tilt) / 2
        won = ~lost & (draw < discordance)
        base.append(np.where(lost | (row & ~won), gold, 1 - gold))
        head.append(np.where(won | (row & ~lost), gold, 1 - gold))
    return gold, np.array(base, np.uint8), np.array(head, np.uint8)


def differ(name, gold, base, head):
    """The library's estimate for labels of shapes (N,), (S, N) and (S, N)."""
    of_gold, *predicted = (int.from_bytes(np.packbits(row).tobytes(), "big") for row in (gold, *base, *head))
    scores = [score(name, gold.size, of_gold, one) for one in predicted]
    return paired_difference(name, scores[: len(base)], scores[len(base) :])


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (1, 0), (5, 15), (10, 10), (200, 150), (38, 16)])
def test_mcnemar_is_that_of_statsmodels_and_scipy(lost, won):
    """The exact test on a table's two discordant counts."""
    assert mcnemar(np.array([[700, lost], [won, 100]]), exact=True).pvalue == pytest.approx(mcnemar_exact(lost, won), rel=1e-9)
    if lost + won:
        assert stats.binomtest(lost, lost + won).pvalue == pytest.approx(mcnemar_exact(lost, won), rel=1e-9)


def test_mcnemar_by_hand():
    """Of three discordant examples all lost: 2 · (1/2)³."""
    assert 0.25 == pytest.approx(mcnemar_exact(3, 0), rel=1e-12)


def test_mcnemar_of_many_examples_is_quick():
    """Of millions the sum of all terms would take for ever; the normal distribution knows the result."""
    expected = 2 * stats.norm.sf(2 * (2500 - 0.5) / 5_000_000**0.5)
    assert expected == pytest.approx(mcnemar_exact(2_497_500, 2_502_500), rel=1e-4)


def test_holm_is_that_of_statsmodels():
    """Adjusted p-values of a family."""
    p = [0.04, 0.001, 0.03, 0.5, 0.011]
    assert multipletests(p, method="holm")[1] == pytest.approx(holm(p))
    assert [] == holm([])


def test_the_variance_is_that_of_scipys_bootstrap():
    """One seed: the standard error behind the interval, for accuracy and F1, paired over examples."""
    gold, base, head = simulate(np.random.default_rng(0), n=400, discordance=0.2, effect=0.05)
    figures = {"accuracy": lambda g, p: np.mean(g == p), "f1": lambda g, p: f1_score(g, p)}
    for name, figure in figures.items():

        def difference(g, b, h, figure=figure):
            return figure(g, h) - figure(g, b)

        expected = stats.bootstrap(
            (gold, base[0], head[0]), difference, paired=True, vectorized=False, n_resamples=999, method="percentile", rng=1
        )
        found = differ(name, gold, base, head)
        assert difference(gold, base[0], head[0]) == pytest.approx(found.value)
        assert expected.standard_error == pytest.approx((found.ci95[1] - found.ci95[0]) / 2 / 1.96, rel=0.1)


def test_the_mean_over_seeds_is_compared():
    """Worked out by hand: two seeds, four examples."""
    gold = np.array([1, 1, 0, 0], np.uint8)
    base = np.array([[1, 0, 0, 0], [1, 1, 0, 1]], np.uint8)  # 3/4 right, 3/4 right
    head = np.array([[1, 1, 0, 0], [0, 0, 0, 1]], np.uint8)  # 4/4 right, 1/4 right
    assert differ("accuracy", gold, base, head).value == pytest.approx((1 / 4 - 2 / 4) / 2)
    # F1 of the base: 2/3 and 4/5; of the head: 1 and 0
    assert differ("f1", gold, base, head).value == pytest.approx(((1 - 2 / 3) + (0 - 4 / 5)) / 2)


@pytest.mark.parametrize("name", ["accuracy", "f1"])
def test_one_example_and_two_seeds_are_too_few(name):
    """Nothing is shown, and nothing divided by zero."""
    gold, base, head = np.array([1], np.uint8), np.array([[1], [1]], np.uint8), np.array([[1], [0]], np.uint8)
    found = differ(name, gold, base, head)
    assert -0.5 == found.value
    assert found.p > 0.3


@given(pairs=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=70))
def test_scores_are_those_of_scikit_learn(pairs):
    """Whatever is predicted, as where there are no positives."""
    predicted, gold = (np.array(side, np.uint8) for side in zip(*pairs, strict=True))
    bits = [int("".join(map(str, side)), 2) for side in (gold, predicted)]
    assert accuracy_score(gold, predicted) == pytest.approx(score("accuracy", len(pairs), *bits).value, rel=1e-12)
    assert f1_score(gold, predicted, zero_division=0) == pytest.approx(score("f1", len(pairs), *bits).value, rel=1e-12)


def test_f1_without_positives_is_zero():
    """Neither predicted nor true ones, on either side."""
    gold = np.zeros(4, np.uint8)
    found = differ("f1", gold, gold[None], gold[None])
    assert (0.0, 1.0) == (found.value, found.p)


def test_the_same_predictions_differ_by_nothing():
    """No difference, p of 1, and an interval, as others might have differed."""
    gold, base, _ = simulate(np.random.default_rng(0), n=1800)
    found = differ("accuracy", gold, base, base)
    assert (0.0, 1.0) == (found.value, found.p)
    assert (-1.96 * 2**0.5 / 1800, 1.96 * 2**0.5 / 1800) == pytest.approx(found.ci95, rel=0.01)


@pytest.mark.parametrize("name", ["accuracy", "f1"])
def test_intervals_hold_the_truth_where_few_examples_differ(name):
    """Of 1,000 each, where the head loses one to twelve of 1,800 examples and wins none: at least 95%, up to chance."""
    rng = np.random.default_rng(7)
    for lost in (1, 3, 5, 8, 12):
        held = []
        for _ in range(1000):
            truth = -lost / 1800
            gold, base, head = simulate(rng, n=1800, discordance=lost / 1800, effect=truth)
            if name == "f1":  # whose truth is that of the labels drawn, with as many hits and misses as are to be expected
                hits, wrong = ((gold == 1) & (base[0] == 1)).sum(), (gold != base[0]).sum()
                share = 2 * hits / (2 * hits + wrong)
                truth = 2 * (hits - lost / 2) / (2 * hits - lost + wrong + lost) - share
            low, high = differ(name, gold, base, head).ci95
            held.append(low <= truth <= high)
        assert is_rare(~np.array(held)), lost


def test_an_interval_and_mcnemars_test_agree():
    """Zero lies in the interval if and only if the exact test shows nothing, whatever the counts."""
    for lost in range(80):
        for won in range(lost, 120):
            gold = (1 << 1800) - 1
            base, head = gold ^ ((1 << won) - 1), gold ^ (((1 << lost) - 1) << 200)
            found = paired_difference("accuracy", *([score("accuracy", 1800, gold, side)] for side in (base, head)))
            assert (found.ci95[0] <= 0 <= found.ci95[1]) == (found.p >= 0.05), (lost, won)


def test_the_variances_over_examples_and_seeds_add_up():
    """Against scipy's bootstrap over examples and the variance of the mean of the seeds' own differences."""
    gold, base, head = simulate(np.random.default_rng(3), n=500, seeds=4, discordance=0.2, effect=0.03, seed_effect=0.02)
    gains = (head == gold).astype(float) - (base == gold)
    over_examples = stats.bootstrap((gains.mean(axis=0),), np.mean, n_resamples=4000, rng=1, method="percentile").standard_error
    error = np.hypot(over_examples, stats.sem(gains.mean(axis=1)))
    found = differ("accuracy", gold, base, head)
    freedom = stats.t.ppf(0.975, [3, 499])  # between those of the seeds and those of the examples
    assert freedom[1] * error * 0.95 < (found.ci95[1] - found.ci95[0]) / 2 < freedom[0] * error


def is_rare(alarms):
    """Of comparisons without an effect at most 5%, up to what chance does to the count."""
    return np.mean(alarms) <= 0.05 + 2 * (0.05 * 0.95 / len(alarms)) ** 0.5


@pytest.mark.parametrize("name", ["accuracy", "f1"])
@pytest.mark.parametrize(
    ("seeds", "seed_effect", "shared"),
    [(1, 0.0, 0.5), (3, 0.0, 0.0), (3, 0.0, 1.0), (3, 0.005, 0.5), (3, 0.01, 0.5), (5, 0.02, 0.5)],
)
def test_false_alarms_are_rare(name, seeds, seed_effect, shared):
    """Of 2,000 comparisons without an effect."""
    rng = np.random.default_rng(7)
    simulations = (simulate(rng, n=600, seeds=seeds, seed_effect=seed_effect, shared=shared) for _ in range(2000))
    assert is_rare([differ(name, *one).p < 0.05 for one in simulations])


def test_false_alarms_are_rare_where_few_examples_differ():
    """Of 2,000 comparisons of F1 each, three to twelve examples in which the sides differ, no more and no fewer."""
    rng = np.random.default_rng(7)
    for differing in (3, 4, 5, 6, 8, 12):
        alarms = []
        while len(alarms) < 2000:
            gold, base, head = simulate(rng, n=1800, discordance=differing / 1800)
            if (base != head).sum() == differing:
                alarms.append(differ("f1", gold, base, head).p < 0.05)
        assert is_rare(alarms), differing


@pytest.mark.parametrize("seeds", [2, 3, 10])
@pytest.mark.parametrize("name", ["accuracy", "f1"])
def test_seeds_that_share_few_examples_are_no_more_evidence(name, seeds):
    """Of 2,000 comparisons each, five or eight examples in which the sides differ, the same ones for all seeds."""
    rng = np.random.default_rng(7)
    for differing in (5, 8):
        alarms = []
        while len(alarms) < 2000:
            gold, base, head = simulate(rng, n=1800, discordance=differing / 1800)
            if (base != head).sum() == differing:
                alarms.append(differ(name, gold, *(np.repeat(side, seeds, axis=0) for side in (base, head))).p < 0.05)
        assert is_rare(alarms), differing


@pytest.mark.parametrize("runs", [2, 3, 5])
def test_false_alarms_of_repeated_times_are_rare(runs):
    """Of 2,000 comparisons of runs that differ by 2%, with an average of three seeds in each that differ by 1%."""
    rng = np.random.default_rng(7)
    logs = 0.02 * rng.standard_normal((2000, 2, runs, 1)) + 0.01 * rng.standard_normal((2000, 2, runs, 3))
    seconds = (60 * np.exp(logs)).mean(axis=-1)
    assert is_rare([ratio_difference(base, head).p < 0.05 for base, head in seconds])


def test_a_drop_is_found():
    """2.5 points at 6% discordance on 1,800 examples, after adjusting for five phases, nine times in ten."""
    rng = np.random.default_rng(8)
    found = 0
    for _ in range(500):
        family = [differ("accuracy", *simulate(rng, n=1800, effect=-0.025)).p]
        family += [differ("accuracy", *simulate(rng, n=1800)).p for _ in range(4)]
        found += holm(family)[0] < 0.05
    assert found / 500 >= 0.9


def test_a_ratio_is_judged_like_welchs_test_on_logarithms():
    """The p-value is scipy's."""
    base, head = [10.0, 10.5, 9.8], [12.0, 12.9, 12.2, 12.4]
    found = ratio_difference(base, head)
    assert stats.ttest_ind(np.log(head), np.log(base), equal_var=False).pvalue == pytest.approx(found.p)
    assert np.mean(base) * (stats.gmean(head) / stats.gmean(base) - 1) == pytest.approx(found.value)
    assert 0 < found.ci95[0] < found.value < found.ci95[1]


def test_an_outlier_does_not_put_a_difference_outside_its_interval():
    """The arithmetic means of these say faster, the geometric ones slower."""
    found = ratio_difference([10.0, 10.1, 9.9] * 4 + [60.0], [12.5] * 13)
    assert found.ci95[0] < found.value < found.ci95[1]


def test_a_ratio_that_no_float_holds_leaves_finite_numbers():
    """Two measurements a side that have nothing in common."""
    assert np.isfinite(ratio_difference([1e-300, 1.0], [1e-300, 1.0]).ci95).all()


def test_a_single_measurement_tells_no_interval():
    """Nor does one that is not positive."""
    assert ratio_difference([1.0], [2.0, 2.1]) is None
    assert ratio_difference([0.0, 0.0], [2.0, 2.1]) is None


def test_the_interval_of_one_seed_by_hand():
    """Ten of a hundred lost and four won: (14 - 6 * 6 / 100 + 2) / 100^2 is the variance, and Student's t has 99 degrees."""
    base, head = score("accuracy", 100, 0, 0b1111), score("accuracy", 100, 0, 0b11_1111_1111_0000)
    found = paired_difference("accuracy", [base], [head])
    half = stats.t.ppf(0.975, 99) * 15.64**0.5 / 100
    assert (-0.06 - half, -0.06 + half) == pytest.approx(found.ci95)
    assert mcnemar_exact(10, 4) == found.p
