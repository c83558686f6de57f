"""Models: load, adapt, run packed, score tokens. What changes here is what transformers or peft change.

Two ideas carry this file.

**Packed attention.** A micro-batch is one row of N tokens, B sequences end to end (`common/data.py`). We register one
attention implementation under the name "packed". On CUDA it is torch's own `varlen_attn` (flash attention over
cu_seqlens); elsewhere, and in fp32, it gathers sequences of similar length into small rectangles and attends in each,
so that no sequence sees another and no N x N mask is ever built. Right padding inside a rectangle is harmless: causal
attention never looks right. Sequences with one prompt may share it: the prompt stands in the row once, and the rest of
each attends to it and to itself. A model that cannot do this (state-space layers, soft-capped attention, anything whose
packed hidden states differ from its separate ones, which is measured at load) runs one sequence per row.

**Token log-probs without logits.** `score_tokens` projects only positions that carry loss, in chunks, and recomputes
the chunk's logits in the backward pass: log-softmax in fp32, temperature before it, never an [N, V] tensor.

Dropout is always off: with it the ratio of two forward passes is not 1, and packed attention does not implement it.

Dimension key: N tokens of a micro-batch, K positions with loss, B sequences, T positions of one sequence, V vocabulary,
H attention heads, D head size, E hidden size.
"""

import copy
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from transformers import (
    AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer,
    BitsAndBytesConfig,
)
from transformers.utils import logging as transformers_logging

from common import toy
from common.data import Example, Layout, MicroBatch, collate
from common.run import UserError

# ------------------------------------------------------------------------------------------------ packed attention


@dataclass
class Segments:
    """Which keys each token of a packed row attends to; built once per micro-batch, read by every layer.

    Every sequence of the row is a segment of queries; its keys are those of a prompt that stands elsewhere in the row,
    if it shares one, then its own. For `varlen_attn` that is cu_seqlens of both and one gather of the keys. Elsewhere
    it is rectangles: sequences with prompts of one length and rests of similar length, gathered all at once.
    """

    cu_queries: torch.Tensor  # int32 [B + 1]
    cu_keys: torch.Tensor
    longest_query: int
    longest_key: int
    key_index: torch.Tensor | None  # None: the keys are the row itself
    query_index: torch.Tensor | None  # of all rectangles laid flat, as key_index then is
    rectangles: list[tuple[int, torch.Tensor]]  # of each B, and how far [T, S] a key stands before a query
    slot_N: torch.Tensor | None  # where in all rectangles, laid flat, each token of the row came to stand


def segments(batch: MicroBatch, use_varlen: bool) -> Segments:
    """Rectangles group lengths that differ by at most a quarter, so little attention is wasted on padding."""
    device, starts = batch.input_ids_N.device, [0, *accumulate(batch.lengths)]
    longest_key = max(len(prompt) + length for prompt, length in zip(batch.prompts, batch.lengths))
    if use_varlen:
        cu_keys, key_index = batch.cu_seqlens, None
        if any(batch.prompts):
            own = [range(start, start + length) for start, length in zip(starts, batch.lengths)]
            keys = [list(prompt) + list(rest) for prompt, rest in zip(batch.prompts, own)]
            key_index = torch.tensor([key for part in keys for key in part], device=device)
            cu_keys = torch.tensor([0, *accumulate(map(len, keys))], dtype=torch.int32, device=device)
        return Segments(batch.cu_seqlens, cu_keys, batch.max_length, longest_key, key_index, None, [], None)

    queries, keys, rectangles, slot_N, written = [], [], [], torch.empty(starts[-1], dtype=torch.long), 0
    order = sorted(range(len(batch.lengths)), key=lambda b: (len(batch.prompts[b]), batch.lengths[b]))
    while order:
        prefix, shortest = len(batch.prompts[order[0]]), batch.lengths[order[0]]
        group = [b for b in order if len(batch.prompts[b]) == prefix and batch.lengths[b] <= 1.25 * shortest + 4]
        order = order[len(group):]
        column_T = torch.arange(batch.lengths[group[-1]])
        # Right of a short sequence its last token is repeated: causal attention never looks there, nobody reads it
        own_BT = torch.stack([starts[b] + column_T.clamp(max=batch.lengths[b] - 1) for b in group])
        prompt_BP = torch.tensor([list(batch.prompts[b]) for b in group], dtype=torch.long).view(len(group), prefix)
        age_TS = prefix + column_T[:, None] - torch.arange(prefix + len(column_T))
        for row, b in enumerate(group):
            slot_N[starts[b]:starts[b + 1]] = written + row * len(column_T) + column_T[:batch.lengths[b]]
        queries.append(own_BT.flatten())
        keys.append(torch.cat([prompt_BP, own_BT], dim=1).flatten())
        rectangles.append((len(group), age_TS.to(device)))
        written += own_BT.numel()
    query_index, key_index, slot_N = (index.to(device) for index in (torch.cat(queries), torch.cat(keys), slot_N))
    cu = batch.cu_seqlens
    return Segments(cu, cu, batch.max_length, longest_key, key_index, query_index, rectangles, slot_N)


def packed_attention(module, query, key, value, attention_mask, scaling=None, segments=None, sliding_window=None, **_):
    """Causal attention inside each sequence of a packed row. query [1, H, N, D] -> output [1, N, H, D]."""
    query, key = query.to(value.dtype), key.to(value.dtype)  # rotary embeddings under autocast hand back fp32
    if segments.slot_N is None:
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        if q.shape[1] != k.shape[1]:  # torch 2.11 has no grouped heads here; repeating them costs 2 %
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        if segments.key_index is not None:
            k, v = k[segments.key_index], v[segments.key_index]
        out = varlen_attn(
            q, k, v, segments.cu_queries, segments.cu_keys, segments.longest_query, segments.longest_key,
            scale=scaling, window_size=((sliding_window or 0) - 1, 0),
        )
        return out[None], None

    grouped, flat = query.shape[1] != key.shape[1], []
    key_index, pieces = segments.key_index, []  # pieces: of query, key and value for each rectangle
    for x, index, side in ((query, segments.query_index, 0), (key, key_index, 1), (value, key_index, 1)):
        rows = F.embedding(index, x[0].transpose(0, 1).flatten(1))  # whole rows, whose gradient adds up fastest so
        parts = rows.split([B * age_TS.shape[side] for B, age_TS in segments.rectangles])
        pieces.append([part.unflatten(1, x.shape[1::2]) for part in parts])
    for (B, age_TS), *qkv in zip(segments.rectangles, *pieces):
        q, k, v = (x.unflatten(0, (B, -1)).transpose(1, 2) for x in qkv)
        mask = None
        if age_TS.shape[0] < age_TS.shape[1] or (sliding_window is not None and sliding_window < age_TS.shape[0]):
            mask = (age_TS >= 0) & (age_TS < (sliding_window or 2**31))
        if age_TS.numel() <= 2**20 and not q.is_cuda:
            out = block_attention(q, k, v, (age_TS >= 0) if mask is None else mask, scaling)
        else:
            causal = mask is None
            out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scaling, enable_gqa=grouped)
        flat.append(out.transpose(1, 2).flatten(2).flatten(0, 1))  # [B * T, H * D]
    return F.embedding(segments.slot_N, torch.cat(flat)).unflatten(1, query.shape[1::2])[None], None


class _BlockAttention(torch.autograd.Function):
    """Causal attention for a CPU in matrix products, 64 queries at a time against the keys that they may see.

    query [B, H, T, D], key and value [B, K, S, D] with H a multiple of K: heads that share keys are stacked along T.
    What stands after the diagonal is mostly left out, and blocks are small enough to stay in the cache. Scores and
    softmax are fp32, and backward keeps only the weights, in the dtype of `value`. Up to 1,024 tokens forward and
    backward take half the time of torch's flash kernel, in bf16, and its memory is no concern yet.
    """

    @staticmethod
    def forward(ctx, query, key, value, mask_TS, scaling):
        ctx.scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        stacked = query.unflatten(1, (key.shape[1], -1))  # [B, K, H / K, T, D]
        out, weights, wide_key = torch.empty_like(stacked), [], key.float()
        for begin, end, seen in _blocks(mask_TS):
            query_rows = (stacked[:, :, :, begin:end].float() * ctx.scaling).flatten(2, 3)
            score = (query_rows @ wide_key[:, :, :seen].mT).unflatten(2, (-1, end - begin))
            weight = score.masked_fill_(~mask_TS[begin:end, :seen], float("-inf")).softmax(-1).to(value.dtype)
            out[:, :, :, begin:end] = (weight.flatten(2, 3) @ value[:, :, :seen]).view_as(stacked[:, :, :, begin:end])
            weights.append(weight.flatten(2, 3))
        ctx.save_for_backward(stacked, key, value, mask_TS, *weights)
        return out.flatten(1, 2)

    @staticmethod
    def backward(ctx, grad_out):
        stacked, key, value, mask_TS, *weights = ctx.saved_tensors
        grad_out, grad_query = grad_out.unflatten(1, (key.shape[1], -1)), torch.empty_like(stacked)
        grad_key, grad_value = (torch.zeros_like(x, dtype=torch.float32) for x in (key, value))
        for (begin, end, seen), weight in zip(_blocks(mask_TS), weights):
            grad_rows = grad_out[:, :, :, begin:end].flatten(2, 3)
            grad_value[:, :, :seen] += weight.mT @ grad_rows
            grad_weight = grad_rows @ value[:, :, :seen].mT
            grad_score = torch._softmax_backward_data(grad_weight, weight, -1, weight.dtype).mul_(ctx.scaling)
            grad_query[:, :, :, begin:end] = (grad_score @ key[:, :, :seen]).view_as(grad_query[:, :, :, begin:end])
            grad_key[:, :, :seen] += grad_score.mT @ stacked[:, :, :, begin:end].flatten(2, 3)
        return grad_query.flatten(1, 2), grad_key.to(key.dtype), grad_value.to(value.dtype), None, None


def _blocks(mask_TS: torch.Tensor, size: int = 64) -> list[tuple[int, int, int]]:
    """First and last query of each block, and how many keys stand before the last one or are its own."""
    T, S = mask_TS.shape
    return [(begin, min(begin + size, T), S - T + min(begin + size, T)) for begin in range(0, T, size)]


block_attention = torch.compiler.disable(_BlockAttention.apply)  # else compiled anew for every number of blocks
AttentionInterface.register("packed", packed_attention)

# ------------------------------------------------------------------------------------------------ loading


def compute_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """ "auto": bf16 on an accelerator, fp32 on a CPU."""
    return getattr(torch, {"auto": "float32" if device.type == "cpu" else "bfloat16"}.get(dtype, dtype))


def load_tokenizer(name: str, chat_template: str | None = None, trust_remote_code: bool = False):
    """A fast tokenizer from a folder, a hub name, a .gguf file or "toy"; `chat_template` is a file or a template."""
    if name == "toy":
        tokenizer = toy.toy_tokenizer()
    else:
        tokenizer = AutoTokenizer.from_pretrained(
            **_source(name, trust_remote_code), trust_remote_code=trust_remote_code
        )
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {name} has no EOS token, without which no model learns to stop: set one")
    if chat_template is not None:
        path = Path(chat_template)
        tokenizer.chat_template = path.read_text() if "{" not in chat_template and path.is_file() else chat_template
        if "{" not in tokenizer.chat_template:
            raise UserError(f"--chat_template {chat_template!r} is neither a file nor a Jinja template")
    return tokenizer


def load_policy(
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool = False,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
):
    """A causal language model in eval mode, dropout off, packed attention on if the model allows it.

    Args:
        name: a folder, a hub name, a .gguf file, or "toy" (fresh weights from the global generator: seed first).
        dtype: of weights and compute.

    Raises:
        UserError: nothing loadable there, or bitsandbytes missing.
    """
    transformers_logging.disable_progress_bar()
    if (load_in_4bit or load_in_8bit) and (name == "toy" or name.endswith(".gguf")):
        raise UserError("--load_in_4bit and --load_in_8bit take a model's folder or hub name, not the toy or a .gguf")
    if name == "toy":
        model = AutoModelForCausalLM.from_config(toy.toy_config())
    elif name.endswith(".gguf"):
        # The de-quantised model refuses save_pretrained, so its weights move into one built from the plain config.
        source = AutoModelForCausalLM.from_pretrained(**_source(name, False), dtype=torch.float32)
        del source.config.quantization_config
        model = AutoModelForCausalLM.from_config(source.config, dtype=torch.float32)
        model.load_state_dict(source.state_dict())
        model.generation_config = source.generation_config
    else:
        options = {"dtype": "auto", "trust_remote_code": trust_remote_code}  # as stored; cast below
        if load_in_4bit or load_in_8bit:
            try:
                import bitsandbytes  # noqa: F401
            except ImportError:
                raise UserError("--load_in_4bit and --load_in_8bit need a package: pip install bitsandbytes")
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=load_in_4bit, load_in_8bit=load_in_8bit,
                bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=True,
            )
            options |= {"dtype": dtype, "device_map": {"": device}}
        model = AutoModelForCausalLM.from_pretrained(**_source(name, trust_remote_code), **options)
    if not (load_in_4bit or load_in_8bit):
        cast(model.to(device), dtype)
    return prepare_model(model)


def load_scorer(
    name: str, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False, zero_head: bool = False
):
    """A reward or value model, of the class AutoModelForSequenceClassification: a causal model's body, a scalar head.

    The head is fp32 and without bias. A folder that holds such a model already has its own; else it is drawn from
    N(0, 1 / (d + 1)) by the global generator (seed first), or 0 with `zero_head`.

    Raises:
        UserError: nothing loadable there, or a model that transformers has no such class for.
    """
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # a reward model's folder has no head over words, and need not say so
    policy = load_policy(name, dtype, device, trust_remote_code)
    transformers_logging.set_verbosity(verbosity)
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    try:
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise UserError(f"the model {name} cannot become a reward model: {_first(error)}")
    if not is_scorer(model):
        raise UserError(f"the model {name} cannot become a reward model: it is no causal model with a score")
    setattr(model, model.base_model_prefix, policy.base_model)
    width = model.score.in_features
    model.score = torch.nn.Linear(width, 1, bias=False, device=device)
    if "ForSequenceClassification" in str(config.architectures):
        before = AutoModelForSequenceClassification.from_pretrained(name, dtype=torch.float32)
        model.score.weight.data.copy_(before.score.weight)
    elif zero_head:
        torch.nn.init.zeros_(model.score.weight)
    else:
        torch.nn.init.normal_(model.score.weight, std=(width + 1) ** -0.5)
    model.layout = policy.layout
    if model.layout != "single":
        model.set_attn_implementation("packed")
    return model.eval()


def is_scorer(model) -> bool:
    """Whether this is a sequence classifier on top of a causal body, and no language model."""
    return hasattr(base_model(model), "score")


@torch.no_grad()
def cast(model, dtype: torch.dtype) -> None:
    """Weights to `dtype`. One that loses bits by it keeps its exact value as `.exact`, for `MasterAdamW` to start from.

    Starting from rounded weights, each stays where it is until its updates add up to half an ulp: the loss is then
    visibly higher for a while.
    """
    for parameter in model.parameters():
        exact = parameter.data
        parameter.data = exact.to(dtype)
        if exact.dtype == torch.float32 != dtype:
            parameter.exact = exact
    for buffer in model.buffers():
        if buffer.is_floating_point() and buffer.dtype != torch.float32:
            buffer.data = buffer.data.to(dtype)


def _source(name: str, trust_remote_code: bool) -> dict:
    """from_pretrained arguments for a folder, a hub name or a .gguf file; a UserError that says what was looked for."""
    path = Path(name).expanduser()
    if name.endswith(".gguf"):
        if not path.is_file():
            raise UserError(f"the model {name}: no such .gguf file")
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"the model {name}: that folder holds no config.json, so it is not a model")
    elif name.startswith((".", "/", "~", "runs/")) or name.count("/") > 1:
        hint = "; run `python sft.py` first, which writes it" if name == "runs/sft/final" else ""
        raise UserError(f"the model {name}: no such folder{hint}")
    try:  # without a word about trust, transformers asks for it on the terminal
        AutoConfig.from_pretrained(path if path.is_dir() else name, trust_remote_code=trust_remote_code)
    except OSError as error:
        found = "its config.json cannot be read" if path.is_dir() else "no folder here, and the hub does not give it"
        raise UserError(f"the model {name}: {found} ({_first(error)})")
    except ValueError as error:
        remedy = "read its code, and give --trust_remote_code if you would run it"
        raise UserError(f"the model {name} is none that transformers knows ({_first(error)}); {remedy}")
    return {"pretrained_model_name_or_path": str(path) if path.is_dir() else name}


def _first(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def prepare_model(model):
    """Dropout off, eval mode, and the most economical layout that gives the hidden states of separate sequences."""
    # Stock embeddings take no gradient for the padding token. But nothing is padded here, and some chat models, as
    # SmolLM2, pad with their end of turn.
    model.get_input_embeddings().padding_idx = None
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.config.use_cache = False
    model.eval()
    model.layout = "single"
    if not getattr(model.config, "attn_logit_softcapping", None):  # which no kernel here has
        model.layout = next((layout for layout in ("shared", "packed") if layout_error(model, layout) < 0.1), "single")
    if model.layout != "single":
        model.set_attn_implementation("packed")
    return model


@torch.no_grad()
def layout_error(model, layout: Layout) -> float:
    """Relative L2 difference of hidden states, three random sequences in one row against each alone; inf if it raises.

    bf16 noise makes up to 0.03 of it; a document that sees its neighbour 0.3 or more.
    """
    generator, vocabulary = np.random.default_rng(0), model.get_input_embeddings().weight.shape[0]
    draw = partial(generator.integers, vocabulary, dtype=np.int32)
    prompt, device, stock = draw(size=5), next(model.parameters()).device, model.config._attn_implementation
    sequences = [np.concatenate([prompt, draw(size=length)]) for length in (4, 9, 2)]
    alone = [model.base_model(torch.tensor(ids, device=device)[None], use_cache=False)[0][0] for ids in sequences]
    batch = collate([Example(ids, ids < 0, 0, len(prompt)) for ids in sequences], [0, 1, 2], device, layout)
    try:
        model.set_attn_implementation("packed")
        together_N = hidden_states(model, batch).float()
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError):
        return float("inf")  # a model with a structure of its own
    finally:
        model.set_attn_implementation(stock)
    alone_N = batch.take(alone).float()
    return ((together_N - alone_N).norm() / alone_N.norm()).item()


def layout_of(model) -> Layout:
    """How sequences of this model may share a micro-batch, as measured when it was loaded."""
    return base_model(model).layout


def base_model(model):
    """The transformers model inside a peft wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def add_lora(model, r: int, alpha: int, target_modules: list[str], use_rslora: bool, use_dora: bool):
    """Wrap the model in a fresh LoRA adapter in fp32; no `target_modules`: every linear layer but the output head.

    The head of a scorer is trained whole, and saved with the adapter.

    Raises:
        UserError: a target that the model does not have, or the output head (its adapter would be ignored here).
    """
    from peft import LoraConfig, get_peft_model

    if any("lm_head" in name or "embed_out" in name for name in target_modules):
        raise UserError("--lora_target_modules names the output head: its adapter is not supported, leave the head out")
    task = {"task_type": "SEQ_CLS", "modules_to_save": ["score"]} if is_scorer(model) else {"task_type": "CAUSAL_LM"}
    config = LoraConfig(
        r=r, lora_alpha=alpha, target_modules=target_modules or "all-linear", use_rslora=use_rslora,
        use_dora=use_dora, **task,
    )
    for parameter in model.parameters():
        vars(parameter).pop("exact", None)  # frozen from here on
    try:
        return get_peft_model(model, config).eval()
    except ValueError as error:
        raise UserError(f"--lora_target_modules {target_modules}: {_first(error)}")


def speed_up(model, gradient_checkpointing: bool, torch_compile: bool):
    """Trade compute for memory (recompute each layer in backward) and warm-up for speed (compile each layer once)."""
    if gradient_checkpointing:
        model.train()  # transformers checkpoints only in train mode; dropout is 0, so nothing else changes
        base_model(model).gradient_checkpointing_enable({"use_reentrant": False})
        base_model(model).enable_input_require_grads()  # frozen embeddings (LoRA) would cut the graph
    if torch_compile:
        for layer in base_model(model).base_model.layers:
            layer.compile(dynamic=True)


@contextmanager
def without_adapter(model):
    """The model as it was before its LoRA adapter: the reference policy at no extra memory."""
    with model.disable_adapter():
        yield model


# ------------------------------------------------------------------------------------------------ token log-probs


def forward_pass(function):
    """`function(model, ...)` reads weights of the model: of a sharded one it has to count as a forward pass."""

    @wraps(function)
    def run(model, *arguments, **options):
        sharded_call = vars(base_model(model).base_model).get("sharded_call")  # set by common/sharding.py
        if sharded_call is None:
            return function(model, *arguments, **options)
        return sharded_call(function, model, *arguments, **options)

    return run


@forward_pass
def hidden_states(model, batch: MicroBatch) -> torch.Tensor:
    """Last hidden states [N, E] of one packed micro-batch."""
    return _hidden_states(model, batch)


def _hidden_states(model, batch: MicroBatch) -> torch.Tensor:
    model = base_model(model)
    inputs = {"input_ids": batch.input_ids_N[None], "position_ids": batch.position_ids_N[None], "use_cache": False}
    if model.config._attn_implementation == "packed":
        use_varlen = batch.input_ids_N.is_cuda and model.dtype in (torch.bfloat16, torch.float16)
        inputs["segments"] = segments(batch, use_varlen)
    else:
        assert len(batch.lengths) == 1, "this model cannot be packed: one sequence per micro-batch"
    return model.base_model(**inputs).last_hidden_state[0]


class TokenScores(NamedTuple):
    """What a model says of the tokens of one packed row; fp32 [N], exactly 0 where `loss_mask_N` is False."""

    logprobs_N: torch.Tensor  # log p(token | tokens before it), differentiable
    entropies_N: torch.Tensor  # entropy of the distribution it was drawn from, nats, differentiable
    correct_N: torch.Tensor  # 1 where the token is the likeliest one
    collisions_N: torch.Tensor  # log sum_v p_v^2: how likely two draws from that distribution agree; no gradient
    hidden_NE: torch.Tensor  # the last hidden states of all tokens, in the model's dtype: another head can read them


class _ScoreTokens(torch.autograd.Function):
    """log softmax(z / temperature)[target] and its entropy for z = cap(hidden @ weight.T + bias), chunk by chunk.

    Forward goes by positions and keeps two numbers of each; backward goes by words, so that each row of the weight gets
    its gradient at once, rebuilds a chunk's logits and turns them into their gradient in place:
      d logprob / d z = onehot(target) - p        d entropy / d z = -p * (log p + entropy)
    Four matrix products in all instead of three, and no chunk is of more than `most` logits, but for one as narrow as
    a matrix product can be and still be quick.
    """

    @staticmethod
    def forward(ctx, hidden_KE, weight_VE, bias_V, target_K, temperature, softcap, most, statistics):
        logprob_K = hidden_KE.new_empty(len(target_K), dtype=torch.float32)
        lse_K, entropy_K, correct_K, collision_K = (torch.zeros_like(logprob_K) for _ in range(4))
        chunk = max(64, most // len(weight_VE))
        for start in range(0, len(target_K), chunk):
            rows = slice(start, start + chunk)
            z, _ = _logits(hidden_KE[rows], weight_VE, bias_V, temperature, softcap)
            lse_K[rows] = z.logsumexp(-1)
            logprob_K[rows] = z.gather(-1, target_K[rows, None])[:, 0] - lse_K[rows]
            if statistics:
                correct_K[rows] = (z.argmax(-1) == target_K[rows]).float()
                p = (z - lse_K[rows, None]).exp_()
                entropy_K[rows] = lse_K[rows] - z.mul_(p).sum(-1)
                collision_K[rows] = p.square_().sum(-1).log_()
        ctx.save_for_backward(hidden_KE, weight_VE, bias_V, target_K, lse_K, entropy_K)
        ctx.settings = temperature, softcap, most
        ctx.mark_non_differentiable(correct_K, collision_K)
        ctx.set_materialize_grads(False)
        return logprob_K, entropy_K, correct_K, collision_K

    @staticmethod
    def backward(ctx, grad_logprob_K, grad_entropy_K, *_):
        hidden_KE, weight_VE, bias_V, target_K, lse_K, entropy_K = ctx.saved_tensors
        temperature, softcap, most = ctx.settings
        grad_logprob_K = torch.zeros_like(lse_K) if grad_logprob_K is None else grad_logprob_K
        grad_hidden_KE = torch.zeros_like(hidden_KE, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        grad_weight_VE = torch.empty_like(weight_VE) if ctx.needs_input_grad[1] else None
        grad_bias_V = torch.empty_like(bias_V) if ctx.needs_input_grad[2] else None
        chunk = max(1024, most // max(1, len(target_K)))
        for start in range(0, len(weight_VE), chunk):
            words, width = slice(start, start + chunk), min(chunk, len(weight_VE) - start)
            bias = None if bias_V is None else bias_V[words]
            z, slope = _logits(hidden_KE, weight_VE[words], bias, temperature, softcap)
            log_p = z.sub_(lse_K[:, None])
            if grad_entropy_K is None:
                grad_z = log_p.exp_().mul_(-grad_logprob_K[:, None])
            else:
                p = log_p.exp()
                grad_z = -p * (grad_logprob_K + grad_entropy_K * entropy_K)[:, None]
                grad_z -= p.mul_(log_p).mul_(grad_entropy_K[:, None])
            place_K = target_K - start
            of_target_K = torch.where((place_K >= 0) & (place_K < width), grad_logprob_K, 0.0)
            grad_z.scatter_add_(-1, place_K.clamp(0, width - 1)[:, None], of_target_K[:, None])
            if slope is not None:
                grad_z *= slope
            if temperature != 1.0:
                grad_z /= temperature
            if grad_bias_V is not None:
                grad_bias_V[words] = grad_z.sum(0)
            grad_z = grad_z.to(hidden_KE.dtype)
            if grad_hidden_KE is not None:
                grad_hidden_KE += grad_z @ weight_VE[words]
            if grad_weight_VE is not None:
                grad_weight_VE[words] = grad_z.T @ hidden_KE
        grad_hidden_KE = grad_hidden_KE if grad_hidden_KE is None else grad_hidden_KE.to(hidden_KE.dtype)
        return grad_hidden_KE, grad_weight_VE, grad_bias_V, None, None, None, None, None


def _logits(hidden_KE, weight_VE, bias_V, temperature: float, softcap: float | None):
    """fp32 logits over temperature [K, V], and the slope of the soft cap (None without one)."""
    z, slope = F.linear(hidden_KE, weight_VE, bias_V).float(), None
    if softcap is not None:
        z = z.div_(softcap).tanh_()
        slope = 1 - z**2
        z = z * softcap
    return z if temperature == 1.0 else z / temperature, slope


@forward_pass
def score_tokens(model, batch: MicroBatch, temperature: float = 1.0, statistics: bool = False) -> TokenScores:
    """Score every token that carries loss: log-probability and, if `statistics`, the rest of TokenScores (else zeros).

    `temperature` divides the logits, as the sampler's did. Statistics cost some passes over the logits.
    """
    hidden_NE = _hidden_states(model, batch)
    core = base_model(model)
    head = core.get_output_embeddings()
    position_K = batch.loss_mask_N.nonzero()[:, 0]
    divisor = getattr(core.config, "logits_scaling", None) or 1 / (getattr(core.config, "logit_scale", None) or 1)
    scores = _ScoreTokens.apply(
        hidden_NE[batch.source_N[position_K]],
        head.weight, head.bias, batch.input_ids_N[position_K], temperature * divisor,
        getattr(core.config, "final_logit_softcapping", None),
        2**28 if hidden_NE.is_cuda else 2**22,  # 1 GB of fp32 logits; 16 MB on a CPU, which is to stay in its cache
        statistics,
    )
    zeros_N = torch.zeros(len(hidden_NE), device=hidden_NE.device)
    return TokenScores(*(zeros_N.index_put((position_K,), score_K) for score_K in scores), hidden_NE)


def score_ends(model, batch: MicroBatch) -> torch.Tensor:
    """The scorer's output [B], fp32, at the last token of each sequence, found by length."""
    last_B = batch.cu_seqlens[1:].long() - 1
    return base_model(model).score(hidden_states(model, batch)[last_B].float())[:, 0]


def score_states(model, batch: MicroBatch, hidden_NE: torch.Tensor) -> torch.Tensor:
    """The scorer's output [N], fp32, for every token that carries loss, at the position before it; 0 elsewhere."""
    position_K = batch.loss_mask_N.nonzero()[:, 0]
    score_K = base_model(model).score(hidden_NE[batch.source_N[position_K]].float())[:, 0]
    return torch.zeros(len(hidden_NE), device=hidden_NE.device).index_put((position_K,), score_K)
