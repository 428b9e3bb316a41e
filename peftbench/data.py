"""Texts and labels: where they come from, how they are split, and which of them a KD subset draws."""

import hashlib
import math
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from peftbench.assets import say
from peftbench.errors import PeftbenchError
from peftbench.hub import snapshot
from peftbench.phases import DATA_SEED, DataSource

SST2_TEST_SIZE = 1821
GLUE = "nyu-mll/glue"
LABELLED_TEST = "SetFit/sst2"


class DataError(PeftbenchError, ValueError):
    """The data cannot be used as they are; the message names the file or split and what to do."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Split:
    """
    Labelled sentences in a fixed order.

    Attributes:
        ids: Unique within the split; what logits are aligned by.
        labels: 1 positive, 0 negative; a published test split may carry -1, which must never be scored.
    """

    name: str
    ids: tuple[int, ...]
    sentences: tuple[str, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        """Short: pytest shows it with what fails."""
        return f"<Split {self.name} of {len(self)}>"

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of ids, sentences and labels in their order."""
        digest = hashlib.sha256()
        for row in zip(self.ids, self.labels, self.sentences, strict=True):
            digest.update(repr(row).encode())
        return digest.hexdigest()

    @property
    def majority_accuracy(self) -> float:
        """What always answering the more frequent label scores, as a fraction."""
        return max(Counter(self.labels).values()) / len(self)

    def check_labels(self) -> None:
        """
        Refuse to learn from or score labels that are none.

        Raises:
            DataError: If a label is outside {0, 1}, naming the split, the label and its first row.
        """
        for row, label in enumerate(self.labels):
            if label not in (0, 1):
                raise DataError(
                    f"split {self.name!r} has label {label} (row {row + 1}, {self.labels.count(label)} times); wanted 0 or 1. "
                    "Labels of -1 mark a test split without published answers: give labelled data or leave the file out"
                )

    def take(self, rows: Sequence[int]) -> "Split":
        """The rows at these positions, in that order."""
        return Split(
            name=self.name,
            ids=tuple(self.ids[i] for i in rows),
            sentences=tuple(self.sentences[i] for i in rows),
            labels=tuple(self.labels[i] for i in rows),
        )


@dataclass(frozen=True, kw_only=True)
class Splits:
    """
    Train, dev and test of one data set.

    Attributes:
        source: What they are and where they come from.
        protocol: How labels and splits were made, for the record.
        notes: Counts worth knowing, such as the number of duplicates dropped.
        revisions: The commit of each repository of the Hub that they come from.
    """

    train: Split
    dev: Split
    test: Split
    source: str
    protocol: str
    notes: dict[str, int] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=dict)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the three splits."""
        return hashlib.sha256("".join(s.fingerprint for s in (self.train, self.dev, self.test)).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """The record's ``data``."""
        sizes = {split.name: len(split) for split in (self.train, self.dev, self.test)}
        return {
            "source": self.source,
            "sizes": sizes,
            "fingerprint": self.fingerprint,
            "label_protocol": self.protocol,
            **({"revisions": self.revisions} if self.revisions else {}),
            **self.notes,
        }


def load_splits(
    source: DataSource,
    folder: Path | None,
    reviews: Callable[[], Path],
    notify: Callable[[str], None] = say,
    *,
    revisions: Mapping[str, str] = MappingProxyType({}),
) -> Splits:
    """
    The splits of a scale.

    Args:
        source: The scale's own data.
        folder: GLUE-style TSV files that take its place.
        reviews: Gives the folder of the reviews asset, fetching it if need be.
        notify: Told when the Hub keeps us waiting.
        revisions: Of the Hub's data sets, by name.

    Raises:
        DataError: If a file is missing or malformed.
        HubError: If the Hub's data cannot be had.
    """
    if folder is not None:
        return read_glue_folder(folder)
    match source:
        case "grammar":
            return generate_sentences()
        case "reviews":
            return read_reviews(reviews() / "reviews.tsv")
        case "glue":
            return load_glue(notify, revisions)


def draw(train: Split, size: int | None) -> Split:
    """
    The first rows of a fixed shuffle of the train split, so that a smaller subset is the beginning of a larger one.

    Raises:
        DataError: If the size is not within 1…len(train).
    """
    if size is None:
        size = len(train)
    if not 1 <= size <= len(train):
        raise DataError(
            f"{size} examples cannot be drawn from a train split of {len(train)}; allowed: 1…{len(train)}; give more rows, "
            "or change the phase's subset or kd_subsets"
        )
    rows = list(range(len(train)))
    random.Random(DATA_SEED).shuffle(rows)
    return train.take(rows[:size])


def read_reviews(path: Path, *, dev: int = 900, test: int = 900) -> Splits:
    """
    Movie-review sentences rated by twenty readers each (Hutto & Gilbert 2014, ICWSM); mean beyond ±0.5 gives the label.

    Duplicates, compared without case and spacing, are dropped before splitting; the first one stays.

    Args:
        path: Rows of id, mean rating in -4…4 and sentence, separated by tabs, Latin-1.
        dev: Rows of the dev split.
        test: Rows of the test split; the rest is train.
    """
    seen: set[str] = set()
    ids, sentences, labels, neutral, duplicates = [], [], [], 0, 0
    for number, line in enumerate(path.read_bytes().decode("latin-1").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            key, mean, text = line.rstrip("\r").split("\t")
            rating, row_id = float(mean), int(key)
            if not (math.isfinite(rating) and text.strip()):
                raise ValueError
        except ValueError:
            raise DataError(f"{path}, line {number}: wanted id, rating and sentence, tab-separated; got {line[:60]!r}") from None
        if abs(rating) <= 0.5:
            neutral += 1
        elif _normal(text) in seen:
            duplicates += 1
        else:
            seen.add(_normal(text))
            ids.append(row_id)
            sentences.append(text.strip())
            labels.append(int(rating > 0))
    everything = Split(name="all", ids=tuple(ids), sentences=tuple(sentences), labels=tuple(labels))
    splits = stratify(everything, {"dev": dev, "test": test}, rest="train")
    return Splits(
        source="movie-review snippets of vaderSentiment 3.3.2 (Hutto & Gilbert 2014)",
        protocol=f"label = sign of the mean of 20 ratings beyond ±0.5; duplicates dropped; stratified, seed {DATA_SEED}",
        notes={"neutral_dropped": neutral, "duplicates_dropped": duplicates},
        train=splits["train"],
        dev=splits["dev"],
        test=splits["test"],
    )


def stratify(everything: Split, sizes: dict[str, int], *, rest: str) -> dict[str, Split]:
    """Disjoint splits of the given sizes with the class shares of the whole, at `DATA_SEED`; what is left becomes ``rest``."""
    if sum(sizes.values()) > len(everything):
        raise DataError(f"splits of {sizes} need more than the {len(everything)} rows there are")
    shuffler = random.Random(DATA_SEED)
    by_label = {label: [i for i, own in enumerate(everything.labels) if own == label] for label in sorted(set(everything.labels))}
    for rows in by_label.values():
        shuffler.shuffle(rows)
    splits = {}
    for name, size in sizes.items():
        taken: list[int] = []
        left = sum(len(rows) for rows in by_label.values())
        for rows in by_label.values():
            # Shares of what is left, rounded so that the last class takes exactly what is missing.
            share = round((size - len(taken)) * len(rows) / left) if left else 0
            left -= len(rows)
            taken += rows[:share]
            del rows[:share]
        splits[name] = sorted(taken)
    splits[rest] = sorted(row for rows in by_label.values() for row in rows)
    return {name: replace(everything.take(rows), name=name) for name, rows in splits.items()}


def read_glue_folder(folder: Path) -> Splits:
    """
    ``train.tsv``, ``dev.tsv`` and, if it has labels, ``test.tsv`` in GLUE's format for SST-2.

    A test file as GLUE publishes it, ``index`` and ``sentence``, has no labels.

    Without a labelled one as many rows as SST-2's test has, but at most a tenth, are held out of train.

    Sentences of dev and test that also stand in train are counted in the notes.

    Raises:
        DataError: If a file is missing or malformed, naming file, line and what was wanted.
    """
    train, dev = (_read_tsv(folder / f"{name}.tsv", name) for name in ("train", "dev"))
    test_path = folder / "test.tsv"
    if test_path.exists() and _tsv_header(test_path) != ["index", "sentence"]:
        test, protocol = _read_tsv(test_path, "test"), "labels of the files"
    else:
        size = min(SST2_TEST_SIZE, len(train) // 10)
        if size < 2:
            raise DataError(f"{folder / 'train.tsv'} has {len(train)} rows, too few to hold a test split out of it; add test.tsv")
        held_out = stratify(train, {"test": size}, rest="train")
        train, test = held_out["train"], held_out["test"]
        if len(set(test.labels)) < 2:
            raise DataError(f"{folder / 'train.tsv'} has too few rows of one label to hold a test split out of it; add test.tsv")
        protocol = f"labels of the files; test held out of train, stratified, seed {DATA_SEED}"
    notes = _count_in_train(train, dev, test)
    return Splits(train=train, dev=dev, test=test, source=f"GLUE-style folder {folder.name}", protocol=protocol, notes=notes)


def load_glue(notify: Callable[[str], None] = say, revisions: Mapping[str, str] = MappingProxyType({})) -> Splits:
    """
    SST-2 from the Hub: GLUE's train and validation, and the labelled test of the Stanford split.

    GLUE's own test labels are all -1; the labelled rows are joined to its sentences by their letters and digits, so that ids
    are GLUE's.

    Args:
        notify: Told when the Hub keeps us waiting.
        revisions: Branch, tag or commit of either repository, by name; the main branch of what is not named.

    Raises:
        HubError: If a repository cannot be had.
        DataError: If one lacks a file or a column, a sentence finds no partner, naming the first, or a revision is of another one.
    """
    if unknown := sorted(set(revisions) - {GLUE, LABELLED_TEST}):
        raise DataError(f"data_revisions must name {GLUE} or {LABELLED_TEST}, got {unknown[0]!r}")
    glue = snapshot(GLUE, kind="dataset", files=["sst2/*"], revision=revisions.get(GLUE), notify=notify)
    stanford = snapshot(LABELLED_TEST, kind="dataset", files=["test*"], revision=revisions.get(LABELLED_TEST), notify=notify)
    train, dev, bare = (
        _split_of_table(glue.folder / "sst2", stem, name)
        for name, stem in (("train", "train"), ("dev", "validation"), ("test", "test"))
    )
    rows = _read_table(stanford.folder, "test", ("text", "label"))
    test = _label(bare, list(zip(rows["text"], rows["label"], strict=True)))
    return Splits(
        source=f"SST-2: {GLUE}, test labels of {LABELLED_TEST}",
        protocol="GLUE train and validation; test joined by text to the labelled Stanford split",
        notes=_count_in_train(train, dev, test),
        revisions={GLUE: glue.commit, LABELLED_TEST: stanford.commit},
        train=train,
        dev=dev,
        test=test,
    )


def _label(bare: Split, labelled: Sequence[tuple[str, int]]) -> Split:
    known: dict[str, set[int]] = {}
    for text, label in labelled:
        for spelling in _spellings(text):
            known.setdefault(spelling, set()).add(label)
    own = {spelling for sentence in bare.sentences for spelling in _spellings(sentence)}
    for text, _ in labelled:
        if own.isdisjoint(_spellings(text)):
            raise DataError(f"{LABELLED_TEST}: test sentence {text!r} is not among the {len(bare)} of {GLUE}")
    labels: list[int] = []
    for sentence in bare.sentences:
        found: set[int] = set().union(*(known.get(spelling, ()) for spelling in _spellings(sentence)))
        if not found:
            raise DataError(f"{GLUE}: test sentence {sentence!r} is not among the {len(labelled)} of {LABELLED_TEST}")
        if len(found) > 1:
            raise DataError(f"{LABELLED_TEST}: test sentence {sentence!r} occurs with both labels")
        labels += found
    return replace(bare, labels=tuple(labels))


def _split_of_table(folder: Path, stem: str, name: str) -> Split:
    rows = _read_table(folder, stem, ("idx", "sentence", "label"))
    return Split(name=name, ids=tuple(rows["idx"]), sentences=tuple(rows["sentence"]), labels=tuple(rows["label"]))


def _read_table(folder: Path, stem: str, columns: Sequence[str]) -> Any:
    """The columns of a split as it lies in a data set's repository: Parquet, or JSON lines."""
    import pyarrow as pa
    from pyarrow import json, parquet

    files = sorted(file for file in folder.glob(f"{stem}*") if file.suffix in (".parquet", ".jsonl", ".json"))
    if not files:
        raise DataError(
            f"{folder} has no {stem}*.parquet and no {stem}*.jsonl; was the data set moved on the Hub, "
            "or is its copy in the cache incomplete? Then run once online"
        )
    shards = [shard for file in files if (shard := re.search(r"-\d+-of-(\d+)\b", file.name))]
    if shards and len(shards) < int(shards[0][1]):
        raise DataError(
            f"{folder} has {len(shards)} of the {int(shards[0][1])} files of {stem}; its copy is incomplete, run once online"
        )
    try:
        table = pa.concat_tables(parquet.read_table(f) if f.suffix == ".parquet" else json.read_json(f) for f in files)
        rows = {column: table[column].to_pylist() for column in columns if column in table.column_names}
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{files[0]} cannot be read: {(str(error).strip() or type(error).__name__).splitlines()[0][:200]}"
        ) from error
    if missing := [column for column in columns if column not in table.column_names]:
        raise DataError(f"{files[0]} has columns {table.column_names} and lacks {missing}")
    return rows


def _count_in_train(train: Split, *others: Split) -> dict[str, int]:
    in_train = {_normal(sentence) for sentence in train.sentences}
    return {f"{s.name}_sentences_in_train": sum(_normal(text) in in_train for text in s.sentences) for s in others}


def _spellings(text: str) -> tuple[str, str]:
    """
    What is left of a sentence under any tokenization, case and bracket, accents folded, and, for text whose accents were spoilt,
    without any letter that has one.
    """
    plain = re.sub(r"-[lr][rsc]b-", "", text.casefold())  # the Penn Treebank's brackets
    folded = unicodedata.normalize("NFKD", plain)
    return ("".join(c for c in folded if c.isalnum()), "".join(c for c in plain if c.isalnum() and c.isascii()))


_POSITIVE = ["wonderful", "brilliant", "moving", "funny", "delightful", "superb"]
_NEGATIVE = ["dull", "awful", "boring", "clumsy", "dreadful", "stale"]
_SUBJECTS = ["plot", "acting", "music", "dialogue", "ending", "camera", "story", "cast"]
_INTENSIFIERS = ("", "very ", "truly ")


def generate_sentences(*, train: int = 2400, dev: int = 400, test: int = 400) -> Splits:
    """
    Sentences of a small grammar with sentiment, negation and contrast: no clause alone gives the label by its adjective.

    A clause is "the plot is (not) very dull"; negation turns its sentiment round, and in "…, but …" the last clause decides.
    Sentences are distinct over all splits.
    """
    rng = random.Random(DATA_SEED)
    rows: dict[str, int] = {}
    while len(rows) < train + dev + test:
        text, label = _clause(rng)
        if rng.random() < 0.5:
            first = _clause(rng)
            while first[1] == label:
                first = _clause(rng)
            text = f"{first[0]} , but {text}"
        rows.setdefault(text, label)
    everything = Split(name="all", ids=tuple(range(len(rows))), sentences=tuple(rows), labels=tuple(rows.values()))
    splits = stratify(everything, {"dev": dev, "test": test}, rest="train")
    return Splits(
        source="generated sentences",
        protocol=f"label of the last clause, negation included; stratified, seed {DATA_SEED}",
        train=splits["train"],
        dev=splits["dev"],
        test=splits["test"],
    )


def grammar_words() -> list[str]:
    """Every word that `generate_sentences` uses, sorted."""
    intensifiers = (word.strip() for word in _INTENSIFIERS)
    return sorted({*_POSITIVE, *_NEGATIVE, *_SUBJECTS, *intensifiers, "the", "is", "not", "but", ","} - {""})


def _clause(rng: random.Random) -> tuple[str, int]:
    label, negated = rng.randrange(2), rng.random() < 0.3
    adjective = rng.choice(_POSITIVE if label != negated else _NEGATIVE)
    return f"the {rng.choice(_SUBJECTS)} is {'not ' * negated}{rng.choice(_INTENSIFIERS)}{adjective}", label


def _normal(text: str) -> str:
    return " ".join(text.casefold().split())


def _tsv_header(path: Path) -> list[str]:
    return _lines(path)[0].split("\t")


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise DataError(f"{path} is missing; wanted train.tsv and dev.tsv with the header sentence<TAB>label") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}; save it as UTF-8") from None
    return re.split(r"\r?\n", text.removeprefix("\ufeff"))


def _read_tsv(path: Path, name: str) -> Split:
    lines = _lines(path)
    if lines[0].split("\t") != ["sentence", "label"]:
        raise DataError(f"{path}, line 1: wanted the header sentence<TAB>label, got {lines[0][:60]!r}")
    while not lines[-1]:
        lines.pop()
    return _parse_rows(path, name, lines[1:])


def _parse_rows(path: Path, name: str, lines: Iterable[str]) -> Split:
    sentences, labels = [], []
    for number, line in enumerate(lines, start=2):
        sentence, tab, label = line.rpartition("\t")
        if not tab or "\t" in sentence:
            raise DataError(f"{path}, line {number}: wanted a sentence, a tab and a label, got {line[:60]!r}")
        if not sentence.strip():
            raise DataError(f"{path}, line {number}: the sentence is empty, got {line[:60]!r}; fill it in or leave the line out")
        if label.strip() not in ("0", "1"):
            unpublished = name == "test" and label.strip() == "-1"
            raise DataError(
                f"{path}, line {number}: split {name!r} has label {label.strip()[:20]!r}; wanted 0 or 1, 1 being positive"
                + ("; a test split without published answers is no test: leave the file out" if unpublished else "")
            )
        sentences.append(sentence.strip())
        labels.append(int(label))
    if len(set(labels)) < 2:
        raise DataError(f"{path} must have rows of both labels, got {len(labels)} rows with labels {sorted(set(labels))}")
    return Split(name=name, ids=tuple(range(len(labels))), sentences=tuple(sentences), labels=tuple(labels))
