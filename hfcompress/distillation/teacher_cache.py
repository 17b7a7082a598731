"""Offline distillation: teacher logits of a training set, recorded once. Training then needs no teacher in memory.

An example is found again by what it holds, not by its place: any order, padding or sampler will do, in any Trainer. A folder
holds `manifest.json` and shards `signals-00000.safetensors`: keys (n, 16) uint8, counts (n,) rows of each example, and for all
rows together either `logits.0` (N, C) of each teacher, or `index` (N, k) and `log_probs.T` (N, k + 1) at each temperature T.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from inspect import signature
from pathlib import Path
from typing import Any, NoReturn
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hfcompress.calibration.batches import examples
from hfcompress.calibration.processes import processes
from hfcompress.calibration.progress import progress
from hfcompress.checkpoint.errors import CompressionError
from hfcompress.checkpoint.sentence_head import sentence_head_of
from hfcompress.checkpoint.writing import write_text, written
from hfcompress.distillation import losses
from hfcompress.distillation.batch import CachedAnswers
from hfcompress.distillation.losses import IGNORED
from hfcompress.distillation.predictions import Prediction, config_of

FORMAT = 2
# What transformers notes in a config while it loads, runs and saves a model.
_PASSING = {"_name_or_path", "transformers_version", "architectures", "dtype", "problem_type", "return_dict"}
BATCHES_A_SHARD = 32
LOGITS = 2**28
"""So many numbers teachers answer with at a time, and a shard holds; one example's may be more."""
ROWS = 1024
"""Of so many rows at a time the distributions are computed in float32."""
Answer = Callable[[dict[str, Tensor]], tuple[Prediction, list[Tensor]]]


def keys(model: Any, inputs: dict[str, Any]) -> list[bytes]:
    """16 bytes an example that tell its input (padding apart) and, where labels are tokens, its labels."""
    name = getattr(model, "main_input_name", None) or next(iter(signature(model.forward).parameters))
    main, mask = inputs.get(name), inputs.get("attention_mask")
    if not isinstance(main, Tensor):
        raise CompressionError(
            f"distill: cache knows examples by their {name}, and the batch has {', '.join(map(str, inputs))}; leave cache out."
        )
    labels = inputs.get("labels")
    tokens = labels if isinstance(labels, Tensor) and labels.dim() == 2 and not labels.is_floating_point() else None
    main = main.cpu()  # once, not once an example
    mask = mask.cpu() if isinstance(mask, Tensor) else None
    tokens = None if tokens is None else tokens.cpu()
    aligned = isinstance(mask, Tensor) and mask.shape[:2] == main.shape[:2]
    found = []
    for row in range(len(main)):
        kept = [main[row][mask[row].bool()] if aligned else main[row]]  # type: ignore[index]
        if tokens is not None:
            same = aligned and tokens.shape == mask.shape  # type: ignore[union-attr]
            kept.append(tokens[row][mask[row].bool()] if same else tokens[row][tokens[row] != IGNORED])  # type: ignore[index]
        digest = hashlib.blake2b(digest_size=16)
        for tensor in kept:
            digest.update(f"{tuple(tensor.shape)}".encode())  # [7, 8], [9] is not [7], [8, 9]
            digest.update(_bytes(tensor))
        found.append(digest.digest())
    return found


def classes(model: Any) -> int:
    """How many there are to choose from, for each row."""
    config = config_of(model)
    is_classifier = type(model).__name__.endswith(("Classification", "MultipleChoice"))
    return int((None if is_classifier else getattr(config, "vocab_size", None)) or getattr(config, "num_labels", None) or 1)


def size(model: Any, batch: dict[str, Tensor]) -> int:
    """Numbers that a teacher answers a batch with, at most."""
    return classes(model) * max(value.shape[:2].numel() for value in batch.values())


def fingerprint(model: Any) -> str:
    """32 hex digits that tell a model's weights, and the config they are computed with; what embeddings are made with, too."""
    digest = hashlib.blake2b(digest_size=16)
    config = model.config.to_dict() if hasattr(model, "config") else {}
    digest.update(json.dumps({key: config[key] for key in sorted(config) if key not in _PASSING}, default=str).encode())
    head = sentence_head_of(model)
    for name, module in head.modules.items() if head else ():
        digest.update(f"{name} {type(module).__name__} {getattr(module, 'get_config_dict', dict)()}".encode())
    tensors = {**model.state_dict(), **(head.tensors() if head else {})}
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor):
            digest.update(name.encode())
            digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


class TeacherCache:
    """A folder of recorded answers. `plan` notes what they are answers to, and must be the same when they are used."""

    def __init__(self, folder: str | Path, plan: dict[str, Any]) -> None:
        self._folder, self._plan = Path(folder).expanduser(), {"format": FORMAT, **plan}
        self._found: dict[bytes, tuple[Any, int, int]] = {}

    @property
    def is_complete(self) -> bool:
        """Whether all was recorded. CompressionError if the folder holds answers to something else."""
        manifest = self._folder / "manifest.json"
        if not manifest.is_file():
            if self._folder.is_dir() and any(one.suffix != ".partial" for one in self._folder.iterdir()):
                self._refuse("holds something else", "choose another folder")
            return False
        try:
            noted = json.loads(manifest.read_text(encoding="utf-8"))
        except ValueError:
            noted = None
        if not isinstance(noted, dict) or not isinstance(complete := noted.pop("shards", None), int | None):
            self._refuse("has no readable manifest", "delete the folder")
        for key, value in self._plan.items():
            if noted.get(key) != value:
                self._refuse(
                    f"was recorded with {key} {noted.get(key)!r}, not {value!r}", "delete it, or choose another folder"
                )
        return complete is not None and all(self._shard(number).is_file() for number in range(complete))

    def record(
        self,
        batches: Iterable[dict[str, Tensor]],
        answer: Answer,
        model: Any,
        total: int | None = None,
    ) -> None:
        """Ask the teachers once: `answer(batch)` gives what was asked and each teacher's logits. Shards appear whole or not at
        all, and those that exist are kept, so a killed run goes on; several processes share the work. `total`: how many
        examples there are, to tell how far it is."""
        state, number = processes(), 0
        state.wait_for_everyone()  # who looks whether there is a record must not find one just begun
        if state.is_main_process:
            with written(self._folder, "a record of the teacher"):
                self._folder.mkdir(parents=True, exist_ok=True)
            self._write_manifest({})
        state.wait_for_everyone()
        bar = progress(what="recording the teacher", total=total, shown=state.is_main_process)
        for group in self._groups(batches, model):
            path = self._shard(number)
            if number % state.num_processes == state.process_index and not path.is_file():
                rows = [self._rows(batch, answer, model) for batch in group]
                whole = {name: torch.cat([one[name] for one in rows]) for name in rows[0]}
                unfinished = path.with_suffix(f".{uuid4().hex}.partial")  # another run may be recording the same
                with written(path, "the teacher's answers"):
                    try:
                        save_file(whole, unfinished)
                        unfinished.rename(path)
                    finally:
                        unfinished.unlink(missing_ok=True)
            bar.update(sum(examples(model, batch) for batch in group))
            number += 1
        bar.close()
        state.wait_for_everyone()
        if state.is_main_process:
            self._write_manifest({"shards": number})
        state.wait_for_everyone()

    def _groups(self, batches: Iterable[dict[str, Tensor]], model: Any) -> Iterator[list[dict[str, Tensor]]]:
        """The batches of each shard: few where whole answers for every token are kept."""
        group: list[dict[str, Tensor]] = []
        is_whole, held = self._plan["top_k"] >= classes(model), 0
        for batch in batches:
            held += size(model, batch) if is_whole else 0
            if group and (len(group) == BATCHES_A_SHARD or held > LOGITS):
                yield group
                group, held = [], size(model, batch) if is_whole else 0
            group.append(batch)
        if group:
            yield group

    def _rows(self, batch: dict[str, Tensor], answer: Answer, model: Any) -> dict[str, Tensor]:
        """What is kept of a batch. Teachers answer for a few examples at a time, so that no whole batch's logits are held."""
        ids = torch.tensor([list(key) for key in keys(model, batch)], dtype=torch.uint8)
        count = len(ids)
        step = max(1, LOGITS * count // max(1, size(model, batch)))
        parts = []
        for start in range(0, count, step):
            few = {key: value[start : start + step] if len(value) == count else value for key, value in batch.items()}
            parts.append(self._kept(*answer(few)))
        return {"keys": ids, **{name: torch.cat([one[name] for one in parts]) for name in parts[0]}}

    def _kept(self, prediction: Prediction, answers: list[Tensor]) -> dict[str, Tensor]:
        rows, most = self._recorded(prediction), self._plan["top_k"]
        parts: list[dict[str, Tensor]] = []
        for some in rows.nonzero().split(ROWS):
            kept = [answer[tuple(some.T)] for answer in answers]
            if rows.dim() == 1 or kept[0].shape[-1] <= most:
                found = {f"logits.{number}": logits for number, logits in enumerate(kept)}
            else:
                found = {}
                for temperature in self._plan["temperatures"]:
                    logs = losses.mean_probs([prediction.log_probs(logits, temperature) for logits in kept])
                    index = found.setdefault("index", logs.topk(most, dim=-1).indices.to(torch.int32)).long()
                    found[f"log_probs.{temperature}"] = losses.bucketed(logs, index)
            parts.append({name: tensor.cpu().contiguous() for name, tensor in found.items()})
        whole = {name: torch.cat([one[name] for one in parts]) for name in parts[0]}
        return {"counts": rows.reshape(len(rows), -1).sum(dim=1).cpu(), **whole}

    def open(self) -> TeacherCache:
        """Find out where every example lies; answers are read from disk when they are asked for."""
        shards = json.loads((self._folder / "manifest.json").read_text(encoding="utf-8"))["shards"]
        for number in range(shards):
            try:
                shard = safe_open(self._shard(number), framework="pt")
            except SafetensorError:
                self._refuse(f"has a damaged file, {self._shard(number).name}", "delete that file, to record it again")
            start = 0
            for key, count in zip(shard.get_tensor("keys"), shard.get_tensor("counts").tolist(), strict=True):
                self._found[bytes(key.tolist())] = (shard, start, start + count)
                start += count
        return self

    def check(self, batches: Iterable[dict[str, Tensor]], model: Any) -> None:
        """CompressionError unless these examples were recorded."""
        asked = [key for batch in batches for key in keys(model, batch)]
        missing = sum(key not in self._found for key in asked)
        if missing:
            self._refuse(
                f"does not know {missing} of {len(asked)} training examples",
                "delete it if the data are others now; leave cache out if they change each epoch (masking, augmentation)",
            )

    def of(self, model: Any, inputs: dict[str, Any], prediction: Prediction) -> CachedAnswers:
        """The recorded answers for a batch."""
        device, parts = prediction.logits.device, list(self._parts(keys(model, inputs)))
        found = {name: torch.cat([one[name] for one in parts]).to(device) for name in parts[0]}
        index = found.pop("index", None)
        return CachedAnswers(
            rows=self._recorded(prediction),
            logits=[found[name] for name in sorted(found) if name.startswith("logits.")],
            index=None if index is None else index.long(),
            log_probs={float(name[10:]): logs for name, logs in found.items() if name.startswith("log_probs.")},
        )

    def _recorded(self, prediction: Prediction) -> Tensor:
        """Of examples all: which of them have a label may be otherwise another time."""
        return prediction.attended if prediction.attended.dim() == 1 else prediction.rows(self._plan["positions"])

    def _parts(self, asked: list[bytes]) -> Iterator[dict[str, Tensor]]:
        for key in asked:
            if key not in self._found:
                self._refuse(
                    "does not know an example of this batch",
                    "leave cache out where data change from epoch to epoch (masking, augmentation)",
                )
            shard, start, end = self._found[key]
            names = [name for name in shard.keys() if name not in ("keys", "counts")]  # noqa: SIM118 (not a dict)
            yield {name: shard.get_slice(name)[start:end] for name in names}

    def _shard(self, number: int) -> Path:
        return self._folder / f"signals-{number:05d}.safetensors"

    def _write_manifest(self, more: dict[str, Any]) -> None:
        text = json.dumps({**self._plan, **more}, indent=2)
        write_text(self._folder / "manifest.json", f"{text}\n", "the record of the teacher")

    def _refuse(self, what: str, mend: str) -> NoReturn:
        raise CompressionError(f"distill: cache {str(self._folder)!r} {what}; {mend}.")
