"""Diagnostics of a machine: versions, processor, accelerators, bitsandbytes, Hub and disk; safe to paste into an issue."""

from __future__ import annotations

import getpass
import importlib.metadata
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, constants, get_token
from packaging.requirements import InvalidRequirement, Requirement

PACKAGES = ("hfcompress", "torch", "transformers", "bitsandbytes", "accelerate", "peft", "datasets")
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
SECONDS, KERNEL_SECONDS = 8.0, 90.0
"""What the network, and the import of bitsandbytes in a process of its own, may take."""
LEAST_GB = 5.0
_SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY|ACCESS_?KEY", re.I)
_KERNELS = """
import bitsandbytes, torch
device = "cuda" if torch.cuda.is_available() else "cpu"
x = torch.eye(64, device=device)
four, state = bitsandbytes.functional.quantize_4bit(x, quant_type="nf4")
assert (bitsandbytes.functional.dequantize_4bit(four, state) - x).abs().max() < 0.1
layer = bitsandbytes.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False, threshold=0.0).to(device)
assert layer(x.to(torch.float16 if device == "cuda" else torch.float32)).isfinite().all()
"""


def examine(folder: Path) -> dict[str, Any]:
    """Sections of names and values, and `problems`, a line each with its remedy. Nothing in it tells who or where one is."""
    problems: list[str] = []
    found = {
        "versions": versions(problems),
        "processor": processor(problems),
        "accelerators": accelerators(problems),
        "bitsandbytes": kernels(problems),
        "hub": hub(problems),
        "disk": disk(folder, problems),
        "problems": problems,
    }
    return json.loads(json.dumps(found), object_hook=_cleaned)


def versions(problems: list[str]) -> dict[str, str]:
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for name in PACKAGES:
        found[name] = _version(name) or "not installed"
    for line in _requirements():
        installed = _version(line.name)
        if installed is None:
            problems.append(f"{line.name} is not installed: pip install '{line.name}{line.specifier}'")
        elif not line.specifier.contains(installed, prereleases=True):
            problems.append(f"{line.name} is {installed}, not {line.specifier}: pip install '{line.name}{line.specifier}'")
    return found


def _version(name: str) -> str | None:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return None


def _requirements() -> list[Requirement]:
    """What hfcompress can't do without, as its installation notes it."""
    found = []
    with suppress(importlib.metadata.PackageNotFoundError, InvalidRequirement):
        for line in importlib.metadata.requires("hfcompress") or ():
            one = Requirement(line)
            if one.marker is None or one.marker.evaluate({"extra": ""}):
                found.append(one)
    return found


def processor(problems: list[str]) -> dict[str, str]:
    """Which instructions there are, and what they make fast."""
    flags = {name for name, value in torch.cpu.get_capabilities().items() if value is True}
    fast_bf16 = sorted(flags & {"amx_bf16", "avx512_bf16"})
    fast_int8 = sorted(flags & {"amx_int8", "avx512_vnni", "avx_vnni", "avx_vnni_int8"})
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    if threads > cores:
        problems.append(f"torch computes with {threads} threads on {cores} cores, which is slow: set OMP_NUM_THREADS={cores}")
    if threads == 1 and cores > 1:
        problems.append(f"torch computes with 1 thread, and there are {cores} cores: unset OMP_NUM_THREADS")
    found = {"cores": str(cores), "threads": str(threads)}
    with suppress(AttributeError, ValueError, OSError):
        found["memory"] = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GB"
    wide = sorted(flags & {"avx2", "avx512_f", "neon", "sve"})
    slow = "slow here: it saves memory, not time"
    return {
        **found,
        "instructions": ", ".join([*wide, *fast_bf16, *fast_int8]) or "none that matter",
        "bfloat16": f"fast ({', '.join(fast_bf16)})" if fast_bf16 else slow,
        "int8": f"fast ({', '.join(fast_int8)})" if fast_int8 else slow,
    }


def accelerators(problems: list[str]) -> dict[str, str]:
    found = {"torch built for": f"CUDA {torch.version.cuda}" if torch.version.cuda else "ROCm" if torch.version.hip else "CPU"}
    count = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    if not count and shutil.which("nvidia-smi"):
        problems.append(
            "there is an NVIDIA driver, and torch sees no GPU: install a torch built for CUDA (pytorch.org/get-started), or "
            "look at CUDA_VISIBLE_DEVICES"
        )
    for number in range(count if torch.cuda.is_available() else 0):
        about = torch.cuda.get_device_properties(number)
        bf16 = "bfloat16" if about.major >= 8 else "no bfloat16: train with fp16"
        found[f"GPU {number}"] = f"{about.name}, {about.total_memory / 2**30:.0f} GB, {bf16}"
    return found if count else {**found, "GPUs": "none"}


def kernels(problems: list[str]) -> dict[str, str]:
    """Whether bitsandbytes computes, found out in a process of its own: a broken library takes its process along."""
    if _version("bitsandbytes") is None:
        problems.append("bitsandbytes is not installed, which quantize needs: pip install bitsandbytes")
        return {"kernels": "not installed"}
    with tempfile.TemporaryDirectory(prefix="hfcompress-doctor-") as folder:  # no file of the user's shadows a module there
        try:
            run = subprocess.run(
                [sys.executable, "-c", _KERNELS],
                capture_output=True,
                text=True,
                errors="replace",
                cwd=folder,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
                timeout=KERNEL_SECONDS,
            )
        except subprocess.TimeoutExpired:
            problems.append("bitsandbytes did not answer in time: try again when the machine is idle, or reinstall it")
            return {"kernels": "no answer"}
    if run.returncode == 0:
        return {"kernels": "4-bit and 8-bit work"}
    last = (run.stderr.strip().splitlines() or [f"exit code {run.returncode}"])[-1]
    problems.append(f"bitsandbytes does not work ({clean(last)[:200]}): pip install --force-reinstall bitsandbytes")
    return {"kernels": "broken"}


def hub(problems: list[str]) -> dict[str, str]:
    """Login and scope. Offline, nothing is asked; nothing takes longer than `SECONDS`."""
    offline = [name for name in OFFLINE if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")]
    found = {"offline": ", ".join(offline) or "no", "endpoint": "the Hub" if "HF_ENDPOINT" not in os.environ else "HF_ENDPOINT"}
    token = get_token()
    found["login"] = "there is a token" if token else "none; push needs one: hf auth login"
    if offline:
        return found
    if not within(SECONDS, _reaches, False):
        problems.append("the Hub can't be reached: look at network and proxy, or set HF_HUB_OFFLINE=1 and use local folders")
        return {**found, "reached": "no"}
    found["reached"] = "yes"
    if token:
        role = within(SECONDS, lambda: _role(token), "not known")
        found["scope"] = role
        if role in ("read", "refused"):
            what = "may only read" if role == "read" else "is refused"
            problems.append(
                f"the Hub token {what}: make one that may write (huggingface.co/settings/tokens), then hf auth login"
            )
    return found


def within(seconds: float, work: Callable[[], Any], otherwise: Any) -> Any:
    """What `work` gives, or otherwise if it raises or takes longer; it is then left behind, and ends with the process."""
    given: list[Any] = []

    def run() -> None:
        with suppress(Exception):
            given.append(work())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return given[0] if given else otherwise


def _reaches() -> bool:
    with suppress(urllib.error.HTTPError):  # an answer, too
        urllib.request.urlopen(constants.ENDPOINT, timeout=SECONDS / 2).close()
    return True


def _role(token: str) -> str:
    try:
        account = HfApi().whoami(token=token)
    except Exception as error:
        return "refused" if getattr(getattr(error, "response", None), "status_code", 0) == 401 else "not known"
    return str(account.get("auth", {}).get("accessToken", {}).get("role", "not known"))


def disk(folder: Path, problems: list[str]) -> dict[str, str]:
    found = {}
    for name, path, remedy in (
        ("output folder", folder, "free some, or give another output_dir"),
        ("Hub cache", Path(constants.HF_HUB_CACHE), "hf cache prune, or set HF_HOME to another disk"),
    ):
        there = path.expanduser().absolute()
        while not there.exists() and there != there.parent:
            there = there.parent
        free = shutil.disk_usage(there).free / 2**30
        found[name] = f"{free:.1f} GB free"
        if free < LEAST_GB:
            problems.append(f"only {free:.1f} GB are free for the {name}: {remedy}")
        if not os.access(there, os.W_OK):
            problems.append(f"the {name} can't be written: {remedy.rpartition('or ')[2]}")
    return found


def _cleaned(found: dict[str, Any]) -> dict[str, Any]:
    def each(value: Any) -> Any:
        return clean(value) if isinstance(value, str) else [each(one) for one in value] if isinstance(value, list) else value

    return {key: each(value) for key, value in found.items()}


def clean(text: str) -> str:
    """Without secrets of the environment, tokens, passwords in addresses, paths, the names of user and machine."""
    for name, value in os.environ.items():
        if _SECRET.search(name) and len(value) > 3:
            text = text.replace(value, "[secret]")
    text = re.sub(r"\bhf_\w+", "[token]", text)
    text = re.sub(r"://[^/\s@]+@", "://[secret]@", text)
    text = re.sub(r"(?<![\w:/.])(?:[A-Za-z]:)?[/\\](?:[^\s'\",:;()]+)", "[path]", text)
    for name in _names():
        text = re.sub(rf"\b{re.escape(name)}\b", "[name]", text)
    return text


def _names() -> list[str]:
    found = [socket.gethostname(), platform.node()]
    with suppress(Exception):
        found.append(getpass.getuser())
    return [name for name in found if len(name) > 1]
