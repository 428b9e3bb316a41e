"""Sealed folders and atomic files: whole or absent, whatever ends the process."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from peftbench.sealed import (
    MANIFEST,
    CorruptError,
    FullError,
    LockError,
    building,
    file_sha256,
    fingerprint,
    lock,
    unseal,
    write_atomically,
)

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


class Crash(Exception):
    """What ends a block in these tests."""


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


def build(target, facts, **texts):
    with building(target, facts) as folder:
        for name, text in texts.items():
            (folder / name).write_text(text)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def run_python(code, *arguments):
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True)


@pytest.fixture
def target(tmp_path):
    return tmp_path / "shelf" / "kd_500"


def test_a_built_folder_is_given_back_with_its_facts(target):
    """What was written is there, and only that and the manifest."""
    build(target, {"size": 500}, data="some text")
    assert {"size": 500} == unseal(target)
    assert ["data", MANIFEST] == names(target)
    assert "some text" == (target / "data").read_text()


def test_the_manifest_holds_the_sum_of_each_file_below_it(target):
    """Files in folders count, under their path with slashes."""
    with building(target, {}) as folder:
        (folder / "a.txt").write_bytes(b"abc")
        (folder / "deep" / "er").mkdir(parents=True)
        (folder / "deep" / "er" / "b.txt").write_bytes(b"")
    files = json.loads((target / MANIFEST).read_text())["files"]
    assert {
        "a.txt": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",  # FIPS 180-2, appendix B.1
        "deep/er/b.txt": hashlib.sha256(b"").hexdigest(),
    } == files


def test_facts_may_be_found_out_while_building(target):
    """What is put into them before the block ends is kept."""
    facts = {}
    with building(target, facts):
        facts["seconds"] = 1.5
    assert {"seconds": 1.5} == unseal(target)


def test_no_folder_is_no_error(target):
    """Absent is one of the two states."""
    assert unseal(target) is None


def test_building_again_replaces_the_whole_folder(target):
    """No file of the old one is left among the new."""
    build(target, {"n": 1}, old="old")
    build(target, {"n": 2}, new="new")
    assert {"n": 2} == unseal(target)
    assert [MANIFEST, "new"] == names(target)


@pytest.mark.parametrize("before", [None, "old"])
def test_an_error_while_building_leaves_what_was_there(target, before):
    """The error comes through, the old folder stays whole, or absent, and nothing lies aside."""
    if before:
        build(target, {"n": 1}, data=before)
    with pytest.raises(Crash), building(target, {"n": 2}) as folder:
        (folder / "data").write_text("half of it")
        raise Crash
    assert ({"n": 1} if before else None) == unseal(target)
    assert ([target.name] if before else []) == names(target.parent)


def test_facts_that_are_not_json_leave_what_was_there(target):
    """A folder that cannot be sealed does not replace one that is."""
    build(target, {"n": 1}, data="old")
    with pytest.raises(TypeError):
        build(target, {"n": object()}, data="new")
    assert {"n": 1} == unseal(target)


def test_a_full_disk_while_building_leaves_what_was_there(target):
    """It is told where, and the old folder stays whole."""
    build(target, {"n": 1}, data="old")
    with (
        full_disk(4096),
        pytest.raises(FullError, match=r"no space is left to store \S+kd_500"),
        building(target, {"n": 2}) as folder,
    ):
        (folder / "data").write_bytes(b"x" * 8192)
    assert {"n": 1} == unseal(target)
    assert [target.name] == names(target.parent)


def test_a_killed_process_leaves_the_old_folder_and_the_next_one_clears_up(target):
    """After a kill the old folder is whole; the next building removes what the dead process left."""
    build(target, {"n": 1}, data="old")
    killed = run_python(
        "import os, signal, sys, pathlib\n"
        "from peftbench.sealed import building, lock\n"
        "target = pathlib.Path(sys.argv[1])\n"
        "with lock(target), building(target, {}) as folder:\n"
        "    (folder / 'data').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n",
        target,
    )
    killed.communicate()
    assert -signal.SIGKILL == killed.returncode
    assert {"n": 1} == unseal(target)
    assert 1 == len([name for name in names(target.parent) if "~" in name])
    with lock(target):
        build(target, {"n": 3}, data="new")
    assert {"n": 3} == unseal(target)
    assert [] == [name for name in names(target.parent) if "~" in name]


def test_clearing_up_spares_the_neighbours(target):
    """Only leftovers of the same target go: whoever builds a neighbour holds another lock, however alike their names are."""
    target, neighbour = (target.parent / f"kd_1000_length_{length}" for length in (100, 128))
    with building(neighbour, {"whose": "neighbour"}) as folder:
        (folder / "data").write_text("half")
        build(target, {}, data="own")
        assert folder.exists()
    assert {"whose": "neighbour"} == unseal(neighbour)


def test_two_processes_build_the_same_target_once(target):
    """The second waits for the lock and finds the folder sealed."""
    code = (
        "import sys, pathlib\n"
        "from peftbench.sealed import building, lock, unseal\n"
        "target = pathlib.Path(sys.argv[1])\n"
        "print('ready', flush=True)\n"
        "with lock(target):\n"
        "    if unseal(target) is None:\n"
        "        with building(target, {'by': sys.argv[2]}) as folder:\n"
        "            (folder / 'data').write_text(sys.argv[2] * 100_000)\n"
        "            print('built', flush=True)\n"
    )
    with lock(target):
        both = [run_python(code, target, name) for name in "ab"]
        assert ["ready\n", "ready\n"] == [process.stdout.readline() for process in both]
    said = [process.communicate()[0] for process in both]
    assert [0, 0] == [process.returncode for process in both]
    assert ["", "built\n"] == sorted(said)
    winner = "ab"[said.index("built\n")]
    assert {"by": winner} == unseal(target)
    assert winner * 100_000 == (target / "data").read_text()


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "got"),
    [
        pytest.param(flip_a_byte, "got SHA-256", id="changed"),
        pytest.param(lambda path: path.write_bytes(path.read_bytes()[:-1]), "got SHA-256", id="truncated"),
        pytest.param(lambda path: path.write_bytes(b""), hashlib.sha256(b"").hexdigest(), id="emptied"),
        pytest.param(lambda path: path.unlink(), "no file", id="missing"),
        pytest.param(lambda path: (path.unlink(), path.mkdir()), "no file", id="a-folder-instead"),
    ],
)
def test_a_damaged_file_is_named_with_what_to_delete(target, damage, got):
    """The error names the file, what it got and wanted, and the folder to delete."""
    build(target, {}, data="some text", other="other")
    damage(target / "data")
    with pytest.raises(CorruptError) as caught:
        unseal(target)
    message = str(caught.value)
    wanted = hashlib.sha256(b"some text").hexdigest()
    assert [] == [part for part in (str(target / "data"), got, wanted, f"delete {target} ") if part not in message], message


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(None, id="missing"),
        pytest.param(b"", id="empty"),
        pytest.param(b'{"facts": {}, "fil', id="truncated"),
        pytest.param(b'{"facts": {}}', id="without-files"),
        pytest.param(b"[]", id="a-list"),
        pytest.param(b'{"facts": 1, "files": {}}', id="facts-no-mapping"),
        pytest.param(b"\xff\xfe", id="not-utf-8"),
        pytest.param(b"[" * 100_000, id="too-deep"),
    ],
)
def test_a_damaged_manifest_is_named_with_what_to_delete(target, text):
    """Without its manifest a folder proves nothing: the error names both and says to delete the folder."""
    build(target, {}, data="some text")
    (target / MANIFEST).unlink()
    if text is not None:
        (target / MANIFEST).write_bytes(text)
    with pytest.raises(CorruptError) as caught:
        unseal(target)
    message = str(caught.value)
    assert [] == [part for part in (str(target), MANIFEST, "delete the folder") if part not in message], message


def test_a_file_in_place_of_the_folder_is_corrupt(target):
    """It is not silently taken for a sealed folder, nor for none."""
    target.parent.mkdir()
    target.write_text("not a folder")
    with pytest.raises(CorruptError, match=MANIFEST):
        unseal(target)


@given(content=st.binary(max_size=64), at=st.integers(0, 63), change=st.integers(1, 255))
@hypothesis_settings(deadline=None, max_examples=15)
def test_any_changed_byte_is_noticed(tmp_path_factory, content, at, change):
    """No single byte of a sealed file can change without an error."""
    target = tmp_path_factory.mktemp("sealed") / "asset"
    content = content or b"\0"
    with building(target, {}) as folder:
        (folder / "data").write_bytes(content)
    changed = bytearray(content)
    changed[at % len(content)] ^= change
    (target / "data").write_bytes(changed)
    with pytest.raises(CorruptError):
        unseal(target)


def test_a_text_is_written_with_its_folders(tmp_path):
    """UTF-8, line ends as given on every system, nothing beside it, readable by others."""
    path = tmp_path / "a" / "b" / "record.json"
    write_atomically(path, "één\nzwei\n")
    assert "één\nzwei\n".encode() == path.read_bytes()
    assert [path.name] == names(path.parent)
    assert 0o644 == path.stat().st_mode & 0o777


def test_a_text_replaces_the_old_one(tmp_path):
    """A shorter text leaves no rest of a longer one."""
    path = tmp_path / "record.json"
    write_atomically(path, "a long old text")
    write_atomically(path, "new")
    assert "new" == path.read_text()


@pytest.mark.parametrize(
    ("text", "error"),
    [
        pytest.param("half of it \ud800", UnicodeEncodeError, id="not-encodable"),
        pytest.param("x" * 100_000, OSError, id="disk-full"),
    ],
)
def test_a_failed_write_leaves_the_old_text(tmp_path, text, error):
    """The error comes through, the old text stays whole and nothing lies beside it."""
    path = tmp_path / "record.json"
    write_atomically(path, "old")
    with full_disk(4096), pytest.raises(error):
        write_atomically(path, text)
    assert "old" == path.read_text()
    assert [path.name] == names(tmp_path)


def test_a_text_that_cannot_take_its_place_leaves_nothing_behind(tmp_path):
    """A folder of that name stays, and the half-made file goes."""
    path = tmp_path / "record.json"
    path.mkdir()
    with pytest.raises(OSError):
        write_atomically(path, "text")
    assert [path.name] == names(tmp_path)


def test_a_reader_sees_the_old_text_or_the_new_one(tmp_path):
    """An open file keeps its old content: the new one is another file, moved into place."""
    path = tmp_path / "record.json"
    write_atomically(path, "old")
    with path.open() as reader:
        write_atomically(path, "new")
        assert "old" == reader.read()


@given(content=JSON_VALUES)
@hypothesis_settings(deadline=None, max_examples=50)
def test_a_fingerprint_is_that_of_the_json_value(content):
    """It is the SHA-256 of canonical JSON, and a round trip through a file does not change it."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(canonical.encode()).hexdigest() == fingerprint(content)
    assert fingerprint(json.loads(json.dumps(content, indent=4))) == fingerprint(content)


def test_a_fingerprint_does_not_depend_on_the_order_of_keys():
    """The same settings written in another order are the same settings; other settings are not."""
    assert fingerprint({"a": 1, "b": [1, 2]}) == fingerprint({"b": [1, 2], "a": 1})
    assert fingerprint({"a": 1, "b": [1, 2]}) != fingerprint({"a": 1, "b": [2, 1]})


def test_a_fingerprint_of_nan_is_refused():
    """NaN is not JSON and would equal nothing."""
    with pytest.raises(ValueError):
        fingerprint({"rate": float("nan")})


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (1 << 20) + 1])
def test_a_files_sum_is_that_of_all_its_bytes(tmp_path, size):
    """Also where it is longer than a block or just as long."""
    content = os.urandom(size)
    (tmp_path / "file").write_bytes(content)
    assert hashlib.sha256(content).hexdigest() == file_sha256(tmp_path / "file")


@pytest.mark.parametrize("error", [OSError(errno.EOPNOTSUPP, "Operation not supported"), NotImplementedError("no flock here")])
def test_a_file_system_without_locks_is_told(target, monkeypatch, error):
    """As some of clusters are."""

    def refuse(self, **_):
        raise error

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    with pytest.raises(LockError, match=r"cannot lock \S+kd_500: (Operation not supported|no flock here); keep"), lock(target):
        pass


@pytest.mark.parametrize(("windows", "refusals", "moved"), [(True, 3, True), (True, 6, False), (False, 1, False)])
def test_windows_is_asked_again_where_a_file_is_open(tmp_path, monkeypatch, windows, refusals, moved):
    """A virus scanner lets go after a moment; other systems do not refuse for that, and are not asked twice."""
    paused, refused, replace = [], [], Path.replace

    def busy(self, target):
        if len(refused) < refusals:
            refused.append(target)
            raise PermissionError("open elsewhere")
        return replace(self, target)

    monkeypatch.setattr("peftbench.sealed.WINDOWS", windows)
    monkeypatch.setattr("peftbench.sealed.time.sleep", paused.append)
    monkeypatch.setattr(Path, "replace", busy)
    if moved:
        write_atomically(tmp_path / "report.json", "whole")
        assert "whole" == (tmp_path / "report.json").read_text()
    else:
        with pytest.raises(PermissionError):
            write_atomically(tmp_path / "report.json", "whole")
    assert min(refusals, 5 if windows else 0) == len(paused)
    assert (["report.json"] if moved else []) == names(tmp_path)


def test_a_file_has_the_rights_that_the_process_gives(tmp_path):
    """Neither the private ones of a scratch file nor more than the user's mask allows."""
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "report.json", "whole")
    finally:
        os.umask(before)
    assert 0o640 == (tmp_path / "report.json").stat().st_mode & 0o777


def test_a_path_aside_is_hardly_longer_than_in_place(tmp_path):
    """Windows may allow 259 characters: a fingerprint of 64 digits stands in it but once."""
    target = tmp_path / ("f" * 64)
    with building(target, {}) as folder:
        assert len(str(folder)) < len(str(target))


def test_an_interrupt_between_the_renames_keeps_what_was_there(target, monkeypatch):
    """Ctrl-C comes at any time."""
    build(target, {"n": 1}, data="old")
    replace, moves = Path.replace, []

    def interrupted(self, to):
        moves.append(to)
        if len(moves) == 3:  # after the manifest's and the old folder's, at the new one's
            raise KeyboardInterrupt
        return replace(self, to)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(target, {"n": 2}, data="new")
    assert {"n": 1} == unseal(target)
    assert [target.name] == names(target.parent)


def test_a_text_is_on_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    """All of it has left the process when the system is asked to write it out, and the old one is still there."""
    path, sync, synced = tmp_path / "record.json", os.fsync, []

    def seen(descriptor):
        synced.append((os.fstat(descriptor).st_size, path.exists()))
        sync(descriptor)

    monkeypatch.setattr("os.fsync", seen)
    write_atomically(path, "text")
    assert [(4, False)] == synced


def test_a_lock_that_fails_for_another_reason_blames_no_file_system(target):
    """Something in the way, or no right to write there, is told as the system does."""
    target.with_name(f".{target.name}.lock").mkdir(parents=True)
    with pytest.raises(OSError), lock(target):
        pass
