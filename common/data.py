"""Rows of a data set -> token ids and loss masks -> packed micro-batches, and a ledger so that no token gets lost.

Dimension key, here and everywhere: N tokens of a packed micro-batch, B sequences, P prompts, G samples a prompt,
V vocabulary, T positions of one sequence. A tensor's name ends in its axes: `loss_mask_N`.

There is no padding in this project. A micro-batch is one row of N tokens: B sequences laid end to end. Here N = 9 and
B = 2, a prompt "2+2=" with the completion "4", then a text that is trained whole:

    tokens           <s>  2+2   =    4  </s> <s>   To   be  </s>
    position_ids_N    0    1    2    3    4    0    1    2    3      starts again with every sequence
    seq_N             0    0    0    0    0    1    1    1    1      which of the B sequences a token belongs to
    loss_mask_N       .    .    .    x    x    .    x    x    x      x: a target, predicted from the token on its left
    cu_seqlens        0                        5                  9  the B + 1 boundaries

Attention never crosses a boundary. Masks come from lengths, never from `ids != pad`. The first token of a sequence is
never a target: the token on its left is another document's.

Three decisions, so that training sees the tokens that sampling sees:
  1. Prompt and completion are tokenised apart and their ids joined: read as one text, "Answer:" and " 42" may merge,
     and no sampler ever sees the merged token. A conversation is cut at both ends of every assistant turn likewise.
  2. One BOS where the tokenizer adds one, whether or not the chat template writes it (Zephyr's does not), and one end:
     the EOS after a text, the template's own end of turn after a chat message.
  3. A conversation's loss covers what the model generates, end of turn included. Where that stands is read off the
     rendered template, for stock templates carry no tags that say it.

A mistake in the data raises UserError: one sentence that names the file, the row and the remedy.
"""

import difflib
import gzip
import json
import os
import re
import time
import zlib
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from heapq import heapreplace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jinja2 import TemplateError
from rich.progress import Progress
from transformers import PreTrainedTokenizerBase as Tokenizer

from common.run import UserError

Chat = list[dict]  # messages with role and content, perhaps tool_calls, perhaps "train": false
Tools = list[dict] | str | None  # function schemas; as JSON text they survive a parquet file
KINDS = ("jsonl", "json", "parquet", "csv")  # in the order in which a folder is searched


class EmptyRow(UserError):
    """A row with nothing in it to train or to compare; the one mistake that `prepare` may be told to pass over."""

    def __init__(self, sentence: str, reason: str = "empty"):
        super().__init__(sentence)
        self.reason = reason  # as the ledger counts it


# ---------------------------------------------------------------- rows


@dataclass(eq=False)
class Rows(Sequence):
    """The rows of a data set. `where(i)` says in which file and line row i stands."""

    name: str
    data: Sequence[dict]  # a list, or a datasets.Dataset that stays on disk
    columns: list[str]
    places: list[str] | None = None  # "train.jsonl, line 17"; None where there are no lines to name
    chosen: range | None = None  # the slice of `data` that was asked for; None: all

    def __post_init__(self):
        self.chosen = range(len(self.data)) if self.chosen is None else self.chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, i: int) -> dict:
        return self.data[self.chosen[i]]

    def where(self, i: int) -> str:
        return self.places[self.chosen[i]] if self.places else f"{self.name}, row {self.chosen[i]}"


def load_rows(dataset_name: str, split: str = "train") -> Rows:
    """Load a file, a folder, `toy:sort[_pairs]`, `reasoning_gym:<task>[:<size>]`, or "owner/name[:config]" of the hub.

    `split` may carry a slice: "train[:200]". Only a hub name touches the network.
    """
    parsed = re.fullmatch(r"([\w.-]+)(?:\[(-?\d+)?:(-?\d+)?\])?", split)
    if parsed is None:
        raise UserError(f"the split {split!r} is not understood; write train, or with a slice train[:200]")
    base, *bounds = parsed.groups()
    path = Path(dataset_name).expanduser()
    if dataset_name.startswith("toy:"):
        rows = _load_toy(dataset_name, base)
    elif dataset_name.startswith("reasoning_gym:"):
        rows = _load_reasoning_gym(dataset_name, base)
    elif path.exists():
        rows = _load_local(path, base)
    elif _kind(path) or path.is_absolute() or dataset_name.startswith(".") or dataset_name.count("/") > 1:
        raise UserError(f"{dataset_name} does not exist{_nearest(path)}")
    else:
        name, _, config = dataset_name.partition(":")
        rows = _load_with(dataset_name, lambda datasets: datasets.load_dataset(name, config or None, split=base))
    rows.chosen = rows.chosen[slice(*(int(bound) if bound else None for bound in bounds))]
    if not rows:
        raise UserError(f"{dataset_name} (split {split}) holds no rows")
    return rows


def require_columns(rows: Rows, *alternatives: tuple[str, ...]) -> tuple[str, ...]:
    """The first of these sets of columns that `rows` has in full. UserError, with likely misspellings, if none is."""
    for columns in alternatives:
        if set(columns) <= set(rows.columns):
            return columns
    missing = dict.fromkeys(column for columns in alternatives for column in columns if column not in rows.columns)
    close = {column: difflib.get_close_matches(column, rows.columns, n=1) for column in missing}
    hints = "".join(f"; should {found[0]!r} be called {column!r}?" for column, found in close.items() if found)
    needed = " or ".join(" + ".join(columns) for columns in alternatives)
    plural = "s" * (" " in needed)
    raise UserError(f"{rows.name} needs the column{plural} {needed}, and has {_listed(rows.columns)}{hints}")


def _listed(columns: list[str]) -> str:
    """Names of columns for a sentence, which a line break or an escape code in one of them would end."""
    return ", ".join(column if column.isprintable() else repr(column) for column in columns)


def _load_toy(name: str, split: str) -> Rows:
    from common.toy import toy_pairs, toy_rows

    makers = {"toy:sort": toy_rows, "toy:sort_pairs": toy_pairs}
    if name not in makers:
        raise UserError(f"there is no toy data set {name}; there are {' and '.join(makers)}")
    data = makers[name](split)
    return Rows(name, data, list(data[0]))


def _load_reasoning_gym(name: str, split: str) -> Rows:
    """Generated questions. The splits differ by their seed alone, so a task with few questions repeats some in both."""
    _, task, size = f"{name}:1000".split(":")[:3]
    seeds = {"train": 1, "test": 2}
    if split not in seeds or not size.isdigit():
        raise UserError(f"{name} (split {split}) is not understood; write reasoning_gym:<task>:<size>, train or test")
    try:
        import reasoning_gym
    except ImportError as error:
        raise UserError(f"{name} needs the package reasoning-gym: pip install reasoning-gym ({error})") from error
    if task not in reasoning_gym.factory.DATASETS:
        close = difflib.get_close_matches(task, reasoning_gym.factory.DATASETS)
        raise UserError(f"reasoning_gym has no task {task!r}; near it are {', '.join(close) or 'none'}")
    data = []
    for entry in reasoning_gym.create_dataset(task, size=int(size), seed=seeds[split]):
        shown = {"question": entry["question"], "answer": entry["answer"]}
        data.append({"prompt": [{"role": "user", "content": entry["question"]}], **shown, "entry": entry})
    return Rows(name, data, ["prompt", "question", "answer", "entry"])


def _load_local(path: Path, split: str) -> Rows:
    if (path / "dataset_dict.json").exists():
        return _load_with(path, lambda datasets: datasets.load_from_disk(path)[split])
    if (path / "state.json").exists():
        return _load_with(path, lambda datasets: datasets.load_from_disk(path))
    files = _files_of_split(path, split) if path.is_dir() else [path]
    kind = _kind(files[0])
    if kind is None:
        raise UserError(f"{path}: such a file cannot be read here, but .jsonl, .json (also .gz), .parquet and .csv can")
    if path.is_file() and split != "train" and split not in path.name:
        raise UserError(
            f"{path} is one file and has no split {split!r}; name a folder with both, or ask for the split train, "
            "which is the whole file"
        )
    if kind in ("parquet", "csv"):
        names = list(map(str, files))
        return _load_with(path, lambda datasets: datasets.load_dataset(kind, data_files=names, split="train"))
    # Not by `datasets`: it cannot name the line of a mistake, and it fills one row's tools with another's keys.
    placed = [pair for file in files for pair in _read_json(file)]
    columns = dict.fromkeys(column for _, row in placed for column in row)
    return Rows(str(path), [row for _, row in placed], list(columns), [place for place, _ in placed])


def _load_with(name: str | Path, load: Callable[[Any], Any]) -> Rows:
    """Rows of `load(datasets)`. Whatever that library raises here is about the user's name, split, file or network."""
    try:
        import datasets

        data = load(datasets)
        return Rows(str(name), data, data.column_names)
    except Exception as error:
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise UserError(f"{name} cannot be loaded ({type(error).__name__}: {reason}){_nearest(Path(name))}") from error


def _kind(path: Path) -> str | None:
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    return kind if kind in (KINDS[:2] if path.suffix == ".gz" else KINDS) else None


def _files_of_split(folder: Path, split: str) -> list[Path]:
    """The files of one kind whose names begin with the split. For train, if there are none, all files of one kind."""
    found = sorted(file for file in folder.rglob("*") if _kind(file) and "/." not in f"/{file.relative_to(folder)}")
    for prefix in (split, "") if split == "train" else (split,):
        for kind in KINDS:
            if files := [file for file in found if _kind(file) == kind and file.name.startswith(prefix)]:
                return files
    held = ", ".join(file.name for file in found[:8]) or "no .jsonl, .json, .parquet or .csv"
    raise UserError(f"{folder} has no file for the split {split!r}; it holds {held}")


def _nearest(path: Path) -> str:
    """What to add to a sentence about a missing file: names beside it that are like it, if there are any."""
    names = os.listdir(path.parent) if path.parent.is_dir() and not path.exists() else []
    close = [str(path.parent / name) for name in difflib.get_close_matches(path.name, names)]
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _read_json(path: Path) -> list[tuple[str, dict]]:
    """(place, row) for each row of a .jsonl or .json file, gzipped or not."""
    placed, place = [], str(path)
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            if _kind(path) == "json":
                array = json.loads(file.read().decode("utf-8-sig"))
                if not isinstance(array, list):
                    raise UserError(f"{path} holds no list of rows; a file with one object a line is called .jsonl")
                placed = [(f"{path}, row {i}", row) for i, row in enumerate(array)]
            else:
                for number, line in enumerate(file, start=1):
                    place = f"{path}, line {number}"
                    if line.strip():
                        placed.append((place, json.loads(line.decode("utf-8-sig"))))
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: byte {error.start + 1} is not UTF-8; convert the file, say with iconv") from error
    except json.JSONDecodeError as error:
        at = f"column {error.colno}" if place != str(path) else f"line {error.lineno}, column {error.colno}"
        wanted = "mend it (.jsonl: one object a line)"
        raise UserError(f"{place}: not JSON, or cut short, at {at} ({error.msg}); {wanted}") from error
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, brackets 1,000 deep
        raise UserError(f"{place}: JSON that cannot be read here ({error}); mend it or take it out") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        reason = "the compressed file is damaged or cut short from here on"
        raise UserError(f"{place}: {reason} ({error}); fetch or write it again") from error
    for place, row in placed:
        if not isinstance(row, dict):
            raise UserError(f"{place}: a row is an object with named columns, and this is a {type(row).__name__}")
    return placed


# ---------------------------------------------------------------- text and chat -> token ids


def encode_text(text: str, tokenizer: Tokenizer, continuation: bool = False) -> list[int]:
    """Ids of `text`: one BOS if the tokenizer adds one and the text continues no other; never an EOS of its own."""
    if not isinstance(text, str):
        raise UserError(f"a text is needed, and this is a {type(text).__name__}: {text!r:.60}")
    if not continuation:
        bos, ids = _bos(tokenizer), _encode(text, tokenizer)
        return ids if ids[: len(bos)] == bos else bos + ids
    # A SentencePiece tokenizer writes a space before the first word, which does not belong into the middle of a
    # sequence. It may write it before a newline, and then both are taken away.
    newline = _newline_after_invented_space(tokenizer)
    ids = _encode("\n" + text, tokenizer) if newline else []
    return ids[len(newline) :] if newline and ids[: len(newline)] == newline else _encode(text, tokenizer)


def _encode(text: str, tokenizer: Tokenizer) -> list[int]:
    try:
        return tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    except Exception as error:  # from Rust, without a type: no unknown token, half a surrogate pair
        raise UserError(f"the tokenizer refuses the text {text!r:.60} ({error})") from error


@lru_cache
def _bos(tokenizer: Tokenizer) -> list[int]:
    """[BOS] if texts begin with it. That the token exists proves nothing: SmolLM2 has one and does not add it."""
    return [tokenizer.bos_token_id] if tokenizer("").input_ids[:1] == [tokenizer.bos_token_id] else []


@lru_cache
def _newline_after_invented_space(tokenizer: Tokenizer) -> list[int]:
    """Ids of a lone newline if the tokenizer begins texts with a space that is not there, otherwise nothing."""
    try:
        newline, letter, both = (_encode(text, tokenizer) for text in ("\n", "a", "\na"))
    except UserError:  # a toy vocabulary without these letters
        return []
    return newline if both != newline + letter else []


@lru_cache
def _special_tokens(tokenizer: Tokenizer) -> re.Pattern:
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return re.compile("|".join(map(re.escape, sorted(added | set(tokenizer.all_special_tokens), reverse=True))))


def render_chat(
    messages: Chat,
    tokenizer: Tokenizer,
    tools: Tools = None,
    add_generation_prompt: bool = False,
    chat_template_kwargs: dict | None = None,
) -> str:
    """The conversation as the tokenizer's chat template writes it."""
    if tokenizer.chat_template is None:
        raise UserError("chat messages need a chat template, which this tokenizer lacks; give one with --chat_template")
    if not (isinstance(messages, list) and messages and all(isinstance(m, dict) and "role" in m for m in messages)):
        raise UserError(f"a chat is a list of messages with role and content, and this is {messages!r:.80}")
    # Columnar files fill absent keys with None, and a template that asks `'tool_calls' in message` then sees a call.
    plain = [{k: v for k, v in m.items() if k != "train" and (k == "content" or v is not None)} for m in messages]
    flags = {**(chat_template_kwargs or {}), "add_generation_prompt": add_generation_prompt, "tokenize": False}
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
        return tokenizer.apply_chat_template(plain, tools=tools or None, **flags)
    except (TemplateError, TypeError, ValueError) as error:  # ValueError: tools that are no JSON
        raise UserError(f"the chat template refuses this conversation ({error})") from error


def encode_prompt(
    prompt: str | Chat, tokenizer: Tokenizer, tools: Tools = None, chat_template_kwargs: dict | None = None
) -> list[int]:
    """Ids of a prompt as the sampler gets them: a text as it is, a chat up to where the assistant begins to speak."""
    if not isinstance(prompt, str):
        if not isinstance(prompt, list):
            kind = type(prompt).__name__
            raise UserError(f"a prompt of the type {kind} ({prompt!r:.60}) is neither text nor messages")
        if prompt and prompt[-1]["role"] == "assistant":
            raise UserError("the prompt ends with a message of the assistant, which belongs into the completion")
        prompt = render_chat(prompt, tokenizer, tools, True, chat_template_kwargs)
    ids = encode_text(prompt, tokenizer)
    if not ids:
        raise UserError("the prompt is empty")
    return ids


def encode_completion(
    prompt: str | Chat,
    completion: str | Chat,
    tokenizer: Tokenizer,
    tools: Tools = None,
    chat_template_kwargs: dict | None = None,
) -> list[int]:
    """Ids of the completion alone, ending in exactly one EOS (a text) or end of turn (a chat message)."""
    if not isinstance(prompt, str):
        reply = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
        if [message["role"] for message in reply] != ["assistant"]:
            raise UserError("a chat's completion is one message of the assistant; a longer one goes into messages")
        text, spans = assistant_spans([*prompt, *reply], tokenizer, tools, chat_template_kwargs, first=len(prompt))
        return encode_text(text[slice(*spans[0])], tokenizer, continuation=True)
    ids, eos = encode_text(completion, tokenizer, continuation=True), tokenizer.eos_token_id
    if not completion.strip():
        raise EmptyRow("the completion is empty")
    if eos is None:
        raise UserError("the tokenizer has no EOS token, so that no completion could end")
    return ids if ids[-1:] == [eos] else [*ids, eos]


def split_pair(row: dict) -> tuple[str | Chat, str | Chat, str | Chat]:
    """(prompt, chosen, rejected) of a preference row, as text or as messages, the replies without the prompt.

    Without a column `prompt` it is what the two have in common: whole messages, or a text up to the space before the
    word in which they part. UserError where they have nothing in common, or do not begin with the prompt given.
    """
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    for side in ("chosen", "rejected"):
        if row[side] is None:
            raise EmptyRow(f"the {side} reply is missing")
    if type(chosen) is not type(rejected) or not isinstance(chosen, (str, list)):
        kinds = f"{type(chosen).__name__} and {type(rejected).__name__}"
        raise UserError(f"chosen and rejected are both texts or both lists of messages, and these are {kinds}")
    if chosen == rejected:
        raise EmptyRow("chosen and rejected are equal, so that nothing can be preferred", "equal")
    parted = next((i for i, (one, other) in enumerate(zip(chosen, rejected)) if one != other), None)
    common = chosen[: min(len(chosen), len(rejected)) if parted is None else parted]
    if isinstance(chosen, str):
        if prompt is None:
            found = re.match(r"(?s).*\S(?=\s)", common)  # up to the last word that a space follows
            prompt = found[0] if found else ""
            if not prompt:
                raise UserError("chosen and rejected share no first word, so there is no prompt; give a column prompt")
            return prompt, chosen[len(prompt) :], rejected[len(prompt) :]
        if not isinstance(prompt, str):
            raise UserError("chosen and rejected are texts, and the prompt is not")
        return prompt, chosen, rejected
    if prompt is not None and (len(chosen), len(rejected)) == (1, 1):
        if not isinstance(prompt, list):
            raise UserError("the prompt is text and the replies are messages; write both as messages")
        return prompt, chosen, rejected
    # The replies come with the conversation before them; a prompt that is text repeats the last question
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt or []
    if not common:
        raise UserError("chosen and rejected have no message in common, so there is no prompt; give a column prompt")
    if asked and common[-len(asked) :] != asked:
        raise UserError("chosen and rejected are whole conversations, and what they have in common is not the prompt")
    return common, chosen[len(common) :], rejected[len(common) :]


def encode_pair(row: dict, tokenizer: Tokenizer) -> tuple[list[int], list[list[int]]]:
    """Ids of the prompt of a preference row, and of its two replies, chosen and rejected."""
    prompt, *replies = split_pair(row)
    options = {"tools": row.get("tools"), "chat_template_kwargs": row.get("chat_template_kwargs")}
    completions = []
    for side, reply in zip(("chosen", "rejected"), replies):
        try:
            completions.append(encode_completion(prompt, reply or "", tokenizer, **options))
        except EmptyRow:
            raise EmptyRow(f"the {side} reply is empty") from None
    if completions[0] == completions[1]:
        raise EmptyRow("chosen and rejected are the same tokens, so that nothing can be preferred", "equal")
    return encode_prompt(prompt, tokenizer, **options), completions


def encode_conversation(
    messages: Chat,
    tokenizer: Tokenizer,
    which: Literal["all", "assistant", "last_turn"] = "assistant",
    tools: Tools = None,
    chat_template_kwargs: dict | None = None,
) -> tuple[list[int], list[bool]]:
    """Ids and loss mask. An assistant message with `"train": false` carries no loss. `which` never changes the ids."""
    text, spans = assistant_spans(messages, tokenizer, tools, chat_template_kwargs)
    if not spans and which != "all":
        raise UserError("the conversation has no message of the assistant, so that nothing of it would be trained")
    if any(message.get("train") is False and message["role"] != "assistant" for message in messages):
        raise UserError("train: false belongs to messages of the assistant, and here it stands at another's")
    carries_loss = [message.get("train") is not False for message in messages if message["role"] == "assistant"]
    if which == "last_turn":
        carries_loss = [False] * len(spans[1:]) + carries_loss[-1:]
    pieces, position = [], 0
    for (start, end), trained in zip(spans, carries_loss, strict=True):
        pieces += [(text[position:start], which == "all"), (text[start:end], trained)]
        position = end
    ids, loss_mask = [], []
    for piece, trained in [*pieces, (text[position:], which == "all")]:
        piece_ids = encode_text(piece, tokenizer, continuation=bool(ids))
        ids += piece_ids
        loss_mask += [trained] * len(piece_ids)
    return ids, loss_mask


def assistant_spans(
    messages: Chat,
    tokenizer: Tokenizer,
    tools: Tools = None,
    chat_template_kwargs: dict | None = None,
    first: int = 0,
) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation, and what of it the model generates: characters [start, end) of each assistant message.

        <|im_start|>user/Hello<|im_end|>/<|im_start|>assistant/Good day.<|im_end|>/      (/ is a line break)
                                                               ^start             ^end

    Messages before number `first` are left out. UserError where the template hides a turn or gives it no end.
    """

    def render(part: Chat, shown_tools: Tools = tools, add_generation_prompt: bool = False) -> str:
        return render_chat(part, tokenizer, shown_tools, add_generation_prompt, chat_template_kwargs)

    text, special = render(messages), _special_tokens(tokenizer)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i >= first]
    return text, [_turn_span(text, messages, i, tools, render, special) for i in turns]


def _turn_span(
    text: str, messages: Chat, i: int, tools: Tools, render: Callable[..., str], special: re.Pattern
) -> tuple[int, int]:
    """Where the turn of assistant message i stands in `text`, found by rendering variations of the conversation."""
    calls = messages[i].get("tool_calls") or []
    if not calls and not str(messages[i].get("content") or "").strip() and messages[i].get("train") is not False:
        raise EmptyRow(f"message {i}, the assistant's, is empty")
    # The end. Two characters that no text may hold stand in for what the assistant says and for the arguments of its
    # calls. Behind the last come the end of the turn and the rest of the conversation, with which `text` ends as well.
    said, called = "\ufdd0", "\ufdd1"
    stand_in = {"role": "assistant", "content": said}
    if calls:
        stand_in["tool_calls"] = [_call_with(call, called) for call in calls]
    varied = render([*messages[:i], stand_in, *messages[i + 1 :]])
    if calls and called not in varied:
        raise UserError(f"the chat template leaves out the tool calls of message {i}; give another by --chat_template")
    tail = re.split(f"[{said}{called}]", varied)[-1]
    ends = [match.end() for match in special.finditer(tail)]
    if calls:  # several special tokens may close a call, then the turn: all that stay when the conversation stops here
        stopped = re.split(f"[{said}{called}]", render([*messages[:i], stand_in]))[-1]
        common = len(os.path.commonprefix([tail, stopped]))
        ends = [end for end in ends if end <= common][-1:]
    if not ends or (not calls and special.sub("", tail[: ends[0]]).strip()):
        raise UserError(
            "the chat template ends the assistant's turn with no special token, so that none is learnt; "
            "give another by --chat_template"
        )
    rest = tail[ends[0] :]
    end = len(text) - len(rest)
    # The start: where the generation prompt ends. But templates rewrite history. Mistral shows the tools with the last
    # question only, so that earlier prompts are without. Qwen3, told not to think, prompts with an empty thought which
    # earlier turns are without; such a turn starts where the stand-in does.
    prompts = [render(messages[:i], shown, True) for shown in ([tools, None] if tools else [None]) if i > 0]
    prompts += [varied.partition(said)[0]] if said in varied else []
    start = next((len(prompt) for prompt in prompts if text.startswith(prompt)), end)
    if start >= end or not text.endswith(rest):
        raise UserError(f"the chat template rewrites message {i}, the assistant's, so that its turn cannot be found")
    return start, end


def _call_with(call: dict, argument: str) -> dict:
    """The tool call with this for its argument; some data sets keep the arguments as an object, some as JSON text."""
    function = call.get("function", call)
    arguments = f'{{"": "{argument}"}}' if isinstance(function.get("arguments"), str) else {argument: argument}
    return {**call, "function": {**function, "arguments": arguments}}


# ---------------------------------------------------------------- rows -> examples


@dataclass
class Example:
    """One sequence. loss_mask[t]: token t is a trained target. The first never is, whatever is passed."""

    input_ids: np.ndarray  # int32 [T]
    loss_mask: np.ndarray  # bool [T]
    row: int  # of the data set
    prompt_length: int = 0  # leading tokens, without loss, that other examples may have in common; 0: nothing to share

    def __post_init__(self):
        self.input_ids = np.asarray(self.input_ids, dtype=np.int32)
        self.loss_mask = np.array(self.loss_mask, dtype=bool)
        self.loss_mask[:1] = False
        assert len(self.input_ids) == len(self.loss_mask)


@dataclass
class Ledger:
    """Where every token went. It is entered once when it is read and once more when its fate is known."""

    rows_read: int = 0
    rows_kept: int = 0
    rows_truncated: int = 0  # among those kept
    rows_dropped: Counter[str] = field(default_factory=Counter)  # by reason
    tokens_read: int = 0
    tokens_trained: int = 0
    tokens_masked: int = 0  # context, without loss
    tokens_truncated: int = 0
    tokens_dropped: int = 0

    def read(self, tokens: int) -> None:
        self.rows_read += 1
        self.tokens_read += tokens

    def keep(self, trained: int, masked: int, truncated: int = 0) -> None:
        self.rows_kept += 1
        self.rows_truncated += truncated > 0
        self.tokens_trained += trained
        self.tokens_masked += masked
        self.tokens_truncated += truncated

    def drop(self, reason: str, tokens: int) -> None:
        self.rows_dropped[reason] += 1
        self.tokens_dropped += tokens

    def check(self) -> None:
        """AssertionError unless all that was read is accounted for."""
        spent = self.tokens_trained + self.tokens_masked + self.tokens_truncated + self.tokens_dropped
        rows = self.rows_kept + self.rows_dropped.total()
        assert (self.tokens_read, self.rows_read) == (spent, rows), f"the ledger does not balance: {self}"

    def as_metrics(self) -> dict[str, int]:
        counts = {**vars(self), "rows_dropped": self.rows_dropped.total()}
        return {f"ledger/{name}": count for name, count in counts.items()}

    def __str__(self) -> str:
        dropped = "".join(f", {rows:,} dropped ({reason})" for reason, rows in self.rows_dropped.items())
        return (
            f"{self.rows_read:,} rows = {self.rows_kept:,} kept ({self.rows_truncated:,} of them truncated){dropped}; "
            f"{self.tokens_read:,} tokens = {self.tokens_trained:,} trained + {self.tokens_masked:,} masked"
            f" + {self.tokens_truncated:,} truncated + {self.tokens_dropped:,} dropped"
        )


def prepare(
    rows: Rows,
    encode: Callable[[dict], tuple[list[int], list[bool]]],
    max_length: int | None,
    on_overlong: Literal["error", "drop", "truncate"],
    ledger: Ledger,
    on_empty: Literal["error", "drop"] = "error",
) -> list[Example]:
    """The examples of all rows by `encode`: row -> (ids, loss mask), of at most `max_length` tokens (None: no limit).

    A row that trains nothing is a mistake, unless its messages say train: false; then it is dropped and counted.
    """

    def encode_something(row: dict) -> list[Example]:
        ids, loss_mask = encode(row)
        if not any(loss_mask[1:]) and not any(message.get("train") is False for message in row.get("messages") or []):
            raise EmptyRow("no token of this row would be trained")
        return [Example(ids, loss_mask, row=-1)]

    examples = []
    for [whole] in _encode_rows(rows, encode_something, max_length, "max_length", on_overlong, on_empty, ledger):
        kept = Example(whole.input_ids[:max_length], whole.loss_mask[:max_length], whole.row)
        cut = len(whole.input_ids) - len(kept.input_ids)
        if trained := int(kept.loss_mask.sum()):
            ledger.keep(trained, len(kept.input_ids) - trained, cut)
            examples.append(kept)
        else:
            ledger.drop("nothing left to train when truncated" if cut else "train: false", len(whole.input_ids))
    ledger.check()
    return examples


def prepare_completions(
    rows: Rows,
    encode: Callable[[dict], tuple[list[int], list[list[int]]]],
    max_length: int | None,
    on_overlong: Literal["error", "drop", "truncate"],
    ledger: Ledger,
    on_empty: Literal["error", "drop"] = "error",
) -> list[list[Example]]:
    """For each row the completions of its prompt, trained, ready to share it: `encode`: row -> (prompt, completions).

    What belongs to one row stays together: if one completion is too long the row is. A row is dropped, and counted,
    when truncation leaves a completion nothing, or makes two of them equal.
    """

    def encode_all(row: dict) -> list[Example]:
        prompt, completions = encode(row)
        return [
            Example(prompt + ids, [False] * len(prompt) + [True] * len(ids), row=-1, prompt_length=len(prompt))
            for ids in completions
        ]

    kept = []
    for whole in _encode_rows(rows, encode_all, max_length, "max_length", on_overlong, on_empty, ledger):
        group = [replace(e, input_ids=e.input_ids[:max_length], loss_mask=e.loss_mask[:max_length]) for e in whole]
        tokens, left = sum(len(e.input_ids) for e in whole), sum(len(e.input_ids) for e in group)
        if not all(e.loss_mask.any() for e in group):
            ledger.drop("nothing left to train when truncated", tokens)
        elif len({e.input_ids.tobytes() for e in group}) < len(group):
            ledger.drop("equal when truncated", tokens)
        else:
            trained = sum(int(e.loss_mask.sum()) for e in group)
            ledger.keep(trained, left - trained, tokens - left)
            kept.append(group)
    ledger.check()
    return kept


def prepare_prompts(
    rows: Rows,
    tokenizer: Tokenizer,
    max_prompt_length: int | None,
    on_overlong: Literal["error", "drop"],
    ledger: Ledger,
    chat_template_kwargs: dict | None = None,
) -> list[tuple[int, list[int]]]:
    """(row, ids) of every prompt. None is ever cut: half a question has no answer."""

    def encode(row: dict) -> list[Example]:
        ids = encode_prompt(row["prompt"], tokenizer, row.get("tools"), chat_template_kwargs)
        return [Example(ids, [False] * len(ids), row=-1)]

    prompts = _encode_rows(rows, encode, max_prompt_length, "max_prompt_length", on_overlong, "error", ledger)
    for [prompt] in prompts:
        ledger.keep(trained=0, masked=len(prompt.input_ids))
    ledger.check()
    return [(prompt.row, prompt.input_ids.tolist()) for [prompt] in prompts]


def _encode_rows(
    rows: Rows, encode: Callable[[dict], list[Example]], limit: int | None, flag: str, on_overlong: str, on_empty: str,
    ledger: Ledger,
) -> list[list[Example]]:
    """The sequences of all rows, entered as read. Overlong rows raise or are dropped here, or go on to be truncated."""
    groups, overlong = [], []
    bar = Progress(transient=True, disable=os.environ.get("RANK", "0") != "0")
    task, begin = bar.add_task("tokenising", total=len(rows)), time.monotonic()
    try:
        for i in range(len(rows)):
            if i % 100 == 99:
                bar.update(task, completed=i)
                if bar.console.is_terminal and not bar.live.is_started and time.monotonic() - begin > 2:
                    bar.start()
            try:
                group = [replace(example, row=i) for example in encode(rows[i])]
            except EmptyRow as error:
                if on_empty == "error":
                    raise UserError(f"{error}; mend the row, or choose --on_empty drop") from error
                ledger.read(0)  # it was never tokenised
                ledger.drop(error.reason, 0)
                continue
            length, tokens = max(len(e.input_ids) for e in group), sum(len(e.input_ids) for e in group)
            ledger.read(tokens)
            if limit is None or length <= limit or on_overlong == "truncate":
                groups.append(group)
            elif on_overlong == "drop":
                ledger.drop("overlong", tokens)
            else:
                overlong.append((length, i))
    except UserError as error:
        raise UserError(f"{rows.where(i)}: {error}") from error
    except KeyError as error:
        held = _listed([column for column, value in rows[i].items() if value is not None])
        raise UserError(f"{rows.where(i)}: this row has no {error}, only {held}; give it one or take it out") from error
    except (TypeError, AttributeError, OverflowError, RecursionError) as error:  # a date after 9999, a list in itself
        raise UserError(f"{rows.where(i)}: a value has the wrong type ({error})") from error
    finally:
        if bar.live.is_started:
            bar.stop()
    if overlong:
        length, i = overlong[0]
        ways = "drop" if flag == "max_prompt_length" else "drop or --on_overlong truncate"
        raise UserError(
            f"{rows.where(i)}: {length} tokens, over --{flag} {limit} (as in {len(overlong)} of {len(rows)} rows). "
            f"--{flag} {max(overlong)[0]} would do for all; or choose --on_overlong {ways}"
        )
    return groups


# ---------------------------------------------------------------- examples -> micro-batches


def draw(num_rows: int, cursor: int, count: int, seed: int) -> np.ndarray:
    """`count` row numbers from position `cursor` of an endless stream, each epoch of which is a permutation of its own.

    Nothing is kept between calls: a run's place in its data is one number, and so is what a resumed run needs.
    """
    epochs, places = np.divmod(np.arange(cursor, cursor + count), num_rows)
    drawn = np.empty(count, dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        drawn[here] = np.random.default_rng([seed, epoch]).permutation(num_rows)[places[here]]
    return drawn


def plan(lengths: Sequence[int], max_tokens: int, ranks: int = 1, one_per_row: bool = False) -> list[list[list[int]]]:
    """Cut sequences into micro-batches: [rank][micro_batch][index into lengths], every index once.

    As few as `max_tokens` allows (a longer sequence is alone), but equally many on every rank, and of equal size where
    they can be, for ranks wait for each other. Longest first, so that a run short of memory fails at once. Empty lists
    stand in where there are not sequences enough.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))

    def tokens(indices: list[int]) -> int:
        return sum(lengths[i] for i in indices)

    tight = [[i] for i in order] if one_per_row else _best_fit(order, lengths, max_tokens)
    count = len(tight) + -len(tight) % ranks
    bins = _spread(order, lengths, count)
    while any(len(indices) > 1 and tokens(indices) > max_tokens for indices in bins):
        if count == len(tight):  # too tight a fit to be even
            bins = tight
            break
        count += ranks
        bins = _spread(order, lengths, count)
    bins.sort(key=tokens, reverse=True)
    shares: list[list[list[int]]] = [[] for _ in range(ranks)]
    totals = [0] * ranks
    for k in range(0, len(bins), ranks):
        by_total = sorted(range(ranks), key=totals.__getitem__)  # whoever has least takes the largest
        for rank, indices in zip(by_total, bins[k : k + ranks], strict=True):
            shares[rank].append(indices)
            totals[rank] += tokens(indices)
    return shares


def _best_fit(order: list[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Bins of at most `budget` tokens: each sequence goes where it leaves the least room."""
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, bin), ascending
    for i in order:
        fit = bisect_left(room, (lengths[i], 0))
        free, chosen = room.pop(fit) if fit < len(room) else (budget, len(bins))
        if chosen == len(bins):
            bins.append([])
        bins[chosen].append(i)
        insort(room, (free - lengths[i], chosen))
    return bins


def _spread(order: list[int], lengths: Sequence[int], count: int) -> list[list[int]]:
    """`count` bins of equal size, nearly: each sequence goes where there is least."""
    bins: list[list[int]] = [[] for _ in range(count)]
    heap = [(0, chosen) for chosen in range(count)]
    for i in order:
        total, chosen = heap[0]
        bins[chosen].append(i)
        heapreplace(heap, (total + lengths[i], chosen))
    return bins


Layout = Literal["single", "packed", "shared"]  # one sequence a row; many; many, and equal prompts computed once


def pack(
    examples: Sequence[Example], max_tokens: int, ranks: int, layout: Layout, together: int = 1
) -> list[list[list[int]]]:
    """`plan` for examples: under "shared", those with the same prompt go together and pay for it once.

    Each `together` examples in a row (2: a pair, of one prompt) are never parted, even where that is over `max_tokens`
    and under "single", where what comes back is to be run one by one.
    """
    units: list[list[int]] = []
    costs: list[int] = []
    family_of: dict[bytes, int] = {}  # prompt -> the unit that still has room for more of it
    for first in range(0, len(examples), together):
        members, length = list(range(first, first + together)), examples[first].prompt_length
        prompt = examples[first].input_ids[:length].tobytes() if layout == "shared" else b""
        unit, cost = family_of.get(prompt), sum(len(examples[i].input_ids) for i in members)
        if prompt:
            cost -= together * length
        if prompt and unit is not None and costs[unit] + cost <= max_tokens:
            units[unit] += members
            costs[unit] += cost
        else:
            family_of[prompt] = len(units)
            units.append(members)
            costs.append(cost + length if prompt else cost)
    planned = plan(costs, max_tokens, ranks, one_per_row=layout == "single")
    return [[[i for unit in micro for i in units[unit]] for micro in share] for share in planned]


@dataclass
class MicroBatch:
    """B sequences in one row of N tokens, as drawn at the top of this file. Its tensors are on the device.

    Under the layout "shared" a sequence whose prompt stands in the row already comes without it:

        tokens            p   p   p   a   a   e   b   e     two completions of one prompt
        position_ids_N    0   1   2   3   4   5   3   4
        seq_N             0   0   0   0   0   0   1   1
        source_N          -   0   1   2   3   4   2   6     where the token is predicted from
    """

    indices: list[int]  # of the examples, in order; empty in the stand-in that keeps an idle rank in step
    input_ids_N: torch.Tensor  # int64
    position_ids_N: torch.Tensor  # int64
    seq_N: torch.Tensor  # int64
    loss_mask_N: torch.Tensor  # bool
    source_N: torch.Tensor  # int64
    cu_seqlens: torch.Tensor  # int32 [B + 1]
    lengths: list[int]  # of what stands in the row
    max_length: int
    prompts: list[range]  # where in the row the rest of a sequence stands, empty if it came whole

    def spread(self, values_B: torch.Tensor) -> torch.Tensor:
        """One value for each example of the step -> each token of this row has its sequence's [N], on its device."""
        chosen_B = values_B[self.indices] if self.indices else values_B.new_zeros(1)
        return chosen_B.to(self.input_ids_N.device)[self.seq_N]

    def take(self, values: Sequence[torch.Tensor]) -> torch.Tensor:
        """Per-token values of each example of the step -> those of this row's tokens [N], on its device."""
        parts = [values[i][len(prompt) :] for i, prompt in zip(self.indices, self.prompts)]
        return torch.cat(parts or [torch.zeros(1)]).to(self.input_ids_N.device)

    def give(self, values_N: torch.Tensor) -> list[torch.Tensor]:
        """The reverse of `take`: values of each whole example, on the CPU, 0 for a prompt that stands elsewhere."""
        parts = values_N.cpu().split(self.lengths)
        return [F.pad(part, (len(prompt), 0)) for _, part, prompt in zip(self.indices, parts, self.prompts)]


def collate(
    examples: Sequence[Example], indices: list[int], device: torch.device | str = "cpu", layout: Layout = "packed"
) -> MicroBatch:
    """Lay examples end to end. Without any: one token that has no loss, for this rank has to run a forward as well."""
    chosen = [examples[i] for i in indices] or [Example([0], [False], row=-1)]
    lengths, prompts, sources, written = [], [], [], 0
    first_of: dict[bytes, int] = {}  # prompt -> where in the row it begins
    for example in chosen:
        prompt = example.input_ids[: example.prompt_length].tobytes() if layout == "shared" else b""
        begin = first_of.setdefault(prompt, written)
        prompts.append(range(begin, begin + example.prompt_length) if prompt and begin < written else range(0))
        lengths.append(len(example.input_ids) - len(prompts[-1]))
        source = np.arange(written, written + lengths[-1]) - 1
        if prompts[-1]:
            source[0] = prompts[-1][-1]
        sources.append(source)
        written += lengths[-1]

    def tensor(parts: Sequence, dtype: torch.dtype) -> torch.Tensor:
        return torch.as_tensor(np.concatenate(parts), dtype=dtype).to(device)

    return MicroBatch(
        indices=list(indices),
        input_ids_N=tensor([example.input_ids[len(p) :] for example, p in zip(chosen, prompts)], torch.int64),
        position_ids_N=tensor([len(p) + np.arange(length) for length, p in zip(lengths, prompts)], torch.int64),
        seq_N=tensor([np.full(length, b) for b, length in enumerate(lengths)], torch.int64),
        loss_mask_N=tensor([example.loss_mask[len(p) :] for example, p in zip(chosen, prompts)], torch.bool),
        source_N=tensor(sources, torch.int64),
        cu_seqlens=tensor([[0], np.cumsum(lengths)], torch.int32),
        lengths=lengths,
        max_length=max(lengths),
        prompts=prompts,
    )


def segment_sum(values_N: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
    """Sums over each sequence: values_B. A stand-in micro-batch has B = 1.

    Not by index_add: on a GPU that adds in no fixed order, and a resumed run would differ in its last bits.
    """
    lengths_B = batch.cu_seqlens.diff().long()
    return torch.segment_reduce(values_N, "sum", lengths=lengths_B, unsafe=True)  # unsafe: no check that awaits the GPU
