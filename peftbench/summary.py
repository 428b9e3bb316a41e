"""Records to summaries: means and spread over seeds, and which phases are worth their cost."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from peftbench.intervals import pooled, t_limit, wilson_interval
from peftbench.records import Record, SplitMetrics

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
    "memory_before_bytes",
    "artifact_bytes",
    "latency_ms",
    "processor_wait_fraction",
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
    def measured(self) -> list[Record]:
        """Those with figures, whatever their tests made of them: a mean without those that a test found wanting would flatter."""
        return [record for record in self.records if record.measured]

    @property
    def failed(self) -> list[Record]:
        """Those whose tests failed, with or without figures."""
        return [record for record in self.records if record.outcome == "failed"]

    @property
    def trains(self) -> bool:
        """Whether a seed changes anything: a phase that trains nothing evaluates one and the same model for all of them."""
        return any(record.optimizer_steps != 0 for record in self.measured)

    def mean(self, figure: str) -> float | None:
        """Mean over the measured seeds; None where there is no value."""
        values = self.values(figure)
        return statistics.fmean(values) if values else None

    def deviation(self, figure: str) -> float | None:
        """Sample standard deviation over the measured seeds; None for fewer than two."""
        values = self.values(figure)
        return statistics.stdev(values) if len(values) > 1 else None

    def values(self, figure: str) -> list[float]:
        """The single values, by seed."""
        return [float(value) for record in self.measured if (value := record.look_up(figure)) is not None]

    def interval(self, split: Literal["dev", "test"]) -> tuple[float, float] | None:
        """The 95% interval of accuracy on one split: of one model the record's own, else over seeds and examples."""
        quality: SplitMetrics | None = self.measured[-1].look_up(split)
        if quality is not None and (len(self.measured) == 1 or not self.trains):
            return quality.accuracy_ci95
        return self.accuracy_ci95(split)

    def accuracy_ci95(self, *splits: str) -> tuple[float, float] | None:
        """
        The interval of accuracy over these splits together: Wilson's for one seed; for several that of the mean over seeds and
        examples, which is Wilson's for as many examples as would be as uncertain.

        None where no predictions were recorded. Two seeds leave it wide, as they tell little about how far seeds vary.
        """
        seeds = [record.labels(splits) for record in (self.measured if self.trains else self.measured[-1:])]
        if not seeds or not all(n for n, _, _ in seeds) or len({n for n, _, _ in seeds}) > 1:
            return None
        n, wrong = seeds[0][0], [gold ^ predicted for _, gold, predicted in seeds]
        if len(seeds) == 1:
            return wilson_interval(n - wrong[0].bit_count(), n)
        rates = [mask.bit_count() / n for mask in wrong]
        square = sum((one & other).bit_count() for one in wrong for other in wrong) / len(wrong) ** 2 / n
        share = 1 - statistics.fmean(rates)
        over_examples = max(0.0, square - (1 - share) ** 2) / n
        over_seeds = statistics.variance(rates) / len(rates)
        variance, freedom = pooled([(over_examples, max(n - 1, 1)), (over_seeds, len(rates) - 1)])
        if not variance or not 0 < share < 1:  # all right or all wrong, which does not make it certain that others would be
            return wilson_interval(n * share, n)
        alike = share * (1 - share) / variance  # as many independent examples would leave it as uncertain
        return wilson_interval(alike * share, alike, z=t_limit(freedom))


def summarize(records: Iterable[Record]) -> list[Summary]:
    """One summary for each phase and scale, in the order of the phases' ids."""
    grouped: dict[tuple[str, str, str], list[Record]] = {}
    for record in sorted(records, key=lambda r: (r.scale, r.phase, r.name, r.seed)):
        grouped.setdefault((record.scale, record.phase, record.name), []).append(record)
    return [Summary(group) for group in grouped.values()]


def by_scale(records: Iterable[Record]) -> dict[str, list[Summary]]:
    """The summaries of each scale, which are never shown in one table."""
    scales: dict[str, list[Summary]] = {}
    for summary in summarize(records):
        scales.setdefault(summary.first.scale, []).append(summary)
    return scales


def phase_report(summary: Summary) -> dict[str, Any]:
    """
    A phase's latest result, of which a seed passed: the record's keys, with means where several seeds were measured.

    ``seeds`` lists these, ``failed_seeds`` those whose tests failed, and ``records`` says where the record of each is; ``spread``
    holds mean, standard deviation (null for one seed) and the single values of each figure. The interval of a mean accuracy is that
    over seeds and examples.
    """
    report = next(record for record in reversed(summary.records) if record.outcome == "passed").to_json()
    report["seeds"] = [record.seed for record in summary.measured]
    report["failed_seeds"] = [record.seed for record in summary.failed]
    report["records"] = [{"run_id": record.run_id, "case": record.case} for record in summary.records]
    report["spread"] = {
        figure: {"mean": summary.mean(figure), "sd": summary.deviation(figure), "values": values}
        for figure in FIGURES
        if (values := summary.values(figure))
    }
    if len(summary.measured) > 1:
        for figure, spread in report["spread"].items():
            *path, last = figure.split(".")
            place = report[path[0]] if path else report
            place[last] = round(spread["mean"]) if last.endswith("_bytes") else spread["mean"]
        for split in ("dev", "test"):
            quality = report[split]
            quality["accuracy_ci95"] = list(
                summary.accuracy_ci95(split) or wilson_interval(quality["accuracy"] * quality["n"], quality["n"])
            )
    return report


def differing(summaries: Iterable[Summary]) -> list[str]:
    """Name the facts, ``data`` or ``machines``, in which the records with figures differ, so that they cannot be compared."""
    measured = [record for summary in summaries for record in summary.measured]
    facts = {
        "data": {str(record.data.get("fingerprint")) for record in measured},
        "machines": {str(record.machine.get("id")) for record in measured},
    }
    return [name for name, values in facts.items() if len(values) > 1]


def pareto_front(summaries: Sequence[Summary]) -> set[str]:
    """
    Ids of the trained phases that no other beats on dev accuracy, trainable parameters and training time at once.

    Left out are a phase that trains nothing, which would be on every front for free, one whose interval of accuracy reaches down to
    the majority class, and one of which a seed failed. Of several machines or data there is no front.
    """
    if differing(summaries):
        return set()
    points = {}
    for summary in summaries:
        if summary.failed:
            continue
        accuracy, seconds = summary.mean("dev.accuracy") or 0.0, summary.mean("train_runtime_seconds") or 0.0
        one = summary.first
        trainable = one.parameter_counts.trainable if one.parameter_counts else 0
        low, _ = summary.interval("dev") or (accuracy, accuracy)
        if trainable and (one.majority_accuracy is None or low > one.majority_accuracy):
            points[one.phase_id] = (-accuracy, trainable, seconds)
    return {
        name
        for name, point in points.items()
        if not any(other != point and all(o <= p for o, p in zip(other, point, strict=True)) for other in points.values())
    }
