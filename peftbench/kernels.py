"""
Faster drop-in layers, for the CPU above all, with the same mathematics.

A profile of MiniLM's step on two cores, packed: autocast converts frozen weights anew in every step, each backward pass makes a
gradient as large as the whole vocabulary, over which AdamW then passes, for the few rows that a batch looks up, and at some 200
tokens what autograd does around an operation takes as long as many of them do. Layers that are fused here add to their gradients
by themselves, which autograd's own functions and hooks on them do not see.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft.tuners import ia3, lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F

from peftbench.dropout import Dropout, Masks, scaled
from peftbench.parameters import supersede

ONEDNN_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
"""None where torch is built without oneDNN."""


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` that can make the addition and the dropout before it a part of it; then it adds to its own gradients."""

    def after_adding(self, x: Tensor, added: Tensor, dropout: Dropout | None) -> Tensor:
        """Normalize x + dropout(added), tensors of one shape."""
        out: Tensor = _AddAndNormalize.apply(x, added, self, dropout)  # type: ignore[no-untyped-call]
        return out

    def forward_sum(self, x: Tensor, added: Tensor, dropout: Dropout | None) -> tuple[Tensor, list[Tensor | None], float]:
        """`after_adding` without autograd; also gives what `backward_sum` takes."""
        mask, scale = (None if dropout is None else dropout.draw(added)) or (None, 1.0)
        total = x + added if mask is None else torch.addcmul(x, added, mask, value=scale)
        out, mean, inverse = torch.native_layer_norm(total, self.normalized_shape, self.weight, self.bias, self.eps)
        return out, [total, mean, inverse, mask], scale

    def backward_sum(
        self, gradient: Tensor, kept: Sequence[Tensor], scale: float, type_of_added: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """What flows into the sum, in its type, and into ``added``; perhaps one tensor for both, to write to in the end."""
        total, mean, inverse, mask = kept
        parameters = self.weight, self.bias
        trained = [p is not None and p.requires_grad for p in parameters]
        into, *gradients = torch.ops.aten.native_layer_norm_backward(
            gradient.contiguous(), total, self.normalized_shape, mean, inverse, *parameters, [True, *trained]
        )
        for parameter, trains, of_parameter in zip(parameters, trained, gradients, strict=True):
            if trains:
                _accumulate(parameter, of_parameter)
        return into, scaled(into.to(type_of_added), mask, scale)


class RowEmbedding(nn.Embedding):
    """
    `torch.nn.Embedding` that can leave out the rows that nothing looks up.

    On a CPU it also adds to the gradient's rows in place, where autograd makes a gradient of the whole weight first.
    """

    _row_of: Tensor | None = None

    def forward(self, ids: Tensor) -> Tensor:
        """Rows of the weight: ids of shape (…) give (…, width)."""
        if self._row_of is not None:
            ids = self._row_of[ids]
        if self.weight.device.type != "cpu" or not (torch.is_grad_enabled() and self.weight.requires_grad):
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
        row_of = torch.full((len(whole),), len(whole))  # an id that was not announced is out of range
        row_of[used] = torch.arange(len(used))
        self.padding_idx = None if padding is None else int(row_of[padding])
        used, self._row_of = used.to(whole.device), row_of.to(whole.device)
        self.weight.data = whole[used]
        try:
            yield
        finally:
            whole[used] = self.weight.data
            self.weight.data, self.weight.grad = whole, None
            self.padding_idx, self._row_of = padding, None

    def add_gradient(self, ids: Tensor, gradient: Tensor) -> None:
        """Accumulate what flows into the rows that were looked up: (N,) and (N, width)."""
        if self.weight.grad is None:
            self.weight.grad = torch.zeros_like(self.weight)
        elif supersede(self.weight):
            self.weight.grad.zero_()
        padding = None if self.padding_idx is None else self.weight.grad[self.padding_idx].clone()
        self.weight.grad.index_add_(0, ids, gradient.to(self.weight.dtype))
        if padding is not None:  # a look-up of padding adds nothing to its row
            self.weight.grad[self.padding_idx] = padding


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
        weight, bias = self.weight, self.bias
        into = weight.grad
        if bias is not None:  # first, while the gradient is still in the processor's cache
            _accumulate(bias, gradient.sum(0))
        if into is not None and x.dtype == into.dtype:
            into.addmm_(gradient.t(), x, beta=0 if supersede(weight) else 1)
        else:
            _accumulate(weight, torch.mm(gradient.t(), x))

    def parameters_for_use(self) -> list[Tensor]:
        """Weight and bias, if there is one, in the type that they are multiplied in."""
        weight, bias = self.weight, self.bias
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype
        parameters = [weight] if bias is None else [weight, bias]
        if weight.requires_grad:  # cannot be kept: the fused AdamW does not count its changes as new versions
            if self._cast is not None:
                self._cast = None
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
        outs = tuple(product(rows, *operand) for operand in operands)
    if x.dim() != 2:  # not in `_Projection`, to whose results an adapter may add in place
        outs = tuple(out.view(*x.shape[:-1], -1) for out in outs)
    return outs


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, in fp32 by the library that is quicker at it here."""
    if x.dtype == torch.float32 and _asks_onednn():
        out: Tensor = ONEDNN_LINEAR(x, weight, bias, "none", [], "")  # type: ignore[misc]
        return out
    return F.linear(x, weight, bias)


def gelu_backward(gradient: Tensor, x: Tensor) -> Tensor:
    """
    What flows back from (N, width) through `torch.nn.functional.gelu`, for inputs of the same shape.

    torch leaves it to oneDNN where both are contiguous. In fp32 with AVX-512 (an Intel Xeon, two threads, 208 rows of 1,536 that
    its cache did not hold) oneDNN took 270 µs and torch itself 180. With AVX2 alone, and in bf16, oneDNN is the quicker one.
    """
    into: Tensor
    if x.dtype == torch.float32 and _has_avx512():
        into = torch.ops.aten.gelu_backward(gradient.t(), x.t()).t()
    else:
        into = torch.ops.aten.gelu_backward(gradient, x)
    return into


def add_product(into: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Add x · weight, (N, in) and (in, out), in place to ``into``, which may be of a wider type."""
    if into.dtype != x.dtype or (x.dtype == torch.float32 and _asks_onednn()):
        return into.add_(product(x, weight.t()))
    return into.addmm_(x, weight)


def economize(model: nn.Module) -> None:
    """Replace dropout, normalization, linear layers and trained embeddings, in place; for CPU, after adapters are attached."""
    masks = Masks()
    left = {id(module) for layer in _adapters(model) if isinstance(layer, lora.ParamWrapper) for module in layer.modules()}
    for module in model.modules():
        if id(module) in left:  # whose weight is another one while it runs, which autograd must see
            continue
        if type(module) is nn.Dropout:
            module.__class__ = Dropout
            module.masks = masks  # type: ignore[assignment]
        elif _learns_row_by_row(module):
            module.__class__ = RowEmbedding
        elif type(module) is nn.LayerNorm:
            module.__class__ = LayerNorm
        elif type(module) is nn.Linear and len({p.requires_grad for p in module.parameters(recurse=False)}) == 1:
            module.__class__ = Linear


def economize_words(model: nn.Module) -> None:
    """Let a trained word embedding be narrowed by `only_words`, in place: what `economize` does to it, for a GPU."""
    words = model.get_input_embeddings()  # type: ignore[operator]
    if _learns_row_by_row(words):
        words.__class__ = RowEmbedding


def cast_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """
    Keep the linear layers that do not train in the type that autocast would convert them to in every step, in place.

    For a GPU, where BERT-large under an adapter would be read and written anew for each few examples. The numbers are the same:
    layers whose adapter does arithmetic with their weights stay as they are, as it would be done in fewer digits.
    """
    left = {id(module) for layer in _adapters(model) if not _adds_only(layer) for module in layer.modules()}
    for module in model.modules():
        trains = any(p.requires_grad for p in module.parameters(recurse=False))
        if type(module) is nn.Linear and not trains and id(module) not in left:
            module.to(dtype)


def can_be_captured(model: nn.Module) -> bool:
    """
    Whether a step of a model over packed rows launches the same operations each time, none of which a GPU's host waits for.

    Known of plain ones and under LoRA and IA3; what other adapters do was not looked into.
    """
    return all(_adds_only(layer) for layer in _adapters(model))


def _adapters(model: nn.Module) -> list[nn.Module]:
    return [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]


def _adds_only(layer: nn.Module) -> bool:
    """Whether an adapter takes its layer's result and nothing else of it, as LoRA and IA3 do and LoRA's variants do not."""
    return type(layer) is ia3.Linear or (type(layer) is lora.Linear and not layer.lora_variant)


@contextmanager
def only_words(model: nn.Module, ids: Tensor) -> Iterator[None]:
    """Have an economized word embedding that trains hold only the rows of these ids; see `RowEmbedding.narrowed`."""
    words = model.get_input_embeddings()  # type: ignore[operator]
    with words.narrowed(ids) if isinstance(words, RowEmbedding) else nullcontext():
        yield


def _learns_row_by_row(module: nn.Module) -> bool:
    """Whether it is torch's embedding, trained, with no option that gives its gradient another form."""
    if type(module) is not nn.Embedding or not module.weight.requires_grad:
        return False
    return not (module.sparse or module.scale_grad_by_freq or module.max_norm is not None)


class _AddAndNormalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, added: Tensor, norm: LayerNorm, dropout: Dropout | None) -> Tensor:
        out, kept, ctx.scale = norm.forward_sum(x, added, dropout)
        ctx.save_for_backward(*kept)
        ctx.norm, ctx.type_of_x, ctx.type_of_added = norm, x.dtype, added.dtype
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        into, into_added = ctx.norm.backward_sum(gradient, ctx.saved_tensors, ctx.scale, ctx.type_of_added)
        return into.to(ctx.type_of_x), into_added, None, None


class _Projection(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, _: Tensor | None, layers: Sequence[Linear], operands: Sequence[list[Tensor]]
    ) -> tuple[Tensor, ...]:
        ctx.layers = layers
        trains = any(layer.weight.requires_grad for layer in layers)
        ctx.save_for_backward(x if trains else None, *(weight for weight, *_ in operands))
        return tuple(product(x, *operand) for operand in operands)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        into = None
        for layer, weight, gradient in zip(ctx.layers, weights, gradients, strict=True):
            if layer.weight.requires_grad:
                layer.add_gradient(x, gradient)
            if ctx.needs_input_grad[0]:
                into = product(gradient, weight.t()) if into is None else add_product(into, gradient, weight)
        return into, None, None, None


def _accumulate(parameter: Tensor, gradient: Tensor) -> None:
    into = parameter.grad
    if into is None:
        parameter.grad = gradient.to(parameter.dtype)
    elif supersede(parameter):
        into.copy_(gradient)
    else:
        into.add_(gradient)


@functools.cache
def _has_avx512() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


@functools.cache
def _asks_onednn() -> bool:
    facts, has_mkl = torch.cpu.get_capabilities(), torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    return ONEDNN_LINEAR is not None and onednn_is_faster(facts, has_mkl=has_mkl)


def onednn_is_faster(processor: Mapping[str, Any], *, has_mkl: bool) -> bool:
    """
    Whether oneDNN makes fp32 products, as it does those of 16 bits; torch itself asks MKL.

    On an AMD EPYC with AVX-512 oneDNN did 10% to 25% more arithmetic a second at this suite's sizes; on one with AVX2 alone MKL did
    up to a quarter more. On an Intel Xeon the two were as quick, and MKL's call costs less: 4% of a step of full fine-tuning, 9% of
    one under LoRA.
    """
    for_mkl = "Intel" in str(processor.get("cpu_name", "")) or not processor.get("avx512_f", False)
    return not (for_mkl and has_mkl)


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
