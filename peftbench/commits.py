"""What git knows of the code: the commit that is checked out, and the order of commits."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftbench.sealed import file_sha256, fingerprint


@dataclass(frozen=True, kw_only=True, slots=True)
class Commit:
    """
    A commit that git knows.

    Attributes:
        on_line: Whether it is HEAD or one that leads to it.
    """

    id: str
    subject: str
    on_line: bool = True


def describe_commit(folder: Path) -> dict[str, Any]:
    """
    The commit that is checked out.

    Returns:
        ``id`` (null without git), ``dirty``, and ``changes``: a fingerprint of what differs
        in tracked files and of untracked Python modules; the latter two null where git does not say.
        ``problem`` where git does not read the repository, such as one of another user, or does not say in 20 s what is
        uncommitted.
    """
    unknown = {"id": None, "dirty": None, "changes": None}
    top = git(folder, "rev-parse", "--show-toplevel")
    nearest = next((parent for parent in (folder, *folder.parents) if (parent / ".git").exists()), None)
    if shutil.which("git") and nearest and (top is None or not _same(Path(top.rstrip("\r\n")), nearest)):
        return {**unknown, "problem": f"git does not read the repository in {nearest.name or nearest}; git status says why"}
    if top is None:
        return unknown
    folder = Path(top.rstrip("\r\n"))
    commit = git(folder, "rev-parse", "HEAD")
    if not commit:
        return unknown
    plain = ("--no-ext-diff", "--no-textconv", "--no-color")
    changes = git(folder, "diff", *plain, "HEAD", "--", ".", ":(exclude)*.ipynb")  # notebooks save what they print
    modules = git(folder, "ls-files", "--others", "--exclude-standard", "-z", "--", "*.py")
    if changes is None or modules is None:
        problem = f"git does not say what is uncommitted in {folder.name or folder}; git status may say why"
        return {**unknown, "id": commit.strip(), "problem": problem}
    sums = {name: file_sha256(folder / name) for name in modules.split("\0") if (folder / name).is_file()}
    dirty = bool(changes or sums)
    return {"id": commit.strip(), "dirty": dirty, "changes": fingerprint([changes, sums])[:16] if dirty else None}


def describe_code(folder: Path) -> dict[str, Any]:
    """The commit, and as ``peftbench`` a fingerprint of this package's modules where they are no part of that repository."""
    package = Path(__file__).parent
    if git(folder, "ls-files", "--", str(package)):
        return describe_commit(folder)
    modules = {path.relative_to(package).as_posix(): file_sha256(path) for path in sorted(package.rglob("*.py"))}
    return {**describe_commit(folder), "peftbench": fingerprint(modules)[:16]}


def commits_in_order(repository: Path) -> list[Commit]:
    """The commits that git knows, each after its parents; none without git."""
    log = git(repository, "log", "--all", "HEAD", "--topo-order", "--reverse", "--format=%H%x00%s") or ""
    line = set((git(repository, "rev-list", "HEAD") or "").split())
    found = [text.partition("\0") for text in log.splitlines() if text]
    return [Commit(id=one, subject=subject, on_line=one in line) for one, _, subject in found]


def git(folder: Path, *arguments: str) -> str | None:
    """What git prints in a folder; None where it fails, is not there, or takes longer than 20 s."""
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode:
        return None
    return done.stdout.decode("utf-8", "replace") if os.name == "nt" else os.fsdecode(done.stdout)


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False
