"""Fresh processes for tests, without the seconds that their imports take: each is forked off one that has imported transformers
and other libraries, but not hfcompress, bitsandbytes or peft."""

from __future__ import annotations

import atexit
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

_SERVER = """
import json, os, runpy, signal, sys, traceback
import torch, safetensors.torch, transformers
import transformers.modeling_utils, transformers.models.auto.modeling_auto, transformers.models.auto.tokenization_auto
import accelerate, datasets, pydantic, rich.console, typer

def run(told):
    for number, name in ((0, os.devnull), (1, told["out"]), (2, told["err"])):
        os.dup2(os.open(name, os.O_RDONLY if number == 0 else os.O_WRONLY), number)
    os.chdir(told["cwd"])
    os.environ.clear()
    os.environ.update(told["env"])
    paths = [path for path in told["env"].get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:0] = paths if "PYTHONSAFEPATH" in told["env"] else ["", *paths]
    how, what, *args = told["args"] if told["args"][0] in ("-c", "-m") else ("", *told["args"])
    sys.argv = ["-c" if how == "-c" else what, *args]
    try:
        if how == "-c":
            exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
        elif how == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(what, run_name="__main__")
        return 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1

assert not {"hfcompress", "bitsandbytes", "peft"} & set(sys.modules)
for line in sys.stdin:
    alive, failed = set(), 0
    for told in json.loads(line):
        child = os.fork()
        if not child:
            code = run(told)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        alive.add(child)
    while alive:
        child, status = os.wait()
        alive.discard(child)
        if (code := os.waitstatus_to_exitcode(status)) and not failed:
            failed = code
            for other in alive:  # which would wait for the one that is gone
                os.kill(other, signal.SIGKILL)
    print(failed, flush=True)
"""
_server: list[subprocess.Popen[str]] = []


def run(command: list[str], *, env: dict[str, str] | None = None, cwd: Any = None, check: bool = False, **_: Any) -> Any:
    """As `subprocess.run(command, capture_output=True, text=True)`, for a command of [sys.executable, "-c", PROGRAM, ...] or
    [sys.executable, "-m", MODULE, ...]."""
    python, *args = map(str, command)
    assert python == sys.executable and args[0] in ("-c", "-m"), command
    done = _run(command, args, [dict(os.environ) if env is None else env], cwd)
    if check:
        done.check_returncode()
    return done


def two_processes(*args: Any, env: dict[str, str] | None = None, cwd: Any = None) -> Any:
    """As `python -m torch.distributed.run --nproc_per_node 2 ARGS` would run them: a script or "-m", a module, and arguments."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    about = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    about = {**(os.environ if env is None else env), **about, "OMP_NUM_THREADS": "1"}
    return _run(args, list(map(str, args)), [{**about, "RANK": rank, "LOCAL_RANK": rank} for rank in "01"], cwd)


def _run(command: Any, args: list[str], environments: list[dict[str, str]], cwd: Any) -> Any:
    """One process for each of the environments, side by side; what they said one after the other."""
    if not _server:
        _server.append(subprocess.Popen([sys.executable, "-P", "-c", _SERVER], stdin=-1, stdout=-1, text=True))
        atexit.register(_server[0].kill)
    with tempfile.TemporaryDirectory() as folder:
        files = [{kind: Path(folder, f"{kind}-{number}") for kind in ("out", "err")} for number in range(len(environments))]
        asked = []
        for own, env in zip(files, environments, strict=True):
            for file in own.values():
                file.touch()
            asked.append({"args": args, "env": env, "cwd": str(cwd or Path.cwd()), **{kind: str(own[kind]) for kind in own}})
        server: Any = _server[0]
        server.stdin.write(json.dumps(asked) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        said = ["".join(own[kind].read_text(errors="replace") for own in files) for kind in ("out", "err")]
    return subprocess.CompletedProcess(command, code, *said)
