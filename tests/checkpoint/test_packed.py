"""Packed storage: bit for bit for every dtype and layer kind, loud without us, bounded, and damage is told."""

from __future__ import annotations

import json
import random
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, Trainer, pipeline

import hfcompress  # noqa: F401
from hfcompress import CompressionError, LowRank, PruneHeads, PruneNeurons, PruneWeights, Quantize
from hfcompress.checkpoint import packed
from hfcompress.checkpoint.artifact import save
from hfcompress.checkpoint.packed import MOST_DENSE, is_packed, pack, unpack
from hfcompress.checkpoint.proof import prove
from hfcompress.checkpoint.verify import verify
from tests.methods.test_laws import FewBatches, auto, logits
from tests.run.test_train import Rows, arguments
from tests.tiny import tiny_model, tiny_tokenizer

DTYPES = [
    *(torch.float32, torch.bfloat16, torch.float16, torch.float64),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
]
SHAPES = [(), (0,), (3, 0), (1,), (7,), (5000,), (64, 96), (130, 40, 3), (2, 3, 4, 5, 6)]


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(bits(one), bits(other))


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], zeros: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator) * 20 * (torch.rand(shape, generator=generator) >= zeros)
    return (values > 0) if dtype == torch.bool else values.abs().to(dtype) if dtype == torch.uint8 else values.to(dtype)


@pytest.mark.parametrize("zeros", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_shape_comes_back_bit_for_bit(dtype: torch.dtype, shape: tuple[int, ...], zeros: float) -> None:
    tensor = random_tensor(dtype, shape, zeros)
    stream = pack(tensor)
    assert stream.dtype == torch.uint8 and stream.dim() == 1 and is_packed(stream)
    assert same(unpack(stream, "x"), tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_what_floats_can_hold_beside_numbers_comes_back(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    odd = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, info.tiny, -info.tiny, info.max, info.min], dtype=dtype)
    whole = {torch.float32: torch.int32, torch.float64: torch.int64}.get(dtype, torch.int16)
    some = torch.randint(torch.iinfo(whole).min, torch.iinfo(whole).max, (4096,), dtype=whole).view(dtype)  # payloads of NaN
    for tensor in (odd.repeat(400), some, torch.full((3000,), -0.0, dtype=dtype)):
        assert same(unpack(pack(tensor), "x"), tensor)


def test_strided_and_transposed_tensors_come_back_as_they_read() -> None:
    tensor = torch.randn(60, 80)
    for view in (tensor.T, tensor[::2, 1::3], tensor.expand(3, 60, 80)):
        assert same(unpack(pack(view), "x"), view.contiguous())


def test_it_is_as_small_as_the_counts_allow() -> None:
    """Within a percent of the entropy of bytes for codes; exponents alone for floats; a bit a weight, and the rest, for zeros."""
    codes = random_tensor(torch.int8, (512, 512))
    counts = bits(codes).bincount().double()
    entropy = float(-(counts[counts > 0] / codes.numel()).log2() @ counts[counts > 0]) / 8
    assert len(pack(codes)) < 1.01 * entropy + 2048
    assert len(pack(torch.randn(512, 512).bfloat16())) < 0.68 * 2 * 512 * 512
    half = torch.randn(512, 512).masked_fill_(torch.rand(512, 512) < 0.5, 0.0)
    assert len(pack(half)) < (0.5 * len(pack(torch.randn(512, 512))) + 512 * 512 / 8) * 1.02
    narrow = torch.cat([codes[:256].div(8, rounding_mode="trunc"), codes[256:]])  # rows that are spread alike share a table
    together = bits(narrow).bincount().double()
    assert len(pack(narrow)) < 0.97 * float(-(together[together > 0] / codes.numel()).log2() @ together[together > 0]) / 8
    assert len(pack(torch.randint(0, 256, (4096,), dtype=torch.uint8))) < 4096 + 64, "noise is left as it is"


def test_damage_is_told_or_changes_nothing() -> None:
    rng = random.Random(0)
    tensors = [
        *(random_tensor(torch.int8, (40, 64)), random_tensor(torch.float32, (40, 64), 0.5), torch.randn(3)),
        *(random_tensor(torch.bfloat16, (64, 64)), torch.zeros(2000)),
    ]
    refused = 0
    for number in range(600):
        tensor = tensors[number % len(tensors)]
        raw = bytearray(pack(tensor).numpy().tobytes())
        for _ in range(rng.choice([1, 1, 3])):
            way, place = rng.choice(["flip", "set", "cut", "grow"]), rng.randrange(len(raw))
            if way == "flip":
                raw[place] ^= 1 << rng.randrange(8)
            elif way == "set":
                raw[place] = rng.choice([0, 255, 127])
            elif way == "cut":
                raw = raw[: place + 1]
            else:
                raw += bytes(rng.randrange(256) for _ in range(4))
        try:
            assert same(unpack(torch.frombuffer(raw, dtype=torch.uint8), "some.weight"), tensor)
        except CompressionError as error:
            assert str(error).startswith("'some.weight': ")
            refused += 1
    assert refused > 450


def test_a_small_file_that_asks_for_all_memory_is_refused_first() -> None:
    sentence = (
        rf"'w': \d+ packed bytes stand for \d+, more than {MOST_DENSE} times as many; the checkpoint is damaged or hostile"
    )
    for sizes in ((1 << 40, 1 << 20), (0, (1 << 63) + 5)):
        start = packed.MAGIC + struct.pack("<BBB", 0, 0, 2) + struct.pack("<2Q", *sizes) + bytes(2000)
        with pytest.raises(CompressionError, match=sentence):
            unpack(torch.frombuffer(bytearray(start), dtype=torch.uint8), "w")


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(packed, "find_spec", lambda _: None)
    with pytest.raises(CompressionError, match=r"storage: packed: packed weights need the package constriction; pip install"):
        save(tiny_model("bert"), None, tmp_path, packed=True)


def test_a_dtype_that_has_no_place_is_named() -> None:
    with pytest.raises(CompressionError, match=r"storage: packed holds tensors of at most 8 dimensions, and this one has 9"):
        pack(torch.zeros([1] * 9))
    with pytest.raises(CompressionError, match=r"storage: packed can't hold torch.complex64; possible are float32, bfloat16"):
        pack(torch.zeros(3, dtype=torch.complex64))


WAYS: dict[str, Any] = {
    "dense": lambda model, task: None,
    "cut": lambda model, task: (PruneHeads(0.5, ranking="global").run(model, task), PruneNeurons(0.4).run(model, task)),
    "factors": lambda model, task: LowRank(ratio=0.5).run(model, None),
    "zeros": lambda model, task: PruneWeights(0.5).run(model, None),
    "ours": lambda model, task: Quantize(8, engine="hfcompress", embeddings=8).run(model, None),
    "ours, 4": lambda model, task: Quantize(4, engine="hfcompress", embeddings=4, symmetric=False).run(model, None),
    "nf4": lambda model, task: Quantize(4).run(model, None),
    "int8": lambda model, task: Quantize(8).run(model, None),
    "bfloat16": lambda model, task: model.bfloat16(),
}


def tensors_in(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            found |= {name: opened.get_tensor(name) for name in list(opened.keys())}
    return found


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("way", WAYS)
def test_a_packed_artifact_loads_plainly_and_is_saved_packed_again(way: str, kind: str, tmp_path: Path) -> None:
    model, once, twice, plain = tiny_model(kind), tmp_path / "once", tmp_path / "twice", tmp_path / "plain"
    WAYS[way](model, FewBatches(kind))
    save(model, None, plain)
    save(model, tiny_tokenizer(), once, packed=True)
    stored = tensors_in(once)
    assert stored and all(is_packed(one) for one in stored.values())
    again, expected = auto(kind).from_pretrained(once), logits(auto(kind).from_pretrained(plain), kind)
    assert torch.equal(logits(again, kind), expected)
    for name, tensor in again.state_dict().items():
        assert same(tensor, model.state_dict()[name].to(tensor.device)), name
    again.save_pretrained(twice)
    assert {name: bytes(one.numpy()) for name, one in tensors_in(twice).items()} == {
        name: bytes(one.numpy()) for name, one in stored.items()
    }
    assert torch.equal(logits(auto(kind).from_pretrained(twice), kind), expected)
    verify(once)


def test_it_is_proven_in_a_fresh_process(tmp_path: Path) -> None:
    model = tiny_model("bert")
    PruneHeads(0.5, ranking="global").run(model, FewBatches("bert"))
    save(model, None, tmp_path, packed=True)
    assert prove(model, FewBatches("bert").batch(), tmp_path) == 0.0


def test_the_base_and_another_head_load_from_it(tmp_path: Path) -> None:
    save(model := tiny_model("bert"), None, tmp_path, packed=True)
    base = AutoModel.from_pretrained(tmp_path)
    assert same(base.encoder.layer[0].output.dense.weight, model.bert.encoder.layer[0].output.dense.weight)
    other = AutoModelForCausalLM.from_pretrained(tmp_path, is_decoder=True)
    assert same(other.bert.embeddings.word_embeddings.weight, model.bert.embeddings.word_embeddings.weight)


def test_shards_are_packed_each(tmp_path: Path) -> None:
    save(model := tiny_model("bert"), None, tmp_path / "one", packed=True)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "one")
    again.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    whole = AutoModelForSequenceClassification.from_pretrained(tmp_path / "many")
    assert torch.equal(logits(whole, "bert"), logits(model, "bert"))


def test_a_method_after_it_and_a_save_are_packed_still_and_a_plain_save_is_not(tmp_path: Path) -> None:
    save(tiny_model("bert"), None, tmp_path / "one", packed=True)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "one")
    PruneNeurons(0.4, ranking="global").run(model, FewBatches("bert"))
    model.save_pretrained(tmp_path / "two")
    assert all(is_packed(one) for one in tensors_in(tmp_path / "two").values())
    assert torch.equal(
        logits(AutoModelForSequenceClassification.from_pretrained(tmp_path / "two"), "bert"), logits(model, "bert")
    )
    save(model, None, tmp_path / "three", packed=False)
    assert not any(is_packed(one) for one in tensors_in(tmp_path / "three").values())
    assert torch.equal(
        logits(AutoModelForSequenceClassification.from_pretrained(tmp_path / "three"), "bert"), logits(model, "bert")
    )


def test_a_pipeline_takes_it(tmp_path: Path) -> None:
    save(tiny_model("bert"), tiny_tokenizer(), tmp_path, packed=True)
    assert pipeline("text-classification", str(tmp_path))("the cat and the dog")[0]["label"]


@pytest.mark.parametrize("way", ["weight", "config"])
def test_a_head_that_is_tied_no_more_is_stored(way: str, tmp_path: Path) -> None:
    save(tiny_model("llama", tie_word_embeddings=True), None, tmp_path / "one", packed=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 2)
    if way == "config":
        model.config.tie_word_embeddings = False
    model.save_pretrained(tmp_path / "two")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    assert same(again.lm_head.weight, model.lm_head.weight)
    assert same(again.model.embed_tokens.weight, model.model.embed_tokens.weight)


def test_an_adapter_on_it_is_a_file_of_pefts(tmp_path: Path) -> None:
    from peft import LoraConfig

    save(tiny_model("bert"), None, tmp_path / "base", packed=True)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    model.add_adapter(LoraConfig(target_modules=["query"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    again.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(again, "bert"), logits(model, "bert"))


def test_a_trainer_resumes_on_it_and_brings_the_best_back(tmp_path: Path) -> None:
    save(tiny_model("bert"), None, tmp_path / "base", packed=True)
    rows = Rows("bert")

    def trainer(**more: Any) -> Trainer:
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
        fields = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1, **more}
        return Trainer(model=model, args=arguments(tmp_path / "work", 8, **fields), train_dataset=rows, eval_dataset=rows)

    trainer(max_steps=2, lr_scheduler_type="constant").train()
    resumed = trainer(lr_scheduler_type="constant")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    best = trainer(load_best_model_at_end=True, eval_strategy="steps", eval_steps=2)
    best.train()
    stored = load_file(str(tmp_path / "work" / "checkpoint-4" / "model.safetensors"))
    assert all(is_packed(one) for one in stored.values())


def test_it_may_be_offloaded_to_disk(tmp_path: Path) -> None:
    save(model := tiny_model("bert"), None, tmp_path / "base", packed=True)
    places = {"bert.embeddings": "cpu", "bert.encoder.layer.0": "cpu", "bert.encoder.layer.1": "disk"}
    places |= {"bert.pooler": "cpu", "classifier": "cpu"}
    again = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", device_map=places, offload_folder=str(tmp_path / "offload")
    )
    assert torch.equal(logits(again, "bert"), logits(model, "bert"))


def test_without_us_it_is_loud(tmp_path: Path) -> None:
    save(tiny_model("bert"), None, tmp_path, packed=True)
    program = f"from transformers import AutoModel; AutoModel.from_pretrained({str(tmp_path)!r})"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode != 0


def test_a_damaged_file_names_the_tensor(tmp_path: Path) -> None:
    save(tiny_model("bert"), None, tmp_path, packed=True)
    state = load_file(tmp_path / "model.safetensors")
    name = "bert.encoder.layer.0.output.dense.weight"
    state[name][-9] ^= 64
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CompressionError, match=rf"'{name}': its packed bytes are damaged; download the checkpoint again"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_a_storage_that_is_not_known_is_refused(tmp_path: Path) -> None:
    save(tiny_model("bert"), None, tmp_path, packed=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["storage"] = "folded"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CompressionError, match=r"config.json: storage 'folded' in quantization_config; possible are format, modules"
    ):
        AutoModel.from_pretrained(tmp_path)


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    model: nn.Module = tiny_model("gpt2")
    save(model, None, tmp_path, packed=True)
    stored = tensors_in(tmp_path)
    assert "transformer.wte.weight" in stored and "lm_head.weight" not in stored
