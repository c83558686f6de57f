"""The losses of dpo.py, kto.py and orpo.py: held to TRL 1.16, to float64 loops, and to closed forms at known ratios.

Where main() runs, what is compared is its own loss and gradient on one step of 32 pairs or 64 replies, cut into
micro-batches, against a reference that is not the policy. TRL's own code runs on the same replies in one padded batch
with stock attention: DPOTrainer._compute_loss, KTOTrainer._compute_loss, get_batch_loss_metrics of CPO and ORPO.

Where the two differ on purpose, a float64 loop over single sequences takes TRL's place:
  - bco_pair: TRL's loss type leaves out the threshold delta of 2404.04656, the running mean of the rewards, around
    which the two classifications are. Ours has it, over all steps so far; without it they agree.
  - sigmoid with label_smoothing: TRL ignores the flag there and is plain DPO, not cDPO (Eq. 3 of Mitchell's note).
  - WPO beside `sft`: 2406.11827 weighs preferences, and the likelihood is none. TRL means to weigh it too, and fails.
  - ORPO's likelihood is that of the reply (2403.07691 Eqs. 1, 6); TRL's, prompt included, comes with a flag.
  - KTO's mismatched replies: TRL rotates a batch by one, we draw afresh. Here ours are rotated as well.
"""

import copy
import math
from collections import Counter, defaultdict
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from recording import SMOOTH, difference, record
from test_preference_layout import blurred, labelled, uneven_pairs, watch_copies, write
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from transformers import AutoModelForCausalLM

import dpo
import kto
import orpo
from common.data import Example, draw
from common.models import load_tokenizer
from common.run import UserError
from dpo import Pairs, pair_loss, sorted_peers
from kto import draw_mismatched, kto_loss, labels_of, transplant, weight_advice
from orpo import log1mexp, odds_margin

pytest_plugins = ["recording"]

KINDS = [
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sigmoid_norm",
]  # TRL's fifteen but `sft`, which is a mean over tokens and no loss of a pair


def doubles(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------ closed forms


def s(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def smooth(x: float, e: float) -> float:
    return (1 - e) * math.log1p(math.exp(-x)) + e * math.log1p(math.exp(x))


def golden(kind, h_w, h_l, S_w=0.0, S_l=0.0, n_w=1, n_l=1, b=0.1, e=0.0, gamma=0.0, tau=0.05, delta=0.0) -> float:
    """T44: the loss of one pair in Python floats. Log-ratios h, log-probs S, lengths n, beta b, smoothing e."""
    d, mean_d = h_w - h_l, h_w / n_w - h_l / n_l
    q_w = math.exp(b * h_w) / (math.exp(b * h_w) + math.exp(b * h_l))
    blend = s(b * d / tau)
    return {
        "sigmoid": lambda: smooth(b * d, e),
        "hinge": lambda: max(0.0, 1 - b * d),
        "ipo": lambda: (mean_d - 1 / (2 * b)) ** 2,
        "exo_pair": lambda: q_w * math.log(q_w / (1 - e)) + (1 - q_w) * math.log((1 - q_w) / e),
        "nca_pair": lambda: -math.log(s(b * h_w)) - (math.log(s(-b * h_w)) + math.log(s(-b * h_l))) / 2,
        "robust": lambda: (e * math.log(s(-b * d)) - (1 - e) * math.log(s(b * d))) / (1 - 2 * e),
        "bco_pair": lambda: -math.log(s(b * h_w - delta)) - math.log(1 - s(b * h_l - delta)),
        "sppo_hard": lambda: (h_w - 1 / (2 * b)) ** 2 + (h_l + 1 / (2 * b)) ** 2,
        "aot": lambda: smooth(b * d, e),  # a pair by itself is its own peer
        "aot_unpaired": lambda: smooth(b * d, e),
        "apo_zero": lambda: s(-b * h_w) + s(b * h_l),
        "apo_down": lambda: s(b * h_w) + s(-b * d),
        "discopop": lambda: (1 - blend) * -math.log(s(b * d)) + blend * math.exp(-b * d),
        "sigmoid_norm": lambda: -math.log(s(b * mean_d)),
        "simpo": lambda: smooth(b * (S_w / n_w - S_l / n_l) - gamma, e),
        "cpo": lambda: smooth(b * (S_w - S_l), e),
    }[kind]()


def of_one_pair(kind, h_w, h_l, S_w, S_l, n_w, n_l, b, e, gamma=0.0, tau=0.05, delta=0.0, **more):
    """The same by dpo.py, and its slopes in both log-probs of the policy."""
    policy_P2 = doubles([[S_w, S_l]]).requires_grad_()
    pairs = Pairs(policy_P2, doubles([[S_w - h_w, S_l - h_l]]), torch.tensor([[n_w, n_l]]), shift=delta)
    if kind.startswith("aot"):
        pairs.peers_P2 = sorted_peers(kind, pairs.policy_P2.detach(), pairs.reference_P2)
    loss_P = pair_loss(kind, pairs, b, e, gamma, tau, **more)
    assert loss_P.shape == (1,)
    loss_P.sum().backward()
    return loss_P.item(), policy_P2.grad[0].tolist()


@pytest.mark.parametrize("kind", [*KINDS, "simpo", "cpo"])
def test_known_losses_and_their_slopes(kind):
    for h_w, h_l, n_w, n_l, b, e in [
        (0.3, -0.2, 1, 1, 0.1, 0.1), (0.3, -0.2, 4, 7, 0.1, 0.25), (-1.5, 2.0, 9, 2, 0.5, 0.01),
        (-0.7, -0.6, 3, 3, 2.0, 0.3), (12.0, 4.0, 5, 6, 0.05, 0.45),
    ]:  # fmt: skip
        S_w, S_l, known = -3.1, -4.7, dict(n_w=n_w, n_l=n_l, b=b, e=e, gamma=0.4, tau=0.2, delta=0.15)
        loss, slopes = of_one_pair(kind, h_w, h_l, S_w, S_l, **known)
        assert loss == pytest.approx(golden(kind, h_w, h_l, S_w, S_l, **known), rel=1e-10)
        tick = 1e-6
        expected = [
            (golden(kind, h_w + i, h_l + j, S_w + i, S_l + j, **known)
             - golden(kind, h_w - i, h_l - j, S_w - i, S_l - j, **known)) / (2 * tick)
            for i, j in ((tick, 0), (0, tick))
        ]  # fmt: skip
        assert slopes == pytest.approx(expected, rel=1e-6, abs=1e-8)


def test_known_losses_as_numbers():
    """h_w = 0.3, h_l = -0.2, beta = 0.1; smoothing 0.1 where it is usual; worked out apart from this code."""
    known = {
        "sigmoid": 0.6684596, "cdpo": 0.6734596, "hinge": 0.95, "ipo": 20.25, "exo_pair": 0.4836784,
        "nca_pair": 1.3739881, "robust": 0.6622096, "bco_pair": 1.3614569, "sppo_hard": 45.13, "apo_zero": 0.9875007,
        "apo_down": 0.9950020, "discopop": 0.8751809, "sigmoid_norm": 0.6684596,
    }
    for kind, value in known.items():
        e = 0.1 if kind in ("cdpo", "exo_pair", "robust") else 0.0
        loss, _ = of_one_pair("sigmoid" if kind == "cdpo" else kind, 0.3, -0.2, -3.0, -4.0, 1, 1, 0.1, e)
        assert loss == pytest.approx(value, abs=1e-7), kind


def test_which_way_every_loss_pushes():
    """Down the slope the chosen reply rises and the rejected one falls. But apo_down, by its name, lets both fall, and
    discopop's curve has a hump between its logistic and its exponential half, with beta d = 0 on the wrong side."""
    for kind in [*KINDS, "simpo", "cpo"]:
        h_w, h_l = (3.0, -3.0) if kind == "discopop" else (0.3, -0.2)
        _, (chosen, rejected) = of_one_pair(kind, h_w, h_l, -3.0, -4.0, 5, 5, 0.1, 0.1)
        assert chosen < 0 < rejected or (kind == "apo_down" and 0 < chosen < rejected), kind
    assert of_one_pair("discopop", 0.0, 0.0, -3.0, -4.0, 5, 5, 0.1, 0.0)[1][0] > 0


def test_ipo_is_over_means_and_sppo_over_sums():
    """T45: doubling length and log-ratio leaves ipo as it is (TRL #1265); SPPO asks for 1/(2 beta) of sums (#1615)."""
    ipo = [of_one_pair("ipo", 0.3 * k, -0.2 * k, -3.0, -4.0, 4 * k, 5 * k, 0.1, 0.0)[0] for k in (1, 2)]
    assert ipo[0] == pytest.approx(ipo[1]) and ipo[0] != pytest.approx((0.5 - 5) ** 2)
    assert of_one_pair("sppo_hard", 5.0, -5.0, -3.0, -4.0, 8, 2, 0.1, 0.0) == (0.0, [0.0, 0.0])


@pytest.mark.parametrize(
    "divergence, alpha, score",
    [
        ("reverse_kl", 0.5, lambda u: math.log(u)),
        ("forward_kl", 0.5, lambda u: -1 / u),
        ("js_divergence", 0.5, lambda u: math.log(2 * u / (1 + u))),
        ("alpha_divergence", 0.5, lambda u: (u**-0.5 - 1) / -0.5),
        ("alpha_divergence", 1.0, lambda u: math.log(u)),
        ("alpha_divergence", 1 + 1e-9, lambda u: math.log(u)),
        ("alpha_divergence", 2.0, lambda u: u - 1),
    ],
)
def test_divergences(divergence, alpha, score):
    """T45: f'(u) as 2309.16240 has it, u the ratio, up to a constant that a margin does not see (TRL #4171)."""
    for kind in dpo.TAKE_DIVERGENCE:
        if kind == "sft":
            continue
        for h_w, h_l in ((0.3, -0.2), (-1.5, 0.7)):
            score_w, score_l = score(math.exp(h_w)), score(math.exp(h_l))
            if kind in ("ipo", "sigmoid_norm"):  # of means: a constant would show, and TRL's forward KL has one
                score_w, score_l = (x + (divergence == "forward_kl") for x in (score_w, score_l))
            known = dict(n_w=4, n_l=7, b=0.3, e=0.1)
            loss, _ = of_one_pair(kind, h_w, h_l, -3.0, -4.0, **known, divergence=divergence, alpha=alpha)
            assert loss == pytest.approx(golden(kind, score_w, score_l, **known), rel=1e-6), kind


@pytest.mark.parametrize("divergence", ["reverse_kl", "js_divergence", "alpha_divergence"])
@pytest.mark.parametrize("kind", KINDS)
def test_far_from_the_reference_losses_and_slopes_are_finite(kind, divergence):
    if divergence == "alpha_divergence" and kind == "ipo":
        return  # the square of what is exponential
    for h_w, h_l in ((3000.0, -3000.0), (-3000.0, 3000.0), (-3000.0, -3000.0)):
        pairs = Pairs(torch.tensor([[h_w, h_l]]).requires_grad_(), torch.zeros(1, 2), torch.tensor([[5, 9]]))
        pairs.peers_P2 = torch.zeros(1, 2)
        loss_P = pair_loss(kind, pairs, 0.1, 0.1, divergence=divergence)
        (slope,) = torch.autograd.grad(loss_P.sum(), pairs.policy_P2)
        assert loss_P.isfinite().all() and slope.isfinite().all()


def test_exo_asks_for_smoothing():
    with pytest.raises(UserError, match="above 0"):
        dpo.check_losses(dpo.Args(loss_type=["exo_pair"]))
    dpo.check_losses(dpo.Args(loss_type=["exo_pair"], label_smoothing=1e-3))


# ------------------------------------------------------------------------------------------- TRL, on given log-probs


def dpo_trainer(model, reference, **options):
    """TRL's, without __init__: no data, no optimiser. `loss_type` and the rest are named as in dpo.py."""
    pytest.importorskip("trl")
    from accelerate import Accelerator
    from trl import DPOTrainer

    defaults = dict(
        beta=0.1, label_smoothing=0.0, loss_type=["sigmoid"], ld_alpha=None, use_weighting=False,
        f_divergence_type="reverse_kl", f_alpha_divergence_coef=0.5, discopop_tau=0.05, precompute_ref_logps=False,
    )
    settings = {**defaults, **options}
    kinds = settings.pop("loss_type")
    trainer = DPOTrainer.__new__(DPOTrainer)
    trainer.__dict__.update(
        settings, model=model, ref_model=reference, accelerator=Accelerator(cpu=True), aux_loss_enabled=False,
        loss_types=kinds, loss_weights=settings.pop("loss_weights", [1.0] * len(kinds)), _total_train_tokens=0,
        _tp_size=1, _metrics=defaultdict(lambda: defaultdict(list)),
        args=SimpleNamespace(discopop_tau=settings["discopop_tau"], gradient_checkpointing_kwargs=None),
    )
    return trainer


def trl_on_numbers(policy_P2, reference_P2, length_P2, **options) -> torch.Tensor:
    """Its loss for log-probs that no model gave: each is spread evenly over the tokens of its reply."""
    column = length_P2.T.flatten()  # all chosen, then all rejected
    completion_mask = torch.arange(1 + int(column.max())) <= column[:, None]
    completion_mask[:, 0] = False

    def outputs_of(values_P2):
        per_token = (values_P2.T.flatten() / column)[:, None] * completion_mask[:, 1:]
        rest = torch.zeros_like(per_token)
        return lambda **_: SimpleNamespace(
            log_probs=per_token, entropy=rest, mean_logits=rest, is_top1=rest.bool(), log_sum_sq_probs=rest
        )

    ids = torch.zeros(completion_mask.shape, dtype=torch.long)
    idle = SimpleNamespace(training=True, is_gradient_checkpointing=False)
    trainer = dpo_trainer(idle, None, **options, precompute_ref_logps=True)
    inputs = {"input_ids": ids, "attention_mask": ids + 1, "completion_mask": completion_mask.long()}
    inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = reference_P2.unbind(1)
    return trainer._compute_loss(outputs_of(policy_P2), inputs, False)


def some_pairs(count: int, seed: int, ties: bool = False):
    """Log-probs of policy and reference [P, 2] and lengths; with `ties` in few values, so that many are equal."""
    generator = torch.Generator().manual_seed(seed)
    policy_P2, reference_P2 = -8 - 4 * torch.randn(2, count, 2, generator=generator, dtype=torch.float64)
    if ties:
        policy_P2, reference_P2 = (policy_P2 / 6).round(), (reference_P2 / 6).round()
    return policy_P2.requires_grad_(), reference_P2, torch.randint(1, 12, (count, 2), generator=generator)


def ours_on_numbers(kind, policy_P2, reference_P2, length_P2, cut: int = 5, **options) -> torch.Tensor:
    """Mean loss by dpo.py, a few pairs at a time."""
    pairs = Pairs(policy_P2, reference_P2, length_P2)
    peers = sorted_peers(kind, policy_P2.detach(), reference_P2) if kind.startswith("aot") else None
    total = 0.0
    for part in torch.arange(len(policy_P2)).split(cut):
        pairs = Pairs(policy_P2[part], reference_P2[part], length_P2[part], None if peers is None else peers[part])
        total = total + pair_loss(kind, pairs, **options).sum()
    return total / len(policy_P2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_numbers_has_the_loss_of_trl(kind):
    for seed, (count, beta) in enumerate([(1, 0.1), (13, 0.1), (16, 1.5)]):
        policy_P2, *rest = some_pairs(count, seed)
        smoothing = dict(label_smoothing=0.15) if kind in ("exo_pair", "robust", "aot", "aot_unpaired") else {}
        ours = ours_on_numbers(kind, policy_P2, *rest, beta=beta, **smoothing)
        theirs = trl_on_numbers(policy_P2, *rest, loss_type=[kind], beta=beta, **smoothing)
        slopes = [torch.autograd.grad(loss, policy_P2)[0] for loss in (ours, theirs)]
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)  # TRL keeps some constants in fp32
        torch.testing.assert_close(*slopes, rtol=1e-6, atol=1e-9)


# --------------------------------------------------------------------------------------------------------------- AOT


@pytest.mark.parametrize("kind", ["aot", "aot_unpaired"])
@pytest.mark.parametrize("ties", [False, True])
def test_peers_make_the_sorted_loss(kind, ties):
    """Values and gradients of a sort over the batch (2406.05882), in any order and however it is cut."""
    for seed in range(6):
        policy_P2, reference_P2, length_P2 = some_pairs(24, seed, ties)
        options = dict(beta=0.3, label_smoothing=0.2 * (seed % 2))
        theirs = trl_on_numbers(policy_P2, reference_P2, length_P2, loss_type=[kind], **options)
        (slope,) = torch.autograd.grad(theirs, policy_P2)
        order = torch.randperm(24, generator=torch.Generator().manual_seed(seed))
        shuffled = policy_P2.detach()[order].requires_grad_()
        ours = ours_on_numbers(kind, shuffled, reference_P2[order], length_P2[order], 1 + seed, **options)
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-9)
        (own_slope,) = torch.autograd.grad(ours, shuffled)

        # Which of two equals meets which peer is anybody's choice: of a tie the sum is compared
        policy_P2 = policy_P2.detach()
        margins, ratios = policy_P2[:, 0] - policy_P2[:, 1], policy_P2 - reference_P2
        for side in (0, 1):
            key_P = margins if kind == "aot" else ratios[:, side]
            for value in key_P.unique():
                tied = key_P == value
                expected = slope[tied, side].sum().item()
                assert own_slope[tied[order], side].sum().item() == pytest.approx(expected, rel=1e-6, abs=1e-12)
        assert not ties or len(margins.unique()) < 12 and len(ratios[:, 0].unique()) < 12


def test_peers_of_four_pairs_by_hand():
    policy = doubles([[0, 3], [0, 1], [0, 4], [0, 2]]).neg().flip(1)  # margins -3, -1, -4, -2
    reference = doubles([[10, 0], [20, 0], [30, 0], [40, 0]])  # margins 10, 20, 30, 40
    assert sorted_peers("aot", policy, reference)[:, 0].tolist() == [20, 40, 10, 30]
    ratios = doubles([[5, -1], [1, -2], [3, -3], [4, -4]])
    peers = sorted_peers("aot_unpaired", ratios, torch.zeros(4, 2))
    assert peers[:, 0].tolist() == [-1, -4, -3, -2] and peers[:, 1].tolist() == [5, 4, 3, 1]


# ------------------------------------------------------------------------------------------ one step of main() by TRL


def write_pairs(folder, count: int = 32) -> tuple[str, list[dict]]:
    rows = uneven_pairs(count)
    return write(folder / "train.jsonl", rows), rows


def ids_of(row: dict, *sides: str) -> list[tuple[list[int], list[int]]]:
    """(prompt, reply) for each of these columns."""
    tokenizer = load_tokenizer("toy")
    prompt = tokenizer(row["prompt"]).input_ids
    replies = [tokenizer(row[side], add_special_tokens=False).input_ids for side in sides]
    return [(prompt, [*reply, tokenizer.eos_token_id]) for reply in replies]


def padded(sequences: list[list[int]], value: int = 0) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(own) for own in sequences], True, value)


def trl_inputs(pairs: list[tuple[list[int], list[int]]], prefix: str = "") -> dict[str, torch.Tensor]:
    return {
        f"{prefix}input_ids": padded([prompt + reply for prompt, reply in pairs]),
        f"{prefix}attention_mask": padded([[1] * len(prompt + reply) for prompt, reply in pairs]),
        f"{prefix}completion_mask": padded([[0] * len(prompt) + [1] * len(reply) for prompt, reply in pairs]),
    }


def stock(folder: str, weights: torch.Tensor, fused: bool = False):
    """Stock transformers with these weights, and on it TRL's fused head."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").train()
    model.to(weights.dtype)
    vector_to_parameters(weights, model.parameters())
    if fused:
        from trl.trainer.utils import add_fused_lm_head

        outputs = ("log_probs", "entropy", "is_top1", "mean_logits", "log_sum_sq_probs")
        add_fused_lm_head(model, outputs=outputs)
    return model


def result_of(loss: torch.Tensor, model) -> tuple[float, torch.Tensor]:
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()]).float()


def last_of(trainer) -> dict[str, float]:
    return {name: values[-1] for name, values in trainer._metrics["train"].items()}


def trl_dpo(folder: str, now: torch.Tensor, first: torch.Tensor, rows: list[dict], **options):
    """Loss, gradient and metrics at the weights `now`, with `first` for the reference."""
    pytest.importorskip("trl")
    model, reference = stock(folder, now, fused=True), stock(folder, first, fused=True)
    inputs = trl_inputs([ids_of(row, side)[0] for side in ("chosen", "rejected") for row in rows])
    trainer = dpo_trainer(model, reference, **options)
    return *result_of(trainer._compute_loss(model, inputs, False), model), last_of(trainer)


def one_step(script, monkeypatch, folder, policy, **flags):
    """(steps, weights of the reference) of a run on all rows of its file at every step, the reference blurred."""
    models = watch_copies(monkeypatch, script, blurred) if script is not orpo else []
    settings = dict(train_batch_size=32, max_steps=1, learning_rate=0.1, max_tokens_per_micro_batch=100)
    steps, _ = record(
        script, monkeypatch, folder / "run", disturb=lambda _: None, model_name_or_path=policy, **{**settings, **flags}
    )
    return steps, parameters_to_vector(models[0][1].parameters()).detach() if models else None


def check(step, loss: float, gradient: torch.Tensor) -> None:
    assert difference(step.gradient, gradient) < 1e-5
    assert step.metrics["loss"] == pytest.approx(loss, rel=1e-5, abs=1e-6)


F_DIVERGENCES = {
    "forward_kl": dict(f_divergence_type="forward_kl"),
    "js_divergence": dict(f_divergence_type="js_divergence"),
    "alpha_divergence 0.5": dict(f_divergence_type="alpha_divergence"),
    "alpha_divergence 1": dict(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1.0),
    # At 2 ratios of these rows make a gradient that answers a change of 1e-7 in the weights with 1e-5
    "alpha_divergence 1.5": dict(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1.5),
}
CASES = {kind: dict(loss_type=[kind]) for kind in (*KINDS, "sft") if kind != "bco_pair"} | F_DIVERGENCES
CASES |= {
    "exo_pair": dict(loss_type=["exo_pair"], label_smoothing=0.1),
    "robust": dict(loss_type=["robust"], label_smoothing=0.2),
    "aot": dict(loss_type=["aot"], label_smoothing=0.1, beta=0.5),
    "aot_unpaired": dict(loss_type=["aot_unpaired"], label_smoothing=0.2, beta=0.5),
    "discopop": dict(loss_type=["discopop"], discopop_tau=0.4),
    "sigmoid_norm": dict(loss_type=["sigmoid_norm"], beta=5.0),
    "rpo": dict(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.005]),
    "several": dict(loss_type=["ipo", "sft", "aot", "hinge"], loss_weights=[0.1, 2.0, 0.7, 0.0]),
    "js_divergence, exo_pair": dict(
        loss_type=["exo_pair", "robust", "hinge", "discopop", "ipo"], label_smoothing=0.1, beta=0.4,
        f_divergence_type="js_divergence",
    ),
    "ld": dict(ld_alpha=0.5),
    "ld, several": dict(ld_alpha=0.2, loss_type=["ipo", "aot", "sft", "apo_down"]),
    "ld 0": dict(ld_alpha=0.0, loss_type=["nca_pair"]),
    "wpo": dict(use_weighting=True),
    "wpo, ld, several": dict(use_weighting=True, ld_alpha=0.5, loss_type=["ipo", "nca_pair"], loss_weights=[0.3, 1.0]),
}


@pytest.mark.parametrize("case", CASES)
def test_dpo_has_the_loss_and_the_gradient_of_trl(case, monkeypatch, tmp_path, policy):
    data, rows = write_pairs(tmp_path)
    [step], reference = one_step(dpo, monkeypatch, tmp_path, policy, dataset_name=data, **CASES[case])
    first = step.weights if reference is None else reference  # sft has none, and TRL looks at it nevertheless
    loss, gradient, metrics = trl_dpo(policy, step.weights, first, rows, **CASES[case])
    check(step, loss, gradient)
    if case in ("sigmoid", "ld, several", "wpo"):
        assert metrics["rewards/chosen"] > 0.05 and 0.2 < metrics["rewards/accuracies"] < 0.9
        for name in metrics.keys() & step.metrics.keys() - {"num_tokens"}:
            assert step.metrics[name] == pytest.approx(metrics[name], rel=1e-4, abs=1e-5), name
        assert {"entropy", "mean_token_accuracy", "logps/rejected", "rewards/margins"} < metrics.keys()


@pytest.mark.parametrize("kinds, weights", [(["bco_pair"], [1.0]), (["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0])])
def test_bco_and_mpo_are_those_of_trl_but_for_the_threshold(kinds, weights, monkeypatch, tmp_path, policy):
    monkeypatch.setattr(dpo, "Pairs", lambda *columns, shift: Pairs(*columns, shift=0.0))
    data, rows = write_pairs(tmp_path)
    flags = dict(loss_type=kinds, loss_weights=weights)
    [step], reference = one_step(dpo, monkeypatch, tmp_path, policy, dataset_name=data, **flags)
    loss, gradient, _ = trl_dpo(policy, step.weights, reference, rows, **flags)
    check(step, loss, gradient)


def test_a_moved_reference_is_scored_from_then_on(monkeypatch, tmp_path, policy):
    """TR-DPO: the second step by TRL, against 0.6 of the first update's policy and 0.4 of the old reference."""
    data, rows = write_pairs(tmp_path)
    models = watch_copies(monkeypatch, dpo)
    steps, _ = record(
        dpo, monkeypatch, tmp_path / "run", model_name_or_path=policy, dataset_name=data, train_batch_size=32,
        max_steps=3, learning_rate=0.3, sync_ref_model=True, ref_model_sync_steps=1,
    )
    assert len(models) == 1
    first = 0.6 * steps[1].weights + 0.4 * steps[0].weights
    check(steps[1], *trl_dpo(policy, steps[1].weights, first, rows)[:2])
    check(steps[2], *trl_dpo(policy, steps[2].weights, 0.6 * steps[2].weights + 0.4 * first, rows)[:2])


# -------------------------------------------------------------------------------------------- by a float64 loop


def slow_replies(model, row: dict, *sides: str):
    """For each reply its tokens' log-probs and their log sum_v p_v^2, float64, one sequence at a time."""
    for prompt, reply in ids_of(row, *sides):
        log_p = model(torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        yield log_p[range(len(reply)), reply], (2 * log_p).logsumexp(-1)


def slow_pairs(policy: str, weights: torch.Tensor, rows: list[dict]):
    """The model, and for each row ((log-probs, collisions) of the chosen, of the rejected)."""
    model = stock(policy, weights.double())
    return model, [tuple(slow_replies(model, row, "chosen", "rejected")) for row in rows]


def slow_ratios(policy: str, now: torch.Tensor, first: torch.Tensor, rows: list[dict]):
    """The model and [(h_w, h_l)]."""
    model, pairs = slow_pairs(policy, now, rows)
    _, before = slow_pairs(policy, first, rows)
    return model, [
        [own.sum() - old.sum().detach() for (own, _), (old, _) in zip(pair, earlier)]
        for pair, earlier in zip(pairs, before)
    ]  # fmt: skip


def check_slowly(step, loss: torch.Tensor, model) -> None:
    check(step, *result_of(loss, model))


def test_sigmoid_with_label_smoothing_is_cdpo(monkeypatch, tmp_path, policy):
    data, rows = write_pairs(tmp_path)
    flags = dict(dataset_name=data, label_smoothing=0.3, beta=0.5)
    [step], reference = one_step(dpo, monkeypatch, tmp_path, policy, **flags)
    model, ratios = slow_ratios(policy, step.weights, reference, rows)
    losses = []
    for h_w, h_l in ratios:
        p = 1 / (1 + (-0.5 * (h_w - h_l)).exp())  # that the label is right
        losses.append(-0.7 * p.log() - 0.3 * (1 - p).log())
    check_slowly(step, sum(losses) / 32, model)


def test_the_threshold_of_bco_is_the_mean_of_all_rewards_so_far(monkeypatch, tmp_path, policy):
    """Those of the current step included, for policy and reference as they stand before its update."""
    data, rows = write_pairs(tmp_path)
    steps, reference = one_step(
        dpo, monkeypatch, tmp_path, policy, dataset_name=data, loss_type=["bco_pair", "hinge"], max_steps=3,
        loss_weights=[1.0, 0.0],
    )
    seen = []
    for step in steps:
        model, ratios = slow_ratios(policy, step.weights, reference, rows)
        seen += [0.1 * h.item() for pair in ratios for h in pair]
        delta = sum(seen) / len(seen)
        assert abs(delta) > 0.05 and step.metrics["rewards/shift"] == pytest.approx(delta, rel=1e-5)
        losses = []
        for h_w, h_l in ratios:
            wins, loses = 1 / (1 + (delta - 0.1 * h_w).exp()), 1 / (1 + (0.1 * h_l - delta).exp())
            losses.append(-wins.log() - loses.log())
        check_slowly(step, sum(losses) / 32, model)
    assert len({round(step.metrics["rewards/shift"], 4) for step in steps}) == 3


def test_the_threshold_of_bco_and_a_moved_reference_survive_a_checkpoint(monkeypatch, tmp_path, policy):
    data, _ = write_pairs(tmp_path, 48)
    flags = dict(
        dataset_name=data, loss_type=["bco_pair"], max_steps=4, save_steps=1, sync_ref_model=True,
        ref_model_sync_steps=2,
    )
    steps, _ = one_step(dpo, monkeypatch, tmp_path, policy, **flags)
    states = sorted((tmp_path / "run" / "checkpoints").glob("step-*/state.pt"))
    state = torch.load(states[-1], weights_only=True)
    assert state["rewards_seen"] == 3 * 64
    assert state["reward_sum"] / state["rewards_seen"] == pytest.approx(steps[2].metrics["rewards/shift"], rel=1e-12)

    monkeypatch.setattr("common.run.describe_environment", lambda *_: {"run_id": "recorded"})
    monkeypatch.setattr(dpo, "save_model", lambda *_: None)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    settings = dict(train_batch_size=32, learning_rate=0.1, max_tokens_per_micro_batch=100, model_name_or_path=policy)
    dpo.main(dpo.Args(
        output_dir=str(tmp_path / "run"), resume=True, logging_steps=1, **SMOOTH, **{**settings, **flags}
    ))
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_wpo_does_not_weigh_the_likelihood(monkeypatch, tmp_path, policy):
    """2406.11827 Eq. 2 beside `sft`. TRL fails: it means to weigh that too, an expanded tensor, in place."""
    data, rows = write_pairs(tmp_path)
    flags = dict(use_weighting=True, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5])
    [step], reference = one_step(dpo, monkeypatch, tmp_path, policy, dataset_name=data, **flags)
    model, pairs = slow_pairs(policy, step.weights, rows)
    _, before = slow_pairs(policy, reference, rows)
    loss, tokens, nll = 0.0, 0, 0.0
    for pair, earlier in zip(pairs, before):
        h_w, h_l = (own.sum() - old.sum().detach() for (own, _), (old, _) in zip(pair, earlier))
        weight = math.prod(math.exp((own - collision).mean().item()) for own, collision in pair)
        loss = loss - weight * (1 / (1 + (-0.1 * (h_w - h_l)).exp())).log()
        nll, tokens = nll - pair[0][0].sum(), tokens + len(pair[0][0])
    check_slowly(step, loss / 32 + 0.5 * nll / tokens, model)
    with pytest.raises(RuntimeError, match="single memory location"):
        trl_dpo(policy, step.weights, reference, rows, **flags)


# ------------------------------------------------------------------------------------------------------- CPO, SimPO


def trl_without_reference(kind: str, folder: str, weights: torch.Tensor, rows: list[dict], **options):
    """Loss, gradient and metrics by TRL's CPOTrainer or ORPOTrainer."""
    pytest.importorskip("trl")
    from accelerate import Accelerator

    if kind == "cpo":
        from trl.experimental.cpo.cpo_trainer import CPOTrainer as Trainer
    else:
        from trl.experimental.orpo.orpo_trainer import ORPOTrainer as Trainer
    model, trainer = stock(folder, weights), Trainer.__new__(Trainer)
    trainer.__dict__.update(
        {"beta": 0.1, "label_smoothing": 0.0, "alpha": 0.0, **options}, accelerator=Accelerator(cpu=True),
        is_encoder_decoder=False, pad_token_id=0, padding_value=0, aux_loss_enabled=False,
    )
    batch = {}
    for side in ("chosen", "rejected"):
        inputs = trl_inputs([ids_of(row, side)[0] for row in rows], prefix=f"{side}_")
        mask = inputs.pop(f"{side}_completion_mask")
        ids, attention_mask = inputs.values()
        batch |= {**inputs, f"{side}_labels": ids.where(mask == 1, -100).where(attention_mask == 1, -100)}
    loss, metrics = trainer.get_batch_loss_metrics(model, batch)
    return *result_of(loss, model), metrics


@pytest.mark.parametrize("nll", [0.0, 1.0, 0.3])
@pytest.mark.parametrize("kind", ["simpo", "cpo"])
def test_simpo_and_cpo_have_the_loss_and_the_gradient_of_trl(kind, nll, monkeypatch, tmp_path, policy):
    """T48: no likelihood unless asked for (cpo_alpha, of which TRL's default is 1), and no second model either way."""
    data, rows = write_pairs(tmp_path)
    ours = dict(simpo=dict(beta=2.0, simpo_gamma=0.7), cpo=dict(beta=0.2, label_smoothing=0.1))[kind]
    asked = dict(loss_type=[kind, "sft"], loss_weights=[1.0, nll]) if nll else dict(loss_type=[kind])
    [step], reference = one_step(dpo, monkeypatch, tmp_path, policy, dataset_name=data, **ours, **asked)
    assert reference is None
    theirs = dict(ours, loss_type="simpo" if kind == "simpo" else "sigmoid", cpo_alpha=nll)
    loss, gradient, metrics = trl_without_reference("cpo", policy, step.weights, rows, **theirs)
    check(step, loss, gradient)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/accuracies", *["nll_loss"] * (nll > 0)):
        assert step.metrics[name] == pytest.approx(metrics[name], rel=1e-4), name


def test_the_margin_of_simpo_is_half_of_beta_unless_given(monkeypatch, tmp_path, policy):
    data, rows = write_pairs(tmp_path)
    [step], _ = one_step(dpo, monkeypatch, tmp_path, policy, dataset_name=data, loss_type=["simpo"], beta=2.0)
    theirs = dict(beta=2.0, simpo_gamma=1.0, loss_type="simpo", cpo_alpha=0.0)
    check(step, *trl_without_reference("cpo", policy, step.weights, rows, **theirs)[:2])


# -------------------------------------------------------------------------------------------------------------- ORPO


def test_orpo_has_the_loss_and_the_gradient_of_trl(monkeypatch, tmp_path, policy):
    """Whose likelihood is of prompt and reply."""
    data, rows = write_pairs(tmp_path)
    [step], _ = one_step(orpo, monkeypatch, tmp_path, policy, dataset_name=data, beta=0.7, completion_only_loss=False)
    loss, gradient, metrics = trl_without_reference("orpo", policy, step.weights, rows, beta=0.7)
    check(step, loss, gradient)
    for name in metrics.keys() - {"logits/chosen", "logits/rejected"}:
        assert step.metrics[name] == pytest.approx(metrics[name], rel=1e-4), name


def test_orpo_by_a_loop(monkeypatch, tmp_path, policy):
    """2403.07691 Eqs. 4, 6, 7 as they are written, with the likelihood of the chosen replies alone."""
    data, rows = write_pairs(tmp_path)
    [step], _ = one_step(orpo, monkeypatch, tmp_path, policy, dataset_name=data, beta=0.7)
    model, pairs = slow_pairs(policy, step.weights, rows)
    ratio, nll, tokens = 0.0, 0.0, 0
    for (chosen, _), (rejected, _) in pairs:
        p_w, p_l = chosen.mean().exp(), rejected.mean().exp()
        odds_ratio = (p_w / (1 - p_w)) / (p_l / (1 - p_l))
        ratio = ratio - (odds_ratio / (1 + odds_ratio)).log()  # sigmoid(log r) = r / (1 + r)
        nll, tokens = nll - chosen.sum(), tokens + len(chosen)
    check_slowly(step, nll / tokens + 0.7 * ratio / 32, model)
    assert step.metrics["nll_loss"] == pytest.approx((nll / tokens).item(), rel=1e-5)
    assert step.metrics["log_odds_ratio"] == pytest.approx(-ratio.item() / 32, rel=1e-5)


def test_log1mexp():
    """T47. Each form fails where the other holds: in fp32 1 - exp(-1e-8) is 0, and so is log(-expm1(-50))."""
    points = [-1e-8, -1e-3, -0.69, -math.log(2), -0.7, -5.0, -50.0, -80.0]
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-13)):
        value = torch.tensor(points, dtype=dtype, requires_grad=True)
        result = log1mexp(value)
        exact = [math.log(-math.expm1(x)) if x > -0.69 else math.log1p(-math.exp(x)) for x in value.tolist()]
        assert result.tolist() == pytest.approx(exact, rel=tolerance, abs=1e-38)
        (slope,) = torch.autograd.grad(result.sum(), value)
        assert slope.tolist() == pytest.approx([-1 / math.expm1(-x) for x in value.tolist()], rel=tolerance)
    assert log1mexp(doubles([-1e-8])).item() == pytest.approx(math.log(1e-8), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_odds_have_finite_slopes_everywhere(dtype):
    """Also where a reply is certain: TRL's log1mexp divides by 0 there, and where() multiplies that by 0."""
    value = torch.tensor([-0.0, *(-(10.0**k) for k in range(-12, 2)), -0.693, -0.694, -80.0, -700.0], dtype=dtype)
    value.requires_grad_()
    pairs_P2 = torch.stack([value, value.flip(0)], dim=1)
    margin_P = odds_margin(pairs_P2)
    (slope,) = torch.autograd.grad(margin_P.sum(), value)
    assert margin_P.isfinite().all() and slope.isfinite().all()
    assert (margin_P + margin_P.flip(0)).abs().max() < 1e-4  # the odds of the other are the inverse


def test_odds_margin_at_known_values():
    """p = 0.5 and 0.25: odds of 1 and of 1/3."""
    assert odds_margin(doubles([[math.log(0.5), math.log(0.25)]])).item() == pytest.approx(math.log(3), rel=1e-12)


# --------------------------------------------------------------------------------------------------------------- KTO


def trl_kto(folder: str, now: torch.Tensor, first: torch.Tensor, rows: list[dict], **options):
    """By TRL's KTOTrainer for these rows in this order, mismatched replies rotated by one."""
    pytest.importorskip("trl")
    from accelerate import Accelerator
    from trl import KTOTrainer

    model, reference = stock(folder, now, fused=True), stock(folder, first, fused=True)
    replies = [ids_of(row, "completion")[0] for row in rows]
    rotated = [(prompt, replies[i - 1][1]) for i, (prompt, _) in enumerate(replies)]
    trainer = KTOTrainer.__new__(KTOTrainer)
    trainer.__dict__.update(
        options, model=model, ref_model=reference, accelerator=Accelerator(cpu=True), aux_loss_enabled=False,
        calculate_KL=options["loss_type"] == "kto", precompute_ref_logps=False, _total_train_tokens=0, _tp_size=1,
        _metrics=defaultdict(lambda: defaultdict(list)), args=SimpleNamespace(gradient_checkpointing_kwargs=None),
    )
    inputs = trl_inputs(replies) | trl_inputs(rotated, "KL_") | {"label": torch.tensor([row["label"] for row in rows])}
    return *result_of(trainer._compute_loss(model, inputs, False), model), last_of(trainer)


KTO = dict(desirable_weight=1.5, undesirable_weight=0.6)


def rotate(monkeypatch) -> None:
    """Instead of the draw what TRL does: reply i meets the one before it."""
    monkeypatch.setattr(
        kto, "draw_mismatched", lambda prompt_B, *_: [(i - 1) % len(prompt_B) for i in range(len(prompt_B))]
    )


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_kto_has_the_loss_and_the_gradient_of_trl(loss_type, monkeypatch, tmp_path, policy):
    """Two steps: at the first z0 is above 0, at the second the policy has left its data and z0 is clamped."""
    rotate(monkeypatch)
    rows = labelled(uneven_pairs(40))[:64]
    flags = dict(loss_type=loss_type, beta=0.3, **KTO)
    steps, reference = one_step(
        kto, monkeypatch, tmp_path, policy, dataset_name=write(tmp_path / "train.jsonl", rows), train_batch_size=64,
        max_steps=2, learning_rate=0.5, **flags,
    )
    clamped = []
    for number, step in enumerate(steps):
        ordered = [rows[i] for i in draw(64, 64 * number, 64, 0)]
        loss, gradient, metrics = trl_kto(policy, step.weights, reference, ordered, **flags)
        check(step, loss, gradient)
        clamped.append(metrics["kl"] == 0)
        for name in metrics.keys() & step.metrics.keys() - {"num_tokens"}:
            assert step.metrics[name] == pytest.approx(metrics[name], rel=1e-4, abs=1e-5), name
        assert {"kl", "entropy", "rewards/chosen", "rewards/margins", "logps/rejected"} < metrics.keys()
    assert clamped == ([False, True] if loss_type == "kto" else [True, True])


def test_kto_by_hand():
    """2402.01306 Eq. 7, at z0 of 0.4."""
    ratio = doubles([0.3, -0.2, 2.0, -3.0]).requires_grad_()
    desirable = torch.tensor([True, False, False, True])
    loss = kto_loss(ratio, desirable, doubles(0.4), 0.5)
    expected = [1 - s(0.5 * (0.3 - 0.4)), 1 - s(0.5 * (0.4 + 0.2)), 1 - s(0.5 * (0.4 - 2)), 1 - s(0.5 * (-3 - 0.4))]
    assert loss.tolist() == pytest.approx(expected, rel=1e-12)
    (slope,) = torch.autograd.grad(loss.sum(), ratio)
    assert (slope.sign() == doubles([-1, 1, 1, -1])).all()


def slow_z0(policy: str, now: torch.Tensor, first: torch.Tensor, met: list[tuple[list[int], list[int]]]) -> float:
    """Mean log-ratio of (prompt, reply), not clamped, in float64."""
    sums = []
    for weights in (now, first):
        model = stock(policy, weights.double())
        with torch.no_grad():
            for prompt, reply in met:
                log_p = model(torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
                sums.append(log_p[range(len(reply)), reply].sum().item())
    return (sum(sums[: len(met)]) - sum(sums[len(met) :])) / len(met)


@pytest.mark.parametrize("batch_size, max_steps", [(64, 2), (6, 3), (1, 8)])
def test_z0_is_that_of_the_replies_drawn(batch_size, max_steps, monkeypatch, tmp_path, policy):
    """By a generator of its own for every step, never to their own prompt; for a batch of one, from the data set."""
    drawn, expected, generators = [], [], set()

    def draw_and_note(prompt_B, all_prompts, generator):
        generators.add(copy.deepcopy(generator).integers(2**62))
        places = draw_mismatched(prompt_B, all_prompts, generator)
        expected.extend(prompt_B[j] if j >= 0 else all_prompts[~j] for j in places)
        return places

    def transplant_and_note(prompt, reply, max_length):
        own, other = (example.input_ids[: example.prompt_length] for example in (prompt, reply))
        assert own.tobytes() != other.tobytes() == expected[len(drawn)]
        drawn.append((own.tolist(), reply.input_ids[reply.prompt_length :].tolist()))
        return transplant(prompt, reply, max_length)

    monkeypatch.setattr(kto, "draw_mismatched", draw_and_note)
    monkeypatch.setattr(kto, "transplant", transplant_and_note)
    data = write(tmp_path / "train.jsonl", labelled(uneven_pairs(40))[:64])
    steps, reference = one_step(
        kto, monkeypatch, tmp_path, policy, dataset_name=data, train_batch_size=batch_size, max_steps=max_steps
    )
    values = [
        slow_z0(policy, step.weights, reference, drawn[k * batch_size : (k + 1) * batch_size])
        for k, step in enumerate(steps)
    ]  # fmt: skip
    assert len(drawn) == max_steps * batch_size and len(generators) == max_steps and max(values) > 0.1
    for step, value in zip(steps, values, strict=True):
        assert step.metrics["kl"] == pytest.approx(max(0.0, value), rel=1e-4, abs=1e-5)
    if batch_size == 1:  # steps of one kind: the other's means are null
        assert {step.metrics["count/chosen"] for step in steps} <= {0, 1}
        assert all((step.metrics["logps/chosen"] is None) == (step.metrics["count/chosen"] == 0) for step in steps)


# T46 ------------------------------------------------------------------------------------------------ mismatched draws


def names(*letters) -> list[bytes]:
    return [str(letter).encode() for letter in letters]


def test_no_reply_ever_meets_its_own_prompt():
    """Batches of 2 to 9, all prompts apart or some alike: TRL's reversal kept the middle one (TRL #1911)."""
    data = names(*"abcdefghij")
    for n in range(2, 10):
        for seed in range(40):
            generator = np.random.default_rng(seed)
            prompts = names(*(generator.integers(0, [2, 3, n, 100][seed % 4], n)))
            places = draw_mismatched(prompts, [*prompts, *data], generator)
            assert len(places) == n
            for own, place in zip(prompts, places):
                if len({*prompts}) > 1:
                    assert 0 <= place < n and prompts[place] != own
                else:  # all of one prompt: from the data set
                    assert place < 0 and [*prompts, *data][~place] != own


def test_a_lone_reply_meets_one_of_the_data_set():
    """TRL #2554: in a batch of one the mismatched reply was its own."""
    data = names("a", "b", "a", "c")
    places = [draw_mismatched(names("a"), data, np.random.default_rng(seed))[0] for seed in range(50)]
    assert {*places} == {~1, ~3}


def chi_square(counts: Counter, outcomes: int) -> float:
    """Distance from uniform in deviations of the statistic."""
    total = sum(counts.values())
    assert len(counts) <= outcomes
    statistic = sum((counts[k] - total / outcomes) ** 2 for k in counts) * outcomes / total
    statistic += (outcomes - len(counts)) * total / outcomes
    return (statistic - (outcomes - 1)) / math.sqrt(2 * (outcomes - 1))


def test_mismatched_replies_are_drawn_uniformly_and_apart():
    prompts = names("a", "a", "b", "c", "d", "d")
    draws = [draw_mismatched(prompts, prompts, np.random.default_rng([0, step])) for step in range(4000)]
    for i, own in enumerate(prompts):
        others = [j for j, other in enumerate(prompts) if other != own]
        assert {places[i] for places in draws} == {*others}
        assert chi_square(Counter(places[i] for places in draws), len(others)) < 4
    # No two of them go together, as in a rotation or a permutation; nor does one step with the next
    assert chi_square(Counter((places[2], places[3]) for places in draws), 25) < 4
    assert chi_square(Counter((a[2], b[2]) for a, b in pairwise(draws)), 25) < 4


def test_transplant():
    prompt = Example([1, 7, 8, 9, 3], [False] * 3 + [True] * 2, row=4, prompt_length=3)
    reply = Example([1, 5, 6, 2], [False, False, True, True], row=9, prompt_length=2)
    for max_length, ids in ((None, [1, 7, 8, 6, 2]), (4, [1, 7, 8, 6]), (9, [1, 7, 8, 6, 2])):
        moved = transplant(prompt, reply, max_length)
        assert moved.input_ids.tolist() == ids and moved.prompt_length == 3
        assert moved.loss_mask.tolist() == [False] * 3 + [True] * (len(ids) - 3)
    assert prompt.input_ids.tolist() == [1, 7, 8, 9, 3] and reply.input_ids.tolist() == [1, 5, 6, 2]


@pytest.mark.parametrize(
    "counts, weights, ratio, advised",
    [
        ((100, 100), (1.0, 1.0), "1.00", None), ((400, 300), (1.0, 1.0), "1.33", None),
        ((50, 100), (2.0, 1.0), "1.00", None), ((300, 100), (1.0, 1.0), "3.00", "0.33 to 0.44"),
        ((100, 400), (1.0, 0.5), "0.50", "2.00 to 2.67"), ((100, 100), (1.0, 2.0), "0.50", "2.00 to 2.67"),
    ],
)  # fmt: skip
def test_weight_advice(counts, weights, ratio, advised):
    """Eq. 8: lambda_D n_D / (lambda_U n_U) from 1 to 4/3; what is advised is then found good."""
    sentence = weight_advice(*counts, *weights)
    assert f"weighed {ratio} to 1" in sentence and ("advised" in sentence) == (advised is not None)
    if advised is not None:
        assert f"--desirable_weight {advised}" in sentence
        for weight in advised.split(" to "):
            assert "advised" not in weight_advice(*counts, float(weight), weights[1])


def test_labels_of():
    """A pair is a desirable and an undesirable reply; a single reply is what its row says, rows may be dropped."""

    def group(row: int, count: int) -> list[Example]:
        return [Example([1, 2], [False, True], row, 1)] * count

    rows = [{"label": True}, {"label": False}, {}, {"label": False}, {"label": True}]
    assert labels_of([group(0, 1), group(2, 2), group(3, 1), group(4, 1)], rows) == [True, True, False, False, True]
