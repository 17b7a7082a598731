"""Where texts and images come from: the Hub, files, folders, installed packages. Splits, columns, labels, duplicates."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import datasets
import pandas
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset

from hfcompress.checkpoint.errors import CompressionError, did_you_mean, first_line

log = logging.getLogger("hfcompress")

PACKAGE = "package://"
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
READERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}
SHORT = {
    "glue": "nyu-mll/glue",
    "super_glue": "aps/super_glue",
    "tweet_eval": "cardiffnlp/tweet_eval",
    "wikitext": "Salesforce/wikitext",
}
"""Collections whose `name/subset` people write without the owner."""
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
EVAL_SPLITS = ("validation", "validation_matched", "dev", "val", "valid", "test")


def resolve_address(text: str) -> str:
    """`package://NAME/path` -> the path in the installed package, which is located, not imported; else as it came."""
    if not text.startswith(PACKAGE):
        return text
    name, _, inside = text.removeprefix(PACKAGE).partition("/")
    module = name.replace("-", "_")
    # a dotted name would make find_spec import the parent
    spec = find_spec(module) if module.isidentifier() else None
    folders = list(spec.submodule_search_locations or ()) if spec else []
    if not folders:
        raise CompressionError(f"{text}: there is no installed package {name!r}; get it with: pip install {name}")
    for folder in folders:
        if (found := Path(folder) / inside).exists():
            return str(found)
    there = (child.name for child in Path(folders[0]).iterdir())
    raise CompressionError(f"{text}: the package {name!r} has no {inside!r}.{did_you_mean(inside, there)}")


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """No progress bars of `datasets` inside; as before afterwards."""
    before = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            datasets.enable_progress_bars()


def read_splits(dataset: str, subset: str | None = None, unit: str = "text") -> tuple[DatasetDict, bool]:
    """All splits of an address, and whether it is local. Raises `CompressionError` where there is nothing to read.

    `unit`: what class folders hold, "text" (.txt files) or "image" (image files, opened when a row is asked for).
    """
    path = Path(resolve_address(dataset)).expanduser()
    with quiet_datasets():
        if path.is_dir():
            return _read_folder(path, dataset, unit), True
        if path.is_file():
            return DatasetDict(train=_read_files([path], dataset)), True
        looks_local = dataset.startswith((".", "/", "~")) or path.suffix in READERS or dataset.count("/") > 2
        if looks_local or "\\" in dataset:
            raise CompressionError(f"dataset {dataset!r}: there is no such file or folder; check the path.")
        return _read_hub(dataset, subset), False


def read_texts(dataset: str) -> Iterator[str]:
    """Every text of an address, whatever its split and column; lists of words are texts too."""
    for rows in read_splits(dataset)[0].values():
        for start in range(0, len(rows), 1000):
            yield from _strings(list(rows[start : start + 1000].values()))


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(one)


def _read_hub(dataset: str, subset: str | None) -> DatasetDict:
    first, *rest = dataset.split("/")
    if first in SHORT:
        name, inner = SHORT[first], "/".join(rest)
    else:
        name, inner = "/".join([first, *rest[:1]]), "/".join(rest[1:])
    try:
        return load_dataset(name, subset or inner or None)
    except Exception as error:  # datasets, huggingface_hub and the network all have errors of their own here
        raise CompressionError(
            f"dataset {dataset!r}: it is no file or folder here, and the Hub did not give {name!r} ({first_line(error)});"
            " check the name and subset, go online, or name a local csv, json, parquet or txt file or folder."
        ) from error


def _read_files(files: list[Path], dataset: str) -> Dataset:
    """Rows of files of one kind; a text file gives one row a paragraph."""
    suffix = files[0].suffix.lower()
    if suffix not in READERS:
        raise CompressionError(f"dataset {dataset!r}: can't read {suffix!r} files. Possible: {', '.join(READERS)}.")
    if suffix == ".txt":
        texts = (file.read_text(encoding="utf-8", errors="replace") for file in files)
        parts = [part.strip() for text in texts for part in re.split(r"\n\s*\n", text)]
        return Dataset.from_dict({"text": [part for part in parts if part]})
    with TemporaryDirectory(prefix="hfcompress-data-", ignore_cleanup_errors=True) as cache:
        try:
            if READERS[suffix] == "csv":
                return _read_tables(files, dataset)
            return load_dataset(
                READERS[suffix],
                data_files=[str(file) for file in files],
                split="train",
                cache_dir=cache,
                keep_in_memory=True,
            )
        except CompressionError:
            raise
        except Exception as error:  # pandas, pyarrow and datasets wrap each other's errors
            raise CompressionError(
                f"dataset {dataset!r}: {files[0].name} is no readable {READERS[suffix]} file "
                f"({first_line(error.__cause__ or error)}); mend it."
            ) from error


def _read_tables(files: list[Path], dataset: str) -> Dataset:
    """Rows of csv and tsv files, each cell as it is written: `NA`, `None` and `007` are texts, only an empty one is missing."""
    tables = [
        pandas.read_csv(
            file,
            sep="\t" if file.suffix.lower() == ".tsv" else ",",
            dtype=str,
            keep_default_na=False,
            na_values=[""],
            encoding="utf-8-sig",
        )
        for file in files
    ]
    for file, table in zip(files, tables, strict=True):
        if set(table.columns) != set(tables[0].columns):
            raise CompressionError(
                f"dataset {dataset!r}: {files[0].name} and {file.name} have different columns; name one file, or keep one kind."
            )
    return Dataset.from_pandas(pandas.concat(tables, ignore_index=True), preserve_index=False)


def _read_folder(folder: Path, dataset: str, unit: str) -> DatasetDict:
    kinds = IMAGES if unit == "image" else (".txt",)
    parts = {SPLITS[child.name.lower()]: child for child in _folders(folder) if child.name.lower() in SPLITS}
    if parts and all(_has_classes(part, kinds) for part in parts.values()):
        names = sorted({child.name for part in parts.values() for child in _folders(part)})
        return DatasetDict({split: _read_classes(part, names, kinds) for split, part in parts.items()})
    if _has_classes(folder, kinds):
        return DatasetDict(train=_read_classes(folder, sorted(child.name for child in _folders(folder)), kinds))
    if unit == "image" and (images := sorted(map(str, _files(folder, kinds)))):
        return DatasetDict(train=Dataset.from_dict({"image": images}, features=datasets.Features(image=datasets.Image())))
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in READERS)
    if not files:
        raise CompressionError(
            f"dataset {dataset!r}: the folder has neither class folders with {unit if unit == 'image' else '.txt'} files"
            f" nor files of a known kind ({', '.join(READERS)}); check the path."
        )
    if len(suffixes := {file.suffix.lower() for file in files}) > 1:
        raise CompressionError(
            f"dataset {dataset!r}: the folder mixes {', '.join(sorted(suffixes))}; name one file, or keep one kind."
        )
    grouped: dict[str, list[Path]] = {}
    for file in files:
        words = re.split(r"[^a-z]+", file.stem.lower())
        grouped.setdefault(next((SPLITS[word] for word in words if word in SPLITS), ""), []).append(file)
    unnamed = grouped.pop("", [])
    if "train" in grouped and unnamed:  # Kaggle's sample_submission.csv lies beside train.csv
        log.info(
            f"dataset {dataset!r}: {', '.join(file.name for file in unnamed)} left out, as other files are named for training"
        )
    elif unnamed:
        grouped["train"] = unnamed
    return DatasetDict({split: _read_files(group, dataset) for split, group in grouped.items()})


def _folders(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if child.is_dir() and child.name[0] not in "._")


def _files(folder: Path, kinds: tuple[str, ...]) -> Iterator[Path]:
    return (file for file in folder.iterdir() if file.suffix.lower() in kinds and file.name[0] != ".")


def _has_classes(folder: Path, kinds: tuple[str, ...]) -> bool:
    return any(next(_files(child, kinds), None) for child in _folders(folder))


def _read_classes(folder: Path, names: list[str], kinds: tuple[str, ...]) -> Dataset:
    """One row a file; the label is its folder's name. Texts are read, of images only the path is kept."""
    what = "image" if kinds == IMAGES else "text"
    rows: dict[str, list] = {what: [], "label": []}
    for child in _folders(folder):
        for file in sorted(_files(child, kinds)):
            rows[what].append(str(file) if what == "image" else file.read_text(encoding="utf-8", errors="replace").strip())
            rows["label"].append(names.index(child.name))
    kind = datasets.Image() if what == "image" else datasets.Value("string")
    return Dataset.from_dict(rows, features=datasets.Features({what: kind, "label": ClassLabel(names=names)}))


def drop_duplicates(splits: Mapping[str, Dataset], keys: Callable[[Dataset], Iterable[Hashable]]) -> dict[str, Dataset]:
    """Each row once, over all splits together, as its key tells; the first split and the first row win."""
    seen: set[Hashable] = set()
    kept: dict[str, Dataset] = {}
    for split, rows in splits.items():
        wanted = []
        for index, key in enumerate(keys(rows)):
            if key not in seen:
                seen.add(key)
                wanted.append(index)
        kept[split] = rows.select(wanted, keep_in_memory=True)
    return kept


def choose(rows: Dataset, most: int | None, seed: int) -> Dataset:
    """All rows, or a seeded choice of `most` of them in random order."""
    if most is None or most >= len(rows):
        return rows
    return rows.shuffle(seed=seed, keep_in_memory=True).select(range(most), keep_in_memory=True)


def split_off(rows: Dataset, share: float, samples: int | None, label: str | None, seed: int) -> tuple[Dataset, Dataset]:
    """(train, eval) of rows without a split to score on; stratified by the ClassLabel column `label` if possible."""
    held_out = min(samples or max(1, round(share * len(rows))), len(rows) - 1)
    counts = Counter(rows[label][:] if label else ()).values()
    stratified = bool(counts) and min(counts) > 1 and len(counts) <= min(held_out, len(rows) - held_out)
    parts = rows.train_test_split(
        test_size=held_out, seed=seed, stratify_by_column=label if stratified else None, keep_in_memory=True
    )
    return parts["train"], parts["test"]
