"""benchmark/ppo_stories.sh in short: a pretrained model of 260,032 parameters learns to go on positively."""

import importlib.util
import itertools
import json
import os
import sys
from pathlib import Path

import pytest

import grpo
import ppo
import rloo
from common.rewards import load_reward, score
from common.run import UserError

ROOT = Path(ppo.__file__).parent
MODELS = Path(os.environ.get("POSTSCRIPTS_MODELS", ROOT.parent / "shared" / "models"))
REWARD = f"{ROOT / 'benchmark' / 'vader.py'}:positive"
needs_vader = pytest.mark.skipif(
    importlib.util.find_spec("vaderSentiment") is None, reason="vaderSentiment is not installed"
)
needs_model = pytest.mark.skipif(
    not (MODELS / "stories260K").is_dir(),
    reason=f"no stories260K in {MODELS}; set POSTSCRIPTS_MODELS to a folder that holds it",
)
HEROES = itertools.product(("small", "big", "clever", "lonely"), ("dog", "cat", "frog", "bird"), ("Tim", "Lily"))
PROMPTS = [f"Once upon a time, there was a {size} {animal} named {name}." for size, animal, name in HEROES]
SHORT = dict(
    model_name_or_path=str(MODELS / "stories260K"), reward_funcs=[REWARD], max_completion_length=32,
    generation_batch_size=128, num_generations=8, steps_per_generation=2, num_iterations=2, max_steps=9,
    learning_rate=1e-3, beta=0.02, log_completions_steps=0,
)  # fmt: skip
SCRIPTS = {  # as in benchmark/ppo_stories.sh
    "ppo": (ppo, dict(missing_eos="none", lam=1.0)),
    "rloo": (rloo, {}),
    "grpo": (grpo, dict(kl_in="reward", kl_estimator="k1")),
}


def rollouts(name: str, folder: Path, **flags) -> list[dict]:
    """What each rollout logged at its first optimiser step."""
    script, own = SCRIPTS[name]
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    output_dir = str(folder / "run")
    script.main(script.Args(output_dir=output_dir, dataset_name=str(prompts), **{**SHORT, **own, **flags}))
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()][::4]


@needs_vader
@needs_model
@pytest.mark.parametrize("name", SCRIPTS)
def test_stories_become_positive(name, tmp_path):
    """Three rollouts of 128 completions; their mean has a standard error of .03 at most."""
    first, _, last = rollouts(name, tmp_path)
    noise = (first["reward_std"] ** 2 / 128 + last["reward_std"] ** 2 / 128) ** 0.5
    assert last["reward"] > first["reward"] + 4 * noise
    assert first["completions/clipped_ratio"] > 0.9, "EOS was never trained"
    kl = last["objective/kl"] if name == "ppo" else last["kl"]
    assert 0 < (kl * last["completions/mean_length"] if name == "grpo" else kl) < 10


@needs_vader
def test_vader_reads_the_completion_and_not_the_prompt():
    reward = load_reward(REWARD)
    texts = ["She was very happy and loved it.", "She was happy.", "She saw a box.", "She was not happy.", ""]
    happy_B = score([reward], ["Once there was a girl."] * 5, texts, {})[:, 0].tolist()
    assert 1 >= happy_B[0] > happy_B[1] > happy_B[2] == 0 == happy_B[4] > happy_B[3] >= -1
    assert score([reward], ["A terrible, sad, lonely day."] * 5, texts, {})[:, 0].tolist() == happy_B


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(UserError, match="pip install vaderSentiment"):
        score([load_reward(REWARD)], ["Once"], ["upon a time"], {})
