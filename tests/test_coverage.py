"""What scripts/coverage.py checks, on the architectures that once failed, each for a reason of its own."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hfcompress.checkpoint.describe import describe
from hfcompress.methods import Quantize

SCRIPT = Path(__file__).parent.parent / "scripts" / "coverage.py"
ODD = {
    "ConvNextForImageClassification": "inputs of four dimensions, which bitsandbytes gives back as a matrix",
    "DeepseekV4ForCausalLM": "parts kept in float32 that are named by two words",
    "FunnelForMaskedLM": "an initialisation that asks every Linear for its shape",
    "GteForSequenceClassification": "a checkpoint format that joins projections",
    "Inkling2ForCausalLM": "names that transformers renames at every load",
    "LayoutLMv3ForTokenClassification": "a layer whose owner indexes the weight",
    "Llama4ForCausalLM": "experts that a quantised load replaces",
    "LongcatFlashForCausalLM": "a router that multiplies the weight itself",
    "Gemma4ForCausalLM": "a config whose fields differ from layer to layer",
    "Swinv2ForImageClassification": "a table that is cast to the dtype of a layer inside another module",
    "Zamba2ForSequenceClassification": "one block tied to several places",
}


@pytest.fixture(scope="module")
def coverage() -> Any:
    spec: Any = importlib.util.spec_from_file_location("coverage_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("check", ["low_rank", "quantize"])
@pytest.mark.parametrize("name", ODD)
def test_linear_layers_of_odd_architectures(name: str, check: str, coverage: Any) -> None:
    assert coverage.row(coverage.CHECKS[check], name, coverage.listed()[name], False) == "pass", ODD[name]


def test_codes_alone_are_loud_without_the_import(coverage: Any, tmp_path: Path) -> None:
    name = "ConvNextForImageClassification"
    model = coverage.build(name, coverage.listed()[name])
    Quantize(8).run(model, None)
    coverage.answer(model, coverage.example(model))
    describe(model)
    assert model.config.quantization_config["quant_method"] == "hfcompress"
    model.save_pretrained(tmp_path)
    program = f"import transformers; transformers.{name}.from_pretrained({str(tmp_path)!r})"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode and "mismatched_sizes" in run.stderr
