"""
What the cases of one scale share: data, tokens, the teacher and its logits, and the device that they train on.

Of the process's own state it seeds the generators of random numbers, sets how a GPU multiplies and attends and, on CPU, has the C
library keep freed memory.
"""

import functools
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftbench import heap
from peftbench.assets import REVIEWS, Asset, asset_path, say
from peftbench.data import Split, Splits, draw, load_splits
from peftbench.device import Device, DoesNotFit, is_out_of_memory
from peftbench.distill import CODE_VERSION, TeacherKey, TeacherLogits, cached_logits, kd_loss, publish_subset, whole_blocks
from peftbench.intervals import wilson_interval
from peftbench.kernels import can_be_captured, cast_frozen, economize, economize_words, only_words
from peftbench.layers import make_packable
from peftbench.measure import describe_machine, usable_processors
from peftbench.memory import examples_at_once
from peftbench.models import (
    ModelError,
    Weights,
    check_positions,
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
from peftbench.records import phase_config
from peftbench.sealed import building, fingerprint, lock, unseal
from peftbench.store import OutputsError, Store
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
        commit: What `peftbench.commits.describe_code` said when the session began.
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Trainee:
    """
    A model on the device, ready to learn.

    Attributes:
        groups: What trains, with its learning rates, as `peftbench.models.prepare` gives it.
        packed: Whether it takes packed rows.
    """

    model: nn.Module
    groups: list[dict[str, Any]]
    packed: bool


def silent(what: str, done: int, total: int) -> None:
    """Progress that is not shown."""


MOST_UNKNOWN = 0.2
"""Share of a split's tokens that may be unknown to a tokenizer before it is said."""


class Workbench:
    """
    What the cases of one scale share: splits, tokens, the teacher and its logits; each made at first use.

    `peftbench.runner.run_phase` makes one of its own where it is given none.
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
            tokenizer = load_tokenizer(weights)
            encoded = self._encoded[key] = Encoded.from_split(split, tokenizer, max_length=max_length)
            unknown = encoded.share_of(tokenizer.unk_token_id)
            if unknown > MOST_UNKNOWN:
                name = "the small random model" if isinstance(weights.source, Untrained) else weights.source.source
                self.notify(
                    f"{100 * unknown:.0f}% of the tokens of {split.name} are unknown to the tokenizer of {name}, to which their "
                    "texts are much the same; take weights whose tokenizer knows them"
                )
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
            blocks = draw(train, whole_blocks(size, len(train)))
            weights = self.teacher.weights
            key = TeacherKey(
                weights=weights.identity,
                tokenizer=tokenizer_identity(load_tokenizer(weights)),
                max_length=max_length,
                precision=self.device.precision,
                device_kind=self.device.kind,
            )
            logits = cached_logits(
                blocks, key, lambda entry: self.store.cache_path("logits", entry), self._teach(weights, max_length)
            )
            self.misses += not logits.hit
            logits = self._kd[size, max_length] = logits.take_first(len(examples))
            right, n = int((logits.values.argmax(dim=1) == torch.tensor(examples.labels)).sum()), len(examples)
            if wilson_interval(right, n)[0] <= examples.majority_accuracy:
                self.notify(
                    f"the teacher is right on {100 * right / n:.1f}% of the {n} examples that it is to teach, and always answering "
                    f"the more frequent label on {100 * examples.majority_accuracy:.1f}%: there is little to learn from it"
                )
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
            heap.retain()
            economize(model)
        else:
            economize_words(model)
            if self.device.casts_frozen:
                cast_frozen(model, self.device.dtype)
        self.device.set_up()
        try:
            return model.to(self.device.name), packed
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise DoesNotFit(f"the weights alone do not fit {self.device.name}; use a smaller model or a larger device") from None

    def ready(self, weights: Weights, phase: Phase) -> Trainee:
        """
        A model as a phase trains it, on the device; what the checkpoint lacks is drawn from torch's global generator.

        Raises:
            ModelError: If the checkpoint or the phase's adapter cannot be used.
            DoesNotFit: If the weights alone are too much for the device.
        """
        model, groups = prepare(load_classifier(weights, tuned=phase.role == "teacher"), phase)
        model, packed = self.place(model)
        return Trainee(model=model, groups=groups, packed=packed)

    def train(
        self,
        phase: Phase,
        trainee: Trainee,
        encoded: Encoded,
        *,
        teacher: Tensor | None,
        seed: int,
        what: str,
        dev: Encoded | None = None,
    ) -> Fit:
        """
        Train a model on a phase's examples.

        Args:
            phase: With its changes for the scale made.
            teacher: Logits in the order of the examples, shape (N, 2), for a phase that distils.
            seed: Of the order of batches.
            what: Name of the work, for progress and errors.
            dev: What to evaluate on while training, as often as the settings say.

        Raises:
            TrainingDiverged: If a loss or gradient is not finite.
            DoesNotFit: If one example at a time is too much for the device's memory.
        """
        device, model, packed = self.device, trainee.model, trainee.packed
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
            self.own_threads(),
            only_words(model, words) if rows_stay else nullcontext(),
            flattened(trainee.groups) if device.kind == "cpu" else nullcontext(SeparateParameters(trainee.groups)) as parameters,
        ):
            return fit(
                model,
                loss,
                Batches(
                    encoded=encoded,
                    size=phase.batch_size,
                    generator=torch.Generator().manual_seed(seed),
                    device=device.name,
                    packed=packed,
                    row_step=row_step_on(device),
                ),
                parameters,
                Recipe(
                    epochs=phase.epochs,
                    warmup_fraction=phase.warmup_fraction,
                    clip_norm=phase.clip_norm,
                    weight_decay=phase.weight_decay,
                ),
                examples_at_once=examples_at_once(model, encoded, phase.batch_size, device),
                device=device,
                progress=self.progress,
                what=what,
                capture=packed and device.kind == "cuda" and can_be_captured(model),
                evaluate=functools.partial(accuracy, dev) if dev else None,
                evaluations=self.settings.evaluations,
            )

    def _fetch(self, asset: Asset) -> Path:
        return asset_path(asset, self.store.assets, notify=self.notify)

    def _teach(self, weights: Weights, max_length: int) -> Callable[[Split], Tensor]:
        @functools.cache
        def load() -> tuple[nn.Module, bool, Any]:
            model = load_classifier(weights, tuned=True)
            check_positions(model, max_length, "the teacher")
            return *self.place(model), load_tokenizer(weights)

        def compute(examples: Split) -> Tensor:
            model, packed, tokenizer = load()
            encoded = Encoded.from_split(examples, tokenizer, max_length=max_length)
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
        trainee = self.ready(backbone, recipe)
        needed = sum(weight.numel() * weight.element_size() for weight in trainee.model.parameters())
        free = shutil.disk_usage(folder.parent).free
        if free < needed:
            raise OutputsError(
                f"{self.store.root} has {free / 2**20:.0f} MiB of free space, and the tuned teacher takes {needed / 2**20:.0f}; "
                "free some or give another folder with --peft-outputs DIR"
            )
        run = self.train(recipe, trainee, encoded, teacher=None, seed=DATA_SEED, what="tuning the teacher")
        facts = {"training_seconds": run.runtime_seconds, "recipe": phase_config(recipe)}
        with building(folder, facts) as target:
            save_classifier(trainee.model, load_tokenizer(backbone), target)
        return facts


def seed_everything(seed: int) -> None:
    """Seed every generator that torch, transformers and peft draw from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
