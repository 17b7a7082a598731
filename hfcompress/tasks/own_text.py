"""Data-free calibration text: tokens that a causal language model samples itself, and a file that keeps them.

After Liu et al. 2023, LLM-QAT (arXiv 2305.17888): what a model was trained on is seldom at hand, but the model still tells it.
What is cut or healed on one domain forgets the others; on text of the model's own it is asked about all that it knows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from transformers import GenerationConfig

from hfcompress.calibration.progress import progress
from hfcompress.checkpoint.errors import CompressionError
from hfcompress.tasks.pretrained import quiet_transformers

BATCH = 32
"""Sequences at a time: decoding reads every weight once a token, for however many sequences."""
FILE = "own-text.safetensors"


def sampled(model: Any, tokenizer: Any, count: int, length: int, seed: int) -> np.ndarray:
    """(count, length) int64: sequences that the model samples at temperature 1, each after one ordinary token drawn at random.

    Nothing ends a sequence: after an end-of-text token the model goes on with the next text, as it was trained to, so that
    there is no padding. Neither top-k nor top-p, penalties or other habits of the checkpoint's generation config apply, as they
    would make of it another model. The same model, seed and machine give the same sequences; PyTorch's generators are left as
    they were.
    """
    tokens, draw = ordinary_tokens(model, tokenizer), np.random.default_rng(seed)
    first = torch.from_numpy(draw.choice(tokens, (count, 1))).to(next(model.parameters()).device)
    habits, pad = model.generation_config, getattr(tokenizer, "pad_token_id", None)
    # generate() fills what a config of ours leaves open, as eos, from the model's own
    model.generation_config = GenerationConfig(do_sample=True, top_k=0, use_cache=True, pad_token_id=pad or 0)
    rows = []
    try:
        with torch.no_grad(), torch.random.fork_rng(), quiet_transformers():
            torch.manual_seed(seed)
            for start in progress(range(0, count, BATCH), what="writing text", total=-(-count // BATCH)):
                given = first[start : start + BATCH]
                if length > 1:
                    given = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=length - 1)
                rows.append(given.cpu().numpy())
    finally:
        model.generation_config = habits
    return np.concatenate(rows)


def ordinary_tokens(model: Any, tokenizer: Any) -> np.ndarray:
    """Ids of tokens that texts are made of: neither special nor added, and with a row in the embeddings."""
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    rows = model.config.get_text_config().vocab_size
    found = sorted(token for token in set(tokenizer.get_vocab().values()) - special if token < rows)
    if not found:
        raise CompressionError(
            "mixture: own needs tokens to begin with, and all of the tokenizer's are special ones; take data or an address."
        )
    return np.asarray(found)


def read(folder: Path, plan: dict[str, Any]) -> np.ndarray | None:
    """What an earlier run kept there of the same plan; None if it is not there, or not whole."""
    try:
        with safe_open(folder / FILE, framework="numpy") as file:
            ids = file.get_tensor("input_ids")
            same = json.loads((file.metadata() or {}).get("plan", "null")) == plan
    except (OSError, ValueError, SafetensorError):
        return None
    return ids if same and ids.shape == (plan["count"], plan["length"]) else None


def keep(folder: Path, plan: dict[str, Any], ids: np.ndarray) -> None:
    """Keep them there, whole or not at all. `plan`: what they are, in plain JSON values, `count` and `length` among it."""
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"{uuid4().hex}.part"
    save_file({"input_ids": np.ascontiguousarray(ids)}, unfinished, metadata={"plan": json.dumps(plan)})
    unfinished.replace(folder / FILE)
