"""What sentence-transformers does after an encoder (pooling, dense layers, normalisation), beside a transformers model.

The model itself stays a plain encoder, which every method knows; the head is a forward hook that puts the embeddings into its
output as `logits`, and files that are saved with it, so that `SentenceTransformer(folder)` opens what was saved.
"""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput, cached_file

from hfcompress.checkpoint.errors import CompressionError, first_line, shown
from hfcompress.checkpoint.quantizer import MODULES

SETTINGS = ("sentence_bert_config.json", "config_sentence_transformers.json")
OWN = "sentence_transformers."
"""Where the classes of modules come from; others would be code of whoever wrote the checkpoint."""


@dataclass
class SentenceOutput(ModelOutput):
    """What an encoder says, with the embeddings, (batch, width) float32, and room for a loss."""

    loss: Tensor | None = None
    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    logits: Tensor | None = None


class SentenceHead:
    """The modules after the encoder, frozen, and the settings that stand beside them."""

    def __init__(self, modules: dict[str, nn.Module], settings: dict[str, dict[str, Any]]) -> None:
        self.modules = {name: module.eval().requires_grad_(False) for name, module in modules.items()}
        self.settings = settings

    @property
    def max_length(self) -> int | None:
        """Tokens that a text is cut to; None where the tokenizer alone says it."""
        found = self.settings.get(SETTINGS[0], {}).get("max_seq_length")
        return found if isinstance(found, int) and found > 0 else None

    def written(self, text: str) -> str:
        """A text as sentence-transformers hands it to the tokenizer, with the prompt that it puts before each."""
        told = self.settings.get(SETTINGS[1], {})
        prompts = told.get("prompts")
        text = f"{prompts.get(told.get('default_prompt_name')) or ''}{text}" if isinstance(prompts, dict) else text
        return text.lower() if self.settings.get(SETTINGS[0], {}).get("do_lower_case") else text

    def attach(self, model: nn.Module) -> None:
        """Have the model answer with embeddings, (batch, width) float32, as `logits`, beside what it answers anyway."""
        model.register_forward_hook(self, with_kwargs=True)

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not isinstance(output, ModelOutput):
            return output  # a tuple was asked for
        names = inspect.signature(model.forward).parameters if args else ()  # most give it by name
        mask = {**dict(zip(names, args, strict=False)), **kwargs}.get("attention_mask")
        states = output["last_hidden_state"].float()
        if mask is None:
            mask = torch.ones(states.shape[:2], dtype=torch.long, device=states.device)
        found: dict[str, Any] = {"token_embeddings": states, "attention_mask": mask}
        if output.get("hidden_states") is not None:
            found["all_layer_embeddings"] = output["hidden_states"]
        for module in self.modules.values():
            found = module.to(states.device)(found)
        kept = {field.name: output[field.name] for field in fields(SentenceOutput) if field.name in output}
        return SentenceOutput(**kept, logits=found["sentence_embedding"])

    def tensors(self) -> dict[str, Tensor]:
        """The weights of its modules."""
        return {f"{place}.{name}": one for place, module in self.modules.items() for name, one in module.state_dict().items()}

    def save(self, folder: Path) -> None:
        """Write the modules and what `SentenceTransformer(folder)` wants to know of them."""
        listed = [_line(0, "", "sentence_transformers.models.Transformer")]
        for number, (name, module) in enumerate(self.modules.items(), start=1):
            (folder / name).mkdir(parents=True, exist_ok=True)
            module.save(str(folder / name))  # type: ignore[operator]
            listed.append(_line(number, name, f"{type(module).__module__}.{type(module).__name__}"))
        (folder / MODULES).write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")
        self.save_settings(folder)

    def save_settings(self, folder: Path) -> None:
        """Write what is done to texts before they are tokens."""
        for name, told in self.settings.items():
            (folder / name).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def sentence_head_of(model: Any) -> SentenceHead | None:
    """The head that was attached to a model, or to the one inside a PEFT wrapper."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    hooks = getattr(model, "_forward_hooks", {}).values()
    return next((hook for hook in hooks if isinstance(hook, SentenceHead)), None)


def read_sentence_head(path: str, width: int) -> SentenceHead:
    """Of a checkpoint of sentence-transformers, a folder or a Hub id; else, as there, the mean of hidden states, of
    this width. CompressionError for modules of another kind."""
    if not find_spec("sentence_transformers"):
        raise CompressionError(
            "task: sentence-embeddings needs sentence-transformers; get it with: pip install 'hfcompress[sentences]'"
        )
    listed = _read(path, MODULES)
    settings = {name: told for name in SETTINGS if isinstance(told := _read(path, name), dict)}
    if listed is None:
        from sentence_transformers.sentence_transformer.modules import Pooling

        return SentenceHead({"1_Pooling": Pooling(width, "mean")}, settings)
    modules: dict[str, nn.Module] = {}
    for told in listed if isinstance(listed, list) else []:
        if isinstance(told, dict) and told.get("path"):  # the encoder itself lies in the folder
            modules[str(told["path"])] = _module(path, told)
    if not modules:
        raise CompressionError(
            f"model {path!r}: its {MODULES} names no module after an encoder at the top of the folder; save it anew with "
            f"sentence-transformers, whose newer versions put the encoder there."
        )
    head = SentenceHead(modules, settings)
    if head.written("") and not all(getattr(module, "include_prompt", True) for module in modules.values()):
        raise CompressionError(
            f"model {path!r}: its pooling leaves out the tokens of its default prompt, which is not done here; choose another "
            f"checkpoint, or take default_prompt_name out of its {SETTINGS[1]}."
        )
    return head


def _line(number: int, path: str, kind: str) -> dict[str, Any]:
    return {"idx": number, "name": str(number), "path": path, "type": kind}


def _module(path: str, told: dict[str, Any]) -> nn.Module:
    from sentence_transformers.util import import_from_string

    kind = str(told.get("type"))
    if not kind.startswith(OWN):
        raise CompressionError(
            f"model {path!r}: its module {shown(told['path'])} is a {shown(kind)}, code that comes with the checkpoint; "
            f"possible are the modules of sentence-transformers itself."
        )
    try:
        module: Any = import_from_string(kind)
        return module.load(path, subfolder=told["path"])  # type: ignore[no-any-return]
    except Exception as error:  # its own, safetensors' and huggingface_hub's
        raise CompressionError(
            f"model {path!r}: its module {shown(told['path'])} can't be read ({shown(first_line(error))}); mend or choose "
            f"another checkpoint."
        ) from error


def _read(path: str, name: str) -> Any:
    """A json file of a checkpoint; None if it has none."""
    file = cached_file(path, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False)
    try:
        return None if file is None else json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise CompressionError(f"model {path!r}: its {name} is no JSON ({shown(first_line(error))}); mend it.") from error
