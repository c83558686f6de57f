"""Finished policies beside the model they started from: rewards against KL, wins, lengths, samples.

    python benchmark/judge.py runs/sft/final runs/ppo_beta*/final --gold common.toy:graded --proxy runs/reward/final
    python benchmark/judge.py START FINAL... --gold GOLD --proxy PROXY --dataset_name test.jsonl --out runs/judged

Every model, the first one included, writes one completion y at temperature 1 to each held-out prompt x, a prompt with
the same random numbers for all of them. Of those completions

    proxy, gold    what the reward trained on and a judge that no policy has seen think of them
    KL             log pi(y|x) - log pi_start(y|x), summed over the tokens of a completion; the mean may fall below 0
    win rate       how often gold is above that of the first model's completion for the same prompt; a tie is half a win

± is half a 95 % normal interval over prompts. The interval of a win rate is Wilson's, which takes a tie for half a win
and half a loss: too wide, if anything. A policy that is the first model writes what it wrote: KL 0, a win rate of 0.5.

A policy is called after its run: runs/ppo_beta0.05/final is ppo_beta0.05, one point of the line of ppo, and
ppo_beta0.05_seed1 one of a second line of the same colour; --beside adds what was judged before. The picture is
the frontier of the DPO paper (2305.18290, sec. 6.1), logarithmic above one nat. Against a proxy gold rises with the KL,
and then falls while the proxy still rises: over-optimisation, as in Gao et al. (2210.10760).

Writes judged.json, frontier.png and samples.md to --out, and a Markdown table to stdout. One process; no vLLM.
"""

import dataclasses
import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.data import Example, Ledger, collate, load_rows, pack, prepare_prompts, require_columns, segment_sum
from common.engine import Sampling, TransformersEngine, request_seed, stop_ids
from common.models import compute_dtype, layout_of, load_policy, load_tokenizer, score_tokens
from common.rewards import load_reward, score
from common.run import UserError, describe_environment, launch, require_at_least

# Okabe and Ito's colours, as in report.py; a marker for each, so that no colour is needed
SERIES = (
    ("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P"),
    ("#000000", "X"), ("#999999", "*"),
)  # fmt: skip


@dataclass
class Args:
    models: tyro.conf.Positional[list[str]] = field(default_factory=list)
    """The model that all policies started from, then the policies: folders, hub names or .gguf files."""
    gold: str = "common.toy:graded"
    """The judge, a reward as --reward_funcs of grpo.py takes it; a function also gets the column `finish_reasons`."""
    proxy: str = "runs/reward/final"
    """The reward that the policies were trained on."""
    dataset_name: str = "toy:sort"
    """Held-out prompts: column `prompt`, and whatever columns the rewards need."""
    dataset_split: str = "test"
    """Split, with an optional slice: "train[:1000]"."""
    num: int = 512
    """How many of the prompts, from the first."""
    max_prompt_length: int = 512
    """Longest prompt in tokens."""
    on_overlong: Literal["error", "drop"] = "error"
    """What to do with a prompt longer than max_prompt_length. It is never cut."""
    max_completion_length: int = 16
    """Longest completion, tokens; as in training."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Weights and compute; auto: bfloat16 on an accelerator, float32 on a CPU."""
    max_tokens_per_micro_batch: int = 16384
    """Tokens of one forward pass."""
    seed: int = 0
    """Of sampling."""
    num_samples: int = 8
    """Prompts in samples.md."""
    beside: list[str] = field(default_factory=list)
    """judged.json of other seeds, to draw in the same picture."""
    out: str = "runs/judged"
    """Folder of the results."""


# ---------------------------------------------------------------------------------------------------------------- math


def mean_and_ci95(values_B: torch.Tensor) -> tuple[float, float]:
    """Mean, and half of its 95 % normal interval (0 for one value)."""
    values = values_B.double()
    return values.mean().item(), 1.96 * values.std(correction=min(1, len(values) - 1)).item() / len(values) ** 0.5


def win_rate(gold_B: torch.Tensor, start_B: torch.Tensor) -> tuple[float, float, float]:
    """Share of prompts where gold is above the start's, ties half, with the ends of Wilson's 95 % interval."""
    share, count, z2 = ((gold_B - start_B).sign().double().mean().item() + 1) / 2, len(gold_B), 1.96**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    reach = (z2 * (share * (1 - share) / count + z2 / (4 * count**2))) ** 0.5 / (1 + z2 / count)
    return share, centre - reach, centre + reach


@torch.no_grad()
def sequence_logprobs(model, examples: list[Example], max_tokens: int) -> torch.Tensor:
    """log p(completion | prompt) [B], float64, summed over its tokens."""
    total_B = torch.zeros(len(examples), dtype=torch.float64)
    layout = layout_of(model)
    for indices in pack(examples, max_tokens, 1, layout)[0]:
        batch = collate(examples, indices, model.device, layout)
        total_B[indices] = segment_sum(score_tokens(model, batch).logprobs_N.double(), batch).cpu()
    return total_B


# --------------------------------------------------------------------------------------------------------------- names


def label_of(model: str) -> str:
    """runs/x/ppo_beta0.05/final: ppo_beta0.05. A hub name or a file: its last part."""
    path = Path(model)
    return path.parent.name if path.name == "final" and path.parent.name else re.sub(r"\.gguf$", "", path.name)


def method_of(label: str) -> tuple[str, float | None, str]:
    """ppo_beta0.05_seed1: ppo, 0.05, _seed1. What is not there is None or empty."""
    name, beta, seed = re.fullmatch(r"(.+?)(?:_beta(\d[\d.]*(?:e-?\d+)?))?(_seed\d+)?", label).groups()
    return name, None if beta is None else float(beta), seed or ""


# -------------------------------------------------------------------------------------------------------------- report


def table(judged: list[dict]) -> str:
    """Markdown, a row for each policy, the model that they started from above."""
    lines = [
        "| | KL | proxy | gold | wins over the start | length | stopped |",
        "|---|---|---|---|---|---|---|",
    ]
    for place, one in enumerate(judged):
        numbers = ["{:.3f} ± {:.3f}".format(one[name], one[f"{name}_ci95"]) for name in ("kl", "proxy", "gold")]
        wins = "{:.3f} ({:.3f} to {:.3f})".format(one["win_rate"], *one["win_rate_ci95"])
        cells = [one["label"], *(numbers if place else ["–", *numbers[1:]]), wins if place else "–"]
        lines.append("| " + " | ".join([*cells, f"{one['mean_length']:.1f}", f"{one['stopped']:.2f}"]) + " |")
    return "\n".join(lines)


def draw(judged: list[dict], others: list[list[dict]], path: Path) -> None:
    """Gold and proxy against KL; a colour for each method, a line through its betas."""
    plt.rcParams.update({"font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False})
    figure, panels = plt.subplots(1, 2, figsize=(9.6, 4.2), layout="constrained")
    policies = [one for run in (judged, *others) for one in run[1:]]
    styles = dict(zip(dict.fromkeys(method_of(one["label"])[0] for one in policies), SERIES * len(policies)))
    for axes, name, title in zip(panels, ("gold", "proxy"), ("gold: the judge", "proxy: what was trained on")):
        start = float(np.mean([run[0][name] for run in (judged, *others)]))
        axes.axhline(start, color="0.75", linewidth=0.8, zorder=0)
        axes.plot(0, start, "*", color="0.4", markersize=11, label="start", clip_on=False)
        for method, (colour, marker) in styles.items():
            label, seeds = method, dict.fromkeys(method_of(one["label"])[2] for one in policies)
            for seed in seeds:
                line = [one for one in policies if method_of(one["label"])[::2] == (method, seed)]
                line.sort(key=lambda one: method_of(one["label"])[1] or 0.0)
                kl, value = [max(0.0, one["kl"]) for one in line], [one[name] for one in line]  # noise may be below 0
                axes.errorbar(
                    kl, value, [one[f"{name}_ci95"] for one in line], color=colour, marker=marker, markersize=5,
                    linewidth=1.3, elinewidth=0.7, label=label, clip_on=False,
                )
                for place, (x, y, one) in enumerate(zip(kl, value, line)):
                    beta = method_of(one["label"])[1]
                    if beta is not None and label is not None:  # of the first seed only
                        shift = (5, 4) if place % 2 else (5, -11)
                        axes.annotate(f"β {beta:g}", (x, y), shift, textcoords="offset points", fontsize=8)
                label = None
        axes.set_xscale("symlog", linthresh=1)
        axes.set_xlim(0, 1.6 * max([one["kl"] for one in policies] + [0.1]))  # room for the last label
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set(title=title, xlabel="KL to the start, nats a completion (logarithmic above 1)", ylabel="mean reward")
        axes.grid(color="0.93", linewidth=0.6)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def samples(judged: list[dict], prompts: list, texts: list[list[str]], golds: list[torch.Tensor]) -> str:
    """Markdown: under each prompt what every model wrote, and its gold reward."""
    parts = ["# Samples\n\nWhat models wrote, at temperature 1; nobody chose or checked it."]
    for p, prompt in enumerate(prompts):
        turns = [prompt] if isinstance(prompt, str) else [f"{turn['role']}: {turn['content']}" for turn in prompt]
        shown = "\n".join(f"> {cell(turn)}  " for turn in turns)  # two spaces: a line break
        rows = [
            f"| {one['label']} | {gold_B[p]:.3f} | {cell(text[p])} |" for one, text, gold_B in zip(judged, texts, golds)
        ]
        parts.append("\n".join([shown, "", "| | gold | |", "|---|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def cell(text: str) -> str:
    """A text in one line that no renderer takes for markup."""
    return re.sub(r"([\\`*_|<>#\[\]])", r"\\\1", text.strip()).replace("\n", "⏎")


def main(args: Args) -> None:
    # ------------------------------------------------------------------------------------------------------ 1. setup
    require_at_least(1, args, "num", "max_completion_length", "max_prompt_length", "max_tokens_per_micro_batch")
    if len(args.models) < 2:
        raise UserError("give the model that the policies started from and at least one policy, in that order")
    labels = [label_of(model) for model in args.models]
    if len({*labels}) < len(labels):
        raise UserError(f"two of the models have the same name, and a picture needs to tell them apart: {labels}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = compute_dtype(args.dtype, device)

    # --------------------------------------------------------------------------------------------- 2. prompts, judges
    rows = load_rows(args.dataset_name, args.dataset_split)
    require_columns(rows, ("prompt",))
    tokenizer = load_tokenizer(args.models[0])
    prompts = prepare_prompts(rows, tokenizer, args.max_prompt_length, args.on_overlong, Ledger())[: args.num]
    if not prompts:
        raise UserError(f"{rows.name}: no prompt is as short as --max_prompt_length {args.max_prompt_length}: raise it")
    held_out, ids = [rows[row] for row, _ in prompts], [ids for _, ids in prompts]
    seeds = [request_seed(args.seed, -1, p, 0) for p in range(len(ids))]
    judges = [load_reward(args.gold, device), load_reward(args.proxy, device)]
    start = load_policy(args.models[0], dtype, device)

    # -------------------------------------------------------------------------------------------------- 3. each model
    judged, texts, golds = [], [], []
    for model, label in zip(args.models, labels):
        if load_tokenizer(model).get_vocab() != tokenizer.get_vocab():
            raise UserError(f"{model} has another vocabulary than {args.models[0]}: their tokens cannot be compared")
        policy = load_policy(model, dtype, device) if judged else start
        stops = stop_ids(tokenizer, policy.generation_config.eos_token_id)
        sampling = Sampling(args.max_completion_length, temperature=1.0, stop_token_ids=stops)
        completions = TransformersEngine(policy).generate(ids, seeds, sampling)

        examples = [
            Example(prompt + one.token_ids, [False] * len(prompt) + [True] * len(one.token_ids), p, len(prompt))
            for p, (prompt, one) in enumerate(zip(ids, completions))
        ]
        kl_B = sequence_logprobs(policy, examples, args.max_tokens_per_micro_batch)
        kl_B -= sequence_logprobs(start, examples, args.max_tokens_per_micro_batch)

        texts.append([tokenizer.decode(one.token_ids, skip_special_tokens=True) for one in completions])
        columns = {name: [row.get(name) for row in held_out] for name in held_out[0] if name != "prompt"}
        columns["finish_reasons"] = [one.finish_reason for one in completions]
        reward_BF = score(
            judges, [row["prompt"] for row in held_out], texts[-1], columns, [one.token_ids for one in completions]
        )
        if reward_BF.isnan().any():
            raise UserError(f"{args.gold} or {args.proxy} left a completion of {label} unscored: no judge may")
        golds.append(reward_BF[:, 0])

        gold, proxy, kl, wins = *map(mean_and_ci95, (*reward_BF.T, kl_B)), win_rate(golds[-1], golds[0])
        judged.append({
            "label": label, "model": model, "kl": kl[0], "kl_ci95": kl[1], "proxy": proxy[0], "proxy_ci95": proxy[1],
            "gold": gold[0], "gold_ci95": gold[1], "win_rate": wins[0], "win_rate_ci95": wins[1:],
            "mean_length": sum(len(one.token_ids) for one in completions) / len(completions),
            "stopped": sum(one.finish_reason == "stop" for one in completions) / len(completions),
        })
        print(f"{label}: KL {kl[0]:.3f}, proxy {proxy[0]:.3f}, gold {gold[0]:.3f}", file=sys.stderr)

    # ------------------------------------------------------------------------------------------------------ 4. report
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    environment = describe_environment(Path(__file__).parent, args.seed)
    result = {"policies": judged, "prompts": len(ids), "settings": dataclasses.asdict(args), "environment": environment}
    (out / "judged.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    shown = [row["prompt"] for row in held_out[: args.num_samples]]
    (out / "samples.md").write_text(samples(judged, shown, texts, golds), encoding="utf-8")
    draw(judged, [json.loads(Path(path).read_text())["policies"] for path in args.beside], out / "frontier.png")
    print(table(judged))


if __name__ == "__main__":
    launch(main, Args)
