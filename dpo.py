"""Direct preference optimisation and its family: from pairs of replies, without sampling and without a reward model.

For a prompt x with a chosen reply y_w and a rejected one y_l, and h(y) = log pi(y|x) - log pi_ref(y|x), summed over the
tokens of the reply and its end of turn,

    loss = - 1/P  sum over the P pairs of a step  log sigmoid(beta (h(y_w) - h(y_l)))            DPO 2305.18290, Eq. 7

The papers that followed changed the curve, the lengths, or what h is measured against; each is a value of --loss_type,
and several mix with --loss_weights (`pair_loss` has the formulas):

    sigmoid       2305.18290   cDPO with --label_smoothing     apo_zero, apo_down  2408.06266
    hinge         2305.10425   SLiC                            discopop            2406.08414   --discopop_tau
    ipo           2310.12036   beta is the paper's tau         sigmoid_norm        2411.15124   wants --beta 5 or so
    exo_pair      2402.00856   needs --label_smoothing         aot, aot_unpaired   2406.05882   sorted over the step
    robust        2403.00409   --label_smoothing               simpo               2405.14734   no reference
    nca_pair      2402.05369                                   cpo                 2401.08417   no reference; see sft
    bco_pair      2404.04656   with its running mean           sft                 likelihood of what was chosen
    sppo_hard     2405.00675

    RPO      --loss_type sigmoid sft --loss_weights 1 0.005                CPO      --loss_type cpo sft
    MPO      --loss_type sigmoid bco_pair sft --loss_weights 0.8 0.2 1     SimPO    --loss_type simpo --beta 2
    LD-DPO   --ld_alpha 0.5       2409.06411                               TR-DPO   --sync_ref_model      2404.09656
    WPO      --use_weighting      2406.11827                               f-DPO    --f_divergence_type   2309.16240

Departures from the papers and from what is usual
  1. Every sum is divided by a count of the whole optimiser step. What looks across pairs (the sorts of AOT, the running
     mean of BCO) looks at all of the step, from a pass without gradient before it. No result depends on micro-batches.
  2. Nothing is padded, and the two replies of a pair share the tokens of their prompt, which are computed once
     (--no_share_prompts computes them twice; the log-probs are the same).
  3. ipo takes the mean over tokens, as its authors do; the sum would want another beta for every length.
  4. `sft` is a mean over the chosen tokens of the step, not over pairs.
  5. rewards/accuracies counts a tie as a half, so that it is 0.5 before the first update (not with
     --precompute_ref_log_probs, which differ from the policy's by rounding).
  6. With --use_weighting the likelihood of `sft` is not weighted, for it is no preference.
  7. Dropout is off. The learning rate defaults to 1e-6, to ten times that under LoRA, and to 2e-5 for the toy.

Dimension key: N tokens of a micro-batch, B replies, P pairs; 2: chosen, rejected.

    python sft.py && python dpo.py                                         # the toy: 2 CPU cores, no network, seconds
    python dpo.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name trl-lib/ultrafeedback_binarized
    torchrun --nproc_per_node 8 dpo.py --model_name_or_path ... --dataset_name ...

What you should see: the loss begins at log 2 = 0.693 exactly, for the policy is its own reference, and falls slowly.
rewards/accuracies rises above 0.5. Watch logps/chosen: it may fall while all else looks well, for the loss asks only
that the rejected reply falls faster; then lower the learning rate, raise beta, or add `sft`. The toy goes from
eval/exact_match 0.35 to above 0.5, greedy to above 0.9.
"""

import copy
import hashlib
import math
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from transformers import get_scheduler

from common.data import (
    Example, Ledger, collate, draw, encode_pair, load_rows, pack, prepare_completions, require_columns, segment_sum,
    split_pair,
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

LossType = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm", "simpo", "cpo",
]
REFERENCE_FREE = ("sft", "simpo", "cpo")
ACROSS_PAIRS = ("aot", "aot_unpaired", "bco_pair")  # need a look at the whole step first
TAKE_DIVERGENCE = ("sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm", "sft")


@dataclass
class Args:
    # Run
    output_dir: str = "runs/dpo"
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
    """Peak learning rate (None: 1e-6; 1e-5 with use_peft; 2e-5 for the toy)."""
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
    loss_type: list[LossType] = field(default_factory=lambda: ["sigmoid"])
    """One or several of the losses above."""
    loss_weights: list[float] = field(default_factory=list)
    """A weight for each (empty: all 1)."""
    beta: float = 0.1
    """How much a log-ratio counts: large keeps the policy near its reference. IPO's tau."""
    label_smoothing: float = 0.0
    """Share of labels taken to be wrong: for sigmoid (cDPO), robust, exo_pair (above 0), aot*, simpo and cpo."""
    simpo_gamma: float | None = None
    """SimPO's target margin (None: half of beta)."""
    discopop_tau: float = 0.05
    """Temperature at which discopop passes from logistic to exponential."""
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl"
    """Distance to the reference that the reward is derived from."""
    f_alpha_divergence_coef: float = 0.5
    """alpha of the alpha-divergence."""
    ld_alpha: float | None = None
    """Weight of the tokens by which one reply is longer than the other (None: 1)."""
    use_weighting: bool = False
    """Weigh pairs by how likely the policy is to write them (WPO)."""
    precompute_ref_log_probs: bool = False
    """Score the data with the reference before training, and hold no second model. Kept for other runs."""
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
    "loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "logps/chosen", "logps/rejected", "chosen_nll",
    "entropy", "correct", "weight",
)  # of a step, added up over pairs, micro-batches and ranks

# ---------------------------------------------------------------------------------------------------------------- math


@dataclass
class Pairs:
    """What a loss sees of P pairs. Column 0 is the chosen reply, column 1 the rejected one."""

    policy_P2: torch.Tensor  # log pi(y|x)
    reference_P2: torch.Tensor  # log pi_ref(y|x); zeros without a reference
    length_P2: torch.Tensor  # tokens of the reply, its end of turn included
    peers_P2: torch.Tensor | None = None  # AOT: what each is compared with, see `sorted_peers`
    shift: float = 0.0  # BCO: running mean of beta h


def divergence_score(ratio: torch.Tensor, divergence: str, alpha: float) -> torch.Tensor:
    """f'(u) of a log-ratio log u, up to a constant: the reward that the divergence f implies (2309.16240).

    forward_kl grows like exp(-log u): it overflows for replies that have become 88 nats less likely.
    """
    if divergence == "forward_kl":
        return 1 - torch.exp(-ratio)
    if divergence == "js_divergence":
        return math.log(2) + F.logsigmoid(ratio)
    if divergence == "alpha_divergence" and alpha != 1:
        return torch.expm1(((alpha - 1) * ratio).clamp(max=80)) / (alpha - 1)
    return ratio


def smoothed_logistic(margin_P: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """-log sigmoid of a margin whose sign is wrong with the probability `label_smoothing` (cDPO, Eq. 3)."""
    return -(1 - label_smoothing) * F.logsigmoid(margin_P) - label_smoothing * F.logsigmoid(-margin_P)


def pair_loss(
    kind: str, pairs: Pairs, beta: float, label_smoothing: float = 0.0, simpo_gamma: float = 0.0,
    discopop_tau: float = 0.05, divergence: str = "reverse_kl", alpha: float = 0.5,
) -> torch.Tensor:
    """Loss of each pair [P] for every loss type but `sft`."""
    ratio_P2 = pairs.policy_P2 - pairs.reference_P2
    score_P2 = divergence_score(ratio_P2, divergence, alpha)
    chosen_P, rejected_P = ratio_P2.unbind(1)
    margin_P = beta * (score_P2[:, 0] - score_P2[:, 1])
    mean_margin_P = (score_P2 / pairs.length_P2).diff(dim=1)[:, 0].neg()  # of means over tokens
    if kind == "sigmoid":  # 2305.18290 Eq. 7
        return smoothed_logistic(margin_P, label_smoothing)
    if kind == "hinge":  # 2305.10425
        return F.relu(1 - margin_P)
    if kind == "ipo":  # 2310.12036 Eq. 17, over means
        return (mean_margin_P - 1 / (2 * beta)) ** 2
    if kind == "exo_pair":  # 2402.00856 Eq. 16: KL(softmax of both || labels)
        chosen_log_share_P, rejected_log_share_P = F.logsigmoid(margin_P), F.logsigmoid(-margin_P)
        return (
            chosen_log_share_P.exp() * (chosen_log_share_P - math.log1p(-label_smoothing))
            + rejected_log_share_P.exp() * (rejected_log_share_P - math.log(label_smoothing))
        )
    if kind == "nca_pair":  # 2402.05369
        return (
            -F.logsigmoid(beta * chosen_P)
            - 0.5 * F.logsigmoid(-beta * chosen_P) - 0.5 * F.logsigmoid(-beta * rejected_P)
        )
    if kind == "robust":  # 2403.00409: unbiased under flipped labels, and may be negative
        clean_P, flipped_P = -F.logsigmoid(margin_P), -F.logsigmoid(-margin_P)
        return ((1 - label_smoothing) * clean_P - label_smoothing * flipped_P) / (1 - 2 * label_smoothing)
    if kind == "bco_pair":  # 2404.04656: two classifications against a shared threshold
        return -F.logsigmoid(beta * chosen_P - pairs.shift) - F.logsigmoid(pairs.shift - beta * rejected_P)
    if kind == "sppo_hard":  # 2405.00675 Eq. 4.7, the winner wins always
        return (chosen_P - 0.5 / beta) ** 2 + (rejected_P + 0.5 / beta) ** 2
    if kind == "aot":  # 2406.05882: sorted policy margins against sorted reference margins
        policy_margin_P = pairs.policy_P2[:, 0] - pairs.policy_P2[:, 1]
        return smoothed_logistic(beta * (policy_margin_P - pairs.peers_P2[:, 0]), label_smoothing)
    if kind == "aot_unpaired":  # 2406.05882: sorted chosen ratios against sorted rejected ratios
        # Both ends of a comparison move, and they belong to two pairs: each brings its own gradient, one the value
        from_chosen_P = smoothed_logistic(beta * (chosen_P - pairs.peers_P2[:, 0]), label_smoothing)
        from_rejected_P = smoothed_logistic(beta * (pairs.peers_P2[:, 1] - rejected_P), label_smoothing)
        return from_chosen_P + from_rejected_P - from_rejected_P.detach()
    if kind == "apo_zero":  # 2408.06266 Eq. 7: up with the chosen, down with the rejected
        return 1 - torch.sigmoid(beta * chosen_P) + torch.sigmoid(beta * rejected_P)
    if kind == "apo_down":  # 2408.06266 Eq. 8: down with both, more with the rejected
        return torch.sigmoid(beta * chosen_P) + 1 - torch.sigmoid(beta * (chosen_P - rejected_P))
    if kind == "discopop":  # 2406.08414 Eq. 5: logistic, exponential where the pair is learnt; with a hump at margin 0
        log_blend_P = F.logsigmoid(margin_P / discopop_tau)
        return (1 - log_blend_P.exp()) * -F.logsigmoid(margin_P) + torch.exp(log_blend_P - margin_P)
    if kind == "sigmoid_norm":  # 2411.15124
        return -F.logsigmoid(beta * mean_margin_P)
    if kind == "simpo":  # 2405.14734 Eq. 6
        chosen_mean_P, rejected_mean_P = (pairs.policy_P2 / pairs.length_P2).unbind(1)
        return smoothed_logistic(beta * (chosen_mean_P - rejected_mean_P) - simpo_gamma, label_smoothing)
    assert kind == "cpo", kind  # 2401.08417, to which the paper adds the likelihood: `sft`
    return smoothed_logistic(beta * (pairs.policy_P2[:, 0] - pairs.policy_P2[:, 1]), label_smoothing)


def sorted_peers(kind: str, policy_P2: torch.Tensor, reference_P2: torch.Tensor) -> torch.Tensor:
    """What AOT compares each pair of the whole step with: the value of equal rank on the other side [P, 2].

    aot          column 0: a pair's policy margin meets the reference margin of its rank
    aot_unpaired column 0: a chosen ratio meets the rejected one of its rank; column 1: the other way round
    """

    def at_rank(own_P: torch.Tensor, other_P: torch.Tensor) -> torch.Tensor:
        return other_P.sort().values[own_P.argsort(stable=True).argsort(stable=True)]

    if kind == "aot":
        policy_P, reference_P = policy_P2.diff(dim=1)[:, 0].neg(), reference_P2.diff(dim=1)[:, 0].neg()
        return torch.stack([at_rank(policy_P, reference_P)] * 2, dim=1)
    chosen_P, rejected_P = (policy_P2 - reference_P2).unbind(1)
    return torch.stack([at_rank(chosen_P, rejected_P), at_rank(rejected_P, chosen_P)], dim=1)


def shared_length_weights(examples: list[Example], alpha: float) -> list[torch.Tensor]:
    """LD-DPO (2409.06411): 1 for the first min(L_w, L_l) tokens of a reply, alpha for the rest; per example [T]."""
    weights = []
    for i, example in enumerate(examples):
        pair = examples[i - i % 2 : i - i % 2 + 2]
        shared = min(len(e.input_ids) - e.prompt_length for e in pair)
        place_T = torch.arange(len(example.input_ids)) - example.prompt_length
        weights.append(torch.where(place_T < shared, 1.0, alpha))
    return weights


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


def check_losses(args: Args) -> None:
    """UserError for losses that do not go with the other flags."""
    kinds, smoothing = args.loss_type, args.label_smoothing
    if not kinds or len({*kinds}) < len(kinds):
        raise UserError("--loss_type takes one or several losses, each once")
    if args.loss_weights and len(args.loss_weights) != len(kinds):
        raise UserError(f"{len(args.loss_weights)} --loss_weights for {len(kinds)} of --loss_type: give one each")
    if args.beta <= 0:
        raise UserError(f"--beta must be above 0, not {args.beta:g}")
    if not 0 <= smoothing < 0.5:
        raise UserError(f"--label_smoothing is a share of wrong labels, at least 0 and below 0.5, not {smoothing:g}")
    if args.discopop_tau <= 0:
        raise UserError(f"--discopop_tau must be above 0, not {args.discopop_tau:g}")
    if args.ld_alpha is not None and not 0 <= args.ld_alpha <= 1:
        raise UserError(f"--ld_alpha is a weight from 0 to 1, not {args.ld_alpha:g}")
    if "exo_pair" in kinds and smoothing == 0:
        raise UserError("--loss_type exo_pair takes the logarithm of --label_smoothing: give one above 0, such as 1e-3")
    if args.f_divergence_type != "reverse_kl" and not {*kinds} <= {*TAKE_DIVERGENCE}:
        others = ", ".join(kind for kind in kinds if kind not in TAKE_DIVERGENCE)
        raise UserError(f"--f_divergence_type {args.f_divergence_type} has no meaning for --loss_type {others}")
    if args.use_weighting and {"aot", "aot_unpaired"} & {*kinds}:
        raise UserError("--use_weighting weighs pairs, and the aot losses compare across pairs: leave one of them out")
    if args.sync_ref_model and (args.precompute_ref_log_probs or {*kinds} <= {*REFERENCE_FREE}):
        raise UserError("--sync_ref_model needs a reference that is scored at every step, not precomputed, not none")
    if args.sync_ref_model and (args.load_in_4bit or args.load_in_8bit):
        raise UserError("--sync_ref_model mixes weights, which quantised ones do not allow: load them whole")


def main(args: Args) -> None:
    # ------------------------------------------------------------------------------------------------------ 1. setup
    require_at_least(
        1, args, "train_batch_size", "max_tokens_per_micro_batch", "logging_steps", "max_completion_length",
        "max_eval_samples", "ref_model_sync_steps",
    )
    require_at_least(0, args, "max_grad_norm", "warmup_steps", "weight_decay")
    if not 0 <= args.ref_model_mixup_alpha <= 1:
        raise UserError(f"--ref_model_mixup_alpha is a share, from 0 to 1, not {args.ref_model_mixup_alpha:g}")
    check_losses(args)
    ranks = join_ranks(args.ddp_timeout)
    device = ranks.device
    run = Run(args, __file__, ranks.is_main_process)
    set_seed(args.seed)
    losses = dict(zip(args.loss_type, args.loss_weights or [1.0] * len(args.loss_type)))
    preferences = {kind: weight for kind, weight in losses.items() if kind != "sft"}
    needs_reference = any(kind not in REFERENCE_FREE for kind in losses)
    across_pairs = [kind for kind in losses if kind in ACROSS_PAIRS]
    is_toy = args.dataset_name.startswith("toy:")
    rewards = [load_reward(name, device) for name in args.eval_reward_funcs or ["common.toy:exact_match"] * is_toy]

    # ------------------------------------------------------------------------------------------------------- 2. data
    tokenizer = load_tokenizer(args.model_name_or_path, args.chat_template, args.trust_remote_code)
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
        learning_rate = 2e-5 if is_toy else 1e-5 if args.use_peft else 1e-6
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
    reference = None
    if needs_reference and not args.precompute_ref_log_probs and (args.sync_ref_model or not args.use_peft):
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

    examples = [example for pair in pairs for example in pair]
    stored, eval_reference_B = None, torch.zeros(len(eval_examples))
    if needs_reference and args.precompute_ref_log_probs and not args.inspect:
        with prior() as scorer:
            stored = reference_logprobs(scorer, examples + eval_examples, args, ranks)
        eval_reference_B = torch.tensor([float(values_T.sum()) for values_T in stored[len(examples):]])
    elif not args.inspect:
        with torch.no_grad(), prior() as scorer:
            for micro in pack(eval_examples, args.max_tokens_per_micro_batch, 1, layout, together=2)[0]:
                eval_reference_B[micro] = score_replies(scorer, eval_examples, micro, layout).plain_logps_B.cpu()

    # -------------------------------------------------------------------------------------------------- 5. optimiser
    optimizer = make_optimizer(
        model, learning_rate, (args.adam_beta1, args.adam_beta2), args.adam_epsilon, args.weight_decay
    )
    scheduler = get_scheduler(args.lr_scheduler_type, optimizer, warmup_steps, total_steps)
    first_step, checkpoint = 0, run.load_checkpoint()
    reward_sum, rewards_seen = 0.0, 0  # BCO's running mean
    if checkpoint is not None:
        first_step, state = checkpoint
        model.load_state_dict(state["model"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        restore_random_state(state["random"])
        reward_sum, rewards_seen = state["reward_sum"], state["rewards_seen"]
        if state["reference"] is not None:
            reference.load_state_dict(state["reference"], strict=False)

    def evaluate(step: int) -> None:
        metrics = evaluate_pairs(
            model, eval_examples, eval_reference_B, layout, args.beta, args.max_tokens_per_micro_batch
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
    settings = dict(
        beta=args.beta, label_smoothing=args.label_smoothing, discopop_tau=args.discopop_tau,
        simpo_gamma=args.beta / 2 if args.simpo_gamma is None else args.simpo_gamma,
        divergence=args.f_divergence_type, alpha=args.f_alpha_divergence_coef,
    )
    for step in range(first_step + 1, total_steps + 1):
        # 6.1 Every rank knows the whole step: replies 2p and 2p + 1 are the chosen and the rejected of pair p
        chosen = draw(len(pairs), (step - 1) * args.train_batch_size, args.train_batch_size, args.seed)
        step_examples = [example for p in chosen for example in pairs[p]]
        length_B = torch.tensor([len(e.input_ids) - e.prompt_length for e in step_examples], device=device)
        num_chosen_tokens, num_tokens = int(length_B[::2].sum()), sum(len(e.input_ids) for e in step_examples)
        weights = None if args.ld_alpha is None else shared_length_weights(step_examples, args.ld_alpha)
        micro_batches = pack(
            step_examples, args.max_tokens_per_micro_batch, ranks.num_processes, layout, together=2
        )[ranks.process_index]
        logging = step % args.logging_steps == 0 or step in (1, total_steps)
        if args.inspect:
            return show_batch(run, tokenizer, collate(step_examples, micro_batches[0], device, layout))

        # 6.2 What the reference says, and what the losses that look across pairs have to know
        reference_B, policy_B = torch.zeros(2, len(step_examples), device=device)
        if stored is not None:
            for i in range(len(step_examples)):
                values_T = stored[2 * chosen[i // 2] + i % 2]
                reference_B[i] = (values_T if weights is None else values_T * weights[i]).sum()
        with torch.no_grad():
            if needs_reference and stored is None:
                with prior() as scorer:
                    for micro in micro_batches:
                        reference_B[micro] = score_replies(scorer, step_examples, micro, layout, weights).logps_B
            if across_pairs:
                for micro in micro_batches:
                    policy_B[micro] = score_replies(model, step_examples, micro, layout, weights).logps_B
                sum_over_ranks(policy_B)
                if stored is None:
                    sum_over_ranks(reference_B)
        shift, peers = 0.0, {}
        if "bco_pair" in across_pairs:
            reward_sum += args.beta * float((policy_B - reference_B).double().sum())
            rewards_seen += len(step_examples)
            shift = reward_sum / rewards_seen
        for kind in across_pairs:
            if kind != "bco_pair":
                peers[kind] = sorted_peers(kind, policy_B.view(-1, 2), reference_B.view(-1, 2))

        # 6.3 Forward and backward, whole pairs at a time
        sums = torch.zeros(len(SUMS), dtype=torch.float64, device=device)
        largest_ratio = torch.zeros((), device=device)
        for micro in micro_batches:
            replies = score_replies(
                model, step_examples, micro, layout, weights, statistics=logging or args.use_weighting
            )
            pair_index = [i // 2 for i in micro[::2]]
            step_pairs = Pairs(
                replies.logps_B.view(len(pair_index), 2), reference_B[micro].view(len(pair_index), 2),
                length_B[micro].view(len(pair_index), 2), shift=shift,
            )
            loss_P = torch.zeros(len(pair_index), device=device)
            for kind, weight in preferences.items():
                step_pairs.peers_P2 = peers[kind][pair_index] if kind in peers else None
                loss_P = loss_P + weight * pair_loss(kind, step_pairs, **settings)
            weight_P = torch.ones_like(loss_P)
            if args.use_weighting:  # 2406.11827 Eq. 2
                weight_P = (replies.alignment_B / length_B[micro]).exp().view(len(pair_index), 2).prod(dim=1)
            nll = -replies.plain_logps_B[::2].sum()
            loss = (weight_P * loss_P).sum() / args.train_batch_size
            loss = loss + losses.get("sft", 0.0) * nll / num_chosen_tokens
            loss.backward()

            with torch.no_grad():  # what to log, as sums over the step
                reward_P2 = args.beta * (step_pairs.policy_P2 - step_pairs.reference_P2)
                if args.loss_type[0] == "simpo":
                    reward_P2 = reward_P2 / step_pairs.length_P2
                right_P = (reward_P2[:, 0] > reward_P2[:, 1]) + 0.5 * (reward_P2[:, 0] == reward_P2[:, 1])
                values = (
                    loss * args.train_batch_size, *reward_P2.sum(0), right_P.sum(), *step_pairs.policy_P2.sum(0), nll,
                    replies.entropies_B.sum(), replies.correct_B[::2].sum(), weight_P.sum(),
                )
                sums += torch.stack([value.double() for value in values])
                if len(micro):
                    largest_ratio = largest_ratio.maximum(reward_P2.abs().max() / args.beta)
        totals, ratio = dict(zip(SUMS, sum_over_ranks(sums).tolist())), float(sum_over_ranks(largest_ratio))
        mean = {name: total / args.train_batch_size for name, total in totals.items()}

        # 6.4 Gates of step one: the policy is its own reference, and the model learns to stop
        if step == 1:
            noise = 1e-3 if model.dtype == torch.float32 else 1.0  # nats in a whole reply; bf16 varies with the layout
            stops = set(stop_ids(tokenizer, base_model(model).generation_config.eos_token_id, []))
            ends = [int(example.input_ids[-1]) in stops for example in step_examples]
            run.gate(
                "replies that end in a stop token", sum(ends) / len(ends), "> 0, and 1 unless truncated", sum(ends) > 0
            )
            if needs_reference:
                run.gate("|log pi - log pi_ref| before the first update", ratio, f"0, below {noise:g}", ratio < noise)
            finite, only_sigmoid = math.isfinite(mean["loss"]), args.loss_type == ["sigmoid"] and not args.use_weighting
            run.gate(
                "loss before the first update", mean["loss"], "log 2, times its weight" if only_sigmoid else "a number",
                abs(mean["loss"] - losses["sigmoid"] * math.log(2)) < noise if only_sigmoid else finite,
            )

        # 6.5 Update
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
        if args.sync_ref_model and step % args.ref_model_sync_steps == 0:  # 2404.09656
            share, weights_of = args.ref_model_mixup_alpha, dict(reference.named_parameters())
            for name, value in full_parameters(model):
                if name in weights_of:
                    weights_of[name].data.lerp_(value.to(weights_of[name].dtype), share)

        # 6.6 Log, save, evaluate
        if logging:
            metrics = {name: mean[name] for name in SUMS if "/" in name or name == "loss"} | {
                "rewards/margins": mean["rewards/chosen"] - mean["rewards/rejected"],
                "grad_norm": grad_norm.item(), "learning_rate": learning_rate,
                "nll_loss": totals["chosen_nll"] / num_chosen_tokens,
                "entropy": totals["entropy"] / int(length_B.sum()),
                "mean_token_accuracy": totals["correct"] / num_chosen_tokens,
                "epoch": step * args.train_batch_size / len(pairs), "num_tokens": num_tokens,
            }
            if args.use_weighting:
                metrics["wpo_weight"] = mean["weight"]
            if "bco_pair" in losses:
                metrics["rewards/shift"] = shift
            run.log(step, metrics, {"tokens_per_second": tokens_seen / (time.perf_counter() - clock)})
            run.progress(step, total_steps, {
                name: metrics[name] for name in ("loss", "rewards/accuracies", "rewards/margins", "logps/chosen")
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
                "reward_sum": reward_sum, "rewards_seen": rewards_seen,
                "reference": dict(reference.named_parameters()) if args.sync_ref_model else None,
            })

    run.finish()


if __name__ == "__main__":
    launch(main, Args)
