"""Run a script's own main() and keep the gradient of every optimiser step, for tests that compare gradients.

    pytest_plugins = ["recording"]                                          # for the fixtures `policy` and `toy_file`
    steps, rollouts = record(grpo, monkeypatch, tmp_path / "run", **flags)

Updates are smooth functions of the gradient here: AdamW with an epsilon of 1 is nearly gradient descent. Its usual
update, nearly a sign, would turn rounding noise of one step into differences of the next.
"""

import json
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import pytest
import torch

import sft
from common.toy import toy_rows

SMOOTH = dict(
    lr_scheduler_type="constant", warmup_steps=0, max_grad_norm=0.0, adam_beta1=0.0, adam_beta2=0.0, adam_epsilon=1.0,
    dtype="float32",
)

# Two steps on 64 sequences, the second off policy: at this rate ratios leave the clip range on both sides.
STEP = dict(
    generation_batch_size=64, num_generations=8, max_completion_length=8, num_iterations=2, max_steps=2,
    learning_rate=0.1, reward_funcs=["common.toy:graded"], log_completions_steps=0,
)


@pytest.fixture(scope="session")
def toy_file(tmp_path_factory):
    """A few toy prompts in a file: not "toy:sort", which would be evaluated."""
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in toy_rows("train", 64)))
    return str(path)


@pytest.fixture(scope="session")
def policy(tmp_path_factory):
    """The toy after 60 steps of imitation: it stops, is often wrong, and no two prompts are alike to it."""
    folder = tmp_path_factory.mktemp("policy")
    sft.main(sft.Args(
        output_dir=str(folder / "run"), dataset_split="train[:5120]", max_steps=60, max_eval_samples=8,
    ))
    return str(folder / "run" / "final")


@dataclass
class Step:
    """One optimiser step: weights before it and summed gradient, flat as model.parameters() has them, and metrics.

    Of ppo.py's critic as well; and the policy's are None in a step in which it does not learn.
    """

    weights: torch.Tensor | None
    gradient: torch.Tensor | None
    metrics: dict[str, float]
    critic_weights: torch.Tensor | None = None
    critic_gradient: torch.Tensor | None = None


def record(script, monkeypatch, folder: Path, alone: bool = False, disturb=None, **flags) -> tuple[list[Step], list]:
    """The optimiser steps of `script.main(Args(**flags))`, and the rollouts they came from (none for sft).

    alone: pretend that the model cannot be packed, so that each sequence runs by itself under stock attention.
    disturb: called with every fresh rollout, to change it in place; the gates of step one then look the other way.
    """
    optimizers, clipped, moments, rollouts = [], {}, [], []
    with monkeypatch.context() as patch:

        def make(*args, real=script.make_optimizer):
            optimizers.append(real(*args))
            return optimizers[-1]

        def clip(optimizer, max_norm, loss, real=script.clip_gradients):
            norm = real(optimizer, max_norm, loss)
            parameters = optimizer.param_groups[0]["params"]
            clipped[optimizers.index(optimizer)] = (
                torch.cat([p.detach().flatten().clone() for p in parameters]),
                torch.cat([p.grad.flatten().clone() for p in parameters]),
            )
            return norm

        def log(run, step, metrics, *rest, real=script.Run.log):
            if clipped:
                moments.append([clipped.get(which, (None, None)) for which in range(len(optimizers))])
                clipped.clear()
            real(run, step, metrics, *rest)

        def load(*args, real, **kwargs):
            model = real(*args, **kwargs)
            if alone:
                model.layout = "single"
                for part in (model, model.base_model):  # a scorer and its body have a config each
                    part.set_attn_implementation("sdpa")
            return model

        def collect(*args, real, **kwargs):
            rollout, *rest = real(*args, **kwargs)
            if disturb is not None:
                disturb(rollout)
            rollouts.append(rollout)
            return rollout, *rest

        # Reading the version of every package would be two thirds of the time of so short a run
        patch.setattr("common.run.describe_environment", lambda *_: {"run_id": "recorded"})
        patch.setattr(script, "make_optimizer", make)
        patch.setattr(script, "clip_gradients", clip)
        patch.setattr(script.Run, "log", log)
        for name in {"load_policy", "load_scorer"} & vars(script).keys():
            patch.setattr(script, name, partial(load, real=getattr(script, name)))
        for name in {"save_model", "save_critic"} & vars(script).keys():
            patch.setattr(script, name, lambda *_: None)
        for name in {"collect", "roll_out"} & vars(script).keys():
            patch.setattr(script, name, partial(collect, real=getattr(script, name)))
        if disturb is not None:
            patch.setattr(script.Run, "gate", lambda *_: None)
        script.main(script.Args(output_dir=str(folder), logging_steps=1, **(SMOOTH | flags)))

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "grad_norm" in line]
    steps = [Step(*policy, line, *chain(*critic)) for (policy, *critic), line in zip(moments, logged, strict=True)]
    return steps, rollouts


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2 distance."""
    return ((actual - expected).norm() / expected.norm()).item()
