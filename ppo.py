"""PPO for language models: every token is an action, and a critic says how much better it went than expected.

    r_t    = - beta (log pi_old(y_t) - log pi_ref(y_t)),  and the completion's score on top of its last token
    A_t    = sum_k (gamma lam)^k delta_{t+k},   delta_t = r_t + gamma V_{t+1} - V_t               GAE, 1506.02438
    G_t    = A_t + V_t,  then A is whitened
    policy = mean over tokens of  - min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t)            PPO, 1707.06347 Eq. 7
    critic = mean over tokens of  1/2 max((V_t - G_t)^2, (clip(V_t, V_old - eps_v, V_old + eps_v) - G_t)^2)
    loss   = policy + vf_coef critic

with rho_t = pi(y_t) / pi_old(y_t). One rollout is taken apart by several passes of several optimiser steps.

What differs from rloo.py (`diff ppo.py rloo.py`): a second network, advantages of tokens and not of completions, no
groups (a prompt needs one completion), and several updates a rollout by default.

The details that decide whether PPO works, each with its test in tests/test_ppo.py
   1. The score stands on the last token of a completion and nowhere else.                 test_score_on_the_last_token
   2. V_t is read at the position before token t.                                           test_values_are_read_before
   3. After the last token V is 0: the episode is over, cut off or not.                        test_gae_sums_the_future
   4. Without a stop token the score is replaced by -1, or has 1 taken off, or stays.                 test_missing_stop
   5. What ends a completion is the sampler's finish reason: any stop token, no id.                 test_any_stop_token
   6. Returns are made of advantages before whitening.                                   test_returns_of_raw_advantages
   7. Whitening is over all trained tokens of the rollout and all ranks; biased variance.                test_whitening
   8. Rewards, if whitened, keep their mean: only the scale goes.                                        test_whitening
   9. The KL is of sampled tokens, for each token; objective/kl is its sum.                   test_kl_of_sampled_tokens
  10. An adaptive beta moves by at most 0.2 episodes / horizon a rollout.                            test_adaptive_beta
  11. The critic's lambda may differ: its returns are then other sums.                                 test_two_lambdas
  12. The critic starts as a reward model, with its mean and std, or as the policy.          test_where_a_critic_starts
  13. In that case its head is 0: the first advantages are sums of rewards.                  test_where_a_critic_starts
  14. The critic may learn first, the policy held still, and at its own rate.                       test_critic_warm_up
  15. Passes x minibatches optimiser steps, no more, no fewer; reshuffled every pass.              test_number_of_steps
  16. Before the first update of a rollout every ratio is 1.                                          test_first_ratios
  17. The temperature divides the logits of the policy, the old one and the reference.                 test_temperature
  18. A clipped value takes the worse of both errors, and half of it.                                   test_value_loss
  19. Losses are means over all trained tokens of the step, however it is cut.                      test_no_cut_matters
  20. So are the metrics; no padding dilutes them.                                                  test_no_cut_matters
  21. Each network's gradient is clipped by its own norm.                                            test_clipped_alone
  22. Adam's epsilon is 1e-5, and both rates fall to 0.                                         test_optimiser_settings
  23. A completion of one token, without a stop, or masked is no special case.               test_hand_made_completions
  24. A killed run resumes: critic, both optimisers, rollout in flight, beta.                      tests/test_resume.py

Departures from the papers and from what is usual
  1. Nothing is padded (common/data.py), so no sentinel log-prob leaks into a mean. GAE alone pads, on the right, with
     zeros: they are what its definition has there.
  2. Old log-probs are computed here, not taken from the sampler, whose kernels differ; --sampler_correction weighs each
     token by pi_old / pi_sampler.
  3. A completion that no reward function scores has no loss.
  4. A completion cut off at max_completion_length ends its episode: no value is bootstrapped behind it.
  5. --value_model shared reads values off the policy's own trunk, for half of the memory. They cost a forward pass of
     their own after sampling, which a fork could save.

Dimension key: N tokens of a micro-batch, B sequences, T tokens of a completion, F reward functions, A all tokens of a
rollout laid end to end.

    python sft.py && python ppo.py                                          # the toy: 2 CPU cores, no network, a minute
    python ppo.py --dataset_name prompts.jsonl --reward_funcs runs/reward/final --value_model runs/reward/final
    torchrun --nproc_per_node 8 ppo.py --model_name_or_path ... --dataset_name ... --use_vllm

What you should see: on the toy, eval/exact_match from 0.3 to above 0.9, and val/explained_variance between 0 and 0.3:
a slip comes by chance, and no critic sees it coming. objective/kl should rise slowly. If it runs away while
objective/scores rises, the policy has found a hole in the reward.
"""

import copy
import math
import re
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from torch.nn.utils.rnn import pad_sequence
from transformers import get_scheduler

from common.data import (
    Example, Ledger, MicroBatch, Rows, collate, draw, load_rows, pack, prepare_prompts, require_columns,
    segment_sum,
)
from common.engine import Sampling, agreement, build_engine, request_seed, stop_ids
from common.models import (
    add_lora, base_model, compute_dtype, hidden_states, layout_of, load_policy, load_scorer, load_tokenizer,
    score_states, score_tokens, speed_up, without_adapter,
)
from common.rewards import load_reward, score
from common.run import (
    Run, UserError, launch, random_state, require_at_least, restore_random_state, set_seed, show_batch,
)
from common.sharding import (
    clip_gradients, describe, join_ranks, make_optimizer, save_model, shard,
    sum_over_ranks, trained_weights, weight_sum,
)


@dataclass
class Args:
    # Run
    output_dir: str = "runs/ppo"
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
    value_model: str = "policy"
    """Where the critic starts: "policy", a network of its own with the policy's weights and a head of zeros; "shared",
    such a head on the policy itself; or a folder or hub name of a reward model or a language model."""
    trust_remote_code: bool = False
    """Run model code that comes with the weights."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: a third more compute, far less memory."""
    torch_compile: bool = False
    """Compile each layer once: slower start, faster steps."""
    use_peft: bool = False
    """Train LoRA adapters instead of all weights; the reference policy is then the model with its adapter off."""
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
    num_generations: int = 1
    """Completions of each prompt."""
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
    """Peak learning rate (None: 3e-6; 1e-5 with use_peft; 5e-4 for the toy)."""
    critic_learning_rate: float | None = None
    """The critic's (None: learning_rate)."""
    critic_warmup_steps: int = 0
    """Optimiser steps at the start in which only the critic learns."""
    max_steps: int = 400
    """Optimiser steps: rollouts x num_iterations x steps_per_generation."""
    steps_per_generation: int = 2
    """Optimiser steps (minibatches) that one pass over a rollout is cut into."""
    num_iterations: int = 2
    """Passes (epochs) over each rollout."""
    max_tokens_per_micro_batch: int = 16384
    """Tokens of one forward and backward pass: the memory knob. It changes no result."""
    share_prompts: bool = True
    """Compute a prompt of several completions once, which attend to it: faster, the same result to rounding."""
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
    adam_epsilon: float = 1e-5
    """AdamW's epsilon."""
    max_grad_norm: float = 1.0
    """Clip the gradient of a step to this norm, each network by itself (0: no clipping)."""

    # Algorithm
    gamma: float = 1.0
    """Discount a token."""
    lam: float = 0.95
    """GAE's lambda: 1 trusts what came out, 0 the critic."""
    lam_value: float | None = None
    """Lambda of the critic's returns (None: lam)."""
    whiten_advantages: bool = True
    """Mean 0 and variance 1 over the trained tokens of the rollout."""
    whiten_rewards: bool = False
    """Scale the rewards of tokens about their mean to variance 1, before GAE."""
    reward_clip_range: tuple[float, float] | None = None
    """Clip the summed reward to this range, before the KL."""
    missing_eos: Literal["replace", "subtract", "none"] = "replace"
    """A completion that did not stop: its score becomes -missing_eos_penalty, has that taken off, or stays."""
    missing_eos_penalty: float = 1.0
    """See missing_eos."""
    epsilon: float = 0.2
    """Lower clip range, and upper one unless epsilon_high is given."""
    epsilon_high: float | None = None
    """Upper clip range."""
    delta: float | None = None
    """Cap on the ratio where the advantage is negative (two-sided or dual clip; above 1 + epsilon_high)."""
    cliprange_value: float | None = 0.2
    """Clip values to this range around those of the rollout (None: no clipping)."""
    vf_coef: float = 0.1
    """Weight of the critic's loss."""
    beta: float = 0.05
    """KL coefficient (0: no reference model is loaded)."""
    kl_estimator: Literal["k1", "k2", "k3", "k3_corrected"] = "k1"
    """Of KL(pi || ref) at a sampled token. In the reward k1 is the exact choice, in the loss k3_corrected."""
    kl_in: Literal["loss", "reward"] = "reward"
    """Where the KL goes."""
    kl_target: float | None = None
    """Let beta follow this KL of a whole completion (None: beta is fixed)."""
    kl_horizon: int = 10_000
    """Completions over which an adaptive beta adapts."""
    sampler_correction: Literal[
        "auto", "none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "sequence_mean_truncate",
        "sequence_mean_mask",
    ] = "auto"
    """Weight by pi_old / pi_sampler: of a token, of a sequence (product), or of a sequence length-normalised (geometric
    mean); truncated at the cap, or set to 0 outside the bounds. auto: token_truncate with vLLM, else none."""
    sampler_correction_max: float = 2.0
    """Cap on that weight."""
    sampler_correction_min: float = 0.0
    """Lower bound on that weight, for the masking forms."""
    mask_truncated_completions: bool = False
    """No loss on completions that hit max_completion_length."""

    # Evaluation
    eval_dataset_name: str | None = None
    """Held-out prompts (None: the toy's own; for other data no evaluation)."""
    eval_split: str = "test"
    """Split of the evaluation data."""
    eval_steps: int = 0
    """Evaluate every so many steps (0: only before the first and after the last)."""
    metric_for_best_model: str = ""
    """Keep the model that is best by this number, named as in metrics.jsonl, in best/ ("": off), without its critic."""
    greater_is_better: bool | None = None
    """Whether more of it is better (None: no if its name ends in "loss", else yes)."""
    num_generations_eval: int = 1
    """k, sampled completions of each held-out prompt: pass@1 is their mean, pass@k any, maj@k the majority."""
    max_eval_samples: int = 512
    """Rows of the evaluation set that are used."""


SUMS = (
    "policy_loss", "value_loss", "tokens", "entropy", "gap_to_old", "square_to_old", "ratio", "ratio_squared",
    "clipped", "value_clipped", "gap", "weight", "weight_squared", "weight_zero",
)  # of a step's trained tokens, added up over micro-batches and ranks

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


def score_of_stop(score_B: torch.Tensor, stopped_B: torch.Tensor, mode: str, penalty: float) -> torch.Tensor:
    """What a completion is worth that did not stop [B]: -penalty ("replace"), that much less ("subtract"), the same."""
    if mode == "none":
        return score_B
    return score_B.where(stopped_B, torch.full_like(score_B, -penalty) if mode == "replace" else score_B - penalty)


def token_rewards(score_B: torch.Tensor, kl_BT: torch.Tensor, length_B: torch.Tensor, beta: float) -> torch.Tensor:
    """-beta KL of every token, and the score on the last one, if there is one. [B, T], 0 right of a completion."""
    last_BT = torch.arange(kl_BT.shape[1]) == length_B[:, None] - 1
    return -beta * kl_BT + score_B[:, None] * last_BT


def gae(reward_BT: torch.Tensor, value_BT: torch.Tensor, gamma: float, lam: float) -> torch.Tensor:
    """Generalised advantages (1506.02438). [B, T]

    Both are 0 right of a completion, which says that nothing comes after its last token: so are the advantages there.
    """
    advantage_BT = torch.zeros_like(value_BT)
    next_value_B = next_advantage_B = torch.zeros_like(value_BT[:, 0])
    for t in reversed(range(value_BT.shape[1])):
        delta_B = reward_BT[:, t] + gamma * next_value_B - value_BT[:, t]
        advantage_BT[:, t] = next_advantage_B = delta_B + gamma * lam * next_advantage_B
        next_value_B = value_BT[:, t]
    return advantage_BT


def whiten(value_A: torch.Tensor, mask_A: torch.Tensor, shift_mean: bool = True) -> torch.Tensor:
    """Variance 1 (biased) over the masked ones, mean 0 or, without `shift_mean`, what it was; 0 elsewhere."""
    known = value_A[mask_A].double()
    variance, mean = torch.var_mean(known, correction=0)
    white = (known - mean) * (variance + 1e-8).rsqrt() + (0 if shift_mean else mean)
    return torch.zeros_like(value_A).masked_scatter(mask_A, white.to(value_A.dtype))


def explained_variance(value: torch.Tensor, target: torch.Tensor) -> float:
    """1 - Var(target - value) / Var(target): 1 for a perfect critic, 0 for one that knows the mean alone, or less."""
    return 1 - ((target - value).var(correction=0) / target.var(correction=0).clamp(min=1e-8)).item()


def value_loss(
    value_N: torch.Tensor, old_value_N: torch.Tensor, return_N: torch.Tensor, cliprange: float | None
) -> torch.Tensor:
    """Half the squared error of each token [N], the worse of itself and of the value clipped around its old one."""
    error_N = (value_N - return_N) ** 2
    if cliprange is not None:
        clipped_N = old_value_N + (value_N - old_value_N).clamp(-cliprange, cliprange)
        error_N = torch.max(error_N, (clipped_N - return_N) ** 2)
    return 0.5 * error_N


def adapted_beta(beta: float, kl: float, target: float, episodes: int, horizon: int) -> float:
    """The next KL coefficient (1909.08593 sec. 2.2): a proportional controller, its relative error clipped to 0.2."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return beta * (1 + error * episodes / horizon)


def nan_std(value_PG: torch.Tensor) -> torch.Tensor:
    """Standard deviation of each row (Bessel), NaN entries left out; 0 for fewer than two. [P, 1]"""
    count_P1 = (~value_PG.isnan()).sum(1, keepdim=True)
    square_P1 = ((value_PG - value_PG.nanmean(1, keepdim=True)) ** 2).nansum(1, keepdim=True)
    return (square_P1 / (count_P1 - 1).clamp(min=1)).sqrt()


def kl_estimate(logprobs_N: torch.Tensor, reference_N: torch.Tensor, estimator: str, ratio_N=1.0) -> torch.Tensor:
    """KL(pi || ref) at sampled tokens [N] (Schulman 2020). As losses their expected gradients differ:

    k1: zero. k2: that of KL(pi || ref). k3: that of KL(ref || pi). ratio * k3: that of KL(pi || ref), off policy too,
    because the ratio is not detached (tests/test_grpo_math.py enumerates all four).
    """
    delta_N = logprobs_N - reference_N
    if estimator == "k1":
        return delta_N
    if estimator == "k2":
        return 0.5 * delta_N**2
    k3_N = torch.expm1(-delta_N) + delta_N
    return k3_N * ratio_N if estimator == "k3_corrected" else k3_N


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


@torch.no_grad()
def value_rollout(critic, rollout: Rollout, layout: str, args: Args, ranks) -> torch.Tensor:
    """Values of a whole rollout [A]: of each completion token, what the critic expected before it."""
    examples, valued = rollout.completions(), []
    for indices in pack(examples, args.max_tokens_per_micro_batch, ranks.num_processes, layout)[ranks.process_index]:
        batch = collate(examples, indices, ranks.device, layout)
        valued += zip(indices, batch.give(token_values(critic, batch, hidden_states(critic, batch))))
    return torch.cat([value_T for _, value_T in sorted(gather_object(valued), key=lambda item: item[0])])


def token_values(critic, batch: MicroBatch, hidden_NE: torch.Tensor) -> torch.Tensor:
    """V before each token that carries loss [N]; a reward model's are in the units of its rewards."""
    config = base_model(critic).config
    mean, std = getattr(config, "reward_mean", 0.0), getattr(config, "reward_std", 1.0)
    return (score_states(critic, batch, hidden_NE) - mean) / std * batch.loss_mask_N


def save_critic(critic, tokenizer, folder: Path) -> None:
    """A stock sequence-classification folder, LoRA merged: --value_model takes it again."""
    save_model(base_model(critic), tokenizer, folder)


def roll_out(
    engine, tokenizer, rows: Rows, prompts: list, rewards: list, weight_F: torch.Tensor, sampling: Sampling,
    cursor: int, step: int, args: Args, ranks, run: Run,
) -> tuple[Rollout, torch.Tensor, dict]:
    """1. draw prompts  2. sample  3. reward  4. see to those that did not stop, or have no reward.

    Returns the rollout, its score_B (NaN without a reward), and metrics (TRL's names where they mean the same).
    """
    num_prompts = args.generation_batch_size // args.num_generations
    chosen = [prompts[i] for i in draw(len(prompts), cursor, num_prompts, args.seed)]
    completions = sample(
        engine, [ids for _, ids in chosen], args.num_generations, sampling, args.seed, step, cursor, ranks
    )
    repeated = [prompt for prompt in chosen for _ in range(args.num_generations)]
    texts, reward_BF = grade(rewards, tokenizer, [rows[row] for row, _ in repeated], completions, ranks)
    stopped_B = torch.tensor([completion.finish_reason == "stop" for completion in completions])
    total_B = total_reward(reward_BF, weight_F)
    score_B = total_B.clamp(*args.reward_clip_range) if args.reward_clip_range else total_B
    score_B = score_of_stop(score_B, stopped_B, args.missing_eos, args.missing_eos_penalty)
    score_B = score_B.masked_fill(total_B.isnan(), math.nan)

    trained_B = ~score_B.isnan() & (stopped_B | (not args.mask_truncated_completions))
    pairs = [(ids, completion.token_ids) for (_, ids), completion in zip(repeated, completions)]
    rollout = Rollout(
        input_ids_A=torch.tensor([token for prompt, reply in pairs for token in prompt + reply], dtype=torch.int32),
        loss_mask_A=torch.tensor([
            bit for (prompt, reply), known in zip(pairs, trained_B.tolist())
            for bit in [False] * len(prompt) + [known] * len(reply)
        ]),
        lengths_B=torch.tensor([len(prompt) + len(reply) for prompt, reply in pairs]),
        prompt_lengths_B=torch.tensor([len(prompt) for prompt, _ in pairs]),
        rewards_BF=reward_BF,
        rows_B=torch.tensor([row for row, _ in repeated]),
    )
    if sampling.logprobs:
        rollout.sampler_logprobs_A = torch.tensor(
            [value for (_, ids), c in zip(repeated, completions) for value in [0.0] * len(ids) + c.logprobs],
            dtype=torch.float32,
        )

    length_B = (rollout.lengths_B - rollout.prompt_lengths_B).float()
    metrics = {
        "reward": total_B.nanmean(), "reward_std": nan_std(total_B[None])[0, 0],
        "completions/mean_length": length_B.mean(), "completions/min_length": length_B.min(),
        "completions/max_length": length_B.max(),
        "completions/clipped_ratio": 1 - stopped_B.float().mean(),
        "completions/mean_terminated_length": length_B[stopped_B].mean() if stopped_B.any() else torch.tensor(0.0),
        "tokens/generated": length_B.sum(), "tokens/masked": rollout.input_ids_A.numel() - rollout.loss_mask_A.sum(),
        "tokens/trained": rollout.loss_mask_A.sum(), "val/num_eos_tokens": stopped_B.sum(),
    }
    for column, reward in enumerate(rewards):
        metrics[f"rewards/{reward.name}/mean"] = reward_BF[:, column].nanmean()
        metrics[f"rewards/{reward.name}/std"] = nan_std(reward_BF[None, :, column])[0, 0]
    steps_per_rollout = args.steps_per_generation * args.num_iterations
    if args.log_completions_steps and (step - 1) % args.log_completions_steps < steps_per_rollout:
        run.samples(
            f"step {step}", ["prompt", "completion", *[reward.name for reward in rewards], "score"],
            [[tokenizer.decode(repeated[i][1]), texts[i], *reward_BF[i].tolist(), score_B[i].item()]
             for i in range(min(4, len(texts)))],
        )
    return rollout, score_B, {name: float(value) for name, value in metrics.items()}


@dataclass
class Targets:
    """What the two losses of a rollout aim at, for all its tokens; 0 where a token is no completion's."""

    values_A: torch.Tensor  # of the critic before the first update
    advantages_A: torch.Tensor
    returns_A: torch.Tensor


def by_completion(value_A: torch.Tensor, rollout: Rollout) -> torch.Tensor:
    """Values of all tokens -> those of completions side by side [B, T], 0 to the right of a shorter one."""
    parts = zip(rollout.split(value_A), rollout.prompt_lengths_B.tolist())
    return pad_sequence([value_T[prompt:] for value_T, prompt in parts], batch_first=True)


def end_to_end(value_BT: torch.Tensor, rollout: Rollout) -> torch.Tensor:
    """The reverse of by_completion [A], 0 for the tokens of prompts."""
    parts = zip(value_BT, rollout.lengths_B.tolist(), rollout.prompt_lengths_B.tolist())
    return torch.cat([F.pad(value_T[: length - prompt], (prompt, 0)) for value_T, length, prompt in parts])


def targets(
    rollout: Rollout, score_B: torch.Tensor, values_A: torch.Tensor, beta: float, args: Args
) -> tuple[Targets, dict]:
    """Rewards of tokens, their advantages and returns; and metrics, in which a KL is the sum over a completion."""
    mask_A, value_BT = rollout.loss_mask_A, by_completion(values_A, rollout)
    length_B = rollout.lengths_B - rollout.prompt_lengths_B
    kl_A = penalty_A = torch.zeros_like(values_A)
    if beta:
        kl_A = rollout.old_logprobs_A - rollout.reference_logprobs_A
        penalty_A = kl_estimate(rollout.old_logprobs_A, rollout.reference_logprobs_A, args.kl_estimator)
    in_reward = beta if args.kl_in == "reward" else 0.0
    reward_BT = token_rewards(score_B.nan_to_num(0), by_completion(penalty_A, rollout), length_B, in_reward)
    if args.whiten_rewards:
        reward_BT = by_completion(whiten(end_to_end(reward_BT, rollout), mask_A, shift_mean=False), rollout)
    advantages_A = end_to_end(gae(reward_BT, value_BT, args.gamma, args.lam), rollout)
    returns_A = values_A + advantages_A
    if args.lam_value is not None:
        returns_A = values_A + end_to_end(gae(reward_BT, value_BT, args.gamma, args.lam_value), rollout)
    kl_B, penalty_B = by_completion(kl_A, rollout).sum(1), by_completion(penalty_A, rollout).sum(1)
    metrics = {
        "objective/scores": score_B.nanmean(), "objective/kl": kl_B.mean(),
        "objective/entropy": -by_completion(rollout.old_logprobs_A, rollout).sum(1).mean(),
        "objective/non_score_reward": -in_reward * penalty_B.mean(),
        "objective/rlhf_reward": (score_B - in_reward * penalty_B).nanmean(), "objective/beta": beta,
        "val/value_mean": values_A[mask_A].mean(), "val/return_mean": returns_A[mask_A].mean(),
        "val/explained_variance": explained_variance(values_A[mask_A], returns_A[mask_A]),
    }
    if args.whiten_advantages:
        advantages_A = whiten(advantages_A, mask_A)
    return Targets(values_A, advantages_A, returns_A), {name: float(value) for name, value in metrics.items()}


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
        "max_tokens_per_micro_batch", "num_generations_eval", "max_prompt_length", "num_generations", "kl_horizon",
    )
    require_at_least(0, args, "critic_warmup_steps", "beta", "vf_coef", "gamma", "lam", "epsilon")
    optional = ("lam_value", "cliprange_value", "epsilon_high", "delta", "critic_learning_rate")
    require_at_least(0, args, *(name for name in optional if getattr(args, name) is not None))
    if args.critic_warmup_steps >= args.max_steps:
        raise UserError("--critic_warmup_steps takes all of --max_steps: the policy would never learn")
    if args.kl_target is not None and (args.kl_target <= 0 or args.beta <= 0):
        raise UserError("--kl_target is a KL above 0 that a --beta above 0 starts to follow")
    if args.kl_target is not None and args.kl_horizon < args.generation_batch_size:
        raise UserError("--kl_horizon has to be --generation_batch_size or more: beta would leap, even below 0")
    if args.kl_in == "loss" and args.kl_estimator == "k1":
        raise UserError("--kl_in loss with k1 holds nothing, its expected gradient is 0: --kl_estimator k3_corrected")
    if args.reward_clip_range is not None and args.reward_clip_range[0] > args.reward_clip_range[1]:
        raise UserError("--reward_clip_range takes the lower end first")
    require_at_least(args.num_generations, args, "generation_batch_size")
    require_at_least(0.01, args, "temperature")  # log-probs are of the logits divided by it
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
    weight_F = torch.tensor(args.reward_weights or [1.0] * len(rewards))
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
    shared = args.value_model == "shared"
    source = args.model_name_or_path if args.value_model in ("policy", "shared") else args.value_model
    if source != args.model_name_or_path and (
        load_tokenizer(source, None, args.trust_remote_code).get_vocab() != tokenizer.get_vocab()
    ):
        raise UserError(f"--value_model {source} has another vocabulary than {args.model_name_or_path}: take policy")
    critic = load_scorer(source, dtype, device, args.trust_remote_code, zero_head=True)
    if shared:
        setattr(critic, critic.base_model_prefix, base_model(model).base_model)
    elif args.use_peft:
        critic = add_lora(
            critic, args.lora_r, args.lora_alpha, args.lora_target_modules, args.use_rslora, args.use_dora
        )
    if not shared:
        speed_up(critic, args.gradient_checkpointing, args.torch_compile)
        shard(critic)
    layout = min(layout_of(model), layout_of(critic), key=("single", "packed", "shared").index)
    if layout == "shared" and not args.share_prompts:
        layout = "packed"
    run.print("policy", describe(model))
    run.print("critic", "a head on the policy" if shared else describe(critic))

    # -------------------------------------------------------------------------------------------------- 5. optimiser
    is_toy = args.dataset_name.startswith("toy:")
    learning_rate = args.learning_rate
    if learning_rate is None:
        learning_rate = 5e-4 if is_toy else 1e-5 if args.use_peft else 3e-6
    critic_rate = learning_rate if args.critic_learning_rate is None else args.critic_learning_rate
    warmup_steps = int(args.warmup_steps if args.warmup_steps >= 1 else args.warmup_steps * args.max_steps)
    settings = (args.adam_beta1, args.adam_beta2), args.adam_epsilon, args.weight_decay
    optimizer = make_optimizer(model, learning_rate, *settings)
    critic_optimizer = make_optimizer(critic.score if shared else critic, critic_rate, *settings)
    policy_steps = args.max_steps - args.critic_warmup_steps
    scheduler = get_scheduler(args.lr_scheduler_type, optimizer, warmup_steps, policy_steps)
    critic_scheduler = get_scheduler(args.lr_scheduler_type, critic_optimizer, warmup_steps, args.max_steps)
    run.print(
        f"peak learning rate {learning_rate:g} of the policy, {critic_rate:g} of the critic, after {warmup_steps} "
        "warm-up steps" + f"; the policy waits for {args.critic_warmup_steps} steps" * bool(args.critic_warmup_steps)
    )

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
        correction = "token_truncate" if args.use_vllm else "none"
    sampling = Sampling(
        args.max_completion_length, args.temperature, args.top_p, args.top_k, args.min_p, args.repetition_penalty,
        stop_ids(tokenizer, base_model(model).generation_config.eos_token_id, args.stop_strings),
    )
    full_softmax = (args.top_p, args.top_k, args.min_p, args.repetition_penalty) == (1.0, 0, 0.0, 1.0)

    # ----------------------------------------------------------------------------------------------------- 7. resume
    first_step, cursor, beta, rollout, target, rollout_metrics = 0, 0, args.beta, None, None, {}
    checkpoint = run.load_checkpoint()
    if checkpoint is not None:
        first_step, state = checkpoint
        model.load_state_dict(state["model"], strict=False)
        critic.load_state_dict(state["critic"], strict=False)
        for name, part in (
            ("optimizer", optimizer), ("critic_optimizer", critic_optimizer), ("scheduler", scheduler),
            ("critic_scheduler", critic_scheduler),
        ):
            part.load_state_dict(state[name])
        restore_random_state(state["random"])
        cursor, beta, rollout_metrics = state["cursor"], state["beta"], state["rollout_metrics"]
        rollout, target = Rollout(**state["rollout"]), Targets(**state["target"])
    engine.push_weights(model)
    if eval_prompts and first_step == 0 and not args.inspect:
        metrics = evaluate(engine, tokenizer, eval_rows, eval_prompts, rewards, sampling, 0, args, ranks, run)
        run.log(0, metrics)
        run.print("before training  " + "  ".join(f"{name} {value:.3f}" for name, value in metrics.items()))
        run.keep_best(0, metrics, lambda folder: save_model(model, tokenizer, folder))

    # ------------------------------------------------------------------------------------------------------- 8. loop
    epsilon_high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    optimizers = {"policy": optimizer, "critic": critic_optimizer}
    weights_before = {name: weight_sum(part) for name, part in optimizers.items()} if first_step == 0 else {}
    for step in range(first_step + 1, args.max_steps + 1):
        position = (step - 1) % steps_per_rollout
        clock = {"time/generation": 0.0, "time/scoring": 0.0}
        started = time.perf_counter()

        # 8.1 A new rollout, scored by whoever will be compared with the policy
        if position == 0:
            wants_logprobs = correction != "none" or (step == 1 and full_softmax)
            rollout, score_B, rollout_metrics = roll_out(
                engine, tokenizer, rows, prompts, rewards, weight_F, replace(sampling, logprobs=wants_logprobs), cursor,
                step, args, ranks, run,
            )
            cursor += num_prompts
            clock["time/generation"] = time.perf_counter() - started
            engine.sleep()
            rollout.old_logprobs_A, _ = score_rollout(model, rollout, layout, args, ranks)
            if args.beta:
                with without_adapter(model) if args.use_peft else nullcontext(reference) as prior:
                    rollout.reference_logprobs_A, _ = score_rollout(prior, rollout, layout, args, ranks)
            values_A = value_rollout(critic, rollout, layout, args, ranks)
            target, metrics = targets(rollout, score_B, values_A, beta, args)
            rollout_metrics |= metrics
            clock["time/scoring"] = time.perf_counter() - started - clock["time/generation"]

        # 8.2 Which sequences this step takes, and how many tokens it has: known before the first backward
        examples = rollout.examples()
        chosen = minibatch(len(examples), args.steps_per_generation, position, (args.seed, step - position))
        needed = [i for i in chosen if examples[i].loss_mask.any()]
        num_trained_tokens = max(1, sum(int(examples[i].loss_mask.sum()) for i in needed))
        micro_batches = pack(
            [examples[i] for i in needed], args.max_tokens_per_micro_batch, ranks.num_processes, layout
        )[ranks.process_index]
        policy_learns = step > args.critic_warmup_steps

        # 8.3 Forward and backward, one packed row at a time: the policy, then the critic
        sums = dict.fromkeys(SUMS, 0.0)
        for micro in micro_batches:
            batch = collate(examples, [int(needed[i]) for i in micro], device, layout)
            mask_N, advantages_N = batch.loss_mask_N, batch.take(rollout.split(target.advantages_A))
            if args.inspect:
                return show_batch(run, tokenizer, batch, advantages_N)
            with torch.set_grad_enabled(policy_learns):
                scores = score_tokens(model, batch, args.temperature, statistics=True)
            logprobs_N, scored_N = scores.logprobs_N, batch.take(rollout.split(rollout.old_logprobs_A))
            old_N = scored_N if steps_per_rollout > 1 else logprobs_N.detach()  # equal but for rounding
            ratio_N = (logprobs_N - old_N).clamp(max=20).exp()  # no overflow
            loss_N = clipped_loss(ratio_N, advantages_N, args.epsilon, epsilon_high, args.delta)
            clipped_N = loss_N.detach() != -ratio_N.detach() * advantages_N
            if correction != "none":
                sampler_N = batch.take(rollout.split(rollout.sampler_logprobs_A))
                correction_N = correction_weights(
                    old_N, sampler_N, batch, correction, args.sampler_correction_min, args.sampler_correction_max
                )
                loss_N = loss_N * correction_N
            if args.beta and args.kl_in == "loss":
                reference_N = batch.take(rollout.split(rollout.reference_logprobs_A))
                loss_N = loss_N + beta * kl_estimate(logprobs_N, reference_N, args.kl_estimator, ratio_N)
            policy_loss = (loss_N * mask_N).sum() / num_trained_tokens
            if policy_learns and not shared:
                policy_loss.backward()
            values_N = token_values(critic, batch, scores.hidden_NE if shared else hidden_states(critic, batch))
            old_values_N, returns_N = (
                batch.take(rollout.split(value_A)) for value_A in (target.values_A, target.returns_A)
            )
            error_N = value_loss(values_N, old_values_N, returns_N, args.cliprange_value)
            critic_loss = (error_N * mask_N).sum() / num_trained_tokens
            loss = args.vf_coef * critic_loss
            (loss + policy_loss if shared else loss).backward()

            with torch.no_grad():  # what to log, as sums over trained tokens
                sums["policy_loss"] += policy_loss
                sums["value_loss"] += critic_loss
                sums["tokens"] += mask_N.sum()
                sums["entropy"] += scores.entropies_N.sum()
                sums["gap_to_old"] += ((logprobs_N - scored_N).abs() * mask_N).sum()
                sums["square_to_old"] += ((logprobs_N - scored_N) ** 2 * mask_N).sum()
                sums["ratio"] += (ratio_N * mask_N).sum()
                sums["ratio_squared"] += (ratio_N**2 * mask_N).sum()
                sums["clipped"] += (clipped_N & mask_N).sum()
                sums["value_clipped"] += ((error_N > 0.5 * (values_N - returns_N) ** 2) & mask_N).sum()
                if correction != "none":
                    sums["gap"] += ((old_N - sampler_N).abs() * mask_N).sum()
                    sums["weight"] += (correction_N * mask_N).sum()
                    sums["weight_squared"] += (correction_N**2 * mask_N).sum()
                    sums["weight_zero"] += ((correction_N == 0) & mask_N).sum()
        values = sum_over_ranks(torch.tensor([float(sums[name]) for name in SUMS], dtype=torch.float64, device=device))
        sums = dict(zip(SUMS, values.tolist()))
        per_token = {name: value / max(1.0, sums["tokens"]) for name, value in sums.items()}

        # 8.4 Gates of step one: what must hold before a curve means anything
        if step == 1:
            noise = 1e-4 if dtype == torch.float32 else 0.1  # bf16 log-probs vary by hundredths between micro-batches
            run.gate("trained tokens in the step", sums["tokens"], "> 0", sums["tokens"] > 0)
            gap = per_token["gap_to_old"]
            run.gate("|log pi - log pi_old| before the first update", gap, f"0, below {noise:g}", gap < noise)
            if args.beta:
                kl = rollout_metrics["objective/kl"] / max(1.0, rollout_metrics["completions/mean_length"])
                run.gate("KL of a token to the reference", kl, f"0, below {noise:g}", abs(kl) < noise)
            if rollout.sampler_logprobs_A is not None and full_softmax:
                gap = agreement(
                    rollout.sampler_logprobs_A[rollout.loss_mask_A], rollout.old_logprobs_A[rollout.loss_mask_A]
                )["mean"]
                limit = 1e-3 if dtype == torch.float32 else 0.1  # stale weights are off by nats
                run.gate("|log p sampler - log p trainer|", gap, f"0, below {limit:g}", gap < limit)

        # 8.5 Update both, then the engine gets the new weights
        learning_rate = scheduler.get_last_lr()[0] if policy_learns else 0.0
        critic_rate = critic_scheduler.get_last_lr()[0]
        loss = sums["policy_loss"] + sums["value_loss"]
        norms = {"policy": torch.tensor(0.0), "critic": clip_gradients(critic_optimizer, args.max_grad_norm, loss)}
        if policy_learns:
            norms["policy"] = clip_gradients(optimizer, args.max_grad_norm, loss)
        norm = norms["policy"] + norms["critic"]
        run.require_finite(norm, loss, step, (rows.where(rollout.rows_B[i]) for i in chosen))
        if policy_learns:
            optimizer.step()
            scheduler.step()
        critic_optimizer.step()
        critic_scheduler.step()
        optimizer.zero_grad()
        critic_optimizer.zero_grad()
        for name, rate in (("policy", learning_rate), ("critic", critic_rate)):
            if name in weights_before and rate > 0 and norms[name] > 0:
                moved = abs(weight_sum(optimizers[name]) - weights_before.pop(name)) > 0  # no, if it is no number
                run.gate(f"weights of the {name} moved by the first update", float(moved), "1", moved)
        clock["time/training"] = time.perf_counter() - started - clock["time/generation"] - clock["time/scoring"]
        if (position + 1) % steps_per_rollout == 0:
            engine.push_weights(model)
            if args.kl_target is not None and policy_learns:
                kl, episodes = rollout_metrics["objective/kl"], args.generation_batch_size
                beta = adapted_beta(beta, kl, args.kl_target, episodes, args.kl_horizon)

        # 8.6 Log, save, evaluate
        last = step == args.max_steps
        if step % args.logging_steps == 0 or last:
            metrics = {
                **rollout_metrics,
                "loss/policy_avg": sums["policy_loss"], "loss/value_avg": sums["value_loss"],
                "policy/approxkl_avg": 0.5 * per_token["square_to_old"], "policy/clipfrac_avg": per_token["clipped"],
                "policy/entropy_avg": per_token["entropy"], "val/clipfrac_avg": per_token["value_clipped"],
                "val/ratio": per_token["ratio"], "val/ratio_var": per_token["ratio_squared"] - per_token["ratio"] ** 2,
                "grad_norm": norms["policy"].item(), "critic_grad_norm": norms["critic"].item(),
                "learning_rate": learning_rate, "critic_learning_rate": critic_rate, "epoch": cursor / len(prompts),
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
                name: metrics[name]
                for name in ("objective/scores", "objective/kl", "val/explained_variance", "completions/mean_length")
            })
        if last:  # first of all: nothing that fails from here on costs the model
            save_model(model, tokenizer, run.final_folder)
            save_critic(critic, tokenizer, run.folder / "critic")
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
                "critic": trained_weights(critic),
                "optimizer": optimizer.state_dict(), "critic_optimizer": critic_optimizer.state_dict(),
                "scheduler": scheduler.state_dict(), "critic_scheduler": critic_scheduler.state_dict(),
                "random": random_state(), "cursor": cursor, "beta": beta, "rollout": vars(rollout),
                "target": vars(target), "rollout_metrics": rollout_metrics,
            })

    engine.close()
    run.finish()


if __name__ == "__main__":
    launch(main, Args)
