"""
One phase, from settings to record: what is done on a workbench, measured and described.

Free of pytest; arguments and result can be pickled, so a case can run in any process.
"""

import json
from collections.abc import Sequence
from typing import Any

from peftbench import heap
from peftbench.data import Split, draw
from peftbench.distill import TeacherLogits, read_subset, whole_blocks
from peftbench.evaluation import METRICS_VERSION, latency_ms, score
from peftbench.measure import PeakMemory, ProcessorWait, Stopwatch, describe_versions
from peftbench.models import ModelError, Weights, artifact_bytes, count_parameters
from peftbench.packing import predict
from peftbench.phases import Phase, Pretrained, Scale, Untrained
from peftbench.plan import plan_phase
from peftbench.records import (
    SCHEMA_VERSION,
    Efficiency,
    ParameterCounts,
    Plan,
    Record,
    TeacherCost,
    decode_record,
    describe_error,
    phase_config,
)
from peftbench.sealed import fingerprint
from peftbench.training import Fit
from peftbench.workbench import Settings, Workbench, seed_everything


def run_phase(phase: Phase, scale: Scale, seed: int, settings: Settings, *, workbench: Workbench | None = None) -> Record:
    """
    Train and evaluate one phase.

    Args:
        phase: As the study writes it; its changes for the scale are made here.
        scale: Where roles and data come from.
        seed: Of what the case draws: new weights, dropout, the order of batches. Splits and subsets do not depend on it.
        settings: Of the session.
        workbench: What earlier cases made, of the same scale and settings.

    Returns:
        The record of a passed case.

    Raises:
        ValueError: If the workbench is of another scale or other settings.
        ModelError: If a phase that is to train has no epochs.
        RecordError: If the case's record could not be read again, as with a number beyond what JSON's readers take.
        Exception: Whatever else went wrong; `failed_record` makes a record of it.
    """
    bench = workbench or Workbench(scale, settings)
    if (bench.scale, bench.settings) != (scale, settings):
        raise ValueError(f"the workbench is of scale {bench.scale.name} or of other settings than the case at scale {scale.name}")
    phase = phase.at(scale.name)
    _check_epochs(phase)
    decode_record(json.dumps(failed_record(phase, seed, bench, RuntimeError("not run yet")).to_json()).encode())
    with bench.own_threads():
        record = _measure(phase, seed, bench)
    bench.device.release_memory()
    return record


def _measure(phase: Phase, seed: int, bench: Workbench) -> Record:
    scale, misses = bench.scale, bench.misses
    identity = case_fingerprint(phase, bench)
    for size in phase.kd_subsets:
        bench.kd_subset(size, phase.max_length)
    examples, logits, kd_path = _training_examples(phase, bench)
    weights = bench.teacher.weights if phase.role == "teacher" else bench.weights(scale.source_of(phase.role))

    bench.device.release_memory()
    heap.release()  # what cases before it have left there, which would count as in use
    memory, wait = PeakMemory(bench.device), ProcessorWait()
    memory.restart()
    seed_everything(seed)
    trainee = bench.ready(weights, phase)
    model, packed = trainee.model, trainee.packed
    total, trainable = count_parameters(model)
    run = None
    if phase.epochs:
        encoded = bench.encoded(examples, weights, phase.max_length)
        aligned = logits.align(examples) if logits else None
        dev = bench.encoded(bench.splits.dev, weights, phase.max_length) if bench.settings.evaluations else None
        run = bench.train(phase, trainee, encoded, teacher=aligned, seed=seed, what=phase.id, dev=dev)

    held_out = {split: bench.encoded(split, weights, phase.max_length) for split in (bench.splits.dev, bench.splits.test)}
    quality, predictions = {}, {}
    with Stopwatch(bench.device) as evaluating:
        for split, encoded in held_out.items():
            quality[split.name], predictions[split.name] = score(predict(model, encoded, bench.device, packed=packed), split)
    peak, latency = memory.read_bytes(), latency_ms(model, held_out[bench.splits.dev], bench.device, packed=packed)
    counts = ParameterCounts(total=total, trainable=trainable if run else 0)
    seconds = run.runtime_seconds if run else 0.0
    return Record(
        **_describe_case(phase, seed, bench),
        **_describe_training(run),
        outcome="passed",
        fingerprint=identity,
        checkpoint=_describe_checkpoint(phase.role, scale, weights),
        teacher_checkpoint=_describe_checkpoint("teacher", scale, bench.teacher.weights) if logits else None,
        dev=quality["dev"],
        test=quality["test"],
        majority_accuracy=bench.splits.dev.majority_accuracy,
        metrics_version=METRICS_VERSION,
        parameter_counts=counts,
        evaluation_seconds=evaluating.seconds,
        efficiency=Efficiency.from_costs(accuracy=quality["dev"].accuracy, trainable=counts.trainable, seconds=seconds),
        kd_path=kd_path,
        peak_memory_bytes=peak,
        peak_memory_scope=memory.scope,
        memory_before_bytes=memory.before_bytes,
        artifact_bytes=artifact_bytes(model),
        latency_ms=latency,
        processor_wait_fraction=wait.read_fraction(),
        precision=bench.device.precision,
        batching="packed" if packed else "padded to the longest",
        teacher_cost=_teacher_cost(phase, bench, logits, hit=bench.misses == misses),
        predictions=predictions,
    )


def plan_phases(phases: Sequence[Phase], bench: Workbench, *, memory_bytes: int | None = None) -> list[Plan]:
    """
    What each phase will cost on the bench's device, that of tuning the teacher first where the scale has none published.

    The teacher's logits are planned where they are asked for first, in the order of the phases.

    Args:
        memory_bytes: Free on the device; None is as much as it takes.

    Raises:
        ModelError: If a phase that is to train has no epochs.
    """
    scale, device, splits = bench.scale, bench.device, bench.splits
    recipe = scale.teacher
    teacher = bench.weights(scale.source_of("teacher"))
    plans = []
    known: dict[int, int] = {}  # how many texts there are logits of, by their length
    for phase in (*([recipe] if isinstance(recipe, Phase) else []), *(phase.at(scale.name) for phase in phases)):
        weights = bench.weights(scale.source_of(phase.role))
        _check_epochs(phase)
        train = splits.train if phase.subset is None else draw(splits.train, phase.subset)
        asked = max([*phase.kd_subsets, len(train) if phase.distillation is not None else 0])
        asked = whole_blocks(asked, len(splits.train))
        there = known.get(phase.max_length, 0)
        known[phase.max_length] = max(asked, there)
        taught = bench.encoded(draw(splits.train, asked), teacher, phase.max_length) if asked > there else None
        plans.append(
            plan_phase(
                phase,
                weights,
                bench.encoded(train, weights, phase.max_length),
                [] if phase is recipe else [bench.encoded(split, weights, phase.max_length) for split in (splits.dev, splits.test)],
                device,
                teacher=teacher,
                taught=taught.tokens[there:] if taught else (),
                memory_bytes=memory_bytes,
            )
        )
    return plans


def _check_epochs(phase: Phase) -> None:
    if phase.epochs:
        return
    if phase.subset is not None or phase.peft is not None or phase.distillation is not None:
        raise ModelError(f"{phase.id}: with 0 epochs its subset, peft or distillation would train nothing; set epochs")
    if phase.role != "teacher":
        raise ModelError(f"{phase.id}: with 0 epochs the {phase.role}'s new head would stay as it was drawn; set epochs")


def failed_record(phase: Phase, seed: int, bench: Workbench, error: BaseException) -> Record:
    """The record of a case that an error ended, with the data that it got so far to load."""
    return Record(
        **_describe_case(phase.at(bench.scale.name), seed, bench),
        outcome="failed",
        fingerprint=None,
        error=describe_error(error),
        learning_curve=(),
        predictions={},
    )


def case_fingerprint(phase: Phase, bench: Workbench) -> str:
    """What the figures of a case depend on, the seed aside; ``--peft-resume`` goes by it."""
    phase = phase.at(bench.scale.name)
    model = bench.teacher_identity if phase.role == "teacher" else bench.weights(bench.scale.source_of(phase.role)).identity
    return fingerprint(
        {
            "phase": [phase.id, phase_config(phase)],
            "scale": bench.scale.name,
            "data": bench.splits.fingerprint,
            "weights": model,
            "teacher": bench.teacher_identity if phase.needs_teacher else None,
            "precision": bench.device.precision,
            "metrics": METRICS_VERSION,
        }
    )


def _describe_case(phase: Phase, seed: int, bench: Workbench) -> dict[str, Any]:
    """What is known of a case however it ends."""
    recipe = bench.scale.teacher
    taught = {"teacher": phase_config(recipe)} if isinstance(recipe, Phase) and phase.needs_teacher else {}
    return {
        "schema_version": SCHEMA_VERSION,
        "run_id": bench.settings.run_id,
        "phase": phase.letter,
        "name": phase.name,
        "scale": bench.scale.name,
        "seed": seed,
        "config": {**phase_config(phase), **taught},
        "data": bench.splits.describe() if "splits" in vars(bench) else {},
        "machine": bench.machine,
        "versions": describe_versions(),
        "commit": bench.settings.commit,
    }


def _describe_training(run: Fit | None) -> dict[str, Any]:
    """What the loop took and how it went; None for a phase that trains nothing."""
    if run is None:
        counts = {"optimizer_steps": 0, "skipped_steps": 0, "replayed_steps": 0}
        return {"train_runtime_seconds": 0.0, **counts, "learning_curve": (), "dev_curve": ()}
    return {
        "train_runtime_seconds": run.runtime_seconds,
        "samples_per_second": run.examples / run.runtime_seconds,
        "tokens_per_second": run.tokens / run.runtime_seconds,
        "optimizer_steps": run.steps,
        "skipped_steps": run.skipped_steps,
        "replayed_steps": run.replayed_steps,
        "memory_use": run.memory,
        "learning_curve": run.learning_curve,
        "dev_curve": run.dev_curve,
    }


def _training_examples(phase: Phase, bench: Workbench) -> tuple[Split, TeacherLogits | None, str | None]:
    """What a phase learns from: the train split or its subset and, under distillation, the logits as they are on disk."""
    train = bench.splits.train
    if phase.distillation is None:
        return (train if phase.subset is None else draw(train, phase.subset)), None, None
    examples = draw(train, phase.subset)
    path = bench.kd_subset(len(examples), phase.max_length)
    key = bench.teacher_logits(len(examples), phase.max_length).fingerprint
    return examples, read_subset(path, key), path.relative_to(bench.settings.outputs.parent).as_posix()


def _teacher_cost(phase: Phase, bench: Workbench, logits: TeacherLogits | None, *, hit: bool) -> TeacherCost | None:
    if not phase.needs_teacher:
        return None
    sizes = [*phase.kd_subsets, *([len(logits.examples)] if logits else [])]
    used = [bench.teacher_logits(size, phase.max_length) for size in sizes]
    return TeacherCost(
        training_seconds=bench.teacher.training_seconds,
        logit_seconds=max((u.seconds for u in used), default=0.0),
        cache="hit" if hit else "miss",
    )


def _describe_checkpoint(role: str, scale: Scale, weights: Weights) -> str:
    if role == "teacher" and isinstance(scale.teacher, Phase):
        return f"tuned once from {_describe_source(scale.backbone)}"
    return _describe_source(weights.source) + (f" at {weights.commit}" if weights.commit else "")


def _describe_source(source: Pretrained | Untrained) -> str:
    if isinstance(source, Untrained):
        return f"random {source.architecture}, {source.layers} layers of {source.hidden_size}"
    layers = f", layers {', '.join(map(str, source.layers))}" if source.layers else ""
    return f"{source.source}{layers}"
