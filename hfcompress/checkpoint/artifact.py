"""The folder on disk: saved, and proven by loading it in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hfcompress.checkpoint.describe import describe
from hfcompress.checkpoint.errors import CompressionError
from hfcompress.checkpoint.quantizer import forget_reading  # this import registers the loader
from hfcompress.layers import holds_codes
from hfcompress.layers.bitsandbytes import frozen

ADAPTER = "adapter"

_PROOF = """
import sys, torch
folder, given, threads = sys.argv[1:4]
if sys.argv[4] == "hfcompress":
    import hfcompress
import transformers
from safetensors.torch import load_file, save_file
transformers.logging.set_verbosity_error()
torch.set_num_threads(int(threads))
tensors = load_file(given)
config = transformers.AutoConfig.from_pretrained(folder)
model = getattr(transformers, config.architectures[0]).from_pretrained(folder).eval()
if len(sys.argv) > 5:
    model.load_adapter(sys.argv[5])
for module in model.modules():
    if hasattr(module, "support_avx512bf16_for_cpu"):
        module.support_avx512bf16_for_cpu = False
device = next(model.parameters()).device
with torch.no_grad():
    logits = model(**{key: value.to(device) for key, value in tensors.items()}).logits
save_file({"logits": logits.float().cpu().contiguous()}, given)
"""


def save(model: Any, processor: Any, folder: str | Path) -> None:
    """Write config.json (with the structure), the weights, an adapter that was kept, and the tokenizer or processor."""
    with _without_adapter(model, Path(folder) / ADAPTER):
        describe(model)
        forget_reading(model)
        model.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)


def load(task: Any, folder: str | Path) -> Any:
    """The model of an artifact, with its adapter if it has one, where and as `open_model` puts it."""
    return task.load_model(str(folder))


def complete(model: Any, folder: str | Path) -> None:
    """What `from_pretrained` leaves undone: low-bit layers are frozen, and an adapter that lies in the folder is put on."""
    for module in model.modules():
        if holds_codes(module):
            frozen(module)
    if (Path(folder) / ADAPTER).is_dir():
        conversions = getattr(model, "_weight_conversions", None)
        model.load_adapter(str(Path(folder) / ADAPTER))
        model._weight_conversions = conversions  # loading puts the adapter's there, and a save would rename the base by them


def prove(model: Any, inputs: dict[str, Tensor], folder: str | Path) -> float:
    """Load the folder in a fresh process, with `import hfcompress` only if its config asks for it, and compare the logits.

    Returns the largest difference; CompressionError if the folder does not load or does not give the same model.
    """
    model.eval()
    device = next(model.parameters()).device
    with torch.no_grad():
        expected = model(**{key: value.to(device) for key, value in inputs.items()}).logits.float().cpu()
    with tempfile.TemporaryDirectory() as scratch:
        tensors = Path(scratch) / "tensors.safetensors"
        save_file({key: value.contiguous() for key, value in inputs.items()}, tensors)
        adapter = [str(Path(folder) / ADAPTER)] if (Path(folder) / ADAPTER).is_dir() else []
        command = [sys.executable, "-c", _PROOF, str(folder), str(tensors), str(torch.get_num_threads()), needed_import(folder)]
        # One process, even under torchrun: its variables would make the child wait for the others.
        alone = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
        run = subprocess.run([*command, *adapter], capture_output=True, text=True, env=alone)
        if run.returncode:
            raise CompressionError(
                f"{folder}: saved, but it does not load in a fresh process: {run.stderr.strip().splitlines()[-1]}; "
                f"this is a fault of hfcompress, please report it with the recipe."
            )
        found = load_file(tensors)["logits"]
    difference = float((found - expected).abs().max())
    allowed = (1e-5 if model.dtype == torch.float32 else 2e-2) * max(1.0, float(expected.abs().max()))
    if found.shape != expected.shape or not difference <= allowed:
        raise CompressionError(
            f"{folder}: saved, but a fresh process computes other logits (off by {difference:.2g}, allowed {allowed:.2g}); "
            f"this is a fault of hfcompress, please report it with the recipe."
        )
    return difference


def needed_import(folder: str | Path) -> str:
    """What must be imported before `from_pretrained`: "hfcompress", or "transformers" if nothing more."""
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    method = (config.get("quantization_config") or {}).get("quant_method")
    return "hfcompress" if method == "hfcompress" else "transformers"


@contextmanager
def _without_adapter(model: Any, folder: Path) -> Iterator[None]:
    """Save a kept LoRA adapter beside the model, as PEFT does, and take it off while the base is saved."""
    if not getattr(model, "_hf_peft_config_loaded", False):
        yield
        return
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    model.save_pretrained(folder)
    wrapped: dict[str, Any] = {
        name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer | ModulesToSaveWrapper)
    }
    for name, module in wrapped.items():
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module.original_module
        model.set_submodule(name, base)
    model._hf_peft_config_loaded = False
    try:
        yield
    finally:
        for name, module in wrapped.items():
            model.set_submodule(name, module)
        model._hf_peft_config_loaded = True
