"""An exported folder as a model: `served(**batch).logits` as PyTorch's, computed by its runtime."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast

from hfcompress.checkpoint.errors import CompressionError, first_line, shown
from hfcompress.export.graphs import DECODER, ENCODER, MODEL
from hfcompress.export.traced import quiet_exporters

TOLD = "exported.json"
"""What hfcompress knows of an export: its format and fields, and what the model weighs."""

WEIGHTS = (".bin", ".data", ".onnx", ".pte", ".gguf")
"""Endings of files that hold weights; graphs lie in them too, or in files of their own."""
GRAPHS = (".xml",)


def is_export(folder: str | Path) -> bool:
    """Whether a folder holds an export of ours."""
    return (Path(folder) / TOLD).is_file()


def told_of(folder: str | Path) -> dict[str, Any]:
    """What `exported.json` holds; CompressionError where it is damaged."""
    path = Path(folder) / TOLD
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        return {**told, "to": str(told["to"]), "parameters": int(told["parameters"]), "nonzero": int(told["nonzero"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CompressionError(
            f"{shown(str(path), 200)}: it is damaged ({first_line(error)}); export the model again."
        ) from error


class Served(nn.Module):
    """The graphs of a folder, opened by their runtime on the CPU, on as many threads as PyTorch has. `in_float32`: whatever the
    runtime would choose to multiply in: OpenVINO takes bfloat16, and for weights that are codes integers, of inputs rounded as
    they come, where the processor has instructions for them.

    Inputs are copied: OpenVINO 2026.4 reads shared ones after they are gone, and aborts when shapes change (seen with T5).
    It has neither parameters nor gradients. `weight_count`: what `measure.weigh` would count of the model it was made of, the
    bytes being those of the files that hold its weights.
    """

    def __init__(self, folder: str | Path, in_float32: bool = False) -> None:
        from transformers.exporters import ExportedModel

        super().__init__()
        told = told_of(folder)
        with quiet_exporters():
            self.exported: Any = ExportedModel.from_pretrained(Path(folder), device="cpu", **_opened(told["to"], in_float32))
        self.format: str = told["to"]
        self.caches: list[list[int]] = told.get("caches") or []
        self.config: Any = self.exported.config
        self.generation_config: Any = self.exported.generation_config
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.weight_count = {name: told[name] for name in ("parameters", "nonzero")} | {"bytes": weight_bytes(Path(folder))}
        self.eval()

    def forward(self, **batch: Tensor) -> Any:
        """What the model says of a whole batch; of a causal model, `logits` of every token."""
        if DECODER in self.exported.components:
            ids, batch = batch["decoder_input_ids"], self._masked(batch)
            return self._decode(ids, self._encode(batch), batch.get("attention_mask"), self._no_past(len(ids)))
        if not self._is_causal:
            return self.exported(share_inputs=False, **self._taken(batch))
        return self._step(batch["input_ids"], batch.get("attention_mask"), self._no_past(len(batch["input_ids"])))

    @torch.no_grad()
    def generate(self, input_ids: Tensor | None = None, max_new_tokens: int = 20, **batch: Tensor) -> Tensor:
        """The likeliest token each time, as `generate(do_sample=False)` of the model; (batch, tokens). Texts that have ended go
        on with the pad token."""
        batch = self._masked(batch if input_ids is None else {"input_ids": input_ids, **batch})
        ended = _ends(self.generation_config)
        pad = next((one for one in (self.generation_config.pad_token_id, *ended) if one is not None), 0)
        mask, read = batch.get("attention_mask"), None
        if self._is_causal:
            ids = batch["input_ids"]
        else:
            read = self._encode(batch)
            start = self.generation_config.decoder_start_token_id
            size = len(next(iter(batch.values())))
            ids = torch.full((size, 1), self.config.decoder_start_token_id if start is None else start)
        done = torch.zeros(len(ids), dtype=torch.bool)
        cache, fresh = self._no_past(len(ids)), ids
        for number in range(max_new_tokens):
            if self._is_causal:
                said = self._step(fresh, mask, cache, counted=True)
            else:
                said = self._decode(fresh if self.caches else ids, read, mask, cache, goes_on=number > 0)
            cache = said.past_key_values
            best = said.logits[:, -1].argmax(-1)
            fresh = torch.where(done, pad, best)[:, None]
            ids = torch.cat([ids, fresh], 1)
            if self._is_causal and mask is not None:
                mask = torch.cat([mask, torch.ones_like(fresh)], 1)
            done |= torch.isin(fresh[:, 0], torch.tensor(ended, dtype=torch.long))
            if bool(done.all()):
                break
        return ids

    def _taken(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the graph takes, with the masks and segments that a model makes where none are given; CompressionError where it
        would leave out something that says anything."""
        takes = self.exported.runners[MODEL].metadata.kwargs
        if (ids := batch.get("input_ids")) is not None:
            usual = {"attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
            batch = {name: value for name, value in usual.items() if name in takes} | batch
        if unread := [name for name, value in batch.items() if name not in takes and bool(value.any())]:
            raise CompressionError(
                f"export: the graph was traced without {', '.join(unread)}, which these inputs hold; it takes "
                f"{', '.join(takes)}; export the model again with a --task whose texts have them."
            )
        return {name: value for name, value in batch.items() if name in takes}

    def _masked(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """With a mask of its texts, as models make one of ones where none is given."""
        ids = batch.get("input_ids")
        return batch if ids is None else {"attention_mask": torch.ones_like(ids), **batch}

    @property
    def _is_causal(self) -> bool:
        return self.generation_config is not None and DECODER not in self.exported.components

    def _encode(self, batch: dict[str, Tensor]) -> Any:
        """All that the decoder needs of what is read: the keys and values of its layers, or hidden states."""
        runner = self.exported.runners[ENCODER]
        said = runner(share_inputs=False, **{name: batch[name] for name in runner.metadata.kwargs if name in batch})
        return said["cross"] if self.caches else said[0]

    def _decode(self, ids: Tensor, read: Any, mask: Tensor | None, cache: Any, goes_on: bool = False) -> Any:
        """Write on after these tokens; `goes_on`: of the same text as before."""
        masked = {} if mask is None else {"attention_mask": mask}
        if self.caches:
            return self._ahead(DECODER, {"decoder_input_ids": ids}, {"cross": read, **masked}, cache, goes_on)
        given = {"encoder_outputs": BaseModelOutput(last_hidden_state=read), "decoder_input_ids": ids, **masked}
        return self.exported.runners[DECODER](share_inputs=False, **given)

    def _no_past(self, size: int) -> Any:
        """The cache before the first token of so many texts; each layer has heads of its own, as they may be cut unevenly."""
        if not self.caches:
            return None
        if self.format == "openvino":  # which keeps the cache itself
            self.exported.runners[MODEL if self._is_causal else DECODER].request.reset_state()
            return None
        cache = DynamicCache()
        for layer, (heads, width, out) in enumerate(self.caches):
            cache.update(torch.empty(size, heads, 0, width), torch.empty(size, heads, 0, out), layer)
        return cache

    def _step(self, ids: Tensor, mask: Tensor | None, cache: Any, counted: bool = False) -> Any:
        """Read these tokens after those of the cache; `mask` is (batch, past + new). `counted`: positions count no pads, as in
        `generate` and unlike in a forward."""
        mask = torch.ones_like(ids) if mask is None else mask
        places = (mask if counted else torch.ones_like(mask)).long().cumsum(-1) - 1
        positions = places.clamp_min(0)[:, mask.shape[1] - ids.shape[1] :]
        return self._ahead(MODEL, {"input_ids": ids, "attention_mask": mask, "position_ids": positions}, {}, cache)

    def _ahead(self, graph: str, new: dict[str, Any], same: dict[str, Any], cache: Any, goes_on: bool = False) -> Any:
        """A graph's answer to what is new, and to what is the same at every step of a text, which OpenVINO keeps as it does the
        cache."""
        runner = self.exported.runners[graph]
        if self.format != "openvino":
            given = {name: value for name, value in {**new, **same}.items() if name in runner.metadata.kwargs}
            return runner(**given, past_key_values=cache)
        from transformers.exporters.utils import get_leaf_tensors

        takes = {name for port in runner.compiled_model.inputs for name in port.names}
        leaves = get_leaf_tensors(new if goes_on else {**new, **same})
        feed = {name: value.numpy() for name, value in leaves.items() if name in takes}
        if "beam_idx" in takes:
            size = len(next(iter(new.values())))
            feed["beam_idx"] = torch.arange(size, dtype=torch.int32).numpy()
        logits = runner.request.infer(feed)["logits"]
        return CausalLMOutputWithPast(logits=torch.from_numpy(logits.copy()))


def computed_by(folder: Path) -> list[str]:
    """The files of an export that say what is computed."""
    return sorted(path.name for path in folder.iterdir() if path.suffix in (*WEIGHTS, *GRAPHS))


def weight_bytes(folder: Path) -> int:
    """The bytes of the files that hold the weights of an export; graphs in a file of their own are left out."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix in WEIGHTS)


def _opened(to: str, in_float32: bool) -> dict[str, Any]:
    """What a runtime is told when it opens a graph."""
    if to == "openvino":
        precision = {"INFERENCE_PRECISION_HINT": "f32", "EXECUTION_MODE_HINT": "ACCURACY"} if in_float32 else {}
        return {"config": {"INFERENCE_NUM_THREADS": torch.get_num_threads(), **precision}}
    if to == "onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        return {"session_options": options}
    return {}


def _ends(generation: Any) -> list[int]:
    ends = generation.eos_token_id
    return [] if ends is None else ends if isinstance(ends, list) else [ends]
