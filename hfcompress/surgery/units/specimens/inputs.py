"""Random inputs that a model's forward takes, read off its signature and its config."""

from __future__ import annotations

import copy
import inspect
import re
from typing import Any

import torch
from torch import Tensor, nn

from hfcompress.checkpoint.config_fields import parts as config_parts

TOKEN = re.compile(r"((?<!per)_token|token_id|token_index|pad_id|start_token_id|_index|token_ids)$")


def example(model: Any, seed: int = 0) -> dict[str, Tensor]:
    """Random inputs for a tiny model's forward, on its device: batch 2, 16 tokens, or images or sounds that fit its config."""
    return _Example(model, torch.Generator().manual_seed(seed)).inputs()


@torch.no_grad()
def set_norms(model: Any, batch: dict[str, Tensor]) -> None:
    """Have batch norms normalise this batch, as after training: else signals vanish in a deep random model."""

    def settle(norm: Any, args: tuple[Any, ...]) -> None:
        values = args[0].float().transpose(0, 1).flatten(1)
        mean, variance = values.mean(1), values.var(1, unbiased=False)
        variance = variance.clamp_min(0.1 * values.square().mean())  # what hardly varies must not be blown up
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
        if norm.affine:  # eps may be far above the variance of small weights
            norm.weight *= torch.where(variance > 1e-12, (1 + norm.eps / variance).sqrt(), 1.0)

    trial = copy.deepcopy(model)  # LeViT keeps what it computed
    norms = [module for module in trial.modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)]
    for norm in norms:
        norm.register_forward_pre_hook(settle)
    if norms:
        trial(**batch)
        model.load_state_dict(trial.state_dict())


class _Example:
    BATCH, LENGTH = 2, 16

    def __init__(self, model: Any, generator: torch.Generator) -> None:
        self.model, self.config, self.generator = model, model.config, generator
        self.takes = inspect.signature(model.forward).parameters
        self.kind = self.config.model_type

    def inputs(self) -> dict[str, Tensor]:
        made = self._main()
        if "decoder_input_ids" in self.takes and self.config.is_encoder_decoder:
            made["decoder_input_ids"] = self._tokens("decoder")
        if "bbox" in self.takes:
            corners = torch.randint(0, 8, (self.BATCH, self.LENGTH, 4), generator=self.generator, device="cpu")
            made["bbox"] = torch.cat([corners[..., :2], corners[..., :2] + corners[..., 2:]], dim=-1)
        made |= self._own(made)
        return {name: tensor.to(self.model.device) for name, tensor in made.items()}

    def _main(self) -> dict[str, Tensor]:
        name = self.model.main_input_name
        if "input_ids" not in self.takes and "input_features" in self.takes and self.kind != "speech-encoder-decoder":
            name = "input_features"
        if name == "pixel_values" or (name == "inputs" and "Image" in type(self.model).__name__):
            return {name: self._images()} if self.kind != "shieldgemma2" else {"input_ids": self._tokens("encoder")}
        if name == "input_features":
            return {name: self._features()}
        if name == "input_values" or (name == "inputs" and self.kind == "speech-encoder-decoder"):
            spectrogram = getattr(self.config, "num_mel_bins", None) if self.kind == "audio-spectrogram-transformer" else None
            wave = (
                self._noise(self.BATCH, self.config.max_length, spectrogram) if spectrogram else self._noise(self.BATCH, 1600)
            )
            return {"input_values" if name == "inputs" else name: wave}
        return {name: self._tokens("encoder")}

    def _own(self, made: dict[str, Tensor]) -> dict[str, Tensor]:
        """What one family, or one head, wants beside or instead."""
        name, ids = type(self.model).__name__, made.get("input_ids")
        if name.endswith("ForMultipleChoice") and ids is not None:
            return {"input_ids": torch.stack([ids, self._tokens("encoder")], dim=1)}  # (batch, choices, tokens)
        if ids is not None and name.endswith("ForSequenceClassification") and self.config.is_encoder_decoder:
            ids[:, -1] = self.config.eos_token_id  # the head reads the state of the last of these
        if name == "LongformerForQuestionAnswering" and ids is not None:
            ids[:, [4, 5, 11]] = self.config.sep_token_id
        if self.kind == "lxmert":
            seen = self._noise(self.BATCH, 5, self.config.visual_feat_dim)
            return {"visual_feats": seen, "visual_pos": self._noise(self.BATCH, 5, self.config.visual_pos_dim)}
        if self.kind.startswith("siglip2"):
            part = self.config.vision_config
            patches = self._noise(self.BATCH, part.num_patches, part.num_channels * part.patch_size**2)
            shapes = torch.tensor([[part.num_patches // 4, 4]] * self.BATCH)
            return {
                "pixel_values": patches,
                "pixel_attention_mask": torch.ones(patches.shape[:2], dtype=torch.long),
                "spatial_shapes": shapes,
            }
        if self.kind == "voxtral_realtime":
            bins = self.config.audio_config.num_mel_bins
            return {"input_features": self._noise(self.BATCH, bins, self.LENGTH * self.config.audio_length_per_tok)}
        if self.kind == "dia":
            channels = self.config.decoder_config.num_channels
            return {"decoder_input_ids": self._tokens("decoder", channels)}
        if self.kind == "kyutai_speech_to_text":
            return {"input_ids": self._tokens("encoder", self.config.num_codebooks + 1)}
        if name.startswith("Musicgen"):
            books = getattr(self.config, "decoder", self.config).num_codebooks
            return {"input_ids": torch.cat([self._tokens("decoder") for _ in range(books)])}
        return {}

    def _vocabulary(self, side: str) -> int:
        keys = (side, f"{side}_config", "text_config", "decoder", "decoder_config")
        parts = [*(getattr(self.config, key, None) for key in keys[:2]), self.config]
        parts += [getattr(self.config, key, None) for key in keys[2:]]
        sizes = [getattr(part, "vocab_size", None) for part in parts if part is not None]
        return next((size for size in sizes if isinstance(size, int)), 97)  # CANINE hashes any number

    def _tokens(self, side: str, *more: int) -> Tensor:
        """Ids that no config knows as special tokens: padding and image places would be read as something else."""
        special: set[int] = set()
        for part in config_parts(self.config):
            for key, value in vars(part).items():
                if TOKEN.search(key):
                    special |= {one for one in (value if isinstance(value, list | tuple) else [value]) if type(one) is int}
        size = self._vocabulary(side)
        plain = torch.tensor([token for token in range(size) if token not in special] or [0])
        return plain[torch.randint(0, len(plain), (self.BATCH, self.LENGTH, *more), generator=self.generator, device="cpu")]

    def _images(self) -> Tensor:
        part = getattr(self.config, "vision_config", None) or self.config
        size = getattr(part, "image_size", None) or 64
        height, width = (size, size) if isinstance(size, int) else size
        return self._noise(self.BATCH, getattr(part, "num_channels", None) or 3, height, width)

    def _features(self) -> Tensor:
        """Whisper reads (batch, bins, frames) of one length; others (batch, frames, bins)."""
        parts = [self.config, *(getattr(self.config, key, None) for key in ("encoder_config", "audio_config", "encoder"))]
        names = ("feature_projection_input_dim", "input_dim", "num_mel_bins", "input_feat_per_channel", "feature_size")
        sizes = [getattr(part, name, None) for part in parts if part is not None for name in names]
        bins = next((size for size in sizes if isinstance(size, int)), 80)
        if self.kind == "whisper":
            return self._noise(self.BATCH, bins, 2 * self.config.max_source_positions)
        stacked = 4 if self.kind.startswith("granite_speech5") else 1
        return self._noise(self.BATCH, 64, bins * stacked)

    def _noise(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device="cpu")
