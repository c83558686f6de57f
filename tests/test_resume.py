"""Killed at any moment and resumed, a run ends with the bytes of one that nobody touched (promise 4 of the design).

Runs are processes of their own, so that SIGKILL takes them as it would on a cluster. Each starts from nothing: forked
ones would start sooner, and may inherit a lock that nobody holds any more. One that hangs says where.
"""

import faulthandler
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PATIENCE = 300  # seconds; a run takes three to ten
FLAGS = {
    "sft": "--dataset_split train[:400] --train_batch_size 32 --max_steps 12 --logging_steps 1 --save_steps 1 "
           "--eval_steps 6 --max_eval_samples 16",
    # Two optimiser steps a pass, two passes: most checkpoints hold a rollout in flight
    "grpo": "--dataset_split train[:400] --reward_funcs common.toy:graded --generation_batch_size 64 "
            "--num_generations 4 --steps_per_generation 2 --num_iterations 2 --max_steps 12 --warmup_steps 1 "
            "--beta 0.02 --max_tokens_per_micro_batch 512 --save_steps 1 --eval_steps 6 --max_eval_samples 16",
}  # fmt: skip
VICTIMS = {  # where a process may kill itself, and at which call
    "rewards": ("grpo.score", 4),  # the rollout is sampled and not yet rewarded (the first two calls are evaluations)
    "update": ("torch.optim.AdamW.step", 6),  # the gradient is there, the weights are old
    "checkpoint": ("pathlib.Path.rename", 5),  # written aside, not yet in its place
    "log": ("common.run.Run.append", 20),  # some lines of a step are written, others are not
}
EVERY_RUN = [("grpo", "rewards"), ("grpo", "checkpoint"), ("grpo", 0), ("sft", "update")]
LONG = [("grpo", "update"), ("grpo", "log"), ("sft", "checkpoint"), ("sft", "log")]
LONG += [("grpo", n) for n in range(1, 11)] + [("sft", n) for n in range(10)]


def train(script: str, flags: list[str], moment: str | None) -> None:
    """What a child process does: the script, but for a call that never comes back."""
    faulthandler.dump_traceback_later(PATIENCE - 20, exit=True)
    module = importlib.import_module(script)
    if moment is not None:
        place, last_call = VICTIMS[moment]
        path, name = place.rsplit(".", 1)
        try:
            owner = importlib.import_module(path)
        except ImportError:
            owner = getattr(importlib.import_module(path.rpartition(".")[0]), path.rpartition(".")[2])
        original, calls = getattr(owner, name), iter(range(1, last_call))

        def mortal(*args, **kwargs):
            if next(calls, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(owner, name, mortal)
    importlib.import_module("common.run").launch(module.main, module.Args, flags)


def start(script: str, flags: list[str], moment: str | None = None) -> subprocess.Popen:
    """A running process."""
    code = "import json, sys, test_resume; test_resume.train(*json.loads(sys.argv[1]))"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, "-c", code, json.dumps([script, flags, moment])]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def untouched(tmp_path_factory) -> dict[str, tuple[list[str], Path]]:
    """script -> its flags and its folder when nobody kills it. GRPO starts from what SFT left."""
    folder, runs = tmp_path_factory.mktemp("untouched"), {}
    for script in ("sft", "grpo"):
        flags = FLAGS[script].split()
        if script == "grpo":
            flags += ["--model_name_or_path", str(folder / "sft" / "final")]
        process = start(script, [*flags, "--output_dir", str(folder / script)])
        assert process.wait(PATIENCE) == 0
        runs[script] = (flags, folder / script)
    return runs


def lines_of(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def assert_same_bytes(one: Path, other: Path) -> None:
    for name in ("final/model.safetensors", "metrics.jsonl", "samples.jsonl"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.parametrize(
    "script, moment", [*EVERY_RUN, *(pytest.param(*case, marks=pytest.mark.long) for case in LONG)]
)
def test_killed_and_resumed_is_the_same_run(script, moment, untouched, tmp_path):
    flags, reference = untouched[script]
    flags = [*flags, "--output_dir", str(tmp_path)]
    if isinstance(moment, str):
        process = start(script, flags, moment)
    else:
        process, chance = start(script, flags), random.Random(f"{script} {moment}")
        lines = chance.randrange(10)  # after so many and a little: a busy machine must not make it after the end
        while process.poll() is None and lines_of(tmp_path / "metrics.jsonl") < lines:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.05))
        process.kill()
    assert process.wait(PATIENCE) == -signal.SIGKILL
    assert start(script, [*flags, "--resume"]).wait(PATIENCE) == 0
    assert_same_bytes(tmp_path, reference)


def test_a_torn_checkpoint_is_passed_over(untouched, tmp_path):
    flags, reference = untouched["grpo"]
    flags = [*flags, "--output_dir", str(tmp_path)]
    start("grpo", flags, "checkpoint").wait(PATIENCE)
    newest = max((tmp_path / "checkpoints").glob("step-*"))
    os.truncate(newest / "state.pt", (newest / "state.pt").stat().st_size // 2)
    assert start("grpo", [*flags, "--resume"]).wait(PATIENCE) == 0
    assert list((tmp_path / "checkpoints").glob(f"torn-*-{newest.name}"))
    assert_same_bytes(tmp_path, reference)


def test_the_comparison_can_fail(untouched, tmp_path):
    """Another seed gives other bytes: the equalities above are not those of a model that never moved."""
    flags, reference = untouched["grpo"]
    start("grpo", [*flags, "--seed", "1", "--output_dir", str(tmp_path)]).wait(PATIENCE)
    with pytest.raises(AssertionError, match="model.safetensors"):
        assert_same_bytes(tmp_path, reference)
