"""What goes wrong in the middle of a run, with nobody's mistake in the flags: one sentence, and nothing is lost.

Most faults are put into a run in this process; the run is then resumed without the fault and has to end with the bytes
of one that had none. SIGKILL has tests of its own (test_resume.py), checkpoints too (test_run.py).
"""

import importlib.util
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import common.rewards
from common.data import draw, load_rows
from common.engine import TransformersEngine
from common.rewards import RewardFunction, load_reward, score
from common.run import Run, UserError, launch, read_manifest
from test_resume import assert_same_bytes
from test_run import flip, truncate

ROOT = Path(__file__).parents[1]
STEPS = 6
SHORT = f"--model_name_or_path toy --dataset_split train[:200] --max_eval_samples 8 --max_steps {STEPS} --save_steps 2 "
PAIRS = SHORT + "--train_batch_size 16 --logging_steps 1 --warmup_steps 1 "
ONLINE = SHORT + "--reward_funcs common.toy:graded --generation_batch_size 32 --num_generations 4 --warmup_steps 1 "
ONLINE += "--steps_per_generation 2 --log_completions_steps 1 "
FLAGS = {
    "sft": PAIRS, "reward": PAIRS + "--normalize_split train[:32]", "kto": PAIRS, "orpo": PAIRS,
    "dpo": PAIRS + "--loss_type sigmoid bco_pair",  # with a running mean that moves before the update
    "grpo": ONLINE, "rloo": ONLINE, "ppo": ONLINE + "--critic_warmup_steps 1",
}  # fmt: skip
SCRIPTS = {name: importlib.import_module(name) for name in FLAGS}


def train(script: str, folder: Path, *more: str) -> None:
    module = SCRIPTS[script]
    launch(module.main, module.Args, [*FLAGS[script].split(), "--output_dir", str(folder), *more])


def fails(script: str, folder: Path, capsys, *more: str) -> str:
    """The one sentence with which a run ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train(script, folder, *more)
    said = capsys.readouterr().err
    assert stop.value.code == 1 and said.startswith("error: ") and said.count("\n") == 1, said
    return said


@pytest.fixture(scope="module")
def untouched(tmp_path_factory):
    """script -> the folder of a run that nothing happens to."""
    folders = {}

    def folder_of(script: str) -> Path:
        if script not in folders:
            folders[script] = tmp_path_factory.mktemp("untouched") / script
            train(script, folders[script])
        return folders[script]

    return folder_of


def on_call(monkeypatch, owner, name: str, number: int, then) -> None:
    """The call of that number is `then(original, *args)`; those before and after are the original."""
    original, calls = getattr(owner, name), iter(range(1, number + 1))

    def call(*args, **kwargs):
        faulty = next(calls, None) == number
        return then(original, *args, **kwargs) if faulty else original(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)


# ------------------------------------------------------------------------------------------------ no number, no update


@pytest.mark.parametrize(
    "script, value, norm", [*((script, float("nan"), "nan") for script in FLAGS), ("sft", 1e38, "inf")]
)
def test_no_number_stops_the_run_before_the_update(script, value, norm, untouched, tmp_path, monkeypatch, capsys):
    reference, folder, graded = untouched(script), tmp_path / "run", []
    with monkeypatch.context() as patch:
        # The fifth step, in which a rollout is new; ppo.py has two losses a step, and a first step of the critic alone
        number = 9 if script == "ppo" else 5
        on_call(patch, torch.Tensor, "backward", number, lambda backward, loss: backward(loss * value))
        call = common.rewards._call
        patch.setattr(common.rewards, "_call", lambda f, lists: graded.append(lists["prompts"]) or call(f, lists))
        said = fails(script, folder, capsys, "--save_steps", "0")
    assert f"the gradient of step 5 has a norm of {norm}, and what was before it is {folder}/checkpoints/step" in said
    assert os.listdir(folder / "checkpoints") == ["step-00000004"]

    rows = load_rows(SCRIPTS[script].Args.dataset_name, "train[:200]")
    file, numbers = re.search(r"its batch: (.*, row)s ([\d, ]+)\n", said).groups()
    named = {f"{file} {number}" for number in numbers.split(", ")}
    if script in ("grpo", "rloo", "ppo"):
        prompts = {rows[i]["prompt"] for i in range(len(rows)) if rows.where(i) in named}
        assert len(prompts) == len(named) > 2 and prompts <= set(graded[-1])  # half of the rollout's completions
    else:
        groups = 2 if script == "kto" else 1  # of a pair kto.py makes two examples
        drawn = draw(len(rows) * groups, 4 * 16, 16, seed=0)
        assert named == {rows.where(i // groups) for i in drawn}

    train(script, folder, "--resume")
    assert_same_bytes(folder, reference)


def without_number(backward, loss) -> None:
    """The gradient is one: as of a NaN that is masked away, or stands in a term without a gradient."""
    backward(loss)
    loss.detach().fill_(float("nan"))


@pytest.mark.parametrize("script, owner, name, number, then", [
    *((script, torch.Tensor, "backward", 8 if script == "ppo" else 5, without_number) for script in FLAGS),
    ("ppo", SCRIPTS["ppo"], "value_loss", 5, lambda value_loss, *values: value_loss(*values) + float("nan")),
])  # fmt: skip
def test_nor_does_a_loss_without_number(script, owner, name, number, then, untouched, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        on_call(patch, owner, name, number, then)
        said = fails(script, tmp_path, capsys, "--save_steps", "0")
    assert f"the loss of step 5 is nan, and what was before it is {tmp_path}/checkpoints/step" in said
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000004"]
    train(script, tmp_path, "--resume")
    assert_same_bytes(tmp_path, untouched(script))


def test_a_checkpoint_is_made_of_the_step_before(untouched, tmp_path, monkeypatch, capsys):
    """Also between two regular ones, and in the middle of a rollout."""
    with monkeypatch.context() as patch:
        on_call(patch, torch.Tensor, "backward", 4, lambda backward, loss: backward(loss * float("nan")))
        assert "step-00000003; its batch" in fails("grpo", tmp_path, capsys)
    train("grpo", tmp_path, "--resume")
    assert_same_bytes(tmp_path, untouched("grpo"))


def test_a_first_step_without_a_number_leaves_nothing(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        on_call(patch, torch.Tensor, "backward", 1, lambda backward, loss: backward(loss * float("nan")))
        assert "of step 1 has a norm of nan, and it was the first" in fails("sft", tmp_path / "run", capsys)
    train("sft", tmp_path / "run")


# -------------------------------------------------------------------------------------------------------------- SIGTERM


@pytest.mark.parametrize("script", FLAGS)
def test_sigterm_ends_the_step_and_saves(script, untouched, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"

    def told_to_stop(step, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return step(*args, **kwargs)

    with monkeypatch.context() as patch:
        on_call(patch, torch.optim.AdamW, "step", 5 if script == "ppo" else 3, told_to_stop)  # ppo.py: the critic's
        with pytest.raises(SystemExit) as stop:
            train(script, folder)
    assert stop.value.code == 0 and "SIGTERM: saved after step 3" in capsys.readouterr().out
    assert max(path.name for path in (folder / "checkpoints").iterdir()) == "step-00000003"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    train(script, folder, "--resume")
    assert_same_bytes(folder, untouched(script))


def test_sigterm_ends_a_forked_child_as_usual(tmp_path):
    """A reward function that ends its workers with `terminate` has to see them end."""
    run = Run(SCRIPTS["sft"].Args(output_dir=str(tmp_path)), __file__)
    run.load_checkpoint()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, b"ready")
        time.sleep(60)
        os._exit(0)
    os.read(reading, 5)
    os.kill(child, signal.SIGTERM)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM
    assert not run.stopping
    run.close()


# ---------------------------------------------------------------------------------------------------- slow rewards

SLOW = """
import asyncio, signal, time, threading

def sleeps(completions, **_):
    time.sleep(60)

def computes(completions, **_):
    while True:
        pass

def waits(completions, **_):
    threading.Event().wait()

def asks_again(completions, **_):
    while True:
        try:
            time.sleep(60)
        except Exception:
            pass

def sets_an_alarm(completions, **_):
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.alarm(1)
    signal.alarm(0)
    time.sleep(60)

async def awaits(completions, **_):
    await asyncio.sleep(60)

async def blocks(completions, **_):
    time.sleep(60)
"""


@pytest.fixture
def slow(tmp_path) -> str:
    (tmp_path / "slow.py").write_text(SLOW)
    return f"{tmp_path}/slow.py"


@pytest.mark.parametrize("name", re.findall(r"def (\w+)", SLOW))
def test_a_reward_function_that_hangs(name, slow):
    reward, fast = load_reward(f"{slow}:{name}", timeout=0.3), RewardFunction("fast", lambda completions: [1.0], 0.3)
    handler, started = signal.getsignal(signal.SIGUSR2), time.monotonic()
    with pytest.raises(UserError, match=f"function {name} took longer than --reward_timeout 0.3 seconds"):
        score([fast, reward], ["31="], ["13"], {})
    assert time.monotonic() - started < 5
    assert score([fast], ["31="], ["13"], {}).tolist() == [[1.0]]
    assert signal.getsignal(signal.SIGUSR2) == handler


def test_of_two_that_wait_both_are_named_and_no_timeout_waits():
    async def late(completions):
        time.sleep(0.3)  # noqa: ASYNC251
        return [1.0]

    for timeout in (0.1, 0.0):
        rewards = [RewardFunction(name, late, timeout) for name in ("one", "other")]
        if timeout:
            with pytest.raises(UserError, match="function one or other took longer"):
                score(rewards, ["31="], ["13"], {})
        else:
            assert score(rewards, ["31="], ["13"], {}).tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("script", ["grpo", "rloo", "ppo"])
def test_a_script_says_which_reward_hangs(script, slow, tmp_path, capsys):
    flags = ["--eval_dataset_name", "toy:sort", "--reward_funcs", f"{slow}:sleeps", "--reward_timeout", "0.2"]
    assert "the reward function sleeps took longer than --reward_timeout 0.2" in fails(
        script, tmp_path / "run", capsys, *flags
    )


# ------------------------------------------------------------------------------------------------- a sampler that fails


def fails_and_resumes(script, fault, reference, folder, monkeypatch, capsys, *more) -> str:
    """What a run says that has the fault in its rollout before step 5; resumed, it comes to the same bytes."""
    with monkeypatch.context() as patch:  # two calls are the evaluation's; ppo.py has one rollout in four steps
        on_call(patch, TransformersEngine, "_decode", 4 if script == "ppo" else 5, fault)
        said = fails(script, folder, capsys, "--save_steps", "0", *more)
    assert said.endswith("; the same command with --resume goes on after step 4\n")
    assert os.listdir(folder / "checkpoints") == ["step-00000004"]
    train(script, folder, "--resume")
    assert_same_bytes(folder, reference)
    return said


@pytest.mark.parametrize("script", ["grpo", "rloo", "ppo"])
def test_an_engine_that_is_silent(script, untouched, tmp_path, monkeypatch, capsys):
    fault, more = lambda *_: time.sleep(60), ("--generation_timeout", "2")
    said = fails_and_resumes(script, fault, untouched(script), tmp_path, monkeypatch, capsys, *more)
    assert "error: the engine took longer than --generation_timeout 2 seconds for 32 completions: raise it" in said


def test_an_engine_that_dies(untouched, tmp_path, monkeypatch, capsys):
    def dies(*_):
        raise UserError("the vLLM engine died while sampling 32 completions: EngineDeadError")  # see test_engine.py

    said = fails_and_resumes("grpo", dies, untouched("grpo"), tmp_path, monkeypatch, capsys)
    assert said.startswith("error: the vLLM engine died while sampling 32 completions: EngineDeadError; the same")


DEADLOCK = """
import ctypes, sys
import common.run, grpo
from common.engine import TransformersEngine

def waits_in_c(*_):
    lock, c = ctypes.create_string_buffer(64), ctypes.CDLL(None)
    c.pthread_mutex_lock(lock)
    c.pthread_mutex_lock(lock)  # deaf to signals

decode, calls, common.run.PATIENCE = TransformersEngine._decode, iter(range(4)), 1
TransformersEngine._decode = lambda *args: (waits_in_c if next(calls, None) is None else decode)(*args)
common.run.launch(grpo.main, grpo.Args)
"""


def test_an_engine_that_never_returns_to_python(untouched, tmp_path):
    flags = [*FLAGS["grpo"].split(), "--output_dir", str(tmp_path), "--save_steps", "0", "--generation_timeout", "3"]
    command = [sys.executable, "-c", DEADLOCK, *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=90)
    assert done.returncode == 1 and "error: the engine took longer than --generation_timeout 3" in done.stderr
    assert done.stderr.endswith("; the same command with --resume goes on after step 4\n")
    train("grpo", tmp_path, "--resume", "--save_steps", "2")
    assert_same_bytes(tmp_path, untouched("grpo"))


def test_what_an_update_has_changed_is_not_saved(tmp_path, monkeypatch, capsys):
    """The evaluation after step 3 fails: the state kept is that of step 2, its tensors are those of step 3."""

    def fault(*_):
        raise UserError("no")

    with monkeypatch.context() as patch:
        on_call(patch, TransformersEngine, "_decode", 3, fault)
        assert fails("sft", tmp_path, capsys, "--save_steps", "0", "--eval_steps", "2") == "error: no\n"
    assert os.listdir(tmp_path / "checkpoints") == []


# --------------------------------------------------------------------------------------------------------- a full disk


@pytest.mark.parametrize("owner, name, number, limit", [
    (torch, "save", 2, lambda folder: 100_000),  # in the middle of the second checkpoint
    (Run, "append", 9, lambda folder: (folder / "metrics.jsonl").stat().st_size + 20),  # in the middle of a line
    (SCRIPTS["sft"], "save_model", 1, lambda folder: 100_000),
], ids=["checkpoint", "log", "model"])  # fmt: skip
def test_a_full_disk(owner, name, number, limit, untouched, tmp_path, monkeypatch, capsys):
    """By a limit on the length of a file: the system's answer is another, the way of all writes into it is the same."""
    folder, before = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(original, *args, **kwargs):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit(folder), before[1]))
        try:
            return original(*args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    with monkeypatch.context() as patch:
        on_call(patch, owner, name, number, full)
        said = fails("sft", folder, capsys)
    assert "the disk is full" in said and "File too large" in said and "--resume" in said
    names = os.listdir(folder / "checkpoints")
    assert "step-00000002" in names and not any(name.startswith(".tmp") for name in names)
    train("sft", folder, "--resume")
    assert_same_bytes(folder, untouched("sft"))


def test_other_errors_keep_their_traceback(tmp_path, monkeypatch):
    on_call(monkeypatch, Run, "append", 2, lambda append, *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train("sft", tmp_path / "run")


# ----------------------------------------------------------------------------------------------------- torn checkpoints


@pytest.mark.parametrize("damage", [truncate, flip, lambda folder: (folder / "manifest.json").unlink()],
                         ids=["truncated", "bit", "manifest"])  # fmt: skip
def test_a_torn_checkpoint_is_passed_over(damage, untouched, tmp_path, capsys):
    shutil.copytree(untouched("sft"), tmp_path, dirs_exist_ok=True)
    damage(tmp_path / "checkpoints/step-00000004")
    train("sft", tmp_path, "--resume")
    said = capsys.readouterr().out
    assert "step-00000004 is torn" in said and "resuming after step 2" in said
    assert_same_bytes(tmp_path, untouched("sft"))


# ---------------------------------------------------------------------------------------------------- several processes


ACCELERATE = ("-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0", "--config_file")
LAUNCHERS = {"": (), "ddp": ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")}
LAUNCHERS |= {layout: (*ACCELERATE, f"configs/{layout}.yaml") for layout in ("fsdp2", "zero2", "zero3")}
has_deepspeed = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(not has_deepspeed, reason="needs deepspeed: bash setup.sh --dev")
one_of_two = pytest.mark.parametrize("layout, rank", [
    ("ddp", 0), ("ddp", 1), ("fsdp2", 0), pytest.param("zero3", 1, marks=needs_deepspeed)
])  # fmt: skip


def start(folder: Path, *flags: str, layout: str = "", script: str = "sft.py") -> subprocess.Popen:
    """sft.py, or what stands in for it, for more steps than anybody waits for; on two ranks in a layout, if any."""
    endless = FLAGS["sft"].replace(f"--max_steps {STEPS}", "--max_steps 100000").replace("--save_steps 2", "").split()
    command = [sys.executable, *LAUNCHERS[layout], script, *endless, "--output_dir", str(folder), *flags]
    environment = os.environ | {"DS_ACCELERATOR": "cuda" if torch.cuda.is_available() else "cpu"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def await_steps(process: subprocess.Popen, number: int) -> None:
    steps = (line for line in process.stdout if line.startswith("step "))
    for _ in range(number):
        assert next(steps, None), f"ended with {process.wait()} too early"


def test_two_runs_in_one_folder_and_sigterm(tmp_path, capsys):
    process = start(tmp_path / "run")
    await_steps(process, 2)
    try:
        assert "already holds a run" in fails("sft", tmp_path / "run", capsys)
        more = ["--max_steps", "100000", "--save_steps", "0", "--resume"]
        assert "another process is writing to" in fails("sft", tmp_path / "run", capsys, *more)
        assert process.poll() is None
    finally:
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert re.search(r"SIGTERM: saved after step (\d+)", said.splitlines()[-1])


def ranks_of(torchrun: subprocess.Popen) -> list[int]:
    """Process ids, rank 0 first."""
    return [int(pid) for pid in Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()]


@pytest.mark.long
@one_of_two
def test_a_rank_that_dies_takes_the_other_with_it(layout, rank, tmp_path):
    process = start(tmp_path / "run", layout=layout)
    await_steps(process, 2)
    ranks = ranks_of(process)
    os.kill(ranks[rank], signal.SIGKILL)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "Signal 9 (SIGKILL) received by PID" in said
    assert "error: another rank of this run has died" in said and "RuntimeError" not in said
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)


@pytest.mark.long
@one_of_two
def test_a_rank_that_is_frozen_takes_the_other_with_it(layout, rank, tmp_path):
    process = start(tmp_path / "run", "--ddp_timeout", "5", layout=layout)
    await_steps(process, 2)
    ranks = ranks_of(process)
    os.kill(ranks[rank], signal.SIGSTOP)
    said, _ = process.communicate(timeout=60)  # torchrun waits for the frozen one as well, half a minute
    assert process.returncode == 1 and "RuntimeError" not in said
    assert "error: another rank of this run has not answered for --ddp_timeout seconds" in said
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)


@pytest.mark.long
@one_of_two
def test_a_rank_that_dies_while_a_checkpoint_is_written(layout, rank, tmp_path):
    checkpoints = tmp_path / "run/checkpoints"
    process = start(tmp_path / "run", "--save_steps", "1", layout=layout)
    await_steps(process, 4)
    deadline = time.monotonic() + 30
    while not any(checkpoints.glob(".tmp-*/*.pt")):
        assert time.monotonic() < deadline
    os.kill(ranks_of(process)[rank], signal.SIGKILL)
    process.communicate(timeout=60)
    kept = sorted(checkpoints.glob("step-*"))
    assert process.returncode == 1 and kept and all(map(read_manifest, kept))
    step = int(kept[-1].name.removeprefix("step-"))
    process = start(tmp_path / "run", "--resume", "--max_steps", str(step + 2), layout=layout)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and f"resuming after step {step}" in said and "torn" not in said
    assert not any(checkpoints.glob(".tmp-*"))


@pytest.mark.long
@one_of_two
def test_a_rank_that_gets_sigterm_stops_all_after_the_same_step(layout, rank, tmp_path):
    process = start(tmp_path / "run", layout=layout)
    await_steps(process, 2)
    os.kill(ranks_of(process)[rank], signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    step = int(re.search(r"SIGTERM: saved after step (\d+)", said)[1])
    assert process.returncode == 0 and "error" not in said.lower()
    more = ("--resume", "--max_steps", str(step + 2))
    process = start(tmp_path / "run", *more, layout=layout)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and f"resuming after step {step}" in said


NO_NUMBER = """
import os, sys, torch
import sft
from common.run import launch

nan, gradient, steps = float("nan"), sys.argv.pop() == "gradient", iter(range(3))
original = torch.Tensor.backward

def backward(loss, *args, **kwargs):
    faulty = next(steps, None) is None and os.environ["RANK"] == "1"  # the other has only numbers of its own
    original(loss * nan if faulty and gradient else loss, *args, **kwargs)
    if faulty and not gradient:
        loss.detach().fill_(nan)

torch.Tensor.backward = backward
launch(sft.main, sft.Args)
"""


@pytest.mark.long
@pytest.mark.parametrize("layout, of", [
    ("ddp", "loss"), ("fsdp2", "gradient"),
    *(pytest.param(layout, of, marks=needs_deepspeed)
      for layout, of in (("zero2", "loss"), ("zero3", "loss"), ("zero3", "gradient"))),
])  # fmt: skip
def test_no_number_on_one_rank_stops_both_before_the_update(layout, of, tmp_path):
    constant = ("--lr_scheduler_type", "constant")  # with any other the rate would depend on the number of steps
    (tmp_path / "no_number.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{NO_NUMBER}")
    process = start(tmp_path / "run", *constant, of, layout=layout, script=str(tmp_path / "no_number.py"))
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and said.count("error: the " + of + " of step 4 ") == 2
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000003"]
    for folder, more in (("run", "--resume"), ("whole", "--no-resume")):
        process = start(tmp_path / folder, *constant, more, "--max_steps", "6", layout=layout)
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 0, said
    lines, whole = ((tmp_path / folder / "metrics.jsonl").read_text() for folder in ("run", "whole"))
    assert lines == whole
