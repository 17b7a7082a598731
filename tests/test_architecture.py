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
from hfcompress.recipe import STEPS
from hfcompress.tasks import TASKS, Task

PACKAGE = Path(hfcompress.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
TASK_FILES = [name.replace("-", "_") for name in TASKS]

# What each file may import of the package; a file stands above everything it names. `methods` and `tasks` mean the folders.
ALLOWED = {
    "errors": "",
    "layers": "errors",
    "counts": "",
    "plain": "",
    "stock": "layers",
    "structure": "errors counts layers plain stock",
    "loading": "errors layers structure",
    "anatomy": "layers",
    "surgery": "errors counts layers anatomy",
    "examples": "errors",
    "odd_sizes": "",
    "miniature": "errors layers examples odd_sizes",
    "reader": "layers anatomy",
    "scaling": "errors counts layers anatomy",
    "proof": "errors counts layers structure anatomy surgery miniature examples reader scaling",
    "calibration": "errors lesson",
    "scores": "errors anatomy calibration moments processes surgeon surgery",
    "ranking": "errors anatomy",
    "lockstep": "",
    "saved": "errors anatomy processes",
    "even": "errors anatomy structure surgery",
    "lanes": "anatomy",
    "moments": "anatomy calibration lanes lockstep",
    "surgeon": "",
    "repair": "anatomy calibration examples moments processes",
    "fading": "anatomy proof surgery",
    "stacks": "errors layers",
    "blanks": "layers",
    "depth": "errors layers stacks blanks",
    "choosing": "errors layers stacks blanks depth",
    "influence": "errors calibration stacks processes",
    "experts": "errors calibration blanks",
    "width": "errors layers anatomy stacks blanks surgery proof scores",
    "architecture": "errors",
    "tokens": "errors",
    "vocabulary": "errors layers blanks surgery",
    "losses": "",
    "processes": "",
    "lesson": "errors losses",
    "terms": "errors losses lesson methods.base",
    "signals": "errors losses lesson processes",
    "teachers": "errors layers surgery",
    "fused": "lesson",
    "distilling": "errors layers anatomy proof fused lesson signals teachers terms",
    "methods": "errors processes layers structure loading anatomy stacks surgery proof calibration scores ranking fading moments repair even saved depth choosing "
    "influence experts width architecture teachers terms distilling data tokens vocabulary methods.base methods.units",
    "metrics": "errors",
    "data": "errors",
    "checkpoints": "errors data",
    "tasks": "errors data checkpoints metrics surgery vocabulary methods.base tasks.base tasks.texts tasks.labels",
    "plugin": "errors structure loading methods.base",
    "train": "errors lesson methods methods.base plugin",
    "recipe": "errors methods methods.base tasks train",
    "measuring": "errors layers",
    "report": "errors measuring",
    "comparing": "measuring report",
    "plots": "errors report",
    "artifact": "errors layers structure loading",
    "snippet": "errors",
    "hub": "errors snippet",
    "loop": "errors metrics processes methods tasks train recipe report plots artifact hub",
    "cli": "errors processes recipe loop report comparing artifact hub snippet",
    "__init__": "loading errors methods recipe plugin train loop",
}
ONLY_IN = {
    "huggingface_hub": {"hub", "checkpoints"},
    "transformers.quantizers": {"loading", "stock"},
    "typer": {"cli"},
    "datasets": {"data", "metrics", *(f"tasks.{name}" for name in ("base", "texts", "labels", *TASK_FILES))},
    "evaluate": {"metrics"},
    "matplotlib": {"plots"},
    "peft": {"methods.adapters", "artifact"},
    "bitsandbytes": {"layers"},
}
LINES, FUNCTION_LINES = 380, 60


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


@pytest.mark.parametrize("path", FILES, ids=module)
def test_imports_point_down(path: Path) -> None:
    name = module(path)
    folder = name.partition(".")[0]
    allowed = set(ALLOWED[folder if folder in ("methods", "tasks") else name].split())
    if name in ("methods.__init__", "tasks.__init__"):
        allowed |= {f"{folder}.{key}" for key in (METHODS if folder == "methods" else TASK_FILES)}
    ours = {found.removeprefix("hfcompress.") for found in imports(path) if found.startswith("hfcompress.")}
    assert ours <= allowed, f"{name} imports {ours - allowed}"


def test_the_two_sides_never_meet() -> None:
    program = (
        "import sys, hfcompress\n"
        "print(sorted(n for n in sys.modules if n.startswith('hfcompress.')), 'bitsandbytes' in sys.modules, 'peft' in sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    expected = [f"hfcompress.{name}" for name in ("counts", "errors", "layers", "loading", "plain", "stock", "structure")]
    assert told.strip() == f"{expected} False False"


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_library_is_imported_in_its_own_files_only(library: str) -> None:
    users = {module(path) for path in FILES if any(f"{name}.".startswith(f"{library}.") for name in imports(path))}
    assert users <= ONLY_IN[library], f"{library} is imported by {users - ONLY_IN[library]}"
    assert users, f"nothing imports {library}: take it out of the table"


def test_trainer_is_imported_by_train_alone() -> None:
    users = {module(path) for path in FILES if re.search(r"\bimport [^\n]*\bTrainer\b|^\s+Trainer,$", path.read_text(), re.M)}
    assert users == {"train"}


def test_module_names_stand_in_anatomy_alone() -> None:
    users = {module(path) for path in FILES if "q_proj" in path.read_text()}
    assert users == {"anatomy"}


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
    written = {path.stem for path in (PACKAGE / "methods").glob("*.py")} - {"__init__", "base", "units"}
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
    written = {path.stem for path in (PACKAGE / "tasks").glob("*.py")} - {"__init__", "base", "texts", "labels"}
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
    assert len(hfcompress.__all__) <= 24
    for name in hfcompress.__all__:
        assert getattr(hfcompress, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'Sesion'"):
        hfcompress.Sesion  # noqa: B018
