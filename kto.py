"""Kahneman-Tversky optimisation: from single replies that somebody liked or did not, without pairs.

For a reply y to a prompt x, h(y) = log pi(y|x) - log pi_ref(y|x), summed over its tokens and its end of turn, and

    z0   = max(0, mean over mismatched (x, y') of  h(y'))
    v(y) = sigmoid(beta (h(y) - z0)) if y is desirable,  sigmoid(beta (z0 - h(y))) if it is not
    loss = 1/B  sum over the B replies of a step  w_y (1 - v(y))                                  KTO 2402.01306, Eq. 7

with w_y = desirable_weight or undesirable_weight. z0, without gradient, estimates the KL between policy and reference:
to count as a gain, a reply has to gain more than any reply does.

    kto                 as above
    apo_zero_unpaired   z0 = 0, so no mismatched replies are scored                                2408.06266

Departures from the paper and from what is usual
  1. A mismatched y' is drawn uniformly from the replies of the step, over all ranks, that answer another prompt; afresh
     at every step, so data may be shuffled and no reply meets the same prompt for ever. Where the step holds none (a
     batch of one) it comes from the data set. z0 is a mean over the whole step, clamped after it is taken.
  2. Every mean has one denominator, the replies of the step: no result depends on micro-batches or ranks.
  3. Nothing is padded, and replies to one prompt share its tokens, in the reference's pass the mismatched ones as well.
  4. Rows with `chosen` and `rejected` are taken as two replies each, drawn independently.
  5. Dropout is off. The learning rate defaults to 1e-6, to ten times that under LoRA, and to 2e-5 for the toy.

Dimension key: N tokens of a micro-batch, B replies.

    python sft.py && python kto.py                                         # the toy: 2 CPU cores, no network, seconds
    python kto.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name trl-lib/kto-mix-14k
    torchrun --nproc_per_node 8 kto.py --model_name_or_path ... --dataset_name ...

What you should see: the loss begins at 0.5 (weights 1), for the policy is its own reference and v is a half, and falls
slowly; rewards/chosen rises and rewards/rejected falls; kl stays small. The toy goes from eval/exact_match 0.35 to
above 0.45, greedy to above 0.9.
"""

import copy
import hashlib
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from transformers import get_scheduler

from common.data import (
    Example, Ledger, collate, draw, encode_completion, encode_pair, encode_prompt, load_rows, pack,
    prepare_completions, require_columns, segment_sum, split_pair,
)
from common.engine import Sampling, TransformersEngine, request_seed, stop_ids
from common.models import (
    add_lora, base_model, compute_dtype, layout_of, load_policy, load_tokenizer, score_tokens, speed_up,
    without_adapter,
)
from common.rewards import load_reward, score
from common.run import (
    Run, UserError, launch, random_state, require_at_least, restore_random_state, set_seed, show_batch,
)
from common.sharding import (
    clip_gradients, describe, full_parameters, is_sharded, join_ranks, make_optimizer, save_model, shard,
    sum_over_ranks, trained_weights, weight_sum, whole,
)


@dataclass
class Args:
    # Run
    output_dir: str = "runs/kto"
    """Folder of this run: config.yaml, metrics.jsonl, clock.jsonl, samples.jsonl, checkpoints/ and final/."""
    seed: int = 0
    """Of data order, fresh weights and sampling."""
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
    """Folder, hub name or .gguf file of the policy; it is its own reference, best trained on such replies."""
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
    """Train a LoRA adapter instead of all weights; the reference is then the model without it, at no extra memory."""
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
    load_in_4bit: bool = False
    """Quantise the frozen weights to nf4 (needs bitsandbytes; with use_peft)."""
    load_in_8bit: bool = False
    """Quantise the frozen weights to int8 (needs bitsandbytes; with use_peft)."""

    # Data
    dataset_name: str = "toy:sort_pairs"
    """Hub name, local .jsonl[.gz] / .json / .parquet / .csv / folder, or "toy:sort_pairs".
    Columns: `prompt` + `completion` + `label` (true: desirable), or pairs, as dpo.py takes them; `tools`."""
    dataset_split: str = "train"
    """Split, with an optional slice: "train[:1000]"."""
    eval_dataset_name: str | None = None
    """Held-out data of the same shape (None: the toy's own; for other data no evaluation)."""
    eval_split: str = "test"
    """Split of the evaluation data."""
    max_length: int | None = 1024
    """Longest prompt and reply in tokens (None: no limit)."""
    on_overlong: Literal["error", "drop", "truncate"] = "error"
    """What to do with a row that is longer than max_length."""
    on_empty: Literal["error", "drop"] = "error"
    """What to do with a row that has nothing to train: an empty reply, or two equal ones."""

    # Optimisation
    learning_rate: float | None = None
    """Peak learning rate (None: 1e-6; 1e-5 with use_peft; 2e-5 for the toy)."""
    train_batch_size: int = 128
    """Replies per optimiser step, over all ranks; a pair is two."""
    max_tokens_per_micro_batch: int = 16384
    """Tokens of one forward and backward pass: the memory knob. It changes no result."""
    share_prompts: bool = True
    """Compute a prompt once for all of its replies in a micro-batch. It changes no result."""
    num_train_epochs: float = 1.0
    """Passes over the data."""
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

    # Loss
    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto"
    """Compare with z0 (kto) or with 0 (apo_zero_unpaired)."""
    beta: float = 0.1
    """How much a log-ratio counts: large keeps the policy near its reference."""
    desirable_weight: float = 1.0
    """Weight of the desirable replies. The paper: weight times count of one kind over the other's from 1 to 4/3."""
    undesirable_weight: float = 1.0
    """Weight of the undesirable replies."""
    precompute_ref_log_probs: bool = False
    """Score the data with the reference before training. Mismatched replies are new at every step and stay to be
    scored, so with kto this spares time and with apo_zero_unpaired the second model."""
    ref_log_probs_dir: str = "runs/ref_log_probs"
    """Where they are kept, under a hash of model and tokens."""
    sync_ref_model: bool = False
    """Move the reference towards the policy during training (TR-DPO). With LoRA too, at the price of a second model."""
    ref_model_mixup_alpha: float = 0.6
    """The policy's share in the new reference."""
    ref_model_sync_steps: int = 512
    """Optimiser steps from one such move to the next."""

    # Evaluation
    eval_steps: int = 0
    """Evaluate every so many steps (0: only before the first and after the last)."""
    metric_for_best_model: str = ""
    """Keep the model that is best by this number, named as in metrics.jsonl, in best/ ("": off)."""
    greater_is_better: bool | None = None
    """Whether more of it is better (None: no if its name ends in "loss", else yes)."""
    eval_reward_funcs: list[str] = field(default_factory=list)
    """Score sampled and greedy replies to the evaluation prompts with these: module:function, file.py:function, or a
    reward model's folder; the toy uses its exact match. Without any, nothing is generated."""
    max_eval_samples: int = 512
    """Rows of the evaluation set that are used."""
    max_completion_length: int = 32
    """Longest reply generated in evaluation, tokens."""


SUMS = (
    "loss", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "entropy",
)  # of a step, added up over replies, micro-batches and ranks

# ---------------------------------------------------------------------------------------------------------------- math


def kto_loss(ratio_B: torch.Tensor, desirable_B: torch.Tensor, z0: torch.Tensor | float, beta: float) -> torch.Tensor:
    """1 - v of each reply [B], before its weight (2402.01306 Eq. 7). With z0 = 0 this is apo_zero_unpaired."""
    sign_B = torch.where(desirable_B, 1.0, -1.0)
    return 1 - torch.sigmoid(beta * sign_B * (ratio_B - z0))


def draw_mismatched(prompt_B: list[bytes], all_prompts: list[bytes], generator: np.random.Generator) -> list[int]:
    """For each reply of the step the place of a reply to another prompt: in the step, from 0, or, if it holds none, in
    the data set, from -1 downwards (~k is its reply k). Uniform over them, and apart for each.
    """
    places = []
    for own in prompt_B:
        others = [j for j, other in enumerate(prompt_B) if other != own]
        others = others or [~k for k, other in enumerate(all_prompts) if other != own]
        places.append(others[generator.integers(len(others))])
    return places


def transplant(prompt: Example, reply: Example, max_length: int | None) -> Example:
    """The reply of one example after the prompt of another."""
    tokens = reply.input_ids[reply.prompt_length :]
    ids = np.concatenate([prompt.input_ids[: prompt.prompt_length], tokens])[:max_length]
    return Example(ids, np.arange(len(ids)) >= prompt.prompt_length, reply.row, prompt.prompt_length)


def weight_advice(num_desirable: int, num_undesirable: int, desirable: float, undesirable: float) -> str:
    """The paper's advice (2402.01306 Eq. 8): weight times count, desirable over undesirable, from 1 to 4/3."""
    if not desirable * undesirable:
        return f"{num_desirable:,} desirable and {num_undesirable:,} undesirable replies, one kind without weight"
    ratio = desirable * num_desirable / (undesirable * num_undesirable)
    sentence = f"{num_desirable:,} desirable and {num_undesirable:,} undesirable replies, weighed {ratio:.2f} to 1"
    if 0.99 <= ratio <= 1.34:
        return sentence
    low = undesirable * num_undesirable / num_desirable
    return f"{sentence}; 1 to 4/3 is advised, as with --desirable_weight {low:.2f} to {4 / 3 * low:.2f}"


# ---------------------------------------------------------------------------------------------------------------- data


def encode_labelled(row: dict, tokenizer) -> tuple[list[int], list[list[int]]]:
    """Ids of a prompt and of its one reply, or of its two if the row is a pair."""
    if "chosen" in row:
        return encode_pair(row, tokenizer)
    if not isinstance(row["label"], bool):
        raise UserError(f"a label is true (desirable) or false, and this one is {row['label']!r}")
    options = {"tools": row.get("tools"), "chat_template_kwargs": row.get("chat_template_kwargs")}
    completion = encode_completion(row["prompt"], row["completion"], tokenizer, **options)
    return encode_prompt(row["prompt"], tokenizer, **options), [completion]


def labels_of(groups: list[list[Example]], rows) -> list[bool]:
    """One label for each reply: of a pair the chosen is desirable, the rejected is not."""
    return [i == 0 if len(group) == 2 else rows[e.row]["label"] for group in groups for i, e in enumerate(group)]


# ------------------------------------------------------------------------------------------------------------- scoring


@dataclass
class Replies:
    """Sums over the tokens of each reply of a micro-batch, in its order [B]."""

    logps_B: torch.Tensor  # log pi(y|x), tokens weighted where weights are given
    plain_logps_B: torch.Tensor  # without weights
    entropies_B: torch.Tensor
    correct_B: torch.Tensor
    alignment_B: torch.Tensor  # log p(y_t) - log sum_v p(v)^2, no gradient (WPO)


def score_replies(
    model, examples: list[Example], micro: list[int], layout: str, weights: list[torch.Tensor] | None = None,
    statistics: bool = False,
) -> Replies:
    """One forward pass over a micro-batch, or one for each of its sequences where the model cannot be packed."""
    parts = []
    for row in [[i] for i in micro] if layout == "single" and micro else [micro]:
        batch = collate(examples, row, model.device, layout)
        scores = score_tokens(model, batch, statistics=statistics)
        weighted_N = scores.logprobs_N if weights is None else scores.logprobs_N * batch.take(weights)
        alignment_N = scores.logprobs_N.detach() - scores.collisions_N
        tokens = (weighted_N, scores.logprobs_N, scores.entropies_N, scores.correct_N, alignment_N)
        parts.append([segment_sum(value_N, batch)[: len(row)] for value_N in tokens])
    return Replies(*(torch.cat(column) for column in zip(*parts)))


@torch.no_grad()
def reference_logprobs(model, examples: list[Example], args, ranks) -> list[torch.Tensor]:
    """Log-probs of every token of all examples [T], the work shared out over the ranks, kept under a hash of both."""
    digest = hashlib.sha256()
    for name, parameter in base_model(model).named_parameters():
        if ".lora_" not in name:
            digest.update(whole(parameter).contiguous().view(torch.uint8).cpu().numpy())
    for example in examples:
        digest.update(example.input_ids.tobytes() + example.loss_mask.tobytes())
    path = Path(args.ref_log_probs_dir) / f"{digest.hexdigest()[:32]}.safetensors"
    if path.parent.is_file():
        raise UserError(f"--ref_log_probs_dir {path.parent} is a file: name a folder")
    lengths = [len(example.input_ids) for example in examples]
    if gather_object([path.exists()])[0]:  # what the first rank sees, for all have to go the same way
        return list(load_file(path)["logprobs_A"].split(lengths))
    scored, layout = [], layout_of(model)
    for micro in pack(examples, args.max_tokens_per_micro_batch, ranks.num_processes, layout)[ranks.process_index]:
        batch = collate(examples, micro, model.device, layout)
        scored += zip(micro, batch.give(score_tokens(model, batch).logprobs_N))
    scored = [values_T for _, values_T in sorted(gather_object(scored), key=lambda item: item[0])]
    if ranks.is_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(".tmp")
        save_file({"logprobs_A": torch.cat(scored)}, aside)
        aside.rename(path)
    return scored


# ---------------------------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def evaluate_pairs(
    model, examples: list[Example], reference_B: torch.Tensor, layout: str, beta: float, budget: int
) -> dict[str, float]:
    """How often held-out chosen replies have the higher implicit reward: beta times the log-ratio to the first policy.

    reference_B: what that says of the replies; for losses without a reference too, so that all are measured alike.
    """
    policy_B = torch.zeros(len(examples))
    for micro in pack(examples, budget, 1, layout, together=2)[0]:
        policy_B[micro] = score_replies(model, examples, micro, layout).plain_logps_B.cpu()
    chosen_P, rejected_P = (beta * (policy_B - reference_B)).view(-1, 2).unbind(1)
    right_P = (chosen_P > rejected_P).float() + 0.5 * (chosen_P == rejected_P).float()
    logps_P2 = policy_B.view(-1, 2)
    metrics = {
        "eval/rewards/accuracies": right_P.mean(),
        "eval/rewards/accuracies_ci95": 1.96 * right_P.std() / len(right_P) ** 0.5,
        "eval/rewards/margins": (chosen_P - rejected_P).mean(), "eval/rewards/chosen": chosen_P.mean(),
        "eval/rewards/rejected": rejected_P.mean(), "eval/logps/chosen": logps_P2[:, 0].mean(),
        "eval/logps/rejected": logps_P2[:, 1].mean(),
    }
    return {name: float(value) for name, value in metrics.items()}


def evaluate_samples(
    model, tokenizer, examples: list[Example], prompts: list, rows: list[dict], rewards: list, run: Run, args, step: int
) -> dict[str, float]:
    """Rewards and lengths of sampled (T=1) and greedy replies to held-out prompts, the same draws every time."""
    prompt_ids = [example.input_ids[: example.prompt_length].tolist() for example in examples]
    given = ("prompt", "completion", "chosen", "rejected")
    columns = {name: [row.get(name) for row in rows] for name in rows[0] if name not in given}
    metrics = {}
    for suffix, temperature in (("", 1.0), ("_greedy", 0.0)):
        sampling = Sampling(
            max_tokens=args.max_completion_length, temperature=temperature,
            stop_token_ids=stop_ids(tokenizer, base_model(model).generation_config.eos_token_id, []),
        )
        seeds = [request_seed(args.seed, -1, i, 0) for i in range(len(rows))]
        completions = TransformersEngine(base_model(model)).generate(prompt_ids, seeds, sampling)
        texts = [tokenizer.decode(c.token_ids, skip_special_tokens=True) for c in completions]
        lengths = [len(c.token_ids) for c in completions]
        metrics[f"eval/mean_length{suffix}"] = sum(lengths) / len(lengths)
        metrics[f"eval/terminated{suffix}"] = sum(c.finish_reason == "stop" for c in completions) / len(completions)
        reward_BF = score(rewards, prompts, texts, columns)
        for name, reward_B in zip([f.name for f in rewards], reward_BF.T):
            metrics[f"eval/{name}{suffix}"] = float(reward_B.nanmean())
        run.samples(f"step {step}, temperature {temperature:g}", ["prompt", "completion", *(f.name for f in rewards)], [
            [tokenizer.decode(ids), text, *reward_F.tolist()]
            for ids, text, reward_F in list(zip(prompt_ids, texts, reward_BF))[:4]
        ])
    return metrics


@torch.no_grad()
def evaluate_labelled(
    model, examples: list[Example], desirable_B: torch.Tensor, reference_B: torch.Tensor, layout: str, beta: float,
    budget: int,
) -> dict[str, float]:
    """Implicit rewards of held-out replies by label; auc: how often a desirable one beats an undesirable one."""
    policy_B = torch.zeros(len(examples))
    for micro in pack(examples, budget, 1, layout)[0]:
        policy_B[micro] = score_replies(model, examples, micro, layout).plain_logps_B.cpu()
    reward_B = beta * (policy_B - reference_B)
    liked, disliked = reward_B[desirable_B], reward_B[~desirable_B]
    difference = liked[:, None] - disliked[None]
    metrics = {
        "eval/rewards/chosen": liked.mean(), "eval/rewards/rejected": disliked.mean(),
        "eval/rewards/margins": liked.mean() - disliked.mean(),
        "eval/rewards/auc": ((difference > 0).float() + 0.5 * (difference == 0).float()).mean(),
        "eval/logps/chosen": policy_B[desirable_B].mean(), "eval/logps/rejected": policy_B[~desirable_B].mean(),
    }
    return {name: float(value) for name, value in metrics.items()}


def main(args: Args) -> None:
    # ------------------------------------------------------------------------------------------------------ 1. setup
    require_at_least(
        1, args, "train_batch_size", "max_tokens_per_micro_batch", "logging_steps", "max_completion_length",
        "max_eval_samples", "ref_model_sync_steps",
    )
    require_at_least(0, args, "max_grad_norm", "warmup_steps", "weight_decay")
    if not 0 <= args.ref_model_mixup_alpha <= 1:
        raise UserError(f"--ref_model_mixup_alpha is a share, from 0 to 1, not {args.ref_model_mixup_alpha:g}")
    require_at_least(0, args, "desirable_weight", "undesirable_weight")
    if args.beta <= 0:
        raise UserError(f"--beta must be above 0, not {args.beta:g}")
    if args.sync_ref_model and args.precompute_ref_log_probs:
        raise UserError("--sync_ref_model needs a reference that is scored at every step, not a precomputed one")
    if args.sync_ref_model and (args.load_in_4bit or args.load_in_8bit):
        raise UserError("--sync_ref_model mixes weights, which quantised ones do not allow: load them whole")
    ranks = join_ranks(args.ddp_timeout)
    device = ranks.device
    run = Run(args, __file__, ranks.is_main_process)
    set_seed(args.seed)
    compares = args.loss_type == "kto"  # with z0
    is_toy = args.dataset_name.startswith("toy:")
    rewards = [load_reward(name, device) for name in args.eval_reward_funcs or ["common.toy:exact_match"] * is_toy]

    # ------------------------------------------------------------------------------------------------------- 2. data
    tokenizer = load_tokenizer(args.model_name_or_path, args.chat_template, args.trust_remote_code)
    rows = load_rows(args.dataset_name, args.dataset_split)
    require_columns(rows, ("prompt", "completion", "label"), ("chosen", "rejected"))
    ledger = Ledger()
    groups = prepare_completions(
        rows, lambda row: encode_labelled(row, tokenizer), args.max_length, args.on_overlong, ledger, args.on_empty
    )
    if not groups:
        raise UserError(f"{rows.name}: every row was dropped ({ledger}): mend the data, or raise --max_length")
    examples, desirable = [example for group in groups for example in group], labels_of(groups, rows)
    if len({*desirable}) == 1:
        raise UserError(f"{rows.name}: every label is {desirable[0]}, so there is nothing to tell apart: add others")
    prompts = [example.input_ids[: example.prompt_length].tobytes() for example in examples]
    if compares and len({*prompts}) == 1:
        raise UserError(f"{rows.name}: all rows have one prompt, so there is no z0: use --loss_type apo_zero_unpaired")
    run.print(f"train  {rows.name}: {ledger}")
    num_desirable = sum(desirable)
    run.print(weight_advice(
        num_desirable, len(desirable) - num_desirable, args.desirable_weight, args.undesirable_weight
    ))

    eval_name = args.eval_dataset_name or (args.dataset_name if is_toy else None)
    eval_groups, eval_examples, eval_rows, eval_prompts = [], [], [], []
    if eval_name is not None:
        held_out, eval_ledger = load_rows(eval_name, args.eval_split), Ledger()
        require_columns(held_out, ("prompt", "completion", "label"), ("chosen", "rejected"))
        eval_groups = prepare_completions(
            held_out, lambda row: encode_labelled(row, tokenizer), args.max_length, args.on_overlong, eval_ledger,
            args.on_empty,
        )[: args.max_eval_samples]
        eval_examples = [example for group in eval_groups for example in group]
        eval_rows = [held_out[group[0].row] for group in eval_groups]
        eval_prompts = [split_pair(row)[0] if "chosen" in row else row["prompt"] for row in eval_rows]
        eval_desirable_B = torch.tensor(labels_of(eval_groups, held_out))
        if not eval_examples:
            raise UserError(f"{held_out.name}: every row was dropped ({eval_ledger}): mend it, or raise --max_length")
        run.print(f"eval   {held_out.name}: {eval_ledger}")
    paired = bool(eval_groups) and all(len(group) == 2 for group in eval_groups)

    # ------------------------------------------------------------------------------------------- 3. batch arithmetic
    total_steps = args.max_steps
    if total_steps <= 0:
        total_steps = int(args.num_train_epochs * len(examples) / args.train_batch_size)
    if total_steps < 1:
        raise UserError(
            f"--num_train_epochs {args.num_train_epochs:g} of {len(examples)} replies are less than one step of "
            f"--train_batch_size {args.train_batch_size}: lower the batch size, or give --max_steps"
        )
    warmup_steps = int(args.warmup_steps if args.warmup_steps >= 1 else args.warmup_steps * total_steps)
    learning_rate = args.learning_rate
    if learning_rate is None:
        learning_rate = 2e-5 if is_toy else 1e-5 if args.use_peft else 1e-6
    run.print(
        f"{len(examples):,} replies / {args.train_batch_size} per step -> {total_steps} optimiser steps "
        f"({total_steps * args.train_batch_size / len(examples):.2f} epochs) on {ranks.num_processes} rank(s), "
        f"peak learning rate {learning_rate:g} after {warmup_steps} warm-up steps"
    )

    # ------------------------------------------------------------------------------------------------------ 4. models
    model = load_policy(
        args.model_name_or_path, compute_dtype(args.dtype, device), device, args.trust_remote_code,
        args.load_in_4bit, args.load_in_8bit,
    )
    reference = None
    if (compares or not args.precompute_ref_log_probs) and (args.sync_ref_model or not args.use_peft):
        reference = shard(copy.deepcopy(model).requires_grad_(False))
    if args.use_peft:
        model = add_lora(
            model, args.lora_r, args.lora_alpha, args.lora_target_modules, args.use_rslora, args.use_dora
        )
    speed_up(model, args.gradient_checkpointing, args.torch_compile)
    shard(model)
    if args.sync_ref_model and is_sharded(reference):
        raise UserError("--sync_ref_model mixes whole weights: launch without FSDP2 and ZeRO-3, or leave it off")
    layout = "packed" if layout_of(model) == "shared" and not args.share_prompts else layout_of(model)
    run.print(describe(model))
    longest = max((e.prompt_length for e in eval_examples), default=0) + args.max_completion_length
    limit = getattr(base_model(model).config, "max_position_embeddings", longest)
    if rewards and longest > limit:
        raise UserError(
            f"the longest evaluation prompt and --max_completion_length {args.max_completion_length} make {longest} "
            f"tokens, and the model takes {limit}: lower it, or --max_length with --on_overlong drop"
        )

    def prior():
        """The reference: a second model, or this one without its adapter."""
        if reference is not None:
            return nullcontext(reference)
        return without_adapter(model) if args.use_peft else nullcontext(model)  # the last only before training

    stored, eval_reference_B = None, torch.zeros(len(eval_examples))
    if args.precompute_ref_log_probs and not args.inspect:
        with prior() as scorer:
            stored = reference_logprobs(scorer, examples + eval_examples, args, ranks)
        eval_reference_B = torch.tensor([float(values_T.sum()) for values_T in stored[len(examples):]])
    elif not args.inspect:
        with torch.no_grad(), prior() as scorer:
            for micro in pack(eval_examples, args.max_tokens_per_micro_batch, 1, layout, together=1 + paired)[0]:
                eval_reference_B[micro] = score_replies(scorer, eval_examples, micro, layout).plain_logps_B.cpu()

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
        if state["reference"] is not None:
            reference.load_state_dict(state["reference"], strict=False)

    def evaluate(step: int) -> None:
        budget = args.max_tokens_per_micro_batch
        if paired:
            metrics = evaluate_pairs(model, eval_examples, eval_reference_B, layout, args.beta, budget)
        else:
            metrics = evaluate_labelled(
                model, eval_examples, eval_desirable_B, eval_reference_B, layout, args.beta, budget
            )
        if rewards:
            firsts = [group[0] for group in eval_groups]
            metrics |= evaluate_samples(model, tokenizer, firsts, eval_prompts, eval_rows, rewards, run, args, step)
        run.log(step, metrics)
        when = f"after step {step}" if step else "before training"
        run.print(f"{when}  " + "  ".join(f"{name} {value:.3f}" for name, value in metrics.items()))
        run.keep_best(step, metrics, lambda folder: save_model(model, tokenizer, folder))

    if eval_examples and first_step == 0 and not args.inspect:
        evaluate(0)

    # ------------------------------------------------------------------------------------------------------- 6. loop
    clock, tokens_seen = time.perf_counter(), 0
    weights_before = weight_sum(optimizer) if first_step == 0 else None
    for step in range(first_step + 1, total_steps + 1):
        # 6.1 Every rank knows the whole step
        chosen = draw(len(examples), (step - 1) * args.train_batch_size, args.train_batch_size, args.seed)
        step_examples = [examples[i] for i in chosen]
        desirable_B = torch.tensor([desirable[i] for i in chosen], device=device)
        weight_B = torch.where(desirable_B, args.desirable_weight, args.undesirable_weight)
        num_desirable, num_tokens = int(desirable_B.sum()), sum(len(e.input_ids) for e in step_examples)
        micro_batches = pack(
            step_examples, args.max_tokens_per_micro_batch, ranks.num_processes, layout
        )[ranks.process_index]
        logging = step % args.logging_steps == 0 or step in (1, total_steps)
        if args.inspect:
            return show_batch(run, tokenizer, collate(step_examples, micro_batches[0], device, layout))

        # 6.2 What the reference says of the replies and, for z0, what both say of mismatched ones
        mismatched = []
        if compares:
            places = draw_mismatched(
                [prompts[i] for i in chosen], prompts, np.random.default_rng([args.seed, step])
            )
            partners = [step_examples[j] if j >= 0 else examples[~j] for j in places]
            mismatched = [transplant(own, partner, args.max_length) for own, partner in zip(step_examples, partners)]
        scored = (step_examples if stored is None else []) + mismatched  # by the reference: equal prompts shared
        reference_B, mismatched_B = (torch.zeros(len(some), device=device) for some in (scored, mismatched))
        budget = args.max_tokens_per_micro_batch
        with torch.no_grad():
            with prior() as scorer:
                for micro in pack(scored, budget, ranks.num_processes, layout)[ranks.process_index] if scored else []:
                    reference_B[micro] = score_replies(scorer, scored, micro, layout).logps_B
            for micro in pack(mismatched, budget, ranks.num_processes, layout)[ranks.process_index] if compares else []:
                mismatched_B[micro] = score_replies(model, mismatched, micro, layout).logps_B
        sum_over_ranks(reference_B)
        reference_mismatched_B = reference_B[len(scored) - len(mismatched):]
        z0 = 0.0
        if compares:
            z0 = (sum_over_ranks(mismatched_B) - reference_mismatched_B).mean().clamp(min=0)
        if stored is not None:
            reference_B = torch.stack([stored[i].sum() for i in chosen]).to(device)

        # 6.3 Forward and backward, one packed row at a time
        sums = torch.zeros(len(SUMS), dtype=torch.float64, device=device)
        largest_ratio = torch.zeros((), device=device)
        for micro in micro_batches:
            replies = score_replies(model, step_examples, micro, layout, statistics=logging)
            ratio_B, liked_B = replies.logps_B - reference_B[micro], desirable_B[micro]
            loss = (weight_B[micro] * kto_loss(ratio_B, liked_B, z0, args.beta)).sum() / args.train_batch_size
            loss.backward()

            with torch.no_grad():  # what to log, as sums over the step
                values = (
                    loss, args.beta * ratio_B[liked_B].sum(), args.beta * ratio_B[~liked_B].sum(),
                    replies.logps_B[liked_B].sum(), replies.logps_B[~liked_B].sum(), replies.entropies_B.sum(),
                )
                sums += torch.stack([value.double() for value in values])
                if len(micro):
                    largest_ratio = largest_ratio.maximum(ratio_B.abs().max())
        totals, ratio = dict(zip(SUMS, sum_over_ranks(sums).tolist())), float(sum_over_ranks(largest_ratio))

        # 6.4 Gates of step one: the policy is its own reference, and the model learns to stop
        if step == 1:
            noise = 1e-3 if model.dtype == torch.float32 else 1.0  # nats in a whole reply; bf16 varies with the layout
            stops = set(stop_ids(tokenizer, base_model(model).generation_config.eos_token_id, []))
            ends = [int(example.input_ids[-1]) in stops for example in step_examples]
            run.gate(
                "replies that end in a stop token", sum(ends) / len(ends), "> 0, and 1 unless truncated", sum(ends) > 0
            )
            half = float(weight_B.mean()) / 2
            run.gate("|log pi - log pi_ref| before the first update", ratio, f"0, below {noise:g}", ratio < noise)
            run.gate("z0 before the first update", float(z0), f"0, below {noise:g}", float(z0) < noise)
            run.gate(
                "loss before the first update", totals["loss"], f"half the mean weight, {half:.4f}",
                abs(totals["loss"] - half) < noise,
            )

        # 6.5 Update
        grad_norm = clip_gradients(optimizer, args.max_grad_norm, totals["loss"])
        run.require_finite(grad_norm, totals["loss"], step, (rows.where(e.row) for e in step_examples))
        learning_rate = scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        tokens_seen += num_tokens
        if weights_before is not None and learning_rate > 0:  # warm-up starts at a rate of 0
            moved = abs(weight_sum(optimizer) - weights_before) > 0  # no, if it is no number
            run.gate("weights moved by the first update", float(moved), "1", moved)
            weights_before = None
        if args.sync_ref_model and step % args.ref_model_sync_steps == 0:  # 2404.09656
            share, weights_of = args.ref_model_mixup_alpha, dict(reference.named_parameters())
            for name, value in full_parameters(model):
                if name in weights_of:
                    weights_of[name].data.lerp_(value.to(weights_of[name].dtype), share)

        # 6.6 Log, save, evaluate
        if logging:
            num_undesirable = args.train_batch_size - num_desirable
            count = {"chosen": num_desirable, "rejected": num_undesirable}
            metrics = {"loss": totals["loss"], "kl": float(z0)} | {  # null where the step has no such reply
                f"{name}/{side}": totals[f"{name}/{side}"] / count[side] if count[side] else float("nan")
                for name in ("rewards", "logps") for side in count
            }
            metrics |= {
                "rewards/margins": metrics["rewards/chosen"] - metrics["rewards/rejected"],
                "count/chosen": num_desirable, "count/rejected": num_undesirable,
                "grad_norm": grad_norm.item(), "learning_rate": learning_rate,
                "entropy": totals["entropy"] / sum(int(e.loss_mask.sum()) for e in step_examples),
                "epoch": step * args.train_batch_size / len(examples), "num_tokens": num_tokens,
            }
            run.log(step, metrics, {"tokens_per_second": tokens_seen / (time.perf_counter() - clock)})
            run.progress(step, total_steps, {
                name: metrics[name] for name in ("loss", "kl", "rewards/margins", "logps/chosen")
            })
        last = step == total_steps
        if last:  # first of all: nothing that fails from here on costs the model
            save_model(model, tokenizer, run.final_folder)
            run.print(f"saved {run.final_folder}")
        if eval_examples and (last or (args.eval_steps and step % args.eval_steps == 0)):
            evaluate(step)
        if not last:
            run.end_step(step, {
                "model": trained_weights(model),
                "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(), "random": random_state(),
                "reference": dict(reference.named_parameters()) if args.sync_ref_model else None,
            })

    run.finish()


if __name__ == "__main__":
    launch(main, Args)
