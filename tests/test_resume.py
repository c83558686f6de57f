"""Killed at any moment and resumed, a run ends with the bytes of one that nobody touched (promise 4 of the design).

Runs are processes of their own, so that SIGKILL takes them as it would on a cluster. Each starts from nothing: forked
ones would start sooner, and may inherit a lock that nobody holds any more. One that hangs says where.
"""

import faulthandler
import filecmp
import importlib
import json
import os
import random
import signal
import shutil
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = ["final/model.safetensors", "metrics.jsonl", "samples.jsonl"]
WHERE_THERE_IS_ONE = {"critic": ["model.safetensors"], "best": ["model.safetensors", "best.json"]}
PATIENCE = 300  # seconds; a run takes three to ten
AT_A_TIME = 2  # processes: each spends most of its life on imports
SHORT = "--dataset_split train[:400] --max_steps 12 --save_steps 1 --eval_steps 6 --max_eval_samples 16 "
PAIRS = SHORT + "--train_batch_size 32 --logging_steps 1 "
FLAGS = {
    "sft": PAIRS,
    # Two optimiser steps a pass, two passes: most checkpoints hold a rollout in flight
    "grpo": SHORT + "--reward_funcs common.toy:graded --generation_batch_size 64 --num_generations 4 "
            "--steps_per_generation 2 --num_iterations 2 --warmup_steps 1 --beta 0.02 --max_tokens_per_micro_batch 512",
    # Two networks with an optimiser each, and a beta that moves
    "ppo": SHORT + "--reward_funcs common.toy:graded --generation_batch_size 64 --warmup_steps 1 --kl_target 0.01 "
           "--kl_horizon 1000 --critic_warmup_steps 2 --max_tokens_per_micro_batch 512",
    "rloo": SHORT + "--reward_funcs common.toy:graded --generation_batch_size 64 --num_generations 4 --warmup_steps 1 "
            "--num_iterations 2",
    # A running mean and a reference that moves have to survive
    "dpo": PAIRS + "--loss_type sigmoid bco_pair aot --sync_ref_model --ref_model_sync_steps 2",
    "kto": PAIRS, "orpo": PAIRS, "reward": PAIRS + "--normalize_split train[:32]",
}  # fmt: skip
BEST = {"sft": "eval/loss", "reward": "eval/test/accuracy"} | dict.fromkeys(("grpo", "ppo", "rloo"), "eval/graded")
FLAGS = {
    script: f"{flags} --metric_for_best_model {BEST.get(script, 'eval/rewards/margins')}"
    for script, flags in FLAGS.items()
}  # fmt: skip
VICTIMS = {  # where a process may kill itself, and at which call
    "rewards": ("common.rewards._call", 4),  # sampled and not yet rewarded (the first two calls are evaluations)
    "update": ("torch.optim.AdamW.step", 6),  # the gradient is there, the weights are old
    "checkpoint": ("pathlib.Path.rename", 5),  # written aside, not yet in its place
    "log": ("common.run.Run.append", 21),  # some lines of a step are written, others are not
}
EVERY_RUN = [("grpo", "rewards"), ("grpo", "checkpoint"), ("grpo", 0), ("sft", "update")]
EVERY_RUN += [("dpo", "checkpoint"), ("kto", "update"), ("orpo", "log"), ("reward", "checkpoint")]
EVERY_RUN += [("ppo", "checkpoint"), ("ppo", 0), ("rloo", "rewards")]
LONG = [("grpo", "update"), ("grpo", "log"), ("sft", "checkpoint"), ("sft", "log")]
LONG += [("ppo", "rewards"), ("ppo", "update"), ("ppo", "log")]
LONG += [(script, n) for script in ("grpo", "ppo") for n in range(1, 11)] + [("sft", n) for n in range(10)]
LONG += [(script, n) for script in ("rloo", "dpo", "kto", "orpo", "reward") for n in range(5)]


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
    """script -> its flags and its folder when nobody kills it. All others start from what SFT left."""
    folder, from_sft = tmp_path_factory.mktemp("untouched"), []

    def finish(script: str) -> tuple[list[str], Path]:
        flags = [*FLAGS[script].split(), *from_sft]
        assert start(script, [*flags, "--output_dir", str(folder / script)]).wait(PATIENCE) == 0, script
        return flags, folder / script

    runs = {"sft": finish("sft")}
    from_sft += ["--model_name_or_path", str(folder / "sft" / "final")]
    others = [script for script in FLAGS if script != "sft"]
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        return runs | dict(zip(others, pool.map(finish, others)))


def kill_and_resume(script: str, moment: str | int, flags: list[str], folder: Path) -> Path:
    """The folder of a run killed at a moment of VICTIMS, or at one that the number `moment` stands for, and resumed."""
    flags = [*flags, "--output_dir", str(folder)]
    if isinstance(moment, str):
        process = start(script, flags, moment)
    else:
        process, chance = start(script, flags), random.Random(f"{script} {moment}")
        lines = chance.randrange(10)  # after so many and a little: a busy machine must not make it after the end
        while process.poll() is None and lines_of(folder / "metrics.jsonl") < lines:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.05))
        process.kill()
    assert process.wait(PATIENCE) == -signal.SIGKILL
    assert start(script, [*flags, "--resume"]).wait(PATIENCE) == 0
    return folder


@pytest.fixture(scope="module")
def resumed(request, untouched, tmp_path_factory) -> dict[tuple, Future]:
    """(script, moment) -> what `kill_and_resume` makes of it, for all cases selected: they run beside the tests."""
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        yield {
            case: pool.submit(kill_and_resume, *case, untouched[case[0]][0], tmp_path_factory.mktemp("resumed"))
            for item in request.session.items
            if item.originalname == "test_killed_and_resumed_is_the_same_run" and not item.get_closest_marker("skip")
            for case in [tuple(item.callspec.params.values())]
        }
        pool.shutdown(cancel_futures=True)


def lines_of(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def assert_same_bytes(one: Path, other: Path) -> None:
    more = [f"{part}/{name}" for part, names in WHERE_THERE_IS_ONE.items() if (one / part).exists() for name in names]
    for name in FILES + more:
        # of two long strings of bytes that differ pytest draws the difference: for hours, where CI is set
        assert filecmp.cmp(one / name, other / name, shallow=False), name


@pytest.mark.parametrize(
    "script, moment", [*EVERY_RUN, *(pytest.param(*case, marks=pytest.mark.long) for case in LONG)]
)
def test_killed_and_resumed_is_the_same_run(script, moment, untouched, resumed):
    folder = resumed[script, moment].result()
    assert (folder / "best").exists() and (folder / "critic").exists() == (script == "ppo")
    assert_same_bytes(folder, untouched[script][1])


def test_a_torn_checkpoint_is_passed_over(untouched, tmp_path):
    flags, reference = untouched["grpo"]
    shutil.copytree(reference, tmp_path, dirs_exist_ok=True)
    newest = max((tmp_path / "checkpoints").glob("step-*"))
    os.truncate(newest / "state.pt", (newest / "state.pt").stat().st_size // 2)
    assert start("grpo", [*flags, "--output_dir", str(tmp_path), "--resume"]).wait(PATIENCE) == 0
    assert list((tmp_path / "checkpoints").glob(f"torn-*-{newest.name}"))
    assert_same_bytes(tmp_path, reference)


@pytest.mark.parametrize("script", ["grpo", "rloo", "ppo", "dpo", "kto", "orpo"])
def test_the_comparison_can_fail(script, untouched):
    """The weights are others than those before: the equalities above are not those of a model that never moved."""
    with pytest.raises(AssertionError, match="model.safetensors"):
        assert_same_bytes(untouched[script][1], untouched["sft"][1])
