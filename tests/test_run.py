"""The run folder: what is written, what survives a kill, what is refused."""

import contextlib
import dataclasses
import filecmp
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import pytest
import torch
import yaml

import common.run
from common.run import (
    Run,
    UserError,
    launch,
    random_state,
    read_config,
    read_manifest,
    restore_random_state,
    set_seed,
    show_batch,
)
from common.toy import toy_tokenizer

LOGS = ("metrics.jsonl", "clock.jsonl", "samples.jsonl")


@dataclasses.dataclass
class Args:
    output_dir: str = "runs/tiny"
    resume: bool = False
    seed: int = 7
    max_steps: int = 6
    save_steps: int = 2
    keep_checkpoints: int = 0
    learning_rate: float = 1e-5
    temperature: float | None = None
    loss_type: Literal["grpo", "dapo"] = "grpo"
    reward_weights: tuple[float, ...] = (1.0, 0.5)
    report_to: list[Literal["wandb", "tensorboard"]] = dataclasses.field(default_factory=list)
    inspect: bool = False
    eval_steps: int = 1
    eval_dataset_name: str | None = "held_out"
    metric_for_best_model: str = ""
    greater_is_better: bool | None = None
    push_to_hub: bool = False
    hub_model_id: str = ""
    hub_private_repo: bool = False


def train(args: Args, die_after: int | None = None) -> list[float]:
    """A script in small: noise walks, everything random comes from the saved generators."""
    run = Run(args, __file__)
    set_seed(args.seed)
    weights, start = torch.zeros(3), 0
    if (checkpoint := run.load_checkpoint()) is not None:
        start, state = checkpoint
        weights = state["weights"]
        restore_random_state(state["random"])
    for step in range(start + 1, args.max_steps + 1):
        weights = weights + torch.randn(3) * np.random.rand() + random.gauss(0, 1)
        run.log(step, {"walk": weights[0], "count": step}, clock={"seconds": os.times().elapsed})
        run.samples(f"step {step}", ["text"], [[f"at {weights[1]:.6f}"]])
        if step == die_after:
            return weights.tolist()  # as a kill would: the lines since the last checkpoint stay behind
        if step % args.save_steps == 0:
            run.save_checkpoint(step, {"weights": weights, "random": random_state()})
    run.close()
    return weights.tolist()


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def args_in(folder: Path, **changes) -> Args:
    return Args(output_dir=str(folder / "run"), **changes)


# What is written


def test_log_writes_flat_lines_and_keeps_numbers_readable(tmp_path):
    run = Run(args_in(tmp_path), __file__)
    run.log(3, {"loss": torch.tensor(0.5), "tokens": 12, "np": np.float32(2), "bad": math.nan, "worse": math.inf})
    run.log(4, {"loss": 1 / 3}, clock={"tokens_per_second": 0.25})
    first, second = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert first == '{"step": 3, "loss": 0.5, "tokens": 12, "np": 2.0, "bad": null, "worse": null}'
    assert json.loads(second) == {"step": 4, "loss": 1 / 3}
    (clock,) = lines(tmp_path / "run/clock.jsonl")
    assert clock["step"] == 4 and clock["tokens_per_second"] == 0.25 and {"seconds", "cpu_seconds"} <= set(clock)


def test_config_repeats_the_run(tmp_path):
    args = args_in(tmp_path, learning_rate=3e-7, temperature=0.7, loss_type="dapo", reward_weights=(2.0,), resume=True)
    Run(args, __file__)
    path = tmp_path / "run/config.yaml"
    assert read_config(path, Args) == dataclasses.replace(args, resume=False)
    assert list(yaml.safe_load(path.read_text())) == [field.name for field in dataclasses.fields(Args)]

    seen = []
    launch(lambda args: seen.append(args), Args, ["--config", str(path), "--learning_rate", "0.5"])
    assert seen == [dataclasses.replace(args, resume=False, learning_rate=0.5)]


def test_script_and_environment_are_recorded_without_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_top" + "secret")
    monkeypatch.setenv("WANDB_API_KEY", "also_top" + "secret")
    Run(args_in(tmp_path), __file__).close()
    assert (tmp_path / "run/script.py").read_text() == Path(__file__).read_text()
    environment = json.loads((tmp_path / "run/environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__
    assert environment["seed"] == 7
    assert {"command", "git_commit", "git_dirty", "python", "cpus", "gpus", "torch_threads"} <= set(environment)
    for path in (tmp_path / "run").iterdir():
        assert path.is_dir() or "top" + "secret" not in path.read_text()


def test_samples_are_cropped_on_the_console_and_whole_in_the_file(tmp_path, capsys):
    run = Run(args_in(tmp_path), __file__)
    long = "start " + "x" * 5000 + " end"
    run.samples("step 1", ["prompt", "reward"], [[long, 1.0], ["[bold]not markup[/bold]", math.nan]])
    text = capsys.readouterr().out
    assert "start" in text and "end" in text and text.count("x") < 500 and "[bold]not markup[/bold]" in text
    first, second = lines(tmp_path / "run/samples.jsonl")
    assert first == {"title": "step 1", "prompt": long, "reward": 1.0} and second["reward"] is None


def test_console_lines_are_plain_and_whole_without_a_terminal(tmp_path, capsys, monkeypatch):
    clock = iter([0.0, 10.0, 12.0])
    run = Run(args_in(tmp_path), __file__)
    monkeypatch.setattr(common.run.time, "monotonic", lambda: next(clock))
    run.progress(101, 300, {"loss": 0.123456})
    run.progress(106, 300, {f"number_{index}": 1.0 for index in range(20)})  # 5 steps in 10 s: 194 left take 388 s
    run.print("[train] and [1, 2] stay")
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.startswith("step 101/300") and "left" not in first and first.endswith("loss 0.1235")
    assert "0:06:28 left" in second and second.endswith("number_19 1")
    assert third == "[train] and [1, 2] stay"
    assert "\x1b" not in first + second


def test_gate_prints_and_stops(tmp_path, capsys):
    run = Run(args_in(tmp_path), __file__)
    run.gate("ratio", 1.0, "1: the policy sampled this", ok=True)
    assert "ratio" in capsys.readouterr().out
    with pytest.raises(UserError, match="gate `ratio` failed: 0.9, expected 1"):
        run.gate("ratio", 0.9, "1", ok=False)
    other_rank = Run(args_in(tmp_path), __file__, is_main=False)
    with pytest.raises(UserError):
        other_rank.gate("ratio", 0.9, "1", ok=False)


def test_other_ranks_write_nothing(tmp_path, capsys):
    run = Run(args_in(tmp_path), __file__, is_main=False)
    run.log(1, {"loss": 1.0})
    run.progress(1, 2, {})
    run.samples("title", ["a"], [["b"]])
    run.save_checkpoint(1, {"a": 1})
    run.close()
    assert not (tmp_path / "run").exists() and capsys.readouterr().out == ""


def test_a_look_leaves_no_trace(tmp_path, capsys):
    train(args_in(tmp_path, inspect=True, report_to=["tensorboard"]))
    assert not (tmp_path / "run").exists() and "at " in capsys.readouterr().out
    train(args_in(tmp_path), die_after=5)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    train(args_in(tmp_path, inspect=True))
    train(args_in(tmp_path, inspect=True, resume=True))
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_trackers_get_metrics_and_clock(tmp_path, monkeypatch):
    run = Run(args_in(tmp_path, report_to=["tensorboard"]), __file__)
    run.log(1, {"loss": 0.5, "bad": math.nan}, clock={"rate": 2.0})
    run.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    assert [event.value for event in events.Scalars("loss")] == [0.5]
    assert [event.value for event in events.Scalars("rate")] == [2.0]

    logged, started = [], []
    fake = SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: logged.append("end"))
    module = SimpleNamespace(init=lambda **options: started.append(options) or fake)
    monkeypatch.setitem(sys.modules, "wandb", module)
    for resume in (False, True):
        run = Run(args_in(tmp_path / "w", report_to=["wandb"], resume=resume), __file__)
        run.log(1, {"loss": 0.5}, clock={"rate": 2.0})
        run.close()
    assert [step for step, _ in logged[::2]] == [1, 1] and logged[1::2] == ["end", "end"]
    assert all({"loss": 0.5, "rate": 2.0}.items() <= values.items() for _, values in logged[::2])
    assert started[0]["id"] == started[1]["id"] and started[0]["config"]["learning_rate"] == 1e-5

    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        Run(args_in(tmp_path / "missing", report_to=["wandb"]), __file__)


# What is refused


def one_step(tmp_path) -> None:
    """A run that has logged something: only then is there anything to lose."""
    run = Run(args_in(tmp_path), __file__)
    run.log(1, {"loss": 1.0})
    run.close()


def test_second_run_in_a_folder_is_refused(tmp_path):
    Run(args_in(tmp_path), __file__).close()  # a try that failed before its first step may be repeated
    one_step(tmp_path)
    with pytest.raises(UserError, match=r"already holds a run.*--resume.*--output_dir"):
        Run(args_in(tmp_path), __file__)


def test_resume_with_other_flags_is_refused(tmp_path):
    one_step(tmp_path)
    with pytest.raises(UserError, match=r"learning_rate \(was 1e-05, now 0.1\)") as refusal:
        Run(args_in(tmp_path, resume=True, learning_rate=0.1, max_steps=9), __file__)
    assert "max_steps" not in str(refusal.value)
    Run(args_in(tmp_path, resume=True, max_steps=9, save_steps=3, keep_checkpoints=1), __file__).close()
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["max_steps"] == 9


def test_a_folder_in_use_by_another_process_is_refused(tmp_path):
    Run(args_in(tmp_path), __file__).close()
    code = f"import fcntl, time; f = open({str(tmp_path / 'run/.lock')!r}, 'w'); fcntl.lockf(f, fcntl.LOCK_EX)"
    other = subprocess.Popen([sys.executable, "-c", code + "; print('locked', flush=True); time.sleep(60)"], stdout=-1)
    try:
        other.stdout.readline()
        with pytest.raises(UserError, match="another process is writing"):
            Run(args_in(tmp_path, resume=True), __file__)
    finally:
        other.kill()
        other.wait()
    Run(args_in(tmp_path, resume=True), __file__).close()


def test_output_dir_that_cannot_be_made(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(UserError, match="cannot be created"):
        Run(args_in(tmp_path), __file__)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("learnin_rate: 1", "unknown key `learnin_rate`; did you mean `learning_rate`"),
        ("max_steps: many", "`max_steps: many` does not fit"),
        ("learning_rate: fast", "`learning_rate: fast` does not fit"),
        ("loss_type: ppo", "`loss_type: ppo` does not fit"),
        ("report_to: [wandb, pigeon]", "`report_to: .*pigeon.*does not fit"),
        ("- a list", "not a readable list of `name: value`"),
        ("a: [", "not a readable list of `name: value`"),
    ],
)
def test_config_that_does_not_fit(tmp_path, text, complaint):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=complaint):
        read_config(tmp_path / "config.yaml", Args)
    with pytest.raises(UserError, match=r"none\.yaml: no such file"):
        read_config(tmp_path / "none.yaml", Args)


def test_config_written_by_hand(tmp_path):
    (tmp_path / "config.yaml").write_text("learning_rate: 1e-5\ntemperature: 1\nreward_weights: [1, 2]\n")
    args = read_config(tmp_path / "config.yaml", Args)
    assert args == Args(learning_rate=1e-5, temperature=1, reward_weights=(1, 2)) and isinstance(
        args.learning_rate, float
    )


SCRIPT = """
'The first paragraph.'
from dataclasses import dataclass
from common.run import UserError, launch

@dataclass
class Args:
    row: int = 3

def main(args):
    raise UserError(f"row {args.row} of [a] is empty")

if __name__ == "__main__":
    launch(main, Args)
"""


def test_a_mistake_of_the_user_is_one_sentence_and_status_1(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(Path(common.run.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py", "--row", "17"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "error: row 17 of [a] is empty\n")


def launch_status(main, *argv: str) -> int:
    try:
        launch(main, Args, list(argv))
    except SystemExit as stop:
        return stop.code
    return 0


def test_exit_status(capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    def fine(args):
        pass

    assert launch_status(interrupted) == 130
    assert capsys.readouterr().err.startswith("interrupted; the same command with --resume")
    with pytest.raises(ZeroDivisionError):  # a bug keeps its traceback
        launch(lambda args: 1 / 0, Args, [])
    assert launch_status(fine) == 0
    assert launch_status(fine, "--help") == 0
    help_text = capsys.readouterr().out
    assert "--config FILE" in help_text and "--learning_rate" in help_text and "What survives" not in help_text
    assert launch_status(fine, "--config", "nowhere.yaml") == 1
    for wrong in (["--learnig_rate", "1"], ["--max_steps", "x"], ["--config"]):
        assert launch_status(fine, *wrong) == 1


# What survives


@pytest.mark.parametrize("die_after", [1, 2, 3, 6])
def test_resumed_run_ends_with_the_same_bytes(tmp_path, die_after):
    weights = train(args_in(tmp_path / "whole"))
    train(args_in(tmp_path / "killed"), die_after)
    assert train(args_in(tmp_path / "killed", resume=True)) == weights
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert filecmp.cmp(tmp_path / "killed/run" / name, tmp_path / "whole/run" / name, shallow=False), name
    assert [line["step"] for line in lines(tmp_path / "killed/run/clock.jsonl")] == [1, 2, 3, 4, 5, 6]
    environment = json.loads((tmp_path / "killed/run/environment.json").read_text())
    assert environment["run_id"] == environment["before_resume"]["run_id"]


def test_half_a_line_is_cut_off(tmp_path):
    train(args_in(tmp_path), die_after=3)
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "wa')
    train(args_in(tmp_path, resume=True))
    assert [line["step"] for line in lines(tmp_path / "run/metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_resume_without_a_run_or_a_checkpoint_starts_over(tmp_path, capsys):
    weights = train(args_in(tmp_path, resume=True))
    assert "nothing to resume" in capsys.readouterr().out
    train(args_in(tmp_path / "early"), die_after=1)
    assert train(args_in(tmp_path / "early", resume=True)) == weights
    assert [line["step"] for line in lines(tmp_path / "early/run/metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_finished_run_resumes_to_itself(tmp_path):
    weights = train(args_in(tmp_path))
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    assert train(args_in(tmp_path, resume=True)) == weights
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before
    run = Run(args_in(tmp_path, resume=True), __file__)
    run.save_checkpoint(6, {"other": 1})
    assert "weights" in run.load_checkpoint()[1]


def test_not_resuming_loads_nothing(tmp_path):
    run = Run(args_in(tmp_path), __file__)
    run.log(1, {"a": 1})
    run.save_checkpoint(1, {"a": 1})
    assert run.load_checkpoint() is None
    assert len(lines(tmp_path / "run/metrics.jsonl")) == 1


def truncate(folder: Path):
    os.truncate(folder / "state.pt", (folder / "state.pt").stat().st_size // 2)


def flip(folder: Path):
    data = bytearray((folder / "state.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "state.pt").write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        flip,
        lambda folder: (folder / "state.pt").unlink(),
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: (folder / "manifest.json").write_text('{"step": 4'),
    ],
    ids=["truncated", "bit", "state", "manifest", "half-manifest"],
)
def test_torn_checkpoint_falls_back_to_the_one_before(tmp_path, capsys, damage):
    weights = train(args_in(tmp_path / "whole"))
    train(args_in(tmp_path), die_after=5)
    damage(tmp_path / "run/checkpoints/step-00000004")
    capsys.readouterr()
    assert train(args_in(tmp_path, resume=True)) == weights
    printed = capsys.readouterr().out
    assert "step-00000004 is torn" in printed and "resuming after step 2" in printed
    assert filecmp.cmp(tmp_path / "run/metrics.jsonl", tmp_path / "whole/run/metrics.jsonl", shallow=False)
    assert read_manifest(tmp_path / "run/checkpoints/step-00000004") is not None


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    train(args_in(tmp_path, keep_checkpoints=2, save_steps=1))
    assert sorted(os.listdir(tmp_path / "run/checkpoints")) == ["step-00000005", "step-00000006"]
    train(args_in(tmp_path / "all", save_steps=1))
    assert len(os.listdir(tmp_path / "all/run/checkpoints")) == 6


def test_state_that_could_not_be_loaded_again_is_refused_at_once(tmp_path):
    run = Run(args_in(tmp_path), __file__)
    with pytest.raises(Exception, match="(?i)weights.?only"):
        run.save_checkpoint(1, {"path": Path("x")})
    assert not (tmp_path / "run/checkpoints/step-00000001").exists()
    state = {"a": torch.ones(2, dtype=torch.bfloat16), "b": [1, 2.5, None, "x", {"c": True}], "d": (1, torch.arange(3))}
    run.save_checkpoint(2, state)
    run.args.resume = True
    step, loaded = run.load_checkpoint()
    assert step == 2 and str(loaded) == str(state)


@pytest.mark.parametrize("keep", [0, 1])
def test_sigkill_at_any_step_of_a_checkpoint(tmp_path, monkeypatch, keep):
    """A child is killed before its n-th call of whatever touches the disk, for every n: the folder then holds whole
    checkpoints only, at least one, and a restart removes the rest."""
    touches = [
        (os, ["fsync", "open", "rmdir", "unlink"]), (torch, ["save", "load"]), (common.run, ["sha256"]),
        (Path, ["mkdir", "open", "rename", "replace", "stat"]),
    ]  # fmt: skip
    monkeypatch.setattr(common.run, "describe_environment", lambda folder, seed: {"run_id": "fixed"})
    weight = torch.ones(1000)
    run = Run(args_in(tmp_path), __file__)
    run.log(1, {"loss": 1.0})
    run.save_checkpoint(1, {"weight": weight})

    def save_and_die(run: Run, kill_at: int) -> None:
        calls = itertools.count(1)

        def dying(function):
            def call(*positional, **named):
                if next(calls) == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*positional, **named)

            return call

        for owner, names in touches:
            for name in names:
                setattr(owner, name, dying(getattr(owner, name)))
        run.save_checkpoint(2, {"weight": weight * 2})

    steps, killed = [], True
    for kill_at in itertools.count(1):
        folder = tmp_path / f"killed_{kill_at}"
        shutil.copytree(tmp_path / "run", folder)
        args = Args(output_dir=str(folder), resume=True, keep_checkpoints=keep)
        process = os.fork()
        if process == 0:
            with contextlib.suppress(BaseException):
                save_and_die(Run(args, __file__), kill_at)
                os._exit(0)
            os._exit(1)
        status = os.waitpid(process, 0)[1]
        killed = os.WIFSIGNALED(status)
        assert killed or status == 0
        checkpoints = list(folder.glob("checkpoints/step-*"))
        assert checkpoints and all(read_manifest(checkpoint) for checkpoint in checkpoints)
        resumed = Run(args, __file__)
        assert not list(folder.glob("checkpoints/.tmp-*"))
        step, state = resumed.load_checkpoint()
        assert torch.equal(state["weight"], weight * step)
        steps.append(step)
        if not killed:
            break
    assert steps == sorted(steps) and set(steps) == {1, 2} and len(steps) > 12


# The best so far


def evaluate(run: Run, step: int, value: float, name: str = "eval/loss") -> None:
    """What a script does after a step: log, and keep the model, here its step, if it is the best."""

    def save(folder: Path) -> None:
        folder.mkdir()
        (folder / "model").write_text(str(step))

    run.log(step, {"loss": 0.0})
    run.log(step, {name: value, "eval/other": -step})
    run.keep_best(step, {name: torch.tensor(value), "eval/other": -step}, save)


def kept(folder: Path) -> tuple[int, float]:
    """(step, value) of best/, which has to be whole, and in a resumed run the only one."""
    said = json.loads((folder / "best/best.json").read_text())
    assert (folder / "best/model").read_text() == str(said["step"])
    assert not list(folder.glob(".tmp-best*"))
    return said["step"], said["value"]


@pytest.mark.parametrize(
    "name, greater, values, best",
    [
        ("eval/loss", None, [math.nan, 3.0, 2.0, math.nan, 2.5, 2.0, -math.inf], 3),
        ("eval/exact_match", None, [0.0, 0.5, 0.75, 0.75, math.nan, 0.5, math.inf], 3),
        ("eval/mse", False, [3.0, 2.0, 4.0], 2),
        ("eval/loss", True, [3.0, 2.0, 4.0], 3),
        ("eval/pass@1", None, [-3.0], 1),
    ],
)
def test_the_best_model_is_kept(tmp_path, name, greater, values, best):
    run = Run(args_in(tmp_path, metric_for_best_model=name, greater_is_better=greater), __file__)
    for step, value in enumerate(values, start=1):
        evaluate(run, step, value, name)
    assert kept(tmp_path / "run") == (best, values[best - 1])


def test_nothing_is_kept_without_a_number_or_unasked(tmp_path):
    run = Run(args_in(tmp_path, metric_for_best_model="eval/loss"), __file__)
    evaluate(run, 1, math.nan)
    evaluate(Run(args_in(tmp_path / "unasked"), __file__), 1, 1.0)
    assert not list(tmp_path.glob("**/best"))


@pytest.mark.parametrize("die_after", range(1, 7))
def test_the_best_survives_a_kill(tmp_path, die_after):
    """A checkpoint every other step; what the killed run saw after the newest one is forgotten, and seen again."""
    values = [5.0, 3.0, 4.0, 2.0, 6.0, 1.0]
    for resume, last in ((False, die_after), (True, 6)):
        run = Run(args_in(tmp_path, metric_for_best_model="eval/loss", resume=resume), __file__)
        start, _ = run.load_checkpoint() or (0, None)
        for step in range(start + 1, last + 1):
            evaluate(run, step, values[step - 1])
            assert kept(tmp_path / "run")[1] == min(values[:step])
            if step % 2 == 0:
                run.save_checkpoint(step, {})
    assert kept(tmp_path / "run") == (6, 1.0)


def test_sigkill_while_the_best_is_replaced(tmp_path, monkeypatch):
    """At any call that touches the disk: best/ is whole or not there, and the same step makes it after a resume."""
    monkeypatch.setattr(common.run, "describe_environment", lambda folder, seed: {"run_id": "fixed"})
    args = args_in(tmp_path, metric_for_best_model="eval/loss", resume=True)
    run = Run(args, __file__)
    evaluate(run, 1, 2.0)
    run.save_checkpoint(1, {})
    run.close()

    def die(kill_at: int) -> None:
        run, calls = Run(args, __file__), itertools.count(1)
        run.load_checkpoint()

        def dying(function):
            def call(*positional, **named):
                if next(calls) == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*positional, **named)

            return call

        for owner, names in ((os, ["fsync", "unlink", "rmdir"]), (Path, ["mkdir", "open", "rename", "replace"])):
            for name in names:
                setattr(owner, name, dying(getattr(owner, name)))
        evaluate(run, 2, 1.0)

    found = []
    for kill_at in itertools.count(1):
        process = os.fork()
        if process == 0:
            with contextlib.suppress(BaseException):
                die(kill_at)
                os._exit(0)
            os._exit(1)
        status = os.waitpid(process, 0)[1]
        assert os.WIFSIGNALED(status) or status == 0
        run = Run(args, __file__)
        found.append(kept(tmp_path / "run")[0] if (tmp_path / "run/best").exists() else None)
        run.load_checkpoint()
        evaluate(run, 2, 1.0)
        assert kept(tmp_path / "run") == (2, 1.0)
        run.close()
        if not os.WIFSIGNALED(status):
            break
        shutil.rmtree(tmp_path / "run/best")  # as it was before
        (tmp_path / "run/best").mkdir()
        (tmp_path / "run/best/model").write_text("1")
        (tmp_path / "run/best/best.json").write_text(json.dumps({"step": 1, "value": 2.0}))
    assert set(found) == {1, None, 2} and found.count(None) == 1 and len(found) > 10


@pytest.mark.parametrize("is_main", [True, False])
def test_a_metric_that_no_evaluation_has(tmp_path, is_main):
    """Every rank says so: one that waited for the others would wait for ever."""
    run = Run(args_in(tmp_path, metric_for_best_model="loss"), __file__, is_main)
    with pytest.raises(UserError, match=r"--metric_for_best_model loss is in no .*: eval/loss, eval/other$"):
        evaluate(run, 1, 1.0)


@pytest.mark.parametrize(
    "flags, remedy", [({"eval_steps": 0}, "--eval_steps"), ({"eval_dataset_name": None}, "--eval_dataset_name")]
)
def test_the_best_needs_evaluations(tmp_path, flags, remedy):
    args = SimpleNamespace(**{
        **vars(args_in(tmp_path, metric_for_best_model="eval/loss")), "dataset_name": "train.jsonl", **flags
    })  # fmt: skip
    with pytest.raises(UserError, match=f"give {remedy}"):
        Run(args, __file__, is_main=False)
    assert not (tmp_path / "run").exists()


# Random numbers and --inspect


def test_random_state_is_restored_exactly(tmp_path):
    def draw() -> list:
        numbers = [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.randn(2).tolist()]
        return [*numbers, torch.rand(1).item()]

    set_seed(3)
    draw()  # leaves half of a Gaussian pair in python and numpy
    torch.save(random_state(), tmp_path / "state.pt")
    expected = [draw(), draw()]
    set_seed(99)
    restore_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [draw(), draw()] == expected
    set_seed(3)
    first = draw()
    set_seed(3)
    assert draw() == first


def test_show_batch_marks_roles(tmp_path, capsys):
    """Prompt, answer, a turn without loss, a second answer; then a sequence with a negative advantage."""
    ids = [1, 9, 3, 9, 2, 6, 9, 2] + [1, 7, 3, 7, 2]
    mask = [0, 0, 0, 1, 1, 0, 1, 1] + [0, 0, 0, 1, 1]
    batch = SimpleNamespace(
        lengths=[8, 5],
        input_ids_N=torch.tensor(ids),
        position_ids_N=torch.tensor([*range(8), *range(5)]),
        loss_mask_N=torch.tensor(mask, dtype=torch.bool),
    )
    run = Run(args_in(tmp_path), __file__)
    show_batch(run, toy_tokenizer(), batch, torch.tensor([0.5] * 8 + [-0.25] * 5))
    head_0, text_0, head_1, text_1, legend = capsys.readouterr().out.splitlines()
    assert head_0 == "sequence 0  tokens 0..7  positions 0..7  advantage +0.500"
    assert text_0 == "<s>4=«4</s>»1«4</s>»"
    assert head_1 == "sequence 1  tokens 8..12  positions 0..4  advantage -0.250"
    assert text_1 == "<s>2=«2</s>»"
    assert " ".join(legend.split()) == "13 tokens: prompt 6 trained 4 trained, advantage < 0 2 masked 1"
