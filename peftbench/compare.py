"""Two sets of records to verdicts: did it get worse, by how much, and is that more than noise?"""

import dataclasses
import itertools
import statistics
from collections.abc import Collection, Iterable, Sequence

from peftbench.intervals import Estimate
from peftbench.metrics import METRICS, Metric
from peftbench.paired import SHOWN, holm, paired_difference, ratio_difference
from peftbench.records import Record
from peftbench.sample import Identity, Sample, of_all_seeds
from peftbench.verdicts import UNDER_LOAD, Row, Verdict

PhaseAtScale = tuple[str, str, str]  # scale, letter, name


def compare(base: Iterable[Record], head: Iterable[Record]) -> list[Row]:
    """
    A row for each phase and metric of two sides.

    Interrupted cases are as if they had not begun. Of several records of one case and seed, the last one's predictions count; times
    and memory are compared over the runs. Where some records of both sides are of one machine, data and so on, or of the same
    seeds, the others are left out. What failed on other data than the head's is no failure of the base.
    """
    sides = _by_phase(base), _by_phase(head)
    labels = _labels([*sides[0], *sides[1]])
    nothing = Sample([])
    pairs = []
    for case in sorted(labels):
        ours, theirs = (side.get(case, nothing) for side in sides)
        pairs.append((labels[case], _without_failures_elsewhere(ours, theirs), theirs))
    return _judge(pairs)


def compare_phases(records: Iterable[Record], base: str, head: str) -> list[Row]:
    """
    Rows of phases beside others, each pair once.

    Args:
        base: A letter, a name or an id, several of them separated by commas, or ``all``.
        head: The same.

    Raises:
        ValueError: If a name fits no phase among the records, or several, naming those there are, or no pair is left.
    """
    by_phase = _by_phase(records)
    labels = _labels(by_phase)
    known = ", ".join(sorted(labels.values())) or "none, as there are no records"

    def find(names: str) -> list[PhaseAtScale]:
        found = []
        for name in sorted(labels.values()) if names.lower() == "all" else names.split(","):
            name = name.strip()
            fits = [case for case in by_phase if name.lower() in {part.lower() for part in (case[1], case[2], labels[case])}]
            if len(fits) != 1:
                raise ValueError(
                    f"a phase must be one of {known}; got {name!r}; "
                    "give another run as BASE, or the folder of reports, which has the latest of each"
                )
            found += fits
        return found

    pairs: dict[frozenset[PhaseAtScale], tuple[PhaseAtScale, PhaseAtScale]] = {}
    for first, second in itertools.product(find(base), find(head)):
        if first != second and (first[0] == second[0] or "all" not in (base.lower(), head.lower())):
            pairs.setdefault(frozenset((first, second)), (first, second))
    if not pairs:
        raise ValueError(f"{base!r} and {head!r} are the same phase; name two of {known}")
    rows, compared, order = [], [], []
    for first, second in pairs.values():
        label = f"{labels[first]} → {labels[second]}"
        order.append(label)
        ours, theirs = by_phase[first], by_phase[second]
        sides = _without_failures_elsewhere(ours, theirs), _without_failures_elsewhere(theirs, ours)
        broken = [f"{labels[case]} failed: {side.error}" for case, side in zip((first, second), sides, strict=True) if side.error]
        if broken:
            shares = [side.share_passed for side in sides]
            reason = broken[0][:200]
            rows.append(Row(phase=label, metric="outcome", base=shares[0], head=shares[1], verdict="not comparable", reason=reason))
        else:
            compared.append((label, *sides))
    return sorted(rows + _judge(compared, of="pairs"), key=lambda row: order.index(row.phase))


def set_up_changes(base: Iterable[Record], head: Iterable[Record]) -> list[str]:
    """
    What the phases of two sides were set up with differently, a line each: hyperparameters, checkpoints, versions.

    Changes that several phases share are told once. Of a phase without figures only hyperparameters and versions are known.
    """
    sides = _by_phase(base), _by_phase(head)
    labels = _labels([*sides[0], *sides[1]])
    both = sorted(case for case in labels if all(case in side and side[case].records for side in sides))
    phases: dict[str, list[str]] = {}
    for case in both:
        whole = all(side[case].measured for side in sides)
        rows = [_set_up(side[case].measured[-1] if whole else side[case].records[-1], whole=whole) for side in sides]
        taught = all(any(key.startswith("config.teacher.") for key in row) for row in rows)  # earlier versions did not record it
        keys = dict.fromkeys([*rows[0], *rows[1]]) if whole else [key for key in rows[0] if key in rows[1]]
        for key in keys:
            if key.startswith("config.teacher.") and not taught:
                continue
            if key.startswith("versions.") and not all(key in row for row in rows):  # nor of every package
                continue
            before, after = (str(row.get(key)) for row in rows)
            if before != after:
                phases.setdefault(f"{key} {_excerpts(before, after)}", []).append(labels[case])
    return [f"{'all phases' if len(of) == len(both) > 1 else ', '.join(of)}: {change}" for change, of in phases.items()]


def _set_up(record: Record, *, whole: bool) -> dict[str, object]:
    kinds = ("config", "versions", *(("checkpoint", "teacher_checkpoint", "precision", "batching") if whole else ()))
    return {key: value for key, value in record.to_row().items() if key.partition(".")[0] in kinds}


def _excerpts(before: str, after: str) -> str:
    """Two texts, long ones from shortly before where they differ."""
    same = next(
        (i for i, (one, other) in enumerate(zip(before, after, strict=False)) if one != other), min(len(before), len(after))
    )
    start = max(0, same - 20) if max(len(before), len(after)) > 60 else 0
    cut = [f"{'…' if start else ''}{text[start : start + 60]}{'…' if text[start + 60 :] else ''}" for text in (before, after)]
    return " → ".join(cut)


def incomparable(metric: Metric, base: Sample, head: Sample) -> str | None:
    """The reason why two sides, each of one machine, data and so on, cannot be compared; None if they can."""
    ours, theirs = base.facts(metric), head.facts(metric)
    for name, values in ours.items():
        if values != theirs[name]:
            told = _told_apart(name, base.measured[-1], head.measured[-1])
            return f"other {name}: {told or ' and '.join(', '.join(sorted(side)) for side in (values, theirs[name]))}"
    if metric.kind == "memory":
        return other_memory_before(metric, base.values(metric), base.memory_before, head.memory_before)
    return None


def _told_apart(name: str, base: Record, head: Record) -> str | None:
    """How two machines, loads or data differ, in words; None if that is not recorded."""
    if name == "machine":
        ours, theirs = ({"workers": 1, **record.machine, "id": None} for record in (base, head))
        if ours.keys() != theirs.keys():
            return None
        return ", ".join(f"{fact} {value} and {theirs[fact]}" for fact, value in ours.items() if value != theirs[fact]) or None
    if name == "load":
        waits = [
            f"{100 * (record.processor_wait_fraction or 0):.0f}% in the {side}" for side, record in (("base", base), ("head", head))
        ]
        return f"waited for a processor {' and '.join(waits)}"
    if name == "data" and all(record.data.get("source") for record in (base, head)):
        return " and ".join(f"{record.data['source']} ({str(record.data.get('fingerprint'))[:6]})" for record in (base, head))
    return None


def other_memory_before(metric: Metric, peaks: Sequence[float], base: Sequence[int], head: Sequence[int]) -> str | None:
    """What earlier cases left in the process counts towards a peak: it must be as much on both sides, within the tolerance."""
    if not (peaks and base and head):
        return None
    ours, theirs = statistics.fmean(base), statistics.fmean(head)
    if abs(theirs - ours) <= metric.relative * statistics.fmean(peaks):
        return None
    return f"other memory in use before the case: {ours / 2**20:.0f} MiB and {theirs / 2**20:.0f} MiB"


def estimate_quality(metric: Metric, base: Sample, head: Sample) -> Estimate | str:
    """How two samples differ that are not `incomparable`, paired on the predictions; a reason if they are after all."""
    before, after = base.scores(metric), head.scores(metric)
    for name, side, scores in (("base", base, before), ("head", head, after)):
        if len(scores) < len(side.by_seed):
            return f"no predictions were recorded in the {name} for seed {' and '.join(map(str, side.unscored(metric)))}"
    examples = base.examples(metric) | head.examples(metric)
    if before.keys() != after.keys() or len(examples) > 1:
        splits = {" and ".join(split for split, _ in fingerprints) for fingerprints, _, _ in examples}
        return "other data: the predictions are of " + (" or of ".join(sorted(splits)) if len(splits) > 1 else "other examples")
    seeds = sorted(before)
    return paired_difference(metric.name, [before[seed] for seed in seeds], [after[seed] for seed in seeds])


def estimate_runs(metric: Metric, base: Sequence[float], head: Sequence[float]) -> Estimate | None:
    """How the runs of two sides differ, times and memory by their ratio; None for sizes, and where there is but one run."""
    return None if metric.kind == "size" else ratio_difference(base, head)


def _by_phase(records: Iterable[Record]) -> dict[PhaseAtScale, Sample]:
    cases: dict[PhaseAtScale, list[Record]] = {}
    for record in sorted(records, key=lambda r: r.run_id):
        cases.setdefault((record.scale, record.phase, record.name), []).append(record)
    return {case: Sample([record for record in of_case if not record.interrupted]) for case, of_case in cases.items()}


def _labels(cases: Collection[PhaseAtScale]) -> dict[PhaseAtScale, str]:
    """The phases' ids, with the scale behind them where there are several scales."""
    several = len({scale for scale, _, _ in cases}) > 1
    return {case: f"{case[1]}-{case[2]}" + (f"-{case[0]}" if several else "") for case in cases}


def _judge(pairs: Sequence[tuple[str, Sample, Sample]], *, of: str = "phases") -> list[Row]:
    """Rows of all pairs, the p-values of a metric adjusted for the number of pairs it was measured on, which are called so."""
    rows = [row for pair in pairs if (row := _judge_outcome(*pair))]
    settled = {row.phase for row in rows}
    measured = [pair for pair in pairs if pair[0] not in settled or all(side.has_all_figures for side in pair[1:])]
    for metric in METRICS.values():
        asked = []
        for phase, *sides in measured:
            base, head, left_out = _matching(metric, *sides)
            if metric.kind == "quality" and sides[0].error:
                left_out += f"; failed in the base: {sides[0].error}"[:200]
            row = Row(
                phase=phase, metric=metric.name, base=base.mean(metric), head=head.mean(metric), verdict="not comparable", reason=""
            )
            if {row.base, row.head} != {None}:
                asked.append((row, base, head, left_out))
        found = [_differ(metric, base, head) for _, base, head, _ in asked]
        chances = [one.p for one in found if isinstance(one, Estimate)]
        adjusted = iter(holm(chances))
        for (row, base, head, left_out), one in zip(asked, found, strict=True):
            if isinstance(one, str):
                judged = dataclasses.replace(row, reason=one)
            elif one is not None:
                judged = _judge_difference(metric, row, one, next(adjusted), f"{len(chances)} {of}" if len(chances) > 1 else "")
            else:
                judged = _judge_single(metric, row, base, head)
            reason = judged.reason + left_out
            if metric.name == "train_runtime_seconds" and base.teacher_seconds != head.teacher_seconds:
                reason += _without_teacher(base, head)
            rows.append(dataclasses.replace(judged, reason=reason))
    order = {phase: i for i, (phase, _, _) in enumerate(pairs)}
    return sorted(rows, key=lambda row: order[row.phase])


def _matching(metric: Metric, base: Sample, head: Sample) -> tuple[Sample, Sample, str]:
    """Keep the records that share machine, data and seeds, or as much of these as any do, and describe the ones dropped."""
    parts = base.by_identity(metric), head.by_identity(metric)

    def alike(pair: tuple[Identity, Identity]) -> tuple[int, bool, int]:
        agree = sum(ours == theirs for ours, theirs in zip(*pair, strict=True))
        return agree, ("load", "alone") in pair[1], len(parts[1][pair[1]].measured)

    chosen = max(itertools.product(*parts), key=alike)
    matched, notes = (parts[0][chosen[0]], parts[1][chosen[1]]), []
    for name, whole, part, one, others in zip(("base", "head"), (base, head), matched, chosen, parts, strict=True):
        if left := len(whole.measured) - len(part.measured):
            why = {fact: None for other in others for (fact, value), (_, ours) in zip(other, one, strict=True) if value != ours}
            notes.append(f"; {left} of the {name}'s {len(whole.measured)} records left out: other {' and '.join(why)}")
    if metric.kind == "quality":
        matched = of_all_seeds(*matched)
    seeds = set(matched[0].by_seed) & set(matched[1].by_seed)
    if metric.kind == "quality" and seeds and seeds != set(matched[0].by_seed) | set(matched[1].by_seed):
        matched = matched[0].of_seeds(seeds), matched[1].of_seeds(seeds)
        notes.append(f"; over the seeds of both sides: {', '.join(map(str, sorted(seeds)))}")
    return *matched, "".join(notes)


def _without_failures_elsewhere(one: Sample, other: Sample) -> Sample:
    """Drop failures on data that the other side did not use; keep all where nothing passed or the data are not known."""
    known = {record.data.get("fingerprint") for record in other.records}
    if not one.passed_seeds or not known or None in known:
        return one
    left = [record for record in one.records if record.outcome == "passed" or record.data.get("fingerprint") in {None, *known}]
    return Sample(left) if len(left) < len(one.records) else one


def _differ(metric: Metric, base: Sample, head: Sample) -> Estimate | str | None:
    """How the sides differ, or why they cannot be compared; None where there is nothing but the tolerance to go by."""
    if reason := incomparable(metric, base, head):
        return reason
    if metric.kind == "quality":
        return estimate_quality(metric, base, head)
    return estimate_runs(metric, base.values(metric), head.values(metric))


def _without_teacher(base: Sample, head: Sample) -> str:
    """What a training time leaves out."""
    sides = [
        f"{seconds:.0f} s in the {name}" for name, side in (("base", base), ("head", head)) if (seconds := side.teacher_seconds)
    ]
    return f"; the teacher's {' and '.join(sides)} not counted"


def _judge_outcome(phase: str, base: Sample, head: Sample) -> Row | None:
    """The row of a phase that did not pass on both sides; None for one that did."""
    verdict: Verdict
    if not head.records:
        verdict, reason = "missing", "no finished record in the head"
    elif not base.records:
        verdict, reason = "new", "no finished record in the base"
    elif (head.error or base.error) and _on_other_data(base, head):
        where = "head" if head.error else "base"
        verdict, reason = "not comparable", f"other data, on which it failed in the {where}: {head.error or base.error}"
    elif head.error:
        failing = {seed: record for seed, record in head.latest.items() if record.outcome == "failed"}
        known = {record.data.get("fingerprint") for record in failing.values()}
        there = [record for record in base.records if None in known or record.data.get("fingerprint") in {None, *known}]
        failed = {record.seed for record in base.records if record.outcome == "failed"} - Sample(there).passed_seeds
        always = failing.keys() <= failed or not base.passed_seeds
        verdict, reason = ("not comparable", f"fails on both sides: {head.error}") if always else ("newly failing", head.error)
        if any(seed in base.latest and base.latest[seed].outcome == "failed" for seed in failing.keys() - failed):
            reason = f"passed in the base before it failed there, too: {reason}"
    elif base.error and not base.passed_seeds:
        verdict, reason = "fixed", f"failed in the base: {base.error}"
    else:
        return None
    return Row(phase=phase, metric="outcome", base=base.share_passed, head=head.share_passed, verdict=verdict, reason=reason[:200])


def _on_other_data(base: Sample, head: Sample) -> bool:
    """Whether no record of one side is of data that the other has one of, as far as is known."""
    ours, theirs = ({record.data.get("fingerprint") for record in side.records} for side in (base, head))
    return None not in ours | theirs and not ours & theirs


def _judge_difference(metric: Metric, row: Row, found: Estimate, p: float, family: str) -> Row:
    """By the p-value, adjusted for all that is compared."""
    how = f"p = {found.p:.2g}" + (f", {p:.2g} adjusted for {family}" if family else "")
    row = dataclasses.replace(row, difference=found.value, ci95=found.ci95, reason=how)
    if p >= SHOWN:
        return dataclasses.replace(row, verdict="no difference shown")
    if abs(found.value) < metric.absolute:
        return dataclasses.replace(row, verdict="no difference shown", reason=f"{how}, but too small to matter")
    return dataclasses.replace(row, verdict="better" if metric.gain(found.value) > 0 else "worse")


def _judge_single(metric: Metric, row: Row, base: Sample, head: Sample) -> Row:
    """By the metric's tolerance, as there is no telling how far single runs vary; by nothing where other work disturbed them."""
    if row.base is None or row.head is None:
        return dataclasses.replace(row, reason=f"not measured in the {'base' if row.base is None else 'head'}")
    difference = row.head - row.base
    within = abs(difference) < metric.absolute or abs(difference) <= metric.relative * abs(row.base)
    single = [name for name, side in (("base", base), ("head", head)) if len(side.values(metric)) == 1]
    how = "one run a side" if len(single) > 1 else f"one run in the {single[0]}" if single else "figures without a ratio"
    if metric.kind == "time" and base.waited:  # and the head, too, or they would not be compared
        return dataclasses.replace(row, difference=difference, verdict="no difference shown", reason=f"{how}, {UNDER_LOAD}")
    how = f"{how}, tolerance {metric.relative:.0%}" if metric.relative else "exact"
    if metric.relative * abs(row.base) < abs(difference) < metric.absolute:
        how = f"less than {metric.absolute:g} {metric.unit} does not matter"
    verdict: Verdict = "no difference shown" if within else "better" if metric.gain(difference) > 0 else "worse"
    return dataclasses.replace(row, difference=difference, verdict=verdict, reason=how)
