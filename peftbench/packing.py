"""
Texts of unequal length as batches without padding.

The sentences of a batch lie end to end in one row: linear layers see real tokens only, attention stays within each
sentence, positions restart, and the classification head reads each sentence's first token. Models that cannot take
such a row get batches padded to their longest sentence instead.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask
from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.distilbert.modeling_distilbert import TransformerBlock

from peftbench.data import Split
from peftbench.device import Device

ATTENTION = "peftbench_packed"

ROW_STEP, ATTENTION_STEP = 16, 8
"""
Packed rows have a multiple of the one as tokens, attention room for a multiple of the other in a sentence: a library of matrix
products prepares code for each shape that it meets, which in bf16 on CPU takes as long as a third of the product.
"""


@dataclass(frozen=True)
class Encoded:
    """
    A split as token ids.

    Attributes:
        tokens: One int64 tensor an example, shape (length,).
        labels: Shape (N,), int64.
    """

    split: Split
    tokens: Sequence[Tensor]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def from_split(cls, split: Split, tokenizer: Any, *, max_length: int) -> "Encoded":
        """Tokenize without padding, truncated to ``max_length`` tokens."""
        ids = tokenizer(list(split.sentences), truncation=True, max_length=max_length, return_attention_mask=False)["input_ids"]
        return cls(split, [torch.tensor(i) for i in ids], torch.tensor(split.labels))

    def take(self, rows: Sequence[int]) -> "Encoded":
        """The examples at these positions, in that order."""
        return Encoded(self.split.take(rows), [self.tokens[i] for i in rows], self.labels[list(rows)])


class Spans:
    """
    Where the sentences of a packed row begin and end.

    The shortest sentence is followed by as many tokens of filling as bring the row to a multiple of `ROW_STEP`; no token attends to
    them and nothing of them reaches the head.

    Attributes:
        longest: Tokens that attention has room for in each sentence.
        starts: Position of each sentence's first token in the row, shape (B,).
        positions: Position of each token within its sentence, shape (T,); of filling 0.
        bias: What is added to attention's scores so that no token attends to padding or filling, shape (B, 1, 1, longest).
        filled: The sentence that is followed by filling, and by how much.
    """

    def __init__(self, lengths: Tensor, device: str = "cpu") -> None:
        """Of sentences with these many tokens, shape (B,), on the CPU; the results are on the device."""
        self.filled = int(lengths.argmin()), -int(lengths.sum()) % ROW_STEP
        room = lengths.clone()
        room[self.filled[0]] += self.filled[1]
        self.longest = _round_up(int(room.max()), ATTENTION_STEP)
        columns = torch.arange(self.longest)
        padding = columns >= lengths[:, None]
        starts = room.cumsum(0) - room
        sentences = torch.arange(len(room)).repeat_interleave(room)  # (T,)
        columns_of_tokens = torch.arange(len(sentences)) - starts[sentences]
        token_of_cell = starts[:, None] + torch.minimum(columns, room[:, None] - 1)  # (B, longest)
        positions = columns_of_tokens.masked_fill(columns_of_tokens >= lengths[sentences], 0)
        # All of it is known from the lengths alone: a device is given the results and never asked for one.
        self.starts, self.positions, self._sentences, self._columns, self._token_of_cell = (
            x.to(device) for x in (starts, positions, sentences, columns_of_tokens, token_of_cell)
        )
        self.bias = torch.zeros(padding.shape).masked_fill_(padding, -math.inf)[:, None, None].to(device)
        self._layouts: dict[int, tuple[Tensor, Tensor]] = {}

    def layout(self, heads: int) -> tuple[Tensor, Tensor]:
        """
        The way from token rows, (T · H, D), to the padded cells that attention runs over, (B · H · longest, D), and back.

        Returns:
            The row that each cell takes, padding taking its sentence's last, shape (B · H · longest,), and the cell of each row,
            shape (T · H,).
        """
        if heads not in self._layouts:
            head = torch.arange(heads, device=self.starts.device)
            rows = self._token_of_cell[:, None] * heads + head[:, None]  # (B, H, longest)
            cells = (self._sentences[:, None] * heads + head) * self.longest + self._columns[:, None]  # (T, H)
            self._layouts[heads] = rows.flatten(), cells.flatten()
        return self._layouts[heads]


@dataclass(frozen=True)
class Batch:
    """
    The examples of one step, on the device.

    Attributes:
        rows: Their positions in the `Encoded` they come from, shape (B,).
        labels: Shape (B,).
        inputs: What the model's forward takes.
        tokens: How many tokens of text go in, padding not counted.
    """

    rows: Tensor
    labels: Tensor
    inputs: dict[str, Any]
    tokens: int


def make_packable(model: nn.Module) -> bool:
    """
    Teach a BERT or DistilBERT classifier, plain or under PEFT, to take packed rows.

    Attention is replaced through transformers' attention interface. The encoder's last layer computes, past its keys and values,
    only the first token of each sentence, which is all that the head reads. Padded input works as before.

    Returns:
        False if the architecture, or a PEFT method that puts virtual tokens before the text, cannot be packed.
    """
    config = getattr(model, "active_peft_config", None)
    if config is not None and config.is_prompt_learning:
        return False
    classifier: Any = model.get_base_model() if config is not None else model  # type: ignore[operator]
    last = LAST_LAYERS.get(classifier.config.model_type) if isinstance(classifier, PreTrainedModel) else None
    if last is None:
        return False
    classifier.set_attn_implementation(ATTENTION)
    body: Any = classifier.base_model
    encoder = getattr(body, "encoder", None) or body.transformer
    encoder.register_forward_hook(_sentences_as_batch, with_kwargs=True)
    encoder.layer[-1].__class__ = last
    return True


def make_batch(encoded: Encoded, rows: Sequence[int], device: str, *, packed: bool) -> Batch:
    """The examples at these positions, packed end to end or padded to the longest."""
    index = torch.tensor(rows)
    tokens = [encoded.tokens[i] for i in rows]
    lengths = torch.tensor([len(t) for t in tokens])
    inputs: dict[str, Any]
    if packed:
        spans = Spans(lengths, device)
        shortest, filling = spans.filled
        row = [*tokens[: shortest + 1], tokens[shortest].new_zeros(filling), *tokens[shortest + 1 :]]
        inputs = {
            "input_ids": torch.cat(row).to(device)[None],  # (1, T)
            "position_ids": spans.positions[None],  # (1, T)
            "spans": spans,
        }
    else:
        ids = nn.utils.rnn.pad_sequence(tokens, batch_first=True).to(device)  # (B, longest)
        inputs = {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long().to(device)}
    return Batch(index, encoded.labels[index].to(device), inputs, sum(len(t) for t in tokens))


def shuffled_rows(n: int, size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """One epoch: every row of n exactly once, in an order drawn from the generator; the last batch may be smaller."""
    order = torch.randperm(n, generator=generator).tolist()
    for start in range(0, n, size):
        yield order[start : start + size]


def predict(model: nn.Module, encoded: Encoded, device: Device, *, packed: bool, batch_size: int = 64) -> Tensor:
    """
    Logits of every example without dropout, sentences of like length together, in smaller batches where memory runs out.

    Returns:
        Shape (N, C), fp32, on the CPU, in the order of the examples.
    """
    order = sorted(range(len(encoded)), key=lambda i: (len(encoded.tokens[i]), i))
    logits: Tensor | None = None
    was_training = model.training
    model.eval()
    with torch.inference_mode(), device.autocast():
        start = 0
        while start < len(order):
            batch = make_batch(encoded, order[start : start + batch_size], device.name, packed=packed)
            try:
                out = model(**batch.inputs).logits.float().cpu()
            except torch.OutOfMemoryError:
                if batch_size == 1:
                    raise
                batch_size //= 2
                device.release_memory()
                continue
            start += len(batch.rows)
            logits = out.new_empty(len(encoded), out.shape[1]) if logits is None else logits
            logits[batch.rows] = out
    model.train(was_training)
    if logits is None:
        raise ValueError(f"no examples to predict in split {encoded.split.name!r}")
    return logits.clone()  # a plain tensor again, not an inference one


class _LastBertLayer(BertLayer):  # type: ignore[misc]
    """Past keys and values, only the first token of each sentence matters, and nothing else is computed."""

    def forward(self, hidden_states: Tensor, *args: Any, spans: Spans | None = None, **kwargs: Any) -> Tensor:
        if spans is None:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[no-any-return]
        first, attention = hidden_states.index_select(1, spans.starts), self.attention.self  # (1, B, E)
        query, key, value = attention.query(first), attention.key(hidden_states), attention.value(hidden_states)
        attended = _attend_from_first(query, key, value, spans, attention, attention.num_attention_heads, attention.dropout.p)
        return self.feed_forward_chunk(self.attention.output(attended, first))  # type: ignore[no-any-return]


class _LastDistilBertLayer(TransformerBlock):  # type: ignore[misc]
    """As `_LastBertLayer`."""

    def forward(self, hidden_states: Tensor, *args: Any, spans: Spans | None = None, **kwargs: Any) -> Tensor:
        if spans is None:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[no-any-return]
        first, attention = hidden_states.index_select(1, spans.starts), self.attention  # (1, B, E)
        query, key, value = attention.q_lin(first), attention.k_lin(hidden_states), attention.v_lin(hidden_states)
        attended = _attend_from_first(query, key, value, spans, attention, attention.n_heads, attention.dropout.p)
        mixed = self.sa_layer_norm(attention.out_lin(attended) + first)
        return self.output_layer_norm(self.ffn(mixed) + mixed)  # type: ignore[no-any-return]


LAST_LAYERS = {"bert": _LastBertLayer, "distilbert": _LastDistilBertLayer}
"""By the type of model: what can be packed."""


def _sentences_as_batch(_: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """The head reads the first token of each sentence: (1, B, E) → (B, 1, E)."""
    if kwargs.get("spans") is not None:
        output["last_hidden_state"] = output.last_hidden_state.transpose(0, 1)
    return output


def _attend_within_sentences(
    module: nn.Module,
    query: Tensor,  # (1, H, T, D); padded input: (B, H, L, D)
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    spans: Spans | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    if spans is None:
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling)
        return out.transpose(1, 2), None
    heads, tokens, size = query.shape[1:]
    scaling = size**-0.5 if scaling is None else scaling
    query, key, value = (_spread(x[0].transpose(0, 1), spans) for x in (query * scaling, key, value))
    out = _attend(query, key, value, spans.bias, dropout, module)
    collected: Tensor = _Collect.apply(out.reshape(-1, size), spans.layout(heads)[1])  # type: ignore[no-untyped-call]
    return collected.view(1, tokens, heads, size), None


def _attend_from_first(
    query: Tensor, key: Tensor, value: Tensor, spans: Spans, module: nn.Module, heads: int, dropout: float
) -> Tensor:
    """Attention of each sentence's first token alone: (1, B, E) over keys and values of (1, T, E) gives (1, B, E)."""
    size = query.shape[-1] // heads
    keys, values = (_spread(x.view(-1, heads, size), spans) for x in (key, value))
    queries = (query * size**-0.5).view(-1, heads, 1, size)
    return _attend(queries, keys, values, spans.bias, dropout if module.training else 0.0, module).view(query.shape)


def _spread(x: Tensor, spans: Spans) -> Tensor:
    """Token rows to the padded layout: (T, H, D) → (B, H, longest, D)."""
    heads, size = x.shape[1:]
    padded: Tensor = _Spread.apply(x.reshape(-1, size), *spans.layout(heads))  # type: ignore[no-untyped-call]
    return padded.view(-1, heads, spans.longest, size)


def _attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, dropout: float, module: Any) -> Tensor:
    """Dot-product attention, (B, H, L, D) → (B, H, L, D); torch has no CPU kernel with dropout, so there it is spelled out."""
    if not dropout or query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype), dropout_p=dropout, scale=1.0)
    wide = torch.promote_types(query.dtype, torch.float32)  # torch's softmax of 16-bit rows is the slower one
    scores = (query @ key.transpose(-1, -2)).to(wide) + bias
    dropped: Tensor = module.dropout(scores.softmax(dim=-1).to(value.dtype))
    return dropped @ value


class _Spread(torch.autograd.Function):
    """Token rows to cells of the padded layout; what a cell of padding holds does not matter, and nothing flows back from it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, tokens: Tensor, cells: Tensor) -> Tensor:
        ctx.save_for_backward(cells)
        return rows.index_select(0, tokens)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.reshape(-1, gradient.shape[-1]).index_select(0, *ctx.saved_tensors), None, None


class _Collect(torch.autograd.Function):
    """Cells of the padded layout back to token rows."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, cells: Tensor) -> Tensor:
        ctx.save_for_backward(cells)
        ctx.size = len(padded)
        return padded.index_select(0, cells)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (cells,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.size, gradient.shape[-1]).index_copy_(0, cells, gradient), None


def _round_up(n: int, step: int) -> int:
    return -(-n // step) * step


AttentionInterface.register(ATTENTION, _attend_within_sentences)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
