"""REINFORCE for language models: one action a completion, and the other samples of its prompt for a baseline.

For the k completions y_i of a prompt, with log pi(y|x) summed over tokens and rho_i = pi(y_i|x) / pi_old(y_i|x),

    R_i  = r_i - beta (log pi_old(y_i|x) - log pi_ref(y_i|x))
    A_i  = R_i - mean of R_j over the other samples j of the prompt                                      RLOO 2402.14740
    loss = - mean over completions of  min(rho_i A_i, clip(rho_i, 1 - eps, 1 + eps) A_i)

On policy, with one step a rollout, rho is 1 and this is REINFORCE. Two axes make its relatives:

    RLOO                    2402.14740   --baseline leave_one_out
    ReMax                   2310.10505   --baseline greedy
    REINFORCE                            --baseline batch_mean
    REINFORCE++             2501.03262   --baseline none --normalize_advantages    (see departure 5)
    REINFORCE++ baseline    2501.03262   --baseline leave_one_out --normalize_advantages

What differs from grpo.py (`diff rloo.py grpo.py`)
  1. A completion is one action: one ratio, the product over its tokens, clipped as a whole, and no division by length.
     Over long completions that product spreads; watch clip_ratio/*.
  2. The KL is part of the reward, summed over the completion: a beta tuned for a mean over tokens is too strong here.
     A group of equal rewards so still has a gradient, through its KL.
  3. No standard deviation: A_i is k / (k - 1) times Dr. GRPO's.

Departures from the papers and from what is usual
  1. Weights are counted over the whole optimiser step, all ranks and micro-batches, before the first backward; so is
     every statistic. The gradient does not depend on how the step is cut.
  2. Nothing is padded (common/data.py). A completion's mask comes from its length and finish reason, never from ids.
  3. With one optimiser step per rollout the ratio is 1: old log-probs are the current ones, detached. Scored apart they
     would differ by rounding, which a product over many tokens adds up.
  4. Rewards are clipped (--reward_clip_range) before the KL is taken off, not after.
  5. REINFORCE++ gives each token the KL that is still to come; here all tokens of a completion share all of it.

Dimension key: N tokens of a micro-batch, B sequences, P prompts, G samples a prompt, F reward functions, A all tokens
of a rollout laid end to end.

    python sft.py && python rloo.py                                        # the toy: 2 CPU cores, no network, a minute
    python rloo.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name train.jsonl --use_vllm
    torchrun --nproc_per_node 8 rloo.py --model_name_or_path ... --dataset_name ... --use_vllm

What you should see: on the toy, eval/exact_match from 0.3 to above 0.8 and greedy above 0.95 in 100 steps. The loss
says little: on policy its value is that of a mean of advantages, about 0, while its gradient is not.
"""

import copy
import math
import re
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from accelerate.utils import gather_object
from transformers import get_scheduler

from common.data import (
    Example, Ledger, MicroBatch, Rows, collate, draw, load_rows, pack, prepare_prompts, require_columns,
    segment_sum,
)
from common.engine import Sampling, agreement, build_engine, request_seed, stop_ids
from common.models import (
    add_lora, base_model, compute_dtype, layout_of, load_policy, load_tokenizer, score_tokens, speed_up,
    without_adapter,
)
from common.rewards import load_reward, score
from common.run import (
    Run, UserError, launch, random_state, require_at_least, restore_random_state, set_seed, show_batch,
)
from common.sharding import (
    clip_gradients, describe, join_ranks, make_optimizer, save_model, shard, sum_over_ranks,
    trained_weights, weight_sum,
)


@dataclass
class Args:
    # Run
    output_dir: str = "runs/rloo"
    """Folder of this run: config.yaml, metrics.jsonl, clock.jsonl, samples.jsonl, checkpoints/ and final/."""
    seed: int = 0
    """Of data order, fresh weights and sampling."""
    resume: bool = False
    """Continue the run in output_dir from its newest whole checkpoint; it ends bit-identical to one never stopped."""
    save_steps: int = 0
    """Checkpoint every so many optimiser steps (0: only the final model)."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints to keep (0: all)."""
    logging_steps: int = 1
    """Log every so many optimiser steps."""
    log_completions_steps: int = 25
    """Show a few prompts, completions and rewards every so many optimiser steps (0: never)."""
    report_to: list[Literal["wandb", "tensorboard"]] = field(default_factory=list)
    """Trackers that mirror metrics.jsonl."""
    push_to_hub: bool = False
    """Upload final/ with its model card to the Hugging Face hub at the end (`hf auth login` or HF_TOKEN)."""
    hub_model_id: str = ""
    """Its name there, "owner/name" or "name" ("": that of the run folder)."""
    hub_private_repo: bool = False
    """Make a new repository private (else it is public, unless the owner's settings say otherwise)."""
    inspect: bool = False
    """Print the first micro-batch, tokens coloured by role and advantage, and exit."""
    ddp_timeout: float = 1800.0
    """Seconds that a rank waits for the others before it takes one for dead, and the run stops."""

    # Model
    model_name_or_path: str = "runs/sft/final"
    """Folder, hub name, .gguf file, or "toy" (fresh weights)."""
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
    """Train a LoRA adapter instead of all weights; the reference policy is then the model with its adapter off."""
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

    # Data and rewards
    dataset_name: str = "toy:sort"
    """Hub name, local .jsonl[.gz] / .json / .parquet / .csv / folder, "toy:sort", or "reasoning_gym:<task>".
    Column `prompt` (text or chat), and whatever columns the rewards need."""
    dataset_split: str = "train"
    """Split, with an optional slice: "train[:1000]"."""
    max_prompt_length: int = 512
    """Longest prompt in tokens."""
    on_overlong: Literal["error", "drop"] = "error"
    """What to do with a prompt longer than max_prompt_length. It is never cut."""
    reward_funcs: list[str] = field(default_factory=lambda: ["exact_match"])
    """Rewards: a function of this file, module:function, file.py:function, reasoning_gym, math_verify, or a folder of a
    sequence-classification reward model. Signature: f(prompts, completions, **columns) -> list[float | None]."""
    reward_weights: list[float] = field(default_factory=list)
    """One weight for each reward function (empty: all 1)."""
    reward_timeout: float = 600.0
    """Seconds that a reward function may take for one rollout (0: for ever)."""

    # Rollout
    generation_batch_size: int = 256
    """Completions of one rollout, over all ranks: generation_batch_size / num_generations prompts."""
    num_generations: int = 8
    """G, completions of each prompt."""
    max_completion_length: int = 16
    """Longest completion, tokens."""
    temperature: float = 1.0
    """Divides the logits in sampling, and in every log-prob computed here."""
    top_p: float = 1.0
    """Nucleus sampling (1: off). Off is right for RL: the log-probs trained on are those of the full softmax."""
    top_k: int = 0
    """Sample among the k likeliest tokens (0: off)."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the likeliest (0: off)."""
    repetition_penalty: float = 1.0
    """Divide the logits of tokens already seen (1: off)."""
    stop_strings: list[str] = field(default_factory=list)
    """Stop at these too; each is one character or one whole token. The EOS tokens always stop."""
    use_vllm: bool = False
    """Sample with vLLM in this process; else with transformers and the trainer's own weights."""
    vllm_gpu_memory_utilization: float = 0.3
    """Share of the accelerator's memory that vLLM takes."""
    vllm_enable_sleep_mode: bool = False
    """Free vLLM's memory during training."""
    generation_timeout: float = 1800.0
    """Seconds that the sampler may take for one rollout (0: for ever)."""

    # Optimisation
    learning_rate: float | None = None
    """Peak learning rate (None: 1e-6; 1e-5 with use_peft; 5e-4 for the toy)."""
    max_steps: int = 100
    """Optimiser steps."""
    steps_per_generation: int = 1
    """Optimiser steps that one pass over a rollout is cut into."""
    num_iterations: int = 1
    """Passes over each rollout (mu in the paper)."""
    max_tokens_per_micro_batch: int = 16384
    """Tokens of one forward and backward pass: the memory knob. It changes no result."""
    share_prompts: bool = True
    """Compute the prompt of a group once, its completions attending to it: faster, the same result to rounding."""
    lr_scheduler_type: Literal[
        "linear", "cosine", "constant", "constant_with_warmup", "cosine_with_restarts", "polynomial", "inverse_sqrt"
    ] = "linear"
    """How the learning rate goes on after warm-up (transformers.get_scheduler)."""
    warmup_steps: float = 5
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

    # Algorithm
    baseline: Literal["leave_one_out", "greedy", "batch_mean", "none"] = "leave_one_out"
    """What a reward is compared with: the mean of the prompt's other samples, the reward of its greedy completion (one
    more sample a prompt), the mean of the rollout, or 0."""
    normalize_advantages: bool = False
    """Take the mean off the advantages of the rollout, and divide them by their standard deviation."""
    reward_clip_range: tuple[float, float] | None = None
    """Clip the summed reward to this range, before the KL."""
    epsilon: float = 0.2
    """Lower clip range, and upper one unless epsilon_high is given."""
    epsilon_high: float | None = None
    """Upper clip range."""
    beta: float = 0.05
    """KL coefficient of a whole completion (0: no reference model is loaded)."""
    sampler_correction: Literal[
        "auto", "none", "sequence_truncate", "sequence_mask", "sequence_mean_truncate", "sequence_mean_mask"
    ] = "auto"
    """Weight by pi_old / pi_sampler of a sequence: product, or geometric mean; truncated at the cap, or set to 0
    outside the bounds. auto: sequence_mean_truncate with vLLM, else none."""
    sampler_correction_max: float = 2.0
    """Cap on that weight."""
    sampler_correction_min: float = 0.0
    """Lower bound on that weight, for the masking forms."""
    mask_truncated_completions: bool = False
    """No loss on completions that hit max_completion_length (they still count in the baselines)."""
    soft_overlong_cache: int = 0
    """DAPO's soft punishment: reward falls from 0 to -1 over the last so many tokens before max_completion_length."""
    dynamic_sampling: bool = False
    """Draw prompts until the rollout is full of groups whose rewards differ."""
    dynamic_sampling_max_rounds: int = 10
    """Give up filling after so many draws, and train on what there is."""

    # Evaluation
    eval_dataset_name: str | None = None
    """Held-out prompts (None: the toy's own; for other data no evaluation)."""
    eval_split: str = "test"
    """Split of the evaluation data."""
    eval_steps: int = 0
    """Evaluate every so many steps (0: only before the first and after the last)."""
    metric_for_best_model: str = ""
    """Keep the model that is best by this number, named as in metrics.jsonl, in best/ ("": off)."""
    greater_is_better: bool | None = None
    """Whether more of it is better (None: no if its name ends in "loss", else yes)."""
    num_generations_eval: int = 1
    """k, sampled completions of each held-out prompt: pass@1 is their mean, pass@k any, maj@k the majority."""
    max_eval_samples: int = 512
    """Rows of the evaluation set that are used."""


SUMS = (
    "loss", "tokens", "entropy", "gap_to_old", "clip_low", "clip_high", "gap", "weight", "weight_squared",
    "weight_zero",
)  # of a step, added up over micro-batches and ranks

# ------------------------------------------------------------------------------------------------------------- rewards
# The first thing a fork edits. A function named here can be given to --reward_funcs by its name alone.


def exact_match(prompts: list, completions: list, answer: list[str], **_) -> list[float]:
    """1 if the completion, stripped, is the answer."""
    return [float(text_of(completion).strip() == gold.strip()) for completion, gold in zip(completions, answer)]


def last_number(prompts: list, completions: list, answer: list[str], **_) -> list[float]:
    """1 if the last number in the completion is the answer: GSM8K and its like, "#### 42" or free prose."""
    return [float(final_answer(text_of(text)) == final_answer(gold)) for text, gold in zip(completions, answer)]


def text_of(completion: str | list[dict]) -> str:
    """The text of a completion, which is a list of one message where the prompt was a chat."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def final_answer(text: str) -> str:
    """The last number of a text without its commas, or the stripped text if it has none."""
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return numbers[-1].replace(",", "") if numbers else text.strip()


# ---------------------------------------------------------------------------------------------------------------- math


def soft_overlong_penalty(length_B: torch.Tensor, max_length: int, cache: int) -> torch.Tensor:
    """DAPO sec. 3.4: 0 up to max_length - cache, then linear to -1 at max_length. [B]"""
    return ((max_length - cache - length_B) / cache).clamp(-1, 0)


def baselines(total_PG: torch.Tensor, kind: str, greedy_P: torch.Tensor | None = None) -> torch.Tensor:
    """What each total reward is compared with [P, G]; NaN rewards are left out of means.

    leave_one_out: the mean of the others of its group (2402.14740), itself where there are none. greedy: that of the
    prompt's greedy completion (2310.10505). batch_mean, none: as they say.
    """
    if kind == "leave_one_out":
        known_PG = ~total_PG.isnan()
        others_PG = known_PG.sum(1, keepdim=True) - known_PG.int()
        # From the smallest up: equal rewards, whatever they are, have no advantage from rounding
        smallest_P1 = total_PG.nan_to_num(float("inf")).amin(1, keepdim=True)
        above_PG = (total_PG - smallest_P1).nan_to_num(0)
        mean_PG = smallest_P1 + (above_PG.sum(1, keepdim=True) - above_PG) / others_PG.clamp(min=1)
        return mean_PG.where(others_PG > 0, total_PG)
    if kind == "greedy":
        return greedy_P[:, None].expand_as(total_PG)
    if kind == "batch_mean":
        return total_PG.nanmean().expand_as(total_PG)
    return torch.zeros_like(total_PG)


def normalized(advantages_PG: torch.Tensor) -> torch.Tensor:
    """Mean 0 and standard deviation 1 over the whole rollout, NaN left out."""
    centred_PG = advantages_PG - advantages_PG.nanmean()
    return centred_PG / (nan_std(advantages_PG.reshape(1, -1)) + 1e-4)


def nan_std(value_PG: torch.Tensor) -> torch.Tensor:
    """Standard deviation of each row (Bessel), NaN entries left out; 0 for fewer than two. [P, 1]"""
    count_P1 = (~value_PG.isnan()).sum(1, keepdim=True)
    square_P1 = ((value_PG - value_PG.nanmean(1, keepdim=True)) ** 2).nansum(1, keepdim=True)
    return (square_P1 / (count_P1 - 1).clamp(min=1)).sqrt()


def total_reward(reward_BF: torch.Tensor, weight_F: torch.Tensor) -> torch.Tensor:
    """Weighted sum [B] of the functions that have an opinion; NaN where none has."""
    return (reward_BF * weight_F).nansum(1).masked_fill(reward_BF.isnan().all(1), float("nan"))


def sequence_mean(value_N: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
    """Mean over the trained tokens of each sequence, given back to its tokens [N]."""
    total_B = segment_sum(value_N * batch.loss_mask_N, batch)
    return (total_B / segment_sum(batch.loss_mask_N.float(), batch).clamp(min=1))[batch.seq_N]


def clipped_loss(
    ratio_N: torch.Tensor, advantages_N: torch.Tensor, epsilon_low: float, epsilon_high: float, delta: float | None
) -> torch.Tensor:
    """PPO's pessimistic surrogate of each token [N] (1707.06347 Eq. 7), with a range of its own on each side."""
    clipped_N = ratio_N.clamp(1 - epsilon_low, 1 + epsilon_high)
    if delta is not None:  # bounds the loss of a bad token that became likely; for A > 0 the clip is tighter anyway
        ratio_N = ratio_N.clamp(max=delta)
    return -torch.min(ratio_N * advantages_N, clipped_N * advantages_N)


def correction_weights(
    old_N: torch.Tensor, sampler_N: torch.Tensor, batch: MicroBatch, mode: str, low: float, high: float
) -> torch.Tensor:
    """pi_old / pi_sampler [N], detached, truncated at `high` or zero outside [low, high].

    A product over a long completion decays by itself: with token noise sigma its typical value is exp(-L sigma^2 / 2).
    The length-normalised form does not.
    """
    log_weight_N = (old_N - sampler_N).detach()
    if mode.startswith("sequence_mean"):
        log_weight_N = sequence_mean(log_weight_N, batch)
    elif mode.startswith("sequence"):
        log_weight_N = segment_sum(log_weight_N * batch.loss_mask_N, batch)[batch.seq_N]
    weight_N = log_weight_N.exp()
    if mode.endswith("truncate"):
        return weight_N.clamp(max=high)
    return weight_N * ((weight_N >= low) & (weight_N <= high))


# ------------------------------------------------------------------------------------------------------------- rollout


@dataclass
class Rollout:
    """B sequences laid end to end: A tokens. Plain tensors only, so that a checkpoint can hold one in flight.

        input_ids_A     p p p c c c e | p p c e | ...          p prompt, c completion, e the stop token
        loss_mask_A     . . . 1 1 1 1 | . . 1 1 | ...          all . where a truncated completion is masked
        lengths_B           7             4       ...
    """

    input_ids_A: torch.Tensor
    loss_mask_A: torch.Tensor
    lengths_B: torch.Tensor
    prompt_lengths_B: torch.Tensor
    rewards_BF: torch.Tensor
    rows_B: torch.Tensor | None = None  # of the data set
    advantages_B: torch.Tensor | None = None
    sampler_logprobs_A: torch.Tensor | None = None
    old_logprobs_A: torch.Tensor | None = None
    entropies_A: torch.Tensor | None = None
    reference_logprobs_A: torch.Tensor | None = None

    def split(self, value_A: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Values of all tokens -> those of each sequence."""
        return value_A.split(self.lengths_B.tolist())

    def examples(self) -> list[Example]:
        """The sequences as the packer takes them."""
        columns = zip(self.split(self.input_ids_A), self.split(self.loss_mask_A), self.prompt_lengths_B.tolist())
        return [Example(ids.numpy(), mask.numpy(), row, prompt) for row, (ids, mask, prompt) in enumerate(columns)]

    def completions(self) -> list[Example]:
        """The same with every completion token marked, trained or not: a KL in the reward counts them all."""
        columns = zip(self.split(self.input_ids_A), self.prompt_lengths_B.tolist())
        return [Example(ids, np.arange(len(ids)) >= prompt, row, prompt) for row, (ids, prompt) in enumerate(columns)]


def sample(engine, prompts: list[list[int]], samples: int, sampling: Sampling, seed: int, step: int, first: int, ranks):
    """`samples` completions of each prompt, prompts shared out over the ranks; P * G completions, groups contiguous.

    Every request has a seed of its own from (run, step, prompt, sample): a killed and resumed run draws the same again.
    """
    requests = [
        (ids, request_seed(seed, step, first + p, g)) for p, ids in enumerate(prompts) for g in range(samples)
    ]
    with ranks.split_between_processes(requests) as mine:
        completions = engine.generate([ids for ids, _ in mine], [request for _, request in mine], sampling)
    return gather_object(completions)


def grade(rewards: list, tokenizer, rows: list[dict], completions: list, ranks) -> tuple[list[str], torch.Tensor]:
    """Texts and rewards_BF (NaN where a function has no opinion) of one completion a row, shared out over the ranks."""
    texts = [tokenizer.decode(completion.token_ids, skip_special_tokens=True) for completion in completions]
    with ranks.split_between_processes(list(range(len(rows)))) as mine:
        columns = {name: [rows[i].get(name) for i in mine] for name in rows[0] if name != "prompt"}
        columns["completion_ids"] = [completions[i].token_ids for i in mine]
        scored = score(rewards, [rows[i]["prompt"] for i in mine], [texts[i] for i in mine], columns).tolist()
    return texts, torch.tensor(gather_object(scored), dtype=torch.float32).view(len(rows), len(rewards))


def minibatch(num_sequences: int, parts: int, position: int, seed: tuple[int, int]) -> np.ndarray:
    """Indices of the sequences that optimiser step `position` of a rollout trains on: a fresh shuffle every pass."""
    if parts == 1:
        return np.arange(num_sequences)
    order = np.random.default_rng((*seed, position // parts)).permutation(num_sequences)
    return np.array_split(order, parts)[position % parts]


@torch.no_grad()
def score_rollout(model, rollout: Rollout, layout: str, args: Args, ranks) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies of a whole rollout under `model` [A], the work shared out over the ranks."""
    examples, scored = rollout.completions(), []
    for indices in pack(examples, args.max_tokens_per_micro_batch, ranks.num_processes, layout)[ranks.process_index]:
        batch = collate(examples, indices, ranks.device, layout)
        scores = score_tokens(model, batch, args.temperature, statistics=True)
        scored += zip(indices, batch.give(scores.logprobs_N), batch.give(scores.entropies_N))
    scored = sorted(gather_object(scored), key=lambda item: item[0])
    return torch.cat([logprobs for _, logprobs, _ in scored]), torch.cat([entropies for _, _, entropies in scored])


def collect(
    engine, tokenizer, rows: Rows, prompts: list, rewards: list, weight_F: torch.Tensor, sampling: Sampling,
    cursor: int, step: int, args: Args, ranks, run: Run,
) -> tuple[Rollout, int, dict]:
    """1. draw prompts  2. sample  3. reward  4. keep; round after round under dynamic sampling.

    Returns the rollout, the new cursor into the prompt stream, and metrics (TRL's names where they mean the same).
    """
    wanted = args.generation_batch_size // args.num_generations
    kept, kept_rows, seen, rounds = [], [], [], 0
    while len(kept) < wanted and rounds < (args.dynamic_sampling_max_rounds if args.dynamic_sampling else 1):
        chosen = draw(len(prompts), cursor, wanted, args.seed)
        chosen_rows = [rows[prompts[i][0]] for i in chosen]
        completions = sample(
            engine, [prompts[i][1] for i in chosen], args.num_generations, sampling, args.seed, step, cursor, ranks
        )
        repeated = [row for row in chosen_rows for _ in range(args.num_generations)]
        texts, reward_BF = grade(rewards, tokenizer, repeated, completions, ranks)
        if args.soft_overlong_cache:
            length_B = torch.tensor([len(completion.token_ids) for completion in completions])
            penalty_B = soft_overlong_penalty(length_B, args.max_completion_length, args.soft_overlong_cache)
            reward_BF = torch.cat([reward_BF, penalty_B[:, None]], dim=1)
        cursor, rounds = cursor + wanted, rounds + 1
        for p, i in enumerate(chosen):
            group = slice(p * args.num_generations, (p + 1) * args.num_generations)
            item = (prompts[i][1], completions[group], texts[group], reward_BF[group])
            seen.append(item)
            differs = total_reward(item[3], weight_F).nan_to_num(0).unique().numel() > 1  # exactly; the whole group
            if len(kept) < wanted and (differs or not args.dynamic_sampling):
                kept.append(item)
                kept_rows += [prompts[i][0]] * args.num_generations
    if not kept:
        raise UserError(
            f"step {step}: in {rounds} round(s) of {wanted} prompts no group had differing rewards, so nothing can be "
            "learnt; use easier prompts, more --num_generations, or leave --dynamic_sampling off"
        )

    sequences = [(ids, completion) for ids, completions, _, _ in kept for completion in completions]
    masks = [
        [False] * len(ids)
        + [not (args.mask_truncated_completions and c.finish_reason == "length")] * len(c.token_ids)
        for ids, c in sequences
    ]
    rollout = Rollout(
        input_ids_A=torch.tensor([token for ids, c in sequences for token in ids + c.token_ids], dtype=torch.int32),
        loss_mask_A=torch.tensor([bit for mask in masks for bit in mask]),
        lengths_B=torch.tensor([len(mask) for mask in masks]),
        prompt_lengths_B=torch.tensor([len(ids) for ids, _ in sequences]),
        rewards_BF=torch.cat([group_BF for _, _, _, group_BF in kept]),
        rows_B=torch.tensor(kept_rows),
    )
    if sampling.logprobs:
        rollout.sampler_logprobs_A = torch.tensor(
            [value for ids, c in sequences for value in [0.0] * len(ids) + c.logprobs], dtype=torch.float32
        )

    all_BF = torch.cat([item[3] for item in seen])
    total_B = total_reward(all_BF, weight_F)
    groups_PG = total_B.view(-1, args.num_generations)
    completions = [c for _, group, _, _ in seen for c in group]
    length_B = torch.tensor([len(c.token_ids) for c in completions]).float()
    stopped_B = torch.tensor([c.finish_reason == "stop" for c in completions])
    names = [reward.name for reward in rewards] + (["soft_overlong"] if args.soft_overlong_cache else [])
    metrics = {
        "reward": total_B.nanmean(), "reward_std": nan_std(total_B[None])[0, 0],
        "frac_reward_zero_std": (nan_std(groups_PG) == 0).float().mean(),
        "completions/mean_length": length_B.mean(), "completions/min_length": length_B.min(),
        "completions/max_length": length_B.max(),
        "completions/clipped_ratio": 1 - stopped_B.float().mean(),
        "completions/mean_terminated_length": length_B[stopped_B].mean() if stopped_B.any() else torch.tensor(0.0),
        "tokens/generated": length_B.sum(), "tokens/masked": rollout.input_ids_A.numel() - rollout.loss_mask_A.sum(),
        "tokens/trained": rollout.loss_mask_A.sum(), "sampling/rounds": torch.tensor(rounds),
    }
    for column, name in enumerate(names):
        metrics[f"rewards/{name}/mean"] = all_BF[:, column].nanmean()
        metrics[f"rewards/{name}/std"] = nan_std(all_BF[None, :, column])[0, 0]
    if args.log_completions_steps and (step == 1 or step % args.log_completions_steps == 0):
        ids, _, texts, group_BF = kept[0]
        run.samples(
            f"step {step}", ["prompt", "completion", *names],
            [[tokenizer.decode(ids), text, *reward_F.tolist()] for text, reward_F in list(zip(texts, group_BF))[:4]],
        )
    return rollout, cursor, {name: float(value) for name, value in metrics.items()}


# ---------------------------------------------------------------------------------------------------------- evaluation


def evaluate(
    engine, tokenizer, rows: Rows, prompts: list, rewards: list, sampling: Sampling, step: int, args: Args, ranks,
    run: Run,
) -> dict[str, float]:
    """Greedy and sampled scores on held-out prompts. The same seeds every time, so two evaluations differ by the model.

    The first reward function decides what is a pass (1 or more). The interval is the half-width of a 95 % normal one
    over prompts.
    """
    held_out = [rows[row] for row, _ in prompts]
    metrics = {}
    for suffix, samples, temperature in (("", args.num_generations_eval, sampling.temperature), ("_greedy", 1, 0.0)):
        settings = Sampling(sampling.max_tokens, temperature, stop_token_ids=sampling.stop_token_ids)
        completions = sample(engine, [ids for _, ids in prompts], samples, settings, args.seed, -1, 0, ranks)
        repeated = [row for row in held_out for _ in range(samples)]
        texts, reward_BF = grade(rewards, tokenizer, repeated, completions, ranks)
        for reward, mean in zip(rewards, reward_BF.nanmean(0)):
            metrics[f"eval/{reward.name}{suffix}"] = mean.item()
        passed_PG = (reward_BF[:, 0] >= 1).float().view(-1, samples)
        metrics[f"eval/pass@1{suffix}"] = passed_PG.mean().item()
        metrics[f"eval/pass@1{suffix}_ci95"] = 1.96 * passed_PG.mean(1).std().item() / len(passed_PG) ** 0.5
        metrics[f"eval/completion_length{suffix}"] = float(np.mean([len(c.token_ids) for c in completions]))
        if samples > 1:
            answers = [final_answer(text) for text in texts]
            majority = []
            for p in range(len(prompts)):
                group = answers[p * samples : (p + 1) * samples]
                majority.append(passed_PG[p, group.index(Counter(group).most_common(1)[0][0])].item())
            metrics[f"eval/pass@{samples}"] = passed_PG.amax(1).mean().item()
            metrics[f"eval/maj@{samples}"] = float(np.mean(majority))
        run.samples(
            f"evaluation after step {step}, temperature {temperature:g}",
            ["prompt", "completion", *[reward.name for reward in rewards]],
            [[tokenizer.decode(prompts[p][1]), texts[p * samples], *reward_BF[p * samples].tolist()]
             for p in range(min(4, len(prompts)))],
        )
    return metrics


def main(args: Args) -> None:
    # ------------------------------------------------------------------------------------------------------ 1. setup
    require_at_least(
        1, args, "max_steps", "steps_per_generation", "num_iterations", "max_completion_length", "logging_steps",
        "max_tokens_per_micro_batch", "num_generations_eval", "max_prompt_length",
    )
    require_at_least(2 if args.baseline == "leave_one_out" else 1, args, "num_generations")
    if args.baseline == "greedy" and args.dynamic_sampling:
        raise UserError("--baseline greedy needs the prompts as they are drawn: leave --dynamic_sampling off")
    if args.reward_clip_range is not None and args.reward_clip_range[0] > args.reward_clip_range[1]:
        raise UserError("--reward_clip_range takes the lower end first")
    require_at_least(args.num_generations, args, "generation_batch_size")
    require_at_least(0.01, args, "temperature")  # at 0 a group is one answer G times
    ranks = join_ranks(args.ddp_timeout)
    device = ranks.device
    run = Run(args, __file__, ranks.is_main_process)
    set_seed(args.seed)

    # ------------------------------------------------------------------------------------------ 2. batch arithmetic
    steps_per_rollout = args.steps_per_generation * args.num_iterations
    if args.generation_batch_size % args.num_generations:
        raise UserError(
            f"--generation_batch_size {args.generation_batch_size} does not divide into groups of --num_generations "
            f"{args.num_generations}: take a multiple, such as "
            f"{-(-args.generation_batch_size // args.num_generations) * args.num_generations}"
        )
    if args.generation_batch_size % args.steps_per_generation:
        raise UserError(
            f"--generation_batch_size {args.generation_batch_size} does not divide into --steps_per_generation "
            f"{args.steps_per_generation} equal parts: take a multiple of both it and --num_generations, such as "
            f"{math.lcm(args.steps_per_generation, args.num_generations)}"
        )
    rewards = [load_reward(name, device, globals(), args.reward_timeout) for name in args.reward_funcs]
    if args.reward_weights and len(args.reward_weights) != len(rewards):
        raise UserError(f"{len(args.reward_weights)} --reward_weights for {len(rewards)} --reward_funcs: give one each")
    weight_F = torch.tensor((args.reward_weights or [1.0] * len(rewards)) + [1.0] * bool(args.soft_overlong_cache))
    num_prompts = args.generation_batch_size // args.num_generations
    step_size = args.generation_batch_size // args.steps_per_generation
    run.print(
        f"a rollout: {num_prompts} prompts x {args.num_generations} = {args.generation_batch_size} completions, "
        f"{args.num_iterations} pass(es) of {args.steps_per_generation} optimiser step(s) of {step_size}; "
        f"{args.max_steps} steps in all on {ranks.num_processes} rank(s)"
    )

    # ------------------------------------------------------------------------------------------------------- 3. data
    tokenizer = load_tokenizer(args.model_name_or_path, args.chat_template, args.trust_remote_code)
    rows = load_rows(args.dataset_name, args.dataset_split)
    require_columns(rows, ("prompt",))
    ledger = Ledger()
    prompts = prepare_prompts(rows, tokenizer, args.max_prompt_length, args.on_overlong, ledger)
    ledger.check()
    if not prompts:
        raise UserError(f"{rows.name}: no prompt is as short as --max_prompt_length {args.max_prompt_length}: raise it")
    run.print(f"train  {rows.name}: {ledger}")
    eval_name = args.eval_dataset_name or (args.dataset_name if args.dataset_name.startswith("toy:") else None)
    eval_rows, eval_prompts = None, []
    if eval_name is not None:
        eval_rows, eval_ledger = load_rows(eval_name, args.eval_split), Ledger()
        require_columns(eval_rows, ("prompt",))
        eval_prompts = prepare_prompts(eval_rows, tokenizer, args.max_prompt_length, args.on_overlong, eval_ledger)
        eval_prompts = eval_prompts[: args.max_eval_samples]
        run.print(f"eval   {eval_rows.name}: {eval_ledger}")

    # ------------------------------------------------------------------------------------------------------ 4. models
    dtype = compute_dtype(args.dtype, device)
    model = load_policy(
        args.model_name_or_path, dtype, device, args.trust_remote_code, args.load_in_4bit, args.load_in_8bit
    )
    reference = shard(copy.deepcopy(model).requires_grad_(False)) if args.beta and not args.use_peft else None
    if args.use_peft:
        model = add_lora(
            model, args.lora_r, args.lora_alpha, args.lora_target_modules, args.use_rslora, args.use_dora
        )
    speed_up(model, args.gradient_checkpointing, args.torch_compile)
    shard(model)
    layout = "packed" if layout_of(model) == "shared" and not args.share_prompts else layout_of(model)
    run.print(describe(model))

    # -------------------------------------------------------------------------------------------------- 5. optimiser
    is_toy = args.dataset_name.startswith("toy:")
    learning_rate = args.learning_rate
    if learning_rate is None:
        learning_rate = 5e-4 if is_toy else 1e-5 if args.use_peft else 1e-6
    warmup_steps = int(args.warmup_steps if args.warmup_steps >= 1 else args.warmup_steps * args.max_steps)
    optimizer = make_optimizer(
        model, learning_rate, (args.adam_beta1, args.adam_beta2), args.adam_epsilon, args.weight_decay
    )
    scheduler = get_scheduler(args.lr_scheduler_type, optimizer, warmup_steps, args.max_steps)
    run.print(f"peak learning rate {learning_rate:g} after {warmup_steps} warm-up steps")

    # ----------------------------------------------------------------------------------------------------- 6. engine
    longest = max(len(ids) for _, ids in prompts + eval_prompts) + args.max_completion_length
    limit = getattr(base_model(model).config, "max_position_embeddings", longest)
    if longest > limit:
        raise UserError(
            f"the longest prompt and --max_completion_length {args.max_completion_length} make {longest} tokens, and "
            f"the model takes {limit}: lower --max_completion_length, or --max_prompt_length with --on_overlong drop"
        )
    engine = build_engine(
        "vllm" if args.use_vllm else "transformers", model, run.folder / "engine", max_model_len=longest,
        dtype=str(dtype).removeprefix("torch."),  # vLLM's own choice for fp32 weights would be half precision
        gpu_memory_utilization=args.vllm_gpu_memory_utilization, enable_sleep=args.vllm_enable_sleep_mode,
        seed=args.seed, timeout=args.generation_timeout,
    )
    correction = args.sampler_correction
    if correction == "auto":
        correction = "sequence_mean_truncate" if args.use_vllm else "none"
    sampling = Sampling(
        args.max_completion_length, args.temperature, args.top_p, args.top_k, args.min_p, args.repetition_penalty,
        stop_ids(tokenizer, base_model(model).generation_config.eos_token_id, args.stop_strings),
    )
    full_softmax = (args.top_p, args.top_k, args.min_p, args.repetition_penalty) == (1.0, 0, 0.0, 1.0)

    # ----------------------------------------------------------------------------------------------------- 7. resume
    first_step, cursor, rollout, rollout_metrics = 0, 0, None, {}
    checkpoint = run.load_checkpoint()
    if checkpoint is not None:
        first_step, state = checkpoint
        model.load_state_dict(state["model"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        restore_random_state(state["random"])
        cursor, rollout, rollout_metrics = state["cursor"], Rollout(**state["rollout"]), state["rollout_metrics"]
    engine.push_weights(model)
    if eval_prompts and first_step == 0 and not args.inspect:
        metrics = evaluate(engine, tokenizer, eval_rows, eval_prompts, rewards, sampling, 0, args, ranks, run)
        run.log(0, metrics)
        run.print("before training  " + "  ".join(f"{name} {value:.3f}" for name, value in metrics.items()))
        run.keep_best(0, metrics, lambda folder: save_model(model, tokenizer, folder))

    # ------------------------------------------------------------------------------------------------------- 8. loop
    epsilon_high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    weights_before = weight_sum(optimizer) if first_step == 0 else None
    for step in range(first_step + 1, args.max_steps + 1):
        position = (step - 1) % steps_per_rollout
        clock = {"time/generation": 0.0, "time/scoring": 0.0}
        started = time.perf_counter()

        # 8.1 A new rollout, scored by whoever will be compared with the policy
        if position == 0:
            first, wants_logprobs = cursor, correction != "none" or (step == 1 and full_softmax)
            rollout, cursor, rollout_metrics = collect(
                engine, tokenizer, rows, prompts, rewards, weight_F,
                replace(sampling, logprobs=wants_logprobs), cursor, step, args, ranks, run,
            )
            clock["time/generation"] = time.perf_counter() - started
            lowest, highest = args.reward_clip_range or (-math.inf, math.inf)
            total_B, greedy_P = total_reward(rollout.rewards_BF, weight_F).clamp(lowest, highest), None
            if args.baseline == "greedy":
                chosen_prompts = [prompts[i] for i in draw(len(prompts), first, num_prompts, args.seed)]
                greedy = sample(
                    engine, [ids for _, ids in chosen_prompts], 1, replace(sampling, temperature=0.0), args.seed, step,
                    first, ranks,
                )
                _, greedy_BF = grade(rewards, tokenizer, [rows[row] for row, _ in chosen_prompts], greedy, ranks)
                if args.soft_overlong_cache:
                    length_P = torch.tensor([len(completion.token_ids) for completion in greedy])
                    penalty_P = soft_overlong_penalty(length_P, args.max_completion_length, args.soft_overlong_cache)
                    greedy_BF = torch.cat([greedy_BF, penalty_P[:, None]], dim=1)
                greedy_P = total_reward(greedy_BF, weight_F).clamp(lowest, highest).nan_to_num(0)
            engine.sleep()
            # On policy the old log-probs are the current ones, detached; step 1 computes them for the gates
            if steps_per_rollout > 1 or step == 1 or args.beta:
                rollout.old_logprobs_A, _ = score_rollout(model, rollout, layout, args, ranks)
            if args.beta:
                with without_adapter(model) if args.use_peft else nullcontext(reference) as prior:
                    rollout.reference_logprobs_A, _ = score_rollout(prior, rollout, layout, args, ranks)
                kl_A = rollout.old_logprobs_A - rollout.reference_logprobs_A
                kl_B = torch.stack([kl_T.sum() for kl_T in rollout.split(kl_A)])
                total_B = total_B - args.beta * kl_B
                rollout_metrics["kl"] = kl_B.mean().item()
                rollout_metrics["rlhf_reward"] = total_B.nanmean().item()
            total_PG = total_B.view(-1, args.num_generations)
            advantages_PG = total_PG - baselines(total_PG, args.baseline, greedy_P)
            if args.normalize_advantages:
                advantages_PG = normalized(advantages_PG)
            rollout.advantages_B = advantages_PG.flatten().nan_to_num(0.0)
            clock["time/scoring"] = time.perf_counter() - started - clock["time/generation"]

        # 8.2 Which sequences this step takes, and what each of their tokens weighs: known before the first backward
        examples, advantages_B = rollout.examples(), rollout.advantages_B
        chosen = minibatch(len(examples), args.steps_per_generation, position, (args.seed, step - position))
        trained_B = torch.zeros(len(examples))
        trained_B[chosen] = torch.tensor([float(examples[i].loss_mask.sum()) for i in chosen])
        num_sequences, num_trained_tokens = max(1, int((trained_B > 0).sum())), max(1, int(trained_B.sum()))
        needed = [i for i in chosen if trained_B[i] > 0 and advantages_B[i] != 0]  # else no gradient: do not run it
        micro_batches = pack(
            [examples[i] for i in needed], args.max_tokens_per_micro_batch, ranks.num_processes, layout
        )[ranks.process_index]

        # 8.3 Forward and backward, one packed row at a time
        sums = dict.fromkeys(SUMS, 0.0)
        for micro in micro_batches:
            batch = collate(examples, [int(needed[i]) for i in micro], device, layout)
            advantages_N = batch.spread(advantages_B)
            if args.inspect:
                return show_batch(run, tokenizer, batch, advantages_N)
            scores = score_tokens(model, batch, args.temperature, statistics=True)
            logprobs_N, mask_N = scores.logprobs_N, batch.loss_mask_N
            old_N = scored_N = logprobs_N.detach()
            if rollout.old_logprobs_A is not None:
                scored_N = batch.take(rollout.split(rollout.old_logprobs_A))
            if steps_per_rollout > 1:
                old_N = scored_N
            first_M = batch.cu_seqlens[:-1].long()  # a token of each of the M sequences in this row
            advantages_M = advantages_N[first_M]
            ratio_M = segment_sum((logprobs_N - old_N) * mask_N, batch).clamp(max=20).exp()  # no overflow
            loss_M = clipped_loss(ratio_M, advantages_M, args.epsilon, epsilon_high, None)
            if correction != "none":
                sampler_N = batch.take(rollout.split(rollout.sampler_logprobs_A))
                correction_N = correction_weights(
                    old_N, sampler_N, batch, correction, args.sampler_correction_min, args.sampler_correction_max
                )
                loss_M = loss_M * correction_N[first_M]
            loss = loss_M.sum() / num_sequences
            loss.backward()

            with torch.no_grad():  # what to log, as sums over trained tokens
                sums["loss"] += loss
                sums["tokens"] += mask_N.sum()
                sums["entropy"] += scores.entropies_N.sum()
                sums["gap_to_old"] += ((logprobs_N - scored_N).abs() * mask_N).sum()
                sums["clip_low"] += ((ratio_M < 1 - args.epsilon) & (advantages_M < 0)).sum()
                sums["clip_high"] += ((ratio_M > 1 + epsilon_high) & (advantages_M > 0)).sum()
                if correction != "none":
                    sums["gap"] += ((old_N - sampler_N).abs() * mask_N).sum()
                    sums["weight"] += (correction_N * mask_N).sum()
                    sums["weight_squared"] += (correction_N**2 * mask_N).sum()
                    sums["weight_zero"] += ((correction_N == 0) & mask_N).sum()
        values = sum_over_ranks(torch.tensor([float(sums[name]) for name in SUMS], dtype=torch.float64, device=device))
        sums = dict(zip(SUMS, values.tolist()))
        per_token = {name: value / max(1.0, sums["tokens"]) for name, value in sums.items()}  # of those that were run
        clip_low, clip_high = sums["clip_low"] / num_sequences, sums["clip_high"] / num_sequences  # of all

        # 8.4 Gates of step one: what must hold before a curve means anything
        if step == 1:
            noise = 1e-4 if dtype == torch.float32 else 0.1  # bf16 log-probs vary by hundredths between micro-batches
            run.gate("trained tokens in the step", num_trained_tokens, "> 0", trained_B.sum() > 0)
            gap = per_token["gap_to_old"]
            run.gate("|log pi - log pi_old| before the first update", gap, f"0, below {noise:g}", gap < noise)
            if args.beta:
                kl = rollout_metrics["kl"] / max(1.0, rollout_metrics["completions/mean_length"])
                run.gate("KL of a token to the reference", kl, f"0, below {noise:g}", abs(kl) < noise)
            if rollout.sampler_logprobs_A is not None and full_softmax:
                gap = agreement(
                    rollout.sampler_logprobs_A[rollout.loss_mask_A], rollout.old_logprobs_A[rollout.loss_mask_A]
                )["mean"]
                limit = 1e-3 if dtype == torch.float32 else 0.1  # stale weights are off by nats
                run.gate("|log p sampler - log p trainer|", gap, f"0, below {limit:g}", gap < limit)

        # 8.5 Update, then the engine gets the new weights
        grad_norm = clip_gradients(optimizer, args.max_grad_norm, sums["loss"])
        run.require_finite(grad_norm, sums["loss"], step, (rows.where(rollout.rows_B[i]) for i in chosen))
        learning_rate = scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if weights_before is not None and learning_rate > 0 and grad_norm > 0:
            moved = abs(weight_sum(optimizer) - weights_before) > 0  # no, if it is no number
            run.gate("weights moved by the first update", float(moved), "1", moved)
            weights_before = None
        clock["time/training"] = time.perf_counter() - started - clock["time/generation"] - clock["time/scoring"]
        if (position + 1) % steps_per_rollout == 0:
            engine.push_weights(model)

        # 8.6 Log, save, evaluate
        last = step == args.max_steps
        if step % args.logging_steps == 0 or last:
            metrics = {
                **rollout_metrics, "loss": sums["loss"], "grad_norm": grad_norm.item(), "learning_rate": learning_rate,
                "entropy": per_token["entropy"], "clip_ratio/low_mean": clip_low, "clip_ratio/high_mean": clip_high,
                "clip_ratio/region_mean": clip_low + clip_high, "tokens/run": sums["tokens"],
                "epoch": cursor / len(prompts),
            }
            if correction != "none":
                metrics["sampling/sampling_logp_difference/mean"] = per_token["gap"]
                metrics["sampling/importance_sampling_ratio/mean"] = per_token["weight"]
                metrics["sampling/frac_masked"] = per_token["weight_zero"]
                metrics["sampling/effective_sample_size"] = sums["weight"] ** 2 / max(
                    1e-9, sums["weight_squared"] * sums["tokens"]
                )
            clock["time/step"] = time.perf_counter() - started
            if position == 0:
                clock["generated_tokens_per_second"] = rollout_metrics["tokens/generated"] / clock["time/generation"]
            run.log(step, metrics, clock)
            run.progress(step, args.max_steps, {
                name: metrics[name] for name in ("reward", "frac_reward_zero_std", "entropy", "completions/mean_length")
            })
        if last:  # first of all: nothing that fails from here on costs the model
            save_model(model, tokenizer, run.final_folder)
            run.print(f"saved {run.final_folder}")
        if eval_prompts and (last or (args.eval_steps and step % args.eval_steps == 0)):
            engine.push_weights(model)
            metrics = evaluate(engine, tokenizer, eval_rows, eval_prompts, rewards, sampling, step, args, ranks, run)
            run.log(step, metrics)
            run.print(f"after step {step}  " + "  ".join(f"{name} {value:.3f}" for name, value in metrics.items()))
            run.keep_best(step, metrics, lambda folder: save_model(model, tokenizer, folder))
        if not last:
            run.end_step(step, {
                "model": trained_weights(model),
                "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(), "random": random_state(),
                "cursor": cursor, "rollout": vars(rollout), "rollout_metrics": rollout_metrics,
            })

    engine.close()
    run.finish()


if __name__ == "__main__":
    launch(main, Args)
