"""The model card, and the push: whole runs against a hub of sixty lines that listens on this machine."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

import sft
from common.hub import model_card, on_hub, without_paths
from common.run import launch

ROOT = Path(sft.__file__).parent
TOKEN = "hf_a-token-that-nobody-may-write-down"
SHORT = ["--dataset_split", "train[:16]", "--train_batch_size", "8", "--max_steps", "2", "--max_eval_samples", "4"]

# ---------------------------------------------------------------- a hub


class Hub(BaseHTTPRequestHandler):
    """The calls of a push. Of the server: what it was `asked`, the `files` it got, its `role`, whether it `refuses`."""

    def do_GET(self):
        self.do_POST()

    def do_POST(self):
        hub, body = self.server, self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub.asked.append((self.path.partition("?")[0], self.headers["Authorization"], body))
        if self.path == "/api/whoami-v2":
            answer = {"type": "user", "name": "me", "orgs": [], "auth": {"accessToken": {"role": hub.role}}}
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            owner = asked.get("organization") or "me"
            answer = {"url": f"http://{self.headers['Host']}/{owner}/{asked['name']}"}
        elif self.path == "/api/validate-yaml":
            answer = {"errors": [], "warnings": []}
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            answer = {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]}
        elif "/commit/" in self.path and not hub.refuses:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            answer = {"commitOid": "0" * 40, "success": True}
            answer["commitUrl"] = f"http://{self.headers['Host']}/me/tiny/commit/{answer['commitOid']}"
        elif self.path.startswith("/api/models/") and "/commit/" not in self.path:
            answer = {"id": "me/tiny", "sha": "0" * 40, "siblings": []}
        else:
            answer = {"error": "storage is full"}
        text = json.dumps(answer).encode()
        self.send_response(403 if "error" in answer else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked, server.files, server.role, server.refuses = [], {}, "write", False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def train(hub, folder: Path, *more: str) -> subprocess.CompletedProcess:
    plain = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}  # of conftest.py
    address = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_TOKEN": TOKEN, "HF_HOME": str(folder / "home")}
    command = [sys.executable, str(ROOT / "sft.py"), "--output_dir", str(folder / "tiny"), *SHORT, "--push_to_hub"]
    return subprocess.run([*command, *more], cwd=folder, env=plain | address, capture_output=True, text=True)


def test_final_is_on_the_hub(hub, tmp_path):
    done = train(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    final = tmp_path / "tiny" / "final"
    assert hub.files == {path.name: path.read_bytes() for path in final.iterdir() if path.is_file()}
    assert {"README.md", "model.safetensors", "config.json", "tokenizer.json"} <= set(hub.files)
    assert "/me/tiny" in done.stdout.splitlines()[-1]
    assert {token for _, token, _ in hub.asked} - {None} == {f"Bearer {TOKEN}"}
    (create,) = [json.loads(body) for path, _, body in hub.asked if path == "/api/repos/create"]
    assert create["name"] == "tiny" and not create.get("private", False) and create.get("visibility") != "public"
    assert TOKEN not in done.stdout + done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


def test_a_push_that_fails_leaves_the_model(hub, tmp_path):
    hub.refuses = True
    done = train(hub, tmp_path, "--hub_model_id", "ours/better", "--hub_private_repo")
    final = tmp_path / "tiny" / "final"
    assert done.returncode == 1 and "Traceback" not in done.stderr
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert f"the model is safe in {final}" in said and "storage is full" in said
    assert f"`hf upload ours/better {final} --private`" in said
    assert (final / "model.safetensors").exists() and (final / "README.md").exists()
    (create,) = [json.loads(body) for path, _, body in hub.asked if path == "/api/repos/create"]
    assert create["organization"] == "ours" and (create.get("private") or create.get("visibility") == "private")


def test_a_token_that_may_only_read_trains_nothing(hub, tmp_path):
    hub.role = "read"
    done = train(hub, tmp_path)
    assert done.returncode == 1 and "the token of me may only read" in done.stderr and "HF_TOKEN" in done.stderr
    assert not (tmp_path / "tiny").exists() and "/api/repos/create" not in [path for path, *_ in hub.asked]


@pytest.mark.parametrize("flags", [[], ["--hub_model_id", "a/b/c"], ["--hub_model_id", "no spaces"]])
def test_without_a_login_or_a_name_nothing_is_trained(flags, tmp_path, capsys):
    """conftest.py has said that there is no network."""
    with pytest.raises(SystemExit) as stop:
        launch(sft.main, sft.Args, ["--output_dir", str(tmp_path / "run"), *SHORT, "--push_to_hub", *flags])
    said = capsys.readouterr().err
    assert stop.value.code == 1 and said.startswith("error: cannot push to ") and said.count("\n") == 1
    assert "hf auth login" in said and not (tmp_path / "run").exists()


# ---------------------------------------------------------------- the card


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A run folder as the scripts leave it, in small. `here/data` is a file, whatever the hub may have."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "here/data").touch()
    run = tmp_path / "runs/mine"
    (run / "final").mkdir(parents=True)
    write(run / "config.yaml", {
        "model_name_or_path": "owner/base-1.5B", "dataset_name": "owner/data:config", "dataset_split": "train[:9]",
        "eval_dataset_name": "here/data", "eval_split": "test", "seed": 7,
        "reward_funcs": ["/home/me/secret place/rewards.py:mine"],
    })  # fmt: skip
    write(run / "environment.json", {
        "script": "grpo.py", "command": ["python", "/home/me/code/grpo.py", "--dataset_name=/data/x/rows.jsonl"],
        "git_commit": "abc123", "git_dirty": True, "packages": {"torch": "2.13.0", "transformers": "5.19.0", "x": "1"},
        "gpus": ["NVIDIA H200"] * 2, "cpus": 16, "processes": 2, "platform": "Linux",
    })  # fmt: skip
    (run / "script.py").write_text('"""Some method:\nits idea.\n\nMore.\n"""')
    lines = [{"step": 8, "old": 9.0}, {"step": 9, "loss": 0.125, "bad": None}, {"step": 9, "eval/pass@1": 0.75}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def write(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value))  # of which yaml is more


def change(path: Path, **values) -> None:
    write(path, json.loads(path.read_text()) | values)


def test_what_the_card_says(folder):
    card = model_card(folder)
    _, header, text = card.split("---\n", 2)
    assert yaml.safe_load(header) == {
        "library_name": "transformers", "base_model": "owner/base-1.5B", "datasets": ["owner/data"],
        "tags": ["postscripts", "grpo"],
    }  # fmt: skip
    for part in ("# mine", "Some method: its idea.", "| seed | 7 |", "`train[:9]`", "`here/data`, split `test`",
                 "abc123, with uncommitted changes", "torch 2.13.0, transformers 5.19.0 ", "2 x NVIDIA H200",
                 "python grpo.py --dataset_name=rows.jsonl"):  # fmt: skip
        assert part in text
    results = text.partition("## Results")[2].split("\n\n")[1].splitlines()
    assert results[0] == "| after step 9 |  |"
    assert results[2:] == ["| eval/pass@1 | 0.75 |", "| loss | 0.125 |", "| bad | not a number |"]
    assert "/home" not in card and "/data/x" not in card and "More." not in card


def test_what_the_card_does_not_claim(folder):
    """What lies here is not the hub's, an adapter is no model, a clean commit has no changes, no commit none."""
    change(folder / "config.yaml", model_name_or_path="runs/mine", dataset_name="toy:sort", eval_dataset_name=None)
    change(folder / "environment.json", git_dirty=False, gpus=[])
    (folder / "final/adapter_config.json").touch()
    card = model_card(folder)
    header = yaml.safe_load(card.split("---\n")[1])
    assert header == {"library_name": "peft", "tags": ["postscripts", "grpo", "lora"]}
    assert "`runs/mine`, of which this is a LoRA adapter" in card and "| evaluation data | `toy:sort`" in card
    assert "| commit | abc123 |" in card and "16 CPU cores" in card
    change(folder / "environment.json", git_commit=None, git_dirty=None)
    assert "| commit | none |" in model_card(folder)


@pytest.mark.parametrize("text, public", [
    ("/models/llama", "llama"), ("/models/llama/", "llama"), ("~/x/rows.jsonl", "rows.jsonl"), ("~me/x", "x"),
    ("--a=/b/c.py:f --d '/e/f g'", "--a=c.py:f --d 'f g'"), ("['/a/b', \"/c/d\"]", "['b', \"d\"]"),
    *((same, same) for same in ("runs/sft/final", "../up", "./here", "owner/name:part", "https://host/path",
                                "</s> 1 / 2", "train[:20%]")),
])  # fmt: skip
def test_absolute_paths_are_taken_out(text, public):
    assert without_paths(text) == public


def test_what_is_on_the_hub(folder):
    assert on_hub("owner/name") and on_hub("owner/name:part")
    for name in ("toy", "toy:sort", "here/data", "runs/mine", "./x", "../x/y", "/a/b", "runs/sft/final", "rows.jsonl"):
        assert not on_hub(name), name
