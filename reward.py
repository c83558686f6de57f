"""Reward modelling: give every reply one number, so that the replies people preferred get the higher ones.

For the scores r_w, r_l of the chosen and the rejected reply to a prompt, or the score r of a reply that was rated s,

    pairs    loss = mean over pairs of  - log sigmoid(r_w - r_l - m) + eta (r_w + r_l)^2               Bradley and Terry
    ratings  loss = mean over replies of  (r - s)^2

with m the pair's `margin` (Llama 2, 2307.09288, sec. 3.2.2; 0 without that column) and eta, which keeps scores near 0,
`--center_rewards_coefficient` (Eisenstein et al., 2312.09244, Eq. 2). The columns decide: `chosen` + `rejected` make
pairs, `prompt` + `completion` + `score` ratings.

Departures from what is usual
  1. The mean is over the whole optimiser step, all ranks and micro-batches. Nothing is padded (common/data.py), and the
     prompt of a pair is computed once. How the step is cut changes no result.
  2. A score is read at the last token of a reply, found by its length. Transformers looks for the last token that is
     not padding, and reads one too early where padding and the end of a text are the same token. So the saved folder
     gets a padding token that ends no text.
  3. The head has no bias and is drawn from N(0, 1 / (d + 1)), d the hidden size, as in 2403.17031; scores are fp32.
  4. After training the scores of reference answers (--normalize_dataset_name) set reward_mean and reward_std in the
     saved config. common/rewards.py takes them off, so references score 0 on average, with a deviation of 1; for the
     stock class, whose head has no bias, this is what a bias was in 2009.01325. Metrics here are of raw scores.
  5. Accuracy counts a pair above zero, r_w > r_l, as right, and a tie as half right.
  6. The learning rate defaults to 1e-5, to 1e-4 under LoRA, and to 5e-4 for the toy. TRL's 1e-4 for all weights is
     aggressive: 2403.17031 took 3e-6 for one to seven billion parameters.

Dimension key: P prompts, each with one pair or one rated reply; B replies, of a pair first the chosen one.

    python sft.py && python reward.py                                      # the toy: 2 CPU cores, no network, seconds
    python reward.py --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct --dataset_name train.jsonl
    torchrun --nproc_per_node 8 reward.py --model_name_or_path ... --dataset_name ...
    python grpo.py --reward_funcs runs/reward/final                        # reinforce what it likes

What you should see: a loss from about 0.7 (log 2 is that of a head without an opinion) and an accuracy from about a
half. The toy ends near eval/test/accuracy 0.90, eval/test/ece 0.03; its labels are noisy, 0.95 would be perfect.
"""

import math
import numbers
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from rich.table import Table
from transformers import get_scheduler

from common.data import (
    Example, Layout, Ledger, Rows, collate, draw, encode_completion, encode_pair, encode_prompt, load_rows, pack,
    prepare_completions, require_columns,
)
from common.engine import stop_ids
from common.models import (
    add_lora, base_model, compute_dtype, layout_of, load_scorer, load_tokenizer, score_ends, speed_up,
)
from common.run import (
    Run, UserError, launch, random_state, require_at_least, restore_random_state, set_seed, show_batch,
)
from common.sharding import (
    clip_gradients, describe, join_ranks, make_optimizer, save_model, shard, sum_over_ranks,
    trained_weights, weight_sum,
)

PAIRS, RATINGS, REFERENCES = ("chosen", "rejected"), ("prompt", "completion", "score"), ("prompt", "completion")


@dataclass
class Args:
    # Run
    output_dir: str = "runs/reward"
    """Folder of this run: config.yaml, metrics.jsonl, clock.jsonl, checkpoints/, final/ and reliability plots."""
    seed: int = 0
    """Of data order and of the fresh head."""
    resume: bool = False
    """Continue the run in output_dir from its newest whole checkpoint; it ends bit-identical to one never stopped."""
    save_steps: int = 0
    """Checkpoint every so many optimiser steps (0: only the final model)."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints to keep (0: all)."""
    logging_steps: int = 10
    """Log every so many optimiser steps."""
    report_to: list[Literal["wandb", "tensorboard"]] = field(default_factory=list)
    """Trackers that mirror metrics.jsonl."""
    push_to_hub: bool = False
    """Upload final/ with its model card to the Hugging Face hub at the end (`hf auth login` or HF_TOKEN)."""
    hub_model_id: str = ""
    """Its name there, "owner/name" or "name" ("": that of the run folder)."""
    hub_private_repo: bool = False
    """Make a new repository private (else it is public, unless the owner's settings say otherwise)."""
    inspect: bool = False
    """Print the first micro-batch, tokens coloured by role, and exit."""
    ddp_timeout: float = 1800.0
    """Seconds that a rank waits for the others before it takes one for dead, and the run stops."""

    # Model
    model_name_or_path: str = "runs/sft/final"
    """Folder, hub name, .gguf file of a causal language model, whose body is used, or "toy"."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Weights and compute; auto: bfloat16 (over fp32 masters) on an accelerator, float32 on a CPU."""
    chat_template: str | None = None
    """A Jinja file (or text) to use instead of the tokenizer's own chat template."""
    trust_remote_code: bool = False
    """Run model code that comes with the weights."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: a third more compute, far less memory."""
    torch_compile: bool = False
    """Compile each layer once: slower start, faster steps."""
    use_peft: bool = False
    """Train a LoRA adapter and the head instead of all weights; final/ has it merged, adapter/ apart."""
    lora_r: int = 16
    """Rank of the adapter."""
    lora_alpha: int = 32
    """Scale of the adapter: alpha / r, or alpha / sqrt(r) with use_rslora."""
    lora_target_modules: list[str] = field(default_factory=list)
    """Names of the layers to adapt (empty: every linear layer but the output head)."""
    use_rslora: bool = False
    """Rank-stabilised LoRA."""
    use_dora: bool = False
    """Weight-decomposed LoRA."""

    # Data
    dataset_name: str = "toy:sort_pairs"
    """Hub name, local .jsonl[.gz] / .json / .parquet / .csv / folder, or "toy:sort_pairs". Columns: `chosen` +
    `rejected`, optionally `prompt` and `margin`; or `prompt` + `completion` + `score`; optionally `source`, `tools`."""
    dataset_split: str = "train"
    """Split, with an optional slice: "train[:1000]"."""
    eval_dataset_name: str | None = None
    """Held-out data of the same shape (None: the toy's own; for other data no evaluation)."""
    eval_splits: list[str] = field(default_factory=lambda: ["test"])
    """Splits of the evaluation data, each evaluated by itself."""
    max_length: int | None = 1024
    """Longest sequence in tokens (None: no limit)."""
    on_overlong: Literal["error", "drop", "truncate"] = "error"
    """What to do with a row longer than max_length; truncate: the score is read where the reply was cut."""
    on_empty: Literal["error", "drop"] = "error"
    """What to do with a row that has nothing to compare: an empty reply, or two that are equal."""
    share_prompts: bool = True
    """Compute the prompt of a pair once per micro-batch, where the model allows it; it changes no result."""
    normalize_dataset_name: str | None = None
    """Reference answers, which are to score 0 on average: rows of `prompt` + `completion`, or of pairs, whose chosen
    replies are taken (None: the training data)."""
    normalize_split: str = "train[:512]"
    """Split of the reference answers."""

    # Optimisation
    learning_rate: float | None = None
    """Peak learning rate (None: 1e-5; 1e-4 with use_peft; 5e-4 for the toy)."""
    train_batch_size: int = 64
    """Pairs, or rated replies, per optimiser step, over all ranks."""
    max_tokens_per_micro_batch: int = 16384
    """Tokens of one forward and backward pass: the memory knob. It changes no result."""
    num_train_epochs: float = 1.0
    """Passes over the data; in a second one a reward model overfits."""
    max_steps: int = -1
    """Optimiser steps; if positive it overrides num_train_epochs."""
    lr_scheduler_type: Literal[
        "linear", "cosine", "constant", "constant_with_warmup", "cosine_with_restarts", "polynomial", "inverse_sqrt"
    ] = "cosine"
    """How the learning rate goes on after warm-up (transformers.get_scheduler)."""
    warmup_steps: float = 0.1
    """Warm-up in steps, or below 1 as a share of all steps."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    adam_beta1: float = 0.9
    """AdamW's first-moment decay."""
    adam_beta2: float = 0.95
    """AdamW's second-moment decay."""
    adam_epsilon: float = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: float = 1.0
    """Clip the gradient of a step to this norm (0: no clipping)."""
    center_rewards_coefficient: float | None = None
    """Weight eta of the term that keeps the scores of a pair near 0 (None: off; 0.01 in the paper)."""

    # Evaluation
    eval_steps: int = 0
    """Evaluate every so many steps (0: only before training and at the end)."""
    metric_for_best_model: str = ""
    """Keep the model that is best by this number, named as in metrics.jsonl, in best/ ("": off), as whole as final/:
    an adapter merged, reward_mean and reward_std its own."""
    greater_is_better: bool | None = None
    """Whether more of it is better (None: no if its name ends in "loss", else yes)."""
    max_eval_samples: int = 512
    """Rows of each evaluation split that are used."""


# ---------------------------------------------------------------------------------------------------------------- math


def bradley_terry_loss(
    score_B: torch.Tensor, margin_P: torch.Tensor, center_rewards_coefficient: float | None
) -> torch.Tensor:
    """Loss of each pair [P]."""
    chosen_P, rejected_P = score_B[0::2], score_B[1::2]
    loss_P = -F.logsigmoid(chosen_P - rejected_P - margin_P)
    if center_rewards_coefficient is not None:
        loss_P = loss_P + center_rewards_coefficient * (chosen_P + rejected_P) ** 2
    return loss_P


def rating_loss(score_P: torch.Tensor, rating_P: torch.Tensor) -> torch.Tensor:
    """Squared error of each rated reply [P]."""
    return (score_P - rating_P) ** 2


def rewards_of(model, examples: list[Example], micro: list[int], layout: Layout) -> torch.Tensor:
    """Scores [B], fp32, of the examples in `micro`: in one packed row, or one by one where the model cannot pack."""
    rows = [[i] for i in micro] if layout == "single" and micro else [micro]
    scores = [score_ends(model, collate(examples, row, model.device, layout)) for row in rows]
    return torch.cat(scores)[: len(micro)]  # an idle rank runs a stand-in, and has no score


def score_metrics(score_B: torch.Tensor, target_P: torch.Tensor, loss_of) -> dict[str, torch.Tensor]:
    """What is logged of the replies of a step or of an evaluation, under TRL's names."""
    metrics = {"loss": loss_of(score_B, target_P).mean()}
    if len(score_B) == 2 * len(target_P):
        gap_P = score_B[0::2] - score_B[1::2]
        metrics |= {"accuracy": accuracy_of(gap_P).mean(), "margin": gap_P.mean()}
    return metrics | {"mean_reward": score_B.mean(), "min_reward": score_B.min(), "max_reward": score_B.max()}


def accuracy_of(gap_P: torch.Tensor) -> torch.Tensor:
    """1 where the chosen reply scores higher, 1/2 at a tie, else 0."""
    return (gap_P.sign() + 1) / 2


# ---------------------------------------------------------------------------------------------------------------- data


@dataclass
class RewardData:
    """What there is to score in one split."""

    rows: Rows
    columns: tuple[str, ...]  # PAIRS, RATINGS or REFERENCES: what it is
    groups: list[list[Example]]  # of each prompt the chosen and the rejected reply, or the only one
    target_P: torch.Tensor  # margin of each pair, rating of each rated reply, else 0
    sources: tuple[str, ...]  # of each prompt, if the rows say


def load_replies(
    name: str, split: str, accepted: list[tuple[str, ...]], tokenizer, args: Args, run: Run, limit: int | None = None
) -> RewardData:
    """Rows that have one of these sets of columns -> replies as token ids; prints where every token went.

    Raises:
        UserError: a row that cannot be compared or has no number where one is needed, or none that is left.
    """
    rows = load_rows(name, split)
    columns = require_columns(rows, *accepted)
    number = {PAIRS: "margin", RATINGS: "score"}.get(columns)
    number = number if number in rows.columns else None

    def encode_replies(row: dict) -> tuple[list[int], list[list[int]]]:
        number_in(row, number)
        if columns == PAIRS:
            return encode_pair(row, tokenizer)
        options = {"tools": row.get("tools"), "chat_template_kwargs": row.get("chat_template_kwargs")}
        completion = encode_completion(row["prompt"], row["completion"], tokenizer, **options)
        return encode_prompt(row["prompt"], tokenizer, **options), [completion]

    ledger = Ledger()
    groups = prepare_completions(rows, encode_replies, args.max_length, args.on_overlong, ledger, args.on_empty)[:limit]
    if not groups:
        raise UserError(f"{rows.name} ({split}): every row was dropped ({ledger}): raise --max_length or mend the data")
    kept = (rows[group[0].row] for group in groups)
    targets, sources = zip(*((number_in(row, number), str(row.get("source"))) for row in kept))
    run.print(f"{split}  {rows.name}, {' + '.join(columns + (number,) * (number == 'margin'))}: {ledger}")
    return RewardData(rows, columns, groups, torch.tensor(targets), sources if "source" in rows.columns else ())


def number_in(row: dict, column: str | None) -> float:
    """The row's margin or score, 0 for no column; UserError unless it is a finite number."""
    value = 0.0 if column is None else row.get(column)
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise UserError(f"{column} is {value!r:.60}, and must be a finite number")
    return float(value)


def padding_token(tokenizer, stops: set[int]) -> int | None:
    """A token to pad with that ends no text, for transformers takes the last token that is not padding for the end.

    None if all special tokens do end texts (GPT-2): transformers then reads the last of one sequence, and no batch.
    """
    special = [i for i, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]
    usual = [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id]
    return next((i for i in usual + special if i is not None and i not in stops), None)


# ---------------------------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def score_all(model, groups: list[list[Example]], layout: Layout, max_tokens: int) -> torch.Tensor:
    """Scores [B] of all replies in order, float64 on the CPU."""
    examples = [example for group in groups for example in group]
    score_B = torch.empty(len(examples), dtype=torch.float64)
    for micro in pack(examples, max_tokens, 1, layout, together=len(groups[0]))[0]:
        score_B[micro] = rewards_of(model, examples, micro, layout).double().cpu()
    return score_B


def evaluate_reward(
    model, replies: RewardData, split: str, layout: Layout, loss_of, run: Run, args: Args, step: int
) -> dict[str, float]:
    """Logs, prints, returns scores of held-out replies; of pairs how often, where, how confidently they are in order.

    Confidence of a pair is sigmoid(|r_w - r_l|), how often the model itself expects to be right; `ece` is how far it is
    off. accuracy_ci95 is half of a normal 95 % interval. Length is that of the reply in tokens.
    """
    score_B = score_all(model, replies.groups, layout, args.max_tokens_per_micro_batch)
    length_B = torch.tensor([len(e.input_ids) - e.prompt_length for group in replies.groups for e in group]).double()
    target_P = replies.target_P.double()
    metrics = score_metrics(score_B, target_P, loss_of) | {"length_correlation": pearson(score_B, length_B)}
    if replies.columns == RATINGS:
        metrics["mse"] = metrics.pop("loss")
        metrics["pearson"] = pearson(score_B, target_P)
        metrics["spearman"] = pearson(rank_of(score_B), rank_of(target_P))
    else:
        gap_P = score_B[0::2] - score_B[1::2]
        right_P, confidence_P = accuracy_of(gap_P), gap_P.abs().sigmoid()
        metrics["accuracy_ci95"] = 1.96 * right_P.std(correction=0) / len(gap_P) ** 0.5
        metrics["ece"] = calibration(confidence_P, right_P)[0]
        table = Table("pairs of which", "number", "accuracy", "confidence")
        for name, part in parts_of(gap_P, length_B[0::2] - length_B[1::2], replies.sources).items():
            metrics[f"accuracy/{name}"] = right_P[part].mean()
            table.add_row(name, str(len(part)), f"{right_P[part].mean():.3f}", f"{confidence_P[part].mean():.3f}")
        run.print(table)
        if run.writes:
            plot_reliability(confidence_P, right_P, run.folder / f"reliability_{split}.png")
    shown = "  ".join(f"{name} {value:.3f}" for name, value in metrics.items() if not name.startswith("accuracy/"))
    run.print(f"{split} after step {step}: {shown}")
    metrics = {f"eval/{split}/{name}": value for name, value in metrics.items()}
    run.log(step, metrics)
    return metrics


def parts_of(gap_P: torch.Tensor, longer_P: torch.Tensor, sources: Sequence[str]) -> dict[str, torch.Tensor]:
    """Groups of pairs, by their places: fifths by |gap|, smallest first; by which reply is longer; by source."""
    by_gap = gap_P.abs().argsort(stable=True).tensor_split(5)
    parts = {f"margin_quintile_{number}": part for number, part in enumerate(by_gap, start=1)}
    for name, sign in (("longer", 1), ("shorter", -1), ("equally_long", 0)):
        parts[f"chosen_{name}"] = (longer_P.sign() == sign).nonzero()[:, 0]
    for name in sorted(set(sources)):
        parts[f"source/{name}"] = torch.tensor([place for place, source in enumerate(sources) if source == name])
    return {name: part for name, part in parts.items() if len(part)}


def calibration(confidence_P: torch.Tensor, right_P: torch.Tensor, bins: int = 10) -> tuple[torch.Tensor, ...]:
    """Expected calibration error, and of equal bins between 1/2 and 1 number, confidence and accuracy (nan: empty)."""
    bin_P = ((confidence_P - 0.5) * 2 * bins).long().clamp(0, bins - 1)
    number, confidence, accuracy = (
        torch.bincount(bin_P, weights, bins).double() for weights in (torch.ones_like(right_P), confidence_P, right_P)
    )
    return (accuracy - confidence).abs().sum() / number.sum(), number, confidence / number, accuracy / number


def plot_reliability(confidence_P: torch.Tensor, right_P: torch.Tensor, path) -> None:
    """Accuracy against confidence, bin by bin; on the diagonal the model is as often right as it says."""
    from matplotlib.figure import Figure

    error, number, confidence, accuracy = calibration(confidence_P, right_P)
    figure = Figure(figsize=(4, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([0.5, 1], [0.5, 1], color="grey", linestyle="--", linewidth=1)
    axes.plot(confidence, accuracy, color="tab:blue", linewidth=1)
    axes.scatter(confidence, accuracy, s=(400 * number / number.sum()).tolist(), color="tab:blue", alpha=0.6)
    axes.set(
        xlabel="confidence: sigmoid(|difference of scores|)", ylabel="accuracy", xlim=(0.48, 1.02), ylim=(-0.05, 1.05),
        title=f"{len(right_P)} pairs, accuracy {right_P.mean():.3f}, ECE {error:.3f}",
    )
    figure.savefig(path, dpi=150)


def pearson(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Correlation; nan when one of the two never changes."""
    x, y = x - x.mean(), y - y.mean()
    return (x @ y) / (x.norm() * y.norm())


def rank_of(x: torch.Tensor) -> torch.Tensor:
    """Rank of each value, from 1, equal values sharing their mean rank: its correlation is Spearman's."""
    _, place, number = x.unique(return_inverse=True, return_counts=True)
    return (number.cumsum(0) - (number - 1) / 2)[place].to(x.dtype)


def normalisation(score_B: torch.Tensor) -> tuple[float, float]:
    """Mean and standard deviation of reference scores; 1 for scores that are equal but for rounding."""
    std = score_B.std(correction=0).item()
    return score_B.mean().item(), std if std > 1e-5 else 1.0


def main(args: Args) -> None:
    # ------------------------------------------------------------------------------------------------------ 1. setup
    require_at_least(
        1, args, "train_batch_size", "max_tokens_per_micro_batch", "logging_steps", "max_eval_samples"
    )
    require_at_least(0, args, "max_grad_norm", "warmup_steps", "weight_decay")
    if (args.center_rewards_coefficient or 0.0) < 0:
        raise UserError(f"--center_rewards_coefficient is at least 0, not {args.center_rewards_coefficient:g}")
    ranks = join_ranks(args.ddp_timeout)
    device = ranks.device
    run = Run(args, __file__, ranks.is_main_process)
    set_seed(args.seed)

    # ------------------------------------------------------------------------------------------------------- 2. data
    tokenizer = load_tokenizer(args.model_name_or_path, args.chat_template, args.trust_remote_code)
    train = load_replies(args.dataset_name, args.dataset_split, [PAIRS, RATINGS], tokenizer, args, run)
    if train.columns == RATINGS and train.target_P.min() == train.target_P.max():
        name, value = train.rows.name, train.target_P[0]
        raise UserError(f"{name}: every score is {value:g}, so there is nothing to learn from them")
    if train.columns == PAIRS:
        loss_of = partial(bradley_terry_loss, center_rewards_coefficient=args.center_rewards_coefficient)
        run.print("pairs: Bradley-Terry loss, the chosen reply over the rejected one")
    else:
        loss_of = rating_loss
        run.print(f"ratings: squared error against `score`, {train.target_P.min():g} to {train.target_P.max():g}")
    is_toy = args.dataset_name.startswith("toy:")
    eval_name = args.eval_dataset_name or (args.dataset_name if is_toy else None)
    held_out = {
        split: load_replies(eval_name, split, [train.columns], tokenizer, args, run, args.max_eval_samples)
        for split in (args.eval_splits if eval_name is not None else [])
    }
    reference_name = args.normalize_dataset_name or args.dataset_name
    references = load_replies(reference_name, args.normalize_split, [PAIRS, REFERENCES], tokenizer, args, run)

    # ------------------------------------------------------------------------------------------------------ 3. model
    model = load_scorer(
        args.model_name_or_path, compute_dtype(args.dtype, device), device, args.trust_remote_code
    )
    if args.use_peft:
        model = add_lora(
            model, args.lora_r, args.lora_alpha, args.lora_target_modules, args.use_rslora, args.use_dora
        )
    speed_up(model, args.gradient_checkpointing, args.torch_compile)
    shard(model)
    layout = "packed" if layout_of(model) == "shared" and not args.share_prompts else layout_of(model)
    run.print(describe(model))
    config = model.config.get_text_config()
    ends = {int(example.input_ids[-1]) for group in train.groups for example in group}
    padding = padding_token(tokenizer, ends | set(stop_ids(tokenizer, getattr(config, "eos_token_id", None))))
    tokenizer.pad_token = None if padding is None else tokenizer.convert_ids_to_tokens(padding)
    config.pad_token_id = padding

    # ------------------------------------------------------------------------------------------ 4. batch arithmetic
    num_prompts = len(train.groups)
    total_steps = args.max_steps
    if total_steps <= 0:
        total_steps = int(args.num_train_epochs * num_prompts / args.train_batch_size)
    if total_steps < 1:
        raise UserError(
            f"--num_train_epochs {args.num_train_epochs:g} of {num_prompts} rows are less than one step of "
            f"--train_batch_size {args.train_batch_size}: lower the batch size, or give --max_steps"
        )
    warmup_steps = int(args.warmup_steps if args.warmup_steps >= 1 else args.warmup_steps * total_steps)
    learning_rate = args.learning_rate
    if learning_rate is None:
        learning_rate = 5e-4 if is_toy else 1e-4 if args.use_peft else 1e-5
    run.print(
        f"{num_prompts:,} rows / {args.train_batch_size} per step -> {total_steps} optimiser steps "
        f"({total_steps * args.train_batch_size / num_prompts:.2f} epochs) on {ranks.num_processes} rank(s), "
        f"peak learning rate {learning_rate:g} after {warmup_steps} warm-up steps"
    )

    # -------------------------------------------------------------------------------------------------- 5. optimiser
    optimizer = make_optimizer(
        model, learning_rate, (args.adam_beta1, args.adam_beta2), args.adam_epsilon, args.weight_decay
    )
    scheduler = get_scheduler(args.lr_scheduler_type, optimizer, warmup_steps, total_steps)
    first_step, checkpoint = 0, run.load_checkpoint()
    if checkpoint is not None:
        first_step, state = checkpoint
        model.load_state_dict(state["model"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        restore_random_state(state["random"])

    def save(folder: Path) -> None:
        """A reward model: LoRA merged, and what the reference answers score now in its config."""
        reference_B = score_all(
            model, [group[:1] for group in references.groups], layout, args.max_tokens_per_micro_batch
        )
        mean, std = normalisation(reference_B)
        model.config.reward_mean, model.config.reward_std = mean, std
        run.print(f"{len(reference_B)} reference answers of {references.rows.name}: mean {mean:.3f}, std {std:.3f}")
        save_model(base_model(model), tokenizer, folder)

    def evaluate(step: int) -> None:
        metrics = {}
        for split, replies in held_out.items():
            metrics |= evaluate_reward(model, replies, split, layout, loss_of, run, args, step)
        run.keep_best(step, metrics, save)

    if first_step == 0 and not args.inspect:
        evaluate(0)

    # ------------------------------------------------------------------------------------------------------- 6. loop
    clock, tokens_seen, together = time.perf_counter(), 0, len(train.groups[0])
    weights_before = weight_sum(optimizer) if first_step == 0 else None
    for step in range(first_step + 1, total_steps + 1):
        # 6.1 Every rank knows the whole step, so all agree on its denominator and on who runs what
        chosen = draw(num_prompts, (step - 1) * args.train_batch_size, args.train_batch_size, args.seed)
        step_examples = [example for i in chosen for example in train.groups[i]]
        target_P = train.target_P[chosen].to(device)
        num_tokens = sum(len(example.input_ids) for example in step_examples)
        micro_batches = pack(
            step_examples, args.max_tokens_per_micro_batch, ranks.num_processes, layout, together
        )[ranks.process_index]
        logging = step % args.logging_steps == 0 or step in (1, total_steps)

        # 6.2 Forward and backward, one packed row at a time
        score_B, loss_sum = torch.zeros(len(step_examples), device=device), torch.zeros((), device=device)
        for micro in micro_batches:
            if args.inspect:
                return show_batch(run, tokenizer, collate(step_examples, micro, device, layout))
            score_M = rewards_of(model, step_examples, micro, layout)  # M of the step's B replies
            loss_M = loss_of(score_M, target_P[[i // together for i in micro[::together]]])
            loss = loss_M.sum() / len(target_P)
            loss.backward()
            score_B[micro] = score_M.detach()
            loss_sum += loss.detach()
        sum_over_ranks(loss_sum)
        if logging:
            score_B = sum_over_ranks(score_B)  # each reply was one rank's

        # 6.3 Gates of step one: is there anything to compare, and are scores numbers?
        if step == 1:
            finite = score_B.isfinite().float().mean().item()
            run.gate("pairs or ratings in the step", len(target_P), "> 0", len(target_P) > 0)
            run.gate("scores that are finite", finite, "1", finite == 1)

        # 6.4 Update
        grad_norm = clip_gradients(optimizer, args.max_grad_norm, loss_sum)
        run.require_finite(grad_norm, loss_sum, step, (train.rows.where(e.row) for e in step_examples))
        learning_rate = scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        tokens_seen += num_tokens
        if weights_before is not None and learning_rate > 0:  # warm-up starts at a rate of 0
            moved = abs(weight_sum(optimizer) - weights_before) > 0  # no, if it is no number
            run.gate("weights moved by the first update", float(moved), "1", moved)
            weights_before = None

        # 6.5 Log, save, evaluate
        if logging:
            seconds = time.perf_counter() - clock
            metrics = score_metrics(score_B, target_P, loss_of) | {
                "grad_norm": grad_norm.item(), "learning_rate": learning_rate,
                "epoch": step * args.train_batch_size / num_prompts, "num_tokens": num_tokens,
            }
            run.log(step, metrics, {"tokens_per_second": tokens_seen / seconds})
            shown = ("loss", "accuracy", "margin", "grad_norm")
            run.progress(step, total_steps, {k: metrics[k] for k in shown if k in metrics})
        last = step == total_steps
        if last:  # first of all: nothing that fails from here on costs the model
            if args.use_peft:
                save_model(model, tokenizer, run.folder / "adapter")
            save(run.final_folder)
            run.print(f"saved {run.final_folder}")
        if last or (args.eval_steps and step % args.eval_steps == 0):
            evaluate(step)
        if not last:
            run.end_step(step, {
                "model": trained_weights(model),
                "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(), "random": random_state(),
            })

    run.finish()


if __name__ == "__main__":
    launch(main, Args)
