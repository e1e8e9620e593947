"""What went wrong between us and a service that speaks the Hugging Face Hub's protocol, in a sentence."""

from __future__ import annotations

import os
from collections.abc import Iterator

from titan_core.runtime.errors import MachineError, RemoteError, TitanError, UsageError

_LOGIN = "log in with `hf auth login`, or set HF_TOKEN"
_NO_CONNECTION = (
    "connection refused",
    "name or service not known",
    "name resolution",
    "nodename nor servname",
    "network is unreachable",
    "no route to host",
)


def may_pass(error: BaseException) -> bool:
    """Is this worth another attempt? Broken connections and failures of the service are; refusals are not."""
    if isinstance(error, TitanError) or _is(error, "OfflineModeIsEnabled", "HFValidationError", "PermissionError"):
        return False
    if isinstance(error, OSError) and error.errno == 28:
        return False
    status = _status(error)
    return status is None or status >= 500 or status < 300 or status in (408, 416, 429)


def unreachable(error: BaseException) -> bool:
    """Was there no connection at all?"""
    text = " ".join(str(one) for one in _chain(error)).lower()
    return any(hint in text for hint in _NO_CONNECTION)


def explain(error: BaseException, repo: str, revision: str | None) -> TitanError:
    """Return what a person needs to know of a failed request."""
    if isinstance(error, TitanError):
        return error
    if isinstance(error, OSError) and error.errno == 28:
        return MachineError("the disk is full", tip="free some space; the same command goes on")
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    return _by_name(error, repo, revision, endpoint) or _by_status(error, repo, endpoint)


def _by_name(error: BaseException, repo: str, revision: str | None, endpoint: str) -> TitanError | None:
    """Explain what the client has a class for; its libraries differ by version, the names of the classes do not."""
    if _is(error, "HFValidationError"):
        return UsageError(f"`{repo}` is no repository: {error}", tip="OWNER/NAME")
    if _is(error, "OfflineModeIsEnabled"):
        return RemoteError("HF_HUB_OFFLINE is set, so nothing is fetched", tip="unset it")
    if _is(error, "GatedRepoError"):
        tip = f"ask for access at {endpoint}/{repo}, then {_LOGIN}"
        return RemoteError(f"{repo} is gated, and you may not read it", where=repo, tip=tip)
    if _is(error, "RevisionNotFoundError"):
        return RemoteError(f"{repo} has no revision `{revision}`", where=repo, tip="a branch, a tag or a commit")
    if _is(error, "RepositoryNotFoundError"):
        tip = f"is it spelt so? {_LOGIN}"
        return RemoteError(f"there is no repository {repo}, or it is private", where=endpoint, tip=tip)
    return None


def _by_status(error: BaseException, repo: str, endpoint: str) -> TitanError:
    status, where = _status(error), f"{endpoint}/{repo}"
    if status in (401, 403):
        what = "does not know you" if status == 401 else "does not let you read this"
        return RemoteError(f"the service {what} ({status})", where=where, tip=_LOGIN)
    if status == 404:
        return RemoteError("a file is not there (404)", where=where, tip="has the repository changed?")
    if status == 429:
        return RemoteError("too many requests (429)", where=endpoint, tip=f"wait, use fewer --workers, or {_LOGIN}")
    if status is not None and status >= 500:
        return RemoteError(f"the service failed ({status})", where=endpoint, tip="try later: the same command goes on")
    if unreachable(error):
        tip = "is there a network? HF_ENDPOINT names a mirror; what is here already can be used without it"
        return RemoteError("the service cannot be reached", where=endpoint, tip=tip)
    return RemoteError(f"the connection broke: {type(error).__name__}: {str(error)[:200]}", where=where)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    """Return the HTTP status behind an error: the client wraps a bare 403 as a missing file."""
    for one in _chain(error):
        for status in (getattr(getattr(one, "response", None), "status_code", None), getattr(one, "code", None)):
            if isinstance(status, int):
                return status
    return None


def _is(error: BaseException, *names: str) -> bool:
    return any(cls.__name__ in names for one in _chain(error) for cls in type(one).__mro__)
