"""The toy task: its rows, its scores, its tokenizer and its model."""

import random
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from common.run import UserError
from common.toy import (
    demonstration, exact_match, gold, graded, prefers_first, toy_config, toy_pairs, toy_rows, toy_tokenizer,
)


def test_rows_are_the_careless_demonstrator():
    rows = toy_rows()
    assert len(rows) == 38_400
    assert {len(row["prompt"]) for row in rows} == {5, 6, 7, 8, 9}
    assert all(row["prompt"].endswith("=") and row["answer"] == gold(row["prompt"]) for row in rows)
    kinds = Counter(
        "right" if row["completion"] == row["answer"]
        else "down" if row["completion"] == row["answer"][::-1]
        else "slip"
        for row in rows
    )  # fmt: skip
    # A swap of two equal digits is no slip: it adds a little to the 35 %.
    assert abs(kinds["right"] / len(rows) - 0.36) < 0.01 and abs(kinds["down"] / len(rows) - 0.40) < 0.01
    assert all(len(row["completion"]) == len(row["answer"]) for row in rows)


def test_slips_are_one_digit_or_one_swap():
    generator, replaced, swapped = random.Random(0), 0, 0
    for _ in range(3000):
        answer = demonstration("12345678=", generator)
        differences = sum(a != b for a, b in zip(answer, "12345678", strict=True))
        replaced += differences == 1
        swapped += differences == 2
        assert differences in (0, 1, 2) or answer == "87654321"
        assert differences != 2 or sorted(answer) == sorted("12345678")
    assert abs(replaced / 3000 - 0.125) < 0.02 and abs(swapped / 3000 - 0.125) < 0.02


def test_splits_are_apart_and_fixed():
    train, test = toy_rows(size=5000, seed=3), toy_rows("test")
    assert len(test) == 512 == len({row["prompt"] for row in test})
    assert not {row["prompt"] for row in test} & {row["prompt"] for row in train}
    assert all(row["completion"] == row["answer"] for row in test)
    assert toy_rows("test", size=10, seed=5) == test[:10]
    assert toy_rows(size=50, seed=3) == train[:50] != toy_rows(size=50, seed=4)
    # The same rows in every process and every release of Python: results are about them.
    assert [row["prompt"] for row in test[:3]] == FIRST_PROMPTS
    with pytest.raises(UserError, match="train and test, not dev"):
        toy_rows("dev")


FIRST_PROMPTS = ["71404=", "6275556=", "10661116="]


def test_scores():
    answer = ["1479"] * 6
    completions = ["1479", "1497", "147", "14790", "", "9741"]
    assert exact_match(["4719="] * 6, completions, answer=answer, other=[0] * 6) == [1, 0, 0, 0, 0, 0]
    assert graded(["4719="] * 6, completions, answer=answer) == [1, 0.5, 0.75, 0.8, 0, 0]
    halved = graded(["4719="] * 6, completions, answer=answer, finish_reasons=["length", "stop"] * 3)
    assert halved == [0.5, 0.5, 0.375, 0.8, 0, 0]


def test_the_judge_prefers_the_better_answer_with_noise():
    def share(first: str, second: str, **options) -> float:
        generator = random.Random(0)
        return sum(prefers_first("4719=", first, second, generator, **options) for _ in range(4000)) / 4000

    assert abs(share("1479", "1497") - 0.9933) < 0.006  # sigmoid(0.5 / 0.1), four standard errors either way
    assert abs(share("1497", "1479", temperature=0.5) - 0.2689) < 0.03  # sigmoid(-1)
    assert abs(share("1497", "4179") - 0.5) < 0.03  # both half right
    assert share("9741", "1479") < 0.001 and share("1479", "9741") > 0.999


def test_pairs_are_two_answers_of_the_demonstrator():
    rows = toy_pairs()
    assert len(rows) == 4096 and all(list(row) == ["prompt", "chosen", "rejected", "answer"] for row in rows)
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in toy_rows(size=4096)]
    gaps = []
    for row in rows:
        assert row["answer"] == gold(row["prompt"]) and row["chosen"] != row["rejected"]
        assert len(row["chosen"]) == len(row["rejected"]) == len(row["answer"])  # length tells nothing
        chosen, rejected = graded([row["prompt"]] * 2, [row["chosen"], row["rejected"]], [row["answer"]] * 2)
        gaps.append(chosen - rejected)
    wrong = sum(gap < 0 for gap in gaps) / len(rows)
    assert sum(gap > 0 for gap in gaps) / len(rows) > 0.93 and 0.005 < wrong < 0.06, "close calls are noisy"
    rights = [sum(row[side] == row["answer"] for row in rows) / len(rows) for side in ("chosen", "rejected")]
    assert rights[0] > 0.6 and rights[1] < 0.05


def test_pairs_are_apart_and_fixed():
    test, train = toy_pairs("test"), toy_pairs(size=50)
    assert [row["prompt"] for row in test] == [row["prompt"] for row in toy_rows("test")]
    assert toy_pairs("test", size=10, seed=5) == test[:10]
    assert train == toy_pairs()[:50] and train != toy_pairs(size=50, seed=1)
    # As for the rows: pinned, for results are about them.
    assert [(row["prompt"], row["chosen"], row["rejected"]) for row in train[:2] + test[1:2]] == FIRST_PAIRS
    with pytest.raises(UserError, match="train and test, not dev"):
        toy_pairs("dev")


FIRST_PAIRS = [("756652=", "255667", "766552"), ("4447=", "4447", "7444"), ("6275556=", "2551667", "7665552")]


def test_tokenizer_and_model_survive_the_disk(tmp_path):
    toy_tokenizer().save_pretrained(tmp_path)
    torch.manual_seed(0)
    model = LlamaForCausalLM(toy_config())
    model.save_pretrained(tmp_path)
    assert sum(parameter.numel() for parameter in model.parameters()) == 133_440
    assert model.config.head_dim == 32
    for tokenizer in (toy_tokenizer(), AutoTokenizer.from_pretrained(tmp_path)):
        assert tokenizer("4719=").input_ids == [1, 9, 12, 6, 14, 3]
        assert tokenizer("0.", add_special_tokens=False).input_ids == [5, 4]
        assert tokenizer.decode([6, 9, 2]) == "14</s>" and tokenizer.decode([6, 9, 2], skip_special_tokens=True) == "14"
        assert len(tokenizer) == 16
        assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
        for row in toy_rows("test", size=20):
            ids = tokenizer(row["prompt"]).input_ids
            assert tokenizer.decode(ids, skip_special_tokens=True) == row["prompt"]
        assert tokenizer("4a").input_ids == [1, 9, 15]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([[1, 9, 12, 3]])
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
