"""What a smaller vocabulary buys and costs, measured: writes docs/vocabulary.json and docs/vocabulary.md.

MiniLM, fine-tuned on BBC News as in the quickstart (packages of the demo extras, no Hub), loses the tokens that a corpus doesn't
use; then all held-out articles are answered by both models, each with its own tokenizer. About two minutes on two cores, and
another two to fine-tune, once.

    python scripts/bench_vocab.py [FOLDER]      # FOLDER: a checkpoint fine-tuned before; default: out/bench-vocab, made if absent
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from demo import NEWS, sentence

from hfcompress import PruneVocab, Recipe, Train
from hfcompress.checkpoint.artifact import save
from hfcompress.checkpoint.proof import needed_import, prove
from hfcompress.results.measure import machine, weigh
from hfcompress.run.recipe import task_from

ROOT = Path(__file__).resolve().parent.parent
BATCH = 32
VARIANTS = {
    "the articles trained on, as the model reads them": PruneVocab(),
    "the same, and those held out": PruneVocab(split="all"),
    "all articles in full length": PruneVocab(NEWS),
    "the articles trained on, at most 6,000 tokens": PruneVocab(tokens=6000),
}


def main(folder: Path) -> None:
    raw = Recipe.load("quickstart").to_dict()
    if not (folder / "config.json").is_file():
        task = task_from(raw["task"]).open(raw["model"])
        model = task.load_model(raw["model"])
        Train(**raw["steps"][0]["train"], seed=42).run(model, task)
        save(model.eval(), task.processor, folder)
    found = {"machine": machine(), "task": raw["task"], "rows": [row(name, raw, folder) for name in ("", *VARIANTS)]}
    docs = ROOT / "docs"
    (docs / "vocabulary.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    (docs / "vocabulary.md").write_text(page(found), encoding="utf-8")


def row(variant: str, raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The whole model for no variant."""
    task = task_from(raw["task"]).open(str(folder))
    model = task.load_model(str(folder))
    score, before, texts = task.remember(model), logits(model, task), strings(task)
    method = VARIANTS.get(variant)
    if method is not None:
        method.run(model, task)
        score = task.score(model)
    with tempfile.TemporaryDirectory() as place:
        save(model, task.processor, place)
        prove(model, task.example(2, 32), place)
        needs = needed_import(place)
        files = sum(file.stat().st_size for file in Path(place).iterdir()) / 1e6
    after, now = logits(model, task), strings(task)
    told = weigh(model)
    print(variant or "whole", len(task.processor), score, flush=True)
    return {
        "corpus": variant,
        "method": None if method is None else str(method),
        "tokens": len(task.processor),
        "parameters": told["parameters"],
        "megabytes": told["bytes"] / 1e6,
        "folder_megabytes": files,
        "accuracy": score["accuracy"],
        "agreement": score["agreement"],
        "articles": len(after),
        "other_tokens": sum(one != other for one, other in zip(texts, now, strict=True)),
        "other_predictions": int((before.argmax(-1) != after.argmax(-1)).sum()),
        "largest_logit_difference": float((before - after).abs().max()),
        "import": needs,
    }


def strings(task: Any) -> list[list[str]]:
    return [task.processor.convert_ids_to_tokens(ids) for ids in task.eval_dataset["input_ids"][:]]


@torch.no_grad()
def logits(model: Any, task: Any) -> torch.Tensor:
    """Of all held-out articles, in their order."""
    data, parts = task.eval_dataset, []
    for start in range(0, len(data), BATCH):
        batch = task.collator([data[index] for index in range(start, min(start + BATCH, len(data)))])
        batch.pop("labels")
        parts.append(model(**batch).logits)
    return torch.cat(parts)


def page(found: dict[str, Any]) -> str:
    whole = found["rows"][0]
    lines = [
        "# A smaller vocabulary, measured",
        "",
        f"`python scripts/bench_vocab.py` writes this page. {sentence(found['machine'])}",
        "",
        f"MiniLM, six layers, fine-tuned on BBC News as in the quickstart; {whole['articles']} held-out articles, cut to 128 tokens. "
        "`prune_vocab` leaves out the tokens that its corpus doesn't use, from the model and its tokenizer; nothing is trained after "
        "it. Every result loads with plain transformers.",
        "",
        "| corpus | tokens | params | MB | accuracy | articles in other tokens | other predictions | largest logit difference |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for one in found["rows"]:
        less = "" if one is whole else f" (-{1 - one['tokens'] / whole['tokens']:.0%})"
        times = "" if one is whole else f" ({whole['megabytes'] / one['megabytes']:.2f}x)"
        compared = ["–"] * 3 if one is whole else [
            str(one["other_tokens"]), str(one["other_predictions"]), f"{one['largest_logit_difference']:.2g}"
        ]  # fmt: skip
        lines.append(
            f"| {one['corpus'] or 'none: as it was'} | {one['tokens']:,}{less} | {one['parameters'] / 1e6:.1f}M | "
            f"{one['megabytes']:.1f}{times} | {one['accuracy']:.4f} | {' | '.join(compared)} |"
        )
    lines += [
        "",
        "With the held-out articles in the corpus their tokens are the same, and so is every answer; the logits differ by no more "
        "than rounding. Without them, words that only they hold are cut into smaller tokens that are left. Tokens that training "
        "never saw were learnt before fine-tuning, so what is known of such words is lost: take a corpus of the texts the model is "
        "for, not only those with labels.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "out" / "bench-vocab")
