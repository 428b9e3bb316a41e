"""Which records are meant: runs on disk, named by commit, run, folder or file."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec

from peftbench.commits import git
from peftbench.errors import PeftbenchError
from peftbench.records import Record, RecordError, decode_json, decode_record, read_content, read_record, uncollected
from peftbench.store import RESUMED, RUN_ID


class HistoryError(PeftbenchError, ValueError):
    """What was asked for names no records."""


@dataclass(frozen=True, kw_only=True, slots=True)
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


@dataclass(frozen=True, slots=True)
class History:
    """
    The runs under an outputs folder, whose folders may have been renamed or copied.

    Attributes:
        folder: That holds a folder for each run.
        files: Of each run, by the name of its folder, in the order of time; a copy comes before what it is of.
        owners: The run that a record is of, by its file, where the folder has another name.
    """

    folder: Path
    files: Mapping[str, Sequence[Path]]
    repository: Path
    owners: Mapping[Path, str]

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
            runs = [run for run in sorted(folder.glob("*"), key=str) if run.name != without and run.is_dir()]
            renamed = [path for run in runs if not RUN_ID.fullmatch(run.name) for path in run.glob("[!.]*.json")]
            owners = {path: run_id for path in renamed if (run_id := _origin([path]).run_id)}
            homes = {run_id: path.parent for path, run_id in owners.items()}
            found = {run.name: _record_files(run.iterdir(), homes) for run in runs}
            in_time = sorted((name for name in found if found[name]), key=lambda name: _began(name, found[name], owners))
            if in_time:
                files = {name: found[name] for name in in_time}
                return cls(folder, files, repository or _repository(outputs, files[in_time[-1]]), owners)
        raise HistoryError(
            f"no records in {outputs / 'runs'}; run pytest benchmarks first, or name another: --outputs DIR, load_records(DIR)"
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
        if home := next((path.parent.name for path, run_id in self.owners.items() if run_id == text), None):
            return self._runs(f"run {text}, in folder {home}", [home])
        if RUN_ID.fullmatch(text) and (tiny := self.folder.parent / "tiny" / "runs" / text).is_dir():
            return _read(f"run {text} of the tiny scale", _record_files(tiny.iterdir()), str(tiny))
        known = {run: facts for run in runs if (facts := self.commit_of(run)).get("id")}
        ids = {str(facts["id"]) for facts in known.values()}
        wanted = _resolved(self.repository, text) or _completed(text, ids)
        at_commit = [run for run, facts in known.items() if facts["id"] == wanted]
        clean = [run for run in at_commit if not (known[run].get("dirty") or known[run].get("problem"))]
        if at_commit:
            certain = all(known[run].get("dirty") for run in at_commit)
            note = "" if clean else ", with uncommitted changes" if certain else ", perhaps with uncommitted changes"
            meant = clean or at_commit
            meant = [run for run in meant if {*map(self._owner, self.files[run])} - {*without}] or meant
            count = f", {runs_meant} runs" if (runs_meant := self._count(meant)) > 1 else ""
            if dirty := [run for run in at_commit if clean and run not in clean]:
                count += f"; {len(dirty)} with uncommitted changes left out (to use one, name its id): {_few(reversed(dirty))}"
            return self._runs(f"commit {wanted[:12]}{note}{count}", meant, without)
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
        return self._runs(f"all {self._count(self.files)} runs in {self.folder}", list(self.files))

    def _runs(self, label: str, runs: Sequence[str], without: Collection[str] = ()) -> Side:
        paths = dict.fromkeys(path for run in runs for path in self.files[run])  # two runs share what one has resumed
        left = [path for path in paths if self._owner(path) not in without] if without else []  # a thousand names take a while
        left = left or list(paths)
        side = _read(label, left, str(self.folder / runs[0] if len(runs) == 1 else self.folder))
        if not self.owners:
            return side
        once: dict[tuple[str, str], tuple[Record, Path]] = {}
        for record, path in zip(side.records, side.paths, strict=True):
            once.setdefault((record.run_id, record.case), (record, path))
        return replace(side, records=[record for record, _ in once.values()], paths=[path for _, path in once.values()])

    def _owner(self, path: Path) -> str:
        return self.owners.get(path, path.parent.name)

    def _count(self, runs: Collection[str]) -> int:
        """How many runs these folders are of, without copies."""
        return len({max(map(self._owner, self.files[run])) for run in runs}) if self.owners else len(runs)

    def _describe_depth(self) -> str:
        shallow = (git(self.repository, "rev-parse", "--is-shallow-repository") or "").strip() == "true"
        return "; this clone is shallow: git fetch --unshallow gets the older commits" if shallow else ""


def doubts(head: Side, base: Side | None = None) -> list[str]:
    """Why a comparison cannot clear a gate, whatever it finds: what could not be read, and records compared with themselves."""
    lines = []
    for name, side in (("base", base), ("head" if base else "base", head)):
        if side and (count := len(side.problems)):
            lines.append(f"{count} file{'s' if count > 1 else ''} of the {name} could not be read")
    known = {(record.run_id, record.case) for record in base.records} if base else set()
    if count := sum((record.run_id, record.case) in known for record in head.records):
        lines.append(f"{count} of {len(head.records)} records of the head are also in the base, and so compared with themselves")
    return lines


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
    attempts = {(record.run_id, record.case): record for record in records}  # the last one of a test that was run again
    return Side(label=f"file {path}", records=list(attempts.values()), problems=problems)


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
    if "\0" in text:
        return None
    commit = git(repository, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{text}^{{commit}}")
    return commit.strip() if commit else None


def _origin(files: Iterable[Path]) -> _Origin:
    """Of the first record that can be read; of no run and commit if there is none."""
    for path in files:
        try:
            return _ORIGIN.decode(read_content(path))
        except (RecordError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            continue
    return _Origin("", {})


def _began(name: str, files: Iterable[Path], owners: Mapping[Path, str]) -> tuple[str, bool, str]:
    """What puts folders in the order of time: the id of the run that they are of; a copy comes before its original."""
    if RUN_ID.fullmatch(name):
        return name, True, name
    return max(owners.get(file, "" if file.parent.name == name else file.parent.name) for file in files), False, name


def _record_files(paths: Iterable[Path], homes: Mapping[str, Path] = MappingProxyType({})) -> list[Path]:
    return list(dict.fromkeys(file for path in sorted(paths, key=str) if (file := _record_file(path, homes))))


def _record_file(path: Path, homes: Mapping[str, Path]) -> Path | None:
    """
    A file of a run's folder, or where the record is that a resumed case stands for; None for what is neither.

    Args:
        homes: Folders of runs that have another name, by the run's id.
    """
    if path.name.startswith("."):  # such as what macOS puts beside files on foreign disks
        return None
    if path.suffix != RESUMED:
        return path if path.suffix == ".json" else None
    try:
        run_id = path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError):
        run_id = ""
    file = path.parent.parent / (Path(run_id).name or "unknown run") / f"{path.stem}.json"
    return file if run_id not in homes or file.is_file() else homes[run_id] / file.name


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
    return Side(label=label, records=records, problems=problems, paths=found)


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


def _completed(text: str, ids: Iterable[str]) -> str:
    """The only id that a shortened one can mean, or nothing; git asks for four characters."""
    fits = [one for one in ids if len(text) >= 4 and one.startswith(text.lower())]
    return fits[0] if len(fits) == 1 else ""


def _few(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "") if listed else "of no commit"
