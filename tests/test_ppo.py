"""ppo.py: every detail of the list in its docstring, under the name given there.

Small functions are held to loops over floats; the script's own main() to itself cut in other ways, and to one optimiser
step written down again here, in float64, with stock transformers on one sequence at a time.
"""

import json
import math
import random
import re
import shutil
from itertools import chain, pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from recording import STEP as GRPO_STEP
from recording import difference, record
from torch.nn.utils import vector_to_parameters
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

import ppo
import reward
from common.data import Example, collate, encode_completion, encode_prompt
from common.models import hidden_states, load_scorer, load_tokenizer
from common.rewards import load_reward
from common.run import launch
from common.toy import toy_rows

pytest_plugins = ["recording"]

NAN, CPU = float("nan"), torch.device("cpu")
# Two minibatches, two passes; the critic moves fast enough for its clip range to matter
STEP = GRPO_STEP | dict(
    generation_batch_size=32, num_generations=1, steps_per_generation=2, learning_rate=0.02, critic_learning_rate=0.03,
    vf_coef=1.0, cliprange_value=0.01,
)


def doubles(values) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


def close(actual: torch.Tensor, expected, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(actual.detach().double(), doubles(expected), rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="session")
def scorer(policy, tmp_path_factory) -> str:
    """A reward model as reward.py leaves it: a body of its own, a head, reward_mean and reward_std."""
    folder = tmp_path_factory.mktemp("scorer") / "run"
    reward.main(reward.Args(
        output_dir=str(folder), model_name_or_path=policy, max_steps=12, train_batch_size=32, max_eval_samples=8,
        normalize_split="train[:64]", learning_rate=3e-3,
    ))  # fmt: skip
    return str(folder / "final")


@pytest.fixture
def run(monkeypatch, tmp_path, toy_file, policy):
    """run(**flags) -> the recorded steps of a run, and each of its rollouts with its scores and its targets."""

    def run(name: str = "run", disturb=None, **flags) -> SimpleNamespace:
        scores, aims = [], []

        def roll_out(*args, real=ppo.roll_out):
            rollout, score_B, metrics = real(*args)
            scores.append(score_B)
            return rollout, score_B, metrics

        def targets(*args, real=ppo.targets):
            aims.append(real(*args)[0])
            return real(*args)

        flags = {**STEP, "model_name_or_path": policy, "dataset_name": toy_file, **flags}
        with monkeypatch.context() as patch:
            patch.setattr(ppo, "roll_out", roll_out)
            patch.setattr(ppo, "targets", targets)
            steps, rollouts = record(ppo, monkeypatch, tmp_path / name, disturb=disturb, **flags)
        flags.pop("alone", None)
        return SimpleNamespace(
            steps=steps, rollouts=rollouts, scores=scores, targets=aims, args=ppo.Args(**flags),
            metrics=[step.metrics for step in steps],
        )

    return run


def test_every_detail_has_its_test():
    """The list in the docstring of ppo.py: numbered without a gap, and no name in it is made up."""
    details = re.findall(r"^ +(\d+)\. .*?(test_\w+|tests/test_\w+\.py)$", ppo.__doc__, re.MULTILINE)
    assert [int(number) for number, _ in details] == list(range(1, 25))
    for _, name in details:
        assert name in globals() or (Path(__file__).parents[1] / name).is_file(), name


# ------------------------------------------------------------------------------------------------ the little functions


def some_lists(lengths: list[int], seed: int) -> list[list[float]]:
    generator = random.Random(seed)
    return [[generator.gauss(0, 1) for _ in range(length)] for length in lengths]


def padded(lists: list[list[float]], width: int = 0) -> torch.Tensor:
    width = max(width, *map(len, lists))
    return doubles([values + [0.0] * (width - len(values)) for values in lists])


def slow_gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """1506.02438 Eq. 16: all later deltas of each token, one by one."""
    values = [*values, 0.0]
    delta = [r + gamma * later - now for r, now, later in zip(rewards, values, values[1:])]
    return [
        sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, len(rewards))) for t in range(len(rewards))
    ]


LENGTHS = [5, 1, 8, 3, 0, 8]


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (1.0, 1.0), (0.9, 0.5), (0.99, 0.0), (0.0, 0.95)])
def test_gae_sums_the_future(gamma, lam):
    """T24. And each sequence has what it has alone, whatever stands beside it and however wide the batch."""
    rewards, values = some_lists(LENGTHS, 0), some_lists(LENGTHS, 1)
    expected = [slow_gae(r, v, gamma, lam) for r, v in zip(rewards, values)]
    close(ppo.gae(padded(rewards), padded(values), gamma, lam), padded(expected))
    wide_BT = ppo.gae(padded(rewards, 20), padded(values, 20), gamma, lam)
    close(wide_BT, padded(expected, 20))
    for row, own in enumerate(expected):
        if own:
            close(ppo.gae(doubles([rewards[row]]), doubles([values[row]]), gamma, lam)[0], own)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_with_lambda_one_an_advantage_is_what_came_out_less_what_was_expected(gamma):
    """T24: A = G - V; the last token's is r - V whatever lambda: nothing is expected behind it."""
    rewards, values = some_lists(LENGTHS, 2), some_lists(LENGTHS, 3)
    returns = [[sum(gamma ** (k - t) * r[k] for k in range(t, len(r))) for t in range(len(r))] for r in rewards]
    close(ppo.gae(padded(rewards), padded(values), gamma, 1.0), padded(returns) - padded(values))
    for lam in (0.0, 0.5, 0.95):
        advantage_BT = ppo.gae(padded(rewards), padded(values), gamma, lam)
        last = [(row, length - 1) for row, length in enumerate(LENGTHS) if length]
        close(torch.stack([advantage_BT[at] for at in last]), [rewards[b][t] - values[b][t] for b, t in last])


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening(shift_mean):
    """T26. Biased variance over the masked ones; where the others stand, how many and what they are, is no matter."""
    generator, numbers = random.Random(0), np.random.default_rng(0).normal(3, 5, 50)
    expected = (numbers - numbers.mean()) / np.sqrt(numbers.var() + 1e-8) + (0 if shift_mean else numbers.mean())
    for extra in (0, 1, 70):
        places = sorted(generator.sample(range(50 + extra), 50))
        value_A = torch.full((50 + extra,), 1e4, dtype=torch.float64)
        value_A[places], mask_A = doubles(numbers), torch.zeros(50 + extra, dtype=torch.bool)
        mask_A[places] = True
        white_A = ppo.whiten(value_A, mask_A, shift_mean)
        close(white_A[mask_A], expected)
        assert not white_A[~mask_A].any()
    assert expected.std() == pytest.approx(1) and expected.mean() == pytest.approx(0 if shift_mean else numbers.mean())
    one = torch.tensor([5.0])  # of one number, and of none
    close(ppo.whiten(one, one > 0, shift_mean), [0.0 if shift_mean else 5.0])
    assert not ppo.whiten(one, one < 0, shift_mean).any()


@pytest.mark.parametrize("cliprange", [0.2, 0.0, None])
def test_value_loss(cliprange):
    """The worse of both errors, and half of it; a value that went the right way out of the range has no gradient."""
    cases = [(v, o, g) for v in (-1.0, 0.05, 0.3, 0.71, 2.0) for o in (0.0, 0.55, 0.9) for g in (-2.0, 0.4, 0.69, 3.0)]

    def slow(value: float, old: float, goal: float) -> float:
        error = (value - goal) ** 2
        if cliprange is not None:
            clipped = min(max(value, old - cliprange), old + cliprange)
            error = max(error, (clipped - goal) ** 2)
        return error / 2

    value_N, old_N, goal_N = doubles(cases).T.contiguous()
    loss_N = ppo.value_loss(value_N.requires_grad_(), old_N, goal_N, cliprange)
    close(loss_N, [slow(*case) for case in cases])
    (slope_N,) = torch.autograd.grad(loss_N.sum(), value_N)
    h = 1e-7
    close(slope_N, [(slow(v + h, o, g) - slow(v - h, o, g)) / (2 * h) for v, o, g in cases], 1e-6)
    if cliprange:
        assert slope_N[cases.index((2.0, 0.0, 3.0))] == 0 != slope_N[cases.index((2.0, 0.0, -2.0))]


def test_explained_variance():
    value, target = np.random.default_rng(0).normal(size=(2, 40))
    expected = 1 - (target - value).var() / target.var()
    assert ppo.explained_variance(doubles(value), doubles(target)) == pytest.approx(expected)
    assert ppo.explained_variance(doubles(target) + 3, doubles(target)) == pytest.approx(1)
    assert ppo.explained_variance(torch.ones(5), torch.arange(5.0)) == 0
    assert math.isfinite(ppo.explained_variance(torch.rand(5), torch.ones(5)))


@pytest.mark.parametrize("mode, expected", [
    ("replace", [0.3, -2.0, -4.0, -2.0, 0.0]), ("subtract", [0.3, -1.5, -4.0, -5.0, 0.0]),
    ("none", [0.3, 0.5, -4.0, -3.0, 0.0]),
])  # fmt: skip
def test_the_score_of_those_that_did_not_stop(mode, expected):
    """T27."""
    stopped_B = torch.tensor([True, False, True, False, True])
    close(ppo.score_of_stop(doubles([0.3, 0.5, -4.0, -3.0, 0.0]), stopped_B, mode, 2.0), expected)


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_rewards_of_tokens(beta):
    kls, scores = some_lists(LENGTHS, 4), [1.0, -2.0, 0.5, 0.0, 7.0, 3.0]
    expected = [[-beta * kl for kl in own] for own in kls]
    for own, score in zip(expected, scores):
        if own:
            own[-1] += score
    close(ppo.token_rewards(doubles(scores), padded(kls), torch.tensor(LENGTHS), beta), padded(expected))


# ------------------------------------------------------------------------------------------------------- one rollout


def hand_made(trained: list[bool], lengths: list[int], prompts: list[int], seed: int = 0) -> ppo.Rollout:
    """Completions of these lengths behind prompts of those; log-probs are random."""
    whole = [length + prompt for length, prompt in zip(lengths, prompts)]
    mask = chain(*([False] * p + [known] * n for known, n, p in zip(trained, lengths, prompts)))
    old_A, reference_A = -torch.rand(2, sum(whole), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    completed_A = torch.tensor([t >= p for n, p in zip(whole, prompts) for t in range(n)])
    return ppo.Rollout(
        input_ids_A=torch.arange(sum(whole), dtype=torch.int32), loss_mask_A=torch.tensor(list(mask)),
        lengths_B=torch.tensor(whole), prompt_lengths_B=torch.tensor(prompts), rewards_BF=torch.zeros(len(whole), 1),
        old_logprobs_A=old_A * completed_A, reference_logprobs_A=reference_A * completed_A,
    )


def completion_parts(rollout: ppo.Rollout, value_A: torch.Tensor) -> list[list[float]]:
    """Values of each completion; those of prompts have to be 0."""
    parts = list(zip(rollout.split(value_A), rollout.prompt_lengths_B.tolist()))
    assert not any(own[:prompt].any() for own, prompt in parts)
    return [own[prompt:].tolist() for own, prompt in parts]


# One token (EOS at once), cut off, masked, nothing but a prompt, ordinary
TRAINED, COMPLETIONS, PROMPTS = [True, True, False, True, True], [1, 4, 3, 0, 5], [2, 1, 3, 4, 2]
SCORES = doubles([0.5, -1.0, 2.0, 3.0, 0.25])


def hand_made_values(rollout: ppo.Rollout, seed: int = 1) -> torch.Tensor:
    value_A = torch.randn(len(rollout.input_ids_A), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return value_A * (rollout.old_logprobs_A != 0)


def aims(rollout: ppo.Rollout, values_A: torch.Tensor, scores=SCORES, beta: float = 0.0, **flags):
    return ppo.targets(rollout, scores, values_A, beta, ppo.Args(**flags))


def test_score_on_the_last_token():
    """T25. Without a discount every token of a completion that nobody had expected anything of returns its score; with
    a discount of everything, which leaves what a token itself was paid, only the last one does."""
    rollout = hand_made(TRAINED, COMPLETIONS, PROMPTS)
    nothing_A = torch.zeros_like(rollout.old_logprobs_A)
    target, _ = aims(rollout, nothing_A, gamma=1.0, lam=1.0, whiten_advantages=False)
    for own, length, score in zip(completion_parts(rollout, target.returns_A), COMPLETIONS, SCORES.tolist()):
        assert own == [score] * length
    target, _ = aims(rollout, nothing_A, gamma=0.0, whiten_advantages=False)
    for own, length, score in zip(completion_parts(rollout, target.returns_A), COMPLETIONS, SCORES.tolist()):
        assert own == [0.0] * (length - 1) + [score] * (length > 0)


def test_what_a_score_on_the_next_slot_would_do():
    """T25, as in TRL before #5338: the score one slot behind, where the critic has an opinion V_p as well, is credited
    gamma lam less: the last token gets gamma V_p - V + gamma lam (R - V_p) and not R - V."""
    gamma, lam, R, (v_0, v_1, v_p) = 0.9, 0.8, 2.0, (0.3, -0.4, 0.7)
    right = ppo.gae(doubles([[0, R]]), doubles([[v_0, v_1]]), gamma, lam)[0]
    wrong = ppo.gae(doubles([[0, 0, R]]), doubles([[v_0, v_1, v_p]]), gamma, lam)[0]
    close(right[1], R - v_1)
    close(wrong[1], gamma * v_p - v_1 + gamma * lam * (R - v_p))
    close(wrong[0] - right[0], gamma * lam * (wrong[1] - right[1]))
    zeros = torch.zeros(1, 3, dtype=torch.float64)
    without_a_critic = ppo.gae(doubles([[0, 0, R]]), zeros, gamma, lam)[0, :2]
    close(without_a_critic, gamma * lam * ppo.gae(doubles([[0, R]]), zeros[:, :2], gamma, lam)[0])


FLAGS = {
    "plain": {}, "loss": dict(kl_in="loss"), "k3": dict(kl_estimator="k3"), "white": dict(whiten_rewards=True),
    "two lambdas": dict(lam=0.9, lam_value=1.0, gamma=0.98), "raw": dict(whiten_advantages=False),
}  # fmt: skip


def slow_white(lists: list[list[float]], trained: list[bool], shift_mean: bool) -> list[list[float]]:
    known = [value for own, bit in zip(lists, trained) for value in own if bit]
    mean = sum(known) / len(known)
    std = math.sqrt(sum((value - mean) ** 2 for value in known) / len(known) + 1e-8)
    kept = 0.0 if shift_mean else mean
    return [[(v - mean) / std + kept if bit else 0.0 for v in own] for own, bit in zip(lists, trained)]


def slow_targets(old, reference, values, scores, trained, beta: float, args) -> tuple[list, list]:
    """Advantages and returns of each completion by the formulas at the top of ppo.py, on lists of floats."""
    kl = {"k1": lambda d: d, "k2": lambda d: d * d / 2}
    kl = kl.get(args.kl_estimator, lambda d: math.exp(-d) - 1 + d)
    beta = beta if args.kl_in == "reward" else 0.0
    rewards = [[-beta * kl(a - b) for a, b in zip(*own)] for own in zip(old, reference)]
    for own, score in zip(rewards, scores):
        if own:
            own[-1] += score
    if args.whiten_rewards:
        rewards = slow_white(rewards, trained, shift_mean=False)
    lam_value = args.lam if args.lam_value is None else args.lam_value
    advantages = [slow_gae(r, v, args.gamma, args.lam) for r, v in zip(rewards, values)]
    returns = [
        [a + b for a, b in zip(slow_gae(r, v, args.gamma, lam_value), v)] for r, v in zip(rewards, values)
    ]
    return slow_white(advantages, trained, True) if args.whiten_advantages else advantages, returns


@pytest.mark.parametrize("name", FLAGS)
def test_hand_made_completions(name):
    """One of a single token, one cut off, one masked, one that is not there; and without these two nothing changes for
    the others."""
    rollout, args = hand_made(TRAINED, COMPLETIONS, PROMPTS), ppo.Args(**FLAGS[name])
    values_A = hand_made_values(rollout)
    target, metrics = ppo.targets(rollout, SCORES, values_A, 0.3, args)
    lists = [completion_parts(rollout, x) for x in (rollout.old_logprobs_A, rollout.reference_logprobs_A, values_A)]
    expected, returns = slow_targets(*lists, SCORES.tolist(), TRAINED, 0.3, args)
    for known, *pairs in zip(
        TRAINED, completion_parts(rollout, target.advantages_A), expected,
        completion_parts(rollout, target.returns_A), returns,
    ):
        if known:
            for actual, wanted in (pairs[:2], pairs[2:]):
                assert actual == pytest.approx(wanted, rel=1e-9, abs=1e-9)
    assert all(math.isfinite(value) for value in metrics.values())

    kept = [0, 1, 4]
    keep = lambda value_A: torch.cat([rollout.split(value_A)[row] for row in kept])
    smaller = ppo.Rollout(
        keep(rollout.input_ids_A), keep(rollout.loss_mask_A), rollout.lengths_B[kept], rollout.prompt_lengths_B[kept],
        rollout.rewards_BF[kept], old_logprobs_A=keep(rollout.old_logprobs_A),
        reference_logprobs_A=keep(rollout.reference_logprobs_A),
    )
    again, _ = ppo.targets(smaller, SCORES[kept], keep(values_A), 0.3, args)
    for ours, theirs in ((target.advantages_A, again.advantages_A), (target.returns_A, again.returns_A)):
        close(keep(ours), theirs)


def test_a_rollout_in_which_all_is_masked_has_finite_targets():
    rollout = hand_made([False] * 5, COMPLETIONS, PROMPTS)
    target, _ = aims(rollout, hand_made_values(rollout), beta=0.1)
    assert all(value_A.isfinite().all() for value_A in vars(target).values())


def test_returns_of_raw_advantages(run):
    """A whitened advantage has another scale, which a return must not take over."""
    for whiten in (True, False):
        made = run(str(whiten), max_steps=1, whiten_advantages=whiten, cliprange_value=None)
        (target,), mask_A = made.targets, made.rollouts[0].loss_mask_A
        raw = (target.returns_A - target.values_A)[mask_A].double().numpy()
        expected = (raw - raw.mean()) / np.sqrt(raw.var() + 1e-8) if whiten else raw
        close(target.advantages_A[mask_A], expected, 1e-5)
        assert abs(raw.mean()) > 0.01 and abs(raw.std() - 1) > 0.1


def test_two_lambdas():
    """lam_value = 1: the critic learns what came out, whatever it believes; the policy's advantages stay at lam."""
    rollout = hand_made(TRAINED, COMPLETIONS, PROMPTS)
    one, other = hand_made_values(rollout, 1), hand_made_values(rollout, 2)
    flags = dict(lam=0.5, whiten_advantages=False)
    target, _ = aims(rollout, one, lam_value=1.0, **flags)
    for own, length, score in zip(completion_parts(rollout, target.returns_A), COMPLETIONS, SCORES.tolist()):
        assert own == pytest.approx([score] * length)
    close(aims(rollout, other, lam_value=1.0, **flags)[0].returns_A, target.returns_A)
    usual, _ = aims(rollout, one, **flags)
    close(target.advantages_A, usual.advantages_A)
    close(usual.returns_A, usual.advantages_A + one)
    assert (usual.returns_A - target.returns_A).abs().max() > 0.1


# ------------------------------------------------------------------------------------- what main() makes of a rollout


def stock(folder: str, weights: torch.Tensor | None = None):
    """Stock transformers in float64. A sampled padding token is a token: its embedding has a gradient."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    if weights is not None:
        vector_to_parameters(weights, model.parameters())
    model.get_input_embeddings().padding_idx = None
    return model.double()


def stock_critic(folder: str, weights: torch.Tensor | None = None):
    """The same with the scalar head that the folder, or `weights`, has."""
    if weights is None:
        return AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager").double()
    config = AutoConfig.from_pretrained(folder, num_labels=1, attn_implementation="eager")
    critic = AutoModelForSequenceClassification.from_config(config)
    vector_to_parameters(weights, critic.parameters())
    critic.get_input_embeddings().padding_idx = None
    return critic.double()


def logprobs_of(model, ids: torch.Tensor, prompt: int, temperature: float) -> torch.Tensor:
    """Of each token of one completion [T]."""
    logits_TV = model(ids[None].long()).logits[0, prompt - 1 : -1] / temperature
    return logits_TV.log_softmax(-1).gather(1, ids[prompt:, None].long())[:, 0]


def values_of(critic, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """Read before each token of one completion [T]."""
    mean, std = getattr(critic.config, "reward_mean", 0.0), getattr(critic.config, "reward_std", 1.0)
    hidden_TE = critic.model(ids[None].long()).last_hidden_state[0]
    return (critic.score(hidden_TE)[prompt - 1 : -1, 0] - mean) / std


@torch.no_grad()
def of_each(function, model, rollout: ppo.Rollout, *rest) -> list[list[float]]:
    pairs = zip(rollout.split(rollout.input_ids_A), rollout.prompt_lengths_B.tolist())
    return [function(model, ids, prompt, *rest).tolist() for ids, prompt in pairs]


def agree(rollout: ppo.Rollout, value_A: torch.Tensor, expected: list[list[float]], tolerance: float = 1e-5) -> None:
    actual = chain.from_iterable(completion_parts(rollout, value_A))
    close(doubles(list(actual)), list(chain.from_iterable(expected)), tolerance)


@pytest.mark.parametrize("cut", [{}, dict(max_tokens_per_micro_batch=45), dict(share_prompts=False)], ids=str)
def test_values_are_read_before(cut, run, scorer):
    """V_t is the stock model's output at the position before token t, prompts shared or not, also for one that is
    masked; nothing of token t is in it."""
    made = run(value_model=scorer, max_steps=1, max_completion_length=6, mask_truncated_completions=True, **cut)
    (rollout,), (target,) = made.rollouts, made.targets
    agree(rollout, target.values_A, of_each(values_of, stock_critic(scorer), rollout))
    assert 0 < sum(not mask.any() for mask in rollout.split(rollout.loss_mask_A)) < 32

    critic = load_scorer(scorer, torch.float32, CPU)

    def values(ids: list[int]) -> list[float]:
        batch = collate([Example(ids, [False] * 3 + [True] * 4, 0, 3)], [0])
        return ppo.token_values(critic, batch, hidden_states(critic, batch)).tolist()

    before, after = values([1, 7, 3, 8, 9, 5, 2]), values([1, 7, 3, 8, 12, 5, 2])
    assert before[:5] == pytest.approx(after[:5], abs=1e-6) and abs(before[5] - after[5]) > 1e-3


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_of_sampled_tokens(estimator, run):
    """Of the second rollout; at the first the policy is its own reference. A discount of everything leaves the rewards
    of tokens: each pays for its own log-ratio. The metric is the plain sum over a completion, no mean over tokens."""
    made = run(max_steps=5, beta=0.4, kl_estimator=estimator, gamma=0.0, whiten_advantages=False)
    first, last = made.metrics[0], made.metrics[-1]
    assert first["objective/kl"] == first["objective/non_score_reward"] == 0
    rollout, score_B, target = made.rollouts[1], made.scores[1], made.targets[1]
    gaps = completion_parts(rollout, rollout.old_logprobs_A - rollout.reference_logprobs_A)
    of = {"k1": lambda d: d, "k2": lambda d: d * d / 2, "k3": lambda d: math.exp(-d) - 1 + d}[estimator]
    expected = [[-0.4 * of(gap) for gap in own] for own in gaps]
    penalty = sum(map(sum, expected)) / 32
    for own, score in zip(expected, score_B.tolist()):
        own[-1] += score
    agree(rollout, target.returns_A, expected)
    assert last["objective/kl"] == pytest.approx(sum(map(sum, gaps)) / 32, rel=1e-5) and last["objective/kl"] > 0.05
    assert last["objective/non_score_reward"] == pytest.approx(penalty, rel=1e-5)
    assert last["objective/scores"] == pytest.approx(score_B.mean().item(), rel=1e-5)
    assert last["objective/rlhf_reward"] == pytest.approx(score_B.mean().item() + penalty, rel=1e-5)
    surprise = -sum(map(sum, completion_parts(rollout, rollout.old_logprobs_A))) / 32
    assert last["objective/entropy"] == pytest.approx(surprise, rel=1e-5)


@pytest.mark.parametrize("flags", [{}, dict(use_peft=True, learning_rate=0.3), dict(value_model="shared")], ids=str)
def test_the_reference_is_the_policy_at_the_start(flags, run, policy):
    """Under LoRA the model without its adapter: no second copy, and none of what was learnt."""
    made = run(max_steps=5, **flags)
    reference = stock(policy)
    for rollout in made.rollouts:
        agree(rollout, rollout.reference_logprobs_A, of_each(logprobs_of, reference, rollout, 1.0), 2e-5)
    assert made.metrics[0]["objective/kl"] == 0 and made.metrics[-1]["objective/kl"] > 0.001


def test_temperature(run, policy):
    """Of sampler, policy and reference alike; the entropies and the first ratios are those of that distribution too."""
    made = run(max_steps=5, temperature=0.5)
    for step, rollout in zip((made.steps[0], made.steps[4]), made.rollouts):
        now = of_each(logprobs_of, stock(policy, step.weights), rollout, 0.5)
        agree(rollout, rollout.old_logprobs_A, now, 2e-5)
        agree(rollout, rollout.reference_logprobs_A, of_each(logprobs_of, stock(policy), rollout, 0.5), 2e-5)
        assert step.metrics["val/ratio"] == pytest.approx(1, abs=1e-6)
    sampled = made.rollouts[0].sampler_logprobs_A  # of the first rollout, for the gate
    agree(made.rollouts[0], sampled, of_each(logprobs_of, stock(policy), made.rollouts[0], 0.5), 2e-5)


@pytest.mark.parametrize("flags", [{}, dict(value_model="shared"), dict(use_peft=True)], ids=str)
def test_first_ratios(flags, run):
    for k, metrics in enumerate(run(max_steps=5, **flags).metrics):
        new = k % 4 == 0
        assert (metrics["val/ratio"] == pytest.approx(1, abs=1e-6)) == new
        assert (metrics["policy/approxkl_avg"] < 1e-10) == (metrics["val/ratio_var"] < 1e-6) == new
        assert metrics["policy/clipfrac_avg"] == 0 or not new
        assert metrics["val/clipfrac_avg"] == 0 or not new


@pytest.mark.parametrize("mode", ["replace", "subtract", "none"])
@pytest.mark.parametrize("clip", [None, (0.3, 0.6)])
def test_missing_stop(mode, clip, run):
    """T27, in main(): the reward is clipped before, so that a penalty is what it was asked to be."""
    made = run(
        max_steps=1, max_completion_length=6, missing_eos=mode, missing_eos_penalty=0.7, reward_clip_range=clip
    )
    (rollout,), (score_B,) = made.rollouts, made.scores
    low, high = clip or (-math.inf, math.inf)
    expected, stopped = [], 0
    for ids, prompt, (value,) in zip(
        rollout.split(rollout.input_ids_A), rollout.prompt_lengths_B, rollout.rewards_BF.tolist()
    ):
        value, stops = min(max(value, low), high), 2 in ids[prompt:].tolist()
        stopped += stops
        expected.append(value if stops or mode == "none" else -0.7 if mode == "replace" else value - 0.7)
    assert 0 < stopped < 32 and made.metrics[0]["val/num_eos_tokens"] == stopped
    close(score_B, expected, 1e-6)
    assert made.metrics[0]["reward"] == pytest.approx(rollout.rewards_BF.mean().item(), rel=1e-6)  # as it came


def test_a_completion_that_has_no_reward_has_no_loss(run, tmp_path):
    """And no part in any mean: a reward function may decline."""
    (tmp_path / "shy.py").write_text(
        "def shy(completions, **_):\n    return [len(c) / 8 if i % 4 else None for i, c in enumerate(completions)]\n"
    )
    made = run(max_steps=1, reward_funcs=[f"{tmp_path}/shy.py:shy"])
    (rollout,), (target,) = made.rollouts, made.targets
    masks = rollout.split(rollout.loss_mask_A)
    assert [mask.any().item() for mask in masks] == [i % 4 != 0 for i in range(32)]
    assert made.metrics[0]["tokens/trained"] == sum(mask.sum().item() for mask in masks)
    known_A = target.advantages_A[rollout.loss_mask_A].double()
    assert known_A.mean().item() == pytest.approx(0, abs=1e-6) and known_A.std(correction=0).item() == pytest.approx(1)
    assert not target.advantages_A[~rollout.loss_mask_A].any()
    assert made.metrics[0]["val/return_mean"] == pytest.approx(target.returns_A[rollout.loss_mask_A].mean().item())


def another_tokenizer(policy: str, folder: Path, eos: list[int], pad: int) -> str:
    """The policy with these end-of-text tokens in its generation config, and another padding token."""
    shutil.copytree(policy, folder)
    for name, change in (
        ("generation_config.json", dict(eos_token_id=eos, pad_token_id=pad)),
        ("config.json", dict(eos_token_id=eos, pad_token_id=pad)),
    ):
        (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **change}))
    tokenizer = load_tokenizer(policy)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("stops, flags", [({2, 9}, {}), ({2, 9, 12}, dict(stop_strings=["7"])), ({2}, {})], ids=str)
def test_any_stop_token(stops, flags, run, policy, tmp_path):
    """T15: a second EOS of the generation config, or a stop string. T9: that padding is EOS is nobody's concern."""
    eos = sorted(stops - {12})
    for pad in (0, 2):
        source = another_tokenizer(policy, tmp_path / f"policy {pad}", eos, pad)
        made = run(str(pad), max_steps=1, model_name_or_path=source, **flags)
        (rollout,), (score_B,) = made.rollouts, made.scores
        lasts = [ids[-1].item() for ids in rollout.split(rollout.input_ids_A)]
        assert stops <= set(lasts) and not stops.issuperset(lasts)
        value_B = rollout.rewards_BF[:, 0].tolist()
        close(score_B, [value if last in stops else -1.0 for value, last in zip(value_B, lasts)], 1e-6)
        assert made.metrics[0]["val/num_eos_tokens"] == sum(last in stops for last in lasts)
        completions = [ids[n:] for ids, n in zip(rollout.split(rollout.input_ids_A), rollout.prompt_lengths_B)]
        assert made.metrics[0]["tokens/trained"] == sum(map(len, completions))  # the stop token too
        if pad == 0:
            before = made
    assert made.metrics == before.metrics and torch.equal(made.steps[0].gradient, before.steps[0].gradient)
    assert torch.equal(made.steps[0].critic_gradient, before.steps[0].critic_gradient)


def test_adaptive_beta(run):
    """1909.08593, section 2.2."""
    for kl, expected in ((6.0, 1.0), (6.6, 1.004), (12.0, 1.008), (900, 1.008), (5.7, 0.998), (0, 0.992), (-9, 0.992)):
        assert ppo.adapted_beta(0.15, kl, 6.0, 400, 10_000) == pytest.approx(0.15 * expected)
    made = run(max_steps=9, beta=0.4, kl_target=0.01, kl_horizon=100, gamma=0.0, whiten_advantages=False)
    betas = [made.metrics[k]["objective/beta"] for k in (0, 4, 8)]
    assert betas[0] == 0.4 and all(made.metrics[k]["objective/beta"] == betas[0] for k in (1, 2, 3))
    for k, (now, later) in enumerate(pairwise(betas)):
        error = max(-0.2, min(0.2, made.metrics[4 * k]["objective/kl"] / 0.01 - 1))
        assert later == pytest.approx(now * (1 + error * 32 / 100))
    assert betas[1] < betas[0] and betas[2] > betas[1]
    for beta, rollout, score_B, target in zip(betas, made.rollouts, made.scores, made.targets):  # and that one is used
        expected = completion_parts(rollout, -beta * (rollout.old_logprobs_A - rollout.reference_logprobs_A))
        for own, score in zip(expected, score_B.tolist()):
            own[-1] += score
        agree(rollout, target.returns_A, expected)


# ----------------------------------------------------------------------------------------------- one step, written down


def slow_step(made, k: int, policy: str, value_folder: str) -> tuple[float, float, torch.Tensor, torch.Tensor]:
    """Losses and gradients of the k-th step of a run (from 0), from its weights, its completions and its rewards."""
    args, shared = made.args, made.args.value_model == "shared"
    parts, per_rollout = args.steps_per_generation, args.steps_per_generation * args.num_iterations
    begin = k - k % per_rollout
    rollout, beta = made.rollouts[k // per_rollout], made.metrics[k]["objective/beta"]

    def networks(step):
        actor = stock(policy, step.weights)
        if not shared:
            return actor, stock_critic(value_folder, step.critic_weights)
        critic = stock_critic(policy, torch.zeros(132_480))
        critic.score.weight.data[0] = step.critic_weights.double()
        critic.model = actor.model
        return actor, critic

    actor, critic = networks(made.steps[begin])
    old = of_each(logprobs_of, actor, rollout, args.temperature)
    reference = of_each(logprobs_of, stock(policy), rollout, args.temperature)
    before = of_each(values_of, critic, rollout)
    scores, trained = [], []
    for ids, total in zip(rollout.split(rollout.input_ids_A), rollout.rewards_BF.double().sum(1).tolist()):
        stopped = ids[-1] == 2
        if args.reward_clip_range:
            total = max(args.reward_clip_range[0], min(args.reward_clip_range[1], total))
        if not stopped and args.missing_eos != "none":
            total = (total if args.missing_eos == "subtract" else 0.0) - args.missing_eos_penalty
        scores.append(total)
        trained.append(bool(stopped) or not args.mask_truncated_completions)
    advantages, returns = slow_targets(old, reference, before, scores, trained, beta, args)

    actor, critic = networks(made.steps[k])
    chosen = ppo.minibatch(len(scores), parts, k % per_rollout, (args.seed, begin + 1))
    chosen = [i for i in chosen if trained[i]]
    ids_B, policy_loss, value_loss, tokens = rollout.split(rollout.input_ids_A), 0.0, 0.0, 0
    high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    for i in chosen:
        prompt = rollout.prompt_lengths_B[i].item()
        now_T = logprobs_of(actor, ids_B[i], prompt, args.temperature)
        value_T = values_of(critic, ids_B[i], prompt)
        weights = [1.0] * len(now_T)
        if args.sampler_correction != "auto":
            gaps = [o - s for o, s in zip(old[i], rollout.split(rollout.sampler_logprobs_A)[i][prompt:].tolist())]
            logs = gaps if args.sampler_correction.startswith("token") else [sum(gaps)] * len(gaps)
            weights = [min(math.exp(log), args.sampler_correction_max) for log in logs]
        for t in range(len(now_T)):
            tokens, ratio, a = tokens + 1, (now_T[t] - old[i][t]).exp(), advantages[i][t]
            loss = torch.max(-ratio * a, -ratio.clamp(1 - args.epsilon, 1 + high) * a)
            if args.delta is not None and a < 0:
                loss = loss.clamp(max=-args.delta * a)
            loss = loss * weights[t]
            if args.kl_in == "loss":
                gap = now_T[t] - reference[i][t]
                loss = loss + beta * ratio * (torch.exp(-gap) - 1 + gap)
            policy_loss = policy_loss + loss
            near = before[i][t] + (value_T[t] - before[i][t]).clamp(-args.cliprange_value, args.cliprange_value)
            value_loss += torch.max((value_T[t] - returns[i][t]) ** 2, (near - returns[i][t]) ** 2) / 2
    (policy_loss / tokens + args.vf_coef * value_loss / tokens).backward()
    modules = (actor, critic.score if shared else critic)
    gradients = [torch.cat([p.grad.flatten() for p in module.parameters()]) for module in modules]
    return policy_loss.item() / tokens, value_loss.item() / tokens, *gradients


def another_sampler(rollout) -> None:
    """Sampler log-probs a tenth of a nat from the trainer's."""
    noise_A = 0.1 * torch.randn(len(rollout.loss_mask_A), generator=torch.Generator().manual_seed(0))
    rollout.sampler_logprobs_A += noise_A * (rollout.sampler_logprobs_A != 0)


TRUNCATED = dict(mask_truncated_completions=True, max_completion_length=6)
SLOW = {
    "as it comes": {},
    "a reward model": dict(value_model="SCORER", lam_value=1.0, lam=0.9, gamma=0.98, temperature=0.8),
    "shared": dict(value_model="shared", vf_coef=0.5, reward_clip_range=(0.1, 0.7), missing_eos="subtract"),
    "kl in the loss": dict(kl_in="loss", kl_estimator="k3_corrected", beta=0.4, missing_eos="none"),
    "kl in the loss, adaptive": dict(
        kl_in="loss", kl_estimator="k3_corrected", beta=0.4, kl_target=0.01, kl_horizon=32
    ),
    "whiten_rewards, dual clip": dict(
        whiten_rewards=True, epsilon=0.05, epsilon_high=0.1, delta=1.3, kl_estimator="k2", num_generations=4
    ),
    "masked, corrected": dict(**TRUNCATED, sampler_correction="token_truncate", sampler_correction_max=1.05),
    "sequence correction": dict(sampler_correction="sequence_truncate", sampler_correction_max=1.1),
}


@pytest.mark.parametrize("case", SLOW)
def test_a_step_is_what_the_formulas_say(case, run, policy, scorer):
    """The third step of the second rollout: neither policy nor critic is the one that the rollout was made with, and
    the policy that made it was not the reference."""
    flags = {name: scorer if value == "SCORER" else value for name, value in SLOW[case].items()}
    disturb = another_sampler if "sampler_correction" in flags else None
    made = run(max_steps=7, disturb=disturb, **flags)
    metrics = made.metrics[6]
    policy_loss, value_loss, gradient, critic_gradient = slow_step(made, 6, policy, flags.get("value_model", policy))
    assert metrics["loss/policy_avg"] == pytest.approx(policy_loss, rel=1e-4, abs=1e-6)
    assert metrics["loss/value_avg"] == pytest.approx(value_loss, rel=1e-5)
    assert difference(made.steps[6].gradient, gradient) < 1e-5
    assert difference(made.steps[6].critic_gradient, critic_gradient) < 1e-5
    assert metrics["policy/clipfrac_avg"] > 0.01 and metrics["val/clipfrac_avg"] > 0.01  # the clips were at work


# ------------------------------------------------------------------------------------------------------------- layout

CUTS = {
    "a few sequences a row": dict(max_tokens_per_micro_batch=45),
    "each with its own prompt": dict(max_tokens_per_micro_batch=130, share_prompts=False),
    "one sequence a row, stock attention": dict(max_tokens_per_micro_batch=1, alone=True),
}
CORRECTED = dict(sampler_correction_max=1.05, sampler_correction_min=0.95)
AXES = {
    "as it comes": {},
    "a reward model, two lambdas": dict(
        value_model="SCORER", lam_value=1.0, lam=0.9, temperature=0.8, learning_rate=0.01
    ),
    "shared": dict(value_model="shared"),
    "shared, lora": dict(value_model="shared", use_peft=True, learning_rate=0.3),
    "lora": dict(value_model="SCORER", use_peft=True, learning_rate=0.3),
    "kl in the loss": dict(kl_in="loss", kl_estimator="k3_corrected", beta=0.4),
    "whiten_rewards, groups": dict(whiten_rewards=True, num_generations=4),
    "dual clip, epsilon_high": dict(epsilon=0.05, epsilon_high=0.1, delta=1.3),
    "masked": dict(**TRUNCATED, reward_clip_range=(0.2, 0.7), missing_eos="subtract", cliprange_value=0.05),
    "masked, sequence_truncate": dict(sampler_correction="sequence_truncate", **CORRECTED, **TRUNCATED),
    "sequence_mean_mask": dict(sampler_correction="sequence_mean_mask", missing_eos="none", **CORRECTED),
    "warm-up, gradient_checkpointing": dict(critic_warmup_steps=1, value_model="shared", gradient_checkpointing=True),
}


@pytest.mark.parametrize("axis", AXES)
def test_no_cut_matters(axis, run, scorer):
    """Gradients of both networks and every metric: 16 sequences a step in one row, in a few, in sixteen. Three steps:
    on policy, off policy, and the first of a second rollout, whose policy is not the reference."""
    flags = dict(max_steps=3, num_iterations=1) | AXES[axis]
    flags = {name: scorer if value == "SCORER" else value for name, value in flags.items()}
    disturb = another_sampler if "sampler_correction" in flags else None
    whole = run("whole", disturb, **flags)
    assert all(step.critic_gradient.norm() > 0 for step in whole.steps)
    for name, cut in CUTS.items():
        again = run(name, disturb, **flags | cut)
        for a, b in zip(whole.rollouts, again.rollouts, strict=True):
            assert torch.equal(a.input_ids_A, b.input_ids_A)
        for k, (step, expected) in enumerate(zip(again.steps, whole.steps, strict=True)):
            # Once Adam has divided by |g|, weights differ by 1e-8; where most of a gradient cancels, that comes back.
            limit = 2e-5 if k else 1e-5
            if k >= whole.args.critic_warmup_steps:
                assert difference(step.gradient, expected.gradient) < limit, f"{name}, step {k}"
            assert difference(step.critic_gradient, expected.critic_gradient) < 1e-5, f"{name}, step {k}"
            for key, value in expected.metrics.items():
                assert step.metrics[key] == pytest.approx(value, rel=1e-4, abs=1e-5), f"{key}, {name}, step {k}"
    if "sampler_correction" in flags:
        assert (whole.metrics[0]["sampling/frac_masked"] > 0.05) == axis.endswith("mask")
    if "mask_truncated_completions" in flags:
        assert 0 < sum(not mask.any() for mask in whole.rollouts[0].split(whole.rollouts[0].loss_mask_A)) < 32


# --------------------------------------------------------------------------------------------------------- two networks


def flat(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_where_a_critic_starts(run, policy, scorer):
    """A reward model: its weights, and values in the units of its scores. A language model: its body, and no opinion,
    so that the first returns are discounted sums of rewards."""
    made = run("reward", value_model=scorer, max_steps=1)
    assert torch.equal(made.steps[0].critic_weights, flat(stock_critic(scorer)).float())
    config = AutoConfig.from_pretrained(scorer)
    assert config.reward_mean != 0 and config.reward_std != 1
    agree(made.rollouts[0], made.targets[0].values_A, of_each(values_of, stock_critic(scorer), made.rollouts[0]))

    for value_model in ("policy", "shared", policy):
        made = run(Path(value_model).name, value_model=value_model, max_steps=1, lam=0.9, gamma=0.8)
        (rollout,), (target,) = made.rollouts, made.targets
        assert not target.values_A.any() and made.metrics[0]["val/explained_variance"] == pytest.approx(0, abs=1e-6)
        head = made.steps[0].critic_weights[-64:]
        assert not head.any() and made.steps[0].critic_gradient[-64:].norm() > 0
        body = flat(AutoModelForCausalLM.from_pretrained(policy).model)
        assert torch.equal(made.steps[0].critic_weights[:-64], body[:0] if value_model == "shared" else body)
        lengths = [len(own) for own in completion_parts(rollout, target.returns_A)]
        scores = made.scores[0].tolist()
        agree(rollout, target.returns_A, [[0.72 ** (n - 1 - t) * s for t in range(n)] for n, s in zip(lengths, scores)])


def test_behind_the_last_token_a_reward_model_says_its_own_score(scorer):
    """The value before a token that would follow is what --reward_funcs with the same folder gives."""
    rows, tokenizer = toy_rows("train", 5), load_tokenizer(scorer)
    critic = load_scorer(scorer, torch.float32, CPU)
    scores = load_reward(scorer).function([r["prompt"] for r in rows], [r["completion"] for r in rows])
    for row, score in zip(rows, scores):
        prompt = encode_prompt(row["prompt"], tokenizer)
        reply = encode_completion(row["prompt"], row["completion"], tokenizer)
        ids = prompt + reply + [7]
        batch = collate([Example(ids, [i >= len(prompt) for i in range(len(ids))], 0, len(prompt))], [0])
        value_N = ppo.token_values(critic, batch, hidden_states(critic, batch))
        assert value_N[-1].item() == pytest.approx(score, abs=1e-5) and not value_N[: len(prompt)].any()


SAVED = {
    "policy": {}, "reward model": dict(value_model="SCORER"), "shared": dict(value_model="shared"),
    "lora": dict(use_peft=True), "lora, reward model": dict(use_peft=True, value_model="SCORER"),
    "lora, shared": dict(use_peft=True, value_model="shared"),
}


@pytest.mark.parametrize("case", SAVED)
def test_the_critic_is_a_stock_folder(case, policy, scorer, toy_file, tmp_path, monkeypatch):
    """critic/ gives transformers, and --value_model, the values that the trained critic had; LoRA merged."""
    examples = [
        Example(ids, [i >= 4 for i in range(len(ids))], 0, 4)
        for ids in ([1, 9, 8, 3, 8, 9, 2], [1, 9, 8, 3, 5], [1, 7, 6, 3, 6, 7, 5, 2, 2])
    ]
    said = []

    def values(critic) -> torch.Tensor:
        batch = collate(examples, [0, 1, 2], layout="shared")
        return ppo.token_values(critic, batch, hidden_states(critic, batch)).detach()

    def save(critic, *rest, real=ppo.save_critic):
        said.append(values(critic))
        real(critic, *rest)

    monkeypatch.setattr(ppo, "save_critic", save)
    flags = {name: scorer if value == "SCORER" else value for name, value in SAVED[case].items()}
    ppo.main(ppo.Args(
        output_dir=str(tmp_path / "run"), model_name_or_path=policy, dataset_name=toy_file, max_steps=4,
        generation_batch_size=32, max_completion_length=8, learning_rate=1e-2, log_completions_steps=0, warmup_steps=0,
        **flags,
    ))  # fmt: skip
    folder = str(tmp_path / "run" / "critic")
    (said,), fresh = said, load_scorer(flags.get("value_model", policy).replace("shared", policy), torch.float32, CPU)
    assert (said - values(fresh)).abs().max() > 0.01 and said.std() > 0.01  # it learnt something
    torch.testing.assert_close(values(load_scorer(folder, torch.float32, CPU, zero_head=True)), said, rtol=0, atol=1e-5)
    critic, report = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()) and critic.config.num_labels == 1
    batch, critic = collate(examples, [0, 1, 2], layout="shared"), critic.double()
    expected = [values_of(critic, torch.tensor(example.input_ids), 4) for example in examples]
    close(said[batch.loss_mask_N], torch.cat(expected).detach(), 1e-5)
    assert load_tokenizer(folder).get_vocab() == load_tokenizer(policy).get_vocab()
    if "value_model" in flags and flags["value_model"] == scorer:
        config = AutoConfig.from_pretrained(scorer)
        assert (critic.config.reward_mean, critic.config.reward_std) == (config.reward_mean, config.reward_std)


@pytest.mark.parametrize("flags", [{}, dict(value_model="shared"), dict(use_peft=True)], ids=str)
def test_critic_warm_up(flags, run, policy):
    """Not one bit of the policy moves, nor of the body under a shared critic; it then starts with a whole schedule of
    its own. Ratios are 1 as long as it waits."""
    made = run(max_steps=8, critic_warmup_steps=5, lr_scheduler_type="linear", **flags)
    whole = run("without", max_steps=8, lr_scheduler_type="linear", **flags)
    steps = made.steps
    for step in steps[:5]:
        assert step.weights is None and step.metrics["grad_norm"] == 0
        assert step.metrics["val/ratio"] == pytest.approx(1, abs=1e-6) and step.metrics["val/ratio_var"] < 1e-6
    assert torch.equal(steps[5].weights, whole.steps[0].weights) and (steps[6].weights != steps[5].weights).any()
    for before, after in pairwise(steps):
        assert not torch.equal(before.critic_weights, after.critic_weights)
    if not flags:  # what it learns meanwhile does not depend on the policy's losses
        assert torch.equal(steps[3].critic_weights, whole.steps[3].critic_weights)
        assert torch.equal(steps[5].weights, flat(AutoModelForCausalLM.from_pretrained(policy)))
    rates = [step.metrics["learning_rate"] for step in steps[5:]]
    assert rates == pytest.approx([0.02, 0.02 * 2 / 3, 0.02 / 3])
    assert [m["critic_learning_rate"] for m in made.metrics] == pytest.approx([0.03 * (8 - k) / 8 for k in range(8)])


def test_clipped_alone(run):
    """A bound between the two norms: one gradient is scaled down to it and the other left as it is."""
    free = run("free", max_steps=1).steps[0]
    norms = [free.metrics[name] for name in ("critic_grad_norm", "grad_norm")]
    assert norms == pytest.approx([free.critic_gradient.norm().item(), free.gradient.norm().item()], rel=1e-5)
    bound = math.sqrt(norms[0] * norms[1])
    assert 0 < 1.1 * norms[0] < bound
    step = run("bound", max_steps=1, max_grad_norm=bound).steps[0]
    assert [step.metrics[name] for name in ("critic_grad_norm", "grad_norm")] == norms
    assert torch.equal(step.critic_gradient, free.critic_gradient)
    close(step.gradient, free.gradient.double() * bound / norms[1], 1e-5)


# ---------------------------------------------------------------------------------------------------------------- steps


@pytest.fixture
def optimizers(monkeypatch) -> list:
    """The optimisers of a run; `.calls` counts the steps of each."""
    made = []

    def make(*args, real=ppo.make_optimizer):
        optimizer = real(*args)
        optimizer.calls = 0
        optimizer.register_step_post_hook(lambda *_: setattr(optimizer, "calls", optimizer.calls + 1))
        made.append(optimizer)
        return optimizer

    monkeypatch.setattr(ppo, "make_optimizer", make)
    return made


def test_number_of_steps(run, optimizers, monkeypatch):
    """Each pass takes every completion once, in an order of its own; the last rollout may be left unfinished."""
    taken = []

    def minibatch(*args, real=ppo.minibatch):
        taken.append(real(*args).tolist())
        return real(*args)

    monkeypatch.setattr(ppo, "minibatch", minibatch)
    made = run(max_steps=14, steps_per_generation=4, num_iterations=3, learning_rate=1e-4)
    assert [optimizer.calls for optimizer in optimizers] == [14, 14] and len(made.rollouts) == 2
    assert len(taken) == len(made.steps) == 14 and {len(part) for part in taken} == {8}
    passes = [list(chain(*taken[begin : begin + 4])) for begin in (0, 4, 8)]
    assert all(sorted(order) == list(range(32)) for order in passes)
    assert len({tuple(order) for order in [*passes, list(range(32))]}) == 4
    assert taken[12:] != taken[:2]
    rollout = made.rollouts[0]
    counts = [mask.sum().item() for mask in rollout.split(rollout.loss_mask_A)]
    assert sum(counts) == made.metrics[0]["tokens/trained"]


def test_optimiser_settings(run, optimizers):
    made = run(
        max_steps=8, critic_warmup_steps=2, lr_scheduler_type="linear", warmup_steps=2,
        adam_epsilon=ppo.Args.adam_epsilon, learning_rate=1e-3, critic_learning_rate=1e-2,
    )
    for optimizer, peak in zip(optimizers, (1e-3, 1e-2), strict=True):
        (group,) = optimizer.param_groups
        assert group["eps"] == 1e-5 and group["lr"] == 0 and group["initial_lr"] == peak
    assert [optimizer.calls for optimizer in optimizers] == [6, 8]
    rates = [m["critic_learning_rate"] for m in made.metrics]
    assert rates == pytest.approx([1e-2 * share for share in (0, 1 / 2, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6)])
    rates = [m["learning_rate"] for m in made.metrics[2:]]
    assert rates == pytest.approx([1e-3 * share for share in (0, 1 / 2, 1, 3 / 4, 2 / 4, 1 / 4)])
    assert run("default", max_steps=1, critic_learning_rate=None).metrics[0]["critic_learning_rate"] == 0.02


# ------------------------------------------------------------------------------------------------------------- mistakes


@pytest.fixture
def stranger(policy, tmp_path) -> str:
    """A model of which two tokens have changed places."""
    folder = Path(shutil.copytree(policy, tmp_path / "stranger"))
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace('"8": 13', '"8": 99').replace('"9": 14', '"9": 13'))
    return str(folder)


@pytest.mark.parametrize("flags, parts", [
    ("--kl_target 6 --beta 0", ["--kl_target", "--beta above 0"]),
    ("--kl_target 0", ["--kl_target is a KL above 0"]),
    ("--kl_horizon 0 --kl_target 1", ["--kl_horizon", "at least 1"]),
    ("--critic_warmup_steps 400", ["--critic_warmup_steps", "--max_steps"]),
    ("--critic_warmup_steps -1", ["--critic_warmup_steps", "at least 0"]),
    ("--value_model nowhere/critic/final", ["nowhere/critic/final", "no such folder"]),
    ("--value_model STRANGER", ["--value_model", "another vocabulary"]),
    ("--beta -0.1", ["--beta must be at least 0"]),
    ("--vf_coef -1", ["--vf_coef must be at least 0"]),
    ("--gamma -1", ["--gamma must be at least 0"]),
    ("--lam -1", ["--lam must be at least 0"]),
    ("--num_generations 3", ["--num_generations 3", "--generation_batch_size 256"]),
    ("--steps_per_generation 3", ["--steps_per_generation 3", "--generation_batch_size 256"]),
])  # fmt: skip
def test_one_clear_sentence(flags, parts, policy, stranger, toy_file, tmp_path, capsys):
    flags = [*flags.replace("STRANGER", stranger).split(), "--model_name_or_path", policy, "--dataset_name", toy_file]
    with pytest.raises(SystemExit) as stop:
        launch(ppo.main, ppo.Args, ["--output_dir", str(tmp_path / "run"), *flags])
    said = capsys.readouterr().err
    assert stop.value.code == 1 and said.startswith("error: ") and said.count("\n") == 1
    for part in parts:
        assert part in said, said
    log = tmp_path / "run" / "metrics.jsonl"
    assert not log.exists() or not log.read_text()
