"""A metric over commits, and the commits that shift its level."""

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from peftbench.commits import Commit
from peftbench.compare import estimate_quality, estimate_runs, other_memory_before
from peftbench.metrics import Metric
from peftbench.records import Record
from peftbench.sample import Identity, Sample, of_all_seeds
from peftbench.verdicts import Point

LEVEL = 0.01
"""Significance level of a shift: strict, as every commit is tested."""

UNKNOWN_CHANGES = "unknown"
"""In place of a fingerprint of uncommitted changes, where git did not say whether there were any."""


def trace(records: Iterable[Record], metric: Metric, commits: Sequence[Commit]) -> dict[str, list[Point]]:
    """
    A metric over commits, by phase.

    Levels go along the line that leads to HEAD. A commit shifts the level if it differs from the first of the level (quality) or
    from all of it (the rest), so that slow drifts show, too, and if a seed newly fails. Commits off the line are shown and take no
    part, and neither do commits that git does not know, or changes that were never committed, where there is anything else; they
    stand where their time puts them.
    """
    place = {commit.id: i for i, commit in enumerate(commits)}
    by_phase: dict[tuple[str, str], dict[tuple[str, str], list[Record]]] = {}
    for record in sorted((r for r in records if not r.interrupted), key=lambda r: r.run_id):
        changes = record.commit.get("changes") or (UNKNOWN_CHANGES if record.commit.get("problem") else "")
        key = (str(record.commit.get("id") or record.run_id), str(changes))
        by_phase.setdefault((record.scale, record.phase_id), {}).setdefault(key, []).append(record)
    several = len({scale for scale, _ in by_phase}) > 1
    traced = {}
    for (scale, phase), groups in sorted(by_phase.items()):
        taking_part = _taking_part(groups, commits, place)
        line, points, last = _Line(metric), [], dict[int, str]()
        for (commit, changes), group in _in_order(groups, place):
            known = commits[place[commit]] if commit in place else None
            sample = Sample(group)
            marks = ["perhaps dirty" if changes == UNKNOWN_CHANGES else "dirty"] if changes else []
            marks += [] if known else ["unknown"]
            marks += ["failed"] if sample.error else []
            marks += ["other branch"] if known and not known.on_line else []
            measured, shift = sample, None
            if metric.kind == "quality" and (unscored := sample.unscored(metric)):
                marks.append(f"no predictions for seed {' and '.join(map(str, unscored))}")
                measured = sample.of_seeds(sample.scores(metric))
            parts = measured.by_identity(metric)
            marks += _mixed(parts)
            if parts and (commit, changes) in taking_part:
                shift, other = line.take(measured, parts)
                marks += [f"other {other}"] if other else []
            if (commit, changes) in taking_part:
                for seed, record in sample.latest.items():
                    if record.outcome == "failed" and last.get(seed) == "passed":
                        shift = "worse"
                    last[seed] = record.outcome
            passed = sum([record.outcome == "passed" for record in group])
            subject, value = known.subject if known else "", (_latest(parts) if len(parts) > 1 else sample).mean(metric)
            points.append(Point(commit=commit, subject=subject, value=value, passed=passed, marks=marks, shift=shift))
        if any(point.value is not None for point in points):
            traced[f"{phase}-{scale}" if several else phase] = points
    return traced


def _mixed(parts: Mapping[Identity, Sample]) -> list[str]:
    """The mark of a commit whose records are of several data, machines and so on."""
    if len(parts) < 2:
        return []
    first = next(iter(parts))
    names = {name: None for one in parts for (name, value), (_, other) in zip(one, first, strict=True) if value != other}
    return [f"mixed {' and '.join(names)}"]


def _latest(parts: Mapping[Identity, Sample]) -> Sample:
    """Of those the ones with the latest record among them."""
    return max(parts.values(), key=lambda sample: sample.measured[-1].run_id)


def _taking_part(
    groups: Mapping[tuple[str, str], list[Record]], commits: Sequence[Commit], place: Mapping[str, int]
) -> set[tuple[str, str]]:
    """What levels are made of: what was committed on the line to HEAD; where that is nothing, all that is not of another branch."""
    known = {key: commits[place[key[0]]].on_line for key in groups if key[0] in place}
    committed = {key for key, on_line in known.items() if on_line and not key[1]}
    return committed or {key for key in groups if known.get(key, True)}


def _in_order(
    groups: Mapping[tuple[str, str], list[Record]], place: Mapping[str, int]
) -> Iterator[tuple[tuple[str, str], list[Record]]]:
    """Commits as git has them; a group that git does not know stands after the known one that was measured before it."""
    last = -1
    keys = {}
    for key, group in sorted(groups.items(), key=lambda item: item[1][0].run_id):
        last = place.get(key[0], last)
        keys[key] = (last, bool(key[1]) or key[0] not in place, group[0].run_id)
    for key in sorted(keys, key=lambda key: keys[key]):
        yield key, groups[key]


@dataclass(kw_only=True, slots=True)
class _Level:
    """
    What a commit is compared with, of one machine, data and whatever else must be the same.

    Attributes:
        first: Of each seed its first record, which quality is compared with.
        values: Of all its runs.
        mean: Of the values.
        memory_before: Of all its cases.
        last: Place of its last commit along the line.
    """

    first: Sample
    values: list[float]
    mean: float
    memory_before: list[int]
    last: int

    def add(self, sample: Sample, values: Sequence[float]) -> None:
        """Take what another commit measured for more of the same."""
        self.values += values
        self.mean += sum(value - self.mean for value in values) / len(self.values)
        self.memory_before += sample.memory_before
        if new := [record for seed, record in sample.by_seed.items() if seed not in self.first.by_seed]:
            self.first = Sample([*self.first.by_seed.values(), *new])

    def of_seeds(self, sample: Sample) -> tuple[Sample, Sample]:
        """The first records and a sample, both of the seeds that they share alone."""
        sides = of_all_seeds(self.first, sample)
        shared = sides[0].by_seed.keys() & sides[1].by_seed.keys()
        base, head = (side if side.by_seed.keys() == shared else side.of_seeds(shared) for side in sides)
        return base, head


class _Line:
    """The levels of a phase along the commits that lead to HEAD, one for each machine and so on, as those may alternate."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric
        self._levels: dict[object, _Level] = {}
        self._facts: dict[str, set[str]] = {}
        self._told: dict[str, int] = {}
        self._place = 0

    def take(self, sample: Sample, parts: Mapping[Identity, Sample]) -> tuple[str | None, str | None]:
        """
        Whether the next commit is better or worse than its level, and which fact has changed since the commit before it.

        Args:
            parts: The sample, by what must be the same to compare two records.
        """
        self._place += 1
        facts = sample.facts(self._metric)
        changed = [name for name, values in facts.items() if self._facts.get(name, values) != values]
        self._facts = facts
        shifts = []
        for one, part in parts.items():
            shift, other = self._take(one, part)
            shifts += [shift] if shift else []
            changed += [other] if other else []
        return next(iter(shifts), None), next(iter(changed), None)

    def _take(self, key: object, sample: Sample) -> tuple[str | None, str | None]:
        """As `take`, for those records of a commit that belong to one level."""
        metric, values = self._metric, sample.values(self._metric)
        level, other = self._levels.get(key), None
        if level and metric.kind == "memory":
            other = other_memory_before(metric, level.values, level.memory_before, sample.memory_before)
        if level is None or other or not level.values:
            self._levels[key] = self._begin(sample, values)
            return None, other.partition(":")[0].removeprefix("other ") if other else None
        shift = _shift(metric, level, sample, values) if values else None
        if shift is None:
            level.add(sample, values)
            level.last = self._place
            return None, None
        self._levels[key] = self._begin(sample, values)
        if self._told.get(shift, 0) > level.last:  # another machine has shown it since this one measured
            return None, None
        self._told = {shift: self._place}
        return shift, None

    def _begin(self, sample: Sample, values: Sequence[float]) -> _Level:
        return _Level(
            first=sample,
            values=[*values],
            mean=statistics.fmean(values) if values else 0.0,
            memory_before=[*sample.memory_before],
            last=self._place,
        )


def _shift(metric: Metric, level: _Level, sample: Sample, values: Sequence[float]) -> str | None:
    """Whether a sample is better or worse than a level."""
    if metric.kind == "quality":
        base, head = level.of_seeds(sample)
        if not head.measured:
            return None
        difference = statistics.fmean(head.values(metric)) - statistics.fmean(base.values(metric))
    else:
        difference = statistics.fmean(values) - level.mean
    if abs(difference) < metric.absolute:
        return None
    found = estimate_quality(metric, base, head) if metric.kind == "quality" else estimate_runs(metric, level.values, values)
    if isinstance(found, str) or (found is None and metric.kind == "time" and sample.waited):
        return None
    if found is not None:
        difference = found.value
    certain = abs(difference) > metric.relative * abs(level.mean) if found is None else found.shows(LEVEL)
    return ("better" if metric.gain(difference) > 0 else "worse") if certain else None
