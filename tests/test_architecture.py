"""The import directions, the sizes and the naming rules of ARCHITECTURE.md, held by a test."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hfcompress
from hfcompress.methods import METHODS, Method
from hfcompress.run.recipe import STEPS
from hfcompress.tasks import TASKS, Task

PACKAGE = Path(hfcompress.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
TASK_FILES = [name.replace("-", "_") for name in TASKS]

# What each folder may import of the others: imports point down the sentence of ARCHITECTURE.md.
BELOW = {
    "run": "results methods tasks distillation calibration surgery export checkpoint",
    "results": "layers checkpoint",
    "methods": "tasks distillation calibration surgery layers checkpoint",
    "tasks": "calibration surgery export layers checkpoint",
    "distillation": "tasks calibration surgery layers checkpoint",
    "calibration": "surgery layers checkpoint",
    "surgery": "layers checkpoint",
    "export": "layers checkpoint",
    "checkpoint": "layers",
    "layers": "checkpoint",
}
ONLY_IN = {
    "huggingface_hub": {"results.hub", "results.card", "tasks.pretrained", "run.doctor"},
    "transformers.quantizers": {
        "checkpoint.quantizer",
        "checkpoint.from_codes",
        "checkpoint.bnb_config",
        "checkpoint.streaming",
    },
    "typer": {"run.cli", "run.arguments"},
    "datasets": {
        "tasks.data",
        "tasks.metric_classes",
        *(
            f"tasks.{name}"
            for name in ("base", "splits", "columns", "texts", "labels", "language_model", "mixture", *TASK_FILES)
        ),
    },
    "evaluate": {"tasks.metrics", "tasks.metric_classes"},
    "matplotlib": {"results.plot", "results.layer_plot"},
    "peft": {"methods.adapters", "surgery.lora", "checkpoint.artifact"},
    "bitsandbytes": {"layers.bnb_library"},
}
LINES, FUNCTION_LINES = 350, 60


def module(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imports(path: Path) -> set[str]:
    """Every module a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            named = {f"{node.module}.{alias.name}" for alias in node.names}
            whole = {name for name in named if (PACKAGE.parent / Path(*name.split("."))).with_suffix(".py").is_file()}
            found |= whole or {node.module}
    return found


def folder_of(name: str) -> str:
    return name.partition(".")[0]


def ours(path: Path) -> set[str]:
    return {found.removeprefix("hfcompress.") for found in imports(path) if found.startswith("hfcompress.")}


@pytest.mark.parametrize("path", [path for path in FILES if path.parent != PACKAGE], ids=module)
def test_imports_point_down(path: Path) -> None:
    name = module(path)
    folder = folder_of(name)
    found = {folder_of(other) for other in ours(path)} - {folder}
    assert found <= set(BELOW[folder].split()), f"{name} imports {found - set(BELOW[folder].split())}"
    if folder == "layers":
        outside = {other for other in ours(path) if folder_of(other) != "layers"}
        assert outside <= {"checkpoint.errors"}, "layers stand on the errors alone"
    if name.startswith("methods.") and name.partition(".")[2] in METHODS:
        assert not {other for other in ours(path) if other.removeprefix("methods.") in METHODS}, (
            "methods don't import each other"
        )


def test_no_circle() -> None:
    """Of modules as they are imported at the top: what a function imports when it runs can't be part of one."""
    tops = {
        module(path): {
            name
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.ImportFrom) and node.module
            for name in ({f"{node.module}.{alias.name}" for alias in node.names} | {node.module})
        }
        for path in FILES
    }
    graph = {name: {found.removeprefix("hfcompress.") for found in tops[name]} & set(tops) for name in tops}
    while leaves := {name for name, below in graph.items() if not below}:
        graph = {name: below - leaves for name, below in graph.items() if name not in leaves}
    assert not graph, f"these import each other: {sorted(graph)}"


def test_the_house_is_small() -> None:
    assert len([path for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"]) <= 10
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py"}


def test_the_two_sides_never_meet() -> None:
    program = (
        "import sys, hfcompress\n"
        "print(sorted(n for n in sys.modules if n.startswith('hfcompress.')), 'bitsandbytes' in sys.modules, 'peft' in sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    loaded = ("", *(f".{name}" for name in ("errors", "integers", "quantizer", "structure")))
    layers = (
        "",
        *(
            f".{name}"
            for name in (
                *(
                    "base",
                    "beside_codes",
                    "bitsandbytes",
                    "bnb_hooks",
                    "bnb_library",
                    "dense",
                    "kernels",
                    "low_rank",
                    "packing",
                ),
                *("quantized", "quantized_conv", "stored"),
            )
        ),
    )
    expected = [*(f"hfcompress.checkpoint{name}" for name in loaded), *(f"hfcompress.layers{name}" for name in layers)]
    assert told.strip() == f"{expected} False False"


def test_loading_needs_public_names_of_transformers_alone() -> None:
    """A name that transformers moves may break what saves, never what published checkpoints need to load."""
    loaders = [path for path in FILES if module(path).startswith("layers")]
    loaders += [PACKAGE / "checkpoint" / f"{name}.py" for name in ("errors", "integers", "quantizer", "structure")]
    public = {"transformers", "transformers.quantizers", "transformers.utils.quantization_config"}
    for path in loaders:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers"):
                assert node.module in public and not any(alias.name.startswith("_") for alias in node.names), path


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_library_is_imported_in_its_own_files_only(library: str) -> None:
    users = {module(path) for path in FILES if any(f"{name}.".startswith(f"{library}.") for name in imports(path))}
    assert users <= ONLY_IN[library], f"{library} is imported by {users - ONLY_IN[library]}"
    assert users, f"nothing imports {library}: take it out of the table"


def test_trainer_is_imported_by_train_alone() -> None:
    users = {module(path) for path in FILES if re.search(r"\bimport [^\n]*\bTrainer\b|^\s+Trainer,$", path.read_text(), re.M)}
    assert users == {"run.train"}


def test_module_names_stand_in_spans_alone() -> None:
    """But for GGUF, a format that gives each of them another name."""
    users = {module(path) for path in FILES if "q_proj" in path.read_text()}
    assert users == {"surgery.units.spans", "export.gguf", "export.gguf_tensors"}


@pytest.mark.parametrize("path", FILES, ids=module)
def test_files_and_functions_are_small(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= LINES, "it holds two ideas"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < FUNCTION_LINES, f"{node.name} is too long"  # type: ignore[operator]


@pytest.mark.parametrize("key", METHODS)
def test_a_key_its_class_and_its_file_are_one_word(key: str) -> None:
    method = METHODS[key]
    assert method.__module__ == f"hfcompress.methods.{key}"
    assert method.__name__ == "".join(word.capitalize() for word in key.split("_"))
    assert getattr(hfcompress, method.__name__) is method


@pytest.mark.parametrize("key", METHODS)
def test_a_methods_docstring_is_a_card(key: str) -> None:
    card = METHODS[key].__doc__ or ""
    headings = re.findall(r"^\s*(Needs|Buys|Costs|Paper):", card, re.M)
    assert headings == ["Needs", "Buys", "Costs", "Paper"]
    assert all(field.description for field in METHODS[key].model_fields.values()), "every field says what it is"


def test_methods_are_found_by_the_table_and_nowhere_else() -> None:
    written = {path.stem for path in (PACKAGE / "methods").glob("*.py")} - {"__init__", "base", "riding", "prune_units"}
    assert written == set(METHODS)
    assert set(STEPS) == {"train", *METHODS}
    assert all(issubclass(method, Method) for method in METHODS.values())


@pytest.mark.parametrize("key", TASKS)
def test_a_task_its_class_and_its_file_are_one_word(key: str) -> None:
    task = TASKS[key]
    assert task.__module__ == f"hfcompress.tasks.{key.replace('-', '_')}"
    assert task.__name__.lower() == key.replace("-", "")
    assert task.__doc__ and all(field.description for name, field in task.model_fields.items() if name != "name")


def test_tasks_are_found_by_the_table_and_nowhere_else() -> None:
    written = {path.stem for path in (PACKAGE / "tasks").glob("*.py")} - {
        "__init__",
        "base",
        "texts",
        "labels",
        "splits",
        "columns",
        "scoring",
        "language_model",
        "mixture",
        "own_text",
        "data",
        "pretrained",
        "metrics",
        "metric_classes",
        "squad",
    }
    assert written == set(TASK_FILES)
    assert all(issubclass(task, Task) for task in TASKS.values())


def test_no_print_no_pickle_no_remote_code() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                assert getattr(node.func, "id", "") != "print", path
                assert getattr(node.func, "attr", "") not in ("exec", "eval_") and ast.unparse(node.func) != "torch.load", path
        assert not re.search(r"^import pickle|trust_remote_code=True|ignore_mismatched_sizes=True", path.read_text(), re.M), (
            path
        )


def test_the_root_has_few_names() -> None:
    assert len(hfcompress.__all__) <= 26
    for name in hfcompress.__all__:
        assert getattr(hfcompress, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'Sesion'"):
        hfcompress.Sesion  # noqa: B018
