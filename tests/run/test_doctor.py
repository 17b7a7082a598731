"""`hfcompress doctor`: what it finds, that it never hangs, and that what it prints gives nobody away."""

from __future__ import annotations

import getpass
import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from hfcompress.run import doctor
from hfcompress.run.cli import app

SECRET = "hf_abcdefghijklmnopqrstuvwxyz0123"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_the_whole_of_it(offline: None, tmp_path: Path) -> None:
    told = CliRunner().invoke(app, ["doctor", str(tmp_path / "out" / "deep"), "--json"])
    assert told.exit_code == 0, told.output
    found = json.loads(told.output)
    assert list(found) == ["versions", "processor", "accelerators", "bitsandbytes", "hub", "disk", "problems"]
    assert found["versions"]["torch"] == torch.__version__
    assert found["bitsandbytes"] == {"kernels": "4-bit and 8-bit work"}
    assert found["processor"]["threads"] == str(torch.get_num_threads())
    assert found["hub"]["offline"] == "HF_HUB_OFFLINE"
    assert not (tmp_path / "out").exists()


def test_it_is_safe_to_paste(offline: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token, a password, a home and names planted wherever they could come through."""
    home = tmp_path / "home" / "annabel"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("HF_ENDPOINT", "https://annabel:geheim@hub.example.org")
    monkeypatch.setattr(getpass, "getuser", lambda: "annabel")
    monkeypatch.setattr(socket, "gethostname", lambda: "annabels-box")
    words = f"{SECRET} 0123456789abcdef {home}/.cache https://annabel:geheim@hub.example.org annabels-box C:\\Users\\annabel\\x"
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for flags, before in ((["--json"], 0), ([], 0), ([], 60), ([], 182), ([], 190)):  # a long line is cut, a name in it never
        (tmp_path / "bitsandbytes.py").write_text(f"raise ImportError({'.' * before + ' ' + words!r})")
        told = CliRunner().invoke(app, ["doctor", str(home / "out"), *flags])
        assert told.exit_code == 0, told.output
        assert "bitsandbytes does not work" in told.output
        for one in (SECRET, "0123456789abcdef", "annabe", "gehei", str(tmp_path), str(home)):
            assert one not in told.output, one
        assert "there is a token" in told.output


def test_kernels_that_hang_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bitsandbytes.py").write_text("import time; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(doctor, "KERNEL_SECONDS", 0.5)
    problems: list[str] = []
    assert doctor.kernels(problems) == {"kernels": "no answer"}
    assert problems == ["bitsandbytes did not answer in time: try again when the machine is idle, or reinstall it"]


def test_a_network_that_hangs_does_not_hang_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in doctor.OFFLINE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(doctor, "SECONDS", 0.2)
    monkeypatch.setattr(doctor, "_reaches", lambda: time.sleep(30))
    started, problems = time.monotonic(), list[str]()
    assert doctor.hub(problems)["reached"] == "no"
    assert time.monotonic() - started < 5
    assert problems == [
        "the Hub can't be reached: look at network and proxy, or set HF_HUB_OFFLINE=1 and use local folders"
    ]  # fmt: skip


def test_offline_nothing_is_asked(offline: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked() -> bool:
        raise AssertionError("asked")

    monkeypatch.setattr(doctor, "within", lambda *_: asked())
    problems: list[str] = []
    assert "reached" not in doctor.hub(problems) and problems == []


@pytest.mark.parametrize(("role", "what"), [("read", "may only read"), ("refused", "is refused"), ("write", "")])
def test_a_token_s_scope_is_told(role: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in doctor.OFFLINE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(doctor, "_reaches", lambda: True)
    monkeypatch.setattr(doctor, "get_token", lambda: SECRET)
    monkeypatch.setattr(doctor, "_role", lambda token: role)
    problems: list[str] = []
    assert doctor.hub(problems)["scope"] == role
    remedy = f"the Hub token {what}: make one that may write (huggingface.co/settings/tokens), then hf auth login"
    assert problems == ([remedy] if what else [])


def test_problems_of_packages_processor_and_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problems: list[str] = []
    versions: dict[str, Any] = {"transformers": "4.40.0", "peft": None}
    monkeypatch.setattr(doctor, "_version", lambda name: versions.get(name, "99.0"))
    needed = [doctor.Requirement(one) for one in ("transformers>=5.20", "peft>=0.18", "torch>=2.6")]
    monkeypatch.setattr(doctor, "_requirements", lambda: needed)
    assert doctor.versions(problems)["peft"] == "not installed"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 999)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "amx_bf16": True, "avx512_vnni": True})
    found = doctor.processor(problems)
    assert found["bfloat16"] == "fast (amx_bf16)" and found["int8"] == "fast (avx512_vnni)"
    monkeypatch.setattr(doctor, "LEAST_GB", 10.0**9)
    doctor.disk(tmp_path, problems)
    assert problems[:2] == [
        "transformers is 4.40.0, not >=5.20: pip install 'transformers>=5.20'",
        "peft is not installed: pip install 'peft>=0.18'",
    ]
    assert problems[2].startswith("torch computes with 999 threads on ") and "set OMP_NUM_THREADS=" in problems[2]
    assert problems[3].endswith("GB are free for the output folder: free some, or give another output_dir")
    assert problems[4].endswith("GB are free for the Hub cache: hf cache prune, or set HF_HOME to another disk")
