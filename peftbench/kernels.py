"""
Parts of a training step on CPU that cost more than they need to, with the same mathematics for less.

A profile of MiniLM's step on two cores, packed: torch draws dropout masks one by one on one thread, autocast converts frozen
weights anew in every step, each backward pass makes a gradient as large as the whole vocabulary, over which AdamW then passes, for
the few rows that a batch looks up, and AdamW spends as long between a hundred parameters as on them.
"""

import ctypes
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

ONEDNN_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
"""None where torch is built without oneDNN."""

_ALIGNMENT = 16  # numbers, a cache line of fp32
_DRAWS = 1 << 16
_NUMBERS = 1 << 18
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # of glibc's malloc.h


class Noise:
    """
    A stream of random 16-bit integers, seeded from torch's global generator when it is made.

    Four come out of each 64-bit number of numpy's fastest generator, of which many are drawn at once.
    """

    def __init__(self) -> None:
        seed = int(torch.empty((), dtype=torch.int64).random_().item())
        self._generator = np.random.Generator(np.random.SFC64(seed))
        self._drawn = torch.empty(0, dtype=torch.int16)

    def take(self, n: int) -> Tensor:
        """The next n integers of -32768…32767, shape (n,), to be changed at will."""
        if n > len(self._drawn):
            size = max(_NUMBERS, (n + 3) // 4)
            numbers = self._generator.integers(-(2**63), 2**63 - 1, size=size, dtype=np.int64, endpoint=True)
            self._drawn = torch.from_numpy(numbers).view(torch.int16)
        taken, self._drawn = self._drawn[:n], self._drawn[n:]
        return taken


class Dropout(nn.Dropout):
    """
    `torch.nn.Dropout` with p to the nearest 1/65536.

    A draw becomes a mask of all ones or all zeros by integer operations, which the processor does many at a time.
    """

    noise: Noise

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and type as ``x``."""
        threshold = round(self.p * _DRAWS)
        if not self.training or threshold == 0:
            return x
        if threshold == _DRAWS:
            return x * 0.0
        least = threshold - _DRAWS // 2  # of a draw that is kept
        draws = self.noise.take(x.numel()).view(x.shape)
        keep = torch.rsub(draws.clamp_(least - 1, least), least - 1).to(_INTEGERS[x.element_size()])  # -1, all bits set, or 0
        dropped: Tensor = _Dropout.apply(x, keep, _DRAWS / (_DRAWS - threshold))  # type: ignore[no-untyped-call]
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
        if weight.grad is None:
            weight.grad = torch.mm(gradient.t(), x).to(weight.dtype)
        elif x.dtype == weight.dtype:
            weight.grad.addmm_(gradient.t(), x)
        else:
            weight.grad.add_(torch.mm(gradient.t(), x))
        if self.bias is not None:
            sums = gradient.sum(0)
            self.bias.grad = sums.to(self.bias.dtype) if self.bias.grad is None else self.bias.grad.add_(sums)

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
    noise = Noise()
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.__class__ = Dropout
            module.noise = noise  # type: ignore[assignment]
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
def flattened(groups: Sequence[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """
    For a while, the parameters of each group, and their gradients, are views of one long tensor.

    Yields the groups with the long tensors in place of the parameters: an optimizer passes over one of them in half the time that a
    hundred take. Gradients must be cleared in place. A parameter that nothing flows into has a gradient of 0, not None.
    """
    parts: list[Tensor] = []
    flat_groups = []
    try:
        for group in groups:
            by_type: dict[torch.dtype, list[Tensor]] = {}
            for parameter in group["params"]:
                by_type.setdefault(parameter.dtype, []).append(parameter)
            flat_groups.append({**group, "params": [_flatten(same) for same in by_type.values()]})
            parts += group["params"]
        yield flat_groups
    finally:
        for parameter in parts:
            parameter.data, parameter.grad = parameter.data.clone(), None


def _flatten(parameters: Sequence[Tensor]) -> nn.Parameter:
    sizes = [-(-p.numel() // _ALIGNMENT) * _ALIGNMENT for p in parameters]
    flat = nn.Parameter(parameters[0].new_zeros(sum(sizes)))
    flat.grad = torch.zeros_like(flat)
    for parameter, *parts in zip(parameters, torch.split(flat.data, sizes), torch.split(flat.grad, sizes), strict=True):
        data, gradient = (part[: parameter.numel()].view(parameter.shape) for part in parts)
        parameter.data, parameter.grad = data.copy_(parameter.data), gradient
    return flat


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
    def forward(ctx: Any, x: Tensor, keep: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(keep)
        ctx.scale = scale
        return _masked(x, keep).mul_(scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _masked(gradient, *ctx.saved_tensors).mul_(ctx.scale), None, None


def _masked(x: Tensor, keep: Tensor) -> Tensor:
    return torch.bitwise_and(x.contiguous().view(keep.dtype), keep).view(x.dtype)


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
