"""The picture of the layers tells the bits that are stored for each weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hfcompress import LowRank, PruneHeads, Quantize
from hfcompress.checkpoint.errors import CompressionError
from hfcompress.results.layer_plot import cells, is_worth_it, plot_layers
from tests.tiny import tiny_model


def bits(model: Any) -> dict[tuple[int | None, str], float]:
    return {(cell.index, cell.place): cell.bits for cell in cells(model)}


def test_dense_layers_have_the_bits_of_their_dtype() -> None:
    model = tiny_model("gpt2").to(torch.bfloat16)
    assert set(bits(model).values()) == {16.0}
    assert {index for index, _ in bits(model)} == {0, 1, None}
    assert not is_worth_it(model)
    PruneHeads(0.5, scores="magnitude").run(model, None)
    assert set(bits(model).values()) == {16.0}, "a cut layer stores what it computes with"


def test_codes_and_factors_are_told_with_what_lies_beside_them() -> None:
    model = tiny_model("bert")
    LowRank(rank=8, target_modules=["intermediate.dense"]).run(model, None)
    fields: dict[str, Any] = {"bits_pattern": {"layer.0.*query": 8}, "skip_modules": ["key"], "group_size": 32}
    Quantize(4, engine="hfcompress", **fields, target_modules=["query", "key", "value"]).run(model, None)
    found = bits(model)
    layer = "bert.encoder.layer.*."
    assert found[0, f"{layer}attention.self.query"] == 8 + 16 / 32 and found[1, f"{layer}attention.self.query"] == 4 + 16 / 32
    assert found[0, f"{layer}attention.self.key"] == 32
    assert found[0, f"{layer}intermediate.dense"] == 32 * 8 * (64 + 128) / (64 * 128)
    assert not [place for _, place in found if place.startswith(f"{layer}intermediate.dense.")]
    assert found[None, "bert.embeddings.word_embeddings"] == 32 and is_worth_it(model)


@pytest.mark.parametrize("fields", [{"bits": 4}, {"bits": 8}, {"engine": "hfcompress", "convolutions": 8}], ids=str)
def test_it_is_drawn(fields: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model("vit" if "convolutions" in fields else "llama")
    Quantize(**fields).run(model, None)
    plot_layers(model, tmp_path / "layers.png")
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_without_layers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CompressionError) as error:
        plot_layers(nn.Sequential(nn.ReLU()), tmp_path / "layers.png")
    assert str(error.value) == "plot: the model has no linear layer, table or convolution to draw."
