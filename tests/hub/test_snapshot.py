"""Repositories come whole or not at all, and whatever goes wrong is one clear message."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

from peftbench.hub import HubError, snapshot

WEIGHTS = bytes(range(256)) * 4096  # 1 MiB, served by redirect
FILES = {"config.json": b"{}", "model.safetensors": WEIGHTS, "pytorch_model.bin": b"never"}
WANTED = ["config.json", "model*.safetensors"]


@pytest.fixture
def repo(hub):
    return hub.add("models/owner/name", FILES)


def fetch(revision=None, **changes):
    said = []
    got = snapshot(
        **{"repo": "owner/name", "kind": "model", "files": WANTED, "revision": revision, "notify": said.append, **changes}
    )
    return got, said


def refused(**changes):
    with pytest.raises(HubError) as raised:
        fetch(**changes)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def whole(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def expected():
    return {name: content for name, content in FILES.items() if name != "pytorch_model.bin"}


def test_cold_cache_fetches_what_is_wanted_and_no_more(hub, repo):
    """The wanted files, at the commit that the Hub names; pickled weights are not even asked for."""
    got, _ = fetch()
    assert repo.commit == got.commit
    assert expected() == whole(got.folder)
    assert not any("pytorch_model.bin" in request for request in hub.requests)


def test_warm_cache_transfers_nothing(hub, repo):
    """A second time only the branch is looked up; a commit is not even that."""
    first, _ = fetch()
    hub.requests.clear()
    assert first == fetch()[0]
    assert 1 >= len(hub.requests)
    hub.requests.clear()
    assert first == fetch(revision=repo.commit)[0]
    assert [] == hub.requests


def test_new_commit_is_fetched_and_the_old_one_stays(repo):
    """A branch follows the Hub; a revision that names the old commit still gives the old files."""
    old, _ = fetch()
    repo.files["model.safetensors"] = b"new" * 1000
    new, _ = fetch()
    assert repo.commit == new.commit != old.commit
    assert b"new" * 1000 == (new.folder / "model.safetensors").read_bytes()
    assert expected() == whole(fetch(revision=old.commit)[0].folder)


def test_offline_with_a_warm_cache(hub, repo, monkeypatch):
    """HF_HUB_OFFLINE serves the cache and asks nobody."""
    online, _ = fetch()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert online == fetch()[0]
    assert [] == hub.requests


def test_offline_with_a_cold_cache(hub, repo, tmp_path):
    """Nothing is asked, and the message says which switch forbids it; in a process that is offline from its start."""
    code = "from peftbench.hub import snapshot; snapshot('owner/name', kind='model', files=['*'])"
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=offline, capture_output=True, text=True, timeout=60, check=False)
    assert re.search(r"HubError: .*owner/name.*HF_HUB_OFFLINE", done.stderr.splitlines()[-1])
    assert [] == hub.requests


def test_private_repository_needs_a_token(hub, repo, monkeypatch):
    """Without one it does not exist, as far as the Hub says; HF_TOKEN opens it."""
    repo.private = True
    assert "HF_TOKEN" in refused()
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert expected() == whole(fetch()[0].folder)


def test_gated_repository_says_where_to_ask(hub, repo):
    """403 of a gated repository."""
    repo.gated = True
    message = refused()
    assert "gated" in message
    assert f"{hub.endpoint}/owner/name" in message


@pytest.mark.parametrize(("kind", "instead"), [("model", "local folder"), ("dataset", "--peft-data")])
def test_missing_repository(hub, kind, instead):
    """404, which the Hub writes as 401 to strangers."""
    message = refused(kind=kind, repo="owner/missing")
    assert "owner/missing" in message
    assert instead in message


def test_missing_revision(repo):
    """The message names it."""
    assert "no revision 'v9'" in refused(revision="v9")


def test_a_name_that_is_none():
    """A misspelt folder is not sent to the Hub."""
    assert "neither a local folder nor a name" in refused(repo="./models/missing/folder")


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("where", ["GET /api/models/owner/name", "HEAD /owner/name/resolve", "GET /cdn/models/owner/name"])
def test_busy_hub_is_asked_again(hub, repo, status, where):
    """Once refused, once served: listing, metadata or content."""
    hub.faults.append((where, (status, {"Retry-After": "0"})))
    got, _ = fetch()
    assert expected() == whole(got.folder)
    assert [] == hub.faults


@pytest.mark.parametrize("status", [429, 503])
def test_hub_that_stays_busy(hub, repo, status):
    """After a few tries it is an error that names the status, and nothing half-fetched passes for whole."""
    hub.faults += [("/api/models/owner/name", (status, {}))] * 50
    assert str(status) in refused()
    hub.faults.clear()
    assert expected() == whole(fetch()[0].folder)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [({"Retry-After": "3600"}, 3600), ({"RateLimit": '"api";r=0;t=3599', "RateLimit-Policy": '"api";q=500'}, 3600)],
)
def test_hub_that_wants_a_long_pause(hub, repo, headers, seconds):
    """Nobody waits an hour unawares."""
    hub.faults += [("/api/models/owner/name", (429, headers))] * 50
    assert f"{seconds} s" in refused()


@pytest.mark.parametrize(
    ("headers", "pause"), [({"Retry-After": "7"}, "7 s"), ({"RateLimit": '"api";r=0;t=55'}, "56 s"), ({}, "0 s")]
)
def test_pause_is_what_the_hub_asks_for(hub, repo, headers, pause):
    """Said before it is slept."""
    hub.faults.append(("GET /api/models/owner/name", (429, headers)))
    _, said = fetch()
    assert ["the Hub answered 429 for owner/name; asking again in " + pause] == said


def test_connection_cut_in_mid_file_is_resumed(hub, repo):
    """The rest is asked for by range, and the file is whole."""
    hub.faults.append(("GET /cdn/models/owner/name/model.safetensors", 300_000))
    got, _ = fetch()
    assert expected() == whole(got.folder)
    assert any("bytes=" in request for request in hub.requests)


def test_connection_that_keeps_being_cut(hub, repo):
    """An error, no broken file, and the next run finishes."""
    hub.faults += [("GET /cdn/models/owner/name/model.safetensors", 0)] * 50
    assert "could not be fetched" in refused()
    assert not any(path.name == "model.safetensors" for path in Path(constants.HF_HUB_CACHE).rglob("*"))
    hub.faults.clear()
    assert expected() == whole(fetch()[0].folder)


def test_nobody_listens(hub, repo, hub_server, monkeypatch):
    """No Hub and no cache: the message names the endpoint; with a cache it does not matter."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9" in refused()
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    online, _ = fetch()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert online == fetch()[0]
