"""Steps replayed as CUDA graphs are the steps that they were captured from."""

import functools
import gc
import weakref

import pytest
import torch
from encoders import adapted, classifier, encoded_of
from torch.nn import functional as F

from peftbench import packing, training
from peftbench.device import Device
from peftbench.kernels import can_be_captured, cast_frozen, economize_words, only_words
from peftbench.layers import make_packable
from peftbench.models import prepare
from peftbench.packing import LONG_ROW_STEP, LONGEST_ROW, Batches, Row
from peftbench.parameters import SeparateParameters
from peftbench.phases import Phase
from peftbench.records import MemoryUse
from peftbench.training import Recipe, TrainingDiverged, fit

with_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
LENGTHS = [1 + 5 * i % 12 for i in range(83)]
"""Of texts of which an epoch makes five batches of sixteen and one of three."""


def train(
    architecture,
    method,
    *,
    capture,
    on="cuda",
    precision="fp32",
    lengths=LENGTHS,
    epochs=4,
    dropout=0.0,
    spoil=None,
    rate=5e-3,
    at_once=16,
    **options,
):
    """A run: what `fit` says, and the trained parameters. After step ``spoil[0]`` the loss is multiplied by ``spoil[1]``."""
    device = Device(name=on, precision=precision, why="test")
    model, groups = adapted(architecture, method, dropout=dropout)
    assert make_packable(model)
    economize_words(model)
    if device.casts_frozen:
        cast_frozen(model, device.dtype)
    device.set_up()
    model.to(device.name)
    encoded = encoded_of(lengths)
    scale = torch.ones((), device=device.name)  # of the loss, where a graph reads it

    def loss(batch):
        return F.cross_entropy(model(**batch.inputs).logits.float(), batch.labels) * scale

    steps = 0

    def progress(*_):
        nonlocal steps
        steps += 1
        if spoil is not None and steps == spoil[0]:
            scale.fill_(spoil[1])

    torch.manual_seed(1)
    with only_words(model, torch.cat(encoded.tokens)):
        run = fit(
            model,
            loss,
            Batches(encoded=encoded, size=16, generator=torch.Generator().manual_seed(0), device=device.name, packed=True),
            SeparateParameters([{**group, "lr": rate} for group in groups]),
            Recipe(epochs=epochs, warmup_fraction=0.1, clip_norm=1.0, weight_decay=0.0),
            examples_at_once=at_once,
            device=device,
            progress=progress,
            what="X-test",
            capture=capture,
            **options,
        )
    return run, {name: p.detach().cpu() for name, p in model.named_parameters() if p.requires_grad}


def losses_of(run):
    return [loss for _, loss in run.learning_curve]


@with_cuda
@pytest.mark.parametrize("architecture", ["bert", "distilbert"])
@pytest.mark.parametrize("method", ["plain", "LORA", "IA3"])
def test_replayed_steps_are_those_of_launched_ones(architecture, method):
    """
    Without dropout, in fp32: losses and weights after four epochs.

    Of 24 steps 19 have rows of 128 tokens, one of 192, and four the last batch's 64: all but the first of each are replayed.
    """
    (run, weights), (expected, expected_weights) = (train(architecture, method, capture=c) for c in (True, False))
    assert (21, 0) == (run.replayed_steps, expected.replayed_steps)
    assert losses_of(expected) == pytest.approx(losses_of(run), rel=1e-3)
    assert (24, 332) == (run.steps, run.examples)
    assert expected_weights.keys() == weights.keys()
    for name, weight in expected_weights.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-2, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@with_cuda
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_replayed_steps_learn_in_16_bits(precision):
    """The first losses are near those of launched steps, and as many steps are skipped."""
    (run, _), (expected, _) = (train("bert", "LORA", capture=c, precision=precision, epochs=12) for c in (True, False))
    assert (69, expected.skipped_steps) == (run.replayed_steps, run.skipped_steps)
    assert losses_of(expected)[:10] == pytest.approx(losses_of(run)[:10], rel=0.05)


@pytest.mark.parametrize("on", ["cpu", pytest.param("cuda", marks=with_cuda)])
def test_each_step_drops_anew(on):
    """At a rate of almost 0 the losses of a single text differ by dropout alone."""
    options = {"on": on, "capture": on == "cuda", "lengths": [12], "epochs": 20, "rate": 1e-12}
    alike, different = (train("bert", "LORA", dropout=dropout, **options)[0] for dropout in (0.0, 0.5))
    assert max(losses_of(alike)) - min(losses_of(alike)) < 1e-5
    assert len({round(loss, 4) for loss in losses_of(different)}) > 10
    assert different.replayed_steps == (19 if on == "cuda" else 0)


@with_cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_replay_that_diverges_ends_training(precision):
    """The step is named."""
    with pytest.raises(TrainingDiverged, match=r"X-test: loss is inf at step 13 of 24, learning rate 0\.00"):
        train("bert", "LORA", capture=True, precision=precision, spoil=(12, torch.inf))


@with_cuda
def test_overflows_in_replays_are_skipped_and_counted():
    """More steps are left out than without the spoiled gradient, and the weights stay finite."""
    (run, weights), (unspoiled, _) = (
        train("bert", "LORA", capture=True, precision="fp16", spoil=spoil) for spoil in ((12, 1e4), None)
    )
    assert (21, 21) == (run.replayed_steps, unspoiled.replayed_steps)
    assert run.skipped_steps > unspoiled.skipped_steps
    assert all(weight.isfinite().all() for weight in weights.values())


class Launches:
    """In place of `Graphs`, for a CPU: steps over rows, of which the first of a shape is not taken; memory for ``room`` of them."""

    made = ()

    def __init__(self, _, room=1000):
        self.room, self.met = room, set()
        type(self).made += (weakref.ref(self),)

    def replay(self, row, step):
        if row.shape not in self.met:
            self.met.add(row.shape)
            return None
        if self.room == 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        self.room -= 1
        return step(row.batch(row.numbers))


def assert_alike(one, other):
    (run, weights), (expected, expected_weights) = one, other
    assert (expected.steps, expected.examples, expected.tokens) == (run.steps, run.examples, run.tokens)
    assert losses_of(expected) == pytest.approx(losses_of(run), rel=1e-5)
    for name, weight in expected_weights.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("room", "replayed", "times"), [(1000, 21, 0), (7, 7, 1), (0, 0, 1)])
def test_without_room_for_graphs_steps_are_launched(room, replayed, times, monkeypatch):
    """From where memory runs out: it is counted, as many examples as before go through at once, and nothing is lost."""
    monkeypatch.setattr(training, "Graphs", functools.partial(Launches, room=room))
    trained = train("bert", "LORA", on="cpu", capture=True)
    assert (MemoryUse(examples_at_once=16, times_out_of_memory=times), replayed) == (trained[0].memory, trained[0].replayed_steps)
    assert_alike(trained, train("bert", "LORA", on="cpu", capture=False))


def test_graphs_go_before_examples_do(monkeypatch):
    """Where launched steps lack memory, too, the number at once is halved next."""
    monkeypatch.setattr(training, "Graphs", functools.partial(Launches, room=0))
    collate, sizes = Batches.collate, []

    def within_eight(batches, rows):
        sizes.append(len(rows))
        if len(rows) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return collate(batches, rows)

    expected = train("bert", "LORA", on="cpu", capture=False)
    monkeypatch.setattr(Batches, "collate", within_eight)
    trained = train("bert", "LORA", on="cpu", capture=True)
    assert MemoryUse(examples_at_once=8, times_out_of_memory=2) == trained[0].memory
    assert 1 == sum(size > 8 for size in sizes)
    assert_alike(trained, expected)


def test_a_capture_without_room_for_the_optimizer_is_given_up(monkeypatch):
    """It has changed nothing, and what was launched did fit: steps are launched from then on."""
    monkeypatch.setattr(training, "Graphs", Launches)
    step, taken = torch.optim.AdamW.step, []

    def second_fails(optimizer):
        taken.append(optimizer)
        if len(taken) == 2:  # of the same shape as the first, which was launched
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return step(optimizer)

    expected = train("bert", "LORA", on="cpu", capture=False)
    monkeypatch.setattr(torch.optim.AdamW, "step", second_fails)
    trained = train("bert", "LORA", on="cpu", capture=True)
    assert MemoryUse(examples_at_once=16, times_out_of_memory=1) == trained[0].memory
    assert_alike(trained, expected)


def test_portions_and_long_rows_are_launched(monkeypatch):
    """Only the last batch, of three texts, goes through at once where four do; none does in a row that would be too long."""
    monkeypatch.setattr(training, "Graphs", Launches)
    expected = train("bert", "LORA", on="cpu", capture=False)
    trained = train("bert", "LORA", on="cpu", capture=True, at_once=4)
    assert (MemoryUse(examples_at_once=4), 3) == (trained[0].memory, trained[0].replayed_steps)
    assert_alike(trained, expected)
    monkeypatch.setattr(packing, "LONGEST_ROW", 60)
    trained = train("bert", "LORA", on="cpu", capture=True)
    assert 3 == trained[0].replayed_steps
    assert_alike(trained, expected)


def test_evaluation_between_replays_changes_nothing(monkeypatch):
    """Between a step and the next one's, which is prepared already."""
    monkeypatch.setattr(training, "Graphs", Launches)
    trained = train("bert", "LORA", on="cpu", capture=True, evaluate=lambda: 0.5, evaluations=6)
    assert [4, 8, 12, 16, 20, 24] == [step for step, _, _ in trained[0].dev_curve]
    assert_alike(trained, train("bert", "LORA", on="cpu", capture=True))


def test_graphs_are_gone_with_the_run(monkeypatch):
    """At once, without a garbage collector: they hold as much memory as the model does."""
    monkeypatch.setattr(training, "Graphs", Launches)
    monkeypatch.setattr(Launches, "made", ())
    gc.disable()
    try:
        train("bert", "LORA", on="cpu", capture=True)
        assert [None] == [made() for made in Launches.made]
    finally:
        gc.enable()


@pytest.mark.parametrize("method", ["plain", "LORA", "IA3"])
def test_known_methods_can_be_captured(method):
    """Those whose steps were."""
    assert can_be_captured(adapted("bert", method)[0])


def test_variants_of_known_methods_are_launched():
    """Nobody has looked into what they launch."""
    peft = {"peft_type": "LORA", "r": 2, "target_modules": ["query"], "use_dora": True}
    model, _ = prepare(classifier("bert"), Phase(id="X-test", role="backbone", peft=peft, max_length=32))
    assert make_packable(model)
    assert not can_be_captured(model)


def test_row_holds_a_batch_in_one_tensor():
    """Ids, positions, sentences, first tokens, labels and rows, by hand; the filling is a sentence of its own at position 0."""
    encoded = encoded_of([3, 1, 2])
    row = Row(encoded, [2, 0])
    assert (LONG_ROW_STEP, 2) == row.shape
    batch = row.batch(row.numbers)
    ids = batch.inputs["input_ids"]
    assert (1, LONG_ROW_STEP) == ids.shape
    assert [*encoded.tokens[2].tolist(), *encoded.tokens[0].tolist()] == ids[0, :5].tolist()
    assert [0, 1, 0, 1, 2, *[0] * (LONG_ROW_STEP - 5)] == batch.inputs["position_ids"][0].tolist()
    assert [2, 0] == batch.rows.tolist()
    assert encoded.labels[[2, 0]].tolist() == batch.labels.tolist()
    spans = batch.inputs["spans"]
    assert [0, 2] == spans.starts.tolist()
    bias = spans.tokens.bias_in(torch.float32)[0, 0]
    assert [0, 0, *[-torch.inf] * (LONG_ROW_STEP - 2)] == bias[1].tolist()
    assert [*[-torch.inf] * 5, *[0] * (LONG_ROW_STEP - 5)] == bias[-1].tolist()
    assert torch.equal(bias[[0, 2]], spans.firsts.bias_in(torch.float32)[0, 0])


def test_rows_that_would_be_too_long_are_not_made():
    """Attention over them would cost more than launches do."""
    encoded = encoded_of([12] * (LONGEST_ROW // 12 + 1))
    batches = Batches(encoded=encoded, size=16, generator=torch.Generator(), device="cpu", packed=True)
    assert batches.row(range(len(encoded))) is None
    assert batches.row(range(len(encoded) - 1)) is not None
