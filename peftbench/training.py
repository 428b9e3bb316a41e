"""The loop. It knows a loss of a batch; not which method, adapter or teacher is behind it."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from peftbench.device import Device, DoesNotFit, is_out_of_memory
from peftbench.errors import PeftbenchError
from peftbench.graphs import Graphs
from peftbench.measure import Stopwatch
from peftbench.packing import Batch, Batches, Row
from peftbench.records import MemoryUse

CURVE_POINTS = 50

SWEEP_STEPS, FAINT = 100, 1e-30
"""
Every so many steps on a CPU, what AdamW's moving average of gradients holds below this becomes 0.

A word that no longer occurs would leave denormal numbers there, some 800 steps on and for good, which a processor is slow with: on
SST-2 AdamW took twice its time after 2,500 steps. So small an average moves a parameter by less than 1e-22 of the learning rate.
"""


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
        replayed_steps: Optimizer steps that were CUDA graphs, which take a fraction of the time of those that a host launches.
        memory: How the batches went through the device in the end.
        dev_curve: Optimizer step, seconds of the loop up to there, and what was evaluated then.
    """

    runtime_seconds: float
    steps: int
    examples: int
    tokens: int
    learning_curve: tuple[tuple[int, float], ...]
    skipped_steps: int
    replayed_steps: int
    memory: MemoryUse
    dev_curve: tuple[tuple[int, float, float], ...]


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
    capture: bool = False,
    evaluate: Callable[[], float] | None = None,
    evaluations: int = 0,
) -> Fit:
    """
    Train with AdamW, linear warm-up and decay, and gradient clipping.

    A step always learns from its whole batch. Where memory runs out, steps are no longer CUDA graphs, then fewer examples go
    through the device at once from then on, and if one alone is too many, activations are computed a second time instead of kept.

    Args:
        model: Put into training mode; its parameters change in place.
        loss: Mean loss of a batch, shape (); runs under the device's autocast.
        batches: What a step learns from.
        parameters: What AdamW changes, and the keeper of its gradients.
        examples_at_once: How many go through the device together at first.
        progress: Told each step.
        what: Name of the work, for progress and errors.
        capture: Replay steps as CUDA graphs. Loss and model must launch the same operations for each `Row` of a shape and wait
            for none.
        evaluate: A figure of the model as it is; draws no random numbers and leaves the model in training mode.
        evaluations: How often to evaluate, evenly, the last time after the last step; takes no part in the runtime.

    Raises:
        TrainingDiverged: If a loss or gradient is not finite, or overflows fp16 at every loss scale, naming step and learning rate.
        DoesNotFit: If one example at a time, with activations computed twice, is too much.
    """
    total = recipe.epochs * len(batches)
    update = _Update(parameters, recipe, total, device, what)
    steps = _Steps(model, loss, batches, parameters, update, device, examples_at_once, what, capture=capture)
    curve, evaluated = _Curve(total), list[tuple[int, float, float]]()
    due = _evenly(total, evaluations) if evaluate is not None else set()
    step, examples, tokens = 0, 0, 0
    model.train()
    with Stopwatch(device) as watch:
        order = itertools.chain.from_iterable(batches.epoch() for _ in range(recipe.epochs))
        following = next(order, None)
        while (rows := following) is not None:
            outcome = steps.launch(rows)
            following = next(order, None)
            steps.prepare(following)
            curve.add(update.settle(outcome))
            step, examples, tokens = step + 1, examples + len(rows), tokens + batches.tokens(rows)
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
        replayed_steps=steps.replayed,
        memory=steps.memory,
        dev_curve=tuple(evaluated),
    )


class _Steps:
    """
    Optimizer steps, each over its whole batch, from as many examples at a time as the device has memory for.

    Attributes:
        memory: How many that is by now.
        replayed: Steps that were replayed as CUDA graphs.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Batch], Tensor],
        batches: Batches,
        parameters: Parameters,
        update: "_Update",
        device: Device,
        examples_at_once: int,
        what: str,
        *,
        capture: bool,
    ) -> None:
        self.memory, self.replayed = MemoryUse(examples_at_once=examples_at_once), 0
        self._model, self._loss, self._batches, self._parameters = model, loss, batches, parameters
        self._update, self._device, self._what = update, device, what
        self._graphs = Graphs(device.name) if capture else None
        self._prepared: tuple[Sequence[int], Row | None] = ((), None)

    def launch(self, rows: Sequence[int]) -> Tensor:
        """Change the parameters by what these examples teach; gives what `_Update.settle` reads, and a GPU is not waited for."""
        while True:
            try:
                if (outcome := self._replay(rows)) is not None:
                    return outcome
                mean = self._accumulate(self._parts(rows), len(rows))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            else:
                return self._update_launched(mean)
            self._make_room()  # now that the error, which holds on to what was computed, is gone

    def prepare(self, rows: Sequence[int] | None) -> None:
        """Make a step's batch ready, while a GPU is still at work on the one before; None if there is no next step."""
        if self._graphs is not None and rows is not None:
            self._prepared = rows, self._batches.row(rows) if len(rows) <= self.memory.examples_at_once else None

    def _replay(self, rows: Sequence[int]) -> Tensor | None:
        """The step's outcome; None if it is to be launched."""
        if self._graphs is None:
            return None
        if self._prepared[0] is not rows:
            self.prepare(rows)
        row = self._prepared[1]
        outcome = None if row is None else self._graphs.replay(row, self._learn)
        self.replayed += outcome is not None
        return outcome

    def _update_launched(self, mean: Tensor) -> Tensor:
        """Not to be tried again: the parameters may have changed."""
        try:
            return self._update.launch(mean)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise DoesNotFit(f"{self._what}: weights, gradients and optimizer state alone do not fit {self._device.name}") from None

    def _learn(self, batch: Batch) -> Tensor:
        """A step over a whole batch."""
        return self._update.launch(self._accumulate([batch], len(batch.rows)))

    def _parts(self, rows: Sequence[int]) -> Iterator[Batch]:
        """The batch, as many examples at a time as fit; laid out as for a graph where the next of its shape will be one."""
        if self._graphs is not None and (row := self._prepared[1]) is not None:
            yield row.batch(row.numbers.to(self._device.name))
            return
        size = self.memory.examples_at_once
        for start in range(0, len(rows), size):
            yield self._batches.collate(rows[start : start + size])

    def _accumulate(self, parts: Iterable[Batch], examples: int) -> Tensor:
        """Leave the gradients of that many examples in the parameters; gives their mean loss, shape ()."""
        mean = torch.zeros((), device=self._device.name)
        for batch in parts:
            with self._device.autocast():
                part = self._loss(batch) * (len(batch.rows) / examples)
            self._update.scaled(part).backward()  # type: ignore[no-untyped-call]
            mean = mean + part.detach()
        return mean

    def _make_room(self) -> None:
        """Drop what the step had so far, and graphs or, where there are none, take fewer examples at once from now on."""
        self._parameters.clear_gradients()
        had_graphs, self._graphs = self._graphs is not None, None
        self._device.release_memory()
        if not had_graphs:
            self.memory = relieve(self.memory, self._model, self._device, self._what)
        self.memory = dataclasses.replace(self.memory, times_out_of_memory=self.memory.times_out_of_memory + 1)


class _Update:
    """
    AdamW under a schedule of learning rates, with clipped gradients and, in fp16, a scaled loss.

    Attributes:
        skipped: Steps left out because a gradient overflowed fp16.
    """

    def __init__(self, parameters: Parameters, recipe: Recipe, total: int, device: Device, what: str) -> None:
        self.skipped = 0
        self._settled, self._total, self._what, self._clip_norm = 0, total, what, recipe.clip_norm
        self._parameters, self._peaks = parameters, [group["lr"] for group in parameters.groups]
        self._warmup = int(recipe.warmup_fraction * total)
        self._sweeps = device.kind == "cpu"
        on_gpu = device.kind == "cuda"  # where a graph reads the rates from memory
        groups = [
            {**group, "lr": torch.tensor(peak, device=device.name) if on_gpu else peak}
            for group, peak in zip(parameters.groups, self._peaks, strict=True)
        ]
        self._optimizer = torch.optim.AdamW(groups, weight_decay=recipe.weight_decay, fused=True, capturable=on_gpu)
        self._scaler = torch.amp.GradScaler(device.kind, enabled=device.precision == "fp16")
        self._one = torch.ones((), device=device.name)
        self._set_rates()

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss times fp16's scale, to call ``backward`` on."""
        return self._scaler.scale(loss)

    def launch(self, mean: Tensor) -> Tensor:
        """Change the parameters by the gradients at hand, and clear these; gives what `settle` reads, shape (4,)."""
        scale = self.scaled(self._one)
        # The fused AdamW divides by this as it reads the gradients; clipping them first would be a pass more over all.
        norm = self._parameters.gradient_norm()
        self._optimizer.grad_scale = (norm / (scale * self._clip_norm)).clamp(min=1.0)  # type: ignore[attr-defined]
        if not self._scaler.is_enabled():  # which tells it by itself: nothing is learned from what is not finite
            self._optimizer.found_inf = (~(norm + mean).isfinite()).float()  # type: ignore[attr-defined]
        self._scaler.step(self._optimizer)
        self._scaler.update()
        if self._sweeps and self._settled % SWEEP_STEPS == SWEEP_STEPS - 1:
            for state in self._optimizer.state.values():
                torch.hardshrink(state["exp_avg"], FAINT, out=state["exp_avg"])
        self._parameters.clear_gradients()
        return torch.stack([mean, norm, scale, self.scaled(self._one)])

    def settle(self, outcome: Tensor) -> float:
        """Wait for the step and see what came of it; gives the batch's mean loss."""
        loss, norm, scale, scale_after = outcome.tolist()  # here a GPU is waited for
        self._settled += 1
        if not math.isfinite(loss):
            raise self._diverged(f"loss is {loss}")
        if not math.isfinite(norm) and not self._scaler.is_enabled():  # which skips such a step
            raise self._diverged(f"the gradient's norm is {norm}")
        if scale_after < scale:
            self.skipped += 1
            if scale_after < 1.0:
                raise self._diverged("gradients overflow fp16 at any loss scale")
        else:
            self._set_rates()
        return float(loss)

    def _set_rates(self) -> None:
        factor = rate_factor(self._settled - self.skipped, warmup=self._warmup, total=self._total)
        self._rates = [peak * factor for peak in self._peaks]
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def _diverged(self, why: str) -> TrainingDiverged:
        rates = ", ".join(f"{rate:.3g}" for rate in self._rates)
        return TrainingDiverged(f"{self._what}: {why} at step {self._settled} of {self._total}, learning rate {rates}; lower it")


class _Curve:
    """
    The learning curve.

    Attributes:
        points: Step and mean loss since the point before.
    """

    def __init__(self, total: int) -> None:
        self.points: list[tuple[int, float]] = []
        self._marks = _evenly(total, CURVE_POINTS)
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


def relieve(memory: MemoryUse, model: Any, device: Device, what: str) -> MemoryUse:
    """
    Half as many examples at once or, where it is one already, activations computed twice.

    Not so on CPU: `dropout.Masks` would draw other dropout masks the second time.
    """
    if memory.examples_at_once > 1:
        return dataclasses.replace(memory, examples_at_once=memory.examples_at_once // 2)
    if memory.gradient_checkpointing or device.kind == "cpu" or not getattr(model, "supports_gradient_checkpointing", False):
        raise DoesNotFit(f"{what}: out of memory with one example at a time; use a smaller model or a larger device")
    checkpoint_activations(model)
    return dataclasses.replace(memory, gradient_checkpointing=True)


def checkpoint_activations(model: Any) -> None:
    """Have a transformers model keep the input of each layer only and run it again in the backward pass."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable  # older transformers
    enable({"use_reentrant": False})


def rate_factor(step: int, *, warmup: int, total: int) -> float:
    """Share of the peak learning rate at a step: 0 → 1 over the warm-up, then linearly to 0 at the end, as in transformers."""
    if step < warmup:
        return step / warmup
    return max(0.0, (total - step) / max(1, total - warmup))
