"""The records of one phase on one side of a comparison, and what must be the same to compare two."""

import dataclasses
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from peftbench.metrics import Metric
from peftbench.paired import Score
from peftbench.records import Record

Identity = tuple[tuple[str, str], ...]
Examples = tuple[tuple[tuple[str, str], ...], int, int]  # the splits and their fingerprints, how many examples, their true labels


@dataclass(slots=True, eq=False)
class Sample:
    """
    The records of one phase on one side, by run, not to be changed; what they say is looked up once.

    Attributes:
        latest: The last of each seed, whether it passed or not.
        measured: All with figures, also those that their tests then found wanting.
        by_seed: The last of each seed with figures.
    """

    records: Sequence[Record]
    latest: dict[int, Record] = field(init=False)
    measured: list[Record] = field(init=False)
    by_seed: dict[int, Record] = field(init=False)
    _values: dict[str, list[float]] = field(init=False, repr=False, default_factory=dict)
    _scores: dict[str, dict[int, Score]] = field(init=False, repr=False, default_factory=dict)
    _examples: set[Examples] = field(init=False, repr=False, default_factory=set)

    def __post_init__(self) -> None:
        self.latest = {record.seed: record for record in self.records}
        self.measured = [record for record in self.records if record.measured]
        self.by_seed = {record.seed: record for record in self.measured}

    @property
    def error(self) -> str | None:
        """The error of the first seed whose last run failed, which it names where there are several; None if none did."""
        record = next((record for record in self.latest.values() if record.outcome == "failed"), None)
        if record is None:
            return None
        seed = f"seed {record.seed}: " if len(self.latest) > 1 else ""
        return seed + record.reason

    @property
    def teacher_seconds(self) -> float:
        """What the teacher and its logits took when they were first made; 0 for a phase that needs none."""
        costs = [cost.training_seconds + cost.logit_seconds for record in self.measured if (cost := record.teacher_cost)]
        return statistics.fmean(costs) if costs else 0.0

    @property
    def passed_seeds(self) -> set[int]:
        """Seeds of which a run passed."""
        return {record.seed for record in self.records if record.outcome == "passed"}

    @property
    def has_all_figures(self) -> bool:
        """Whether the last record of each seed has figures, and there is one."""
        return bool(self.latest) and all(record.measured for record in self.latest.values())

    @property
    def share_passed(self) -> float | None:
        """Share of the seeds whose last run passed; None without records."""
        return statistics.fmean(record.outcome == "passed" for record in self.latest.values()) if self.records else None

    @property
    def waited(self) -> bool:
        """Whether a case with figures waited for a processor."""
        return any(record.waited for record in self.measured)

    @property
    def memory_before(self) -> list[int]:
        """What was in use when each case with figures began, where that is known."""
        return [size for record in self.measured if (size := record.memory_before_bytes) is not None]

    def mean(self, metric: Metric) -> float | None:
        """Mean of the values; None if there are none."""
        values = self.values(metric)
        return statistics.fmean(values) if values else None

    def values(self, metric: Metric) -> list[float]:
        """Independent measurements: of quality, one a seed; of all else, the mean of each run, whose seeds share its conditions."""
        if metric.name not in self._values:
            self._values[metric.name] = self._look_up(metric)
        return self._values[metric.name]

    def _look_up(self, metric: Metric) -> list[float]:
        if metric.kind == "quality":
            return [one.value for one in self.scores(metric).values()]
        grouped: dict[str, list[float]] = {}
        for record in self.measured:
            if (value := metric.value(record)) is not None:
                grouped.setdefault(record.run_id, []).append(value)
        return [statistics.fmean(values) for values in grouped.values()]

    def scores(self, metric: Metric) -> dict[int, Score]:
        """Of a metric of quality, by seed, from its last record with figures; without the seeds that are `unscored`."""
        if metric.name not in self._scores:
            scores = {seed: metric.score(record) for seed, record in self.by_seed.items()}
            self._scores[metric.name] = {seed: one for seed, one in scores.items() if one is not None}
        return self._scores[metric.name]

    def unscored(self, metric: Metric) -> list[int]:
        """Seeds whose last record with figures has no predictions."""
        scores = self.scores(metric)
        return [seed for seed in self.by_seed if seed not in scores] if len(scores) < len(self.by_seed) else []

    def examples(self, metric: Metric) -> set[Examples]:
        """What the scores of any metric of quality are of; one element where that is the same for all seeds."""
        if not self._examples:
            self._examples = {(self.by_seed[seed].examples, one.n, one.gold) for seed, one in self.scores(metric).items()}
        return self._examples

    def of_seeds(self, seeds: Collection[int]) -> "Sample":
        """The records of these seeds."""
        return Sample([record for record in self.records if record.seed in seeds])

    def by_identity(self, metric: Metric) -> dict[Identity, "Sample"]:
        """The records with figures, parted by what must be the same to compare two of them."""
        parts: dict[Identity, list[Record]] = {}
        for record in self.measured:
            parts.setdefault(identity(metric, record), []).append(record)
        if len(parts) == 1 and len(self.measured) == len(self.records):
            return dict.fromkeys(parts, self)  # with what has been looked up of it
        return {one: Sample(records) for one, records in parts.items()}

    def facts(self, metric: Metric) -> dict[str, set[str]]:
        """Values that must match on both sides, by name."""
        records = list(self.by_seed.values()) if metric.kind == "quality" else self.measured  # what its values are taken from
        facts: dict[str, set[str]] = {"seed set": {str(record.seed) for record in records}} if metric.kind == "quality" else {}
        for name, value in (fact for record in records for fact in identity(metric, record)):
            facts.setdefault(name, set()).add(value)
        return facts


def identity(metric: Metric, record: Record) -> Identity:
    """What must be the same in two records that a metric is compared in, each with what it is called."""
    data = ("data", str(record.data.get("fingerprint"))[:12])
    if metric.kind == "quality":
        return data, ("metric code", str(record.metrics_version or 1))
    if metric.kind == "size":
        return (data,)
    machine = ("machine", str(record.machine.get("id")))
    if metric.kind == "time":
        return data, machine, ("load", "shared" if record.waited else "alone")
    return data, machine, ("scope of memory", str(record.peak_memory_scope))


def of_all_seeds(base: Sample, head: Sample) -> tuple[Sample, Sample]:
    """A phase that trains nothing is the same for each seed: what it measured stands beside each of the other side's."""
    sides = base, head
    trains = [any(record.optimizer_steps != 0 for record in side.measured) for side in sides]
    if all(trains) or not (base.measured and head.measured):
        return sides
    seeds = [seed for side, trained in zip(sides, trains, strict=True) if trained for seed in side.by_seed] or [
        base.measured[-1].seed
    ]
    first, second = (
        side if trained else Sample([dataclasses.replace(side.measured[-1], seed=seed) for seed in seeds])
        for side, trained in zip(sides, trains, strict=True)
    )
    return first, second
