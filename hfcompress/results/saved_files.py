"""Which files of a folder are a saved model: what transformers and hfcompress write, and nothing that merely lies beside it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import transformers

from hfcompress.checkpoint.errors import CompressionError, shown

NAMES = (
    "config.json generation_config.json chat_template.jinja chat_template.json tokenizer.json tokenizer_config.json "
    "special_tokens_map.json added_tokens.json preprocessor_config.json processor_config.json video_preprocessor_config.json "
    "audio_tokenizer_config.json checksums.json README.md recipe.yaml report.json report.html report.md "
    "report.png layers.png inputs.json "
    "adapter/adapter_config.json adapter/adapter_model.safetensors adapter/README.md "
    "modules.json sentence_bert_config.json config_sentence_transformers.json"
)
PATTERNS = (
    r"(model|adapter/adapter_model)(-\d+-of-\d+)?\.safetensors(\.index\.json)?",
    r"additional_chat_templates/[\w-]+\.jinja",
    r"((openvino|onnx|executorch|gguf)(-int8)?/)?(exported\.json|export\.json|openvino_\w+\.(xml|bin)|\w+\.(onnx|onnx\.data|pte|gguf)|Modelfile)",
    r"(openvino|onnx|executorch|gguf)(-int8)?/(checksums|config|generation_config|tokenizer|tokenizer_config|preprocessor_config)\.json",
    r"(openvino|onnx|executorch)(-int8)?/(sentence_bert_config|config_sentence_transformers)\.json",
    r"(openvino|onnx|executorch|gguf)(-int8)?/(README\.md|recipe\.yaml|chat_template\.jinja|vocab\.\w+|merges\.txt|\w+\.model)",
    r"\d+_\w+/(config\.json|model\.safetensors)",  # the pooling and dense modules of sentence-transformers
)
WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
LOCAL_ONLY = frozenset({"inputs.json"})
"""Written for resuming on this machine; nobody else needs it."""


def saved_files(folder: Path) -> dict[str, Path]:
    """The files of a saved model by their names in it, sorted. CompressionError for one that is a link out of the folder."""
    names = {*NAMES.split(), *_vocabulary(folder)}
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_symlink() or path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name in names or any(re.fullmatch(pattern, name) for pattern in PATTERNS):
            if not path.resolve().is_relative_to(folder.resolve()):
                raise CompressionError(
                    f"{shown(str(folder), 200)}: {name} is a link out of the folder, and nothing from outside it is taken; "
                    f"put the file itself there."
                )
            found[name] = path
    return found


def other_files(folder: Path) -> list[str]:
    """What else lies in the folder, links and empty folders included."""
    ours = saved_files(folder)
    above = {parent.as_posix() for name in ours for parent in Path(name).parents}
    names = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")))
    return [name for name in names if name not in ours and name not in above]


def missing_files(folder: Path) -> list[str]:
    """What a saved model can't do without, and the folder does not hold."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            weights = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError):
            return [index.name]
    else:
        weights = {"model.safetensors"}
    return [name for name in ("config.json", *sorted(map(str, weights))) if not (folder / name).is_file()]


def _vocabulary(folder: Path) -> set[str]:
    """The files of this very tokenizer: their names are the class's own (vocab.txt, spiece.model, source.spm, ...)."""
    names = {"vocab.json", "vocab.txt", "merges.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model"}
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        own = getattr(transformers, config["tokenizer_class"]).vocab_files_names.values()
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return names
    return names | {name for name in own if isinstance(name, str)}
