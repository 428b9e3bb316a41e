"""The commit by git."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from peftbench import commits
from peftbench.commits import describe_code, describe_commit

ROOT = Path(__file__).parents[1]


@pytest.fixture
def git(tmp_path, monkeypatch):
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "no-config"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    folder = tmp_path / "project"
    folder.mkdir()

    def run(*arguments):
        identity = ["-c", "user.name=Test", "-c", "user.email=test@example.org"]
        done = subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    run.folder = folder
    return run


def commit_a_file(git):
    git("init", "--quiet")
    (git.folder / "code.py").write_text("x = 1\n")
    git("add", "code.py")
    git("commit", "--quiet", "-m", "first")
    return git("rev-parse", "HEAD")


def test_clean_checkout_is_its_commit(git):
    """No changes, no fingerprint of them; files that git does not track do not count."""
    head = commit_a_file(git)
    (git.folder / "notes.txt").write_text("untracked")
    assert {"id": head, "dirty": False, "changes": None} == describe_commit(git.folder)


def test_what_a_notebook_has_printed_is_no_change(git):
    """Running a tracked notebook saves its output into it; that must not hide the records of before from `--peft-resume`."""
    commit_a_file(git)
    (git.folder / "notebooks").mkdir()
    (git.folder / "notebooks/run.ipynb").write_text("{}")
    git("add", ".")
    git("commit", "--quiet", "-m", "a notebook")
    (git.folder / "notebooks/run.ipynb").write_text('{"outputs": ["42"]}')
    assert describe_commit(git.folder)["dirty"] is False
    assert describe_commit(git.folder / "notebooks")["dirty"] is False


@pytest.mark.parametrize("staged", [True, False])
def test_dirty_checkout_is_told_apart_by_its_changes(git, staged):
    """The same change gives the same fingerprint, another change another one, staged or not."""
    head = commit_a_file(git)
    seen = []
    for text in ("x = 2\n", "x = 3\n", "x = 2\n"):
        (git.folder / "code.py").write_text(text)
        if staged:
            git("add", "code.py")
        seen.append(describe_commit(git.folder))
    assert {(head, True)} == {(commit["id"], commit["dirty"]) for commit in seen}
    assert seen[0] == seen[2] != seen[1]
    assert re.fullmatch("[0-9a-f]{16}", seen[0]["changes"])


def test_commit_is_found_from_a_folder_inside(git):
    """A project may be a part of its repository; changes elsewhere in it count."""
    head = commit_a_file(git)
    (git.folder / "inner").mkdir()
    (git.folder / "code.py").write_text("x = 4\n")
    assert (head, True) == (describe_commit(git.folder / "inner")["id"], describe_commit(git.folder / "inner")["dirty"])


@pytest.mark.parametrize("kind", ["no repository", "no commit", "no folder"])
def test_without_a_commit_all_is_null(git, kind):
    """Nothing is made up where git has nothing to say."""
    if kind == "no commit":
        git("init", "--quiet")
    folder = git.folder / "missing" if kind == "no folder" else git.folder
    assert {"id": None, "dirty": None, "changes": None} == describe_commit(folder)


def test_a_repository_that_git_refuses_is_told_from_none(git):
    """So that nobody takes other code for the same: here its HEAD is broken, elsewhere another user owns it."""
    commit_a_file(git)
    (git.folder / ".git/HEAD").write_text("?")
    assert "git does not read the repository in " in describe_commit(git.folder)["problem"]


def test_a_package_that_the_commit_does_not_hold_is_named_by_its_modules(git, monkeypatch):
    """Else a study would resume what another version of the package has measured."""
    commit_a_file(git)
    package = git.folder.parent / "package"
    package.mkdir()
    seen = []
    for content in ("x = 1\n", "x = 2\n"):
        (package / "commits.py").write_text(content)
        monkeypatch.setattr(commits, "__file__", str(package / "commits.py"))
        seen.append(describe_code(git.folder))
    assert seen[0].pop("peftbench") != seen[1].pop("peftbench")
    assert [describe_commit(git.folder)] * 2 == seen
    monkeypatch.setattr(commits, "__file__", str(git.folder / "code.py"))
    assert describe_commit(git.folder) == describe_code(git.folder)


def test_untracked_modules_count_wherever_they_are(git):
    """In a folder beside, and with a name that git would quote."""
    commit_a_file(git)
    (git.folder / "inner").mkdir()
    for name in ("hälfte.py", "beside it.py"):
        (git.folder / name).write_text("x = 5\n")
        assert describe_commit(git.folder / "inner")["dirty"] is True
        assert describe_commit(git.folder / "inner") == describe_commit(git.folder)
        (git.folder / name).unlink()


def test_without_git_all_is_null(git, monkeypatch):
    """A machine without git still measures."""
    commit_a_file(git)
    monkeypatch.setenv("PATH", str(git.folder))
    assert {"id": None, "dirty": None, "changes": None} == describe_commit(git.folder)


def test_a_tool_that_shows_differences_hides_none(git, monkeypatch):
    """`diff.external` may print nothing, or fail."""
    commit_a_file(git)
    (git.folder / "code.py").write_text("x = 2\n")
    seen = describe_commit(git.folder)
    for tool in ("true", "false"):
        monkeypatch.setenv("GIT_EXTERNAL_DIFF", tool)
        assert seen == describe_commit(git.folder)
    assert seen["dirty"] is True


def test_where_git_does_not_say_what_is_uncommitted_that_is_a_problem(git, monkeypatch):
    """As where it takes too long; two such states are not taken for the same."""
    head = commit_a_file(git)
    ask = commits.git
    monkeypatch.setattr(commits, "git", lambda folder, *words: None if words[0] == "diff" else ask(folder, *words))
    commit = describe_commit(git.folder)
    assert (head, None) == (commit["id"], commit["dirty"])
    assert "git does not say what is uncommitted in project" in commit["problem"]


def test_a_repository_may_have_any_name(git):
    """Also where Python takes text for ASCII."""
    folder = git.folder.parent / "Jörg"
    git.folder.rename(folder)
    git.folder.mkdir()
    subprocess.run(["git", "init", "--quiet", folder], check=True)
    subprocess.run(
        ["git", "-c", "user.name=T", "-c", "user.email=t@example.org", "commit", "--quiet", "--allow-empty", "-m", "first"],
        cwd=folder,
        check=True,
    )
    code = "import pathlib, peftbench.commits as c; print(c.describe_commit(pathlib.Path.cwd())['id'])"
    plain = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=plain, capture_output=True, text=True, check=False)
    assert (describe_commit(folder)["id"], "") == (done.stdout.strip(), done.stderr)
    assert re.fullmatch("[0-9a-f]{40}", done.stdout.strip())
