"""Limits on how much worse a metric may get, and whether a comparison keeps them."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from peftbench.metrics import METRICS, Metric
from peftbench.report import render_difference
from peftbench.verdicts import UNDER_LOAD, Row

Status = Literal[0, 1, 2]

_LIMIT = re.compile(r"(?P<number>[0-9]+(\.[0-9]+)?([eE][-+]?[0-9]+)?)(?P<unit>[^0-9]*)")

_UNITS = {
    "": {"pt": 0.01},
    "s": {"": 1.0, "s": 1.0, "ms": 1e-3, "min": 60.0},
    "ms": {"": 1.0, "ms": 1.0, "s": 1e3},
    "B": {"": 1.0, "B": 1.0, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30},
}
"""
How a limit may be written, by the metric's unit, and what it is times; of other units the number alone.

A fraction needs its points said, as 0.5 may be half a point or fifty.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gate:
    """
    A metric must not be worse by more than the limit.

    Attributes:
        limit: A share of the base if ``relative``, else in the metric's unit.
        written: The limit as it was given.
    """

    metric: Metric
    limit: float
    relative: bool
    written: str

    @classmethod
    def from_text(cls, text: str, option: str = "--fail") -> "Gate":
        """
        ``METRIC:LIMIT`` as pytest-benchmark has it: ``train_runtime_seconds:20%``, ``latency_ms:0.5ms``, ``accuracy:0.5pt``.

        Args:
            option: That gave it, for the message.

        Raises:
            ValueError: Naming what was got and what is allowed.
        """
        name, _, limit = text.partition(":")
        if name not in METRICS:
            raise ValueError(f"{option} must name one of {', '.join(METRICS)}, got {text!r}")
        metric, found = METRICS[name], _LIMIT.fullmatch(limit)
        units = {**_UNITS.get(metric.unit, {"": 1.0}), "%": 0.01}
        number = float(found["number"]) * units[found["unit"]] if found and found["unit"] in units else None
        if found is None or number is None or not math.isfinite(number) or (not metric.unit and number > 1):
            written = ", ".join(f"5{unit}" for unit in units)
            raise ValueError(f"{option} {name}: the limit must be written as {written} (of the base); got {text!r}")
        return cls(metric=metric, limit=number, relative=found["unit"] == "%", written=limit)

    def breaks(self, row: Row, *, strict: bool) -> bool:
        """Whether a row of this metric is worse by more than the limit and, unless strict, by more than noise."""
        if row.base is None or row.difference is None or not (strict or row.verdict == "worse"):
            return False
        return self._exceeded(-self.metric.gain(row.difference), row.base)

    def doubt(self, row: Row) -> str | None:
        """Why a row of this metric that does not break the limit does not prove that it is kept; None if it does."""
        if row.base is None or row.difference is None:
            return None
        lost = -self.metric.gain(row.difference)
        if row.ci95 is None:
            if self._exceeded(lost, row.base):
                return f"{row.phase} is {self._render(lost)} worse, which is not shown to be a difference ({row.reason})"
            if UNDER_LOAD in row.reason:
                return f"no loss can be shown in {row.phase} ({row.reason})"
            noise = max(self.metric.absolute, self.metric.relative * abs(row.base))
            if self.metric.kind == "size" or row.verdict != "no difference shown" or not self._exceeded(noise, row.base):
                return None
            return f"less than {self._render(noise)} is not shown in {row.phase} ({row.reason})"
        worst = max(-self.metric.gain(end) for end in row.ci95)
        if not self._exceeded(worst, row.base):
            return None
        return f"{row.phase} may be up to {self._render(worst)} worse, which these records cannot rule out"

    def _exceeded(self, lost: float, base: float) -> bool:
        """Whether that much, in the metric's unit, is more than the limit, rounding apart."""
        return lost > (self.limit * abs(base) if self.relative else self.limit) * (1 + 1e-9)

    def _render(self, difference: float) -> str:
        return render_difference(self.metric, difference).removeprefix("+")


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """
    What gates say about a comparison.

    Attributes:
        status: 0 fine, 1 worse, 2 cannot tell.
        lines: Why, one a finding, and which gates are kept.
    """

    status: Status
    lines: Sequence[str]


def judge(rows: Sequence[Row], gates: Sequence[Gate], *, strict: bool = False, doubts: Sequence[str] = ()) -> Judgement:
    """
    Hold rows to gates.

    A phase that newly fails is worse whatever the gates. One that the base has and that is missing, fails on both sides, or cannot
    be compared in a metric that has a gate, leaves it open, and so does a gate whose metric no row compares. Without gates only the
    doubts are told.

    Args:
        rows: Of a comparison.
        gates: Each of which may break in any row.
        strict: Whether differences that may be noise count.
        doubts: What else leaves all gates open.
    """
    if not gates:
        return Judgement(status=0, lines=list(doubts))
    worse, unclear, notes, kept = [], list(doubts), [], []
    for row in rows:
        of_metric = [gate for gate in gates if gate.metric.name == row.metric]
        broken = [gate for gate in of_metric if gate.breaks(row, strict=strict)]
        worse += [f"{row.phase}: {row.metric} is worse by more than {gate.written} ({row.reason})" for gate in broken]
        if row.verdict == "newly failing":
            worse.append(f"{row.phase}: newly failing: {row.reason}")
        if row.verdict in ("missing", "not comparable") and (of_metric or (row.metric == "outcome" and row.base is not None)):
            unclear.append(f"{row.phase}: {row.metric}: {row.verdict}: {row.reason}")
    for gate in gates:
        name = gate.metric.name
        compared = [row for row in rows if row.metric == name and row.difference is not None]
        if not compared:
            unclear.append(f"{name}:{gate.written}: compared in no phase")
        elif any(gate.breaks(row, strict=strict) for row in compared):
            continue
        elif not strict and (hidden := [what for row in compared if (what := gate.doubt(row))]):
            notes.append(f"{name}:{gate.written}: {'; '.join(dict.fromkeys(hidden))}")
        else:
            kept.append(f"{name}:{gate.written}: kept in {len(compared)} phase{'s' if len(compared) > 1 else ''}")
    return Judgement(status=1 if worse else 2 if unclear else 0, lines=[*worse, *unclear, *notes, *(() if doubts else kept)])
