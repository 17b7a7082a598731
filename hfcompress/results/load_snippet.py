"""How to load a saved model: the code a model card shows, read off the folder itself."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto import modeling_auto

from hfcompress.checkpoint.errors import INSTALL
from hfcompress.checkpoint.quantizer import MODULES
from hfcompress.checkpoint.structure import PACKED

SNIPPET_START, SNIPPET_END = "<!-- hfcompress: how to load -->", "<!-- hfcompress: end -->"


def load_section(folder: Path, name: str) -> str:
    """The part of a model card that loads this very folder, as `name`: a repository, or a path."""
    code, packages = load_code(folder, name)
    parts = [SNIPPET_START, "## Load it", fenced("python", code)]
    if others := [package for package in packages if package != "hfcompress"]:
        parts.append(f"It needs `pip install {' '.join(others)}`.")
    if "hfcompress" in packages:
        parts.append(f"It needs hfcompress, which {INSTALL}.")
    return "\n\n".join([*parts, SNIPPET_END])


def load_code(folder: Path, name: str) -> tuple[str, list[str]]:
    """Python that loads the folder, as `name`, and the packages it needs beside transformers."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    stored = config.get("quantization_config") or {}
    method = stored.get("quant_method")
    auto = auto_class(config)
    loaders = {"model": auto} | _preprocessors(folder)
    with_adapter = (folder / "adapter" / "adapter_config.json").is_file()
    cache, embeds = _cache_backend(folder), (folder / MODULES).is_file()
    packages = [
        package
        for package, needed in (
            ("hfcompress", method == "hfcompress"),
            ("constriction", stored.get("storage") == PACKED),
            ("bitsandbytes", method == "bitsandbytes"),
            ("peft", with_adapter),
            ("optimum-quanto", cache == "quanto"),
            ("hqq", cache == "hqq"),
            ("sentence-transformers", embeds),
        )
        if needed
    ]
    quoted = json.dumps(name, ensure_ascii=False)
    code = ["import hfcompress  # teaches transformers to load it"] if method == "hfcompress" else []
    if embeds:
        code += ["from sentence_transformers import SentenceTransformer", "", f"model = SentenceTransformer({quoted})"]
        if with_adapter:
            code.append(f'model[0].model.load_adapter({quoted}, adapter_kwargs={{"subfolder": "adapter"}})')
        return "\n".join([*code, 'embeddings = model.encode(["a text", "another text"])']), packages
    code += [f"from transformers import {', '.join(sorted(set(loaders.values())))}", ""]
    code += [f"{variable} = {loader}.from_pretrained({quoted})" for variable, loader in loaders.items()]
    if with_adapter:
        code.append(f'model.load_adapter({quoted}, adapter_kwargs={{"subfolder": "adapter"}})')
    return "\n".join(code), packages


def _cache_backend(folder: Path) -> str | None:
    """Who quantises the cache of generation, where the folder asks for that; its package is needed to generate."""
    path = folder / "generation_config.json"
    asked = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    is_quantised = asked.get("cache_implementation") == "quantized"
    return (asked.get("cache_config") or {}).get("backend", "quanto") if is_quantised else None


def _preprocessors(folder: Path) -> dict[str, str]:
    if (folder / "processor_config.json").is_file():
        return {"processor": "AutoProcessor"}
    found = {"tokenizer": "AutoTokenizer"} if (folder / "tokenizer_config.json").is_file() else {}
    path = folder / "preprocessor_config.json"
    if path.is_file():
        kind = "Feature" if "feature_extractor_type" in json.loads(path.read_text(encoding="utf-8")) else "Image"
        found |= {"processor": "AutoFeatureExtractor" if kind == "Feature" else "AutoImageProcessor"}
    return found


def auto_class(config: dict[str, Any]) -> str:
    """The Auto class that gives `architectures[0]`; of several, the one users know it by."""
    architecture = (config.get("architectures") or [""])[0]
    found = []
    for name, auto in vars(modeling_auto).items():
        if name.startswith("AutoModel") and hasattr(transformers, name):
            classes = getattr(auto, "_model_mapping", None)
            given = classes._model_mapping.get(config.get("model_type")) if classes is not None else None
            if architecture in (given if isinstance(given, tuple | list) else [given]):
                found.append(name)
    known = ["AutoModel", *(f"AutoModelFor{task}" for task in ("CausalLM", "Seq2SeqLM", "SpeechSeq2Seq", "MaskedLM"))]
    vague = ["AutoModelForPreTraining", "AutoModelForTextEncoding", "AutoModelForMultimodalLM"]

    def rank(name: str) -> tuple[bool, int, bool]:
        same = architecture.endswith(name.removeprefix("AutoModel")) and name != "AutoModel"
        return not same, known.index(name) if name in known else len(known), name in vague

    if found:
        return min(found, key=rank)
    return architecture if hasattr(transformers, architecture or " ") else "AutoModel"


def fenced(language: str, text: str) -> str:
    fence = "```" if "```" not in text else "`" * (max(map(len, re.findall("`+", text))) + 1)
    return f"{fence}{language}\n{text}\n{fence}"
