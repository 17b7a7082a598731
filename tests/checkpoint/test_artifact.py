"""What is saved loads as it was, is proven, and is refused in a sentence once it is damaged."""

from __future__ import annotations

import json
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from hfcompress import Adapters, Cast, CompressionError, LowRank, PruneHeads, PruneNeurons, PruneWeights, Quantize, riding
from hfcompress.checkpoint import describe as describing
from hfcompress.checkpoint import proof
from hfcompress.checkpoint.artifact import save
from hfcompress.checkpoint.checksums import CHECKSUMS
from hfcompress.checkpoint.describe import describe
from hfcompress.checkpoint.proof import difference, prove
from hfcompress.checkpoint.verify import verify
from hfcompress.methods.base import Method
from hfcompress.tasks.pretrained import open_model
from tests.tiny import tiny_model

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])
AUTO = {"bert": AutoModelForSequenceClassification, "llama": AutoModelForCausalLM, "gpt2": AutoModelForCausalLM}
QUERY = "bert.encoder.layer.0.attention.self.query"
KEY = "bert.encoder.layer.0.attention.self.key"
AGAIN = "the checkpoint is damaged: download it again, or save the model again."


def logits(model: Any) -> torch.Tensor:
    model.eval()
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def mixed(bits: int = 4) -> Any:
    """Factors and codes in one model: an artifact that needs the import."""
    model = tiny_model("bert")
    LowRank(rank=4, target_modules=["query"]).run(model, None)
    Quantize(bits).run(model, None)
    return model


# ---------------------------------------------------------------- what a method alone leaves


BARE: list[list[Method]] = [
    [Quantize(8)],
    [Quantize(4)],
    [LowRank(rank=4)],
    [PruneHeads(0.5, scores="magnitude", ranking="global")],
    [PruneNeurons(0.4, scores="magnitude", ranking="global")],
    [PruneNeurons(0.5, scores="magnitude")],
    [PruneWeights(0.5)],
    [Cast()],
    [PruneHeads(0.5, scores="magnitude"), LowRank(rank=4), Quantize(8), Cast()],
]


@pytest.mark.parametrize("methods", BARE, ids=lambda methods: "+".join(method.key() for method in methods))
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_method_run_alone_leaves_a_model_that_saves_what_loads(kind: str, methods: list[Method], tmp_path: Path) -> None:
    model = tiny_model(kind)
    for method in methods:
        method.run(model, None)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AUTO[kind].from_pretrained(tmp_path)), expected)


def test_an_adapter_names_no_base_that_was_compressed(tmp_path: Path) -> None:
    tiny_model("bert").save_pretrained(tmp_path / "base")
    for method in (None, LowRank(rank=4), Quantize(4), Cast()):
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
        if method is not None:
            method.run(model, None)
        with riding(model, [Adapters(r=4, merge=False)], None):
            pass
        model.save_pretrained(tmp_path / "adapter")
        base = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
        assert base == ("" if method is not None else str(tmp_path / "base"))
    with pytest.raises(OSError, match="Repo id"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "adapter")


def test_a_peft_model_can_be_cast(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model("bert"), LoraConfig(target_modules="all-linear"))
    Cast().run(model, None)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_uneven_sizes_are_described_without_a_trial_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    model, built = tiny_model("bert", layers=8), []
    for number, layer in enumerate(model.bert.encoder.layer):
        size = 8 * (number + 1)
        layer.intermediate.dense, layer.output.dense = nn.Linear(64, size), nn.Linear(size, 64)
    whole = describing.twin
    monkeypatch.setattr(describing, "twin", lambda *given: built.append(1) or whole(*given))
    assert len(describe(model)) == 16
    assert len(built) <= 5


# ---------------------------------------------------------------- dtypes


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "methods",
    [
        [LowRank(rank=4)],
        [LowRank(rank=4, target_modules=["query"]), Quantize(4)],
        [LowRank(rank=4, target_modules=["query"]), Quantize(8)],
        [Quantize(8, engine="hfcompress", embeddings=8)],
        [Quantize(4, engine="hfcompress", embeddings=4, symmetric=False)],
    ],
    ids=str,
)
def test_an_artifact_loads_in_half_precision(methods: list[Method], dtype: str, tmp_path: Path) -> None:
    model = tiny_model("bert")
    for method in methods:
        method.run(model, None)
    expected = logits(model)
    save(model, None, tmp_path)
    half = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=getattr(torch, dtype))
    assert {str(p.dtype) for p in half.parameters() if p.is_floating_point()} == {f"torch.{dtype}"}
    assert difference(logits(half), expected) < 0.1
    again = tiny_model("bert")
    for method in (*methods, Cast(dtype)):
        method.run(again, None)
    assert torch.equal(logits(half), logits(again)), "as if it had been cast"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_plain_low_bit_artifact_is_opened_in_half_precision(kind: str, bits: int, dtype: torch.dtype, tmp_path: Path) -> None:
    model, again = tiny_model(kind), tiny_model(kind)
    for one in (model, again):
        Quantize(bits).run(one, None)
    save(model, None, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "bitsandbytes"
    half = open_model(tmp_path, dtype=dtype)
    assert {p.dtype for p in half.parameters() if p.is_floating_point()} == {dtype} and half.config.dtype == dtype
    Cast(str(dtype).removeprefix("torch.")).run(again, None)
    assert torch.equal(logits(half), logits(again)), "as if it had been cast"
    assert difference(logits(half), logits(model)) < 0.1


def test_cast_leaves_in_float32_what_the_architecture_keeps_there(tmp_path: Path) -> None:
    model = tiny_model("t5")
    Cast("float16").run(model, None)
    kinds = {name.rpartition(".wo.")[1]: p.dtype for name, p in model.named_parameters()}
    assert kinds == {"": torch.float16, ".wo.": torch.float32}
    save(model, None, tmp_path)
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert {name: p.dtype for name, p in again.named_parameters()} == {name: p.dtype for name, p in model.named_parameters()}
    Cast("bfloat16").run(model, None)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("after", [None, "bfloat16"])
def test_a_plain_4bit_save_computes_in_the_dtype_it_was_measured_in(after: str | None, tmp_path: Path) -> None:
    model = tiny_model("bert")
    Quantize(4).run(model, None)
    logits(model)
    if after:
        Cast(after).run(model, None)
    save(model, None, tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert told["quant_method"] == "bitsandbytes" and told["bnb_4bit_compute_dtype"] == (after or "float32")
    assert torch.equal(logits(AutoModelForSequenceClassification.from_pretrained(tmp_path)), logits(model))


# ---------------------------------------------------------------- other classes, PEFT


@pytest.mark.parametrize("bits", [4, 8])
def test_a_class_without_a_pooler_loads_what_has_an_edit_of_one(bits: int, tmp_path: Path) -> None:
    model = mixed(bits)
    save(model, None, tmp_path)
    assert "bert.pooler.dense" in json.loads((tmp_path / "config.json").read_text())["quantization_config"]["modules"]
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    body = AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = model.bert(input_ids=IDS).last_hidden_state
        assert torch.equal(loaded.bert(input_ids=IDS).last_hidden_state, expected)
        assert torch.equal(body(input_ids=IDS).last_hidden_state, expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_peft_merges_into_a_loaded_artifact(bits: int, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    save(mixed(bits), None, tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    kinds = {name: type(module) for name, module in model.named_modules()}
    with_adapter = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in with_adapter.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    healed = logits(with_adapter)
    merged = with_adapter.merge_and_unload()
    assert {name: type(module) for name, module in merged.named_modules()} == kinds
    assert difference(logits(merged), healed) < (0.3 if bits == 4 else 0.05)


# ---------------------------------------------------------------- damage


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def put(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    made: dict[int, Path] = {}

    def artifact(bits: int) -> Path:
        if bits not in made:
            made[bits] = tmp_path_factory.mktemp(f"mixed-{bits}")
            save(mixed(bits), None, made[bits])
        return made[bits]

    return artifact


MISSING = [
    (4, f"{QUERY}.first.weight", f"'{QUERY}.first.weight': it is missing from the file of weights"),
    (4, f"{QUERY}.second.bias", f"'{QUERY}.second.bias': it is missing from the file of weights"),
    (4, f"{QUERY}.weight", f"'{QUERY}.weight': it is missing from the file of weights"),
    (4, f"{KEY}.bias", f"'{KEY}.bias': it is missing from the file of weights"),
    (4, f"{KEY}.weight", f"'{KEY}': what lies beside its codes can't be read: \"'weight'\""),
    (4, f"{KEY}.weight.absmax", f"'{KEY}': what lies beside its codes can't be read: \"'absmax'\""),
    (4, f"{KEY}.weight.nested_absmax", f"'{KEY}': absmax, the scales of its codes, are 64 of uint8, not 64 of float32"),
    (8, f"{KEY}.SCB", f"'{KEY}': what lies beside its codes can't be read: \"'SCB'\""),
    (8, f"{KEY}.weight", f"'{KEY}': what lies beside its codes can't be read: \"'weight'\""),
    (8, "bert.embeddings.LayerNorm.weight", "'bert.embeddings.LayerNorm.weight': it is missing from the file of weights"),
]


@pytest.mark.parametrize(("bits", "name", "says"), MISSING, ids=[f"{bits}-{name}" for bits, name, _ in MISSING])
def test_a_missing_tensor_is_refused(bits: int, name: str, says: str, saved: Any, tmp_path: Path) -> None:
    tensors = tensors_of(saved(bits))
    del tensors[name]
    put(tmp_path, tensors)
    (tmp_path / "config.json").write_bytes((saved(bits) / "config.json").read_bytes())
    with pytest.raises(CompressionError) as error:
        AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert str(error.value) == f"{says}; {AGAIN}"


def test_a_new_head_is_no_damage(saved: Any) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(saved(4), num_labels=7, ignore_mismatched_sizes=True)
    assert model.classifier.out_features == 7


def test_what_the_file_and_the_structure_say_must_agree(saved: Any, tmp_path: Path) -> None:
    config = json.loads((saved(4) / "config.json").read_text())
    config["quantization_config"]["modules"][KEY]["compress_statistics"] = False
    (tmp_path / "config.json").write_text(json.dumps(config))
    put(tmp_path, tensors_of(saved(4)))
    with pytest.raises(CompressionError) as error:
        AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert str(error.value) == f"'{KEY}': compress_statistics is True in the file of weights and False in config.json; {AGAIN}"


def test_a_value_that_was_changed_is_noticed(tmp_path: Path) -> None:
    save(mixed(), None, tmp_path)
    assert verify(tmp_path) is True
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "id2label": {"0": "a", "1": "b", "2": "c"}}))
    assert verify(tmp_path) is True, "names may be given later"
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    with pytest.raises(CompressionError) as error:
        verify(tmp_path)
    advice = f"download the artifact again, or run its recipe again; after a change of your own, remove {CHECKSUMS}."
    assert str(error.value) == f"{tmp_path / 'config.json'}: it describes another model than was saved; {advice}"
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = tensors_of(tmp_path)
    tensors["classifier.bias"][0] += 1
    put(tmp_path, tensors)
    with pytest.raises(CompressionError) as error:
        verify(tmp_path)
    where = tmp_path / "model.safetensors"
    assert str(error.value) == f"{where}: it is not the file that was saved, its checksum is another; {advice}"
    (tmp_path / CHECKSUMS).unlink()
    assert verify(tmp_path) is False, "without checksums the values can't be checked"
    del tensors["classifier.bias"]
    put(tmp_path, tensors)
    with pytest.raises(CompressionError, match=r"'classifier.bias': it is missing from the file of weights"):
        verify(tmp_path)


def test_a_plain_artifact_is_verified_too(tmp_path: Path) -> None:
    model = tiny_model("bert")
    Quantize(4).run(model, None)
    save(model, None, tmp_path)
    assert verify(tmp_path) is True
    (tmp_path / CHECKSUMS).unlink()
    tensors = tensors_of(tmp_path)
    put(tmp_path, {**tensors, f"{KEY}.weight.absmax": tensors[f"{KEY}.weight.absmax"][:-3]})
    with pytest.raises(CompressionError, match=r"key': absmax, the scales of its codes, are 61 of uint8, not 64 of uint8"):
        verify(tmp_path)
    put(tmp_path, {**tensors, "stray": torch.zeros(1)})
    with pytest.raises(CompressionError, match="the tensor 'stray' belongs to no layer"):
        verify(tmp_path)
    put(tmp_path, {key: value for key, value in tensors.items() if key != "classifier.weight"})
    with pytest.raises(CompressionError, match=r"the tensor 'classifier.weight' is missing"):
        verify(tmp_path)


# ---------------------------------------------------------------- saving


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("size", "says"), [(30_000, "I/O error: File too large (os error 27)"), (100, "[Errno 27] File too large")]
)
def test_what_can_not_be_written_is_a_sentence(size: int, says: str, tmp_path: Path) -> None:
    model = tiny_model("bert")
    with files_up_to(size), pytest.raises(CompressionError) as error:
        save(model, None, tmp_path)
    told = str(error.value)
    assert told.startswith(f"{tmp_path}: the model can't be written there (") and says in told
    assert told.endswith(
        "); free some space or choose another place, then do the same again: a run goes on after its last finished step."
    )
    save(model, None, tmp_path)
    assert verify(tmp_path) is True


@pytest.mark.parametrize("shows", [True, False])
def test_a_save_shows_no_bar(shows: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    (logging.enable_progress_bar if shows else logging.disable_progress_bar)()
    try:
        save(tiny_model("bert"), None, tmp_path)
        assert "shards" not in capfd.readouterr().err
        assert logging.is_progress_bar_enabled() == shows, "as it was before"
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()


# ---------------------------------------------------------------- the proof


def test_the_proof_looks_at_the_model_and_not_at_its_surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "subprocess", subprocess)  # a whole new Python, as for users
    model = tiny_model("bert")
    LowRank(rank=4).run(model, None)
    save(model, None, tmp_path / "out")
    (tmp_path / "random.py").write_text("raise SystemExit('a file of the user')")
    (tmp_path / "torch.py").write_text("raise SystemExit('a file of the user')")
    monkeypatch.chdir(tmp_path)
    kept = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert prove(torch.compile(model), {"input_ids": IDS}, "out") < 1e-5
            assert torch.is_autocast_enabled("cpu")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(kept)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_layer_does_not_pass(dtype: str, tmp_path: Path) -> None:
    """In half precision its logits are the same to the last bit: the tensors are compared as well."""
    model = tiny_model("bert", layers=8)
    Cast(dtype).run(model, None)
    save(model, None, tmp_path)
    expected, rows = logits(model), torch.randperm(64)
    with torch.no_grad():
        model.bert.encoder.layer[3].output.dense.weight.copy_(model.bert.encoder.layer[3].output.dense.weight[rows])
    if dtype == "bfloat16":
        assert difference(logits(model), expected) < proof.ALLOWED[torch.bfloat16], "or the test says nothing"
    with pytest.raises(CompressionError, match=r"loads another tensor 'bert.encoder.layer.3.output.dense.weight'|other logits"):
        prove(model, {"input_ids": IDS}, tmp_path)


def test_what_a_load_rounds_is_allowed(tmp_path: Path) -> None:
    """A head in float32 on a body in half precision is loaded in the dtype of the config."""
    model = tiny_model("bert")
    Cast().run(model, None)
    with torch.no_grad():
        model.classifier.weight.data = model.classifier.weight.float() + 1e-4 * torch.randn(3, 64)
        model.classifier.bias.data = model.classifier.bias.float()
    model.classifier.register_forward_pre_hook(lambda _, given: (given[0].float(),))
    save(model, None, tmp_path)
    assert 0 < prove(model, {"input_ids": IDS}, tmp_path) < proof.ALLOWED[torch.bfloat16]


def test_differences_are_relative_to_the_spread() -> None:
    far = torch.tensor([[1000.0, 1000.1], [1000.0, 999.9]])
    assert difference(far + 0.1, far) > 1
    assert difference(far, far) == 0
    assert difference(far[:1], far) == float("inf")
    assert not difference(far * float("nan"), far) <= 1


@pytest.mark.parametrize(
    ("program", "says"),
    [
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
            "it was ended by signal 9, most likely for want of memory; the folder is whole, check it with hfcompress verify where there is more.",
        ),
        (
            "raise SystemExit(3)",
            "'it ended with code 3 and said nothing'; this is a fault of hfcompress, please report it with the recipe.",
        ),
        ("raise ValueError('no')", "'ValueError: no'; this is a fault of hfcompress, please report it with the recipe."),
    ],
    ids=["killed", "silent", "error"],
)
def test_how_the_fresh_process_ended_is_told(program: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("bert")
    save(model, None, tmp_path)
    monkeypatch.setattr(proof, "_PROGRAM", program)
    with pytest.raises(CompressionError) as error:
        prove(model, {"input_ids": IDS}, tmp_path)
    assert str(error.value) == f"{tmp_path}: saved, but it does not load in a fresh process: {says}"


def test_a_folder_that_gives_another_model_is_refused(tmp_path: Path) -> None:
    model = tiny_model("bert")
    save(model, None, tmp_path)
    with torch.no_grad():
        model.classifier.weight.mul_(1.01)
    with pytest.raises(
        CompressionError, match=r"a fresh process computes other logits \(off by 0\.0\d+ of their spread, allowed 0\.0001\)"
    ):
        prove(model, {"input_ids": IDS}, tmp_path)
