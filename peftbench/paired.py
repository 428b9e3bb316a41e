"""Whether two measurements of the same thing differ: paired quality over examples and seeds, times by their ratio."""

import dataclasses
import functools
import itertools
import math
import statistics
from collections.abc import Sequence

from peftbench.intervals import Estimate, beta_share, estimate

SHOWN = 0.05
"""Significance level; it matches the 95% intervals."""


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


def paired_difference(name: str, n: int, gold: int, base: Sequence[int], head: Sequence[int]) -> Estimate:
    """
    Accuracy or F1 of the head less that of the base, the mean over seeds; labels are the bits of a number, one an example.

    The variance is the sum of two paired bootstraps', in closed form: over examples, the same for both sides and all seeds, and
    over seeds, with their few degrees of freedom (Satterthwaite 1946). What examples and seeds share counts twice, which errs on
    the side of showing nothing; where seeds differ by several points, three are too few for that to suffice. Where few examples
    differ, the bootstrap does not suffice either; as if one more were lost and one more won in every seed, as seeds share the
    examples, it is wide enough (Bonett and Price 2012).
    Accuracy with one seed is judged by McNemar's exact test, whose interval has zero in it where that shows nothing.

    Args:
        name: ``accuracy`` or ``f1``.
        n: How many examples there are.
        gold: True labels.
        base: Predicted labels of each seed.
        head: The same.
    """
    before, after = ([_score(name, n, gold, predicted) for predicted in side] for side in (base, head))
    differences = [score - other for (score, _, _), (other, _, _) in zip(after, before, strict=True)]
    effects = [(sign * effect, mask) for sign, side in ((-1, before), (1, after)) for _, _, parts in side for effect, mask in parts]
    pairs = itertools.combinations(effects, 2)
    products = [2 * effect * other * (mask & also).bit_count() for (effect, mask), (other, also) in pairs]
    squares = math.fsum(products + [effect**2 * mask.bit_count() for effect, mask in effects])
    mean = math.fsum([effect * mask.bit_count() for effect, mask in effects])
    seeds = len(base)
    one_example = statistics.fmean([step for _, step, _ in (*before, *after)])
    sources = [(max(0.0, squares - mean**2 / n) / (n * seeds) ** 2 + 2 * one_example**2, max(n - 1.0, 1.0))]
    if seeds > 1:
        sources.append((statistics.variance(differences) / seeds, seeds - 1.0))
    exact = None
    if seeds == 1 and name == "accuracy":
        wrong, later = gold ^ base[0], gold ^ head[0]
        exact = mcnemar_exact((later & ~wrong).bit_count(), (wrong & ~later).bit_count())
    found = estimate(statistics.fmean(differences), sources, p=exact)
    low, high = found.ci95
    if exact is not None and exact >= SHOWN:
        low, high = min(low, 0.0), max(high, 0.0)
    return dataclasses.replace(found, ci95=(max(-1.0, low), min(1.0, high)))


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
    return Estimate(difference, (low, high), ratio.p)


def _score(name: str, n: int, gold: int, predicted: int) -> tuple[float, float, list[tuple[float, int]]]:
    """
    Accuracy or F1, about how much one example moves it, and the influence of each example as pairs of effect and mask.

    An example's influence is the sum of the effects in whose masks its bit is set, up to a constant.

    The variance of that, over n, is the variance of a bootstrap over examples: of accuracy, which is a mean, that of all its draws;
    of F1 to first order (the infinitesimal jackknife, Efron 1982).
    """
    wrong = gold ^ predicted
    if name == "accuracy":
        return 1 - wrong.bit_count() / n, 1 / n, [(-1.0, wrong)]
    hits = gold & predicted
    size = 2 * hits.bit_count() + wrong.bit_count()
    if not size:
        return 0.0, 0.0, []
    score = 2 * hits.bit_count() / size
    return score, 1 / size, [(2 * (1 - score) * n / size, hits), (-score * n / size, wrong)]
