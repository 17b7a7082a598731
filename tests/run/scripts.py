"""Training scripts as people have them: five of the shape of transformers' own examples, on data that takes no download.

Each is a `main(argv, line)`: arguments, tokenizer or image processor, `map` with column removal, collator, a Trainer of its kind,
then train, evaluate, save. `line` is what a user would add: keywords for the Trainer, or a call after it was built.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset, DatasetDict
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    EvalPrediction,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    PvtConfig,
    PvtForImageClassification,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    default_data_collator,
    get_scheduler,
    set_seed,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from tests.tiny import FILLER, TOPICS, tiny_text, tiny_tokenizer


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "The model that is trained."})
    attn_implementation: str | None = field(default=None, metadata={"help": "How attention is computed."})


@dataclass
class DataArguments:
    max_length: int = field(default=24, metadata={"help": "Longer texts are cut."})
    train_examples: int = field(default=24, metadata={"help": "How many."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on fewer."})
    eval_examples: int = field(default=9, metadata={"help": "How many; not a multiple of the batch size."})


@dataclass
class Line:
    """The line a user adds to a script."""

    keywords: dict[str, Any] = field(default_factory=dict)
    after: Callable[[Trainer], Any] = lambda trainer: None


def parsed(argv: list[str], kind: type[TrainingArguments] = TrainingArguments) -> Any:
    model_args, data_args, args = HfArgumentParser((ModelArguments, DataArguments, kind)).parse_args_into_dataclasses(argv)
    set_seed(args.seed)
    return model_args, data_args, args


def split(data: DataArguments, row: Callable[[random.Random], dict[str, Any]]) -> DatasetDict:
    rng = random.Random(0)
    counts = {"train": data.train_examples, "validation": data.eval_examples}
    return DatasetDict({name: Dataset.from_list([row(rng) for _ in range(count)]) for name, count in counts.items()})


def finished(trainer: Trainer, args: TrainingArguments, line: Line) -> tuple[Trainer, dict[str, float]]:
    """The end all the scripts share: train if asked to, evaluate, save."""
    line.after(trainer)
    if args.do_train:
        result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        trainer.save_model()
        trainer.log_metrics("train", result.metrics)
        trainer.save_state()
    metrics = trainer.evaluate()
    trainer.save_metrics("eval", metrics)
    return trainer, metrics


# ---------------------------------------------------------------- run_glue


def glue(argv: list[str], line: Line) -> Any:
    names, data, args = parsed(argv)
    raw = split(data, lambda rng: (lambda topic: {"sentence": tiny_text(topic, rng), "label": topic})(rng.choice([*TOPICS])))
    labels = sorted(TOPICS)
    tokenizer = AutoTokenizer.from_pretrained(names.model_name_or_path)
    model = AutoModelForSequenceClassification.from_pretrained(
        names.model_name_or_path, num_labels=len(labels), attn_implementation=names.attn_implementation
    )

    def preprocess(examples: Any) -> Any:
        result = tokenizer(examples["sentence"], max_length=data.max_length, truncation=True)
        result["label"] = [labels.index(label) for label in examples["label"]]
        return result

    with args.main_process_first(desc="dataset map pre-processing"):
        raw = raw.map(preprocess, batched=True, remove_columns=["sentence"])

    def compute_metrics(p: EvalPrediction) -> dict[str, float]:
        logits = p.predictions[0] if isinstance(p.predictions, tuple) else p.predictions
        assert logits.shape == (data.eval_examples, len(labels))
        return {"accuracy": float((logits.argmax(-1) == p.label_ids).mean()), "logits": float(np.abs(logits).mean())}

    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=raw["train"],
        eval_dataset=raw["validation"],
        compute_metrics=compute_metrics,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        **line.keywords,
    )
    return finished(trainer, args, line)


# ---------------------------------------------------------------- run_glue_no_trainer


def glue_no_trainer(folder: Path, out: Path, around: Callable[..., Any], steps: int = 4) -> Any:
    """The loop of accelerate's examples: two groups of parameters, a scheduler, `prepare`, and only then the training.

    `around(model, loader, optimizer)` is what a user would add: a context manager that gives a tick, or None.
    """
    accelerator = Accelerator(cpu=True)
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(TOPICS))
    raw = split(
        DataArguments(), lambda rng: (lambda topic: {"text": tiny_text(topic, rng), "label": topic})(rng.choice([*TOPICS]))
    )
    labels = sorted(TOPICS)

    def preprocess(examples: Any) -> Any:
        return {**tokenizer(examples["text"]), "labels": [labels.index(label) for label in examples["label"]]}

    rows = raw["train"].map(preprocess, batched=True, remove_columns=raw["train"].column_names)
    loader = DataLoader(rows, shuffle=True, collate_fn=DataCollatorWithPadding(tokenizer), batch_size=6)
    bare = ("bias", "LayerNorm.weight")
    groups = [
        {"params": [one for name, one in model.named_parameters() if not name.endswith(bare)], "weight_decay": 0.01},
        {"params": [one for name, one in model.named_parameters() if name.endswith(bare)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=steps)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    with around(accelerator.unwrap_model(model), loader, optimizer) as tick:
        model.train()
        for step, batch in enumerate(loader, start=1):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            if tick is not None:
                tick(step / steps)
    model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    model.save_pretrained(out, is_main_process=accelerator.is_main_process, save_function=accelerator.save)
    return model


# ---------------------------------------------------------------- run_clm


def clm(argv: list[str], line: Line) -> Any:
    names, data, args = parsed(argv)
    raw = split(data, lambda rng: {"text": tiny_text(rng.choice([*TOPICS]), rng)})
    tokenizer = AutoTokenizer.from_pretrained(names.model_name_or_path)
    model = AutoModelForCausalLM.from_pretrained(
        names.model_name_or_path, attn_implementation=names.attn_implementation, dtype=torch.float32
    )
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))
    block = 16
    texts = raw.map(lambda examples: tokenizer(examples["text"]), batched=True, remove_columns=["text"])

    def group(examples: Any) -> Any:
        joined = {key: [token for one in examples[key] for token in one] for key in examples}
        whole = len(joined["input_ids"]) // block * block
        result = {key: [tokens[at : at + block] for at in range(0, whole, block)] for key, tokens in joined.items()}
        result["labels"] = [list(ids) for ids in result["input_ids"]]
        return result

    blocks = texts.map(group, batched=True)
    if data.max_train_samples is not None:
        blocks["train"] = blocks["train"].select(range(data.max_train_samples))

    def compute_metrics(p: EvalPrediction) -> dict[str, float]:
        guessed, labels = p.predictions[:, :-1].reshape(-1), p.label_ids[:, 1:].reshape(-1)
        return {"accuracy": float((guessed == labels).mean())}

    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=blocks["train"],
        eval_dataset=blocks["validation"],
        processing_class=tokenizer,
        data_collator=default_data_collator,
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=lambda logits, labels: (logits[0] if isinstance(logits, tuple) else logits).argmax(-1),
        **line.keywords,
    )
    return finished(trainer, args, line)


# ---------------------------------------------------------------- run_qa


class QuestionAnsweringTrainer(Trainer):
    """As the official one: its evaluation finds texts in the contexts before it counts which are right."""

    def __init__(self, *args: Any, eval_examples: Any = None, post_process_function: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.eval_examples, self.post_process_function = eval_examples, post_process_function

    def evaluate(  # type: ignore[override]
        self, eval_dataset: Any = None, eval_examples: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        examples = self.eval_examples if eval_examples is None else eval_examples
        compute_metrics, self.compute_metrics = self.compute_metrics, None  # they need texts, not logits
        try:
            output = self.evaluation_loop(
                self.get_eval_dataloader(dataset),
                description="Evaluation",
                prediction_loss_only=None if compute_metrics is None else False,
                ignore_keys=ignore_keys,
                metric_key_prefix=metric_key_prefix,
            )
        finally:
            self.compute_metrics = compute_metrics
        found = self.post_process_function(examples, dataset, output.predictions)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.compute_metrics(found).items()}
        metrics.update({name: value for name, value in output.metrics.items() if name.endswith("_loss")})
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def qa(argv: list[str], line: Line) -> Any:
    names, data, args = parsed(argv)

    def row(rng: random.Random) -> dict[str, Any]:
        topic = rng.choice([*TOPICS])
        before, answer, after = rng.choices(FILLER, k=rng.randint(1, 9)), rng.choice(TOPICS[topic]), rng.choices(FILLER, k=4)
        start = len(" ".join(before)) + 1
        context = " ".join([*before, answer, *after])
        return {"question": f"the {rng.choice(TOPICS[topic])}", "context": context, "answer": answer, "start": start}

    raw = split(data, row)
    tokenizer = AutoTokenizer.from_pretrained(names.model_name_or_path)
    model = AutoModelForQuestionAnswering.from_pretrained(
        names.model_name_or_path, attn_implementation=names.attn_implementation
    )

    def features(examples: Any, training: bool) -> Any:
        made = tokenizer(
            examples["question"],
            examples["context"],
            truncation="only_second",
            max_length=data.max_length,
            stride=4,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            padding="max_length",
        )
        sample, offsets = made.pop("overflow_to_sample_mapping"), made["offset_mapping"]
        kept = [
            [offset if side == 1 else None for offset, side in zip(offsets[at], made.sequence_ids(at), strict=True)]
            for at in range(len(offsets))
        ]
        if not training:
            made["example"], made["offset_mapping"] = sample, kept
            return made
        del made["offset_mapping"]
        made["start_positions"] = [
            next((place for place, offset in enumerate(one) if offset and offset[0] == examples["start"][number]), 0)
            for number, one in zip(sample, kept, strict=True)
        ]
        made["end_positions"] = list(made["start_positions"])
        return made

    columns = raw["train"].column_names
    train = raw["train"].map(lambda examples: features(examples, True), batched=True, remove_columns=columns)
    validation = raw["validation"].map(lambda examples: features(examples, False), batched=True, remove_columns=columns)

    def post_process(examples: Any, dataset: Any, predictions: Any) -> Any:
        starts, ends = predictions
        found = []
        for number, example in enumerate(examples):
            best, text = -np.inf, ""
            for at, one in enumerate(dataset):
                if one["example"] != number:
                    continue
                for start, offset in enumerate(one["offset_mapping"]):
                    if offset and starts[at][start] + ends[at][start] > best:
                        best, text = starts[at][start] + ends[at][start], example["context"][offset[0] : offset[1]]
            found.append({"text": text, "score": float(best), "answer": example["answer"]})
        return found

    def compute_metrics(found: Any) -> dict[str, float]:
        exact = [one["text"] == one["answer"] for one in found]
        return {"exact_match": float(np.mean(exact)), "score": float(np.mean([one["score"] for one in found]))}

    trainer = QuestionAnsweringTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=validation,
        eval_examples=raw["validation"],
        processing_class=tokenizer,
        data_collator=default_data_collator,
        post_process_function=post_process,
        compute_metrics=compute_metrics,
        **line.keywords,
    )
    return finished(trainer, args, line)


# ---------------------------------------------------------------- run_summarization


def summarization(argv: list[str], line: Line) -> Any:
    names, data, args = parsed(argv, Seq2SeqTrainingArguments)

    def row(rng: random.Random) -> dict[str, str]:
        text = tiny_text(rng.choice([*TOPICS]), rng)
        return {"document": text, "summary": " ".join(word for word in text.split() if word not in FILLER) or "the"}

    raw = split(data, row)
    tokenizer = AutoTokenizer.from_pretrained(names.model_name_or_path)
    model = AutoModelForSeq2SeqLM.from_pretrained(names.model_name_or_path, attn_implementation=names.attn_implementation)

    def preprocess(examples: Any) -> Any:
        inputs = tokenizer([f"to {text}" for text in examples["document"]], max_length=data.max_length, truncation=True)
        inputs["labels"] = tokenizer(text_target=examples["summary"], max_length=8, truncation=True)["input_ids"]
        return inputs

    raw = raw.map(preprocess, batched=True, remove_columns=["document", "summary"])

    def compute_metrics(given: Any) -> dict[str, float]:
        predictions, labels = (np.where(ids < 0, tokenizer.pad_token_id, ids) for ids in given)
        guessed, meant = (tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in (predictions, labels))
        shared = [
            len({*one.split()} & {*other.split()}) / len(other.split()) for one, other in zip(guessed, meant, strict=True)
        ]
        return {"rouge1": float(np.mean(shared)), "gen_len": float((predictions != tokenizer.pad_token_id).sum(-1).mean())}

    trainer = Seq2SeqTrainer(
        model=model,
        args=args,
        train_dataset=raw["train"],
        eval_dataset=raw["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model, label_pad_token_id=-100),
        compute_metrics=compute_metrics,
        **line.keywords,
    )
    return finished(trainer, args, line)


# ---------------------------------------------------------------- run_image_classification


def images(argv: list[str], line: Line) -> Any:
    names, data, args = parsed(argv)

    def row(rng: random.Random) -> dict[str, Any]:
        label = rng.randrange(3)
        noise = np.random.default_rng(rng.randrange(2**31)).integers(0, 128, (20, 20, 3), dtype=np.uint8)
        noise[..., label] += 100
        return {"image": noise.tolist(), "label": label}

    raw = split(data, row)
    processor = ViTImageProcessorPil.from_pretrained(names.model_name_or_path)
    model = AutoModelForImageClassification.from_pretrained(
        names.model_name_or_path, num_labels=3, attn_implementation=names.attn_implementation
    )

    def transforms(examples: Any) -> Any:
        pictures = [np.array(image, dtype=np.uint8) for image in examples["image"]]
        return {"pixel_values": list(processor(pictures, return_tensors="pt").pixel_values), "label": examples["label"]}

    raw.set_transform(transforms)

    def collate(examples: Any) -> Any:
        return {
            "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
            "labels": torch.tensor([example["label"] for example in examples]),
        }

    trainer = Trainer(
        model=model,
        args=args,
        data_collator=collate,
        train_dataset=raw["train"],
        eval_dataset=raw["validation"],
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
        processing_class=processor,
        **line.keywords,
    )
    return finished(trainer, args, line)


# ---------------------------------------------------------------- tiny checkpoints for them

DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TEXTS = {**SIZES, "vocab_size": 64, "pad_token_id": 0, "max_position_embeddings": 64}


def _made(name: str) -> Any:
    if name == "clm":  # stock Llama has dropout in its attention only
        return LlamaForCausalLM(LlamaConfig(**TEXTS, num_key_value_heads=2, attention_dropout=0.1))
    if name == "summarization":
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 64}
        return T5ForConditionalGeneration(
            T5Config(
                **sizes, dropout_rate=0.1, decoder_start_token_id=0, pad_token_id=0, eos_token_id=3, tie_word_embeddings=True
            )
        )
    if name == "images":
        return ViTForImageClassification(ViTConfig(**SIZES, **DROPOUT, image_size=16, patch_size=8, num_labels=3))
    if name == "images-pvt":  # fewer and wider positions from layer to layer
        sizes = {"hidden_sizes": [16, 32], "depths": [1, 1], "num_attention_heads": [1, 2], "num_encoder_blocks": 2}
        ratios = {"sequence_reduction_ratios": [2, 1], "mlp_ratios": [2, 2], "patch_sizes": [4, 2], "strides": [4, 2]}
        return PvtForImageClassification(PvtConfig(**sizes, **ratios, **DROPOUT, image_size=16, num_labels=3))
    head = {"glue": BertForSequenceClassification, "qa": BertForQuestionAnswering}[name]
    return head(BertConfig(**TEXTS, **DROPOUT, num_labels=3 if name == "glue" else 2))


def checkpoint(name: str, folder: Path, seed: int) -> Path:
    """A random model that is unsure of nothing: with weights as they are made, teachers would hardly differ."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _made(name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3.0) if parameter.dim() > 1 else parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    if name.startswith("images"):
        ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    else:
        tiny_tokenizer().save_pretrained(folder)
    return folder


SCRIPTS: dict[str, tuple[Callable[[list[str], Line], Any], Any]] = {
    "glue": (glue, AutoModelForSequenceClassification),
    "clm": (clm, AutoModelForCausalLM),
    "qa": (qa, AutoModelForQuestionAnswering),
    "summarization": (summarization, AutoModelForSeq2SeqLM),
    "images": (images, AutoModelForImageClassification),
    "images-pvt": (images, AutoModelForImageClassification),
}
"""A name to (the script, the Auto class that loads what it saves)."""
