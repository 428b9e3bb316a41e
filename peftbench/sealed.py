"""Folders and files that are whole or absent: built aside, checksummed, moved into place, checked before use."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from peftbench.errors import PeftbenchError

MANIFEST = "manifest.json"


class CorruptError(PeftbenchError):
    """What lies on disk is not what was once written there."""


def fingerprint(content: object) -> str:
    """SHA-256, in hexadecimal, of a JSON value in canonical form."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader sees either the old or the new one, whole, also after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        Path(aside).chmod(0o644)
        Path(aside).replace(path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise


@contextmanager
def lock(target: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the lock, over processes, of whoever builds or reads the target; ``waiting`` is called if another holds it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    held = FileLock(target.parent / f".{target.name}.lock")
    try:
        held.acquire(timeout=0)
    except Timeout:
        waiting()
        held.acquire()
    try:
        yield
    finally:
        held.release()


@contextmanager
def building(target: Path, facts: Mapping[str, Any]) -> Iterator[Path]:
    """
    Give an empty folder to fill; when the block ends well, it replaces the target, sealed.

    The caller holds the target's `lock`, so what else lies aside is left over from a process that died. Readers hold it, too:
    between the two renames that replace a folder there is none.

    Args:
        target: Where the folder will be.
        facts: JSON that `unseal` gives back. It may be changed until the block ends.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for dead in target.parent.glob(f".{target.name}~*"):
        if not target.exists() and (dead / "replaced").exists():
            (dead / "replaced").replace(target)
        shutil.rmtree(dead, ignore_errors=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}~", dir=target.parent))
    try:
        folder = aside / target.name
        folder.mkdir()
        yield folder
        sums = {str(f.relative_to(folder).as_posix()): file_sha256(f) for f in sorted(folder.rglob("*")) if f.is_file()}
        manifest = {"facts": dict(facts), "files": sums}
        write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True) + "\n")
        if target.exists():
            target.replace(aside / "replaced")
        folder.replace(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def unseal(folder: Path) -> Mapping[str, Any] | None:
    """
    Check a sealed folder against its manifest.

    Returns:
        The facts it was sealed with; None if there is no such folder.

    Raises:
        CorruptError: If a file is missing or changed, naming it and what to delete.
    """
    if not folder.exists():
        return None
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        facts, files = dict(manifest["facts"]), dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptError(
            f"{folder} has no readable {MANIFEST} ({type(error).__name__}); delete the folder and run again"
        ) from error
    for name, wanted in files.items():
        path = folder / name
        got = file_sha256(path) if path.is_file() else "no file"
        if got != wanted:
            raise CorruptError(
                f"{path} is corrupt: got SHA-256 {got}, wanted {wanted}; delete {folder} and run again to have it rebuilt"
            )
    return facts
