"""How sure a figure is: 95% intervals of a share, and of a mean whose variance has several sources. Standard library only."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

NORMAL_LIMIT = 1.959963984540054
"""97.5th percentile of the standard normal distribution."""

MOST_FREEDOM = 1e5
"""Degrees of freedom; with more, the limits of Student's t are the normal distribution's to four digits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """
    A value and how sure it is.

    Attributes:
        ci95: The 95% interval of the value.
        t: What is tested, the value or the logarithm of a ratio, in standard errors; infinite where there is no error.
        freedom: Degrees of freedom of ``t``.
        exact_p: Where a better test than Student's tells it.
    """

    value: float
    ci95: tuple[float, float]
    t: float
    freedom: float
    exact_p: float | None = None

    @property
    def p(self) -> float:
        """The probability of a value at least as far from zero, in either direction, where zero is the truth."""
        return t_p(self.t, self.freedom) if self.exact_p is None else self.exact_p

    def shows(self, level: float) -> bool:
        """Whether p is below a level of at most 5%; mostly without computing it."""
        return (self.exact_p is not None or abs(self.t) > NORMAL_LIMIT) and self.p < level  # Student's t is never narrower


def wilson_interval(hits: float, n: float, *, z: float = NORMAL_LIMIT) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927), 95% by default."""
    share, spread = hits / n, z * z / n
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    return max(0.0, min(centre - half, share)), min(1.0, max(centre + half, share))  # it has the share in spite of rounding


def estimate(value: float, sources: Sequence[tuple[float, float]], *, exact_p: float | None = None) -> Estimate:
    """
    A value with its 95% interval and the two-sided p of its being 0.

    Both are by Student's t with the degrees of freedom of Welch and Satterthwaite (Satterthwaite 1946).

    Args:
        value: Such as a difference of means.
        sources: What the variance of the value is the sum of, each with its degrees of freedom.
        exact_p: Where a better test than Student's tells it.
    """
    variance, freedom = pooled(sources)
    if variance <= 0:
        return Estimate(
            value=value, ci95=(value, value), t=math.copysign(math.inf, value) if value else 0.0, freedom=freedom, exact_p=exact_p
        )
    error = math.sqrt(variance)
    half = t_limit(freedom) * error
    return Estimate(value=value, ci95=(value - half, value + half), t=value / error, freedom=freedom, exact_p=exact_p)


def pooled(sources: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The sum of variances, each with its degrees of freedom, and the degrees of freedom of it (Satterthwaite 1946)."""
    variance = sum(part for part, _ in sources)
    spread = sum(part**2 / freedom for part, freedom in sources if part)
    return variance, min(variance**2 / spread, MOST_FREEDOM) if spread else MOST_FREEDOM


def t_p(t: float, freedom: float) -> float:
    """Two-sided p-value of Student's t."""
    square = t * t
    if square < 1:
        return 1 - beta_share(square / (freedom + square), 0.5, freedom / 2)
    return beta_share(freedom / (freedom + square), freedom / 2, 0.5)


@functools.lru_cache(maxsize=1024)
def t_limit(freedom: float) -> float:
    """What 95% of Student's t lie within, either way of zero; for one degree of freedom or more."""
    t, step = NORMAL_LIMIT, 1.0
    log_height = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - math.log(freedom * math.pi) / 2
    while step > 1e-9 * t:  # by Newton's method, which comes from below, as the tail is convex
        density = math.exp(log_height - (freedom + 1) / 2 * math.log1p(t * t / freedom))
        step = (t_p(t, freedom) - 0.05) / 2 / density
        t += step
    return t


def beta_share(x: float, a: float, b: float) -> float:
    """
    The share of the beta distribution of ``a`` and ``b`` that lies below ``x``: its regularized incomplete function.

    By the continued fraction of Abramowitz and Stegun (1964, 26.5.8) in the way of Lentz (1976), from the side where it is short.
    """
    if x <= 0 or x >= 1:
        return float(x > 0)
    if x > (a + 1) / (a + b + 2):
        return 1 - beta_share(1 - x, b, a)
    tiny = 1e-300
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    ratio = 1 / (1 - (a + b) * x / (a + 1) or tiny)
    fraction, numerator, change, m = ratio, 1.0, 0.0, 0
    while abs(change - 1) > 1e-13:  # beyond, a slow tail's steps are little but rounding
        m += 1
        for factor in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            ratio = 1 / (1 + factor * ratio or tiny)
            numerator = 1 + factor / numerator or tiny
            change = ratio * numerator
            fraction *= change
    return math.exp(log_front) * fraction / a
