"""The teacher's logits: computed once, cached by content, checked at use; and the loss that learns from them."""

import time
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from peftbench.data import DataError, Split
from peftbench.phases import Distillation
from peftbench.sealed import CorruptError, building, file_sha256, fingerprint, lock, unseal

TEACHER_MODULES = (
    *("attention", "device", "distill", "dropout", "graphs", "kernels", "layers"),
    *("models", "packing", "memory", "parameters", "training", "workbench"),
)
_PACKAGES = ("torch", "numpy", "transformers", "tokenizers")
CODE_VERSION = fingerprint(
    [*(file_sha256(Path(__file__).with_name(f"{name}.py")) for name in TEACHER_MODULES), *(version(name) for name in _PACKAGES)]
)
"""Version of the code that decides what a teacher learns and says; a part of every cache key."""

LOGIT_BLOCK = 500
"""
Examples to a cache entry. Subsets are beginnings of one draw, computed in whole blocks, so they share the entries, and the
logits of an example do not depend on which subset it is in or which was asked for first.
"""


def whole_blocks(size: int, there: int) -> int:
    """How many examples are answered and cached where so many of those there are asked for."""
    return min(there, -(-size // LOGIT_BLOCK) * LOGIT_BLOCK)


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherKey:
    """
    All that decides a teacher's logits, besides the text.

    Attributes:
        weights: Fingerprint of the files that the teacher is loaded from.
        tokenizer: Fingerprint of how it splits texts.
        max_length: Tokens kept of a text.
        precision: ``fp32``, ``bf16`` or ``fp16``.
        device_kind: ``cpu`` or ``cuda``.
    """

    weights: str
    tokenizer: str
    max_length: int
    precision: str
    device_kind: str

    def for_examples(self, examples: Split) -> str:
        """The cache key of these examples' logits."""
        return fingerprint([*astuple(self), CODE_VERSION, list(examples.ids), list(examples.sentences)])


@dataclass(frozen=True, kw_only=True)
class TeacherLogits:
    """
    Logits for examples of a fixed order.

    Attributes:
        values: Shape (N, 2), fp32.
        seconds: What loading the teacher, tokenizing and computing them took when they were first computed.
        hit: Whether all of them came from the cache.
    """

    examples: Split
    values: Tensor
    seconds: float
    hit: bool

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of examples and values."""
        return fingerprint([self.examples.fingerprint, self.values.tolist()])

    def take_first(self, size: int) -> "TeacherLogits":
        """The beginning."""
        return replace(self, examples=self.examples.take(range(size)), values=self.values[:size])

    def align(self, examples: Split) -> Tensor:
        """
        The logits of these examples, found by id and checked against the text.

        Returns:
            Shape (len(examples), 2).

        Raises:
            DataError: If an example has no logits, or had another text when they were computed.
        """
        row_of = {example_id: row for row, example_id in enumerate(self.examples.ids)}
        rows = []
        for example_id, sentence in zip(examples.ids, examples.sentences, strict=True):
            row = row_of.get(example_id)
            if row is None:
                raise DataError(f"there are no teacher's logits for id {example_id} ({sentence[:60]!r}); delete the KD subset")
            if self.examples.sentences[row] != sentence:
                raise DataError(
                    f"the teacher's logits of example {example_id} were computed for {self.examples.sentences[row][:60]!r}, "
                    f"but the data say {sentence[:60]!r}; delete the KD subset to have it made again"
                )
            rows.append(row)
        return self.values[rows]


def cached_logits(
    examples: Split, key: TeacherKey, cache: Callable[[str], Path], compute: Callable[[Split], Tensor]
) -> TeacherLogits:
    """
    The teacher's logits for the examples, block by block from the cache or computed and put there.

    Args:
        examples: A beginning of the fixed draw; its blocks are the units of the cache.
        key: What identifies the teacher.
        cache: Gives the folder of a cache key.
        compute: Logits, shape (n, 2), of a block, only called on a miss.

    Raises:
        CorruptError: If a cache entry is not what was written.
    """
    values, seconds, hit = [], 0.0, True
    for start in range(0, len(examples), LOGIT_BLOCK):
        block = examples.take(range(start, min(start + LOGIT_BLOCK, len(examples))))
        folder = cache(key.for_examples(block))
        with lock(folder):
            facts = unseal(folder)
            if facts is None:
                hit = False
                began = time.perf_counter()
                logits = compute(block).float().contiguous()
                facts = {"seconds": time.perf_counter() - began, "examples": len(block)}
                with building(folder, facts) as target:
                    save_file({"logits": logits}, target / "logits.safetensors")
            values.append(load_file(folder / "logits.safetensors")["logits"])
            seconds += float(facts["seconds"])
    return TeacherLogits(examples=examples, values=torch.cat(values), seconds=seconds, hit=hit)


def publish_subset(logits: TeacherLogits, path: Path) -> Path:
    """
    Write a KD subset as a `datasets` folder (sentence, label, idx, teacher_logits), replacing another one as a whole.

    The same subset gives the same bytes.
    """
    key = logits.fingerprint
    with lock(path):
        facts = unseal(path)
        if facts is None or facts.get("key") != key:
            import pyarrow as pa
            from datasets import Dataset, Features, List, Value

            features = Features(
                {
                    "sentence": Value("string"),
                    "label": Value("int64"),
                    "idx": Value("int64"),
                    "teacher_logits": List(Value("float32")),
                }
            )
            columns = {
                "sentence": list(logits.examples.sentences),
                "label": list(logits.examples.labels),
                "idx": list(logits.examples.ids),
                "teacher_logits": logits.values.tolist(),
            }
            table = pa.Table.from_pydict(columns, schema=features.arrow_schema)
            with building(path, {"key": key}) as target:
                Dataset(table, fingerprint=key[:16]).save_to_disk(target)
    return path


def read_subset(path: Path, key: str | None = None) -> TeacherLogits:
    """
    Read a KD subset back.

    Args:
        key: Fingerprint of the logits that must be there; None takes any.

    Raises:
        CorruptError: If the folder is missing, not what was written, or another session has put other logits there.
    """
    from datasets import load_from_disk

    with lock(path):
        facts = unseal(path)
        if facts is None:
            raise CorruptError(f"there is no KD subset at {path}; run the case again to have it made")
        if key not in (None, facts.get("key")):
            raise CorruptError(f"{path} holds another teacher's logits, from a session beside this one; run the case again")
        columns = load_from_disk(path, keep_in_memory=True)[:]
    examples = Split(name="train", ids=tuple(columns["idx"]), sentences=tuple(columns["sentence"]), labels=tuple(columns["label"]))
    return TeacherLogits(examples=examples, values=torch.tensor(columns["teacher_logits"]), seconds=0.0, hit=True)


def distillation_loss(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """
    KL divergence from the softened teacher to the softened student, times temperature squared.

    The square keeps gradients on the scale of the hard-label loss (Hinton et al. 2015, arXiv:1503.02531, section 2).

    Args:
        student: Logits, shape (B, C).
        teacher: Logits, shape (B, C); no gradient flows into them.

    Returns:
        Mean over the batch in nats, shape (); 0 where the two agree.

    Raises:
        ValueError: If the shapes differ or temperature is not positive.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"student and teacher logits must have one shape, got {tuple(student.shape)} and {tuple(teacher.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature!r}")
    student_log = F.log_softmax(student / temperature, dim=-1)
    teacher_log = F.log_softmax(teacher.detach() / temperature, dim=-1)
    return temperature**2 * F.kl_div(student_log, teacher_log, reduction="batchmean", log_target=True)


def kd_loss(student: Tensor, teacher: Tensor, labels: Tensor, distillation: Distillation) -> Tensor:
    """
    The weighted sum of `distillation_loss` and cross-entropy.

    Args:
        student: Logits, shape (B, C).
        teacher: Logits, shape (B, C).
        labels: Shape (B,).

    Returns:
        Shape ().
    """
    soft = distillation_loss(student, teacher, temperature=distillation.temperature)
    return distillation.alpha * soft + (1 - distillation.alpha) * F.cross_entropy(student, labels)
