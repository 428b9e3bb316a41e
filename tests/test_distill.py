"""Teacher logits are computed once and found again; the loss is Hinton's."""

import ast
import dataclasses
import hashlib
import math
from pathlib import Path

import pytest
import torch
from datasets import load_from_disk
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch.nn import functional as F

from peftbench import distill
from peftbench.data import DataError, Split, draw
from peftbench.distill import (
    LOGIT_BLOCK,
    TeacherKey,
    TeacherLogits,
    cached_logits,
    distillation_loss,
    kd_loss,
    publish_subset,
    read_subset,
)
from peftbench.phases import Distillation
from peftbench.sealed import CorruptError

KEY = TeacherKey(weights="w", tokenizer="t", max_length=96, precision="fp32", device_kind="cpu")

IN_THE_KEY = {"assets", "data", "hub", "phases", "sealed", "records", "store"}
"""Modules that the workbench needs for what is in a cache key by itself, such as weights, texts and recipe, or for the disk."""

MEASURING = {"errors", "heap", "intervals", "measure"}

logit_pairs = st.tuples(st.integers(1, 6), st.integers(2, 4)).flatmap(
    lambda shape: st.tuples(*[hnp.arrays("float64", shape, elements=st.floats(-10, 10))] * 2)
)
temperatures = st.floats(0.5, 8)


def examples_of(n):
    return Split(
        name="train", ids=tuple(range(n)), sentences=tuple(f"sentence {i}" for i in range(n)), labels=tuple(i % 2 for i in range(n))
    )


def logits_of(examples):
    """Two numbers that belong to a sentence whatever else is in its block."""
    numbers = [int(hashlib.sha256(sentence.encode()).hexdigest()[:6], 16) / 2**20 for sentence in examples.sentences]
    return torch.tensor([[number, -number / 3] for number in numbers])


class Oracle:
    """A teacher that remembers which blocks it was asked for."""

    def __init__(self):
        self.blocks = []

    def __call__(self, examples):
        self.blocks.append(examples.ids)
        return logits_of(examples)


@pytest.fixture
def oracle():
    return Oracle()


@pytest.fixture
def cache(tmp_path):
    return lambda key: tmp_path / "logits" / key


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@settings(max_examples=30, deadline=None)
@given(logits=logit_pairs, temperature=temperatures)
def test_loss_and_gradient_are_zero_where_the_two_agree(logits, temperature):
    """Also where they agree up to a constant, which softmax does not see."""
    teacher = torch.tensor(logits[0])
    student = (teacher + 1.5).requires_grad_()
    loss = distillation_loss(student, teacher, temperature=temperature)
    loss.backward()
    assert 0 == pytest.approx(loss.item(), abs=1e-9)
    torch.testing.assert_close(student.grad, torch.zeros_like(teacher), rtol=0, atol=1e-9)


def test_loss_by_hand():
    """T 2, teacher (3/4, 1/4) and student (1/2, 1/2) once softened: 4 · (3/4 · ln 3/2 + 1/4 · ln 1/2)."""
    teacher, student = torch.tensor([[2 * math.log(3), 0.0]]), torch.zeros(1, 2)
    expected = 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert 0.5232481437645479 == pytest.approx(expected, rel=1e-12)
    assert expected == pytest.approx(distillation_loss(student, teacher, temperature=2).item(), rel=1e-6)


@settings(max_examples=50, deadline=None)
@given(logits=logit_pairs, temperature=temperatures)
def test_loss_is_torch_s_divergence_of_softened_probabilities(logits, temperature):
    """F.kl_div on probabilities, row by row, averaged over the batch, times the square of the temperature; never negative."""
    student, teacher = map(torch.tensor, logits)
    rows = [
        F.kl_div((s / temperature).log_softmax(-1), (t / temperature).softmax(-1), reduction="sum")
        for s, t in zip(student, teacher, strict=True)
    ]
    actual = distillation_loss(student, teacher, temperature=temperature)
    torch.testing.assert_close(actual, temperature**2 * torch.stack(rows).mean(), rtol=1e-9, atol=1e-9)
    assert -1e-9 <= actual.item()


@settings(max_examples=50, deadline=None)
@given(logits=logit_pairs, temperature=temperatures)
def test_gradient_is_temperature_times_difference_of_probabilities(logits, temperature):
    """T · (student - teacher) / B, so that its scale does not fall with the square of the temperature; none reaches the teacher."""
    student, teacher = (torch.tensor(values).requires_grad_() for values in logits)
    distillation_loss(student, teacher, temperature=temperature).backward()
    difference = (student / temperature).softmax(-1) - (teacher / temperature).softmax(-1)
    torch.testing.assert_close(student.grad, (temperature * difference / len(student)).detach(), rtol=1e-9, atol=1e-12)
    assert teacher.grad is None


def test_gradient_of_high_temperature_is_that_of_squared_logit_difference():
    """In the limit the gradient is (student - teacher) / C for centred logits (Hinton et al. 2015, section 2.1)."""
    student, teacher = torch.tensor([[1.0, -1.0]], dtype=torch.float64), torch.tensor([[-0.5, 0.5]], dtype=torch.float64)
    student.requires_grad_()
    distillation_loss(student, teacher, temperature=1e4).backward()
    torch.testing.assert_close(student.grad, torch.tensor([[0.75, -0.75]], dtype=torch.float64), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("student", "teacher", "temperature", "message"),
    [
        ((2, 2), (3, 2), 2.0, r"must have one shape, got \(2, 2\) and \(3, 2\)"),
        ((1, 2), (2,), 2.0, r"must have one shape, got \(1, 2\) and \(2,\)"),
        ((2, 2), (2, 2), 0.0, "temperature must be positive, got 0.0"),
        ((2, 2), (2, 2), -1.0, "temperature must be positive, got -1.0"),
        ((2, 2), (2, 2), math.nan, "temperature must be positive, got nan"),
    ],
)
def test_loss_refuses_what_has_no_meaning(student, teacher, temperature, message):
    """Shapes that would broadcast and temperatures that are not positive."""
    with pytest.raises(ValueError, match=message):
        distillation_loss(torch.zeros(student), torch.zeros(teacher), temperature=temperature)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.7, 1.0])
def test_kd_loss_weighs_teacher_and_labels(alpha):
    """Alpha of the teacher's part and the rest of cross-entropy; the ends are one of them alone."""
    teacher, student, labels = torch.tensor([[2 * math.log(3), 0.0]]), torch.zeros(1, 2), torch.tensor([1])
    by_hand = alpha * 0.5232481437645479 + (1 - alpha) * math.log(2)
    reference = alpha * 4 * F.kl_div((student / 2).log_softmax(-1), (teacher / 2).softmax(-1), reduction="batchmean")
    reference = reference + (1 - alpha) * F.cross_entropy(student, labels)
    actual = kd_loss(student, teacher, labels, Distillation(alpha=alpha, temperature=2.0))
    assert by_hand == pytest.approx(actual.item(), rel=1e-6)
    torch.testing.assert_close(actual, reference)


def test_logits_are_computed_once(oracle, cache):
    """The second request finds them, says so, and reports what the first one took."""
    first = cached_logits(examples_of(30), KEY, cache, oracle)
    second = cached_logits(examples_of(30), KEY, cache, oracle)
    assert [tuple(range(30))] == oracle.blocks
    assert [False, True] == [first.hit, second.hit]
    assert first.seconds == second.seconds
    assert torch.equal(first.values, second.values)


def test_logits_are_in_the_order_of_the_examples(oracle, cache):
    """Also over several blocks and in an order that is not sorted."""
    examples = draw(examples_of(1300), 1200)
    logits = cached_logits(examples, KEY, cache, oracle)
    assert examples == logits.examples
    torch.testing.assert_close(logits.values, logits_of(examples))


@pytest.mark.parametrize(("sizes", "blocks"), [((1000, 500), 2), ((500, 1000), 2), ((750, 1000), 3)])
def test_subsets_share_whole_blocks(oracle, cache, sizes, blocks):
    """500 is the first block of 1,000 whichever was asked for first; a part of a block is one of its own."""
    examples = draw(examples_of(1200), 1000)
    for size in sizes:
        logits = cached_logits(examples.take(range(size)), KEY, cache, oracle)
        torch.testing.assert_close(logits.values, logits_of(examples.take(range(size))))
    assert (500, blocks) == (LOGIT_BLOCK, len(oracle.blocks))


@pytest.mark.parametrize(
    "changes",
    [{"weights": "other"}, {"tokenizer": "other"}, {"max_length": 95}, {"precision": "bf16"}, {"device_kind": "cuda"}],
    ids=lambda changes: next(iter(changes)),
)
def test_another_teacher_is_not_found_in_the_cache(oracle, cache, changes):
    """Whatever decides the logits is part of the key."""
    cached_logits(examples_of(3), KEY, cache, oracle)
    assert not cached_logits(examples_of(3), dataclasses.replace(KEY, **changes), cache, oracle).hit


@pytest.mark.parametrize(
    ("changes", "hit"),
    [
        ({"sentences": ("sentence 0", "sentence 1", "another")}, False),
        ({"ids": (0, 1, 7)}, False),
        ({"ids": (0, 2, 1), "sentences": ("sentence 0", "sentence 2", "sentence 1")}, False),
        ({"labels": (1, 1, 1)}, True),
        ({"name": "dev"}, True),
    ],
    ids=["text", "id", "order", "label", "name"],
)
def test_other_text_is_not_found_in_the_cache(oracle, cache, changes, hit):
    """The teacher sees texts, not labels."""
    cached_logits(examples_of(3), KEY, cache, oracle)
    assert hit == cached_logits(dataclasses.replace(examples_of(3), **changes), KEY, cache, oracle).hit


def test_corrupted_cache_entry_is_refused(oracle, cache):
    """A changed byte is found before it teaches anything, and the message says what to delete."""
    cached_logits(examples_of(3), KEY, cache, oracle)
    path = cache(KEY.for_examples(examples_of(3))) / "logits.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptError, match=r"logits.safetensors is corrupt: .*; delete "):
        cached_logits(examples_of(3), KEY, cache, oracle)


def test_teacher_that_fails_leaves_nothing_behind(oracle, cache):
    """An error in the middle is no cache entry; the next request computes."""

    def fail(_):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        cached_logits(examples_of(3), KEY, cache, fail)
    assert not cached_logits(examples_of(3), KEY, cache, oracle).hit


def taught(examples):
    return TeacherLogits(examples=examples, values=logits_of(examples), seconds=1.0, hit=False)


def test_same_subset_gives_the_same_bytes(tmp_path):
    """Two folders of one subset are equal file by file, and writing one again changes nothing."""
    logits = taught(examples_of(40))
    first, second = (files_of(publish_subset(logits, tmp_path / name / "kd_40")) for name in ("a", "b"))
    again = files_of(publish_subset(logits, tmp_path / "a" / "kd_40"))
    assert first == second == again
    assert 3 < len(first)


def test_smaller_subset_is_the_beginning_of_the_larger(oracle, cache, tmp_path):
    """The first 500 of kd_1000's rows are kd_500's, logits included."""
    train = examples_of(1100)
    columns = {}
    for size in (1000, 500):
        path = publish_subset(cached_logits(draw(train, size), KEY, cache, oracle), tmp_path / f"kd_{size}")
        columns[size] = load_from_disk(path, keep_in_memory=True)[:]
    assert {"sentence", "label", "idx", "teacher_logits"} == set(columns[500])
    assert {name: list(values[:500]) for name, values in columns[1000].items()} == {n: list(v) for n, v in columns[500].items()}
    assert 500 == len(set(columns[500]["idx"]))


def test_subset_reads_back_as_it_was_written(tmp_path):
    """Ids, texts, labels and fp32 logits, bit by bit."""
    logits = taught(draw(examples_of(60), 20))
    back = read_subset(publish_subset(logits, tmp_path / "kd_20"))
    assert logits.examples == back.examples
    assert torch.equal(logits.values, back.values)
    assert torch.float32 == back.values.dtype


def test_changed_subset_replaces_the_old_one(tmp_path):
    """Another teacher's logits take the folder's place as a whole."""
    examples = examples_of(5)
    publish_subset(taught(examples), tmp_path / "kd_5")
    other = TeacherLogits(examples=examples, values=-logits_of(examples), seconds=1.0, hit=False)
    assert torch.equal(other.values, read_subset(publish_subset(other, tmp_path / "kd_5")).values)


def test_missing_subset_is_refused(tmp_path):
    """The message names the folder."""
    with pytest.raises(CorruptError, match=r"there is no KD subset at .*kd_5"):
        read_subset(tmp_path / "kd_5")


@pytest.mark.parametrize("damage", ["truncated", "deleted", "no manifest"])
def test_damaged_subset_is_refused(tmp_path, damage):
    """A folder that lost something is not read."""
    path = publish_subset(taught(examples_of(5)), tmp_path / "kd_5")
    [arrow] = path.glob("*.arrow")
    if damage == "truncated":
        arrow.write_bytes(arrow.read_bytes()[:-50])
    else:
        (arrow if damage == "deleted" else path / "manifest.json").unlink()
    with pytest.raises(CorruptError, match="kd_5"):
        read_subset(path)


@settings(max_examples=30, deadline=None)
@given(rows=st.permutations(range(8)), n=st.integers(1, 8))
def test_logits_are_aligned_by_id(rows, n):
    """Whatever the order, each example gets the logits of its id."""
    wanted = examples_of(8).take(rows[:n])
    torch.testing.assert_close(taught(examples_of(8)).align(wanted), logits_of(wanted))


def test_aligning_an_unknown_id_is_refused():
    """An example that the teacher has not seen is named."""
    with pytest.raises(DataError, match=r"no teacher's logits for id 3 \('sentence 3'\)"):
        taught(examples_of(3)).align(examples_of(4))


def test_aligning_another_text_is_refused():
    """The same id with another text means other data; both texts are named."""
    other = dataclasses.replace(examples_of(3), sentences=("sentence 0", "changed", "sentence 2"))
    with pytest.raises(DataError, match=r"example 1 were computed for 'sentence 1', but the data say 'changed'"):
        taught(examples_of(3)).align(other)


def test_every_module_that_decides_what_a_teacher_says_is_in_the_version_of_the_code():
    """What the workbench imports, directly or not, is hashed, or it is known to matter in no other way than by the key."""
    package, reached, ahead = Path(distill.__file__).parent, set(), {"workbench"}
    while ahead:
        reached.add(name := ahead.pop())
        tree = ast.parse((package / f"{name}.py").read_text("utf-8"))
        modules = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        for node in (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)):
            names = [f"peftbench.{alias.name}" for alias in node.names]  # as in: from peftbench import kernels
            modules += names if node.module == "peftbench" else [node.module or ""]
        ahead |= {module.removeprefix("peftbench.") for module in modules if module.startswith("peftbench.")} - reached
    assert set(distill.TEACHER_MODULES) == reached - IN_THE_KEY - MEASURING
