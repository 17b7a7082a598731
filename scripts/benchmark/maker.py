"""What people would make of a model instead of us, by the tools they would use, run in the environment that has them.

`python maker.py WHAT MODEL FOLDER CALIBRATION` prints how many seconds it took.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SAMPLES = 300
"""Of optimum-intel's own default."""


def _class(package: str, prefix: str, source: str) -> Any:
    """Optimum's class for the task of a checkpoint."""
    task = json.loads((Path(source) / "config.json").read_text())["architectures"][0].partition("For")[2]
    return getattr(importlib.import_module(f"optimum.{package}"), f"{prefix}ModelFor{task}")


def onnx(source: str, target: Path, calibration: str) -> None:
    """optimum-onnx: exported, and its operators fused as `optimum-cli onnxruntime optimize -O3` does."""
    from optimum.onnxruntime import AutoOptimizationConfig, ORTOptimizer

    plain = target.with_name(target.name + "-plain")
    _class("onnxruntime", "ORT", source).from_pretrained(source, export=True).save_pretrained(plain)
    ORTOptimizer.from_pretrained(plain).optimize(
        save_dir=target, optimization_config=AutoOptimizationConfig.O3(), file_suffix=""
    )


def onnx_int8(source: str, target: Path, calibration: str) -> None:
    """optimum-onnx: dynamic int8, a scale a channel, by the preset for this processor."""
    from optimum.onnxruntime import ORTQuantizer
    from optimum.onnxruntime.configuration import AutoQuantizationConfig

    plain = target.with_name(target.name + "-plain")
    _class("onnxruntime", "ORT", source).from_pretrained(source, export=True).save_pretrained(plain)
    flags = Path("/proc/cpuinfo").read_text()
    preset = AutoQuantizationConfig.avx512_vnni if "avx512_vnni" in flags else AutoQuantizationConfig.avx2
    ORTQuantizer.from_pretrained(plain).quantize(
        save_dir=target, quantization_config=preset(is_static=False, per_channel=True), file_suffix=""
    )


def openvino(source: str, target: Path, calibration: str) -> None:
    """optimum-intel, in float32."""
    _class("intel", "OV", source).from_pretrained(source, export=True, load_in_8bit=False).save_pretrained(target)


def openvino_int8(source: str, target: Path, calibration: str) -> None:
    """optimum-intel with NNCF: static int8 of weights and activations, on 300 training texts."""
    from datasets import Dataset
    from optimum.intel import OVQuantizationConfig, OVQuantizer

    arrays = dict(np.load(calibration))
    arrays.pop("labels")
    texts = Dataset.from_dict({name: value[:SAMPLES].tolist() for name, value in arrays.items()})
    model: Any = _class("intel", "OV", source).from_pretrained(source, export=True, load_in_8bit=False)
    OVQuantizer.from_pretrained(model).quantize(
        ov_config=_config(OVQuantizationConfig(bits=8, num_samples=SAMPLES)),
        calibration_dataset=texts,
        save_directory=target,
    )


def _config(how: Any) -> Any:
    from optimum.intel import OVConfig

    return OVConfig(quantization_config=how)


MAKERS: dict[str, Callable[[str, Path, str], None]] = {
    "onnx": onnx,
    "onnx-int8": onnx_int8,
    "openvino": openvino,
    "openvino-int8": openvino_int8,
}


if __name__ == "__main__":
    what, source, target, calibration = sys.argv[1:]
    began = time.monotonic()
    MAKERS[what](source, Path(target), calibration)
    print(f"seconds {time.monotonic() - began:.1f}")
