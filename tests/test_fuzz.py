"""Bad data in quantity: 2,000 files over the eight scripts (`--long`; else 200), each from its number alone.

Whatever is in a file, a script says one sentence and leaves with 1, or goes on to its first batch (`--inspect`) with a
ledger that balances over exactly the rows that were written. Never a traceback, a hang, a row gone silently.

    pytest tests/test_fuzz.py --case 1234 -rP        one case by its number; prints the file and what was said
"""

import contextlib
import datetime
import decimal
import gzip
import io
import json
import random
import re
import shutil
import signal
import traceback
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from templates import FAMILIES, metaspace_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

import dpo
import grpo
import kto
import orpo
import ppo
import reward
import rloo
import sft
from common.data import Ledger
from common.run import launch

SCRIPTS = {"sft": sft, "reward": reward, "dpo": dpo, "kto": kto, "orpo": orpo, "ppo": ppo, "grpo": grpo, "rloo": rloo}
CASES, SAMPLE = 2000, 200  # in all, and without --long: every tenth, which takes all scripts and kinds of file in turn
SECONDS = 20  # for one case, which takes a twentieth of one

# ---------------------------------------------------------------- rows


def chat(*contents: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


TOOLS = [{"type": "function", "function": {"name": "add", "description": "adds", "parameters": {"type": "object"}}}]
SHAPES = {  # good rows of every shape; {n} differs from row to row
    "text": {"text": "row {n}"},
    "completion": {"prompt": "say {n}:", "completion": "{n}", "answer": "{n}"},
    "chat completion": {"prompt": chat("say {n}"), "completion": chat("", "{n}")[1:], "answer": "{n}"},
    "messages": {"messages": chat("say {n}", "{n}", "again", "{n}{n}")},
    "tools": {"messages": [{"role": "system", "content": "be brief"}, *chat("say {n}", "{n}")], "tools": TOOLS},
    "prompt": {"prompt": "say {n}:", "answer": "{n}"},
    "chat prompt": {"prompt": chat("say {n}"), "answer": "{n}", "chat_template_kwargs": {"enable_thinking": False}},
    "pair": {"prompt": "say {n}:", "chosen": "{n}", "rejected": "no {n}"},
    "implicit pair": {"chosen": "say {n}: {n}", "rejected": "say {n}: no"},
    "chat pair": {"prompt": chat("say {n}"), "chosen": chat("", "{n}")[1:], "rejected": chat("", "no {n}")[1:]},
    "implicit chat pair": {"chosen": chat("say {n}", "{n}"), "rejected": chat("say {n}", "no {n}")},
    "margins": {"prompt": "say {n}:", "chosen": "{n}", "rejected": "no {n}", "margin": 1.5},
    "scored": {"prompt": "say {n}:", "completion": "{n}", "score": 0.5, "source": "a"},
    "labelled": {"prompt": "say {n}:", "completion": "{n}", "label": True},
    "chat labelled": {"prompt": chat("say {n}"), "completion": chat("", "{n}")[1:], "label": False},
}
PAIRS = ["pair", "implicit pair", "chat pair", "implicit chat pair"]
TAKES = {
    "sft": ["text", "completion", "chat completion", "messages", "tools"],
    "reward": [*PAIRS, "margins", "scored"], "dpo": PAIRS, "orpo": PAIRS, "kto": [*PAIRS, "labelled", "chat labelled"],
    **{script: ["prompt", "chat prompt", "completion"] for script in ("ppo", "grpo", "rloo")},
}  # fmt: skip
DEEP = [[]]
for _ in range(60):
    DEEP = [DEEP]
ODD = [
    None, True, False, 0, 1, -1, 1.5, float("nan"), float("inf"), -float("inf"), 10**400, 1e308, "", " ", "\n",
    "\x00", "\x07\x1b[31m", "\ufeffa", "\ud800", "\udfff a", "\ufdd0", "\ufdd1", "\ufffe", "e\u0301\u202e\u2028\u0085",
    "👩‍👩‍👧",
    "a" * 20_000, "ab " * 5000, "<|im_end|>", "<|im_start|>assistant\n", "</s><s>", "<|eot_id|>", "<end_of_turn>",
    "<|endoftext|>", "[INST]", "<unk>", "{{ 7 * 7 }}", "{% for %}", "true", "[1", "[" * 3000, "null", "{}", [], {},
    [[]], [None], [1, "a"], ["a", "b"], {"a": 1}, {"": ""}, DEEP, chat("a"), chat("a", "b"), chat("", "b")[1:],
    [chat("a", "b")],
    [{"role": "user"}], [{"content": "x"}], [{"role": None, "content": "x"}], [{"role": "assistant", "content": None}],
    [{"role": "assistant", "content": ""}], [{"role": "usr", "content": "x"}], [{"role": ["user"], "content": "x"}],
    [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], [{"role": "tool", "content": "x"}],
    [{"role": "assistant", "content": "x", "tool_calls": 1}], [{"role": "assistant", "tool_calls": [{"name": "f"}]}],
    [{"role": "assistant", "content": "x", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
    [{"role": "assistant", "content": "x", "train": False}], [{"role": "user", "content": "x", "train": False}],
    [{"role": "assistant", "content": "x", "train": "no"}], [*chat("a", "b"), *chat("a", "b")], [{"from": "human"}],
    {"chat_template": "{{ 1 / 0 }}"}, {"tokenize": True}, {"messages": []}, {"add_generation_prompt": 1},
    {"continue_final_message": True}, {"chat_template": 5}, {"return_tensors": "pt"}, {"documents": 5}, {1: 2},
    [{"role": "assistant", "content": {"a": 1}}], [{"role": "user", "content": 10**400}],
    [{"role": "user", "content": DEEP}],
]  # fmt: skip
KEYS = ["prompt", "completion", "chosen", "rejected", "messages", "text", "label", "score", "margin", "tools", "train",
        "chat_template_kwargs", "role", "content", "tool_calls", "answer", "source", "", " prompt", "promt", "a\nb",
        "\x1b[2J", "images", "prompts", "completions", "completion_ids"]  # fmt: skip


def filled(value, n: int):
    """A good value with its row's number in it."""
    if isinstance(value, str):
        return value.replace("{n}", str(n))
    if isinstance(value, list):
        return [filled(item, n) for item in value]
    return {key: filled(item, n) for key, item in value.items()} if isinstance(value, dict) else value


def spoil(value, chance: random.Random):
    """A copy with one thing odd somewhere in it."""
    if isinstance(value, dict) and "rejected" in value and chance.random() < 0.1:
        return {**value, "rejected": value["chosen"]}
    if isinstance(value, dict) and value and chance.random() < 0.8:
        key = chance.choice(list(value))
        way = chance.choice(["inside"] * 4 + ["odd", "gone", "renamed", "more", "wrapped"])
        rest = {k: v for k, v in value.items() if k != key}
        return {
            "inside": lambda: {**value, key: spoil(value[key], chance)},
            "odd": lambda: {**value, key: chance.choice(ODD)},
            "gone": lambda: rest,
            "renamed": lambda: {**rest, chance.choice(KEYS): value[key]},
            "more": lambda: {**value, chance.choice(KEYS): chance.choice(ODD)},
            "wrapped": lambda: {**value, key: [value[key]]},
        }[way]()
    if isinstance(value, list) and value and chance.random() < 0.8:
        i = chance.randrange(len(value))
        before, here, after = value[:i], value[i], value[i + 1 :]
        spoilt, odd = spoil(here, chance), chance.choice(ODD)
        return chance.choice([
            [*before, spoilt, *after], [*before, spoilt, *after], before + after, [*value, here], value[::-1],
            [*before, odd, *value[i:]], [*before, [here], *after],
        ])  # fmt: skip
    if isinstance(value, str) and chance.random() < 0.3:
        return chance.choice(["", "", " \n", value * 200])
    if isinstance(value, str) and chance.random() < 0.7:
        odd = chance.choice([text for text in ODD if isinstance(text, str)])
        return chance.choice([value + odd, odd + value, value + odd + value, value[::-1]])
    return chance.choice(ODD)


# ---------------------------------------------------------------- files


def json_line(row, chance: random.Random) -> bytes:
    """Plain or escaped; lone surrogates only escaped, which JSON allows and UTF-8 does not."""
    with contextlib.suppress(UnicodeEncodeError):
        if chance.random() < 0.5:
            return json.dumps(row, ensure_ascii=False).encode()
    return json.dumps(row).encode()


def bad_lines(good: bytes, chance: random.Random) -> bytes:
    """What may stand in a file in the place of a line."""
    return chance.choice([
        b"{", b"}", b"null", b"17", b'"text"', b"[]", b"[{}]", b"{}", good[: len(good) // 2], good + good, good + b",",
        good.replace(b'"', b"'"), b"// " + good, b"\x00" * 9, b"\xff\xfe" + good, good.decode().encode("utf-16"),
        b"\x1f\x8b\x08\x00", b'{"text": "\xe9"}', b'{"text": "\xed\xa0\x80"}', b'{"text": "a\tb"}', b'{"text": "\\x"}',
        b"[" * 100_000, b'{"a":' * 100_000, b'{"text": ' + b"9" * 5000 + b"}", b'{"text": 1e999}',
        b'{"text": -Infinity}',
        b'{"text": NaN, "text": "b"}', b"PAR1", b"\xef\xbb\xbf" + good, b"{text: 1}", b'{"text": "\\ud83d"}', b"\xc3",
        b'{"prompt": 0x10}', b"\x0c", b"\xc2\xa0",
    ])  # fmt: skip


def write_json(path: Path, rows: list, chance: random.Random) -> int | None:
    """Writes them as .json[l][.gz], perhaps spoilt as a file; how many there are, None where a reader may differ."""
    lines, count = [json_line(row, chance) for row in rows], len(rows)
    way = chance.choice(["good"] * 9 + ["line", "line", "cut", "flip", "bytes", "nothing", "no list"])
    if way == "line":
        lines.insert(chance.randrange(len(lines) + 1), bad_lines(lines[0], chance))
        count = None
    end = chance.choice([b"\n", b"\n", b"\r\n", b"\n\n", b" \n"])
    content = end.join(lines) + end * chance.randrange(2)
    if ".jsonl" not in path.name:
        content = b"[" + b",".join(lines) + b"]" if way != "no list" else lines[0]
    content = chance.choice([b"", b"", b"", b"\xef\xbb\xbf"]) + content
    if path.suffix == ".gz":
        content = gzip.compress(content)
    if way in ("cut", "flip", "bytes", "nothing"):
        count, at = None, chance.randrange(len(content))
        content = {
            "cut": content[:at],
            "flip": content[:at] + bytes([content[at] ^ 1 << chance.randrange(8)]) + content[at + 1 :],
            "bytes": chance.randbytes(99), "nothing": chance.choice([b"", b"\n", b" \r\n \n", b"[]", b"\xef\xbb\xbf"]),
        }[way]  # fmt: skip
    path.write_bytes(content)
    return count


MINUTE, FLOAT = datetime.timedelta(minutes=1), pyarrow.float32()
CELLS = [  # what a column of a parquet file may hold where text is meant, and its type if that is not clear
    (None,), (b"\xff\x00",), (1, "uint8"), (1.5, FLOAT), (float("nan"),), (True,), (decimal.Decimal("1.5"),), (MINUTE,),
    (datetime.datetime(2026, 1, 1),), (datetime.date(1, 1, 1),), (2**62, pyarrow.timestamp("us")), ([["a"]],),
    ({"role": "user"},), ([{"role": "user", "content": None}],), ("a", pyarrow.large_string()),
    ([], pyarrow.list_(pyarrow.null())), ([("a", 1)], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
    ([1.0, 2.0], pyarrow.list_(FLOAT, 2)), (b"abc", pyarrow.large_binary()),
    ("a", pyarrow.dictionary(pyarrow.int32(), pyarrow.string())),
]  # fmt: skip


def write_parquet(path: Path, rows: list[dict], chance: random.Random) -> int | None:
    """Good rows but for a column of another type, or two, or for the bytes of the file."""
    table = pyarrow.Table.from_pylist(rows)
    for _ in range(chance.randrange(3)):
        name, (cell, *kind) = chance.choice([*table.column_names, *KEYS]), chance.choice(CELLS)
        cells = [None if chance.random() < 0.1 else cell for _ in rows]
        columns = {x: table[x] for x in table.column_names} | {name: pyarrow.array(cells, *kind)}
        table = pyarrow.table(columns)
    pyarrow.parquet.write_table(table, path)
    if chance.random() < 0.2:
        content = path.read_bytes()
        path.write_bytes(chance.choice([content[: chance.randrange(len(content))], b"", b"PAR1PAR1", content[4:]]))
        return None
    return len(rows)


def write_csv(path: Path, rows: list[dict], chance: random.Random) -> None:
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows).to_csv(str(path))
    lines = path.read_bytes().splitlines()
    bad = [b"", b"a", b"a,b,c,d,e,f,g", b'"', b"\x00,\x00", b"\xff,\xff", b"1,2", b",,,", b'"a\nb",c']
    lines.insert(chance.randrange(len(lines) + 1), chance.choice(bad))
    path.write_bytes(b"\n".join(lines))


def write_case(number: int, folder: Path) -> tuple[str, list[str], int | None]:
    """Case `number` as files in `folder`: script, flags, and how many rows were written (None: not for us to say)."""
    chance = random.Random(number)
    script = list(SCRIPTS)[number // 10 % len(SCRIPTS)]
    shape = chance.choice(TAKES[script]) if chance.random() < 0.95 else chance.choice(list(SHAPES))
    rows = [filled(SHAPES[shape], n) for n in range(chance.choice([1, 2, 2, 3, 8]))]
    if "label" in rows[0]:
        rows += [row | {"label": not row["label"]} for row in rows]
    kinds = [".jsonl"] * 6 + [".jsonl.gz"] * 2 + [".json", ".json.gz"] + [".parquet"] * 2 + [".csv", "folder"]
    kind = chance.choice(kinds)
    path, count = folder / f"data{kind}", None
    if kind == ".parquet":
        count = write_parquet(path, rows, chance)
    elif kind == ".csv":
        write_csv(path, rows, chance)
    elif kind == "folder":
        path = folder / chance.choice(["data", "data.jsonl", "data.parquet"])
        path.mkdir()
        names = ["state.json", "dataset_dict.json", "train.jsonl", "train-1.json", "test.jsonl", "a.txt", ".jsonl"]
        for name in chance.sample(names, chance.randrange(4)):
            (path / name).write_bytes(chance.choice([b"", b"{}", b"[]", *(json_line(row, chance) for row in rows)]))
        if chance.random() < 0.3:
            (path / "train.parquet").mkdir()
    else:
        for _ in range(chance.choice([0, 1, 1, 1, 1, 2])):
            i = chance.randrange(len(rows))
            rows[i] = spoil(rows[i], chance)
        count = write_json(path, rows, chance)
    flags = ["--dataset_name", str(path), "--model_name_or_path", chance.choice([*FAMILIES, "metaspace", "toy"])]
    policies = ["error", "drop", "drop"]
    if script in ("ppo", "grpo", "rloo"):
        rest = "--max_prompt_length 300 --generation_batch_size 8 --max_completion_length 4 --max_steps 1"
        flags += [*rest.split(), "--reward_funcs", "zero.py:zero", "--on_overlong", chance.choice(policies)]
    else:
        flags += ["--on_overlong", chance.choice([*policies, "truncate"]), "--max_length", chance.choice(["12", "300"])]
        flags += ["--on_empty", chance.choice(policies), "--train_batch_size", "1"]
    if script == "reward":
        flags += ["--normalize_split", "train"]
    if script == "sft":
        some = ["", "", "--assistant_only_loss", "--last_turn_only_loss", "--completion_only_loss False"]
        flags += chance.choice(some).split()
    if chance.random() < 0.1:
        flags += ["--dataset_split", chance.choice(["train[:1]", "train[1:]", "test", "train[-1:]", "train[5:2]"])]
        count = None
    return script, flags, count


# ---------------------------------------------------------------- what has to come of them


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder for each family's tokenizer, with a model of one layer."""
    folder = tmp_path_factory.mktemp("models")
    tokenizers = {name: family.tokenizer() for name, family in FAMILIES.items()}
    tokenizers["metaspace"] = metaspace_tokenizer(False)
    for name, tokenizer in tokenizers.items():
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1,
            num_key_value_heads=1, eos_token_id=tokenizer.eos_token_id, max_position_embeddings=2**17,
        )  # fmt: skip
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "zero.py").write_text("def zero(prompts, completions, **_):\n    return [0.0] * len(prompts)\n")
    return folder


class Hang(BaseException):
    """Not an Exception: nothing on the way out takes it for a fault of the file."""


def play(number: int, folder: Path, monkeypatch) -> tuple[str, str]:
    """(what is wrong with case `number`, nothing if all is well; what the script said)."""
    script, flags, count = write_case(number, folder)
    module, ledgers = SCRIPTS[script], []

    class Noted(Ledger):
        def __init__(self, *values):
            super().__init__(*values)
            ledgers.append(self)

    def ring(*_):
        raise Hang(f"no answer in {SECONDS} seconds")

    monkeypatch.setattr(module, "Ledger", Noted)
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", errors) for errors in ("strict", "backslashreplace"))
    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    status, wrong = 0, ""
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            launch(module.main, module.Args, [*flags, "--inspect", "--output_dir", str(folder / "run")])
    except SystemExit as stop:
        status = stop.code
    except (Exception, Hang):  # noqa: BLE001
        wrong = "a traceback: " + "".join(traceback.format_exc(limit=-4))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    out.flush(), err.flush()
    said, complaint = (stream.buffer.getvalue().decode("utf-8", "replace") for stream in (out, err))
    sentence = complaint[complaint.find("error: ") :] if "error: " in complaint else ""
    if not wrong and status == 0:
        if not ledgers or not re.search(r"rows = .*kept", said):
            wrong = "no ledger was printed"
        elif count is not None and ledgers[0].rows_read != count:
            wrong = f"{count} rows were written and {ledgers[0].rows_read} read"
    elif not wrong and (status != 1 or len(sentence) < 20 or sentence.count("\n") != 1):
        wrong = f"status {status} and not one sentence"
    for ledger in ledgers if status == 0 and not wrong else []:
        ledger.check()
        assert ledger.rows_kept > 0
    return wrong, f"{script} {' '.join(flags)}\n{said[-2000:]}{complaint[-2000:]}"


def shown(folder: Path) -> str:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return "\n".join(f"{path.name}: {path.read_bytes()[:700]!r}" for path in files)


def test_bad_data(request, models, tmp_path, monkeypatch):
    one = request.config.getoption("--case")
    numbers = range(CASES) if request.config.getoption("--long") else range(0, CASES, CASES // SAMPLE)
    monkeypatch.chdir(models)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    failures, spoke = [], 0
    for number in numbers if one is None else [one]:
        folder = tmp_path / "case"
        folder.mkdir()
        wrong, said = play(number, folder, monkeypatch)
        spoke += "error: " in said
        if one is not None:
            print(f"{shown(folder)}\n{said}")
        if wrong:
            failures.append(f"case {number}: {wrong}\n{said}\n{shown(folder)}")
        shutil.rmtree(folder)
    assert not failures, f"{len(failures)} of {len(numbers)} cases\n\n" + "\n\n".join(failures[:5])
    if one is None:  # neither is every file refused, nor does every file pass
        assert 0.2 < spoke / len(numbers) < 0.8
