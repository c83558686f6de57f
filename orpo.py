"""Odds-ratio preference optimisation: fine-tune on the chosen replies, and push the rejected ones away, in one run.

For a prompt x with a chosen reply y_w and a rejected one y_l, of L tokens each with their end of turn,

    log p(y|x)    = 1/L  sum over its tokens of  log pi(y_t | x, y_<t)                                        2403.07691
    log odds(y|x) = log p(y|x) - log(1 - p(y|x))                                                                  Eq. 4
    loss          = NLL(y_w) - beta / P  sum over P pairs  log sigmoid(log odds(y_w|x) - log odds(y_l|x))      Eqs. 6, 7

There is no reference model and no fine-tuning before it: NLL is the fine-tuning, and the odds, unlike probabilities,
leave a good reply nearly alone while they push a bad one down.

Departures from the paper and from what is usual
  1. NLL is a mean over the tokens of all chosen replies of the step, one denominator for all ranks and micro-batches.
     TRL's is a mean over each micro-batch, so that its gradient depends on how the batch is cut.
  2. NLL is of the reply alone, which is what Eqs. 1 and 6 say. The authors' code and TRL count the prompt as well, and
     so does --completion_only_loss False; prompts are then not shared, for that of the chosen reply carries a loss.
  3. Nothing is padded, and the two replies of a pair share the tokens of their prompt, which are computed once.
  4. eval/rewards/* are beta times the log-ratio to the first policy, as in dpo.py, so that all methods are measured
     alike. While training, rewards/* are beta log p(y|x), as in TRL.
  5. Dropout is off. The learning rate defaults to 8e-6, to ten times that under LoRA, and to 2e-4 for the toy.

Dimension key: N tokens of a micro-batch, B replies, P pairs; 2: chosen, rejected.

    python sft.py && python orpo.py                                        # the toy: 2 CPU cores, no network, seconds
    python orpo.py --model_name_or_path Qwen/Qwen2.5-0.5B --dataset_name trl-lib/ultrafeedback_binarized
    torchrun --nproc_per_node 8 orpo.py --model_name_or_path ... --dataset_name ...

What you should see: nll_loss falls as in sft.py, and log_odds_chosen rises from about 0. The toy goes from
eval/exact_match 0.35 to above 0.55, greedy to above 0.95.
"""

import math
import time
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from transformers import get_scheduler

from common.data import (
    Example, Ledger, collate, draw, encode_pair, load_rows, pack, prepare_completions, require_columns, segment_sum,
    split_pair,
)
from common.engine import Sampling, TransformersEngine, request_seed, stop_ids
from common.models import (
    add_lora, base_model, compute_dtype, layout_of, load_policy, load_tokenizer, score_tokens, speed_up,
)
from common.rewards import load_reward, score
from common.run import (
    Run, UserError, launch, random_state, require_at_least, restore_random_state, set_seed, show_batch,
)
from common.sharding import (
    clip_gradients, describe, join_ranks, make_optimizer, save_model, shard, sum_over_ranks, trained_weights,
    weight_sum,
)


@dataclass
class Args:
    # Run
    output_dir: str = "runs/orpo"
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
    """Folder, hub name or .gguf file of the policy. The paper starts from a base model, the toy from sft.py."""
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
    """Train a LoRA adapter instead of all weights."""
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
    Columns: `prompt` + `chosen` + `rejected` (text or chat), or the last two with the prompt in both; `tools`."""
    dataset_split: str = "train"
    """Split, with an optional slice: "train[:1000]"."""
    eval_dataset_name: str | None = None
    """Held-out data of the same shape (None: the toy's own; for other data no evaluation)."""
    eval_split: str = "test"
    """Split of the evaluation data."""
    max_length: int | None = 1024
    """Longest prompt and reply in tokens (None: no limit)."""
    on_overlong: Literal["error", "drop", "truncate"] = "error"
    """What to do with a pair of which one side is longer than max_length."""
    on_empty: Literal["error", "drop"] = "error"
    """What to do with a row that has nothing to compare: an empty reply, or two equal ones."""

    # Optimisation
    learning_rate: float | None = None
    """Peak learning rate (None: 8e-6; 8e-5 with use_peft; 2e-4 for the toy)."""
    train_batch_size: int = 64
    """Pairs per optimiser step, over all ranks."""
    max_tokens_per_micro_batch: int = 16384
    """Tokens of one forward and backward pass: the memory knob. It changes no result."""
    share_prompts: bool = True
    """Compute a prompt once for both of its replies. It changes no result."""
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
    beta: float = 0.1
    """Weight of the odds ratio beside the likelihood; the paper's lambda."""
    completion_only_loss: bool | None = None
    """Likelihood of the chosen reply only (None: yes), or of its prompt as well (no)."""

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
    "loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "logps/chosen", "logps/rejected",
    "log_odds_ratio", "log_odds_chosen", "nll", "entropy", "correct",
)  # of a step, added up over pairs, micro-batches and ranks

# ---------------------------------------------------------------------------------------------------------------- math


def log1mexp(value: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(value)) for value < 0, by whichever form keeps its digits; the other form's gradient stays finite."""
    near_zero = value.clamp(min=-math.log(2), max=-1e-20)
    return torch.where(
        value > -math.log(2), torch.log(-torch.expm1(near_zero)), torch.log1p(-value.clamp(max=-math.log(2)).exp())
    )


def odds_margin(mean_logps_P2: torch.Tensor) -> torch.Tensor:
    """Log odds ratio [P] of chosen over rejected, from log-probs that are means over tokens (2403.07691 Eq. 4)."""
    log_odds_P2 = mean_logps_P2 - log1mexp(mean_logps_P2)
    return log_odds_P2[:, 0] - log_odds_P2[:, 1]


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


def main(args: Args) -> None:
    # ------------------------------------------------------------------------------------------------------ 1. setup
    require_at_least(
        1, args, "train_batch_size", "max_tokens_per_micro_batch", "logging_steps", "max_completion_length",
        "max_eval_samples",
    )
    require_at_least(0, args, "beta", "max_grad_norm", "warmup_steps", "weight_decay")
    ranks = join_ranks(args.ddp_timeout)
    device = ranks.device
    run = Run(args, __file__, ranks.is_main_process)
    set_seed(args.seed)
    is_toy = args.dataset_name.startswith("toy:")
    rewards = [load_reward(name, device) for name in args.eval_reward_funcs or ["common.toy:exact_match"] * is_toy]

    # ------------------------------------------------------------------------------------------------------- 2. data
    tokenizer = load_tokenizer(args.model_name_or_path, args.chat_template, args.trust_remote_code)
    train_prompts = args.completion_only_loss is False
    rows = load_rows(args.dataset_name, args.dataset_split)
    require_columns(rows, ("chosen", "rejected"))
    ledger = Ledger()
    pairs = prepare_completions(
        rows, lambda row: encode_pair(row, tokenizer), args.max_length, args.on_overlong, ledger, args.on_empty
    )
    if not pairs:
        raise UserError(f"{rows.name}: every row was dropped ({ledger}): mend the data, or raise --max_length")
    run.print(f"train  {rows.name}: {ledger}")

    eval_name = args.eval_dataset_name or (args.dataset_name if is_toy else None)
    eval_examples, eval_rows, eval_prompts = [], [], []
    if eval_name is not None:
        held_out, eval_ledger = load_rows(eval_name, args.eval_split), Ledger()
        require_columns(held_out, ("chosen", "rejected"))
        eval_pairs = prepare_completions(
            held_out, lambda row: encode_pair(row, tokenizer), args.max_length, args.on_overlong, eval_ledger,
            args.on_empty,
        )[: args.max_eval_samples]
        eval_examples = [example for pair in eval_pairs for example in pair]
        eval_rows = [held_out[chosen.row] for chosen, _ in eval_pairs]
        eval_prompts = [split_pair(row)[0] for row in eval_rows]
        if not eval_examples:
            raise UserError(f"{held_out.name}: every row was dropped ({eval_ledger}): mend it, or raise --max_length")
        run.print(f"eval   {held_out.name}: {eval_ledger}")

    # ------------------------------------------------------------------------------------------- 3. batch arithmetic
    total_steps = args.max_steps
    if total_steps <= 0:
        total_steps = int(args.num_train_epochs * len(pairs) / args.train_batch_size)
    if total_steps < 1:
        raise UserError(
            f"--num_train_epochs {args.num_train_epochs:g} of {len(pairs)} pairs are less than one step of "
            f"--train_batch_size {args.train_batch_size}: lower the batch size, or give --max_steps"
        )
    warmup_steps = int(args.warmup_steps if args.warmup_steps >= 1 else args.warmup_steps * total_steps)
    learning_rate = args.learning_rate
    if learning_rate is None:
        learning_rate = 2e-4 if is_toy else 8e-5 if args.use_peft else 8e-6
    run.print(
        f"{len(pairs):,} pairs / {args.train_batch_size} per step -> {total_steps} optimiser steps "
        f"({total_steps * args.train_batch_size / len(pairs):.2f} epochs) on {ranks.num_processes} rank(s), "
        f"peak learning rate {learning_rate:g} after {warmup_steps} warm-up steps"
    )

    # ------------------------------------------------------------------------------------------------------ 4. models
    model = load_policy(
        args.model_name_or_path, compute_dtype(args.dtype, device), device, args.trust_remote_code,
        args.load_in_4bit, args.load_in_8bit,
    )
    if args.use_peft:
        model = add_lora(
            model, args.lora_r, args.lora_alpha, args.lora_target_modules, args.use_rslora, args.use_dora
        )
    speed_up(model, args.gradient_checkpointing, args.torch_compile)
    shard(model)
    share_prompts = args.share_prompts and not train_prompts
    layout = "packed" if layout_of(model) == "shared" and not share_prompts else layout_of(model)
    run.print(describe(model))
    longest = max((e.prompt_length for e in eval_examples), default=0) + args.max_completion_length
    limit = getattr(base_model(model).config, "max_position_embeddings", longest)
    if rewards and longest > limit:
        raise UserError(
            f"the longest evaluation prompt and --max_completion_length {args.max_completion_length} make {longest} "
            f"tokens, and the model takes {limit}: lower it, or --max_length with --on_overlong drop"
        )

    first_logps_B = torch.zeros(len(eval_examples))  # of the policy before training, which evaluation compares with
    with torch.no_grad():
        for micro in pack(eval_examples, args.max_tokens_per_micro_batch, 1, layout, together=2)[0]:
            first_logps_B[micro] = score_replies(model, eval_examples, micro, layout).plain_logps_B.cpu()

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

    def evaluate(step: int) -> None:
        metrics = evaluate_pairs(
            model, eval_examples, first_logps_B, layout, args.beta, args.max_tokens_per_micro_batch
        )
        if rewards:
            metrics |= evaluate_samples(
                model, tokenizer, eval_examples[::2], eval_prompts, eval_rows, rewards, run, args, step
            )
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
        # 6.1 Every rank knows the whole step: replies 2p and 2p + 1 are the chosen and the rejected of pair p
        chosen = draw(len(pairs), (step - 1) * args.train_batch_size, args.train_batch_size, args.seed)
        step_examples = [example for p in chosen for example in pairs[p]]
        length_B = torch.tensor([len(e.input_ids) - e.prompt_length for e in step_examples], device=device)
        num_tokens, num_nll_tokens = sum(len(e.input_ids) for e in step_examples), int(length_B[::2].sum())
        weights = None
        if train_prompts:  # every token of a chosen sequence carries loss; `weights` pick those of the replies
            step_examples[::2] = [replace(e, loss_mask=np.ones(len(e.input_ids), bool)) for e in step_examples[::2]]
            weights = [(torch.arange(len(e.input_ids)) >= e.prompt_length).float() for e in step_examples]
            num_nll_tokens = sum(int(e.loss_mask.sum()) for e in step_examples[::2])
        micro_batches = pack(
            step_examples, args.max_tokens_per_micro_batch, ranks.num_processes, layout, together=2
        )[ranks.process_index]
        logging = step % args.logging_steps == 0 or step in (1, total_steps)
        if args.inspect:
            return show_batch(run, tokenizer, collate(step_examples, micro_batches[0], device, layout))

        # 6.2 Forward and backward, whole pairs at a time
        sums = torch.zeros(len(SUMS), dtype=torch.float64, device=device)
        for micro in micro_batches:
            replies = score_replies(model, step_examples, micro, layout, weights, statistics=logging)
            mean_logps_P2 = (replies.logps_B / length_B[micro]).view(len(micro) // 2, 2)
            margin_P = odds_margin(mean_logps_P2)
            nll = -replies.plain_logps_B[::2].sum()
            loss = nll / num_nll_tokens - args.beta * F.logsigmoid(margin_P).sum() / args.train_batch_size  # Eq. 6
            loss.backward()

            with torch.no_grad():  # what to log, as sums over the step
                chosen_P, rejected_P = mean_logps_P2.unbind(1)
                right_P = (chosen_P > rejected_P) + 0.5 * (chosen_P == rejected_P)
                values = (
                    loss * args.train_batch_size, *(args.beta * mean_logps_P2).sum(0), right_P.sum(),
                    *mean_logps_P2.sum(0), F.logsigmoid(margin_P).sum(), margin_P.sum(), nll,
                    replies.entropies_B.sum(), replies.correct_B[::2].sum(),
                )
                sums += torch.stack([value.double() for value in values])
        totals = dict(zip(SUMS, sum_over_ranks(sums).tolist()))
        mean = {name: total / args.train_batch_size for name, total in totals.items()}

        # 6.3 Gates of step one: there is something to compare, and the model learns to stop
        if step == 1:
            stops = set(stop_ids(tokenizer, base_model(model).generation_config.eos_token_id, []))
            ends = [int(example.input_ids[-1]) in stops for example in step_examples]
            run.gate(
                "replies that end in a stop token", sum(ends) / len(ends), "> 0, and 1 unless truncated", sum(ends) > 0
            )
            run.gate("trained tokens in the step", num_nll_tokens, "> 0", num_nll_tokens > 0)

        # 6.4 Update
        grad_norm = clip_gradients(optimizer, args.max_grad_norm, mean["loss"])
        run.require_finite(grad_norm, mean["loss"], step, (rows.where(e.row) for e in step_examples))
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
            metrics = {name: mean[name] for name in SUMS if "/" in name or name == "loss"} | {
                "rewards/margins": mean["rewards/chosen"] - mean["rewards/rejected"],
                "grad_norm": grad_norm.item(), "learning_rate": learning_rate,
                "log_odds_ratio": mean["log_odds_ratio"],
                "log_odds_chosen": mean["log_odds_chosen"], "nll_loss": totals["nll"] / num_nll_tokens,
                "entropy": totals["entropy"] / sum(int(e.loss_mask.sum()) for e in step_examples),
                "mean_token_accuracy": totals["correct"] / num_nll_tokens,
                "epoch": step * args.train_batch_size / len(pairs), "num_tokens": num_tokens,
            }
            run.log(step, metrics, {"tokens_per_second": tokens_seen / (time.perf_counter() - clock)})
            run.progress(step, total_steps, {
                name: metrics[name] for name in ("loss", "nll_loss", "log_odds_chosen", "rewards/accuracies")
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
            })

    run.finish()


if __name__ == "__main__":
    launch(main, Args)
