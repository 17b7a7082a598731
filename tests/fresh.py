"""Fresh processes for tests, without the seconds that their imports take: each is forked off one that has imported transformers
and other libraries, but not hfcompress, bitsandbytes or peft."""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

_SERVER = """
import json, os, runpy, sys, traceback
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
    how, what, *args = told["args"]
    sys.argv = ["-c" if how == "-c" else what, *args]
    try:
        if how == "-c":
            exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
        else:
            runpy.run_module(what, run_name="__main__", alter_sys=True)
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
    child = os.fork()
    if not child:
        code = run(json.loads(line))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
_server: list[subprocess.Popen[str]] = []


def run(command: list[str], *, env: dict[str, str] | None = None, cwd: Any = None, check: bool = False, **_: Any) -> Any:
    """As `subprocess.run(command, capture_output=True, text=True)`, for a command of [sys.executable, "-c", PROGRAM, ...] or
    [sys.executable, "-m", MODULE, ...]."""
    python, *args = map(str, command)
    assert python == sys.executable and args[0] in ("-c", "-m"), command
    if not _server:
        _server.append(subprocess.Popen([python, "-P", "-c", _SERVER], stdin=-1, stdout=-1, text=True))
        atexit.register(_server[0].kill)
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        out.touch()
        err.touch()
        told = {"args": args, "env": dict(os.environ) if env is None else env, "cwd": str(cwd or Path.cwd())}
        server: Any = _server[0]
        server.stdin.write(json.dumps({**told, "out": str(out), "err": str(err)}) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        done = subprocess.CompletedProcess(command, code, out.read_text(errors="replace"), err.read_text(errors="replace"))
    if check:
        done.check_returncode()
    return done
