"""Data: sources, splits and draws, and what is said about files that are not as they should be."""

import random
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from peftbench.data import (
    SST2_TEST_SIZE,
    DataError,
    Split,
    Splits,
    draw,
    generate_sentences,
    grammar_words,
    load_splits,
    read_glue_folder,
    read_reviews,
    stratify,
)

POSITIVE = {"wonderful", "brilliant", "moving", "funny", "delightful", "superb"}
NEGATIVE = {"dull", "awful", "boring", "clumsy", "dreadful", "stale"}
LABELS = st.lists(st.integers(0, 1), min_size=1, max_size=80)


def split_of(labels, name="train"):
    return Split(
        name=name,
        ids=tuple(range(100, 100 + len(labels))),
        sentences=tuple(f"sentence {i}" for i in range(len(labels))),
        labels=tuple(labels),
    )


def rows(count, *, what="row"):
    """GLUE lines with labels 0, 1, 0, …"""
    return [f"{what} {i}\t{i % 2}" for i in range(count)]


def write_tsv(path, lines, *, header="sentence\tlabel", end="\n"):
    path.write_bytes(end.join([header, *lines, ""]).encode())


def test_a_split_is_shown_short():
    """By its name and size, not with every sentence."""
    assert "<Split train of 3>" == repr(split_of([0, 1, 1]))


@pytest.fixture
def folder(tmp_path):
    """A GLUE-style folder of 40 training and 6 dev rows, without a test file."""
    write_tsv(tmp_path / "train.tsv", rows(40))
    write_tsv(tmp_path / "dev.tsv", rows(6, what="dev"))
    return tmp_path


@pytest.fixture
def reviews(tmp_path):
    def write(*lines, **sizes):
        path = tmp_path / "reviews.tsv"
        path.write_bytes("\n".join(lines).encode("latin-1"))
        return read_reviews(path, **sizes)

    return write


@pytest.fixture(scope="module")
def generated():
    return generate_sentences()


def everything_of(splits):
    return {
        row
        for split in (splits.train, splits.dev, splits.test)
        for row in zip(split.ids, split.sentences, split.labels, strict=True)
    }


# Reviews


def test_the_sign_of_a_clear_rating_is_the_label(reviews):
    """Beyond ±0.5 it is 1 or 0; at ±0.5 and between, the row is dropped and counted."""
    lines = ["1\t0.51\tgood", "2\t-0.51\tbad", "3\t0.5\tso", "4\t-0.5\tso so", "5\t0\tnothing", "6\t4\tbest", "7\t-4.0\tworst"]
    splits = reviews(*lines, dev=0, test=0)
    assert {(1, "good", 1), (2, "bad", 0), (6, "best", 1), (7, "worst", 0)} == everything_of(splits)
    assert {"neutral_dropped": 3, "duplicates_dropped": 0} == splits.notes


def test_duplicates_are_dropped_whatever_their_case_and_spacing(reviews):
    """The first one stays, also where a later one is labelled differently."""
    splits = reviews("1\t2\tA fine film .", "2\t2\ta  FINE film .", "3\t-2\t A fine film . ", "4\t-2\tdull", dev=0, test=0)
    assert {(1, "A fine film .", 1), (4, "dull", 0)} == everything_of(splits)
    assert 2 == splits.notes["duplicates_dropped"]


def test_reviews_are_read_as_latin_1(reviews):
    """Byte 0xe9 is é; a byte that other encodings take for a line end is none."""
    splits = reviews("1\t2\ttouch\xe9", "2\t-2\ttwo\x85parts", dev=0, test=0)
    assert {(1, "touché", 1), (2, "two\x85parts", 0)} == everything_of(splits)


def test_line_ends_of_windows_and_empty_lines_are_passed_over(reviews):
    """Neither is part of a sentence."""
    splits = reviews("1\t2\tgood\r", "", "2\t-2\tbad\r", "  ", dev=0, test=0)
    assert {(1, "good", 1), (2, "bad", 0)} == everything_of(splits)


@pytest.mark.parametrize(
    "line",
    ["2\tgood", "2\t1.0\tgood\tmore", "two\t1.0\tgood", "2\tmuch\tgood", "2 1.0 good", "2\tnan\tgood", "2\tinf\tgood", "2\t1.0\t "],
)
def test_a_bad_line_is_named(reviews, tmp_path, line):
    """The error says file, line, what was wanted and what was got."""
    with pytest.raises(DataError) as caught:
        reviews("1\t2\tfine", line, dev=0, test=0)
    message = str(caught.value)
    wanted = (f"{tmp_path / 'reviews.tsv'}, line 2", "id, rating and sentence", repr(line))
    assert [] == [part for part in wanted if part not in message], message


def test_reviews_are_split_into_the_sizes_asked_for(reviews):
    """Disjoint, named, and together everything."""
    lines = [f"{i}\t{2 if i % 4 else -2}\tsentence {i}" for i in range(100)]
    splits = reviews(*lines, dev=20, test=12)
    assert [("train", 68), ("dev", 20), ("test", 12)] == [(s.name, len(s)) for s in (splits.train, splits.dev, splits.test)]
    assert 100 == len(everything_of(splits))
    assert (15, 9) == (sum(splits.dev.labels), sum(splits.test.labels))


# Stratifying


@given(labels=LABELS, data=st.data())
@settings(deadline=None, max_examples=80)
def test_stratified_splits_are_disjoint_exact_and_everything(labels, data):
    """For any labels and any sizes that fit: exact sizes, no row twice, none lost."""
    dev = data.draw(st.integers(0, len(labels)))
    test = data.draw(st.integers(0, len(labels) - dev))
    whole = split_of(labels)
    parts = stratify(whole, {"dev": dev, "test": test}, rest="train")
    assert {"dev": dev, "test": test, "train": len(labels) - dev - test} == {name: len(part) for name, part in parts.items()}
    assert sorted(whole.ids) == sorted(i for part in parts.values() for i in part.ids)
    given = dict(zip(whole.ids, zip(whole.sentences, whole.labels, strict=True), strict=True))
    for part in parts.values():
        assert [given[i] for i in part.ids] == list(zip(part.sentences, part.labels, strict=True))


@given(labels=st.lists(st.integers(0, 1), min_size=2, max_size=200), data=st.data())
@settings(deadline=None, max_examples=60)
def test_stratified_splits_have_the_shares_of_the_whole(labels, data):
    """The positives of the first split are their share of it, to within one row."""
    size = data.draw(st.integers(1, len(labels)))
    part = stratify(split_of(labels), {"dev": size}, rest="train")["dev"]
    assert abs(sum(part.labels) - size * sum(labels) / len(labels)) < 1


def test_stratified_shares_by_hand():
    """30 of 40 rows are positive: a dev split of 8 has 6 of them, a test split of 12 has 9, and 15 of 20 are left."""
    parts = stratify(split_of([1] * 30 + [0] * 10), {"dev": 8, "test": 12}, rest="train")
    assert {"dev": 6, "test": 9, "train": 15} == {name: sum(part.labels) for name, part in parts.items()}


def test_stratifying_draws_rather_than_cuts():
    """A split is not the beginning of the file, and twice the same."""
    whole = split_of([0, 1] * 50)
    first, second = (stratify(whole, {"dev": 20}, rest="train")["dev"] for _ in range(2))
    assert first == second
    assert set(range(100, 120)) != set(first.ids)


def test_sizes_that_do_not_fit_are_refused():
    """Ten rows hold no dev split of eleven, and none that is shorter than asked for is made in silence."""
    with pytest.raises(ValueError):
        stratify(split_of([0, 1] * 5), {"dev": 11}, rest="train")


# Drawing


@given(labels=LABELS, data=st.data())
@settings(deadline=None, max_examples=50)
def test_a_smaller_subset_begins_a_larger_one(labels, data):
    """Subsets are nested, without a row twice, in an order of their own."""
    train = split_of(labels)
    large = data.draw(st.integers(1, len(labels)))
    small = data.draw(st.integers(1, large))
    drawn = draw(train, large)
    assert draw(train, small).ids == drawn.ids[:small]
    assert (large, large) == (len(drawn), len(set(drawn.ids)))
    assert set(drawn.ids) <= set(train.ids)


def test_a_draw_is_the_same_every_time_whatever_the_global_seed():
    """Runs and processes agree on it."""
    train = split_of([0, 1] * 20)
    before = draw(train, 10)
    random.seed(7)
    state = random.getstate()
    assert before == draw(train, 10)
    assert state == random.getstate()


def test_a_draw_of_none_is_a_shuffle_of_everything():
    """Each row once, not in the file's order."""
    train = split_of([0, 1] * 20)
    drawn = draw(train, None)
    assert sorted(train.ids) == sorted(drawn.ids)
    assert train.ids != drawn.ids


def test_a_draw_keeps_each_rows_label_and_sentence():
    """Ids, sentences and labels move together."""
    train = split_of([0, 0, 1, 1, 0])
    given = dict(zip(train.ids, zip(train.sentences, train.labels, strict=True), strict=True))
    drawn = draw(train, 5)
    assert [given[i] for i in drawn.ids] == list(zip(drawn.sentences, drawn.labels, strict=True))


@pytest.mark.parametrize("size", [0, -1, 11])
def test_a_draw_that_does_not_fit_is_refused(size):
    """The error names the size and the range."""
    with pytest.raises(DataError, match=rf"^{size} examples cannot be drawn from a train split of 10; allowed: 1…10; "):
        draw(split_of([0, 1] * 5), size)


# GLUE-style folders


def test_a_folder_is_read_with_its_test_file(folder):
    """Sentences, labels and row numbers as they stand; the note says that nothing was held out."""
    write_tsv(folder / "test.tsv", ["so good\t1", "so bad\t0"])
    splits = read_glue_folder(folder)
    assert Split(name="test", ids=(0, 1), sentences=("so good", "so bad"), labels=(1, 0)) == splits.test
    assert (40, 6) == (len(splits.train), len(splits.dev))
    assert {"dev_sentences_in_train": 0, "test_sentences_in_train": 0} == splits.notes
    assert "held out" not in splits.protocol


def test_without_a_test_file_a_tenth_of_train_is_held_out(folder):
    """Stratified, disjoint from what is left, and told in the protocol."""
    splits = read_glue_folder(folder)
    assert (36, 4, 2) == (len(splits.train), len(splits.test), sum(splits.test.labels))
    assert set(range(40)) == {*splits.train.ids, *splits.test.ids}
    assert "held out of train" in splits.protocol


def test_no_more_than_the_size_of_sst_2s_test_is_held_out(folder):
    """1,821 of 20,000 rows, not 2,000."""
    write_tsv(folder / "train.tsv", rows(20_000))
    assert (1821, 1821) == (SST2_TEST_SIZE, len(read_glue_folder(folder).test))


def test_a_test_file_without_labels_is_left_out(folder):
    """GLUE publishes one; test is held out of train instead."""
    write_tsv(folder / "test.tsv", ["0\tunlabelled", "1\tsentences"], header="index\tsentence")
    splits = read_glue_folder(folder)
    assert 4 == len(splits.test)
    assert "unlabelled" not in splits.test.sentences


@pytest.mark.parametrize("name", ["train", "dev", "test"])
@pytest.mark.parametrize("label", ["-1", "2", "0.5", "positive", ""])
def test_a_label_that_is_none_is_refused(folder, name, label):
    """The error names file, line, split and label; -1, GLUE's mark for a hidden answer, is never scored."""
    write_tsv(folder / f"{name}.tsv", ["good\t1", "bad\t0", f"odd\t{label}", *rows(40)])
    with pytest.raises(DataError) as caught:
        read_glue_folder(folder)
    message = str(caught.value)
    wanted = (f"{folder / name}.tsv, line 4", f"split {name!r}", repr(label), "wanted 0 or 1")
    assert [] == [part for part in wanted if part not in message], message


@pytest.mark.parametrize("name", ["train", "dev"])
def test_a_missing_file_is_named(folder, name):
    """With what a folder must have."""
    (folder / f"{name}.tsv").unlink()
    with pytest.raises(DataError, match=rf"{re.escape(str(folder))}/{name}\.tsv is missing; wanted train\.tsv and dev\.tsv"):
        read_glue_folder(folder)


@pytest.mark.parametrize("header", ["label\tsentence", "sentence,label", "sentence\tlabel\tid", "good\t1", ""])
def test_a_wrong_header_is_refused(folder, header):
    """The error says what it wanted and got."""
    write_tsv(folder / "dev.tsv", rows(4), header=header)
    with pytest.raises(DataError) as caught:
        read_glue_folder(folder)
    message = str(caught.value)
    wanted = (f"{folder / 'dev.tsv'}, line 1", "sentence<TAB>label", repr(header))
    assert [] == [part for part in wanted if part not in message], message


@pytest.mark.parametrize("line", ["\t1", " \t1"])
def test_an_empty_sentence_is_named(folder, line):
    """As such, with what to do about it."""
    write_tsv(folder / "train.tsv", ["good\t1", line, *rows(40)])
    with pytest.raises(DataError, match=r"train.tsv, line 3: the sentence is empty, got .*; fill it in or leave the line out$"):
        read_glue_folder(folder)


@pytest.mark.parametrize("line", ["", " ", "no tab", "two\ttabs\t1"])
def test_a_bad_row_is_named(folder, line):
    """An empty one between others included."""
    write_tsv(folder / "train.tsv", ["good\t1", line, *rows(40)])
    with pytest.raises(DataError) as caught:
        read_glue_folder(folder)
    assert f"{folder / 'train.tsv'}, line 3: wanted a sentence, a tab and a label, got {line!r}" == str(caught.value)


def test_empty_lines_at_the_end_are_passed_over(folder):
    """Editors leave them."""
    write_tsv(folder / "dev.tsv", [*rows(6, what="dev"), "", ""])
    assert 6 == len(read_glue_folder(folder).dev)


@pytest.mark.parametrize("lines", [[], ["good\t1"], ["bad\t0", "worse\t0"]])
def test_a_file_of_one_label_is_refused(folder, lines):
    """Nothing can be learned from it, nor can F1 be told."""
    write_tsv(folder / "dev.tsv", lines)
    with pytest.raises(DataError, match=rf"dev\.tsv must have rows of both labels, got {len(lines)} rows"):
        read_glue_folder(folder)


def test_a_byte_that_is_not_utf_8_is_named(folder):
    """Latin-1 é: the header line is bytes 0 to 14, caf is 15 to 17, so é is byte 18."""
    (folder / "train.tsv").write_bytes(b"sentence\tlabel\ncaf\xe9\t1\n")
    with pytest.raises(DataError) as caught:
        read_glue_folder(folder)
    assert f"{folder / 'train.tsv'} is not UTF-8: byte 18 is 0xe9; save it as UTF-8" == str(caught.value)


def test_a_test_split_of_one_label_is_not_held_out(folder):
    """Four positives in a thousand leave none for a tenth of them."""
    write_tsv(folder / "train.tsv", [f"row {i}\t{int(i < 4)}" for i in range(1000)])
    with pytest.raises(DataError, match=r"train\.tsv has too few rows of one label to hold a test split out of it; add test\.tsv"):
        read_glue_folder(folder)


def test_a_train_file_too_short_to_hold_out_of_is_refused(folder):
    """19 rows give one for test; the error says to add a test file."""
    write_tsv(folder / "train.tsv", rows(19))
    with pytest.raises(DataError, match=r"train\.tsv has 19 rows, too few .* add test\.tsv"):
        read_glue_folder(folder)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "marked"])
def test_windows_files_are_the_same_data(folder, end, mark):
    """Line ends and a byte-order mark change nothing, the fingerprint included."""
    before = read_glue_folder(folder).fingerprint
    for name, lines in (("train", rows(40)), ("dev", rows(6, what="dev"))):
        write_tsv(folder / f"{name}.tsv", lines, end=end)
        path = folder / f"{name}.tsv"
        path.write_bytes(mark + path.read_bytes())
    assert before == read_glue_folder(folder).fingerprint


def test_a_line_ends_only_at_a_line_break(folder):
    """Characters that Unicode counts as line ends may stand in a sentence."""
    write_tsv(folder / "dev.tsv", ["one\u2028two\x0bthree\x85four\t1", "bad\t0"])
    assert ("one\u2028two\x0bthree\x85four", "bad") == read_glue_folder(folder).dev.sentences


@pytest.mark.parametrize(("name", "sentence"), [("dev", "row 3"), ("dev", " Row  3 "), ("test", "ROW 3")])
def test_sentences_that_stand_in_train_are_counted(folder, name, sentence):
    """Whatever their case and spacing; the count goes into the record."""
    write_tsv(folder / "test.tsv", rows(4, what="test"))
    write_tsv(folder / f"{name}.tsv", ["good\t1", f"{sentence}\t0"])
    splits = read_glue_folder(folder)
    assert {"dev_sentences_in_train": 0, "test_sentences_in_train": 0} | {f"{name}_sentences_in_train": 1} == splits.notes
    assert 1 == splits.describe()[f"{name}_sentences_in_train"]


def test_a_duplicate_that_is_held_out_is_counted(folder):
    """Where train holds each sentence twice, the held-out test split is not as unseen as it looks."""
    write_tsv(folder / "train.tsv", ["good\t1", "bad\t0"] * 20)
    assert 4 == read_glue_folder(folder).notes["test_sentences_in_train"]


# Splits


@pytest.mark.parametrize("label", [-1, 2])
def test_labels_that_are_none_are_refused_with_their_split(label):
    """The error names split, label, first row and how often it stands there."""
    with pytest.raises(DataError) as caught:
        split_of([0, 1, label, label], name="test").check_labels()
    message = str(caught.value)
    assert f"split 'test' has label {label} (row 3, 2 times); wanted 0 or 1" in message


def test_labels_of_0_and_1_are_fine():
    """Nothing is said."""
    split_of([0, 1]).check_labels()


def test_majority_accuracy_is_the_share_of_the_more_frequent_label():
    """Three of four, whichever label it is."""
    assert (0.75, 0.75) == (split_of([1, 1, 1, 0]).majority_accuracy, split_of([0, 0, 1, 0]).majority_accuracy)


@pytest.mark.parametrize(
    "other",
    [
        Split(name="dev", ids=(1, 3), sentences=("a", "b"), labels=(0, 1)),
        Split(name="dev", ids=(1, 2), sentences=("a", "c"), labels=(0, 1)),
        Split(name="dev", ids=(1, 2), sentences=("a", "b"), labels=(1, 0)),
        Split(name="dev", ids=(2, 1), sentences=("b", "a"), labels=(1, 0)),
        Split(name="dev", ids=(1,), sentences=("a",), labels=(0,)),
    ],
)
def test_a_fingerprint_changes_with_every_part_and_the_order(other):
    """Ids, sentences, labels, order and length; the split's name is no part."""
    split = Split(name="dev", ids=(1, 2), sentences=("a", "b"), labels=(0, 1))
    assert split.fingerprint != other.fingerprint
    assert split.fingerprint == Split(name="renamed", ids=(1, 2), sentences=("a", "b"), labels=(0, 1)).fingerprint


def test_a_description_holds_what_the_record_needs(folder):
    """Source, sizes, fingerprint and label protocol, beside the counts."""
    splits = read_glue_folder(folder)
    about = splits.describe()
    assert {"train": 36, "dev": 6, "test": 4} == about["sizes"]
    assert (splits.fingerprint, splits.source, splits.protocol) == (about["fingerprint"], about["source"], about["label_protocol"])


def test_the_fingerprint_of_splits_tells_which_split_holds_what():
    """Swapping dev and test is other data."""
    train, one, two = split_of([0, 1]), split_of([0, 1, 1]), split_of([1, 0, 0])
    first, second = (Splits(train=train, dev=dev, test=test, source="", protocol="") for dev, test in ((one, two), (two, one)))
    assert first.fingerprint != second.fingerprint


# Sources


def test_a_folder_takes_the_place_of_a_scales_data(folder):
    """Nothing is fetched then."""

    def fetch():
        pytest.fail("the reviews are not needed")

    assert read_glue_folder(folder) == load_splits("reviews", folder, fetch)


def test_reviews_come_from_their_asset(tmp_path):
    """The file has the name under which the asset unpacks it."""
    lines = [f"{i}\t{2 if i % 2 else -2}\tsentence {i}" for i in range(1900)]
    (tmp_path / "reviews.tsv").write_text("\n".join(lines))
    splits = load_splits("reviews", None, lambda: tmp_path)
    assert (100, 900, 900) == (len(splits.train), len(splits.dev), len(splits.test))


# Generated sentences


def parse(sentence):
    """The label by the grammar's rule, from its words alone: the last clause's adjective, turned round by a `not`."""
    words = sentence.split(" , but ")[-1].split()
    assert (words[0], words[2]) == ("the", "is"), sentence
    positive = words[-1] in POSITIVE
    assert positive or words[-1] in NEGATIVE, sentence
    return int(positive != ("not" in words))


def adjectives(sentence):
    return [1 if word in POSITIVE else 0 for word in sentence.split() if word in POSITIVE | NEGATIVE]


def accuracy(rule, split):
    return sum(rule(s) == label for s, label in zip(split.sentences, split.labels, strict=True)) / len(split)


def test_generated_sentences_are_distinct_over_all_splits(generated):
    """2,400, 400 and 400 of them, none twice."""
    sizes = [len(split) for split in (generated.train, generated.dev, generated.test)]
    texts = [text for split in (generated.train, generated.dev, generated.test) for text in split.sentences]
    assert [2400, 400, 400] == sizes
    assert Counter(texts).most_common(1)[0][1] == 1
    assert 3200 == len({*generated.train.ids, *generated.dev.ids, *generated.test.ids})


def test_generated_sentences_are_balanced(generated):
    """Always answering the same scores little more than half, equally in each split."""
    shares = [sum(split.labels) / len(split) for split in (generated.train, generated.dev, generated.test)]
    assert [pytest.approx(0.5, abs=0.04)] * 3 == shares
    assert [pytest.approx(shares[0], abs=0.005)] * 2 == shares[1:]


@pytest.mark.parametrize("name", ["train", "dev", "test"])
def test_a_generated_label_is_that_of_the_last_clause(generated, name):
    """Negation included, as a parser of its own reads it; some sentences have each feature."""
    split = getattr(generated, name)
    assert 1.0 == accuracy(parse, split)
    assert {True, False} == {" , but " in text for text in split.sentences} == {" not " in text for text in split.sentences}


def test_the_clauses_of_a_contrast_contradict_each_other(generated):
    """What stands before the `but` would give the wrong label."""
    contrasts = [s for s in generated.dev.sentences if " , but " in s]
    assert contrasts
    assert [] == [s for s in contrasts if parse(s) == parse(s.split(" , but ")[0])]


@pytest.mark.parametrize(
    "rule",
    [
        pytest.param(lambda s: int(sum(adjectives(s)) * 2 >= len(adjectives(s))), id="majority"),
        pytest.param(lambda s: adjectives(s)[0], id="first"),
        pytest.param(lambda s: adjectives(s)[-1], id="last"),
    ],
)
def test_adjectives_alone_do_not_give_the_label(generated, rule):
    """A model that only counts them cannot pass for one that reads."""
    assert accuracy(rule, generated.dev) < 0.7


def test_a_fitted_bag_of_words_does_not_give_the_label(generated):
    """Logistic regression on the counts of all words, fitted on train, stays below 0.7 on dev."""
    words = CountVectorizer(vocabulary=grammar_words(), token_pattern=r"\S+")
    model = LogisticRegression(max_iter=500).fit(words.transform(generated.train.sentences), generated.train.labels)
    assert model.score(words.transform(generated.dev.sentences), generated.dev.labels) < 0.7


def test_the_vocabulary_is_every_word_of_the_sentences(generated):
    """Sorted, none missing and none to spare."""
    used = {word for text in (*generated.train.sentences, *generated.dev.sentences) for word in text.split()}
    assert sorted(used) == grammar_words()


def test_generated_sentences_are_the_same_every_time(generated):
    """Also after others have drawn from the global generator, which stays as it was."""
    random.seed(3)
    state = random.getstate()
    assert generated.fingerprint == generate_sentences().fingerprint == load_splits("grammar", None, pytest.fail).fingerprint
    assert state == random.getstate()


def test_fewer_sentences_can_be_generated():
    """Any sizes, with the shares kept."""
    few = generate_sentences(train=20, dev=6, test=4)
    assert (20, 6, 4) == (len(few.train), len(few.dev), len(few.test))
