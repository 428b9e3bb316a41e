"""
Parts of a training step on CPU that cost more than they need to, with the same mathematics for less.

A profile of MiniLM's step on two cores, packed: torch draws dropout masks one by one on one thread, and each backward pass
allocates and clears a gradient as large as the whole vocabulary for the few rows that a batch looks up.
"""

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor, nn

_DRAWS = 1 << 16
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # of glibc's malloc.h


def dropout(x: Tensor, p: float) -> Tensor:
    """
    Zero elements with probability p, to the nearest 1/65536, and scale the rest so that the mean stays.

    Four independent 16-bit draws come out of each 64-bit random number of torch's global generator.
    """
    threshold = round(p * _DRAWS)
    if threshold == _DRAWS:
        return x * 0.0
    draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    keep = draws[: x.numel()].view(x.shape) >= threshold - _DRAWS // 2
    dropped: Tensor = _Dropout.apply(x, keep, _DRAWS / (_DRAWS - threshold))  # type: ignore[no-untyped-call]
    return dropped


class Dropout(nn.Dropout):
    """`torch.nn.Dropout` by `dropout`."""

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and type as ``x``."""
        return dropout(x, self.p) if self.training and 0 < self.p < 1 else super().forward(x)


class RowEmbedding(nn.Embedding):
    """
    `torch.nn.Embedding` whose weight keeps one gradient buffer, of which only the rows that were used are cleared.

    The buffer becomes ``weight.grad``; setting that to None, as ``zero_grad`` does, starts the next step.
    """

    _buffer: Tensor | None = None
    _used: Tensor

    def forward(self, ids: Tensor) -> Tensor:
        """Rows of the weight: ids of shape (…) give (…, width)."""
        if not (torch.is_grad_enabled() and self.weight.requires_grad):
            return super().forward(ids)
        rows: Tensor = _Lookup.apply(self.weight, ids, self)  # type: ignore[no-untyped-call]
        return rows

    def add_gradient(self, ids: Tensor, gradient: Tensor) -> None:
        """Accumulate what flows into the rows that were looked up: (N,) and (N, width)."""
        if self.padding_idx is not None:
            real = ids != self.padding_idx
            ids, gradient = ids[real], gradient[real]
        if self.weight.grad is None:
            if self._buffer is None:
                self._buffer = torch.zeros_like(self.weight)
            else:
                self._buffer.index_fill_(0, self._used, 0.0)
            self._used, self.weight.grad = ids, self._buffer
        elif self.weight.grad is self._buffer:
            self._used = torch.cat([self._used, ids])
        self.weight.grad.index_add_(0, ids, gradient.to(self.weight.dtype))


@functools.cache
def retain_memory() -> None:
    """
    Have glibc keep what a step has freed for the next one, where it would hand it back to the system and fault it in again.

    Holds for the whole process; does nothing where the C library is another one.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    for parameter, size in ((_M_TRIM_THRESHOLD, 2**31 - 1), (_M_MMAP_THRESHOLD, 2**25), (_M_TOP_PAD, 2**26)):
        mallopt(parameter, size)


def economize(model: nn.Module) -> None:
    """Replace dropout and word embeddings of a model on the CPU, in place; call it after adapters are attached."""
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.__class__ = Dropout
        elif type(module) is nn.Embedding and module.weight.requires_grad and not _has_special_gradient(module):
            module.__class__ = RowEmbedding


def _has_special_gradient(embedding: nn.Embedding) -> bool:
    return embedding.sparse or embedding.scale_grad_by_freq or embedding.max_norm is not None


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(keep)
        ctx.scale = scale
        return torch.ops.aten.native_dropout_backward(x, keep, scale)  # type: ignore[no-any-return]  # x · keep · scale, fused

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return torch.ops.aten.native_dropout_backward(gradient, *ctx.saved_tensors, ctx.scale), None, None


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, module: RowEmbedding) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.module = module
        return weight.index_select(0, ids.reshape(-1)).view(*ids.shape, -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        (ids,) = ctx.saved_tensors
        ctx.module.add_gradient(ids.reshape(-1), gradient.reshape(-1, gradient.shape[-1]))
        return None, None, None
