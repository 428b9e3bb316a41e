"""Whether two measurements of the same thing differ: paired quality over examples and seeds, times by their ratio."""

import functools
import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from peftbench.intervals import Estimate, estimate

RESAMPLES = 2000

Bits = npt.NDArray[np.uint8]


@functools.lru_cache(maxsize=4096)  # a history asks for the same counts again and again
def mcnemar_exact(lost: int, won: int) -> float:
    """
    Two-sided p of McNemar's exact test (McNemar 1947).

    Args:
        lost: Examples that the base got right and the head wrong.
        won: The other way round.
    """
    n = lost + won
    tail = sum(math.comb(n, k) for k in range(min(lost, won) + 1))
    return min(1.0, float(2 * tail / 2**n)) if n else 1.0


def holm(p: Sequence[float]) -> list[float]:
    """The p-values adjusted for their number (Holm 1979): comparing each to 5% errs in 5% of families at most."""
    adjusted, least = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        least = adjusted[i] = max(least, min(1.0, (len(p) - rank) * p[i]))
    return adjusted


def paired_difference(name: str, gold: Bits, base: Bits, head: Bits, *, seed: int = 0) -> Estimate:
    """
    Accuracy or F1 of the head less that of the base, the mean over seeds.

    The variance is the sum of two bootstraps': over examples, the same for both sides and all seeds, and over seeds, with their few
    degrees of freedom (Satterthwaite 1946). What examples and seeds share counts twice, which errs on the side of showing nothing;
    where seeds differ by several points, three are too few for that to suffice.

    Args:
        name: ``accuracy`` or ``f1``.
        gold: True labels, shape (N,).
        base: Predicted labels, shape (S, N), a row a seed.
        head: The same.
        seed: Of the bootstrap.
    """
    seeds, n = base.shape
    gains = (head == gold) - (base == gold).astype(float)  # (S, N)
    if name == "accuracy":  # a mean, whose bootstrap has a closed form
        observed, by_example = gains.sum(axis=1) / n, gains.sum(axis=0) / seeds
        over_examples = max(0.0, float(by_example @ by_example / n - observed.mean() ** 2)) / n
    else:
        observed, drawn = _bootstrap_f1(gold, base, head, seed)
        over_examples = float(drawn.mean(axis=1).var(ddof=1))
    sources = [(over_examples, n - 1.0)]
    if seeds > 1:
        sources.append((float(observed.var(ddof=1)) / seeds, seeds - 1.0))
    found = estimate(float(observed.mean()), sources)
    p = found.p
    if seeds == 1 and name == "accuracy":
        p = mcnemar_exact(int((gains < 0).sum()), int((gains > 0).sum()))
    return Estimate(found.value, (max(-1.0, found.ci95[0]), min(1.0, found.ci95[1])), p)


def ratio_difference(base: Sequence[float], head: Sequence[float]) -> Estimate | None:
    """
    Mean of the head less that of the base, judged by the logarithm of their ratio (Welch 1947).

    Returns:
        None where a side has fewer than two measurements or one is not positive.
    """
    if min(len(base), len(head)) < 2 or min(*base, *head) <= 0:
        return None
    logs = [[math.log(x) for x in side] for side in (base, head)]
    sources = [(statistics.variance(side) / len(side), len(side) - 1.0) for side in logs]
    ratio = estimate(statistics.fmean(logs[1]) - statistics.fmean(logs[0]), sources)
    mean = statistics.fmean(base)
    low, high = (mean * math.expm1(end) for end in ratio.ci95)
    return Estimate(statistics.fmean(head) - mean, (low, high), ratio.p)


def _bootstrap_f1(gold: Bits, base: Bits, head: Bits, seed: int) -> tuple[Any, Any]:
    """Head less base of each seed, as observed, (S,), and of each draw of examples, (R, S)."""
    labels = np.concatenate([gold[None], base, head]).astype(np.int64)  # (1 + 2S, N)
    patterns, counts = np.unique(labels, axis=1, return_counts=True)  # drawing how often each occurs is drawing examples
    times = np.random.default_rng(seed).multinomial(labels.shape[1], counts / labels.shape[1], size=RESAMPLES)  # (R, K)
    sides = [patterns[1 : 1 + len(base)], patterns[1 + len(base) :]]

    def difference(draws: npt.NDArray[np.int64]) -> Any:
        scores = []
        for predicted in sides:
            hits, wrong = draws @ (predicted & patterns[0]).T, draws @ (predicted ^ patterns[0]).T
            scores.append(2 * hits / np.maximum(2 * hits + wrong, 1))
        return scores[1] - scores[0]

    return difference(counts[None])[0], difference(times)
