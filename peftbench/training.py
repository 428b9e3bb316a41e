"""The loop. It knows a loss of a batch; not which method, adapter or teacher is behind it."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from peftbench.device import Device, DoesNotFit, is_out_of_memory
from peftbench.errors import PeftbenchError
from peftbench.measure import Stopwatch
from peftbench.packing import Batch
from peftbench.records import MemoryUse

CURVE_POINTS = 50


class TrainingDiverged(PeftbenchError, RuntimeError):  # noqa: N818 - a state, not a mistake
    """The loss is no longer a finite number."""


class Parameters(Protocol):
    """
    What is trained, in groups with their peak learning rates, as an optimizer takes them; see `peftbench.parameters`.

    A step asks for the norm of its gradients before the optimizer reads them, and clears them afterwards.
    """

    groups: list[dict[str, Any]]

    def gradient_norm(self) -> Tensor: ...

    def clear_gradients(self) -> None: ...


class Progress(Protocol):
    """Is told how far a long piece of work has come."""

    def __call__(self, what: str, done: int, total: int) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """
    What a training run cost and how it went.

    Attributes:
        runtime_seconds: The loop alone: no loading, tokenizing, evaluating or saving.
        learning_curve: Optimizer step and mean training loss since the point before, some fifty points.
        skipped_steps: Optimizer steps that fp16's loss scaling left out because a gradient overflowed.
        memory: How the batches went through the device in the end.
        dev_curve: Optimizer step, seconds of the loop up to there, and what was evaluated then.
    """

    runtime_seconds: float
    steps: int
    examples: int
    tokens: int
    learning_curve: tuple[tuple[int, float], ...]
    skipped_steps: int
    memory: MemoryUse
    dev_curve: tuple[tuple[int, float, float], ...] = ()


def fit(
    model: nn.Module,
    loss: Callable[[Batch], Tensor],
    epoch: Callable[[], Iterator[Sequence[int]]],
    collate: Callable[[Sequence[int]], Batch],
    parameters: Parameters,
    *,
    epochs: int,
    steps_per_epoch: int,
    examples_at_once: int,
    warmup_fraction: float,
    clip_norm: float,
    weight_decay: float,
    device: Device,
    progress: Progress,
    what: str,
    evaluate: Callable[[], float] | None = None,
    evaluations: int = 0,
) -> Fit:
    """
    Train with AdamW, linear warm-up and decay, and gradient clipping.

    A step always learns from its whole batch. Where memory runs out, fewer examples go through the device at once from then on,
    and if one alone is too many, activations are computed a second time instead of kept.

    Args:
        model: Put into training mode; its parameters change in place.
        loss: Mean loss of a batch, shape (); runs under the device's autocast.
        epoch: The rows of each step of one pass, in a fresh order each time.
        collate: Makes the batch of some rows.
        parameters: What AdamW changes, and the keeper of its gradients.
        examples_at_once: How many go through the device together at first.
        progress: Told each step.
        what: Name of the work, for progress and errors.
        evaluate: A figure of the model as it is; draws no random numbers and leaves the model in training mode.
        evaluations: How often to evaluate, evenly, the last time after the last step; takes no part in the runtime.

    Raises:
        TrainingDiverged: If a loss or a gradient is not finite, or not at any loss scale, naming step and learning rate.
        DoesNotFit: If one example at a time, with activations computed twice, is too much.
    """
    total = epochs * steps_per_epoch
    warmup = int(warmup_fraction * total)
    optimizer = torch.optim.AdamW(parameters.groups, weight_decay=weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, warmup=warmup, total=total))
    scaler = torch.amp.GradScaler(device.kind, enabled=device.precision == "fp16")
    memory = MemoryUse(examples_at_once=examples_at_once)
    points = min(CURVE_POINTS, total)
    marks = {round(total * (i + 1) / points) for i in range(points)}
    curve: list[tuple[int, float]] = []
    evaluated: list[tuple[int, float, float]] = []
    due = {round(total * (i + 1) / evaluations) for i in range(evaluations)} if evaluate is not None else set()
    since_point, step, examples, tokens, skipped, scale = 0.0, 0, 0, 0, 0, scaler.get_scale()

    def diverged(why: str) -> TrainingDiverged:
        rates = ", ".join(f"{rate:.3g}" for rate in schedule.get_last_lr())
        return TrainingDiverged(f"{what}: {why} at step {step + 1} of {total}, learning rate {rates}; lower it")

    def gradients(rows: Sequence[int]) -> tuple[Tensor, int] | None:
        """The batch's mean loss, shape (), and tokens, its gradients left in the parameters; None if memory ran out."""
        mean, count = torch.zeros((), device=device.name), 0
        try:
            for start in range(0, len(rows), memory.examples_at_once):
                batch = collate(rows[start : start + memory.examples_at_once])
                with device.autocast():
                    value = loss(batch) * (len(batch.rows) / len(rows))
                scaler.scale(value).backward()  # type: ignore[no-untyped-call]
                mean, count = mean + value.detach(), count + batch.tokens
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return None
        return mean, count

    model.train()
    with Stopwatch(device) as watch:
        for _ in range(epochs):
            for rows in epoch():
                while (done := gradients(rows)) is None:
                    parameters.clear_gradients()
                    device.release_memory()
                    memory = _relieve(memory, model, device, what)
                mean, batch_tokens = done
                # The fused AdamW divides by this as it reads the gradients; clipping them first would be a pass more over all.
                norm = parameters.gradient_norm()
                optimizer.grad_scale = (norm / (scale * clip_norm)).clamp(min=1.0)  # type: ignore[attr-defined]
                number, length = torch.stack([mean, norm.to(mean.device)]).tolist()  # here a GPU is waited for
                if not math.isfinite(number):
                    raise diverged(f"loss is {number}")
                if not math.isfinite(length) and not scaler.is_enabled():  # which skips such a step
                    raise diverged(f"the gradient's norm is {length}")
                try:
                    scaler.step(optimizer)
                except RuntimeError as error:
                    if not is_out_of_memory(error):
                        raise
                    raise DoesNotFit(f"{what}: weights, gradients and optimizer state alone do not fit {device.name}") from None
                scaler.update()
                parameters.clear_gradients()
                before, scale = scale, scaler.get_scale()
                if scale < before:
                    skipped += 1
                    if scale < 1.0:
                        raise diverged("gradients overflow fp16 at any loss scale")
                else:
                    schedule.step()
                step, examples, tokens = step + 1, examples + len(rows), tokens + batch_tokens
                since_point += number
                if step in marks:
                    curve.append((step, since_point / (step - (curve[-1][0] if curve else 0))))
                    since_point = 0.0
                progress(what, step, total)
                if evaluate is not None and step in due:
                    seconds = watch.read()
                    with watch.paused():
                        evaluated.append((step, seconds, evaluate()))
    return Fit(
        runtime_seconds=watch.seconds,
        steps=step,
        examples=examples,
        tokens=tokens,
        learning_curve=tuple(curve),
        skipped_steps=skipped,
        memory=memory,
        dev_curve=tuple(evaluated),
    )


def _relieve(memory: MemoryUse, model: Any, device: Device, what: str) -> MemoryUse:
    """
    Half as many examples at once or, where it is one already, activations computed twice.

    Not so on CPU: `dropout.Masks` would draw other dropout masks the second time.
    """
    if memory.examples_at_once > 1:
        return dataclasses.replace(
            memory, examples_at_once=memory.examples_at_once // 2, times_out_of_memory=memory.times_out_of_memory + 1
        )
    if memory.gradient_checkpointing or device.kind == "cpu" or not getattr(model, "supports_gradient_checkpointing", False):
        raise DoesNotFit(f"{what}: out of memory with one example at a time; use a smaller model or a larger device")
    checkpoint_activations(model)
    return dataclasses.replace(memory, gradient_checkpointing=True, times_out_of_memory=memory.times_out_of_memory + 1)


def checkpoint_activations(model: Any) -> None:
    """Have a transformers model keep the input of each layer only and run it again in the backward pass."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable  # older transformers
    enable({"use_reentrant": False})


def rate_factor(step: int, *, warmup: int, total: int) -> float:
    """Share of the peak learning rate at a step: 0 → 1 over the warm-up, then linearly to 0 at the end, as in transformers."""
    if step < warmup:
        return step / warmup
    return max(0.0, (total - step) / max(1, total - warmup))
