"""Reward functions, graders and reward models: the right numbers, or one sentence about what is wrong."""

import asyncio
import math
import time

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from common.rewards import RewardFunction, load_reward, math_verify_reward, reasoning_gym_reward, score, sequence_scores
from common.run import UserError
from common.toy import toy_config, toy_tokenizer

PROMPTS = ["4719=", "31=", "880=", "5="]
COMPLETIONS = ["1479", "13", "088", ""]


def scored(function, prompts=PROMPTS, completions=COMPLETIONS, **columns) -> list:
    rewards_BF = score([RewardFunction("mine", function)], prompts, completions, columns)
    assert rewards_BF.shape == (len(prompts), 1) and rewards_BF.dtype == torch.float32
    return [None if math.isnan(x) else x for x in rewards_BF[:, 0].tolist()]


# ------------------------------------------------------------------------------------------------ calling


def test_functions_get_columns_and_may_abstain():
    def lengths(prompts, completions, weight, **columns):
        assert prompts is PROMPTS and set(columns) == {"answer"}
        return [None if w == 0 else w * len(c) for c, w in zip(completions, weight)]

    assert scored(lengths, weight=[1, 2, 0, 0.5], answer=[1] * 4) == [4.0, 4.0, None, 0.0]


def test_a_chat_prompt_brings_messages():
    chats = [[{"role": "user", "content": p}] for p in PROMPTS]

    def check(prompts, completions, **_):
        assert prompts == chats
        return [len(reply["content"]) for (reply,) in completions if reply["role"] == "assistant"]

    assert scored(check, prompts=chats) == [4, 2, 3, 0]


def test_completion_ids_are_passed_and_own_names_win():
    def check(completions, completion_ids, **columns):
        assert completions == COMPLETIONS and "prompts" in columns
        return [len(ids) for ids in completion_ids]

    columns = {"completions": ["theirs"] * 4, "completion_ids": [[9]] * 4}
    assert score([RewardFunction("f", check)], PROMPTS, COMPLETIONS, columns, [[1, 2]] * 4)[:, 0].tolist() == [2.0] * 4


def test_a_function_without_keyword_arguments_gets_what_it_names():
    def matches(completions, answer):
        return [float(c == a) for c, a in zip(completions, answer)]

    assert scored(matches, answer=COMPLETIONS, other=[0] * 4) == [1] * 4


def test_numpy_torch_and_bool_are_numbers():
    mixed = [True, False, np.float32(1), torch.tensor(0)]
    for values in (np.array([1, 0, 1, 0]), torch.tensor([1.0, 0, 1, 0]), mixed, (1, 0, 1, 0)):
        assert scored(lambda completions, values=values: values) == [1, 0, 1, 0]


def test_several_functions_are_columns_in_order_and_async_ones_overlap():
    def constant(value, pause):
        async def reward(completions):
            await asyncio.sleep(pause)
            return [value] * len(completions)

        return RewardFunction(f"wait {value}", reward)

    async def inner():
        return [7.0] * 4

    synchronous = RewardFunction("own loop", lambda completions: asyncio.run(inner()))
    start = time.perf_counter()
    rewards_BF = score([constant(1.0, 0.4), synchronous, constant(2.0, 0.4)], PROMPTS, COMPLETIONS, {})
    assert time.perf_counter() - start < 0.7
    assert rewards_BF.tolist() == [[1.0, 7.0, 2.0]] * 4
    assert score([], PROMPTS, COMPLETIONS, {}).shape == (4, 0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0] * 3, "mine returned 3 rewards for 4 completions"),
        ([1.0, "high", 0.0, 0.0], "mine returned 'high', no finite number, for the prompt 31="),
        ([1.0, 0.0, math.nan, 0.0], "mine returned nan, .* prompt 880="),
        ([math.inf, 0.0, 0.0, 0.0], "mine returned inf, .* prompt 4719="),
        ({"reward": [1.0] * 4}, "mine returned a dict"),
        (1.0, "mine returned a float"),
        (None, "mine returned a NoneType"),
    ],
)
def test_wrong_answers_are_one_sentence(values, message):
    with pytest.raises(UserError, match=message):
        scored(lambda completions: values)


def test_exceptions_name_function_and_line():
    def broken(completions, **_):
        return [1 / len(c) for c in completions]

    async def broken_later(completions, **_):
        raise KeyError("score")

    with pytest.raises(UserError, match=r"mine raised ZeroDivisionError: .* \(test_rewards.py, line \d+\)"):
        scored(broken)
    with pytest.raises(UserError, match="mine raised KeyError: 'score'"):
        scored(broken_later)
    with pytest.raises(UserError, match="mine needs the column 'solution'; there are: answer, completions, prompts"):
        scored(lambda completions, solution: [0] * 4, answer=[0] * 4)


# ------------------------------------------------------------------------------------------------ loading


def test_load_from_module_and_file(tmp_path, monkeypatch):
    reward = load_reward("common.toy:exact_match")
    assert reward.name == "exact_match"
    assert score([reward], PROMPTS, COMPLETIONS, {"answer": ["1479", "31", "088", ""]})[:, 0].tolist() == [1, 0, 1, 1]
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Box:\n    value: float\n"
        "def length(completions, **_):\n    return [Box(float(len(c))).value for c in completions]\n"
    )
    reward = load_reward(f"{tmp_path}/mine.py:length")
    assert reward.name == "length" and scored(reward.function) == [4, 2, 3, 0]
    monkeypatch.chdir(tmp_path)
    assert scored(load_reward("mine.py:length").function) == [4, 2, 3, 0]


def test_what_cannot_be_loaded_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "bad.py").write_text("import nothing_of_that_name\n")
    for spec, message in [
        ("common.toy:exact_matsch", "has no function exact_matsch; did you mean exact_match"),
        ("common.toys:exact_match", "importing common.toys raised ModuleNotFoundError"),
        ("nowhere.py:f", "there is no file nowhere.py"),
        (f"{tmp_path}/bad.py:f", r"No module named 'nothing_of_that_name' \(bad.py, line 1\)"),
        ("common.toy:VOCABULARY", "has no function VOCABULARY"),
        (str(tmp_path / "no-such-folder"), "neither module:function"),
    ]:
        with pytest.raises(UserError, match=message):
            load_reward(spec)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install math-verify"):
        load_reward("math_verify")


# ------------------------------------------------------------------------------------------------ graders


def test_reasoning_gym_grades_its_entries():
    reasoning_gym = pytest.importorskip("reasoning_gym")
    entries = [reasoning_gym.create_dataset(task, size=1, seed=1)[0] for task in ("chain_sum", "basic_arithmetic")]
    right = [entry["answer"] for entry in entries]
    assert load_reward("reasoning_gym").function is reasoning_gym_reward
    prompts = [entry["question"] for entry in entries]
    assert scored(reasoning_gym_reward, prompts, [f" {x}\n" for x in right], entry=entries) == [1, 1]
    assert scored(reasoning_gym_reward, prompts, [f"so <answer>{x}</answer>" for x in right], entry=entries) == [1, 1]
    assert max(scored(reasoning_gym_reward, prompts, ["99999", ""], entry=entries)) < 0.5
    chats = [[{"role": "user", "content": p}] for p in prompts]
    assert scored(reasoning_gym_reward, chats, right, entry=entries) == [1, 1]


def test_math_verify_reads_gold_and_answer():
    pytest.importorskip("math_verify")
    cases = [
        ("72", "so it is \\boxed{72}", 1),
        ("72", "The answer is 72.", 1),
        ("72", "The answer is 71.", 0),
        ("72", "", 0),
        ("The final answer is 7, or rather\n#### 1,200", "1200", 1),
        ("\\frac{1}{2}", "$0.5$", 1),
        ("\\frac{1}{2}", "\\boxed{\\frac{1}{3}}", 0),
        ("no number", "3", None),
        (5, "5", 1),
    ]
    gold, completions, expected = map(list, zip(*cases))
    assert scored(math_verify_reward, ["q"] * len(cases), completions, answer=gold) == expected
    assert scored(math_verify_reward, ["q"] * len(cases), completions, solution=gold) == expected
    with pytest.raises(UserError, match="needs a column answer or solution"):
        scored(math_verify_reward)


# ------------------------------------------------------------------------------------------------ reward models


def reward_model(tmp_path, **fields):
    torch.manual_seed(0)
    config = toy_config()
    config.num_labels, config.initializer_range = 1, 0.3
    for key, value in fields.items():
        setattr(config, key, value)
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    toy_tokenizer().save_pretrained(tmp_path)
    return model


def alone(model, ids: list[int]) -> float:
    """The head on the last hidden state of one unpadded sequence."""
    with torch.no_grad():
        return model.score(model.model(torch.tensor([ids])).last_hidden_state[0, -1]).item()


def test_a_reward_model_scores_the_last_token(tmp_path):
    model = reward_model(tmp_path)
    reward = load_reward(str(tmp_path))
    ids = {"4719=": [1, 9, 12, 6, 14, 3], "31=": [1, 8, 6, 3], "880=": [1, 13, 13, 5, 3], "5=": [1, 10, 3]}
    replies = [[6, 9, 12, 14, 2], [6, 8, 2], [5, 13, 13, 2], [2]]
    expected = [alone(model, ids[p] + r) for p, r in zip(PROMPTS, replies)]
    assert reward.name == tmp_path.name and max(expected) - min(expected) > 0.1
    assert scored(reward.function) == pytest.approx(expected, abs=1e-5)
    assert scored(reward.function, PROMPTS[1:2], COMPLETIONS[1:2]) == pytest.approx(expected[1:2], abs=1e-5)


def test_padding_changes_nothing_whatever_the_pad_token_is(tmp_path):
    sequences = [[1, 9, 12, 3, 6, 2], [1, 8, 3, 2, 2], [0, 0, 2], [1, 0]]
    for pad in (0, 2, None):
        model = reward_model(tmp_path, pad_token_id=pad)
        expected = [alone(model, ids) for ids in sequences]
        assert sequence_scores(model, sequences).tolist() == pytest.approx(expected, abs=1e-5)


def test_mean_and_std_of_the_config_are_applied(tmp_path):
    model = reward_model(tmp_path, reward_mean=0.75, reward_std=4.0)
    expected = (alone(model, [1, 8, 6, 3, 6, 8, 2]) - 0.75) / 4
    assert scored(load_reward(str(tmp_path)).function, ["31="], ["13"]) == pytest.approx([expected], abs=1e-5)


def test_forwards_are_cut_by_tokens_without_changing_a_reward(tmp_path):
    from common.rewards import load_reward_model

    reward_model(tmp_path)
    whole, cut = (load_reward_model(str(tmp_path), torch.device("cpu"), max_tokens=n) for n in (10_000, 12))
    assert scored(cut) == pytest.approx(scored(whole), abs=1e-5)


def test_a_reward_model_of_a_chat(tmp_path):
    model = reward_model(tmp_path)
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ '.' if m.role == 'user' else eos_token }}{% endfor %}"
    )
    tokenizer.save_pretrained(tmp_path)
    chats = [[{"role": "user", "content": "31"}], [{"role": "user", "content": "5"}]]
    expected = [alone(model, [1, 8, 6, 4, 6, 8, 2]), alone(model, [1, 10, 4, 2])]
    assert scored(load_reward(str(tmp_path)).function, chats, ["13", ""]) == pytest.approx(expected, abs=1e-5)


def test_what_is_no_reward_model_is_refused(tmp_path):
    LlamaForCausalLM(toy_config()).save_pretrained(tmp_path)
    toy_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no weights for score.weight"):
        load_reward(str(tmp_path))
    reward_model(tmp_path, num_labels=3)
    with pytest.raises(UserError, match="3 labels"):
        load_reward(str(tmp_path))
