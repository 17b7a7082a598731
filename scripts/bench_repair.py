"""What repairing a cut costs in memory and time: the growth of the process over the model's own weights, at its peak.

python scripts/bench_repair.py                          # SmolLM2-135M, 128 samples of 512 tokens
python scripts/bench_repair.py --model llama-1b         # random weights in the shapes of a Llama of a billion parameters
python scripts/bench_repair.py --layers 4               # the first layers alone: memory hardly depends on how many there are
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import hfcompress  # noqa: F401
from hfcompress.methods import PruneNeurons
from hfcompress.results.measure import _watched as watched
from hfcompress.surgery.units.verify import units_of

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2": {
        **{"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30},
        **{"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
    },
    "llama-1b": {
        **{"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True},
    },
}


class Tokens:
    """Random tokens: what they are changes no cost."""

    has_data, original, processor, is_resumed = True, None, None, False

    def __init__(self, vocabulary: int, length: int) -> None:
        self.vocabulary, self.length = vocabulary, length

    def batches(self, model: Any, samples: int, batch_size: int = 8, seed: int = 0) -> Iterator[dict[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        for start in range(0, samples, batch_size):
            ids = torch.randint(self.vocabulary, (min(batch_size, samples - start), self.length), generator=generator)
            yield {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(SHAPES), default="smollm2")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    given = parser.parse_args()
    shapes = SHAPES[given.model] | ({"num_hidden_layers": given.layers} if given.layers else {})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**shapes), dtype=getattr(torch, given.dtype)).eval()
    method = PruneNeurons(0.25, scores="magnitude", repair=True, samples=given.samples)
    task = Tokens(shapes["vocab_size"], given.length)
    units_of(model, "neurons")  # what is found on a small model of its kind is no cost of the repair
    gc.collect()
    started = time.monotonic()
    _, grown = watched(lambda: method.run(model, task), torch.device("cpu"))
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    told = {
        "model": given.model,
        **vars(given),
        "weights_megabytes": round(weights / 1e6),
        "seconds": round(time.monotonic() - started),
    }
    print(json.dumps(told | {"peak_over_weights_megabytes": None if grown is None else round(grown / 1e6)}))


if __name__ == "__main__":
    main()
