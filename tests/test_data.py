"""common/data.py: token ids, loss masks, packing, the ledger, and one clear sentence for every mistake in the data."""

import gzip
import json
import os
import re
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from templates import FAMILIES, GPT_OSS, LFM2, byte_tokenizer, metaspace_tokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from common.data import (
    Example,
    Ledger,
    Rows,
    assistant_spans,
    collate,
    draw,
    encode_completion,
    encode_conversation,
    encode_prompt,
    encode_text,
    load_rows,
    plan,
    prepare,
    prepare_prompts,
    render_chat,
    require_columns,
    segment_sum,
)
from common.run import UserError

REAL_DATA = Path(os.environ.get("POSTSCRIPTS_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
needs_real_data = pytest.mark.skipif(
    not REAL_DATA.is_dir(), reason=f"no data sets at {REAL_DATA}; set POSTSCRIPTS_DATA to a folder that holds them"
)
quick = settings(max_examples=150, deadline=None, derandomize=True)


def rows_of(data: list[dict], name: str = "rows.jsonl") -> Rows:
    return Rows(name, data, list(data[0]), [f"{name}, line {i + 1}" for i in range(len(data))])


def write_lines(path: Path, rows: list[dict]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8").write(text)
    return path


def trained_texts(tokenizer, ids: list[int], loss_mask: list[bool]) -> list[str]:
    """The decoded runs of trained tokens."""
    runs, previous = [], False
    for token, trained in zip(ids, loss_mask, strict=True):
        if trained and not previous:
            runs.append([])
        if trained:
            runs[-1].append(token)
        previous = trained
    return [tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in runs]


# ---------------------------------------------------------------- plan, draw, collate


@quick
@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=60),
    max_tokens=st.integers(1, 400),
    ranks=st.integers(1, 9),
    one_per_row=st.booleans(),
)
def test_plan_places_every_sequence_once_within_the_budget(lengths, max_tokens, ranks, one_per_row):
    shares = plan(lengths, max_tokens, ranks, one_per_row)
    assert sorted(i for share in shares for batch in share for i in batch) == list(range(len(lengths)))
    assert len(shares) == ranks and len({len(share) for share in shares}) == 1
    for share in shares:
        sizes = [sum(lengths[i] for i in batch) for batch in share]
        assert sizes == sorted(sizes, reverse=True)
        for batch, size in zip(share, sizes, strict=True):
            assert size <= max_tokens or len(batch) == 1
            assert not (one_per_row and len(batch) > 1)
    assert sum(not batch for share in shares for batch in share) < ranks
    assert shares == plan(lengths, max_tokens, ranks, one_per_row)


def test_plan_uses_no_stand_in_where_a_split_will_do():
    for count in range(1, 20):
        for ranks in range(1, 9):
            shares = plan([10] * count, 1000, ranks)
            assert sum(not batch for share in shares for batch in share) == max(0, ranks - count)


def test_plan_keeps_a_fit_too_tight_to_be_made_even():
    """5 + 4 and 3 + 3 + 3 fill two bins of 9; to put every sequence where there is least would fill one with 10."""
    for ranks in (1, 2):
        batches = [sorted(batch) for share in plan([5, 4, 3, 3, 3], 9, ranks) for batch in share]
        assert sorted(batches) == [[0, 1], [2, 3, 4]]


def test_plan_gives_the_rank_that_has_least_the_larger_of_what_is_left():
    assert plan([100, 60, 50, 10], 100, ranks=2, one_per_row=True) == [[[0], [3]], [[1], [2]]]


@pytest.mark.parametrize("seed", range(3))
def test_plan_fills_the_budget_and_balances_the_ranks(seed):
    lengths = np.random.default_rng(seed).integers(20, 601, size=2000)
    one_rank = plan(lengths, 16_384)[0]
    assert lengths.sum() / (16_384 * len(one_rank)) > 0.95
    assert all(sum(lengths[batch]) > 0.95 * 16_384 for batch in one_rank[:-1])
    shares = plan(lengths, 16_384, ranks=4)
    totals = [sum(lengths[i] for batch in share for i in batch) for share in shares]
    assert max(totals) < 1.01 * min(totals)
    for together in zip(*shares, strict=True):
        sizes = [int(lengths[batch].sum()) for batch in together]
        assert max(sizes) < 1.05 * min(sizes), "ranks that wait for each other should do equal work"


@quick
@given(st.integers(1, 40), st.integers(0, 90), st.integers(1, 90), st.integers(0, 5), st.data())
def test_draw_is_a_permutation_of_every_epoch_and_resumes_anywhere(num_rows, start, count, seed, cut):
    for epoch in range(3):
        assert sorted(draw(num_rows, epoch * num_rows, num_rows, seed)) == list(range(num_rows))
    middle = cut.draw(st.integers(0, count))
    pieces = [draw(num_rows, start, middle, seed), draw(num_rows, start + middle, count - middle, seed)]
    assert np.array_equal(np.concatenate(pieces), draw(num_rows, start, count, seed))


def test_draw_differs_between_epochs_and_seeds():
    orders = [tuple(draw(50, epoch * 50, 50, seed)) for epoch in range(3) for seed in range(3)]
    assert len(set(orders)) == 9


def test_collate_draws_the_picture_of_the_docstring():
    examples = [
        Example([7], [True], 0),
        Example([1, 10, 11, 12, 2], [False, False, False, True, True], 1),
        Example([1, 20, 21, 2], [True] * 4, 2),
    ]
    batch = collate(examples, [1, 2], "cpu")
    assert batch.input_ids_N.tolist() == [1, 10, 11, 12, 2, 1, 20, 21, 2]
    assert batch.position_ids_N.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]
    assert batch.seq_N.tolist() == [0] * 5 + [1] * 4
    assert batch.loss_mask_N.tolist() == [False] * 3 + [True, True, False, True, True, True]
    assert batch.cu_seqlens.tolist() == [0, 5, 9]
    assert (batch.lengths, batch.max_length, batch.indices) == ([5, 4], 5, [1, 2])
    kinds = {name: value.dtype for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    assert kinds.pop("loss_mask_N") == torch.bool and kinds.pop("cu_seqlens") == torch.int32
    assert set(kinds.values()) == {torch.int64}


def test_collate_of_nothing_is_one_token_without_loss():
    batch = collate([], [], "cpu")
    assert batch.indices == [] and batch.lengths == [1] and batch.cu_seqlens.tolist() == [0, 1]
    assert batch.loss_mask_N.tolist() == [False]
    assert segment_sum(torch.ones(1), batch).tolist() == [1.0]


@quick
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=9))
def test_segment_sum_and_its_gradient(lengths):
    batch = collate([Example([5] * n, [True] * n, 0) for n in lengths], list(range(len(lengths))), "cpu")
    values_N = torch.arange(sum(lengths), dtype=torch.float64).requires_grad_()
    sums_B = segment_sum(values_N, batch)
    assert sums_B.tolist() == [part.sum().item() for part in values_N.split(lengths)]
    weights_B = torch.arange(1.0, len(lengths) + 1, dtype=torch.float64)
    (sums_B * weights_B).sum().backward()
    assert torch.equal(values_N.grad, weights_B[batch.seq_N])


# ---------------------------------------------------------------- ledger and prepare


@quick
@given(
    shapes=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=30),
    max_length=st.one_of(st.none(), st.integers(1, 40)),
    policy=st.sampled_from(["drop", "truncate"]),
)
def test_ledger_balances_whatever_the_lengths(shapes, max_length, policy):
    """T20 as well: no policy leaves an example without a trained token."""
    rows, ledger = rows_of([{"prompt": p, "completion": c} for p, c in shapes]), Ledger()

    def encode(row):
        return [9] * (row["prompt"] + row["completion"]), [False] * row["prompt"] + [True] * row["completion"]

    examples = prepare(rows, encode, max_length, policy, ledger)
    assert all(example.loss_mask.any() and not example.loss_mask[0] for example in examples)
    assert all(max_length is None or len(example.input_ids) <= max_length for example in examples)
    assert ledger.tokens_read == sum(p + c for p, c in shapes) and ledger.rows_read == len(shapes)
    assert ledger.tokens_trained == sum(int(example.loss_mask.sum()) for example in examples)
    assert ledger.tokens_masked == sum(int((~example.loss_mask).sum()) for example in examples)
    assert ledger.rows_kept == len(examples) and (policy == "truncate" or ledger.tokens_truncated == 0)
    metrics = ledger.as_metrics()
    assert metrics["ledger/tokens_read"] == sum(
        metrics[f"ledger/tokens_{fate}"] for fate in ("trained", "masked", "truncated", "dropped")
    )
    assert metrics["ledger/rows_dropped"] == len(shapes) - len(examples)
    assert "\n" not in str(ledger) and f"{ledger.tokens_read:,} tokens" in str(ledger)


def test_ledger_that_does_not_balance_says_so():
    ledger = Ledger()
    ledger.read(10)
    ledger.keep(trained=4, masked=5)
    with pytest.raises(AssertionError, match="balance"):
        ledger.check()
    ledger = Ledger()
    ledger.read(10)
    with pytest.raises(AssertionError, match="balance"):
        ledger.check()


def test_a_quick_job_prints_nothing(capfd):
    prepare(rows_of([{}] * 500), lambda row: ([1, 2], [True, True]), None, "error", Ledger())
    assert capfd.readouterr() == ("", "")


def test_overlong_rows_under_error_name_the_row_and_the_remedies():
    rows = rows_of([{"n": n} for n in (3, 12, 20, 4)])
    with pytest.raises(UserError) as error:
        prepare(rows, lambda row: ([9] * row["n"], [True] * row["n"]), 10, "error", Ledger())
    sentence = str(error.value)
    assert sentence.startswith("rows.jsonl, line 2: 12 tokens") and "2 of 4 rows" in sentence
    assert "--max_length 20" in sentence and "--on_overlong drop" in sentence and "truncate" in sentence


def test_truncation_that_leaves_nothing_to_train_drops_the_row():
    rows, ledger = rows_of([{"p": 10, "c": 3}, {"p": 2, "c": 9}]), Ledger()
    examples = prepare(rows, lambda r: ([9] * (r["p"] + r["c"]), [0] * r["p"] + [1] * r["c"]), 8, "truncate", ledger)
    assert [example.row for example in examples] == [1] and len(examples[0].input_ids) == 8
    assert (ledger.tokens_dropped, ledger.tokens_truncated) == (13, 3)
    assert (ledger.tokens_trained, ledger.tokens_masked) == (6, 2)
    assert ledger.rows_truncated == 1 and ledger.rows_dropped.total() == 1


def test_prompts_are_dropped_or_refused_but_never_cut():
    tokenizer, ledger = byte_tokenizer(["<s>", "</s>"], "<s>", "</s>", adds_bos=True), Ledger()
    rows = rows_of([{"prompt": "abc"}, {"prompt": "a" * 20}, {"prompt": "xy"}])
    prompts = prepare_prompts(rows, tokenizer, 8, "drop", ledger)
    assert [(row, len(ids)) for row, ids in prompts] == [(0, 4), (2, 3)]
    assert (ledger.tokens_read, ledger.tokens_masked, ledger.tokens_dropped) == (28, 7, 21)
    with pytest.raises(UserError, match=r"line 2: 21 tokens.*--max_prompt_length 21.*--on_overlong drop$"):
        prepare_prompts(rows, tokenizer, 8, "error", Ledger())


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"completion": "x"}, "line 2: this row has no 'prompt'"),
        ({"prompt": "a", "completion": ""}, "line 2: the completion is empty"),
        ({"prompt": "a", "completion": " \n"}, "line 2: the completion is empty"),
        ({"prompt": "", "completion": "b"}, "line 2: the prompt is empty"),
        ({"prompt": None, "completion": "b"}, "line 2: "),
        ({"prompt": 3, "completion": "b"}, "line 2: "),
        ({"prompt": "a", "completion": 3}, "line 2: a text is needed, and this is a int"),
        ({"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}, "line 2: a text is needed"),
        ({"prompt": "a", "completion": "\ud83d"}, "line 2: "),
    ],
)
def test_a_bad_row_is_named(row, sentence):
    tokenizer = byte_tokenizer(["</s>"], None, "</s>")

    def encode(row):
        prompt = encode_prompt(row["prompt"], tokenizer)
        completion = encode_completion(row["prompt"], row["completion"], tokenizer)
        return prompt + completion, [False] * len(prompt) + [True] * len(completion)

    with pytest.raises(UserError) as error:
        prepare(rows_of([{"prompt": "a", "completion": "b"}, row]), encode, None, "error", Ledger())
    assert f"rows.jsonl, {sentence}" in str(error.value)


def test_empty_rows_are_passed_over_when_asked_to():
    tokenizer, ledger = byte_tokenizer(["</s>"], None, "</s>"), Ledger()
    rows = rows_of([{"prompt": "a", "completion": text} for text in ("b", "", "c")])

    def encode(row):
        ids = encode_completion(row["prompt"], row["completion"], tokenizer)
        return [7, *ids], [False] + [True] * len(ids)

    with pytest.raises(UserError, match="line 2: the completion is empty; mend the row, or choose --on_empty drop"):
        prepare(rows, encode, None, "error", ledger)
    ledger = Ledger()
    assert [example.row for example in prepare(rows, encode, None, "error", ledger, on_empty="drop")] == [0, 2]
    assert dict(ledger.rows_dropped) == {"empty": 1} and ledger.rows_read == 3


def test_a_row_masked_on_purpose_is_dropped_and_one_that_trains_nothing_is_refused():
    tokenizer, ledger = FAMILIES["chatml"].tokenizer(), Ledger()
    said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    silent = [said[0], {**said[1], "train": False}]
    rows = rows_of([{"messages": said}, {"messages": silent}])
    examples = prepare(rows, lambda row: encode_conversation(row["messages"], tokenizer), None, "error", ledger)
    assert [example.row for example in examples] == [0] and dict(ledger.rows_dropped) == {"train: false": 1}
    with pytest.raises(UserError, match="line 1: no token of this row would be trained"):
        prepare(rows_of([{"text": "a"}]), lambda row: ([5], [True]), None, "error", Ledger())


# ---------------------------------------------------------------- text


def test_one_bos_and_never_an_eos():
    """T16, T17."""
    adds = byte_tokenizer(["<s>", "</s>"], "<s>", "</s>", adds_bos=True)
    bos, eos = adds.bos_token_id, adds.eos_token_id
    for text in ("hello", "<s>hello", ""):
        ids = encode_text(text, adds)
        assert ids[0] == bos and ids.count(bos) == 1 and eos not in ids
    assert encode_text("hello", adds, continuation=True) == encode_text("hello", adds)[1:]
    has_one_but_adds_none = byte_tokenizer(["<s>", "</s>"], "<s>", "</s>", adds_bos=False)
    assert encode_text("hello", has_one_but_adds_none).count(bos) == 0


def test_a_text_completion_ends_in_exactly_one_eos():
    tokenizer = byte_tokenizer(["<s>", "</s>"], "<s>", "</s>", adds_bos=True)
    for completion in (" 42", " 42</s>"):
        ids = encode_completion("6*7=", completion, tokenizer)
        assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id
        assert tokenizer.bos_token_id not in ids
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no EOS"):
        encode_completion("6*7=", " 42", tokenizer)


def test_prompt_and_completion_never_merge():
    """T18: a tokenizer that merges ": 42" across the boundary when it reads both at once."""
    words = ["</s>", *"Answer: 42", ": ", ": 4"]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    backend = Tokenizer(models.BPE(vocabulary, [(":", " "), (": ", "4")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    prompt, completion = encode_prompt("Answer:", tokenizer), encode_completion("Answer:", " 42", tokenizer)
    whole = encode_text("Answer: 42", tokenizer)
    assert vocabulary[": 4"] in whole and whole[: len(prompt)] != prompt, "the example has to merge to prove anything"
    assert tokenizer.convert_ids_to_tokens(prompt) == list("Answer:")
    assert tokenizer.convert_ids_to_tokens(completion) == [" ", "4", "2", "</s>"]


@pytest.mark.parametrize("legacy", [True, False])
def test_a_continuation_gets_no_invented_space(legacy):
    tokenizer = metaspace_tokenizer(legacy)
    tokens = tokenizer.convert_ids_to_tokens
    assert tokens(encode_text("hello", tokenizer)) == ["<s>", "▁hello"]
    assert tokens(encode_text("hello", tokenizer, continuation=True)) == ["hello"]
    assert tokens(encode_text(" hello", tokenizer, continuation=True)) == ["▁hello"]
    assert tokens(encode_text("\nhello", tokenizer, continuation=True)) == ["<0x0A>", "hello"]
    assert encode_text("", tokenizer, continuation=True) == []
    for text in ("hello", " hello", "  42", "\n\nok", "é ok"):
        joined = encode_text("ok", tokenizer) + encode_text(text, tokenizer, continuation=True)
        assert tokenizer.decode(joined, skip_special_tokens=True) == "ok" + text


@quick
@given(st.text(st.characters(codec="utf-8", exclude_characters="▁"), min_size=1, max_size=12), st.booleans())
def test_a_continuation_decodes_to_its_text(text, legacy):
    tokenizer = METASPACE[legacy]
    assume(not any(token in text for token in tokenizer.all_special_tokens))  # decoding skips them
    joined = encode_text("ok", tokenizer) + encode_text(text, tokenizer, continuation=True)
    assert tokenizer.decode(joined, skip_special_tokens=True) == "ok" + text


METASPACE = {legacy: metaspace_tokenizer(legacy) for legacy in (True, False)}


def test_a_newline_that_merges_is_not_lost():
    """Behind an added newline, "\\n" merges with it: then the text is tokenised as it stands."""
    backend = Tokenizer(models.BPE({"▁": 0, "\n": 1, "\n\n": 2, "a": 3, "</s>": 4}, [("\n", "\n")]))
    backend.normalizer = normalizers.Prepend("▁")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    assert encode_text("a", tokenizer, continuation=True) == [3]
    assert encode_text("\na", tokenizer, continuation=True) == [0, 1, 3]


def test_a_vocabulary_without_letters():
    """It can be asked whether it invents spaces, and a text that it has no tokens for is refused."""
    backend = Tokenizer(models.WordLevel({"1": 0, "2": 1, "</s>": 2}))
    backend.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    assert encode_completion("1", "21", tokenizer) == [1, 0, 2]
    with pytest.raises(UserError, match="the tokenizer refuses the text 'hello'"):
        encode_prompt("hello", tokenizer)


# ---------------------------------------------------------------- chat

SYSTEM = {"role": "system", "content": "Be brief."}
TALK = [
    {"role": "user", "content": "Hi there."},
    {"role": "assistant", "content": "Hello. <b>How</b> are you?"},
    {"role": "user", "content": "Two plus two?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Four."},  # again, to mislead whoever searches for the words
]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Add.", "parameters": {"type": "object"}}}]
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
ERRAND = [
    {"role": "user", "content": "Add two and two."},  # not TALK's words: Mistral shows the tools there too
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "add", "tool_call_id": "abcdefghi", "content": "4"},
    {"role": "assistant", "content": "Four."},
]


def expected(name: str, i: int, messages: list[dict]) -> str:
    """What the model should be trained to say for the plain assistant message i."""
    thought = "<think>\n\n</think>\n\n" if name == "qwen3" and i == len(messages) - 1 else ""
    return thought + (" " if name == "mistral" else "") + messages[i]["content"] + FAMILIES[name].stop


@pytest.mark.parametrize("turns", [1, 2, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_spans_are_what_the_assistant_says_and_its_end_of_turn(name, turns):
    family, messages = FAMILIES[name], TALK[: 2 * turns]
    tokenizer = family.tokenizer()
    text, spans = assistant_spans(messages, tokenizer)
    wanted = [expected(name, i, messages) for i in range(1, 2 * turns, 2)]
    assert [text[start:end] for start, end in spans] == wanted
    ids, loss_mask = encode_conversation(messages, tokenizer)
    assert trained_texts(tokenizer, ids, loss_mask) == wanted
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False).endswith(text)
    # What precedes the last turn is, to the id, what the sampler is given; the turn is what a completion is trained on.
    prompt = encode_prompt(messages[:-1], tokenizer)
    completion = encode_completion(messages[:-1], messages[-1:], tokenizer)
    both = len(prompt) + len(completion)
    assert ids[:both] == prompt + completion and not any(loss_mask[both:])
    assert completion == encode_completion(messages[:-1], messages[-1]["content"], tokenizer)
    assert tokenizer.decode(completion[-1]) == family.stop and completion.count(completion[-1]) == 1
    if family.adds_bos:
        assert [each.count(tokenizer.bos_token_id) for each in (ids, prompt, completion)] == [1, 1, 0]


@pytest.mark.parametrize("name", FAMILIES)
def test_which_turns_carry_loss(name):
    tokenizer = FAMILIES[name].tokenizer()
    wanted = [expected(name, i, TALK) for i in (1, 3, 5)]
    ids, loss_mask = encode_conversation(TALK, tokenizer, "last_turn")
    assert trained_texts(tokenizer, ids, loss_mask) == wanted[2:]
    same_ids, everything = encode_conversation(TALK, tokenizer, "all")
    assert same_ids == ids and all(everything)
    quiet = [*TALK[:3], {**TALK[3], "train": False}, *TALK[4:]]
    same_ids, loss_mask = encode_conversation(quiet, tokenizer)
    assert same_ids == ids and trained_texts(tokenizer, ids, loss_mask) == [wanted[0], wanted[2]]
    same_ids, loss_mask = encode_conversation(quiet, tokenizer, "all")
    assert same_ids == ids and len(trained_texts(tokenizer, ids, loss_mask)) == 2
    last_is_quiet = [*TALK[:5], {**TALK[5], "train": False}]
    assert not any(encode_conversation(last_is_quiet, tokenizer, "last_turn")[1])


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "mistral"])
def test_a_system_message_changes_no_span(name):
    family, messages = FAMILIES[name], [SYSTEM, *TALK]
    if family.system:
        text, spans = assistant_spans(messages, family.tokenizer())
        assert [text[start:end] for start, end in spans] == [expected(name, i, messages) for i in (2, 4, 6)]
    else:
        with pytest.raises(UserError, match="System role not supported"):
            assistant_spans(messages, family.tokenizer())


def test_mistral_forgets_a_system_message_that_the_prompt_has():
    """The stock template shows it with the very last message only, so no prompt is the beginning of what was said."""
    text, spans = assistant_spans([SYSTEM, *TALK], FAMILIES["mistral"].tokenizer())
    assert [text[start:end] for start, end in spans] == [TALK[i]["content"] + "</s>" for i in (1, 3, 5)]


CALLS = {
    "qwen2.5": '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 2}}\n</tool_call><|im_end|>',
    "qwen3": '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 2}}\n</tool_call><|im_end|>',
    "llama-3.1": '{"name": "add", "parameters": {"a": 2, "b": 2}}<|eot_id|>',
    "mistral": '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 2, "b": 2}, "id": "abcdefghi"}]</s>',
}


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)], ids=["list", "json"])
@pytest.mark.parametrize("talk_after", [0, 2, 4])
@pytest.mark.parametrize("name", CALLS)
def test_spans_of_tool_calls(name, talk_after, tools):
    """A call is trained, its result is not; also where it lies turns back and the tools have moved on (Mistral)."""
    tokenizer, messages = FAMILIES[name].tokenizer(), [*ERRAND, *TALK[:talk_after]]
    call = CALLS[name]
    ids, loss_mask = encode_conversation(messages, tokenizer, tools=tools)
    wanted = [call, *(expected(name, i, messages) for i in range(3, len(messages), 2 if talk_after else 1))]
    assert trained_texts(tokenizer, ids, loss_mask) == wanted
    assert "add" in tokenizer.decode(ids).replace(call, "", 1), "the tools are shown"


def test_calls_may_close_in_ways_of_their_own():
    specials = re.findall(r"<\|\w+\|>", LFM2 + GPT_OSS)
    tokenizer = byte_tokenizer(sorted({*specials, "<|endoftext|>"}), None, "<|endoftext|>")
    said = {}
    for template in (LFM2, GPT_OSS):
        tokenizer.chat_template = template
        said[template] = trained_texts(tokenizer, *encode_conversation([*ERRAND, *TALK[:2]], tokenizer))
    call = "<|tool_call_start|>[add(a=2, b=2)]<|tool_call_end|><|im_end|>"
    assert said[LFM2] == [call, "Four.<|im_end|>", TALK[1]["content"] + "<|im_end|>"]
    call = ' to=functions.add<|channel|>commentary json<|message|>{"a": 2, "b": 2}<|call|>'
    final = "<|channel|>final<|message|>"
    assert said[GPT_OSS] == [call, f"{final}Four.<|end|>", f"{final}{TALK[1]['content']}<|return|>"]


def test_arguments_as_json_text_and_templates_that_know_no_calls():
    tokenizer = FAMILIES["qwen3"].tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|call|>", "<|end|>", "<|return|>"]})
    function = {"name": "add", "arguments": '{"a": 2, "b": 2}'}
    as_text = [ERRAND[0], {**ERRAND[1], "tool_calls": [{"type": "function", "function": function}]}, *ERRAND[2:]]
    assert encode_conversation(as_text, tokenizer) == encode_conversation(ERRAND, tokenizer)
    tokenizer.chat_template = GPT_OSS.replace("call.arguments | tojson", "call.arguments")  # takes nothing but text
    assert trained_texts(tokenizer, *encode_conversation(as_text, tokenizer))[0].endswith('{"a": 2, "b": 2}<|call|>')
    with pytest.raises(UserError, match="leaves out the tool calls of message 1"):
        encode_conversation(ERRAND, FAMILIES["chatml"].tokenizer())


def test_llama_ends_a_call_of_a_built_in_tool_with_another_token():
    tokenizer = FAMILIES["llama-3.1"].tokenizer()
    text, spans = assistant_spans(ERRAND, tokenizer, chat_template_kwargs={"builtin_tools": ["search"]})
    assert text[slice(*spans[0])].endswith("}<|eom_id|>") and text[slice(*spans[1])] == "Four.<|eot_id|>"


def test_qwen3_drops_earlier_thoughts_and_trains_the_last():
    tokenizer = FAMILIES["qwen3"].tokenizer()
    thinking = [dict(message) for message in TALK]
    for i in (1, 3, 5):
        thinking[i]["content"] = f"<think>\nhm {i}\n</think>\n\n{TALK[i]['content']}"
    wanted = [TALK[1]["content"], TALK[3]["content"], "<think>\nhm 5\n</think>\n\nFour."]
    ids, loss_mask = encode_conversation(thinking, tokenizer)
    assert trained_texts(tokenizer, ids, loss_mask) == [said + "<|im_end|>" for said in wanted]
    as_field = [*TALK[:5], {**TALK[5], "reasoning_content": "hm 5"}]
    assert trained_texts(tokenizer, *encode_conversation(as_field, tokenizer))[2] == wanted[2] + "<|im_end|>"
    errand = [*ERRAND[:1], {**ERRAND[1], "reasoning_content": "call it"}, *ERRAND[2:]]
    assert trained_texts(tokenizer, *encode_conversation(errand, tokenizer, tools=TOOLS)) == [
        "<think>\ncall it\n</think>\n\n" + CALLS["qwen3"],
        "<think>\n\n</think>\n\nFour.<|im_end|>",
    ]


def test_qwen3_told_not_to_think_is_prompted_with_an_empty_thought():
    tokenizer, off = FAMILIES["qwen3"].tokenizer(), {"enable_thinking": False}
    for messages, first in ((TALK[:4], TALK[1]["content"] + "<|im_end|>"), (ERRAND, CALLS["qwen3"])):
        ids, loss_mask = encode_conversation(messages, tokenizer, chat_template_kwargs=off)
        assert trained_texts(tokenizer, ids, loss_mask) == [first, "Four.<|im_end|>"]
    assert tokenizer.decode(encode_prompt(TALK[:1], tokenizer, chat_template_kwargs=off)).endswith("</think>\n\n")


def test_metaspace_turns_lie_next_to_each_other_without_invented_spaces():
    tokenizer = metaspace_tokenizer(legacy=True)
    tokenizer.chat_template = FAMILIES["mistral"].template
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "ok world"}] * 2
    ids, loss_mask = encode_conversation(messages, tokenizer)
    assert tokenizer.decode(ids).endswith("[INST] hello[/INST] ok world</s>[INST] hello[/INST] ok world</s>")
    assert tokenizer.convert_ids_to_tokens([i for i, trained in zip(ids, loss_mask, strict=True) if trained]) == [
        *("▁ok", "▁world", "</s>"),
        *("▁ok", "▁world", "</s>"),
    ]


def test_keys_that_a_columnar_file_fills_with_none_are_no_tool_calls():
    tokenizer = FAMILIES["llama-3.1"].tokenizer()
    filled = [{**message, "tool_calls": None, "train": None} for message in TALK]
    assert encode_conversation(filled, tokenizer) == encode_conversation(TALK, tokenizer)
    for none in ([], "[]", "null"):
        assert render_chat(TALK, tokenizer, tools=none) == render_chat(TALK, tokenizer)


def test_mistakes_in_a_chat():
    tokenizer = FAMILIES["chatml"].tokenizer()
    user, reply = TALK[0], TALK[1]
    with pytest.raises(UserError, match="message 1, the assistant's, is empty"):
        encode_conversation([user, {"role": "assistant", "content": " "}], tokenizer)
    with pytest.raises(UserError, match="message 1, the assistant's, is empty"):
        encode_completion([user], "", tokenizer)
    with pytest.raises(UserError, match="no message of the assistant"):
        encode_conversation([user], tokenizer)
    with pytest.raises(UserError, match="train: false"):
        encode_conversation([{**user, "train": False}, reply], tokenizer)
    with pytest.raises(UserError, match="belongs into the completion"):
        encode_prompt([user, reply], tokenizer)
    with pytest.raises(UserError, match="one message of the assistant"):
        encode_completion([user], [reply, user, reply], tokenizer)
    for wrong in ([], [{"from": "human", "value": "hi"}], "hello", None, [3]):
        with pytest.raises(UserError, match="list of messages"):
            render_chat(wrong, tokenizer)
    with pytest.raises(UserError, match="refuses this conversation"):
        render_chat([{"role": "user", "content": None}], tokenizer)
    with pytest.raises(UserError, match="refuses this conversation"):
        render_chat([user], tokenizer, tools="[{]")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    with pytest.raises(UserError, match="no special token"):
        encode_conversation([user, reply], tokenizer)
    tokenizer.chat_template += "<|im_end|>"  # one end for all turns is no end of the first
    with pytest.raises(UserError, match="no special token"):
        encode_conversation(TALK, tokenizer)
    tokenizer.chat_template = "{{ messages[0]['content'] }}<|im_end|>"
    with pytest.raises(UserError, match="no special token|cannot be found"):
        encode_conversation([user, reply], tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="--chat_template"):
        encode_prompt([user], tokenizer)


# ---------------------------------------------------------------- files

PLAIN = [{"prompt": "a", "completion": "b", "label": True}, {"prompt": "c\nd", "completion": "é", "label": False}]
CONVENTIONS = {
    "messages": {"messages": TALK[:2]},
    "messages with tools": {"messages": ERRAND, "tools": TOOLS},
    "prompt completion": {"prompt": "a", "completion": "b"},
    "prompt completion chat": {"prompt": TALK[:1], "completion": TALK[1:2]},
    "text": {"text": "a b"},
    "explicit pairs": {"prompt": "a", "chosen": "b", "rejected": "c"},
    "implicit pairs": {"chosen": TALK[:2], "rejected": [TALK[0], TALK[3]]},
    "labelled": {"prompt": TALK[:1], "completion": TALK[1:2], "label": True},
    "prompt and reward columns": {"prompt": TALK[:1], "answer": "4", "difficulty": 0.5},
}


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.json", "x.json.gz", "x.parquet", "x.csv"])
def test_every_kind_of_file(name, tmp_path):
    path = tmp_path / name
    if "jsonl" in name:
        write_lines(path, PLAIN)
    elif name.endswith("parquet"):
        datasets.Dataset.from_list(PLAIN).to_parquet(str(path))
    elif name.endswith("csv"):
        datasets.Dataset.from_list(PLAIN).to_csv(str(path))
    else:
        (gzip.open if name.endswith(".gz") else open)(path, "wt", encoding="utf-8").write(json.dumps(PLAIN, indent=1))
    rows = load_rows(str(path))
    assert list(rows) == PLAIN and len(rows) == 2 and rows.columns == ["prompt", "completion", "label"]
    assert rows.where(1) == (f"{path}, line 2" if "jsonl" in name else f"{path}, row 1")
    assert list(load_rows(str(path), "train[1:]")) == PLAIN[1:] == list(load_rows(str(path), "train[-1:]"))
    assert load_rows(str(path), "train[1:2]").where(0) == rows.where(1)


@pytest.mark.parametrize("row", CONVENTIONS.values(), ids=CONVENTIONS)
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "disk"])
def test_every_column_convention(row, kind, tmp_path):
    path = tmp_path / f"x.{kind}"
    if kind == "jsonl":
        write_lines(path, [row, row])
        assert list(load_rows(str(path))) == [row, row]
    else:
        table = datasets.Dataset.from_list([row, row])
        table.save_to_disk(path) if kind == "disk" else table.to_parquet(str(path))
    rows = load_rows(str(path))
    assert rows.columns == list(row) and len(rows) == 2
    tokenizer = FAMILIES["qwen3"].tokenizer()
    if "messages" in row:
        ids, loss_mask = encode_conversation(rows[0]["messages"], tokenizer, tools=rows[0].get("tools"))
        assert trained_texts(tokenizer, ids, loss_mask) == trained_texts(
            tokenizer, *encode_conversation(row["messages"], tokenizer, tools=row.get("tools"))
        )
    for key in {"completion", "chosen", "rejected"} & set(row) if "prompt" in row else ():
        assert tokenizer.decode(encode_completion(rows[0]["prompt"], rows[0][key], tokenizer)).endswith("<|im_end|>")


def test_tools_of_one_row_keep_out_of_another(tmp_path):
    other = [{"type": "function", "function": {"name": "find", "parameters": {"properties": {"where": {}}}}}]
    path = write_lines(tmp_path / "x.jsonl", [{"tools": TOOLS}, {"tools": other}, {}])
    assert [row.get("tools") for row in load_rows(str(path))] == [TOOLS, other, None]


def test_a_folder_with_splits(tmp_path):
    write_lines(tmp_path / "train-0.jsonl", PLAIN[:1])
    write_lines(tmp_path / "train-1.jsonl.gz", PLAIN[1:])
    write_lines(tmp_path / "test.jsonl", PLAIN[1:])
    (tmp_path / ".hidden").mkdir()
    write_lines(tmp_path / ".hidden" / "train.jsonl", PLAIN)
    datasets.Dataset.from_list(PLAIN * 5).to_parquet(str(tmp_path / "train.parquet"))
    rows = load_rows(str(tmp_path))
    assert list(rows) == PLAIN and rows.where(1) == f"{tmp_path / 'train-1.jsonl.gz'}, line 1"
    assert list(load_rows(str(tmp_path), "test")) == PLAIN[1:]
    with pytest.raises(UserError, match=r"no file for the split 'validation'; it holds test\.jsonl"):
        load_rows(str(tmp_path), "validation")
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(UserError, match="no .jsonl"):
        load_rows(str(other))
    write_lines(other / "part.jsonl", PLAIN)
    assert list(load_rows(str(other))) == PLAIN


def test_a_saved_folder_with_splits(tmp_path):
    table = datasets.Dataset.from_list(PLAIN)
    datasets.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(tmp_path / "saved")
    assert list(load_rows(str(tmp_path / "saved"))) == PLAIN
    assert list(load_rows(str(tmp_path / "saved"), "test")) == PLAIN[1:]
    with pytest.raises(UserError, match="saved cannot be loaded .*validation"):
        load_rows(str(tmp_path / "saved"), "validation")


def test_hub_names_are_handed_to_datasets(monkeypatch):
    asked = []

    def load_dataset(*names, split):
        asked.append((*names, split))
        if "missing" in names[0]:
            raise FileNotFoundError("no such data set\n  on the hub")
        return datasets.Dataset.from_list(PLAIN)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(load_rows("owner/name:main", "test[:1]")) == PLAIN[:1]
    assert load_rows("owner/name").where(1) == "owner/name, row 1"
    assert asked == [("owner/name", "main", "test"), ("owner/name", None, "train")]
    with pytest.raises(UserError, match="owner/missing cannot be loaded .*no such data set on the hub"):
        load_rows("owner/missing")


def test_toy_rows():
    train, test = load_rows("toy:sort", "train[:5]"), load_rows("toy:sort", "test")
    assert len(train) == 5 and {"prompt", "completion", "answer"} <= set(test.columns) and len(test) == 512
    assert train.where(2) == "toy:sort, row 2"
    for name, split in (("toy:srot", "train"), ("toy:sort", "tset")):
        with pytest.raises(UserError, match="toy"):
            load_rows(name, split)


def test_toy_tokenizer():
    from common.toy import toy_tokenizer

    tokenizer = toy_tokenizer()
    assert tokenizer.decode(encode_prompt("4719=", tokenizer)).replace(" ", "") == "<s>4719="
    assert tokenizer.decode(encode_completion("4719=", "1479", tokenizer)).replace(" ", "") == "1479</s>"


def test_reasoning_gym_rows():
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed")
    train, again, test = (load_rows("reasoning_gym:chain_sum:20", split) for split in ("train", "train", "test"))
    assert list(train) == list(again) and len(train) == 20
    assert [row["question"] for row in train] != [row["question"] for row in test]
    assert train[0]["prompt"] == [{"role": "user", "content": train[0]["question"]}]
    assert train[0]["entry"]["answer"] == train[0]["answer"] and "metadata" in train[0]["entry"]
    with pytest.raises(UserError, match="no task 'chain_smu'.*chain_sum"):
        load_rows("reasoning_gym:chain_smu")
    with pytest.raises(UserError, match="reasoning_gym:<task>:<size>"):
        load_rows("reasoning_gym:chain_sum:many")


def test_a_missing_reasoning_gym_names_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match="pip install reasoning-gym"):
        load_rows("reasoning_gym:chain_sum")


# ---------------------------------------------------------------- mistakes in files


def bad_file(tmp_path: Path, name: str, content: bytes) -> str:
    (tmp_path / name).write_bytes(content)
    return str(tmp_path / name)


GOOD_LINE = b'{"text": "a"}\n'


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("x.jsonl", GOOD_LINE + '{"text": "é"}\n'.encode("latin1"), r"x\.jsonl, line 2: byte 11 is not UTF-8"),
        ("x.jsonl", GOOD_LINE * 2 + b'{"text": "a', r"x\.jsonl, line 3: not JSON, or cut short"),
        ("x.jsonl", GOOD_LINE + b"\n\n[1, 2]\n", r"x\.jsonl, line 4: a row is an object .* this is a list"),
        ("x.jsonl", b"", r"x\.jsonl \(split train\) holds no rows"),
        ("x.jsonl", b"\n \n", "holds no rows"),
        ("x.jsonl.gz", gzip.compress(GOOD_LINE * 9)[:-12], r"x\.jsonl\.gz.*damaged or cut short"),
        ("x.jsonl.gz", GOOD_LINE, r"x\.jsonl\.gz.*damaged or cut short"),
        ("x.json", b'{"text": "a"}', r"x\.json holds no list of rows"),
        ("x.json", GOOD_LINE * 2, r"x\.json: not JSON.*\.jsonl: one object a line"),
        ("x.json", b'[{"text": "a"}, "b"]', r"x\.json, row 1: a row is an object .* this is a str"),
        ("x.json", b'[{"text": "a"}', r"x\.json: not JSON, or cut short"),
        ("x.json.gz", gzip.compress(b"[]"), "holds no rows"),
        ("x.parquet", b"not parquet", r"x\.parquet cannot be loaded"),
        ("x.csv", b"", r"x\.csv cannot be loaded"),
        ("x.txt", b"hello", r"x\.txt: such a file cannot be read here"),
    ],
)
def test_bad_files(name, content, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        load_rows(bad_file(tmp_path, name, content))


def test_a_gz_cut_in_the_middle_names_the_line(tmp_path):
    lines = b"".join(b'{"text": "%d"}\n' % (i * 7919 % 10007) for i in range(20_000))
    path = bad_file(tmp_path, "x.jsonl.gz", gzip.compress(lines)[:-3000])
    with pytest.raises(UserError, match=r"x\.jsonl\.gz, line \d{4,}: the compressed file"):
        load_rows(path)


def test_a_byte_order_mark_is_no_mistake(tmp_path):
    assert list(load_rows(bad_file(tmp_path, "x.jsonl", b"\xef\xbb\xbf" + GOOD_LINE))) == [{"text": "a"}]


def test_missing_files_name_their_neighbours(tmp_path):
    write_lines(tmp_path / "train.jsonl", PLAIN)
    with pytest.raises(UserError, match=re.escape(f"did you mean {tmp_path / 'train.jsonl'}?")):
        load_rows(str(tmp_path / "trian.jsonl"))
    with pytest.raises(UserError, match="does not exist$"):
        load_rows("no/such/folder/at/all")
    with pytest.raises(UserError, match="one file and has no split 'test'"):
        load_rows(str(tmp_path / "train.jsonl"), "test")
    write_lines(tmp_path / "my_test.jsonl", PLAIN)
    assert len(load_rows(str(tmp_path / "my_test.jsonl"), "test")) == 2
    for split in ("train[", "train[:10%]", "", "train[a:b]"):
        with pytest.raises(UserError, match="is not understood"):
            load_rows(str(tmp_path / "train.jsonl"), split)
    with pytest.raises(UserError, match="holds no rows"):
        load_rows(str(tmp_path / "train.jsonl"), "train[5:]")


def test_missing_and_misspelt_columns():
    rows = rows_of([{"promt": "a", "completion": "b"}])
    with pytest.raises(UserError) as error:
        require_columns(rows, ("messages",), ("prompt", "completion"), ("text",))
    assert str(error.value) == (
        "rows.jsonl needs the columns messages or prompt + completion or text, and has promt, completion; "
        "should 'promt' be called 'prompt'?"
    )
    assert require_columns(rows, ("messages",), ("promt", "completion")) == ("promt", "completion")


# ---------------------------------------------------------------- real data


@needs_real_data
def test_real_conversations_train_exactly_what_the_assistant_says():
    rows = load_rows(str(REAL_DATA / "sft_messages_train.jsonl.gz"), "train[:60]")
    tokenizers = {name: family.tokenizer() for name, family in FAMILIES.items() if name not in ("gemma", "mistral")}
    for row in rows:
        for name, tokenizer in tokenizers.items():
            ids, loss_mask = encode_conversation(row["messages"], tokenizer)
            assert trained_texts(tokenizer, ids, loss_mask) == [
                expected(name, i, row["messages"]).replace(message["content"], message["content"].strip())
                if name == "llama-3.1"
                else expected(name, i, row["messages"])
                for i, message in enumerate(row["messages"])
                if message["role"] == "assistant"
            ]


@needs_real_data
@pytest.mark.parametrize(
    ("file", "columns"),
    [
        ("hh_helpful_train", ("prompt", "chosen", "rejected")),
        ("kto_hh_train", ("prompt", "completion", "label")),
        ("hh_helpful_implicit_500", ("chosen", "rejected")),
        ("gsm8k_train", ("prompt", "completion", "answer")),
        ("prompts_stories", ("prompt",)),
    ],
)
def test_real_files_load_and_balance(file, columns):
    rows, ledger = load_rows(str(REAL_DATA / f"{file}.jsonl.gz"), "train[:100]"), Ledger()
    assert require_columns(rows, columns) == columns and len(rows) == 100
    tokenizer = FAMILIES["smollm2"].tokenizer()
    if "prompt" in columns:
        prompts = prepare_prompts(rows, tokenizer, 500, "drop", ledger)
        assert len(prompts) == ledger.rows_kept and ledger.rows_read == 100
    for key in {"completion", "chosen", "rejected"} & set(columns) if "prompt" in columns else ():

        def encode(row, key=key):
            prompt = encode_prompt(row["prompt"], tokenizer)
            completion = encode_completion(row["prompt"], row[key], tokenizer)
            return prompt + completion, [False] * len(prompt) + [True] * len(completion)

        examples = prepare(rows, encode, 1000, "truncate", ledger)
        assert all(example.loss_mask.any() for example in examples)


@needs_real_data
def test_real_lengths_pack_tightly():
    rows = load_rows(str(REAL_DATA / "sft_messages_train.jsonl.gz"))
    lengths = [min(1024, sum(len(message["content"].split()) for message in row["messages"]) + 1) for row in rows]
    batches = plan(lengths, 16_384)[0]
    assert sum(lengths) / (16_384 * len(batches)) > 0.95
