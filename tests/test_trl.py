"""TRL 1.16 as an oracle: on the same rollout its trainers and these scripts have the same loss and the same gradient.

TRL's own code runs here: `_generate_and_score_completions` (given our completions and our rewards, it computes
advantages, old and reference log-probs and vLLM's importance weights) and `_compute_loss`, on one padded batch with
stock attention. Ours is what main() did, packed. Compared is a step off policy, after an update that carried ratios
out of the clip range on both sides.

Where the two differ on purpose:
  - A mean over sequences: TRL counts those that are masked altogether, we do not (verl and OpenRLHF neither).
  - top_entropy_quantile: TRL takes the entropies of the current policy, batch by batch; we those of the policy that
    made the rollout, over the step. They agree on policy. TRL's entropy bonus skips the others too; ours does not.
  - Metrics of clipping are means over the tokens that were run: TRL also runs those without an advantage.
"""

import copy
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from recording import STEP, difference, record
from transformers import AutoModelForCausalLM

import grpo
import sft
from common.data import Example, load_rows
from common.models import load_tokenizer

pytest_plugins = ["recording"]
pytest.importorskip("trl")


def trl_model(folder: str, weights: torch.Tensor, temperature: float = 1.0):
    """Stock transformers with these weights, and TRL's fused head on it."""
    from trl.trainer.utils import add_fused_lm_head

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").train()
    model.get_input_embeddings().padding_idx = None  # the toy samples its padding token, which is then one like others
    torch.nn.utils.vector_to_parameters(weights, model.parameters())
    add_fused_lm_head(model, temperature, outputs=("log_probs", "entropy", "is_top1"))
    return model


def trl_grpo(folder: str, rollout, first: torch.Tensor, now: torch.Tensor, **options):
    """Loss, gradient and advantages by TRL: sampled with weights `first`, which are the reference too; now at `now`."""
    from accelerate import Accelerator
    from trl import GRPOConfig, GRPOTrainer

    settings = dict(
        loss_type="dapo", num_generations=8, beta=0.0, max_completion_length=8, num_iterations=2, temperature=1.0,
        steps_per_generation=1, gradient_accumulation_steps=1, per_device_train_batch_size=64, bf16=False, use_cpu=True,
        report_to="none", scale_rewards="group",
    )
    mode, limits = options.pop("correction", None), options.pop("limits", (None, None))
    weights = options.pop("reward_weights", None)
    arguments = GRPOConfig(output_dir="unused", **{**settings, **options})
    tokenizer = load_tokenizer("toy")
    trainer = GRPOTrainer.__new__(GRPOTrainer)  # without __init__: no data loader, no optimiser, no reward function
    trainer.__dict__.update(
        vars(arguments), args=arguments, accelerator=Accelerator(cpu=True), _tokenizer=tokenizer,
        processing_class=tokenizer, model=trl_model(folder, first, arguments.temperature), ref_model=None,
        state=SimpleNamespace(global_step=1), environment_factories=None, environments=None, tools=None,
        pad_to_multiple_of=None, eos_token_ids=[tokenizer.eos_token_id], aux_loss_enabled=False,
        use_vllm=mode is not None, vllm_importance_sampling_correction=mode is not None,
        vllm_importance_sampling_mode=mode, vllm_importance_sampling_clip_min=limits[0],
        vllm_importance_sampling_clip_max=limits[1], epsilon_low=arguments.epsilon,
        epsilon_high=arguments.epsilon if arguments.epsilon_high is None else arguments.epsilon_high,
        reward_funcs=[None] * rollout.rewards_BF.shape[1], reward_func_names=["r"] * rollout.rewards_BF.shape[1],
        reward_weights=torch.tensor(weights or [1.0] * rollout.rewards_BF.shape[1]),
        _entropy_bonus_enabled=arguments.entropy_coef != 0, use_adaptive_entropy=False,
        current_gradient_accumulation_steps=1, _pending_extra_logs={}, _pending_metrics={},
        _metrics=defaultdict(lambda: defaultdict(list)), _logs=defaultdict(list), log_multimodal=False,
    )
    trainer._logs["rewards"] = defaultdict(list)
    if arguments.beta:
        trainer.ref_model = trl_model(folder, first, arguments.temperature)

    ids = [ids.tolist() for ids in rollout.split(rollout.input_ids_A)]
    prompts = [own[:n] for own, n in zip(ids, rollout.prompt_lengths_B)]
    completions = [own[n:] for own, n in zip(ids, rollout.prompt_lengths_B)]
    sampler = None
    if rollout.sampler_logprobs_A is not None:
        parts = rollout.split(rollout.sampler_logprobs_A)
        sampler = [own[n:].tolist() for own, n in zip(parts, rollout.prompt_lengths_B)]
    trainer._generate = lambda _: (prompts, completions, None, completions, sampler, {}, None, None)
    trainer._calculate_rewards = lambda *_: rollout.rewards_BF.clone()

    batch = trainer._generate_and_score_completions([{"prompt": "unused"}] * len(ids))
    model = trl_model(folder, now, arguments.temperature)
    loss = trainer._compute_loss(model, batch)
    loss.backward()
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()]), batch["advantages"], metrics


GSPO = dict(importance_sampling_level="sequence")
SEQUENCE_MEAN = dict(loss_aggregation="sequence_mean")
CASES = {  # name: our flags, TRL's options
    "grpo": (SEQUENCE_MEAN, dict(loss_type="grpo")),
    "dr_grpo": (
        dict(scale_rewards="none", loss_aggregation="constant"), dict(loss_type="dr_grpo", scale_rewards="none")
    ),
    "dapo": (dict(epsilon_high=0.28), dict(loss_type="dapo", epsilon_high=0.28)),
    "delta": (dict(delta=1.3), dict(loss_type="dapo", delta=1.3)),
    "cispo": (dict(surrogate="cispo", cispo_max_ratio=1.1), dict(loss_type="cispo", epsilon_high=1.1)),
    "sapo": (dict(surrogate="sapo", **SEQUENCE_MEAN), dict(loss_type="sapo")),
    "gspo": (
        {**GSPO, **SEQUENCE_MEAN, "epsilon": 0.03, "epsilon_high": 0.04},
        {**GSPO, "loss_type": "grpo", "epsilon": 0.03, "epsilon_high": 0.04},
    ),
    "gspo, kl": ({**GSPO, "beta": 0.3}, {**GSPO, "loss_type": "dapo", "beta": 0.3}),
    "gspo, cispo": (
        {**GSPO, "surrogate": "cispo", "cispo_max_ratio": 1.05}, {**GSPO, "loss_type": "cispo", "epsilon_high": 1.05}
    ),
    "kl, corrected": (dict(beta=0.3), dict(beta=0.3)),
    "kl": (dict(beta=0.3, kl_estimator="k3"), dict(beta=0.3, use_bias_correction_kl=False)),
    "temperature": (dict(temperature=0.7), dict(temperature=0.7)),
    "entropy": (dict(entropy_coef=0.1), dict(entropy_coef=0.1)),
    "batch": (dict(scale_rewards="batch"), dict(scale_rewards="batch")),
    "mask_truncated": (
        dict(mask_truncated_completions=True, max_completion_length=6),
        dict(mask_truncated_completions=True, max_completion_length=6),
    ),
    "two rewards": (
        dict(reward_funcs=["common.toy:graded", "common.toy:exact_match"], reward_weights=[1.0, 0.5]),
        dict(reward_weights=[1.0, 0.5]),
    ),
    "gdpo": (
        dict(
            reward_funcs=["common.toy:graded", "common.toy:exact_match"], reward_weights=[1.0, 0.5],
            multi_objective_aggregation="normalize_then_sum",
        ),
        dict(reward_weights=[1.0, 0.5], multi_objective_aggregation="normalize_then_sum"),
    ),
}
for level in ("token", "sequence"):
    for form in ("truncate", "mask"):
        CASES[f"{level}_{form}"] = (
            dict(
                sampler_correction=f"{level}_{form}", sampler_correction_max=1.1, beta=0.3,
                sampler_correction_min=0.0 if form == "truncate" else 0.9,
            ),
            dict(correction=f"{level}_{form}", limits=(None if form == "truncate" else 0.9, 1.1), beta=0.3),
        )


def noisy_sampler(rollout) -> None:
    """A sampler that disagrees with the trainer by a tenth of a nat, and a reward that is missing now and then."""
    generator = torch.Generator().manual_seed(0)
    if rollout.sampler_logprobs_A is not None:
        noise_A = 0.1 * torch.randn(len(rollout.sampler_logprobs_A), generator=generator)
        rollout.sampler_logprobs_A += noise_A * rollout.loss_mask_A
    rollout.rewards_BF[3] = float("nan")


def run_both(monkeypatch, folder, policy, toy_file, ours, theirs, number):
    flags = {**STEP, "model_name_or_path": policy, "dataset_name": toy_file, **ours}
    steps, (rollout,) = record(grpo, monkeypatch, folder / "run", disturb=noisy_sampler, **flags)
    oracle = trl_grpo(policy, copy.deepcopy(rollout), steps[0].weights, steps[number].weights, **theirs)
    return steps[number], rollout, *oracle


def check(step, loss: float, gradient: torch.Tensor) -> None:
    assert difference(step.gradient, gradient) < 1e-5
    # A loss is a difference of terms of both signs that nearly cancel: its rounding is not relative to itself.
    assert step.metrics["loss"] == pytest.approx(loss, rel=1e-5, abs=2e-6)


@pytest.mark.parametrize("case", CASES)
def test_grpo_has_the_loss_and_the_gradient_of_trl(case, monkeypatch, tmp_path, policy, toy_file):
    step, rollout, loss, gradient, advantages, metrics = run_both(
        monkeypatch, tmp_path, policy, toy_file, *CASES[case], number=1
    )
    torch.testing.assert_close(rollout.advantages_B, advantages, rtol=1e-5, atol=1e-5)
    check(step, loss, gradient)
    if case == "kl":  # every sequence is run, so that means over tokens are over the same tokens
        assert metrics["clip_ratio/low_mean"] > 0.01 and metrics["clip_ratio/high_mean"] > 0.01
        for name in ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "entropy", "kl"):
            assert step.metrics[name] == pytest.approx(metrics[name], rel=1e-4), name


@pytest.mark.parametrize("quantile", [0.2, 0.5])
def test_top_entropy_quantile_is_that_of_trl_on_policy(quantile, monkeypatch, tmp_path, policy, toy_file):
    step, _, loss, gradient, _, _ = run_both(
        monkeypatch, tmp_path, policy, toy_file, dict(top_entropy_quantile=quantile),
        dict(top_entropy_quantile=quantile), number=0,
    )
    check(step, loss, gradient)


def test_a_masked_sequence_is_no_part_of_the_mean(monkeypatch, tmp_path, policy, toy_file):
    """The first difference above: TRL divides by 64 what the sequences that train have added up to."""
    flags = dict(mask_truncated_completions=True, max_completion_length=6)
    step, rollout, loss, gradient, _, _ = run_both(
        monkeypatch, tmp_path, policy, toy_file, {**flags, **SEQUENCE_MEAN}, {**flags, "loss_type": "grpo"}, number=1
    )
    training = sum(mask.any().item() for mask in rollout.split(rollout.loss_mask_A))
    assert 0 < training < 64
    check(step, loss * 64 / training, gradient * 64 / training)


# -------------------------------------------------------------------------------------------------------------- sft


def trl_sft(folder: str, weights: torch.Tensor, rows: list[dict], loss_type: str, completion_only: bool):
    """Loss, gradient and metrics by TRL's SFTTrainer for these rows in one padded batch."""
    from accelerate import Accelerator
    from trl import SFTTrainer

    tokenizer, args = load_tokenizer("toy"), sft.Args(completion_only_loss=completion_only)
    examples = [Example(*sft.encode_row(row, tokenizer, args), row=i) for i, row in enumerate(rows)]
    width = max(len(example.input_ids) for example in examples)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full((len(rows), width), -100)
    for i, example in enumerate(examples):
        own = torch.tensor(example.input_ids, dtype=torch.long)
        ids[i, : len(own)], mask[i, : len(own)] = own, 1
        labels[i, : len(own)] = own.where(torch.tensor(example.loss_mask), torch.tensor(-100))

    model = trl_model(folder, weights)
    trainer = SFTTrainer.__new__(SFTTrainer)
    trainer.__dict__.update(
        model=model, accelerator=Accelerator(cpu=True), aux_loss_enabled=False, compute_loss_func=None,
        label_smoother=None, _total_train_tokens=0, _tp_size=1, _metrics=defaultdict(lambda: defaultdict(list)),
        args=SimpleNamespace(loss_type=loss_type, average_tokens_across_devices=True),
        get_tp_size=lambda: 1,
    )
    loss = trainer.compute_loss(model, {"input_ids": ids, "attention_mask": mask, "labels": labels})
    loss.backward()
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()]), metrics


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
@pytest.mark.parametrize("completion_only", [True, False])
def test_sft_has_the_loss_and_the_gradient_of_trl(
    loss_type, completion_only, monkeypatch, tmp_path, policy, toy_file
):
    flags = dict(
        model_name_or_path=policy, dataset_name=toy_file, train_batch_size=64, max_steps=2, learning_rate=1.0,
        loss_type=loss_type, completion_only_loss=completion_only,
    )
    steps, _ = record(sft, monkeypatch, tmp_path / "run", **flags)
    for step in steps:  # each takes all rows of the file
        loss, gradient, metrics = trl_sft(policy, step.weights, list(load_rows(toy_file)), loss_type, completion_only)
        check(step, loss, gradient)
        for name in ("entropy", "mean_token_accuracy"):
            assert step.metrics[name] == pytest.approx(metrics[name], rel=1e-4), name
