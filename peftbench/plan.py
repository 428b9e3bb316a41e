"""What a phase will cost, told before it is run: examples, tokens, arithmetic, memory, minutes."""

import itertools
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from peftbench.device import Device
from peftbench.kernels import can_be_captured, cast_frozen
from peftbench.layers import make_packable
from peftbench.measure import Stopwatch
from peftbench.memory import activation_bytes, fitting, longest_lengths, weight_bytes
from peftbench.models import ModelError, Weights, count_parameters, load_classifier, prepare
from peftbench.packing import LONG_ROW_STEP, Encoded, Row, make_batch, row_step_on, shuffled_rows
from peftbench.phases import DATA_SEED, Phase
from peftbench.records import Plan

SAMPLED_STEPS = {"packed": 2, "padded": 8}
"""Steps whose operations are counted; the others are taken to cost the same per token that goes through the model."""

ASKED_FOR_NUMBERS = (RuntimeError, AssertionError, AttributeError, TypeError, OSError)
"""Errors of adapters that read the values of tensors, where tensors have shapes alone."""

MATRIX_SHARE = 0.4
"""
Share of a step that matrix multiplication takes: a round figure below what a profile of MiniLM's operations showed on two CPU
cores, 0.46 under LoRA and 0.49 in full tuning.
"""

RATE_ROUNDS = 5

LEAST_SECONDS = 0.05
"""Least duration of a round in which the matrix rate is measured."""

STEP_SECONDS = {"cpu": 0.008, "cuda": 0.001}
"""Fixed cost of an optimizer step beside its matrix products: as one of the tiny scale takes it on a CPU; on an H100."""

REPLAYED_LAYER_SECONDS = 0.0003
"""What a layer of BERT-large under LoRA adds to a step on an H100 that is a CUDA graph."""

LAUNCHED_LAYER_SECONDS = 0.004
"""The same of a step that the host launches, for each portion of its batch."""

CAPTURE_SECONDS = 0.04
"""What a layer takes once a phase, while the first steps are launched and then captured."""

RATE_TOKENS = {"cpu": 512, "cuda": 8192}
"""Rows of the product that the matrix rate is measured with; between smaller ones a GPU would wait for its host."""


def plan_phase(
    phase: Phase,
    weights: Weights,
    train: Encoded,
    held_out: Sequence[Encoded],
    device: Device,
    *,
    teacher: Weights | None = None,
    taught: Sequence[Tensor] = (),
    memory_bytes: int | None = None,
) -> Plan:
    """
    Count what a phase costs by running some of its steps on shapes alone, without weights and without arithmetic.

    Args:
        phase: With its changes for the scale made.
        weights: Of the role that it trains.
        train: What it learns from.
        held_out: What it is evaluated on.
        teacher: Whose logits it asks for.
        taught: Token ids of the texts that it asks them for first.
        memory_bytes: Free on the device; None is as much as it takes.

    Raises:
        ModelError: If the phase's adapter cannot be made, or run, without numbers.
    """
    model, packed = _shapes(weights, phase)
    total, trainable = count_parameters(model)
    trainable = trainable if phase.epochs else 0
    captured = packed and device.kind == "cuda" and can_be_captured(model)
    forward = _flops_per_token(model, train, phase, device, packed=packed, training=False)
    tokens = sum(map(len, train.tokens)) if phase.epochs else 0
    other = forward * sum(len(t) for encoded in held_out for t in encoded.tokens)
    if teacher is not None and taught:
        teaching, teacher_packed = _shapes(teacher, Phase(id=phase.id, role="teacher", max_length=phase.max_length))
        other += _flops_per_token(teaching, train, phase, device, packed=teacher_packed, training=False) * sum(map(len, taught))
    training = {}  # per token of text, by whether steps are captured: memory decides, of which more is known below
    for way in {False, captured} if phase.epochs else ():
        training[way] = _flops_per_token(model, train, phase, device, packed=packed, training=True, captured=way)
    if device.casts_frozen:
        cast_frozen(model, device.dtype)
    held = weight_bytes(model, trainable, device)
    at_once = fitting(model, train, phase.batch_size, device, None if memory_bytes is None else memory_bytes - held)
    captured = captured and at_once >= phase.batch_size
    steps = phase.epochs * -(-len(train) // phase.batch_size)
    return Plan(
        phase=phase.id,
        parameters=total,
        trainable=trainable,
        examples=len(train) if phase.epochs else 0,
        steps=steps,
        tokens=phase.epochs * tokens,
        training_flops=training[captured] * phase.epochs * tokens if phase.epochs else 0.0,
        other_flops=other,
        examples_at_once=at_once,
        weight_bytes=held,
        activation_bytes=activation_bytes(model, longest_lengths(train, at_once), device) if phase.epochs else 0,
        fixed_seconds=_fixed_seconds(model, steps, device, portions=-(-phase.batch_size // at_once), captured=captured),
    )


def estimate_seconds(plan: Plan, matrix_rate: float) -> float:
    """Duration of a phase on a device that does that many multiplications and additions of matrix products a second."""
    return (plan.training_flops + plan.other_flops) / (matrix_rate * MATRIX_SHARE) + plan.fixed_seconds


def measure_matrix_rate(device: Device, *, tokens: int | None = None, width: int = 1024) -> float:
    """Multiplications and additions a second of a feed-forward layer's product on this device, in its precision; median."""
    tokens = tokens or RATE_TOKENS[device.kind]
    x = torch.ones(tokens, width, dtype=device.dtype, device=device.name)
    w = torch.ones(width, 4 * width, dtype=device.dtype, device=device.name)
    device.set_up()

    def seconds(products: int) -> float:
        with Stopwatch(device) as watch:
            for _ in range(products):
                x @ w
        return watch.seconds

    seconds(1)  # in which a library gets ready
    products = 1
    while seconds(products) < LEAST_SECONDS:  # so that launching and waiting do not count
        products *= 2
    return products * 2 * tokens * width * 4 * width / statistics.median(seconds(products) for _ in range(RATE_ROUNDS))


def _shapes(weights: Weights, phase: Phase) -> tuple[nn.Module, bool]:
    try:
        with torch.device("meta"):
            model, _ = prepare(load_classifier(weights, shapes_only=True), phase)
    except ASKED_FOR_NUMBERS:
        model, _ = prepare(load_classifier(weights, shapes_only=True), phase)
        model = model.to("meta")
    return model.train(), make_packable(model)


def _flops_per_token(
    model: nn.Module, encoded: Encoded, phase: Phase, device: Device, *, packed: bool, training: bool, captured: bool = False
) -> float:
    """Arithmetic of a pass forward, in training backward, too, for each token of text; captured steps go over a `Row` each."""
    steps = SAMPLED_STEPS["packed" if packed else "padded"]
    generator = torch.Generator().manual_seed(DATA_SEED)
    computed = 0
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(training):
        for rows in itertools.islice(shuffled_rows(len(encoded), phase.batch_size, generator), steps):
            if captured:
                row = Row(encoded, rows)
                batch = row.batch(row.numbers.to("meta"))
            else:
                batch = make_batch(encoded, rows, "meta", packed=packed, row_step=row_step_on(device))
            inputs = {name: value for name, value in batch.inputs.items() if name != "attention_mask"}  # its values are asked for
            try:
                loss = F.cross_entropy(model(**inputs).logits, batch.labels)
                if training:
                    loss.backward()  # type: ignore[no-untyped-call]
            except ASKED_FOR_NUMBERS as error:
                why = next(iter(str(error).splitlines()), type(error).__name__)[:160]
                raise ModelError(
                    f"{phase.id} cannot be planned: its model reads the values of tensors, and planning has shapes only: {why}"
                ) from error
            computed += batch.inputs["input_ids"].numel()
    row_step = LONG_ROW_STEP if captured else row_step_on(device)
    return float(counter.get_total_flops()) / computed * _computed_per_token(encoded, phase, packed=packed, row_step=row_step)


def _computed_per_token(encoded: Encoded, phase: Phase, *, packed: bool, row_step: int) -> float:
    """Tokens that go through the model in an epoch, filling or padding included, for each token of text."""
    lengths, computed = list(map(len, encoded.tokens)), 0
    for rows in shuffled_rows(len(encoded), phase.batch_size, torch.Generator().manual_seed(DATA_SEED)):
        of_text = [lengths[i] for i in rows]
        computed += -(-sum(of_text) // row_step) * row_step if packed else len(rows) * max(of_text)
    return computed / sum(lengths)


def _fixed_seconds(model: nn.Module, steps: int, device: Device, *, portions: int, captured: bool) -> float:
    """Seconds of all steps besides products."""
    layers = getattr(model.config, "num_hidden_layers", 0)
    if device.kind != "cuda" or not steps:
        return steps * STEP_SECONDS[device.kind]
    replayed = steps * REPLAYED_LAYER_SECONDS + CAPTURE_SECONDS
    launched = steps * portions * LAUNCHED_LAYER_SECONDS
    return float(steps * STEP_SECONDS["cuda"] + layers * (replayed if captured else launched))
