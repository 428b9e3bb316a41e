"""The encoder layers of BERT and DistilBERT, over packed rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.activations import GELUActivation
from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.distilbert.modeling_distilbert import TransformerBlock

from peftbench import attention, kernels
from peftbench.dropout import Dropout
from peftbench.kernels import add_product, gelu_backward, product
from peftbench.packing import RowSpans, Spans

ACROSS_TOKENS = {"LILY"}
"""Types of adapters that average over all tokens at hand, padding included: without it they would be other adapters."""


def make_packable(model: nn.Module) -> bool:
    """
    Teach a BERT or DistilBERT classifier, plain or under PEFT, to take packed rows.

    The encoder's last layer computes, past its keys and values, only the first token of each sentence, which is all that the head
    reads. Padded input works as before.

    Returns:
        False if the architecture, or what a PEFT method has made of it, such as virtual tokens before the text, cannot be packed.
    """
    config = getattr(model, "active_peft_config", None)
    if config is not None and (config.is_prompt_learning or config.peft_type in ACROSS_TOKENS):
        return False
    classifier: Any = model.get_base_model() if config is not None else model  # type: ignore[operator]
    packed = LAYERS.get(classifier.config.model_type) if isinstance(classifier, PreTrainedModel) else None
    if packed is None or getattr(classifier.config, "is_decoder", False):  # in which a token does not attend to those behind it
        return False
    body: Any = classifier.base_model
    encoder = getattr(body, "encoder", None) or body.transformer
    if not all(type(layer) is packed.__base__ for layer in encoder.layer):  # one that an adapter has wrapped, say
        return False
    encoder.register_forward_hook(_sentences_as_batch, with_kwargs=True)
    for layer in encoder.layer:
        layer.__class__ = packed
    encoder.layer[-1].firsts_alone = True
    return True


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """
    The modules of a layer, by what they do in either architecture.

    Attributes:
        attention_dropout: Of attention's weights.
        mix: Of what attention gives, whose result is added to the layer's input; its dropout is None where there is none.
        widen: The feed-forward network's first half, ``narrow`` its second.
    """

    query: Any
    key: Any
    value: Any
    heads: int
    attention_dropout: Any
    mix: Any
    mix_dropout: Any
    mix_norm: Any
    widen: Any
    activation: Any
    narrow: Any
    narrow_dropout: Any
    narrow_norm: Any

    @property
    def linear(self) -> tuple[Any, ...]:
        return self.query, self.key, self.value, self.mix, self.widen, self.narrow

    def are_plain(self) -> bool:
        """
        Whether an adapter has replaced none, all linear layers train, and the derivative of the activation is known here.

        Hooks on the modules do not run then.
        """
        return (
            all(type(layer) is kernels.Linear and layer.weight.requires_grad for layer in self.linear)
            and type(self.mix_dropout) in (Dropout, NoneType)
            and type(self.narrow_dropout) is Dropout
            and type(self.mix_norm) is type(self.narrow_norm) is kernels.LayerNorm
            and type(self.activation) is GELUActivation
            and self.activation.act is F.gelu
        )


class PackedBertLayer(BertLayer):  # type: ignore[misc]
    """
    transformers' layer that takes a packed row where ``spans`` say so.

    Attributes:
        firsts_alone: Past keys and values, only the first token of each sentence goes on.
    """

    firsts_alone = False

    def forward(self, hidden_states: Tensor, *args: Any, spans: Spans | RowSpans | None = None, **kwargs: Any) -> Tensor:
        """(1, T, E) → (1, T, E) or, with the firsts alone, (1, B, E)."""
        if spans is None:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[no-any-return]
        within, mix, out = self.attention.self, self.attention.output, self.output
        parts = Parts(
            query=within.query,
            key=within.key,
            value=within.value,
            heads=within.num_attention_heads,
            attention_dropout=within.dropout,
            mix=mix.dense,
            mix_dropout=mix.dropout,
            mix_norm=mix.LayerNorm,
            widen=self.intermediate.dense,
            activation=self.intermediate.intermediate_act_fn,
            narrow=out.dense,
            narrow_dropout=out.dropout,
            narrow_norm=out.LayerNorm,
        )
        return _encode(hidden_states.view(-1, hidden_states.shape[-1]), parts, spans, self.firsts_alone)[None]


class PackedDistilBertLayer(TransformerBlock):  # type: ignore[misc]
    """As `PackedBertLayer`."""

    firsts_alone = False

    def forward(self, hidden_states: Tensor, *args: Any, spans: Spans | RowSpans | None = None, **kwargs: Any) -> Tensor:
        """(1, T, E) → (1, T, E) or, with the firsts alone, (1, B, E)."""
        if spans is None:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[no-any-return]
        within, feed = self.attention, self.ffn
        parts = Parts(
            query=within.q_lin,
            key=within.k_lin,
            value=within.v_lin,
            heads=within.n_heads,
            attention_dropout=within.dropout,
            mix=within.out_lin,
            mix_dropout=None,
            mix_norm=self.sa_layer_norm,
            widen=feed.lin1,
            activation=feed.activation,
            narrow=feed.lin2,
            narrow_dropout=feed.dropout,
            narrow_norm=self.output_layer_norm,
        )
        return _encode(hidden_states.view(-1, hidden_states.shape[-1]), parts, spans, self.firsts_alone)[None]


LAYERS = {"bert": PackedBertLayer, "distilbert": PackedDistilBertLayer}
"""By the type of model: what can be packed."""


def _sentences_as_batch(_: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """The head reads the first token of each sentence: (1, B, E) → (B, 1, E)."""
    if kwargs.get("spans") is not None:
        output["last_hidden_state"] = output.last_hidden_state.transpose(0, 1)
    return output


def _encode(tokens: Tensor, parts: Parts, spans: Spans | RowSpans, firsts_alone: bool) -> Tensor:
    """A layer over a packed row: (T, E) → (T, E) or, with the firsts alone, (B, E)."""
    if tokens.requires_grad and isinstance(spans, Spans) and _drops(parts.attention_dropout) and parts.are_plain():
        out: Tensor = _Layer.apply(tokens, parts, spans, firsts_alone)  # type: ignore[no-untyped-call]
        return out
    x = tokens.index_select(0, spans.starts) if firsts_alone else tokens
    query, key, value = _project(x, tokens, parts.query, parts.key, parts.value)
    attended = _attend(query, key, value, spans, firsts_alone, parts.heads, parts.attention_dropout)
    mixed = _add_and_normalize(x, parts.mix(attended), parts.mix_dropout, parts.mix_norm)
    fed = parts.narrow(parts.activation(parts.widen(mixed)))
    return _add_and_normalize(mixed, fed, parts.narrow_dropout, parts.narrow_norm)


class _Layer(torch.autograd.Function):
    """A plain layer in training as one operation for autograd."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, parts: Parts, spans: Spans, firsts_alone: bool) -> Tensor:
        operands = [layer.parameters_for_use() for layer in parts.linear]
        query, key, value, mix, widen, narrow = operands
        dtype = query[0].dtype
        x = tokens.index_select(0, spans.starts) if firsts_alone else tokens
        all_rows = tokens.to(dtype)
        rows = x.to(dtype) if firsts_alone else all_rows
        cells = spans.firsts if firsts_alone else spans.tokens
        attended, kept_attention, scale_attention = attention.forward(
            product(rows, *query),
            product(all_rows, *key),
            product(all_rows, *value),
            cells.indices(parts.heads),
            spans.tokens.indices(parts.heads),
            cells.bias,
            parts.attention_dropout,
        )
        mixed, kept_mix, scale_mix = parts.mix_norm.forward_sum(x, product(attended, *mix), parts.mix_dropout)
        mixed_rows = mixed.to(dtype)
        wide = product(mixed_rows, *widen)
        active = F.gelu(wide)
        out, kept_narrow, scale_narrow = parts.narrow_norm.forward_sum(mixed, product(active, *narrow), parts.narrow_dropout)
        inputs, weights = [all_rows, rows, attended, mixed_rows, wide, active], [weight for weight, *_ in operands]
        ctx.save_for_backward(*inputs, *weights, *kept_mix, *kept_narrow, *kept_attention)
        ctx.parts, ctx.scales, ctx.dtype = parts, (scale_attention, scale_mix, scale_narrow), tokens.dtype
        ctx.starts = spans.starts if firsts_alone else None
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        all_rows, rows, attended, mixed_rows, wide, active, *kept = ctx.saved_tensors
        (to_query, to_key, to_value, to_mixed, to_wide, to_narrow), kept = kept[:6], kept[6:]
        kept_mix, kept_narrow, kept_attention = kept[:4], kept[4:8], kept[8:]
        scale_attention, scale_mix, scale_narrow = ctx.scales
        parts, dtype = ctx.parts, rows.dtype

        into_mixed, gradient = parts.narrow_norm.backward_sum(gradient, kept_narrow, scale_narrow, dtype)
        parts.narrow.add_gradient(active, gradient)
        gradient = gelu_backward(product(gradient, to_narrow.t()), wide)
        parts.widen.add_gradient(mixed_rows, gradient)
        add_product(into_mixed, gradient, to_wide)

        into_x, gradient = parts.mix_norm.backward_sum(into_mixed, kept_mix, scale_mix, dtype)
        parts.mix.add_gradient(attended, gradient)
        query, key, value = attention.backward(product(gradient, to_mixed.t()), kept_attention, scale_attention)
        parts.query.add_gradient(rows, query)
        parts.key.add_gradient(all_rows, key)
        parts.value.add_gradient(all_rows, value)
        add_product(into_x, query, to_query)
        if ctx.starts is None:
            into = add_product(into_x, key, to_key)
        else:
            into = product(key, to_key.t()).to(into_x.dtype).index_add_(0, ctx.starts, into_x)
        return add_product(into, value, to_value).to(ctx.dtype), None, None, None


def _drops(dropout: Any) -> TypeGuard[Dropout]:
    """Whether some of attention's weights are dropped, on a CPU; torch's own attention is as fast or faster where none are."""
    return isinstance(dropout, Dropout) and dropout.training and dropout.p > 0


def _project(x: Tensor, tokens: Tensor, query: Any, key: Any, value: Any) -> Sequence[Tensor]:
    """Queries of ``x``, keys and values of the tokens; in one go where an adapter has not replaced any."""
    if not all(isinstance(layer, kernels.Linear) for layer in (query, key, value)):
        return query(x), key(tokens), value(tokens)
    if x is tokens:
        return kernels.project(tokens, [query, key, value])
    return query(x), *kernels.project(tokens, [key, value])


def _attend(
    query: Tensor, key: Tensor, value: Tensor, spans: Spans | RowSpans, firsts_alone: bool, heads: int, dropout: nn.Dropout
) -> Tensor:
    """Attention within sentences: (Q, E) over keys and values of (T, E) gives (Q, E); Q is T, or B for the firsts alone."""
    if isinstance(spans, Spans) and _drops(dropout):
        cells = spans.firsts if firsts_alone else spans.tokens
        return attention.attend(query, key, value, cells.indices(heads), spans.tokens.indices(heads), cells.bias, dropout)
    queries, keys, size = spans.firsts if firsts_alone else spans.tokens, spans.tokens, query.shape[1] // heads
    q = queries.spread(query.view(-1, heads, size))
    k, v = (keys.spread(x.view(-1, heads, size)) for x in (key, value))
    rate = dropout.p if dropout.training else 0.0
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=queries.bias_in(q.dtype), dropout_p=rate)
    return queries.collect(attended).reshape(query.shape)


def _add_and_normalize(x: Tensor, added: Tensor, dropout: Any, norm: Callable[[Tensor], Tensor]) -> Tensor:
    """norm(x + dropout(added)), all of one shape; a dropout of None drops nothing."""
    if isinstance(norm, kernels.LayerNorm) and added.requires_grad:
        return norm.after_adding(x, added, dropout)
    return norm(x + (added if dropout is None else dropout(added)))
