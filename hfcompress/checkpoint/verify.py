"""Is a folder the model that was saved? Its checksums, its structure, and every tensor, by loading it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from hfcompress.checkpoint.artifact import without_bars
from hfcompress.checkpoint.checksums import check_checksums, read_json
from hfcompress.checkpoint.errors import CompressionError, first_line, shown
from hfcompress.checkpoint.quantizer import check_layer, check_types


def verify(folder: str | Path) -> bool:
    """Check the checksums, the structure and the tensors of a saved model: their names, sizes and types.

    Returns whether the values were checked as well: False for a folder without checksums. CompressionError where something is
    damaged. The model is loaded, on the CPU.
    """
    folder = Path(folder)
    checked = check_checksums(folder)
    config = read_json(folder / "config.json")
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    auto = getattr(transformers, name, None) if isinstance(name, str) else None
    if not isinstance(auto, type) or not issubclass(auto, transformers.PreTrainedModel):
        raise CompressionError(
            f"{folder / 'config.json'}: architectures is {shown(names)}, and transformers has no such class; name the class "
            f"that was saved, or save the model again."
        )
    model, told = _loaded(auto, folder)
    for sort, what in (("missing_keys", "is missing"), ("unexpected_keys", "belongs to no layer")):
        if told[sort]:
            raise _wrong(folder, f"the tensor {shown(sorted(told[sort])[0])} {what}")
    for layer, module in model.named_modules():
        check_layer(layer, module)
    check_types(model)
    return checked


def _loaded(auto: Any, folder: Path) -> tuple[Any, dict[str, Any]]:
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    try:
        with without_bars():
            return auto.from_pretrained(folder, output_loading_info=True, device_map={"": "cpu"}, local_files_only=True)
    except CompressionError:
        raise
    except Exception as error:  # transformers, safetensors and torch have errors of their own for what they can't load
        raise _wrong(folder, f"it can't be loaded: {shown(first_line(error))}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)


def _wrong(folder: Path, what: str) -> CompressionError:
    return CompressionError(f"{folder}: {what}; download the artifact again, or run its recipe again.")
