"""Uploads a saved pruned model to the hub: `push=org/name`. What would stop it is found before long work, each as one line."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from nnprune.files.hub_errors import LOGIN, is_offline, is_transient, line, status_of
from nnprune.model.export import SUMMARY, write_card
from nnprune.model.model_files import SMALL_FILES, read_json

log = logging.getLogger(__name__)

EMPTY = {".gitattributes", "README.md", "LICENSE"}
"""The files of a repository that was made by hand for a model to come."""


def check_destination(name: str, is_private: bool, fingerprint: str, overwrite: bool) -> None:
    """Make the repository `name` if it does not exist. Raises ValueError if a model of this fingerprint cannot be pushed to it: a bad
    name, no login, no permission, a public repository for a private model, or another model in it, unless `overwrite` says to replace
    that."""
    from huggingface_hub import HfApi, constants, errors, utils

    with _explained(name):
        try:
            utils.validate_repo_id(name)
        except errors.HFValidationError as error:
            raise ValueError(f"push={name}: is no name of a repository ({line(error)}); write push=ORG/NAME") from error
        if name.count("/") != 1:
            raise ValueError(f"push={name}: must name an owner and a model; write push=ORG/NAME")
        if is_offline():
            raise ValueError(f"push={name}: HF_HUB_OFFLINE forbids to ask the hub; run without it, or without push")
        me = _whoami()
        owner, role = name.split("/")[0], me.get("auth", {}).get("accessToken", {}).get("role")
        orgs = {org["name"]: org.get("roleInOrg") for org in me.get("orgs", [])}
        if role == "read":
            raise ValueError(
                f"push={name}: the token may only read; make one that may write at {constants.ENDPOINT}/settings/tokens"
            )
        if role != "fineGrained" and owner != me["name"] and orgs.get(owner, "read") == "read":
            others = [me["name"], *(org for org, role in orgs.items() if role != "read")]
            raise ValueError(
                f"push={name}: {me['name']} may not write to {owner}; write to {' or '.join(others)}, or {LOGIN} as another"
            )
        try:
            found = HfApi().model_info(name)
        except errors.RepositoryNotFoundError:
            HfApi().create_repo(name, private=is_private, exist_ok=True)  # tells for sure whether the token may write there
            return
        if is_private and not found.private:
            raise ValueError(f"push={name}: exists and is public; set push_private=false, or make it private on its page")
        files = {file.rfilename for file in found.siblings or []} - EMPTY
        if not files or overwrite:
            return
        pushed = {}
        if SUMMARY in files:
            pushed = read_json(Path(HfApi().hf_hub_download(name, SUMMARY, revision=found.sha)), f"push={name}")
        if pushed.get("fingerprint") != fingerprint:
            raise ValueError(f"push={name}: holds another model; choose another name, or replace it with overwrite=true")


def push_model(folder: Path, name: str) -> None:
    """Upload the saved model in `folder` to a repository that `check_destination` accepted; what is there already is not sent again.

    Raises ValueError, one line, if the hub does not take it.
    """
    from huggingface_hub import HfApi, constants

    summary = read_json(folder / SUMMARY, f"push={name}")
    write_card(folder, summary, name)
    message = f"{summary['model']} pruned to {summary['sparsity']} by {summary['pruner']}"
    log.info("pushing %s to %s", folder, name)
    with _explained(name, f"; the model is in {folder}: run the same command again to push it"):
        stale = ["*.safetensors*", "*.bin*", "*.py", *SMALL_FILES]  # of an earlier model, which would be loaded with this one
        HfApi().upload_folder(repo_id=name, folder_path=folder, commit_message=message, delete_patterns=stale)
    log.info("pushed: %s/%s", constants.ENDPOINT, name)


@cache  # the hub answers this question a few times a minute only
def _whoami() -> dict[str, Any]:
    from huggingface_hub import HfApi

    return HfApi().whoami()


@contextmanager
def _explained(name: str, remedy: str = "") -> Iterator[None]:
    """Turn what the hub's library raises into one line."""
    from huggingface_hub import constants, errors

    try:
        yield
    except errors.LocalTokenNotFoundError as error:
        raise ValueError(f"push={name}: you are not logged in to the hub; {LOGIN}") from error
    except ValueError:
        raise
    except Exception as error:
        status = status_of(error)
        if status == 401:
            told = f"the hub refuses the token; {LOGIN}"
        elif status in (403, 404):
            told = f"the token may not write there ({line(error)}); make one that may at {constants.ENDPOINT}/settings/tokens"
        elif is_transient(error):
            told = f"the hub at {constants.ENDPOINT} cannot be reached ({line(error)}); try again later, or run without push"
        else:
            told = f"the hub did not take it ({line(error)})"
        raise ValueError(f"push={name}: {told}{remedy}") from error
