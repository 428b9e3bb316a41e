"""Whether two measurements of the same thing differ: paired quality over examples and seeds, times by their ratio."""

import functools
import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from peftbench.intervals import Estimate, estimate

Bits = npt.NDArray[np.uint8]


@functools.lru_cache(maxsize=4096)  # a history asks for the same counts again and again
def mcnemar_exact(lost: int, won: int) -> float:
    """
    Two-sided p of McNemar's exact test (McNemar 1947).

    Args:
        lost: Examples that the base got right and the head wrong.
        won: The other way round.
    """
    from scipy.special import bdtr

    return min(1.0, 2 * float(bdtr(min(lost, won), lost + won, 0.5))) if lost + won else 1.0


def holm(p: Sequence[float]) -> list[float]:
    """The p-values adjusted for their number (Holm 1979): comparing each to 5% errs in 5% of families at most."""
    adjusted, least = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        least = adjusted[i] = max(least, min(1.0, (len(p) - rank) * p[i]))
    return adjusted


def paired_difference(name: str, gold: Bits, base: Bits, head: Bits) -> Estimate:
    """
    Accuracy or F1 of the head less that of the base, the mean over seeds.

    The variance is the sum of two paired bootstraps', in closed form: over examples, the same for both sides and all seeds, and
    over seeds, with their few degrees of freedom (Satterthwaite 1946). What examples and seeds share counts twice, which errs on
    the side of showing nothing; where seeds differ by several points, three are too few for that to suffice.

    Args:
        name: ``accuracy`` or ``f1``.
        gold: True labels, shape (N,).
        base: Predicted labels, shape (S, N), a row a seed.
        head: The same.
    """
    seeds, n = base.shape
    before, after = (_score(name, gold, side) for side in (base, head))
    observed, of_examples = after[0] - before[0], (after[1] - before[1]).sum(axis=0) / seeds
    sources = [(float(of_examples @ of_examples) / n**2, n - 1.0)]
    if seeds > 1:
        sources.append((float(observed.var(ddof=1)) / seeds, seeds - 1.0))
    found = estimate(float(observed.mean()), sources)
    p = found.p
    if seeds == 1 and name == "accuracy":
        right = base[0] == gold, head[0] == gold
        p = mcnemar_exact(int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum()))
    return Estimate(found.value, (max(-1.0, found.ci95[0]), min(1.0, found.ci95[1])), p)


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
    logs = [np.log(side) for side in (base, head)]
    sources = [(float(side.var(ddof=1)) / len(side), len(side) - 1.0) for side in logs]
    ratio = estimate(float(logs[1].mean() - logs[0].mean()), sources)
    mean = statistics.fmean(base)
    difference, low, high = (mean * math.expm1(min(one, 100.0)) for one in (ratio.value, *ratio.ci95))  # beyond, it overflows
    return Estimate(difference, (low, high), ratio.p)


def _score(name: str, gold: Bits, predicted: Bits) -> tuple[Any, Any]:
    """
    Accuracy or F1 of each seed, (S,), and what each example does to it, (S, N).

    The mean square of the latter, over N, is the variance of a bootstrap over examples: of accuracy, which is a mean, that of all
    its draws; of F1 to first order (the infinitesimal jackknife, Efron 1982).
    """
    right = predicted == gold
    if name == "accuracy":
        score = right.sum(axis=1) / gold.size
        return score, right - score[:, None]
    hits, wrong = right & gold, (~right).view(np.uint8)
    parts = 2 * hits + wrong  # F1 is 2 · hits / parts
    size = np.maximum(parts.sum(axis=1), 1)  # where nothing is positive, F1 is 0
    score = 2 * hits.sum(axis=1) / size
    return score, (2 * hits - score[:, None] * parts) * (gold.size / size[:, None])
