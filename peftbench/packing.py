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

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from peftbench.data import Split
from peftbench.device import Device, DoesNotFit, is_out_of_memory

Integers = NDArray[np.int64]
"""Indices as they are made; numpy's calls cost a fraction of torch's on so few numbers."""

ROW_STEP, ATTENTION_STEP = 8, 8
"""Packed rows have a multiple of the one as tokens, and the rows that attention runs over a multiple of the other as cells."""

BF16_ROW_STEP = 32
"""
In place of `ROW_STEP` for bf16 on a CPU, where oneDNN prepares code for each shape that it meets, and keeps it.

A hundred steps at mini scale on reviews took 1210 MiB with it and 1366 MiB with 8, and 3% to 13% less time.
"""

LONG_ROW_STEP, LONGEST_ROW = 64, 2048
"""
A `Row` has a multiple of the one as tokens, so that a training run meets few shapes, and at most the other: attention over the
whole row is a twentieth of BERT-large's arithmetic at 300 tokens, and a third at this many.
"""


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """
    A split as token ids.

    Attributes:
        tokens: One int64 tensor an example, shape (length,).
        labels: Shape (N,), int64.
        padding: Id of the token that fills a batch of unequal lengths.
    """

    split: Split
    tokens: Sequence[Tensor]
    labels: Tensor
    padding: int = 0

    def __len__(self) -> int:
        return len(self.tokens)

    def share_of(self, token: int | None) -> float:
        """Of all tokens, how many are this one, as a fraction; 0 for None."""
        return 0.0 if token is None or not self.tokens else (torch.cat([*self.tokens]) == token).float().mean().item()

    @classmethod
    def from_split(cls, split: Split, tokenizer: Any, *, max_length: int) -> "Encoded":
        """Tokenize without padding, truncated to ``max_length`` tokens."""
        ids = tokenizer(list(split.sentences), truncation=True, max_length=max_length, return_attention_mask=False)["input_ids"]
        return cls(
            split=split,
            tokens=[torch.tensor(i) for i in ids],
            labels=torch.tensor(split.labels),
            padding=tokenizer.pad_token_id or 0,
        )


class Cells:
    """
    Items, and the cells of a padded layout that attention runs over.

    Attributes:
        bias: What is added to attention's scores so that an item attends to nothing but its own sentence, shape (R, 1, C, keys).
    """

    def __init__(self, item_of_cell: Integers, cell_of_item: Integers, bias: NDArray[np.float32], device: str) -> None:
        """Shapes (R, C), where a cell that is not used names any item, (N,), and the bias's; they are put on the device."""
        self._item_of_cell, self._cell_of_item, self.bias = (
            torch.from_numpy(x).to(device, non_blocking=True) for x in (item_of_cell, cell_of_item, bias)
        )
        self._bias_in = {self.bias.dtype: self.bias}
        self._indices: dict[int, tuple[Tensor, Tensor]] = {}

    def spread(self, items: Tensor) -> Tensor:
        """(N, H, D) → (R, H, C, D); what an unused cell holds does not matter, and nothing flows back from it."""
        rows: Tensor = _Spread.apply(items.flatten(1), self._item_of_cell.flatten(), self._cell_of_item)  # type: ignore[no-untyped-call]
        return rows.view(*self._item_of_cell.shape, *items.shape[1:]).transpose(1, 2)

    def collect(self, cells: Tensor) -> Tensor:
        """(R, H, C, D) → (N, H, D)."""
        rows = cells.transpose(1, 2).reshape(self._item_of_cell.numel(), -1)
        collected: Tensor = _Collect.apply(rows, self._cell_of_item)  # type: ignore[no-untyped-call]
        return collected.view(-1, cells.shape[1], cells.shape[3])

    def bias_in(self, dtype: torch.dtype) -> Tensor:
        """The bias in that type of number, converted once for all layers."""
        if dtype not in self._bias_in:
            self._bias_in[dtype] = self.bias.to(dtype)
        return self._bias_in[dtype]

    def indices(self, heads: int) -> tuple[Tensor, Tensor]:
        """
        The row of (N · H, D) that each cell of (R · H · C, D) takes, and the cell of each row: shapes (R · H · C,), (N · H,).

        For a CPU only, as `peftbench.attention`, its only caller, is.
        """
        if heads not in self._indices:
            head, width = np.arange(heads), self._item_of_cell.shape[1]
            items = self._item_of_cell.numpy()[:, None] * heads + head[:, None]  # (R, H, C)
            row, column = divmod(self._cell_of_item.numpy()[:, None], width)
            cells = (row * heads + head) * width + column  # (N, H)
            self._indices[heads] = torch.from_numpy(items.ravel()), torch.from_numpy(cells.ravel())
        return self._indices[heads]


class Spans:
    """
    Where the sentences of a packed row begin and end.

    Filling makes the tokens a multiple of a step. It is a sentence of its own, or several, of which nothing reaches the head.
    Attention runs over rows as long as the longest sentence, and shorter ones share a row.

    Attributes:
        filling: Tokens at the end that belong to no sentence.
        starts: Position of each sentence's first token, shape (B,).
        positions: Position of each token within its sentence, shape (T,).
        tokens: The cells of all tokens.
        firsts: The cells of each sentence's first token, in the rows that its other tokens are in.
    """

    def __init__(self, lengths: Sequence[int], device: str = "cpu", row_step: int = ROW_STEP) -> None:
        """Of B sentences with these many tokens."""
        self.filling = -sum(lengths) % row_step
        room = _round_up(max(lengths), ATTENTION_STEP)
        sizes = [*lengths, *(min(room, self.filling - start) for start in range(0, self.filling, room))]
        row, column, order = np.array(_share_rows(sizes, room), dtype=np.int64).T  # of each sentence
        rows, opens = row.max() + 1, column == 0
        start, sentence, position = _end_to_end(sizes)

        cell = (row * room + column)[sentence] + position
        token = np.empty((rows, room), dtype=np.int64)
        token[row[opens]] = start[opens, None]  # an unused cell names the token in its row's first
        token.flat[cell] = np.arange(len(cell))
        of_cell = np.full((rows, room), -1)  # the sentence
        of_cell.flat[cell] = sentence
        together = sentence[token][:, :, None] == of_cell[:, None]  # (R, room, room)
        bias = np.where(together, np.float32(0), np.float32(-np.inf))

        row, column, order = row[: len(lengths)], column[: len(lengths)], order[: len(lengths)]
        most = order.max() + 1
        first, columns = np.zeros((2, rows, most), dtype=np.int64)
        first[row, order], columns[row, order] = np.arange(len(row)), column

        # All of it is known from the lengths alone: a device is given the results and never asked for one.
        self.starts, self.positions = (torch.from_numpy(x).to(device, non_blocking=True) for x in (start[: len(lengths)], position))
        self.tokens = Cells(token, cell, bias[:, None], device)
        self.firsts = Cells(first, row * most + order, bias[np.arange(rows)[:, None], columns][:, None], device)


class WholeRow:
    """As `Cells`, for attention over a packed row as it is: each item is its own cell."""

    def __init__(self, apart: Tensor) -> None:
        """Which of the T tokens each of N items does not attend to, shape (N, T)."""
        self._apart = apart
        self._bias_in: dict[torch.dtype, Tensor] = {}

    def spread(self, items: Tensor) -> Tensor:
        """(N, H, D) → (1, H, N, D)."""
        return items.transpose(0, 1)[None]

    def collect(self, cells: Tensor) -> Tensor:
        """(1, H, N, D) → (N, H, D)."""
        return cells[0].transpose(0, 1)

    def bias_in(self, dtype: torch.dtype) -> Tensor:
        """What is added to attention's scores, shape (1, 1, N, T), made once for all layers."""
        if dtype not in self._bias_in:
            bias = torch.zeros(self._apart.shape, dtype=dtype, device=self._apart.device)
            self._bias_in[dtype] = bias.masked_fill_(self._apart, -math.inf)[None, None]
        return self._bias_in[dtype]


class RowSpans:
    """As `Spans`, of a `Row`, made on its device: by the number of each token's sentence and of each sentence's first token."""

    def __init__(self, sentence: Tensor, starts: Tensor) -> None:
        """Shapes (T,) and (B,)."""
        self.starts = starts
        self.tokens = WholeRow(sentence[:, None] != sentence)
        self.firsts = WholeRow(sentence[starts][:, None] != sentence)


def _end_to_end(sizes: Sequence[int]) -> tuple[Integers, Integers, Integers]:
    """Where each sentence of a row starts, shape (B,), and each token's sentence and place in it, shapes (T,)."""
    size = np.array(sizes, dtype=np.int64)
    start = size.cumsum() - size
    sentence = np.arange(len(sizes)).repeat(size)
    return start, sentence, np.arange(len(sentence)) - start[sentence]


def _share_rows(sizes: Sequence[int], room: int) -> list[tuple[int, int, int]]:
    """Row, first column and number in the row of each sentence: the longest first, each where it fits first."""
    places: list[tuple[int, int, int]] = [(0, 0, 0)] * len(sizes)
    rows: list[tuple[int, int]] = []  # cells taken and sentences
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        row = next((number for number, (taken, _) in enumerate(rows) if taken + sizes[i] <= room), len(rows))
        if row == len(rows):
            rows.append((0, 0))
        taken, sentences = rows[row]
        places[i] = row, taken, sentences
        rows[row] = taken + sizes[i], sentences + 1
    return places


@dataclass(frozen=True, kw_only=True)
class Batch:
    """
    The examples of one step, on the device.

    Attributes:
        rows: Their positions in the `Encoded` they come from, shape (B,); on the device or the CPU.
        labels: Shape (B,).
        inputs: What the model's forward takes.
    """

    rows: Tensor
    labels: Tensor
    inputs: dict[str, Any]


class Row:
    """
    A batch of packed sentences as a single tensor, which reaches a GPU in one copy and has one of a few shapes.

    Attention runs over the row as it is, behind a mask. Filling is a sentence of its own, as in `Spans`.

    Attributes:
        shape: Tokens with the filling, and sentences.
        numbers: All that the device must be told, int64, on the CPU.
    """

    def __init__(self, encoded: Encoded, rows: Sequence[int]) -> None:
        tokens = [encoded.tokens[i] for i in rows]
        lengths = [len(t) for t in tokens]
        text = sum(lengths)
        filling = -text % LONG_ROW_STEP
        self.shape = text + filling, len(rows)
        start, sentence, position = _end_to_end([*lengths, filling])
        position[text:] = 0  # the filling may be longer than a model has positions
        index = torch.tensor(rows)
        ids = torch.cat([*tokens, tokens[0][:1].expand(filling)])
        places = torch.from_numpy(np.concatenate([position, sentence, start[: len(rows)]]))
        self.numbers = torch.cat([ids, places, encoded.labels[index], index])

    def batch(self, numbers: Tensor) -> Batch:
        """The batch over a copy of the numbers, which decides the device."""
        tokens, sentences = self.shape
        ids, positions, sentence, starts, labels, rows = torch.split(numbers, [tokens] * 3 + [sentences] * 3)
        inputs = {"input_ids": ids[None], "position_ids": positions[None], "spans": RowSpans(sentence, starts)}
        return Batch(rows=rows, labels=labels, inputs=inputs)


def row_step_on(device: Device) -> int:
    """What the number of tokens of a packed row should be a multiple of."""
    return BF16_ROW_STEP if (device.kind, device.precision) == ("cpu", "bf16") else ROW_STEP


def make_batch(encoded: Encoded, rows: Sequence[int], device: str, *, packed: bool, row_step: int = ROW_STEP) -> Batch:
    """The examples at these positions, packed end to end, in a multiple of that many tokens, or padded to the longest."""
    index = torch.tensor(rows)
    tokens = [encoded.tokens[i] for i in rows]
    inputs: dict[str, Any]
    if packed:
        spans = Spans([len(t) for t in tokens], device, row_step)
        inputs = {
            "input_ids": torch.cat([*tokens, tokens[0][:1].expand(spans.filling)]).to(device, non_blocking=True)[None],  # (1, T)
            "position_ids": spans.positions[None],  # (1, T)
            "spans": spans,
        }
    else:
        lengths = torch.tensor([len(t) for t in tokens])
        ids = nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=encoded.padding)  # (B, longest)
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        inputs = {"input_ids": ids.to(device, non_blocking=True), "attention_mask": mask.to(device, non_blocking=True)}
    return Batch(rows=index, labels=encoded.labels[index].to(device, non_blocking=True), inputs=inputs)


def shuffled_rows(n: int, size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """One epoch: every row of n exactly once, in an order drawn from the generator; the last batch may be smaller."""
    order = torch.randperm(n, generator=generator).tolist()
    for start in range(0, n, size):
        yield order[start : start + size]


@dataclass(frozen=True, kw_only=True)
class Batches:
    """
    The batches of a training run: each example once an epoch, in another order each time.

    Attributes:
        size: Examples to a batch.
        generator: Of the orders.
        device: As torch writes it.
        packed: Whether a batch is one row, or padded to its longest text.
        row_step: What the number of tokens of a packed row is a multiple of.
    """

    encoded: Encoded
    size: int
    generator: torch.Generator
    device: str
    packed: bool
    row_step: int = ROW_STEP

    def __len__(self) -> int:
        """Batches of an epoch."""
        return -(-len(self.encoded) // self.size)

    def epoch(self) -> Iterator[list[int]]:
        """The rows of each batch of the next epoch; the last batch may be smaller."""
        return shuffled_rows(len(self.encoded), self.size, self.generator)

    def collate(self, rows: Sequence[int]) -> Batch:
        """The batch, or a part of one, of these rows."""
        return make_batch(self.encoded, rows, self.device, packed=self.packed, row_step=self.row_step)

    def row(self, rows: Sequence[int]) -> Row | None:
        """The batch of these rows as a single tensor; None if it would be too long."""
        return Row(self.encoded, rows) if self.tokens(rows) <= LONGEST_ROW else None

    def tokens(self, rows: Sequence[int]) -> int:
        """Tokens of text of these rows."""
        return sum(len(self.encoded.tokens[i]) for i in rows)


def predict(model: nn.Module, encoded: Encoded, device: Device, *, packed: bool, batch_size: int = 64) -> Tensor:
    """
    Logits of every example without dropout, sentences of like length together, in smaller batches where memory runs out.

    Returns:
        Shape (N, C), fp32, on the CPU, in the order of the examples.

    Raises:
        DoesNotFit: If one text at a time is too much for the device's memory.
    """
    order = sorted(range(len(encoded)), key=lambda i: len(encoded.tokens[i]))
    logits: Tensor | None = None
    was_training = model.training
    model.eval()
    with torch.inference_mode(), device.autocast():
        start = 0
        while start < len(order):
            rows = order[start : start + batch_size]
            try:
                batch = make_batch(encoded, rows, device.name, packed=packed, row_step=row_step_on(device))
                out = model(**batch.inputs).logits.float().cpu()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                out = None
            if out is None:  # the error, which keeps what was computed before it, is gone
                if batch_size == 1:
                    raise DoesNotFit(
                        f"split {encoded.split.name!r}: one text at a time does not fit {device.name}; use a larger device"
                    )
                batch_size //= 2
                device.release_memory()
                continue
            start += len(rows)
            logits = out.new_empty(len(encoded), out.shape[1]) if logits is None else logits
            logits[rows] = out
    model.train(was_training)
    if logits is None:
        raise ValueError(f"no examples to predict in split {encoded.split.name!r}")
    return logits.clone()  # a plain tensor again, not an inference one


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, tokens: Tensor, cells: Tensor) -> Tensor:
        ctx.save_for_backward(cells)
        return rows.index_select(0, tokens)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.reshape(-1, gradient.shape[-1]).index_select(0, *ctx.saved_tensors), None, None


class _Collect(torch.autograd.Function):
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
