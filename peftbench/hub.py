"""Repositories of the Hugging Face Hub as local folders: fetched once, at one commit, into the Hub's own cache."""

import errno
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from peftbench.assets import say
from peftbench.errors import PeftbenchError

Kind = Literal["model", "dataset"]

PAUSES = (1.0, 2.0, 4.0, 8.0)
"""Seconds before each new try at a Hub that is busy, unless it says how long to wait itself."""

LONGEST_PAUSE = 300.0
BUSY = (408, 429, 500, 502, 503, 504)


class HubError(PeftbenchError, OSError):
    """A repository cannot be had from the Hub; the message says why and what to do."""


@dataclass(frozen=True)
class Snapshot:
    """The wanted files of a repository at one commit."""

    folder: Path
    commit: str


def snapshot(
    repo: str, *, kind: Kind, files: Sequence[str], revision: str | None = None, notify: Callable[[str], None] = say
) -> Snapshot:
    """
    Fetch files of a repository, or find them in the cache.

    ``HF_HOME``, ``HF_ENDPOINT``, ``HF_TOKEN`` and ``HF_HUB_OFFLINE`` mean what they mean to ``huggingface_hub``. A busy Hub
    (429, 5xx) is asked again a few times.

    Args:
        repo: Owner and name.
        kind: What the repository holds.
        files: Patterns of the paths that are wanted, as of `fnmatch`.
        revision: Branch, tag or commit; None takes the main branch.
        notify: Told before each new try.

    Raises:
        HubError: If the files cannot be had.
    """
    for pause in (*PAUSES, None):
        try:
            folder = Path(snapshot_download(repo, repo_type=kind, revision=revision, allow_patterns=list(files)))
            return Snapshot(folder, folder.name)
        except Exception as error:  # of huggingface_hub, and of the HTTP library that it happens to use
            status = _status(error)
            if status not in BUSY or pause is None or constants.HF_HUB_OFFLINE:
                raise HubError(_explain(error, repo, kind, revision)) from None
            wait = _pause_asked_for(error) or pause
            if wait > LONGEST_PAUSE:
                raise HubError(f"the Hub asks to wait {wait:.0f} s before fetching {repo} ({status}); run again then") from None
            notify(f"the Hub answered {status} for {repo}; asking again in {wait:.0f} s")
            time.sleep(wait)
    raise AssertionError("unreachable: the last try returns or raises")


def _explain(error: Exception, repo: str, kind: Kind, revision: str | None) -> str:
    what, instead = f"{kind} {repo}", "or give a local folder in its place"
    if kind == "dataset":
        instead = "or give the data as files with --peft-data"
    causes = list(_causes(error))
    if any(isinstance(cause, HFValidationError) for cause in causes):
        return f"{repo!r} is neither a local folder nor a name on the Hub such as owner/name"
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in causes):
        return (
            f"{what} is incomplete in the cache at {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids fetching it: "
            f"run once without that variable, {instead}"
        )
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{repo}"
        return f"{what} is gated: ask for access at {page} and set HF_TOKEN, {instead}"
    if any(isinstance(cause, RevisionNotFoundError) for cause in causes):
        return f"{what} has no revision {revision!r}: name a branch, a tag or a commit of it"
    status = _status(error)
    if status in (401, 403) or any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return (
            f"the Hub at {constants.ENDPOINT} has no {what} for you ({status}): check the name, and if it is private "
            f"set HF_TOKEN to a token that may read it, {instead}"
        )
    if full := next((cause for cause in causes if isinstance(cause, OSError) and cause.errno == errno.ENOSPC), None):
        return f"no space for {what} in {constants.HF_HUB_CACHE}: {full.strerror}; make room or point HF_HOME elsewhere"
    if status is not None:
        return f"the Hub at {constants.ENDPOINT} answered {status} for {what}: run again later, {instead}"
    root = causes[-1]
    reason = (str(root).strip() or type(root).__name__).splitlines()[0][:200]
    return f"{what} could not be fetched from {constants.ENDPOINT} ({reason}): check the network and run again, {instead}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(error: Exception) -> int | None:
    responses = (getattr(cause, "response", None) for cause in _causes(error))
    return next((response.status_code for response in responses if response is not None), None)


def _pause_asked_for(error: Exception) -> float | None:
    """Seconds by ``Retry-After``, or until the window of the Hub's ``RateLimit: "api";r=0;t=55`` ends."""
    for cause in _causes(error):
        headers = getattr(getattr(cause, "response", None), "headers", {})
        if (seconds := headers.get("Retry-After", "")).isdecimal():
            return float(seconds)
        if window := re.search(r";\s*t=(\d+)", headers.get("RateLimit", "")):
            return float(window[1]) + 1
    return None
