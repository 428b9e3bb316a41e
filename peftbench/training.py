"""The loop. It knows a loss of a batch; not which method, adapter or teacher is behind it."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from peftbench.device import Device, DoesNotFit, is_out_of_memory
from peftbench.errors import PeftbenchError
from peftbench.measure import Stopwatch
from peftbench.packing import Batch, Batches
from peftbench.records import MemoryUse

CURVE_POINTS = 50


class TrainingDiverged(PeftbenchError, RuntimeError):  # noqa: N818 - a state, not a mistake
    """A loss or a gradient is no longer a finite number, or overflows fp16 at every loss scale."""


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
class Recipe:
    """
    How to learn, besides the peak learning rates, which are those of the groups of parameters.

    Attributes:
        warmup_fraction: Share of the steps over which the rates rise from 0; over the rest they fall back to it.
        clip_norm: The most that the gradients' Euclidean norm may be.
        weight_decay: Of AdamW, times the learning rate.
    """

    epochs: int
    warmup_fraction: float
    clip_norm: float
    weight_decay: float


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
    batches: Batches,
    parameters: Parameters,
    recipe: Recipe,
    *,
    examples_at_once: int,
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
        batches: What a step learns from.
        parameters: What AdamW changes, and the keeper of its gradients.
        examples_at_once: How many go through the device together at first.
        progress: Told each step.
        what: Name of the work, for progress and errors.
        evaluate: A figure of the model as it is; draws no random numbers and leaves the model in training mode.
        evaluations: How often to evaluate, evenly, the last time after the last step; takes no part in the runtime.

    Raises:
        TrainingDiverged: If a loss or gradient is not finite, or overflows fp16 at every loss scale, naming step and learning rate.
        DoesNotFit: If one example at a time, with activations computed twice, is too much.
    """
    total = recipe.epochs * len(batches)
    update = _Update(parameters, recipe, total, device, what)
    gradients = _Gradients(model, loss, batches, parameters, update.scaled, device, examples_at_once, what)
    curve, evaluated = _Curve(total), list[tuple[int, float, float]]()
    due = _evenly(total, evaluations) if evaluate is not None else set()
    step, examples, tokens = 0, 0, 0
    model.train()
    with Stopwatch(device) as watch:
        for rows in itertools.chain.from_iterable(batches.epoch() for _ in range(recipe.epochs)):
            mean, of_text = gradients.compute(rows)
            curve.add(update.step(mean))
            step, examples, tokens = step + 1, examples + len(rows), tokens + of_text
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
        learning_curve=tuple(curve.points),
        skipped_steps=update.skipped,
        memory=gradients.memory,
        dev_curve=tuple(evaluated),
    )


class _Gradients:
    """
    Gradients of a step's whole batch, from as many examples at a time as the device has memory for.

    Attributes:
        memory: How many that is by now.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Batch], Tensor],
        batches: Batches,
        parameters: Parameters,
        scaled: Callable[[Tensor], Tensor],
        device: Device,
        examples_at_once: int,
        what: str,
    ) -> None:
        self.memory = MemoryUse(examples_at_once=examples_at_once)
        self._model, self._loss, self._batches, self._parameters = model, loss, batches, parameters
        self._scaled, self._device, self._what = scaled, device, what

    def compute(self, rows: Sequence[int]) -> tuple[Tensor, int]:
        """The batch's mean loss, shape (), and tokens of text; the gradients are left in the parameters."""
        while (done := self._try(rows)) is None:
            self._parameters.clear_gradients()
            self._device.release_memory()
            self.memory = _relieve(self.memory, self._model, self._device, self._what)
        return done

    def _try(self, rows: Sequence[int]) -> tuple[Tensor, int] | None:
        """As `compute`; None if memory ran out, when the error, which holds on to what was computed, is gone."""
        mean, tokens = torch.zeros((), device=self._device.name), 0
        try:
            for start in range(0, len(rows), self.memory.examples_at_once):
                batch = self._batches.collate(rows[start : start + self.memory.examples_at_once])
                with self._device.autocast():
                    part = self._loss(batch) * (len(batch.rows) / len(rows))
                self._scaled(part).backward()  # type: ignore[no-untyped-call]
                mean, tokens = mean + part.detach(), tokens + batch.tokens
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return None
        return mean, tokens


class _Update:
    """
    An optimizer step: AdamW under a schedule of learning rates, with clipped gradients and, in fp16, a scaled loss.

    Attributes:
        skipped: Steps left out because a gradient overflowed fp16.
    """

    def __init__(self, parameters: Parameters, recipe: Recipe, total: int, device: Device, what: str) -> None:
        self.skipped = 0
        self._taken, self._total, self._what, self._device = 0, total, what, device
        self._parameters, self._clip_norm = parameters, recipe.clip_norm
        warmup = int(recipe.warmup_fraction * total)
        self._optimizer = torch.optim.AdamW(parameters.groups, weight_decay=recipe.weight_decay, fused=True)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda step: rate_factor(step, warmup=warmup, total=total)
        )
        self._scaler = torch.amp.GradScaler(device.kind, enabled=device.precision == "fp16")
        self._scale = self._scaler.get_scale()

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss times fp16's scale, to call ``backward`` on."""
        return self._scaler.scale(loss)

    def step(self, mean: Tensor) -> float:
        """Change the parameters by the gradients at hand, and clear these; gives the batch's mean loss, shape (), as a number."""
        # The fused AdamW divides by this as it reads the gradients; clipping them first would be a pass more over all.
        norm = self._parameters.gradient_norm()
        self._optimizer.grad_scale = (norm / (self._scale * self._clip_norm)).clamp(min=1.0)  # type: ignore[attr-defined]
        loss, length = torch.stack([mean, norm.to(mean.device)]).tolist()  # here a GPU is waited for
        if not math.isfinite(loss):
            raise self._diverged(f"loss is {loss}")
        if not math.isfinite(length) and not self._scaler.is_enabled():  # which skips such a step
            raise self._diverged(f"the gradient's norm is {length}")
        try:
            self._scaler.step(self._optimizer)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise DoesNotFit(f"{self._what}: weights, gradients and optimizer state alone do not fit {self._device.name}") from None
        self._scaler.update()
        self._parameters.clear_gradients()
        before, self._scale = self._scale, self._scaler.get_scale()
        if self._scale < before:
            self.skipped += 1
            if self._scale < 1.0:
                raise self._diverged("gradients overflow fp16 at any loss scale")
        else:
            self._schedule.step()
        self._taken += 1
        return float(loss)

    def _diverged(self, why: str) -> TrainingDiverged:
        rates = ", ".join(f"{rate:.3g}" for rate in self._schedule.get_last_lr())
        return TrainingDiverged(f"{self._what}: {why} at step {self._taken + 1} of {self._total}, learning rate {rates}; lower it")


class _Curve:
    """
    The learning curve.

    Attributes:
        points: Step and mean loss since the point before.
    """

    def __init__(self, total: int) -> None:
        self.points: list[tuple[int, float]] = []
        self._marks = _evenly(total, min(CURVE_POINTS, total))
        self._step, self._sum = 0, 0.0

    def add(self, loss: float) -> None:
        """The next step's loss."""
        self._step, self._sum = self._step + 1, self._sum + loss
        if self._step in self._marks:
            self.points.append((self._step, self._sum / (self._step - (self.points[-1][0] if self.points else 0))))
            self._sum = 0.0


def _evenly(total: int, times: int) -> set[int]:
    """That many steps of all, at even distances, the last one among them."""
    return {round(total * (i + 1) / times) for i in range(times)}


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
