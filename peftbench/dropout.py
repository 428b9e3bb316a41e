"""Dropout on CPU, where torch draws its masks one number at a time on one thread."""

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_VALUES = 1 << 16  # that a draw can have
_BLOCK = 1 << 20  # draws at a time


class Masks:
    """
    A stream of random zeros and ones, seeded from torch's global generator when it is made.

    Four come out of each 64-bit number of numpy's fastest generator. Many are drawn at once, since an operation on few numbers
    takes longer to begin than to do.
    """

    def __init__(self) -> None:
        seed = int(torch.empty((), dtype=torch.int64).random_().item())
        self._generator = np.random.Generator(np.random.SFC64(seed))
        self._drawn: dict[tuple[int, torch.dtype], Tensor] = {}

    def take(self, n: int, zeros: int, dtype: torch.dtype) -> Tensor:
        """The next n of which on average this many of 65,536 are zero, shape (n,)."""
        if n > _BLOCK:
            return self._draw(n, zeros, dtype)
        drawn = self._drawn.get((zeros, dtype))
        if drawn is None or n > len(drawn):
            drawn = self._draw(max(_BLOCK, 4 * n), zeros, dtype)
        taken, self._drawn[zeros, dtype] = drawn[:n], drawn[n:]
        return taken

    def _draw(self, n: int, zeros: int, dtype: torch.dtype) -> Tensor:
        numbers = self._generator.integers(-(2**63), 2**63 - 1, size=(n + 3) // 4, dtype=np.int64, endpoint=True)
        most = zeros - _VALUES // 2 - 1  # of a draw that gives 0
        with torch.inference_mode(False):  # what is left over may be used in training later
            return torch.from_numpy(numbers).view(torch.int16)[:n].gt_(most).to(dtype)


class Dropout(nn.Dropout):
    """`torch.nn.Dropout` with p to the nearest 1/65536."""

    masks: Masks

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and type as ``x``."""
        drawn = self.draw(x)
        if drawn is None:
            return x
        dropped: Tensor = _Dropout.apply(x, *drawn)  # type: ignore[no-untyped-call]
        return dropped

    def draw(self, x: Tensor) -> tuple[Tensor, float] | None:
        """What to multiply ``x`` with: zeros and ones of its shape and type, and a number; None if all of it is kept."""
        zeros = round(self.p * _VALUES)
        if not self.training or zeros == 0:
            return None
        if zeros == _VALUES:
            return torch.zeros_like(x), 1.0
        return self.masks.take(x.numel(), zeros, x.dtype).view(x.shape), _VALUES / (_VALUES - zeros)


def scaled(x: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """scale · x · mask, in one pass and rounded once; ``x`` itself without a mask."""
    return x if mask is None else torch.addcmul(_zero(x.dtype), x, mask, value=scale)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.scale = scale
        return scaled(x, mask, scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (mask,) = ctx.saved_tensors
        return scaled(gradient, mask, ctx.scale), None, None


@functools.cache
def _zero(dtype: torch.dtype) -> Tensor:
    return torch.zeros((), dtype=dtype)
