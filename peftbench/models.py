"""Roles as loaded classifiers: weights, adapters, what trains, and how much of it there is."""

import copy
import dataclasses
import functools
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import TaskType, get_peft_config, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    DistilBertConfig,
    PreTrainedTokenizerFast,
    logging,
)
from transformers.pytorch_utils import Conv1D

from peftbench.assets import ASSETS, Asset, say
from peftbench.data import grammar_words
from peftbench.device import is_out_of_memory
from peftbench.errors import PeftbenchError
from peftbench.hub import HubError, snapshot
from peftbench.phases import Phase, Pretrained, Untrained
from peftbench.sealed import file_sha256, fingerprint

LABELS = {0: "negative", 1: "positive"}

CHECKPOINT_FILES = (
    "config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*",
    "vocab.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)
"""What makes a checkpoint; nothing else is fetched or loaded but the files of an older tokenizer."""

TOKENIZER_FILES = frozenset(("tokenizer.json", "vocab.txt"))
"""One of them must be there: without, transformers makes up a tokenizer to which every word is unknown."""

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
"""Of the tokenizer at tiny scale, before its words."""

OLDER_TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "spm.model",
    "sentencepiece.bpe.model",
    "sentencepiece.model",
    "tokenizer.model",
)
"""What older tokenizers consist of, asked for where there is none of those: the first two together, or any other."""

HEAD_WEIGHTS = ("classifier.weight", "classifier.out_proj.weight", "score.weight", "classification_head.out_proj.weight")
"""Names of the weight that has a row for each label, by architecture."""

NOT_BY_THE_LOSS_ALONE = {
    "ADALORA": "chooses its ranks while it trains and must be told of each step, which the loop does not do; it would train as "
    "another method. Use one such as LORA",
    "POLY": "must be told the task of each example, which the loop does not know. Use one such as LORA",
    "MULTITASK_PROMPT_TUNING": "must be told the task of each example, which the loop does not know. Use one such as PROMPT_TUNING",
}
"""Methods of ``peft`` that cannot train here, and why."""

FROM_DATA = ("eva", "lora_ga", "corda")
"""What LoRA can begin from after a pass over the data, which the loop does not make; peft would begin from something else."""

Fetch = Callable[[Asset], Path]


class ModelError(PeftbenchError, ValueError):
    """A checkpoint or an adapter configuration cannot be used as asked."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """
    Where a role's weights are, resolved to something that can be loaded.

    Attributes:
        folder: Where they lie; empty for random weights.
        identity: Fingerprint of their content: equal ones give equal models.
        commit: Of the Hub's repository; None for anything else.
    """

    source: Pretrained | Untrained
    folder: str
    identity: str
    commit: str | None = None


def locate(source: Pretrained | Untrained, fetch: Fetch, notify: Callable[[str], None] = say) -> Weights:
    """
    Resolve a role's source, fetching an asset or a Hub repository if need be, and fingerprint the content of its weights.

    Raises:
        HubError: If the source is no asset and no local folder, and cannot be had from the Hub.
        ModelError: If the checkpoint has no safetensors, no tokenizer or an adapter beside them, or there is no such asset.
    """
    if isinstance(source, Untrained):
        facts = [source.architecture, source.layers, source.hidden_size, source.attention_heads, source.initializer_range]
        return Weights(source=source, folder="", identity=fingerprint([*facts, grammar_words()]))
    commit = None
    if source.source.startswith("asset:"):
        asset = ASSETS.get(source.source.removeprefix("asset:"))
        if asset is None:
            raise ModelError(f"{source.source} is not an asset; there are {', '.join(f'asset:{name}' for name in ASSETS)}")
        folder = fetch(asset)
    elif Path(source.source).is_dir():
        folder = Path(source.source)
    else:
        hub = functools.partial(snapshot, source.source, kind="model", revision=source.revision, notify=notify)
        try:
            found = hub(files=CHECKPOINT_FILES)
            if not _tokenizer_files(found.folder):
                found = hub(files=(*CHECKPOINT_FILES, *OLDER_TOKENIZER_FILES))
        except HubError as error:
            raise HubError(f"{error}; nor is there a folder {source.source!r} in {Path().resolve().name or 'here'}") from None
        folder, commit = found.folder, found.commit
    if (folder / "adapter_config.json").is_file():  # which transformers attaches by itself
        raise ModelError(
            f"{folder} has an adapter, adapter_config.json; merge it into the weights and save these and their tokenizer alone"
        )
    files = sorted({file for pattern in CHECKPOINT_FILES for file in folder.glob(pattern) if file.is_file()})
    if not any(file.suffix == ".safetensors" for file in files):
        raise ModelError(
            f"{source.source} has no model.safetensors; pickled weights can run code and are not loaded. Name a revision that "
            "has it (the Hub keeps its conversions as refs/pr/1 and so on), or save the checkpoint again as safetensors"
            + ("" if commit is None else f". If it does have it, the copy in {folder} is incomplete: run once online")
        )
    of_tokenizer = _tokenizer_files(folder)
    if not of_tokenizer:
        raise ModelError(
            f"{source.source} has no tokenizer, wanted {' or '.join(sorted(TOKENIZER_FILES))}; "
            "save the tokenizer that the weights were trained with beside them"
        )
    content = {file.name: file_sha256(file) for file in sorted({*files, *of_tokenizer})}
    return Weights(source=source, folder=str(folder), identity=fingerprint([content, list(source.layers)]), commit=commit)


def _tokenizer_files(folder: Path) -> list[Path]:
    """What the tokenizer in a folder is made of; nothing if there is none."""
    if found := [path for name in TOKENIZER_FILES if (path := folder / name).is_file()]:
        return found
    older = {name: path for name in OLDER_TOKENIZER_FILES if (path := folder / name).is_file()}
    return [] if older.keys() in ({"vocab.json"}, {"merges.txt"}) else list(older.values())


def load_tokenizer(weights: Weights) -> Any:
    """
    The tokenizer that belongs to the weights; at tiny scale one word is one token.

    One without a token for padding, such as GPT-2's, pads with the one that ends a text.

    Raises:
        ModelError: If its files cannot be read.
    """
    if not isinstance(weights.source, Untrained):
        with _explained(f"cannot load the tokenizer of {weights.source.source}"):
            loaded = AutoTokenizer.from_pretrained(weights.folder, trust_remote_code=False)
            if loaded.pad_token_id is None and loaded.eos_token is not None:
                loaded.pad_token = loaded.eos_token
            return loaded
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = [*SPECIAL_TOKENS, *grammar_words()]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(token, words.index(token)) for token in ("[CLS]", "[SEP]")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")


def load_classifier(weights: Weights, *, tuned: bool = False, shapes_only: bool = False) -> nn.Module:
    """
    The encoder with a two-label head; what the checkpoint lacks, such as the head, is drawn from torch's global generator.

    Args:
        tuned: The checkpoint must bring its own head, as a teacher does.
        shapes_only: Read no weights; for torch's meta device.

    Raises:
        ModelError: If the checkpoint cannot be read, lacks weights of the encoder or the head it must bring, has another number
            of labels or the positive one first, not the layers that were asked for, or a tokenizer with more ids than it has
            embeddings, or if its head reads what may be padding.
    """
    labels: dict[str, Any] = {"num_labels": 2, "id2label": LABELS, "label2id": {v: k for k, v in LABELS.items()}}
    source = weights.source
    if isinstance(source, Untrained):
        return AutoModelForSequenceClassification.from_config(_untrained_config(source, labels))  # type: ignore[no-any-return]
    if tuned:
        _check_label_order(weights)
    model = _from_config(weights, labels) if shapes_only else _from_checkpoint(weights, labels, tuned=tuned)
    if source.layers:
        stack = encoder_layers(model)
        if not all(1 <= layer <= len(stack) for layer in source.layers):
            raise ModelError(f"layers {source.layers} were asked for, {source.source} has layers 1 to {len(stack)}")
        kept = nn.ModuleList(stack[i - 1] for i in source.layers)
        for number, layer in enumerate(kept):
            for module in layer.modules():
                if hasattr(module, "layer_idx"):  # where the keys are that a prefix puts before the layer's own
                    module.layer_idx = number  # type: ignore[assignment]
        _encoder(model).layer = kept
        model.config.num_hidden_layers = len(kept)
    if hasattr(model, "sequence_summary") and model.config.summary_type == "last":
        raise ModelError(
            f"{source.source}: {type(model).__name__} reads a batch's last tokens, padding included; use another model"
        )
    tokenizer = load_tokenizer(weights)
    if _reads_last_token(model) and tokenizer.pad_token_id is None:
        raise ModelError(
            f"{source.source}: {type(model).__name__} reads a text's last token, and its tokenizer has none to pad with behind it; "
            "give the tokenizer a pad_token and save it again"
        )
    # Heads that read a text's last token find it before the padding.
    if tokenizer.pad_token_id is not None and _padding_position(model) is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    has_pooler = any(".pooler." in name for name, _ in model.named_parameters())
    model.pooler_is_new = has_pooler and not any("pooler." in name for name in _weight_shapes(weights))
    largest, rows = max(tokenizer.get_vocab().values(), default=-1), model.get_input_embeddings().num_embeddings
    if largest >= rows:
        raise ModelError(
            f"{source.source}: the tokenizer has ids up to {largest}, the model embeds {rows}; they are of different checkpoints"
        )
    return model  # type: ignore[no-any-return]


def _from_config(weights: Weights, labels: dict[str, Any]) -> Any:
    with _explained(f"cannot read the architecture in {weights.folder}"):
        config = AutoConfig.from_pretrained(weights.folder, trust_remote_code=False, **labels)
        return AutoModelForSequenceClassification.from_config(config)


def _from_checkpoint(weights: Weights, labels: dict[str, Any], *, tuned: bool) -> Any:
    source = weights.source
    assert isinstance(source, Pretrained)
    for name, shape in _weight_shapes(weights).items():
        if name in HEAD_WEIGHTS and shape[0] != 2:
            raise ModelError(
                f"{source.source} classifies into {shape[0]} labels, wanted 2: negative and positive; the encoder alone, as "
                "model.base_model.save_pretrained saves it, gets a new head"
            )
    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # that the head is new is what we want, not news
    try:
        with _explained(f"cannot load a two-label classifier from {source.source}"):
            model, loaded = AutoModelForSequenceClassification.from_pretrained(
                weights.folder,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                **labels,
            )
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
    missing = sorted(loaded["missing_keys"])
    lost = [name for name in missing if name.startswith(f"{model.base_model_prefix}.") and ".pooler." not in name]
    if lost:
        raise ModelError(
            f"{source.source} lacks {len(lost)} weights of the encoder, such as {lost[0]}; are they of another model, or saved "
            "under other names, such as with module. in front?"
        )
    if tuned and missing:
        raise ModelError(
            f"{source.source} is not a tuned classifier: it lacks {', '.join(missing)[:200]}; give one that is, or a "
            "Phase by which the scale's backbone is tuned to become the teacher"
        )
    return model


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Say of whatever a library makes of files that it cannot read what could not be done, and why."""
    try:
        yield
    except Exception as error:
        if isinstance(error, RuntimeError | MemoryError) and is_out_of_memory(error):
            raise
        told = str(error).strip()[:300]
        of_files = isinstance(error, OSError | RuntimeError | ValueError | SafetensorError)  # others say what is wrong with code
        raise ModelError(f"{what}: {told}" if told and of_files else f"{what}: {type(error).__name__}: {told}") from error


def encoder_layers(model: nn.Module) -> nn.ModuleList:
    """
    The stack of encoder layers, bottom first, of BERT, DistilBERT or whatever names it alike.

    Raises:
        ModelError: If the model has none there.
    """
    layers = getattr(_encoder(model), "layer", None)
    if not isinstance(layers, nn.ModuleList):
        raise ModelError(
            f"{type(model).__name__} has no encoder layers where BERT or DistilBERT have them; a checkpoint's layers, "
            "unfreeze_top_layers and a layer_decay below 1 ask for these"
        )
    return layers


def check_positions(model: nn.Module, max_length: int, what: str, *, virtual_tokens: int = 0) -> None:
    """
    See that texts have no more tokens than the model has positions, before one of them asks for a position that there is not.

    Args:
        virtual_tokens: That an adapter puts before each text.

    Raises:
        ModelError: If they may have.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is None or positions < 0:  # as of models whose positions are relative
        return
    padding = _padding_position(model)
    usable = positions - virtual_tokens - (0 if padding is None else padding + 1)  # RoBERTa counts from behind the padding's
    if max_length > usable:
        less = f" less {virtual_tokens} virtual tokens" if virtual_tokens else ""
        raise ModelError(f"{what}: max_length must be at most {usable}, the model's positions{less}, got {max_length}")


def _padding_position(model: nn.Module) -> int | None:
    """The position of padding where a model counts from behind it, as RoBERTa does."""
    embeddings: Any = getattr(getattr(model, "base_model", None), "embeddings", None)
    position: int | None = getattr(getattr(embeddings, "position_embeddings", None), "padding_idx", None)
    return position


def prepare(model: nn.Module, phase: Phase) -> tuple[nn.Module, list[dict[str, Any]]]:
    """
    Attach the phase's adapter, set its dropout and decide what trains: everything, or adapter, head and the top layers asked for.

    Returns:
        The model, and its trainable parameters with their learning rates as an optimizer takes them.

    Raises:
        ModelError: If the PEFT configuration is not valid, matches no module, more layers are to be unfrozen than exist, or texts
            may have more tokens than the model has positions.
    """
    plain, virtual_tokens = model, 0
    if phase.dropout is not None:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = phase.dropout
    unfrozen: list[nn.Parameter] = []
    if phase.peft is not None:
        if phase.unfreeze_top_layers:
            layers = list(encoder_layers(model))
            if phase.unfreeze_top_layers > len(layers):
                raise ModelError(
                    f"{phase.id}: cannot unfreeze {phase.unfreeze_top_layers} top layers, the encoder has {len(layers)}"
                )
            unfrozen = [p for layer in layers[-phase.unfreeze_top_layers :] for p in layer.parameters()]
        model = _adapt(model, phase)
        config: Any = model.active_peft_config
        virtual_tokens = config.num_virtual_tokens if config.is_prompt_learning else 0
        for parameter in unfrozen:
            parameter.requires_grad_(True)
    check_positions(plain, phase.max_length, phase.id, virtual_tokens=virtual_tokens)
    return model, _groups(model, phase, {id(p) for p in unfrozen})


def _head(model: nn.Module) -> list[str]:
    """
    What lies on top of the encoder, by name, and a pooler of the encoder's that the checkpoint lacked.

    PEFT must be told of it, or a random part of it would stay frozen.
    """
    body = getattr(model, "base_model", model)
    children = [] if body is model else list(model.named_children())
    head = [name for name, child in children if child is not body and next(child.parameters(), None) is not None]
    return head + ["pooler"] * ("pooler" not in head and getattr(model, "pooler_is_new", False))


def _adapt(model: nn.Module, phase: Phase) -> nn.Module:
    assert phase.peft is not None
    head, reads_last_token = _head(model), _reads_last_token(model)
    peft = copy.deepcopy(dict(phase.peft))  # peft extends lists in place
    if (task := peft.pop("task_type", TaskType.SEQ_CLS)) != TaskType.SEQ_CLS:
        raise ModelError(f"{phase.id}: peft's task_type must be SEQ_CLS or left out, got {task!r}")
    kind = peft["peft_type"] = str(getattr(peft["peft_type"], "value", peft["peft_type"])).upper()
    if why := NOT_BY_THE_LOSS_ALONE.get(kind):
        raise ModelError(f"{phase.id}: {kind} {why}")
    if (start := peft.get("init_lora_weights")) in FROM_DATA:
        raise ModelError(f"{phase.id}: init_lora_weights {start!r} begins from a pass over the data, which the loop does not make")
    config_type = PEFT_TYPE_TO_CONFIG_MAPPING.get(kind)
    saves_modules = config_type is not None and any(field.name == "modules_to_save" for field in dataclasses.fields(config_type))
    if saves_modules:
        own = peft.get("modules_to_save") or []
        if not isinstance(own, list | tuple):
            raise ModelError(f"{phase.id}: peft's modules_to_save must be a list of names, got {own!r}")
        peft["modules_to_save"] = list(dict.fromkeys([*head, *own]))
    try:
        with warnings.catch_warnings():  # peft asks transformers by an old name whether activations are checkpointed
            warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
            adapted: nn.Module = get_peft_model(model, get_peft_config({"task_type": TaskType.SEQ_CLS, **peft}))
    except (ValueError, TypeError, KeyError, AttributeError, ImportError) as error:  # as of an outdated torchao beside peft
        hint = ""
        if config_type is None:
            hint = f"; peft_type must be one of {', '.join(sorted(PEFT_TYPE_TO_CONFIG_MAPPING))}"
        elif "target" in str(error):
            inside = (name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D))
            hint = f"; linear layers are {', '.join(dict.fromkeys(inside))}"
        raise ModelError(f"{phase.id}: peft cannot apply {dict(phase.peft)}: {type(error).__name__}: {error}{hint}") from error
    config: Any = adapted.active_peft_config
    if getattr(config, "use_asa", False):
        raise ModelError(f"{phase.id}: with use_asa {kind} {NOT_BY_THE_LOSS_ALONE['ADALORA']}")
    if config.is_prompt_learning and kind != "PREFIX_TUNING":  # which alone leaves the text's ids to the model
        name, width = type(model).__name__, model.get_input_embeddings().embedding_dim  # type: ignore[operator]
        if reads_last_token:
            raise ModelError(
                f"{phase.id}: {name} reads a text's last token, which it cannot find behind {kind}'s virtual tokens; "
                "use PREFIX_TUNING or another method"
            )
        if config.token_dim != width:
            raise ModelError(
                f"{phase.id}: {name} embeds tokens as {width} numbers and {kind}'s virtual tokens have {config.token_dim}; "
                f"give peft token_dim {width}"
            )
    if not saves_modules:
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in head:
                module.requires_grad_(True)
    return adapted


def _groups(model: nn.Module, phase: Phase, unfrozen: set[int]) -> list[dict[str, Any]]:
    """What trains, by learning rate; the head and whatever lies outside the layers count as the top."""
    base: Any = model.get_base_model() if phase.peft is not None else model  # type: ignore[operator]
    below_top: dict[int, int] = {}
    if phase.layer_decay != 1.0:
        layers = list(encoder_layers(base))
        below_top = {id(p): len(layers) - i for i, layer in enumerate(layers, start=1) for p in layer.parameters()}
        below_top |= {id(p): len(layers) for p in base.base_model.embeddings.parameters()}
    by_rate: dict[float, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            peak = (phase.unfrozen_learning_rate or phase.learning_rate) if id(parameter) in unfrozen else phase.learning_rate
            by_rate.setdefault(peak * phase.layer_decay ** below_top.get(id(parameter), 0), []).append(parameter)
    return [{"params": parameters, "lr": rate} for rate, parameters in by_rate.items()]


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Total and trainable scalars; a shared tensor counts once, and the frozen copy that PEFT keeps of the head not at all."""
    parameters = [p for _, p in shipped(model)]
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


def shipped(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The model's parameters by name, without the frozen copy that PEFT keeps of the head."""
    return [(name, p) for name, p in model.named_parameters() if ".original_module." not in name]


def artifact_bytes(model: nn.Module) -> int:
    """Size of what one would ship, as safetensors: the whole model, or under PEFT only what was trained."""
    under_peft = hasattr(model, "peft_config")
    tensors = {
        name: tensor.detach().cpu().contiguous() for name, tensor in shipped(model) if tensor.requires_grad or not under_peft
    }
    return len(save(tensors))


def save_classifier(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """Write a plain classifier and its tokenizer so that `load_classifier` reads them."""
    model.save_pretrained(folder)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)


def tokenizer_identity(tokenizer: Any) -> str:
    """Fingerprint of what the tokenizer does to text."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "tokenizer.json"
        if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
            backend.save(str(path))
            return file_sha256(path)
        tokenizer.save_pretrained(scratch)  # one that is written in Python, as for Japanese
        return fingerprint({file.name: file_sha256(file) for file in sorted(Path(scratch).iterdir())})


def _weight_shapes(weights: Weights) -> dict[str, list[int]]:
    """The checkpoint's tensors by their names there, of what can be read; loading says what cannot."""
    shapes: dict[str, list[int]] = {}
    for path in Path(weights.folder).glob("model*.safetensors"):
        with suppress(OSError, SafetensorError), safe_open(path, framework="pt") as file:
            shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    return shapes


def _reads_last_token(model: nn.Module) -> bool:
    """Whether it is one of transformers' classifiers on decoders, which all call their head so."""
    return isinstance(getattr(model, "score", None), nn.Linear)


def _check_label_order(weights: Weights) -> None:
    """See that a head that is to be used as it is does not call its first label positive."""
    with _explained(f"cannot read the architecture in {weights.folder}"):
        names = dict(AutoConfig.from_pretrained(weights.folder, trust_remote_code=False).id2label or {})
    first, second = (str(names.get(label, "")).lower() for label in (0, 1))
    if first.startswith("pos") and second.startswith("neg"):
        assert isinstance(weights.source, Pretrained)
        raise ModelError(
            f"{weights.source.source}: label 0 is {names[0]!r} and 1 is {names[1]!r}, wanted 0 for negative and 1 for positive; "
            "save a copy whose classifier has its two rows, and the names of its configuration, the other way round"
        )


def _encoder(model: nn.Module) -> Any:
    body = getattr(model, "base_model", model)
    return getattr(body, "encoder", None) or getattr(body, "transformer", None)


def _untrained_config(source: Untrained, labels: dict[str, Any]) -> Any:
    vocabulary = len(SPECIAL_TOKENS) + len(grammar_words())
    if source.architecture == "bert":
        return BertConfig(
            vocab_size=vocabulary,
            hidden_size=source.hidden_size,
            num_hidden_layers=source.layers,
            num_attention_heads=source.attention_heads,
            intermediate_size=4 * source.hidden_size,
            max_position_embeddings=128,
            initializer_range=source.initializer_range,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            **labels,
        )
    return DistilBertConfig(
        vocab_size=vocabulary,
        dim=source.hidden_size,
        n_layers=source.layers,
        n_heads=source.attention_heads,
        hidden_dim=4 * source.hidden_size,
        max_position_embeddings=128,
        initializer_range=source.initializer_range,
        dropout=0.0,
        attention_dropout=0.0,
        **labels,
    )
