"""Teachers' answers to a training set, recorded once: training then needs no teacher in memory, and no forward pass of it.

An example is found again by what it holds, not by its place: any order, padding or sampler will do, in any Trainer. A folder
holds `manifest.json` and shards `signals-00000.safetensors`: keys (n, 16) uint8, counts (n,) rows of each example, and for all
rows together either `logits.0` (N, C) of each teacher, or `index` (N, k) and `log_probs.T` (N, k + 1) at each temperature T.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hfcompress.calibration.processes import processes
from hfcompress.calibration.progress import progress
from hfcompress.checkpoint.errors import CompressionError
from hfcompress.distillation import losses
from hfcompress.distillation.batch import Problem, Recorded
from hfcompress.distillation.losses import IGNORED

FORMAT = 2
# What transformers notes in a config while it loads, runs and saves a model.
_PASSING = {"_name_or_path", "transformers_version", "architectures", "dtype", "problem_type", "return_dict"}
BATCHES_A_SHARD = 32


def keys(model: Any, inputs: dict[str, Any]) -> list[bytes]:
    """16 bytes an example that tell its input (padding apart) and, where labels are tokens, its labels."""
    main, mask = inputs.get(model.main_input_name), inputs.get("attention_mask")
    if not isinstance(main, Tensor):
        raise CompressionError(
            f"distill: cache knows examples by their {model.main_input_name}, and the batch has "
            f"{', '.join(map(str, inputs))}; leave cache out."
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
        told = hashlib.blake2b(digest_size=16)
        for tensor in kept:
            told.update(f"{tuple(tensor.shape)}".encode())  # [7, 8], [9] is not [7], [8, 9]
            told.update(_bytes(tensor))
        found.append(told.digest())
    return found


def fingerprint(model: Any) -> str:
    """32 hex digits that tell a model's weights, and the config they are computed with."""
    told = hashlib.blake2b(digest_size=16)
    config = model.config.to_dict() if hasattr(model, "config") else {}
    told.update(json.dumps({key: config[key] for key in sorted(config) if key not in _PASSING}, default=str).encode())
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor):
            told.update(name.encode())
            told.update(_bytes(tensor))
    return told.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


class Signals:
    """A folder of recorded answers. `plan` tells what they are answers to, and must be the same when they are used."""

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
            told = json.loads(manifest.read_text(encoding="utf-8"))
        except ValueError:
            told = None
        if not isinstance(told, dict) or not isinstance(complete := told.pop("shards", None), int | None):
            self._refuse("has no readable manifest", "delete the folder")
        for key, value in self._plan.items():
            if told.get(key) != value:
                self._refuse(f"was recorded with {key} {told.get(key)!r}, not {value!r}", "delete it, or choose another folder")
        return complete is not None and all(self._shard(number).is_file() for number in range(complete))

    def record(
        self,
        batches: Iterable[dict[str, Tensor]],
        answer: Callable[[dict[str, Tensor]], tuple[Problem, list[Tensor]]],
        model: Any,
    ) -> None:
        """Ask the teachers once: `answer(batch)` gives what was asked and each teacher's logits. Shards appear whole or not at
        all, and those that exist are kept, so a killed run goes on; several processes share the work."""
        state, waiting, number = processes(), iter(batches), 0
        state.wait_for_everyone()  # who looks whether there is a record must not find one just begun
        if state.is_main_process:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._write_manifest({})
        state.wait_for_everyone()
        bar = progress(what="recording the teacher", shown=state.is_main_process)
        while group := list(islice(waiting, BATCHES_A_SHARD)):
            path = self._shard(number)
            if number % state.num_processes == state.process_index and not path.is_file():
                rows = [self._rows(batch, *answer(batch), model) for batch in group]
                whole = {name: torch.cat([one[name] for one in rows]) for name in rows[0]}
                unfinished = path.with_suffix(f".{uuid4().hex}.partial")  # another run may be recording the same
                save_file(whole, unfinished)
                unfinished.rename(path)
            bar.update(len(group))
            number += 1
        bar.close()
        state.wait_for_everyone()
        if state.is_main_process:
            self._write_manifest({"shards": number})
        state.wait_for_everyone()

    def _rows(self, batch: dict[str, Tensor], problem: Problem, answers: list[Tensor], model: Any) -> dict[str, Tensor]:
        rows = self._recorded(problem)
        told = [torch.tensor(list(key), dtype=torch.uint8) for key in keys(model, batch)]
        found = {"keys": torch.stack(told), "counts": rows.reshape(len(rows), -1).sum(dim=1)}
        kept, most = [answer[rows] for answer in answers], self._plan["top_k"]
        if rows.dim() == 1 or kept[0].shape[-1] <= most:
            found |= {f"logits.{number}": logits.float() for number, logits in enumerate(kept)}
        else:
            for temperature in self._plan["temperatures"]:
                logs = losses.mean_probs([problem.log_probs(logits, temperature) for logits in kept])
                index = found.setdefault("index", logs.topk(most, dim=-1).indices.to(torch.int32)).long()
                found[f"log_probs.{temperature}"] = losses.bucketed(logs, index)
        return {name: tensor.cpu().contiguous() for name, tensor in found.items()}

    def open(self) -> Signals:
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
        told = [key for batch in batches for key in keys(model, batch)]
        missing = sum(key not in self._found for key in told)
        if missing:
            self._refuse(
                f"does not know {missing} of {len(told)} training examples",
                "delete it if the data are others now; leave cache out if they change each epoch (masking, augmentation)",
            )

    def of(self, model: Any, inputs: dict[str, Any], problem: Problem) -> Recorded:
        """The recorded answers for a batch."""
        device, parts = problem.logits.device, list(self._parts(keys(model, inputs)))
        found = {name: torch.cat([one[name] for one in parts]).to(device) for name in parts[0]}
        index = found.pop("index", None)
        return Recorded(
            rows=self._recorded(problem),
            logits=[found[name] for name in sorted(found) if name.startswith("logits.")],
            index=None if index is None else index.long(),
            log_probs={float(name[10:]): logs for name, logs in found.items() if name.startswith("log_probs.")},
        )

    def _recorded(self, problem: Problem) -> Tensor:
        """Of examples all: which of them have a label may be otherwise another time."""
        return problem.attended if problem.attended.dim() == 1 else problem.rows(self._plan["positions"])

    def _parts(self, told: list[bytes]) -> Iterator[dict[str, Tensor]]:
        for key in told:
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
        unfinished = self._folder / f"manifest.{uuid4().hex}.partial"
        unfinished.write_text(json.dumps({**self._plan, **more}, indent=2) + "\n", encoding="utf-8")
        unfinished.rename(self._folder / "manifest.json")

    def _refuse(self, what: str, mend: str) -> NoReturn:
        raise CompressionError(f"distill: cache {str(self._folder)!r} {what}; {mend}.")
