"""Every method on the GPU: it chooses and computes as on a CPU, and what is saved there reloads exactly, there and on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BitsAndBytesConfig

from hfcompress import Cast, LowRank, PruneHeads, PruneNeurons, Quantize
from hfcompress.checkpoint.artifact import save
from hfcompress.checkpoint.describe import diff
from hfcompress.checkpoint.proof import difference
from hfcompress.layers import holds_codes
from hfcompress.methods import Method
from hfcompress.results.measure import has_codes
from hfcompress.tasks.pretrained import open_model
from tests.gpu.place import DEVICE, KINDS, Few, auto, logits, made, rows

CODES: list[Method] = [
    Quantize(8),
    Quantize(8, threshold=6.0),
    *(Quantize(4, quant_type=kind, use_double_quant=double) for kind in ("nf4", "fp4") for double in (True, False)),
]
ALL = [(kind, method) for kind in KINDS for method in rows(kind)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IN = [(kind, method, dtype) for kind, method in ALL for dtype in DTYPES if dtype != torch.float16 or kind in ("llama", "vit")]


def names(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(("kind", "method"), ALL, ids=str)
def test_it_chooses_and_computes_as_on_a_cpu(kind: str, method: Method) -> None:
    here, there = made(kind), made(kind, device=torch.device("cpu"))
    for model in (here, there):
        method.run(model, Few(kind))
    assert {tensor.device for tensor in (*here.parameters(), *here.buffers())} == {DEVICE}
    assert diff(here) == diff(there)
    low = has_codes(there) or here.dtype != torch.float32
    # codes: a weight that lies between two may fall to either side, and inputs are rounded or not
    assert difference(logits(here, kind), logits(there, kind)) < (3e-2 if low else 1e-3)


@pytest.mark.parametrize(("kind", "method", "dtype"), IN, ids=str)
def test_it_reloads_exactly_on_either_device(kind: str, method: Method, dtype: torch.dtype, tmp_path: Path) -> None:
    model = made(kind, dtype)
    method.run(model, Few(kind))
    check(model, kind, tmp_path)


def check(model: Any, kind: str, folder: Path) -> None:
    """Saved here and loaded here or on a CPU; and what a CPU saved again, loaded here."""
    expected = logits(model, kind)
    assert expected.isfinite().all()
    save(model, None, folder / "here")
    here = open_model(folder / "here", auto(kind), DEVICE)
    assert torch.equal(logits(here, kind), expected)
    there = open_model(folder / "here", auto(kind), "cpu")
    tensors, others = names(here), names(there)
    assert tensors.keys() == others.keys()
    assert [name for name, one in tensors.items() if not torch.equal(one, others[name])] == []
    assert difference(logits(there, kind), expected) < (2e-3 if model.dtype == torch.float32 and not has_codes(model) else 5e-2)
    save(there, None, folder / "there")
    assert torch.equal(logits(open_model(folder / "there", auto(kind), DEVICE), kind), expected)


@pytest.mark.parametrize("method", CODES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_format_of_bitsandbytes_after_cuts_and_factors(
    kind: str, dtype: torch.dtype, method: Method, tmp_path: Path
) -> None:
    model = made(kind, dtype)
    PruneHeads(0.5, ranking="global").run(model, Few(kind))
    PruneNeurons(0.3, ranking="global", round_to=32).run(model, Few(kind))
    LowRank(rank=8, target_modules=[{"bert": "query", "t5": "q"}.get(kind, "q_proj")]).run(model, None)
    method.run(model, None)
    check(model, kind, tmp_path)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_our_codes_are_those_that_transformers_makes(kind: str, bits: int, tmp_path: Path) -> None:
    """`BitsAndBytesConfig` quantises while it loads, with bitsandbytes' own kernels on the GPU."""
    if DEVICE.type == "cpu":
        pytest.skip("other kernels")
    made(kind, torch.bfloat16).save_pretrained(tmp_path)
    ours = open_model(tmp_path, auto(kind), DEVICE)
    (Quantize(8) if bits == 8 else Quantize(4, use_double_quant=False)).run(ours, None)
    skipped = [name for name, module in ours.named_modules() if type(module) is torch.nn.Linear]
    asked = BitsAndBytesConfig(
        load_in_8bit=bits == 8,
        load_in_4bit=bits == 4,
        llm_int8_threshold=0.0,
        llm_int8_skip_modules=skipped or ["none"],
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    theirs = auto(kind).from_pretrained(tmp_path, quantization_config=asked, device_map={"": DEVICE}, dtype=torch.bfloat16)
    assert sum(map(holds_codes, theirs.modules())) == sum(map(holds_codes, ours.modules())) > 0
    assert difference(logits(ours, kind), logits(theirs, kind)) < 2e-2


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_what_was_cut_and_coded_generates_the_same_after_a_reload(kind: str, tmp_path: Path) -> None:
    model = made(kind, torch.bfloat16)
    PruneHeads(0.5, ranking="global").run(model, Few(kind))
    Quantize(4).run(model, None)
    save(model, None, tmp_path)
    ids = torch.tensor([[7, 8, 9]], device=DEVICE)
    asked = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    again = open_model(tmp_path, auto(kind), DEVICE)
    assert torch.equal(again.generate(ids, **asked), model.eval().generate(ids, **asked))


@pytest.mark.parametrize("kind", KINDS)
def test_a_half_is_the_model_cast(kind: str, tmp_path: Path) -> None:
    model = made(kind)
    PruneNeurons(0.5, ranking="global").run(model, Few(kind))
    save(model, None, tmp_path)
    half = open_model(tmp_path, auto(kind), DEVICE, torch.bfloat16)
    Cast().run(model, None)
    assert torch.equal(logits(half, kind), logits(model, kind))
