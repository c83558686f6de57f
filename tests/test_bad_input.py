"""A mistake of the user gets one clear sentence: which file, which row, what to do. No traceback, no step taken.

`pytest tests/test_bad_input.py -rP` prints every sentence, to be read as somebody would who has never seen this code.
"""

import gzip
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dpo
import grpo
import kto
import orpo
import ppo
import reward
import rloo
import sft
from common.run import UserError, launch

ROOT = Path(grpo.__file__).parent
SCRIPTS = {"sft": sft, "grpo": grpo, "dpo": dpo, "kto": kto, "orpo": orpo, "reward": reward, "rloo": rloo, "ppo": ppo}
PAIRED = "--dataset_name pairs.jsonl --model_name_or_path toy --chat_template chat.jinja --train_batch_size 4"
USUAL = {
    "sft": "--dataset_name good.jsonl",
    **dict.fromkeys(("grpo", "rloo", "ppo"), "--dataset_name good.jsonl --model_name_or_path toy"),
    "dpo": PAIRED, "orpo": PAIRED, "reward": f"{PAIRED} --normalize_split train",
    "kto": PAIRED.replace("pairs", "labelled"),
}  # fmt: skip

GOOD = [{"prompt": f"{n}=", "completion": str(n)[::-1], "answer": str(n)[::-1]} for n in range(43, 51)]
LABELLED = [{"prompt": f"{n}=", "completion": str(n), "label": n % 2 == 0} for n in range(45, 53)]
PAIRS = [{"prompt": f"{n}=", "chosen": str(n)[::-1], "rejected": str(n)} for n in range(45, 53)]
REWARDS = """
def raises(prompts, completions, **_):
    return [1 / 0 for _ in prompts]
def nan(prompts, completions, **_):
    return [float("nan")] * len(prompts)
def short(prompts, completions, **_):
    return [1.0, 2.0]
def nothing(prompts, completions, **_):
    pass
def words(prompts, completions, **_):
    return ["good"] * len(prompts)
def wants_solution(prompts, completions, solution):
    return [0.0] * len(prompts)
"""

# command, what the sentence has to say; the flags of USUAL come first
CASES = [
    # the columns and rows of a data set
    ("sft --dataset_name strange.jsonl", ["strange.jsonl", "prompt + completion", "has question, reply"]),
    ("sft --dataset_name misspelt.jsonl", ["misspelt.jsonl", "'promt'", "called 'prompt'"]),
    ("grpo --dataset_name misspelt.jsonl", ["misspelt.jsonl", "'promt'", "called 'prompt'"]),
    ("sft --dataset_name empty.jsonl", ["empty.jsonl", "no rows"]),
    ("grpo --dataset_name empty.jsonl", ["empty.jsonl", "no rows"]),
    ("sft --dataset_name good.jsonl --dataset_split train[8:]", ["good.jsonl", "train[8:]", "no rows"]),
    ("sft --dataset_name hole.jsonl", ["hole.jsonl, line 4", "completion is empty", "--on_empty drop"]),
    ("sft --dataset_name ragged.jsonl", ["ragged.jsonl, line 9", "'completion'"]),
    ("sft --dataset_name typed.jsonl", ["typed.jsonl, line 9", "type"]),
    ("grpo --dataset_name typed.jsonl", ["typed.jsonl, line 9", "type"]),
    ("sft --max_length 4", ["good.jsonl, line 1", "7 tokens", "--max_length 7", "--on_overlong drop", "truncate"]),
    ("grpo --max_prompt_length 3", ["good.jsonl, line 1", "4 tokens", "--max_prompt_length 4", "--on_overlong drop"]),
    ("sft --dataset_name chat.jsonl", ["chat.jsonl, line 1", "chat template", "--chat_template"]),
    ("grpo --dataset_name chat_prompts.jsonl", ["chat_prompts.jsonl, line 1", "chat template", "--chat_template"]),
    # the bytes of a file
    ("sft --dataset_name gud.jsonl", ["gud.jsonl does not exist", "good.jsonl"]),
    ("sft --dataset_name latin.jsonl", ["latin.jsonl, line 9", "not UTF-8", "convert"]),
    ("grpo --dataset_name latin.jsonl", ["latin.jsonl, line 9", "not UTF-8"]),
    ("sft --dataset_name cut.jsonl", ["cut.jsonl, line 9", "cut short"]),
    ("grpo --dataset_name cut.jsonl", ["cut.jsonl, line 9", "cut short"]),
    ("sft --dataset_name cut.jsonl.gz", ["cut.jsonl.gz, line ", "damaged or cut short"]),
    ("grpo --dataset_name cut.jsonl.gz", ["cut.jsonl.gz, line ", "damaged or cut short"]),
    # rewards
    ("grpo --reward_funcs rewards.py:raises", ["raises", "ZeroDivisionError", "rewards.py, line 3"]),
    ("grpo --reward_funcs rewards.py:nan", ["nan", "no finite number", "prompt"]),
    ("grpo --reward_funcs rewards.py:short", ["short", "2 rewards for 256 completions"]),
    ("grpo --reward_funcs rewards.py:nothing", ["nothing", "not a list of numbers"]),
    ("grpo --reward_funcs rewards.py:words", ["words", "'good'", "no finite number"]),
    ("grpo --reward_funcs rewards.py:wants_solution", ["wants_solution", "'solution'", "answer"]),
    ("grpo --reward_funcs rewards.py:raise", ["rewards.py has no function raise", "did you mean raises?"]),
    ("grpo --reward_funcs awards.py:raises", ["no file awards.py"]),
    ("grpo --reward_funcs exact_macth", ["exact_macth", "module:function"]),
    ("grpo --reward_weights 1 2", ["2 --reward_weights for 1 --reward_funcs"]),
    ("sft --eval_reward_funcs rewards.py:nann", ["rewards.py has no function nann", "did you mean nan?"]),
    # numbers that do not go together
    ("grpo --generation_batch_size 250", ["250", "--num_generations 8", "256"]),
    ("grpo --steps_per_generation 3", ["--generation_batch_size 256", "--steps_per_generation 3"]),
    ("grpo --num_generations 1", ["--num_generations", "at least 2"]),
    ("grpo --max_completion_length 61", ["65 tokens", "takes 64", "lower --max_completion_length"]),
    # numbers and names that mean nothing
    ("sft --train_batch_size 0", ["--train_batch_size"]),
    ("sft --logging_steps 0", ["--logging_steps"]),
    ("sft --lr_scheduler_type cosinus", ["--lr_scheduler_type", "cosine"]),
    ("sft --max_tokens_per_micro_batch 0", ["--max_tokens_per_micro_batch"]),
    ("sft --num_train_epochs 0", ["--num_train_epochs"]),
    ("grpo --generation_batch_size 0", ["--generation_batch_size"]),
    ("grpo --num_generations 0", ["--num_generations"]),
    ("grpo --num_iterations 0", ["--num_iterations"]),
    ("grpo --steps_per_generation 0", ["--steps_per_generation"]),
    ("grpo --temperature 0", ["--temperature"]),
    ("grpo --max_completion_length 0", ["--max_completion_length"]),
    ("grpo --max_prompt_length 2 --on_overlong drop", ["good.jsonl", "--max_prompt_length"]),
    ("grpo --reward_funcs torch", ["torch"]),
    ("grpo --reward_funcs Counter", ["Counter", "no function"]),
    # models, folders, packages
    ("sft --model_name_or_path runs/mine/final", ["runs/mine/final", "no such folder"]),
    ("grpo --model_name_or_path runs/sft/final", ["runs/sft/final", "no such folder", "run `python sft.py` first"]),
    ("grpo --model_name_or_path hollow", ["hollow", "no config.json"]),
    ("grpo --use_vllm", ["vLLM is not installed", "setup.sh", "leave --use_vllm out"]),
    ("sft --output_dir taken", ["taken already holds a run", "--resume", "another --output_dir"]),
    ("grpo --output_dir taken", ["taken already holds a run", "--resume", "another --output_dir"]),
    ("sft --output_dir taken --resume", ["other flags", "seed (was 3, now 0)"]),
    # flags
    ("sft --config typo.yaml", ["typo.yaml", "`learning_rat`", "`learning_rate`?"]),
    ("grpo --config wrong.yaml", ["wrong.yaml", "`max_steps: many`"]),
    ("sft --loss_type nnl", ["--loss_type", "'nnl'", "'nll'", "'dft'"]),
    ("grpo --surrogate clop", ["--surrogate", "'clop'", "'clip'"]),
    ("sft --learning_rat 1", ["--learning_rat", "Perhaps you meant", "--learning_rate"]),
    ("grpo --num_generation 4", ["--num_generation", "Perhaps you meant", "--num_generations"]),
    # labels
    ("kto --dataset_name label_text.jsonl", ["label_text.jsonl, line 4", "true", "false", "'yes'"]),
    ("kto --dataset_name label_number.jsonl", ["label_number.jsonl, line 4", "true", "false", "is 1"]),
    ("kto --dataset_name label_null.jsonl", ["label_null.jsonl, line 4", "true", "false", "None"]),
    ("kto --dataset_name liked.jsonl", ["liked.jsonl", "every label is True", "add others"]),
    ("kto --dataset_name disliked.jsonl", ["disliked.jsonl", "every label is False", "add others"]),
    ("kto --dataset_name one_prompt.jsonl", ["one_prompt.jsonl", "one prompt", "--loss_type apo_zero_unpaired"]),
    ("kto --dataset_name lable.jsonl", ["lable.jsonl", "'lable'", "called 'label'"]),
    ("kto --dataset_name good.jsonl", ["good.jsonl", "prompt + completion + label or chosen + rejected"]),
    # losses
    ("dpo --loss_type sigmod", ["--loss_type", "'sigmod'", "'sigmoid'"]),
    ("dpo --loss_type sigmoid sft --loss_weights 1", ["1 --loss_weights", "2 of --loss_type"]),
    ("dpo --loss_type sigmoid sft sigmoid", ["--loss_type", "each once"]),
    ("dpo --loss_type exo_pair", ["exo_pair", "--label_smoothing", "above 0"]),
    ("dpo --label_smoothing 0.5", ["--label_smoothing", "below 0.5"]),
    ("dpo --loss_type nca_pair --f_divergence_type js_divergence", ["js_divergence", "no meaning", "nca_pair"]),
    ("dpo --loss_type sigmoid aot --use_weighting", ["--use_weighting", "aot"]),
    ("dpo --sync_ref_model --precompute_ref_log_probs", ["--sync_ref_model", "not precomputed"]),
    ("kto --sync_ref_model --precompute_ref_log_probs", ["--sync_ref_model", "not a precomputed"]),
    ("dpo --sync_ref_model --loss_type simpo", ["--sync_ref_model", "not none"]),
    ("dpo --beta 0", ["--beta", "above 0"]),
    ("kto --beta 0", ["--beta", "above 0"]),
    ("dpo --ref_model_sync_steps 0", ["--ref_model_sync_steps"]),
    ("reward --max_eval_samples 0", ["--max_eval_samples"]),
    ("reward --normalize_split tain", ["pairs.jsonl", "no split 'tain'"]),
]  # fmt: skip
PREFERENCES = [  # the same for all that take pairs
    ("--dataset_name equal.jsonl", ["equal.jsonl, line 4", "are equal", "--on_empty drop"]),
    ("--dataset_name all_equal.jsonl --on_empty drop", ["all_equal.jsonl", "every row was dropped", "8 dropped"]),
    ("--dataset_name half.jsonl", ["half.jsonl, line 4", "rejected reply is empty", "--on_empty drop"]),
    ("--dataset_name null.jsonl", ["null.jsonl, line 4", "the rejected reply is missing", "--on_empty drop"]),
    ("--dataset_name ragged_pairs.jsonl", ["ragged_pairs.jsonl, line 9", "'rejected'", "only prompt, chosen"]),
    ("--dataset_name choosen.jsonl", ["choosen.jsonl", "'choosen'", "called 'chosen'"]),
    ("--dataset_name long.jsonl --max_length 10", ["long.jsonl, line 4", "15 tokens", "--max_length 15", "drop"]),
    ("--dataset_name apart.jsonl", ["apart.jsonl, line 4", "so there is no prompt", "give a column prompt"]),
    ("--dataset_name chats_apart.jsonl", ["chats_apart.jsonl, line 4", "no message in common", "column prompt"]),
    ("--dataset_name chats_asked.jsonl", ["chats_asked.jsonl, line 4", "whole conversations", "not the prompt"]),
    ("--dataset_name chats_mixed.jsonl", ["chats_mixed.jsonl, line 4", "both texts or both lists", "str and list"]),
    ("--dataset_name chats_half.jsonl", ["chats_half.jsonl, line 4", "chosen reply is empty", "--on_empty drop"]),
    ("--train_batch_size 9", ["8 ", "less than one step", "--train_batch_size 9", "lower", "--max_steps"]),
    ("--train_batch_size 0", ["--train_batch_size"]),
    ("--output_dir taken", ["taken already holds a run", "--resume", "another --output_dir"]),
    ("--output_dir taken --resume", ["other flags", "seed (was 3, now 0)"]),
    ("--model_name_or_path runs/sft/final", ["runs/sft/final", "no such folder", "run `python sft.py` first"]),
]  # fmt: skip
CASES += [(f"{script} {flags}", parts) for script in ("dpo", "kto", "orpo", "reward") for flags, parts in PREFERENCES]
CASES += [
    (command.replace("grpo", script, 1), parts) for command, parts in CASES for script in ("rloo", "ppo")
    if command.startswith("grpo") and not re.search("num_generations|surrogate", f"{command} {parts}")
]  # fmt: skip
CASES += [
    ("rloo --num_generations 1", ["--num_generations", "at least 2"]),
    ("rloo --baseline greedy --dynamic_sampling", ["--baseline greedy", "--dynamic_sampling"]),
    ("ppo --kl_target 6 --kl_horizon 100", ["--kl_horizon", "--generation_batch_size"]),
    ("ppo --kl_in loss", ["k1", "--kl_estimator k3_corrected"]),
    ("ppo --critic_learning_rate -1", ["--critic_learning_rate"]),
    ("ppo --cliprange_value -1", ["--cliprange_value"]),
    ("ppo --reward_clip_range 1 -1", ["--reward_clip_range"]),
    ("rloo --reward_clip_range 1 -1", ["--reward_clip_range"]),
]
HELD_OUT = "--eval_dataset_name pairs.jsonl --eval_split train --eval_reward_funcs rewards.py:"
CASES += [
    case for script in ("dpo", "kto", "orpo") for case in (
        (f"{script} {HELD_OUT}nann", ["rewards.py has no function nann", "did you mean nan?"]),
        (f"{script} {HELD_OUT}nan --max_completion_length 61", ["65 tokens", "takes 64", "--max_completion"]),
    )
]  # fmt: skip
DROPPED = [  # flags, what the ledger says
    ("--dataset_name equal.jsonl --on_empty drop", "7 kept (0 of them truncated), 1 dropped (equal)"),
    ("--dataset_name half.jsonl --on_empty drop", "7 kept (0 of them truncated), 1 dropped (empty)"),
    ("--dataset_name chats_half.jsonl --on_empty drop", "7 kept (0 of them truncated), 1 dropped (empty)"),
    ("--dataset_name long.jsonl --max_length 10 --on_overlong drop", "7 kept (0 of them truncated), 1 dropped (over"),
    ("--dataset_name long.jsonl --max_length 10 --on_overlong truncate", "8 kept (1 of them truncated);"),
]  # fmt: skip


def write_preferences(folder: Path) -> None:
    """Pairs and labelled replies in which mostly the row of line 4 is wrong."""

    def write(name: str, rows: list[dict], **in_line_4) -> None:
        rows = [row | (in_line_4 if i == 3 else {}) for i, row in enumerate(rows)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def chat(*contents: str) -> list[dict]:
        return [{"role": role, "content": content} for role, content in zip(("user", "assistant"), contents)]

    write("pairs", PAIRS)
    write("equal", PAIRS, chosen="84", rejected="84")
    write("all_equal", [row | {"rejected": row["chosen"]} for row in PAIRS])
    write("half", PAIRS, rejected="")
    write("null", PAIRS, rejected=None)
    write("long", PAIRS, rejected="48" * 5)
    write("ragged_pairs", [*PAIRS, {"prompt": "53=", "chosen": "35"}])
    write("choosen", [{"prompt": "45=", "choosen": "45", "rejected": "54"}])
    write("apart", [{"chosen": "45= 45", "rejected": "45= 54"}] * 8, chosen="84= 48")
    chats = [{side: chat(row["prompt"], row[side]) for side in ("chosen", "rejected")} for row in PAIRS]
    write("chats_apart", chats, rejected=chat("84=", "84"))
    write("chats_asked", chats, prompt="84=")
    write("chats_mixed", chats, chosen="84")
    write("chats_half", chats, chosen=chat("48=", ""))
    (folder / "chat.jinja").write_text("{% for m in messages %}{{ m.content }}{{ '</s>' * loop.index0 }}{% endfor %}")
    write("labelled", LABELLED)
    write("lable", [{"prompt": "45=", "completion": "45", "lable": True}])
    for name, label in (("text", "yes"), ("number", 1), ("null", None)):
        write(f"label_{name}", LABELLED, label=label)
    write("liked", [row | {"label": True} for row in LABELLED])
    write("disliked", [row | {"label": False} for row in LABELLED])
    write("one_prompt", [row | {"prompt": "45="} for row in LABELLED])


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mistakes")

    def write(name: str, rows: list[dict], tail: bytes = b"") -> bytes:
        content = "".join(json.dumps(row) + "\n" for row in rows).encode() + tail
        (folder / name).write_bytes(content)
        return content

    write("good.jsonl", GOOD)
    write("empty.jsonl", [])
    write("strange.jsonl", [{"question": "31=", "reply": "13"}])
    write("misspelt.jsonl", [{"promt": row["prompt"], "completion": row["completion"]} for row in GOOD])
    write("hole.jsonl", [*GOOD[:3], {"prompt": "34=", "completion": "", "answer": ""}, *GOOD[4:]])
    write("ragged.jsonl", [*GOOD, {"prompt": "39="}])
    write("typed.jsonl", [*GOOD, {"prompt": 39, "completion": "39"}])
    question, reply = {"role": "user", "content": "31="}, {"role": "assistant", "content": "13"}
    write("chat.jsonl", [{"messages": [question, reply]}])
    write("chat_prompts.jsonl", [{"prompt": [question], "answer": "13"}])
    write("latin.jsonl", GOOD, '{"prompt": "39=", "completion": "é"}\n'.encode("latin-1"))
    write("cut.jsonl", GOOD, b'{"prompt": "39=", "comple')
    whole = gzip.compress(write("whole.jsonl", GOOD * 500))
    (folder / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (folder / "rewards.py").write_text(REWARDS)
    (folder / "hollow").mkdir()
    (folder / "taken").mkdir()
    (folder / "taken" / "config.yaml").write_text("seed: 3\n")
    (folder / "taken" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.7}\n')
    write_preferences(folder)
    (folder / "typo.yaml").write_text("learning_rat: 0.1\n")
    (folder / "wrong.yaml").write_text("max_steps: many\n")
    return folder


@pytest.fixture
def complain(files, tmp_path, monkeypatch, capsys):
    """complain("sft --flag value") -> what `python sft.py --flag value` says on stderr; it leaves with status 1."""

    def refuse_to_train(*_, **__):
        raise AssertionError("the optimiser made a step")

    def run(command: str) -> str:
        name, *flags = shlex.split(command)
        usual = [] if "--config" in flags else [*USUAL[name].split(), "--output_dir", str(tmp_path / "out")]
        script = SCRIPTS[name]
        with pytest.raises(SystemExit) as stop:
            launch(script.main, script.Args, [*usual, *flags])
        assert stop.value.code == 1
        return capsys.readouterr().err

    find_spec = importlib.util.find_spec
    without_vllm = lambda name, *rest: None if name == "vllm" else find_spec(name, *rest)
    monkeypatch.setattr(importlib.util, "find_spec", without_vllm)
    monkeypatch.setattr(torch.optim.AdamW, "step", refuse_to_train)
    monkeypatch.chdir(files)
    return run


@pytest.mark.parametrize("command, parts", CASES, ids=[command for command, _ in CASES])
def test_one_clear_sentence(command, parts, complain):
    said = complain(command)
    print(f"{command}\n    {said}")
    if said.startswith("error: "):
        assert said.count("\n") == 1  # not so tyro's boxes, which wrap
    for part in parts:
        assert part in " ".join(said.split()), said


@pytest.mark.parametrize("flags, ledger", DROPPED, ids=[flags for flags, _ in DROPPED])
@pytest.mark.parametrize("script", ["dpo", "kto", "orpo", "reward"])
def test_a_pair_is_passed_over_whole_and_counted(script, flags, ledger, files, monkeypatch, capsys):
    monkeypatch.chdir(files)
    module = SCRIPTS[script]
    launch(module.main, module.Args, [*USUAL[script].split(), *flags.split(), "--inspect"])
    assert f"8 rows = {ledger}" in capsys.readouterr().out


def test_a_mended_mistake_can_be_repeated_with_the_same_folder(complain, tmp_path):
    """What failed before anything was trained leaves nothing behind that is in the way of the second try."""
    complain("sft --dataset_name hole.jsonl")
    assert "ragged.jsonl, line 9" in complain("sft --dataset_name ragged.jsonl")


@pytest.mark.parametrize("command", [
    "sft.py --dataset_name hole.jsonl", "grpo.py --num_generations 1", "grpo.py --s", "dpo.py --loss_type exo_pair",
])  # fmt: skip
def test_as_a_program(command, files):
    script, *flags = command.split()
    done = subprocess.run([sys.executable, ROOT / script, *flags], cwd=files, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1 or "Unrecognized options: --s" in done.stderr


def test_a_failing_last_evaluation_does_not_cost_the_model(tmp_path):
    """A reward that fails is seen only when the evaluation calls it: after the training."""
    (tmp_path / "rewards.py").write_text("nan = lambda prompts, completions, **_: [float('nan')] * len(prompts)")
    with pytest.raises(UserError, match="nan returned nan"):
        sft.main(sft.Args(
            output_dir=str(tmp_path / "run"), max_steps=2, train_batch_size=8,
            eval_reward_funcs=[f"{tmp_path}/rewards.py:nan"],
        ))
    assert (tmp_path / "run/final/model.safetensors").exists()
