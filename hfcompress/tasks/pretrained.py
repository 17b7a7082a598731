"""Opening checkpoints (a folder, a Hub id, a GGUF file, a package:// address), or saying in one sentence why not."""

from __future__ import annotations

import copy
import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from hfcompress.calibration.processes import processes
from hfcompress.checkpoint.artifact import complete, forget_quantization
from hfcompress.checkpoint.errors import CompressionError, first_line
from hfcompress.export.served import Served, is_export
from hfcompress.layers.bnb_library import import_first
from hfcompress.tasks.data import resolve_address


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Errors only, no progress bars; as before afterwards. A new head is no news: the task asked for it."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def locate(path: str) -> tuple[str, dict[str, str]]:
    """What `from_pretrained` wants: a folder or Hub id and, for a GGUF file, its name as `gguf_file`."""
    place = Path(resolve_address(str(path))).expanduser()
    if place.is_dir():
        if not (place / "config.json").is_file():
            raise CompressionError(
                f"model {str(path)!r}: the folder has no config.json, so it holds no model; name a folder that"
                " save_pretrained wrote, a Hub id or a .gguf file."
            )
        return str(place), {}
    if place.is_file():
        if place.suffix != ".gguf":
            raise CompressionError(f"model {str(path)!r}: it is a file, but no .gguf file; name the folder it lies in.")
        return str(place.parent), {"gguf_file": place.name}
    owner, _, rest = str(path).partition("/")
    if place.suffix == ".gguf" and rest.count("/") == 1 and owner not in ("", ".", "..", "~"):
        return f"{owner}/{rest.split('/')[0]}", {"gguf_file": place.name}
    if owner in ("", ".", "..", "~") or "/" in rest or "\\" in str(path) or place.suffix == ".gguf":
        raise CompressionError(f"model {str(path)!r}: there is no such file or folder; check the path.")
    return str(path), {}


def load_config(path: str) -> PreTrainedConfig:
    """The config of a checkpoint. Raises `CompressionError`."""
    where, more = locate(path)
    with _explained(path, "config"), quiet_transformers():
        return AutoConfig.from_pretrained(where, **more)


def load_tokenizer(path: str, **kwargs: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint; it pads with the end-of-text token if it has no pad token."""
    where, more = locate(path)
    with _explained(path, "tokenizer"), quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(where, **more, **kwargs)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise CompressionError(f"model {str(path)!r}: its tokenizer has neither a pad nor an eos token; give it one.")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_fast_tokenizer(path: str, what: str, **kwargs: Any) -> Any:
    """The same, one of the fast ones, which alone tell `what`."""
    tokenizer: Any = load_tokenizer(path, **kwargs)
    if not tokenizer.is_fast:
        raise CompressionError(
            f"model {str(path)!r}: its tokenizer is written in Python and does not tell {what};"
            " choose a checkpoint with a fast tokenizer (tokenizer.json)."
        )
    return tokenizer


def load_image_processor(path: str) -> Any:
    """The image processor of a checkpoint; it works with Pillow where torchvision is not installed."""
    where, more = locate(path)
    if not find_spec("PIL"):
        raise CompressionError("task: images can't be read for want of Pillow; get it with: pip install pillow")
    with _explained(path, "image processor"), quiet_transformers():
        return AutoImageProcessor.from_pretrained(where, **more)


def open_model(
    path: str | Path,
    task: Any = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    *,
    config: PreTrainedConfig | None = None,
    new_head: bool = False,
    seed: int = 0,
    **kwargs: Any,
) -> Any:
    """The model of a checkpoint or an artifact, with its adapter if it has one, in eval mode: the one door for all models.

    `task`: a `Task`, whose labels the head then has, an Auto class or a model class; None: the class its config names.
    `device`: by default the accelerator, this process's own of several, else the CPU. `dtype`: by default the checkpoint's;
    float32 for GGUF files, which are dequantised. `kwargs` go to `from_pretrained`; a `device_map` among them decides where
    the model lies, in place of `device`. `config`: its `load_config`, if it is known. `new_head`: weights may be missing from
    the checkpoint, and `seed` decides what they are. The folder of an export opens as a `Served`. Raises `CompressionError`.
    """
    if hasattr(task, "load_model"):
        return task.load_model(str(path), device=device, dtype=dtype, **kwargs)
    where, gguf = locate(str(path))
    if is_export(where):
        with _explained(str(path), "export"):
            return Served(where)
    config = config or load_config(str(path))
    kind = _class_for(config, str(path), task)
    asked: dict[str, Any] = {"dtype": dtype or (torch.float32 if gguf else "auto"), **gguf}
    if gguf:
        asked["quantization_config"] = GgufConfig(**gguf, dequantize=True)
    place = place_for(device)
    if getattr(config, "quantization_config", None) is not None:
        import_first()
        if torch.accelerator.is_available():
            asked["device_map"] = {"": place}  # low-bit layers can't be moved later, and would go to the accelerator unasked
    with _explained(str(path), "weights"), quiet_transformers(), _quiet_bar(bool(gguf)), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, told = kind.from_pretrained(where, output_loading_info=True, **{**asked, **kwargs})
    # a pooler, which embeddings are not made of, is left out by some
    missing = sorted(key for key in told["missing_keys"] if kind is not AutoModel or not key.startswith("pooler."))
    if missing and not new_head:
        raise CompressionError(
            f"model {str(path)!r}: {len(missing)} of the weights {type(model).__name__} needs are not in the checkpoint"
            f" (the first is {missing[0]}); choose a checkpoint trained for {_head_of(kind)}."
        )
    if gguf:
        forget_quantization(model)  # a dequantised model is a plain one: it can be saved and trained
    complete(model, where, getattr(torch, dtype, None) if isinstance(dtype, str) else dtype)
    is_placed = {**asked, **kwargs}.get("device_map") is not None
    if not is_placed and not any(parameter.is_meta for parameter in model.parameters()):
        model.to(place)
    return model.eval()


def _class_for(config: PreTrainedConfig, path: str, task: Any) -> Any:
    """The class that loads it. CompressionError where the architecture has no such head."""
    if task is None:
        name = next(iter(config.architectures or ()), "")
        if not hasattr(transformers, name):
            raise CompressionError(
                f"model {path!r}: its config names no class of transformers ({name or 'it has no architectures'}); say"
                " what it is for with a task."
            )
        return getattr(transformers, name)
    # BERT has a causal head, but without is_decoder every token sees what it is to predict
    sees_all = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    known = getattr(task, "_model_mapping", None)
    if known is not None and (type(config) not in known or (task is AutoModelForCausalLM and sees_all)):
        raise CompressionError(
            f"model {path!r}: a {config.model_type} model has no head for {_head_of(task)}; choose another model or task."
        )
    return task


def _head_of(kind: Any) -> str:
    return kind.__name__.removeprefix("AutoModelFor")


def place_for(device: str | torch.device | None = None) -> torch.device:
    """The device that was asked for; else the accelerator, of several processes each one's own, where `accelerate launch` was
    not told to stay on the CPU."""
    if device is not None:
        return torch.device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or os.environ.get("ACCELERATE_USE_CPU"):
        return processes().device
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    return torch.device(torch.accelerator.current_accelerator().type, torch.accelerator.current_device_index())  # type: ignore[union-attr]


@contextmanager
def _quiet_bar(is_gguf: bool) -> Iterator[None]:
    """transformers' bar over the tensors of a GGUF file has no switch, but looks for stderr when it begins."""
    with redirect_stderr(io.StringIO()) if is_gguf else nullcontext():
        yield


def positions(config: PreTrainedConfig) -> int:
    """Tokens the model has positions for; 10**9 where its config tells no end.

    RoBERTa and its kin (CamemBERT, MPNet, Longformer, data2vec, ...) count from the pad token's id on, and the rows up to that
    are of no use: such models are told by a table of positions that has a padding row.
    """
    config = config.get_text_config()
    told = {"max_position_embeddings", *(name for name in vars(config) if re.fullmatch(r"max_\w+_position_embeddings", name))}
    ends = [end for end in (getattr(config, name, None) for name in told) if isinstance(end, int) and end > 0]
    if not ends:
        return 10**9
    blank = copy.deepcopy(config)
    vars(blank).pop("quantization_config", None)
    tables: list[Any] = []
    # an architecture that is built from nothing else than its own class tells no more than its config does
    with suppress(Exception), quiet_transformers(), torch.device("meta"):
        for name, module in AutoModel.from_config(blank).named_modules():
            tables += [module] if "position" in name.rpartition(".")[2] and hasattr(module, "weight") else []
    rows = [len(one.weight) - one.padding_idx - 1 for one in tables if isinstance(getattr(one, "padding_idx", None), int)]
    return min([*ends, *(count for count in rows if count > 0)])


def has_head(config: PreTrainedConfig, kind: str = "SequenceClassification") -> bool:
    """Whether the checkpoint was saved with a head of this kind."""
    return any(f"For{kind}" in name for name in config.architectures or ())


class Fit(NamedTuple):
    """For each of the data's labels its place in the head, the names in the head's order, and whether no name confirms it."""

    order: list[int]
    labels: tuple[str, ...]
    is_guess: bool


def fit_labels(names: tuple[str, ...], config: PreTrainedConfig) -> Fit | None:
    """How the data's labels fit a head; None if they don't.

    Names are compared without case. Numbers are places in the head, where it has no such names. Names beside a head without
    any (LABEL_0, LABEL_1, ...) can only be taken in their order.
    """
    theirs = head_labels(config)
    numbers = [_numbered(name) for name in names]
    if not _unnamed(theirs):
        places = {name.casefold(): index for index, name in enumerate(theirs)}
        for written in (names, [name if one is None else str(one) for name, one in zip(names, numbers, strict=True)]):
            if all(name.casefold() in places for name in written):
                return Fit([places[name.casefold()] for name in written], theirs, False)
    if all(one is not None and 0 <= one < len(theirs) for one in numbers):
        return Fit([int(one or 0) for one in numbers], theirs, 0 not in numbers)
    if _unnamed(theirs) and len(names) == len(theirs):
        return Fit(list(range(len(names))), names, True)
    return None


def _numbered(name: str) -> int | None:
    """3 for "3" and "LABEL_3"."""
    found = re.fullmatch(r"(?:LABEL_)?(-?\d{1,18})", name)
    return int(found[1]) if found else None


def head_labels(config: PreTrainedConfig) -> tuple[str, ...]:
    """The names of the labels in the order of the logits."""
    return tuple(str(name) for _, name in sorted((config.id2label or {}).items()))


def _unnamed(names: tuple[str, ...]) -> bool:
    return names == tuple(f"LABEL_{index}" for index in range(len(names)))


@contextmanager
def _explained(path: str, what: str) -> Iterator[None]:
    try:
        yield
    except CompressionError:
        raise
    except Exception as error:  # transformers, huggingface_hub, safetensors, httpx: all have errors of their own here
        if Path(resolve_address(str(path))).expanduser().exists():
            hint = "mend or choose another checkpoint"
        else:
            hint = "it is no folder here, so the Hub was asked: check the name, log in if it is gated, or go online"
        raise CompressionError(f"model {str(path)!r}: its {what} can't be loaded ({first_line(error)}); {hint}.") from error
