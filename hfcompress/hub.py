"""The artifact on the Hub: may it be pushed, push it, its model card. The only file that imports huggingface_hub."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterator
from numbers import Real
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    EvalResult,
    HfApi,
    ModelCard,
    ModelCardData,
    constants,
    get_token,
)
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects, validate_repo_id

from hfcompress.errors import CompressionError
from hfcompress.snippet import SNIPPET_END, SNIPPET_START, fenced, load_section

WORK_FILES = ["*.partial*", "checkpoint-*", "*/checkpoint-*"]
TOKENS = "https://huggingface.co/settings/tokens"
TIMEOUT = 10  # seconds to wait for what a card can do without
# Where a task of ours and the Hub's pipeline differ in name; None where the Hub has several, and the task can't tell which.
PIPELINES = {"causal-lm": "text-generation", "masked-lm": "fill-mask", "seq2seq-lm": None}
TAGS = {
    "distill": "distillation",
    "prune_heads": "pruning",
    "prune_neurons": "pruning",
    "prune_weights": "pruning",
    "low_rank": "low-rank",
    "adapters": "lora",
    "quantize": "quantization",
}


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
        raise CompressionError(f"{where}: HF_HUB_OFFLINE is set; unset it, or leave the push out.") from error
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise CompressionError(f"{where}: the Hub does not accept the token; {login} ({TOKENS}).") from error
        raise CompressionError(f"{where}: {_reason(error)}; try again later, or leave the push out.") from error
    except Exception as error:  # the HTTP library's own, an answer that is no JSON: each means no Hub at this address
        raise CompressionError(
            f"{where}: the Hub at {constants.ENDPOINT} can't be reached ({type(error).__name__}); check the network "
            "and HF_ENDPOINT, or leave the push out."
        ) from error


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

    The card's load snippet names the repository there; nothing in the folder changes. Weight files of an earlier push
    that this model does not have are deleted in the same commit: `from_pretrained` might pick them.

    Raises `CompressionError`: what `check_push` finds, `private` for a repository that is public, any failed upload.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise CompressionError(f"push: {str(folder)!r} has no config.json; name the folder of a saved model.")
    _owner(repo_id)
    again = shlex.join(["hfcompress", "push", str(folder), repo_id] + ["--private"] * private)
    try:
        check_push(repo_id, token)
        return _upload(folder, repo_id, private, token or get_token())
    except CompressionError as error:
        reason, cause = str(error).rstrip("."), error.__cause__
    except Exception as error:  # whatever broke, the user must hear that nothing is lost
        reason, cause = f"push to {repo_id!r}: {_reason(error)}", error
    raise CompressionError(f"{reason}; {str(folder)!r} is whole: push it again with `{again}`.") from cause


def _upload(folder: Path, repo_id: str, private: bool, token: str | None) -> str:
    api = HfApi(token=token)
    # None, not False: an organisation may make its repositories private by default.
    api.create_repo(repo_id, private=private or None, exist_ok=True)
    there = api.model_info(repo_id)
    if private and not there.private:
        raise CompressionError(
            f"push to {repo_id!r}: this repository exists and is public; "
            "make it private in its settings, or choose another name"
        )
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    names = list(filter_repo_objects(files, ignore_patterns=[*DEFAULT_IGNORE_PATTERNS, *WORK_FILES]))
    stale = {sibling.rfilename for sibling in there.siblings or []} - set(names)
    operations: list[Any] = [
        CommitOperationDelete(name)
        for name in sorted(stale)
        if re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?", name)
    ]
    for name in names:
        content = _card_for(files[name], repo_id) if name == "README.md" else files[name]
        operations.append(CommitOperationAdd(name, content))
    # Not upload_folder: with Xet it commits a large folder in parts, and a half-pushed model is one that loads wrongly.
    api.create_commit(repo_id, operations, commit_message="Compressed with hfcompress")
    return f"{api.endpoint}/{repo_id}"


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


def _card_for(path: Path, repo_id: str) -> bytes:
    """The card as the Hub shall show it: title, name and snippet say `repo_id`. Any other card stays as it is."""
    if SNIPPET_START not in path.read_text(encoding="utf-8"):
        return path.read_bytes()
    card, name = ModelCard.load(path), repo_id.split("/")[1]
    if card.data.eval_results:
        card.data.model_name = name
    section = load_section(path.parent, repo_id)
    text = re.sub(rf"{SNIPPET_START}.*?{SNIPPET_END}", lambda _: section, card.text, count=1, flags=re.S)
    card.text = re.sub(r"^# .*$", f"# {name}", text, count=1, flags=re.M)
    return str(card).encode()


# The model card


def write_card(
    folder: str | Path,
    *,
    base_model: str,
    report: Any,
    recipe_text: str,
    task: Any,
    license: str | None = None,
    repo_id: str | None = None,
    structure: dict[str, Any] | None = None,
) -> None:
    """Write README.md, the model card, into the folder of a saved model (config.json must be there).

    `report`: rows (step, score, megabytes, parameters), reference, markdown(), to_dict(). `task`: its name, an object
    or a dict with name and dataset. Without `license` the base model's card is asked; what can't be known is left out.
    """
    folder = Path(folder)
    # A model is written inside NAME.partial and moved when it is whole; the card names the place it will have.
    place = repo_id or re.sub(r"\.partial(/.*)?$", "", folder.as_posix())
    name = place.rstrip("/").split("/")[-1]
    words = set(_words(yaml.safe_load(recipe_text)))
    data = _metadata(name, base_model, task, license, words, report.rows[-1].score or {})
    body = [
        f"# {name}",
        _summary(base_model, report),
        load_section(folder, place),
        "## What was done",
        "\n".join(f"{number}. {row.step}" for number, row in enumerate(report.rows[1:], start=1)) or "Nothing yet.",
        "## Measured",
        report.markdown().strip(),
        _machine(report.to_dict().get("machine")),
        "## Recipe",
        "Run it again with `hfcompress run recipe.yaml`.",
        fenced("yaml", recipe_text.strip()),
    ]
    if structure:
        told = fenced("json", json.dumps(structure, sort_keys=True))
        body += ["## Structure", "How the model differs from what its config alone describes.", told]
    text = "\n\n".join(part for part in body if part)
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n").save(folder / "README.md")


def _metadata(
    name: str, base_model: str, task: Any, license: str | None, words: set[str], score: dict[str, Any]
) -> ModelCardData:
    hub_base = base_model if _is_hub_id(base_model) else None
    named = task if isinstance(task, str) else _field(task, "name")
    pipeline = PIPELINES.get(named or "", named)
    dataset, config = _dataset(_field(task, "dataset"))
    shown = _shown(_field(task, "dataset")) or "evaluation data"
    fields: dict[str, Any] = {"license": license} if license else _license_of(base_model)
    if hub_base:
        fields |= {"base_model": hub_base, "base_model_relation": "quantized" if "quantize" in words else "finetune"}
    results = [
        EvalResult(
            task_type=pipeline or "other",
            dataset_type=dataset or shown,
            dataset_name=shown,
            dataset_config=config,
            metric_type=metric,
            metric_value=float(value),
        )
        for metric, value in score.items()
        # The Hub refuses a card with NaN in it, and with the card the whole push.
        if isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    ]
    return ModelCardData(
        library_name="transformers",
        tags=["hfcompress", "compression", *dict.fromkeys(tag for word, tag in TAGS.items() if word in words)],
        pipeline_tag=pipeline,
        datasets=[dataset] if dataset else None,
        model_name=name if results else None,
        eval_results=results or None,
        **fields,
    )


def _summary(base_model: str, report: Any) -> str:
    before, after = report.rows[report.reference], report.rows[-1]
    base = f"[{base_model}](https://huggingface.co/{base_model})" if _is_hub_id(base_model) else f"`{_shown(base_model)}`"
    return (
        f"{base}, compressed with `hfcompress`: {_number(after.parameters / 1e6)} M parameters, were "
        f"{_number(before.parameters / 1e6)} M; {_number(after.megabytes)} MB, were {_number(before.megabytes)} MB."
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _machine(machine: Any) -> str:
    if isinstance(machine, dict):
        told = {key: " ".join(map(str, value)) if isinstance(value, list) else value for key, value in machine.items()}
        machine = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in told.items())
    return f"Measured on: {machine}." if machine else ""


def _words(tree: Any) -> Iterator[str]:
    """Every key of a recipe, and every step written without settings."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield str(key)
            yield from _words(value)
    elif isinstance(tree, list):
        for part in tree:
            yield from [part] if isinstance(part, str) else _words(part)


def _field(task: Any, name: str) -> str | None:
    value = task.get(name) if isinstance(task, dict) else getattr(task, name, None)
    return value if isinstance(value, str) and value else None


def _is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def _shown(address: str | None) -> str:
    """How a card names a model or data set: as it is, but of a path on this machine only its last part."""
    if not address or "://" in address or _is_hub_id(address):
        return (address or "").split("://")[-1]
    return Path(address).name


def _license_of(base_model: str) -> dict[str, Any]:
    """The licence fields of the base model's card, if it has one and it can be read."""
    try:
        path = Path(base_model) / "README.md"
        if path.is_file():
            data: Any = ModelCard.load(path).data
        elif _is_hub_id(base_model):
            data = HfApi().model_info(base_model, timeout=TIMEOUT).card_data
        else:
            return {}
    except Exception:  # no Hub, no such model, a card with a mistake: the licence is not known
        return {}
    fields = {key: getattr(data, key, None) for key in ("license", "license_name", "license_link")}
    return {key: value for key, value in fields.items() if value}


def _dataset(address: str | None) -> tuple[str | None, str | None]:
    """The Hub's id and the configuration; only the Hub can tell `glue/sst2` (both) from `stanfordnlp/sst2` (an id)."""
    if not address or "://" in address or not _is_hub_id(address):
        return None, None
    owner, _, config = address.partition("/")
    for name, rest in [(address, None), (owner, config)]:
        try:
            return HfApi().dataset_info(name, timeout=TIMEOUT).id, rest or None
        except HfHubHTTPError:
            continue
        except Exception:  # no Hub: left out rather than guessed
            break
    return None, None
