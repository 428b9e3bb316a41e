"""The encoder layers of BERT and DistilBERT, over packed rows."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.distilbert.modeling_distilbert import TransformerBlock

from peftbench import kernels
from peftbench.attention import attend
from peftbench.dropout import Dropout
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
        within, mix = self.attention.self, self.attention.output
        tokens = hidden_states.view(-1, hidden_states.shape[-1])  # (T, E)
        x = tokens.index_select(0, spans.starts) if self.firsts_alone else tokens
        query, key, value = _project(x, tokens, within.query, within.key, within.value)
        attended = _attend(query, key, value, spans, self.firsts_alone, within.num_attention_heads, within.dropout)
        mixed = _add_and_normalize(x, mix.dense(attended), mix.dropout, mix.LayerNorm)
        out = _add_and_normalize(mixed, self.output.dense(self.intermediate(mixed)), self.output.dropout, self.output.LayerNorm)
        return out[None]


class PackedDistilBertLayer(TransformerBlock):  # type: ignore[misc]
    """As `PackedBertLayer`."""

    firsts_alone = False

    def forward(self, hidden_states: Tensor, *args: Any, spans: Spans | RowSpans | None = None, **kwargs: Any) -> Tensor:
        """(1, T, E) → (1, T, E) or, with the firsts alone, (1, B, E)."""
        if spans is None:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[no-any-return]
        within, feed = self.attention, self.ffn
        tokens = hidden_states.view(-1, hidden_states.shape[-1])  # (T, E)
        x = tokens.index_select(0, spans.starts) if self.firsts_alone else tokens
        query, key, value = _project(x, tokens, within.q_lin, within.k_lin, within.v_lin)
        attended = _attend(query, key, value, spans, self.firsts_alone, within.n_heads, within.dropout)
        mixed = _add_and_normalize(x, within.out_lin(attended), None, self.sa_layer_norm)
        out = _add_and_normalize(mixed, feed.lin2(feed.activation(feed.lin1(mixed))), feed.dropout, self.output_layer_norm)
        return out[None]


LAYERS = {"bert": PackedBertLayer, "distilbert": PackedDistilBertLayer}
"""By the type of model: what can be packed."""


def _sentences_as_batch(_: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """The head reads the first token of each sentence: (1, B, E) → (B, 1, E)."""
    if kwargs.get("spans") is not None:
        output["last_hidden_state"] = output.last_hidden_state.transpose(0, 1)
    return output


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
    rate = dropout.p if dropout.training else 0.0
    if rate and isinstance(dropout, Dropout) and isinstance(spans, Spans):
        cells = spans.firsts if firsts_alone else spans.tokens
        return attend(query, key, value, cells.indices(heads), spans.tokens.indices(heads), cells.bias, dropout)
    queries, keys, size = spans.firsts if firsts_alone else spans.tokens, spans.tokens, query.shape[1] // heads
    q = queries.spread(query.view(-1, heads, size))
    k, v = (keys.spread(x.view(-1, heads, size)) for x in (key, value))
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=queries.bias_in(q.dtype), dropout_p=rate)
    return queries.collect(attended).reshape(query.shape)


def _add_and_normalize(x: Tensor, added: Tensor, dropout: Any, norm: Callable[[Tensor], Tensor]) -> Tensor:
    """norm(x + dropout(added)), all of one shape; a dropout of None drops nothing."""
    if isinstance(norm, kernels.LayerNorm) and added.requires_grad:
        return norm.after_adding(x, added, dropout)
    return norm(x + (added if dropout is None else dropout(added)))
