"""What is installed: the wheel, the time of an import, and a push from a run."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from hfcompress.run.recipe import shipped_recipes
from tests.results.hub_server import WRITE, HubServer
from tests.run.test_run import recipe
from tests.tiny import tiny_checkpoint, tiny_texts

ROOT = Path(__file__).parent.parent


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NEEDED = [Requirement(line) for line in PROJECT["dependencies"]]
ASKED = {"matplotlib", "PIL", "gguf", "onnxruntime", "openvino", "sentence_transformers", "triton", "constriction"}
"""What is imported where it is there, from an extra, or with torch where that is built for CUDA."""
DISTRIBUTIONS = {"yaml": "pyyaml"}


def test_whatever_is_imported_is_a_dependency() -> None:
    roots: set[str] = set()
    for path in (ROOT / "hfcompress").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                roots |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                roots.add(node.module.partition(".")[0])
    others = roots - set(sys.stdlib_module_names) - {"hfcompress"} - ASKED
    assert {"torch", "filelock", "pandas"} <= others
    assert {DISTRIBUTIONS.get(name, name) for name in others} <= {line.name for line in NEEDED}


def test_no_version_is_claimed_that_was_not_run() -> None:
    """The least version of each is the pinned one, without its last number."""
    pinned = dict(re.findall(r"^([\w-]+)==([\w.]+)$", (ROOT / "constraints.txt").read_text(), re.M))
    names = ("plots", "llm-demo", "vision", "export")
    extras = [Requirement(line) for name in names for line in PROJECT["optional-dependencies"][name]]
    assert len(NEEDED) > 10 and len(extras) == 9
    for line in (*NEEDED, *extras):
        (least,) = re.fullmatch(r">=([\d.]+)", str(line.specifier)).groups()  # type: ignore[union-attr]
        assert f"{pinned[line.name]}.".startswith(f"{least}."), line
    assert PROJECT["requires-python"] == ">=3.11" and "on Python 3.11" in (ROOT / "constraints.txt").read_text()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (made,) = out.glob("*.whl")
    return made


def test_the_wheel_holds_the_recipes_and_no_tests(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"hfcompress/recipes/{name}.yaml" for name in shipped_recipes()} <= set(names)
    assert not [name for name in names if name.startswith(("tests/", "scripts/"))]


def test_an_installed_wheel_knows_its_recipes_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    run = subprocess.run(
        [sys.executable, "-m", "hfcompress", "validate", "quickstart"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site"), "COLUMNS": "200"},
    )
    assert run.stdout.startswith("valid: 7 steps"), run.stderr
    where = "import hfcompress, hfcompress.run.recipe as r; print(hfcompress.__file__); print(r.find_recipe('quickstart'))"
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    told = subprocess.run([sys.executable, "-c", where], capture_output=True, text=True, cwd=tmp_path, env=env).stdout
    assert len(told.split()) == 2 and all(line.startswith(str(tmp_path / "site")) for line in told.split())


def test_importing_adds_under_a_second_to_importing_transformers() -> None:
    program = (
        "import time; from transformers import AutoModelForSequenceClassification\n"
        "AutoModelForSequenceClassification.from_pretrained; import transformers.modeling_utils\n"
        "start = time.perf_counter(); import hfcompress; print(time.perf_counter() - start)"
    )
    runs = [subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True) for _ in range(2)]
    assert min(float(run.stdout) for run in runs) < 1.0


LOADS = """
import hfcompress
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
model = AutoModelForSequenceClassification.from_pretrained("me/small")
print("QUANT", type(model.config.quantization_config).__name__)
print("LABEL", pipeline("text-classification", model="me/small")("the goal of the team")[0]["label"])
"""


def test_a_run_pushes_and_a_fresh_process_loads_it_by_name(tmp_path: Path) -> None:
    tiny_texts(tmp_path / "texts")
    tiny_checkpoint(tmp_path / "bert", "bert")
    file = tmp_path / "push.yaml"
    file.write_text(recipe(tmp_path, steps=[{"prune_heads": {"ratio": 0.5, "samples": 16}}]).to_yaml())
    with HubServer() as hub:
        env = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))},
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": WRITE,
            "PYTHONPATH": str(ROOT),
            "COLUMNS": "200",
        }
        command = [
            sys.executable,
            "-m",
            "hfcompress",
            "run",
            str(file),
            f"output_dir={tmp_path / 'out'}",
            "push_to=me/small",
        ]
        run = subprocess.run(command, capture_output=True, text=True, env=env)
        assert run.returncode == 0, run.stderr
        assert {"config.json", "model.safetensors", "README.md", "report.json"} <= set(hub.files("me/small"))
        assert WRITE not in run.stdout + run.stderr
        told = subprocess.run([sys.executable, "-c", LOADS], capture_output=True, text=True, env=env)
        assert "QUANT HfcompressConfig" in told.stdout and "LABEL" in told.stdout, told.stderr[-800:]

        hub.fail_uploads = True
        failed = subprocess.run(
            [*command[:-2], f"output_dir={tmp_path / 'kept'}", "push_to=me/other"], capture_output=True, text=True, env=env
        )
        assert failed.returncode == 1 and "is whole: push it again with" in failed.stderr
        assert (tmp_path / "kept" / "model.safetensors").is_file(), "the local result is whole if the push fails"

        before = list((tmp_path / "nowhere").glob("*"))
        refused = subprocess.run(
            [*command[:-2], f"output_dir={tmp_path / 'nowhere'}", "push_to=strangers/x"],
            capture_output=True,
            text=True,
            env=env,
        )
        assert refused.returncode == 1 and "may not write to 'strangers'" in refused.stderr
        assert "step 1" not in refused.stdout and list((tmp_path / "nowhere").glob("*")) == before, "before compressing"
