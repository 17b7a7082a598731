"""The artifact on the Hub: may it be pushed, push it, its model card. The only file that imports huggingface_hub."""

from __future__ import annotations

import hashlib
import logging
import re
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from hfcompress.checkpoint.checksums import check_checksums
from hfcompress.checkpoint.errors import CompressionError, shown, without_password
from hfcompress.results.card import card_for, recipe_for_others, report_for_others
from hfcompress.results.page import page_for
from hfcompress.results.saved_files import LOCAL_ONLY, WEIGHTS, other_files, saved_files

log = logging.getLogger("hfcompress")
TOKENS = "https://huggingface.co/settings/tokens"


# May we push?


def check_push(repo_id: str, token: str | None = None) -> None:
    """See, before anything is computed, that a push could succeed: the name, the token, its rights, the Hub.

    Raises `CompressionError`: a malformed `repo_id`; no token, one the Hub does not know, or one that may not write
    there; a Hub that can't be reached.
    """
    owner = _owner(repo_id)
    me = _whoami(repo_id, token)
    writable = _writable(me)
    if not writable:
        raise CompressionError(
            f"push to {repo_id!r}: the token of {me['name']!r} may only read; make one with write access at {TOKENS}, "
            "then run `hf auth login` or set HF_TOKEN."
        )
    if not {owner.lower(), repo_id.lower()} & {name.lower() for name in writable}:
        raise CompressionError(
            f"push to {repo_id!r}: the token of {me['name']!r} may not write to {owner!r}; "
            f"possible: {', '.join(writable)}; choose one of these, or log in with another token."
        )


def _owner(repo_id: str) -> str:
    try:
        validate_repo_id(repo_id)
        owner, _ = repo_id.split("/")
    except (HFValidationError, ValueError) as error:
        raise CompressionError(
            f"push to {repo_id!r}: this is no Hub repository; write OWNER/NAME, such as your-name/bert-small, with "
            "letters, digits, '-', '_' and '.', each at most 96 characters."
        ) from error
    return owner


def _whoami(repo_id: str, token: str | None) -> dict[str, Any]:
    where, login = f"push to {repo_id!r}", "run `hf auth login` or set HF_TOKEN to a token with write access"
    token = token or get_token()
    if token is None:
        raise CompressionError(f"{where}: no Hugging Face token was found; {login} ({TOKENS}).")
    # Sent as it is, such a token would come back in the HTTP library's complaint, in plain text.
    if not re.fullmatch(r"[!-~]+", token):
        raise CompressionError(f"{where}: the token holds a blank or another character no token has; {login}.")
    try:
        return HfApi(token=token).whoami()
    except OfflineModeIsEnabled as error:
        raise CompressionError(f"{where}: HF_HUB_OFFLINE is set; unset it, or leave the push out.") from _told(error)
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise CompressionError(f"{where}: the Hub does not accept the token; {login} ({TOKENS}).") from _told(error)
        raise CompressionError(f"{where}: {_reason(error)}; try again later, or leave the push out.") from _told(error)
    except Exception as error:  # the HTTP library's own, an answer that is no JSON: each means no Hub at this address
        raise CompressionError(
            f"{where}: the Hub at {constants.ENDPOINT} can't be reached ({type(error).__name__}); check the network "
            "and HF_ENDPOINT, or leave the push out."
        ) from _told(error)


def _writable(me: dict[str, Any]) -> list[str]:
    """The owners, and single repositories, that the token may write to."""
    token = me.get("auth", {}).get("accessToken", {})
    if token.get("role") == "read":
        return []
    # An organisation that does not tell our role is left in: the Hub has the last word, at the push.
    owners = [me["name"], *(org["name"] for org in me.get("orgs", []) if org.get("roleInOrg") != "read")]
    scopes = token.get("fineGrained", {}).get("scoped")
    if token.get("role") != "fineGrained" or scopes is None:
        return owners
    named = [scope.get("entity", {}).get("name") for scope in scopes if "repo.write" in scope.get("permissions", [])]
    return [name for name in named if name and name.split("/")[0] in owners]


# Push


def push(folder: str | Path, repo_id: str, private: bool = False, token: str | None = None) -> str:
    """Upload a saved model in one commit, creating the repository if needed, and return its address.

    Only the files of a saved model go up, and no link out of the folder is followed. Card, recipe and report name no path of
    this machine there, and the card's load snippet names the repository; nothing in the folder changes. Weight files of an
    earlier push that this model does not have are deleted in the same commit: `from_pretrained` might pick them.

    Raises `CompressionError`: weights that are not those that were saved, what `check_push` finds,
    `private` for a repository that is public, any failed upload.
    """
    folder = Path(folder)
    if not any((folder / name).is_file() for name in ("config.json", "exported.json")):
        raise CompressionError(f"push: {str(folder)!r} has no config.json; name the folder of a saved model.")
    _owner(repo_id)
    check_checksums(folder)
    uploads = _uploads(folder, repo_id)
    if others := other_files(folder):
        log.info("not pushed, as no part of a saved model: %s", shown(", ".join(others), 300)[1:-1])
    again = shlex.join(["hfcompress", "push", str(folder), repo_id] + ["--private"] * private)
    try:
        check_push(repo_id, token)
        return _upload(uploads, repo_id, private, token or get_token())
    except CompressionError as error:
        reason, cause = str(error).rstrip("."), error.__cause__
    except Exception as error:  # whatever broke, the user must hear that nothing is lost
        reason, cause = f"push to {repo_id!r}: {_reason(error)}", error
    raise CompressionError(f"{reason}; {str(folder)!r} is whole: push it again with `{again}`.") from _told(cause)


def is_pushed(folder: str | Path, repo_id: str, token: str | None = None) -> bool:
    """Whether the repository holds the weights and the config of this folder: one commit brings all files or none."""
    _owner(repo_id)
    uploads = {
        name: file for name, file in _uploads(Path(folder), repo_id).items() if name == "config.json" or _is_weight(name)
    }
    try:
        info = HfApi(token=token or get_token()).model_info(repo_id, files_metadata=True)
    except Exception:  # no such repository, or no Hub: a push will say which
        return False
    there = {file.rfilename: file.lfs.sha256 if file.lfs else file.blob_id for file in info.siblings or []}
    return all(there.get(name) in (_sha256(file), _git_blob(file)) for name, file in uploads.items())


def _is_weight(name: str) -> bool:
    return WEIGHTS.fullmatch(name.split("/")[-1]) is not None


def _sha256(file: Path | bytes) -> str:
    if isinstance(file, bytes):
        return hashlib.sha256(file).hexdigest()
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        for piece in iter(lambda: opened.read(2**22), b""):
            digest.update(piece)
    return digest.hexdigest()


def _git_blob(file: Path | bytes) -> str:
    """git's name of a file's content; what is large has none, as only a pointer to it is in git."""
    if isinstance(file, Path) and file.stat().st_size > 2**26:
        return ""
    content = file.read_bytes() if isinstance(file, Path) else file
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _uploads(folder: Path, repo_id: str) -> dict[str, Path | bytes]:
    """What goes up, by its name there: a file, or the bytes that stand for it."""
    found: dict[str, Path | bytes] = {name: path for name, path in saved_files(folder).items() if name not in LOCAL_ONLY}
    told: dict[str, Callable[[Path], bytes]] = {
        "recipe.yaml": recipe_for_others,
        "report.json": report_for_others,
        "README.md": partial(card_for, repo_id=repo_id),
        "report.html": partial(page_for, repo_id=repo_id),
    }
    return found | {name: told[name](folder / name) for name in told if name in found}


def _upload(uploads: dict[str, Path | bytes], repo_id: str, private: bool, token: str | None) -> str:
    api = HfApi(token=token)
    # None, not False: an organisation may make its repositories private by default.
    api.create_repo(repo_id, private=private or None, exist_ok=True)
    there = api.model_info(repo_id)
    if private and not there.private:
        raise CompressionError(
            f"push to {repo_id!r}: this repository exists and is public; "
            "make it private in its settings, or choose another name"
        )
    stale = {sibling.rfilename for sibling in there.siblings or []} - set(uploads)
    operations: list[Any] = [CommitOperationDelete(name) for name in sorted(stale) if WEIGHTS.fullmatch(name)]
    operations += [CommitOperationAdd(name, content) for name, content in uploads.items()]
    # Not upload_folder: with Xet it commits a large folder in parts, and a half-pushed model is one that loads wrongly.
    api.create_commit(repo_id, operations, commit_message="Compressed with hfcompress")
    return f"{without_password(api.endpoint)}/{repo_id}"


def _told(cause: BaseException | None) -> BaseException | None:
    """The cause, unless its own words may hold the password of HF_ENDPOINT."""
    return cause if without_password(constants.ENDPOINT) == constants.ENDPOINT else None


def _reason(error: BaseException) -> str:
    """What went wrong, without addresses: those of storage are signed."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__) is not None and cause not in chain:
        chain.append(cause)
    for link in chain:
        if isinstance(link, HfHubHTTPError):
            response = link.response
            said = f": {' '.join(link.server_message.split())}" if link.server_message else ""
            return f"the Hub answered {response.status_code} {response.reason_phrase}{said}".rstrip(".")
    if isinstance(error, ValueError | OSError) and str(error):
        return " ".join(str(error).split()).rstrip(".")
    return f"the upload broke off ({type(chain[-1]).__name__})"
