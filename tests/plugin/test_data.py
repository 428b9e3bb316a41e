"""--peft-data: bad folders end in one clear message."""

import pytest
from samples import REWRITTEN


@pytest.mark.parametrize(
    ("name", "why"),
    [("nowhere", "does not exist"), ("whole/dev.tsv", "is a file"), ("half", "has no dev.tsv"), ("empty", "has no train.tsv")],
)
def test_a_folder_without_the_files_is_a_usage_error(study, tmp_path, name, why):
    """Before anything is loaded, naming what it lacks."""
    for path in ("empty", "half", "whole"):
        (tmp_path / path).mkdir()
    for path in ("half/train.tsv", "whole/train.tsv", "whole/dev.tsv"):
        (tmp_path / path).touch()
    result = study(data=tmp_path / name)
    assert pytest.ExitCode.USAGE_ERROR == result.ret
    result.stderr.fnmatch_lines([f"*--peft-data must be a folder with train.tsv and dev.tsv, got '{tmp_path / name}', which {why}"])


def test_a_folder_of_the_ini_file_matters_to_cases_alone(study, pytester):
    """Tests of something else run without it; cases do not, and the message names the key."""
    pytester.makeini("[pytest]\npeft_data = nowhere")
    pytester.makepyfile(test_other="def test_other(): pass")
    pytester.runpytest_inprocess("test_other.py").assert_outcomes(passed=1)
    result = study(data=None)
    assert pytest.ExitCode.USAGE_ERROR == result.ret
    result.stderr.fnmatch_lines(
        ["*the ini key peft_data must be a folder with train.tsv and dev.tsv, got '*nowhere', which does not exist"]
    )


def test_a_bad_file_is_a_usage_error_with_its_line(study, tmp_path, records):
    """A label that is none ends the session before anything is trained, naming file, line and what is allowed."""
    (tmp_path / "train.tsv").write_text("sentence\tlabel\ngood\t1\nbad\t-1\n")
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\ngood\t1\nbad\t0\n")
    result = study("-k", "small", data=tmp_path)
    assert pytest.ExitCode.USAGE_ERROR == result.ret
    result.stderr.fnmatch_lines(["*train.tsv, line 3: split 'train' has label '-1'; wanted 0 or 1*"])
    assert not records()


def test_sentences_of_dev_in_train_are_warned_of_and_counted(study, tmp_path, data_folder, records):
    """The summary says how many, the record keeps the number, and no warning filter turns it into an error."""
    for name in ("train", "dev", "test"):
        (tmp_path / f"{name}.tsv").write_text((data_folder / f"{name}.tsv").read_text())
    stolen = (tmp_path / "train.tsv").read_text().splitlines()[1]
    with (tmp_path / "dev.tsv").open("a") as dev:
        dev.write(stolen + "\n")
    result = study("-k", "small", "-W", "error", "-W", "ignore::FutureWarning", *REWRITTEN, data=tmp_path)
    result.assert_outcomes(passed=1, deselected=5)
    result.stdout.fnmatch_lines(["warning: 1 dev sentences also occur in train"])
    [record] = records().values()
    assert 1 == record["data"]["dev_sentences_in_train"]


def test_without_an_ini_file_outputs_are_where_pytest_was_started(study, data_folder, records):
    """Wherever pytest puts its root, which is what its arguments have in common, the data's folder among them."""
    result = study("-k", "small", "test_study.py", "--peft-data", str(data_folder), data=None)
    result.assert_outcomes(passed=1, deselected=5)
    assert ["S-small-tiny-s42.json"] == list(records())


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        (["--peft-data", "{}"], True),
        (["--rootdir=.", "--peft-data", "{}"], True),  # which moves the root, and finds no ini file
        (["-c", "tox.ini", "--peft-data", "{}"], False),
        (["--peft-data={}"], False),
        (["--peft-data", "{}", "."], False),
    ],
)
def test_a_folder_that_pytest_takes_for_tests_does_not_cost_the_ini_file(study, pytester, data_folder, words, refused):
    """As a word of its own, where no path of tests is given, it would move the root to where the data are."""
    pytester.makeini("[pytest]\npeft_seeds = 7")
    result = study("-k", "small", *(word.format(data_folder) for word in words), data=None)
    if refused:
        assert pytest.ExitCode.USAGE_ERROR == result.ret
        result.stderr.fnmatch_lines(
            [f"*taken {data_folder} for a folder of tests and passed over *tox.ini; write --peft-data={data_folder} in one word"]
        )
    else:
        result.assert_outcomes(passed=1, deselected=5)
