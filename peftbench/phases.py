"""What to run: phases, the scales they run at, and the checks on both. Standard library only."""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

Role = Literal["teacher", "backbone", "student"]
DataSource = Literal["grammar", "reviews", "glue"]
Architecture = Literal["bert", "distilbert"]

SCALE_NAMES = ("tiny", "mini", "thesis")

PRECISIONS = ("auto", "fp32", "bf16", "fp16")

DATA_SEED = 42
"""The one seed of splits and KD subsets: they stay the same while a case's own seed varies."""

STANDARD_KD_SUBSETS = (1000, 500)
"""Sizes of the KD subsets that the study publishes under ``outputs/kd``."""

MAX_ID_LENGTH = 100
"""Characters of a phase's id."""

KD_MAX_LENGTH = 96
"""Tokens of a text that the teacher sees for the standard KD subsets, as the phases do."""

LORA: Mapping[str, Any] = {
    "peft_type": "LORA",
    "r": 32,
    "lora_alpha": 64,
    "lora_dropout": 0.1,
    "target_modules": ["query", "key", "value"],
}
"""The study's adapter, for BERT's names of the attention projections."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Distillation:
    """
    Loss = alpha · T² · KL(teacher ‖ student) + (1 - alpha) · cross-entropy (Hinton et al. 2015, arXiv:1503.02531).

    Raises:
        ValueError: If alpha is outside 0…1 or the temperature is not positive.
    """

    alpha: float = 0.7
    temperature: float = 2.0

    def __post_init__(self) -> None:
        _check_number("alpha", self.alpha, at_least=0.0, at_most=1.0)
        _check_number("temperature", self.temperature, above=0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """
    One method of the study as plain data.

    Attributes:
        id: Letter and name joined by a hyphen, such as ``D-hybrid``; names the case and its files.
        role: The model that the phase trains; the teacher may be evaluated only.
        epochs: Passes over the training examples; 0 is for a teacher that is only evaluated.
        learning_rate: Peak rate of AdamW.
        subset: Number of training examples, the first of the fixed draw; None takes the whole train split.
        peft: Any configuration of the ``peft`` library with its ``peft_type``; None trains all parameters.
        unfreeze_top_layers: Encoder layers, counted from the top, that train beside the adapter.
        unfrozen_learning_rate: Peak rate for those layers; None gives them ``learning_rate``.
        layer_decay: Factor on the rate for each layer further down, embeddings last; 1 gives every layer the same.
        dropout: Share of the model's activations that are dropped in training, an adapter's own dropout aside; None takes the
            checkpoint's. One or two passes over many examples do as well without, but a teacher gets too certain.
        distillation: Learn from the teacher's logits, too; None learns from the labels alone.
        kd_subsets: Sizes of the KD subsets that the phase writes.
        batch_size: Examples to an optimizer step.
        max_length: Tokens kept of a text, special tokens included.
        warmup_fraction: Share of the optimizer steps in which the rate rises; it falls linearly to 0 afterwards.
        clip_norm: Largest global norm of the gradient.
        weight_decay: AdamW's, on every trained parameter.
        at_scale: Changes to the fields above, by the name of a scale.

    Raises:
        ValueError: If a field is out of range, or ``at_scale`` names a field that a phase does not have.
    """

    id: str
    role: Role
    epochs: int = 0
    learning_rate: float = 3e-5
    subset: int | None = None
    peft: Mapping[str, Any] | None = None
    unfreeze_top_layers: int = 0
    unfrozen_learning_rate: float | None = None
    layer_decay: float = 1.0
    dropout: float | None = None
    distillation: Distillation | None = None
    kd_subsets: tuple[int, ...] = ()
    batch_size: int = 16
    max_length: int = KD_MAX_LENGTH
    warmup_fraction: float = 0.0
    clip_norm: float = 1.0
    weight_decay: float = 0.0
    at_scale: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        __tracebackhide__ = True  # pytest shows the line that made the phase, not the check
        if not isinstance(self.id, str) or not re.fullmatch(r"[A-Za-z0-9]+-[A-Za-z0-9_]+", self.id):
            raise ValueError(
                "phase id must be letters or digits, one hyphen and a name of letters, digits and underscores, like 'E-ia3' or "
                f"'G-lora_r4', got {self.id!r}"
            )
        if len(self.id) > MAX_ID_LENGTH:
            raise ValueError(
                f"phase id names files and must have at most {MAX_ID_LENGTH} characters, got {len(self.id)}: {self.id!r}"
            )
        if self.role not in get_args(Role):
            raise ValueError(f"{self.id}: role must be one of {', '.join(get_args(Role))}, got {self.role!r}")
        _check_count(f"{self.id}: epochs", self.epochs, at_least=0)
        _check_count(f"{self.id}: batch_size", self.batch_size, at_least=1)
        _check_count(f"{self.id}: max_length", self.max_length, at_least=3)
        _check_count(f"{self.id}: unfreeze_top_layers", self.unfreeze_top_layers, at_least=0)
        if not isinstance(self.kd_subsets, tuple):
            raise ValueError(f"{self.id}: kd_subsets must be a tuple of sizes, such as (1000, 500), got {self.kd_subsets!r}")
        for size in (*([] if self.subset is None else [self.subset]), *self.kd_subsets):
            _check_count(f"{self.id}: a subset", size, at_least=1)
        _check_number(f"{self.id}: learning_rate", self.learning_rate, above=0.0)
        if self.unfrozen_learning_rate is not None:
            _check_number(f"{self.id}: unfrozen_learning_rate", self.unfrozen_learning_rate, above=0.0)
        _check_number(f"{self.id}: layer_decay", self.layer_decay, above=0.0, at_most=1.0)
        if self.dropout is not None:
            _check_number(f"{self.id}: dropout", self.dropout, at_least=0.0, at_most=1.0)
        _check_number(f"{self.id}: warmup_fraction", self.warmup_fraction, at_least=0.0, at_most=1.0)
        _check_number(f"{self.id}: clip_norm", self.clip_norm, above=0.0)
        _check_number(f"{self.id}: weight_decay", self.weight_decay, at_least=0.0)
        if self.peft is not None and not (isinstance(self.peft, Mapping) and isinstance(self.peft.get("peft_type"), str)):
            raise ValueError(f"{self.id}: peft must be a mapping that names its peft_type, such as 'LORA', got {self.peft!r}")
        try:
            json.dumps(self.peft, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.id}: peft must be plain data that JSON can hold, got {self.peft!r}: {error}") from None
        if self.distillation is not None and not isinstance(self.distillation, Distillation):
            raise ValueError(f"{self.id}: distillation must be a Distillation, got {self.distillation!r}")
        if self.unfrozen_learning_rate is not None and not self.unfreeze_top_layers:
            raise ValueError(f"{self.id}: unfrozen_learning_rate needs unfreeze_top_layers, which is 0")
        if self.unfreeze_top_layers and self.peft is None:
            raise ValueError(f"{self.id}: unfreeze_top_layers needs peft; without it all layers train already")
        fields = {f.name for f in dataclasses.fields(self)} - {"id", "role", "at_scale"}
        for scale, changes in self.at_scale.items():
            if scale not in SCALE_NAMES:
                raise ValueError(f"{self.id}: at_scale must name one of {', '.join(SCALE_NAMES)}, got {scale!r}")
            if not isinstance(changes, Mapping):
                raise ValueError(f"{self.id}: at_scale[{scale!r}] must be a mapping of fields, got {changes!r}")
            if unknown := sorted(set(changes) - fields):
                raise ValueError(
                    f"{self.id}: at_scale[{scale!r}] has no field {', '.join(unknown)}; allowed: {', '.join(sorted(fields))}"
                )
            self.at(scale)

    @property
    def letter(self) -> str:
        """The part of the id before the hyphen: ``D`` of ``D-hybrid``."""
        return self.id.partition("-")[0]

    @property
    def name(self) -> str:
        """The part of the id after the hyphen: ``hybrid`` of ``D-hybrid``."""
        return self.id.partition("-")[2]

    @property
    def needs_teacher(self) -> bool:
        """Whether it evaluates the teacher, learns from it or writes what it says."""
        return self.role == "teacher" or self.distillation is not None or bool(self.kd_subsets)

    def at(self, scale: str) -> "Phase":
        """The phase with its changes for that scale made."""
        return dataclasses.replace(self, **self.at_scale.get(scale, {}), at_scale={})


@dataclass(frozen=True, kw_only=True, slots=True)
class Pretrained:
    """
    Published weights: ``asset:<name>`` of `peftbench.assets`, a checkpoint on the Hub, or a local folder.

    Attributes:
        layers: The encoder layers to keep, counted from 1; empty keeps all.
        revision: Branch, tag or commit on the Hub; None takes the main branch. Of no meaning elsewhere.
    """

    source: str
    layers: tuple[int, ...] = ()
    revision: str | None = None

    def __post_init__(self) -> None:
        __tracebackhide__ = True
        if not isinstance(self.source, str) or not self.source:
            raise ValueError(f"source must name a folder, an asset or a repository of the Hub, got {self.source!r}")
        if not isinstance(self.layers, tuple):
            raise ValueError(f"{self.source}: layers must be a tuple of numbers, such as (2, 4, 6), got {self.layers!r}")
        for layer in self.layers:
            _check_count(f"{self.source}: a layer", layer, at_least=1)
        if len(set(self.layers)) < len(self.layers):
            raise ValueError(f"{self.source}: layers must be kept once each, got {self.layers!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Untrained:
    """A small encoder with random weights, drawn with the case's seed."""

    architecture: Architecture
    layers: int
    hidden_size: int
    attention_heads: int

    def __post_init__(self) -> None:
        __tracebackhide__ = True
        if self.architecture not in get_args(Architecture):
            raise ValueError(
                f"random weights: architecture must be {' or '.join(get_args(Architecture))}, got {self.architecture!r}"
            )
        for name in ("layers", "hidden_size", "attention_heads"):
            _check_count(f"random weights: {name}", getattr(self, name), at_least=1)
        if self.hidden_size % self.attention_heads:
            raise ValueError(
                "random weights: hidden_size must be a multiple of attention_heads, "
                f"got {self.hidden_size} and {self.attention_heads}"
            )

    @property
    def initializer_range(self) -> float:
        """
        Standard deviation of the weights: 1/√width, so that what a layer makes is about as large as what it takes.

        With transformers' 0.02, meant for a width of 768, some seeds learn nothing.
        """
        return float(self.hidden_size**-0.5)


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """
    Where roles and data come from and how big they are.

    Attributes:
        name: In records and in what ``--peft-scale`` takes.
        data: ``grammar``, ``reviews`` or ``glue``; ``--peft-data`` takes its place.
        backbone: What B and D train, and what a teacher is tuned from.
        student: What C1 and C2 train.
        data_revisions: Branch, tag or commit of the Hub's data sets, by their names; the main branch of what is not named.
        teacher: A published teacher, or the phase by which the backbone is tuned once to become it.
        threads: CPU threads per operation; None is torch's default. Operations of a tiny model are too short to share.
    """

    name: str
    data: DataSource
    backbone: Pretrained | Untrained
    student: Pretrained | Untrained
    teacher: Pretrained | Phase
    threads: int | None = None
    data_revisions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        __tracebackhide__ = True
        if self.data not in get_args(DataSource):
            raise ValueError(
                f"scale {self.name}: data must be one of {', '.join(get_args(DataSource))}, got {self.data!r}; "
                "give your own files with --peft-data"
            )
        if not re.fullmatch(r"[A-Za-z0-9_]+", self.name):  # it stands in file names
            raise ValueError(f"a scale's name must be of letters, digits and underscores, got {self.name!r}")
        if self.threads is not None:
            _check_count(f"scale {self.name}: threads", self.threads, at_least=1)
        if self.data_revisions and self.data != "glue":
            raise ValueError(f"scale {self.name}: data_revisions are of the Hub's data, and this scale has {self.data}")
        for role, other in (("backbone", Untrained), ("student", Untrained), ("teacher", Phase)):
            if not isinstance(source := getattr(self, role), (Pretrained, other)):
                raise ValueError(f"scale {self.name}: {role} must be Pretrained or {other.__name__}, got {source!r}")
        if isinstance(self.teacher, Phase):
            recipe = self.teacher
            whole = (recipe.role, recipe.subset, recipe.peft, recipe.distillation, dict(recipe.at_scale), recipe.kd_subsets)
            if whole != ("backbone", None, None, None, {}, ()) or not recipe.epochs:
                raise ValueError(
                    f"scale {self.name}: the teacher is the backbone with all parameters tuned on all of train, for one epoch or "
                    f"more; its phase can have no subset, peft, distillation, at_scale or kd_subsets, got {recipe}"
                )

    def source_of(self, role: Role) -> Pretrained | Untrained:
        """Where a role's weights come from; those of a teacher that is to be tuned, from the backbone."""
        if role == "teacher" and isinstance(self.teacher, Pretrained):
            return self.teacher
        return self.student if role == "student" else self.backbone


def check_data_folder(folder: Path, option: str) -> None:
    """
    See that a folder can stand in for a scale's data, before anything is loaded.

    Raises:
        ValueError: Naming the option that gave it, and what it lacks.
    """
    missing = [name for name in ("train.tsv", "dev.tsv") if not (folder / name).is_file()]
    if missing:
        why = f"has no {missing[0]}" if folder.is_dir() else "is a file" if folder.is_file() else "does not exist"
        raise ValueError(f"{option} must be a folder with train.tsv and dev.tsv, got {str(folder)!r}, which {why}")


def _check_count(what: str, got: object, *, at_least: int) -> None:
    __tracebackhide__ = True
    if isinstance(got, bool) or not isinstance(got, int) or got < at_least:
        raise ValueError(f"{what} must be a whole number of at least {at_least}, got {got!r}")


def _check_number(
    what: str, got: object, *, at_least: float = -math.inf, above: float = -math.inf, at_most: float = math.inf
) -> None:
    __tracebackhide__ = True
    is_number = isinstance(got, int | float) and not isinstance(got, bool) and math.isfinite(got)
    if not is_number or not (at_least <= got <= at_most and got > above):  # type: ignore[operator]
        bounds = [f"at least {at_least}"] * (at_least > -math.inf) + [f"above {above}"] * (above > -math.inf)
        bounds += [f"at most {at_most}"] * (at_most < math.inf)
        raise ValueError(f"{what} must be a finite number {' and '.join(bounds)}, got {got!r}")


SCALES: Mapping[str, Scale] = {
    "tiny": Scale(
        name="tiny",
        data="grammar",
        backbone=Untrained(architecture="bert", layers=2, hidden_size=64, attention_heads=4),
        student=Untrained(architecture="distilbert", layers=2, hidden_size=64, attention_heads=4),
        teacher=Phase(id="T-tune", role="backbone", epochs=3, learning_rate=1e-3, warmup_fraction=0.1),
        threads=1,
    ),
    "mini": Scale(
        name="mini",
        data="reviews",
        backbone=Pretrained(source="asset:encoder"),
        student=Pretrained(source="asset:encoder", layers=(2, 4, 6)),
        teacher=Phase(id="T-tune", role="backbone", epochs=2, learning_rate=1e-4, layer_decay=0.8, warmup_fraction=0.1),
    ),
    "thesis": Scale(
        name="thesis",
        data="glue",
        backbone=Pretrained(source="google-bert/bert-large-uncased"),
        student=Pretrained(source="distilbert/distilbert-base-uncased"),
        teacher=Pretrained(source="yoshitomo-matsubara/bert-large-uncased-sst2"),
    ),
}
