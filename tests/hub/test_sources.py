"""What the thesis scale loads from the Hub: SST-2 with labels joined by text, and checkpoints that are what they should be."""

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load, save

from peftbench.data import GLUE, LABELLED_TEST, DataError, load_glue
from peftbench.hub import HubError
from peftbench.models import ModelError, load_classifier, load_tokenizer, locate, save_classifier
from peftbench.phases import Pretrained, Untrained

TRAIN = [("a charming film ", 1), ("dull . ", 0), ("hide new secretions ", 0), ("it works", 1)]
DEV = [("dull .", 0), ("nearly perfect", 1)]
TEST = ["The Acting, not  the plot", "a clich\u00e9 , twice", "It works", "( hill ) has learned and/or", "na\u00efve"]
LABELLED = [
    ("it works", 1),
    ("the acting , not the plot", 1),
    ("a cliche , twice", 0),
    ("-lrb- hill -rrb- has learned and\\/or", 0),
    ("na\u00c3\u00afve", 1),
]


def parquet(rows):
    sentences, labels = zip(*rows, strict=True)
    table = pa.table({"sentence": sentences, "label": labels, "idx": list(range(len(rows)))})
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def jsonl(rows):
    return "".join(json.dumps({"text": text, "label": label, "label_text": "x"}) + "\n" for text, label in rows).encode()


@pytest.fixture
def sst2(hub):
    """The two repositories, small."""
    shards = {"train": TRAIN, "validation": DEV, "test": [(text, -1) for text in TEST]}
    files = {f"sst2/{name}-00000-of-00001.parquet": parquet(rows) for name, rows in shards.items()}
    hub.add(f"datasets/{GLUE}", {**files, "cola/train-00000-of-00001.parquet": b"another task", "README.md": b"---\n---"})
    hub.add(f"datasets/{LABELLED_TEST}", {"test.jsonl": jsonl(LABELLED), "train.jsonl": b"not needed"})
    return hub


def test_labels_are_joined_by_text(sst2):
    """Order and ids are GLUE's; case, spacing, punctuation and accents do not matter; commits and overlaps are in the record."""
    splits = load_glue()
    assert ((0, 1, 2, 3, 4), (1, 0, 1, 0, 1)) == (splits.test.ids, splits.test.labels)
    assert tuple(TEST) == splits.test.sentences
    assert [label for _, label in TRAIN] == list(splits.train.labels)
    assert [text for text, _ in DEV] == list(splits.dev.sentences)
    described = splits.describe()
    assert {"train": 4, "dev": 2, "test": 5} == described["sizes"]
    assert (1, 1) == (described["dev_sentences_in_train"], described["test_sentences_in_train"])
    assert {name: sst2.repos[f"datasets/{name}"].commit for name in (GLUE, LABELLED_TEST)} == described["revisions"]
    assert not any("cola" in request or "train.jsonl" in request for request in sst2.requests)


@pytest.mark.parametrize(
    ("labelled", "message"),
    [
        (LABELLED[1:], "test sentence 'It works' is not among the 4"),
        ([*LABELLED, ("one too many", 1)], "test sentence 'one too many' is not among the 5"),
        ([*LABELLED, ("It works .", 0)], "with both labels"),
    ],
)
def test_a_row_without_its_partner_is_an_error(sst2, labelled, message):
    """In either direction, or with two labels: the first one is shown."""
    sst2.repos[f"datasets/{LABELLED_TEST}"].files["test.jsonl"] = jsonl(labelled)
    with pytest.raises(DataError, match=message):
        load_glue()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"test.jsonl": b'{"text": "it works"}\n'}, "and lacks .'label'."),
        ({"test.jsonl": b"\x00\x01 no JSON"}, "cannot be read"),
        ({"test.csv": b"text,label\n"}, "has no test.*parquet"),
        ({"test-00001-of-00002.jsonl": jsonl(LABELLED)}, "has 1 of the 2 files of test; its copy is incomplete"),
    ],
)
def test_a_data_set_of_another_shape_is_an_error(sst2, files, message):
    """It names the file and what is missing."""
    sst2.repos[f"datasets/{LABELLED_TEST}"].files = files
    with pytest.raises(DataError, match=message):
        load_glue()


def test_revision_of_a_data_set(sst2):
    """Of the one that is named; the other's is the main branch."""
    sst2.repos[f"datasets/{LABELLED_TEST}"].branches = ("main", "v2")
    assert load_glue(revisions={LABELLED_TEST: "v2"}).test.labels == load_glue().test.labels
    assert any(f"{LABELLED_TEST}/revision/v2" in request for request in sst2.requests)
    with pytest.raises(HubError, match=rf"{GLUE} .*no revision 'v3'"):
        load_glue(revisions={GLUE: "v3"})
    with pytest.raises(DataError, match=r"data_revisions must name .*, got 'sst2'"):
        load_glue(revisions={"sst2": "main"})


def test_a_data_set_that_is_gone(hub):
    """The way out is named: files."""
    with pytest.raises(HubError, match=r"nyu-mll/glue .*--peft-data"):
        load_glue()


@pytest.fixture
def checkpoint(tmp_path):
    """The files of a small tuned classifier."""
    weights = locate(Untrained(architecture="bert", layers=2, hidden_size=8, attention_heads=2), fetch=None)
    torch.manual_seed(0)
    save_classifier(load_classifier(weights), load_tokenizer(weights), tmp_path / "made")
    return {path.name: path.read_bytes() for path in (tmp_path / "made").iterdir()}


def test_checkpoint_from_the_hub(hub, checkpoint):
    """Weights, tokenizer and commit; the same files in a local folder have the same identity."""
    repo = hub.add("models/owner/bert", {**checkpoint, "pytorch_model.bin": b"never", "onnx/model.onnx": b"never"})
    weights = locate(Pretrained(source="owner/bert"), fetch=None)
    assert repo.commit == weights.commit
    model = load_classifier(weights, tuned=True)
    assert 2 == model.config.num_hidden_layers
    assert [2, 3] == load_tokenizer(weights)("")["input_ids"]
    local = locate(Pretrained(source=weights.folder), fetch=None)
    assert (weights.identity, None) == (local.identity, local.commit)
    assert not any(name in request for request in hub.requests for name in ("pytorch_model", "onnx"))


def test_an_older_tokenizer_is_fetched_where_there_is_no_newer(hub, checkpoint, monkeypatch):
    """Its files are asked for only then: neither what lies beside another, nor what has such an ending, is worth a download."""
    older = {"vocab.json": b'{"<s>": 0, "</s>": 1}', "merges.txt": b"#version: 0.2\n"}
    others = {"runs/word2vec.model": b"never", "word2vec.model": b"never"}
    hub.add("models/owner/newer", {**checkpoint, **older, **others})
    hub.add("models/owner/older", {**{k: v for k, v in checkpoint.items() if k != "tokenizer.json"}, **older, **others})
    locate(Pretrained(source="owner/newer"), fetch=None)
    assert not any(name in request for request in hub.requests for name in ("vocab.json", "merges.txt", "word2vec"))
    folder = Path(locate(Pretrained(source="owner/older"), fetch=None).folder)
    assert older == {name: (folder / name).read_bytes() for name in older}
    assert not any("word2vec" in request for request in hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert str(folder) == locate(Pretrained(source="owner/older"), fetch=None).folder


def test_revision_of_a_checkpoint(hub, checkpoint):
    """A branch that the source names is the one that is loaded."""
    hub.add("models/owner/bert", checkpoint).branches = ("main", "refs%2Fpr%2F1", "refs/pr/1")
    assert locate(Pretrained(source="owner/bert", revision="refs/pr/1"), fetch=None).commit
    with pytest.raises(HubError, match="no revision 'v2'"):
        locate(Pretrained(source="owner/bert", revision="v2"), fetch=None)


def test_pickled_checkpoint_is_refused_unread(hub, checkpoint):
    """It is not even fetched, and the way to a safe one is named."""
    weights = checkpoint.pop("model.safetensors")
    hub.add("models/owner/pickled", {**checkpoint, "pytorch_model.bin": weights})
    with pytest.raises(ModelError, match=r"owner/pickled has no model.safetensors.*refs/pr/1"):
        locate(Pretrained(source="owner/pickled"), fetch=None)
    assert not any("pytorch_model" in request for request in hub.requests)


def test_half_precision_checkpoint_is_loaded_in_full(hub, checkpoint):
    """Master weights are fp32, whatever a repository stores."""
    halves = {name: tensor.half() for name, tensor in load(checkpoint["model.safetensors"]).items()}
    config = json.loads(checkpoint["config.json"]) | {"dtype": "float16"}
    hub.add("models/owner/half", {**checkpoint, "config.json": json.dumps(config).encode(), "model.safetensors": save(halves)})
    model = load_classifier(locate(Pretrained(source="owner/half"), fetch=None), tuned=True)
    assert {torch.float32} == {parameter.dtype for parameter in model.parameters()}


def test_checkpoint_with_three_labels(hub, checkpoint):
    """The message has both numbers."""
    head = {"classifier.weight": torch.zeros(3, 8), "classifier.bias": torch.zeros(3)}
    hub.add("models/owner/nli", {**checkpoint, "model.safetensors": save(head)})
    with pytest.raises(ModelError, match="owner/nli classifies into 3 labels, wanted 2"):
        load_classifier(locate(Pretrained(source="owner/nli"), fetch=None))
