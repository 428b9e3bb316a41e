"""How sure a figure is: 95% intervals of a share, and of a mean whose variance has several sources. Imports nothing until asked."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Estimate:
    """
    A value and how sure it is.

    Attributes:
        ci95: The 95% interval of the value.
        p: Of a value at least as far from zero, in either direction, where zero is the truth.
    """

    value: float
    ci95: tuple[float, float]
    p: float


def wilson_interval(hits: float, n: int, *, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927), 95% by default."""
    share, spread = hits / n, z * z / n
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def estimate(value: float, sources: Sequence[tuple[float, float]]) -> Estimate:
    """
    By Student's t with the degrees of freedom of Welch and Satterthwaite (Satterthwaite 1946).

    Args:
        value: Such as a difference of means.
        sources: What the variance of the value is the sum of, each with its degrees of freedom.
    """
    variance = sum(part for part, _ in sources)
    if variance <= 0:
        return Estimate(value, (value, value), float(not value))
    from scipy.special import stdtr, stdtrit

    spread = sum(part**2 / freedom for part, freedom in sources if part)  # of one example neither part nor freedom is left
    freedom = min(variance**2 / spread, 1e9) if spread else 1e9
    error = math.sqrt(variance)
    half = float(stdtrit(freedom, 0.975)) * error
    return Estimate(value, (value - half, value + half), 2 * float(stdtr(freedom, -abs(value) / error)))
