"""Records to summaries: means and spread over seeds, and which phases are worth their cost."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from peftbench.records import Record, wilson_interval

FIGURES = (
    "dev.accuracy",
    "dev.f1",
    "test.accuracy",
    "test.f1",
    "train_runtime_seconds",
    "evaluation_seconds",
    "efficiency.accuracy_per_million_params",
    "efficiency.accuracy_per_minute",
    "samples_per_second",
    "tokens_per_second",
    "peak_memory_bytes",
    "artifact_bytes",
    "latency_ms",
)
"""What varies with the seed, by its place in the record."""


@dataclass(frozen=True)
class Summary:
    """The records of one phase at one scale, a seed each."""

    records: Sequence[Record]

    @property
    def first(self) -> Record:
        """Any of them, for what they share."""
        return self.records[0]

    @property
    def passed(self) -> list[Record]:
        """Those that measured something."""
        return [record for record in self.records if record.outcome == "passed"]

    def mean(self, figure: str) -> float | None:
        """Mean over the passed seeds; None where there is no value."""
        values = self.values(figure)
        return statistics.fmean(values) if values else None

    def deviation(self, figure: str) -> float | None:
        """Sample standard deviation over the passed seeds; None for fewer than two."""
        values = self.values(figure)
        return statistics.stdev(values) if len(values) > 1 else None

    def values(self, figure: str) -> list[float]:
        """The single values, by seed."""
        return [float(value) for record in self.passed if (value := _look_up(record, figure)) is not None]


def summarize(records: Iterable[Record]) -> list[Summary]:
    """One summary for each phase and scale, in the order of the phases' ids."""
    grouped: dict[tuple[str, str, str], list[Record]] = {}
    for record in sorted(records, key=lambda r: (r.scale, r.phase, r.name, r.seed)):
        grouped.setdefault((record.scale, record.phase, record.name), []).append(record)
    return [Summary(group) for group in grouped.values()]


def phase_report(summary: Summary) -> dict[str, Any]:
    """
    A phase's latest result: the record's keys, with means where there are several seeds.

    ``seeds`` lists them; ``spread`` holds mean, standard deviation (null for one seed) and the single values of each figure.
    The interval of a mean accuracy is that of the examples, which all seeds share.
    """
    passed = summary.passed
    report = passed[-1].to_json()
    report["seeds"] = [record.seed for record in passed]
    report["spread"] = {
        figure: {"mean": summary.mean(figure), "sd": summary.deviation(figure), "values": values}
        for figure in FIGURES
        if (values := summary.values(figure))
    }
    if len(passed) > 1:
        for figure, spread in report["spread"].items():
            *path, last = figure.split(".")
            place = report[path[0]] if path else report
            place[last] = round(spread["mean"]) if isinstance(place[last], int) else spread["mean"]
        for split in ("dev", "test"):
            quality = report[split]
            quality["accuracy_ci95"] = list(wilson_interval(quality["accuracy"] * quality["n"], quality["n"]))
    return report


def pareto_front(summaries: Iterable[Summary]) -> set[str]:
    """
    Ids of the trained phases that no other beats on dev accuracy, trainable parameters and training time at once.

    A phase that trains nothing is left out: it would be on every front for free.
    """
    points = {}
    for summary in summaries:
        if summary.passed and summary.passed[0].parameter_counts and summary.passed[0].parameter_counts.trainable:
            accuracy, seconds = summary.mean("dev.accuracy"), summary.mean("train_runtime_seconds")
            trainable = summary.passed[0].parameter_counts.trainable
            points[f"{summary.first.phase}-{summary.first.name}"] = (-(accuracy or 0.0), trainable, seconds or 0.0)
    return {
        name
        for name, point in points.items()
        if not any(other != point and all(o <= p for o, p in zip(other, point, strict=True)) for other in points.values())
    }


def _look_up(record: Record, figure: str) -> Any:
    place: Any = record
    for name in figure.split("."):
        place = None if place is None else getattr(place, name)
    return place
