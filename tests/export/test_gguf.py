"""GGUF, tried with llama.cpp itself: the same tokens, the very codes, the whole tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from tokenizers import Regex, pre_tokenizers

from hfcompress import CompressionError, LowRank, PruneHeads, PruneNeurons, Quantize
from hfcompress.export.gguf import FILE, MODELFILE, Gguf, shape_of
from hfcompress.export.gguf_tensors import quantised
from hfcompress.export.gguf_tokenizer import _WORDS
from tests.export.models import VOCABULARY, LlamaCpp, byte_tokenizer, source_of
from tests.methods.test_laws import FewBatches
from tests.tiny import tiny_model, tiny_tokenizer

PROMPT = "Alice was beginning to get very tired of sitting by her sister on the bank, 42 times."
WRITTEN = 12
WIDTHS = {0: list(range(64)), 1: list(range(96))}


def model_of(kind: str, **config: Any) -> Any:
    """A random model whose likeliest token is far ahead of the next."""
    model = tiny_model(kind, vocab_size=VOCABULARY, **config)
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    return model


def cut(model: Any, how: str) -> Any:
    batches = FewBatches("llama")
    if how == "uneven":  # heads too, where llama.cpp allows it
        if model.model.layers[0].self_attn.q_proj.bias is None:
            PruneHeads(keep={0: [0, 1]}).run(model, batches)
        PruneNeurons(keep=WIDTHS).run(model, batches)
    if how == "even":
        PruneHeads(0.5, even=True).run(model, batches)
        PruneNeurons(0.25, even=True, round_to=32).run(model, batches)
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


def write(model: Any, tokenizer: Any, folder: Path, **fields: Any) -> dict[str, Any]:
    return Gguf(**fields).write(source_of(model, tokenizer), folder)


@pytest.mark.parametrize(
    ("kind", "how", "architecture"),
    [
        ("llama", "whole", "llama"),
        ("llama", "even", "llama"),
        ("llama", "uneven", "deci"),
        ("mistral", "uneven", "deci"),
        ("qwen2", "whole", "qwen2"),
        ("qwen2", "uneven", "deci"),
        ("qwen3", "even", "qwen3"),
    ],
)
def test_llama_cpp_writes_what_transformers_writes(
    kind: str, how: str, architecture: str, tokenizer: Any, tmp_path: Path
) -> None:
    model = cut(model_of(kind), how)
    told = write(model, tokenizer, tmp_path, type="F32")
    assert told["architecture"] == architecture
    ids = tokenizer(PROMPT)["input_ids"]
    expected = model.generate(
        torch.tensor([ids]), do_sample=False, max_new_tokens=WRITTEN, min_new_tokens=WRITTEN, eos_token_id=None
    )
    llama = LlamaCpp(tmp_path / FILE)
    found = llama.written(ids, WRITTEN)
    with torch.no_grad():  # two that are as likely may change places
        logits = model(expected).logits[0, len(ids) - 1 : -1].topk(2).values
    clear = int(((logits[:, 0] - logits[:, 1]) > 1e-2).long().cumprod(0).sum())
    assert clear >= WRITTEN // 2 and found[:clear] == expected[0, len(ids) :].tolist()[:clear]
    assert llama.length(PROMPT) == len(ids), "its tokenizer cuts as ours does"
    assert (tmp_path / MODELFILE).read_text() == f"FROM ./{FILE}\n"


@pytest.mark.parametrize(
    ("fields", "type"),
    [
        ({"bits": 4, "group_size": 32, "symmetric": False}, "Q4_1"),
        ({"bits": 4, "group_size": 32}, "Q4_0"),
        ({"bits": 8, "group_size": 32, "embeddings": 8}, "Q8_0"),
    ],
)
def test_codes_of_ours_are_written_as_they_are(fields: dict[str, Any], type: str, tokenizer: Any, tmp_path: Path) -> None:
    model = model_of("llama")
    Quantize(engine="hfcompress", **fields).run(model, None)
    expected = model.model.layers[1].mlp.down_proj.dequantised()
    told = write(model, tokenizer, tmp_path)
    assert told["matrices_as_coded"] >= 14
    tensor = next(one for one in GGUFReader(tmp_path / FILE).tensors if one.name == "blk.1.ffn_down.weight")
    assert tensor.tensor_type == GGMLQuantizationType[type]
    np.testing.assert_array_equal(dequantize(tensor.data, tensor.tensor_type), expected.numpy())
    assert LlamaCpp(tmp_path / FILE).length(PROMPT) == len(tokenizer(PROMPT)["input_ids"])


def test_a_scale_a_row_is_one_of_each_block_in_half_precision(tokenizer: Any, tmp_path: Path) -> None:
    model = model_of("llama")
    Quantize(8, engine="hfcompress", embeddings=8).run(model, None)
    query, expected = model.model.layers[0].mlp.up_proj, model.model.layers[0].mlp.up_proj.dequantised()
    assert write(model, tokenizer, tmp_path)["matrices_quantised"] == 0
    tensor = next(one for one in GGUFReader(tmp_path / FILE).tensors if one.name == "blk.0.ffn_up.weight")
    found = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type))
    torch.testing.assert_close(found, expected, rtol=2**-11, atol=0)
    assert query.group_size is None


@pytest.mark.parametrize("type", ["F16", "Q8_0", "Q4_0", "Q4_1"])
def test_a_type_is_what_its_blocks_are(type: str, tokenizer: Any, tmp_path: Path) -> None:
    model = model_of("llama")
    weight = model.model.layers[0].mlp.gate_proj.weight.detach()
    write(model, tokenizer, tmp_path, type=type)
    tensors = {one.name: one for one in GGUFReader(tmp_path / FILE).tensors}
    tensor, table = tensors["blk.0.ffn_gate.weight"], tensors["token_embd.weight"]
    assert tensor.tensor_type == GGMLQuantizationType[type]
    assert table.tensor_type == GGMLQuantizationType["Q8_0" if type.startswith("Q") else type]
    step = weight.abs().max() * {"F16": 2**-10, "Q8_0": 1 / 127, "Q4_0": 1 / 8, "Q4_1": 2 / 15}[type]
    assert np.abs(dequantize(tensor.data, tensor.tensor_type) - weight.numpy()).max() <= step
    assert LlamaCpp(tmp_path / FILE).written([5, 6, 7], 2)


def test_rows_that_are_no_multiple_of_a_block_stay_half_precision() -> None:
    assert quantised(np.ones((4, 48), np.float32), "Q4_1")[1] == "F16"
    assert quantised(np.ones((4, 64), np.float32), "Q4_1")[1] == "Q4_1"


def test_factors_are_multiplied_out(tokenizer: Any, tmp_path: Path) -> None:
    model = model_of("llama")
    LowRank(rank=8, target_modules=["down_proj"]).run(model, None)
    expected = model.model.layers[0].mlp.down_proj.dequantised()
    write(model, tokenizer, tmp_path, type="F32")
    tensor = next(one for one in GGUFReader(tmp_path / FILE).tensors if one.name == "blk.0.ffn_down.weight")
    np.testing.assert_allclose(tensor.data, expected.numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("before", "name"),
    [
        (None, "gpt-2"),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]), "smollm"),
        *(
            (
                pre_tokenizers.Sequence(
                    [
                        pre_tokenizers.Split(Regex(_WORDS % digits), "isolated"),
                        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                    ]
                ),
                name,
            )
            for digits, name in (("{1,3}", "llama-bpe"), ("", "qwen2"))
        ),
    ],
    ids=["gpt-2", "smollm", "llama-bpe", "qwen2"],
)
def test_a_tokenizer_is_whole_in_the_file(before: Any, name: str, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(before, chat_template="{{ messages[0]['content'] }}")
    write(model_of("llama"), tokenizer, tmp_path, type="F32")
    fields = GGUFReader(tmp_path / FILE).fields
    assert fields["tokenizer.ggml.pre"].contents() == name
    tokens, types = fields["tokenizer.ggml.tokens"].contents(), fields["tokenizer.ggml.token_type"].contents()
    assert tokens[:VOCABULARY] == tokenizer.convert_ids_to_tokens(list(range(VOCABULARY)))
    assert types[:2] == [3, 3] and set(types[2:]) == {1}, "special tokens are control tokens"
    assert fields["tokenizer.ggml.eos_token_id"].contents() == tokenizer.eos_token_id
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False
    assert fields["tokenizer.chat_template"].contents() == tokenizer.chat_template
    llama = LlamaCpp(tmp_path / FILE)
    for text in ("12345 and 67", "it's  spaced\n\nout", "UPPER lower_mixed (brackets)!"):
        assert llama.length(text) == len(tokenizer(text)["input_ids"]), text


def test_chat_templates_keep_their_names(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(chat_template={"default": "{{ messages[0]['content'] }}", "tool_use": "{{ tools }}"})
    write(model_of("llama"), tokenizer, tmp_path, type="F32")
    fields = GGUFReader(tmp_path / FILE).fields
    assert fields["tokenizer.chat_template"].contents() == tokenizer.chat_template["default"]
    assert fields["tokenizer.chat_templates"].contents() == ["tool_use"]
    assert fields["tokenizer.chat_template.tool_use"].contents() == "{{ tools }}"
    assert LlamaCpp(tmp_path / FILE).length("a cat") == len(tokenizer("a cat")["input_ids"])


def test_positions_that_are_scaled_are_told(tokenizer: Any, tmp_path: Path) -> None:
    scaled = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    model = model_of("llama", rope_parameters={**scaled, "original_max_position_embeddings": 32})
    write(model, tokenizer, tmp_path, type="F32")
    factors = next(one for one in GGUFReader(tmp_path / FILE).tensors if one.name == "rope_freqs.weight").data
    plain = 10000.0 ** -(np.arange(0, 16, 2) / 16)
    np.testing.assert_allclose(plain / factors, model.model.rotary_emb.inv_freq.numpy(), rtol=1e-5)
    ids = tokenizer(PROMPT)["input_ids"]
    expected = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=4, min_new_tokens=4, eos_token_id=None)
    assert LlamaCpp(tmp_path / FILE).written(ids, 4) == expected[0, len(ids) :].tolist()


@pytest.mark.parametrize(
    ("kind", "how", "sentence"),
    [
        (
            "gpt2",
            "whole",
            "export to gguf: GPT2LMHeadModel can't be held by it here; what can: causal language models of the types llama, "
            "mistral, qwen2, qwen3; export it to onnx or openvino.",
        ),
        (
            "qwen3",
            "uneven",
            "export to gguf: its layers have different numbers of heads or neurons, which llama.cpp can hold of llama, mistral, "
            "qwen2, not of qwen3; cut it with even: true, or export it to onnx or openvino.",
        ),
        (
            "qwen2",
            "even",
            "export to gguf: its queries have a bias, which llama.cpp wants as wide as the model, and heads were cut; leave the "
            "heads of qwen2 whole, or export it to onnx or openvino.",
        ),
    ],
)
def test_what_llama_cpp_cant_hold_is_refused(kind: str, how: str, sentence: str) -> None:
    with pytest.raises(CompressionError) as told:
        shape_of(cut(model_of(kind), how) if how != "whole" else model_of(kind))
    assert str(told.value) == sentence


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (
            {"hidden_act": "gelu"},
            "export to gguf: its activation is 'gelu', and llama.cpp's graphs of llama have silu; export it to onnx or openvino.",
        ),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
            "export to gguf: its positions are scaled by 'dynamic'; possible: default, linear, yarn, llama3; export it to onnx or "
            "openvino.",
        ),
    ],
)
def test_what_its_graphs_compute_otherwise_is_refused(config: Any, sentence: str, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(CompressionError) as told:
        write(model_of("llama", **config), tokenizer, tmp_path)
    assert str(told.value) == sentence


def test_a_tokenizer_that_llama_cpp_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CompressionError, match=r"its tokenizer is 'WordLevel', and llama\.cpp takes byte-level BPE as GPT-2"):
        write(model_of("llama"), tiny_tokenizer(), tmp_path)
    with pytest.raises(
        CompressionError, match=r"for which llama\.cpp's name isn't known here; known are gpt-2, smollm, llama-bpe"
    ):
        write(model_of("llama"), byte_tokenizer(pre_tokenizers.Whitespace()), tmp_path)
    with pytest.raises(CompressionError, match="no tokenizer lies beside the model"):
        write(model_of("llama"), None, tmp_path)
