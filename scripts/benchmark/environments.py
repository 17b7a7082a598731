"""Where each contestant runs: a virtual environment of its own, of pinned packages, made when it is first asked for."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
OUT = ROOT / "out" / "benchmark"

OURS = "hfcompress"
"""The environment that runs this script; everything of ours is made there, and served there or by a runtime alone."""

PACKAGES: dict[str, list[str]] = {
    "torch": ["torch==2.13.0", "transformers==5.23.0", "torchao==0.18.0", "bitsandbytes==0.50.2", "accelerate==1.15.0"],
    "onnx": ["torch==2.13.0", "optimum-onnx[onnxruntime]==0.1.0"],
    "openvino": ["torch==2.13.0", "optimum-intel[openvino,nncf]==2.2.0", "datasets==5.0.1"],
    "runtimes": [
        "numpy==2.4.6",
        "onnxruntime==1.32.0",
        "openvino==2026.4.1",
        "xllamacpp==2026.10.11549",
        "scikit-learn==1.9.1",
    ],
}
"""By environment. `runtimes` holds no PyTorch: exports of anybody, and llama.cpp, run there."""

LEFT_OUT = {"openvino": "torchvision"}
"""What comes with the packages in a build for another PyTorch, and is needed by nobody here."""


def python_of(environment: str) -> str:
    """The interpreter of an environment, which is made if it is not there."""
    if environment == OURS:
        return sys.executable
    folder = OUT / "env" / environment
    python, stamp = folder / "bin" / "python", folder / "packages.txt"
    wanted = "\n".join(PACKAGES[environment]) + "\n"
    if not stamp.is_file() or stamp.read_text() != wanted:
        print(f"making the environment {environment}: {', '.join(PACKAGES[environment])}", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        _pip(str(python), "install", *PACKAGES[environment])
        if environment in LEFT_OUT:
            _pip(str(python), "uninstall", "--yes", LEFT_OUT[environment])
        stamp.write_text(wanted)
    return str(python)


def _pip(python: str, *words: str) -> None:
    subprocess.run(
        [python, "-m", "pip", "--quiet", "--disable-pip-version-check", *words], check=True, stderr=subprocess.DEVNULL
    )
