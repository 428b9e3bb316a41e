"""The fixtures."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from peftbench.errors import PeftbenchError
from peftbench.phases import KD_MAX_LENGTH, SCALES, STANDARD_KD_SUBSETS, Phase, Scale
from peftbench.plugin.recording import ATTEMPTED, BENCHMARK, RECORD
from peftbench.plugin.session import SESSION
from peftbench.records import Record, case_name

if TYPE_CHECKING:
    from peftbench.data import Splits
    from peftbench.distill import TeacherLogits
    from peftbench.workbench import Workbench


@pytest.fixture(scope="session")
def peft_scale(request: pytest.FixtureRequest) -> Scale:
    """The scale of this case: what the options ask for or, where a test is parametrized over it, the one of that name."""
    name = request.config.stash[SESSION].scale_name(getattr(request, "param", "main"))
    if name not in SCALES:
        pytest.fail(f"peft_scale must be parametrized with main or one of {', '.join(SCALES)}, got {name!r}", pytrace=False)
    return SCALES[name]


@pytest.fixture
def peft_seed(request: pytest.FixtureRequest) -> int:
    """The seed of this case."""
    return int(getattr(request, "param", request.config.stash[SESSION].options.seeds[0]))


@pytest.fixture(scope="session")
def peft_workbench(request: pytest.FixtureRequest, peft_scale: Scale) -> Workbench:
    """What the cases of one scale share."""
    from peftbench.workbench import Workbench

    session = request.config.stash[SESSION]
    if not isinstance(peft_scale, Scale):
        pytest.fail(f"peft_scale must be a Scale, got {peft_scale!r}; parametrize over it with indirect=True", pytrace=False)
    if peft_scale.name not in SCALES:
        pytest.fail(
            f"peft_scale must keep the name of one of the scales, {', '.join(SCALES)}, by which phases and folders go; "
            f"got {peft_scale.name!r}",
            pytrace=False,
        )
    with explained():
        bench = Workbench(peft_scale, session.settings, session.progress, session.progress.say)
        bench.store.check_writable()
    return bench


@pytest.fixture(scope="session")
def sst2(peft_workbench: Workbench) -> Splits:
    """The scale's train, dev and test."""
    with explained():
        return peft_workbench.splits


@pytest.fixture(scope="session")
def teacher_logits(peft_workbench: Workbench) -> TeacherLogits:
    """The teacher's logits on the largest standard KD subset, from the cache if they are there."""
    with explained():
        return peft_workbench.teacher_logits(max(STANDARD_KD_SUBSETS), KD_MAX_LENGTH)


@pytest.fixture(scope="session")
def kd_subsets(peft_workbench: Workbench) -> dict[str, Path]:
    """Folders of the standard KD subsets: ``{"kd_1000": path, "kd_500": path}``."""
    with explained():
        return {f"kd_{size}": peft_workbench.kd_subset(size, KD_MAX_LENGTH) for size in STANDARD_KD_SUBSETS}


@pytest.fixture
def run_phase(
    request: pytest.FixtureRequest, benchmark: Any, peft_scale: Scale, peft_workbench: Workbench, peft_seed: int
) -> Iterator[Callable[[Phase], Record]]:
    """
    Train and evaluate a phase, once to a test and in one test of a session, and return its record.

    The record is written when the test ends. pytest-benchmark reports the time of the training loop.
    """
    session, node = request.config.stash[SESSION], request.node
    called = measured = False
    if not type(benchmark).__module__.startswith("pytest_benchmark"):  # another plugin's, or that of none
        benchmark = None
    node.stash[BENCHMARK] = benchmark

    def run(phase: Phase) -> Record:
        from peftbench.runner import case_fingerprint, failed_record, run_phase

        nonlocal called
        if called:
            raise RuntimeError("run_phase can be called only once per test; parametrize the test over phases")
        called = True
        if peft_workbench.scale != peft_scale:  # as in a class of unittest, whose tests pytest does not parametrize
            raise RuntimeError(
                "peft_scale is overridden here, and pytest has made the other fixtures for a test elsewhere; make this test a "
                "function that takes run_phase, or run it in a session of its own"
            )
        scale, settings, store = peft_workbench.scale, session.settings, peft_workbench.store
        with explained():
            case = case_name(phase.id, scale.name, peft_seed)
            store.check_case(session.run_id, case, attempted=node.stash.get(ATTEMPTED, None))
        try:
            if session.options.resume:
                fingerprint = case_fingerprint(phase, peft_workbench)
                if found := session.find_passed(node, peft_workbench, fingerprint, peft_seed):
                    session.check_phase(phase, scale.name)
                    for size in phase.at(scale.name).kd_subsets:  # which somebody may have deleted, or another study replaced
                        peft_workbench.kd_subset(size, phase.at(scale.name).max_length)
                    store.link(found, session.run_id)
                    node.user_properties.append(("peftbench_record", str(store.record_path(found))))
                    pytest.skip(f"resumed: passed with this fingerprint at this commit in run {found.run_id}")

            def train() -> Record:
                nonlocal measured
                measured = True
                session.check_phase(phase, scale.name)
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
    if benchmark is not None and not measured:
        benchmark.skipped = True  # a test that was skipped or failed before it got so far is told of that alone


@contextmanager
def explained() -> Iterator[None]:
    """Let errors that explain themselves fail the test without the traceback of a library on top."""
    try:
        yield
    except PeftbenchError as error:
        link: BaseException | None = error
        while link is not None:  # pytest keeps all of them, and with them what a failed training has on a GPU
            traceback.clear_frames(link.__traceback__)
            link = link.__cause__ or link.__context__
        raise pytest.fail.Exception(f"{type(error).__name__}: {error}", pytrace=False) from None


class NoBenchmark:
    """Stands in for pytest-benchmark where it is switched off as a whole (``-p no:benchmark``)."""

    @pytest.fixture
    def benchmark(self) -> None:
        return None
