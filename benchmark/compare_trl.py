"""Our scripts (not orpo.py) beside TRL: the same work on both sides, in one run on one machine.

    python benchmark/compare_trl.py sft         # or grpo, rloo, ppo, reward, dpo, kto

Legs. Each is a process of its own, and rounds interleave them: T0 U0 T1 U1, T0 U0 T1 U1.

    T0  TRL as its documentation shows it: activation checkpointing, bf16 autocast over fp32 weights, micro-batches of 8
    T1  TRL tuned by us: no checkpointing, the whole step in one micro-batch; on a CPU one pair (reward, dpo) or two
        replies (kto), for less padding makes that twice as fast; sft without padding, over our own packed attention
        (`padding_free`, which leaves nothing for group_by_length to win)
    U0  our script with T0's knobs: checkpointing, micro-batches of about as many tokens, no prompt shared
    U1  our script as it comes

The same on both sides: weights, token ids, order of rows, seeds, global batch, AdamW, clipping, constant learning rate,
no dropout, metrics at every step, fp32 masters. bfloat16 means autocast there, and bf16 compute weights here. The
padding token is one that no row holds: transformers gives its embedding no gradient, and scores the last other token.

Gate (legs TG and UG, before the timing). sft: losses and gradient norms of 20 steps. grpo, rloo: both get the same
recorded completions, of unequal length, and train on them twice, so that the second pass is off policy. Losses may
differ by 0.5 % and gradient norms by 2 %; if they differ by more, table.md says so and the exit status is 1. The gate
runs in fp32, where a difference is an error and not rounding. What bf16 adds, table.md tells of the timed legs.

reward, dpo, kto: rows with a sequence of over --max_length tokens are left out of both. TRL's trainers get columns of
token ids and skip their own tokenising. reward: both heads are the same draw. dpo, kto: the reference is a second model
that is scored at every step, on both sides; neither precomputes. kto: for its KL term TRL pairs a prompt with the reply
before it in the micro-batch, we with any other of the whole step, so the losses differ by design. The timed legs run
`kto` all the same, the gate `apo_zero_unpaired`, which has no such term.

ppo: TRL 1.12.0, the last with a PPOTrainer. pip puts it, alone, into runs/compare_trl/trl-1.12.0 the first time; what
it imports is what our side runs with. A step is a rollout and its --passes optimiser steps, each over all of it, for
TRL's minibatches make no steps of their own (its issue 5645); those of both sides are counted. A prompt has one
completion unless --num_generations says more. A reward model with a drawn head reads the sampled ids; the critic starts
as its copy. TRL clips nothing, so neither side does: a hook of TRL's optimiser takes the two norms that we take, for
the stopwatch. TRL's bf16 flag does not reach its Accelerator, ACCELERATE_MIXED_PRECISION does; rollouts are outside of
that autocast, and checkpointing is never switched on. T1 puts rollouts into autocast; U0 is U1 with checkpointing, so
leave it out: --legs T0 T1 U1. The gate replays completions of full length, for TRL puts the score of a shorter one
behind its last token, and makes TRL whiten with the biased variance, as we do. Scores, KL and values are each side's
own.

Measured by a stopwatch in the function with which both sides clip gradients: from step to step, the first --warmup
steps left out, no evaluation and no checkpoint inside. On a CPU the primary clock is CPU seconds of the process, on one
thread; wall time stands beside it. Useful tokens are counted from the data, by us: no pads, no completions borrowed for
a KL term, and a prompt as often as it has a reply. grpo, rloo and ppo force every completion to --completion_length;
grpo and rloo reward a hash of it, so that no group is dead. Peak memory is the highest resident size above that after
the imports; on CUDA, max_memory_allocated after step one.

Writes result.json, losses.jsonl, curves.png, table.md to benchmark/results/compare_trl_<what>_<hardware>_<date>/.
Needs Linux, trl, datasets, matplotlib. On one quiet core sft, grpo and reward take about 20 minutes, rloo and dpo 30,
ppo and kto 40.
"""

import dataclasses
import datetime
import importlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from statistics import fmean, median
from types import SimpleNamespace
from typing import Any, Literal

import tyro

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "runs/compare_trl"  # git ignores it: models, logs, run folders, TRL 1.12.0
TRL_NAMES = {
    "sft": "SFT", "grpo": "GRPO", "rloo": "RLOO", "ppo": "PPO", "reward": "Reward", "dpo": "DPO", "kto": "KTO"
}
CURVES = ("loss", "grad_norm", "critic_grad_norm")
COLOURS = {"T0": "#9aa5b1", "T1": "#52606d", "TG": "#52606d", "U0": "#e6a23c", "U1": "#c2410c", "UG": "#c2410c"}


@dataclass(frozen=True)
class Settings:
    what: tyro.conf.Positional[Literal["sft", "grpo", "rloo", "ppo", "reward", "dpo", "kto"]]
    """Which script."""
    model_name_or_path: str = "models/SmolLM2-135M-Instruct.Q4_1.gguf"
    """Folder or .gguf file. Both sides read a Hugging Face folder that is written from it first."""
    dataset_name: str | None = None
    """None: what `prepare` names, .jsonl.gz, of the folder $POSTSCRIPTS_DATA (data)."""
    legs: tuple[Literal["T0", "U0", "T1", "U1"], ...] = ("T0", "U0", "T1", "U1")
    """What to time, in this order."""
    rounds: int = 2
    """How often each leg runs."""
    steps: int = 8
    """Optimiser steps of a timed leg; ppo: rollouts."""
    warmup: int = 2
    """First steps that are not timed; at least 1, for a stopwatch between steps misses the first."""
    batch_size: int | None = None
    """Sequences per optimiser step, pairs for reward and dpo (None: 8; grpo and rloo 16; reward and dpo 4)."""
    tuned_micro_batch: int | None = None
    """The same per micro-batch of T1 (None: what was fastest, see above)."""
    gate_steps: int | None = None
    """Optimiser steps of the gate (None: 20; grpo and rloo 4; ppo 2 rollouts; 0: no gate)."""
    gate_dtype: Literal["bfloat16", "float32"] = "float32"
    """Of the gate."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the timed legs."""
    completion_length: int = 32
    """grpo, rloo, ppo: tokens of every completion."""
    num_generations: int | None = None
    """grpo, rloo, ppo: completions of every prompt (None: 8; ppo 1)."""
    passes: int = 4
    """ppo: optimiser steps of a rollout, each over all of it (4 is TRL's default)."""
    max_length: int = 512
    """reward, dpo, kto: rows with a longer sequence are left out."""
    torch_compile: bool = False
    """Let T1 and U1 compile."""
    threads: int = 1
    """OpenMP threads of a leg on a CPU."""
    seed: int = 0
    """Of the order of rows, and of sampling."""
    output_dir: str | None = None
    """None: a new folder in benchmark/results."""

    def of_leg(self, leg: str) -> "Settings":
        """With the defaults filled in. The gate's legs are smaller, and have a dtype of their own."""
        batch_size, gate_batch_size, gate_steps = {
            "sft": (8, 2, 20), "grpo": (16, 4, 4), "rloo": (16, 4, 4), "ppo": (8, 4, 2), "reward": (4, 2, 20),
            "dpo": (4, 2, 20), "kto": (8, 4, 20),
        }[self.what]
        gate_steps = gate_steps if self.gate_steps is None else self.gate_steps
        if leg in ("TG", "UG"):
            return dataclasses.replace(self, steps=gate_steps, batch_size=gate_batch_size, dtype=self.gate_dtype)
        return dataclasses.replace(self, gate_steps=gate_steps, batch_size=self.batch_size or batch_size)

    @property
    def samples(self) -> bool:
        """Whether the script samples its completions."""
        return self.what in ("grpo", "rloo", "ppo")

    @property
    def group(self) -> int:
        """Completions of one prompt."""
        default = 8 if self.what in ("grpo", "rloo") else 1
        return min(self.num_generations or default, self.batch_size)

    @property
    def updates(self) -> int:
        """Optimiser steps between two stamps of the stopwatch."""
        return self.passes if self.what == "ppo" else 1


def hash_reward(prompts: list, completions: list[str], **_) -> list[float]:
    """A number in [0, 1) that depends on the completion alone, and that hardly two completions have in common."""
    return [zlib.crc32(completion.encode()) / 2**32 for completion in completions]


def count_tokens(step: list[dict], settings: Settings) -> tuple[int, int]:
    """Useful tokens of one optimiser step, and those of them that are of prompts, counted from its data."""
    if settings.what == "sft":
        return sum(len(row["labels"]) for row in step), sum(row["labels"].count(-100) for row in step)
    total = prompts = 0
    for row in step:
        replies = [len(row[side]) for side in ("chosen_ids", "rejected_ids", "completion_ids") if side in row]
        replies = replies or [settings.completion_length] * settings.group
        prompts += len(row["prompt_ids"]) * len(replies)
        total += len(row["prompt_ids"]) * len(replies) + sum(replies)
    return total, prompts


# ------------------------------------------------------------------------------------------------ processes, stopwatch


def in_process(function: Callable, folder: Path, *args) -> Any:
    """What `function(folder, *args)` returns in a fresh interpreter, which writes to folder/log.txt."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    process = multiprocessing.get_context("spawn").Process(target=enter_process, args=(function, folder, *args))
    process.start()
    process.join()
    if process.exitcode:
        log = (folder / "log.txt").read_text().splitlines()
        sys.exit("\n".join([*log[-25:], f"{function.__name__} failed; its log is {folder / 'log.txt'}"]))
    return json.loads((folder / "returned.json").read_text())


def enter_process(function: Callable, folder: Path, *args) -> None:
    with (folder / "log.txt").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    (folder / "returned.json").write_text(json.dumps(function(folder, *args)))


def start_stopwatch() -> list[dict]:
    """A list that grows by one entry where a step clips its gradients; TRL and we call two functions of torch."""
    import torch

    stamps = []

    def clip_and_stamp(*args, real, **kwargs):
        norm = real(*args, **kwargs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        stamps.append({"wall": time.perf_counter(), "cpu": time.process_time(), "memory": memory("VmHWM")})
        if torch.cuda.is_available() and len(stamps) == 1:
            torch.cuda.reset_peak_memory_stats()  # forget what loading took
        return norm

    for name in ("clip_grad_norm_", "clip_grads_with_norm_"):
        setattr(torch.nn.utils, name, partial(clip_and_stamp, real=getattr(torch.nn.utils, name)))
    return stamps


def memory(field: Literal["VmRSS", "VmHWM"]) -> int:
    """Bytes in use now (VmRSS) or at most so far (VmHWM): of this process, or on the GPU if there is one."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() if field == "VmRSS" else torch.cuda.max_memory_allocated()
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


# ------------------------------------------------------------------------------------------------ what both are given


def last_trl_with_ppo() -> str:
    """The folder with TRL 1.12.0 and nothing else, for the front of sys.path; pip fills it the first time."""
    folder, package = WORK / "trl-1.12.0", "trl==1.12.0"
    if not (folder / "trl/experimental/ppo").is_dir():
        print(f"pip installs {package} into {folder.relative_to(ROOT)}, without dependencies", flush=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--no-deps", "--target", str(folder), package], check=True)
    return str(folder)


def prepare(folder: Path, settings: Settings) -> dict:
    """Writes model/ and train.jsonl; returns the rows of every step in order, and the rates of this machine.

    A row of sft is {input_ids, labels}, one of grpo, rloo and ppo {prompt, prompt_ids}, of reward and dpo {prompt_ids,
    chosen_ids, rejected_ids}, of kto {prompt_ids, completion_ids, label}. "rollout" holds the completions to replay.
    For reward and ppo there is scorer/ too: the model with the head that reward.py draws.
    """
    import torch

    import grpo
    import sft
    from common import data
    from common.engine import Sampling, TransformersEngine
    from common.models import load_policy, load_scorer, load_tokenizer
    from common.sharding import save_model
    from common.run import set_seed

    name = {
        "sft": "sft_prompt_completion_train", "reward": "hh_helpful_train", "dpo": "hh_helpful_train",
        "kto": "kto_hh_train",
    }.get(settings.what, "rg_chain_sum_train")
    default = Path(os.environ.get("POSTSCRIPTS_DATA", "data")) / f"{name}.jsonl.gz"
    tokenizer = load_tokenizer(settings.model_name_or_path)
    model = load_policy(settings.model_name_or_path, torch.float32, torch.device("cpu"))
    rows, items = data.load_rows(settings.dataset_name or str(default)), []
    if settings.what == "sft":
        examples = data.prepare(
            rows, lambda row: sft.encode_row(row, tokenizer, sft.Args()), sft.Args().max_length, "drop", data.Ledger(),
            on_empty="drop",
        )
        rows = [rows[example.row] for example in examples]
        for example in examples:
            ids = example.input_ids.tolist()
            labels = [token if trained else -100 for token, trained in zip(ids, example.loss_mask)]
            items.append({"input_ids": ids, "labels": labels})
    elif settings.samples:
        prompts = data.prepare_prompts(rows, tokenizer, grpo.Args().max_prompt_length, "drop", data.Ledger())
        rows = items = [{"prompt": rows[row]["prompt"], "prompt_ids": ids} for row, ids in prompts]
    else:
        sides = ["completion_ids"] if settings.what == "kto" else ["chosen_ids", "rejected_ids"]

        def encode(row: dict) -> tuple[list[int], list[list[int]]]:
            if settings.what != "kto":
                return data.encode_pair(row, tokenizer)
            completion = data.encode_completion(row["prompt"], row["completion"], tokenizer)
            return data.encode_prompt(row["prompt"], tokenizer), [completion]

        groups = data.prepare_completions(rows, encode, settings.max_length, "drop", data.Ledger(), on_empty="drop")
        rows = [rows[group[0].row] for group in groups]
        for row, group in zip(rows, groups):
            ids, length = [example.input_ids.tolist() for example in group], group[0].prompt_length
            item = {"prompt_ids": ids[0][:length]} | {side: whole[length:] for side, whole in zip(sides, ids)}
            items.append(item | ({"label": row["label"]} if settings.what == "kto" else {}))
    # SmolLM2 pads with what ends a turn
    held = {token for item in items for name, ids in item.items() if name.endswith("_ids") for token in ids}
    model.config.pad_token_id = max(set(tokenizer.added_tokens_decoder) - held)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(model.config.pad_token_id)
    # bf16, as checkpoints come: no side then begins with a rounding of the other's weights
    save_model(model.to(torch.bfloat16), tokenizer, folder / "model")
    if settings.what in ("reward", "ppo"):
        set_seed(settings.seed)  # as reward.py does before it draws the head
        scorer = load_scorer(str(folder / "model"), torch.float32, torch.device("cpu"))
        save_model(scorer, tokenizer, folder / "scorer")
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    prepared = {"rates": machine_rates()}
    for kind, part in (("timed", settings.of_leg("T0")), ("gate", settings.of_leg("TG"))):
        count = part.batch_size // part.group
        drawn = [data.draw(len(items), step * count, count, settings.seed) for step in range(part.steps)]
        prepared[kind] = [[items[i] for i in chosen] for chosen in drawn]
    if settings.samples:
        prompts = [row["prompt_ids"] for step in prepared["gate"] for row in step for _ in range(part.group)]
        longest = settings.completion_length
        completions = TransformersEngine(model).generate(prompts, list(range(len(prompts))), Sampling(longest))
        # Unequal lengths: of equal ones grpo's loss would be 0 whatever the model
        lengths = [longest if settings.what == "ppo" else longest // 4 + 5 * i % longest for i in range(len(prompts))]
        prepared["rollout"] = [c.token_ids[:length] for c, length in zip(completions, lengths)]
    return prepared


def machine_rates() -> dict[str, float]:
    """What one leg could reach at most here: matrix products in TFLOP/s, copies (read and write) in GB/s."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    side, source = 8192 if device == "cuda" else 1024, torch.ones(2**26, device=device)

    def best_seconds(work: Callable, *args) -> float:
        starts = []
        for _ in range(6):
            starts.append(time.perf_counter())
            work(*args).view(-1)[-1].item()  # waits for a GPU
        return min(after - before for before, after in pairwise(starts))

    rates = {"copy GB/s": 2 * source.nbytes / best_seconds(source.clone) / 1e9}
    for dtype in ("bfloat16", "float32"):
        square = torch.ones(side, side, device=device, dtype=getattr(torch, dtype))
        rates[f"matmul {dtype} TFLOP/s"] = 2 * side**3 / best_seconds(square.matmul, square) / 1e12
    return rates


def shared_flags(leg: str, settings: Settings) -> dict:
    """The flags that both sides call by one name."""
    flags = dict(
        seed=settings.seed, max_steps=settings.steps, lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0,
        adam_beta1=0.9, adam_beta2=0.95, adam_epsilon=1e-8, max_grad_norm=1.0, logging_steps=1,
    )
    if settings.what == "sft":
        return flags | dict(learning_rate=2e-5)
    if settings.what == "ppo":
        return flags | dict(learning_rate=1e-5, temperature=1.0, gamma=1.0, lam=0.95, vf_coef=0.1, cliprange_value=0.2)
    if settings.samples:
        return flags | dict(
            learning_rate=1e-5, num_generations=settings.group, max_completion_length=settings.completion_length,
            temperature=1.0, beta=0.0 if settings.what == "grpo" else 0.05,
        )
    flags["max_length"] = settings.max_length
    if settings.what == "reward":
        return flags | dict(learning_rate=1e-4)
    if settings.what == "kto":
        flags["loss_type"] = "apo_zero_unpaired" if leg in ("TG", "UG") else "kto"
    return flags | dict(learning_rate=1e-6, beta=0.1)


def run_leg(folder: Path, leg: str, settings: Settings, prepared_folder: Path) -> dict:
    """Trains one leg: its flags, losses, gradient norms and scores by step, its stamps, its memory before training."""
    prepared = json.loads((prepared_folder / "returned.json").read_text())
    kind, rollout = ("gate", prepared.get("rollout")) if leg in ("TG", "UG") else ("timed", None)
    make = trl_leg if leg.startswith("T") else our_leg
    flags, train = make(folder, leg, settings.of_leg(leg), prepared_folder, prepared[kind], rollout)
    stamps, baseline = start_stopwatch(), memory("VmRSS")
    logs = train()
    if settings.what == "ppo":  # two networks, two norms
        every, steps = 2 * settings.passes, settings.of_leg(leg).steps
        assert len(stamps) == every * steps, f"{len(stamps) / 2} optimiser steps in {steps} rollouts"
        stamps = stamps[every - 1 :: every]
    curves = {name: [log[name] for log in logs] for name in (*CURVES, "score") if name in logs[0]}
    return {"leg": leg, "flags": flags, "stamps": stamps, "baseline": baseline, **curves}


# ------------------------------------------------------------------------------------------------ the two sides


def our_leg(folder: Path, leg: str, settings: Settings, prepared: Path, steps: list[list[dict]], rollout: list | None):
    """Flags of the script, and a function that calls its main with them and reads the metrics it wrote."""
    from common.engine import Completion, TransformersEngine
    from common.rewards import RewardFunction

    script = importlib.import_module(settings.what)
    flags = shared_flags(leg, settings) | {"dtype": settings.dtype}
    if settings.samples:
        flags |= {"generation_batch_size": settings.batch_size, "log_completions_steps": 0}
    if settings.what == "ppo":
        flags |= {"max_steps": settings.steps * settings.passes, "num_iterations": settings.passes, "beta": 0.05}
        flags |= {"steps_per_generation": 1, "num_generations": settings.group, "max_grad_norm": 0.0}
        flags["max_completion_length"] = settings.completion_length
        scorer = (prepared / "scorer").relative_to(ROOT)
        flags |= {"missing_eos": "none", "reward_funcs": ["scorer"], "value_model": str(scorer)}
    elif settings.samples:
        flags |= {"num_iterations": 2 if rollout else 1, "reward_funcs": ["benchmark/compare_trl.py:hash_reward"]}
    else:
        flags["train_batch_size"] = settings.batch_size
    if settings.what == "reward":
        flags["normalize_split"] = "train[:1]"  # scored after the last step
    if leg == "U0":
        most, micro = max(count_tokens(step, settings)[0] for step in steps), min(8, settings.batch_size)
        flags |= {"gradient_checkpointing": True, "max_tokens_per_micro_batch": most * micro // settings.batch_size}
        flags |= {} if settings.what == "sft" else {"share_prompts": False}
    elif leg == "U1":
        flags["torch_compile"] = settings.torch_compile
    recorded = iter(rollout or [])

    class Replay(TransformersEngine):
        """Hands out the recorded completions instead of sampling."""

        def generate(self, prompts, seeds, sampling):
            return [Completion(ids, "length", [0.0] * len(ids)) for ids in islice(recorded, len(prompts))]

    def train() -> list[dict]:
        script.save_model = script.save_critic = lambda *_: None
        if settings.samples:
            script.stop_ids = lambda *_: ()  # nothing stops a completion before its full length
        if settings.what == "ppo":
            reward = reward_of_ids(scorer, settings.dtype)
            script.load_reward = lambda name, *_: RewardFunction(name, reward)
        if rollout:
            script.build_engine = lambda name, model, *_, **__: Replay(model)
            script.agreement = lambda *_: {"mean": 0.0}  # step one compares trainer and sampler, and here is no sampler
        model, rows = str(prepared / "model"), str(prepared / "train.jsonl")
        script.main(script.Args(output_dir=str(folder / "run"), model_name_or_path=model, dataset_name=rows, **flags))
        logs = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
        for log, step in zip(logs[:: settings.updates], steps if not rollout else []):
            seen = log["tokens/masked"] + log["tokens/trained"] if settings.samples else log["num_tokens"]
            assert seen == count_tokens(step, settings)[0], "the script trained on other tokens than TRL gets"
        if settings.what == "ppo":
            for log in logs:
                log["loss"] = log["loss/policy_avg"] + flags["vf_coef"] * log["loss/value_avg"]
                log["score"] = log["objective/scores"]
        return logs

    return flags, train


def reward_of_ids(folder: Path, dtype: str) -> Callable:
    """A reward model that reads the ids as they were sampled, as TRL's does; ours would close the text first."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from common.rewards import sequence_scores

    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=getattr(torch, dtype))
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    def reward(prompt_ids: list[list[int]], completion_ids: list[list[int]]) -> list[float]:
        return sequence_scores(model, [prompt + ids for prompt, ids in zip(prompt_ids, completion_ids)]).tolist()

    return reward


def trl_leg(folder: Path, leg: str, settings: Settings, prepared: Path, steps: list[list[dict]], rollout: list | None):
    """Flags of TRL's trainer, and a function that builds it, trains, and returns what it logged."""
    import torch
    import trl
    from datasets import Dataset
    from transformers import AttentionInterface

    whole, on_gpu = settings.batch_size, torch.cuda.is_available()
    tuned = whole if on_gpu else {"reward": 1, "dpo": 1, "kto": 2}.get(settings.what, whole)
    micro = min({"T0": 8, "T1": settings.tuned_micro_batch or tuned}.get(leg, whole), whole)
    flags = shared_flags(leg, settings) | {
        "bf16": settings.dtype == "bfloat16", "use_cpu": not on_gpu, "save_strategy": "no",
        "gradient_checkpointing": leg == "T0", "per_device_train_batch_size": micro, "report_to": "none",
        "gradient_accumulation_steps": whole // micro, "disable_tqdm": True,
    }
    if leg == "T1":
        flags["torch_compile"] = settings.torch_compile
    if settings.what == "ppo":
        return trl_ppo_leg(folder, leg, settings, prepared, steps, rollout, flags)
    if settings.samples:
        flags |= {"shuffle_dataset": False, "generation_kwargs": {"min_new_tokens": settings.completion_length}}
        flags["num_iterations"] = 2 if rollout else 1
    else:
        flags["train_sampling_strategy"] = "sequential"
    if settings.what == "sft" and leg == "T1":
        AttentionInterface.register("packed_for_trl", packed_attention_for_trl())
        flags |= {"padding_free": True, "max_length": None}
        flags["model_init_kwargs"] = {"attn_implementation": "packed_for_trl"}

    recorded = iter(rollout or [])
    prompts = iter([row.get("prompt_ids") for step in steps for row in step for _ in range(settings.group)])

    def replay(prompt_ids, *_, **__):
        assert prompt_ids == list(islice(prompts, len(prompt_ids))), "TRL has other prompts, or in another order"
        ids = list(islice(recorded, len(prompt_ids)))
        return ids if settings.what == "rloo" else (ids, None)

    def train() -> list[dict]:
        rows, options = [row for step in steps for row in step], {}
        trainer_class, config_class = (getattr(trl, TRL_NAMES[settings.what] + kind) for kind in ("Trainer", "Config"))
        if settings.samples:
            rows, options = [{"prompt": row["prompt"]} for row in rows], {"reward_funcs": hash_reward}
        elif settings.what == "reward":
            sides = ("chosen_ids", "rejected_ids")
            rows = [{side: row["prompt_ids"] + row[side] for side in sides} for row in rows]
        elif flags.get("loss_type") == "kto":
            parts = [rows[first : first + micro] for first in range(0, len(rows), micro)]
            rows = [
                row | {"KL_completion_ids": before["completion_ids"]}
                for part in parts for row, before in zip(part, [part[-1], *part])
            ]
        if settings.what in ("reward", "dpo", "kto"):
            trainer_class._prepare_dataset = lambda self, dataset, *_: dataset  # tokenised, and as it would be
        model = str(prepared / ("scorer" if settings.what == "reward" else "model"))
        config = config_class(output_dir=str(folder), **flags)
        trainer = trainer_class(model, args=config, train_dataset=Dataset.from_list(rows), **options)
        if rollout:
            trainer._generate_single_turn = replay
        trainer.train()
        return [log for log in trainer.state.log_history if "loss" in log]

    return flags, train


def trl_ppo_leg(
    folder: Path, leg: str, settings: Settings, prepared: Path, steps: list[list[dict]], rollout: list | None,
    flags: dict,
):
    """The same with the PPOTrainer of TRL 1.12.0."""
    import torch
    from accelerate.utils import convert_outputs_to_fp32
    from datasets import Dataset
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    flags |= {"total_episodes": settings.steps * settings.batch_size, "num_ppo_epochs": settings.passes}
    flags |= {"response_length": settings.completion_length, "num_sample_generations": 0, "kl_coef": 0.05}
    if settings.dtype == "bfloat16":
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    if leg == "T1" and settings.dtype == "bfloat16":
        for name in ("batch_generation", "forward", "get_reward"):
            in_autocast = torch.autocast(device, torch.bfloat16)(getattr(ppo_trainer, name))
            setattr(ppo_trainer, name, convert_outputs_to_fp32(in_autocast))

    recorded, pad = iter(rollout or []), AutoTokenizer.from_pretrained(prepared / "model").pad_token_id
    drawn = [row["prompt_ids"] for step in steps for row in step for _ in range(settings.group)]
    prompts = iter(drawn)

    def replay(model, queries, *_):
        ids = [query[query != pad].tolist() for query in queries]
        assert ids == list(islice(prompts, len(ids))), "TRL has other prompts, or in another order"
        whole = torch.cat([queries, torch.tensor(list(islice(recorded, len(ids))), device=queries.device)], dim=1)
        return whole, ppo_trainer.forward(model, whole, pad).logits[:, queries.shape[1] - 1 : -1]

    if rollout:
        ppo_trainer.batch_generation = replay
        ppo_trainer.masked_var = partial(ppo_trainer.masked_var, unbiased=False)

    def train() -> list[dict]:
        losses, norms = [], []
        options = {"dtype": torch.float32}  # the default of TRL's own script
        policy, reference = (AutoModelForCausalLM.from_pretrained(prepared / "model", **options) for _ in range(2))
        critic, scorer = (
            AutoModelForSequenceClassification.from_pretrained(prepared / "scorer", **options) for _ in range(2)
        )
        tokenizer = AutoTokenizer.from_pretrained(prepared / "model", padding_side="left")
        rows = Dataset.from_list([{"input_ids": ids} for ids in drawn])
        trainer = PPOTrainer(
            PPOConfig(output_dir=str(folder), **flags), tokenizer, policy, reference, scorer, rows, critic
        )
        in_order = DataLoader(rows, batch_size=settings.batch_size, collate_fn=trainer.data_collator)
        trainer.dataloader = trainer.accelerator.prepare(in_order)  # its own shuffles

        def backward(loss):
            losses.append(loss.item())
            type(trainer.accelerator).backward(trainer.accelerator, loss)

        def norm(*_):
            both = [torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf")) for model in (policy, critic)]
            norms.append([value.item() for value in both])

        trainer.accelerator.backward = backward
        trainer.optimizer.optimizer.register_step_pre_hook(norm)
        trainer.train()
        scores = [log["objective/scores"] for log in trainer.state.log_history if "objective/scores" in log]
        parts = flags["gradient_accumulation_steps"]
        return [
            {"loss": sum(losses[parts * i : parts * (i + 1)]) / parts, "grad_norm": of_policy,
             "critic_grad_norm": of_critic, "score": scores[i // settings.passes]}
            for i, (of_policy, of_critic) in enumerate(norms)
        ]

    return flags, train


def packed_attention_for_trl() -> Callable:
    """Our packed attention, told by TRL's padding-free collator where a sequence ends."""
    from common.models import packed_attention, segments

    known = {"cu": None, "segments": None}  # every layer of one forward pass is handed the same tensor

    def attend(module, query, key, value, attention_mask, cu_seq_lens_q=None, max_length_q=None, scaling=None, **_):
        if known["cu"] is not cu_seq_lens_q:
            lengths = cu_seq_lens_q.diff().tolist()
            batch = SimpleNamespace(
                input_ids_N=query, cu_seqlens=cu_seq_lens_q, lengths=lengths, max_length=max_length_q,
                prompts=[range(0)] * len(lengths),
            )
            known.update(cu=cu_seq_lens_q, segments=segments(batch, query.is_cuda and value.itemsize == 2))
        return packed_attention(module, query, key, value, None, scaling, known["segments"])

    return attend


# ------------------------------------------------------------------------------------------------ results


def seconds_of(run: dict, clock: str, warmup: int) -> list[float]:
    """Seconds of each timed step, from clip to clip."""
    times = [stamp[clock] for stamp in run["stamps"]]
    return [after - before for before, after in pairwise(times)][warmup - 1:]


def summarise(settings: Settings, runs: list[dict], steps: list[list[dict]], clock: str) -> dict[str, dict]:
    """Of each leg: useful tokens per second in every round, seconds of a step, peak memory."""
    tokens, summary = sum(count_tokens(step, settings)[0] for step in steps[settings.warmup:]), {}
    for leg in settings.legs:
        mine = [run for run in runs if run["leg"] == leg]
        rounds = [seconds_of(run, clock, settings.warmup) for run in mine]
        flat = sorted(second for seconds in rounds for second in seconds)
        summary[leg] = {
            "rates": [tokens / sum(seconds) for seconds in rounds], "rate": tokens * len(rounds) / sum(flat),
            "step_median": median(flat), "step_p90": flat[int(0.9 * len(flat))],
            "peak_gb": max(run["stamps"][-1]["memory"] - run["baseline"] for run in mine) / 1e9,
        }
    return summary


def ratios(summary: dict[str, dict]) -> dict[str, dict]:
    """Ours over TRL's; low and high pair the slowest round of one side with the fastest of the other."""
    pairs = [(summary[u], summary[t], f"{u}/{t}") for u in ("U1", "U0") for t in ("T0", "T1") if {u, t} <= set(summary)]
    return {
        name: {
            "speed": ours["rate"] / theirs["rate"], "low": min(ours["rates"]) / max(theirs["rates"]),
            "high": max(ours["rates"]) / min(theirs["rates"]), "memory": ours["peak_gb"] / theirs["peak_gb"],
        }
        for ours, theirs, name in pairs
    }


def differences(ours: dict, theirs: dict) -> dict[str, float]:
    """Largest relative difference over the steps; of values under 1 % of the largest (rloo, on policy) to that 1 %."""
    return {
        name: max(
            abs(a - b) / max(abs(b), 0.01 * max(map(abs, theirs[name])))
            for a, b in zip(ours[name], theirs[name], strict=True)
        )
        for name in CURVES if name in theirs
    }


def table(settings: Settings, result: dict) -> str:
    """The verdicts, the legs, and what they ran with, as Markdown."""
    clock, gate = result["clock"], result["gate"]
    per = f"useful tokens per {'CPU ' * (clock == 'cpu')}second"
    lines = [f"# {settings.what}.py beside TRL {result['versions']['trl']}: {result['hardware']}, {result['date']}", ""]
    if gate:
        verdict = "passed" if gate["passed"] else "FAILED"
        of_loss = " of apo_zero_unpaired, since the KL terms of kto differ by design" * (settings.what == "kto")
        steps, norms = "steps", f"the gradient norm {gate['grad_norm']:.1e} (2e-2)"
        if settings.what == "ppo":
            steps, norms = "rollouts", f"{norms}, the critic's {gate['critic_grad_norm']:.1e} (2e-2)"
        lines += [f"Gate, {gate['steps']} {steps} in {settings.gate_dtype}{of_loss}: **{verdict}**. The loss differs "
                  f"by {gate['loss']:.1e} at most (allowed 5e-3), {norms}.", ""]
    lines += [f"Prompts are {result['prompt_share']:.0%} of the useful tokens, of which a sequence has "
              f"{result['sequence_tokens']:.0f}.", ""]
    lines += [f"| ours / TRL | {per} | from, to | peak memory |", "|---|---|---|---|"]
    lines += [f"| {name} | **{r['speed']:.2f}x** | {r['low']:.2f}x, {r['high']:.2f}x | {r['memory']:.2f}x |"
              for name, r in result["ratios"].items()]
    lines += ["", f"| leg | {per} | by round | seconds of a step, median, 90 % | per wall second | peak memory, GB |",
              "|---|---|---|---|---|---|"]
    for leg in settings.legs:
        row, wall = result["summary"][clock][leg], result["summary"]["wall"][leg]["rate"]
        rounds, seconds = ", ".join(f"{rate:.0f}" for rate in row["rates"]), (row["step_median"], row["step_p90"])
        lines.append(f"| {leg} | {row['rate']:.0f} | {rounds} | {seconds[0]:.2f}, {seconds[1]:.2f} | {wall:.0f} "
                     f"| {row['peak_gb']:.2f} |")
    if settings.what == "ppo":
        scores = "; ".join(f"{leg} {score:.3f}" for leg, score in result["scores"].items())
        lines += ["", f"Every leg took {settings.passes} optimiser steps a rollout, counted. Score, mean over all of a "
                  f"leg's rollouts: {scores}."]
    each = "; ".join(f"{leg} {d['loss']:.1e}, {d['grad_norm']:.1e}" for leg, d in result["rounding"].items())
    if each:
        lines += ["", f"Timed legs ({settings.dtype}) against {settings.legs[0]}, loss, gradient norm: {each}."]
    named = result["versions"] | {name: f"{rate:.3g}" for name, rate in result["rates"].items()}
    setting = f"Commit {result['commit']}, seed {settings.seed}, {settings.threads} thread(s), load at the start "
    setting += ", ".join([f"{result['load_average']:.1f}", *(f"{name} {value}" for name, value in named.items())])
    lines += ["", f"    {result['command']}", "", setting, ""]
    lines += [f"- {leg}: " + ", ".join(f"{name}={value}" for name, value in sorted(flags.items()))
              for leg, flags in sorted(result["flags"].items())]
    return "\n".join(lines) + "\n"


def draw_curves(path: Path, what: str, runs: list[dict]) -> None:
    """Loss above gradient norm: the gate on the left, the timed legs on the right, ours thin on top of TRL's thick."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(10, 6), sharex="col", layout="constrained")
    labelled = set()
    for run in runs:
        leg, column = run["leg"], 0 if run["leg"] in ("TG", "UG") else 1
        style = {"linewidth": 1.2, "zorder": 3} if leg.startswith("U") else {"linewidth": 4, "alpha": 0.5}
        for axis, name in zip(axes[:, column], ("loss", "grad_norm")):
            label = None if leg in labelled else leg
            axis.plot(range(1, len(run[name]) + 1), run[name], color=COLOURS[leg], label=label, **style)
            axis.set_ylabel(name)
            axis.spines[["top", "right"]].set_visible(False)
        labelled.add(leg)
        axes[0, column].set_title("timed legs" if column else "gate")
        axes[0, column].legend(frameon=False)
        axes[1, column].set_xlabel("optimiser step")
    figure.suptitle(f"{what}.py (thin) on top of TRL (thick)")
    figure.savefig(path, dpi=150)


def machine() -> str:
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,clocks.sm,clocks.mem", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True).stdout.splitlines()[0]
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"{os.cpu_count()} cores of {model[1] if model else platform.machine()}"


def main(settings: Settings) -> None:
    settings, on_gpu = settings.of_leg(""), shutil.which("nvidia-smi") is not None
    threads = {} if on_gpu else {"OMP_NUM_THREADS": str(settings.threads), "MKL_NUM_THREADS": str(settings.threads)}
    os.environ.update(threads, HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True).stdout
    if settings.what == "ppo":
        sys.path.insert(0, last_trl_with_ppo())  # of the legs too
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "accelerate", "trl")}
    result = {
        "command": "python benchmark/compare_trl.py " + " ".join(sys.argv[1:]), "commit": commit.strip(),
        "date": datetime.date.today().isoformat(), "hardware": machine(), "load_average": os.getloadavg()[0],
        "versions": {"python": platform.python_version()} | versions,
        "clock": "wall" if on_gpu else "cpu", "settings": dataclasses.asdict(settings),
    }

    work, runs = WORK / settings.what, []
    prepared = in_process(prepare, work / "prepared", settings)
    gate = ["TG", "UG"] if settings.gate_steps else []
    for number, leg in enumerate(gate + list(settings.legs) * settings.rounds):
        run = in_process(run_leg, work / f"{number:02}_{leg}", leg, settings, work / "prepared")
        step = median(seconds_of(run, result["clock"], warmup=1))
        print(f"{leg}  loss {run['loss'][0]:.5f} -> {run['loss'][-1]:.5f}  {step:.2f} s a step", flush=True)
        runs.append(run)

    first = {run["leg"]: run for run in reversed(runs)}
    found = differences(first["UG"], first["TG"]) if gate else {}
    passed = all(difference < (5e-3 if name == "loss" else 2e-2) for name, difference in found.items())
    base, compared = first[settings.legs[0]], settings.what in ("sft", "reward", "dpo")  # else they see other things
    counts = [count_tokens(step, settings) for step in prepared["timed"][settings.warmup:]]
    tokens, of_prompts = (sum(column) for column in zip(*counts))
    sequences = len(counts) * settings.batch_size * (2 if settings.what in ("reward", "dpo") else 1)
    result |= {
        "prompt_share": of_prompts / tokens, "sequence_tokens": tokens / sequences,
        "rates": prepared["rates"], "flags": {leg: run["flags"] for leg, run in first.items()},
        "gate": found and found | {"passed": passed, "steps": settings.gate_steps},
        "scores": {
            leg: fmean(score for run in runs if run["leg"] == leg for score in run["score"])
            for leg in settings.legs if settings.what == "ppo"
        },
        "rounding": {leg: differences(first[leg], base) for leg in settings.legs[1:] if compared},
        "summary": {clock: summarise(settings, runs, prepared["timed"], clock) for clock in ("cpu", "wall")},
    }
    result["ratios"] = ratios(result["summary"][result["clock"]])
    result["runs"] = [{name: run[name] for name in ("leg", "stamps", "baseline")} for run in runs]

    slug = re.sub(r"[^a-z0-9]+", "-", result["hardware"].split(",")[0].lower()).strip("-")
    name = f"compare_trl_{settings.what}_{slug}_{result['date']}"
    output = Path(settings.output_dir or ROOT / "benchmark/results" / name)
    output.mkdir(parents=True, exist_ok=True)
    (output / "result.json").write_text(json.dumps(result, indent=1))
    with (output / "losses.jsonl").open("w") as file:
        for number, run in enumerate(runs):
            for step, (loss, norm) in enumerate(zip(run["loss"], run["grad_norm"]), 1):
                line = {"run": number, "leg": run["leg"], "step": step, "loss": loss, "grad_norm": norm}
                file.write(json.dumps(line) + "\n")
    draw_curves(output / "curves.png", settings.what, runs)
    (output / "table.md").write_text(table(settings, result))
    print((output / "table.md").read_text())
    sys.exit(not passed)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__, use_underscores=True))
