"""Rewards: functions with TRL's signature, two graders of verifiable answers, and reward models.

    def my_reward(prompts, completions, answer, **columns) -> list[float | None]

gets lists with one entry per completion: the prompt, the completion (text; after a chat prompt a list of one assistant
message), `completion_ids`, and every column of the data set. It may be `async`. None leaves a completion unscored.

A reward model is a stock AutoModelForSequenceClassification folder with one label and its own tokenizer. It reads the
completion's last token: an end of turn, or the EOS that `common/data.py` puts after a text. `reward_mean` and
`reward_std` in its config, if any, turn the raw output into (raw - mean) / std.

Dimension key: B completions, F reward functions, T positions of one sequence, E hidden size.
"""

import asyncio
import difflib
import importlib
import importlib.util
import inspect
import math
import numbers
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging

from common.data import encode_completion, encode_prompt
from common.run import UserError, time_limit

# ------------------------------------------------------------------------------------------------ loading


@dataclass(frozen=True)
class RewardFunction:
    name: str
    function: Callable  # f(prompts, completions, **columns) -> list[float | None], sync or async
    timeout: float = 0.0  # seconds that one call may take; 0: for ever


def load_reward(
    spec: str, device: torch.device | str = "cpu", script: dict | None = None, timeout: float = 0.0
) -> RewardFunction:
    """The reward that `spec` names; a reward model is put on `device`.

    Args:
        spec: a function of the script, "package.module:function", "file.py:function", "reasoning_gym", "math_verify",
            or a reward model's folder or hub name.
        script: the script's globals(); its functions (prompts, completions, ...) go by their names alone.
        timeout: seconds that scoring one batch may take; 0: for ever.

    Raises:
        UserError: nothing of that name, a package that is missing, a model that is no reward model.
    """
    functions = {name: value for name, value in (script or {}).items() if inspect.isfunction(value)}
    wanted = {"prompts", "completions"}
    here = {name: f for name, f in functions.items() if wanted <= {*inspect.signature(f).parameters}}
    if spec in here:
        return RewardFunction(spec, here[spec], timeout)
    if spec in ("reasoning_gym", "math_verify"):
        if importlib.util.find_spec(spec) is None:
            raise UserError(f"the reward {spec} needs a package: pip install {spec.replace('_', '-')}")
        grader = reasoning_gym_reward if spec == "reasoning_gym" else math_verify_reward
        return RewardFunction(spec, grader, timeout)
    if ":" in spec:
        return RewardFunction(spec.rpartition(":")[2], _import_function(spec), timeout)
    if "/" not in spec and not Path(spec).is_dir():
        near = difflib.get_close_matches(spec, [*here, "reasoning_gym", "math_verify"], n=1)
        hint = f"did you mean {near[0]}? Or give " if near else "give "
        hint += "one of the script's functions, " * bool(here)
        raise UserError(
            f"there is no function {spec} to use as a reward; {hint}"
            "module:function, file.py:function, reasoning_gym, math_verify, or a reward model's folder"
        )
    name = Path(spec).parent.name if Path(spec).name == "final" else Path(spec).name  # runs/reward/final: reward
    return RewardFunction(name, load_reward_model(spec, torch.device(device)), timeout)


def _import_function(spec: str) -> Callable:
    source, _, name = spec.rpartition(":")
    path = Path(source).expanduser()
    if path.suffix == ".py" and not path.is_file():
        raise UserError(f"the reward {spec}: there is no file {source}")
    try:
        if path.suffix == ".py":
            module_spec = importlib.util.spec_from_file_location(str(path.resolve()), path)
            module = importlib.util.module_from_spec(module_spec)
            sys.modules[module_spec.name] = module  # dataclasses look their module up
            module_spec.loader.exec_module(module)
        else:
            module = importlib.import_module(source)
    except Exception as error:
        raise UserError(f"the reward {spec}: importing {source} raised {_where(error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        nearest = difflib.get_close_matches(name, [key for key in vars(module) if not key.startswith("_")], n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise UserError(f"the reward {spec}: {source} has no function {name}{hint}")
    return function


# ------------------------------------------------------------------------------------------------ scoring


def score(
    reward_functions: Sequence[RewardFunction],
    prompts: list[str] | list[list[dict]],
    completions: list[str],
    columns: dict[str, list],
    completion_ids: list[list[int]] | None = None,
) -> torch.Tensor:
    """Call every reward function once on the whole batch; async ones run concurrently.

    Returns:
        rewards_BF, fp32 on the CPU, NaN where a function returned None.

    Raises:
        UserError: a function that raises, wants a column that is not there, takes longer than its timeout, or returns
            something else than one finite number or None per completion.
    """
    messages = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, completions, strict=True)
    ]
    arguments = {**columns, "prompts": prompts, "completions": messages}
    if completion_ids is not None:
        arguments["completion_ids"] = completion_ids

    results = []
    for function in reward_functions:
        with _limit([function]):
            results.append(_call(function, arguments))
    waiting = [i for i, result in enumerate(results) if inspect.isawaitable(result)]
    if waiting:  # only now: a synchronous function may itself call asyncio.run
        with _limit([reward_functions[i] for i in waiting]):
            answers = asyncio.run(_await_all([(reward_functions[i], results[i]) for i in waiting]))
        for i, answer in zip(waiting, answers):
            results[i] = answer
    rewards_FB = [_as_floats(function, result, prompts) for function, result in zip(reward_functions, results)]
    return torch.tensor(rewards_FB, dtype=torch.float32).reshape(len(reward_functions), len(prompts)).T.contiguous()


def _limit(functions: list[RewardFunction]) -> AbstractContextManager[None]:
    names, seconds = " or ".join(function.name for function in functions), functions[0].timeout
    return time_limit(
        seconds,
        f"the reward function {names} took longer than --reward_timeout {seconds:g} seconds for one batch: "
        "raise it, or give 0 to wait for ever",
    )


def _call(reward: RewardFunction, available: dict[str, list]):
    """The function's result, or its coroutine; it gets everything if it takes **columns, else what it names."""
    parameters = inspect.signature(reward.function).parameters.values()
    wanted = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for parameter in parameters:
        if parameter.name in wanted and parameter.default is parameter.empty and parameter.name not in available:
            missing, there = parameter.name, ", ".join(sorted(available))
            raise UserError(f"the reward function {reward.name} needs the column {missing!r}; there are: {there}")
    takes_all = any(p.kind == p.VAR_KEYWORD for p in parameters)
    try:
        return reward.function(**{key: x for key, x in available.items() if takes_all or key in wanted})
    except Exception as error:
        raise UserError(f"the reward function {reward.name} raised {_where(error)}") from error


async def _await_all(pending: list) -> list:
    async def one(reward, awaitable):
        try:
            return await awaitable
        except Exception as error:
            raise UserError(f"the reward function {reward.name} raised {_where(error)}") from error

    return await asyncio.gather(*(one(*pair) for pair in pending))


def _as_floats(reward: RewardFunction, values, prompts: list) -> list[float]:
    returned = f"the reward function {reward.name} returned"
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, (list, tuple)):
        raise UserError(f"{returned} a {type(values).__name__}, not a list of numbers, one per completion")
    if len(values) != len(prompts):
        raise UserError(f"{returned} {len(values)} rewards for {len(prompts)} completions; it takes one for each")
    floats = []
    for value, prompt in zip(values, prompts):
        value = value.item() if hasattr(value, "item") else value
        if value is not None and not (isinstance(value, numbers.Real) and math.isfinite(value)):
            shown = textwrap.shorten(str(prompt), 100)
            raise UserError(f"{returned} {value!r}, no finite number, for the prompt {shown}; None leaves it unscored")
        floats.append(math.nan if value is None else float(value))
    return floats


def _where(error: Exception) -> str:
    """ "ValueError: no such key (my_rewards.py, line 12)": the deepest frame that is not an installed package's."""
    if isinstance(error, UserError):
        return str(error)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "site-packages" not in f.filename]
    message = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {message} ({Path(frames[-1].filename).name}, line {frames[-1].lineno})"


# ------------------------------------------------------------------------------------------------ graders


def _text(completion: str | list[dict]) -> str:
    return completion if isinstance(completion, str) else completion[0]["content"]


def reasoning_gym_reward(completions: list, entry: list[dict], **_) -> list[float]:
    """The task's own grade in [0, 1] of what stands in <answer> tags, or of the whole completion without any."""
    from reasoning_gym import get_score_answer_fn
    from reasoning_gym.utils import extract_answer

    graders = {task: get_score_answer_fn(task) for task in {row["metadata"]["source_dataset"] for row in entry}}
    answers = [extract_answer(text) or text.strip() for text in map(_text, completions)]
    return [float(graders[row["metadata"]["source_dataset"]](answer, row)) for answer, row in zip(answers, entry)]


def math_verify_reward(completions: list, answer: list | None = None, solution: list | None = None, **_) -> list:
    """1 if the completion's last (or boxed) result equals the gold one, else 0; None if no gold result can be read."""
    from math_verify import parse, verify

    gold_texts = answer if answer is not None else solution
    if gold_texts is None:
        raise UserError("math_verify needs a column answer or solution with the right result")
    rewards = []
    for completion, gold_text in zip(completions, gold_texts):
        gold = parse(str(gold_text).split("####")[-1].strip())  # GSM8K keeps its result behind ####
        rewards.append(float(verify(gold, parse(_text(completion)))) if gold else None)
    return rewards


# ------------------------------------------------------------------------------------------------ reward models


def load_reward_model(name: str, device: torch.device, max_tokens: int = 16_384) -> Callable:
    """A function (prompts, completions) -> rewards around the sequence classifier in a folder or on the hub.

    Args:
        max_tokens: padded tokens of one forward.
    """
    transformers_logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)  # unsaid, it asks on the terminal
        model, report = AutoModelForSequenceClassification.from_pretrained(
            name, dtype="auto", output_loading_info=True  # as it was trained
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"the reward {name} is neither module:function, file.py:function, reasoning_gym, math_verify, nor a reward "
            f"model's folder or hub name: {_where(error)}"
        ) from error
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"]))
        raise UserError(f"the reward model {name} has no weights for {missing}: is it one?")
    if model.config.num_labels != 1:
        raise UserError(f"the reward model {name} has {model.config.num_labels} labels; a reward is one number")
    model = model.to(device).eval()
    mean, std = getattr(model.config, "reward_mean", 0.0), getattr(model.config, "reward_std", 1.0)

    def reward(prompts: list, completions: list) -> list[float]:
        sequences = [_pair_ids(p, _text(c), tokenizer) for p, c in zip(prompts, completions)]
        order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
        raw: dict[int, float] = {}
        while order:
            rows = order[:max(1, max_tokens // len(sequences[order[0]]))]  # the first is the longest
            order = order[len(rows):]
            raw.update(zip(rows, sequence_scores(model, [sequences[i] for i in rows]).tolist()))
        return [(raw[i] - mean) / std for i in range(len(sequences))]

    return reward


@torch.no_grad()
def sequence_scores(model, sequences: list[list[int]]) -> torch.Tensor:
    """Raw scores [B], fp32. Padded on the right, read at the last real token, which is found by length.

    The stock forward looks for the last id that is not `pad_token_id`: with pad = EOS it reads one token too early.
    """
    width = max(map(len, sequences))
    ids_BT = torch.zeros(len(sequences), width, dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    for row, ids in enumerate(sequences):
        ids_BT[row, :len(ids)], mask_BT[row, :len(ids)] = torch.tensor(ids), 1
    ids_BT, mask_BT = ids_BT.to(model.device), mask_BT.to(model.device)
    if not hasattr(model, "score"):  # an encoder, which pools its first token
        return model(input_ids=ids_BT, attention_mask=mask_BT).logits[:, 0].float()
    hidden_BTE = model.base_model(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state
    last_B = mask_BT.sum(-1) - 1
    return model.score.float()(hidden_BTE[torch.arange(len(sequences)), last_B].float())[:, 0]


def _pair_ids(prompt: str | list[dict], completion: str, tokenizer) -> list[int]:
    if not completion.strip():  # a mistake in training data; but a sampler may stop at once: just the closing token
        return encode_prompt(prompt, tokenizer) + encode_completion(prompt, "0", tokenizer)[-1:]
    return encode_prompt(prompt, tokenizer) + encode_completion(prompt, completion, tokenizer)
