"""What the tests of exports share: a source without a task, a byte-level tokenizer, llama.cpp."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hfcompress.export import Source

TEXT = Path(__file__).parents[2] / "hfcompress" / "tasks" / "alice.txt"
VOCABULARY = 600


def source_of(model: Any, processor: Any = None) -> Source:
    """Random inputs of the kind that the model reads."""
    config = model.config
    is_image, is_sound = (model.main_input_name == name for name in ("pixel_values", "input_features"))

    def example(size: int, length: int | None) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(size)
        if is_image:
            return {"pixel_values": torch.randn(size, 3, config.image_size, config.image_size, generator=generator)}
        if is_sound:
            heard = torch.randn(size, config.num_mel_bins, 2 * config.max_source_positions, generator=generator)
            return {
                "input_features": heard,
                "decoder_input_ids": torch.randint(5, config.vocab_size, (size, 4), generator=generator),
            }
        ids = torch.randint(5, config.vocab_size, (size, length or 12), generator=generator)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if config.is_encoder_decoder:
            batch["decoder_input_ids"] = torch.randint(5, config.vocab_size, (size, 4), generator=generator)
        return batch

    def samples(count: int) -> Iterator[dict[str, torch.Tensor]]:
        return (example(1, 8 + number) for number in range(count))

    return Source(model, processor, example, samples, has_length=not (is_image or is_sound))


def byte_tokenizer(cut: Any = None, **told: Any) -> PreTrainedTokenizerFast:
    """A small BPE over the letters of a novel. `cut`: how texts are cut before merging; GPT-2's way if absent."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = cut or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = "".join(letter for letter in TEXT.read_text(encoding="utf-8") if ord(letter) < 128)
    special = ["<|end|>", "<|start|>"]
    tokenizer.train_from_iterator(
        [text], trainers.BpeTrainer(vocab_size=VOCABULARY, show_progress=False, special_tokens=special)
    )
    names = {"eos_token": "<|end|>", "bos_token": "<|start|>", "pad_token": "<|end|>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{**names, **told})


class LlamaCpp:
    """llama.cpp on a file, on one thread; its server listens to nobody."""

    def __init__(self, path: Path) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.cpuparams.n_threads = 256, 1, 1
        params.warmup, params.n_gpu_layers, params.verbosity = False, 0, -1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32  # its own are of half precision
        params.port, params.hostnames = 0, ["127.0.0.1"]
        self.server = xllamacpp.Server(params)

    def complete(self, prompt: Any, tokens: int) -> dict[str, Any]:
        asked = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "logprobs": 1, "ignore_eos": True}
        told = self.server.handle_completions(asked)
        return json.loads(told) if isinstance(told, str) else told

    def written(self, ids: list[int], tokens: int) -> list[int]:
        """The likeliest tokens after these."""
        content = self.complete(ids, tokens)["choices"][0]["logprobs"]["content"]
        return [one["id"] for one in content]

    def length(self, text: str) -> int:
        """How many tokens it makes of a text."""
        return int(self.complete(text, 1)["usage"]["prompt_tokens"])
