"""benchmark/judge.py: its numbers, held to loops and to known cases, and a whole evaluation of toy policies."""

import json
import math
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification

from benchmark import judge
from common.data import Example
from common.models import load_policy, load_tokenizer
from common.run import UserError, launch
from common.toy import toy_config, toy_tokenizer

pytest_plugins = ["recording"]

SMALL = dict(num=96, max_completion_length=12, gold="common.toy:graded", proxy="common.toy:exact_match")


def undecided(prompts, completions, **_):
    return [None] * len(completions)


@pytest.fixture(scope="module")
def models(policy, tmp_path_factory):
    """The toy, a copy of it, and two policies that noise has taken away from it: folders as runs leave them."""
    runs, noise = tmp_path_factory.mktemp("runs"), torch.Generator().manual_seed(0)
    folders = []
    for label, scale in (("start", 0.0), ("copy", 0.0), ("ppo_beta0.5", 0.02), ("ppo_beta0.1", 0.06)):
        model = AutoModelForCausalLM.from_pretrained(policy)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += scale * torch.randn(parameter.shape, generator=noise)
        folders.append(str(runs / label / "final"))
        model.save_pretrained(folders[-1])
        toy_tokenizer().save_pretrained(folders[-1])
    return folders


def judged(folder, **flags) -> dict:
    judge.main(judge.Args(out=str(folder), **{**SMALL, **flags}))
    return json.loads((folder / "judged.json").read_text())


# ---------------------------------------------------------------------------------------------------------------- math


def test_mean_and_interval():
    mean, half = judge.mean_and_ci95(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    assert mean == 3 and half == pytest.approx(1.96 * math.sqrt(14 / 3) / 2)
    assert judge.mean_and_ci95(torch.tensor([5.0])) == (5.0, 0.0)


def test_win_rate():
    start = torch.zeros(100)
    gold = torch.tensor([1.0] * 30 + [0.0] * 40 + [-1.0] * 30)
    share, low, high = judge.win_rate(gold, start)
    assert share == 0.5 and (low, high) == pytest.approx((0.40383, 0.59617), abs=1e-5)  # Wilson's for 50 of 100
    assert judge.win_rate(gold.abs(), start)[0] == 0.8
    share, low, high = judge.win_rate(start + 1, start)
    assert share == 1 and (low, high) == pytest.approx((0.96300, 1), abs=1e-5)
    assert judge.win_rate(start - 1, start)[:2] == pytest.approx((0, 0))


def test_names():
    assert [judge.label_of(name) for name in ("runs/x/ppo_beta0.05/final", "final", "runs/dpo/", "a/Smol.Q4.gguf")] == [
        "ppo_beta0.05", "final", "dpo", "Smol.Q4"
    ]  # fmt: skip
    assert judge.method_of("ppo_beta0.05") == ("ppo", 0.05, "")
    assert judge.method_of("toy_ppo_beta1e-3_seed2") == ("toy_ppo", 1e-3, "_seed2")
    assert judge.method_of("beta_dpo") == ("beta_dpo", None, "")


@pytest.mark.parametrize("max_tokens", [16, 10_000])
def test_sequence_logprobs(models, max_tokens):
    """One sequence at a time through the stock model; two completions of one prompt among them."""
    tokenizer, stock = load_tokenizer(models[0]), AutoModelForCausalLM.from_pretrained(models[0])
    pairs = [("413=", "134"), ("413=", "431"), ("9=", "9"), ("52718=", "12578")]
    examples, expected = [], []
    for row, (prompt, completion) in enumerate(pairs):
        ids, reply = tokenizer(prompt).input_ids, tokenizer(completion, add_special_tokens=False).input_ids + [2]
        examples.append(Example(ids + reply, [False] * len(ids) + [True] * len(reply), row, len(ids)))
        with torch.no_grad():
            logprobs = stock(torch.tensor([ids + reply])).logits[0].log_softmax(-1)
        expected.append(sum(logprobs[len(ids) + t - 1, token].item() for t, token in enumerate(reply)))
    model = load_policy(models[0], torch.float32, torch.device("cpu"))
    actual = judge.sequence_logprobs(model, examples, max_tokens)
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------------------------------- whole


def test_toy_policies(models, tmp_path, capsys):
    result = judged(tmp_path / "out", models=models)
    start, copy, near, far = result["policies"]
    assert [one["label"] for one in result["policies"]] == ["start", "copy", "ppo_beta0.5", "ppo_beta0.1"]
    assert copy["kl"] == 0 and copy["win_rate"] == 0.5  # the same random numbers: the same completions
    same = {name: value for name, value in start.items() if name not in ("label", "model")}
    assert same.items() <= copy.items()
    assert 0.5 * near["kl_ci95"] < near["kl"] < far["kl"]
    assert far["gold"] < start["gold"] and far["win_rate_ci95"][0] < far["win_rate"] < 0.5
    assert 0 < start["proxy"] < start["gold"] < 1 and 4 < start["mean_length"] < 12 and start["stopped"] > 0.5
    assert result["prompts"] == 96 and result["settings"]["gold"] == "common.toy:graded"
    assert {"command", "git_commit", "packages", "cpus"} <= result["environment"].keys()

    table = capsys.readouterr().out.strip().splitlines()
    assert len(table) == 2 + len(models) and {line.count("|") for line in table} == {8}
    assert (tmp_path / "out" / "frontier.png").stat().st_size > 10_000
    samples = (tmp_path / "out" / "samples.md").read_text()
    assert samples.count("\n> ") == judge.Args.num_samples and samples.count("| ppo_beta0.5 |") == 8


def test_the_same_run_twice(models, tmp_path):
    first, again = (judged(tmp_path / name, models=models[::3], num=16) for name in ("first", "again"))
    assert first["policies"] == again["policies"]
    other = judged(tmp_path / "other", models=models[::3], num=16, seed=1)
    assert first["policies"] != other["policies"]


def test_gold_hears_who_did_not_stop(models, tmp_path):
    """common.toy:graded halves an answer that was cut; exact_match knows no such thing."""
    cut = judged(tmp_path / "cut", models=models[:2], num=16, max_completion_length=1)["policies"][0]
    assert cut["stopped"] < 0.2 and cut["gold"] < 0.5 / 4  # of 4 to 8 positions at most one is right


def test_a_reward_model_as_proxy(models, tmp_path):
    config = toy_config()
    config.num_labels = 1
    torch.manual_seed(0)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "reward" / "final")
    toy_tokenizer().save_pretrained(tmp_path / "reward" / "final")
    proxy = str(tmp_path / "reward" / "final")
    start, far = judged(tmp_path / "out", models=models[::3], num=16, proxy=proxy)["policies"]
    assert start["proxy"] != far["proxy"] and start["proxy_ci95"] > 0


@pytest.mark.parametrize("case", ["alone", "twins", "vocabulary", "abstains", "overlong"])
def test_mistakes(models, tmp_path, case):
    flags, models = {}, models[:2]
    if case == "alone":
        models = models[:1]
    elif case == "twins":
        models = [models[0], models[0]]
    elif case == "vocabulary":
        shutil.copytree(models[1], tmp_path / "other")
        tokenizer = toy_tokenizer()
        tokenizer.add_tokens(["!"])
        tokenizer.save_pretrained(tmp_path / "other")
        models = [models[0], str(tmp_path / "other")]
    elif case == "abstains":
        flags = {"gold": f"{__file__}:undecided"}
    else:
        flags = {"max_prompt_length": 2, "on_overlong": "drop"}
    sentences = {
        "alone": "at least one policy", "twins": "the same name", "vocabulary": "another vocabulary",
        "abstains": "unscored", "overlong": "raise it",
    }
    with pytest.raises(UserError, match=sentences[case]):
        judged(tmp_path / "out", models=models, num=4, **flags)
    assert not (tmp_path / "out").exists()


def test_flags_before_and_behind_the_models(models, tmp_path, capsys):
    gold, rest = ["--gold", "common.toy:exact_match"], ["--proxy", "common.toy:graded", "--num", "4", "--out"]
    launch(judge.main, judge.Args, [*models[:2], *gold, *rest, str(tmp_path / "behind")])
    launch(judge.main, judge.Args, [*gold, *rest, str(tmp_path / "before"), *models[:2]])
    first, again = (json.loads((tmp_path / name / "judged.json").read_text()) for name in ("behind", "before"))
    assert first["policies"] == again["policies"]
