"""Attention within the sentences of a packed row, with dropout, on CPU: one operation for autograd, its derivative written out."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftbench.dropout import Dropout, scaled


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
    attended: Tensor = _Attention.apply(query, key, value, queries, keys, bias, dropout)  # type: ignore[no-untyped-call]
    return attended


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: tuple[Tensor, Tensor],
    keys: tuple[Tensor, Tensor],
    bias: Tensor,
    dropout: Dropout,
) -> tuple[Tensor, list[Tensor | None], float]:
    """`attend` of tensors of one type, without autograd; also gives what `backward` takes."""
    (query_of_cell, cell_of_query), (key_of_cell, cell_of_key) = queries, keys
    rows, _, width, length = bias.shape
    heads = len(query_of_cell) // (rows * width)
    size = query.shape[1] // heads
    q = query.reshape(-1, size).index_select(0, query_of_cell).view(-1, width, size)  # (R · H, C, D)
    k = key.reshape(-1, size).index_select(0, key_of_cell).view(-1, length, size)  # (R · H, K, D)
    v = value.reshape(-1, size).index_select(0, key_of_cell).view(-1, length, size)
    scores = torch.bmm(q, k.transpose(1, 2)).view(rows, heads, width, length)
    weights = torch.add(bias, scores, alpha=size**-0.5).softmax(dim=-1)  # in fp32: torch's softmax of 16 bits is slower
    used = weights.to(v.dtype)
    mask, scale = dropout.draw(used) or (None, 1.0)
    used = scaled(used, mask, scale).view(-1, width, length)
    out = torch.bmm(used, v).view(-1, size).index_select(0, cell_of_query).view(query.shape)
    return out, [q, k, v, weights, mask, cell_of_query, cell_of_key], scale


def backward(
    gradient: Tensor, kept: Sequence[Tensor], scale: float, wanted: Sequence[bool] = (True, True, True)
) -> tuple[Any, Any, Any]:
    """What flows from (Q, E) back into queries, keys and values; None for those that are not wanted."""
    q, k, v, weights, mask, cell_of_query, cell_of_key = kept
    width, length = weights.shape[2:]
    size = q.shape[2]
    out = q.new_zeros(q.shape)  # a cell without an item gets no gradient
    out.view(-1, size).index_copy_(0, cell_of_query, gradient.reshape(-1, size))
    into_used = torch.bmm(out, v.transpose(1, 2)).view(weights.shape)
    into_weights = scaled(into_used, mask, scale).to(weights.dtype)
    scores = torch._softmax_backward_data(into_weights, weights, -1, weights.dtype).to(q.dtype).view(-1, width, length)
    used = scaled(weights.to(v.dtype), mask, scale).view(-1, width, length)  # made again, since it would be much to keep
    wants_query, wants_key, wants_value = wanted

    def collect(cells: Tensor, cell_of_item: Tensor) -> Tensor:
        return cells.view(-1, size).index_select(0, cell_of_item).view(-1, gradient.shape[1])

    return (
        collect(torch.baddbmm(q, scores, k, beta=0, alpha=size**-0.5), cell_of_query) if wants_query else None,
        collect(torch.baddbmm(k, scores.transpose(1, 2), q, beta=0, alpha=size**-0.5), cell_of_key) if wants_key else None,
        collect(torch.bmm(used.transpose(1, 2), out), cell_of_key) if wants_value else None,
    )


class _Attention(torch.autograd.Function):
    """The two functions above for autograd."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, *others: Any) -> Tensor:
        out, kept, ctx.scale = forward(query, key, value, *others)
        ctx.save_for_backward(*kept)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return *backward(gradient, ctx.saved_tensors, ctx.scale, ctx.needs_input_grad[:3]), None, None, None, None
