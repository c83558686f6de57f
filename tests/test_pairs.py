"""Preference pairs: found in a row, tokenised, cut to length, never parted, and the same whatever they are laid in."""

import os
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from templates import FAMILIES, byte_tokenizer
from tokenizers import Tokenizer, models
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from common.data import (
    EmptyRow, Example, Ledger, Rows, collate, encode_completion, encode_pair, encode_prompt, encode_text, load_rows,
    pack, plan, prepare_completions, segment_sum, split_pair,
)
from common.models import prepare_model, score_tokens
from common.run import UserError
from common.toy import toy_config, toy_pairs, toy_tokenizer

REAL_DATA = Path(os.environ.get("POSTSCRIPTS_DATA", Path(__file__).resolve().parents[1] / "data"))
needs_real_data = pytest.mark.skipif(
    not REAL_DATA.is_dir(), reason=f"no data sets at {REAL_DATA}; set POSTSCRIPTS_DATA to a folder that holds them"
)
quick = settings(max_examples=150, deadline=None, derandomize=True)


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict:
    return {"role": "assistant", "content": content}


def rows_of(data: list[dict], name: str = "pairs.jsonl") -> Rows:
    return Rows(name, data, list(data[0]), [f"{name}, line {i + 1}" for i in range(len(data))])


# ---------------------------------------------------------------- split_pair


def test_an_explicit_prompt_is_taken_as_it_is():
    text = {"prompt": "Q: x A:", "chosen": " Hello", "rejected": " Help"}
    assert split_pair(text) == ("Q: x A:", " Hello", " Help")
    assert split_pair({**text, "prompt": ""})[0] == ""  # no column and an empty one are different things
    chat = {"prompt": [user("Hi")], "chosen": [assistant("Hello.")], "rejected": [assistant("Help!")]}
    assert split_pair(chat) == (chat["prompt"], chat["chosen"], chat["rejected"])


@pytest.mark.parametrize(("chosen", "rejected", "prompt"), [
    ("Q: x A: Hello", "Q: x A: Help", "Q: x A:"),
    ("Q: x A: Hello there", "Q: x A: Hello world", "Q: x A: Hello"),
    ("Q: x A: He", "Q: x A: Help", "Q: x A:"),  # one reply begins the other: its word may not be cut
    ("Q: x A: Help", "Q: x A: Help me", "Q: x A:"),
    ("Q: x A: Help", "Q: x A: Help ", "Q: x A:"),
    ("Q: x A:  two", "Q: x A: one", "Q: x A:"),
    ("Q: x A: Yes", "Q: x A: No", "Q: x A:"),
    ("### Response:\nYes", "### Response:\nNo", "### Response:"),
    ("\n\nHuman: x\n\nAssistant: Yes", "\n\nHuman: x\n\nAssistant: No", "\n\nHuman: x\n\nAssistant:"),
    ("Q: x\n\n\tYes", "Q: x\n\n\tNo", "Q: x"),
])  # fmt: skip
def test_an_implicit_text_prompt_ends_at_the_space_before_the_word_in_which_they_part(chosen, rejected, prompt):
    for row in ({"chosen": chosen, "rejected": rejected}, {"prompt": None, "chosen": chosen, "rejected": rejected}):
        assert split_pair(row) == (prompt, chosen.removeprefix(prompt), rejected.removeprefix(prompt))
    assert split_pair({"chosen": rejected, "rejected": chosen})[0] == prompt


WORDS = st.text("ab: \n", max_size=8)


@quick
@given(WORDS, WORDS, WORDS)
@example("a: a\n", "a", "b")
def test_an_implicit_text_prompt_is_all_they_share_but_never_half_a_word(begin, chosen, rejected):
    chosen, rejected = begin + chosen, begin + rejected
    alike = os.path.commonprefix([chosen, rejected])
    shared_words = [i + 1 for i in range(len(alike) - 1) if not alike[i].isspace() and alike[i + 1].isspace()]
    row = {"chosen": chosen, "rejected": rejected}
    if chosen == rejected or not shared_words:
        with pytest.raises(UserError):
            split_pair(row)
    else:
        prompt = alike[: shared_words[-1]]
        assert split_pair(row) == (prompt, chosen[len(prompt) :], rejected[len(prompt) :])


QUESTION = [user("Hi there."), assistant("Hello."), user("Two plus two?")]
FORMS = {
    "explicit": {"prompt": QUESTION, "chosen": [assistant("Four.")], "rejected": [assistant("Five.")]},
    "implicit": {"chosen": [*QUESTION, assistant("Four.")], "rejected": [*QUESTION, assistant("Five.")]},
}
FORMS |= {
    "whole, and its last question": {**FORMS["implicit"], "prompt": "Two plus two?"},
    "whole, and its prompt": {**FORMS["implicit"], "prompt": QUESTION},
    "whole, and the end of its prompt": {**FORMS["implicit"], "prompt": QUESTION[-1:]},
    "whole, and no prompt in this row": {**FORMS["implicit"], "prompt": None},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_chat_pair_is_the_same_pair(form):
    row, explicit = FORMS[form], FORMS["explicit"]
    assert split_pair(row) == (QUESTION, explicit["chosen"], explicit["rejected"])
    tokenizer = FAMILIES["chatml"].tokenizer()
    assert encode_pair(row, tokenizer) == encode_pair(explicit, tokenizer)


def test_a_chat_reply_is_what_follows_the_last_common_message():
    """Alike in half of the reply: a message is never cut."""
    row = {"chosen": [user("q"), assistant("It is four.")], "rejected": [user("q"), assistant("It is five.")]}
    assert split_pair(row) == ([user("q")], [assistant("It is four.")], [assistant("It is five.")])


@pytest.mark.parametrize(("row", "words"), [
    ({"chosen": "a", "rejected": [assistant("b")]}, "both texts or both lists of messages, and these are str and list"),
    ({"prompt": "p", "chosen": 1, "rejected": 2}, "these are int and int"),
    ({"prompt": [user("q")], "chosen": "a", "rejected": "b"}, "are texts, and the prompt is not"),
    ({"chosen": "Yes", "rejected": "No"}, "share no first word, so there is no prompt; give a column prompt"),
    ({"chosen": "Yesterday", "rejected": "Yes"}, "share no first word"),
    ({"chosen": "\n\nHuman: a", "rejected": "\n\nHello"}, "share no first word"),
    ({"chosen": [assistant("a")], "rejected": [assistant("b")]}, "no message in common, .* give a column prompt"),
    ({**FORMS["implicit"], "prompt": "Two plus three?"}, "what they have in common is not the prompt"),
    ({**FORMS["implicit"], "prompt": QUESTION[:1]}, "what they have in common is not the prompt"),
    ({**FORMS["implicit"], "prompt": [user("Hm."), *QUESTION]}, "what they have in common is not the prompt"),
])  # fmt: skip
def test_what_is_no_pair_is_one_sentence(row, words):
    with pytest.raises(UserError, match=words) as error:
        split_pair(row)
    assert not isinstance(error.value, EmptyRow)


# ---------------------------------------------------------------- encode_pair


@pytest.mark.parametrize("name", FAMILIES)
def test_ids_are_those_of_prompt_and_completion(name):
    """T16, T17: one BOS where the model has one, one end, which is the model's own."""
    family, row = FAMILIES[name], FORMS["explicit"]
    tokenizer = family.tokenizer()
    prompt, completions = encode_pair(row, tokenizer)
    assert prompt == encode_prompt(QUESTION, tokenizer)
    assert completions == [encode_completion(QUESTION, row[side], tokenizer) for side in ("chosen", "rejected")]
    for ids, said in zip(completions, ("Four.", "Five."), strict=True):
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False).endswith(said + family.stop)
        assert ids.count(ids[-1]) == 1
        if family.adds_bos:
            assert (prompt + ids).count(tokenizer.bos_token_id) == 1


def test_texts_have_one_bos_and_one_eos():
    """T16, T17, also where a reply brings its own EOS."""
    tokenizer = byte_tokenizer(["<s>", "</s>"], "<s>", "</s>", adds_bos=True)
    for eos in ("", "</s>"):
        prompt, completions = encode_pair({"prompt": "6*7=", "chosen": "42" + eos, "rejected": "54"}, tokenizer)
        for ids in completions:
            assert [(prompt + ids).count(token) for token in (tokenizer.bos_token_id, tokenizer.eos_token_id)] == [1, 1]
            assert prompt[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id


def test_both_sides_have_the_same_prompt():
    """T49: read as one text, ": 42" merges and ": x" does not, so the two prompts would differ in length."""
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(["</s>", *"Answer: 42x", ": ", ": 4"]))}
    backend = Tokenizer(models.BPE(vocabulary, [(":", " "), (": ", "4")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    merged, apart = (encode_text(text, tokenizer) for text in ("Answer: 42", "Answer: xx"))
    assert len(merged) != len(apart), "the example has to merge to prove anything"
    explicit = {"prompt": "Answer:", "chosen": " 42", "rejected": " xx"}
    rows = rows_of([explicit, {"chosen": "Answer: 42", "rejected": "Answer: xx"}])
    encode = partial(encode_pair, tokenizer=tokenizer)
    for chosen, rejected in prepare_completions(rows, encode, None, "error", Ledger()):
        for side, tokens in ((chosen, [" ", "4", "2"]), (rejected, [" ", "x", "x"])):
            assert tokenizer.convert_ids_to_tokens(side.input_ids) == [*"Answer:", *tokens, "</s>"]
            assert side.prompt_length == 7 and side.loss_mask.tolist() == [False] * 7 + [True] * 4


def test_tools_and_template_flags_of_a_row_reach_its_template():
    tokenizer = FAMILIES["qwen3"].tokenizer()
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    row = {**FORMS["explicit"], "tools": tools, "chat_template_kwargs": {"enable_thinking": False}}
    prompt, [chosen, _] = encode_pair(row, tokenizer)
    assert '"name": "add"' in tokenizer.decode(prompt)
    assert tokenizer.decode(prompt).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert tokenizer.decode(chosen) == "Four.<|im_end|>"


@pytest.mark.parametrize(("row", "reason", "words"), [
    ({"prompt": "p", "chosen": "a", "rejected": "a"}, "equal", "chosen and rejected are equal"),
    ({"prompt": "p", "chosen": "", "rejected": ""}, "equal", "chosen and rejected are equal"),
    ({"chosen": QUESTION, "rejected": QUESTION}, "equal", "chosen and rejected are equal"),
    ({"prompt": "p", "chosen": "a", "rejected": "a<|im_end|>"}, "equal", "the same tokens"),
    ({"prompt": "p", "chosen": "", "rejected": "b"}, "empty", "the chosen reply is empty"),
    ({"prompt": "p", "chosen": "a", "rejected": " \n"}, "empty", "the rejected reply is empty"),
    ({"chosen": "p a", "rejected": "p "}, "empty", "the rejected reply is empty"),
    ({"prompt": QUESTION, "chosen": [assistant("")], "rejected": [assistant("b")]}, "empty", "the chosen reply is"),
    ({"prompt": QUESTION, "chosen": [assistant("a")], "rejected": [assistant("\n")]}, "empty", "the rejected reply is"),
])  # fmt: skip
def test_a_row_with_nothing_to_compare_is_refused_or_dropped_with_its_reason(row, reason, words):
    encode, good = partial(encode_pair, tokenizer=FAMILIES["chatml"].tokenizer()), FORMS["explicit"]
    with pytest.raises(EmptyRow, match=words) as error:
        encode(row)
    assert error.value.reason == reason
    with pytest.raises(UserError, match=f"^pairs.jsonl, line 2: .*{words}.*; mend the row, or choose --on_empty drop$"):
        prepare_completions(rows_of([good, row]), encode, None, "error", Ledger())
    ledger = Ledger()
    groups = prepare_completions(rows_of([good, row, good]), encode, None, "error", ledger, on_empty="drop")
    assert [side.row for group in groups for side in group] == [0, 0, 2, 2]
    assert dict(ledger.rows_dropped) == {reason: 1} and (ledger.rows_read, ledger.rows_kept) == (3, 2)


def test_replies_that_a_template_trims_alike_are_equal():
    """Llama 3.1 trims what is said, so that a space more is no preference."""
    row = {"prompt": QUESTION, "chosen": [assistant("Four.")], "rejected": [assistant(" Four.")]}
    with pytest.raises(EmptyRow, match="the same tokens"):
        encode_pair(row, FAMILIES["llama-3.1"].tokenizer())


def test_a_row_that_is_wrong_stays_wrong_when_empty_ones_are_dropped():
    encode = partial(encode_pair, tokenizer=FAMILIES["chatml"].tokenizer())
    more = [*FORMS["implicit"]["rejected"], user("Sure?"), assistant("Yes.")]
    for row, words in (
        ({"prompt": "p", "chosen": "a"}, "this row has no 'rejected', only prompt, chosen"),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, "the prompt is empty"),
        ({"chosen": "Yes", "rejected": "No"}, "share no first word"),
        ({"chosen": FORMS["implicit"]["chosen"], "rejected": more}, "one message of the assistant"),
        ({**FORMS["explicit"], "prompt": QUESTION[:2]}, "belongs into the completion|one message of the assistant"),
    ):
        with pytest.raises(UserError, match=f"^pairs.jsonl, line 2: .*({words})"):
            prepare_completions(rows_of([FORMS["explicit"], row]), encode, None, "drop", Ledger(), on_empty="drop")


# ---------------------------------------------------------------- prepare_completions


def as_written(row: dict) -> tuple[list[int], list[list[int]]]:
    return row["prompt"], [row["chosen"], row["rejected"]]


IDS = st.lists(st.integers(5, 6), min_size=1, max_size=5)  # of two kinds, so that many are alike at their beginning


@quick
@given(
    pairs=st.lists(st.tuples(IDS, IDS, IDS).filter(lambda pair: pair[1] != pair[2]), min_size=1, max_size=12),
    max_length=st.one_of(st.none(), st.integers(1, 9)),
    policy=st.sampled_from(["drop", "truncate"]),
)
@example([([5], [5, 5], [5, 6])], 2, "truncate")
@example([([5, 6], [5], [6])], 2, "truncate")
def test_pairs_are_kept_cut_or_dropped_as_one_and_the_ledger_balances(pairs, max_length, policy):
    rows, ledger = rows_of([dict(zip(("prompt", "chosen", "rejected"), pair)) for pair in pairs]), Ledger()
    groups = prepare_completions(rows, as_written, max_length, policy, ledger)

    kept, cut, dropped = [], 0, Counter()
    for i, (prompt, *replies) in enumerate(pairs):
        room = max_length - len(prompt) if max_length is not None else 99
        if max(map(len, replies)) > room and policy == "drop":
            dropped["overlong"] += 1
        elif room <= 0:
            dropped["nothing left to train when truncated"] += 1
        elif replies[0][:room] == replies[1][:room]:
            dropped["equal when truncated"] += 1
        else:
            kept += [(i, prompt + reply[:room], len(prompt)) for reply in replies]
            cut += any(len(reply) > room for reply in replies)
    assert [(e.row, e.input_ids.tolist(), e.prompt_length) for group in groups for e in group] == kept
    assert all(len(group) == 2 for group in groups) and ledger.rows_dropped == dropped
    for e in (e for group in groups for e in group):
        assert e.loss_mask.tolist() == [t >= e.prompt_length for t in range(len(e.input_ids))] and e.loss_mask.any()
    assert ledger.tokens_read == sum(2 * len(prompt) + len(a) + len(b) for prompt, a, b in pairs)
    assert (ledger.rows_read, ledger.rows_kept, ledger.rows_truncated) == (len(pairs), len(groups), cut)
    assert ledger.tokens_trained == sum(len(ids) - length for _, ids, length in kept)
    assert ledger.tokens_masked == sum(length for _, _, length in kept)
    ledger.check()


def test_a_pair_overlong_on_one_side_names_the_row_and_the_remedies():
    rows = rows_of([
        {"prompt": [9] * 3, "chosen": [5] * 4, "rejected": [6] * 2},
        {"prompt": [9] * 3, "chosen": [5] * 2, "rejected": [6] * 8},
        {"prompt": [9] * 3, "chosen": [5] * 12, "rejected": [6] * 8},
    ])  # fmt: skip
    with pytest.raises(UserError) as error:
        prepare_completions(rows, as_written, 10, "error", Ledger())
    sentence = str(error.value)
    assert sentence.startswith("pairs.jsonl, line 2: 11 tokens, over --max_length 10 (as in 2 of 3 rows)")
    assert "--max_length 15 would do" in sentence and "--on_overlong drop or --on_overlong truncate" in sentence
    ledger = Ledger()
    [[chosen, rejected]] = prepare_completions(rows, as_written, 10, "drop", ledger)
    assert (chosen.row, rejected.row) == (0, 0)
    assert (ledger.rows_dropped["overlong"], ledger.tokens_dropped) == (2, 3 + 2 + 3 + 8 + 3 + 12 + 3 + 8)
    ledger = Ledger()
    groups = prepare_completions(rows, as_written, 10, "truncate", ledger)
    assert [len(side.input_ids) for group in groups for side in group] == [7, 5, 5, 10, 10, 10]
    assert (ledger.tokens_truncated, ledger.rows_truncated) == (1 + 5 + 1, 2) and not ledger.rows_dropped
    assert [group[0].row for group in prepare_completions(rows, as_written, 15, "error", Ledger())] == [0, 1, 2]


# ---------------------------------------------------------------- pack


def sequence(prompt: int, prompt_length: int, length: int, row: int) -> Example:
    """The first tokens of prompt number `prompt`, then `length` of the completion."""
    ids = [100 + prompt] * prompt_length + [7] * length
    return Example(ids, [t >= prompt_length for t in range(len(ids))], row, prompt_length)


@st.composite
def pairs_of_few_prompts(draw) -> list[Example]:
    lengths = draw(st.lists(st.integers(1, 30), min_size=1, max_size=4))
    shape = st.tuples(st.integers(0, len(lengths) - 1), st.integers(1, 40), st.integers(1, 40))
    return [
        sequence(prompt, lengths[prompt], length, row)
        for row, (prompt, *both) in enumerate(draw(st.lists(shape, min_size=1, max_size=25)))
        for length in both
    ]


def tokens(examples: list[Example], micro: list[int], layout: str) -> int:
    """What a micro-batch costs, counted by hand."""
    if layout != "shared":
        return sum(len(examples[i].input_ids) for i in micro)
    prompts = {examples[i].input_ids[: examples[i].prompt_length].tobytes(): examples[i].prompt_length for i in micro}
    return sum(prompts.values()) + sum(len(examples[i].input_ids) - examples[i].prompt_length for i in micro)


@quick
@given(
    examples=pairs_of_few_prompts(),
    budget=st.integers(1, 400),
    ranks=st.integers(1, 5),
    layout=st.sampled_from(["shared", "packed", "single"]),
)
def test_pairs_are_never_parted(examples, budget, ranks, layout):
    shares = pack(examples, budget, ranks, layout, together=2)
    assert len(shares) == ranks and len({len(share) for share in shares}) == 1
    micro_batches = [micro for share in shares for micro in share]
    assert sorted(i for micro in micro_batches for i in micro) == list(range(len(examples)))
    assert sum(not micro for micro in micro_batches) < ranks
    for micro in micro_batches:
        assert all(chosen % 2 == 0 and rejected == chosen + 1 for chosen, rejected in zip(micro[::2], micro[1::2]))
        assert len(micro) % 2 == 0 and (layout != "single" or len(micro) <= 2)
        assert layout == "single" or len(micro) <= 2 or tokens(examples, micro, layout) <= budget
        if micro and layout != "single":
            assert len(collate(examples, micro, "cpu", layout).input_ids_N) == tokens(examples, micro, layout)
    assert shares == pack(examples, budget, ranks, layout, together=2)


def test_a_shared_prompt_is_paid_for_once_also_by_pairs_of_one_prompt():
    """Two pairs of one prompt of 10 tokens and replies of 5: 10 + 4 * 5 fill a budget of 30; unshared a pair does."""
    examples = [sequence(0, 10, 5, row) for row in (0, 0, 1, 1)]
    assert pack(examples, 30, 1, "shared", together=2) == [[[0, 1, 2, 3]]]
    assert len(collate(examples, [0, 1, 2, 3], "cpu", "shared").input_ids_N) == 30
    assert sorted(pack(examples, 29, 1, "shared", together=2)[0]) == [[0, 1], [2, 3]]
    assert sorted(pack(examples, 59, 1, "packed", together=2)[0]) == [[0, 1], [2, 3]]
    assert pack(examples, 60, 1, "packed", together=2) == [[[0, 1, 2, 3]]]
    # Another prompt between the two does not part them
    between = [examples[0], examples[1], sequence(1, 10, 5, 1), sequence(1, 10, 5, 1), *examples[2:]]
    assert sorted(map(sorted, pack(between, 30, 1, "shared", together=2)[0])) == [[0, 1, 4, 5], [2, 3]]
    assert len(pack(between, 50, 1, "shared", together=2)[0]) == 1


def test_a_pair_over_the_budget_is_alone_and_whole():
    examples = [sequence(p, 4, length, p) for p, length in ((0, 3), (0, 3), (1, 50), (1, 2), (2, 3), (2, 3))]
    for layout in ("shared", "packed"):
        micro_batches = pack(examples, 30, 1, layout, together=2)[0]
        assert micro_batches[0] == [2, 3] and sorted(i for micro in micro_batches for i in micro) == list(range(6))
    assert pack(examples, 30, 1, "single", together=2) == [[[2, 3], [0, 1], [4, 5]]]


def test_ranks_without_a_pair_get_a_stand_in():
    shares = pack([sequence(0, 4, 3, 0)] * 2, 100, 3, "shared", together=2)
    assert sorted(shares) == [[[]], [[]], [[0, 1]]]


@quick
@given(
    examples=pairs_of_few_prompts(),
    with_prompts=st.booleans(),
    budget=st.integers(1, 400),
    ranks=st.integers(1, 5),
    layout=st.sampled_from(["shared", "packed", "single"]),
)
def test_one_at_a_time_is_what_it_was_without_pairs(examples, with_prompts, budget, ranks, layout):
    """Each sequence joins the newest family of its prompt while that has room, and the families are planned."""
    if not with_prompts:
        examples = [Example(e.input_ids, e.loss_mask, e.row) for e in examples]
    families = []
    for i, e in enumerate(examples):
        prompt, rest = tuple(e.input_ids[: e.prompt_length]), len(e.input_ids) - e.prompt_length
        shares_it = [family for family in families if layout == "shared" and prompt and family["prompt"] == prompt][-1:]
        if shares_it and shares_it[0]["cost"] + rest <= budget:
            shares_it[0]["members"].append(i)
            shares_it[0]["cost"] += rest
        else:
            families.append({"prompt": prompt, "members": [i], "cost": len(e.input_ids)})
    planned = plan([family["cost"] for family in families], budget, ranks, one_per_row=layout == "single")
    wanted = [[[i for unit in micro for i in families[unit]["members"]] for micro in share] for share in planned]
    assert pack(examples, budget, ranks, layout) == pack(examples, budget, ranks, layout, together=1) == wanted


# ---------------------------------------------------------------- what the layout may not change


def toy_model():
    """Weights six times as large as usual, so that every position says something of its own."""
    torch.manual_seed(0)
    config = toy_config()
    config.initializer_range = 0.3
    return prepare_model(LlamaForCausalLM(config))


def toy_examples() -> list[Example]:
    """Ten pairs of the toy, and another of the first and of the fourth prompt: chosen at 2 p, rejected at 2 p + 1."""
    rows = toy_pairs("train", 10)
    rows += [{**rows[i], "chosen": "0123456789", "rejected": "7"} for i in (0, 3)]
    encode = partial(encode_pair, tokenizer=toy_tokenizer())
    return [side for group in prepare_completions(rows_of(rows), encode, 64, "error", Ledger()) for side in group]


def preference_loss(sums_B: torch.Tensor) -> torch.Tensor:
    """A loss that needs both sides of a pair at once."""
    return -F.logsigmoid(0.1 * (sums_B[::2] - sums_B[1::2])).sum()


def gradient_of(model) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def oracle(examples: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of the completions and the gradient: stock attention, whole logits, each sequence alone."""
    model = toy_model()
    model.set_attn_implementation("eager")
    sums = []
    for e in examples:
        ids = torch.tensor(e.input_ids).long()
        log_p = model(ids[None]).logits[0, :-1].double().log_softmax(-1)
        sums.append(log_p.gather(-1, ids[1:, None])[e.prompt_length - 1 :].sum())
    preference_loss(torch.stack(sums)).backward()
    return torch.stack(sums).detach(), gradient_of(model)


@pytest.mark.parametrize(("layout", "budget", "ranks"), [
    ("single", 1000, 1), ("packed", 1000, 1), ("packed", 60, 1),
    ("shared", 1000, 1), ("shared", 60, 1), ("shared", 60, 2),
])  # fmt: skip
def test_log_probs_and_gradients_of_pairs_are_those_of_separate_sequences(layout, budget, ranks):
    """To 1e-4 in log-probabilities and 1e-5 of the gradient, however the pairs are laid out."""
    model, examples = toy_model(), toy_examples()
    logprobs, computed = torch.full((len(examples),), torch.nan), 0
    for micro in (micro for share in pack(examples, budget, ranks, layout, together=2) for micro in share):
        sums = []
        for row in [[i] for i in micro] if layout == "single" else [micro]:
            batch = collate(examples, row, "cpu", layout)
            computed += len(batch.input_ids_N)
            sums.append(segment_sum(score_tokens(model, batch).logprobs_N, batch))
        logprobs[micro] = torch.cat(sums).detach()
        preference_loss(torch.cat(sums)).backward()
    wanted, gradient = oracle(examples)
    assert (wanted[::2] - wanted[1::2]).std() > 1, "the two sides have to differ to prove anything"
    torch.testing.assert_close(logprobs.double(), wanted, atol=1e-4, rtol=0)
    assert (gradient_of(model) - gradient).norm() / gradient.norm() < 1e-5
    unshared = sum(len(e.input_ids) for e in examples)
    assert computed < 0.8 * unshared if layout == "shared" else computed == unshared


# ---------------------------------------------------------------- real data


@needs_real_data
@pytest.mark.parametrize(("file", "pairs", "equal"), [
    ("hh_helpful_test_a", 1096, 0), ("hh_helpful_implicit_500", 500, 0), ("hh_helpful_standard_500", 500, 0),
    ("ultrafeedback_test_a", 100, 1), ("pandalm_human_test_a", 139, 0), ("pandalm_human_train", 575, 0),
])  # fmt: skip
def test_real_pairs_are_read_and_paid_for_once(file, pairs, equal):
    """All rows of several sources, as text and as chat; one row of UltraFeedback prefers a reply to itself."""
    tokenizer, ledger = FAMILIES["smollm2"].tokenizer(), Ledger()
    rows = load_rows(str(REAL_DATA / f"{file}.jsonl.gz"), "test" if "test" in file else "train")
    encode = partial(encode_pair, tokenizer=tokenizer)
    decode = partial(tokenizer.decode, clean_up_tokenization_spaces=False)
    groups = prepare_completions(rows, encode, None, "error", ledger, on_empty="drop")
    assert (ledger.rows_read, len(groups), ledger.rows_dropped["equal"]) == (pairs, pairs - equal, equal)
    for group in groups:
        chosen, rejected = group
        shared, row = chosen.prompt_length, rows[chosen.row]
        assert shared == rejected.prompt_length > 0
        assert chosen.input_ids[:shared].tobytes() == rejected.input_ids[:shared].tobytes()
        for column, side in zip(("chosen", "rejected"), group, strict=True):
            whole, reply = (decode(side.input_ids[begin:]) for begin in (0, shared))
            if isinstance(row[column], str):
                assert whole == row.get("prompt", "") + row[column] + "<|im_end|>"
            else:
                assert reply == row[column][-1]["content"] + "<|im_end|>"
    examples = [side for group in groups for side in group]
    costs = {
        layout: sum(tokens(examples, micro, layout) for micro in pack(examples, 20_000, 1, layout, together=2)[0])
        for layout in ("packed", "shared")
    }
    assert costs["packed"] == ledger.tokens_trained + ledger.tokens_masked
    assert costs["shared"] <= ledger.tokens_trained + ledger.tokens_masked / 2


@needs_real_data
def test_an_implicit_prompt_is_the_explicit_one_and_the_words_with_which_both_replies_begin():
    """The same 500 rows in two forms: 421 prompts are equal, 79 longer by whole words that both replies begin with."""
    files = (REAL_DATA / f"hh_helpful_{form}_500.jsonl.gz" for form in ("implicit", "standard"))
    longer = 0
    for implicit, explicit in zip(*(load_rows(str(file)) for file in files), strict=True):
        prompt, *replies = split_pair(implicit)
        asked, *answers = split_pair(explicit)
        more = prompt.removeprefix(asked)
        assert prompt == asked + more and [more + reply for reply in replies] == answers
        assert all(reply[0].isspace() for reply in replies) and more == more.rstrip()
        longer += bool(more)
    assert longer == 79
