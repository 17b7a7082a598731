"""Who takes part: what people would use, and what is ours."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from environments import OURS


@dataclass(frozen=True)
class Contestant:
    """A model as it is served: `model` names a folder of the benchmark; `made` what makes the served files of it, a maker of its
    environment or, for ours, fields of `export_model`; `kind` and `how` open them in `worker.py`."""

    name: str
    model: str
    environment: str
    kind: str
    made: str | dict[str, Any] | None = None
    how: dict[str, Any] = field(default_factory=dict)
    needs: str = ""
    """A flag of the processor, without which it is left out."""
    beside: str = ""
    """The row of the whole model in the same runtime and type; its own if it is whole."""

    @property
    def is_ours(self) -> bool:
        return self.model.startswith(("quickstart", "fastest", "healed", "cpu-llm"))

    @property
    def against(self) -> str:
        """The model whose tokens its own are compared with."""
        return {"file": "plain", "cpu-llm": "healed"}.get(self.model, self.model)

    @property
    def place(self) -> str:
        """A folder of its own."""
        words = self.made if isinstance(self.made, str) else "-".join(str(value) for value in (self.made or {}).values())
        return f"{self.model}-{words}" if words else self.model


def eager(name: str, model: str = "fine-tuned", environment: str = "torch", **how: Any) -> Contestant:
    return Contestant(name, model, environment, "pytorch", None, how)


REFERENCE = "PyTorch, float32"
ENCODERS = [
    eager(REFERENCE),
    eager("PyTorch, bfloat16", dtype="bfloat16"),
    eager("PyTorch, compiled", compile=True),
    eager("PyTorch, compiled, bfloat16", dtype="bfloat16", compile=True),
    eager("torchao, int8", quantize="torchao"),
    eager("bitsandbytes, int8", quantize="int8"),
    eager("bitsandbytes, NF4", quantize="nf4"),
    Contestant("ONNX Runtime (optimum, O3)", "fine-tuned", "onnx", "onnx", "onnx"),
    Contestant("ONNX Runtime (optimum), int8", "fine-tuned", "onnx", "onnx", "onnx-int8"),
    Contestant("OpenVINO (optimum), float32", "fine-tuned", "openvino", "openvino", "openvino", {"precision": "f32"}),
    Contestant("OpenVINO (optimum), bfloat16", "fine-tuned", "openvino", "openvino", "openvino", {"precision": "bf16"}, "bf16"),
    Contestant("OpenVINO (optimum, NNCF), int8", "fine-tuned", "openvino", "openvino", "openvino-int8"),
    eager("half of the layers, distilled, PyTorch", "half"),
    Contestant("half of the layers, ONNX Runtime (optimum), int8", "half", "onnx", "onnx", "onnx-int8"),
    Contestant("half of the layers, OpenVINO (optimum, NNCF), int8", "half", "openvino", "openvino", "openvino-int8"),
    Contestant("a ready int8 ONNX of MiniLM, regression on top", "ready", "runtimes", "pooled"),
    Contestant(
        "its 3-layer sibling in ONNX, regression on top", "sibling", "runtimes", "pooled", None, {"output": "onnx::Shape_422"}
    ),
    *(
        one
        for name, model in (
            ("quickstart", "quickstart"),
            ("fastest", "fastest"),
            ("fastest, two layers", "fastest-2"),
            ("fastest, one layer", "fastest-1"),
        )
        for one in (
            eager(f"hfcompress {name}, PyTorch", model, OURS, hfcompress=True),
            *(
                Contestant(f"hfcompress {name}, {runtime}", model, "runtimes", made["to"], made)
                for runtime, made in (
                    ("OpenVINO", {"to": "openvino"}),
                    ("OpenVINO, int8", {"to": "openvino", "quantize": "int8"}),
                    ("ONNX Runtime, int8", {"to": "onnx", "quantize": "int8"}),
                )
            ),
        )
    ),
]
"""Of an encoder that is trained on the data; the reference first."""


def gguf(name: str, model: str, type_: str | None = None, beside: str = "") -> Contestant:
    return Contestant(name, model, "runtimes", "llama.cpp", None if type_ is None else {"type": type_}, beside=beside)


def writes(name: str, model: str = "plain", environment: str = "torch", beside: str = "", **how: Any) -> Contestant:
    return Contestant(name, model, environment, "transformers", None, how, beside=beside)


FLOAT, F32, Q8, FILE = "PyTorch, float32", "llama.cpp, F32", "llama.cpp, Q8_0", "llama.cpp, Q4_1, the file as it came"
LANGUAGE = [
    writes(FLOAT),
    writes("PyTorch, bfloat16", dtype="bfloat16"),
    writes("bitsandbytes, NF4", quantize="nf4"),
    writes("bitsandbytes, int8", quantize="int8"),
    gguf(F32, "plain", "F32"),
    gguf(Q8, "plain", "Q8_0"),
    gguf(FILE, "file"),
    writes("hfcompress cpu-llm before its codes, PyTorch, float32", "healed", OURS, FLOAT, hfcompress=True),
    gguf("hfcompress cpu-llm before its codes, llama.cpp, F32", "healed", "F32", F32),
    gguf("hfcompress cpu-llm before its codes, llama.cpp, Q8_0", "healed", "Q8_0", Q8),
    gguf("hfcompress cpu-llm, llama.cpp, Q4_1", "cpu-llm", "Q4_1", FILE),
]
"""Of SmolLM2-135M; those of one model after it in PyTorch, with whose tokens theirs are compared."""
