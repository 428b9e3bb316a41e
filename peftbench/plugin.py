"""All of pytest: options, cases, fixtures, records, progress and the table at the end."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from peftbench.compare import phase_report, summarize
from peftbench.phases import KD_MAX_LENGTH, PRECISIONS, SCALES, STANDARD_KD_SUBSETS, Phase, Scale
from peftbench.records import Record, RecordError, Store, make_run_id, read_record
from peftbench.report import render_duration, render_summary
from peftbench.sealed import CorruptError

if TYPE_CHECKING:
    from peftbench.device import Device
    from peftbench.runner import Settings, Workbench

OPTIONS = {
    "scale": ("auto", f"Scale of the cases: auto (thesis where CUDA is available, else mini), {', '.join(SCALES)}."),
    "seeds": ("42", "Seeds, separated by commas; each case runs once with each of them."),
    "outputs": ("outputs", "Folder for records, reports, KD subsets and caches."),
    "data": ("", "Folder with train.tsv and dev.tsv (and a labelled test.tsv) in GLUE's format, in place of the scale's data."),
    "device": ("auto", "Device as torch writes it: cpu, cuda, cuda:1; auto takes CUDA where it is available."),
    "precision": ("auto", f"One of {', '.join(PRECISIONS)}; auto takes what the device does natively."),
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
    resume: bool

    @classmethod
    def from_config(cls, config: pytest.Config) -> Options:
        """
        Read and check what the user gave.

        Raises:
            pytest.UsageError: Naming the option, what was got and what is allowed.
        """
        given = {name: str(config.getoption(f"peft_{name}") or config.getini(f"peft_{name}")) for name in OPTIONS}
        for name, allowed in (("scale", ("auto", *SCALES)), ("precision", PRECISIONS)):
            if given[name] not in allowed:
                raise pytest.UsageError(f"--peft-{name} must be one of {', '.join(allowed)}, got {given[name]!r}")
        texts = [text.strip() for text in given["seeds"].split(",")]
        if not all(text.isascii() and text.isdigit() and int(text) < 2**32 for text in texts) or len({*map(int, texts)}) < len(
            texts
        ):
            raise pytest.UsageError(
                f"--peft-seeds must be different whole numbers from 0 to {2**32 - 1}, separated by commas, got {given['seeds']!r}"
            )
        if given["data"] and not Path(given["data"]).is_dir():
            raise pytest.UsageError(
                f"--peft-data must be a folder with train.tsv and dev.tsv, got {given['data']!r}, which is none"
            )
        return cls(
            scale=given["scale"],
            seeds=tuple(map(int, texts)),
            outputs=Path(given["outputs"]),
            data=Path(given["data"]) if given["data"] else None,
            device=given["device"],
            precision=given["precision"],
            resume=bool(config.getoption("peft_resume") or config.getini("peft_resume")),
        )


class Session:
    """One pytest session: its run id, its records, and the clock that pytest-benchmark reads."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.options = Options.from_config(config)
        worker: dict[str, Any] = getattr(config, "workerinput", {})  # set in a worker of pytest-xdist
        self.run_id: str = worker.get("peftbench_run_id") or make_run_id()
        self.trained_seconds = 0.0
        self.record_paths: list[Path] = []
        self.resumed: list[Record] = []
        self._phase_of: dict[str, str] = {}

    @cached_property
    def main_scale(self) -> str:
        """The scale of the cases that are not tiny; ``auto`` asks torch."""
        if self.options.scale != "auto":
            return self.options.scale
        import torch

        return "thesis" if torch.cuda.is_available() else "mini"

    @cached_property
    def device(self) -> Device:
        """Where the cases run."""
        from peftbench.device import Device

        return Device.choose(self.options.device, self.options.precision)

    @cached_property
    def settings(self) -> Settings:
        """What the runner needs to know of the session."""
        from peftbench.runner import Settings

        options = self.options
        return Settings(
            outputs=options.outputs,
            run_id=self.run_id,
            project=self.config.rootpath,
            data=options.data,
            device=options.device,
            precision=options.precision,
        )

    @cached_property
    def commit(self) -> dict[str, Any]:
        """The commit under test."""
        from peftbench.measure import describe_commit

        return describe_commit(self.config.rootpath)

    def train_runtime_seconds(self) -> float:
        """A clock that only runs in training loops: pytest-benchmark's timer for the cases."""
        return self.trained_seconds

    def check_phase(self, phase: Phase) -> None:
        """Refuse two phases of one letter, whose results would replace each other."""
        known = self._phase_of.setdefault(phase.letter.lower(), phase.id)
        if known != phase.id:
            raise ValueError(f"phases {known} and {phase.id} would share phase_{phase.letter.lower()}_metrics.json; rename one")

    def find_passed(self, store: Store, fingerprint: str, seed: int) -> tuple[Record, Path] | None:
        """The newest passed record of the same case at the same commit and changes."""
        found: tuple[Record, Path] | None = None
        for record in store.records():
            if isinstance(record, RecordError):
                self.config.issue_config_time_warning(UserWarning(f"left out of the history: {record}"), stacklevel=2)
            elif (record.outcome, record.fingerprint, record.seed) == (
                "passed",
                fingerprint,
                seed,
            ) and record.commit == self.commit:
                found = record, store.runs / record.run_id / f"{record.case}.json"
        return found

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Learn of records, also from the workers of pytest-xdist."""
        if report.when == "call":
            self.record_paths += [Path(str(value)) for name, value in report.user_properties if name == "peftbench_record"]

    def keep(self, record: Record) -> Path:
        """Write a record and, if it passed, the phase's report over this run's seeds."""
        store = Store(self.options.outputs, record.scale)
        path = store.save(record)
        if record.outcome == "passed":
            of_run = [r for r in store.records(self.run_id) if isinstance(r, Record)]
            same = [r for r in (*self.resumed, *of_run) if (r.phase, r.name, r.scale) == (record.phase, record.name, record.scale)]
            [summary] = summarize(same)
            store.publish(record.phase, phase_report(summary))
        return path


class Progress:
    """Shows how far training is: one line that changes on a terminal, a line now and then in a log."""

    def __init__(self, config: pytest.Config) -> None:
        self._reporter: Any = config.pluginmanager.getplugin("terminalreporter")
        self._writer = config.get_terminal_writer()
        self._capture: Any = config.pluginmanager.getplugin("capturemanager")
        self._what, self._began, self._shown = "", 0.0, 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        if self._reporter is None:
            return
        now = time.monotonic()
        if what != self._what or done == 1:
            self._what, self._began, self._shown = what, now, now
        live = self._reporter.isatty
        if now - self._shown < (TERMINAL_LINE_SECONDS if live else LOG_LINE_SECONDS) and not (live and done == total):
            return
        self._shown = now
        left = render_duration((now - self._began) / done * (total - done))
        line = f"{what}: step {done} of {total}, {left} left"
        with self._capture.global_and_fixture_disabled():
            self._reporter.ensure_newline()
            if not live:
                self._reporter.write_line(f"peftbench: {line}")
            elif done < total:
                self._reporter.rewrite(line, erase=True)
            else:
                self._reporter.rewrite("", erase=True)
            self._writer.flush()


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
    text = "Skip cases that have passed with the same fingerprint at this commit."
    group.addoption("--peft-resume", dest="peft_resume", action="store_true", help=text)
    parser.addini("peft_resume", text, type="bool", default=False)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "tiny: smoke version of a peftbench case; runs only when asked for with -m tiny.")
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
    if "run_phase" in getattr(item, "fixturenames", ()) and item.config.pluginmanager.hasplugin("benchmark"):
        item.add_marker(pytest.mark.benchmark(timer=item.config.stash[SESSION].train_runtime_seconds, group="training"))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the tiny versions out unless something in the command line names them."""
    named = [config.option.markexpr, config.option.keyword, config.stash[SESSION].options.scale]
    named += [argument for argument in config.args if "::" in argument]
    if any("tiny" in text for text in named):
        return
    tiny = [item for item in items if "peft_scale" in getattr(item, "fixturenames", ()) and item.get_closest_marker("tiny")]
    if tiny:
        config.hook.pytest_deselected(items=tiny)
        items[:] = [item for item in items if item not in tiny]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Before hours are spent: can the device be used, can the outputs be written?"""
    if _will_run(session.config, session.items):
        own = session.config.stash[SESSION]
        try:
            Store(own.options.outputs, own.main_scale).check_writable()
            assert own.device
        except (ValueError, OSError) as error:
            raise pytest.UsageError(f"peftbench: {error}") from error


def pytest_report_collectionfinish(config: pytest.Config, items: list[pytest.Item]) -> list[str]:
    if not _will_run(config, items):
        return []
    own = config.stash[SESSION]
    scales = sorted({"tiny" if item.get_closest_marker("tiny") else own.main_scale for item in items})
    device = f"device {own.device.name}, precision {own.device.precision} ({own.device.why})"
    return [f"peftbench: scale {', '.join(scales)}; {device}; run {own.run_id}"]


def _will_run(config: pytest.Config, items: list[pytest.Item]) -> bool:
    return not config.option.collectonly and any("peft_scale" in getattr(item, "fixturenames", ()) for item in items)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Write the record the moment its case ends; what the test made of it decides the outcome."""
    report = yield
    record = item.stash.get(RECORD, None)
    if call.when == "call" and record is not None:
        if report.failed and record.outcome == "passed":
            message = call.excinfo.exconly() if call.excinfo else "the test failed"
            record = dataclasses.replace(record, outcome="failed", error=message[:2000])
        path = item.config.stash[SESSION].keep(record)
        report.user_properties.append(("peftbench_record", str(path)))
        benchmark: Any = getattr(item, "funcargs", {}).get("benchmark")
        if benchmark is not None:
            benchmark.extra_info["peftbench"] = record.to_json()
    return report


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = config.stash[SESSION]
    records = []
    for path in session.record_paths:
        try:
            records.append(read_record(path))
        except RecordError as error:
            terminalreporter.write_line(f"peftbench: {error}", yellow=True)
    if records:
        terminalreporter.section("peftbench")
        terminalreporter.write_line(render_summary(records))
        folders = sorted({Store(session.options.outputs, record.scale).root for record in records})
        terminalreporter.write_line(f"records: {', '.join(str(folder / 'runs' / session.run_id) for folder in folders)}")


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

    return Workbench(peft_scale, request.config.stash[SESSION].settings, Progress(request.config))


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
) -> Callable[[Phase], Record]:
    """
    Train and evaluate a phase, once to a test, and return its record.

    The record is written when the test ends. pytest-benchmark reports the time of the training loop.
    """
    session = request.config.stash[SESSION]

    def run(phase: Phase) -> Record:
        from peftbench.runner import case_fingerprint, failed_record, run_phase

        scale, settings = peft_workbench.scale, session.settings
        try:
            if session.options.resume:
                fingerprint = case_fingerprint(phase, peft_workbench)
                if found := session.find_passed(peft_workbench.store, fingerprint, peft_seed):
                    record, path = found
                    session.resumed.append(record)
                    request.node.user_properties.append(("peftbench_record", str(path)))
                    pytest.skip(f"resumed: passed with this fingerprint at this commit in run {record.run_id}")

            def train() -> Record:
                session.check_phase(phase)
                record = run_phase(phase, scale, peft_seed, settings, workbench=peft_workbench)
                session.trained_seconds += record.train_runtime_seconds or 0.0
                return record

            record = train() if benchmark is None else benchmark.pedantic(train, rounds=1, iterations=1)
            request.node.stash[RECORD] = record
            return record
        except pytest.skip.Exception:
            raise
        except BaseException as error:
            record = failed_record(phase, scale, peft_seed, settings, error)
            request.node.stash[RECORD] = record
            if not isinstance(error, Exception):
                session.keep(record)  # Ctrl-C: no report will be made of this test
                raise
            with explained():
                raise

    return run


@contextmanager
def explained() -> Iterator[None]:
    """Let errors that explain themselves fail the test without the traceback of a library on top."""
    from peftbench.assets import AssetError
    from peftbench.data import DataError
    from peftbench.models import ModelError
    from peftbench.training import TrainingDiverged

    try:
        yield
    except (AssetError, CorruptError, DataError, ModelError, TrainingDiverged, RecordError) as error:
        pytest.fail(f"{type(error).__name__}: {error}", pytrace=False)
