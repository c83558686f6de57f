"""How a step is cut is a matter of memory: the gradient of 64 sequences is the same in one row or in sixty-four.

Every case runs the scripts' own main() from end to end, sampling included. A script that divides by a count of the
micro-batch, takes a statistic of one micro-batch for one of the step, or lets a sequence see its neighbour, fails here
(T1, T4, T7, T8, T50 of the list of known bugs that this project was planned with).
"""

import pytest
import torch
from recording import STEP, difference, record

import grpo
import sft

pytest_plugins = ["recording"]

CUTS = {
    "a few sequences a row": dict(max_tokens_per_micro_batch=45),
    "each with its own prompt": dict(max_tokens_per_micro_batch=130, share_prompts=False),
    "one sequence a row, stock attention": dict(max_tokens_per_micro_batch=1, alone=True),
}

AXES = {
    "clip": {},
    "epsilon_high, delta": dict(epsilon=0.1, epsilon_high=0.28, delta=1.5),
    "cispo": dict(surrogate="cispo", cispo_max_ratio=1.1),
    "sapo": dict(surrogate="sapo", loss_aggregation="sequence_mean"),
    "sequence_mean": dict(loss_aggregation="sequence_mean"),
    "constant": dict(loss_aggregation="constant", scale_rewards="none"),
    "gspo": dict(importance_sampling_level="sequence", loss_aggregation="sequence_mean", epsilon=0.05),
    "gspo, token_mean": dict(importance_sampling_level="sequence", delta=1.2),
    "gspo, cispo": dict(importance_sampling_level="sequence", surrogate="cispo", cispo_max_ratio=1.1),
    "gspo, kl": dict(importance_sampling_level="sequence", beta=0.3),
    "kl k1": dict(beta=0.3, kl_estimator="k1"),
    "kl k2": dict(beta=0.3, kl_estimator="k2"),
    "kl k3": dict(beta=0.3, kl_estimator="k3"),
    "kl k3_corrected": dict(beta=0.3, kl_estimator="k3_corrected"),
    # Three steps, for only the second rollout is that of a policy other than the reference
    "kl k1 in the reward": dict(beta=0.3, kl_estimator="k1", kl_in="reward", max_steps=3),
    "kl k2 in the reward": dict(beta=0.3, kl_estimator="k2", kl_in="reward", max_steps=3),
    "kl k3 in the reward": dict(beta=0.3, kl_estimator="k3", kl_in="reward", max_steps=3, scale_rewards="none"),
    "entropy_coef": dict(entropy_coef=0.1),
    "top_entropy_quantile": dict(top_entropy_quantile=0.3),
    "top_entropy_quantile, entropy_coef": dict(top_entropy_quantile=0.5, entropy_coef=0.1),
    "mask_truncated": dict(mask_truncated_completions=True, max_completion_length=6),
    "mask_truncated, sequence_mean, kl": dict(
        mask_truncated_completions=True, max_completion_length=6, loss_aggregation="sequence_mean", beta=0.3
    ),
    "mask_truncated, entropy": dict(mask_truncated_completions=True, max_completion_length=6, entropy_coef=0.1),
    "batch": dict(scale_rewards="batch"),
    "two rewards": dict(
        reward_funcs=["common.toy:graded", "common.toy:exact_match"], reward_weights=[1.0, 0.5],
        multi_objective_aggregation="normalize_then_sum",
    ),
    "soft_overlong": dict(soft_overlong_cache=4),
    "dynamic_sampling": dict(dynamic_sampling=True, reward_funcs=["exact_match"]),
    "temperature": dict(temperature=0.7),
    "two steps a pass": dict(num_iterations=1, steps_per_generation=2),
    "four steps a pass, sequence_mean": dict(
        steps_per_generation=4, max_steps=5, loss_aggregation="sequence_mean", learning_rate=0.01
    ),
    "lora, kl": dict(use_peft=True, beta=0.3, learning_rate=1.0),
    "gradient_checkpointing": dict(gradient_checkpointing=True),
}
CORRECTIONS = [
    f"{level}_{form}" for level in ("token", "sequence", "sequence_mean") for form in ("truncate", "mask")
]


def compare_cuts(script, monkeypatch, folder, cuts, disturb=None, **flags):
    """All steps of a run, metrics included, cut in each of these ways, against those of the run in one row."""
    whole, rollouts = record(script, monkeypatch, folder / "whole", disturb=disturb, **flags)
    assert all(step.gradient.norm() > 0 for step in whole)
    for name, cut in cuts.items():
        steps, again = record(script, monkeypatch, folder / name, disturb=disturb, **{**flags, **cut})
        assert all(torch.equal(a.input_ids_A, b.input_ids_A) for a, b in zip(rollouts, again, strict=True))
        for number, (step, expected) in enumerate(zip(steps, whole, strict=True), start=1):
            assert difference(step.gradient, expected.gradient) < 1e-5, f"{name}, step {number}"
            for key, value in expected.metrics.items():
                # Before the first update a KL is rounding noise, and so is the sign of an advantage made only of it
                if flags.get("kl_in") == "reward" and key.startswith("clip_ratio/"):
                    continue
                assert step.metrics[key] == pytest.approx(value, rel=1e-4, abs=1e-5), f"{key}, {name}, step {number}"
    return whole, rollouts


@pytest.mark.parametrize("axis", AXES)
def test_every_cut_of_a_grpo_step_has_the_same_gradient(axis, monkeypatch, tmp_path, toy_file, policy):
    flags = {**STEP, "model_name_or_path": policy, "dataset_name": toy_file, **AXES[axis]}
    steps, rollouts = compare_cuts(grpo, monkeypatch, tmp_path, CUTS, **flags)
    if axis == "clip":  # the second step is as far off policy as this file says
        assert steps[1].metrics["clip_ratio/low_mean"] > 0.01 and steps[1].metrics["clip_ratio/high_mean"] > 0.01
    if "mask_truncated_completions" in flags:
        assert 0 < sum(not mask.any() for mask in rollouts[0].split(rollouts[0].loss_mask_A)) < 64


def another_sampler(rollout) -> None:
    """Sampler log-probs a tenth of a nat from the trainer's, and a few rewards missing."""
    noise_A = 0.1 * torch.randn(len(rollout.loss_mask_A), generator=torch.Generator().manual_seed(0))
    rollout.sampler_logprobs_A += noise_A * rollout.loss_mask_A
    rollout.rewards_BF[::9] = float("nan")


@pytest.mark.parametrize("mode", CORRECTIONS)
def test_nor_does_a_correction_depend_on_the_cut(mode, monkeypatch, tmp_path, toy_file, policy):
    flags = {**STEP, "model_name_or_path": policy, "dataset_name": toy_file, "beta": 0.3, "sampler_correction": mode}
    bounds = dict(sampler_correction_max=1.05, sampler_correction_min=0.95)
    steps, _ = compare_cuts(grpo, monkeypatch, tmp_path, CUTS, another_sampler, **flags, **bounds)
    assert (steps[0].metrics["sampling/frac_masked"] > 0.05) == mode.endswith("mask")


@pytest.mark.parametrize("flags", [dict(loss_type="nll"), dict(loss_type="dft", completion_only_loss=False)])
def test_every_cut_of_an_sft_step_has_the_same_gradient(flags, monkeypatch, tmp_path, toy_file, policy):
    cuts = {name: {k: v for k, v in cut.items() if k != "share_prompts"} for name, cut in CUTS.items()}
    step = dict(train_batch_size=64, max_steps=2, learning_rate=1.0)
    compare_cuts(
        sft, monkeypatch, tmp_path, cuts, model_name_or_path=policy, dataset_name=toy_file, **step, **flags
    )
