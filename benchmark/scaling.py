"""Memory of a rank and seconds of a step at sizes that nobody here has run: formulas, no measurements.

    python benchmark/scaling.py              # tables for 7B and 70B on 8 to 1,024 GPUs
    python benchmark/scaling.py --check      # the memory formula beside the peaks in benchmark/results/compare_trl_*

docs/scaling.md says what to make of them. Units: bytes, seconds, FLOP, tokens.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Shape:
    """A Llama-like decoder: grouped heads, gated MLP, RMSNorm."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    mlp: int
    vocabulary: int
    tied: bool = False

    @property
    def of_layer(self) -> int:
        """Parameters of one layer."""
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * self.head_size
        return attention + 3 * self.hidden * self.mlp + 2 * self.hidden

    @property
    def of_head(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        return self.layers * self.of_layer + (1 if self.tied else 2) * self.of_head + self.hidden

    @property
    def kv_cache(self) -> int:
        """Bytes of one token, bf16."""
        return 2 * self.layers * self.kv_heads * self.head_size * 2

    def flops(self, length: int) -> float:
        """Of one token forward, in sequences of this length: two for each weight that multiplies, half of attention."""
        multiplied = self.layers * self.of_layer + self.of_head
        return 2 * multiplied + 2 * self.layers * self.heads * self.head_size * length


SMOLLM2 = Shape("SmolLM2-135M", 30, 576, 9, 3, 64, 1536, 49_152, tied=True)
QWEN_7B = Shape("7B (Qwen2.5-7B)", 28, 3584, 28, 4, 128, 18_944, 152_064)
LLAMA_70B = Shape("70B (Llama-3.1-70B)", 80, 8192, 64, 8, 128, 28_672, 128_256)

# ------------------------------------------------------------------------------------------------ memory

# Bytes of a parameter: on every rank, and shared out over the ranks. Replicated is one process, or DDP: bf16 weights
# 2, and in fp32 the masters 4, AdamW's moments 8, the gradients 4. FSDP2 computes with bf16 copies of the fp32 weights,
# gathered when needed; ZeRO-3 keeps both.
KEPT = {"replicated": (18, 0), "ZeRO-2": (2, 16), "ZeRO-3": (0, 18), "FSDP2": (0, 16)}
GATHERS = ("ZeRO-3", "FSDP2")


def states(shape: Shape, sharding: str, ranks: int) -> float:
    """Weights, masters, moments and gradients of one rank.

    Where weights are gathered: two layers at a time and the head in bf16, a layer's gradient in fp32 on its way out.
    """
    everywhere, shared = KEPT[sharding]
    gathered = 2 * (2 * shape.of_layer + shape.of_head) + 4 * shape.of_layer if sharding in GATHERS else 0
    return shape.parameters * (everywhere + shared / ranks) + gathered


def activations_of_layer(shape: Shape, length: int, flash: bool) -> float:
    """Bytes that backward needs of one token and layer, as transformers' Llama computes it in bf16, not compiled.

    Two norms: the input in fp32, normalised and scaled in bf16. The MLP: gate, its SiLU, up, their product. Attention:
    queries, keys and values, and what it puts out; on a CPU also the weights that `block_attention` keeps.
    """
    queries, keys = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    attention = 2 * queries + 2 * (queries + 2 * keys)
    if not flash:
        attention += 2 * shape.heads * length / 2
    return 2 * 8 * shape.hidden + 4 * 2 * shape.mlp + attention


def activations(shape: Shape, tokens: int, length: int, checkpointing: bool, flash: bool = True) -> float:
    """Of a packed micro-batch. Checkpointed, a layer keeps its input and one at a time is computed again."""
    layer = activations_of_layer(shape, length, flash)
    return tokens * (2 * shape.hidden * shape.layers + layer if checkpointing else layer * shape.layers)


def output_head(shape: Shape, tokens: int, chunk_elements: int = 2**28) -> float:
    """Of `score_tokens` in backward: a chunk of logits in fp32 and bf16, the head's gradient in bf16."""
    return 6 * min(tokens * shape.vocabulary, chunk_elements) + 2 * shape.of_head


# ------------------------------------------------------------------------------------------------ time


@dataclass(frozen=True)
class Machine:
    """One GPU in a node of eight. docs/scaling.md says where the numbers come from."""

    memory: float
    read: float  # bytes a second from its own memory
    matmul: float = 370e12  # FLOP a second in training
    in_node: float = 450e9  # bytes a second of a collective, NVLink
    between_nodes: float = 350e9  # the same over eight network cards of 400 Gbit/s


H100, H200 = Machine(80e9, 3.0e12), Machine(141e9, 4.3e12)


def communication(shape: Shape, sharding: str, ranks: int, micro_batches: int, machine: Machine) -> float:
    """Seconds of an optimiser step. Volume over bandwidth: no latency, no stragglers, no traffic of others."""
    once = (ranks - 1) / ranks * shape.parameters / (machine.in_node if ranks <= 8 else machine.between_nodes)
    if sharding == "replicated":
        return 2 * 4 * once  # all-reduce of fp32 gradients, after the last backward
    if sharding == "ZeRO-2":
        return (4 + 2) * once  # reduce-scatter of the gradients, all-gather of the new weights
    return (2 + 2 + 4) * once * micro_batches  # weights for forward and backward, gradients


def compute(
    shape: Shape, sharding: str, ranks: int, tokens: int, length: int, checkpointing: bool, machine: Machine
) -> float:
    """Seconds of forward, backward and AdamW (28 bytes a parameter) for `tokens` on this rank."""
    passes = 4 if checkpointing else 3
    owned = shape.parameters / (1 if sharding == "replicated" else ranks)
    return passes * shape.flops(length) * tokens / machine.matmul + 28 * owned / machine.read


def generation(
    shape: Shape, ranks: int, engine: int, samples: int, prompt: int, completion: int, machine: Machine
) -> float:
    """Seconds to sample: engines of `engine` GPUs read weights and cache for every token at 60 % of their bandwidth."""
    batch = -(-samples * engine // ranks)
    bytes_of_token = 2 * shape.parameters + batch * (prompt + completion / 2) * shape.kv_cache
    arithmetic = batch * shape.flops(prompt + completion) / (engine * machine.matmul)
    return completion * max(bytes_of_token / (engine * 0.6 * machine.read), arithmetic)


# ------------------------------------------------------------------------------------------------ tables

BATCH, LENGTH, MICRO = 2**20, 1024, 8192  # tokens of a step, of a sequence, of a micro-batch at most
PROMPT, COMPLETION = 256, 768  # of a rollout, which is what a step trains on
GPUS = (8, 64, 256, 1024)


def row(shape: Shape, sharding: str, ranks: int, engine: int) -> list[str]:
    """One line of a table; times are an H200's."""
    tokens = BATCH // ranks
    micro = min(MICRO, tokens)
    held, logits = states(shape, sharding, ranks), output_head(shape, micro)
    whole, recomputed = (held + logits + activations(shape, micro, LENGTH, saving) for saving in (False, True))
    limits = (0.9 * H100.memory, 0.9 * H200.memory)
    fits = ["yes" if whole < limit else "recomputed" if recomputed < limit else "no" for limit in limits]
    cells = [str(ranks), sharding, *(f"{size / 1e9:,.0f}" for size in (held, whole, recomputed)), *fits]
    if fits[1] == "no":
        return cells + ["-"] * 5
    work = compute(shape, sharding, ranks, tokens, LENGTH, fits[1] == "recomputed", H200)
    talk = communication(shape, sharding, ranks, tokens // micro, H200)
    sampling = generation(shape, ranks, engine, BATCH // LENGTH, PROMPT, COMPLETION, H200)
    share = sampling / (sampling + work + talk)
    rate = tokens / (work + talk)
    return cells + [f"{work:.2f}", f"{talk:.2f}", f"{rate:,.0f}", f"{sampling:.1f}", f"{share:.0%}"]


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def tables() -> str:
    head = ["GPUs", "sharding", "states, GB", "all, GB", "all, recomputed, GB", "H100", "H200", "compute, s",
            "communication, s", "tokens/s of a GPU", "sampling, s", "its share"]  # fmt: skip
    return "\n\n".join(
        f"### {shape.name}, {shape.parameters / 1e9:.1f} billion parameters\n\n"
        + markdown(head, [row(shape, sharding, ranks, engine) for ranks in GPUS for sharding in KEPT])
        for shape, engine in ((QWEN_7B, 1), (LLAMA_70B, 8))
    )


# ------------------------------------------------------------------------------------------------ the check


def measured() -> list[tuple[str, float, float]]:
    """(script and leg, formula, measured), bytes: SmolLM2-135M on a CPU, ours with checkpointing (U0) and without (U1).

    A CPU process has its libraries' scratch and what malloc keeps on top, which is in no formula.
    """
    points = []
    for script in ("sft", "dpo", "kto", "reward", "grpo"):
        [path] = RESULTS.glob(f"compare_trl_{script}_*/result.json")
        result = json.loads(path.read_text())
        for leg in ("U0", "U1"):
            row_tokens = result["flags"]["U0"]["max_tokens_per_micro_batch"]  # the most a step had, or half of it
            length = int(result.get("sequence_tokens") or 170)
            if script == "grpo":  # two groups of eight completions of 32 tokens
                length = row_tokens // 8
                row_tokens = row_tokens if leg == "U0" else 2 * (length - 32) + 16 * 32
            elif script in ("dpo", "reward") and leg == "U1":  # the prompt of a pair once
                row_tokens = int(row_tokens * (1 - result["prompt_share"] / 2))
            memory = states(SMOLLM2, "replicated", 1)
            memory += activations(SMOLLM2, row_tokens, length, leg == "U0", flash=False)
            memory += 0 if script == "reward" else output_head(SMOLLM2, row_tokens, 2**22)
            memory += 2 * SMOLLM2.parameters if script in ("dpo", "kto") else 0  # the reference
            points.append((f"{script} {leg}", memory, result["summary"]["cpu"][leg]["peak_gb"] * 1e9))
    return points


def check() -> str:
    rows = [
        [name, f"{ours / 1e9:.2f}", f"{peak / 1e9:.2f}", f"{ours / peak - 1:+.0%}"] for name, ours, peak in measured()
    ]
    return markdown(["script, leg", "formula, GB", "measured, GB", "off by"], rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="the memory formula beside what was measured")
    print(check() if parser.parse_args().check else tables())
