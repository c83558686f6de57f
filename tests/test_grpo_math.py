"""The small functions of grpo.py, held to loops over floats that a reader can check against the papers."""

import math
import random

import numpy as np
import pytest
import torch
from recording import STEP, record

import grpo
from common.data import Example, collate
from grpo import (
    advantages_of_rewards,
    cispo_loss,
    clipped_loss,
    correction_weights,
    group_advantages,
    kl_estimate,
    minibatch,
    sapo_loss,
    sequence_mean,
    sequence_weights,
    soft_overlong_penalty,
)

pytest_plugins = ["recording"]

NAN = float("nan")


def doubles(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(actual: torch.Tensor, expected, tolerance: float = 1e-9) -> None:
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual.detach().double(), expected, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------------------- advantages


def mean_and_std(values: list[float]) -> tuple[float, float]:
    """Of the values that are not NaN; Bessel's deviation, 0 for fewer than two."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return NAN, 0.0
    mean = sum(known) / len(known)
    return mean, math.sqrt(sum((value - mean) ** 2 for value in known) / max(1, len(known) - 1))


def slow_advantages(rewards: list[float], group_size: int, scale: str) -> list[float]:
    """2402.03300, section 4.1.2, one reward at a time."""
    advantages = []
    for i, reward in enumerate(rewards):
        begin = i // group_size * group_size
        mean, group_std = mean_and_std(rewards[begin : begin + group_size])
        divisor = {"group": group_std + 1e-4, "batch": mean_and_std(rewards)[1] + 1e-4, "none": 1.0}[scale]
        advantages.append(0.0 if math.isnan(reward) else (reward - mean) / divisor)
    return advantages


def some_rewards(groups: int, group_size: int, missing: float = 0.0, seed: int = 0) -> list[float]:
    """Groups of quite different mean and spread, so that no two scalings agree by chance."""
    generator = random.Random(seed)
    return [
        NAN if generator.random() < missing else 3 * p + (p + 1) * generator.gauss(0, 1)
        for p in range(groups)
        for _ in range(group_size)
    ]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("missing", [0.0, 0.4])
def test_advantages_are_those_of_a_loop(scale, missing):
    for seed, (groups, group_size) in enumerate([(3, 4), (1, 2), (5, 7), (2, 16)]):
        rewards = some_rewards(groups, group_size, missing, seed)
        close(group_advantages(doubles(rewards), group_size, scale), slow_advantages(rewards, group_size, scale))


def test_group_and_batch_scaling_are_not_swapped():
    """T30 (TRL #3992): two groups of the same shape, one ten times as wide."""
    rewards = doubles([0, 1, 2, 3, 0, 10, 20, 30])
    narrow, wide = group_advantages(rewards, 4, "group").view(2, 4)
    close(narrow, wide, 1e-4)  # each by its own deviation: the same
    narrow, wide = group_advantages(rewards, 4, "batch").view(2, 4)
    close(wide, 10 * narrow)  # both by one: ten times as large
    close(group_advantages(rewards, 4, "none"), [-1.5, -0.5, 0.5, 1.5, -15, -5, 5, 15])


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_permuting_prompts_permutes_advantages(scale):
    rewards_PG = doubles(some_rewards(6, 4, 0.2)).view(6, 4)
    order = [4, 0, 5, 2, 1, 3]
    advantages_PG = group_advantages(rewards_PG.flatten(), 4, scale).view(6, 4)
    close(group_advantages(rewards_PG[order].flatten(), 4, scale).view(6, 4), advantages_PG[order])


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_an_equal_group_has_no_advantage(scale):
    """Up to the rounding of a mean in fp32; for 0 and 1, the usual rewards, exactly."""
    rewards = torch.tensor([1.0] * 5 + [0.0] * 5 + [0.1] * 5 + [0.0, 1.0, 0.0, 0.0, 1.0])
    advantages = group_advantages(rewards, 5, scale).view(4, 5)
    assert (advantages[:2] == 0).all()
    assert advantages[2].abs().max() < 1e-3 < advantages[3].abs().min()


def test_a_group_that_nobody_could_grade_has_no_advantage():
    rewards = torch.tensor([NAN] * 4 + [0.0, 1.0, 1.0, NAN])
    for scale in ("group", "batch", "none"):
        advantages = group_advantages(rewards, 4, scale)
        assert (advantages[:4] == 0).all() and advantages[7] == 0 and advantages[4] < 0 < advantages[5]
    assert (group_advantages(torch.tensor([NAN, 0.7]), 2, "group") == 0).all()  # one opinion is no spread


def test_unscaled_advantages_are_those_of_rloo_but_for_a_factor():
    """r_i minus the mean of the OTHERS (2402.14740) is k/(k-1) times r_i minus the mean of all."""
    rewards = some_rewards(3, 5)
    leave_one_out = [
        reward - sum(other for j, other in enumerate(rewards) if j // 5 == i // 5 and j != i) / 4
        for i, reward in enumerate(rewards)
    ]
    close(group_advantages(doubles(rewards), 5, "none") * 5 / 4, leave_one_out)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_rewards_are_weighed_once_and_then_normalised(scale, missing):
    generator = random.Random(1)
    weights = [0.5, 2.0, -1.0]
    rewards = [[NAN if generator.random() < missing else generator.gauss(0, 1) for _ in weights] for _ in range(12)]
    rewards[3] = [NAN] * 3  # no function had an opinion: not the same as 0
    totals = [
        NAN if all(map(math.isnan, row)) else sum(w * r for w, r in zip(weights, row) if not math.isnan(r))
        for row in rewards
    ]
    actual = advantages_of_rewards(doubles(rewards), doubles(weights), 4, scale, "sum_then_normalize")
    close(actual, slow_advantages(totals, 4, scale))
    assert actual[3] == 0


@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_gdpo_normalises_each_reward_before_it_adds_them_up(missing):
    """2601.05242: by group for each function, then by the mean and deviation of the whole batch."""
    generator = random.Random(2)
    weights = [1.0, 0.25]
    rewards = [
        [NAN if generator.random() < missing else generator.gauss(i, 10**f) for f in range(2)] for i in range(12)
    ]
    if missing:
        rewards[7] = [NAN, NAN]
    each = [slow_advantages([row[f] for row in rewards], 4, "group") for f in range(2)]
    totals = [
        NAN if all(map(math.isnan, row)) else weights[0] * a + weights[1] * b for row, a, b in zip(rewards, *each)
    ]  # a completion that nobody could grade is no part of the batch's statistics either
    mean, std = mean_and_std(totals)
    for scale in ("group", "batch", "none"):  # which has no say here
        actual = advantages_of_rewards(doubles(rewards), doubles(weights), 4, scale, "normalize_then_sum")
        close(actual, [0.0 if math.isnan(total) else (total - mean) / (std + 1e-4) for total in totals])


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_a_constant_reward_changes_nothing(aggregation):
    rewards = torch.tensor(some_rewards(4, 4), dtype=torch.float64)
    alone = advantages_of_rewards(rewards[:, None], doubles([1.0]), 4, "group", aggregation)
    with_a_constant = torch.stack([rewards, torch.zeros(16, dtype=torch.float64)], 1)
    close(advantages_of_rewards(with_a_constant, doubles([1.0, 5.0]), 4, "group", aggregation), alone)


# ---------------------------------------------------------------------------------------------------------- weights


def slow_weights(lengths: list[int], aggregation: str, longest: int) -> list[float]:
    """What a token of sequence i weighs, from the three denominators as the papers write them."""
    trained = [length for length in lengths if length > 0]
    if aggregation == "token_mean":
        return [1 / sum(trained)] * len(lengths)
    if aggregation == "sequence_mean":
        return [1 / (len(trained) * length) if length else 0.0 for length in lengths]
    return [1 / (len(lengths) * longest)] * len(lengths)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant"])
@pytest.mark.parametrize("lengths", [[3, 1, 7], [3, 0, 7, 0], [5, 5, 5], [1]])
def test_sequence_weights(aggregation, lengths):
    weights = sequence_weights(torch.tensor(lengths), aggregation, 8)
    trained = torch.tensor(lengths) > 0  # the weight of a sequence without trained tokens is never read
    close(weights[trained], torch.tensor(slow_weights(lengths, aggregation, 8))[trained], 1e-6)
    total = (weights * torch.tensor(lengths)).sum().item()
    assert total == pytest.approx(sum(lengths) / (8 * len(lengths)) if aggregation == "constant" else 1)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant"])
def test_a_step_in_which_all_is_masked_has_finite_weights(aggregation):
    """T6."""
    assert sequence_weights(torch.zeros(3), aggregation, 8).isfinite().all()


def test_the_means_differ_when_lengths_do_and_only_then():
    """T5."""
    ragged, even = torch.tensor([2.0, 6.0]), torch.tensor([4.0, 4.0])
    assert (sequence_weights(ragged, "token_mean", 8) != sequence_weights(ragged, "sequence_mean", 8)).all()
    close(sequence_weights(even, "token_mean", 8), sequence_weights(even, "sequence_mean", 8))


# ------------------------------------------------------------------------------------------------------- surrogates

RATIOS = [0.3, 0.79, 0.81, 0.999, 1.0, 1.19, 1.21, 1.27, 1.29, 3.9, 4.1, 9.0]


def surrogate_cases() -> tuple[torch.Tensor, torch.Tensor]:
    """Every ratio with an advantage above, below and at 0. No ratio sits on a corner: there is no one slope there."""
    pairs = [(ratio, advantage) for ratio in RATIOS for advantage in (1.5, -0.7, 0.0)]
    ratio, advantage = doubles(pairs).T.contiguous()
    return ratio.requires_grad_(), advantage


def slopes(slow, ratios: torch.Tensor, advantages: torch.Tensor, h: float = 1e-6) -> list[float]:
    """Central differences of `slow` in the ratio."""
    pairs = zip(ratios.tolist(), advantages.tolist())
    return [(slow(ratio + h, advantage) - slow(ratio - h, advantage)) / (2 * h) for ratio, advantage in pairs]


@pytest.mark.parametrize("low, high, delta", [(0.2, 0.2, None), (0.2, 0.28, None), (0.2, 0.28, 4.0), (0.2, 0.2, 1.2)])
def test_clipped_loss(low, high, delta):
    def slow(ratio: float, advantage: float) -> float:
        clipped = min(max(ratio, 1 - low), 1 + high)
        if delta is not None:
            ratio = min(ratio, delta)
        return -min(ratio * advantage, clipped * advantage)

    ratio, advantage = surrogate_cases()
    loss = clipped_loss(ratio, advantage, low, high, delta)
    close(loss, [slow(r, a) for r, a in zip(ratio.tolist(), advantage.tolist())])
    (slope,) = torch.autograd.grad(loss.sum(), ratio)
    close(slope, slopes(slow, ratio, advantage), 1e-6)


def test_where_the_clip_takes_the_gradient():
    """T35: above the range for a good token, below it for a bad one, and nowhere else."""
    ratio, advantage = surrogate_cases()
    (slope,) = torch.autograd.grad(clipped_loss(ratio, advantage, 0.2, 0.28, None).sum(), ratio)
    dead = ((advantage > 0) & (ratio > 1.28)) | ((advantage < 0) & (ratio < 0.8)) | (advantage == 0)
    assert torch.equal(slope == 0, dead)
    close(slope[~dead], -advantage[~dead])


def test_delta_bounds_the_loss_of_a_bad_token_that_became_likely():
    """2505.07291: without it a ratio of 9 at A = -1 costs 9; a good token never feels it."""
    nine = doubles([9.0])
    close(clipped_loss(nine, doubles([-1.0]), 0.2, 0.28, None), [9.0])
    close(clipped_loss(nine, doubles([-1.0]), 0.2, 0.28, 4.0), [4.0])
    close(clipped_loss(nine, doubles([1.0]), 0.2, 0.28, 4.0), [-1.28])
    ratio = nine.requires_grad_()
    (slope,) = torch.autograd.grad(clipped_loss(ratio, doubles([-1.0]), 0.2, 0.28, 4.0).sum(), ratio)
    assert slope.item() == 0


def test_cispo_keeps_the_gradient_of_capped_tokens():
    """T36: the gradient is sg[min(ratio, cap)] A grad log pi, also where PPO's would be 0."""
    ratio, advantage = surrogate_cases()
    logprobs = torch.linspace(-3, -0.1, len(ratio), dtype=torch.float64, requires_grad=True)
    live_ratio = ratio * (logprobs - logprobs.detach()).exp()  # depends on the log-probs, and must be detached
    loss = cispo_loss(live_ratio, logprobs, advantage, 2.0)
    weights = [min(r, 2.0) for r in ratio.tolist()]
    close(loss, [-w * a * lp for w, a, lp in zip(weights, advantage.tolist(), logprobs.tolist())])
    (slope,) = torch.autograd.grad(loss.sum(), logprobs)
    close(slope, [-w * a for w, a in zip(weights, advantage.tolist())])


def test_sapo_loss():
    """2511.20347: sigmoid(tau (rho - 1)) 4 / tau, tau by the sign of the advantage."""

    def slow(ratio: float, advantage: float) -> float:
        tau = 1.0 if advantage > 0 else 1.5
        return -advantage * 4 / (tau * (1 + math.exp(-tau * (ratio - 1))))

    ratio, advantage = surrogate_cases()
    loss = sapo_loss(ratio, advantage, 1.0, 1.5)
    close(loss, [slow(r, a) for r, a in zip(ratio.tolist(), advantage.tolist())])
    (slope,) = torch.autograd.grad(loss.sum(), ratio)
    close(slope, slopes(slow, ratio, advantage), 1e-6)
    good = advantage > 0
    assert (slope[good].abs().argmax() == (ratio[good] - 1).abs().argmin()).item()  # fades on both sides


@pytest.mark.parametrize("advantage", [0.8, -1.3])
def test_every_surrogate_has_the_policy_gradient_at_ratio_one(advantage):
    logprobs = doubles([-0.7]).requires_grad_()
    ratio, a = (logprobs - logprobs.detach()).exp(), doubles([advantage])
    losses = [
        clipped_loss(ratio, a, 0.2, 0.28, 4.0),
        cispo_loss(ratio, logprobs, a, 5.0),
        sapo_loss(ratio, a, 1.0, 1.0),
        sapo_loss(ratio, a, 2.0, 0.5),
    ]
    for loss in losses:
        (slope,) = torch.autograd.grad(loss.sum(), logprobs, retain_graph=True)
        close(slope, [-advantage])


# --------------------------------------------------------------------------------------------------------------- KL
# T34. A policy over seven symbols, so that an expectation is a sum of seven terms and nothing is left to chance.


def seven_symbols() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of pi (to be differentiated), log-probs of the reference, log-probs of another policy that sampled."""
    generator = torch.Generator().manual_seed(0)
    theta, reference, sampler = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    return theta.requires_grad_(), (2 * reference).log_softmax(0), sampler.log_softmax(0)


def exact_gradients() -> tuple[torch.Tensor, torch.Tensor]:
    """d KL(pi || ref) / d theta and d KL(ref || pi) / d theta."""
    theta, reference, _ = seven_symbols()
    logprobs = theta.log_softmax(0)
    reverse = (logprobs.exp() * (logprobs - reference)).sum()
    forward = (reference.exp() * (reference - logprobs)).sum()
    return tuple(torch.autograd.grad(kl, theta, retain_graph=True)[0] for kl in (reverse, forward))


def test_the_values_of_the_kl_estimators():
    theta, reference, _ = seven_symbols()
    logprobs = theta.log_softmax(0)
    pi, kl = logprobs.exp(), (logprobs.exp() * (logprobs - reference)).sum()
    for estimator in ("k1", "k3", "k3_corrected"):  # the ratio is 1
        close((pi * kl_estimate(logprobs, reference, estimator)).sum(), kl.item())
    assert (kl_estimate(logprobs, reference, "k3") >= 0).all() and (kl_estimate(logprobs, reference, "k2") >= 0).all()
    delta = (logprobs - reference).tolist()
    close(kl_estimate(logprobs, reference, "k2"), [d * d / 2 for d in delta])
    close(kl_estimate(logprobs, reference, "k3"), [math.exp(-d) - 1 + d for d in delta])


@pytest.mark.parametrize("estimator, is_gradient_of", [("k1", None), ("k2", 0), ("k3", 1), ("k3_corrected", 0)])
def test_the_expected_gradient_of_a_kl_estimator_as_a_loss(estimator, is_gradient_of):
    theta, reference, _ = seven_symbols()
    logprobs = theta.log_softmax(0)
    ratio = (logprobs - logprobs.detach()).exp()
    expectation = (logprobs.detach().exp() * kl_estimate(logprobs, reference, estimator, ratio)).sum()
    (gradient,) = torch.autograd.grad(expectation, theta)
    close(gradient, torch.zeros(7) if is_gradient_of is None else exact_gradients()[is_gradient_of])


def test_the_ratio_repairs_k3_off_policy_too():
    """Samples of another policy, ratio pi / sampler not detached: still the gradient of KL(pi || ref), and only so."""
    theta, reference, sampler = seven_symbols()
    logprobs = theta.log_softmax(0)
    ratio = (logprobs - sampler).exp()
    expected = exact_gradients()[0]

    def gradient(ratio):
        expectation = (sampler.exp() * kl_estimate(logprobs, reference, "k3_corrected", ratio)).sum()
        return torch.autograd.grad(expectation, theta, retain_graph=True)[0]

    close(gradient(ratio), expected)
    assert (gradient(ratio.detach()) - expected).norm() > 0.1 * expected.norm()


def test_k1_in_the_reward_is_exact():
    """REINFORCE with the reward -k1: minus the gradient of KL(pi || ref)."""
    theta, reference, _ = seven_symbols()
    logprobs = theta.log_softmax(0)
    penalty = kl_estimate(logprobs, reference, "k1").detach()
    (gradient,) = torch.autograd.grad((logprobs.detach().exp() * penalty * logprobs).sum(), theta)
    close(gradient, exact_gradients()[0])


def test_kl_in_the_reward_is_that_of_the_whole_completion(monkeypatch, tmp_path, policy, toy_file):
    """T33: r_i - beta sum_t (log pi - log ref), advantages then as ever. In main(), at the second rollout: at the first
    the policy is its own reference."""
    flags = {**STEP, "model_name_or_path": policy, "dataset_name": toy_file, "num_iterations": 1}
    _, (_, rollout) = record(
        grpo, monkeypatch, tmp_path / "run", beta=0.05, kl_in="reward", kl_estimator="k1", scale_rewards="none", **flags
    )
    gaps = [gap_T.sum().item() for gap_T in rollout.split(rollout.old_logprobs_A - rollout.reference_logprobs_A)]
    rewards = [reward - 0.05 * gap for reward, gap in zip(rollout.rewards_BF[:, 0].tolist(), gaps)]
    assert max(map(abs, gaps)) > 1
    close(rollout.advantages_B, slow_advantages(rewards, 8, "none"), 1e-5)


def test_kl_of_nearly_equal_policies_does_not_cancel():
    """exp(-d) - 1 + d at d = 1e-4 is 5e-9: in fp32 the naive form is off by more than its value."""
    close(kl_estimate(torch.tensor([-1.0]), torch.tensor([-1.0001]), "k3"), [0.5e-8], 1e-10)


# ------------------------------------------------------------------------------------------------------ packed rows


def packed_row(layout: str):
    """Four sequences of two prompts, 1 to 6 trained tokens each and one with none; their indices are out of order."""
    prompts, lengths = [[1, 2, 3], [1, 2, 3], [4, 5], [4, 5]], [2, 6, 1, 3]
    examples = []
    for row, (prompt, length) in enumerate(zip(prompts, lengths)):
        mask = [False] * len(prompt) + [row != 3] * length
        examples.append(Example(prompt + list(range(6, 6 + length)), mask, row, len(prompt)))
    return examples, collate(examples, [2, 0, 3, 1], layout=layout)


def slow_by_sequence(values_N: torch.Tensor, batch) -> list[list[float]]:
    """The trained values of each sequence of the row."""
    sequences = [[] for _ in batch.lengths]
    for value, b, trained in zip(values_N.tolist(), batch.seq_N.tolist(), batch.loss_mask_N.tolist()):
        if trained:
            sequences[b].append(value)
    return sequences


@pytest.mark.parametrize("layout", ["packed", "shared"])
def test_sequence_mean(layout):
    """The exponent of GSPO (2507.18071 Eq. 7), and its gradient: each trained token's share is 1 / L."""
    _, batch = packed_row(layout)
    values = torch.randn(len(batch.seq_N), generator=torch.Generator().manual_seed(0)).requires_grad_()
    mean_N = sequence_mean(values, batch)
    means = [sum(own) / len(own) if own else 0.0 for own in slow_by_sequence(values, batch)]
    close(mean_N, [means[b] for b in batch.seq_N.tolist()], 1e-6)

    weights = torch.rand(len(values), generator=torch.Generator().manual_seed(1))
    (slope,) = torch.autograd.grad((weights * mean_N).sum(), values)
    counts = [len(own) for own in slow_by_sequence(values, batch)]
    totals = [weights[batch.seq_N == b].sum().item() for b in range(len(counts))]
    trained_N = zip(batch.seq_N.tolist(), batch.loss_mask_N.tolist())
    expected = [totals[b] / counts[b] if trained else 0.0 for b, trained in trained_N]
    close(slope, expected, 1e-6)


MODES = [f"{level}_{form}" for level in ("token", "sequence", "sequence_mean") for form in ("truncate", "mask")]


@pytest.mark.parametrize("layout", ["packed", "shared"])
@pytest.mark.parametrize("mode", MODES)
def test_correction_weights(mode, layout):
    _, batch = packed_row(layout)
    seen = set()
    for seed in range(8):
        old, sampler = 0.5 * torch.randn(2, len(batch.seq_N), generator=torch.Generator().manual_seed(seed))
        weights = correction_weights(old.requires_grad_(), sampler, batch, mode, 0.6, 1.6)
        assert not weights.requires_grad

        log_ratios, expected = slow_by_sequence(old - sampler, batch), []
        for b, own in enumerate(log_ratios):
            for log_weight in own:
                if mode.startswith("sequence"):
                    log_weight = sum(own) / (len(own) if "mean" in mode else 1)
                weight = math.exp(log_weight)
                expected.append(min(weight, 1.6) if "truncate" in mode else weight * (0.6 <= weight <= 1.6))
        close(weights[batch.loss_mask_N], expected, 1e-6)
        seen |= set(expected)
    assert len(seen) > 3 and (1.6 if "truncate" in mode else 0.0) in seen  # the bounds were met


def test_a_product_of_weights_decays_with_length_and_a_geometric_mean_does_not():
    """Noise of sigma a token makes the log of a product about -L sigma^2 / 2: 2000 tokens at 0.1 leave e^-10."""

    def typical_weight(length: int, mode: str) -> float:
        examples = [Example([0] * (length + 1), [False] + [True] * length, row) for row in range(25)]
        batch = collate(examples, list(range(25)))
        gap_N = 0.1 * torch.randn(len(batch.seq_N), generator=torch.Generator().manual_seed(length)) - 0.1**2 / 2
        return correction_weights(gap_N, torch.zeros_like(gap_N), batch, mode, 0.0, 1e9).median().item()

    for length in (20, 200, 2000):
        assert typical_weight(length, "sequence_mean_truncate") == pytest.approx(1, abs=0.02)
    assert typical_weight(20, "sequence_truncate") == pytest.approx(math.exp(-0.1), rel=0.3)
    assert typical_weight(2000, "sequence_truncate") < 1e-3


# ------------------------------------------------------------------------------------------------------------- rest


def test_soft_overlong_penalty():
    """DAPO Eq. 13 with L_max 20 and a cache of 4."""
    lengths = list(range(1, 24))
    expected = [0.0 if n <= 16 else (16 - n) / 4 if n <= 20 else -1.0 for n in lengths]
    close(soft_overlong_penalty(torch.tensor(lengths), 20, 4), expected)


@pytest.mark.parametrize("sequences, parts", [(64, 1), (64, 4), (12, 3), (8, 8)])
def test_every_pass_takes_every_sequence_once(sequences, parts):
    passes = [[minibatch(sequences, parts, k * parts + i, (7, 3)) for i in range(parts)] for k in range(3)]
    for one_pass in passes:
        assert sorted(np.concatenate(one_pass).tolist()) == list(range(sequences))
        assert {len(part) for part in one_pass} == {sequences // parts}
    again = minibatch(sequences, parts, 2 * parts - 1, (7, 3))
    assert np.array_equal(again, passes[1][-1])


def test_every_pass_is_shuffled_anew():
    def order(position, seed):
        return minibatch(64, 2, position, seed).tolist()

    assert len({tuple(order(position, (7, 3))) for position in (0, 2, 4)}) == 3
    assert order(0, (7, 3)) != order(0, (8, 3)) and order(0, (7, 3)) != order(0, (7, 5))
