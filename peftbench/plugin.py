"""All of pytest: options, cases, fixtures, records, progress and the table at the end."""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Collection, Generator, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from peftbench.phases import KD_MAX_LENGTH, PRECISIONS, SCALES, STANDARD_KD_SUBSETS, Phase, Scale, check_data_folder
from peftbench.records import Record, RecordError, Store, make_run_id, read_record
from peftbench.report import printable, render_comparison, render_duration, render_summary
from peftbench.sealed import CorruptError
from peftbench.summary import phase_report, summarize
from peftbench.verdicts import Row

if TYPE_CHECKING:
    from peftbench.device import Device
    from peftbench.gates import Gate, Judgement
    from peftbench.history import Side
    from peftbench.runner import Settings, Workbench

OPTIONS = {
    "scale": ("auto", f"Scale of the cases: auto (thesis where CUDA is available, else mini), {', '.join(SCALES)}."),
    "seeds": ("42", "Seeds, separated by commas; each case runs once with each of them."),
    "outputs": ("outputs", "Folder for records, reports, KD subsets and caches."),
    "data": ("", "Folder with train.tsv and dev.tsv (and a labelled test.tsv) in GLUE's format, in place of the scale's data."),
    "device": ("auto", "Device: cpu, cuda, or one of several, such as cuda:1; auto takes CUDA where it is available."),
    "precision": ("auto", f"One of {', '.join(PRECISIONS)}; auto takes what the device does natively."),
    "evaluations": ("0", "How often each phase is evaluated on dev while it trains; not part of the training time."),
    "compare": (
        "",
        "Compare this run at its end with a commit, a run's id, latest, a folder or a file, as peftbench compare does.",
    ),
}

LOG_LINE_SECONDS = 30.0
TERMINAL_LINE_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """The ``--peft-*`` options or their ini keys, checked as far as that goes without torch."""

    scale: str
    seeds: tuple[int, ...]
    outputs: Path
    data: Path | None
    device: str
    precision: str
    evaluations: int
    compare: str
    gates: tuple[Gate, ...]
    resume: bool

    @classmethod
    def from_config(cls, config: pytest.Config) -> Options:
        """
        Read and check what the user gave.

        Raises:
            pytest.UsageError: Naming the option, what was got and what is allowed.
        """
        given = {name: str(config.getoption(f"peft_{name}") or config.getini(f"peft_{name}")) for name in OPTIONS}

        def folder(name: str) -> Path:
            """On the command line seen from where pytest was started, else from the ini file, or the root where there is none."""
            root = config.inipath.parent if config.inipath else config.rootpath
            return (Path.cwd() if config.getoption(f"peft_{name}") else root) / given[name]

        for name, allowed in (("scale", ("auto", *SCALES)), ("precision", PRECISIONS)):
            if given[name] not in allowed:
                raise pytest.UsageError(f"--peft-{name} must be one of {', '.join(allowed)}, got {given[name]!r}")
        seeds = [text.strip() for text in given["seeds"].split(",")]
        well_formed = all(text.isascii() and text.isdigit() and int(text) < 2**32 for text in seeds)
        if not well_formed or len({int(text) for text in seeds}) < len(seeds):
            raise pytest.UsageError(
                f"--peft-seeds must be different whole numbers from 0 to {2**32 - 1}, separated by commas, got {given['seeds']!r}"
            )
        if given["data"]:
            try:
                check_data_folder(folder("data"), "--peft-data")
            except ValueError as error:
                raise pytest.UsageError(str(error)) from None
        if not (given["evaluations"].isascii() and given["evaluations"].isdigit() and int(given["evaluations"]) <= 1000):
            raise pytest.UsageError(f"--peft-evaluations must be a whole number from 0 to 1000, got {given['evaluations']!r}")
        limits = config.getoption("peft_fail") or config.getini("peft_fail")
        if limits and not given["compare"]:
            raise pytest.UsageError(
                f"--peft-fail {limits[0]} judges a comparison; name what to compare with by --peft-compare BASE"
            )
        return cls(
            scale=given["scale"],
            seeds=tuple(map(int, seeds)),
            outputs=folder("outputs"),
            data=folder("data") if given["data"] else None,
            device=given["device"],
            precision=given["precision"],
            evaluations=int(given["evaluations"]),
            compare=given["compare"],
            gates=_parse_gates(limits),
            resume=bool(config.getoption("peft_resume") or config.getini("peft_resume")),
        )


class Session:
    """One pytest session: its run id, its records, and the clock that pytest-benchmark reads."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.began = time.monotonic()
        self.options = Options.from_config(config)
        self.progress = Progress(config)
        worker: dict[str, Any] = getattr(config, "workerinput", {})  # set in a worker of pytest-xdist
        self.run_id: str = worker.get("peftbench_run_id") or make_run_id()
        self.workers = int(worker.get("workercount", 1))
        self.trained_seconds = 0.0
        self.record_paths: list[Path] = []
        self.unreadable: set[str] = set()
        self.unpublished: list[str] = []
        self.records: list[Record] = []
        self.reported: set[bool] = set()  # of what there were reports: cases, True, and other tests, False
        self.bases: list[Side] = []
        self.comparison: list[Row] = []
        self.changes: list[str] = []
        self.judgement: Judgement | None = None
        self._phases: dict[str, Phase] = {}
        self._history: dict[Path, list[Record]] = {}

    @cached_property
    def main_scale(self) -> str:
        """The scale of the cases that are not tiny; ``auto`` asks torch."""
        if self.options.scale != "auto":
            return self.options.scale
        from peftbench.device import auto_scale

        return auto_scale()

    @property
    def asked_for(self) -> list[str]:
        """What selects cases by name, in small letters."""
        return [text.lower() for text in (self.config.option.keyword, *(a.partition("::")[2] for a in self.config.args))]

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
        from peftbench.measure import describe_commit
        from peftbench.runner import Settings

        options = self.options
        return Settings(
            outputs=options.outputs,
            run_id=self.run_id,
            commit=describe_commit(self.config.rootpath),
            data=options.data,
            device=options.device,
            precision=options.precision,
            evaluations=options.evaluations,
            workers=self.workers,
        )

    def train_runtime_seconds(self) -> float:
        """A clock that only runs in training loops: pytest-benchmark's timer for the cases."""
        return self.trained_seconds

    def describe_times(self, records: list[Record]) -> list[str]:
        """Of a session that has trained: how soon, and how much of its time was something else."""
        first = self.progress.first_step
        if first is None:
            return []
        total = time.monotonic() - self.began
        evaluation = sum(record.evaluation_seconds or 0.0 for record in records if record.run_id == self.run_id)
        return [
            f"{render_duration(first - self.began)} from the session's start to the first optimizer step; "
            f"{render_duration(max(0.0, total - self.progress.training_seconds - evaluation))} of {render_duration(total)} "
            "neither training nor evaluation"
        ]

    def check_phase(self, phase: Phase) -> None:
        """
        Refuse two phases of one letter, whose results would replace each other.

        Raises:
            RecordError: If another phase with that letter has run in this session.
        """
        known = self._phases.setdefault(phase.letter.lower(), phase)
        if known != phase:
            raise RecordError(
                f"phases {known.id} and {phase.id} differ but would share phase_{phase.letter.lower()}_metrics.json; rename one"
            )

    def find_passed(self, bench: Workbench, fingerprint: str, seed: int) -> Record | None:
        """The newest passed record of the same case at the same commit and changes, on the same device."""
        store = bench.store
        if self.settings.commit.get("problem"):
            return None  # as nobody knows what code it was
        if store.runs not in self._history:
            readable = self._history.setdefault(store.runs, [])
            for record in store.records():
                if isinstance(record, RecordError):
                    self.unreadable.add(str(record))
                else:
                    readable.append(record)
        same = ("device", "accelerator") if bench.device.kind == "cuda" else ("device", "processor", "cores")
        wanted = ("passed", fingerprint, seed, self.settings.commit, [bench.machine[fact] for fact in same])
        for record in reversed(self._history[store.runs]):
            there = [record.machine.get(fact) for fact in same]
            evaluations = min(self.options.evaluations, record.optimizer_steps or 0)
            if (record.outcome, record.fingerprint, record.seed, record.commit, there) == wanted and (
                len(record.dev_curve or ()) >= evaluations
            ):
                return record
        return None

    def publish(self, record: Record) -> None:
        """Write the report of a phase over the seeds that this session has measured or resumed, if one has passed."""
        self.records.append(record)
        of_letter = [r for r in self.records if (r.scale, r.phase.lower()) == (record.scale, record.phase.lower())]
        passed = {one.phase_id for one in of_letter if one.outcome == "passed"}
        if record.phase_id not in passed:
            return
        if others := sorted(passed - {record.phase_id}):  # each alone in a worker of pytest-xdist
            raise RecordError(f"phases {record.phase_id} and {', '.join(others)} would share it; rename one")
        [summary] = summarize(one for one in of_letter if one.phase_id == record.phase_id)
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
            side = read_side(
                self.options.compare,
                functools.partial(History.from_outputs, root, self.config.rootpath, without=self.run_id),
            )
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

        records = [read_record(path) for path in self.record_paths]
        scales = {record.scale for record in records}
        self.bases = [side for side in self.bases if side.records[0].scale in scales]
        self.choose_bases(scales - {record.scale for side in self.bases for record in side.records})
        base = [record for side in self.bases for record in side.records]
        if any(self.asked_for):  # the other phases are not missing then
            measured = {(record.scale, record.phase_id) for record in records}
            base = [record for record in base if (record.scale, record.phase_id) in measured]
        self.comparison, self.changes = compare(base, records), set_up_changes(base, records)
        problems = list(dict.fromkeys(problem for side in self.bases for problem in side.problems))
        self.unreadable.update(problems)
        doubtful = doubts(Side("this run", records), Side(self.options.compare, base, problems))
        self.judgement = judge(self.comparison, self.options.gates, doubts=doubtful)
        return self.judgement.status if self.options.gates else 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Learn of records that other processes have written: of workers of pytest-xdist, and of earlier runs."""
        self.reported.add(any(name == "peftbench_case" for name, _ in report.user_properties))
        if report.when != "call":
            return
        for path in [Path(str(value)) for name, value in report.user_properties if name == "peftbench_record"]:
            self.learn(path)

    def learn(self, path: Path) -> None:
        """Take a record into the session's, once, and publish it; of a worker's the main process learns."""
        if self.is_worker or path in self.record_paths:
            return
        self.record_paths.append(path)
        try:
            self.publish(read_record(path))
        except (OSError, RecordError) as error:
            self.unpublished.append(f"the report of {path.stem} was not written: {error}")


class Progress:
    """
    Shows how far training is: one line that changes on a terminal, a line now and then in a log.

    Attributes:
        first_step: When the session's first optimizer step was done, by `time.monotonic`; None before that.
        training_seconds: Between the first and the last step of each training run, the teacher's included.
    """

    def __init__(self, config: pytest.Config) -> None:
        self.first_step: float | None = None
        self.training_seconds = 0.0
        self._config = config
        self._what, self._began, self._shown, self._last = "", 0.0, 0.0, 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if what != self._what or done == 1:
            self._what, self._began, self._shown, self._last = what, now, now, now
            self.first_step = self.first_step or now
            return
        self.training_seconds += now - self._last
        self._last = now
        reporter: Any = self._config.pluginmanager.getplugin("terminalreporter")
        live = reporter is not None and reporter.isatty
        if done < total and now - self._shown < (TERMINAL_LINE_SECONDS if live else LOG_LINE_SECONDS):
            return
        self._shown = now
        left = render_duration((now - self._began) / (done - 1) * (total - done))
        line = f"{what}: step {done} of {total}, {left} left"
        if live:
            self._write(lambda reporter: reporter.rewrite(line if done < total else "", erase=True))
        elif done < total:
            self.say(line)

    def say(self, line: str) -> None:
        """Show a line of news in its own right."""
        self._write(lambda reporter: reporter.write_line(f"peftbench: {line}"))

    def _write(self, write: Callable[[Any], None]) -> None:
        plugins = self._config.pluginmanager
        reporter: Any = plugins.getplugin("terminalreporter")
        capture: Any = plugins.getplugin("capturemanager")
        if reporter is not None:
            with capture.global_and_fixture_disabled() if capture else nullcontext():
                reporter.ensure_newline()
                write(reporter)
                reporter.flush()


SESSION = pytest.StashKey[Session]()
RECORD = pytest.StashKey[Record]()


class NoBenchmark:
    """Stands in for pytest-benchmark where it is switched off as a whole (``-p no:benchmark``)."""

    @pytest.fixture
    def benchmark(self) -> None:
        return None


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("peftbench", "peftbench: fine-tuning, PEFT and distillation compared")
    for name, (default, text) in OPTIONS.items():
        group.addoption(f"--peft-{name}", dest=f"peft_{name}", metavar=name.upper(), help=f"{text} Default: {default or 'none'}.")
        parser.addini(f"peft_{name}", text, default=default)
    text = "Exit with 1 if METRIC is worse by more than LIMIT, such as accuracy:0.5pt or train_runtime_seconds:20%."
    group.addoption("--peft-fail", dest="peft_fail", action="append", metavar="METRIC:LIMIT", help=f"{text} Can be repeated.")
    parser.addini("peft_fail", text, type="args", default=[])
    text = "Skip cases that have passed with the same fingerprint at this commit."
    group.addoption("--peft-resume", dest="peft_resume", action="store_true", help=text)
    parser.addini("peft_resume", text, type="bool", default=False)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "tiny: smoke version of a peftbench case; runs only when asked for with -m tiny.")
    config.addinivalue_line("markers", "peer: comparison with another way to train; runs only when asked for with -m peer.")
    session = config.stash[SESSION] = Session(config)
    config.pluginmanager.register(session, "peftbench-session")
    if not config.pluginmanager.hasplugin("benchmark"):
        config.pluginmanager.register(NoBenchmark(), "peftbench-no-benchmark")


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """All workers of pytest-xdist write into one run."""
    node.workerinput["peftbench_run_id"] = node.config.stash[SESSION].run_id


@pytest.hookimpl(trylast=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give every test that uses our fixtures its scale and seeds, behind its own parameters in the id."""
    options = metafunc.config.stash[SESSION].options
    if "peft_scale" in metafunc.fixturenames:
        main = [] if options.scale == "tiny" else [pytest.param("main", id=pytest.HIDDEN_PARAM)]
        tiny = pytest.param("tiny", id="tiny", marks=pytest.mark.tiny)
        metafunc.parametrize("peft_scale", [*main, tiny], indirect=True, scope="session")
    if "peft_seed" in metafunc.fixturenames:
        ids = [f"s{seed}" for seed in options.seeds] if len(options.seeds) > 1 else [pytest.HIDDEN_PARAM]
        metafunc.parametrize("peft_seed", options.seeds, ids=ids, indirect=True)


def pytest_itemcollected(item: pytest.Item) -> None:
    """Note which are cases; have pytest-benchmark read the clock of their loops, whatever else the test's own marker says."""
    if "peft_scale" in getattr(item, "fixturenames", ()):
        item.user_properties.append(("peftbench_case", True))  # which a worker of pytest-xdist passes on
    if "run_phase" in getattr(item, "fixturenames", ()) and item.config.pluginmanager.hasplugin("benchmark"):
        own = item.get_closest_marker("benchmark")
        settings = {"group": "training", **(own.kwargs if own else {}), "timer": item.config.stash[SESSION].train_runtime_seconds}
        item.add_marker(pytest.mark.benchmark(**settings), append=False)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave tiny versions and comparisons with peers out unless something in the command line names them."""
    own = config.stash[SESSION]
    named = [config.option.markexpr, own.options.scale, *own.asked_for]
    unnamed = [marker for marker in ("tiny", "peer") if not any(marker in text for text in named)]
    cases = [item for item in items if "peft_scale" in getattr(item, "fixturenames", ())]
    left_out = [item for item in cases if any(item.get_closest_marker(marker) for marker in unnamed)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Before hours are spent: can the device be used, can the outputs be written?"""
    own = session.config.stash[SESSION]
    if not own.is_worker:  # there the case itself fails, with the same message
        try:
            scales = _scales(session.config, session.items)
            for scale in scales:
                Store(own.options.outputs, scale).check_writable()
                assert own.device
            if own.options.compare:
                own.choose_bases(scales)
        except (ValueError, OSError) as error:
            raise pytest.UsageError(f"peftbench: {error}") from error


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """Where workers of pytest-xdist collect, what to compare with is chosen before they do, by what can be known by then."""
    own, config = session.config.stash[SESSION], session.config
    if not (config.pluginmanager.hasplugin("dsession") and own.options.compare):
        return
    if "tiny" in (own.options.scale, config.option.markexpr):
        scales = ["tiny"]
    else:
        named = any("tiny" in text for text in (config.option.markexpr, *own.asked_for))
        scales = [own.main_scale, *(["tiny"] if named else [])]
    problems = []
    for scale in scales:
        try:
            own.choose_bases([scale])
        except ValueError as error:
            problems.append(error)
    if not own.bases and config.getoption("peft_compare"):  # an ini file's is said at the end, and only if there were cases
        raise pytest.UsageError(f"peftbench: {problems[0]}") from problems[0]


def pytest_report_collectionfinish(config: pytest.Config, items: list[pytest.Item]) -> list[str]:
    scales = _scales(config, items)
    if not scales:
        return []
    own = config.stash[SESSION]
    auto = " (auto: CUDA is available)" if own.main_scale == "thesis" else " (auto: no CUDA here)"
    scale = ", ".join(scales) + (auto if own.options.scale == "auto" and own.main_scale in scales else "")
    device = f"device {own.device.name}, precision {own.device.precision} ({own.device.why})"
    problem = own.settings.commit.get("problem")
    unknown = f"peftbench: the records will not say of which commit they are, and nothing is resumed: {problem}"
    return [f"peftbench: scale {scale}; {device}; run {own.run_id}", *([unknown] if problem else [])]


def _parse_gates(limits: list[str]) -> tuple[Gate, ...]:
    if not limits:
        return ()
    from peftbench.gates import Gate

    try:
        return tuple(Gate.from_text(text) for text in limits)
    except ValueError as error:
        raise pytest.UsageError(str(error).replace("--fail", "--peft-fail")) from error


def _scales(config: pytest.Config, items: list[pytest.Item]) -> list[str]:
    """The scales of the cases that will run; asks torch only if there are any."""
    cases = [item for item in items if "peft_scale" in getattr(item, "fixturenames", ())]
    if config.option.collectonly or not cases:
        return []
    main = config.stash[SESSION].main_scale
    return sorted({"tiny" if item.get_closest_marker("tiny") else main for item in cases})


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Write the record the moment its test ends, however that ends; what the test made of the case decides the outcome."""
    try:
        result = yield
    except BaseException as error:
        if problem := _keep(item, error):
            item.add_report_section("call", "peftbench", problem)
        raise
    if problem := _keep(item):
        raise pytest.fail.Exception(problem, pytrace=False)
    return result


def _keep(item: pytest.Item, error: BaseException | None = None) -> str | None:
    """Write the test's record, if it has one; what is wrong if that cannot be done."""
    record = item.stash.get(RECORD, None)
    if record is None:
        return None
    del item.stash[RECORD]
    session = item.config.stash[SESSION]
    if error and record.outcome == "passed" and not isinstance(error, pytest.skip.Exception):
        record = dataclasses.replace(record, outcome="failed", error=pytest.ExceptionInfo.from_exception(error).exconly()[:2000])
    benchmark: Any = getattr(item, "funcargs", {}).get("benchmark")
    try:
        path = Store(session.options.outputs, record.scale).save(record)
        if benchmark is not None:
            benchmark.extra_info["peftbench"] = record.to_json()
    except (OSError, ValueError) as problem:
        return f"peftbench could not write the record: {problem}"
    session.learn(path)  # now, as pytest makes no report of a test that was interrupted
    item.user_properties.append(("peftbench_record", str(path)))
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Let a gate that does not hold fail the session, and a report that could not be written."""
    own = session.config.stash.get(SESSION, None)
    if own is None or own.is_worker:
        return
    status = 1 if own.unpublished else 0
    asked = True in own.reported or (own.reported and session.config.getoption("peft_fail"))
    if own.options.compare and (own.record_paths or (own.options.gates and asked)):
        from peftbench.gates import Judgement

        try:
            if not own.record_paths:
                raise ValueError("nothing to compare: no case has left a record")
            status = own.judge() or status
        except ValueError as error:
            own.judgement = Judgement(2, [str(error)])
            status = 2
    if session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = status


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = config.stash[SESSION]
    records = []
    for path in session.record_paths:
        try:
            records.append(read_record(path))
        except RecordError as error:
            session.unreadable.add(str(error))
    if not (records or session.unreadable or session.unpublished or session.judgement):
        return
    terminalreporter.section("peftbench")
    if records:
        terminalreporter.write_line(render_summary(records))
    if session.judgement is not None:
        if session.comparison:
            terminalreporter.write_line(f"\ncompared with {', '.join(printable(side.label) for side in session.bases)}:")
            terminalreporter.write_line(render_comparison(session.comparison))
            for line in session.changes:
                terminalreporter.write_line(f"changed: {printable(line)}")
        for line in session.judgement.lines if session.options.gates or not session.comparison else ():
            terminalreporter.write_line(printable(line), red=True)
    for line in session.describe_times(records):
        terminalreporter.write_line(line)
    resumed = [record for record in records if record.run_id != session.run_id]
    for record in resumed:
        case = f"{record.phase}-{record.name} at {record.scale} scale, seed {record.seed}"
        terminalreporter.write_line(printable(f"resumed, not run again: {case}, passed in run {record.run_id}"))
    for problem in session.unpublished:
        terminalreporter.write_line(printable(problem), red=True)
    for problem in sorted(session.unreadable):
        terminalreporter.write_line(printable(f"left out of the history: {problem}"), yellow=True)
    for folder in dict.fromkeys(path.parent for path in session.record_paths):
        terminalreporter.write_line(f"records: {os.path.relpath(folder)}")


@pytest.fixture(scope="session")
def peft_scale(request: pytest.FixtureRequest) -> Scale:
    """The scale of this case."""
    session = request.config.stash[SESSION]
    return SCALES["tiny" if getattr(request, "param", "main") == "tiny" else session.main_scale]


@pytest.fixture
def peft_seed(request: pytest.FixtureRequest) -> int:
    """The seed of this case."""
    return int(getattr(request, "param", request.config.stash[SESSION].options.seeds[0]))


@pytest.fixture(scope="session")
def peft_workbench(request: pytest.FixtureRequest, peft_scale: Scale) -> Workbench:
    """What the cases of one scale share."""
    from peftbench.runner import Workbench

    session = request.config.stash[SESSION]
    with explained():
        return Workbench(peft_scale, session.settings, session.progress, session.progress.say)


@pytest.fixture(scope="session")
def sst2(peft_workbench: Workbench) -> Any:
    """The scale's `peftbench.data.Splits`: train, dev and test."""
    with explained():
        return peft_workbench.splits


@pytest.fixture(scope="session")
def teacher_logits(peft_workbench: Workbench) -> Any:
    """The teacher's logits on the largest standard KD subset, as `peftbench.distill.TeacherLogits`, from the cache if there."""
    with explained():
        return peft_workbench.teacher_logits(max(STANDARD_KD_SUBSETS), KD_MAX_LENGTH)


@pytest.fixture(scope="session")
def kd_subsets(peft_workbench: Workbench) -> dict[str, Path]:
    """Folders of the standard KD subsets: ``{"kd_1000": path, "kd_500": path}``."""
    with explained():
        return {f"kd_{size}": peft_workbench.kd_subset(size, KD_MAX_LENGTH) for size in STANDARD_KD_SUBSETS}


@pytest.fixture
def run_phase(
    request: pytest.FixtureRequest, benchmark: Any, peft_workbench: Workbench, peft_seed: int
) -> Iterator[Callable[[Phase], Record]]:
    """
    Train and evaluate a phase, once to a test, and return its record.

    The record is written when the test ends. pytest-benchmark reports the time of the training loop.
    """
    session, node = request.config.stash[SESSION], request.node
    called = False

    def run(phase: Phase) -> Record:
        from peftbench.runner import case_fingerprint, failed_record, run_phase

        nonlocal called
        if called:
            raise RuntimeError("run_phase can be called once in a test; parametrize the test over phases")
        called = True
        scale, settings, store = peft_workbench.scale, session.settings, peft_workbench.store
        try:
            if session.options.resume:
                fingerprint = case_fingerprint(phase, peft_workbench)
                if found := session.find_passed(peft_workbench, fingerprint, peft_seed):
                    session.check_phase(phase)
                    store.link(found, session.run_id)
                    node.user_properties.append(("peftbench_record", str(store.record_path(found))))
                    pytest.skip(f"resumed: passed with this fingerprint at this commit in run {found.run_id}")

            def train() -> Record:
                session.check_phase(phase)
                record = run_phase(phase, scale, peft_seed, settings, workbench=peft_workbench)
                session.trained_seconds += record.train_runtime_seconds or 0.0
                return record

            if benchmark is not None and not phase.at(scale.name).epochs:
                benchmark.group = "no training"  # whose 0 s would make all others infinitely slow in one table
            record: Record = train() if benchmark is None else benchmark.pedantic(train, rounds=1, iterations=1)
        except pytest.skip.Exception:
            raise
        except BaseException as error:
            node.stash[RECORD] = failed_record(phase, peft_seed, peft_workbench, error)
            with explained():
                raise
        node.stash[RECORD] = record
        return record

    yield run
    if benchmark is not None and not called:
        benchmark.skipped = True  # a test that failed before it got so far is told of its own error alone


@contextmanager
def explained() -> Iterator[None]:
    """Let errors that explain themselves fail the test without the traceback of a library on top."""
    from peftbench.assets import AssetError
    from peftbench.data import DataError
    from peftbench.device import DoesNotFit
    from peftbench.hub import HubError
    from peftbench.models import ModelError
    from peftbench.training import TrainingDiverged

    try:
        yield
    except (AssetError, CorruptError, DataError, DoesNotFit, HubError, ModelError, TrainingDiverged, RecordError) as error:
        raise pytest.fail.Exception(f"{type(error).__name__}: {error}", pytrace=False) from None
