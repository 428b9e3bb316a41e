"""What happened: the record of a case, JSON both ways, and the store under ``outputs/``. Standard library only."""

import base64
import dataclasses
import functools
import json
import reprlib
import secrets
import time
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, repeat
from pathlib import Path
from typing import Any, Literal

from peftbench.phases import KD_MAX_LENGTH, Phase
from peftbench.sealed import lock, write_atomically

SCHEMA_VERSION = 4

_GROUPS = frozenset(
    ("dev", "test", "parameter_counts", "efficiency", "memory_use", "teacher_cost", "config.peft", "config.distillation")
)
"""Keys that hold keys of their own, unless they are null."""

MAX_RECORD_BYTES = 64 * 2**20
"""Of a file that is read; a record has some ten thousand."""

_LARGEST: Mapping[type, float] = {int: 2**63 - 1, float: 1e100}
"""Of a figure, either way: arrays hold it, and its square, which a spread and an axis need, is finite, too."""

_DEEPEST = 50
"""Mappings and lists inside each other, of which a record has some four; whatever reads a record need not fear more."""

_MEASURED = ("dev", "test", "parameter_counts", "train_runtime_seconds", "efficiency")
"""What a passed case has, whatever the phase."""

_ADDED: Mapping[int, Sequence[str]] = {
    2: ("skipped_steps", "memory_use", "teacher_checkpoint"),
    3: ("metrics_version", "dev_curve"),
    4: ("precision", "memory_before_bytes"),
}
"""The top-level keys that each version of the schema brought; in records of older ones they are null."""


class RecordError(ValueError):
    """A file is not a record that this version can read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitMetrics:
    """Quality on one split; fractions, F1 of the positive class, the interval by Wilson's score."""

    accuracy: float
    f1: float
    n: int
    accuracy_ci95: tuple[float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterCounts:
    """Scalars in the model, and how many of them an optimizer step may change."""

    total: int
    trainable: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Efficiency:
    """Dev accuracy (a fraction) per million trainable parameters and per minute of training; null if nothing trained."""

    accuracy_per_million_params: float | None
    accuracy_per_minute: float | None

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

    training_seconds: float
    logit_seconds: float
    cache: Literal["hit", "miss"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryUse:
    """
    How a batch went through the device.

    Attributes:
        examples_at_once: Together in one forward and backward pass; a step adds up the passes of its batch.
        times_out_of_memory: How often that number had to be lowered, or the next measure taken.
        gradient_checkpointing: Whether activations were computed a second time instead of kept.
    """

    examples_at_once: int
    times_out_of_memory: int = 0
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
        predicted: Base64 of the bits, the first example in the highest bit of the first byte.
        gold: The same for the labels.
    """

    split_fingerprint: str
    n: int
    predicted: str
    gold: str

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
        """Predicted and gold labels as the n bits of a whole number, the first example in the highest."""
        return _unpack_bits(self.predicted, self.n), _unpack_bits(self.gold, self.n)

    def correct(self) -> list[bool]:
        """Whether each example was predicted right, in the split's order."""
        predicted, gold = self.masks()
        return [bit == "0" for bit in f"{predicted ^ gold:0{self.n}b}"[: self.n]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """
    Everything that one case measured; see README for the meaning and unit of each key.

    A failed case has null where it did not get to measure.
    """

    run_id: str
    phase: str
    name: str
    scale: str
    seed: int
    outcome: Literal["passed", "failed"]
    fingerprint: str | None
    config: Mapping[str, Any]
    schema_version: int = SCHEMA_VERSION
    error: str | None = None
    checkpoint: str | None = None
    teacher_checkpoint: str | None = None
    dev: SplitMetrics | None = None
    test: SplitMetrics | None = None
    majority_accuracy: float | None = None
    metrics_version: int | None = None
    parameter_counts: ParameterCounts | None = None
    train_runtime_seconds: float | None = None
    evaluation_seconds: float | None = None
    efficiency: Efficiency | None = None
    kd_path: str | None = None
    samples_per_second: float | None = None
    tokens_per_second: float | None = None
    optimizer_steps: int | None = None
    skipped_steps: int | None = None
    memory_use: MemoryUse | None = None
    learning_curve: tuple[tuple[int, float], ...] = ()
    dev_curve: tuple[tuple[int, float, float], ...] | None = None
    peak_memory_bytes: int | None = None
    peak_memory_scope: str | None = None
    memory_before_bytes: int | None = None
    artifact_bytes: int | None = None
    latency_ms: float | None = None
    precision: str | None = None
    batching: str | None = None
    teacher_cost: TeacherCost | None = None
    data: Mapping[str, Any] = field(default_factory=dict)
    predictions: Mapping[str, Predictions] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    commit: Mapping[str, Any] = field(default_factory=dict)

    @property
    def phase_id(self) -> str:
        """As the study writes it: ``D-hybrid``."""
        return f"{self.phase}-{self.name}"

    @property
    def case(self) -> str:
        """File name of the record without its ending; unique within a run."""
        return f"{self.phase_id}-{self.scale}-s{self.seed}"

    def reaching(self, accuracy: float) -> tuple[int, float] | None:
        """Optimizer steps and seconds of training after which dev accuracy was first seen to be that high; None if it never was."""
        return next(((step, seconds) for step, seconds, reached in self.dev_curve or () if reached >= accuracy), None)

    def to_json(self) -> dict[str, Any]:
        """The record as JSON values."""
        text = json.dumps(dataclasses.asdict(self), allow_nan=False, ensure_ascii=False)
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
            elif isinstance(value, list):
                row.update({name: value} if name not in ("learning_curve", "dev_curve") else {})
            else:
                row.update({name: value} if value is not None or name not in _GROUPS else {})

        add("", {name: value for name, value in self.to_json().items() if name != "predictions"})
        return row

    @classmethod
    def from_json(cls, content: object) -> "Record":
        """
        Read what `to_json` gave.

        Raises:
            RecordError: If it is something else, naming the first key that is wrong.
        """
        if not isinstance(content, dict) or "schema_version" not in content or "outcome" not in content:
            raise RecordError("not a peftbench record: no schema_version and outcome at the top level")
        version = content["schema_version"]
        if type(version) is not int or not 1 <= version <= SCHEMA_VERSION:
            raise RecordError(f"schema_version must be 1 to {SCHEMA_VERSION}, got {version!r}; a newer peftbench may read it")
        later = {key: None for added, keys in _ADDED.items() if added > version for key in keys}
        try:
            record: Record = _reader(typing.cast(Any, cls))({**later, **content, "schema_version": SCHEMA_VERSION})
            _check(record)
        except _Misfit as misfit:
            raise RecordError(str(misfit)) from None
        return record


def read_record(path: Path) -> Record:
    """
    Read one record file.

    Raises:
        RecordError: If it cannot be read, is not JSON or not a record; the message names the file.
    """
    try:
        return Record.from_json(parse_json(path))
    except RecordError as error:
        raise RecordError(str(error) if str(error).startswith(str(path)) else f"{path}: {error}") from error


def parse_json(path: Path) -> object:
    """
    Read a JSON file that may be anything.

    Raises:
        RecordError: If it is too large, cannot be read, or is not JSON with finite numbers; the message names the file.
    """
    try:
        if (size := path.stat().st_size) > MAX_RECORD_BYTES:
            raise ValueError(f"{size} bytes are more than the {MAX_RECORD_BYTES} that a file of records may have")
        content: object = json.loads(path.read_bytes().decode("utf-8"), parse_constant=_refuse_constant)
    except RecursionError as error:
        raise RecordError(f"{path}: nested too deeply") from error
    except (OSError, ValueError) as error:
        raise RecordError(f"{path}: {error}") from error
    return content


def make_run_id() -> str:
    """An id that sorts by time, within a second, too, and does not collide.

    UTC to the second, five hexadecimal digits of its fraction (about a microsecond), three random ones.
    """
    seconds, nanoseconds = divmod(time.time_ns(), 10**9)
    fraction = (nanoseconds << 20) // 10**9
    return f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime(seconds))}-{fraction:05x}{secrets.token_hex(2)[:3]}"


@dataclass(frozen=True, slots=True)
class Store:
    """
    The only place that spells a path under ``outputs/``.

    Args:
        outputs: The folder that the user named.
        scale: Tiny runs live in a tree of their own, apart from real results.
    """

    outputs: Path
    scale: str

    @property
    def root(self) -> Path:
        """Where this scale's tree begins."""
        return self.outputs / "tiny" if self.scale == "tiny" else self.outputs

    @property
    def runs(self) -> Path:
        """Append-only history: a folder per run, a file per case."""
        return self.root / "runs"

    def report_path(self, letter: str) -> Path:
        """The latest result of a phase."""
        return self.root / "reports" / f"phase_{letter.lower()}_metrics.json"

    def kd_path(self, size: int, max_length: int = KD_MAX_LENGTH) -> Path:
        """A KD subset, saved with ``datasets``; one whose teacher saw texts of another length has that in its name."""
        return self.root / "kd" / (f"kd_{size}" if max_length == KD_MAX_LENGTH else f"kd_{size}_length_{max_length}")

    def cache_path(self, kind: Literal["teachers", "logits"], key: str) -> Path:
        """A content-keyed entry of the cache."""
        return self.root / "cache" / kind / key

    @property
    def assets(self) -> Path:
        """Fetched archives, unpacked; shared by all scales."""
        return self.outputs / "cache" / "assets"

    def check_writable(self) -> None:
        """
        Try to write before hours are spent.

        Raises:
            OSError: If the folder cannot be made or written, naming it and the option.
        """
        try:
            probe = self.root / f".writable-{secrets.token_hex(4)}"
            write_atomically(probe, "")
            probe.unlink()
        except OSError as error:
            raise OSError(
                f"cannot write to the outputs folder {self.root}: {error.strerror or error}; "
                "give a folder that can be written with --peft-outputs DIR"
            ) from error

    def record_path(self, record: Record) -> Path:
        """A case of a run."""
        return self.runs / record.run_id / f"{record.case}.json"

    def save(self, record: Record) -> Path:
        """
        Add a record to the history, whole or not at all.

        Raises:
            RecordError: If the run has a record of that case already; history is never replaced.
        """
        path = self.record_path(record)
        if path.exists():
            raise RecordError(
                f"{path} exists: {record.phase_id} with seed {record.seed} has run already in this run; "
                "if that was another phase, give one of them another id"
            )
        write_atomically(path, json.dumps(record.to_json(), indent=1) + "\n")
        return path

    def publish(self, letter: str, report: Callable[[], Mapping[str, Any]]) -> Path:
        """Replace the latest result of a phase; the report is made while no other process can publish an older one."""
        path = self.report_path(letter)
        with lock(path):
            write_atomically(path, json.dumps(report(), indent=1, allow_nan=False) + "\n")
        return path

    def records(self, run_id: str = "*") -> Iterator[Record | RecordError]:
        """The history, or one run of it, by run and case; a file that cannot be read comes as its error."""
        for path in sorted(self.runs.glob(f"{run_id}/*.json")):
            try:
                yield read_record(path)
            except RecordError as error:
                yield error


def phase_config(phase: Phase) -> dict[str, Any]:
    """Every hyperparameter of a phase as JSON values."""
    config: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(phase)))
    return {name: value for name, value in config.items() if name not in ("at_scale", "id")}


def _pack_bits(labels: Sequence[int]) -> str:
    if wrong := sorted({label for label in labels if label not in (0, 1)}):
        raise ValueError(f"labels must be 0 or 1, got {wrong[0]!r}")
    bits = "".join("1" if label else "0" for label in labels)
    padded = bits.ljust(-(-len(bits) // 8) * 8, "0")
    return base64.b64encode(bytes(int(padded[i : i + 8], 2) for i in range(0, len(padded), 8))).decode()


def _unpack_bits(packed: str, n: int) -> int:
    try:
        content = base64.b64decode(packed, validate=True)
    except ValueError:
        content = b""
    if n < 0 or len(content) != -(-n // 8):
        raise RecordError(f"{n} predictions must be the bits of {-(-n // 8)} bytes in base64, got {packed[:40]!r}")
    return int.from_bytes(content, "big") >> (8 * len(content) - n)


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


class _Misfit(Exception):  # noqa: N818 - an intermediate state of the message
    """A value that is not of its type: what is wrong with it, and the keys to it, the innermost first."""

    def __init__(self, problem: str, *keys: str | int) -> None:
        super().__init__(problem)
        self.problem = problem
        self.keys = list(keys)

    def __str__(self) -> str:
        keys = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in reversed(self.keys))
        return f"record{keys} {self.problem}"


Reader = Callable[[Any], Any]


def _check(record: Record) -> None:
    """What types alone do not say."""
    if record.outcome == "passed" and (missing := [name for name in _MEASURED if getattr(record, name) is None]):
        raise _Misfit(f"is of a case that passed, and has null for {', '.join(missing)}")
    for predictions in record.predictions.values():
        predictions.masks()
    for name, split in (("dev", record.dev), ("test", record.test)):
        if split and not (0 <= split.accuracy <= 1 and 0 <= split.f1 <= 1):
            raise _Misfit(f"must have fractions, got accuracy {split.accuracy!r} and f1 {split.f1!r}", name)
    if record.learning_curve and min(record.learning_curve)[0] < 1:
        raise _Misfit(f"must count its steps from 1, got {min(record.learning_curve)[0]}", "learning_curve")
    _read_parts(["data.sizes"], [_reader(Mapping[str, int])], [record.data.get("sizes", {})])


@functools.cache
def _reader(kind: Any) -> Reader:
    """What checks a JSON value against a type annotation and builds the dataclasses in it."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return _read_anything
    if origin is typing.Literal:
        return _reader_of_choice(args)
    if origin is types.UnionType:
        inner = _reader(next(a for a in args if a is not type(None)))
        return lambda value: None if value is None else inner(value)
    if dataclasses.is_dataclass(kind):
        return _reader_of_dataclass(kind)
    if origin is tuple:
        return _reader_of_list(args[0]) if args[-1] is Ellipsis else _reader_of_tuple(args)
    if origin is Mapping:
        return _reader_of_mapping(args[1])
    return _reader_of_plain(kind)


def _reader_of_choice(choices: Sequence[Any]) -> Reader:
    def read(value: Any) -> Any:
        if value not in choices:
            raise _Misfit(f"must be one of {', '.join(map(str, choices))}, got {reprlib.repr(value)}")
        return value

    return read


def _reader_of_dataclass(kind: Any) -> Reader:
    readers = {name: _reader(hint) for name, hint in typing.get_type_hints(kind).items()}

    def read(value: Any) -> Any:
        if not isinstance(value, dict):
            raise _misfit(kind, value)
        if missing := [name for name in readers if name not in value]:
            raise _Misfit(f"has no {', '.join(missing)}")
        return kind(**_read_parts(readers, readers.values(), map(value.__getitem__, readers)))

    return read


def _reader_of_list(kind: Any) -> Reader:
    reader, kinds = _reader(kind), typing.get_args(kind)

    def read(value: Any) -> Any:
        if not isinstance(value, list):
            raise _misfit(tuple, value)
        rows = _read_rows(value, kinds)
        return tuple(_read_parts(count(), repeat(reader), value).values()) if rows is None else rows

    return read


def _read_rows(rows: list[Any], kinds: Sequence[Any]) -> tuple[Any, ...] | None:
    """Rows of numbers, column by column, as curves are most of a record; None if anything is not as it should be."""
    try:
        columns = [_read_column(column, kind) for column, kind in zip(zip(*rows, strict=True), kinds, strict=True)]
    except (TypeError, ValueError, OverflowError):
        return None
    return tuple(zip(*columns, strict=True))


def _read_column(column: tuple[Any, ...], kind: Any) -> tuple[Any, ...]:
    found = set(map(type, column))
    if not found <= ({int, float} if kind is float else {kind}) or not sum(map(abs, column)) <= _LARGEST[kind]:
        raise ValueError
    return column if found == {kind} else tuple(map(float, column))


def _reader_of_tuple(kinds: Sequence[Any]) -> Reader:
    readers = [_reader(kind) for kind in kinds]

    def read(value: Any) -> Any:
        if not isinstance(value, list) or len(value) != len(readers):
            raise _misfit(tuple, value)
        return tuple(_read_parts(count(), readers, value).values())

    return read


def _reader_of_mapping(kind: Any) -> Reader:
    reader = _reader(kind)

    def read(value: Any) -> Any:
        if not isinstance(value, dict):
            raise _misfit(dict, value)
        return _read_parts(map(_read_text, value), repeat(reader), value.values())

    return read


def _reader_of_plain(kind: Any) -> Reader:
    def read(value: Any) -> Any:
        if type(value) is kind:
            return value
        raise _misfit(kind, value)

    return {str: _read_text, int: _read_int, float: _read_float}.get(kind, read)


def _read_text(value: Any) -> str:
    if type(value) is not str:
        raise _misfit(str, value)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise _Misfit(f"must be text that UTF-8 can hold, got {reprlib.repr(value)}") from None
    return value


def _read_int(value: Any) -> Any:
    if type(value) is not int:
        raise _misfit(int, value)
    return _read_number(value)


def _read_float(value: Any) -> float:
    if type(value) is not float and type(value) is not int:
        raise _misfit(float, value)
    return float(_read_number(value))


def _read_number(value: Any) -> Any:
    if not abs(value) <= (largest := _LARGEST[type(value)]):  # and NaN is not, either
        raise _Misfit(f"must be a number within {largest:g} of zero, got {reprlib.repr(value)}")
    return value


def _read_anything(value: Any, depth: int = 0) -> Any:
    kind = type(value)
    if kind is str:
        return _read_text(value)
    if kind is int or kind is float:
        return _read_number(value)
    if kind is not dict and kind is not list:
        return value
    if depth == _DEEPEST:
        raise _Misfit("is nested too deeply")
    reader = functools.partial(_read_anything, depth=depth + 1)
    if kind is dict:
        return _read_parts(map(_read_text, value), repeat(reader), value.values())
    return list(_read_parts(count(), repeat(reader), value).values())


def _read_parts(keys: Iterable[Any], readers: Iterable[Reader], values: Iterable[Any]) -> dict[Any, Any]:
    """Each key's value as its reader gives it; a misfit learns which key it stands at."""
    read = {}
    for key, reader, value in zip(keys, readers, values, strict=False):  # the count of a list's items has no end
        try:
            read[key] = reader(value)
        except _Misfit as misfit:
            misfit.keys.append(key)
            raise
    return read


def _misfit(kind: Any, value: Any) -> _Misfit:
    return _Misfit(f"must be {kind.__name__}, got {reprlib.repr(value)}")
