"""The two engines: what they sample, what they report of it, and that they agree with the trainer."""

import importlib.util
import itertools
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from common.engine import (
    Completion,
    Sampling,
    TransformersEngine,
    VLLMEngine,
    agreement,
    build_engine,
    draw_tokens,
    process_logits,
    request_seed,
    stop_ids,
    uniforms,
)
from common.run import UserError

ROOT = Path(__file__).resolve().parents[1]
SIZES = {
    "vocab_size": 16, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 320, "initializer_range": 0.3, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
PROMPTS = [[1, 5, 6, 7, 3], [1, 9, 3], [1, 5, 6, 7, 3], [1, 8, 8, 8, 8, 8, 8, 3], [1, 4]]


def llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True, architectures=["LlamaForCausalLM"])).eval()


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return llama()


def trainer_logprobs(model, prompt: list[int], completion: Completion, temperature: float = 1.0) -> list[float]:
    """Scores of the completion's tokens by one plain forward without a cache."""
    with torch.no_grad():
        logits_TV = model(torch.tensor([prompt + completion.token_ids]), use_cache=False).logits[0].float()
    logprobs_TV = (logits_TV / temperature).log_softmax(-1)
    return [logprobs_TV[len(prompt) - 1 + t, token].item() for t, token in enumerate(completion.token_ids)]


def disagreement(model, prompts: list[list[int]], completions: list[Completion], temperature: float = 1.0) -> dict:
    trainer = [trainer_logprobs(model, p, c, temperature) for p, c in zip(prompts, completions)]
    return agreement(list(itertools.chain(*(c.logprobs for c in completions))), list(itertools.chain(*trainer)))


def chi_square_is_plausible(counts: np.ndarray, expected: np.ndarray) -> bool:
    """Cells with fewer than five expected are pooled; five standard deviations of the chi-square distribution."""
    rare = expected < 5
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], max(expected[rare].sum(), 1e-9))
    statistic, freedom = ((counts - expected) ** 2 / expected).sum(), len(expected) - 1
    return statistic < freedom + 5 * math.sqrt(2 * freedom)


# ------------------------------------------------------------------------------------------------ plain values


def test_request_seeds_differ_and_are_the_same_in_every_process():
    seeds = [request_seed(*key) for key in itertools.product(range(2), range(5), range(7), range(8))]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**63 for seed in seeds)
    assert request_seed(1, 23, 4, 5) != request_seed(12, 3, 4, 5)
    command = "from common.engine import request_seed; print(request_seed(1, 2, 3, 4))"
    environment, root = os.environ | {"PYTHONHASHSEED": "77"}, Path(__file__).parents[1]
    output = subprocess.run([sys.executable, "-c", command], env=environment, cwd=root, capture_output=True, check=True)
    assert int(output.stdout) == request_seed(1, 2, 3, 4)


def test_bad_sampling_is_refused():
    for bad in ({"max_tokens": 0}, {"top_p": 0.0}, {"top_k": -1}, {"min_p": 2.0}, {"temperature": 1e-4}):
        with pytest.raises(UserError, match="sampling needs"):
            Sampling(**({"max_tokens": 4} | bad))


def test_agreement():
    assert agreement([0.0, -1.0], [-0.5, -1.0]) == {"mean": 0.25, "max": 0.5}
    assert math.isnan(agreement([math.nan, -1.0], [0.0, -1.0])["max"])
    with pytest.raises(ValueError):
        agreement([0.0], [0.0, 0.0])


def word_tokenizer(words: list[str]):
    from tokenizers import Tokenizer
    from tokenizers.decoders import Fuse
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(BPE({word: i for i, word in enumerate(words)}, []))
    backend.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def test_stop_ids():
    tokenizer = word_tokenizer(["</s>", "a", "b", "\n", "a\n", "ab", "<|end|>"])
    assert stop_ids(tokenizer, None) == (0,)
    assert stop_ids(tokenizer, 2) == (0, 2)
    assert stop_ids(tokenizer, [6, 2]) == (0, 2, 6)
    assert stop_ids(tokenizer, None, ["\n"]) == (0, 3, 4)
    tokenizer.add_tokens(["ab"])
    assert stop_ids(tokenizer, None, ["ab"]) == (0, 5)
    for impossible in ("z", "b\n", ""):
        with pytest.raises(UserError, match="stop string"):
            stop_ids(tokenizer, None, [impossible])


# ------------------------------------------------------------------------------------------------ the distribution


def kept(**options) -> list[int]:
    """Which tokens of p = (.4 .3 .2 .1) survive."""
    logits_BV = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    return process_logits(logits_BV, Sampling(max_tokens=1, **options))[0].isfinite().nonzero()[:, 0].tolist()


def test_filters_keep_the_right_tokens():
    assert kept() == [0, 1, 2, 3]
    assert kept(top_k=2) == [0, 1] and kept(top_k=9) == [0, 1, 2, 3]
    assert kept(top_p=0.69) == [0, 1] and kept(top_p=0.71) == [0, 1, 2] and kept(top_p=1e-6) == [0]
    assert kept(min_p=0.49) == [0, 1, 2] and kept(min_p=0.51) == [0, 1] and kept(min_p=1.0) == [0]
    assert kept(top_k=3, top_p=0.7) == [0, 1]  # renormalised after top_k: (.44 .33 .22)
    assert kept(temperature=0.25, min_p=0.2) == [0, 1]  # after the temperature: p^4


def test_filters_agree_with_transformers():
    from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

    generator = torch.Generator().manual_seed(0)
    logits_BV = torch.randn(32, 50, generator=generator) * 3
    seen = torch.randint(50, (32, 6), generator=generator)
    seen_BV = torch.zeros(32, 50, dtype=torch.bool).scatter(1, seen, True)
    cases = [
        ({"top_k": 7}, TopKLogitsWarper(7)),
        ({"top_p": 0.8}, TopPLogitsWarper(0.8)),
        ({"min_p": 0.1}, MinPLogitsWarper(0.1)),
        ({"repetition_penalty": 1.7}, RepetitionPenaltyLogitsProcessor(1.7)),
    ]
    for options, theirs in cases:
        ours_BV = process_logits(logits_BV, Sampling(max_tokens=1, **options), seen_BV)
        torch.testing.assert_close(ours_BV, theirs(seen, logits_BV.clone()), msg=str(options))


def test_processing_does_not_touch_its_input():
    logits_BV = torch.randn(3, 9)
    before_BV = logits_BV.clone()
    process_logits(logits_BV, Sampling(1, 0.5, 0.9, 4, 0.1, 1.2), torch.ones(3, 9, dtype=torch.bool))
    assert torch.equal(logits_BV, before_BV)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-60, 60), min_size=2, max_size=20), st.floats(0, 1, exclude_max=True), st.floats(0.05, 1))
def test_a_drawn_token_is_never_an_excluded_one(logits, uniform, top_p):
    logits_BV = process_logits(torch.tensor([logits]), Sampling(max_tokens=1, top_p=top_p))
    for u in (0.0, uniform, math.nextafter(1, 0)):
        token_B = draw_tokens(logits_BV, torch.tensor([u], dtype=torch.float64))
        assert logits_BV[0, token_B[0]].softmax(-1) > 0 and logits_BV[0, token_B[0]] > -math.inf


def test_streams_are_uniform_and_a_longer_one_begins_with_the_shorter():
    assert np.array_equal(uniforms(2**63 - 1, 5), uniforms(2**63 - 1, 9)[:5])
    first = np.array([uniforms(request_seed(0, 0, 0, sample), 1)[0] for sample in range(2000)])
    assert chi_square_is_plausible(np.histogram(first, 20, (0, 1))[0], np.full(20, 100.0))


def test_sampled_frequencies_match_the_temperature(model):
    """Two tokens a sample: the second one has gone through the cache."""
    count, temperature = 20_000, 0.7
    engine = TransformersEngine(model, max_sequences=5000)
    completions = engine.generate([PROMPTS[0]] * count, list(range(count)), Sampling(2, temperature))
    pairs = np.bincount([16 * a + b for a, b in (c.token_ids for c in completions)], minlength=256)

    def expected(temperature):
        with torch.no_grad():
            continued = torch.tensor([PROMPTS[0] + [token] for token in range(16)])
            logprobs = (model(continued).logits.double() / temperature).log_softmax(-1)
        return count * (logprobs[0, -2][:, None] + logprobs[:, -1]).exp().flatten().numpy()

    assert chi_square_is_plausible(pairs, expected(temperature))
    assert not chi_square_is_plausible(pairs, expected(0.65))


def test_filtered_frequencies_match_the_renormalised_distribution(model):
    count, sampling = 4000, Sampling(1, 1.5, top_p=0.8, top_k=6, min_p=0.02, repetition_penalty=1.3, logprobs=True)
    completions = TransformersEngine(model, 4000).generate([PROMPTS[0]] * count, list(range(count)), sampling)
    counts = np.bincount([c.token_ids[0] for c in completions], minlength=16)
    with torch.no_grad():
        logits_BV = model(torch.tensor([PROMPTS[0]])).logits[:, -1]
    seen_BV = torch.zeros(1, 16, dtype=torch.bool)
    seen_BV[0, PROMPTS[0]] = True
    logprobs_V = process_logits(logits_BV, sampling, seen_BV)[0].log_softmax(-1)
    assert 2 <= logprobs_V.isfinite().sum() <= 6
    assert chi_square_is_plausible(counts, count * logprobs_V.exp().numpy())
    assert all(abs(c.logprobs[0] - logprobs_V[c.token_ids[0]].item()) < 1e-5 for c in completions)


# ------------------------------------------------------------------------------------------------ transformers engine


def sliding() -> MistralForCausalLM:
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4)).eval()


def learned_positions() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.3, eos_token_id=2)).eval()


@pytest.mark.parametrize("build", [llama, sliding, learned_positions])
def test_greedy_equals_generate(build):
    model = build()
    completions = TransformersEngine(model).generate(PROMPTS, [0] * 5, Sampling(12, 0, stop_token_ids=(2,)))
    for prompt, completion in zip(PROMPTS, completions):
        ids = torch.tensor([prompt])
        theirs = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=2, pad_token_id=0
        )
        assert completion.token_ids == theirs[0, len(prompt):].tolist()


@pytest.mark.parametrize("build", [llama, sliding, learned_positions])
def test_logprobs_equal_a_plain_forward(build):
    model = build()
    for temperature in (1.0, 0.6):
        sampling = Sampling(12, temperature, stop_token_ids=(2, 7), logprobs=True)
        completions = TransformersEngine(model).generate(PROMPTS * 4, list(range(20)), sampling)
        assert {c.finish_reason for c in completions} == {"stop", "length"}
        assert disagreement(model, PROMPTS * 4, completions, temperature)["max"] < 1e-4
        assert disagreement(model, PROMPTS * 4, completions, temperature + 0.5)["mean"] > 0.05
    assert TransformersEngine(model).generate(PROMPTS[:1], [0], Sampling(1))[0].logprobs is None


def test_a_sample_does_not_depend_on_its_batch(model):
    """Neighbours, order, padding, the size of a batch, rows that were dropped: none may change it."""
    sampling = Sampling(16, 1.0, stop_token_ids=(2, 5, 9))
    prompts, seeds = PROMPTS * 6, list(range(30))
    together = TransformersEngine(model).generate(prompts, seeds, sampling)
    assert len({len(c.token_ids) for c in together}) > 4
    alone = [TransformersEngine(model).generate([p], [s], sampling)[0] for p, s in zip(prompts, seeds)]
    small = TransformersEngine(model, max_sequences=4).generate(prompts[::-1], seeds[::-1], sampling)[::-1]
    assert together == alone == small
    assert together[0] != together[5]  # the same prompt under another seed


def test_stop_tokens_and_finish_reasons(model):
    engine, seeds = TransformersEngine(model), list(range(200))
    free = engine.generate([PROMPTS[0]] * 200, seeds, Sampling(8))
    stopped = engine.generate([PROMPTS[0]] * 200, seeds, Sampling(8, stop_token_ids=(2, 11)))
    assert all(c.finish_reason == "length" and len(c.token_ids) == 8 for c in free)
    for whole, cut in zip(free, stopped):
        ends = [t for t, token in enumerate(whole.token_ids) if token in (2, 11)]
        assert cut.token_ids == whole.token_ids[:ends[0] + 1 if ends else 8]
        assert cut.finish_reason == ("stop" if ends else "length")


def test_repetition_penalty_sees_prompt_and_completion(model):
    options = {"max_new_tokens": 10, "do_sample": False, "repetition_penalty": 1.8, "eos_token_id": None}
    theirs = model.generate(torch.tensor([PROMPTS[3]]), **options)
    ours = TransformersEngine(model).generate([PROMPTS[3], [1] * 20], [0, 0], Sampling(10, 0, repetition_penalty=1.8))
    assert ours[0].token_ids == theirs[0, len(PROMPTS[3]):].tolist()


def test_the_model_is_left_as_it_was_found():
    from common.models import prepare_model

    model = prepare_model(llama())
    assert model.config._attn_implementation == "packed"
    model.train()
    generator = torch.get_rng_state()
    completions = TransformersEngine(model).generate(PROMPTS, [0] * 5, Sampling(6, 0))
    assert model.training and model.config._attn_implementation == "packed" and model.config.use_cache is False
    assert torch.equal(generator, torch.get_rng_state()) and torch.is_grad_enabled()
    assert completions == TransformersEngine(llama()).generate(PROMPTS, [0] * 5, Sampling(6, 0))
    with pytest.raises(UserError):
        with torch.no_grad():
            model.lm_head.weight.fill_(math.nan)
        TransformersEngine(model).generate(PROMPTS, [0] * 5, Sampling(6))
    assert model.training and model.config._attn_implementation == "packed"


def test_lora_adapters_take_part():
    from peft import LoraConfig, get_peft_model

    plain = TransformersEngine(llama()).generate(PROMPTS, [0] * 5, Sampling(8, 0))
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(llama(), config).eval()
    completions = TransformersEngine(adapted).generate(PROMPTS, [0] * 5, Sampling(8, 0, logprobs=True))
    assert [c.token_ids for c in completions] != [c.token_ids for c in plain]
    assert disagreement(adapted, PROMPTS, completions)["max"] < 1e-4


def test_impossible_requests_are_refused(model):
    engine = TransformersEngine(model)
    with pytest.raises(UserError, match="no tokens"):
        engine.generate([[1, 5], []], [0, 0], Sampling(4))
    with pytest.raises(UserError, match="max_completion_length"):
        engine.generate([[1] * 317], [0], Sampling(4))
    assert len(engine.generate([[1] * 316], [0], Sampling(4))[0].token_ids) == 4
    assert engine.generate([], [], Sampling(4)) == []


# ------------------------------------------------------------------------------------------------ vLLM


needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """One engine for all tests, started from a config alone; torch must come out of it as it went in."""
    core = llama()
    core.config.architectures = None
    before = torch.get_num_threads(), torch.set_num_threads, torch.get_rng_state(), np.random.get_state()[1].tolist()
    cores = os.sched_getaffinity(0)
    engine = build_engine("vllm", core, tmp_path_factory.mktemp("engine"), dtype="float32", max_model_len=320)
    assert torch.get_num_threads() == before[0] and torch.set_num_threads is before[1]
    assert torch.equal(torch.get_rng_state(), before[2]) and np.random.get_state()[1].tolist() == before[3]
    assert os.sched_getaffinity(0) == cores
    with pytest.raises(RuntimeError, match="push_weights"):
        engine.generate(PROMPTS, [0] * 5, Sampling(4))
    yield engine
    engine.close()


@needs_vllm
def test_vllm_agrees_with_the_trainer_after_a_push(engine, model):
    engine.push_weights(model)
    sampling = Sampling(12, 0.7, stop_token_ids=(2, 7), logprobs=True)
    prompts, seeds = PROMPTS * 4, [request_seed(0, 0, 0, sample) for sample in range(20)]
    completions = engine.generate(prompts, seeds, sampling)
    assert disagreement(model, prompts, completions, 0.7)["max"] < 1e-3
    assert disagreement(model, prompts, completions, 1.0)["mean"] > 0.05  # a wrong temperature, or raw log-probs
    assert disagreement(llama(seed=1), prompts, completions, 0.7)["mean"] > 0.5  # stale weights
    assert {c.finish_reason for c in completions} == {"stop", "length"}
    for completion in completions:
        ends = [t for t, token in enumerate(completion.token_ids) if token in (2, 7)]
        assert ends == ([len(completion.token_ids) - 1] if completion.finish_reason == "stop" else [])
        assert completion.finish_reason == "stop" or len(completion.token_ids) == 12
    again = engine.generate(prompts[::-1], seeds[::-1], sampling)[::-1]
    assert [c.token_ids for c in again] == [c.token_ids for c in completions]
    assert engine.generate(prompts, seeds, Sampling(12, 0.7, stop_token_ids=(2, 7)))[0].logprobs is None


@needs_vllm
def test_vllm_forgets_prefixes_of_old_weights(engine):
    """300 shared tokens are two whole blocks of the CPU's cache: from old weights they would change what follows."""
    prompt = [1] + [5 + i % 10 for i in range(299)]
    for seed in (3, 4, 5):
        model = llama(seed)
        engine.push_weights(model)
        ours = TransformersEngine(model).generate([prompt], [0], Sampling(10, 0, logprobs=True))
        for _ in range(2):  # the second time from the cache
            theirs = engine.generate([prompt], [0], Sampling(10, 0, logprobs=True))
            assert theirs[0].token_ids == ours[0].token_ids
            assert agreement(theirs[0].logprobs, ours[0].logprobs)["max"] < 1e-3


@needs_vllm
def test_vllm_holds_a_copy_of_the_weights(engine):
    """An optimiser step must not reach the engine by itself: half of a batch would be sampled from other weights."""
    model = llama()
    engine.push_weights(model)
    before = engine.generate(PROMPTS, [0] * 5, Sampling(8, 0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    assert engine.llm.reset_prefix_cache()
    assert engine.generate(PROMPTS, [0] * 5, Sampling(8, 0)) == before


@needs_vllm
def test_vllm_processes_logits_in_the_same_order(engine, model):
    engine.push_weights(model)
    sampling = Sampling(1, 1.5, top_p=0.8, top_k=6, min_p=0.02, repetition_penalty=1.3, logprobs=True)
    ours = TransformersEngine(model).generate([PROMPTS[0]] * 300, list(range(300)), sampling)
    theirs = engine.generate([PROMPTS[0]] * 300, list(range(300)), sampling)
    logprob_of = {c.token_ids[0]: c.logprobs[0] for c in ours}
    assert {c.token_ids[0] for c in theirs} == set(logprob_of)
    assert all(abs(c.logprobs[0] - logprob_of[c.token_ids[0]]) < 1e-3 for c in theirs)


@needs_vllm
def test_vllm_errors_are_one_sentence(engine, model, monkeypatch):
    engine.push_weights(model)
    with pytest.raises(UserError, match="max_completion_length"):
        engine.generate([[1] * 317], [0], Sampling(4))

    def fail(*_, **__):
        raise RuntimeError("out of memory\n  on rank 0")

    with monkeypatch.context() as patch:
        patch.setattr(engine.llm, "generate", fail)
        with pytest.raises(UserError, match="died while sampling 1 completions: RuntimeError: out of memory on rank"):
            engine.generate([[1, 5]], [0], Sampling(4))
    with monkeypatch.context() as patch:
        patch.setattr(engine, "timeout", 0.2)
        patch.setattr(engine.llm, "generate", lambda *_, **__: time.sleep(60))
        with pytest.raises(UserError, match="longer than --generation_timeout 0.2 seconds for 1 completions"):
            engine.generate([[1, 5]], [0], Sampling(4))
    with pytest.raises(UserError, match="did not take the new weights"):
        engine.load_weights([("model.no_such.weight", torch.zeros(3))])
    engine.push_weights(model)
    engine.sleep(), engine.wake()  # nothing on CPU
    assert disagreement(model, PROMPTS, engine.generate(PROMPTS, [0] * 5, Sampling(4, logprobs=True)))["max"] < 1e-3


ADAPTER = """
import copy, sys
from pathlib import Path
import torch
from peft import LoraConfig, get_peft_model
from test_engine import PROMPTS, disagreement, llama
from common.engine import Sampling, VLLMEngine, build_engine

config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, use_rslora=True, task_type="CAUSAL_LM")
model = get_peft_model(llama(), config).eval()
engine = build_engine("vllm", model, Path(sys.argv[1]), dtype="float32", max_model_len=320)
load, loads = engine.load_weights, []
engine.load_weights = lambda tensors: loads.append(1) or load(tensors)
for round in range(3):
    before = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    engine.push_weights(model)
    completions = engine.generate(PROMPTS, [0] * 5, Sampling(8, 0.7, logprobs=True))
    assert disagreement(model, PROMPTS, completions, 0.7)["max"] < 1e-3
    assert disagreement(before, PROMPTS, completions, 0.7)["mean"] > 0.1
assert len(loads) == 1
"""


@needs_vllm
def test_of_a_lora_model_only_the_adapter_is_pushed_after_the_first_time(tmp_path):
    command = [sys.executable, "-c", ADAPTER, str(tmp_path / "engine")]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@needs_vllm
def test_vllm_leaves_training_alone(engine, model):
    """Gradients flow, and thread counts still obey, in the process that holds an engine."""
    loss = model(torch.tensor([PROMPTS[0]]), labels=torch.tensor([PROMPTS[0]])).loss
    loss.backward()
    assert model.lm_head.weight.grad.abs().sum() > 0
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    assert torch.get_num_threads() == threads + 1
    torch.set_num_threads(threads)


@needs_vllm
def test_a_vllm_that_cannot_start_says_so(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["NoSuchModel"]}')
    with pytest.raises(UserError, match="vLLM engine did not start"):
        VLLMEngine(tmp_path)


def test_a_missing_vllm_names_the_remedy(model, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="requirements-gpu.txt"):
        build_engine("vllm", model, tmp_path)
