"""
Texts of unequal length as batches without padding.

The sentences of a batch lie end to end in one row: linear layers see real tokens only, attention stays within each
sentence, positions restart, and the classification head reads each sentence's first token. Models that cannot take
such a row get batches padded to their longest sentence instead.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from peftbench import kernels
from peftbench.data import Split
from peftbench.device import Device

ATTENTION = "peftbench_packed"
PACKABLE = ("bert", "distilbert")


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

    Attributes:
        lengths: Tokens of each sentence, shape (B,).
        starts: Position of each sentence's first token in the row, shape (B,).
        positions: Position of each token within its sentence, shape (T,).
        padded: Position of each token in a (B · longest) layout, shape (T,).
        mask: Which cells of that layout hold a token, shape (B, 1, 1, longest).
    """

    def __init__(self, lengths: Tensor) -> None:
        ends = lengths.cumsum(0)
        self.lengths, self.starts, self.longest = lengths, ends - lengths, int(lengths.max())
        self.positions = torch.arange(int(ends[-1]), device=lengths.device) - self.starts.repeat_interleave(lengths)
        row = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
        self.padded = row * self.longest + self.positions
        self.mask = (torch.arange(self.longest, device=lengths.device) < lengths[:, None])[:, None, None, :]


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

    Attention is replaced through transformers' attention interface, and the encoder hands the head only each sentence's first
    token, which is all that it reads; BERT's last layer computes nothing else past its keys and values. Padded input works as
    before.

    Returns:
        False if the architecture, or a PEFT method that puts virtual tokens before the text, cannot be packed.
    """
    config = getattr(model, "active_peft_config", None)
    if config is not None and config.is_prompt_learning:
        return False
    classifier = model.get_base_model() if config is not None else model  # type: ignore[operator]
    if not isinstance(classifier, PreTrainedModel) or classifier.config.model_type not in PACKABLE:
        return False
    classifier.set_attn_implementation(ATTENTION)
    _FirstTokens().attach(classifier)
    return True


def make_batch(encoded: Encoded, rows: Sequence[int], device: str, *, packed: bool) -> Batch:
    """The examples at these positions, packed end to end or padded to the longest."""
    index = torch.tensor(rows)
    tokens = [encoded.tokens[i] for i in rows]
    lengths = torch.tensor([len(t) for t in tokens]).to(device)
    inputs: dict[str, Any]
    if packed:
        spans = Spans(lengths)
        inputs = {
            "input_ids": torch.cat(tokens).to(device)[None],  # (1, T)
            "position_ids": spans.positions[None],  # (1, T)
            "spans": spans,
        }
    else:
        ids = nn.utils.rnn.pad_sequence(tokens, batch_first=True).to(device)  # (B, longest)
        inputs = {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1], device=device) < lengths[:, None]).long()}
    return Batch(index, encoded.labels[index].to(device), inputs, sum(len(t) for t in tokens))


def shuffled_batches(encoded: Encoded, size: int, device: str, *, packed: bool, generator: torch.Generator) -> Iterator[Batch]:
    """One epoch: every example exactly once, in an order drawn from the generator; the last batch may be smaller."""
    order = torch.randperm(len(encoded), generator=generator).tolist()
    for start in range(0, len(order), size):
        yield make_batch(encoded, order[start : start + size], device, packed=packed)


def predict(model: nn.Module, encoded: Encoded, device: Device, *, packed: bool, batch_size: int = 64) -> Tensor:
    """
    Logits of every example without dropout, sentences of like length together.

    Returns:
        Shape (N, C), fp32, on the CPU, in the order of the examples.
    """
    order = sorted(range(len(encoded)), key=lambda i: (len(encoded.tokens[i]), i))
    logits: Tensor | None = None
    was_training = model.training
    model.eval()
    with torch.inference_mode(), device.autocast():
        for start in range(0, len(order), batch_size):
            batch = make_batch(encoded, order[start : start + batch_size], device.name, packed=packed)
            out = model(**batch.inputs).logits.float().cpu()
            logits = out.new_empty(len(encoded), out.shape[1]) if logits is None else logits
            logits[batch.rows] = out
    model.train(was_training)
    if logits is None:
        raise ValueError(f"no examples to predict in split {encoded.split.name!r}")
    return logits.clone()  # a plain tensor again, not an inference one


class _FirstTokens:
    """Hooks that narrow a packed row to the first token of each sentence as early as the architecture lets them."""

    def __init__(self) -> None:
        self.spans: Spans | None = None
        self.narrowed = False

    def attach(self, classifier: PreTrainedModel) -> None:
        encoder: Any = getattr(classifier.base_model, "encoder", None) or classifier.base_model.transformer
        encoder.register_forward_pre_hook(self._begin, with_kwargs=True)
        encoder.register_forward_hook(self._end)
        if classifier.config.model_type == "bert":
            encoder.layer[-1].attention.output.register_forward_pre_hook(self._narrow)

    def _begin(self, _: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.spans, self.narrowed = kwargs.get("spans"), False

    def _narrow(self, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if self.spans is None:
            return None
        self.narrowed = True
        return tuple(x[:, self.spans.starts] for x in args)  # attention's output and the residual: (1, T, E) → (1, B, E)

    def _end(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        if self.spans is not None:
            hidden = output.last_hidden_state[0]  # (T, E), or (B, E) where the last layer was narrowed
            output["last_hidden_state"] = (hidden if self.narrowed else hidden[self.spans.starts])[:, None]  # (B, 1, E)
        self.spans = None
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
        return _attend(query, key, value, attention_mask, dropout, scaling).transpose(1, 2), None
    batch, longest, heads, size = len(spans.lengths), spans.longest, query.shape[1], query.shape[3]

    def spread(x: Tensor) -> Tensor:  # (1, H, T, D) → (B, H, longest, D)
        rows = x[0].transpose(0, 1).reshape(-1, heads * size)
        cells = rows.new_zeros(batch * longest, heads * size).index_copy(0, spans.padded, rows)
        return cells.view(batch, longest, heads, size).transpose(1, 2)

    out = _attend(spread(query), spread(key), spread(value), spans.mask, dropout, scaling)
    rows = out.transpose(1, 2).reshape(batch * longest, heads * size).index_select(0, spans.padded)
    return rows.view(1, -1, heads, size), None  # (1, T, H, D)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, scaling: float | None) -> Tensor:
    """Scaled dot-product attention, (B, H, L, D) → (B, H, L, D); torch has no CPU kernel with dropout, so it is spelled out."""
    if not dropout or query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
    scores = (query * (query.shape[-1] ** -0.5 if scaling is None else scaling)) @ key.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return kernels.dropout(scores.softmax(dim=-1), dropout) @ value


AttentionInterface.register(ATTENTION, _attend_within_sentences)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
