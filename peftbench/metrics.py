"""What is compared: each metric's unit, its direction, and how much of a difference means something."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from peftbench.paired import Score, score
from peftbench.records import Record

Kind = Literal["quality", "time", "memory", "size"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """
    A figure of a record.

    Attributes:
        name: As gates, tables and exports spell it.
        place: Where the record has it; quality has none, as it is over dev and test together.
        unit: Of the value; an empty one stands for a fraction.
        kind: Quality is paired example by example; time and memory compare on one machine only; size is exact.
        better: Which direction is an improvement.
        absolute: A smaller difference does not matter, however certain; in the unit.
        relative: Tolerance where a side has a single run, as a share of the base.
    """

    name: str
    place: str
    unit: str
    kind: Kind
    better: Literal["higher", "lower"]
    absolute: float
    relative: float

    def value(self, record: Record) -> float | None:
        """The record's figure; None where it measured none, as a phase that trains nothing has no training time."""
        if self.kind == "quality":
            return found.value if (found := self.score(record)) else None
        value = record.look_up(self.place)
        return None if value is None or (self.kind == "time" and not value) else float(value)

    def score(self, record: Record) -> Score | None:
        """Of a metric of quality, over all splits that the record has predictions for, by their names; None without any."""
        n, gold, predicted = record.labels(sorted(record.predictions))
        return score(self.name, n, gold, predicted) if n else None

    def gain(self, difference: float) -> float:
        """The difference, its sign such that more is better."""
        return difference if self.better == "higher" else -difference


_TABLE: tuple[tuple[str, str, str, Kind, Literal["higher", "lower"], float, float], ...] = (
    ("accuracy", "", "", "quality", "higher", 0.001, 0.0),
    ("f1", "", "", "quality", "higher", 0.001, 0.0),
    ("train_runtime_seconds", "train_runtime_seconds", "s", "time", "lower", 0.1, 0.25),
    ("samples_per_second", "samples_per_second", "1/s", "time", "higher", 0.1, 0.25),
    ("evaluation_seconds", "evaluation_seconds", "s", "time", "lower", 0.1, 0.25),
    ("latency_ms", "latency_ms", "ms", "time", "lower", 0.1, 0.5),
    ("peak_memory_bytes", "peak_memory_bytes", "B", "memory", "lower", 2.0**20, 0.1),
    ("artifact_bytes", "artifact_bytes", "B", "size", "lower", 2.0**10, 0.0),
    ("trainable_parameters", "parameter_counts.trainable", "parameters", "size", "lower", 1.0, 0.0),
)

METRICS: Mapping[str, Metric] = {
    name: Metric(name=name, place=place, unit=unit, kind=kind, better=better, absolute=absolute, relative=relative)
    for name, place, unit, kind, better, absolute, relative in _TABLE
}
"""By name, in the order in which they are shown."""
