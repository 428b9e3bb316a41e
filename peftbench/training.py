"""The loop. It knows a loss of a batch; not which method, adapter or teacher is behind it."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from peftbench.device import Device
from peftbench.measure import Stopwatch
from peftbench.packing import Batch

CURVE_POINTS = 50


class TrainingDiverged(RuntimeError):  # noqa: N818 - a state, not a mistake
    """The loss is no longer a finite number."""


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
    """

    runtime_seconds: float
    steps: int
    examples: int
    tokens: int
    learning_curve: tuple[tuple[int, float], ...]


def fit(
    model: nn.Module,
    loss: Callable[[Batch], Tensor],
    epoch: Callable[[], Iterator[Batch]],
    groups: Sequence[dict[str, Any]],
    *,
    epochs: int,
    steps_per_epoch: int,
    warmup_fraction: float,
    clip_norm: float,
    weight_decay: float,
    device: Device,
    progress: Progress,
    what: str,
) -> Fit:
    """
    Train with AdamW, linear warm-up and decay, and gradient clipping.

    Args:
        model: Put into training mode; its parameters change in place.
        loss: Mean loss of a batch, shape (); runs under the device's autocast.
        epoch: The batches of one pass, in a fresh order each time.
        groups: Parameters with their peak learning rates.
        progress: Told each step.
        what: Name of the work, for progress and errors.

    Raises:
        TrainingDiverged: If a loss is not finite, naming step and learning rate.
    """
    total = epochs * steps_per_epoch
    warmup = int(warmup_fraction * total)
    optimizer = torch.optim.AdamW(list(groups), weight_decay=weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, warmup=warmup, total=total))
    scaler = torch.amp.GradScaler(device.kind, enabled=device.precision == "fp16")
    parameters = [p for group in groups for p in group["params"]]
    every = max(1, math.ceil(total / CURVE_POINTS))
    curve: list[tuple[int, float]] = []
    since_point, step, examples, tokens = 0.0, 0, 0, 0

    model.train()
    with Stopwatch(device) as watch:
        for _ in range(epochs):
            for batch in epoch():
                with device.autocast():
                    value = loss(batch)
                if not math.isfinite(number := value.item()):
                    rates = ", ".join(f"{rate:.3g}" for rate in schedule.get_last_lr())
                    raise TrainingDiverged(
                        f"{what}: loss is {number} at step {step + 1} of {total}, learning rate {rates}; lower it"
                    )
                scaler.scale(value).backward()  # type: ignore[no-untyped-call]
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(parameters, clip_norm)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                schedule.step()
                step, examples, tokens = step + 1, examples + len(batch.rows), tokens + batch.tokens
                since_point += number
                if step % every == 0 or step == total:
                    curve.append((step, since_point / (step - (curve[-1][0] if curve else 0))))
                    since_point = 0.0
                progress(what, step, total)
    return Fit(
        runtime_seconds=watch.seconds,
        steps=step,
        examples=examples,
        tokens=tokens,
        learning_curve=tuple(curve),
    )


def rate_factor(step: int, *, warmup: int, total: int) -> float:
    """Share of the peak learning rate at a step: 0 → 1 over the warm-up, then linearly to 0 at the end, as in transformers."""
    if step < warmup:
        return step / warmup
    return max(0.0, (total - step) / max(1, total - warmup))
