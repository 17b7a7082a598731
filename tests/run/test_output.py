"""Where results go: what is never replaced, one run at a time, what changed since, full disks, goals before pushes."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

import hfcompress.run.loop as loop
from hfcompress import CompressionError, Recipe, compress
from hfcompress.results.plot import plot
from hfcompress.run import cli
from hfcompress.run.inputs import fingerprint, local_inputs
from hfcompress.run.output_folder import output_folder, put_in_place, reserved
from tests.results.hub_server import WRITE, HubServer
from tests.tiny import tiny_checkpoint, tiny_texts


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny encoder and texts; saves are not proven, which other tests do."""
    tiny_texts(tmp_path / "texts", each=8)
    tiny_checkpoint(tmp_path / "bert", "bert")
    monkeypatch.setattr(loop, "prove", lambda *_: 0.0)
    return tmp_path


def recipe(place: Path, **change: Any) -> Recipe:
    raw = {
        "model": str(place / "bert"),
        "task": {"name": "text-classification", "dataset": str(place / "texts"), "max_length": 32, "max_eval_samples": 8},
        "steps": [{"cast": {"dtype": "float16"}}, {"cast": {"dtype": "float32"}}],
    }
    return Recipe.from_dict({**raw, **change})


def refused(place: Path, out: Path | str, overwrite: bool = False, **change: Any) -> str:
    with pytest.raises(CompressionError) as error:
        compress(recipe(place, **change), out, overwrite=overwrite)
    return str(error.value)


def stopped(place: Path, out: Path, monkeypatch: pytest.MonkeyPatch, after: int = 1, **change: Any) -> None:
    """A run that died after so many saves."""
    saved, calls = loop.artifact.save, []

    def dies(*given: Any, **how: Any) -> None:
        calls.append(given)
        if len(calls) > after:
            raise KeyboardInterrupt
        saved(*given, **how)

    monkeypatch.setattr(loop.artifact, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        compress(recipe(place, **change), out)
    monkeypatch.setattr(loop.artifact, "save", saved)


# What may be replaced


def test_only_a_result_of_ours_is_replaced(place: Path) -> None:
    out = place / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    assert refused(place, out, overwrite=True) == (
        f"output_dir '{out}': what lies there is no result of hfcompress (no recipe.yaml and report.json), and --overwrite "
        f"replaces nothing else; choose another output_dir=..., or empty it yourself."
    )
    (out / "thesis.tex").unlink()
    compress(recipe(place), out)  # an empty folder is nobody's
    (out / "thesis.tex").write_text("years of work")
    (out / "figures").mkdir()
    assert refused(place, out, overwrite=True) == (
        f"output_dir '{out}': beside a result it holds figures, thesis.tex, which hfcompress did not write; move that away, or "
        f"choose another output_dir=...."
    )
    assert (out / "thesis.tex").read_text() == "years of work"
    (out / "thesis.tex").unlink()
    (out / "figures").rmdir()
    before = (out / "model.safetensors").stat().st_ino
    compress(recipe(place), out, overwrite=True)
    assert (out / "model.safetensors").stat().st_ino != before


def test_a_work_folder_that_is_not_ours_is_left_alone(place: Path) -> None:
    (place / "out.partial").mkdir()
    (place / "out.partial" / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        assert refused(place, place / "out", overwrite) == (
            f"output_dir '{place / 'out'}': out.partial beside it holds thesis.tex, which hfcompress did not write; move that "
            f"away, or choose another output_dir=...."
        )
    assert (place / "out.partial" / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "where, what",
    [
        ("bert", "is the recipe's model ('{0}/bert')"),
        ("bert/small", "lies in the recipe's model ('{0}/bert')"),
        ("texts/", "is the recipe's task.dataset ('{0}/texts')"),
        ("texts/animals/../money", "lies in the recipe's task.dataset ('{0}/texts')"),
        ("", "holds the working folder ('{0}/home')"),
        ("home", "is the working folder ('{0}/home')"),
        (".", "is the working folder ('{0}/home')"),
        ("..", "holds the working folder ('{0}/home')"),
        ("~", "is the working folder ('{0}/home')"),
    ],
)
def test_what_a_run_reads_is_no_place_for_its_result(
    place: Path, where: str, what: str, overwrite: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "home").mkdir()
    monkeypatch.chdir(place / "home")
    monkeypatch.setenv("HOME", str(place / "home"))
    before = sorted(place.rglob("*"))
    given = where if where in (".", "..", "~") else f"{place}/{where}"
    told = refused(place, given, overwrite)
    assert told.endswith(f": it {what.format(place)}; choose another output_dir=....")
    assert sorted(place.rglob("*")) == before, "nothing was made or removed"


def test_a_result_that_is_the_model_of_the_next_recipe_is_not_replaced_by_it(place: Path) -> None:
    compress(recipe(place), place / "first")
    told = refused(place, place / "first", overwrite=True, model=str(place / "first"))
    assert told == f"output_dir '{place}/first': it is the recipe's model ('{place}/first'); choose another output_dir=...."
    (place / "first").rename(place / "second.partial")  # a work folder would go without being asked
    told = refused(place, place / "second", overwrite=True, model=str(place / "second.partial"))
    assert told.startswith(f"output_dir '{place}/second': second.partial: it is the recipe's model (")


def test_a_tilde_is_a_home_and_a_slash_at_the_end_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert output_folder("~/small") == tmp_path / "small"
    assert output_folder("out/small/") == Path("out/small")
    for given in ("", " ", "a\0b", "~nobody-of-this-name/x", "/"):
        with pytest.raises(CompressionError, match=r"^output_dir '.*': .*"):
            output_folder(given)


def test_a_place_that_no_result_can_be_moved_into_is_found_at_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "elsewhere").mkdir()
    (place / "link").symlink_to(place / "elsewhere")
    assert refused(place, place / "link") == (
        f"output_dir '{place / 'link'}': it is a link, and a result can't take its place; name where it leads, or another."
    )
    (place / "file").write_text("")
    assert refused(place, place / "file") == f"output_dir '{place / 'file'}': it is a file; choose another output_dir=...."
    assert "a mount point, and a result can't take its place; name a folder in it." in refused(place, "/proc")
    opened = []
    monkeypatch.setattr(loop, "_compress", lambda *_: opened.append(1))
    assert refused(place, "/proc/out").startswith("output_dir '/proc/out': nothing can be written there (")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != place)
    assert refused(place, place / "out") == (
        f"output_dir '{place / 'out'}': nothing can be written there (Permission denied); choose another output_dir=...."
    )
    assert not opened and not (place / "out.partial").exists()


def test_a_mistake_leaves_no_work_folder(place: Path) -> None:
    refused(place, place / "out", task={"name": "text-classification", "dataset": str(place / "nothing.csv")})
    assert not (place / "out.partial").exists() and not (place / "out").exists()


def test_what_was_there_goes_only_after_the_new_is_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, whole = tmp_path / "out", tmp_path / "out.partial" / "artifact"
    for folder, word in ((out, "old"), (whole, "new")):
        folder.mkdir(parents=True)
        (folder / "word").write_text(word)
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda self, to: rename(self, to) if self == out else _no_space())
    with pytest.raises(
        CompressionError, match=r"the result can't be moved there .*; it is whole in '.*/out.partial/artifact'\.$"
    ):
        put_in_place(whole, out)
    assert [path.read_text() for path in sorted(tmp_path.rglob("word"))] == ["new", "old"]
    monkeypatch.undo()
    put_in_place(whole, out)
    assert [path.read_text() for path in tmp_path.rglob("word")] == ["new"] and (out / "word").is_file()


def _no_space(*_: Any) -> None:
    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))


# One run at a time


def test_two_runs_in_one_folder_never_mix_and_a_dead_one_blocks_nobody(place: Path) -> None:
    told, tell = os.pipe()
    if not (child := os.fork()):
        with reserved(place / "out"):
            os.write(tell, b"held")
            time.sleep(600)
    assert os.read(told, 4) == b"held"
    assert refused(place, place / "out") == (
        f"output_dir '{place / 'out'}': another run is at work there; wait for it, or choose another output_dir=...."
    )
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    compress(recipe(place), place / "out")
    assert (place / "out" / "model.safetensors").is_file()


# What changed since


def test_a_run_does_not_go_on_with_other_data_or_weights(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped(place, place / "out", monkeypatch)
    text = next((place / "texts").rglob("*.txt"))
    before = text.read_text()
    text.write_text(before.swapcase())  # as long as it was
    told = f"{place}/out.partial: the unfinished run there began with another content of "
    end = "; put that back, or pass --overwrite to begin anew."
    assert refused(place, place / "out") == f"{told}task.dataset{end}"
    weights = load_file(place / "bert" / "model.safetensors")
    save_file(
        {**weights, "classifier.bias": weights["classifier.bias"] + 1}, place / "bert" / "model.safetensors", {"format": "pt"}
    )
    assert refused(place, place / "out") == f"{told}model and task.dataset{end}"
    text.write_text(before)
    save_file(weights, place / "bert" / "model.safetensors", {"format": "pt"})
    (place / "bert" / "README.md").write_text("read by nobody")
    os.utime(text)
    lines: list[str] = []
    compress(recipe(place), place / "out", tell=lines.append)
    assert "going on after step 1, where an earlier run stopped" in lines
    text.write_text(before.swapcase())
    assert refused(place, place / "out") == (
        f"{place}/out: the finished result there was made from another content of task.dataset; pass --overwrite to make it "
        f"anew, or choose another output_dir."
    )


def test_a_finished_folder_without_its_weights_is_not_done(place: Path) -> None:
    compress(recipe(place), place / "out")
    (place / "out" / "model.safetensors").unlink()
    assert refused(place, place / "out") == (
        f"{place}/out: the finished result of this recipe there has lost model.safetensors; pass --overwrite to make it anew."
    )
    compress(recipe(place), place / "out", overwrite=True)
    assert (place / "out" / "model.safetensors").is_file()


def test_fingerprints_tell_content_and_not_dates_or_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / "x.csv").write_bytes(b"0123456789" * 1000)
        (tmp_path / name / "y.csv").write_bytes(b"y")
    first = fingerprint(tmp_path / "a")
    assert first == fingerprint(tmp_path / "b") and fingerprint(tmp_path / "a" / "y.csv") != first
    (tmp_path / "b" / ".hidden").write_bytes(b"z")
    assert fingerprint(tmp_path / "b") == first
    (tmp_path / "b" / "y.csv").rename(tmp_path / "b" / "z.csv")
    assert fingerprint(tmp_path / "b") != first
    monkeypatch.setattr("hfcompress.run.inputs.WHOLE", 100)  # what is large is read in pieces
    monkeypatch.setattr("hfcompress.run.inputs.PIECE", 16)
    first = fingerprint(tmp_path / "a")
    (tmp_path / "a" / "sub" / "x.csv").write_bytes(b"0123456789" * 999 + b"012345678x")
    assert fingerprint(tmp_path / "a") != first, "the end is read"
    (tmp_path / "a" / "sub" / "x.csv").write_bytes(b"1123456789" * 1000)
    assert fingerprint(tmp_path / "a") != first


def test_what_a_recipe_reads_here(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    (place / "train").mkdir()
    (place / "scores.safetensors").write_bytes(b"")
    distill = {"distill": {"teacher": "./bert", "cache": str(place / "texts")}}
    prune = {"prune_heads": {"ratio": 0.5, "scores": "scores.safetensors"}}
    chosen = recipe(place, model="bert", steps=[{"train": {"deepspeed": str(place), "with": [distill]}}, prune])
    assert sorted(local_inputs(chosen)) == [
        "model", "steps.0.distill.teacher", "steps.1.prune_heads.scores", "task.dataset"
    ]  # fmt: skip


# Damage, and full disks


@pytest.mark.parametrize("damage", ["report", "recipe", "snapshot", "weights"])
def test_a_damaged_work_folder_says_what_to_do(place: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    out, work = place / "out", place / "out.partial"
    stopped(place, out, monkeypatch)
    if damage == "report":
        (work / "report.json").write_text('{"format": 1, "rows": [3, ')
    elif damage == "recipe":
        (work / "recipe.yaml").write_text("model: [")
    elif damage == "snapshot":
        shutil.rmtree(work / "step-1")
    else:
        (work / "step-1" / "model.safetensors").write_bytes(b"\xff" * 100)
    told = refused(place, out)
    assert told.startswith(f"{work}: the unfinished run there is damaged (") and len(told.splitlines()) == 1
    assert told.endswith("); pass --overwrite to begin anew, or remove that folder.")
    compress(recipe(place), out, overwrite=True)


class SafetensorError(Exception):
    """As safetensors tells of a disk that is full."""


@pytest.mark.parametrize(
    "error, said",
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError(errno.EFBIG, "File too large"), "File too large"),
        (
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
            "No space left on device",
        ),
    ],
)
def test_a_full_disk_is_one_sentence_and_the_run_goes_on(
    place: Path, error: Exception, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = loop.artifact.save

    def full(model: Any, processor: Any, folder: Path, **how: Any) -> None:
        if folder.name == "step-2":
            raise error
        saved(model, processor, folder, **how)

    monkeypatch.setattr(loop.artifact, "save", full)
    assert refused(place, place / "out").endswith(
        f"output_dir '{place / 'out'}': {said}, and the run could not go on; make room and give the same command again: it goes "
        f"on after the last step that was finished."
    )
    monkeypatch.setattr(loop.artifact, "save", saved)
    lines: list[str] = []
    compress(recipe(place), place / "out", tell=lines.append)
    assert "going on after step 1, where an earlier run stopped" in lines


@pytest.mark.parametrize(
    "name, what, left, number",
    [
        ("recipe.yaml", "the recipe", "", errno.ENOSPC),
        ("report.json", "the report", "", errno.EFBIG),
        ("report.png", "the plot", "out.partial/step-2/model.safetensors", errno.EFBIG),
        ("README.md", "the model card", "out.partial/step-2/model.safetensors", errno.ENOSPC),
    ],
)
def test_whatever_file_the_disk_has_no_room_for_is_one_sentence_and_the_run_goes_on(
    place: Path, name: str, what: str, left: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, refusals = open, []

    def full(file: Any, mode: str = "r", *more: Any, **options: Any) -> Any:
        if Path(str(file)).name.startswith(name) and set(mode) & set("wxa"):
            refusals.append(str(file))
            raise OSError(number, os.strerror(number), str(file))
        return opened(file, mode, *more, **options)

    for owner in ("io.open", "builtins.open"):
        monkeypatch.setattr(owner, full)
    monkeypatch.setattr(loop, "plot", plot)
    told = refused(place, place / "out")
    monkeypatch.undo()
    monkeypatch.setattr(loop, "prove", lambda *_: 0.0)
    assert refusals and len(told.splitlines()) == 1
    assert f": {what} can't be written there ([Errno {number}] {os.strerror(number)}: " in told
    assert told.endswith(
        "); free some space or choose another place, then do the same again: a run goes on after its last finished step."
    )
    assert (place / left).exists() and not (place / "out").exists()
    compress(recipe(place), place / "out")
    assert not (place / "out.partial").exists()
    assert {"recipe.yaml", "report.json", "report.png", "README.md"} <= {path.name for path in (place / "out").iterdir()}


def test_adapter_files_beside_the_weights_are_found_at_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "bert" / "adapter_config.json").write_text("{}")
    monkeypatch.setattr(loop, "_compress", lambda *_: pytest.fail("it began"))
    assert refused(place, place / "out") == (
        f"model '{place}/bert': adapter files (adapter_config.json) lie beside its weights, and a recipe needs one model; merge "
        f"the adapter with PEFT's merge_and_unload and save the result, or take its files away."
    )


# Goals and pushes


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", WRITE)
        yield server


def test_what_missed_its_goal_is_not_pushed_unless_asked(place: Path, hub: HubServer) -> None:
    chosen, lines = recipe(place, goal={"smaller": 3}, push_to="me/small"), []
    report = compress(chosen, place / "out", tell=lines.append)
    missed = "smaller: 3 times wanted, 1.00 times reached"
    assert report.check_goal(chosen.goal_parts) == [f"{missed}."]
    assert lines[-1] == (f"not pushed to me/small, as the goal was missed ({missed}); --push-anyway pushes it all the same")
    assert "me/small" not in hub.repos
    assert f"## Goal\n\n- smaller 3: missed. {missed}.\n" in (place / "out" / "README.md").read_text()
    compress(chosen, place / "out", tell=lines.append, push_anyway=True)
    assert "model.safetensors" in hub.files("me/small")
    there = json.dumps(
        {name: data.decode() for name, data in hub.files("me/small").items() if name.endswith(("md", "yaml", "json"))}
    )
    assert str(place) not in there and "missed" in there


def test_a_finished_run_is_judged_and_pushed_anew_without_computing(
    place: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = place / "out"
    compress(recipe(place, goal={"smaller": 3}), out)
    before = {name: (out / name).read_bytes() for name in ("model.safetensors", "report.png")}
    mark = "<!-- hfcompress: layers -->.*<!-- hfcompress: end of layers -->"
    layers = re.findall(mark, (out / "report.html").read_text(), re.S)
    monkeypatch.setattr(loop, "_compress", lambda *_: pytest.fail("it was computed again"))
    chosen, lines = recipe(place, goal={"smaller": 0.5}, push_to="me/small", output_dir=str(out)), []
    report = compress(chosen, out, tell=lines.append)
    assert lines == [
        f"{out} holds the finished result of this recipe, with another goal and push_to and output_dir; --overwrite runs it again",
        "pushing to me/small",
        f"{hub.endpoint}/me/small",
    ]
    assert report.check_goal(chosen.goal_parts) == [] and report.goal == chosen.goal_parts
    assert hub.files("me/small")["model.safetensors"] == before["model.safetensors"]
    assert {name: (out / name).read_bytes() for name in before} == before
    assert (out / "recipe.yaml").read_text() == chosen.to_yaml()
    card = (out / "README.md").read_text()
    assert "## Goal\n\n- smaller 0.5: met" in card and "missed" not in card
    page = (out / "report.html").read_text()
    assert "met: smaller, 0.5 times wanted" in page and "missed" not in page.partition("<main>")[2]
    assert layers and layers == re.findall(mark, page, re.S)
    assert str(place) not in hub.files("me/small")["report.html"].decode()
    assert loop.Report.load(out / "report.json").goal == chosen.goal_parts
    compress(chosen, out, tell=lines.append)
    assert lines[3:] == [
        f"{out} holds the finished result of this very recipe; --overwrite runs it again", "me/small holds it already"
    ]  # fmt: skip
    compress(recipe(place, goal={"smaller": 3}, push_to="me/other"), out, tell=lines.append)
    assert lines[-1].startswith("not pushed to me/other, as the goal was missed (") and "me/other" not in hub.repos
    told = refused(place, out, seed=7)
    assert (
        told
        == f"output_dir '{out}': something else lies there; choose another output_dir=..., or pass --overwrite to replace it."
    )


def test_an_interrupted_push_is_made_up_by_the_same_command(place: Path, hub: HubServer) -> None:
    chosen, lines = recipe(place, goal={"smaller": 0.5}, push_to="me/small"), []
    hub.fail_uploads = True
    assert "is whole: push it again" in refused(place, place / "out", goal={"smaller": 0.5}, push_to="me/small")
    hub.fail_uploads = False
    compress(chosen, place / "out", tell=lines.append)
    assert lines == [
        f"{place}/out holds the finished result of this very recipe; --overwrite runs it again",
        "pushing to me/small",
        f"{hub.endpoint}/me/small",
    ]
    assert hub.files("me/small")["model.safetensors"] == (place / "out" / "model.safetensors").read_bytes()
    hub.repos["me/small"].commit({**hub.files("me/small"), "README.md": b"a card that somebody has written since"})
    compress(chosen, place / "out", tell=lines.append)
    assert lines[-1] == "me/small holds it already"
    assert hub.files("me/small")["README.md"] == b"a card that somebody has written since"


def test_the_exit_code_tells_a_goal_that_was_missed(place: Path, capsys: Any) -> None:
    (place / "r.yaml").write_text(recipe(place, goal={"smaller": 3}).to_yaml())
    with pytest.raises(typer.Exit) as end:
        cli.run(str(place / "r.yaml"), [f"output_dir={place / 'out'}"])
    assert end.value.exit_code == 3 and (place / "out" / "model.safetensors").is_file()
    assert "goal missed smaller: 3 times wanted, 1.00 times reached." in capsys.readouterr().out
