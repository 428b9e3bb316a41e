"""One pytest session: its records, their reports, and what they are compared with."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from peftbench.phases import Phase
from peftbench.plugin.options import Options
from peftbench.plugin.progress import Progress
from peftbench.plugin.resuming import EarlierRuns
from peftbench.records import Record, RecordError, read_record
from peftbench.report import render_duration
from peftbench.store import Store, make_run_id
from peftbench.summary import phase_report, summarize
from peftbench.verdicts import Row

if TYPE_CHECKING:
    from peftbench.device import Device
    from peftbench.gates import Judgement
    from peftbench.history import Side
    from peftbench.workbench import Settings, Workbench


def asked_scale(item: pytest.Item) -> str:
    """The name that a test's scale is parametrized by; ``main`` where it says nothing."""
    call = getattr(item, "callspec", None)
    asked = call.params.get("peft_scale", "main") if call else "main"
    return str(getattr(asked, "name", asked))


def takes(item: pytest.Item, fixture: str) -> bool:
    """Whether a test takes a fixture, itself or through another."""
    return fixture in getattr(item, "fixturenames", ())


class Session:
    """
    One pytest session: its run id, its records, and the clock that pytest-benchmark reads.

    Attributes:
        records: Those measured or resumed, by their files; a case's last attempt alone.
        unpublished: What kept a phase's report from being written, by the record's file.
        unreadable: Files of the history that could not be read, and why.
        saw_case: Whether there was a report of a case.
        saw_other_test: Whether there was one of any other test.
        unrecorded: Tests that take `run_phase`, are not marked to be skipped, and have left no record.
        set_aside: Tests that no option names, and that are left out because of that.
        deselected: The scales of which cases that take `run_phase` are left out otherwise, as tests are parametrized over them.
    """

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.began = time.monotonic()
        self.progress = Progress(config)
        worker: dict[str, Any] = getattr(config, "workerinput", {})  # set in a worker of pytest-xdist
        self.run_id: str = worker.get("peftbench_run_id") or make_run_id()
        self.workers = int(worker.get("workercount", 1))
        self.trained_seconds = 0.0
        self.records: dict[Path, Record] = {}
        self.unpublished: dict[Path, str] = {}
        self.unreadable: set[str] = set()
        self.saw_case = self.saw_other_test = False
        self.unrecorded: set[str] = set()
        self.set_aside: set[str] = set()
        self.deselected: set[str] = set()
        self.bases: list[Side] = []
        self.comparison: list[Row] = []
        self.changes: list[str] = []
        self.judgement: Judgement | None = None
        self._due: set[Path] = set()
        self._phases: dict[tuple[Path, str], Phase] = {}
        self._earlier: dict[Path, EarlierRuns] = {}

    @cached_property
    def options(self) -> Options:
        """What the user gave; read when a session starts, so that ``pytest --help`` needs nothing to be right."""
        return Options.from_config(self.config)

    @cached_property
    def main_scale(self) -> str:
        """The scale of the cases that are not tiny; ``auto`` asks torch."""
        if self.options.scale != "auto":
            return self.options.scale
        from peftbench.device import auto_scale

        return auto_scale(self.options.device)

    def scale_name(self, asked: str) -> str:
        """The scale that a test asks for; ``main`` is what the options ask for."""
        return self.main_scale if asked == "main" else asked

    @property
    def asked_for(self) -> list[str]:
        """What selects cases: the expression of markers and, in small letters, names."""
        names = [self.config.option.keyword, *(argument.partition("::")[2] for argument in self.config.args)]
        return [self.config.option.markexpr, *map(str.lower, names)]

    def is_narrowed(self, scale: str) -> bool:
        """Whether cases of a scale are left out on purpose, so that phases that were not measured are not missing."""
        by_id = any("::" in argument for argument in self.config.args)
        return by_id or bool(self.config.getoption("lf", False)) or scale in map(self.scale_name, self.deselected)

    def pytest_deselected(self, items: Sequence[pytest.Item]) -> None:
        """Note of which scales cases are left out, by whatever option."""
        for item in items:
            if takes(item, "run_phase") and item.nodeid not in self.set_aside:
                self.deselected.add(asked_scale(item))

    @property
    def is_worker(self) -> bool:
        """Whether this process runs cases for another one, under pytest-xdist, and tells it what came of them."""
        return hasattr(self.config, "workerinput")

    @cached_property
    def device(self) -> Device:
        """Where the cases run."""
        from peftbench.device import Device

        return Device.choose(self.options.device, self.options.precision)

    @cached_property
    def settings(self) -> Settings:
        """What the runner needs to know of the session."""
        from peftbench.commits import describe_code
        from peftbench.workbench import Settings

        options = self.options
        return Settings(
            outputs=options.outputs,
            run_id=self.run_id,
            commit=describe_code(self.config.rootpath),
            data=options.data,
            device=options.device,
            precision=options.precision,
            evaluations=options.evaluations,
            workers=self.workers,
        )

    def train_runtime_seconds(self) -> float:
        """A clock that only runs in training loops: pytest-benchmark's timer for the cases."""
        return self.trained_seconds

    def describe_times(self) -> list[str]:
        """How soon a session trained, and how much of its time was something else; nothing if it did not train."""
        first = self.progress.first_step
        if first is None:
            return []
        total = time.monotonic() - self.began
        evaluation = sum(record.evaluation_seconds or 0.0 for record in self.records.values() if record.run_id == self.run_id)
        return [
            f"{render_duration(first - self.began)} from the session's start to the first optimizer step; "
            f"{render_duration(max(0.0, total - self.progress.training_seconds - evaluation))} of {render_duration(total)} "
            "neither training nor evaluation"
        ]

    def check(self, scales: Collection[str]) -> None:
        """
        See, for cases of these scales, that there are data and a device, that results can be written, and what to compare with.

        Raises:
            pytest.UsageError: If the folder of the data lacks files.
            ValueError: If the device cannot be had, the data cannot be read, there is nothing to compare with, or pytest-benchmark
                is asked for a profile.
            OSError: If the outputs cannot be written.
        """
        if not scales:
            return
        if self.config.getoption("benchmark_cprofile", None):
            raise ValueError("--benchmark-cprofile would train each phase a second time; use python -m cProfile -m pytest")
        self.options.check_data()
        self.device  # noqa: B018 - it is chosen here, or cannot be
        for scale in scales:
            Store(self.options.outputs, scale).check_writable()
        if self.options.data:
            from peftbench.data import read_glue_folder

            read_glue_folder(self.options.data)
        if self.options.compare:
            self.choose_bases(scales)

    def check_phase(self, phase: Phase, scale: str) -> None:
        """
        Refuse two phases of one letter, whose reports would replace each other.

        Raises:
            RecordError: If another phase with that letter has run in this session, in the same folder of reports.
        """
        store = Store(self.options.outputs, scale)
        known = self._phases.setdefault((store.root, phase.letter.lower()), phase)
        if known != phase:
            field = next(f.name for f in dataclasses.fields(Phase) if getattr(known, f.name) != getattr(phase, f.name))
            raise RecordError(
                f"phases {known.id} and {phase.id} differ in {field} but would share "
                f"{store.report_path(phase.letter).name}; rename one"
            )

    def find_passed(self, item: pytest.Item, bench: Workbench, fingerprint: str, seed: int) -> Record | None:
        """The record of an earlier run that stands for a test's case; says why there is none of a case that has passed."""
        if self.settings.commit.get("problem"):
            return None  # as nobody knows what code it was
        runs = bench.store.runs
        earlier = self._earlier[runs] = self._earlier.get(runs) or EarlierRuns(bench.store)
        if self.is_worker:  # whose main process says it
            item.user_properties.extend(("peftbench_unreadable", problem) for problem in earlier.problems)
        self.unreadable.update(earlier.problems)
        found = earlier.passed(bench, fingerprint, seed)
        if not found and (news := earlier.why_not(bench, fingerprint, seed)):
            self.progress.say(news)
        return found

    def _write_report(self, record: Record) -> None:
        """
        Write the report of a phase over the seeds that this session has measured or resumed, if one has passed.

        Raises:
            OSError: If it cannot be written.
            RecordError: If another phase of the same letter has passed.
        """
        case = record.scale, record.phase.lower()
        settled = [known for path, known in self.records.items() if path not in self._due]
        of_letter = [known for known in settled if (known.scale, known.phase.lower()) == case]
        passed = {known.phase_id for known in of_letter if known.outcome == "passed"}
        if record.phase_id not in passed:
            return
        if others := sorted(passed - {record.phase_id}):  # each alone in a worker of pytest-xdist
            raise RecordError(f"phases {record.phase_id} and {', '.join(others)} would share it; rename one")
        [summary] = summarize(known for known in of_letter if known.phase_id == record.phase_id)
        Store(self.options.outputs, record.scale).publish(record.phase, phase_report(summary))

    def choose_bases(self, scales: Collection[str]) -> None:
        """
        Find what this run is to be compared with, before hours are spent.

        Raises:
            ValueError: If there is no such thing at one of the scales.
        """
        from peftbench.history import History, read_side

        for scale in scales:
            root = Store(self.options.outputs, scale).root
            history = functools.cache(functools.partial(History.from_outputs, root, self.config.rootpath, without=self.run_id))
            other = None
            if self.options.compare == "latest" and self.options.resume:  # a run of this very code is the one to be resumed
                latest_first = reversed([*history().files])
                other = next((run for run in latest_first if history().commit_of(run) != self.settings.commit), None)
            side = history().select(other) if other else read_side(self.options.compare, history)
            records = [record for record in side.records if record.scale == scale]
            if not records:
                raise ValueError(f"--peft-compare {self.options.compare}: {side.label} has no record of the {scale} scale")
            self.bases.append(dataclasses.replace(side, records=records, paths=()))

    def judge(self) -> int:
        """
        Compare with the bases; 0 is fine, 1 worse by a gate, 2 cannot tell.

        Raises:
            ValueError: If there is nothing to compare with, which under pytest-xdist comes out only here.
        """
        from peftbench.compare import compare, set_up_changes
        from peftbench.gates import judge
        from peftbench.history import Side, doubts

        records = list(self.records.values())
        scales = {record.scale for record in records}
        self.bases = [side for side in self.bases if side.records[0].scale in scales]
        self.choose_bases(scales - {record.scale for side in self.bases for record in side.records})
        base = [record for side in self.bases for record in side.records]
        measured = {(record.scale, record.phase_id) for record in records}
        left = {(r.scale, r.phase_id) for r in base if self.is_narrowed(r.scale)} - measured  # which are not missing
        base = [record for record in base if (record.scale, record.phase_id) not in left]
        self.comparison, self.changes = compare(base, records), set_up_changes(base, records)
        problems = list(dict.fromkeys(problem for side in self.bases for problem in side.problems))
        self.unreadable.update(problems)
        doubtful = doubts(
            Side(label="this run", records=records), Side(label=self.options.compare, records=base, problems=problems)
        )
        if self.unrecorded and left:  # whose phases may be among those
            doubtful.append(f"{len(self.unrecorded)} of the tests asked for left no record, such as {min(self.unrecorded)}")
        self.judgement = judge(self.comparison, self.options.gates, doubts=doubtful)
        return self.judgement.status

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Learn of records that others have written, workers of pytest-xdist and earlier runs; publish at the end of a test."""
        told = dict(report.user_properties)
        is_case = "peftbench_case" in told
        self.saw_case, self.saw_other_test = self.saw_case or is_case, self.saw_other_test or not is_case
        if report.when == "teardown" and not self.is_worker:  # which would have the news said again with its next test
            self.unrecorded.discard(report.nodeid)  # of an earlier attempt
            if "peftbench_to_record" in told and "peftbench_record" not in told:
                self.unrecorded.add(report.nodeid)
            for name, text in report.user_properties:
                if name == "peftbench_unreadable":
                    self.unreadable.add(str(text))
                elif name == "peftbench_news":
                    self.progress.say(str(text))
        for path in [Path(str(value)) for name, value in report.user_properties if name == "peftbench_record"]:
            if path not in self.records or hasattr(report, "node"):  # a worker may have written it again
                self.learn(path)
            if report.when == "teardown":
                self._publish(path)

    def learn(self, path: Path) -> None:
        """Take a record, or a case's next attempt, into the session's, to be published; of a worker's the main process learns."""
        if self.is_worker:
            return
        self._due.discard(path)
        self.unpublished.pop(path, None)
        try:
            self.records[path] = read_record(path)
            self._due.add(path)
        except RecordError as error:
            self.unpublished[path] = f"the report of {path.stem} was not written: {error}"

    def withdraw(self, path: Path, problem: str) -> None:
        """Keep a record from being published, as it is not what its test came to."""
        self._due.discard(path)
        self.unpublished[path] = problem

    def publish_all(self) -> None:
        """Publish what waits for it still, as no test that was interrupted comes to its end."""
        for path in sorted(self._due):
            self._publish(path)

    def _publish(self, path: Path) -> None:
        if path not in self._due:
            return
        self._due.remove(path)
        try:
            self._write_report(self.records[path])
        except (OSError, RecordError) as error:
            self.unpublished[path] = f"the report of {path.stem} was not written: {error}"


SESSION = pytest.StashKey[Session]()
"""A pytest configuration's session."""
