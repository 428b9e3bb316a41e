"""
Optimizer steps as CUDA graphs.

At sixteen phrases to a step a GPU waits for its host: BERT-large under LoRA launches thousands of operations, each of which takes
longer to launch than to do. A graph of them is launched at once.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from peftbench.packing import Batch, Row


@dataclass(frozen=True)
class _Captured:
    """A step that reads its batch from ``numbers`` and leaves its outcome where it left the first."""

    graph: torch.cuda.CUDAGraph
    numbers: Tensor
    outcome: Tensor


class Graphs:
    """
    Steps on a CUDA device, one graph for each shape of `Row`.

    The first step of a shape runs as it is, and the first of all makes the optimizer's state, which a graph finds where it was; the
    second is captured, which takes about as long. Graphs share their memory, as no two are at work at a time: an outcome is to be
    read before the next step.

    Args:
        step: Learns from a batch, all of it on the device: launches the same operations for each batch of a shape, and waits for
            none. Gives a tensor.
        device: As torch writes it.
    """

    def __init__(self, step: Callable[[Batch], Tensor], device: str) -> None:
        self._step, self._device = step, device
        self._captured: dict[tuple[int, int], _Captured] = {}
        self._met: set[tuple[int, int]] = set()
        self._pool, self._stream = torch.cuda.graph_pool_handle(), _capture_stream(device)

    def take(self, row: Row) -> Tensor:
        """What the step gives; the host does not wait for it."""
        numbers = row.numbers.pin_memory()  # without which the copy would wait for what runs
        if row.shape not in self._met:
            outcome = self._step(row.batch(numbers.to(self._device, non_blocking=True)))
            self._met.add(row.shape)
            return outcome
        if row.shape not in self._captured:
            self._captured[row.shape] = self._capture(row)
        captured = self._captured[row.shape]
        captured.numbers.copy_(numbers, non_blocking=True)
        captured.graph.replay()
        return captured.outcome

    def _capture(self, row: Row) -> _Captured:
        graph, numbers = torch.cuda.CUDAGraph(), row.numbers.to(self._device)
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            outcome = self._step(row.batch(numbers))
        return _Captured(graph, numbers, outcome)


@functools.cache
def _capture_stream(device: str) -> torch.cuda.Stream:
    """The same for all: the library of matrix products keeps memory for each stream it has worked on."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
