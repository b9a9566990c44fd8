"""What can go wrong with the hub, each as one line: the config key, its value, and the remedy for just that."""

import errno
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nnprune.files.hub import Repository

BUSY = (429, 500, 502, 503, 504)
"""Statuses of a hub that may answer in a moment."""

HTTP = ("httpx", "httpx2", "httpcore", "httpcore2")
"""Packages whose errors tell that nobody answered."""

LOGIN = "log in with `hf auth login` (formerly huggingface-cli login), or set HF_TOKEN"


def explain(error: Exception, repository: "Repository", file: str | None) -> str:
    """One line for an error of huggingface_hub.

    Args:
        error: what was raised.
        repository: what was asked for.
        file: key and value of the setting that names a file in it, if one was asked for.
    """
    from huggingface_hub import constants, errors

    chain = list(_causes(error))
    key, name, kind, revision = repository.key, repository.name, repository.kind, repository.revision
    without = _without(repository)
    label, what = f"{key}={name}", f"the {kind} {name}"
    page = f"{constants.ENDPOINT}/{'' if kind == 'model' else 'datasets/'}{name}"
    at = f" at {revision}" if revision else ""
    answers = {
        errors.GatedRepoError: f"{label}: is gated; accept its licence at {page}, then {LOGIN}",
        errors.RepositoryNotFoundError: f"{label}: does not exist or is private (the hub does not tell which); check the "
        f"spelling, or {LOGIN}",
        errors.RevisionNotFoundError: f"{key.rsplit('.', 1)[0]}.revision={revision}: {what} has no such branch, tag or commit; "
        f"choose one of those at {page}",
        errors.RemoteEntryNotFoundError: f"{file or label}: {what} has no such file{at}; choose one of those at {page}/tree/main",
        errors.CachedRepoTreeNotFoundError: f"{file or label}: the cache may lack some of these files of {what}{at}; run once where "
        f"{constants.ENDPOINT} can be reached, or {without}",
        errors.OfflineModeIsEnabled: _uncached(file or label, at, without),
    }
    for kinds, answer in answers.items():
        if any(isinstance(one, kinds) for one in chain):
            return answer
    for one in chain:
        if told := _about_disk(one, label):
            return told
    cause = chain[-1]
    status = next(filter(None, map(status_of, chain)), None)
    if status in (401, 403):
        return f"{label}: the hub refuses access ({line(error)}); {LOGIN}"
    if is_offline() and status is None:
        return _uncached(file or label, at, without)
    if status in BUSY or any(map(is_transient, chain)) or isinstance(cause, errors.LocalEntryNotFoundError | LookupError):
        told = f"it answers {status}" if status else line(cause) if is_transient(cause) else "it did not answer before"
        lacks = f"the hub at {constants.ENDPOINT} cannot be reached ({told}), and the cache lacks it"
        return f"{label}: {lacks}; try again later, or {without}"
    return f"{label}: the hub did not give it ({line(cause)}); {without}"


def is_offline() -> bool:
    """Whether the user forbids to ask the hub."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def is_transient(error: BaseException) -> bool:
    """Whether the hub did not answer, or not now: no connection, no answer in time, or a failure of its own."""
    is_silent = isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.split(".")[0] in HTTP
    return status_of(error) in BUSY or (is_silent and status_of(error) is None)


def status_of(error: BaseException) -> int | None:
    """The status of the answer that an error tells of."""
    return getattr(getattr(error, "response", None), "status_code", None)


def line(error: BaseException) -> str:
    """An error's message as one line that is not too long."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _uncached(label: str, at: str, without: str) -> str:
    reason = f"could not be read: it is not in the cache{at}, and HF_HUB_OFFLINE forbids fetching it"
    return f"{label}: {reason}; run once without it, or {without}"


def _without(repository: "Repository") -> str:
    """What to do without the hub."""
    if repository.kind == "model":
        return "use model=local model.path=DIR"
    key, group = repository.key, repository.key.split(".")[0]
    return f"point {key} at a local folder that holds {repository.wanted}, or use {group}=text {group}.path=FILE"


def _about_disk(error: BaseException, label: str) -> str | None:
    from huggingface_hub import constants

    if not isinstance(error, OSError):
        return None
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{label}: no space is left in {constants.HF_HUB_CACHE}; make room there, or set HF_HOME to a folder on another disk"
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return f"{label}: {constants.HF_HUB_CACHE} cannot be written ({error.strerror}); set HF_HOME to another folder"
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
