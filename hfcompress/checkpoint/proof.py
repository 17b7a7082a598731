"""The proof of a save: a fresh process loads the folder, and computes the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hfcompress.checkpoint.checksums import read_json
from hfcompress.checkpoint.errors import CompressionError, shown
from hfcompress.checkpoint.fingerprints import differing, fingerprints
from hfcompress.checkpoint.writing import written

# The largest difference of logits, as a share of how far they spread. One device, the same kernels: what is left is the order
# of sums. Logits of half precision can't show every wrong layer, so the tensors are compared as well: a load rounds at most.
ALLOWED = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
ROUNDED = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}

_PROGRAM = """
import json, runpy, sys
folder, given, needed, device, attention, threads, adapter, home = sys.argv[1:9]
sys.path.append(home)
import torch
if needed == "hfcompress":
    import hfcompress
import transformers
from safetensors.torch import load_file, save_file
transformers.logging.set_verbosity_error()
torch.set_num_threads(int(threads))
tensors = load_file(given)
config = transformers.AutoConfig.from_pretrained(folder)
where = {"device_map": {"": device}} if torch.accelerator.is_available() else {}
how = {"attn_implementation": attention} if attention else {}
model = getattr(transformers, config.architectures[0]).from_pretrained(folder, **where, **how).eval()
if adapter:
    model.load_adapter(adapter)
for module in model.modules():
    if hasattr(module, "support_avx512bf16_for_cpu"):
        module.support_avx512bf16_for_cpu = False
with torch.no_grad():
    said = model(**{key: value.to(next(model.parameters()).device) for key, value in tensors.items()})[0]
told = runpy.run_path(home + "/hfcompress/checkpoint/fingerprints.py")["fingerprints"](model)
save_file({"said": said.float().cpu().contiguous()}, given, {"tensors": json.dumps(told)})
"""


def prove(model: Any, inputs: dict[str, Tensor], folder: str | Path) -> float:
    """Load the folder in a fresh process, with `import hfcompress` only if its config asks for it; compare logits and tensors.

    Both compute on the model's device; on the CPU where it has no room for a second model. Returns the difference relative to
    the spread of the logits; CompressionError if the folder does not load or does not give the same model.
    """
    model = getattr(model, "_orig_mod", model).eval()
    device = next(model.parameters()).device
    found, tensors, said = _loaded(model, inputs, folder, device)
    expected = None if found is None else _said(model, inputs, device)
    if found is None and device.type != "cpu" and "out of memory" in said.lower():
        found, tensors, said = _loaded(model, inputs, folder, torch.device("cpu"))
        if found is not None:
            try:
                expected = _said(nn.Module.to(model, "cpu"), inputs, torch.device("cpu"))
            finally:
                nn.Module.to(model, device)
    if found is None or expected is None:
        raise CompressionError(f"{folder}: saved, but it does not load in a fresh process: {said}")
    off, allowed = difference(found, expected), ALLOWED.get(model.dtype, ALLOWED[torch.float32])
    if not off <= allowed:
        raise CompressionError(
            f"{folder}: saved, but a fresh process computes other logits (off by {off:.2g} of their spread, allowed "
            f"{allowed:.2g}); this is a fault of hfcompress, please report it with the recipe."
        )
    name = differing(tensors, fingerprints(model), ROUNDED.get(model.dtype, ROUNDED[torch.float32]))
    if name is not None:
        raise CompressionError(
            f"{folder}: saved, but a fresh process loads another tensor {shown(name)}; this is a fault of hfcompress, please "
            f"report it with the recipe."
        )
    return off


def difference(found: Tensor, expected: Tensor) -> float:
    """How far two models' logits are apart, as a share of how far those expected lie from their mean; inf where they can't be
    compared."""
    if found.shape != expected.shape:
        return float("inf")
    found, expected = found.double(), expected.double()
    spread = (expected - expected.mean()).norm()
    return float((found - expected).norm() / (spread if spread > 0 else expected.norm().clamp_min(1e-12)))


def needed_import(folder: str | Path) -> str:
    """What must be imported before `from_pretrained`: "hfcompress", or "transformers" if nothing more."""
    method = (read_json(Path(folder) / "config.json").get("quantization_config") or {}).get("quant_method")
    return "hfcompress" if method == "hfcompress" else "transformers"


def _said(model: Any, inputs: dict[str, Tensor], device: torch.device) -> Tensor:
    """What comes first in its output: logits, or the hidden states of a model without a head."""
    with _exactly(device):
        return model(**{key: value.to(device) for key, value in inputs.items()})[0].float().cpu()


def _loaded(
    model: Any, inputs: dict[str, Tensor], folder: str | Path, device: torch.device
) -> tuple[Tensor | None, dict[str, list[float]], str]:
    """What a fresh process computes and the fingerprints of its tensors; or None, nothing, and why it could not."""
    adapter = Path(folder).absolute() / "adapter"
    with tempfile.TemporaryDirectory() as scratch:
        tensors = Path(scratch) / "tensors.safetensors"
        with written(scratch, "what a proof computes with"):
            save_file({key: value.contiguous() for key, value in inputs.items()}, tensors)
        given = [Path(folder).absolute(), tensors, needed_import(folder), device]
        given += [getattr(model.config, "_attn_implementation", None) or "", torch.get_num_threads()]
        given += [adapter if adapter.is_dir() else "", Path(__file__).parents[2]]
        run = subprocess.run(
            # Nothing is imported from the working folder: a file random.py there would stand for Python's own.
            [sys.executable, "-c", _PROGRAM, *map(str, given)],
            capture_output=True,
            text=True,
            errors="replace",
            env=_environment(),
            cwd=scratch,
        )
        if run.returncode == 0:
            with safe_open(tensors, "pt") as told:
                return told.get_tensor("said"), json.loads(told.metadata()["tensors"]), ""
    lines = [line.strip() for line in run.stderr.splitlines() if line.strip()]
    if run.returncode < 0:
        return (
            None,
            {},
            f"it was ended by signal {-run.returncode}, most likely for want of memory; the folder is whole, check it with "
            f"hfcompress verify where there is more.",
        )
    last = lines[-1] if lines else f"it ended with code {run.returncode} and said nothing"
    return None, {}, f"{shown(last, 300)}; this is a fault of hfcompress, please report it with the recipe."


def _environment() -> dict[str, str]:
    """One process, even under torchrun, whose variables would make it wait for the others; paths that hold elsewhere."""
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    if paths := kept.get("PYTHONPATH"):
        kept["PYTHONPATH"] = os.pathsep.join(os.path.abspath(path) for path in paths.split(os.pathsep) if path)
    return {**kept, "PYTHONSAFEPATH": "1"}


@contextmanager
def _exactly(device: torch.device) -> Iterator[None]:
    """As the fresh process computes: eagerly, without autocast, in whole float32 where training allowed TF32."""
    backends: Any = torch.backends
    parts = [backends, backends.cuda.matmul, backends.cudnn, backends.mkldnn]
    parts += [getattr(part, leaf) for part in parts[2:] for leaf in ("conv", "rnn", "matmul") if hasattr(part, leaf)]
    name, exact = "fp32_precision", "ieee"
    if not hasattr(backends, name):  # before torch 2.9
        parts, name, exact = [backends.cuda.matmul, backends.cudnn], "allow_tf32", False  # type: ignore[assignment]
    kept = [(part, getattr(part, name)) for part in parts if hasattr(part, name)]
    with ExitStack() as stack:
        for part, value in kept:
            stack.callback(setattr, part, name, value)
            setattr(part, name, exact)
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if hasattr(torch.compiler, "set_stance"):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield
