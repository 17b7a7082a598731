"""Low-bit layers switched to inference: the same outputs, and neither trained nor saved afterwards."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import has_avx512bf16

from hfcompress import Quantize, fast
from hfcompress.checkpoint.describe import describe
from hfcompress.checkpoint.errors import CompressionError
from hfcompress.layers import holds_codes
from hfcompress.layers.bitsandbytes import Linear4bit
from hfcompress.layers.fast import is_fast
from hfcompress.layers.quantized import QuantLinear
from tests.tiny import tiny_model

ENGINES: dict[str, dict[str, Any]] = {
    "nf4": {"bits": 4},
    "fp4 in bfloat16": {"bits": 4, "quant_type": "fp4", "compute_dtype": "bfloat16"},
    "int8": {"bits": 8},
    "ours": {"bits": 4, "engine": "hfcompress", "group_size": 16, "symmetric": False},
}
SENTENCE = "fast: a model that was switched to inference can't be {}; {}, or load it again."


def quantised(kind: str = "bert", dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    model = tiny_model(kind).to(dtype).eval()
    Quantize(**fields).run(model, None)
    return model


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(1, 25).reshape(2, 12)
    more = {"decoder_input_ids": ids[:, :3]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


@pytest.mark.parametrize("fields", ENGINES.values(), ids=list(ENGINES))
@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2", "bart"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_outputs_stay_as_they_were(kind: str, fields: dict[str, Any], dtype: torch.dtype) -> None:
    model = quantised(kind, dtype, **fields)
    expected = logits(model)
    assert fast(model) is model
    in_bfloat16 = dtype == torch.bfloat16 or (fields["bits"] == 4 and has_avx512bf16())
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-2 if in_bfloat16 else 0)
    assert torch.equal(logits(copy.deepcopy(model)), logits(pickle.loads(pickle.dumps(model))))


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2", "bart"])
def test_outputs_are_equal_where_the_processor_has_no_fused_kernel(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitsandbytes.functional.has_avx512bf16", lambda: False)
    model = quantised(kind, **ENGINES["nf4"])
    expected = logits(model)
    assert torch.equal(logits(fast(model)), expected)


def test_what_is_unpacked_at_every_forward_is_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitsandbytes.functional.has_avx512bf16", lambda: False)
    model = fast(quantised(bits=4))
    assert is_fast(model) and not any(holds_codes(module) for module in model.bert.modules())
    ours = fast(quantised(bits=4, engine="hfcompress", group_size=16))
    layer = next(module for module in ours.modules() if isinstance(module, QuantLinear))
    assert layer.keeps_unpacked and not is_fast(ours)
    assert not is_fast(fast(quantised(bits=8))) and not is_fast(fast(tiny_model("bert")))
    assert not is_fast(fast(quantised(bits=4, compute_dtype="bfloat16")))  # bitsandbytes alone computes so


def test_the_fused_kernel_is_let_in_where_the_processor_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitsandbytes.functional.has_avx512bf16", lambda: True)
    model = fast(quantised(bits=4))
    layers = [module for module in model.modules() if type(module).__name__ == Linear4bit.type_name]
    assert layers and all(layer.support_avx512bf16_for_cpu for layer in layers) and is_fast(model)


def test_it_is_neither_trained_nor_saved(tmp_path: Path) -> None:
    model = fast(quantised(bits=4))
    with pytest.raises(CompressionError) as error:
        model.save_pretrained(tmp_path / "theirs")
    assert str(error.value) == SENTENCE.format("saved", "save it before")
    assert not list((tmp_path / "theirs").glob("*.safetensors"))
    with pytest.raises(CompressionError) as error:
        model.train()(input_ids=torch.ones(1, 4, dtype=torch.long))
    assert str(error.value) == SENTENCE.format("trained", "call eval()")
    codes = fast(quantised(bits=8, engine="hfcompress"))  # nothing was put in their place
    describe(codes)
    codes.save_pretrained(tmp_path / "codes")
    assert torch.equal(logits(type(codes).from_pretrained(tmp_path / "codes").eval()), logits(codes))
    with pytest.raises(CompressionError, match=r"fast: .* is not in memory"):
        fast(tiny_model("bert").to("meta"))


KERNELS = """
import importlib.abc, importlib.util, logging, sys

class Claims(importlib.abc.MetaPathFinder):
    "A processor with AVX512-BF16, and a package that would fetch a kernel."
    def find_spec(self, name, path, target=None):
        if name != "bitsandbytes.functional":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module
        def loaded(module):
            run(module)
            module.has_avx512bf16 = lambda: True
        spec.loader.exec_module = loaded
        return spec

sys.meta_path.insert(0, Claims())
sys.path.insert(0, sys.argv[1])
from hfcompress.layers.bnb_library import import_first
if sys.argv[2] == "ours":
    import_first()
if sys.argv[2] == "recipe":
    from hfcompress import Recipe
import bitsandbytes
"""


@pytest.mark.parametrize("first", ["ours", "recipe", "plainly"])
def test_bitsandbytes_is_imported_without_a_look_over_the_network(first: str, tmp_path: Path) -> None:
    (tmp_path / "kernels.py").write_text(
        "def get_kernel(*args, **kwargs):\n    print('fetched')\n    raise OSError('offline')\n"
    )
    done = subprocess.run([sys.executable, "-c", KERNELS, str(tmp_path), first], capture_output=True, text=True, check=True)
    assert ("fetched" in done.stdout, "kernels-community" in done.stderr) == ((first == "plainly",) * 2)
