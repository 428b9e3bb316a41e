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
        kind: Quality is paired example by example; time and memory compare on one machine only; size is exact.
        better: Which direction is an improvement.
        absolute: A smaller difference does not matter, however certain; in the unit.
        relative: Tolerance where a side has a single run, as a share of the base.
        unit: Of the value; an empty one stands for a fraction.
        place: Where the record has it, if not at its name; quality comes from the predictions of dev and test together.
    """

    name: str
    kind: Kind
    better: Literal["higher", "lower"]
    absolute: float
    relative: float = 0.0
    unit: str = ""
    place: str = ""

    def value(self, record: Record) -> float | None:
        """The record's figure; None where it measured none, as a phase that trains nothing has no training time."""
        if self.kind == "quality":
            return found.value if (found := self.score(record)) else None
        value = record.look_up(self.place or self.name)
        return None if value is None or (self.kind == "time" and not value) else float(value)

    def score(self, record: Record) -> Score | None:
        """Of a metric of quality, over all splits that the record has predictions for, by their names; None without any."""
        n, gold, predicted = record.labels(sorted(record.predictions))
        return score(self.name, n, gold, predicted) if n else None

    def gain(self, difference: float) -> float:
        """The difference, its sign such that more is better."""
        return difference if self.better == "higher" else -difference


METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(name="accuracy", kind="quality", better="higher", absolute=0.001),
        Metric(name="f1", kind="quality", better="higher", absolute=0.001),
        Metric(name="train_runtime_seconds", unit="s", kind="time", better="lower", absolute=0.1, relative=0.25),
        Metric(name="samples_per_second", unit="1/s", kind="time", better="higher", absolute=0.1, relative=0.25),
        Metric(name="evaluation_seconds", unit="s", kind="time", better="lower", absolute=0.1, relative=0.25),
        Metric(name="latency_ms", unit="ms", kind="time", better="lower", absolute=0.1, relative=0.5),
        Metric(name="peak_memory_bytes", unit="B", kind="memory", better="lower", absolute=2.0**20, relative=0.1),
        Metric(name="artifact_bytes", unit="B", kind="size", better="lower", absolute=2.0**10),
        Metric(
            name="trainable_parameters",
            place="parameter_counts.trainable",
            unit="parameters",
            kind="size",
            better="lower",
            absolute=1.0,
        ),
    )
}
"""By name, in the order in which they are shown."""
