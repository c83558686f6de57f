"""The "CartPole" of post-training: sort digits, with a character tokenizer and a Llama of 133,440 parameters.

    prompt "4719="   completion "1479"      BOS 4 7 1 9 = | 1 4 7 9 EOS

Prompts hold 4 to 8 random digits, so lengths differ. The demonstrator of the training split is careless on purpose:
35 % sorts as asked, 40 % sorts downwards, 25 % sorts as asked but for one slip. Supervised fine-tuning imitates that
mixture, whose right answer is a minority (so greedy decoding starts weak as well); reinforcement and preferences have
to select it and repair the rest. No file, no network: seconds on one core show whether an algorithm learns.

Everything is drawn from `random.Random(seed)`, whose numbers do not change between Python releases.
"""

import math
import random

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, PreTrainedTokenizerFast

from common.run import UserError

VOCABULARY = ["<pad>", "<s>", "</s>", "=", ".", *"0123456789", "<spare>"]
CORRECT, DESCENDING = 0.35, 0.40  # shares of the demonstrations; the rest has one slip


def toy_prompt(generator: random.Random) -> str:
    """Four to eight random digits and "="."""
    return "".join(generator.choice("0123456789") for _ in range(generator.randint(4, 8))) + "="


def gold(prompt: str) -> str:
    """The digits of a prompt in ascending order."""
    return "".join(sorted(prompt.removesuffix("=")))


def demonstration(prompt: str, generator: random.Random) -> str:
    """What the careless demonstrator answers: right, downwards, or right but for one replaced digit or one swap."""
    answer, kind = list(gold(prompt)), generator.random()
    if kind < CORRECT:
        pass
    elif kind < CORRECT + DESCENDING:
        answer.reverse()
    elif generator.random() < 0.5:
        place = generator.randrange(len(answer))
        answer[place] = generator.choice([digit for digit in "0123456789" if digit != answer[place]])
    else:
        first, second = generator.sample(range(len(answer)), 2)
        answer[first], answer[second] = answer[second], answer[first]
    return "".join(answer)


def toy_rows(split: str = "train", size: int | None = None, seed: int = 0) -> list[dict]:
    """Rows of {"prompt": "4719=", "completion": "1479", "answer": "1479"}.

    "train": `size` demonstrations (default 38,400: 300 steps of 128), `answer` being the right one. "test": the first
    `size` of 512 fixed prompts (`seed` does not change them), rightly completed; no training row has one of them.
    """
    generator, held_out = random.Random("toy:sort test"), {}
    while len(held_out) < 512:
        held_out[toy_prompt(generator)] = None
    if split == "test":
        return [{"prompt": p, "completion": gold(p), "answer": gold(p)} for p in held_out][:size]
    if split != "train":
        raise UserError(f"toy:sort has the splits train and test, not {split}")
    generator, rows = random.Random(f"toy:sort train {seed}"), []
    while len(rows) < (38_400 if size is None else size):
        prompt = toy_prompt(generator)
        if prompt not in held_out:
            rows.append({"prompt": prompt, "completion": demonstration(prompt, generator), "answer": gold(prompt)})
    return rows


def toy_pairs(split: str = "train", size: int | None = None, seed: int = 0) -> list[dict]:
    """Preference rows {"prompt": "4719=", "chosen": "1479", "rejected": "9741", "answer": "1479"}.

    Two different answers of the demonstrator, of which `prefers_first` chooses. "train": `size` pairs (default 4096);
    "test": the first `size` of the 512 fixed prompts of `toy_rows`, so that scripts evaluate on the same.
    """
    generator, rows = random.Random(f"toy:sort pairs {split} {0 if split == 'test' else seed}"), []
    for prompt in (row["prompt"] for row in toy_rows(split, 4096 if (split, size) == ("train", None) else size, seed)):
        first = second = demonstration(prompt, generator)
        while first == second:
            second = demonstration(prompt, generator)
        if not prefers_first(prompt, first, second, generator):
            first, second = second, first
        rows.append({"prompt": prompt, "chosen": first, "rejected": second, "answer": gold(prompt)})
    return rows


def prefers_first(
    prompt: str, first: str, second: str, generator: random.Random, temperature: float = 0.1
) -> bool:
    """A judge with the Bradley-Terry probability sigmoid((graded_1 - graded_2) / temperature).

    Close calls are noisy, as people are.
    """
    score_1, score_2 = graded([prompt] * 2, [first, second], [gold(prompt)] * 2)
    return generator.random() < 1 / (1 + math.exp((score_2 - score_1) / temperature))


def toy_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each character, 16 in all: PAD 0, BOS 1, EOS 2, "=" 3, "." 4, digits 5 to 14, one spare.

    Adds BOS and never EOS. Any other character becomes the spare.
    """
    vocabulary = {token: index for index, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<spare>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", VOCABULARY.index("<s>"))]
    )
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=64
    )


def toy_config() -> LlamaConfig:
    """Two layers of width 64. Two heads of 32, because vLLM refuses smaller heads."""
    return LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        initializer_range=0.05,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def exact_match(prompts: list[str], completions: list[str], answer: list[str], **_) -> list[float]:
    """1 for the right answer and nothing else, 0 otherwise."""
    return [float(completion == right) for completion, right in zip(completions, answer, strict=True)]


def graded(
    prompts: list[str], completions: list[str], answer: list[str], finish_reasons: list[str] | None = None, **_
) -> list[float]:
    """Share of positions that are right, of the longer of the two texts; halved for an answer that never stopped.

    finish_reasons: "stop" or "length" for each completion; taken as "stop" when not given.
    """
    scores = []
    for index, (completion, right) in enumerate(zip(completions, answer, strict=True)):
        hits = sum(a == b for a, b in zip(completion, right, strict=False))
        stopped = finish_reasons is None or finish_reasons[index] == "stop"
        scores.append(hits / max(len(completion), len(right)) * (1.0 if stopped else 0.5))
    return scores
