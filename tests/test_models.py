"""Packed attention, token scores and weights out: held to stock transformers, one sequence at a time, in fp32."""

import copy
import re

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from common import models
from common.data import Example, collate, pack
from common.models import (
    add_lora,
    is_scorer,
    layout_of,
    load_policy,
    load_scorer,
    load_tokenizer,
    prepare_model,
    score_ends,
    score_tokens,
    without_adapter,
)
from common.run import UserError
from common.sharding import MasterAdamW, clip_gradients, full_parameters, make_optimizer, save_model, weight_sum

SMALL = dict(
    vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, head_dim=16,
    num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2,
)
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "qwen2": Qwen2Config(**{k: v for k, v in SMALL.items() if k != "head_dim"}),
    "qwen3": Qwen3Config(**SMALL),
    "gemma": GemmaConfig(**SMALL),
    "gemma3": Gemma3TextConfig(**SMALL, sliding_window=6, layer_types=["sliding_attention", "full_attention"]),
    "mistral_sliding": MistralConfig(**SMALL, sliding_window=5),
    "gpt_neox": GPTNeoXConfig(**{k: v for k, v in SMALL.items() if k not in ("head_dim", "num_key_value_heads")}),
}


def build(kind: str):
    torch.manual_seed(0)
    return prepare_model(AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[kind])))


def sequences(lengths=(9, 3, 17, 1, 8), seed=0) -> list[Example]:
    """Random ids; about half of the tokens carry loss, never the first."""
    generator = np.random.default_rng(seed)
    examples = []
    for row, length in enumerate(lengths):
        mask = generator.random(length) < 0.6
        mask[0] = False
        examples.append(Example(generator.integers(0, 97, length).astype(np.int32), mask, row))
    return examples


def slow_scores(model, example: Example, temperature: float):
    """float64 log-softmax over stock logits of one sequence alone; zeros where no loss is."""
    stock = model.config._attn_implementation
    model.set_attn_implementation("eager")
    ids = torch.tensor(example.input_ids, dtype=torch.long)
    logits = model(ids[None], use_cache=False).logits[0].double() / temperature
    model.set_attn_implementation(stock)
    logprobs = torch.zeros(len(ids), dtype=torch.float64)
    entropies = torch.zeros(len(ids), dtype=torch.float64)
    collisions = torch.zeros(len(ids), dtype=torch.float64)
    for t in range(1, len(ids)):
        if example.loss_mask[t]:
            log_p = logits[t - 1].log_softmax(-1)
            logprobs[t], entropies[t] = log_p[ids[t]], -(log_p.exp() * log_p).sum()
            collisions[t] = (log_p.exp() ** 2).sum().log()
    return logprobs, entropies, collisions


@pytest.mark.parametrize("kind", CONFIGS)
def test_packed_scores_equal_separate_ones(kind):
    model = build(kind)
    assert layout_of(model) == "shared"
    examples = sequences()
    order = [3, 0, 2, 4, 1]
    scores = score_tokens(model, collate(examples, order, torch.device("cpu")), temperature=0.7, statistics=True)
    expected = [slow_scores(model, examples[i], 0.7) for i in order]
    torch.testing.assert_close(scores.logprobs_N.double(), torch.cat([e[0] for e in expected]), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(scores.entropies_N.double(), torch.cat([e[1] for e in expected]), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(scores.collisions_N.double(), torch.cat([e[2] for e in expected]), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
def test_bf16_rounding_does_not_cost_the_layout(kind):
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[kind]), dtype=torch.bfloat16)
    assert layout_of(prepare_model(model)) == "shared"


def test_a_leak_between_documents_does(monkeypatch):
    """Attention that forgets the boundary of a document, as stock attention with a cache does, is seen at load."""
    monkeypatch.setattr(models, "segments", lambda batch, _: one_document(batch))
    assert layout_of(build("llama")) == "single"


def one_document(batch):
    index = torch.arange(len(batch.input_ids_N))
    ages = index[:, None] - index
    return models.Segments(batch.cu_seqlens, batch.cu_seqlens, 0, 0, index, index, [(1, ages)], index)


def families(seed=0) -> list[Example]:
    """Three prompts (of 6, 1 and 11 tokens) with 3, 2 and 1 completions of 2 to 20 tokens, shuffled."""
    generator, examples = np.random.default_rng(seed), []
    for prompt_length, completions in ((6, (4, 20, 2)), (1, (3, 8)), (11, (5,))):
        prompt = generator.integers(0, 97, prompt_length).astype(np.int32)
        for length in completions:
            ids = np.concatenate([prompt, generator.integers(0, 97, length).astype(np.int32)])
            mask = (np.arange(len(ids)) >= prompt_length) & (generator.random(len(ids)) < 0.8)
            mask[prompt_length] = True  # the first token after the prompt is the one that sharing moves
            examples.append(Example(ids, mask, len(examples), prompt_length))
    return [examples[i] for i in generator.permutation(len(examples))]


@pytest.mark.parametrize("kind", CONFIGS)
def test_shared_prompts_change_no_score_and_no_gradient(kind):
    """Prompts computed once against every sequence alone: scores to 2e-5, gradient to 1e-5 relative L2."""
    examples, results = families(), []
    for layout, budget in (("single", 1), ("shared", 1000), ("shared", 30)):
        model = build(kind)
        rows = pack(examples, budget, 1, layout)[0]
        scored, tokens = {}, 0
        for row in rows:
            batch = collate(examples, row, torch.device("cpu"), layout)
            tokens += len(batch.input_ids_N)
            scores = score_tokens(model, batch, statistics=True)
            (-scores.logprobs_N.sum() + 0.1 * scores.entropies_N.sum()).backward()
            scored |= dict(zip(row, batch.give(scores.logprobs_N.detach())))
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        results.append((torch.cat([scored[i] for i in range(len(examples))]), gradient, tokens))
    for logprobs, gradient, tokens in results[1:]:
        torch.testing.assert_close(logprobs, results[0][0], atol=2e-5, rtol=1e-5)
        assert (gradient - results[0][1]).norm() / results[0][1].norm() < 1e-5
        assert tokens < results[0][2]
    assert results[1][2] == 6 + 4 + 20 + 2 + 1 + 3 + 8 + 11 + 5


@pytest.mark.parametrize("prefix, window", [(0, None), (75, None), (0, 40), (75, 40)])
@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_attention_in_blocks_equals_torchs(prefix, window, heads, dtype, tolerance):
    """Of 150 queries, three blocks, the last not whole, behind a shared prompt or not; values and gradients."""
    torch.manual_seed(0)
    query, key, value, grad = (
        torch.randn(2, number, length, 16).to(dtype)
        for number, length in ((heads, 150), (2, prefix + 150), (2, prefix + 150), (heads, 150))
    )
    age_TS = prefix + torch.arange(150)[:, None] - torch.arange(prefix + 150)
    mask_TS = (age_TS >= 0) & (age_TS < (window or 1000))
    answers = []
    for attend, kind in (
        (lambda *qkv: models.block_attention(*qkv, mask_TS, 0.3), dtype),
        (lambda *qkv: torch.nn.functional.scaled_dot_product_attention(*qkv, mask_TS, scale=0.3, enable_gqa=True),
         torch.float64),
    ):  # fmt: skip
        inputs = [x.to(kind).requires_grad_() for x in (query, key, value)]
        out = attend(*inputs)
        answers.append([x.double() for x in (out, *torch.autograd.grad(out, inputs, grad.to(kind)))])
    for ours, theirs in zip(*answers):
        assert (ours - theirs).norm() < tolerance * theirs.norm()


def test_long_sequences_attend_as_they_do_alone():
    """Each over more than one block, in rectangles of several and of one, and longer than blocks are for."""
    generator, model = np.random.default_rng(0), build("llama")
    prompt, model.config.max_position_embeddings = generator.integers(0, 97, 70).astype(np.int32), 2048
    parts = [generator.integers(0, 97, length).astype(np.int32) for length in (90, 100, 31, 3)]
    examples = [Example(np.concatenate([prompt, ids]), [False] * 70 + [True] * len(ids), 0, 70) for ids in parts]
    examples.append(Example(generator.integers(0, 97, 1100).astype(np.int32), [False] + [True] * 1099, 0))
    for layout in ("packed", "shared"):
        batch = collate(examples, [4, 2, 0, 1, 3], "cpu", layout)
        got = batch.give(score_tokens(model, batch).logprobs_N)
        for i, logprobs_T in zip(batch.indices, got):
            expected_T, _, _ = slow_scores(model, examples[i], 1.0)
            torch.testing.assert_close(logprobs_T.double(), expected_T, atol=2e-5, rtol=1e-5)


def test_take_and_give_are_inverse_on_a_shared_row():
    examples = families()
    batch = collate(examples, [4, 0, 2, 1], "cpu", "shared")
    values = [torch.arange(len(e.input_ids)).float() + 100 * i for i, e in enumerate(examples)]
    for i, given in zip(batch.indices, batch.give(batch.take(values))):
        assert torch.equal(given[examples[i].prompt_length :], values[i][examples[i].prompt_length :])
    ids = batch.take([torch.tensor(e.input_ids).long() for e in examples])
    assert torch.equal(ids, batch.input_ids_N)


def test_soft_capped_attention_is_not_packed():
    """Gemma 2 caps its attention logits, which no packed kernel here does: one sequence per row, and correctly."""
    config = Gemma2Config(**SMALL, attn_logit_softcapping=1.0, final_logit_softcapping=2.0, sliding_window=64)
    torch.manual_seed(0)
    model = prepare_model(AutoModelForCausalLM.from_config(config, attn_implementation="eager"))
    assert layout_of(model) == "single"
    examples = sequences()
    with pytest.raises(AssertionError):
        score_tokens(model, collate(examples, [0, 1], torch.device("cpu")))
    scores = score_tokens(model, collate(examples, [2], torch.device("cpu")), temperature=0.7, statistics=True)
    logprobs, entropies, collisions = slow_scores(model, examples[2], 0.7)
    torch.testing.assert_close(scores.logprobs_N.double(), logprobs, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(scores.entropies_N.double(), entropies, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(scores.collisions_N.double(), collisions, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("most", [1, 2**22])  # many chunks of positions and of words, or one
def test_gradients_of_scores_equal_autograd(most, softcap):
    """Log-probs and entropies through the chunked, recomputing function against plain float64 autograd."""
    from common.models import _ScoreTokens

    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(150, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2500, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2500, generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.randint(2500, (150,), generator=generator)
    mix_logprob, mix_entropy = torch.randn(2, 150, generator=generator, dtype=torch.float64)

    z = hidden @ weight.T + bias
    z = (softcap * torch.tanh(z / softcap) if softcap else z) / 0.7
    log_p = z.log_softmax(-1)
    plain = (mix_logprob * log_p.gather(-1, target[:, None])[:, 0]).sum()
    plain = plain + (mix_entropy * -(log_p.exp() * log_p).sum(-1)).sum()
    expected = torch.autograd.grad(plain, (hidden, weight, bias))

    leaves = [x.detach().float().requires_grad_() for x in (hidden, weight, bias)]
    logprobs, entropies, *_ = _ScoreTokens.apply(*leaves, target, 0.7, softcap, most, True)
    loss = (mix_logprob.float() * logprobs).sum() + (mix_entropy.float() * entropies).sum()
    for ours, theirs in zip(torch.autograd.grad(loss, leaves), expected):
        torch.testing.assert_close(ours.double(), theirs, atol=1e-4, rtol=1e-4)


def test_collisions_are_statistics_without_a_gradient():
    """How likely two draws agree lies between 1 / V and 1, grows as the temperature falls, and trains nothing."""
    model, batch = build("llama"), collate(sequences(), [0, 2, 4], torch.device("cpu"))
    cold, warm = (score_tokens(model, batch, temperature, statistics=True).collisions_N for temperature in (0.2, 5.0))
    trained = batch.loss_mask_N
    assert (cold[trained] > warm[trained]).all() and (cold[trained] <= 0).all() and (warm[trained] > -np.log(97)).all()
    assert (cold[~trained] == 0).all() and not cold.requires_grad
    assert (score_tokens(model, batch).collisions_N == 0).all()  # not asked for


def test_gradient_does_not_depend_on_packing():
    """One row of all sequences, rows of one, checkpointing, in one gradient: relative L2 below 1e-5."""
    gradients = []
    together, alone, pairs = [[0, 1, 2, 3, 4]], [[4], [2], [0], [1], [3]], [[2, 1], [0, 3, 4]]
    for rows, checkpointing in ((together, False), (alone, False), (pairs, True)):
        model = build("qwen3")
        if checkpointing:
            from common.models import speed_up

            speed_up(model, gradient_checkpointing=True, torch_compile=False)
        for row in rows:
            batch = collate(sequences(), row, torch.device("cpu"))
            scores = score_tokens(model, batch, statistics=True)
            (-scores.logprobs_N.sum() + 0.1 * scores.entropies_N.sum()).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    for other in gradients[1:]:
        assert (other - gradients[0]).norm() / gradients[0].norm() < 1e-5


def test_no_logits_tensor_is_kept(monkeypatch):
    """Between forward and backward nothing of size K x V is alive: saved tensors are two numbers a token."""
    model = build("llama")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(tuple(x.shape)) or x, lambda x: x):
        score_tokens(model, collate(sequences((60, 60)), [0, 1], torch.device("cpu")), statistics=True)
    positions = sum(int(e.loss_mask.sum()) for e in sequences((60, 60)))
    assert (positions, 97) not in saved and (120, 97) not in saved


def test_masters_keep_small_updates_that_bf16_loses():
    """At lr 1e-6 bf16 weights near 1 do not move in a step; their masters do, and after enough steps so do they."""
    model = torch.nn.Linear(4, 4, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        model.weight.fill_(1.0)
    optimizer = make_optimizer(model, 1e-4, (0.9, 0.95), 1e-8, 0.0)
    assert isinstance(optimizer, MasterAdamW)
    for step in range(60):
        model(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
        assert model.weight.grad is None  # moved into the fp32 master
        optimizer.step()
        optimizer.zero_grad()
        if step == 0:
            assert (model.weight == 1.0).all() and (optimizer.param_groups[0]["params"][0] < 1.0).all()
    assert (model.weight < 1.0).all()


def test_the_sum_of_weights_sees_every_part_of_a_table():
    """Taken in parts of a million, for a table of embeddings in fp64 would be more than all else of a step."""
    model = torch.nn.Embedding(1100, 2000)
    optimizer = make_optimizer(model, 1e-4, (0.9, 0.95), 1e-8, 0.0)
    before = weight_sum(optimizer)
    assert before == pytest.approx(model.weight.detach().double().abs().sum().item(), rel=1e-12)
    for row in (0, 600, 1099):
        with torch.no_grad():
            model.weight[row, 0] *= 1.001
        before, last = weight_sum(optimizer), before
        assert before > last


def test_master_gradients_add_up_in_fp32():
    """Many small gradients after a large one: bf16 accumulation would drop them all."""
    model = torch.nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    optimizer = make_optimizer(model, 0.0, (0.9, 0.95), 1e-8, 0.0)
    for value in [1024.0] + [1.0] * 64:
        model(torch.full((1, 1), value, dtype=torch.bfloat16)).sum().backward()
    assert clip_gradients(optimizer, 0.0, 0.0).item() == 1024 + 64


@pytest.mark.parametrize("dora", [False, True])
def test_lora_reference_merge_and_save(tmp_path, dora):
    """A fresh adapter changes nothing; a trained one is merged into the weights an engine gets, names intact."""
    model = add_lora(build("llama"), r=4, alpha=8, target_modules=[], use_rslora=True, use_dora=dora)
    batch = collate(sequences(), [0, 2, 4], torch.device("cpu"))
    start = score_tokens(model, batch).logprobs_N
    with without_adapter(model):
        torch.testing.assert_close(score_tokens(model, batch).logprobs_N, start)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    trained = score_tokens(model, batch).logprobs_N
    assert (trained - start).abs().max() > 0.01
    fresh = build("llama")
    names = {name for name, _ in fresh.named_parameters()}
    weights = dict(full_parameters(model))
    assert set(weights) == names
    fresh.load_state_dict(weights, strict=False)
    torch.testing.assert_close(score_tokens(fresh, batch).logprobs_N, trained, atol=1e-4, rtol=1e-4)


def test_lora_on_the_head_is_refused():
    with pytest.raises(UserError, match="output head"):
        add_lora(build("llama"), r=4, alpha=8, target_modules=["lm_head"], use_rslora=False, use_dora=False)


def test_saved_folder_is_stock_and_keeps_generation_config(tmp_path):
    """Saved, reloaded by plain transformers, generates; generation_config is what it was."""
    model = load_policy("toy", torch.float32, torch.device("cpu"))
    model.generation_config.max_new_tokens = 7
    before = model.generation_config.to_dict()
    save_model(model, load_tokenizer("toy"), tmp_path / "final")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert again.config._attn_implementation == "sdpa" and again.config.use_cache
    assert {k: v for k, v in again.generation_config.to_dict().items() if v != before.get(k)} == {}
    assert again.generate(torch.tensor([[1, 5, 3]]), do_sample=False).shape[1] > 3
    assert layout_of(load_policy(str(tmp_path / "final"), torch.float32, torch.device("cpu"))) == "shared"


@pytest.mark.parametrize("name, words", [
    ("runs/sft/final", "python sft.py"), ("runs/nothing/final", "no such folder"), ("./nowhere", "no such folder"),
    ("model.gguf", "no such .gguf"),
])
def test_a_model_that_is_not_there_is_one_sentence(name, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words):
        load_policy(name, torch.float32, torch.device("cpu"))


# ------------------------------------------------------------------------------------------------ reward models


def scorer(kind: str, folder, seed: int = 0):
    """A reward model on top of the language model `kind`, which is written to `folder` first."""
    build(kind).save_pretrained(folder)
    torch.manual_seed(seed)
    return load_scorer(str(folder), torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt_neox"])
def test_scores_equal_the_stock_class_on_each_sequence_alone(kind, tmp_path):
    """Saved, and loaded by plain transformers: to 2e-5 what the packed scorer says, under every layout."""
    model, examples = scorer(kind, tmp_path / "policy"), families()
    assert layout_of(model) == "shared" and is_scorer(model) and not is_scorer(build(kind))
    model.save_pretrained(tmp_path / "scorer")
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "scorer").eval()
    assert stock.num_labels == 1 and type(stock) is type(model)
    alone_B = torch.stack([stock(torch.tensor(e.input_ids).long()[None]).logits[0, 0] for e in examples])
    assert alone_B.std() > 0.1
    model.config.pad_token_id = int(examples[0].input_ids[-1])  # T21: the last token is the last whatever its name is
    for layout, budget in (("single", 1), ("packed", 1000), ("packed", 30), ("shared", 1000), ("shared", 30)):
        scored_B = torch.full_like(alone_B, torch.nan)
        for row in pack(examples, budget, 1, layout)[0]:
            scored_B[row] = score_ends(model, collate(examples, row, torch.device("cpu"), layout))
        torch.testing.assert_close(scored_B, alone_B, atol=2e-5, rtol=1e-5)


def test_the_body_of_a_scorer_is_the_policys_and_its_head_small_and_repeatable(tmp_path):
    """T22: one label, no bias, fp32 also over a body in bf16, the same head from the same seed."""
    model, policy = scorer("llama", tmp_path), build("llama")
    for name, weight in policy.base_model.named_parameters():
        assert torch.equal(weight, model.base_model.get_parameter(name))
    assert (model.config.num_labels, model.score.bias, tuple(model.score.weight.shape)) == (1, None, (1, 64))
    assert not model.training and not hasattr(model, "lm_head")
    heads = [scorer("llama", tmp_path, seed).score.weight.detach() for seed in range(20)]
    assert torch.equal(heads[0], model.score.weight) and not torch.equal(heads[0], heads[1])
    assert abs(torch.stack(heads).std().item() * 65**0.5 - 1) < 0.06  # 1,280 draws: 3 standard errors
    half = load_scorer(str(tmp_path), torch.bfloat16, torch.device("cpu"))
    assert (half.dtype, half.score.weight.dtype) == (torch.bfloat16, torch.float32)
    assert score_ends(half, collate(sequences(), [0, 1], torch.device("cpu"))).dtype == torch.float32


@pytest.mark.parametrize("config, words", [
    (CohereConfig(**SMALL), "cannot become a reward model: Unrecognized configuration class .*"),
    (BertConfig(**{k: v for k, v in SMALL.items() if k not in ("head_dim", "num_key_value_heads")}, is_decoder=True),
     "cannot become a reward model: it is no causal model with a score"),
])  # fmt: skip
def test_a_model_that_cannot_score_is_one_sentence(config, words, tmp_path):
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UserError) as error:
        load_scorer(str(tmp_path), torch.float32, torch.device("cpu"))
    assert re.fullmatch(f"the model {re.escape(str(tmp_path))} {words}", str(error.value))


def test_the_padding_token_is_trained_like_any_other():
    """Where it ends turns, as in SmolLM2, its input embedding has to learn; stock embeddings mask its gradient."""
    model = load_policy("toy", torch.float32, torch.device("cpu"))
    padding = model.config.pad_token_id
    example = Example([1, 5, padding, 6, 7], [False, True, True, True, True], row=0)
    score_tokens(model, collate([example], [0], "cpu")).logprobs_N.sum().backward()
    assert padding is not None and model.get_input_embeddings().weight.grad[padding].abs().sum() > 0
