"""Steps replayed as CUDA graphs are the steps that they were captured from."""

import pytest
import torch
from encoders import adapted, encoded_of
from torch.nn import functional as F

from peftbench import training
from peftbench.device import Device
from peftbench.kernels import cast_frozen, economize_words, launches_alike, only_words
from peftbench.layers import make_packable
from peftbench.packing import LONG_ROW_STEP, LONGEST_ROW, Batches, Row
from peftbench.parameters import SeparateParameters
from peftbench.records import MemoryUse
from peftbench.training import Recipe, TrainingDiverged, fit

with_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
LENGTHS = [1 + 5 * i % 12 for i in range(83)]
"""Of texts that make rows of one to three steps' length, with a last batch of three."""


def train(architecture, method, *, capture, on="cuda", precision="fp32", epochs=4, dropout=0.0, spoil=None, rate=5e-3):
    """A run: what `fit` says, and the trained parameters."""
    device = Device(name=on, precision=precision, why="test")
    model, groups = adapted(architecture, method, dropout=dropout)
    assert make_packable(model)
    economize_words(model)
    if device.casts_frozen:
        cast_frozen(model, device.dtype)
    device.set_up()
    model.to(device.name)
    encoded = encoded_of(LENGTHS)
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
            Batches(encoded, 16, torch.Generator().manual_seed(0), device.name, packed=True),
            SeparateParameters([{**group, "lr": rate} for group in groups]),
            Recipe(epochs=epochs, warmup_fraction=0.1, clip_norm=1.0, weight_decay=0.0),
            examples_at_once=16,
            device=device,
            progress=progress,
            what="X-test",
            capture=capture,
        )
    return run, {name: p.detach().cpu() for name, p in model.named_parameters() if p.requires_grad}


@with_cuda
@pytest.mark.parametrize("architecture", ["bert", "distilbert"])
@pytest.mark.parametrize("method", ["plain", "LORA", "IA3"])
def test_replayed_steps_are_those_of_launched_ones(architecture, method):
    """Without dropout, in fp32: losses and weights after four epochs, over shapes that come once, twice and often."""
    (run, weights), (expected, expected_weights) = (train(architecture, method, capture=c) for c in (True, False))
    assert [loss for _, loss in expected.learning_curve] == pytest.approx([loss for _, loss in run.learning_curve], rel=1e-3)
    assert (24, 332) == (run.steps, run.examples)
    assert expected_weights.keys() == weights.keys()
    for name, weight in expected_weights.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-2, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@with_cuda
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_replayed_steps_learn_in_16_bits(precision):
    """The losses are near those of launched steps, and fall; nothing overflows but at first, while fp16's scale is too large."""
    (run, _), (expected, _) = (train("bert", "LORA", capture=c, precision=precision, epochs=12) for c in (True, False))
    assert expected.skipped_steps == run.skipped_steps
    losses, expected_losses = ([loss for _, loss in r.learning_curve] for r in (run, expected))
    assert expected_losses[:10] == pytest.approx(losses[:10], rel=0.05)


@with_cuda
def test_each_replay_drops_anew():
    """With a rate of 0 nothing is learned, so that two losses of the same batch differ by dropout alone."""
    run, _ = train("bert", "LORA", capture=True, dropout=0.5, epochs=8, rate=1e-12)
    losses = [loss for _, loss in run.learning_curve]
    assert len(losses) == len(set(losses)) == 48


@with_cuda
@pytest.mark.parametrize(("precision", "spoiled"), [("fp32", "loss is inf"), ("bf16", "loss is inf")])
def test_a_replay_that_diverges_ends_training(precision, spoiled):
    """The step is named, and the weights stay those of the step before."""
    with pytest.raises(TrainingDiverged, match=rf"X-test: {spoiled} at step 13 of 24, learning rate 0\.0"):
        train("bert", "LORA", capture=True, precision=precision, spoil=(12, torch.inf))


@with_cuda
def test_an_overflow_in_a_replay_is_skipped_and_counted():
    """fp16's scale falls until the spoiled gradient fits again."""
    run, weights = train("bert", "LORA", capture=True, precision="fp16", spoil=(12, 1e4))
    assert run.skipped_steps >= 1
    assert all(weight.isfinite().all() for weight in weights.values())


class Launches:
    """In place of `Graphs`, for a CPU: steps over rows as they are; memory runs out in the one after ``room``."""

    room = 1000

    def __init__(self, step, _):
        self.step, self.taken = step, 0

    def take(self, row):
        self.taken += 1
        if self.taken > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return self.step(row.batch(row.numbers))


@pytest.mark.parametrize(("room", "times"), [(1000, 0), (7, 1), (0, 1)])
def test_without_room_for_graphs_steps_are_launched(room, times, monkeypatch):
    """From where memory runs out: it is counted, as many examples as before go through at once, and nothing is lost."""
    monkeypatch.setattr(training, "Graphs", type("Short", (Launches,), {"room": room}))
    run, weights = train("bert", "LORA", on="cpu", capture=True)
    expected, expected_weights = train("bert", "LORA", on="cpu", capture=False)
    assert MemoryUse(examples_at_once=16, times_out_of_memory=times) == run.memory
    assert (expected.steps, expected.examples, expected.tokens) == (run.steps, run.examples, run.tokens)
    assert [loss for _, loss in expected.learning_curve] == pytest.approx([loss for _, loss in run.learning_curve], rel=1e-5)
    for name, weight in expected_weights.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["plain", "LORA", "IA3"])
def test_known_methods_launch_alike(method):
    """Those whose steps were captured."""
    assert launches_alike(adapted("bert", method)[0])


def test_other_methods_are_not_captured():
    """Nobody has looked into what they launch."""
    assert not launches_alike(adapted("bert", "LILY")[0])


def test_row_holds_a_batch_in_one_tensor():
    """Ids, positions, sentences, first tokens, labels and rows, by hand; the filling is a sentence of its own at position 0."""
    encoded = encoded_of([3, 1, 2])
    row = Row(encoded, [2, 0])
    assert (LONG_ROW_STEP, 2) == row.shape
    assert 5 == row.text
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
    batches = Batches(encoded, 16, torch.Generator(), "cpu", packed=True)
    assert batches.row(range(len(encoded))) is None
    assert batches.row(range(len(encoded) - 1)) is not None
