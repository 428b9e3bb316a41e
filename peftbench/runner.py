"""
One phase, from settings to record: wires data, models, teacher, loop and evaluation together.

Free of pytest; arguments and result can be pickled, so a case can run in any process. Of the process's own state a case seeds the
generators of random numbers, sets how a GPU multiplies and attends and, on CPU, has the C library keep freed memory.
"""

import functools
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftbench.assets import REVIEWS, Asset, asset_path, say
from peftbench.data import Split, Splits, draw, load_splits
from peftbench.device import Device, DoesNotFit, is_out_of_memory
from peftbench.distill import (
    CODE_VERSION,
    LOGIT_BLOCK,
    TeacherKey,
    TeacherLogits,
    cached_logits,
    kd_loss,
    publish_subset,
    read_subset,
)
from peftbench.evaluation import METRICS_VERSION, latency_ms, score
from peftbench.kernels import can_be_captured, cast_frozen, economize, economize_words, only_words, retain_memory
from peftbench.layers import make_packable
from peftbench.measure import PeakMemory, ProcessorWait, Stopwatch, describe_machine, describe_versions, usable_processors
from peftbench.models import (
    ModelError,
    Weights,
    artifact_bytes,
    check_positions,
    count_parameters,
    load_classifier,
    load_tokenizer,
    locate,
    prepare,
    save_classifier,
    tokenizer_identity,
)
from peftbench.packing import Batch, Batches, Encoded, predict, row_step_on
from peftbench.parameters import SeparateParameters, flattened
from peftbench.phases import DATA_SEED, Phase, Pretrained, Scale, Untrained
from peftbench.plan import examples_at_once, plan_phase
from peftbench.records import (
    SCHEMA_VERSION,
    Efficiency,
    OutputsError,
    ParameterCounts,
    Plan,
    Record,
    Store,
    TeacherCost,
    describe_error,
    phase_config,
)
from peftbench.sealed import building, fingerprint, lock, unseal
from peftbench.training import Fit, Progress, Recipe, fit


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """
    What a session decides for all of its cases.

    Attributes:
        outputs: Where results and caches go.
        data: A folder of GLUE-style files in place of the scale's data.
        device: ``auto``, ``cpu``, ``cuda`` or one of several, such as ``cuda:1``.
        precision: ``auto``, ``fp32``, ``bf16`` or ``fp16``.
        run_id: The run that the records belong to.
        commit: What `peftbench.commits.describe_commit` said when the session began.
        evaluations: How often each phase is evaluated on dev while it trains; takes no part in the training time.
        workers: Processes that run cases beside each other.
    """

    outputs: Path
    run_id: str
    commit: Mapping[str, Any] = field(default_factory=dict)
    data: Path | None = None
    device: str = "auto"
    precision: str = "auto"
    evaluations: int = 0
    workers: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Teacher:
    """The scale's teacher, ready to load; the cost of tuning it is that of the first time."""

    weights: Weights
    training_seconds: float


def silent(what: str, done: int, total: int) -> None:
    """Progress that is not shown."""


class Workbench:
    """
    What the cases of one scale share: splits, tokens, the teacher and its logits; each made at first use.

    Optional in any call; without one, what a call needs is made again.
    """

    def __init__(self, scale: Scale, settings: Settings, progress: Progress = silent, notify: Callable[[str], None] = say) -> None:
        self.scale, self.settings, self.progress, self.notify = scale, settings, progress, notify
        self.store = Store(settings.outputs, scale.name)
        self.device = Device.choose(settings.device, settings.precision)
        own_choice = self.scale.threads if self.device.kind == "cpu" else None
        self.threads = own_choice or min(torch.get_num_threads(), usable_processors())  # torch knows nothing of containers
        self.machine = describe_machine(self.device, self.threads, settings.workers)  # now, as a broken device may not tell
        self.misses = 0  # how often the teacher or its logits were not on disk
        self._weights: dict[Pretrained | Untrained, Weights] = {}
        self._encoded: dict[tuple[str, str, int], Encoded] = {}
        self._kd: dict[tuple[int, int], TeacherLogits] = {}

    @cached_property
    def splits(self) -> Splits:
        """Train, dev and test, with labels checked."""
        scale, reviews = self.scale, functools.partial(self._fetch, REVIEWS)
        splits = load_splits(scale.data, self.settings.data, reviews, self.notify, revisions=scale.data_revisions)
        for split in (splits.train, splits.dev, splits.test):
            split.check_labels()
        return splits

    def weights(self, source: Pretrained | Untrained) -> Weights:
        """A role's weights, located once."""
        if source not in self._weights:
            self._weights[source] = locate(source, self._fetch, self.notify)
        return self._weights[source]

    def encoded(self, split: Split, weights: Weights, max_length: int) -> Encoded:
        """A split as token ids."""
        key = (split.fingerprint, weights.identity, max_length)
        if key not in self._encoded:
            self._encoded[key] = Encoded.from_split(split, load_tokenizer(weights), max_length=max_length)
        return self._encoded[key]

    @cached_property
    def teacher(self) -> Teacher:
        """The published teacher, or the backbone tuned by the scale's recipe, once, and cached by content."""
        recipe = self.scale.teacher
        if isinstance(recipe, Pretrained):
            return Teacher(weights=self.weights(recipe), training_seconds=0.0)
        folder = self.store.cache_path("teachers", fingerprint([self.teacher_identity, CODE_VERSION]))
        with lock(folder, waiting=lambda: self.notify("waiting for another session that is tuning the same teacher")):
            facts = unseal(folder)
            if facts is None:
                self.misses += 1
                facts = self._tune_teacher(recipe, folder)
        weights = locate(Pretrained(source=str(folder)), self._fetch)
        return Teacher(weights=weights, training_seconds=float(facts["training_seconds"]))

    @cached_property
    def teacher_identity(self) -> str:
        """What the teacher is tuned from and how, or its weights; the code is no part, so that commits can be compared."""
        recipe = self.scale.teacher
        if isinstance(recipe, Pretrained):
            return self.weights(recipe).identity
        facts = [self.weights(self.scale.backbone).identity, phase_config(recipe), self.splits.train.fingerprint]
        return fingerprint([*facts, self.device.precision, self.device.kind, DATA_SEED])

    def teacher_logits(self, size: int, max_length: int) -> TeacherLogits:
        """The teacher's logits for the first ``size`` examples of the fixed draw, from the cache where they are in it."""
        if (size, max_length) not in self._kd:
            train = self.splits.train
            examples = draw(train, size)
            whole_blocks = draw(train, min(len(train), -(-size // LOGIT_BLOCK) * LOGIT_BLOCK))
            weights = self.teacher.weights
            key = TeacherKey(
                weights=weights.identity,
                tokenizer=tokenizer_identity(load_tokenizer(weights)),
                max_length=max_length,
                precision=self.device.precision,
                device_kind=self.device.kind,
            )
            logits = cached_logits(
                whole_blocks, key, lambda entry: self.store.cache_path("logits", entry), self._teach(weights, max_length)
            )
            self.misses += not logits.hit
            self._kd[size, max_length] = logits.take_first(len(examples))
        return self._kd[size, max_length]

    def kd_subset(self, size: int, max_length: int) -> Path:
        """The folder of a KD subset, written or left as it is if it already says the same."""
        return publish_subset(self.teacher_logits(size, max_length), self.store.kd_path(size, max_length))

    @contextmanager
    def own_threads(self) -> Iterator[None]:
        """For a while, an operation on the CPU takes as many threads as the scale asks for."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def place(self, model: nn.Module) -> tuple[nn.Module, bool]:
        """Bring a model to the device, ready to run there; also says whether it takes packed rows."""
        packed = make_packable(model)
        if self.device.kind == "cpu":
            retain_memory()
            economize(model)
        else:
            economize_words(model)
            if self.device.casts_frozen:
                cast_frozen(model, self.device.dtype)
        self.device.set_up()
        try:
            return model.to(self.device.name), packed
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise DoesNotFit(f"the weights alone do not fit {self.device.name}; use a smaller model or a larger device") from None

    def _fetch(self, asset: Asset) -> Path:
        return asset_path(asset, self.store.assets, notify=self.notify)

    def _teach(self, weights: Weights, max_length: int) -> Callable[[Split], Tensor]:
        @functools.cache
        def load() -> tuple[nn.Module, bool]:
            model = load_classifier(weights, tuned=True)
            check_positions(model, max_length, "the teacher")
            return self.place(model)

        def compute(examples: Split) -> Tensor:
            model, packed = load()
            encoded = Encoded.from_split(examples, load_tokenizer(weights), max_length=max_length)
            with self.own_threads():
                logits = predict(model, encoded, self.device, packed=packed)
            if broken := int((~torch.isfinite(logits)).any(dim=1).sum()):
                raise ModelError(
                    f"the teacher's logits of {broken} of {len(examples)} texts are not finite in {self.device.precision}; "
                    "use another precision, such as fp32, or another teacher"
                )
            return logits

        return compute

    def _tune_teacher(self, recipe: Phase, folder: Path) -> dict[str, Any]:
        seed_everything(DATA_SEED)
        backbone = self.weights(self.scale.backbone)
        encoded = self.encoded(self.splits.train, backbone, recipe.max_length)
        model, groups = prepare(load_classifier(backbone), recipe)
        needed = sum(weight.numel() * weight.element_size() for weight in model.parameters())
        free = shutil.disk_usage(folder.parent).free
        if free < needed:
            raise OutputsError(
                f"{self.store.root} has {free / 2**20:.0f} MiB of free space, and the tuned teacher takes {needed / 2**20:.0f}; "
                "free some or give another folder with --peft-outputs DIR"
            )
        model, packed = self.place(model)
        run = train(recipe, model, groups, encoded, self, teacher=None, packed=packed, seed=DATA_SEED, what="tuning the teacher")
        facts = {"training_seconds": run.runtime_seconds, "recipe": phase_config(recipe)}
        with building(folder, facts) as target:
            save_classifier(model, load_tokenizer(backbone), target)
        return facts


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
        ValueError: If the workbench is of another scale or other settings, or the phase says what to train on but not how often.
        Exception: Whatever else went wrong; `failed_record` makes a record of it.
    """
    bench = workbench or Workbench(scale, settings)
    if (bench.scale, bench.settings) != (scale, settings):
        raise ValueError(f"the workbench is of scale {bench.scale.name} or of other settings than the case at scale {scale.name}")
    phase = phase.at(scale.name)
    asks_to_train = phase.subset is not None or phase.peft is not None or phase.distillation is not None
    if asks_to_train and not phase.epochs:
        raise ModelError(f"{phase.id}: with 0 epochs its subset, peft or distillation would train nothing; set epochs")
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
    memory, wait = PeakMemory(bench.device), ProcessorWait()
    memory.restart()
    seed_everything(seed)
    model, groups = prepare(load_classifier(weights, tuned=phase.role == "teacher"), phase)
    model, packed = bench.place(model)
    total, trainable = count_parameters(model)
    run = None
    if phase.epochs:
        encoded = bench.encoded(examples, weights, phase.max_length)
        aligned = logits.align(examples) if logits else None
        dev = bench.encoded(bench.splits.dev, weights, phase.max_length) if bench.settings.evaluations else None
        run = train(phase, model, groups, encoded, bench, teacher=aligned, packed=packed, seed=seed, what=phase.id, dev=dev)

    held_out = [bench.encoded(split, weights, phase.max_length) for split in (bench.splits.dev, bench.splits.test)]
    quality, predictions = {}, {}
    with Stopwatch(bench.device) as evaluating:
        for encoded in held_out:
            split = encoded.split
            quality[split.name], predictions[split.name] = score(predict(model, encoded, bench.device, packed=packed), split)
    peak, latency = memory.read_bytes(), latency_ms(model, held_out[0], bench.device, packed=packed)
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


def train(
    phase: Phase,
    model: nn.Module,
    groups: list[dict[str, Any]],
    encoded: Encoded,
    bench: Workbench,
    *,
    teacher: Tensor | None,
    packed: bool,
    seed: int,
    what: str,
    dev: Encoded | None = None,
) -> Fit:
    """
    Train a model that `Workbench.place` made ready on a phase's examples.

    Args:
        phase: With its changes for the scale made.
        groups: Parameters with their learning rates, as `peftbench.models.prepare` gives them.
        teacher: Logits in the order of the examples, shape (N, 2), for a phase that distils.
        packed: What `Workbench.place` said.
        seed: Of the order of batches.
        what: Name of the work, for progress and errors.
        dev: What to evaluate on while training, as often as the settings say.
    """
    device = bench.device
    targets = None if teacher is None else teacher.to(device.name)  # (N, 2)

    def loss(batch: Batch) -> Tensor:
        logits = model(**batch.inputs).logits.float()  # (B, 2)
        if targets is None or phase.distillation is None:
            return F.cross_entropy(logits, batch.labels)
        return kd_loss(logits, targets[batch.rows.to(targets.device, non_blocking=True)], batch.labels, phase.distillation)

    def accuracy(on: Encoded) -> float:
        return int((predict(model, on, device, packed=packed).argmax(dim=1) == on.labels).sum()) / len(on)

    words = torch.cat([*encoded.tokens, *(dev.tokens if dev else ())])
    rows_stay = packed and not phase.weight_decay  # of words that do not occur: no padding and no decay touches them
    with (
        bench.own_threads(),
        only_words(model, words) if rows_stay else nullcontext(),
        flattened(groups) if device.kind == "cpu" else nullcontext(SeparateParameters(groups)) as parameters,
    ):
        return fit(
            model,
            loss,
            Batches(encoded, phase.batch_size, torch.Generator().manual_seed(seed), device.name, packed, row_step_on(device)),
            parameters,
            Recipe(
                epochs=phase.epochs,
                warmup_fraction=phase.warmup_fraction,
                clip_norm=phase.clip_norm,
                weight_decay=phase.weight_decay,
            ),
            examples_at_once=examples_at_once(model, encoded, phase.batch_size, device),
            device=device,
            progress=bench.progress,
            what=what,
            capture=packed and device.kind == "cuda" and can_be_captured(model),
            evaluate=functools.partial(accuracy, dev) if dev else None,
            evaluations=bench.settings.evaluations,
        )


def plan_phases(phases: Sequence[Phase], bench: Workbench, *, memory_bytes: int | None = None) -> list[Plan]:
    """
    What each phase will cost on the bench's device, that of tuning the teacher first where the scale has none published.

    The teacher's logits are planned where they are asked for first, in the order of the phases.
    """
    scale, device, splits = bench.scale, bench.device, bench.splits
    recipe = scale.teacher
    teacher = bench.weights(scale.source_of("teacher"))
    plans = []
    known: dict[int, int] = {}  # how many texts there are logits of, by their length
    for phase in (*([recipe] if isinstance(recipe, Phase) else []), *(phase.at(scale.name) for phase in phases)):
        weights = bench.weights(scale.source_of(phase.role))
        train = splits.train if phase.subset is None else draw(splits.train, phase.subset)
        asked = max([*phase.kd_subsets, len(train) if phase.distillation is not None else 0])
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


def seed_everything(seed: int) -> None:
    """Seed every generator that torch, transformers and peft draw from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


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
    if phase.role != "teacher" and logits is None:
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
