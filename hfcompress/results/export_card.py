"""What the folder of an export says of itself: where it came from, whether it says what PyTorch says, and how to load it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hfcompress.results.load_snippet import fenced


def export_card(folder: Path, place: str, chosen: Any, told: dict[str, Any]) -> str:
    """README.md of an export that will lie in `place`. `told`: what `exported.json` holds."""
    name = place.rstrip("/").split("/")[-1]
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    before = ["from transformers import AutoTokenizer", "", f'tokenizer = AutoTokenizer.from_pretrained("{place}")']
    some = '["a text"]' if told.get("caches") else '["a text", "another, longer text"], padding=True'
    before += [f'inputs = tokenizer({some}, return_tensors="np")', ""]
    parts = [
        f"---\nlibrary_name: {told['to']}\ntags: [hfcompress, compression, {told['to']}]\n---",
        f"# {name}",
        f"Exported to {told['to']} by hfcompress: {told['parameters'] / 1e6:.4g} M parameters.",
        _agrees(told.get("agreement") or {}),
        "## Load it",
        fenced("python", "\n".join([*(before if has_tokenizer and told["to"] != "gguf" else []), chosen.snippet(place, told)])),
    ]
    if told["to"] != "gguf":
        loader = f'from transformers.exporters import ExportedModel\n\nmodel = ExportedModel.from_pretrained("{place}")'
        parts += ["Or by transformers, called as the model it came from:", fenced("python", loader)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _agrees(found: dict[str, Any]) -> str:
    if not found:
        return ""
    told = f"Its outputs differ from PyTorch's by {found['off']:.2g} of their spread at most"
    same = found.get("same_tokens")
    return f"{told}." if same is None else f"{told}; of the tokens that both wrote, {same:.0%} are the same."
