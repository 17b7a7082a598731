"""Teachers of knowledge distillation: loaded, frozen, and checked that they answer the same question as the student."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers.integrations import is_deepspeed_zero3_enabled

from hfcompress.checkpoint.errors import CompressionError, shown
from hfcompress.distillation.predictions import by_name, config_of, is_encoder_decoder
from hfcompress.layers.bitsandbytes import coded
from hfcompress.surgery.modules import copied, swap
from hfcompress.surgery.targets import codable

log = logging.getLogger("hfcompress")
ORIGINAL, CURRENT = "original", "current"


class Teacher:
    """A frozen model in eval mode, outside the student's module tree, and how its classes map to the student's."""

    def __init__(self, model: Any, columns: Tensor | None) -> None:
        self.model, self.columns = model.eval().requires_grad_(False), columns
        self._accepted = set(inspect.signature(model.forward).parameters)
        self._placed: torch.device | None = None

    def __call__(self, inputs: dict[str, Any], device: torch.device, **asked: bool) -> Any:
        """Its output for a student's inputs, with the classes of `logits` in the student's order."""
        if self._placed != device:
            if next(self.model.parameters()).device != device:
                self.model.to(device)
            self._placed = device
        self.model.eval()  # whoever holds it too may have set it to train
        # An encoder-decoder makes its decoder's inputs of the labels; others would only compute a loss in vain.
        needs_labels = is_encoder_decoder(self.model) and "decoder_input_ids" not in inputs
        dropped = {"num_items_in_batch", "shift_labels", "start_positions", "end_positions"}
        dropped |= set() if needs_labels else {"labels"}
        given = {name: self._cast(value) for name, value in inputs.items() if name not in dropped and self._knows(name)}
        if not getattr(config_of(self.model), "return_dict", True):
            given["return_dict"] = True
        if "use_cache" in self._accepted:
            given["use_cache"] = False
        if not given:
            raise CompressionError(
                f"distill: the teacher's {type(self.model).__name__}.forward takes {', '.join(sorted(self._accepted))}, "
                f"and the student was given {', '.join(inputs)}; name its arguments as the student's."
            )
        with torch.no_grad():
            output = by_name(self.model(**given, **asked))
        if self.columns is not None:
            output.logits = output.logits[..., self.columns.to(output.logits.device)]
        return output

    def _cast(self, value: Any) -> Any:
        """Sounds and images come at the student's precision, which may be another one."""
        dtype = getattr(self.model, "dtype", None)
        is_real = isinstance(value, Tensor) and value.is_floating_point() and dtype is not None and dtype.is_floating_point
        return value.to(dtype) if is_real else value

    def _knows(self, name: str) -> bool:
        return name in self._accepted or self._accepted <= {"args", "kwargs", "self"}


def find(asked: Any, model: Any, task: Any, bits: int | None) -> nn.Module:
    """The model that `teacher: ...` means."""
    if isinstance(asked, nn.Module):
        if asked is model:
            raise CompressionError(
                "distill: the teacher is the student itself, which would be frozen; give 'original' for a copy of it."
            )
        if bits:
            raise CompressionError(
                "distill: teacher_bits would change your own teacher object; quantise it yourself, or name it by its path."
            )
        return _filled(asked)
    found: Any
    if asked == CURRENT:
        if isinstance(model, FSDPModule):
            raise CompressionError("distill: FSDP holds the student in pieces, and 'current' would copy them; give 'original'.")
        found = copied(model)
    elif asked == ORIGINAL:
        # the drivers keep it, before any method has touched the model
        found = copied(task.original) if bits else task.original
    else:
        found = _load(asked, model, task)
    _filled(found)
    if bits:
        for name in codable(found, bits):
            swap(found, name, coded(found.get_submodule(name), bits))
    return found


def _filled(teacher: nn.Module) -> nn.Module:
    if any(parameter.is_meta for parameter in teacher.parameters()):
        raise CompressionError(
            "distill: only the first process holds the teacher's weights; set fsdp_cpu_ram_efficient_loading to false "
            "(accelerate's config) or cpu_ram_efficient_loading (fsdp_config)."
        )
    return teacher


def _load(path: str, model: Any, task: Any) -> nn.Module:
    if is_deepspeed_zero3_enabled():
        raise CompressionError(
            f"distill: under DeepSpeed's stage 3 the teacher {path!r} would be loaded in pieces that only an optimizer's "
            f"engine puts together; use stage 2, or FSDP."
        )
    from hfcompress.tasks.pretrained import open_model  # here, as importing datasets takes its time

    if hasattr(task, "load_model"):
        return open_model(path, task)
    name = type(unwrapped(model)).__name__
    head = name.rpartition("For")[2] if "For" in name else "CausalLM"
    if head == "ConditionalGeneration" and model.config.is_encoder_decoder:
        head = "SpeechSeq2Seq" if model.main_input_name == "input_features" else "Seq2SeqLM"
    auto = getattr(transformers, f"AutoModelFor{head}", transformers.AutoModelForCausalLM)
    try:
        return open_model(path, auto)
    except CompressionError as error:
        raise CompressionError(
            f"distill: teacher {path!r} can't be loaded: {str(error).rstrip('.')}; "
            f"give 'original', a folder, a Hub id or a model."
        ) from error


def unwrapped(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def fitting(model: Any, teacher: Any, asked: Any, processor: Any) -> Tensor | None:
    """The teacher's classes in the student's order, or None if they already are. CompressionError if they answer another
    question: other labels, another vocabulary, another tokenizer."""
    if hasattr(processor, "get_vocab"):
        _check_tokenizer(asked, processor)
    name, kept = type(unwrapped(model)).__name__, getattr(unwrapped(model), "kept_tokens", None)
    mine, theirs = (getattr(config_of(one), "vocab_size", None) for one in (model, teacher))
    if kept and mine != theirs:
        raise CompressionError(
            f"distill: prune_vocab left the student {mine} tokens, under other ids than the teacher's {theirs}; give "
            f"'original', or cut the teacher too: keep_tokens(teacher, student.kept_tokens)."
        )
    # Vocabularies are padded to round sizes: a token that no text has may be missing.
    padded = theirs is not None and hasattr(processor, "get_vocab") and len(processor) <= theirs
    if mine and theirs and theirs < mine and not padded:
        raise CompressionError(
            f"distill: the teacher's vocabulary has {theirs} tokens and the student's {mine}; "
            f"take a teacher with the same tokenizer."
        )
    if _is_classifier(model) and hasattr(config_of(teacher), "id2label"):
        return _labels(model, teacher)
    if name.endswith("QuestionAnswering") or mine is None or theirs is None or theirs <= mine:
        return None
    return torch.arange(mine)


def _labels(model: Any, teacher: Any) -> Tensor | None:
    """The teacher's classes in the student's order, by their names, upper and lower case being one where that is unique. A
    model whose classes have no names (LABEL_0, or 0, for the first) has them in the order of the other."""
    mine, theirs = _names(model.config), _names(teacher.config)
    if set(mine) != set(theirs) and len(mine) == len(theirs):
        if _are_default(mine) or _are_default(theirs):
            log.info("distill: %s names no labels, which are taken in the student's order", _unnamed(theirs))
            return None
        plain = [{name.casefold(): number for name, number in names.items()} for names in (mine, theirs)]
        if len(plain[0]) == len(plain[1]) == len(mine):
            mine, theirs = plain
    if set(mine) != set(theirs):
        raise CompressionError(
            f"distill: the teacher's labels {shown(sorted(theirs))} are not the student's {shown(sorted(mine))}; "
            f"take a teacher that was trained on the same labels."
        )
    columns = torch.tensor([theirs[label] for label in sorted(mine, key=mine.__getitem__)])
    return None if columns.tolist() == list(range(len(columns))) else columns


def _unnamed(theirs: dict[str, int]) -> str:
    return "the teacher" if _are_default(theirs) else "the student"


def _are_default(names: dict[str, int]) -> bool:
    """Whether classes are called what transformers calls them that nobody named, or by their numbers."""
    return all(name in (f"LABEL_{number}", str(number)) for name, number in names.items())


def labels_of(model: Any) -> list[str] | None:
    """The classes of a classifier, in their order."""
    if not _is_classifier(model):
        return None
    names = _names(model.config)
    return sorted(names, key=names.__getitem__)


def _is_classifier(model: Any) -> bool:
    return type(unwrapped(model)).__name__.endswith("Classification") and hasattr(config_of(model), "id2label")


def _names(config: Any) -> dict[str, int]:
    # Either may be unset, or be the default beside the other; id2label is what a class is called by.
    default = {f"LABEL_{number}": number for number in range(config.num_labels)}
    names = {str(name): int(number) for number, name in (config.id2label or {}).items()}
    names = names if names and names != default else config.label2id or default
    return {str(name): int(number) for name, number in names.items()}


def _check_tokenizer(asked: Any, processor: Any) -> None:
    if not isinstance(asked, str) or asked in (ORIGINAL, CURRENT):
        return
    try:
        other = transformers.AutoTokenizer.from_pretrained(asked)
    except (OSError, ValueError, KeyError):
        return  # a checkpoint without a tokenizer: the sizes of the vocabularies are all there is to compare
    mine, theirs = processor.get_vocab(), other.get_vocab()
    token = next((token for token, index in mine.items() if theirs.get(token) != index), None)
    if token is not None:
        there = f"is {theirs[token]}" if token in theirs else "is unknown"
        raise CompressionError(
            f"distill: the teacher {asked!r} has another tokenizer: {token!r} is {mine[token]} here and {there} there; "
            f"take a teacher with the same tokenizer."
        )
