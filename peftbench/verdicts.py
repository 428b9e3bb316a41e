"""What a comparison says about a phase, and a history about a commit."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["better", "worse", "no difference shown", "not comparable", "newly failing", "fixed", "missing", "new"]

UNDER_LOAD = "while other work ran"
"""In the reason of a row of single runs by which no loss, however large, could be shown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """
    What a comparison says about one metric of one phase.

    Attributes:
        metric: Its name in `METRICS`, or ``outcome``, the share of seeds that passed, for a phase that failed or is not there.
        base: Mean of what was measured; None where nothing was.
        difference: Head less base, in the metric's unit.
        ci95: Its 95% interval, not adjusted for the number of phases; None where a single measurement tells none.
        reason: What the verdict rests on.
    """

    phase: str
    metric: str
    base: float | None = None
    head: float | None = None
    difference: float | None = None
    ci95: tuple[float, float] | None = None
    verdict: Verdict
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """
    A phase's metric at one commit.

    Attributes:
        commit: Its id, or the run's id where a record has no commit.
        value: Mean over the records with figures; None where there is none.
        passed: How many records passed.
        marks: ``dirty``, ``unknown`` to git, ``failed``, ``other machine`` or whatever else cannot be compared with before.
        shift: Better or worse than the level before it; None where no shift is shown.
    """

    commit: str
    subject: str
    value: float | None
    passed: int
    marks: Sequence[str]
    shift: str | None
