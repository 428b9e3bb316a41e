"""Which records are meant: runs on disk, named by commit, run, folder or file, and a metric over commits."""

import re
import statistics
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from peftbench.commits import Commit, git
from peftbench.compare import Sample, judge_quality, judge_runs, of_all_seeds, other_memory_before
from peftbench.errors import PeftbenchError
from peftbench.metrics import Metric
from peftbench.records import RESUMED, Record, RecordError, decode_json, decode_record, read_content, read_record, uncollected
from peftbench.verdicts import Point

LEVEL = 0.01
"""Significance level of a shift: strict, as every commit is tested."""

UNKNOWN_CHANGES = "unknown"
"""In place of a fingerprint of uncommitted changes, where git did not say whether there were any."""


class HistoryError(PeftbenchError, ValueError):
    """What was asked for names no records."""


@dataclass(frozen=True, slots=True)
class Side:
    """
    Some records and where they are from.

    Attributes:
        label: For people.
        problems: Of files that could not be read.
        paths: The file of each record; none where one file holds them all.
    """

    label: str
    records: Sequence[Record]
    problems: Sequence[str] = ()
    paths: Sequence[Path] = ()

    @property
    def files(self) -> dict[tuple[str, str], Path]:
        """Where records are, by run and case."""
        return {(record.run_id, record.case): path for record, path in zip(self.records, self.paths, strict=False)}

    @property
    def latest(self) -> list[Record]:
        """The last record of each case and seed; an interrupted one only where there is no other."""
        by_run = sorted(self.records, key=lambda r: (not r.interrupted, r.run_id))
        return list({(r.scale, r.phase, r.name, r.seed): r for r in by_run}.values())


class _Origin(msgspec.Struct):
    """The part of a record that says its run and commit."""

    run_id: str
    commit: dict[str, Any]


_ORIGIN = msgspec.json.Decoder(_Origin)
_RUN_ID = re.compile(r"[0-9TZ]+-[0-9a-f]+")


@dataclass(frozen=True, slots=True)
class History:
    """
    The runs under an outputs folder.

    Attributes:
        folder: That holds a folder for each run.
        files: Of each run, by the name of its folder, in the order of time; of a copy the files that it is of.
    """

    folder: Path
    files: Mapping[str, Sequence[Path]]
    repository: Path

    @classmethod
    def from_outputs(cls, outputs: Path, repository: Path | None = None, *, without: str = "") -> "History":
        """
        List the runs of an outputs folder; those of the tiny scale where it has no others.

        Args:
            repository: A folder in the git repository that the runs are of; None takes the current one or, if only git there knows
                the last run's commit, the outputs folder.
            without: Id of a run to leave out.

        Raises:
            HistoryError: If there are none.
        """
        for folder in (outputs / "runs", outputs / "tiny" / "runs"):
            runs = [run for run in sorted(folder.glob("*"), key=str) if run.name != without]
            if found := dict(_in_time(run, files) for run in runs if (files := _record_files(run.glob("*.*")))):
                in_time = {name: found[began, is_id, name] for began, is_id, name in sorted(found)}
                return cls(folder, in_time, repository or _repository(outputs, [*in_time.values()][-1]))
        raise HistoryError(
            f"no records in {outputs / 'runs'}; run pytest benchmarks first, or name the outputs folder with --outputs DIR"
        )

    def select(self, text: str, *, without: Collection[str] = ()) -> Side:
        """
        The records that a text names: ``latest``, a run's id, or a commit as git writes it.

        Args:
            without: Ids of runs that a commit shall not mean, unless it has no others.

        Raises:
            HistoryError: If it names none, saying what was looked for.
        """
        runs = list(self.files)
        if text == "latest":
            return self._runs(f"latest run {runs[-1]}", runs[-1:])
        if text in runs:
            return self._runs(f"run {text}", [text])
        if _RUN_ID.fullmatch(text) and (tiny := self.folder.parent / "tiny" / "runs" / text).is_dir():
            return _read(f"run {text} of the tiny scale", _record_files(tiny.iterdir()), str(tiny))
        known = {run: facts for run in runs if (facts := self.commit_of(run)).get("id")}
        ids = {str(facts["id"]) for facts in known.values()}
        wanted = _resolved(self.repository, text) or _completed(text, ids)
        at_commit = [run for run, facts in known.items() if facts["id"] == wanted]
        at_commit = [run for run in at_commit if {path.parent.name for path in self.files[run]} - {*without}] or at_commit
        clean = [run for run in at_commit if not (known[run].get("dirty") or known[run].get("problem"))]
        if at_commit:
            certain = all(known[run].get("dirty") for run in at_commit)
            note = "" if clean else ", with uncommitted changes" if certain else ", perhaps with uncommitted changes"
            count = f", {len(clean or at_commit)} runs" if len(clean or at_commit) > 1 else ""
            if dirty := [run for run in at_commit if clean and run not in clean]:
                count += f"; {len(dirty)} with uncommitted changes left out (to use one, name its id): {_few(reversed(dirty))}"
            return self._runs(f"commit {wanted[:12]}{note}{count}", clean or at_commit, without)
        if wanted:
            silent = [run for run in runs if run not in known]
            before = (git(self.repository, "rev-list", "--max-count=1000", wanted) or "").split()
            near = next((one for one in before if one in ids), None)
            raise HistoryError(
                f"no run in {self.folder} is of commit {wanted[:12]} ({text!r}); runs are of {_few(one[:12] for one in ids)}"
                + (f"; the nearest commit before it that was measured is {near[:12]}" if near else "")
                + (f"; no record that can be read says the commit of {_few(silent)}" if silent else "")
            )
        raise HistoryError(
            f"{text!r} is not a file, a folder, 'latest', a run in {self.folder}, or a commit that git or a record knows; "
            f"runs are {_few(reversed(runs))}" + self._describe_depth()
        )

    def commit_of(self, run: str) -> Mapping[str, Any]:
        """What the run's first readable record says of its commit; nothing if none does."""
        return _origin(self.files[run]).commit

    def everything(self) -> Side:
        """All runs."""
        return self._runs(f"all {len(self.files)} runs in {self.folder}", list(self.files))

    def _runs(self, label: str, runs: Sequence[str], without: Collection[str] = ()) -> Side:
        paths = dict.fromkeys(path for run in runs for path in self.files[run])  # two runs share what one has resumed
        left = [path for path in paths if path.parent.name not in without] if without else []  # a thousand names take a while
        left = left or list(paths)
        return _read(label, left, str(self.folder / runs[0] if len(runs) == 1 else self.folder))

    def _describe_depth(self) -> str:
        shallow = (git(self.repository, "rev-parse", "--is-shallow-repository") or "").strip() == "true"
        return "; this clone is shallow: git fetch --unshallow gets the older commits" if shallow else ""


def doubts(head: Side, base: Side | None = None) -> list[str]:
    """Why a comparison cannot clear a gate, whatever it finds: what could not be read, and records compared with themselves."""
    lines = []
    for name, side in (("base", base), ("head", head)):
        if side and (count := len(side.problems)):
            lines.append(f"{count} file{'s' if count > 1 else ''} of the {name} could not be read")
    known = {(record.run_id, record.case) for record in base.records} if base else set()
    if count := sum((record.run_id, record.case) in known for record in head.records):
        lines.append(f"{count} of {len(head.records)} records of the head are also in the base, and so compared with themselves")
    return lines


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
            if measured.passed and (commit, changes) in taking_part:
                shift, other = line.take(measured)
                marks += [f"other {other}"] if other else []
            if (commit, changes) in taking_part:
                for seed, record in sample.latest.items():
                    if record.outcome == "failed" and last.get(seed) == "passed":
                        shift = "worse"
                    last[seed] = record.outcome
            subject, value = known.subject if known else "", sample.mean(metric)
            points.append(Point(commit=commit, subject=subject, value=value, passed=len(sample.passed), marks=marks, shift=shift))
        if any(point.value is not None for point in points):
            traced[f"{phase}-{scale}" if several else phase] = points
    return traced


def read_side(text: str, history: Callable[[], History], *, without: Collection[str] = ()) -> Side:
    """
    The records that a text names: a file or a folder, or what `History.select` knows, for which alone the history is listed.

    Raises:
        HistoryError: If it names none.
    """
    if not text:
        raise HistoryError("each side must be a commit, a run, 'latest', a folder or a file, got an empty text")
    path = Path(text)
    if path.is_file():
        return read_file(path)
    try:
        return _read(f"folder {text}", _files_in(path), text) if path.is_dir() else history().select(text, without=without)
    except HistoryError as error:
        tiny = next((folder for folder in (path / "tiny", path.parent / "tiny" / path.name) if _files_in(folder)), None)
        if tiny is None or _files_in(path):
            raise
        raise HistoryError(f"{error}; there are records of the tiny scale in {tiny}") from error


def read_file(path: Path) -> Side:
    """
    A record file, or pytest-benchmark's JSON with our records in it.

    Raises:
        HistoryError: If it is neither.
    """
    try:
        content = decode_json(read_content(path))
    except RecordError as error:
        raise HistoryError(f"{path}: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("benchmarks"), list):
        return _read(f"file {path}", [path], str(path))
    records, problems = [], []
    for entry in content["benchmarks"]:
        extra = entry.get("extra_info") if isinstance(entry, dict) else None
        if isinstance(extra, dict) and "peftbench" in extra:
            others = extra.get("peftbench_other_seeds", [])
            try:
                records += [Record.from_json(one) for one in (*(others if isinstance(others, list) else ()), extra["peftbench"])]
            except RecordError as error:
                problems.append(f"{path}: {error}")
    if not records:
        raise HistoryError(f"{path} is pytest-benchmark's, but no entry's extra_info has a readable peftbench record")
    return Side(f"file {path}", records, problems)


def _files_in(folder: Path) -> list[Path]:
    """The reports or records that a folder holds, whichever folder of outputs it is."""
    places = ("phase_*_metrics.json", "*.*", "runs/*/*.json", "*/*.json")
    return next((files for place in places if (files := _record_files(folder.glob(place)))), [])


def _repository(outputs: Path, files: Iterable[Path]) -> Path:
    """Where git knows the commit of these records: the current folder, if there is a choice."""
    commit = _origin(files).commit.get("id")
    here = Path()
    if commit and _resolved(here, str(commit)) is None and _resolved(outputs, str(commit)):
        return outputs
    return here


def _resolved(repository: Path, text: str) -> str | None:
    """The commit that git takes a text for."""
    commit = git(repository, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{text}^{{commit}}")
    return commit.strip() if commit else None


def _in_time(run: Path, files: list[Path]) -> tuple[tuple[str, bool, str], list[Path]]:
    """
    A run's files, with what it is sorted by: its id, and its folder's name.

    A folder that was renamed stands where its records were made, a copy before its original; what it has resumed lies elsewhere.
    """
    if _RUN_ID.fullmatch(run.name):
        return (run.name, True, run.name), files
    run_ids = {file: _origin([file]).run_id for file in files if file.parent == run}
    originals = {file: run.parent / run_id / file.name for file, run_id in run_ids.items()}
    files = [original if (original := originals.get(file)) and original.is_file() else file for file in files]
    return (max(run_ids.values(), default=""), False, run.name), files


def _origin(files: Iterable[Path]) -> _Origin:
    """Of the first record that can be read; of no run and commit if there is none."""
    for path in files:
        try:
            return _ORIGIN.decode(read_content(path))
        except (RecordError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            continue
    return _Origin("", {})


def _record_files(paths: Iterable[Path]) -> list[Path]:
    return list(dict.fromkeys(file for path in sorted(paths, key=str) if (file := _record_file(path))))


def _record_file(path: Path) -> Path | None:
    """A file of a run's folder, or where the record is that a resumed case stands for; None for what is neither."""
    if path.name.startswith("."):  # such as what macOS puts beside files on foreign disks
        return None
    if path.suffix != RESUMED:
        return path if path.suffix == ".json" else None
    try:
        run_id = path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError):
        run_id = ""
    return path.parent.parent / (Path(run_id).name or "unknown run") / f"{path.stem}.json"


def _read(label: str, paths: Sequence[Path], where: str) -> Side:
    records, problems, found = [], [], []
    with uncollected():
        for path in paths:
            try:
                content = read_content(path)
                files = _files_behind(path, decode_json(content)) if b'"seeds"' in content else []
                records += [read_record(file) for file in files] or [decode_record(content)]
                found += files or [path]
            except RecordError as error:
                problems.append(f"{path}: {error}")
    if not records:
        raise HistoryError(f"no record in {where}" + (f" can be read; the first problem: {problems[0]}" if problems else ""))
    return Side(label, records, problems, found)


def _files_behind(path: Path, content: object) -> list[Path]:
    """
    The records that a report over several seeds tells of, as its figures are means; none of what is a record itself.

    Raises:
        RecordError: If they are not in the runs beside the folder of the report.
    """
    if not isinstance(content, dict):
        return []
    seeds = [content.get(key) for key in ("seeds", "failed_seeds")]
    if sum(len(listed) for listed in seeds if isinstance(listed, list)) < 2:
        return []
    runs = path.absolute().parent.parent / "runs"
    try:
        files = [runs / one["run_id"] / f"{one['case']}.json" for one in content["records"]]
    except (KeyError, TypeError):
        raise RecordError("a report over several seeds that does not name its records; give the run's folder instead") from None
    for file in files:
        if file.parent.parent != runs or not file.is_file():
            raise RecordError(f"a report over several seeds, whose record {file} is missing; give the run's folder instead")
    return files


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


@dataclass(slots=True)
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

    def take(self, sample: Sample) -> tuple[str | None, str | None]:
        """Whether the next commit is better or worse than its level, and which fact has changed since the commit before it."""
        self._place += 1
        facts = sample.facts(self._metric)
        changed = [name for name, values in facts.items() if self._facts.get(name, values) != values]
        self._facts = facts
        shifts = []
        for one, part in sample.by_identity(self._metric).items():
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
        return _Level(sample, [*values], statistics.fmean(values) if values else 0.0, [*sample.memory_before], self._place)


def _shift(metric: Metric, level: _Level, sample: Sample, values: Sequence[float]) -> str | None:
    """Whether a sample is better or worse than a level."""
    if metric.kind == "quality":
        base, head = level.of_seeds(sample)
        if not head.passed:
            return None
        difference = statistics.fmean(head.values(metric)) - statistics.fmean(base.values(metric))
    else:
        difference = statistics.fmean(values) - level.mean
    if abs(difference) < metric.absolute:
        return None
    found = judge_quality(metric, base, head) if metric.kind == "quality" else judge_runs(metric, level.values, values)
    if isinstance(found, str):
        return None
    if found is not None:
        difference = found.value
    certain = abs(difference) > metric.relative * abs(level.mean) if found is None else found.p < LEVEL
    return ("better" if metric.gain(difference) > 0 else "worse") if certain else None


def _completed(text: str, ids: Iterable[str]) -> str:
    """The only id that a shortened one can mean, or nothing; git asks for four characters."""
    fits = [one for one in ids if len(text) >= 4 and one.startswith(text.lower())]
    return fits[0] if len(fits) == 1 else ""


def _few(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "") if listed else "of no commit"
