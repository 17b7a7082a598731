"""What a saved folder says of its model, in lines for a terminal. The file may be anybody's: nothing in it is obeyed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import safe_open

from hfcompress.checkpoint.checksums import read_json
from hfcompress.checkpoint.errors import CompressionError, printable, shown
from hfcompress.checkpoint.packed import is_packed, unpacked_size
from hfcompress.checkpoint.structure import PACKED


def described(folder: Path) -> list[str | list[tuple[str, str]]]:
    """The lines, and as a list of rows (module, what it is now) what was changed."""
    where = folder / "config.json"
    config = read_json(where)
    names, told = config.get("architectures"), config.get("quantization_config") or {}
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        names = ["?"]
    lines: list[str | list[tuple[str, str]]] = [_cut(f"{', '.join(names)}, {config.get('model_type')}")]
    if not isinstance(told, dict):
        raise CompressionError(f"{where}: quantization_config = {shown(told)} is no mapping; save the model again.")
    if told.get("quant_method") != "hfcompress":
        method = _cut(str(told.get("quant_method")))
        plain = "a plain transformers model: its own config tells everything; loads without hfcompress"
        return [*lines, f"quantised with {method}; loads without hfcompress" if told else plain]
    edits = told.get("modules")
    if not isinstance(edits, dict) or not all(isinstance(edit, dict) for edit in edits.values()):
        raise CompressionError(f"{where}: modules = {shown(edits)} must map module names to edits; save the model again.")
    if told.get("storage") == PACKED:
        lines += _streams(folder)
    return [*lines, [(_cut(name), _edit(edit)) for name, edit in edits.items()]]


def _streams(folder: Path) -> list[str]:
    """How small packed weights are, and where most of their bytes lie."""
    sizes: dict[str, tuple[int, int, int]] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in list(tensors.keys()):
                if is_packed(stream := tensors.get_tensor(name)):
                    sizes[name] = (len(stream), *unpacked_size(stream, name))
    packed, dense, elements = (sum(one[part] for one in sizes.values()) for part in range(3))
    if not sizes:
        return ["packed, and no tensor is"]
    most = sorted(sizes, key=lambda name: -sizes[name][0])[:5]
    lines = [
        f"packed: {packed / 1e6:.2f} MB for {dense / 1e6:.2f}, {8 * packed / max(elements, 1):.2f} bits an element; most in"
    ]
    return [
        *lines,
        *(
            f"  {_cut(name)}: {sizes[name][0] / 1e6:.3f} MB, {8 * sizes[name][0] / max(sizes[name][2], 1):.2f} bits"
            for name in most
        ),
    ]


def harmless(file: Path) -> Any:
    """What a JSON file holds, without what a terminal would obey."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {printable(key): clean(part) for key, part in value.items()}
        if isinstance(value, list):
            return [clean(part) for part in value]
        return printable(value) if isinstance(value, str) else value

    return clean(read_json(file))


def _edit(edit: dict[str, object]) -> str:
    fields = [_cut(f"{key} {value}") for key, value in edit.items() if key != "kind"]
    return ", ".join([_cut(edit.get("kind", "?")), *fields])


def _cut(text: object, most: int = 120) -> str:
    told = printable(text)
    return told if len(told) <= most else f"{told[:most]}…"
