"""reward.py: its losses against TRL and against loops, its folder against stock transformers, every cut of a step.

T21 to T23 of the list of known bugs that this project was planned with: the score is that of the last real token
whatever pads it, the head is one label and reproducible, and the model scores the ids that it was trained on.
"""

import filecmp
import json
import math
import random
import shlex
import shutil
from functools import cache
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from recording import SMOOTH, difference
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import common.rewards
import reward
from common.data import Example
from common.models import load_scorer, load_tokenizer
from common.run import launch
from common.toy import graded, toy_pairs, toy_rows

pytest_plugins = ["recording"]
CPU = torch.device("cpu")


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def stock(folder) -> torch.nn.Module:
    return AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager").eval()


@torch.no_grad()
def stock_scores(model, sequences: list[list[int]], side: str = "right", extra: int = 0) -> list[float]:
    """Of transformers' own forward on one padded batch."""
    width = max(map(len, sequences)) + extra
    pads = [[model.config.pad_token_id] * (width - len(ids)) for ids in sequences]
    ids = torch.tensor([p + i if side == "left" else i + p for i, p in zip(sequences, pads)])
    mask = torch.tensor(
        [[0] * len(p) + [1] * len(i) if side == "left" else [1] * len(i) + [0] * len(p)
         for i, p in zip(sequences, pads)]
    )  # fmt: skip
    return model(input_ids=ids, attention_mask=mask).logits[:, 0].tolist()


# ---------------------------------------------------------------------------------------------------- math by itself


@pytest.mark.parametrize("center", [None, 0.01, 0.5])
def test_pair_loss_and_its_gradient_are_those_of_a_slow_loop(center):
    generator = torch.Generator().manual_seed(0)
    score_B = (3 * torch.randn(12, generator=generator)).requires_grad_()
    margin_P = torch.rand(6, generator=generator)
    loss_P = reward.bradley_terry_loss(score_B, margin_P, center)
    loss_P.sum().backward()
    scores, margins, eta = score_B.tolist(), margin_P.tolist(), center or 0.0
    for p in range(6):
        w, l, m = scores[2 * p], scores[2 * p + 1], margins[p]
        wrong = 1 / (1 + math.exp(w - l - m))  # sigmoid(-(w - l - m))
        assert loss_P[p].item() == pytest.approx(-math.log(1 - wrong) + eta * (w + l) ** 2, rel=1e-5)
        gradient = [-wrong + 2 * eta * (w + l), wrong + 2 * eta * (w + l)]
        assert score_B.grad[2 * p : 2 * p + 2].tolist() == pytest.approx(gradient, rel=1e-5, abs=1e-7)


def test_loss_at_known_scores():
    score_B = torch.tensor([0.3, -0.2], dtype=torch.float64)
    assert reward.bradley_terry_loss(score_B, torch.zeros(1), None).item() == pytest.approx(0.474076984, abs=1e-8)
    assert reward.bradley_terry_loss(score_B, torch.ones(1), 0.01).item() == pytest.approx(0.974076984 + 1e-4, abs=1e-8)
    assert reward.rating_loss(torch.tensor([0.5]), torch.tensor([2.0])).item() == 2.25


def test_a_tie_is_half_right():
    assert reward.accuracy_of(torch.tensor([0.1, 0.0, -3.0])).tolist() == [1.0, 0.5, 0.0]


def test_calibration_is_that_of_a_slow_loop():
    generator = random.Random(0)
    confidence = [0.5 + 0.5 * generator.random() for _ in range(200)] + [0.5, 1.0]
    right = [generator.choice([0.0, 0.5, 1.0, 1.0]) for _ in confidence]
    bins: list[list[int]] = [[] for _ in range(10)]
    for i, value in enumerate(confidence):
        bins[min(9, int((value - 0.5) * 20))].append(i)
    expected = 0.0
    for members in bins:
        mean = [sum(values[i] for i in members) / len(members) for values in (right, confidence)]
        expected += len(members) / len(confidence) * abs(mean[0] - mean[1])
    error, number, _, accuracy = reward.calibration(
        torch.tensor(confidence, dtype=torch.float64), torch.tensor(right, dtype=torch.float64)
    )
    assert error.item() == pytest.approx(expected, abs=1e-12)
    assert number.tolist() == [len(members) for members in bins]
    assert accuracy[0].item() == pytest.approx(sum(right[i] for i in bins[0]) / len(bins[0]))
    one = torch.tensor([1.0], dtype=torch.float64)
    assert reward.calibration(one, one)[0] == 0  # nine empty bins are no error


def test_correlations_are_those_of_slow_loops():
    generator = random.Random(1)
    x = [generator.randrange(6) for _ in range(40)]  # with ties
    y = [a + generator.gauss(0, 2) for a in x]

    def rank(values):
        return [sum(w < v for w in values) + (sum(w == v for w in values) + 1) / 2 for v in values]

    def correlation(a, b):
        mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
        covariance = sum((p - mean_a) * (q - mean_b) for p, q in zip(a, b))
        return covariance / math.sqrt(sum((p - mean_a) ** 2 for p in a) * sum((q - mean_b) ** 2 for q in b))

    x_N, y_N = torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)
    assert reward.rank_of(x_N).tolist() == rank(x)
    assert reward.pearson(x_N, y_N).item() == pytest.approx(correlation(x, y))
    assert reward.pearson(reward.rank_of(x_N), reward.rank_of(y_N)).item() == pytest.approx(
        correlation(rank(x), rank(y))
    )
    assert math.isnan(reward.pearson(x_N, torch.ones(40, dtype=torch.float64)))


def test_parts_of_pairs():
    gap_P = torch.tensor([0.1, -5.0, 2.0, -0.2, 0.5, 1.0])
    parts = reward.parts_of(gap_P, torch.tensor([3, 0, -1, 2, 1, 1]), ["b", "a", "a", "b", "a", "a"])
    assert {name: part.tolist() for name, part in parts.items()} == {
        "margin_quintile_1": [0, 3], "margin_quintile_2": [4], "margin_quintile_3": [5], "margin_quintile_4": [2],
        "margin_quintile_5": [1], "chosen_longer": [0, 3, 4, 5], "chosen_shorter": [2], "chosen_equally_long": [1],
        "source/a": [1, 2, 4, 5], "source/b": [0, 3],
    }  # fmt: skip
    assert "chosen_shorter" not in reward.parts_of(gap_P, torch.ones(6), [])


def test_normalisation_divides_by_no_zero():
    assert reward.normalisation(torch.tensor([1.0, 3.0], dtype=torch.float64)) == (2.0, 1.0)
    assert reward.normalisation(torch.tensor([2.0, 2.0, 2.0], dtype=torch.float64)) == (2.0, 1.0)
    assert reward.normalisation(torch.tensor([2.0], dtype=torch.float64)) == (2.0, 1.0)


@pytest.mark.parametrize(
    "pad, unk, bos, chosen", [(0, 9, 1, 0), (2, 9, 1, 9), (2, None, 1, 1), (None, 2, 2, 7), (2, 2, 2, 7)]
)
def test_a_padding_token_ends_no_text(pad, unk, bos, chosen):
    token = lambda special: SimpleNamespace(special=special)
    tokenizer = SimpleNamespace(
        pad_token_id=pad, unk_token_id=unk, bos_token_id=bos,
        added_tokens_decoder={2: token(True), 8: token(True), 5: token(False), 7: token(True)},
    )  # fmt: skip
    assert reward.padding_token(tokenizer, {2, 3}) == chosen
    tokenizer.added_tokens_decoder = {}
    assert reward.padding_token(tokenizer, {0, 1, 2, 9}) is None


# ---------------------------------------------------------------------------------------------- gradients of main()


def record(monkeypatch, folder: Path, alone: bool = False, **flags):
    """(weights before, gradient, metrics) of each step of reward.main(), and the scorer, which is not saved."""
    steps, models = [], []
    with monkeypatch.context() as patch:

        def clip(optimizer, max_norm, loss, real=reward.clip_gradients):
            norm, parameters = real(optimizer, max_norm, loss), optimizer.param_groups[0]["params"]
            steps.append([torch.cat([t.detach().flatten().clone() for t in group]) for group in (
                parameters, [p.grad for p in parameters]
            )])
            return norm

        def load(*args, real=reward.load_scorer):
            model = real(*args)
            if alone:
                model.layout = "single"
                for part in (model, model.base_model):  # each has a config of its own
                    part.set_attn_implementation("sdpa")
            models.append(model)
            return model

        patch.setattr("common.run.describe_environment", lambda *_: {"run_id": "recorded"})
        patch.setattr(reward, "clip_gradients", clip)
        patch.setattr(reward, "load_scorer", load)
        patch.setattr(reward, "save_model", lambda *_: None)
        reward.main(reward.Args(output_dir=str(folder), logging_steps=1, **SMOOTH, **flags))
    logged = [line for line in lines_of(folder) if "grad_norm" in line]
    return [(*step, line) for step, line in zip(steps, logged, strict=True)], models[0]


@pytest.fixture(scope="session")
def pair_rows() -> list[dict]:
    """64 toy pairs with margins, some of replies that are cut short, so that lengths differ."""
    rows, generator = toy_pairs("train", 64), random.Random(0)
    for row in rows[::3]:
        side = generator.choice(["chosen", "rejected"])
        row[side] = row[side][: generator.randint(1, 3)]
    return [{**row, "margin": generator.choice([0, 1 / 3, 1.0])} for row in rows]


@pytest.fixture(scope="session")
def rating_rows() -> list[dict]:
    rows = toy_rows("train", 4096)
    score = graded([r["prompt"] for r in rows], [r["completion"] for r in rows], [r["answer"] for r in rows])
    return [{"prompt": r["prompt"], "completion": r["completion"], "score": s} for r, s in zip(rows, score)]


CUTS = {
    "one pair a row": dict(max_tokens_per_micro_batch=1),
    "a few pairs a row, each with its own prompts": dict(max_tokens_per_micro_batch=130, share_prompts=False),
    "all in one row, prompts twice": dict(share_prompts=False),
    "one reply a row, stock attention": dict(max_tokens_per_micro_batch=60, alone=True),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["pairs", "ratings", "lora", "gradient_checkpointing"])
def test_every_cut_of_a_step_has_the_same_gradient(kind, monkeypatch, tmp_path, policy, pair_rows, rating_rows):
    rows = rating_rows[:64] if kind == "ratings" else pair_rows
    flags = dict(
        model_name_or_path=policy, dataset_name=write(tmp_path / "train.jsonl", rows), max_steps=2, learning_rate=0.1,
        center_rewards_coefficient=0.1, train_batch_size=61, use_peft=kind == "lora",
        gradient_checkpointing=kind == "gradient_checkpointing",
    )  # fmt: skip
    whole, _ = record(monkeypatch, tmp_path / "whole", **flags)
    assert all(gradient.norm() > 0 for _, gradient, _ in whole)
    for name, cut in CUTS.items():
        steps, _ = record(monkeypatch, tmp_path / name, **{**flags, **cut})
        for (_, gradient, metrics), (_, expected, expected_metrics) in zip(steps, whole, strict=True):
            assert difference(gradient, expected) < 1e-5, name
            assert metrics == pytest.approx(expected_metrics, rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("center", [None, 0.1])
def test_loss_gradient_and_metrics_are_those_of_trl(center, monkeypatch, tmp_path, policy, pair_rows):
    """One padded batch through stock transformers and TRL's own compute_loss."""
    from collections import defaultdict

    trl = pytest.importorskip("trl")
    from accelerate import Accelerator

    [(weights, gradient, metrics)], scorer = record(
        monkeypatch, tmp_path / "run", model_name_or_path=policy, max_steps=1, learning_rate=0.1,
        dataset_name=write(tmp_path / "train.jsonl", pair_rows), center_rewards_coefficient=center,
    )
    tokenizer = load_tokenizer(policy)
    replies = {
        side: [tokenizer(r["prompt"]).input_ids + tokenizer(r[side], add_special_tokens=False).input_ids + [2]
               for r in pair_rows] for side in ("chosen", "rejected")
    }  # fmt: skip
    padded = tokenizer.pad({"input_ids": replies["chosen"] + replies["rejected"]}, return_tensors="pt")
    margin = torch.tensor([row["margin"] for row in pair_rows])
    model = AutoModelForSequenceClassification.from_config(scorer.config, attn_implementation="eager").train()
    torch.nn.utils.vector_to_parameters(weights, model.parameters())
    trainer = trl.RewardTrainer.__new__(trl.RewardTrainer)  # without __init__: no data loader, no optimiser
    trainer.__dict__.update(
        model=model, args=SimpleNamespace(center_rewards_coefficient=center), accelerator=Accelerator(cpu=True),
        _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    loss = trainer.compute_loss(model, {**padded, "margin": margin})
    loss.backward()
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert difference(gradient, torch.cat([p.grad.flatten() for p in model.parameters()])) < 1e-5
    theirs = {name: values[0] for name, values in trainer._metrics["train"].items()}
    assert {name: metrics[name] for name in theirs} == pytest.approx(theirs, rel=1e-4)


# --------------------------------------------------------------------------------------------- the folder it leaves


@pytest.fixture(scope="session")
def short_run(policy, tmp_path_factory):
    """short_run(**flags) -> folder of a run of 12 steps of 32 toy pairs, and its scores of four replies."""

    def run(**flags) -> tuple[Path, list[Example], list[float]]:
        folder, scores = tmp_path_factory.mktemp("short") / "run", []
        with pytest.MonkeyPatch.context() as patch:

            def save(model, tokenizer, where, real=reward.save_model):
                real(model, tokenizer, where)
                if where.name == "final":
                    scores.extend(reward.score_all(model, [[e] for e in EXAMPLES], "shared", 10_000).tolist())

            patch.setattr(reward, "save_model", save)
            reward.main(reward.Args(**{
                **dict(output_dir=str(folder), model_name_or_path=policy, max_steps=12, train_batch_size=32,
                       max_eval_samples=32, normalize_split="train[:64]"), **flags,
            }))  # fmt: skip
        return folder, EXAMPLES, scores

    return cache(run)


# A prompt that contains EOS (2), one reply of EOS alone, different lengths, and an unpadded longest one
EXAMPLES = [
    Example(ids, [t >= start for t in range(len(ids))], row=-1, prompt_length=start)
    for ids, start in (
        ([1, 9, 12, 2, 14, 3, 6, 9, 12, 14, 2], 6), ([1, 9, 12, 2, 14, 3, 14, 2], 6), ([1, 8, 6, 3, 2], 4),
        ([1, 13, 13, 5, 3, 5, 2, 2], 5),
    )
]  # fmt: skip


@pytest.mark.parametrize("flags", [{}, {"use_peft": True, "learning_rate": 1e-2}], ids=["full", "lora"])
def test_stock_transformers_reads_the_same_score_however_it_pads(flags, short_run):
    folder, examples, ours = short_run(**flags)
    model, sequences = stock(folder / "final"), [e.input_ids.tolist() for e in examples]
    assert max(ours) - min(ours) > 0.1
    assert list(chain(*(stock_scores(model, [ids]) for ids in sequences))) == pytest.approx(ours, abs=1e-5)
    for side in ("left", "right"):
        for extra in (0, 1, 9):
            assert stock_scores(model, sequences, side, extra) == pytest.approx(ours, abs=1e-5)


def test_a_model_whose_padding_is_its_end_of_text_gets_another(policy, short_run, tmp_path):
    source = Path(shutil.copytree(policy, tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "pad_token_id": 2}))
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(source)
    folder, examples, ours = short_run(model_name_or_path=str(source))
    model, sequences = stock(folder / "final"), [e.input_ids.tolist() for e in examples]
    saved = AutoTokenizer.from_pretrained(folder / "final")
    assert saved.pad_token_id == model.config.pad_token_id != 2
    assert saved("4719=").input_ids == tokenizer("4719=").input_ids
    assert stock_scores(model, sequences) == pytest.approx(ours, abs=1e-5)
    model.config.pad_token_id = 2  # what would have been: read a token too early
    assert stock_scores(model, sequences) != pytest.approx(ours, abs=1e-2)
    model.config.pad_token_id = None  # what is done where every special token ends texts: one by one it reads the end
    one_by_one = [model(torch.tensor([ids])).logits.item() for ids in sequences]
    assert one_by_one == pytest.approx(ours, abs=1e-5)


@pytest.mark.parametrize("flags", [{}, {"use_peft": True, "learning_rate": 1e-2}], ids=["full", "lora"])
def test_as_a_reward_it_is_normalised_over_the_references(flags, short_run, monkeypatch):
    folder, _, _ = short_run(**flags)
    rows, seen = toy_pairs("train")[:64], []

    def read(model, sequences, real=common.rewards.sequence_scores):
        seen.extend(sequences)
        return real(model, sequences)

    monkeypatch.setattr(common.rewards, "sequence_scores", read)
    function = common.rewards.load_reward(str(folder / "final")).function
    scores = torch.tensor(function([r["prompt"] for r in rows], [r["chosen"] for r in rows]))
    assert scores.mean().item() == pytest.approx(0, abs=1e-4) and scores.std(correction=0).item() == pytest.approx(1)
    # and these are the ids that it was trained on (T23)
    run = SimpleNamespace(print=lambda *_: None)
    tokenizer = load_tokenizer(str(folder / "final"))
    train = reward.load_replies("toy:sort_pairs", "train[:64]", [reward.PAIRS], tokenizer, reward.Args(), run)
    assert sorted(seen) == sorted(group[0].input_ids.tolist() for group in train.groups)


@pytest.mark.parametrize("kind", ["pairs", "ratings"])
def test_a_chat_is_scored_on_the_ids_of_its_template(kind, tmp_path, monkeypatch, short_run):
    folder, _, _ = short_run()
    tokenizer = load_tokenizer(str(folder / "final"), (
        "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ '.' if m.role == 'user' else eos_token }}{% endfor %}"
    ))
    prompt = [{"role": "user", "content": "31"}]
    row = {"prompt": prompt, "completion": [{"role": "assistant", "content": "13"}], "score": 1.0}
    if kind == "pairs":
        row = {"prompt": prompt, "chosen": row["completion"], "rejected": [{"role": "assistant", "content": "31"}]}
    run = SimpleNamespace(print=lambda *_: None)
    data = write(tmp_path / "chat.jsonl", [row])
    train = reward.load_replies(data, "train", [reward.PAIRS, reward.RATINGS], tokenizer, reward.Args(), run)
    assert train.groups[0][0].input_ids.tolist() == common.rewards._pair_ids(prompt, "13", tokenizer)


def test_head_is_one_label_and_reproducible(policy, short_run):
    heads = []
    for seed in range(20):
        torch.manual_seed(seed)
        heads.append(load_scorer(policy, torch.float32, CPU).score.weight.detach()[0])
    torch.manual_seed(3)
    assert torch.equal(load_scorer(policy, torch.float32, CPU).score.weight[0], heads[3])
    assert torch.cat(heads).std().item() == pytest.approx(65**-0.5, rel=0.08)
    folder, _, _ = short_run()
    config = json.loads((folder / "final" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"] and stock(folder / "final").num_labels == 1
    assert isinstance(config["reward_mean"], float) and config["reward_std"] > 0


@pytest.mark.parametrize("greater, step", [(None, 12), (True, 0)])
def test_the_best_is_whole_and_normalised(policy, short_run, greater, step):
    """Of the last step it is final/; of any other, too, references score 0 on average, with a deviation of 1."""
    folder, *_ = short_run(
        use_peft=True, learning_rate=1e-2, eval_steps=6, metric_for_best_model="eval/test/loss",
        greater_is_better=greater,
    )
    assert json.loads((folder / "best/best.json").read_text())["step"] == step
    folders = folder / "best", folder / "final", short_run()[0] / "final"
    best, final, without_lora = (load_file(where / "model.safetensors") for where in folders)
    assert best.keys() == final.keys() == without_lora.keys()
    assert all(best[name].equal(final[name]) for name in final) == (step == 12)
    rows, function = toy_pairs("train")[:64], common.rewards.load_reward(str(folder / "best")).function
    scores = torch.tensor(function([row["prompt"] for row in rows], [row["chosen"] for row in rows]))
    assert abs(scores.mean()) < 1e-4 and abs(scores.std(correction=0) - 1) < 1e-4


def test_the_adapter_beside_a_merged_folder_has_the_head_too(policy, short_run):
    from peft import PeftModel

    folder, examples, ours = short_run(use_peft=True, learning_rate=1e-2)
    torch.manual_seed(0)
    fresh = load_scorer(policy, torch.float32, CPU).score.weight
    base = AutoModelForSequenceClassification.from_pretrained(policy, num_labels=1)
    model = PeftModel.from_pretrained(base, folder / "adapter").eval()
    scores = [model(torch.tensor(e.input_ids.tolist())[None]).logits.item() for e in examples]
    assert scores == pytest.approx(ours, abs=1e-5)
    assert not torch.allclose(stock(folder / "final").score.weight, fresh)


# ------------------------------------------------------------------------------------------------ evaluation, resume


def test_evaluation_by_split_and_source(policy, tmp_path):
    for split in ("test", "hard"):
        rows = [{**row, "source": f"{split}{i % 3}"} for i, row in enumerate(toy_pairs("test", 40))]
        write(tmp_path / f"{split}.jsonl", rows[:30] if split == "hard" else rows)
    reward.main(reward.Args(
        output_dir=str(tmp_path / "run"), model_name_or_path=policy, max_steps=2, train_batch_size=8, eval_steps=1,
        eval_dataset_name=str(tmp_path), eval_splits=["test", "hard"], max_eval_samples=32,
    ))  # fmt: skip
    lines = lines_of(tmp_path / "run")
    assert [line["step"] for line in lines if "eval/hard/accuracy" in line] == [0, 1, 2]
    last = lines[-2]
    by_source = [last[f"eval/test/accuracy/source/test{i}"] for i in range(3)]
    assert sum(a * n for a, n in zip(by_source, (11, 11, 10))) / 32 == pytest.approx(last["eval/test/accuracy"])
    assert last["eval/test/accuracy_ci95"] == pytest.approx(
        1.96 * math.sqrt(last["eval/test/accuracy"] * (1 - last["eval/test/accuracy"]) / 32)
    )
    assert {"loss", "margin", "mean_reward", "min_reward", "max_reward", "ece", "length_correlation"} <= {
        name.removeprefix("eval/test/") for name in last
    }
    assert {path.name for path in (tmp_path / "run").glob("*.png")} == {"reliability_test.png", "reliability_hard.png"}


def test_a_resumed_run_ends_with_the_same_bytes(policy, tmp_path, monkeypatch):
    flags = dict(
        model_name_or_path=policy, max_steps=6, save_steps=2, logging_steps=1, train_batch_size=16, eval_steps=3,
        max_eval_samples=16,
    )  # fmt: skip
    reward.main(reward.Args(output_dir=str(tmp_path / "whole"), **flags))
    calls = iter(range(4))

    def stop(*args, real=reward.clip_gradients):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(reward, "clip_gradients", stop)
        reward.main(reward.Args(output_dir=str(tmp_path / "cut"), **flags))
    reward.main(reward.Args(output_dir=str(tmp_path / "cut"), resume=True, **flags))
    for name in ("metrics.jsonl", "final/model.safetensors", "final/config.json"):
        assert filecmp.cmp(tmp_path / "cut" / name, tmp_path / "whole" / name, shallow=False), name


# ------------------------------------------------------------------------------------------------------- learning


def test_flipped_labels_teach_the_opposite(policy, tmp_path):
    flipped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in toy_pairs("train", 2048)]
    reward.main(reward.Args(
        output_dir=str(tmp_path / "run"), model_name_or_path=policy, learning_rate=5e-4,
        dataset_name=write(tmp_path / "train.jsonl", flipped), eval_dataset_name="toy:sort_pairs",
    ))  # fmt: skip
    assert lines_of(tmp_path / "run")[-1]["eval/test/accuracy"] < 0.22


def test_ratings_are_learned(policy, tmp_path, rating_rows):
    write(tmp_path / "train.jsonl", rating_rows[:3584])
    write(tmp_path / "test.jsonl", rating_rows[3584:])
    reward.main(reward.Args(
        output_dir=str(tmp_path / "run"), model_name_or_path=policy, dataset_name=str(tmp_path),
        eval_dataset_name=str(tmp_path), learning_rate=1e-3,
    ))  # fmt: skip
    first, last = (lines_of(tmp_path / "run")[place] for place in (0, -1))
    score = torch.tensor([row["score"] for row in rating_rows[3584:]])
    assert last["eval/test/mse"] < 0.5 * score.var().item() < first["eval/test/mse"]
    assert last["eval/test/pearson"] > 0.75 and last["eval/test/spearman"] > 0.7
    assert "eval/test/accuracy" not in last


# ------------------------------------------------------------------------------------------------------ bad input

PAIR = {"prompt": "31=", "chosen": "13", "rejected": "31"}
RATED = {"prompt": "31=", "completion": "13", "score": 1.0}
CASES = {
    "no column rejected": ([{"prompt": "31=", "chosen": "13"}], "", ["bad.jsonl", "chosen + rejected", "score"]),
    "misspelt": ([{"prompt": "31=", "chosen": "13", "rejectd": "31"}], "", ["'rejectd'", "called 'rejected'"]),
    "equal": ([PAIR, {**PAIR, "rejected": "13"}], "", ["bad.jsonl, line 2", "equal", "--on_empty drop"]),
    "empty side": ([PAIR, {**PAIR, "chosen": " "}], "", ["bad.jsonl, line 2", "the chosen reply is empty"]),
    "empty completion": ([RATED, {**RATED, "completion": ""}], "", ["bad.jsonl, line 2", "completion is empty"]),
    "margin in words": ([{**PAIR, "margin": "big"}], "", ["bad.jsonl, line 1", "margin is 'big'", "number"]),
    "margin missing": ([{**PAIR, "margin": 1}, PAIR], "", ["bad.jsonl, line 2", "margin is None", "number"]),
    "margin true": ([{**PAIR, "margin": True}], "", ["bad.jsonl, line 1", "margin is True", "number"]),
    "score in words": ([RATED, {**RATED, "score": "good"}], "", ["bad.jsonl, line 2", "score is 'good'", "number"]),
    "score nan": ([RATED, {**RATED, "score": math.nan}], "", ["bad.jsonl, line 2", "score is nan", "number"]),
    "scores equal": ([RATED, {**RATED, "completion": "31"}], "", ["bad.jsonl", "every score is 1", "nothing to learn"]),
    "overlong on one side": (
        [PAIR, {**PAIR, "rejected": "1" * 9}], "--max_length 9",
        ["bad.jsonl, line 2", "14 tokens", "--max_length 14", "--on_overlong drop"],
    ),
    "all dropped": ([PAIR], "--max_length 4 --on_overlong drop", ["bad.jsonl (train)", "every row was dropped"]),
    "no row to evaluate": (
        [PAIR], "--eval_dataset_name toy:sort_pairs --eval_splits test[512:]", ["toy:sort_pairs", "no rows"],
    ),
    "evaluation dropped": (
        [PAIR], "--eval_dataset_name toy:sort_pairs --max_length 7 --on_overlong drop",
        ["toy:sort_pairs (test)", "every row was dropped"],
    ),
    "evaluation of another kind": (
        [RATED, {**RATED, "score": 0}], "--eval_dataset_name toy:sort_pairs", ["toy:sort_pairs", "score"],
    ),
    "too few rows": ([PAIR], "", ["1 rows", "--train_batch_size 64"]),
    "no reference": ([PAIR], "--normalize_split train[1:]", ["bad.jsonl", "train[1:]", "no rows"]),
    "not enough samples": ([PAIR], "--max_eval_samples 0", ["--max_eval_samples", "at least 1"]),
    "no model": ([PAIR], "--model_name_or_path runs/sft/final", ["runs/sft/final", "run `python sft.py` first"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_one_clear_sentence(case, tmp_path, monkeypatch, capsys):
    rows, flags, parts = CASES[case]
    write(tmp_path / "bad.jsonl", rows)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("common.run.describe_environment", lambda *_: {"run_id": "recorded"})
    with pytest.raises(SystemExit) as stop:
        launch(reward.main, reward.Args, [
            "--dataset_name", "bad.jsonl", "--model_name_or_path", "toy", "--output_dir", "out", *shlex.split(flags)
        ])  # fmt: skip
    said = capsys.readouterr().err
    print(said)
    assert stop.value.code == 1 and said.startswith("error: ") and said.count("\n") == 1
    for part in parts:
        assert part in said


def test_rows_without_a_comparison_can_be_dropped(tmp_path, capsys):
    rows = [PAIR, {**PAIR, "rejected": "13"}, {**PAIR, "chosen": ""}, {**PAIR, "prompt": "32=", "rejected": "23"}]
    reward.main(reward.Args(
        output_dir=str(tmp_path / "run"), model_name_or_path="toy", on_empty="drop", train_batch_size=2,
        dataset_name=write(tmp_path / "train.jsonl", rows), learning_rate=1e-3,
    ))  # fmt: skip
    assert "2 kept" in capsys.readouterr().out.replace("\n", " ")
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()
    assert load_file(tmp_path / "run" / "final" / "model.safetensors")["score.weight"].shape == (1, 64)
