"""Quality, and whether two measurements of the same thing differ: quality paired over examples and seeds, times by their ratio."""

import functools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from peftbench.intervals import Estimate, beta_share, estimate

SHOWN = 0.05
"""Significance level; it matches the 95% intervals."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """
    Accuracy or F1 of predictions.

    Labels, and which examples something is true of, are the bits of a number, one an example.

    Attributes:
        n: How many examples there are.
        gold: True labels.
        errors: The examples whose prediction is wrong.
        value: A fraction.
        step: About how much one example moves it.
        influence: Of each example, in pairs of an effect and the examples that it is of: the sum of its effects, up to a constant.
            Its variance, over n, is that of a bootstrap over examples: of accuracy, which is a mean, that of all its draws; of F1
            to first order (the infinitesimal jackknife, Efron 1982).
    """

    n: int
    gold: int
    errors: int
    value: float
    step: float
    influence: Sequence[tuple[float, int]]


def score(name: str, n: int, gold: int, predicted: int) -> Score:
    """
    Accuracy, or F1 of the positive class.

    Args:
        name: ``accuracy`` or ``f1``.
        n: How many examples there are, at least one.
        gold: True labels, as in `Score`.
        predicted: Predicted ones.
    """
    errors = gold ^ predicted
    wrong = errors.bit_count()
    if name == "accuracy":
        return Score(n=n, gold=gold, errors=errors, value=(n - wrong) / n, step=1 / n, influence=((-1.0, errors),))
    true_positives = gold & predicted
    size = 2 * true_positives.bit_count() + wrong
    if not size:
        return Score(n=n, gold=gold, errors=errors, value=0.0, step=0.0, influence=())
    value = (size - wrong) / size
    return Score(
        n=n,
        gold=gold,
        errors=errors,
        value=value,
        step=1 / size,
        influence=((2 * (1 - value) * n / size, true_positives), (-value * n / size, errors)),
    )


@functools.lru_cache(maxsize=4096)  # a history asks for the same counts again and again
def mcnemar_exact(lost: int, won: int) -> float:
    """
    Two-sided p of McNemar's exact test (McNemar 1947).

    Args:
        lost: Examples that the base got right and the head wrong.
        won: The other way round.
    """
    fewer, more = sorted((lost, won))
    # The binomial's tail is a share of a beta distribution.
    return min(1.0, 2 * beta_share(0.5, more, fewer + 1)) if more else 1.0


def holm(p: Sequence[float]) -> list[float]:
    """The p-values adjusted for their number (Holm 1979): comparing each to 5% errs in 5% of families at most."""
    adjusted, least = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        least = adjusted[i] = max(least, min(1.0, (len(p) - rank) * p[i]))
    return adjusted


def paired_difference(name: str, base: Sequence[Score], head: Sequence[Score]) -> Estimate:
    """
    Accuracy or F1 of the head less that of the base, the mean over seeds.

    The variance is the sum of two paired bootstraps', in closed form: over examples, the same for both sides and all seeds, and
    over seeds, with their few degrees of freedom (Satterthwaite 1946). What examples and seeds share counts twice, which errs on
    the side of showing nothing; where seeds differ by several points, three are too few for that to suffice. Where few examples
    differ, the bootstrap does not suffice either; as if one more were lost and one more won in every seed, as seeds share the
    examples, it is wide enough (Bonett and Price 2012).
    Accuracy with one seed is judged by McNemar's exact test, whose interval has zero in it where that shows nothing.

    Args:
        name: ``accuracy`` or ``f1``, whichever the scores are.
        base: One a seed, all on the same examples.
        head: Of the same seeds on the same examples.
    """
    n, differences = base[0].n, [after.value - before.value for before, after in zip(base, head, strict=True)]
    effects = [(-effect, mask) for one in base for effect, mask in one.influence]
    effects += [part for one in head for part in one.influence]
    total, squares = 0.0, 0.0  # over the examples: the sum of their influences, and of the squares of these
    for i, (effect, mask) in enumerate(effects):
        of_effect = effect * mask.bit_count()
        total += of_effect
        squares += effect * of_effect
        for other, also in effects[:i]:
            squares += 2 * effect * other * (mask & also).bit_count()
    seeds = len(base)
    one_example = statistics.fmean([one.step for one in (*base, *head)])
    sources = [(max(0.0, squares - total**2 / n) / (n * seeds) ** 2 + 2 * one_example**2, max(n - 1.0, 1.0))]
    if seeds > 1:
        sources.append((statistics.variance(differences) / seeds, seeds - 1.0))
    exact = None
    if seeds == 1 and name == "accuracy":
        before, after = base[0].errors, head[0].errors
        exact = mcnemar_exact((after & ~before).bit_count(), (before & ~after).bit_count())
    found = estimate(statistics.fmean(differences), sources, exact_p=exact)
    low, high = found.ci95
    if exact is not None and exact >= SHOWN:
        low, high = min(low, 0.0), max(high, 0.0)
    within = max(-1.0, low), min(1.0, high)
    return Estimate(value=found.value, ci95=within, t=found.t, freedom=found.freedom, exact_p=exact)


def ratio_difference(base: Sequence[float], head: Sequence[float]) -> Estimate | None:
    """
    How much the head's measurements are more than the base's, judged by the logarithm of their ratio (Welch 1947).

    The difference is the mean of the base times what the ratio of the geometric means says, as the interval is.

    Args:
        base: Independent measurements: of a run each, as those of one run share its conditions.
        head: The same.

    Returns:
        None where a side has fewer than two measurements or one is not positive.
    """
    if min(len(base), len(head)) < 2 or min(*base, *head) <= 0:
        return None
    logs = [[math.log(value) for value in side] for side in (base, head)]
    sources = [(statistics.variance(side) / len(side), len(side) - 1.0) for side in logs]
    ratio = estimate(statistics.fmean(logs[1]) - statistics.fmean(logs[0]), sources)
    mean = statistics.fmean(base)
    difference, low, high = (mean * math.expm1(min(one, 100.0)) for one in (ratio.value, *ratio.ci95))  # beyond, it overflows
    return Estimate(value=difference, ci95=(low, high), t=ratio.t, freedom=ratio.freedom)
