"""What happened: the record of a case, as JSON and back."""

import base64
import dataclasses
import gc
import json
import os
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import msgspec

from peftbench.errors import PeftbenchError
from peftbench.phases import Phase

SCHEMA_VERSION = 6

_GROUPS = frozenset(
    (
        *("dev", "test", "parameter_counts", "efficiency", "memory_use", "teacher_cost"),
        *("config.peft", "config.distillation", "config.teacher.peft", "config.teacher.distillation"),
    )
)
"""Keys that hold keys of their own, unless they are null."""

_SERIES = frozenset(("predictions", "learning_curve", "dev_curve"))
"""Keys that no row has room for."""

PEAK_SINCE_START = "process resident set since its start"
"""The scope of peak memory where the system does not forget the peaks of earlier cases."""

LONG_WAIT = 0.2
"""Share of the time that threads waited for a processor; above it, times are compared only with others above it."""

MAX_RECORD_BYTES = 64 * 2**20
"""Largest file that is read; a record has some ten thousand bytes."""

Outcome = Literal["passed", "failed"]
CacheUse = Literal["hit", "miss"]

Whole = Annotated[int, msgspec.Meta(ge=1 - 2**63, le=2**63 - 1)]
"""What fits 64 bits, as in arrays."""

Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]

Step = Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]
"""Optimizer step, counted from 1."""

Fraction = Annotated[float, msgspec.Meta(ge=0, le=1)]

Figure = Annotated[float, msgspec.Meta(ge=-1e100, le=1e100)]
"""A number whose square, which a spread and an axis need, is finite, too."""

Amount = Annotated[float, msgspec.Meta(ge=0, le=1e100)]
"""The same of what cannot be negative: time, memory, rates."""

_DEEPEST = 50
"""Deepest nesting that is accepted; a record has some four levels."""

_MEASURED = ("dev", "test", "parameter_counts", "train_runtime_seconds", "efficiency")
"""What a passed case has, whatever the phase."""

_OPEN = ("config", "data", "machine", "commit")
"""Mappings of values of any kind."""

_read_open = attrgetter(*_OPEN)
_read_measured = attrgetter(*_MEASURED)


class RecordError(PeftbenchError, ValueError):
    """A file is not a record that this version can read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitMetrics:
    """Quality on one split; fractions, F1 of the positive class, the interval by Wilson's score."""

    accuracy: Fraction
    f1: Fraction
    n: Count
    accuracy_ci95: tuple[Figure, Figure]


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterCounts:
    """Scalars in the model, and how many of them an optimizer step may change."""

    total: Count
    trainable: Count


@dataclass(frozen=True, kw_only=True, slots=True)
class Efficiency:
    """Dev accuracy (a fraction) per million trainable parameters and per minute of training; null if nothing trained."""

    accuracy_per_million_params: Amount | None
    accuracy_per_minute: Amount | None

    @classmethod
    def from_costs(cls, *, accuracy: float, trainable: int, seconds: float) -> "Efficiency":
        """Divide the dev accuracy by what it cost."""
        return cls(
            accuracy_per_million_params=accuracy / (trainable / 1e6) if trainable else None,
            accuracy_per_minute=accuracy / (seconds / 60) if trainable and seconds > 0 else None,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherCost:
    """
    What the teacher cost whoever first needed it: tuning, and computing the logits that this case learned from.

    ``cache`` is ``hit`` where this case found both on disk; the seconds are those of the first time in either case.
    """

    training_seconds: Amount
    logit_seconds: Amount
    cache: CacheUse


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryUse:
    """
    How a batch went through the device.

    Attributes:
        examples_at_once: Together in one forward and backward pass; a step adds up the passes of its batch.
        times_out_of_memory: How often CUDA graphs had to be given up, that number to be lowered, or the next measure to be taken.
        gradient_checkpointing: Whether activations were computed a second time instead of kept.
    """

    examples_at_once: Count
    times_out_of_memory: Count = 0
    gradient_checkpointing: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """
    What one phase will need.

    Attributes:
        steps: Optimizer steps; 0 for a phase that only evaluates.
        tokens: That go through the model in training, over all epochs.
        training_flops: Multiplications and additions of the matrix products of training, forward and backward.
        other_flops: The same for evaluation on dev and test, and for the teacher's logits that the phase learns from.
        weight_bytes: Weights, their 16-bit copies, gradients and AdamW's state.
        activation_bytes: Kept for the backward pass of the longest batch, as many examples at once as fit.
        fixed_seconds: What the steps take besides their matrix products, however small these are.
    """

    phase: str
    parameters: int
    trainable: int
    examples: int
    steps: int
    tokens: int
    training_flops: float
    other_flops: float
    examples_at_once: int
    weight_bytes: int
    activation_bytes: int
    fixed_seconds: float

    @property
    def memory_bytes(self) -> int:
        """Weights and activations together."""
        return self.weight_bytes + self.activation_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Predictions:
    """
    Predicted and gold labels of a split, one bit an example each, so that two records can be compared in pairs.

    Attributes:
        split_fingerprint: Of the split's ids, texts and labels; only equal ones may be paired.
        predicted: The first example in the highest bit of the first byte; base64 in JSON.
        gold: The same for the labels.
    """

    split_fingerprint: str
    n: Count
    predicted: bytes
    gold: bytes

    @classmethod
    def from_labels(cls, predicted: Sequence[int], gold: Sequence[int], split_fingerprint: str) -> "Predictions":
        """
        Pack labels in {0, 1}, in the split's order.

        Raises:
            ValueError: If there is not one prediction a label, or one is neither 0 nor 1.
        """
        if len(predicted) != len(gold):
            raise ValueError(f"there must be one prediction a label, got {len(predicted)} for {len(gold)}")
        return cls(split_fingerprint=split_fingerprint, n=len(gold), predicted=_pack_bits(predicted), gold=_pack_bits(gold))

    def masks(self) -> tuple[int, int]:
        """Gold and predicted labels as the n bits of a whole number, the first example in the highest."""
        fillers = -self.n % 8
        return int.from_bytes(self.gold, "big") >> fillers, int.from_bytes(self.predicted, "big") >> fillers


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """
    Everything that one case measured; see docs/record.md for the meaning and unit of each key.

    Keys that a failed case did not reach are null.
    """

    schema_version: Count
    run_id: str
    phase: str
    name: str
    scale: str
    seed: Whole
    outcome: Outcome
    fingerprint: str | None
    config: Mapping[str, Any]
    learning_curve: tuple[tuple[Step, Figure], ...]
    data: Mapping[str, Any]
    predictions: Mapping[str, Predictions]
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    commit: Mapping[str, Any]
    error: str | None = None
    checkpoint: str | None = None
    teacher_checkpoint: str | None = None
    dev: SplitMetrics | None = None
    test: SplitMetrics | None = None
    majority_accuracy: Fraction | None = None
    metrics_version: Count | None = None
    parameter_counts: ParameterCounts | None = None
    train_runtime_seconds: Amount | None = None
    evaluation_seconds: Amount | None = None
    efficiency: Efficiency | None = None
    kd_path: str | None = None
    samples_per_second: Amount | None = None
    tokens_per_second: Amount | None = None
    optimizer_steps: Count | None = None
    skipped_steps: Count | None = None
    replayed_steps: Count | None = None
    memory_use: MemoryUse | None = None
    dev_curve: tuple[tuple[Step, Amount, Fraction], ...] | None = None
    peak_memory_bytes: Count | None = None
    peak_memory_scope: str | None = None
    memory_before_bytes: Count | None = None
    processor_wait_fraction: Amount | None = None
    artifact_bytes: Count | None = None
    latency_ms: Amount | None = None
    precision: str | None = None
    batching: str | None = None
    teacher_cost: TeacherCost | None = None

    @property
    def phase_id(self) -> str:
        """As the study writes it: ``D-hybrid``."""
        return f"{self.phase}-{self.name}"

    @property
    def case(self) -> str:
        """File name of the record without its ending; unique within a run."""
        return case_name(self.phase_id, self.scale, self.seed)

    @property
    def measured(self) -> bool:
        """Whether it has figures: of a case that passed, or one that its test then found wanting."""
        return self.outcome == "passed" or None not in _read_measured(self)

    @property
    def interrupted(self) -> bool:
        """Whether somebody ended the session meanwhile, which tells nothing of the phase."""
        return self.outcome == "failed" and (self.error or "").partition(":")[0] in ("KeyboardInterrupt", "Exit")

    @property
    def waited(self) -> bool:
        """Whether the case's threads waited for a processor more than `LONG_WAIT` of their time, so that times say little."""
        return (self.processor_wait_fraction or 0.0) > LONG_WAIT

    @property
    def reason(self) -> str:
        """The first line of the error of a case that failed."""
        return next(iter((self.error or "").splitlines()), "no reason recorded")

    def look_up(self, place: str) -> Any:
        """The value at a dotted path, such as ``dev.accuracy``; None where a part of the path is null."""
        value: Any = self
        for name in place.split("."):
            value = None if value is None else getattr(value, name)
        return value

    @property
    def examples(self) -> tuple[tuple[str, str], ...]:
        """What was predicted: the splits by name, each with its fingerprint."""
        return tuple([(split, self.predictions[split].split_fingerprint) for split in sorted(self.predictions)])

    def labels(self, splits: Iterable[str]) -> tuple[int, int, int]:
        """How many examples the splits have, and their gold and predicted labels, end to end, as the bits of whole numbers."""
        n, gold, predicted = 0, 0, 0
        for split in splits:
            if (one := self.predictions.get(split)) is not None:
                of_gold, of_predictions = one.masks()
                n, gold, predicted = n + one.n, gold << one.n | of_gold, predicted << one.n | of_predictions
        return n, gold, predicted

    def reaching(self, accuracy: float) -> tuple[int, float] | None:
        """Optimizer steps and seconds of training after which dev accuracy was first seen to be that high; None if it never was."""
        return next(((step, seconds) for step, seconds, reached in self.dev_curve or () if reached >= accuracy), None)

    def to_json(self) -> dict[str, Any]:
        """The record as JSON values."""
        text = json.dumps(dataclasses.asdict(self), allow_nan=False, ensure_ascii=False, default=_encode_bytes)
        # An error may quote a path that is not UTF-8; half a character in it would keep the record from being read.
        content: dict[str, Any] = json.loads(text.encode("utf-8", "replace"))
        return content

    def to_row(self) -> dict[str, Any]:
        """
        The record's single values by their dotted path, after the phase's id and the case, for a table.

        Left out are predictions, curves, and groups that the case has nothing in, such as a teacher's cost.
        """
        row: dict[str, Any] = {"id": self.phase_id, "case": self.case}

        def add(name: str, value: Any) -> None:
            if isinstance(value, dict):
                for key, item in value.items():
                    add(f"{name}.{key}" if name else key, item)
            elif value is not None or name not in _GROUPS:
                row[name] = value

        add("", {name: value for name, value in self.to_json().items() if name not in _SERIES})
        return row

    @classmethod
    def from_json(cls, content: object) -> "Record":
        """
        Read what `to_json` gave, as `decode_json` gives it.

        A key that is null unless told may be left out, as older schemas have not all of them.

        Raises:
            RecordError: If it is something else, naming the first key that is wrong.
        """
        if not isinstance(content, dict) or "schema_version" not in content or "outcome" not in content:
            raise RecordError("not a peftbench record: no schema_version and outcome at the top level")
        version = content["schema_version"]
        if type(version) is not int or not 1 <= version <= SCHEMA_VERSION:
            raise RecordError(f"schema_version must be 1 to {SCHEMA_VERSION}, got {version!r}; a newer peftbench may read it")
        try:
            record = msgspec.convert(content, cls)
        except msgspec.ValidationError as error:
            raise RecordError(_explain(error, content, cls)) from None
        except RecursionError as error:
            raise RecordError("record is nested too deeply") from error
        return _checked(record)


_DECODER = msgspec.json.Decoder(Record)
_SIZES = dict[str, Count]


def read_record(path: Path) -> Record:
    """
    Read one record file.

    Raises:
        RecordError: If it cannot be read, is not JSON or not a record; the message names the file.
    """
    try:
        return decode_record(read_content(path))
    except RecordError as error:
        raise RecordError(f"{path}: {error}") from error


def decode_record(content: bytes) -> Record:
    """
    Read the content of a record file.

    Raises:
        RecordError: If it is not JSON or not a record.
    """
    try:
        record = _DECODER.decode(content)
        if 1 <= record.schema_version <= SCHEMA_VERSION:
            return _checked(record)
    except msgspec.ValidationError as error:
        if "out of range" in str(error):  # no number of Python's, and so no content to look it up in
            raise RecordError(_explain(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    return Record.from_json(decode_json(content))  # which is slower, and says what was got


def decode_json(content: bytes) -> object:
    """
    Read JSON that may be anything.

    Raises:
        RecordError: If it is not JSON with finite numbers.
    """
    try:
        return msgspec.json.decode(content)
    except RecursionError as error:
        raise RecordError("nested too deeply") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        place = re.search(r"\(byte (\d+)\)", str(error))
        near = content[int(place[1]) :][:20].decode("utf-8", "replace") if place else ""
        raise RecordError(f"not JSON as a run writes it: {error}{near and f': {near!r}'}") from error


def read_content(path: Path) -> bytes:
    """
    Read a file that should hold records.

    Raises:
        RecordError: If it is too large or cannot be read.
    """
    try:
        with path.open("rb", buffering=0) as file:
            if (size := os.fstat(file.fileno()).st_size) > MAX_RECORD_BYTES:
                raise RecordError(f"{size} bytes are more than the {MAX_RECORD_BYTES} that a file of records may have")
            return file.readall()
    except OSError as error:
        raise RecordError(error.strerror or str(error)) from error


@contextmanager
def uncollected() -> Iterator[None]:
    """Pause garbage collection: reading thousands of records would spend a quarter of its time there, and free nothing."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def case_name(phase_id: str, scale: str, seed: int) -> str:
    """What a case's file in a run's folder is called, without its ending."""
    return f"{phase_id}-{scale}-s{seed}"


def describe_error(error: BaseException) -> str:
    """Its type and message, as a record has them."""
    try:
        message = str(error)
    except Exception:
        message = "str() of it failed"
    return ": ".join(filter(None, (type(error).__name__, message)))[:2000]


def phase_config(phase: Phase) -> dict[str, Any]:
    """Every hyperparameter of a phase as JSON values."""
    config: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(phase)))
    return {name: value for name, value in config.items() if name not in ("at_scale", "id")}


def _encode_bytes(value: object) -> str:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    raise TypeError(f"{value!r} is nothing that JSON has")


def _pack_bits(labels: Sequence[int]) -> bytes:
    if wrong := sorted({label for label in labels if label not in (0, 1)}):
        raise ValueError(f"labels must be 0 or 1, got {wrong[0]!r}")
    n, bits = len(labels), "".join("1" if label else "0" for label in labels)
    return (int(bits or "0", 2) << -n % 8).to_bytes(-(-n // 8), "big")


def _checked(record: Record) -> Record:
    """
    The record, where all is well that types alone do not say.

    Raises:
        RecordError: Where it is not.
    """
    if record.outcome == "passed" and None in _read_measured(record):
        missing = [name for name in _MEASURED if getattr(record, name) is None]
        raise RecordError(f"record is of a case that passed, but has null for {', '.join(missing)}")
    for predictions in record.predictions.values():
        if not len(predictions.predicted) == len(predictions.gold) == -(-predictions.n // 8):
            raise RecordError(
                f"{predictions.n} predictions must be the bits of {-(-predictions.n // 8)} bytes, got "
                f"{len(predictions.predicted)} predicted and {len(predictions.gold)} gold ones"
            )
    for name, mapping in zip(_OPEN, _read_open(record), strict=True):
        if problem := _misfit_in(mapping, _DEEPEST):
            raise RecordError(f"record.{name} {problem}")
    try:
        msgspec.convert(record.data.get("sizes", {}), _SIZES)
    except msgspec.ValidationError as error:
        raise RecordError(_explain(error, record.data["sizes"], _SIZES, "data.sizes")) from None
    return record if record.schema_version == SCHEMA_VERSION else dataclasses.replace(record, schema_version=SCHEMA_VERSION)


def _misfit_in(values: Any, levels: int) -> str | None:
    """What is wrong with a mapping or list that may hold anything; None if nothing is."""
    for value in values.values() if type(values) is dict else values:
        kind = type(value)
        if (kind is int and not -(2**63) < value < 2**63) or (kind is float and not -1e100 <= value <= 1e100):
            return f"must have numbers within 2^63 and 1e100 of zero, got {reprlib.repr(value)}"
        if kind is dict or kind is list:
            if levels == 1:
                return "is nested too deeply"
            if problem := _misfit_in(value, levels - 1):
                return problem
    return None


def _explain(error: msgspec.ValidationError, content: Any = None, kind: Any = None, where: str = "") -> str:
    """What is wrong at which key, and what is there, where the content is at hand that is not of the kind."""
    problem, _, path = str(error).partition(" - at `$")
    path = path.removesuffix("`")
    keys = re.findall(r"\w+|\.\.\.", path)
    if choices := {"outcome": get_args(Outcome), "cache": get_args(CacheUse)}.get(keys[-1] if keys else ""):
        problem += f", wanted {' or '.join(choices)}"
    if content is not None:
        for i, key in enumerate(keys):
            if key == "...":  # so msgspec writes any key of a mapping
                mapping = get_type_hints(kind, include_extras=True)[keys[0]] if i else kind
                key = next(key for key, value in content.items() if not _fits({key: value}, mapping))
                path = path.replace("[...]", f".{key}", 1)
            content = content[key] if isinstance(content, dict) else content[int(key)]
        if "missing" not in problem:
            path += f" is {reprlib.repr(content)}"
    return f"record{where and '.'}{where}{path}: {problem}"


def _fits(content: object, kind: Any) -> bool:
    try:
        msgspec.convert(content, kind)
    except msgspec.ValidationError:
        return False
    return True
