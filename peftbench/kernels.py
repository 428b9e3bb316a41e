"""
Parts of a training step on CPU that cost more than they need to, with the same mathematics for less.

A profile of MiniLM's step on two cores, packed: torch draws dropout masks one by one on one thread, autocast converts frozen
weights anew in every step, each backward pass makes a gradient as large as the whole vocabulary, over which AdamW then passes, for
the few rows that a batch looks up, and at some 200 tokens what autograd does around an operation takes as long as many of them do.
Layers that are fused here add to their gradients by themselves, which autograd's own functions and hooks on them do not see.
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

from peftbench.parameters import supersede

ONEDNN_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
"""None where torch is built without oneDNN."""

_DRAWS = 1 << 16
_MASKS = 1 << 20
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # of glibc's malloc.h


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
        if n > _MASKS:
            return self._draw(n, zeros, dtype)
        drawn = self._drawn.get((zeros, dtype))
        if drawn is None or n > len(drawn):
            drawn = self._draw(max(_MASKS, 4 * n), zeros, dtype)
        taken, self._drawn[zeros, dtype] = drawn[:n], drawn[n:]
        return taken

    def _draw(self, n: int, zeros: int, dtype: torch.dtype) -> Tensor:
        numbers = self._generator.integers(-(2**63), 2**63 - 1, size=(n + 3) // 4, dtype=np.int64, endpoint=True)
        most = zeros - _DRAWS // 2 - 1  # of a draw that gives 0
        with torch.inference_mode(False):  # what is left over may be used in training later
            return torch.from_numpy(numbers).view(torch.int16)[:n].clamp_(most, most + 1).sub_(most).to(dtype)


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
        zeros = round(self.p * _DRAWS)
        if not self.training or zeros == 0:
            return None
        if zeros == _DRAWS:
            return torch.zeros_like(x), 1.0
        return self.masks.take(x.numel(), zeros, x.dtype).view(x.shape), _DRAWS / (_DRAWS - zeros)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: tuple[Tensor, Tensor],
    keys: tuple[Tensor, Tensor],
    bias: Tensor,
    dropout: Dropout,
) -> Tensor:
    """
    Dot-product attention of items that are spread over padded rows for it and collected again.

    Args:
        query: Shape (Q, E).
        key: Shape (T, E), as ``value``.
        queries: For H heads of size D, the row of (Q · H, D) that each cell of (R · H · C, D) takes, and the cell of each row.
        keys: The same for keys and values: T items, and rows of K cells.
        bias: Added to the scores, shape (R, 1, C, K).

    Returns:
        Shape (Q, E).
    """
    if torch.is_autocast_enabled("cpu"):  # some adapters give fp32, which autocast would convert for the products alone
        query, key, value = (x.to(torch.get_autocast_dtype("cpu")) for x in (query, key, value))
    attended: Tensor = _Attention.apply(query, key, value, *queries, *keys, bias, dropout)  # type: ignore[no-untyped-call]
    return attended


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` that can make the addition and the dropout before it a part of it."""

    def after_adding(self, x: Tensor, added: Tensor, dropout: Dropout | None) -> Tensor:
        """What it makes of x + dropout(added), tensors of one shape; adds to its gradients by itself."""
        drawn = None if dropout is None else dropout.draw(added)
        out: Tensor = _AddAndNormalize.apply(x, added, self, *drawn or (None, 1.0))  # type: ignore[no-untyped-call]
        return out


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
        (out,) = project(x, [self])
        return out

    def add_gradient(self, x: Tensor, gradient: Tensor) -> None:
        """Accumulate what flows back from (N, out) for inputs of (N, in)."""
        weight = self.weight
        if weight.grad is not None and x.dtype == weight.dtype:
            weight.grad.addmm_(gradient.t(), x, beta=0 if supersede(weight) else 1)
        else:
            _accumulate(weight, torch.mm(gradient.t(), x))
        if self.bias is not None:
            _accumulate(self.bias, gradient.sum(0))

    def parameters_for_use(self) -> list[Tensor]:
        """Weight and bias, if there is one, in the type that they are multiplied in."""
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else self.weight.dtype
        parameters = [self.weight] if self.bias is None else [self.weight, self.bias]
        if self.weight.requires_grad:  # cannot be kept: the fused AdamW does not count its changes as new versions
            return [p if p.dtype == dtype else p.detach().to(dtype) for p in parameters]
        state = (dtype, *((p.data_ptr(), p._version) for p in parameters))
        if self._cast is None or self._cast[0] != state:
            with torch.inference_mode(False):  # what is kept may be used in training later
                self._cast = state, [p.detach().to(dtype) for p in parameters]
        return self._cast[1]


def project(x: Tensor, layers: Sequence[Linear]) -> tuple[Tensor, ...]:
    """What some linear layers make of the same (…, in): one (…, out) each."""
    operands = [layer.parameters_for_use() for layer in layers]
    rows = x.to(operands[0][0].dtype)
    if x.dim() != 2:
        rows = rows.reshape(-1, x.shape[-1])
    outs: tuple[Tensor, ...]
    if torch.is_grad_enabled() and (x.requires_grad or any(layer.weight.requires_grad for layer in layers)):
        # A layer adds to its gradients by itself; autograd is told of its weight where nothing else would have it come by here.
        reason = None if x.requires_grad else next(layer.weight for layer in layers if layer.weight.requires_grad)
        outs = _Projection.apply(rows, reason, layers, operands)  # type: ignore[no-untyped-call]
    else:
        outs = tuple(_product(rows, *operand) for operand in operands)
    if x.dim() != 2:  # not in `_Projection`, to whose results an adapter may add in place
        outs = tuple(out.view(*x.shape[:-1], -1) for out in outs)
    return outs


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
    """Replace dropout, normalization, linear layers and trained embeddings, in place; for CPU, after adapters are attached."""
    masks = Masks()
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.__class__ = Dropout
            module.masks = masks  # type: ignore[assignment]
        elif type(module) is nn.Embedding and module.weight.requires_grad and not _has_special_gradient(module):
            module.__class__ = RowEmbedding
        elif type(module) is nn.LayerNorm:
            module.__class__ = LayerNorm
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


def _scaled(x: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """scale · x · mask, in one pass and rounded once; ``x`` itself without a mask."""
    return x if mask is None else torch.addcmul(_zero(x.dtype), x, mask, value=scale)


@functools.cache
def _zero(dtype: torch.dtype) -> Tensor:
    return torch.zeros((), dtype=dtype)


class _AddAndNormalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, added: Tensor, norm: nn.LayerNorm, mask: Tensor | None, scale: float) -> Tensor:
        total = x + added if mask is None else torch.addcmul(x, added, mask, value=scale)
        out, mean, inverse = torch.native_layer_norm(total, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        ctx.save_for_backward(total, mean, inverse, mask)
        ctx.norm, ctx.scale, ctx.type_of_x, ctx.type_of_added = norm, scale, x.dtype, added.dtype
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        total, mean, inverse, mask = ctx.saved_tensors
        parameters = ctx.norm.weight, ctx.norm.bias
        trained = [p is not None and p.requires_grad for p in parameters]
        into, *gradients = torch.ops.aten.native_layer_norm_backward(
            gradient.contiguous(), total, ctx.norm.normalized_shape, mean, inverse, *parameters, [True, *trained]
        )
        for parameter, trains, of_parameter in zip(parameters, trained, gradients, strict=True):
            if trains:
                _accumulate(parameter, of_parameter)
        of_added = into.to(ctx.type_of_added)
        return into.to(ctx.type_of_x), _scaled(of_added, mask, ctx.scale), None, None, None


class _Attention(torch.autograd.Function):
    """Letters of shapes as in `attend`."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        query_of_cell: Tensor,
        cell_of_query: Tensor,
        key_of_cell: Tensor,
        cell_of_key: Tensor,
        bias: Tensor,
        dropout: Dropout,
    ) -> Tensor:
        rows, _, width, length = bias.shape
        heads = len(query_of_cell) // (rows * width)
        size = query.shape[1] // heads
        q = query.view(-1, size).index_select(0, query_of_cell).view(-1, width, size)  # (R · H, C, D)
        k = key.view(-1, size).index_select(0, key_of_cell).view(-1, length, size)  # (R · H, K, D)
        v = value.view(-1, size).index_select(0, key_of_cell).view(-1, length, size)
        scores = torch.bmm(q, k.transpose(1, 2)).view(rows, heads, width, length)
        weights = torch.add(bias, scores, alpha=size**-0.5).softmax(dim=-1)  # in fp32: torch's softmax of 16 bits is slower
        used = weights.to(v.dtype)
        mask, scale = dropout.draw(used) or (None, 1.0)
        used = _scaled(used, mask, scale).view(-1, width, length)
        ctx.save_for_backward(q, k, v, weights, mask, cell_of_query, cell_of_key)
        ctx.scale = scale
        return torch.bmm(used, v).view(-1, size).index_select(0, cell_of_query).view(query.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights, mask, cell_of_query, cell_of_key = ctx.saved_tensors
        width, length = weights.shape[2:]
        size = q.shape[2]
        out = q.new_zeros(q.shape)  # a cell without an item gets no gradient
        out.view(-1, size).index_copy_(0, cell_of_query, gradient.reshape(-1, size))
        into_used = torch.bmm(out, v.transpose(1, 2)).view(weights.shape)
        into_weights = _scaled(into_used, mask, ctx.scale).to(weights.dtype)
        scores = torch._softmax_backward_data(into_weights, weights, -1, weights.dtype).to(q.dtype).view(-1, width, length)
        used = _scaled(weights.to(v.dtype), mask, ctx.scale).view(-1, width, length)  # made again, since it would be much to keep
        wants_query, wants_key, wants_value, *_ = ctx.needs_input_grad

        def collect(cells: Tensor, cell_of_item: Tensor) -> Tensor:
            return cells.view(-1, size).index_select(0, cell_of_item).view(-1, gradient.shape[1])

        return (
            collect(torch.baddbmm(q, scores, k, beta=0, alpha=size**-0.5), cell_of_query) if wants_query else None,
            collect(torch.baddbmm(k, scores.transpose(1, 2), q, beta=0, alpha=size**-0.5), cell_of_key) if wants_key else None,
            collect(torch.bmm(used.transpose(1, 2), out), cell_of_key) if wants_value else None,
            *[None] * 6,
        )


class _Projection(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, _: Tensor | None, layers: Sequence[Linear], operands: Sequence[list[Tensor]]
    ) -> tuple[Tensor, ...]:
        ctx.layers = layers
        trains = any(layer.weight.requires_grad for layer in layers)
        ctx.save_for_backward(x if trains else None, *(weight for weight, *_ in operands))
        return tuple(_product(x, *operand) for operand in operands)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        into = None
        for layer, weight, gradient in zip(ctx.layers, weights, gradients, strict=True):
            if layer.weight.requires_grad:
                layer.add_gradient(x, gradient)
            if ctx.needs_input_grad[0]:
                into = _product(gradient, weight.t()) if into is None else into.addmm_(gradient, weight)
        return into, None, None, None


def _accumulate(parameter: Tensor, gradient: Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = gradient.to(parameter.dtype)
    elif supersede(parameter):
        parameter.grad.copy_(gradient)
    else:
        parameter.grad.add_(gradient)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, in fp32 by the library that is quicker at it here."""
    if x.dtype == torch.float32 and _asks_onednn():
        product: Tensor = ONEDNN_LINEAR(x, weight, bias, "none", [], "")  # type: ignore[misc]
        return product
    return F.linear(x, weight, bias)


@functools.cache
def _asks_onednn() -> bool:
    """
    Whether oneDNN makes fp32 products, as it does those of 16 bits; torch itself asks MKL.

    On an AMD EPYC with AVX-512 oneDNN did 10% to 25% more arithmetic a second at this suite's sizes; on one with AVX2 alone MKL did
    up to 20% more. On an Intel Xeon the two were as quick, and MKL's call costs less: 4% of a step of full fine-tuning, 9% of one
    under LoRA.
    """
    facts = torch.cpu.get_capabilities()
    for_mkl = "Intel" in str(facts.get("cpu_name", "")) or not facts.get("avx512_f", False)
    return ONEDNN_LINEAR is not None and not (for_mkl and torch.backends.mkl.is_available())  # type: ignore[no-untyped-call]


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
