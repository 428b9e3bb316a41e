"""
Parts of a training step on CPU that cost more than they need to, with the same mathematics for less.

A profile of MiniLM's step on two cores, packed: torch draws dropout masks one by one on one thread, autocast converts frozen
weights anew in every step, each backward pass makes a gradient as large as the whole vocabulary, over which AdamW then passes, for
the few rows that a batch looks up, and AdamW spends as long between a hundred parameters as on them.
"""

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftbench.parameters import supersede

ONEDNN_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
"""None where torch is built without oneDNN."""

_DRAWS = 1 << 16
_MASKS = 1 << 20
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # of glibc's malloc.h


class Masks:
    """
    A stream of random zeros and ones, seeded from torch's global generator when it is made.

    Four come out of each 64-bit number of numpy's fastest generator. Many are drawn at once, since an operation on few numbers takes
    longer to begin than to do.
    """

    def __init__(self) -> None:
        seed = int(torch.empty((), dtype=torch.int64).random_().item())
        self._generator = np.random.Generator(np.random.SFC64(seed))
        self._drawn: dict[tuple[int, torch.dtype], Tensor] = {}

    def take(self, n: int, zeros: int, dtype: torch.dtype) -> Tensor:
        """The next n of which on average this many of 65,536 are zero, shape (n,)."""
        drawn = self._drawn.get((zeros, dtype))
        if drawn is None or n > len(drawn):
            drawn = self._draw(max(_MASKS, n), zeros, dtype)
        taken, self._drawn[zeros, dtype] = drawn[:n], drawn[n:]
        return taken

    def _draw(self, n: int, zeros: int, dtype: torch.dtype) -> Tensor:
        numbers = self._generator.integers(-(2**63), 2**63 - 1, size=(n + 3) // 4, dtype=np.int64, endpoint=True)
        most = zeros - _DRAWS // 2 - 1  # of a draw that gives 0
        return torch.from_numpy(numbers).view(torch.int16).clamp_(most, most + 1).sub_(most).to(dtype)


class Dropout(nn.Dropout):
    """`torch.nn.Dropout` with p to the nearest 1/65536."""

    masks: Masks

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and type as ``x``."""
        zeros = round(self.p * _DRAWS)
        if not self.training or zeros == 0:
            return x
        if zeros == _DRAWS:
            return x * 0.0
        mask = self.masks.take(x.numel(), zeros, x.dtype).view(x.shape)
        dropped: Tensor = _Dropout.apply(x, mask, _DRAWS / (_DRAWS - zeros))  # type: ignore[no-untyped-call]
        return dropped


class RowEmbedding(nn.Embedding):
    """`torch.nn.Embedding` that adds to the gradient's rows in place, where autograd makes a gradient of the whole weight first."""

    _row_of: Tensor | None = None

    def forward(self, ids: Tensor) -> Tensor:
        """Rows of the weight: ids of shape (…) give (…, width)."""
        if self._row_of is not None:
            ids = self._row_of[ids]
        if not (torch.is_grad_enabled() and self.weight.requires_grad):
            return super().forward(ids)
        rows: Tensor = _Lookup.apply(self.weight, ids, self)  # type: ignore[no-untyped-call]
        return rows

    @contextmanager
    def narrowed(self, ids: Tensor) -> Iterator[None]:
        """
        For a while, the weight holds only the rows of these ids, shape (N,), so that the optimizer passes over no other.

        Rows that are never looked up get no gradient, so AdamW without weight decay would leave them as they are, too.
        """
        whole, padding = self.weight.data, self.padding_idx
        used = torch.unique(ids if padding is None else torch.cat([ids, torch.tensor([padding])]))
        self._row_of = torch.full((len(whole),), len(whole))  # an id that was not announced is out of range
        self._row_of[used] = torch.arange(len(used))
        self.padding_idx = None if padding is None else int(self._row_of[padding])
        self.weight.data = whole[used]
        try:
            yield
        finally:
            whole[used] = self.weight.data
            self.weight.data, self.weight.grad = whole, None
            self.padding_idx, self._row_of = padding, None

    def add_gradient(self, ids: Tensor, gradient: Tensor) -> None:
        """Accumulate what flows into the rows that were looked up: (N,) and (N, width)."""
        if self.padding_idx is not None:
            real = ids != self.padding_idx
            ids, gradient = ids[real], gradient[real]
        if self.weight.grad is None:
            self.weight.grad = torch.zeros_like(self.weight)
        elif supersede(self.weight):
            self.weight.grad.zero_()
        self.weight.grad.index_add_(0, ids, gradient.to(self.weight.dtype))


class Linear(nn.Linear):
    """
    `torch.nn.Linear` that keeps a frozen weight in autocast's type and adds to the gradients of a trained one in place.

    A frozen weight is written anew when torch counts a new version of it, which writing to its ``.data`` does not.
    """

    _cast: tuple[Any, list[Tensor]] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """As `torch.nn.Linear`: (…, in) → (…, out), in autocast's type where that is on."""
        weight, *bias = self._parameters_for_use()
        rows = x.to(weight.dtype).reshape(-1, x.shape[-1])
        if torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad):
            out: Tensor = _Linear.apply(rows, self.weight, self, weight, *bias)  # type: ignore[no-untyped-call]
        else:
            out = _product(rows, weight, *bias)
        return out.view(*x.shape[:-1], -1)  # outside of `_Linear`, whose result an adapter may add to in place

    def add_gradient(self, x: Tensor, gradient: Tensor) -> None:
        """Accumulate what flows back from (N, out) for inputs of (N, in)."""
        weight = self.weight
        if weight.grad is not None and x.dtype == weight.dtype:
            weight.grad.addmm_(gradient.t(), x, beta=0 if supersede(weight) else 1)
        else:
            _accumulate(weight, torch.mm(gradient.t(), x))
        if self.bias is not None:
            _accumulate(self.bias, gradient.sum(0))

    def _parameters_for_use(self) -> list[Tensor]:
        """Weight and bias, if there is one, in the type that they are multiplied in."""
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else self.weight.dtype
        parameters = [self.weight] if self.bias is None else [self.weight, self.bias]
        if self.weight.requires_grad:  # cannot be kept: the fused AdamW does not count its changes as new versions
            return [p.detach().to(dtype) for p in parameters]
        state = (dtype, *((p.data_ptr(), p._version) for p in parameters))
        if self._cast is None or self._cast[0] != state:
            with torch.inference_mode(False):  # what is kept may be used in training later
                self._cast = state, [p.detach().to(dtype) for p in parameters]
        return self._cast[1]


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
    """Replace dropout, linear layers and trained embeddings, in place; for the CPU, and after adapters are attached."""
    masks = Masks()
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.__class__ = Dropout
            module.masks = masks  # type: ignore[assignment]
        elif type(module) is nn.Embedding and module.weight.requires_grad and not _has_special_gradient(module):
            module.__class__ = RowEmbedding
        elif type(module) is nn.Linear and len({p.requires_grad for p in module.parameters(recurse=False)}) == 1:
            module.__class__ = Linear


def cast_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """
    Keep the linear layers that do not train in the type that autocast would convert them to in every step, in place.

    The numbers are the same; for a GPU, where BERT-large under an adapter would be read and written anew for each few examples.
    """
    for module in model.modules():
        if type(module) is nn.Linear and not any(p.requires_grad for p in module.parameters(recurse=False)):
            module.to(dtype)


@contextmanager
def only_words(model: nn.Module, ids: Tensor) -> Iterator[None]:
    """Have the trained word embedding of an economized model hold only the rows of these ids; see `RowEmbedding.narrowed`."""
    words = model.get_input_embeddings()  # type: ignore[operator]
    with words.narrowed(ids) if isinstance(words, RowEmbedding) else nullcontext():
        yield


def _has_special_gradient(embedding: nn.Embedding) -> bool:
    return embedding.sparse or embedding.scale_grad_by_freq or embedding.max_norm is not None


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.scale = scale
        return _scaled(x, mask, scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (mask,) = ctx.saved_tensors
        return _scaled(gradient, mask, ctx.scale), None, None


def _scaled(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    """scale · x · mask, in one pass and rounded once."""
    return torch.addcmul(x.new_zeros(()), x, mask, value=scale)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, parameter: Tensor, module: Linear, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        ctx.module = module
        ctx.save_for_backward(x if parameter.requires_grad else None, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if x is not None:
            ctx.module.add_gradient(x, gradient)
        into = _product(gradient, weight.t()) if ctx.needs_input_grad[0] else None
        return (into, *[None] * (len(ctx.needs_input_grad) - 1))


def _accumulate(parameter: Tensor, gradient: Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = gradient.to(parameter.dtype)
    elif supersede(parameter):
        parameter.grad.copy_(gradient)
    else:
        parameter.grad.add_(gradient)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """
    `torch.nn.functional.linear`; in fp32 by oneDNN, as torch does itself in 16 bits, where it would ask MKL.

    On an AMD EPYC with AVX-512 oneDNN did 10% to 25% more arithmetic a second at this suite's sizes.
    """
    if x.dtype == torch.float32 and ONEDNN_LINEAR is not None:
        product: Tensor = ONEDNN_LINEAR(x, weight, bias, "none", [], "")
        return product
    return F.linear(x, weight, bias)


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
