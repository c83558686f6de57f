"""Two processes log what one does: the same losses and gradient norms for the same global batch, the same weights."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
PAIRS = (
    "--model_name_or_path toy --dataset_split train[:400] --train_batch_size 37 --max_tokens_per_micro_batch 150 "
    "--logging_steps 1 --max_steps 5 --learning_rate 1e-3 "
)
# Odd numbers of prompts and of sequences, several micro-batches a step, and every term that is a mean over the step
FLAGS = {
    "sft": "--train_batch_size 37 --max_tokens_per_micro_batch 150 --logging_steps 1 --max_steps 5",
    "grpo": "--model_name_or_path toy --generation_batch_size 36 --num_generations 4 --max_tokens_per_micro_batch 120 "
    "--beta 0.02 --entropy_coef 0.01 --num_iterations 2 --top_entropy_quantile 0.7 --warmup_steps 0 --max_steps 4 "
    "--reward_funcs common.toy:graded",
    "ppo": "--model_name_or_path toy --generation_batch_size 37 --steps_per_generation 1 --kl_horizon 1000 "
    "--max_tokens_per_micro_batch 120 --kl_target 0.01 --critic_warmup_steps 1 "
    "--warmup_steps 0 --max_steps 4 --reward_funcs common.toy:graded",
    "rloo": "--model_name_or_path toy --generation_batch_size 36 --num_generations 4 --max_tokens_per_micro_batch 120 "
    "--num_iterations 2 --warmup_steps 0 --max_steps 4 --reward_funcs common.toy:graded",
    "dpo": PAIRS + "--loss_type aot_unpaired bco_pair sft --ld_alpha 0.5",
    "kto": PAIRS,
    "orpo": PAIRS + "--completion_only_loss False",
    "reward": PAIRS + "--normalize_split train[:37]",
}
CASES = [(script, "") for script in FLAGS]
CASES += [(script, "--train_batch_size 1") for script in FLAGS if PAIRS in FLAGS[script]]  # one rank has nothing to do


def run(script: str, flags: str, folder: Path, *launcher: str) -> list[dict]:
    command = [sys.executable, *launcher, f"{script}.py", "--output_dir", str(folder), "--max_eval_samples", "8"]
    done = subprocess.run([*command, *flags.split()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.long  # two processes that wait for each other: seconds on two idle cores, minutes on busy ones
@pytest.mark.parametrize("script, more", CASES)
def test_two_ranks_log_what_one_does(script, more, tmp_path):
    flags = f"{FLAGS[script]} {more}"
    alone = run(script, flags, tmp_path / "alone")
    both = run(script, flags, tmp_path / "both", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    assert len(alone) == len(both)
    for one, two in zip(alone, both):
        for name, value in one.items():
            if value is not None:
                assert two[name] == pytest.approx(value, rel=1e-4, abs=1e-5), f"{name} of step {one['step']}"
    weights, again = (load_file(tmp_path / name / "final/model.safetensors") for name in ("alone", "both"))
    for name, tensor in weights.items():
        assert (again[name] - tensor).norm() <= 1e-4 * tensor.norm(), name
