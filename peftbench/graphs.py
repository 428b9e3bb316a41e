"""
Optimizer steps as CUDA graphs.

At sixteen phrases to a step a GPU waits for its host: BERT-large under LoRA launches thousands of operations, each of which takes
longer to launch than to do. A graph of them is launched at once.
"""

import functools
import gc
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

    The first step of a shape is to be launched, which loads what it needs, and the first of all makes the optimizer's state, which
    a graph finds where it was. The second is captured, in about the time that launching it takes, and replayed, as all after it.
    Graphs share their memory, as no two are at work at a time: an outcome is to be read before the next step.
    """

    def __init__(self, device: str) -> None:
        """For a device, as torch writes it, such as ``cuda:0``."""
        gc.collect()  # a failed test keeps its graphs in a cycle, and one that dies while another is captured or at work breaks it
        self._device, self._pool, self._stream = device, torch.cuda.graph_pool_handle(), _capture_stream(device)
        self._met: set[tuple[int, int]] = set()
        self._captured: dict[tuple[int, int], _Captured] = {}

    def replay(self, row: Row, step: Callable[[Batch], Tensor]) -> Tensor | None:
        """
        Take a step without waiting for it.

        Args:
            step: Learns from a batch, all of it on the device: launches the same operations for each batch of a shape, and waits
                for none. Gives a tensor.

        Returns:
            What the step gives; None if the shape is new and the caller is to launch this one.
        """
        if row.shape not in self._met:
            self._met.add(row.shape)
            return None
        if row.shape not in self._captured:
            self._captured[row.shape] = self._capture(row, step)
        captured = self._captured[row.shape]
        captured.numbers.copy_(row.numbers.pin_memory(), non_blocking=True)
        captured.graph.replay()
        return captured.outcome

    def _capture(self, row: Row, step: Callable[[Batch], Tensor]) -> _Captured:
        graph, numbers = torch.cuda.CUDAGraph(), row.numbers.to(self._device)
        # The stream twice, as torch's own context does not leave it if a capture cannot be ended.
        with (
            torch.cuda.device(self._device),
            torch.cuda.stream(self._stream),
            torch.cuda.graph(graph, pool=self._pool, stream=self._stream),
        ):
            outcome = step(row.batch(numbers))
        return _Captured(graph, numbers, outcome)


@functools.cache
def _capture_stream(device: str) -> torch.cuda.Stream:
    """The same for all: the library of matrix products keeps memory for each stream it has worked on."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
