"""Pushing, the model card, and loading back, over HTTP with the real client; `HubServer` plays the Hub."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import traceback
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard, constants
from huggingface_hub.errors import EntryNotFoundError
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForSequenceClassification, BertConfig, PreTrainedTokenizerFast

from hfcompress.checkpoint.errors import CompressionError
from hfcompress.results.card import write_card
from hfcompress.results.hub import check_push, is_pushed, push
from hfcompress.results.load_snippet import auto_class
from tests.results.hub_server import FINE, OTHER, READ, WRITE, HubServer, card_errors

IDS = [[2, 5, 7, 3], [2, 9, 4, 3]]
MEASURED_ON = "Measured on: cpu a processor, cpu flags avx2 amx, threads 2."
RECIPE = """\
model: glue-bert
task: {name: text-classification, dataset: glue/sst2}
steps:
  - prune_heads: {ratio: 0.5}
  - train:
      with: [{distill: {teacher: original}}]
  - quantize: {bits: 8}
"""


@dataclass
class Row:
    step: str
    megabytes: float
    parameters: int
    score: dict[str, Any]


@dataclass
class FakeReport:
    rows: list[Row]
    reference: int = 0
    machine: Any = field(default_factory=lambda: {"cpu": "a processor", "cpu_flags": ["avx2", "amx"], "threads": 2})

    def check_goal(self, goal: dict[str, float | None]) -> list[str]:
        return [
            f"{part}: {wanted:g} times wanted, 4.44 times reached." for part, wanted in goal.items() if wanted and wanted > 4.44
        ]

    def markdown(self) -> str:
        lines = [f"| {row.step} | {row.megabytes} | {row.score.get('accuracy')} |" for row in self.rows]
        return "\n".join(["| step | megabytes | accuracy |", "|---|---|---|", *lines])

    def to_dict(self) -> dict[str, Any]:
        return {"machine": self.machine}


@pytest.fixture(autouse=True)
def on_the_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test of this file asks anything outside this machine, whatever is reachable from it."""
    connect = socket.socket.connect

    def only_here(self: socket.socket, address: Any) -> None:
        assert self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1"), f"a connection to {address}"
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", only_here)


@pytest.fixture
def report() -> FakeReport:
    score = {"accuracy": 0.5, "loss": float("nan"), "perplexity": float("inf"), "f1": 0.25, "best": "a word"}
    return FakeReport(
        [Row("as it came", 91.0, 22_700_000, {"accuracy": 0.75}), Row("quantize (bits: 8)", 20.5, 17_400_000, score)]
    )


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A Hub of its own for a test, and this process's client pointed at it, logged in with the write token."""
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
        monkeypatch.setenv("HF_TOKEN", WRITE)
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny BERT classifier with its tokenizer, as save_pretrained leaves it."""
    place = tmp_path / "tiny"
    config = BertConfig(
        vocab_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=3
    )
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(place)
    vocabulary = {word: number for number, word in enumerate(["[UNK]", "[PAD]", "[CLS]", "[SEP]", *"abcdefgh"])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(place)
    return place


def fresh(code: str, hub: HubServer, home: Path, token: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run code in a new process with an empty HF_HOME, whose Hub is `hub`: what a user's colleague would have."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_TOKEN": token} if token else {}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForSequenceClassification.from_pretrained(folder)(torch.tensor(IDS)).logits


def fingerprint(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def snippet(card: str) -> str:
    found = re.findall(r"```python\n(.*?)\n```", card, re.S)
    assert len(found) == 1
    return found[0]


def card(folder: Path, report: Any, **changes: Any) -> str:
    fields: dict[str, Any] = {"base_model": "me/base", "recipe_text": RECIPE}
    fields["task"] = {"name": "text-classification", "dataset": "glue/sst2"}
    write_card(folder, **(fields | {"report": report} | changes))
    return (folder / "README.md").read_text()


# May we push?

LOGIN = "run `hf auth login` or set HF_TOKEN to a token with write access"
TOKENS = "https://huggingface.co/settings/tokens"
NO_NAME = (
    "this is no Hub repository; write OWNER/NAME, such as your-name/bert-small, with letters, digits, '-', '_' and "
    "'.', each at most 96 characters."
)


@pytest.mark.parametrize(
    "token, repo_id", [(WRITE, "me/x"), (WRITE, "team/x"), (FINE, "team/x"), (FINE, "me/one"), (OTHER, "other/x")]
)
def test_who_may_push(hub: HubServer, token: str, repo_id: str) -> None:
    check_push(repo_id, token)
    # Where the client suspects a coding agent it asks one page more, once.
    assert [line for line in hub.requests if "agent" not in line] == ["GET /api/whoami-v2"]


@pytest.mark.parametrize("repo_id", ["small", "me/my model", "me/a/b", "/x", "me/", "me/a--b", "me/x.git", ""])
def test_malformed_name(hub: HubServer, repo_id: str) -> None:
    with pytest.raises(CompressionError) as told:
        check_push(repo_id)
    assert str(told.value) == f"push to {repo_id!r}: {NO_NAME}"
    assert hub.requests == []


@pytest.mark.parametrize(
    "token, repo_id, sentence",
    [
        (None, "me/x", f"no Hugging Face token was found; {LOGIN} ({TOKENS})."),
        ("hf_test_unknown", "me/x", f"the Hub does not accept the token; {LOGIN} ({TOKENS})."),
        ("hf_test write", "me/x", f"the token holds a blank or another character no token has; {LOGIN}."),
        (
            READ,
            "me/x",
            f"the token of 'me' may only read; make one with write access at {TOKENS}, then run `hf auth login` or set "
            "HF_TOKEN.",
        ),
        (
            WRITE,
            "other/x",
            "the token of 'me' may not write to 'other'; possible: me, team; choose one of these, or log in "
            "with another token.",
        ),
        (
            WRITE,
            "readers/x",
            "the token of 'me' may not write to 'readers'; possible: me, team; choose one of these, or log in "
            "with another token.",
        ),
        (
            FINE,
            "me/x",
            "the token of 'me' may not write to 'me'; possible: team, me/one; choose one of these, or log in with "
            "another token.",
        ),
    ],
)
def test_who_may_not_push(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, token: str | None, repo_id: str, sentence: str
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(CompressionError) as told:
        check_push(repo_id, token)
    assert str(told.value) == f"push to {repo_id!r}: {sentence}"
    assert token is None or token not in "".join(traceback.format_exception(told.value))


def test_no_hub_at_the_address(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CompressionError) as told:
        check_push("me/x")
    assert str(told.value) == (
        "push to 'me/x': the Hub at http://127.0.0.1:9 can't be reached (ConnectError); check the network and "
        "HF_ENDPOINT, or leave the push out."
    )


def test_the_client_may_be_told_to_stay_offline(hub: HubServer, tmp_path: Path) -> None:
    code = (
        "import os; os.environ['HF_HUB_OFFLINE'] = '1'\n"
        "from hfcompress.results.hub import CompressionError, check_push\n"
        "try:\n    check_push('me/x')\nexcept CompressionError as error:\n    print(error)"
    )
    said = fresh(code, hub, tmp_path / "home", WRITE)
    assert said.stdout.strip() == "push to 'me/x': HF_HUB_OFFLINE is set; unset it, or leave the push out.", said.stderr


def test_a_hub_in_trouble(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", f"{hub.endpoint}/nothing/here")
    with pytest.raises(CompressionError) as told:
        check_push("me/x")
    assert str(told.value).startswith("push to 'me/x': the Hub answered 404 Not Found: no such page")
    assert str(told.value).endswith("; try again later, or leave the push out.")


# Push and load back


def test_the_hub_of_these_tests_answers_as_the_real_one(hub: HubServer, tmp_path: Path) -> None:
    weights = bytes(range(256))
    hub.add("me/x", {"config.json": b"{}", "model.safetensors": weights, "adapter/model.safetensors": b"small"})
    api = HfApi()
    assert api.repo_exists("me/x") and not api.repo_exists("me/y")
    assert Path(api.hf_hub_download("me/x", "model.safetensors", cache_dir=tmp_path)).read_bytes() == weights
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download("me/x", "vocab.txt", cache_dir=tmp_path)
    assert api.revision_exists("me/x", "main") and not api.revision_exists("me/x", "v2")
    assert {entry.path for entry in api.list_repo_tree("me/x")} == {"config.json", "model.safetensors", "adapter"}
    assert len(list(api.list_repo_tree("me/x", recursive=True))) == 4
    url = f"{hub.endpoint}/me/x/resolve/main/model.safetensors"
    with urllib.request.urlopen(urllib.request.Request(url, headers={"Range": "bytes=250-"})) as answer:
        assert (answer.status, answer.read()) == (206, weights[250:])


def test_fine_grained_token_for_one_repository(hub: HubServer, folder: Path) -> None:
    hub.add("me/one", {"README.md": b"# one"})
    push(folder, "me/one", token=FINE)
    assert "model.safetensors" in hub.files("me/one")


def test_pushed_model_loads_plainly_in_a_fresh_process(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    for name in (
        "checkpoint-10/model.safetensors",
        "model.safetensors.partial",
        ".env",
        "notes.txt",
        ".ssh/id_rsa",
        "key.json",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not to be seen")
    (folder / "README.md").write_bytes(b"")
    before = fingerprint(folder)
    assert push(folder, "me/tiny") == f"{hub.endpoint}/me/tiny"
    assert fingerprint(folder) == before
    assert set(hub.files("me/tiny")) == {
        ".gitattributes", "README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"
    }  # fmt: skip
    assert len(hub.repos["me/tiny"].commits) == 2, "the repository's own first commit, and one for the whole model"
    code = (
        "import json, torch\n"
        "from transformers import AutoModelForSequenceClassification, AutoTokenizer\n"
        "model = AutoModelForSequenceClassification.from_pretrained('me/tiny')\n"
        "assert AutoTokenizer.from_pretrained('me/tiny').pad_token == '[PAD]'\n"
        f"with torch.no_grad(): print(json.dumps(model(torch.tensor({IDS})).logits.tolist()))"
    )
    said = fresh(code, hub, tmp_path / "home")
    assert said.returncode == 0, said.stderr
    torch.testing.assert_close(torch.tensor(json.loads(said.stdout)), logits(folder), rtol=0, atol=1e-6)


def test_private_repository_is_refused_without_a_token(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    push(folder, "team/secret", private=True)
    assert hub.repos["team/secret"].private
    code = (
        "from huggingface_hub import hf_hub_download\n"
        "from huggingface_hub.errors import RepositoryNotFoundError\n"
        "try:\n    print(hf_hub_download('team/secret', 'config.json'))\n"
        "except RepositoryNotFoundError as error:\n    print('refused', error.response.status_code)"
    )
    assert fresh(code, hub, tmp_path / "stranger").stdout.strip() == "refused 401"
    assert fresh(code, hub, tmp_path / "other", OTHER).stdout.strip() == "refused 404"
    assert fresh(code, hub, tmp_path / "me", READ).stdout.strip().endswith("config.json")


def test_private_push_never_lands_in_a_public_repository(hub: HubServer, folder: Path) -> None:
    hub.add("me/open", {"README.md": b"public"})
    with pytest.raises(CompressionError) as told:
        push(folder, "me/open", private=True)
    assert str(told.value) == (
        "push to 'me/open': this repository exists and is public; make it private in its settings, or choose another "
        f"name; '{folder}' is whole: push it again with `hfcompress push {folder} me/open --private`."
    )
    assert set(hub.files("me/open")) == {"README.md"}


@pytest.mark.filterwarnings("ignore")
def test_second_push_replaces_the_first(hub: HubServer, folder: Path) -> None:
    hub.add("me/tiny", {"model-00001-of-00001.safetensors": b"old", "model.safetensors.index.json": b"old", "a.txt": b"a"})
    push(folder, "me/tiny")
    assert "a.txt" in hub.files("me/tiny"), "files that are not the model's weights stay"
    assert {name for name in hub.files("me/tiny") if name.startswith("model")} == {"model.safetensors"}
    commits = len(hub.repos["me/tiny"].commits)
    push(folder, "me/tiny")
    assert len(hub.repos["me/tiny"].commits) == commits, "nothing changed, nothing committed"
    (folder / "model.safetensors").write_bytes(b"new weights")
    push(folder, "me/tiny")
    assert hub.files("me/tiny")["model.safetensors"] == b"new weights"


def test_failing_push_leaves_the_folder_whole(hub: HubServer, folder: Path, report: FakeReport) -> None:
    card(folder, report)
    before = fingerprint(folder)
    hub.fail_uploads = True
    with pytest.raises(CompressionError) as told:
        push(folder, "me/tiny")
    assert str(told.value) == (
        "push to 'me/tiny': the Hub answered 507 Insufficient Storage: The storage is full; "
        f"'{folder}' is whole: push it again with `hfcompress push {folder} me/tiny`."
    )
    assert fingerprint(folder) == before
    assert WRITE not in "".join(traceback.format_exception(told.value))
    assert set(hub.files("me/tiny")) == {".gitattributes"}
    hub.fail_uploads = False
    push(folder, "me/tiny")
    assert fingerprint(folder) == before


def test_a_link_out_of_the_folder_is_never_followed(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"a key")
    (folder / "notes.txt").symlink_to(secret)
    (folder / "inside.json").symlink_to(folder / "config.json")
    push(folder, "me/tiny")
    assert set(hub.files("me/tiny")) == {
        ".gitattributes", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"
    }  # fmt: skip
    (folder / "generation_config.json").symlink_to(secret)
    with pytest.raises(CompressionError) as told:
        push(folder, "me/tiny")
    assert str(told.value) == (
        f"'{folder}': generation_config.json is a link out of the folder, and nothing from outside it is taken; put the file "
        f"itself there."
    )
    assert hub.files("me/tiny") and all(
        b"a key" not in data for data in (*hub.files("me/tiny").values(), *hub.objects.values())
    )


def test_what_was_pushed_is_known(hub: HubServer, folder: Path) -> None:
    assert not is_pushed(folder, "me/tiny"), "no such repository"
    push(folder, "me/tiny")
    assert is_pushed(folder, "me/tiny")
    config = (folder / "config.json").read_bytes()
    (folder / "config.json").write_bytes(config + b" ")
    assert not is_pushed(folder, "me/tiny")
    (folder / "config.json").write_bytes(config)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-1] + b"x")
    assert not is_pushed(folder, "me/tiny")


PRIVATE = """\
model: /home/me/secret models/bert
task: {name: text-classification, dataset: ~/data/texts.csv}
steps: [{train: {logging_dir: "C:\\\\Users\\\\me\\\\logs"}}]
"""


def test_nothing_pushed_names_a_path_of_this_machine(hub: HubServer, folder: Path, report: FakeReport) -> None:
    report.rows[-1].step = "prune_vocab ~/data/texts.csv"
    text = card(folder, report, recipe_text=PRIVATE, base_model="/home/me/secret models/bert")
    (folder / "recipe.yaml").write_text(PRIVATE)
    (folder / "report.json").write_text(json.dumps({"rows": [{"step": "prune_vocab ~/data/texts.csv"}]}))
    push(folder, "me/tiny")
    there = hub.files("me/tiny")
    for words in (text, *(there[name].decode() for name in ("README.md", "recipe.yaml", "report.json"))):
        assert not re.search(r"/home|Users|~|secret|data/texts|pytest", words), words
    assert yaml.safe_load(there["recipe.yaml"]) == {
        "model": "bert",
        "task": {"name": "text-classification", "dataset": "texts.csv"},
        "steps": [{"train": {"logging_dir": "logs"}}],
    }
    assert json.loads(there["report.json"]) == {"rows": [{"step": "prune_vocab texts.csv"}]}
    assert "1. prune_vocab texts.csv" in text
    assert (folder / "recipe.yaml").read_text() == PRIVATE, "the folder's own stays, to run it again"


def test_a_password_in_the_address_of_the_hub_is_never_told(
    hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://somebody:hunter2@127.0.0.1:9")
    for call in (lambda: check_push("me/x"), lambda: push(folder, "me/x")):
        with pytest.raises(CompressionError) as told:
            call()
        whole = "".join(traceback.format_exception(told.value))
        assert "the Hub at http://127.0.0.1:9 can't be reached" in whole and "hunter2" not in whole and "somebody" not in whole
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint.replace("//", "//somebody:hunter2@"))
    with pytest.raises(CompressionError) as told:  # the client takes them for the login
        push(folder, "me/tiny")
    assert "hunter2" not in "".join(traceback.format_exception(told.value))


def test_push_says_what_check_push_says(hub: HubServer, folder: Path) -> None:
    with pytest.raises(CompressionError) as told:
        push(folder, "me/tiny", token=READ)
    assert str(told.value).startswith("push to 'me/tiny': the token of 'me' may only read; make one")
    assert str(told.value).endswith(f"; '{folder}' is whole: push it again with `hfcompress push {folder} me/tiny`.")
    with pytest.raises(CompressionError, match=r"^push: '.*' has no config.json; name the folder of a saved model.$"):
        push(folder / "nothing", "me/tiny")
    assert hub.repos == {}


def test_hub_refuses_nan_in_a_card_and_push_says_so(hub: HubServer, folder: Path) -> None:
    (folder / "README.md").write_text("---\nmodel-index:\n- name: x\n  results: []\n  loss: .nan\n---\n# my own card\n")
    with pytest.raises(CompressionError) as told:
        push(folder, "me/tiny")
    assert "push to 'me/tiny': the Hub answered 400 Bad Request: Invalid metadata" in str(told.value)


# The card


def test_card_says_what_is_known(hub: HubServer, folder: Path, report: FakeReport) -> None:
    hub.add("me/base", {"README.md": b"---\nlicense: apache-2.0\n---\n# base\n"})
    text = card(folder, report, tags=["distillation", "pruning", "pruning", "quantization"])
    assert card_errors(text) == []
    data = ModelCard.load(folder / "README.md").data.to_dict()
    results = data.pop("model-index")
    assert data == {
        "base_model": "me/base",
        "base_model_relation": "quantized",
        "datasets": ["nyu-mll/glue"],
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-classification",
        "tags": ["hfcompress", "compression", "distillation", "pruning", "quantization"],
    }
    dataset = {"name": "glue/sst2", "type": "nyu-mll/glue", "config": "sst2"}
    metrics = [{"type": "accuracy", "value": 0.5}, {"type": "f1", "value": 0.25}]
    result = {"task": {"type": "text-classification"}, "dataset": dataset, "metrics": metrics}
    assert results == [{"name": "tiny", "results": [result]}]
    for part in (report.markdown(), f"```yaml\n{RECIPE.strip()}\n```", MEASURED_ON):
        assert part in text
    assert "1. quantize (bits: 8)" in text
    assert "17.4 M parameters, were 22.7 M; 20.5 MB, were 91 MB" in text


def test_card_invents_nothing(hub: HubServer, folder: Path, report: FakeReport) -> None:
    report.rows[-1].score = {}
    base = folder.parent / "my base"
    base.mkdir()
    for address in (str(base), "package://some-package/model", "me/unknown"):
        text = card(folder, report, base_model=address, task={"name": "causal-lm", "dataset": "package://a/b"})
        data = ModelCard.load(folder / "README.md").data.to_dict()
        assert card_errors(text) == []
        assert data["pipeline_tag"] == "text-generation"
        assert ("base_model" in data) == (address == "me/unknown")
        assert not {"license", "datasets", "model-index"} & set(data)
        assert str(folder.parent) not in text.replace(folder.as_posix(), "")
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: mine\n---\n")
    card(folder, report, base_model=str(base), recipe_text="steps: [merge]", task="text-generation")
    data = ModelCard.load(folder / "README.md").data.to_dict()
    assert (data["license"], data["license_name"], data["tags"]) == ("other", "mine", ["hfcompress", "compression"])


def test_card_says_whether_each_part_of_the_goal_was_met(hub: HubServer, folder: Path, report: FakeReport) -> None:
    text = card(folder, report, goal={"smaller": 4.0, "faster": 5.0})
    assert "## Goal\n\n- smaller 4: met.\n- faster 5: missed. faster: 5 times wanted, 4.44 times reached.\n" in text
    assert "## Goal" not in card(folder, report)


def test_card_needs_no_hub(folder: Path, report: FakeReport, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    data = ModelCard(card(folder, report)).data.to_dict()
    assert "license" not in data and "datasets" not in data
    assert data["model-index"][0]["results"][0]["dataset"] == {"name": "glue/sst2", "type": "glue/sst2"}


def test_import_is_named_only_where_needed(hub: HubServer, folder: Path, report: FakeReport) -> None:
    config = json.loads((folder / "config.json").read_text())
    plain = card(folder, report)
    assert "hfcompress" not in snippet(plain) and "It needs" not in plain
    ours = "It needs hfcompress, which is on no package index yet: run `pip install .` in a checkout of its repository."
    for method, needs, imported in [
        ("hfcompress", ours, True),
        ("bitsandbytes", "It needs `pip install bitsandbytes`.", False),
    ]:
        config["quantization_config"] = {"quant_method": method}
        (folder / "config.json").write_text(json.dumps(config))
        text = card(folder, report)
        assert ("import hfcompress" in snippet(text)) == imported
        assert needs in text and "pip install hfcompress" not in text


@pytest.mark.parametrize("place", ["small.partial", "small.partial/artifact"])
def test_card_of_a_work_folder_names_its_final_place(folder: Path, report: FakeReport, place: str) -> None:
    work = folder.parent / place
    work.parent.mkdir(exist_ok=True)
    folder.rename(work)
    text = card(work, report, base_model="package://a/b", task="text-classification")
    assert 'from_pretrained("small")' in text and "\n# small\n" in text


@pytest.mark.parametrize(
    "model_type, architecture, expected",
    [
        ("bert", "BertForSequenceClassification", "AutoModelForSequenceClassification"),
        ("bert", "BertModel", "AutoModel"),
        ("llama", "LlamaForCausalLM", "AutoModelForCausalLM"),
        ("gpt2", "GPT2LMHeadModel", "AutoModelForCausalLM"),
        ("t5", "T5ForConditionalGeneration", "AutoModelForSeq2SeqLM"),
        ("whisper", "WhisperForConditionalGeneration", "AutoModelForSpeechSeq2Seq"),
        ("vit", "ViTForImageClassification", "AutoModelForImageClassification"),
        ("wav2vec2", "Wav2Vec2ForCTC", "AutoModelForCTC"),
        ("bert", "BertForMaskedLM", "AutoModelForMaskedLM"),
        ("distilbert", "DistilBertForTokenClassification", "AutoModelForTokenClassification"),
    ],
)
def test_auto_class(model_type: str, architecture: str, expected: str) -> None:
    assert auto_class({"model_type": model_type, "architectures": [architecture]}) == expected


def test_pushed_snippet_runs_in_a_fresh_process(
    hub: HubServer, folder: Path, report: FakeReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = LoraConfig(r=2, target_modules=["query"], init_lora_weights=False)
    model = get_peft_model(AutoModelForSequenceClassification.from_pretrained(folder), lora).eval()
    model.save_pretrained(folder / "adapter")
    local = card(folder, report)
    assert 'from_pretrained("tiny")' in snippet(local)
    push(folder, "me/renamed")
    there = hub.files("me/renamed")["README.md"].decode()
    assert (folder / "README.md").read_text() == local
    assert 'from_pretrained("me/renamed")' in snippet(there) and folder.as_posix() not in there
    assert "\n# renamed\n" in there and ModelCard(there).data.model_name == "renamed"
    assert "It needs `pip install peft`." in there
    run = snippet(there) + "\n"
    run += (
        "import json, torch\n"
        f"with torch.no_grad(): out = model.eval()(torch.tensor({IDS})).logits.tolist()\n"
        "print(json.dumps([type(model).__name__, tokenizer.pad_token, out]))"
    )
    said = fresh(run, hub, tmp_path / "home")
    assert said.returncode == 0, said.stderr
    kind, pad, out = json.loads(said.stdout.splitlines()[-1])
    assert (kind, pad) == ("BertForSequenceClassification", "[PAD]")
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(out), model(torch.tensor(IDS)).logits, rtol=0, atol=1e-6)
    monkeypatch.chdir(folder.parent)
    scope: dict[str, Any] = {}
    exec(snippet(local), scope)
    assert type(scope["model"]).__name__ == kind


def test_an_export_is_pushed_alone(hub: HubServer, tmp_path: Path) -> None:
    """One for llama.cpp has no config.json."""
    told = {"exported.json": "{}", "model.gguf": "GGUF", "Modelfile": "FROM ./model.gguf", "notes.txt": "mine"}
    for name, text in told.items():
        (tmp_path / name).write_text(text)
    push(tmp_path, "me/small-gguf")
    assert set(HfApi().list_repo_files("me/small-gguf")) == {".gitattributes", *told} - {"notes.txt"}
