"""One table: what every script logs and saves on two ranks, in every layout of configs/, beside one process.

    python benchmark/layouts.py                                    # all of it: docs/layouts.md has the table
    python benchmark/layouts.py --cases sft ppo --layouts fsdp2    # a part, to the console alone

A case is a script on the toy with an odd number of prompts or sequences a step, unequal micro-batches on the ranks, and
every term that is a mean over the whole step. Two numbers come out of each run of 20 steps:

    metrics   the largest |a - b| / max(|a|, 0.1) over all numbers of metrics.jsonl
    weights   the largest |A - B| / |A| over the tensors of final/, in the Euclidean norm

Both must be at most 1e-4. Ranks add up in another order than one process does, so they are not 0. On a GPU machine the
same command uses its first two GPUs, through nccl; without one it is gloo. Takes about twenty minutes on two cores.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common.models import load_policy, load_tokenizer
from common.run import describe_environment, launch
from common.sharding import save_model

LIMIT = 1e-4
LAYOUTS = ("ddp", "fsdp2", "zero2", "zero3", "zero3_offload")
PAIRS = (
    "--model_name_or_path toy --dataset_split train[:400] --train_batch_size 37 --max_tokens_per_micro_batch 150 "
    "--learning_rate 1e-3 --logging_steps 1"
)
ROLLOUTS = (
    "--model_name_or_path toy --max_tokens_per_micro_batch 120 --warmup_steps 0 --reward_funcs common.toy:graded "
    "--generation_batch_size"
)
GROUPS = f"{ROLLOUTS} 36 --num_generations 4 --num_iterations 2"
SFT = "--train_batch_size 37 --max_tokens_per_micro_batch 150 --logging_steps 1"
PPO = f"{ROLLOUTS} 37 --steps_per_generation 1 --kl_horizon 1000 --kl_target 0.01 --critic_warmup_steps 1"
SCRIPTS = {
    "sft": SFT,
    "reward": f"{PAIRS} --normalize_split train[:37]",
    "dpo": f"{PAIRS} --loss_type aot_unpaired bco_pair sft --ld_alpha 0.5",
    "kto": PAIRS,
    "orpo": f"{PAIRS} --completion_only_loss False",
    "ppo": PPO,
    "grpo": f"{GROUPS} --beta 0.02 --entropy_coef 0.01 --top_entropy_quantile 0.7",
    "rloo": GROUPS,
}
CASES = {name: (name, flags) for name, flags in SCRIPTS.items()}
CASES |= {
    "sft, DoRA, recomputed": ("sft", f"{SFT} --use_peft --use_dora --gradient_checkpointing"),
    "sft, tied embeddings": ("sft", f"{SFT} --model_name_or_path TIED"),
    "reward, LoRA": ("reward", f"{SCRIPTS['reward']} --use_peft"),
    "grpo, LoRA": ("grpo", f"{SCRIPTS['grpo']} --use_peft"),
    "ppo, LoRA": ("ppo", f"{PPO} --use_peft"),
    "ppo, critic on the policy": ("ppo", f"{PPO} --value_model shared"),
    "grpo, vLLM": ("grpo", f"{SCRIPTS['grpo']} --use_vllm"),
    "grpo, LoRA, vLLM": ("grpo", f"{SCRIPTS['grpo']} --use_vllm --use_peft"),
}


@dataclass
class Args:
    """Flags of benchmark/layouts.py."""

    cases: list[str] = field(default_factory=lambda: list(CASES))
    """Names of the rows; a script's name is one."""
    layouts: list[str] = field(default_factory=lambda: list(LAYOUTS))
    """Files of configs/, without .yaml: the columns."""
    max_steps: int = 20
    """Steps of each run."""
    output_dir: str = ""
    """Where table.md and layouts.json go; nowhere if empty."""


def train(case: str, layout: str, folder: Path, *more: str, ranks: int = 2) -> list[dict]:
    """The lines of metrics.jsonl of one run into `folder`; layout "": one process. RuntimeError if the run fails."""
    script, flags = CASES[case]
    if "TIED" in flags:
        flags = flags.replace("TIED", str(tied_toy(folder.parent / "tied")))
    command = [sys.executable]
    if layout:
        command += ["-m", "accelerate.commands.launch", "--config_file", f"configs/{layout}.yaml"]
        command += ["--num_processes", str(ranks), "--main_process_port", "0"]  # any free port
    command += [f"{script}.py", "--output_dir", str(folder), "--max_eval_samples", "8", *flags.split(), *more]
    environment = os.environ if torch.cuda.is_available() else os.environ | {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-9000:]}")
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def tied_toy(folder: Path) -> Path:
    """A folder with the toy's model, but its output head is its embeddings."""
    if not folder.exists():
        model = load_policy("toy", torch.float32, torch.device("cpu"))
        model.config.tie_word_embeddings = True
        save_model(type(model)(model.config), load_tokenizer("toy"), folder)
    return folder


def difference_of_metrics(alone: list[dict], other: list[dict]) -> float:
    """See the top of this file; infinite where one run has a line or a number that the other has not."""
    if [line.keys() for line in alone] != [line.keys() for line in other]:
        return float("inf")
    worst = 0.0
    for line, again in zip(alone, other):
        for name, a in line.items():
            if (a is None) != (again[name] is None):
                return float("inf")
            if a is not None:
                worst = max(worst, abs(a - again[name]) / max(abs(a), 0.1))
    return worst


def difference_of_weights(alone: Path, other: Path) -> float:
    """See the top of this file; infinite where the folders hold other tensors."""
    (file,) = alone.glob("*.safetensors")
    weights, again = load_file(file), load_file(other / file.name)
    if {n: (t.shape, t.dtype) for n, t in weights.items()} != {n: (t.shape, t.dtype) for n, t in again.items()}:
        return float("inf")
    return max(((again[name] - t).norm() / t.norm().clamp(min=1e-9)).item() for name, t in weights.items())


def main(args: Args) -> None:
    rows, found, began, steps = [], {}, time.monotonic(), ("--max_steps", str(args.max_steps))
    for count, case in enumerate(args.cases):
        cells = []
        with tempfile.TemporaryDirectory() as scratch:
            alone = Path(scratch) / "alone"
            lines = train(case, "", alone, *steps)
            for layout in args.layouts:
                other = Path(scratch) / layout
                metrics = difference_of_metrics(lines, train(case, layout, other, *steps))
                weights = difference_of_weights(alone / "final", other / "final")
                found[f"{case} | {layout}"] = {"metrics": metrics, "weights": weights}
                cells.append(f"{metrics:.0e}, {weights:.0e}" + " **differs**" * (max(metrics, weights) > LIMIT))
                print(f"{case}, {layout}: {cells[-1]}", file=sys.stderr, flush=True)
        rows.append(f"| {case} | {' | '.join(cells)} |")
        left = (time.monotonic() - began) / (count + 1) * (len(args.cases) - count - 1)
        print(f"{count + 1} of {len(args.cases)} cases, {left / 60:.0f} min left", file=sys.stderr, flush=True)
    table = [f"| | {' | '.join(args.layouts)} |", "|---" * (1 + len(args.layouts)) + "|", *rows]
    print("\n".join(table))
    if args.output_dir:
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "table.md").write_text("\n".join(table) + "\n")
        (folder / "layouts.json").write_text(json.dumps(found, indent=2) + "\n")
        (folder / "environment.json").write_text(json.dumps(describe_environment(ROOT, 0), indent=2) + "\n")


if __name__ == "__main__":
    launch(main, Args)
