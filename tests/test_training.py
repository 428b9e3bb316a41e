"""The loop is the plain torch loop, no more and no less."""

import copy
import dataclasses
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.data import SequentialSampler
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    Trainer,
    TrainingArguments,
    get_linear_schedule_with_warmup,
)

from peftbench.data import Split
from peftbench.device import Device, DoesNotFit
from peftbench.kernels import economize
from peftbench.layers import make_packable
from peftbench.packing import Batch, Batches, Encoded, make_batch
from peftbench.parameters import FlatParameters, SeparateParameters, flattened
from peftbench.records import MemoryUse
from peftbench.training import CURVE_POINTS, Recipe, TrainingDiverged, fit, rate_factor, relieve

CPU = Device(name="cpu", precision="fp32", why="test")
DEFAULTS = {
    "epochs": 1,
    "examples_at_once": 1000,
    "warmup_fraction": 0.0,
    "clip_norm": 1.0,
    "weight_decay": 0.0,
    "device": CPU,
    "what": "X-test",
    "progress": lambda *_: None,
}


def batches_of(n, size=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        Batch(
            rows=torch.arange(size),
            labels=torch.randint(0, 2, (size,), generator=generator),
            inputs={"input": torch.randn(size, 3, generator=generator)},
        )
        for _ in range(n)
    ]


class Ready:
    """Batches that are made already, the same ones in the same order each epoch, by the rows of each; tokens are as told."""

    def __init__(self, rows, collate, tokens=len):
        self.rows, self.collate, self.tokens = rows, collate, tokens

    def __len__(self):
        return len(self.rows)

    def epoch(self):
        return iter(self.rows)


def fit_with(model, loss, batches, parameters, **arguments):
    """`fit`, the recipe's parts among the arguments."""
    recipe = Recipe(**{field.name: arguments.pop(field.name) for field in dataclasses.fields(Recipe)})
    return fit(model, loss, batches, parameters, recipe, **arguments)


def fit_batches(model, loss, batches, groups, **arguments):
    """`fit` over these batches."""
    rows = [[(i, row) for row in range(len(batch.rows))] for i, batch in enumerate(batches)]
    ready = Ready(rows, lambda some: batches[some[0][0]], lambda some: 10 + some[0][0])
    return fit_with(model, loss, ready, SeparateParameters(groups), **arguments)


def perceptron(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))


def fit_losses(values, **options):
    """Train one number whose loss at step i is values[i], whatever the number is."""
    model = nn.Linear(1, 1, bias=False)
    losses = iter(values)
    batch = Batch(rows=torch.arange(2), labels=torch.zeros(2), inputs={})
    arguments = {**DEFAULTS, **options}
    steps = arguments.pop("steps_per_epoch", len(values))
    groups = [{"params": list(model.parameters()), "lr": arguments.pop("lr", 1e-3)}]
    return fit_batches(
        model,
        lambda _: next(losses) + 0 * model.weight.sum(),
        [batch] * steps,
        groups,
        **arguments,
    )


@settings(max_examples=40, deadline=None)
@given(total=st.integers(1, 60), share=st.floats(0, 1))
def test_rate_is_that_of_transformers_schedule(total, share):
    """Step by step get_linear_schedule_with_warmup's, for any warm-up."""
    warmup = int(share * total)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_linear_schedule_with_warmup(optimizer, warmup, total)
    expected = []
    for _ in range(total + 1):
        expected += schedule.get_last_lr()
        optimizer.step()
        schedule.step()
    assert expected == pytest.approx([rate_factor(step, warmup=warmup, total=total) for step in range(total + 1)], rel=1e-12)


@pytest.mark.parametrize(
    ("warmup", "expected"),
    [(0, [1, 0.75, 0.5, 0.25, 0]), (2, [0, 0.5, 1, 0.5, 0]), (4, [0, 0.25, 0.5, 0.75, 0])],
)
def test_rate_by_hand(warmup, expected):
    """Four steps: up over the warm-up, down to zero at the end."""
    assert expected == [rate_factor(step, warmup=warmup, total=4) for step in range(5)]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("clip_norm", [0.05, 100.0])
def test_twenty_steps_are_those_of_a_plain_loop(clip_norm, weight_decay):
    """Two groups with their own rates, warm-up, clipping and decay: the weights of a loop written out with torch alone."""
    model, batches = perceptron(), batches_of(10)
    plain = copy.deepcopy(model)

    def groups_of(m):
        return [{"params": list(m[0].parameters()), "lr": 1e-2}, {"params": list(m[2].parameters()), "lr": 3e-3}]

    optimizer = torch.optim.AdamW(groups_of(plain), weight_decay=weight_decay, foreach=False, fused=False)
    schedule = get_linear_schedule_with_warmup(optimizer, 5, 20)
    losses = []
    for batch in batches * 2:
        loss = F.cross_entropy(plain(**batch.inputs), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), clip_norm)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())

    run = fit_batches(
        model.eval(),
        lambda batch: F.cross_entropy(model(**batch.inputs), batch.labels),
        batches,
        groups_of(model),
        **{**DEFAULTS, "epochs": 2, "warmup_fraction": 0.25, "clip_norm": clip_norm, "weight_decay": weight_decay},
    )
    for expected, actual in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert losses == pytest.approx([loss for _, loss in run.learning_curve], rel=1e-5)
    assert model.training


@pytest.fixture
def one_thread():
    """Thousands of operations on a few numbers wait for a second thread, where another process has it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_what_was_learned_long_ago_leaves_no_denormal_numbers(monkeypatch):
    """A word of the first step alone: no average becomes denormal, as torch's own AdamW's does; the weights are its to the bit."""
    words, steps = nn.Embedding(2, 64), 1200
    with torch.no_grad():
        words.weight.uniform_(0.5, 1.5)
    plain, optimizers, found = copy.deepcopy(words), [], []
    monkeypatch.setattr(torch.optim.AdamW, "__init__", noting(optimizers, torch.optim.AdamW.__init__))
    batches = [
        Batch(rows=torch.arange(1), labels=torch.zeros(1), inputs={"input": torch.tensor([min(i, 1)])}) for i in range(steps)
    ]

    def loss_of(module, batch):
        return module(**batch.inputs).square().mean()

    def denormal(optimizer):
        (state,) = optimizer.state.values()
        return sum(int(((x != 0) & (x.abs() < torch.finfo(x.dtype).tiny)).sum()) for x in (state["exp_avg"], state["exp_avg_sq"]))

    fit_batches(
        words,
        lambda batch: loss_of(words, batch),
        batches,
        [{"params": [words.weight], "lr": 1e-4}],
        **{**DEFAULTS, "clip_norm": 1e9, "progress": lambda *_: found.append(denormal(optimizers[0]))},
    )
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = 1e-4 * (1 - step / steps)
        optimizer.zero_grad(set_to_none=False)
        loss_of(plain, batch).backward()
        optimizer.step()

    assert torch.equal(words.weight, plain.weight)
    assert (len(found), max(found), denormal(optimizer)) == (steps, 0, 64)


def noting(calls, method):
    """The method, which puts the object that it is called on into a list."""

    def noted(self, *args, **kwargs):
        calls.append(self)
        method(self, *args, **kwargs)

    return noted


class OrderedTrainer(Trainer):
    """transformers' Trainer over its rows as they lie."""

    def _get_train_sampler(self, *_):
        return SequentialSampler(self.train_dataset)


NO_DROPOUT = [
    BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=90,
               hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=64, vocab_size=90,
                     dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0),
]  # fmt: skip


@pytest.mark.parametrize("config", NO_DROPOUT, ids=lambda config: config.model_type)
def test_twenty_updates_are_those_of_trainer(config, tmp_path):
    """Packed, with our kernels and clipping, 20 updates leave the weights that transformers' Trainer leaves on padded batches."""
    generator = torch.Generator().manual_seed(3)
    tokens = [torch.randint(1, 90, (length,), generator=generator) for length in torch.randint(1, 40, (80,), generator=generator)]
    labels = tuple(torch.randint(0, 2, (80,), generator=generator).tolist())
    encoded = Encoded(
        split=Split(name="train", ids=tuple(range(80)), sentences=("",) * 80, labels=labels),
        tokens=tokens,
        labels=torch.tensor(labels),
    )
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    start, theirs = copy.deepcopy(model.state_dict()), copy.deepcopy(model)

    def pad(rows):
        batch = make_batch(encoded, rows, "cpu", packed=False)
        return {**batch.inputs, "labels": batch.labels}

    arguments = TrainingArguments(
        output_dir=tmp_path, max_steps=20, per_device_train_batch_size=8, learning_rate=5e-4, warmup_steps=4, max_grad_norm=0.5,
        lr_scheduler_type="linear", use_cpu=True, save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    OrderedTrainer(model=theirs, args=arguments, train_dataset=list(range(80)), data_collator=pad).train()

    assert make_packable(model)
    economize(model)
    with flattened([{"params": list(model.parameters()), "lr": 5e-4}]) as parameters:
        fit_with(
            model,
            lambda batch: F.cross_entropy(model(**batch.inputs).logits, batch.labels),
            Ready([range(i, i + 8) for i in range(0, 80, 8)], lambda rows: make_batch(encoded, rows, "cpu", packed=True)),
            parameters,
            **{**DEFAULTS, "epochs": 2, "warmup_fraction": 0.2, "clip_norm": 0.5},
        )
    moved = max(float((theirs.state_dict()[name] - value).abs().max()) for name, value in start.items())
    assert moved > 1e-3
    torch.testing.assert_close(model.state_dict(), theirs.state_dict(), rtol=0, atol=1e-4 * moved)


def test_costs_are_counted_by_hand():
    """Ten batches of four examples and 10 to 19 tokens, twice."""
    model, batches = perceptron(), batches_of(10)
    run = fit_batches(
        model,
        lambda batch: F.cross_entropy(model(**batch.inputs), batch.labels),
        batches,
        [{"params": list(model.parameters()), "lr": 1e-3}],
        **{**DEFAULTS, "epochs": 2},
    )
    assert (20, 80, 290) == (run.steps, run.examples, run.tokens)
    assert 0 < run.runtime_seconds < 60


def test_parameters_outside_the_groups_stay():
    """What does not train does not change, nor does it count for clipping."""
    model, batches = perceptron(), batches_of(3)
    frozen = model[0].weight.detach().clone()
    head = model[2].weight.detach().clone()
    fit_batches(
        model,
        lambda batch: F.cross_entropy(model(**batch.inputs), batch.labels),
        batches,
        [{"params": list(model[2].parameters()), "lr": 1e-2}],
        **DEFAULTS,
    )
    assert torch.equal(frozen, model[0].weight)
    assert not torch.equal(head, model[2].weight)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_loss_that_is_not_finite_stops_training(bad):
    """The message has the work, the step, how many there are, and the learning rate at that step."""
    with pytest.raises(TrainingDiverged, match=re.escape(f"X-test: loss is {bad} at step 3 of 4, learning rate 0.001; lower it")):
        fit_losses([1.0, 1.0, bad, 1.0], lr=2e-3)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_stops_training(bad):
    """At its own step, the last one too, before it reaches the weights."""
    model = nn.Linear(1, 1, bias=False)
    before = model.weight.detach().clone()
    batch = Batch(rows=torch.arange(2), labels=torch.zeros(2), inputs={})
    groups = [{"params": list(model.parameters()), "lr": 1e-3}]

    model.weight.register_hook(lambda gradient: torch.full_like(gradient, bad))
    with pytest.raises(TrainingDiverged, match=r"X-test: the gradient's norm is (inf|nan) at step 1 of 1, learning rate"):
        fit_batches(model, lambda _: model.weight.sum(), [batch], groups, **DEFAULTS)
    assert torch.equal(before, model.weight)


def test_diverging_training_leaves_the_weights_of_the_last_good_step():
    """The bad loss changes nothing any more."""
    weights = []
    model = nn.Linear(1, 1, bias=False)
    batch = Batch(rows=torch.arange(1), labels=torch.zeros(1), inputs={})

    def loss(_):
        weights.append(model.weight.item())
        return model.weight.sum() * (math.nan if len(weights) == 3 else 1.0)

    with pytest.raises(TrainingDiverged):
        fit_batches(
            model, loss, [batch] * 4, [{"params": list(model.parameters()), "lr": 0.1}],
            **DEFAULTS,
        )  # fmt: skip
    assert weights[2] == model.weight.item()
    assert 3 == len(set(weights))


@settings(max_examples=25, deadline=None)
@given(total=st.integers(1, 130), seed=st.integers(0, 99))
def test_learning_curve_has_the_mean_of_every_stretch(total, seed):
    """Some fifty points at most, the last one at the last step, which together weigh every step once."""
    losses = torch.rand(total, generator=torch.Generator().manual_seed(seed)).tolist()
    curve = fit_losses(losses).learning_curve
    steps = [step for step, _ in curve]
    assert total == steps[-1]
    assert len(steps) <= CURVE_POINTS
    assert sorted(set(steps)) == steps
    starts = [0, *steps[:-1]]
    assert max(b - a for a, b in zip(starts, steps, strict=True)) <= -(-total // CURVE_POINTS)
    expected = [sum(losses[a:b]) / (b - a) for a, b in zip(starts, steps, strict=True)]
    assert expected == pytest.approx([mean for _, mean in curve], rel=1e-5)


def test_learning_curve_by_hand():
    """101 steps with losses 1, 2, …: fifty points, each of two steps but one."""
    curve = fit_losses([float(i) for i in range(1, 102)]).learning_curve
    assert [(2, 1.5), (4, 3.5), (6, 5.5)] == list(curve[:3])
    assert [(99, 98.5), (101, 100.5)] == list(curve[-2:])
    assert 50 == len(curve)


def test_progress_is_told_every_step():
    """The name of the work, the steps done and how many there are, once each and in order."""
    told = []
    fit_losses([1.0] * 6, epochs=2, steps_per_epoch=3, progress=lambda *step: told.append(step))
    assert [("X-test", i, 6) for i in range(1, 7)] == told


def train_bert(seed):
    torch.manual_seed(seed)
    config = BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    model = AutoModelForSequenceClassification.from_config(config)
    packed = make_packable(model)
    economize(model)
    n = 24
    draws = torch.Generator().manual_seed(0)
    tokens = [torch.randint(1, 40, (1 + i % 7,), generator=draws) for i in range(n)]
    split = Split(name="train", ids=tuple(range(n)), sentences=tuple(map(str, range(n))), labels=tuple(i % 2 for i in range(n)))
    encoded = Encoded(split=split, tokens=tokens, labels=torch.tensor(split.labels))
    with flattened([{"params": list(model.parameters()), "lr": 1e-3}]) as parameters:
        run = fit_with(
            model,
            lambda batch: F.cross_entropy(model(**batch.inputs).logits, batch.labels),
            Batches(encoded=encoded, size=5, generator=torch.Generator().manual_seed(seed), device="cpu", packed=packed),
            parameters,
            **{**DEFAULTS, "epochs": 2},
        )
    assert (10, 48, 2 * sum(map(len, tokens))) == (run.steps, run.examples, run.tokens)
    return run.learning_curve, [p.detach().clone() for p in model.parameters()]


def test_same_seed_gives_the_same_weights_to_the_bit():
    """New weights, dropout and order of batches all come from the seed; another seed gives other weights."""
    (curve, weights), (again, same), (_, other) = train_bert(3), train_bert(3), train_bert(4)
    assert curve == again
    assert all(torch.equal(a, b) for a, b in zip(weights, same, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(weights, other, strict=True) if a.abs().sum() > 1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_parameters_stay_fp32_and_learn(precision):
    """Under autocast, too, the loss falls and the weights are full precision."""
    torch.manual_seed(0)
    model = perceptron()
    x = torch.randn(32, 3)
    batch = Batch(rows=torch.arange(32), labels=(x[:, 0] > 0).long(), inputs={"input": x})
    run = fit_batches(
        model,
        lambda b: F.cross_entropy(model(**b.inputs).float(), b.labels),
        [batch] * 30,
        [{"params": list(model.parameters()), "lr": 5e-2}],
        **{**DEFAULTS, "device": Device(name="cpu", precision=precision, why="test")},
    )
    assert {torch.float32} == {p.dtype for p in model.parameters()}
    assert run.learning_curve[-1][1] < run.learning_curve[0][1] / 2


class Memory:
    """A loss on a device that takes only so many examples at once."""

    def __init__(self, model, x, labels, room):
        self.model, self.x, self.labels, self.room = model, x, labels, room
        self.sizes = []
        self.failing = ()
        self.error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def collate(self, rows):
        index = torch.tensor(rows)
        return Batch(rows=index, labels=self.labels[index], inputs={"input": self.x[index]})

    def loss(self, batch):
        self.sizes.append(len(batch.rows))
        if len(batch.rows) > self.room or len(self.sizes) in self.failing:
            raise self.error
        return F.cross_entropy(self.model(**batch.inputs), batch.labels)


def train_within(room, *, at_once=16, model=None, error=None, parameters=SeparateParameters, failing=()):
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(40, 3, generator=generator), torch.randint(0, 2, (40,), generator=generator)
    model = model or perceptron()
    memory = Memory(model, x, labels, room)
    memory.error, memory.failing = error or memory.error, failing
    groups = [{"params": list(model.parameters()), "lr": 1e-2}]
    rows = list(range(40))
    batches = Ready([rows[:16], rows[16:32], rows[32:]], memory.collate)
    options = {**DEFAULTS, "epochs": 2, "examples_at_once": at_once}
    run = fit_with(model, memory.loss, batches, parameters(groups), **options)
    return run, memory.sizes, torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("parameters", [SeparateParameters, FlatParameters])
@pytest.mark.parametrize(("room", "at_once", "times"), [(16, 16, 0), (5, 4, 2), (1, 1, 4)])
def test_running_out_of_memory_changes_the_portions_and_not_the_mathematics(room, at_once, times, parameters):
    """The number at once is halved until it fits, stays there, and losses, weights and counts are those of whole batches."""
    whole, _, expected = train_within(1000)
    run, sizes, weights = train_within(room, parameters=parameters)
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-7)
    assert [loss for _, loss in whole.learning_curve] == pytest.approx([loss for _, loss in run.learning_curve], rel=1e-5)
    assert (6, 80, 80) == (run.steps, run.examples, run.tokens)
    assert MemoryUse(examples_at_once=at_once, times_out_of_memory=times) == run.memory
    assert times == sum(size > room for size in sizes)


@pytest.mark.parametrize("parameters", [SeparateParameters, FlatParameters])
def test_what_a_step_had_of_its_gradients_when_memory_ran_out_is_dropped(parameters):
    """The third of four portions fails, in the first step and in a later one: the weights are those of whole batches."""
    run, sizes, weights = train_within(1000, at_once=4, parameters=parameters, failing=(3, 14))
    assert [4, 4, 4, 2] == sizes[:4]
    assert MemoryUse(examples_at_once=1, times_out_of_memory=2) == run.memory
    torch.testing.assert_close(weights, train_within(1000)[2], rtol=1e-5, atol=1e-7)


def test_activations_are_computed_twice_on_a_gpu_that_takes_no_single_example():
    """After that there is nothing left to try."""
    model = AutoModelForSequenceClassification.from_config(
        BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    )
    gpu = Device(name="cuda", precision="fp16", why="test")
    memory = relieve(MemoryUse(examples_at_once=1), model, gpu, "X-test")
    assert MemoryUse(examples_at_once=1, gradient_checkpointing=True) == memory
    assert [True] == [layer.gradient_checkpointing for layer in model.bert.encoder.layer]
    with pytest.raises(DoesNotFit, match="X-test: out of memory with one example at a time"):
        relieve(memory, model, gpu, "X-test")


def test_cublas_without_room_is_out_of_memory_and_other_errors_are_not():
    """A RuntimeError of its own, as numpy's where dropout is drawn is a MemoryError; anything else is passed on at once."""
    for error in (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), MemoryError("mask")):
        run, _, _ = train_within(4, error=error)
        assert MemoryUse(examples_at_once=4, times_out_of_memory=2) == run.memory
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        train_within(4, error=RuntimeError("shapes cannot be multiplied"))


def test_a_number_at_once_can_be_given():
    """As a plan has it: nothing larger is tried."""
    run, sizes, weights = train_within(1000, at_once=4)
    assert 4 == max(sizes)
    assert MemoryUse(examples_at_once=4) == run.memory
    torch.testing.assert_close(weights, train_within(1000)[2], rtol=1e-5, atol=1e-7)


def test_one_example_that_does_not_fit_is_an_error():
    """Its message says what to do, and has no traceback of an allocator."""
    with pytest.raises(DoesNotFit, match="X-test: out of memory with one example at a time; use a smaller model"):
        train_within(0)


def test_optimizer_state_that_does_not_fit_is_an_error(monkeypatch):
    """Fewer examples would not help there."""

    def refuse(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.optim.AdamW, "step", refuse)
    with pytest.raises(DoesNotFit, match="optimizer state alone do not fit cpu"):
        train_within(16)


FP16 = Device(name="cpu", precision="fp16", why="test")


def train_scaled(losses, *, clip_norm=1e9):
    """One weight at 1.0 whose loss at step i is losses[i](weight)."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    steps = iter(losses)
    batch = Batch(rows=torch.arange(1), labels=torch.zeros(1), inputs={})
    groups = [{"params": list(model.parameters()), "lr": 0.25}]
    options = {**DEFAULTS, "device": FP16, "clip_norm": clip_norm}
    run = fit_batches(model, lambda _: next(steps)(model.weight.sum()), [batch] * len(losses), groups, **options)
    return run, model.weight.item()


def test_steps_that_overflow_fp16_are_skipped_and_counted():
    """The scaled gradient of step 2 is beyond fp32: no update, a lower scale, the rate stays, and the rest trains on."""
    run, weight = train_scaled([lambda w: w, lambda w: 1e38 * (w - 0.75), lambda w: w])
    assert (3, 1) == (run.steps, run.skipped_steps)
    plain = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([plain], weight_decay=0.0)
    for rate in (0.25, 0.25 * 2 / 3):
        optimizer.param_groups[0]["lr"] = rate
        plain.grad = torch.ones(1)
        optimizer.step()
    assert plain.item() == pytest.approx(weight, rel=1e-6)


def test_clipping_in_fp16_goes_by_the_gradient_and_not_by_its_scale():
    """Gradients of 0.25, 4 and 0.125 at a limit of 0.5: the second one alone is clipped."""
    _, weight = train_scaled([lambda w: 0.25 * w, lambda w: 4 * w, lambda w: 0.125 * w], clip_norm=0.5)
    plain = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([plain], weight_decay=0.0)
    for rate, gradient in zip((0.25, 0.25 * 2 / 3, 0.25 / 3), (0.25, 0.5, 0.125), strict=True):
        optimizer.param_groups[0]["lr"] = rate
        plain.grad = torch.full((1,), gradient)
        optimizer.step()
    assert plain.item() == pytest.approx(weight, rel=1e-5)


def test_gradients_that_overflow_at_any_scale_stop_training():
    """The scale falls below one: named with step and rate."""
    with pytest.raises(
        TrainingDiverged, match=r"X-test: gradients overflow fp16 at any loss scale at step 17 of 60, learning rate"
    ):
        train_scaled([lambda w: (w - 1).sqrt()] * 60)
