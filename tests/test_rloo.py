"""rloo.py: what differs from grpo.py, held to loops, to TRL 1.16's RLOOTrainer, and to itself cut in other ways.

TRL's own code runs here, as in test_trl.py: `_generate_and_score_completions` and `_compute_loss` on one padded batch.
Where the two differ on purpose:
  - A truncated completion under mask_truncated_completions: TRL counts it in the mean over completions, with its KL
    taken as 0; we leave it out of that mean, and its KL, which the baselines of the others see, is what it is.
  - `kl`: TRL logs a mean over tokens, we one over completions, which is what beta multiplies.
"""

import copy
import json
import math
import random
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from recording import STEP as GRPO_STEP
from recording import difference, record
from transformers import AutoModelForCausalLM

import rloo
from common.models import load_tokenizer
from common.run import launch
from common.toy import graded
from rloo import baselines, normalized

pytest_plugins = ["recording"]

NAN = float("nan")
STEP = GRPO_STEP | {"learning_rate": 0.005}  # the ratio of a whole completion leaves the clip range sooner


def doubles(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(actual: torch.Tensor, expected, tolerance: float = 1e-9) -> None:
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual.detach().double(), expected, rtol=tolerance, atol=tolerance)


# -------------------------------------------------------------------------------------------------------- baselines


def some_rewards(prompts: int, samples: int, missing: float = 0.0, seed: int = 0) -> list[list[float]]:
    """Groups of quite different mean and spread."""
    generator = random.Random(seed)
    return [
        [NAN if generator.random() < missing else 3 * p + (p + 1) * generator.gauss(0, 1) for _ in range(samples)]
        for p in range(prompts)
    ]


def mean(values: list[float]) -> float:
    """Of those that are not NaN; 0 of none."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else 0.0


@pytest.mark.parametrize("missing", [0.0, 0.4])
@pytest.mark.parametrize("prompts, samples", [(3, 4), (1, 2), (5, 7), (2, 16), (4, 1)])
def test_the_baseline_is_the_mean_of_the_others(prompts, samples, missing):
    """2402.14740, one completion at a time; a group of one has nothing to be compared with."""
    rewards = some_rewards(prompts, samples, missing)

    def advantage(group: list[float], i: int) -> float:
        others = [reward for j, reward in enumerate(group) if j != i and not math.isnan(reward)]
        return group[i] - sum(others) / len(others) if others and not math.isnan(group[i]) else 0.0

    total_PG = doubles(rewards)
    expected = [[advantage(group, i) for i in range(samples)] for group in rewards]
    close((total_PG - baselines(total_PG, "leave_one_out")).nan_to_num(0), expected)


def test_the_other_baselines():
    rewards = some_rewards(3, 4, missing=0.3)
    total_PG, everyone = doubles(rewards), mean([reward for group in rewards for reward in group])
    close(baselines(total_PG, "greedy", doubles([1.0, -2.0, 0.5])), [[1.0] * 4, [-2.0] * 4, [0.5] * 4])
    close(baselines(total_PG, "batch_mean"), [[everyone] * 4] * 3)
    close(baselines(total_PG, "none"), [[0.0] * 4] * 3)


@pytest.mark.parametrize("samples", [2, 3, 8])
def test_advantages_are_those_of_dr_grpo_but_for_a_factor(samples):
    """T30: r_i less the mean of the others is k / (k - 1) times r_i less the mean of all."""
    total_PG = doubles(some_rewards(5, samples))
    centred_PG = total_PG - total_PG.mean(1, keepdim=True)
    close(total_PG - baselines(total_PG, "leave_one_out"), samples / (samples - 1) * centred_PG)


@pytest.mark.parametrize("kind", ["leave_one_out", "greedy", "batch_mean", "none"])
@pytest.mark.parametrize("normalize", [False, True])
def test_permuting_prompts_permutes_advantages(kind, normalize):
    total_PG, greedy_P, order = doubles(some_rewards(6, 4, 0.2)), torch.arange(6.0), [4, 0, 5, 2, 1, 3]

    def advantages(total_PG, greedy_P):
        advantages_PG = total_PG - baselines(total_PG, kind, greedy_P)
        return (normalized(advantages_PG) if normalize else advantages_PG).nan_to_num(0)

    close(advantages(total_PG[order], greedy_P[order]), advantages(total_PG, greedy_P)[order])


@pytest.mark.parametrize("samples", [2, 3, 4, 5, 7, 8, 16])
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 0.3, 0.7, 2 / 3])
def test_equal_rewards_have_no_advantage(reward, samples):
    """Exactly: the script does not run a sequence of advantage 0, and rounding has a sign, which is a gradient."""
    total_PG = torch.full((2, samples), reward)
    total_PG[1, 0] = NAN if samples > 2 else reward
    advantages_PG = total_PG - baselines(total_PG, "leave_one_out")
    assert not advantages_PG.nan_to_num(0).any()


@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_normalized_advantages(missing):
    """Mean 0, standard deviation 1 (Bessel's, and 1e-4 on top), of all that are known."""
    advantages = np.array(some_rewards(6, 5, missing))
    expected = (advantages - np.nanmean(advantages)) / (np.nanstd(advantages, ddof=1) + 1e-4)
    actual = normalized(doubles(advantages.tolist()))
    torch.testing.assert_close(actual, doubles(expected.tolist()), equal_nan=True)
    assert np.nanmean(actual) == pytest.approx(0, abs=1e-9) and np.nanstd(actual, ddof=1) == pytest.approx(1, abs=1e-4)


# -------------------------------------------------------------------------------------------------------------- TRL


def stock_model(folder: str, weights: torch.Tensor):
    """Stock transformers with these weights. A sampled padding token is a token: its embedding has a gradient."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    torch.nn.utils.vector_to_parameters(weights, model.parameters())
    model.get_input_embeddings().padding_idx = None
    return model


def trl_model(folder: str, weights: torch.Tensor, temperature: float = 1.0):
    """The same with TRL's fused head on it."""
    from trl.trainer.utils import add_fused_lm_head

    model = stock_model(folder, weights).train()
    add_fused_lm_head(model, temperature, outputs=("log_probs", "entropy", "is_top1"))
    return model


def trl_rloo(folder: str, rollout, reference: torch.Tensor, old: torch.Tensor, now: torch.Tensor, **options):
    """Loss, gradient, advantages and metrics by TRL for completions of the policy `old`, at the policy `now`."""
    from accelerate import Accelerator
    from trl import RLOOConfig, RLOOTrainer

    settings = dict(
        num_generations=8, beta=0.0, max_completion_length=8, num_iterations=2, temperature=1.0,
        steps_per_generation=1, gradient_accumulation_steps=1, per_device_train_batch_size=64, bf16=False, use_cpu=True,
        report_to="none",
    )
    arguments = RLOOConfig(output_dir="unused", **{**settings, **options})
    tokenizer, functions = load_tokenizer("toy"), rollout.rewards_BF.shape[1]
    tokenizer.pad_token_id = tokenizer.eos_token_id  # for TRL a completion that ends in padding has not been truncated
    trainer = RLOOTrainer.__new__(RLOOTrainer)  # without __init__: no data loader, no optimiser, no reward function
    trainer.__dict__.update(
        vars(arguments), args=arguments, accelerator=Accelerator(cpu=True), _tokenizer=tokenizer,
        processing_class=tokenizer, model=trl_model(folder, old, arguments.temperature),
        ref_model=trl_model(folder, reference, arguments.temperature), state=SimpleNamespace(global_step=1),
        pad_to_multiple_of=None, eos_token_ids=[tokenizer.eos_token_id], aux_loss_enabled=False,
        epsilon_low=arguments.epsilon,
        epsilon_high=arguments.epsilon if arguments.epsilon_high is None else arguments.epsilon_high,
        reward_funcs=[None] * functions, reward_func_names=["r"] * functions, reward_weights=torch.ones(functions),
        _pending_extra_logs={}, _pending_metrics={}, _metrics=defaultdict(lambda: defaultdict(list)),
        _logs=defaultdict(list), log_multimodal=False,
    )
    trainer._logs["rewards"] = defaultdict(list)

    ids = [ids.tolist() for ids in rollout.split(rollout.input_ids_A)]
    prompts = [own[:n] for own, n in zip(ids, rollout.prompt_lengths_B)]
    completions = [own[n:] for own, n in zip(ids, rollout.prompt_lengths_B)]
    trainer._generate = lambda _: (prompts, completions, completions)
    trainer._calculate_rewards = lambda *_: rollout.rewards_BF.clone()

    batch = trainer._generate_and_score_completions([{"prompt": "unused"}] * len(ids))
    model = trl_model(folder, now, arguments.temperature)
    loss = trainer._compute_loss(model, batch)
    loss.backward()
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()]), batch["advantages"], metrics


def one_ungraded(rollout) -> None:
    rollout.rewards_BF[3] = NAN


def run_both(monkeypatch, folder, policy, toy_file, flags: dict, theirs: dict):
    """The fourth step: the second rollout's second, so that the policy that sampled is neither reference nor policy."""
    flags = {**STEP, "model_name_or_path": policy, "dataset_name": toy_file, "max_steps": 4, **flags}
    steps, rollouts = record(rloo, monkeypatch, folder / "run", disturb=one_ungraded, **flags)
    reference, _, old, now = (step.weights for step in steps)
    return steps[3], rollouts[1], *trl_rloo(policy, copy.deepcopy(rollouts[1]), reference, old, now, **theirs)


CASES = {  # the same flags here and there
    "plain": dict(beta=0.0),
    "kl": dict(beta=0.05),
    "kl, reward_clip_range": dict(beta=0.05, reward_clip_range=(0.2, 0.7)),
    "kl, normalized": dict(beta=0.05, normalize_advantages=True),
    "epsilon_high, temperature": dict(epsilon=0.1, epsilon_high=0.28, temperature=0.7, beta=0.05),
}


@pytest.mark.parametrize("case", CASES)
def test_the_loss_and_the_gradient_are_those_of_trl(case, monkeypatch, tmp_path, policy, toy_file):
    pytest.importorskip("trl")
    step, rollout, loss, gradient, advantages, metrics = run_both(
        monkeypatch, tmp_path, policy, toy_file, CASES[case], CASES[case]
    )
    torch.testing.assert_close(rollout.advantages_B, advantages, rtol=1e-5, atol=1e-5)
    assert difference(step.gradient, gradient) < 1e-5
    # A loss is a difference of terms of both signs that nearly cancel: its rounding is not relative to itself.
    assert step.metrics["loss"] == pytest.approx(loss, rel=1e-5, abs=2e-6)
    if CASES[case]["beta"]:  # every sequence is run, so that means over tokens are over the same tokens
        assert metrics["clip_ratio/low_mean"] > 0.01 and metrics["clip_ratio/high_mean"] > 0.01
        for name in ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"):
            assert step.metrics[name] == pytest.approx(metrics[name], rel=1e-4), name
        length = step.metrics["completions/mean_length"]
        assert step.metrics["kl"] == pytest.approx(metrics["kl"] * length, rel=1e-4, abs=1e-5)


def test_a_masked_sequence_is_no_part_of_the_mean(monkeypatch, tmp_path, policy, toy_file):
    """The second difference above: TRL divides by 64 what the sequences that train have added up to."""
    flags = dict(mask_truncated_completions=True, max_completion_length=6, beta=0.0)
    step, rollout, loss, gradient, _, _ = run_both(monkeypatch, tmp_path, policy, toy_file, flags, flags)
    training = sum(mask.any().item() for mask in rollout.split(rollout.loss_mask_A))
    assert 0 < training < 64
    assert difference(step.gradient, gradient * 64 / training) < 1e-5
    masked = [not mask.any() for mask in rollout.split(rollout.loss_mask_A)]
    theirs = loss * 64 + sum(a for a, hidden in zip(rollout.advantages_B.tolist(), masked) if hidden)  # of ratio 1
    assert step.metrics["loss"] * training == pytest.approx(theirs, rel=1e-5, abs=1e-4)


# ------------------------------------------------------------------------------------------------------------- loss


def test_kl_in_the_reward_is_that_of_the_whole_completion(monkeypatch, tmp_path, policy, toy_file):
    """T33: r_i - beta sum_t (log pi_old - log ref), truncated and masked completions included; 0 while the policy is
    its own reference."""
    flags = {**STEP, "model_name_or_path": policy, "dataset_name": toy_file, "num_iterations": 1, "beta": 0.05}
    flags |= {"mask_truncated_completions": True, "max_completion_length": 6, "learning_rate": 0.1}
    steps, rollouts = record(rloo, monkeypatch, tmp_path / "run", **flags)
    assert steps[0].metrics["kl"] == 0
    assert torch.equal(rollouts[0].old_logprobs_A, rollouts[0].reference_logprobs_A)
    rollout = rollouts[1]
    gaps = [gap_T.sum().item() for gap_T in rollout.split(rollout.old_logprobs_A - rollout.reference_logprobs_A)]
    masked = [not mask.any() for mask in rollout.split(rollout.loss_mask_A)]
    assert max(map(abs, gaps)) > 1 and any(gap for gap, hidden in zip(gaps, masked) if hidden)
    assert steps[1].metrics["kl"] == pytest.approx(sum(gaps) / 64, rel=1e-5)

    rewards = [reward - 0.05 * gap for reward, gap in zip(rollout.rewards_BF[:, 0].tolist(), gaps)]
    assert steps[1].metrics["rlhf_reward"] == pytest.approx(sum(rewards) / 64, rel=1e-5)
    groups = [rewards[begin : begin + 8] for begin in range(0, 64, 8)]
    expected = [group[i] - mean(group[:i] + group[i + 1 :]) for group in groups for i in range(8)]
    close(rollout.advantages_B, expected, 1e-5)


def test_clip_metrics_count_the_sequences_that_lost_their_gradient(monkeypatch, tmp_path, policy, toy_file):
    """T35: above the range with A > 0, below it with A < 0; a share of the sequences that train."""
    flags = {**STEP, "model_name_or_path": policy, "dataset_name": toy_file, "epsilon": 0.1, "epsilon_high": 0.3}
    flags |= {"mask_truncated_completions": True, "beta": 0.0}
    steps, (rollout,) = record(rloo, monkeypatch, tmp_path / "run", **flags)
    assert steps[0].metrics["clip_ratio/region_mean"] == 0  # on policy

    ids = rollout.split(rollout.input_ids_A)
    columns = zip(
        ids, rollout.split(rollout.old_logprobs_A), rollout.split(rollout.loss_mask_A), rollout.advantages_B.tolist()
    )
    model = stock_model(policy, steps[1].weights)
    low = high = outside = trained = 0
    for own, old_T, mask_T, advantage in columns:
        if not mask_T.any():
            continue
        with torch.no_grad():
            logits_TV = model(own[None].long()).logits[0, :-1].double()
        now_T = logits_TV.log_softmax(1).gather(1, own[1:, None].long())[:, 0]
        ratio = (now_T - old_T[1:].double())[mask_T[1:]].sum().exp().item()
        trained, outside = trained + 1, outside + (not 0.9 <= ratio <= 1.3)
        low, high = low + (ratio < 0.9 and advantage < 0), high + (ratio > 1.3 and advantage > 0)
    assert 0 < low + high < outside and low and high and trained < 64
    for name, count in (("low", low), ("high", high), ("region", low + high)):
        assert steps[1].metrics[f"clip_ratio/{name}_mean"] == pytest.approx(count / trained)


# ----------------------------------------------------------------------------------------------------------- layout

CUTS = {
    "a few sequences a row": dict(max_tokens_per_micro_batch=45),
    "each with its own prompt": dict(max_tokens_per_micro_batch=130, share_prompts=False),
    "one sequence a row, stock attention": dict(max_tokens_per_micro_batch=1, alone=True),
}
TRUNCATED = dict(mask_truncated_completions=True, max_completion_length=6)
CORRECTED = dict(sampler_correction_max=1.05, sampler_correction_min=0.95, beta=0.0)
AXES = {
    "kl": dict(beta=0.05, max_steps=3),  # only the second rollout is that of a policy other than the reference
    "greedy": dict(beta=0.0, baseline="greedy"),
    "mask_truncated, normalize_advantages": dict(**TRUNCATED, beta=0.05, normalize_advantages=True, max_steps=3),
    "two steps a pass": dict(beta=0.0, baseline="batch_mean", num_iterations=1, steps_per_generation=2, **TRUNCATED),
    "sequence_truncate": dict(sampler_correction="sequence_truncate", **CORRECTED),
    "sequence_mean_mask": dict(sampler_correction="sequence_mean_mask", **CORRECTED),
}


def another_sampler(rollout) -> None:
    """Sampler log-probs a tenth of a nat from the trainer's, and a few rewards missing."""
    noise_A = 0.1 * torch.randn(len(rollout.loss_mask_A), generator=torch.Generator().manual_seed(0))
    rollout.sampler_logprobs_A += noise_A * rollout.loss_mask_A
    rollout.rewards_BF[::9] = NAN


@pytest.mark.parametrize("axis", AXES)
def test_every_cut_of_a_step_has_the_same_gradient(axis, monkeypatch, tmp_path, toy_file, policy):
    """64 sequences in one row, in a few, in sixty-four; on policy and off."""
    flags = {**STEP, "model_name_or_path": policy, "dataset_name": toy_file, **AXES[axis]}
    disturb = another_sampler if "sampler_correction" in flags else None
    whole, rollouts = record(rloo, monkeypatch, tmp_path / "whole", disturb=disturb, **flags)
    assert all(step.gradient.norm() > 0 for step in whole)
    for name, cut in CUTS.items():
        steps, again = record(rloo, monkeypatch, tmp_path / name, disturb=disturb, **{**flags, **cut})
        assert all(torch.equal(a.input_ids_A, b.input_ids_A) for a, b in zip(rollouts, again, strict=True))
        for number, (step, expected) in enumerate(zip(steps, whole, strict=True), start=1):
            assert difference(step.gradient, expected.gradient) < 1e-5, f"{name}, step {number}"
            for key, value in expected.metrics.items():
                assert step.metrics[key] == pytest.approx(value, rel=1e-4, abs=1e-5), f"{key}, {name}, step {number}"

    if axis == "kl":  # the second step is off policy
        assert whole[1].metrics["clip_ratio/low_mean"] > 0.01 and whole[1].metrics["clip_ratio/high_mean"] > 0.01
    if "sampler_correction" in flags:
        assert (whole[0].metrics["sampling/frac_masked"] > 0.05) == axis.endswith("mask")
    if "mask_truncated_completions" in flags:
        assert 0 < sum(not mask.any() for mask in rollouts[0].split(rollouts[0].loss_mask_A)) < 64


# ------------------------------------------------------------------------------------------------- sampler correction


@pytest.mark.parametrize("mode, cap", [("sequence_truncate", 1.05), ("sequence_mean_mask", 1.05)])
def test_a_correction_weighs_whole_completions(mode, cap, monkeypatch, tmp_path, toy_file, policy):
    """On policy the loss is - mean of w_i A_i: w_i the product, or geometric mean, of pi_old / pi_sampler."""
    flags = {**STEP, "model_name_or_path": policy, "dataset_name": toy_file, "max_steps": 1, "num_iterations": 1}
    flags |= dict(sampler_correction=mode, **CORRECTED)
    (step,), (rollout,) = record(rloo, monkeypatch, tmp_path / "run", disturb=another_sampler, **flags)
    expected = 0.0
    columns = zip(
        rollout.split(rollout.old_logprobs_A - rollout.sampler_logprobs_A), rollout.split(rollout.loss_mask_A),
        rollout.advantages_B.tolist(),
    )
    for gap_T, mask_T, advantage in columns:
        own = gap_T[mask_T].double()
        weight = (own.mean() if "mean" in mode else own.sum()).exp().item()
        weight = min(weight, cap) if mode.endswith("truncate") else weight * (0.95 <= weight <= cap)
        expected -= weight * advantage / 64
    assert step.metrics["loss"] == pytest.approx(expected, rel=1e-4, abs=1e-6)


# ------------------------------------------------------------------------------------------------------ greedy baseline


def test_greedy_rewards_are_those_of_the_prompts_own_greedy_completions(monkeypatch, tmp_path, toy_file, policy):
    """ReMax, second rollout: the baseline of a group is the reward of what its prompt decodes to without sampling."""
    flags = {**STEP, "model_name_or_path": policy, "dataset_name": toy_file, "num_iterations": 1, "beta": 0.0}
    steps, rollouts = record(rloo, monkeypatch, tmp_path / "run", baseline="greedy", **flags)
    tokenizer = load_tokenizer("toy")
    answers = {row["prompt"]: row["answer"] for row in map(json.loads, Path(toy_file).read_text().splitlines())}
    for step, rollout in zip(steps, rollouts):
        model = stock_model(policy, step.weights)
        baseline_PG = rollout.rewards_BF.view(8, 8) - rollout.advantages_B.view(8, 8)
        ids = rollout.split(rollout.input_ids_A)
        for p in range(8):
            prompt = ids[8 * p][: rollout.prompt_lengths_B[8 * p]].long()
            out = prompt
            while len(out) < len(prompt) + 8 and (len(out) == len(prompt) or out[-1] != tokenizer.eos_token_id):
                with torch.no_grad():
                    out = torch.cat([out, model(out[None]).logits[0, -1].argmax()[None]])
            text = tokenizer.decode(out[len(prompt) :], skip_special_tokens=True)
            question = tokenizer.decode(prompt, skip_special_tokens=True)
            (reward,) = graded([question], [text], answer=[answers[question]])
            close(baseline_PG[p], [reward] * 8, 1e-6)


@pytest.mark.parametrize("flags", [dict(reward_clip_range=(0.4, 0.6)), dict(soft_overlong_cache=4)], ids=str)
def test_greedy_rewards_are_counted_as_sampled_ones_are(flags, monkeypatch, tmp_path, toy_file, policy):
    """Clipped, and punished for their length: else every advantage of a group is off by the same amount."""
    base = {**STEP, "model_name_or_path": policy, "dataset_name": toy_file, "num_iterations": 1, "beta": 0.0}
    base |= dict(baseline="greedy", max_steps=1, temperature=0.01)  # so that samples are greedy, nearly all of them
    _, (rollout,) = record(rloo, monkeypatch, tmp_path / "run", **base, **flags)
    assert rollout.advantages_B.view(8, 8).median(1).values.abs().max() < 1e-6


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize("flags, parts", [
    (["--num_generations", "1"], ["--num_generations", "at least 2, not 1"]),
    (["--baseline", "greedy", "--dynamic_sampling"], ["--baseline greedy", "--dynamic_sampling off"]),
])  # fmt: skip
def test_one_clear_sentence(flags, parts, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        launch(rloo.main, rloo.Args, ["--model_name_or_path", "toy", "--output_dir", str(tmp_path / "run"), *flags])
    said = capsys.readouterr().err
    assert stop.value.code == 1 and said.startswith("error: ") and said.count("\n") == 1
    for part in parts:
        assert part in said, said
    assert not (tmp_path / "run").exists()
