"""OpenVINO and ONNX: what PyTorch says, at every size, of models cut, factored and coded; text goes on with the same tokens."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, GenerationMixin

from hfcompress import CompressionError, PruneHeads, Quantize
from hfcompress.export import FORMATS
from hfcompress.export.agreement import ALLOWED, agreement
from hfcompress.export.halves import Reads
from hfcompress.export.plain import plain
from hfcompress.export.served import Served, weight_bytes
from hfcompress.export.traced import Executorch, Openvino
from hfcompress.layers.quantized import QuantLinear
from hfcompress.layers.stored import StoredEmbedding, StoredLinear
from tests.distillation.lessons import pupil
from tests.export.models import source_of
from tests.methods.test_laws import FewBatches, stacked
from tests.tiny import DECODERS, ENCODERS, tiny_model

CODES = {"bits": 8, "engine": "hfcompress", "embeddings": 8}


def compressed(kind: str, how: str) -> Any:
    model = tiny_model(kind)
    if kind in (*ENCODERS, *DECODERS):
        stacked(model, kind)
    elif kind == "vit":
        PruneHeads(0.5, scores="l1").run(model, None)
    if how == "codes":
        Quantize(**(CODES if kind != "vit" else {**CODES, "embeddings": None, "convolutions": 8})).run(model, None)
    return model.eval()


def served(model: Any, to: str, folder: Path, **fields: Any) -> tuple[Any, Served]:
    source = source_of(model)
    told = FORMATS[to](**fields).write(source, folder)
    (folder / "exported.json").write_text(json.dumps({"to": to, "parameters": 1, "nonzero": 1, **told}))
    return source, Served(folder, in_float32=True)


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str, str], tuple[Any, Path]]:
    """The source and the folder of an export, made once: tracing takes ten seconds and more."""

    @functools.cache
    def made(kind: str, how: str, to: str) -> tuple[Any, Path]:
        folder = tmp_path_factory.mktemp(f"{kind}-{how}-{to}")
        return served(compressed(kind, how), to, folder)[0], folder

    return made


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("bert", "dense"),
        ("bert", "codes"),
        ("distilbert", "codes"),
        ("llama", "codes"),
        ("gpt2", "dense"),
        ("t5", "codes"),
        ("vit", "codes"),
    ],
)
@pytest.mark.parametrize("to", ["openvino", "onnx"])
def test_an_export_says_what_pytorch_says(to: str, kind: str, how: str, exports: Any) -> None:
    source, folder = exports(kind, how, to)
    told = agreement(source, Served(folder, in_float32=True))  # batches of 1 to 9, texts of 5 to 60 tokens
    assert told["off"] <= ALLOWED
    if source.model.can_generate():
        assert told["same_tokens"] == 1.0


def writer(kind: str) -> Any:
    """A translator whose layers have other numbers of heads each."""
    model = pupil("whisper") if kind == "whisper" else tiny_model(kind)
    PruneHeads(0.5, scores="l1", ranking="global").run(model, None)
    model.generation_config = GenerationConfig(decoder_start_token_id=1, eos_token_id=2, pad_token_id=0)
    model.config.use_cache = False  # as training with checkpoints leaves it
    return model.eval()


@pytest.mark.parametrize("kind", ["bart", "whisper"])
@pytest.mark.parametrize("to", ["openvino", "onnx"])
def test_a_decoder_goes_on_by_its_cache(to: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, found = served(writer(kind), to, tmp_path / "cached")
    told = agreement(source, found)
    assert told["off"] <= ALLOWED and told["same_tokens"] == 1.0
    assert len(found.caches) == source.model.config.decoder_layers
    given: list[int] = []
    ahead = found._ahead
    monkeypatch.setattr(
        found, "_ahead", lambda graph, new, *rest: given.append(new["decoder_input_ids"].shape[1]) or ahead(graph, new, *rest)
    )
    batch = {name: value for name, value in source.example(2, 9).items() if name != "decoder_input_ids"}
    written = found.generate(**batch, max_new_tokens=14)
    plainly: Any = GenerationMixin.generate
    expected = plainly(source.model, **batch, do_sample=False, num_beams=1, max_new_tokens=14)
    assert torch.equal(written, expected) and given == [1] * (written.shape[1] - 1)
    alone = batch[source.model.main_input_name]  # without a mask, as models take it
    assert torch.equal(found.generate(**{source.model.main_input_name: alone}, max_new_tokens=14), expected)


class Decodes:
    """A tokenizer, as far as a snippet asks for one."""

    def batch_decode(self, ids: Any) -> None:
        self.ids = ids


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bart", "whisper"])
@pytest.mark.parametrize("to", ["openvino", "onnx"])
def test_the_snippet_of_a_model_that_writes_writes(to: str, kind: str, tmp_path: Path) -> None:
    model = writer(kind)
    model.generation_config.eos_token_id = None  # the snippet does not look for an end
    source = source_of(model)
    told = FORMATS[to]().write(source, tmp_path)
    batch = {name: value for name, value in source.example(2, 9).items() if name != "decoder_input_ids"}
    code, tokenizer = FORMATS[to]().snippet(str(tmp_path), told), Decodes()
    count = 12 if kind == "whisper" else 20  # which has room for no more
    given = {"inputs": {name: value.numpy() for name, value in batch.items()}, "tokenizer": tokenizer}
    exec(code.replace("range(20)", f"range({count})"), given)
    plainly: Any = GenerationMixin.generate
    expected = plainly(model, **batch, do_sample=False, num_beams=1, max_new_tokens=count)
    assert torch.equal(torch.from_numpy(tokenizer.ids), expected)


@pytest.mark.parametrize("to", ["openvino", "onnx"])
def test_a_decoder_that_can_not_reads_its_text_anew_each_time(to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reads, "forward", lambda self, **given: {"cross": []})
    source, found = served(writer("bart"), to, tmp_path)
    told = agreement(source, found)
    assert found.caches == [] and told["off"] <= ALLOWED and told["same_tokens"] == 1.0


def test_a_classifier_of_an_encoder_decoder_is_one_graph(tmp_path: Path) -> None:
    model = tiny_model("bart", "text-classification")
    plain = source_of(model)

    def example(size: int, length: int | None) -> dict[str, torch.Tensor]:
        batch = dict(plain.example(size, length))
        batch["input_ids"][:, -1] = model.config.eos_token_id  # where it looks for the sentence
        return {name: value for name, value in batch.items() if name != "decoder_input_ids"}

    source = dataclasses.replace(plain, example=example)
    told = FORMATS["onnx"]().write(source, tmp_path)
    (tmp_path / "exported.json").write_text(json.dumps({"to": "onnx", "parameters": 1, "nonzero": 1, **told}))
    assert told["graphs"] == ["model"] and agreement(source, Served(tmp_path, in_float32=True))["off"] <= ALLOWED


def test_codes_stay_codes_in_the_file(exports: Any) -> None:
    dense, coded = (exports("bert", how, "openvino")[1] for how in ("dense", "codes"))
    assert weight_bytes(coded) < 0.4 * weight_bytes(dense)
    assert Served(coded).weight_count["bytes"] == weight_bytes(coded)


@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_of_four_bits_take_four_bits_in_openvino(symmetric: bool, tmp_path: Path) -> None:
    sizes = {}
    for bits in (8, 4):
        model = tiny_model("bert", layers=1)
        how = {"engine": "hfcompress", "group_size": 32, "symmetric": symmetric}
        Quantize(bits=bits, embeddings=bits, **how).run(model, None)
        source, found = served(model.eval(), "openvino", tmp_path / str(bits))
        assert agreement(source, found)["off"] <= ALLOWED
        sizes[bits] = weight_bytes(tmp_path / str(bits))
    codes = sum(
        one.weight.numel()
        for one in tiny_model("bert", layers=1).modules()
        if isinstance(one, torch.nn.Linear | torch.nn.Embedding)
    )
    assert sizes[8] - sizes[4] == pytest.approx(codes / 2, rel=0.02)  # all but the few that no group divides


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("bert", {"bits": 4, "group_size": 32}),
        ("llama", {"bits": 4, "group_size": 32, "symmetric": False}),
        ("bert", {"bits": 8, "group_size": 32}),
        ("gpt2", {"bits": 4}),
    ],
)
def test_codes_that_plain_operators_would_unpack_are_blocks_of_onnx_runtime(
    kind: str, how: dict[str, Any], tmp_path: Path
) -> None:
    import onnx

    model = tiny_model(kind, layers=1)
    Quantize(engine="hfcompress", **how).run(model, None)
    layers = [one for one in model.modules() if isinstance(one, QuantLinear)]
    source, found = served(model.eval(), "onnx", tmp_path)
    told = agreement(source, found)
    assert told["off"] <= ALLOWED and told.get("same_tokens", 1.0) == 1.0
    nodes = [one for one in onnx.load(tmp_path / "model.onnx").graph.node if one.op_type == "MatMulNBits"]
    assert len(nodes) == len(layers) > 3
    assert any(isinstance(one, StoredLinear) for one in source.model.modules()), "the model is as it was"


def test_onnx_runtime_rounds_what_codes_of_a_model_that_writes_read(tmp_path: Path) -> None:
    model = tiny_model("llama", layers=1)
    Quantize(bits=4, engine="hfcompress", group_size=32).run(model, None)
    source, found = served(model.eval(), "onnx", tmp_path, quantize="int8")
    told = agreement(source, found, is_exact=False)
    assert 1e-5 < told["off"] < 0.05  # inputs were rounded, to a hundredth
    with pytest.raises(CompressionError, match=r"quantize: int8 is for models that answer at once"):
        FORMATS["onnx"](quantize="int8").write(source_of(tiny_model("llama", layers=1)), tmp_path / "dense")


def test_openvino_chooses_its_precision_but_where_logits_are_compared(exports: Any) -> None:
    import openvino

    folder = exports("bert", "dense", "openvino")[1]
    graph = openvino.Core().read_model(folder / "openvino_model.xml")
    assert not graph.has_rt_info(["runtime_options", "INFERENCE_PRECISION_HINT"])
    assert graph.has_rt_info(["runtime_options", "KV_CACHE_PRECISION"])
    runner = Served(folder, in_float32=True).exported.runners["model"]
    assert runner.compiled_model.get_property("INFERENCE_PRECISION_HINT") == openvino.Type.f32


@pytest.mark.parametrize("to", ["openvino", "onnx"])
def test_int8_is_near(to: str, tmp_path: Path) -> None:
    source, found = served(compressed("bert", "codes"), to, tmp_path, quantize="int8", samples=8)
    told = agreement(source, found, is_exact=False)
    # a random model feels rounding more than any other: test_readme holds that a real one answers alike
    assert 1e-5 < told["off"] < 0.5


def test_int8_of_a_model_that_writes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CompressionError, match="quantize: int8 is for models that answer at once, not for those that write"):
        Openvino(quantize="int8").write(source_of(tiny_model("llama")), tmp_path)


def test_executorch_says_what_pytorch_says(tmp_path: Path) -> None:
    pytest.importorskip(
        "executorch", reason="executorch is not installed: it brings many packages, and is no part of `make test`"
    )
    for number, (kind, how) in enumerate([("bert", "codes"), ("vit", "dense"), ("t5", "dense")]):
        told = agreement(*served(compressed(kind, how), "executorch", tmp_path / str(number)))
        assert told["off"] <= ALLOWED and told.get("same_tokens", 1.0) == 1.0


def test_executorch_refuses_what_goes_on_with_a_cache(tmp_path: Path) -> None:
    with pytest.raises(CompressionError) as told:
        Executorch().write(source_of(tiny_model("llama")), tmp_path)
    assert str(told.value) == (
        "export to executorch: LlamaForCausalLM goes on with a cache, and a program can't begin with an empty one; export it to "
        "gguf, onnx or openvino."
    )


def test_the_check_notices_what_differs(exports: Any) -> None:
    source, folder = exports("bert", "dense", "openvino")
    other = copy.deepcopy(source.model)
    with torch.no_grad():
        other.classifier.bias += 0.1
    with pytest.raises(CompressionError, match="the graph computes other logits than PyTorch"):
        agreement(dataclasses.replace(source, model=other), Served(folder, in_float32=True))


@pytest.mark.parametrize("keep_codes", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("engine", ["hfcompress", "bitsandbytes"])
def test_the_plain_form_computes_the_same(engine: str, bits: int, keep_codes: bool) -> None:
    model = tiny_model("bert")
    Quantize(bits, engine=engine).run(model, None)
    batch = FewBatches("bert").batch(seed=7)
    batch.pop("labels")
    with torch.no_grad():
        expected = model(**batch).logits
        flat = plain(model, keep_codes)
        torch.testing.assert_close(flat(**batch).logits, expected, atol=0.05, rtol=0.05)
    stored = [one for one in flat.modules() if isinstance(one, StoredLinear | StoredEmbedding)]
    assert bool(stored) == (keep_codes and not (engine == "bitsandbytes" and bits == 4))
    assert getattr(flat.config, "quantization_config", None) is None and flat.dtype == torch.float32


def test_a_table_in_two_places_stays_one() -> None:
    model = tiny_model("t5")
    Quantize(**CODES).run(model, None)
    plain(model)
    assert model.shared is model.encoder.embed_tokens or torch.equal(model.shared.codes, model.encoder.embed_tokens.codes)


def test_an_adapter_beside_the_model_is_refused() -> None:
    model = tiny_model("bert")
    model._hf_peft_config_loaded = True
    with pytest.raises(
        CompressionError, match="an adapter lies beside the model, and an export holds one model; set merge: true"
    ):
        plain(model)
