"""Folders and files that are whole or absent: built aside, checksummed, moved into place, checked before use."""

import errno
import hashlib
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peftbench.errors import PeftbenchError

MANIFEST = "manifest.json"
WINDOWS = os.name == "nt"
NO_LOCKS = (errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK)
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class CorruptError(PeftbenchError):
    """What lies on disk is not what was once written there."""


class FullError(PeftbenchError, OSError):
    """No space is left where something was to be stored."""


class LockError(PeftbenchError):
    """A file system on which nothing can be locked."""


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
    aside = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    try:
        with aside.open("x", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        _move(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def _move(source: Path, target: Path) -> None:
    """Rename, over what may be there. Windows refuses it while a reader or a scanner has either open, and is asked again."""
    for pause in (0.05, 0.1, 0.2, 0.4, 0.8) if WINDOWS else ():
        try:
            source.replace(target)
        except PermissionError:
            time.sleep(pause)
        else:
            return
    source.replace(target)


@contextmanager
def lock(target: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """
    Hold the lock, over processes, of whoever builds or reads the target; ``waiting`` is called if another holds it.

    Raises:
        LockError: If the file system has no locks.
    """
    from filelock import FileLock, Timeout  # here, as reading results needs no lock, and this imports sockets and logging

    target.parent.mkdir(parents=True, exist_ok=True)
    held = FileLock(target.parent / f".{target.name}.lock")
    try:
        held.acquire(timeout=0)
    except Timeout:
        waiting()
        held.acquire()
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise
        raise LockError(
            f"cannot lock {target}: {getattr(error, 'strerror', None) or error}; keep outputs on a file system with locks"
        ) from error
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

    Raises:
        FullError: If there is no space left, whichever library says so.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{fingerprint(target.name)[:16]}~"  # short, as Windows may allow a path 259 characters only
    for dead in target.parent.glob(f"{prefix}*"):
        _clear(dead, target)
    aside = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    try:
        folder = aside / "new"
        folder.mkdir()
        yield folder
        sums = {f.relative_to(folder).as_posix(): file_sha256(f) for f in sorted(folder.rglob("*")) if f.is_file()}
        manifest = {"facts": dict(facts), "files": sums}
        write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True) + "\n")
        if target.exists():
            _move(target, aside / "replaced")
        _move(folder, target)
    except Exception as error:
        full = error.errno in NO_SPACE if isinstance(error, OSError) else os.strerror(errno.ENOSPC) in str(error)  # as safetensors'
        if full:
            raise FullError(f"no space is left to store {target}; free some, or keep the outputs elsewhere") from error
        raise
    finally:
        _clear(aside, target)


def _clear(aside: Path, target: Path) -> None:
    """Remove what lies aside, but for a target that had made room for one that did not come."""
    if not target.exists() and (aside / "replaced").exists():
        _move(aside / "replaced", target)
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
