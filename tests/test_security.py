"""What a run may not do: unpickle, run code that nobody asked for, reach the network, write down a secret.

The runs are a process of their own with an audit hook that sees (and refuses) every connection that Python asks for,
whoever swallows the error. Not seen: connections from C++ or Rust, of which torch makes some between ranks.
"""

import ast
import hashlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dpo
import grpo
import kto
import orpo
import ppo
import reward
import rloo
import sft
from common import toy
from common.models import load_policy, load_scorer
from common.rewards import load_reward
from common.run import launch

ROOT = Path(sft.__file__).parent
SCRIPTS = {script.__name__: script for script in (sft, reward, dpo, kto, orpo, ppo, grpo, rloo)}
SOURCES = [*sorted(ROOT.glob("*.py")), *sorted(ROOT.glob("common/*.py")), *sorted(ROOT.glob("benchmark/*.py"))]
MARKER = "a-secret-that-nobody-may-write-down-0123456789"
SECRETS = ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY")

# ---------------------------------------------------------------- what the sources say

UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
LOADERS = {  # call -> the argument without which it may run code, and what that has to be
    "torch.load": ("weights_only", "True"), "yaml.load": ("Loader", "yaml.SafeLoader"),
    "np.load": ("allow_pickle", "False"),
}  # fmt: skip
RUNNERS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.unsafe_load", "yaml.full_load"}
PASSED_ON = {"trust_remote_code", "args.trust_remote_code", "False"}
IMPORTERS = {"importlib.import_module", "module_spec.loader.exec_module"}
ASKED_FOR = {  # code that the command line names
    "rewards.py": ["importlib.import_module(source)", "module_spec.loader.exec_module(module)"],
    "compare_trl.py": ["importlib.import_module(settings.what)"],
}


def dangers(source: str) -> list[str]:
    """What in a source may run code that comes with data: "12: torch.load(path)"."""
    found = []
    for node in ast.walk(ast.parse(source)):
        bad = False
        if isinstance(node, ast.Import):
            bad = any(alias.name.split(".")[0] in UNPICKLERS for alias in node.names)
        elif isinstance(node, ast.ImportFrom):  # to name an error is no danger
            bad = node.module in UNPICKLERS and any(not alias.name.endswith("Error") for alias in node.names)
        elif isinstance(node, ast.Call):
            name, given = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            bad = name in RUNNERS | IMPORTERS or given.get("shell", "False") != "False"
            bad |= given.get("trust_remote_code", "False") not in PASSED_ON
            if name in LOADERS:
                argument, safe = LOADERS[name]
                bad |= given.get(argument) != safe
        elif isinstance(node, ast.Dict):
            bad = any(
                isinstance(key, ast.Constant) and key.value == "trust_remote_code"
                and ast.unparse(value) not in PASSED_ON
                for key, value in zip(node.keys, node.values)
            )
        if bad:
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=[str(path.relative_to(ROOT)) for path in SOURCES])
def test_no_source_runs_what_comes_with_data(path):
    found = [line.partition(": ")[2] for line in dangers(path.read_text(encoding="utf-8"))]
    assert sorted(found) == sorted(ASKED_FOR.get(path.name, []))


@pytest.mark.parametrize("source", [
    "torch.load(path)", "torch.load(path, weights_only=False)", "import pickle", "import torch, dill",
    "from pickle import loads",
    "yaml.load(text)", "np.load(path, allow_pickle=True)", "eval(text)", "subprocess.run(line, shell=True)",
    "load(name, trust_remote_code=True)", "options = {'trust_remote_code': True}", "load(trust_remote_code=not off)",
    "importlib.import_module(name)", "os.system(line)",
])  # fmt: skip
def test_the_scan_sees(source):
    assert dangers(source)


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_remote_code_is_off_unless_asked_for(script):
    assert script.Args().trust_remote_code is False


# ---------------------------------------------------------------- what comes with a file


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_checkpoint_with_a_pickle_in_it_is_refused(tmp_path, capsys):
    """Whole, by its manifest: whoever can write the one can write the other."""
    args = ["--output_dir", str(tmp_path / "run"), "--dataset_split", "train[:16]", "--train_batch_size", "8",
            "--max_eval_samples", "4", "--max_steps", "2"]  # fmt: skip
    launch(sft.main, sft.Args, [*args, "--save_steps", "1"])
    folder = tmp_path / "run/checkpoints/step-00000001"
    torch.save({"model": Bomb(tmp_path / "ran")}, folder / "state.pt")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["sha256"]["state.pt"] = hashlib.sha256((folder / "state.pt").read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        launch(sft.main, sft.Args, [*args, "--resume"])
    said = capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    assert stop.value.code == 1 and said.startswith("error: ") and said.count("\n") == 1
    assert "step-00000001" in said


EVIL = "from pathlib import Path\nPath({ran!r}).touch()\nclass Config:\n    pass\nclass Model:\n    pass\n"


@pytest.fixture
def evil(tmp_path, monkeypatch) -> Path:
    """A folder whose every file that could be code makes the file `ran` beside it when it runs."""
    folder = tmp_path / "evil"
    load_policy("toy", torch.float32, torch.device("cpu")).save_pretrained(folder)
    toy.toy_tokenizer().save_pretrained(folder)
    code = EVIL.format(ran=str(tmp_path / "ran"))
    for name in ("modeling", "evil", "rewards", "setup", "__init__", "train", "dataset", "conftest"):
        (folder / f"{name}.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    names = ("AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoModel")
    config["auto_map"] = {"AutoConfig": "modeling.Config"} | dict.fromkeys(names, "modeling.Model")
    (folder / "config.json").write_text(json.dumps(config))
    rows = [{"prompt": "21=", "completion": "12", "answer": "12", "chosen": "12", "rejected": "21", "label": True},
            {"prompt": "43=", "completion": "34", "answer": "34", "chosen": "34", "rejected": "43", "label": False}]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(folder)  # `rewards.py` lies where the script is started
    return folder


def flags(script, evil: Path) -> list[str]:
    few = "--max_steps 1 --inspect --output_dir runs/evil"
    few += " --generation_batch_size 8" if hasattr(script.Args(), "generation_batch_size") else " --train_batch_size 2"
    few += " --normalize_split train" if script is reward else ""
    return ["--model_name_or_path", str(evil), "--dataset_name", str(evil), *few.split()]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_folder_with_code_in_it_is_data(name, evil, tmp_path):
    """transformers knows how to load it by itself, and nobody asked for the code."""
    launch(SCRIPTS[name].main, SCRIPTS[name].Args, flags(SCRIPTS[name], evil))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_model_that_is_code_is_refused(name, evil, tmp_path, capsys):
    config = json.loads((evil / "config.json").read_text())
    (evil / "config.json").write_text(json.dumps(config | {"model_type": "unheard_of"}))
    with pytest.raises(SystemExit) as stop:
        launch(SCRIPTS[name].main, SCRIPTS[name].Args, flags(SCRIPTS[name], evil))
    said = capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    assert stop.value.code == 1 and said.count("error: ") == 1


@pytest.mark.parametrize("load", [
    lambda folder: load_policy(folder, torch.float32, torch.device("cpu")),
    lambda folder: load_scorer(folder, torch.float32, torch.device("cpu")),
    load_reward,
], ids=["policy", "scorer", "reward"])  # fmt: skip
def test_weights_in_a_pickle_are_not_unpickled(load, evil, tmp_path):
    (evil / "model.safetensors").unlink()
    with (evil / "pytorch_model.bin").open("wb") as file:
        pickle.dump({"lm_head.weight": Bomb(tmp_path / "ran")}, file)
    torch.save({"lm_head.weight": Bomb(tmp_path / "ran")}, evil / "pytorch_model.bin")
    with pytest.raises(Exception, match="(?i)weights|unpickl"):  # whatever the sentence: it does not go on
        load(str(evil))
    assert not (tmp_path / "ran").exists()


def test_reward_code_runs_when_it_is_named(evil, tmp_path, capsys):
    """The other half of the tests above: the same file, now asked for."""
    with pytest.raises(SystemExit):
        launch(grpo.main, grpo.Args, [*flags(grpo, evil), "--reward_funcs", "rewards.py:nothing"])
    assert "rewards.py has no function nothing" in capsys.readouterr().err
    assert (tmp_path / "ran").exists()


# ---------------------------------------------------------------- what a run reaches and what it leaves

WATCH = '''
import os, sys

def watch(event, arguments, here=("127.", "::1", "localhost")):
    """Unix sockets have a path for an address. Tests of trackers may speak to this machine; the others to nobody."""
    if event in ("socket.connect", "socket.sendto", "socket.bind"):
        address = arguments[1]
        if not isinstance(address, tuple) or event == "socket.bind" and address[0].startswith(here):
            return
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        address = (str(arguments[0]), *arguments[1:2])
    else:
        return
    if os.environ.get("WATCH_ALLOWS_LOOPBACK") and (address[0].startswith(here) or address[0] == "None"):
        return
    import traceback
    place = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_stack()[-9:-1]]
    with open(os.environ["WATCH_LOG"], "a") as file:
        print(event, address, *place, file=file)
    raise OSError(f"{event} {address}: this run is not allowed a network")

sys.addaudithook(watch)
'''
CHILD = """
import importlib, sys
from common.run import launch
for line in sys.stdin.read().splitlines():
    name, *flags = line.split()
    script = importlib.import_module(name)
    launch(script.main, script.Args, [*flags, "--output_dir", f"runs/{name}{'_lora' * ('--use_peft' in flags)}"])
"""
SHORT = "--dataset_split train[:32] --max_steps 2 --save_steps 1 --max_eval_samples 8 "
PAIRS = SHORT + "--train_batch_size 8 --model_name_or_path runs/sft/final "
ROLLOUTS = SHORT + "--generation_batch_size 16 --model_name_or_path runs/sft/final "
COMMANDS = [  # each writes a folder of its own
    f"sft {SHORT} --train_batch_size 8 --report_to tensorboard", f"sft {PAIRS} --use_peft", f"dpo {PAIRS}",
    f"dpo {PAIRS} --use_peft --precompute_ref_log_probs", f"kto {PAIRS}", f"orpo {PAIRS}",
    f"reward {PAIRS} --normalize_split train[:8]", f"grpo {ROLLOUTS}", f"grpo {ROLLOUTS} --use_peft --beta 0.1",
    f"rloo {ROLLOUTS}", f"ppo {ROLLOUTS}",
]  # fmt: skip


def watched(folder: Path, commands: list[str], **environment: str) -> tuple[str, str]:
    """(stderr, connections) of a process that makes these runs in `folder`, with secrets in its environment."""
    (folder / "sitecustomize.py").write_text(WATCH)
    log = folder / "connections"
    log.touch()
    offline = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "WANDB_MODE")  # of conftest.py
    plain = {name: value for name, value in os.environ.items() if name not in offline}
    paths = {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "WATCH_LOG": str(log), "HF_HOME": str(folder / "hub")}
    done = subprocess.run(
        [sys.executable, "-c", CHILD], input="\n".join(commands), cwd=folder, capture_output=True, text=True,
        env=plain | paths | dict.fromkeys(SECRETS, MARKER) | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr, log.read_text()


def files_with(marker: str, folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and marker.encode() in path.read_bytes()]


def test_local_runs_reach_nothing_and_keep_secrets(tmp_path):
    said, connections = watched(tmp_path, COMMANDS)
    assert connections == ""
    assert len(list(tmp_path.glob("runs/*/final"))) == len(COMMANDS)
    assert MARKER not in said and not files_with(MARKER, tmp_path)


def test_the_watch_sees_a_connection(tmp_path):
    """Of the user's own reward, which may: here it is refused, noted, and one sentence."""
    (tmp_path / "phone.py").write_text(
        "import socket\ndef home(prompts, completions, **_):\n    socket.create_connection(('example.com', 80))\n"
    )
    with pytest.raises(AssertionError, match="error: the reward function home raised OSError"):
        watched(tmp_path, [f"grpo {SHORT} --model_name_or_path toy --reward_funcs phone.py:home"])
    assert "example.com" in (tmp_path / "connections").read_text()


def test_wandb_keeps_secrets(tmp_path):
    pytest.importorskip("wandb")
    commands = [f"sft {SHORT} --train_batch_size 8 --report_to wandb"]
    _, connections = watched(tmp_path, commands, WANDB_MODE="offline", WATCH_ALLOWS_LOOPBACK="1")
    assert connections == ""
    assert list(tmp_path.glob("runs/sft/wandb/offline-run-*/*.wandb"))
    assert not files_with(MARKER, tmp_path)


# ---------------------------------------------------------------- the engine

LISTENING = """
import os, sys
from pathlib import Path
import torch
from common.engine import Sampling, build_engine
from common.models import load_policy
model = load_policy("toy", torch.float32, torch.device("cpu"))
engine = build_engine("vllm", model, Path("engine"), dtype="float32", max_model_len=64)
engine.push_weights(model)
engine.generate([[1, 5, 6, 3]], [1], Sampling(max_tokens=4))
links = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
for table in ("tcp", "tcp6"):
    for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
        _, address, _, state, *rest = line.split()
        if state == "0A" and f"socket:[{rest[5]}]" in links:
            print("listens", address.split(":")[0])
print("children", Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())
"""


@pytest.mark.long
def test_vllm_listens_on_loopback_alone(tmp_path):
    pytest.importorskip("vllm")
    done = subprocess.run([sys.executable, "-c", LISTENING], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    listens = {line.split()[1] for line in done.stdout.splitlines() if line.startswith("listens")}
    assert listens <= {"0100007F", "00000000000000000000000001000000"}, listens
    assert "children []" in done.stdout
