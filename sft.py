"""Supervised fine-tuning: maximise the likelihood of the tokens a model should have written.

    loss = - 1/N  sum over trained tokens t of  w_t log pi(y_t | x, y_<t),     N = trained tokens of the whole step

with w_t = 1 (`nll`) or w_t = stop_gradient(pi(y_t | x, y_<t)) (`dft`, Dynamic Fine-Tuning, arXiv 2508.05629: it undoes
the 1/pi that makes unlikely demonstrations dominate the gradient of the likelihood).

Departures from what is usual
  1. The denominator N is counted over the whole optimiser step, all ranks and micro-batches, before the first backward.
     So the gradient does not depend on how the step is cut: `max_tokens_per_micro_batch` is a memory knob and no more.
  2. Nothing is padded: a micro-batch is sequences end to end in one row (common/data.py), attention stays inside each.
  3. Nothing is lost silently: the ledger printed at the start accounts for every token read, and a row that is too long
     is an error until you say otherwise (`--on_overlong`).
  4. Dropout is off. The learning rate defaults to 2e-5, to ten times that under LoRA, and to 2e-3 for the toy.

Dimension key: N tokens of a micro-batch, B sequences of the optimiser step.

    python sft.py                                                        # the toy: sort digits; 2 CPU cores, no network
    python sft.py --model_name_or_path HuggingFaceTB/SmolLM2-135M --dataset_name train.jsonl
    torchrun --nproc_per_node 8 sft.py --model_name_or_path ... --dataset_name ...

What you should see: the loss starts near log(vocabulary) for a fresh model (2.77 for the toy) and falls. The toy ends
near eval/exact_match 0.3: its demonstrator is right 36 % of the time, and imitation is no better. Run grpo.py next.
"""

import time
from dataclasses import dataclass, field
from typing import Literal

import torch
from transformers import get_scheduler

from common.data import (
    Example, Ledger, collate, draw, encode_completion, encode_conversation, encode_prompt, encode_text, load_rows,
    pack, prepare, require_columns,
)
from common.engine import Sampling, TransformersEngine, request_seed, stop_ids
from common.models import add_lora, compute_dtype, layout_of, load_policy, load_tokenizer, score_tokens, speed_up
from common.rewards import load_reward, score
from common.run import (
    Run, UserError, launch, random_state, require_at_least, restore_random_state, set_seed, show_batch,
)
from common.sharding import (
    clip_gradients, describe, join_ranks, make_optimizer, save_model, shard, sum_over_ranks, trained_weights,
    weight_sum,
)


@dataclass
class Args:
    # Run
    output_dir: str = "runs/sft"
    """Folder of this run: config.yaml, metrics.jsonl, clock.jsonl, samples.jsonl, checkpoints/ and final/."""
    seed: int = 0
    """Of data order, fresh weights and sampling."""
    resume: bool = False
    """Continue the run in output_dir from its newest whole checkpoint; it ends bit-identical to one never stopped."""
    save_steps: int = 0
    """Checkpoint every so many optimiser steps (0: only the final model)."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints to keep (0: all)."""
    logging_steps: int = 10
    """Log every so many optimiser steps."""
    report_to: list[Literal["wandb", "tensorboard"]] = field(default_factory=list)
    """Trackers that mirror metrics.jsonl."""
    push_to_hub: bool = False
    """Upload final/ with its model card to the Hugging Face hub at the end (`hf auth login` or HF_TOKEN)."""
    hub_model_id: str = ""
    """Its name there, "owner/name" or "name" ("": that of the run folder)."""
    hub_private_repo: bool = False
    """Make a new repository private (else it is public, unless the owner's settings say otherwise)."""
    inspect: bool = False
    """Print the first micro-batch, tokens coloured by role, and exit."""
    ddp_timeout: float = 1800.0
    """Seconds that a rank waits for the others before it takes one for dead, and the run stops."""

    # Model
    model_name_or_path: str = "toy"
    """Folder, hub name, .gguf file, or "toy" (a fresh 133k-parameter Llama over 16 characters)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Weights and compute; auto: bfloat16 (over fp32 masters) on an accelerator, float32 on a CPU."""
    chat_template: str | None = None
    """A Jinja file (or text) to use instead of the tokenizer's own chat template."""
    trust_remote_code: bool = False
    """Run model code that comes with the weights."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: a third more compute, far less memory."""
    torch_compile: bool = False
    """Compile each layer once: slower start, faster steps."""
    use_peft: bool = False
    """Train a LoRA adapter instead of all weights."""
    lora_r: int = 16
    """Rank of the adapter."""
    lora_alpha: int = 32
    """Scale of the adapter: alpha / r, or alpha / sqrt(r) with use_rslora."""
    lora_target_modules: list[str] = field(default_factory=list)
    """Names of the layers to adapt (empty: every linear layer but the output head)."""
    use_rslora: bool = False
    """Rank-stabilised LoRA."""
    use_dora: bool = False
    """Weight-decomposed LoRA."""
    load_in_4bit: bool = False
    """Quantise the frozen weights to nf4 (needs bitsandbytes; with use_peft)."""
    load_in_8bit: bool = False
    """Quantise the frozen weights to int8 (needs bitsandbytes; with use_peft)."""

    # Data
    dataset_name: str = "toy:sort"
    """Hub name, local .jsonl[.gz] / .json / .parquet / .csv / folder, "toy:sort", or "reasoning_gym:<task>".
    Columns: `messages`, or `prompt` + `completion` (text or chat), or `text`; optionally `tools`."""
    dataset_split: str = "train"
    """Split, with an optional slice: "train[:1000]"."""
    eval_dataset_name: str | None = None
    """Held-out data of the same shape (None: the toy's own; for other data no evaluation)."""
    eval_split: str = "test"
    """Split of the evaluation data."""
    max_length: int | None = 1024
    """Longest sequence in tokens (None: no limit)."""
    on_overlong: Literal["error", "drop", "truncate"] = "error"
    """What to do with a row longer than max_length."""
    on_empty: Literal["error", "drop"] = "error"
    """What to do with a row that has nothing to train, such as an empty completion."""
    completion_only_loss: bool | None = None
    """Loss on the completion of `prompt` + `completion` rows only (None: yes) or on the prompt as well (no)."""
    assistant_only_loss: bool = False
    """Loss on the assistant's turns of `messages` rows only; a message with "train": false carries none."""
    last_turn_only_loss: bool = False
    """Loss on the last assistant turn of `messages` rows only."""

    # Optimisation
    learning_rate: float | None = None
    """Peak learning rate (None: 2e-5; 2e-4 with use_peft; 2e-3 for the toy)."""
    train_batch_size: int = 128
    """Sequences per optimiser step, over all ranks."""
    max_tokens_per_micro_batch: int = 16384
    """Tokens of one forward and backward pass: the memory knob. It changes no result."""
    num_train_epochs: float = 1.0
    """Passes over the data."""
    max_steps: int = -1
    """Optimiser steps; if positive it overrides num_train_epochs."""
    lr_scheduler_type: Literal[
        "linear", "cosine", "constant", "constant_with_warmup", "cosine_with_restarts", "polynomial", "inverse_sqrt"
    ] = "cosine"
    """How the learning rate goes on after warm-up (transformers.get_scheduler)."""
    warmup_steps: float = 0.1
    """Warm-up in steps, or below 1 as a share of all steps."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    adam_beta1: float = 0.9
    """AdamW's first-moment decay."""
    adam_beta2: float = 0.95
    """AdamW's second-moment decay."""
    adam_epsilon: float = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: float = 1.0
    """Clip the gradient of a step to this norm (0: no clipping)."""
    loss_type: Literal["nll", "dft"] = "nll"
    """Weight of a token: 1 (nll) or its own probability, detached (dft)."""

    # Evaluation
    eval_steps: int = 0
    """Evaluate every so many steps (0: only at the end)."""
    metric_for_best_model: str = ""
    """Keep the model that is best by this number, named as in metrics.jsonl, in best/ ("": off)."""
    greater_is_better: bool | None = None
    """Whether more of it is better (None: no if its name ends in "loss", else yes)."""
    eval_reward_funcs: list[str] = field(default_factory=list)
    """Score sampled and greedy completions of the evaluation prompts with these functions (module:function or
    file.py:function); the toy uses its exact match."""
    max_eval_samples: int = 512
    """Rows of the evaluation set that are used."""
    max_completion_length: int = 32
    """Longest completion generated in evaluation, tokens."""


# ---------------------------------------------------------------------------------------------------------------- math


def sft_loss(logprobs_N: torch.Tensor, loss_type: str) -> torch.Tensor:
    """Loss of each token [N], before the weights of `token_weights` make it a mean."""
    if loss_type == "dft":
        return -logprobs_N.detach().exp() * logprobs_N  # arXiv 2508.05629: stop_gradient(pi) log pi
    return -logprobs_N


# ---------------------------------------------------------------------------------------------------------------- data


def encode_row(row: dict, tokenizer, args: Args) -> tuple[list[int], list[bool]]:
    """One row of any accepted shape -> token ids and which of them are trained."""
    options = {"tools": row.get("tools"), "chat_template_kwargs": row.get("chat_template_kwargs")}
    if "messages" in row:
        which = "last_turn" if args.last_turn_only_loss else "assistant" if args.assistant_only_loss else "all"
        return encode_conversation(row["messages"], tokenizer, which, **options)
    if "prompt" in row:
        prompt = encode_prompt(row["prompt"], tokenizer, **options)
        completion = encode_completion(row["prompt"], row["completion"], tokenizer, **options)
        return prompt + completion, [args.completion_only_loss is False] * len(prompt) + [True] * len(completion)
    ids = encode_text(row["text"], tokenizer) + [tokenizer.eos_token_id]
    return ids, [True] * len(ids)


def prompt_of(row: dict):
    """What to generate from when a row is evaluated: its prompt, or the conversation before its last assistant turn."""
    if "messages" in row:
        last = max(i for i, message in enumerate(row["messages"]) if message["role"] == "assistant")
        return row["messages"][:last]
    return row.get("prompt")


# ---------------------------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def evaluate_sft(
    model, tokenizer, examples: list[Example], rows: list[dict], prompts: list, prompt_ids: list[list[int]],
    rewards: list, run: Run, args: Args, step: int,
) -> dict[str, float]:
    """Loss and token accuracy on held-out rows; mean score of sampled (T=1) and greedy completions of their prompts."""
    sums = torch.zeros(3, dtype=torch.float64)
    for micro in pack(examples, args.max_tokens_per_micro_batch, 1, layout_of(model))[0]:
        batch = collate(examples, micro, model.device)
        scores = score_tokens(model, batch, statistics=True)
        sums += torch.stack([-scores.logprobs_N.sum(), scores.correct_N.sum(), batch.loss_mask_N.sum()]).double().cpu()
    metrics = {"eval/loss": sums[0] / sums[2], "eval/mean_token_accuracy": sums[1] / sums[2]}

    if not prompt_ids:  # texts
        return {name: float(value) for name, value in metrics.items()}
    engine = TransformersEngine(model)
    columns = {name: [row.get(name) for row in rows] for name in rows[0] if name not in ("prompt", "completion")}
    for suffix, temperature in (("", 1.0), ("_greedy", 0.0)):
        sampling = Sampling(
            max_tokens=args.max_completion_length, temperature=temperature,
            stop_token_ids=stop_ids(tokenizer, model.generation_config.eos_token_id, []),
        )
        seeds = [request_seed(args.seed, -1, i, 0) for i in range(len(rows))]  # the same draws at every evaluation
        completions = engine.generate(prompt_ids, seeds, sampling)
        texts = [tokenizer.decode(c.token_ids, skip_special_tokens=True) for c in completions]
        metrics[f"eval/terminated{suffix}"] = sum(c.finish_reason == "stop" for c in completions) / len(completions)
        if rewards:
            scores_BF = score(rewards, prompts, texts, columns)
            for name, mean in zip([f.name for f in rewards], scores_BF.nanmean(0)):
                metrics[f"eval/{name}{suffix}"] = mean
        run.samples(f"step {step}, temperature {temperature:g}", ["prompt", "completion"], [
            [tokenizer.decode(ids), text] for ids, text in zip(prompt_ids[:4], texts)
        ])
    return {name: float(value) for name, value in metrics.items()}


def main(args: Args) -> None:
    # ------------------------------------------------------------------------------------------------------ 1. setup
    require_at_least(
        1, args, "train_batch_size", "max_tokens_per_micro_batch", "logging_steps", "max_completion_length"
    )
    ranks = join_ranks(args.ddp_timeout)
    device = ranks.device
    run = Run(args, __file__, ranks.is_main_process)
    set_seed(args.seed)

    # ------------------------------------------------------------------------------------------------------ 2. model
    tokenizer = load_tokenizer(args.model_name_or_path, args.chat_template, args.trust_remote_code)
    model = load_policy(
        args.model_name_or_path, compute_dtype(args.dtype, device), device, args.trust_remote_code,
        args.load_in_4bit, args.load_in_8bit,
    )
    if args.use_peft:
        model = add_lora(
            model, args.lora_r, args.lora_alpha, args.lora_target_modules, args.use_rslora, args.use_dora
        )
    speed_up(model, args.gradient_checkpointing, args.torch_compile)
    shard(model)
    run.print(describe(model))

    # ------------------------------------------------------------------------------------------------------ 3. data
    rows = load_rows(args.dataset_name, args.dataset_split)
    require_columns(rows, ("messages",), ("prompt", "completion"), ("text",))
    ledger = Ledger()
    examples = prepare(
        rows, lambda row: encode_row(row, tokenizer, args), args.max_length, args.on_overlong, ledger, args.on_empty
    )
    ledger.check()
    if not examples:
        raise UserError(f"{rows.name}: every row was dropped ({ledger}): raise --max_length or mend the data")
    run.print(f"train  {rows.name}: {ledger}")

    is_toy = args.dataset_name.startswith("toy:")
    eval_name = args.eval_dataset_name or (args.dataset_name if is_toy else None)
    eval_examples, eval_rows = [], []
    if eval_name is not None:
        held_out = load_rows(eval_name, args.eval_split)
        eval_ledger = Ledger()
        eval_examples = prepare(
            held_out, lambda row: encode_row(row, tokenizer, args), args.max_length, args.on_overlong, eval_ledger,
            args.on_empty,
        )[: args.max_eval_samples]
        eval_rows = [held_out[example.row] for example in eval_examples]
        run.print(f"eval   {held_out.name}: {eval_ledger}")
    rewards = [load_reward(name) for name in args.eval_reward_funcs or ["common.toy:exact_match"] * is_toy]
    prompts, prompt_ids = [prompt_of(row) for row in eval_rows], []
    if prompts and prompts[0] is not None:
        prompt_ids = [encode_prompt(prompt, tokenizer, row.get("tools")) for prompt, row in zip(prompts, eval_rows)]
        longest = max(map(len, prompt_ids)) + args.max_completion_length
        limit = getattr(model.config, "max_position_embeddings", longest)
        if longest > limit:
            raise UserError(
                f"the longest evaluation prompt and --max_completion_length {args.max_completion_length} make "
                f"{longest} tokens, and the model takes {limit}: lower it, or --max_length with --on_overlong drop"
            )

    # ------------------------------------------------------------------------------------------ 4. batch arithmetic
    total_steps = args.max_steps
    if total_steps <= 0:
        total_steps = int(args.num_train_epochs * len(examples) / args.train_batch_size)
    if total_steps < 1:
        raise UserError(
            f"--num_train_epochs {args.num_train_epochs:g} of {len(examples)} examples are less than one step of "
            f"--train_batch_size {args.train_batch_size}: lower the batch size, or give --max_steps"
        )
    warmup_steps = int(args.warmup_steps if args.warmup_steps >= 1 else args.warmup_steps * total_steps)
    learning_rate = args.learning_rate
    if learning_rate is None:
        learning_rate = 2e-3 if args.model_name_or_path == "toy" else 2e-4 if args.use_peft else 2e-5
    run.print(
        f"{len(examples):,} examples / {args.train_batch_size} per step -> {total_steps} optimiser steps "
        f"({total_steps * args.train_batch_size / len(examples):.2f} epochs) on {ranks.num_processes} rank(s), "
        f"peak learning rate {learning_rate:g} after {warmup_steps} warm-up steps"
    )

    # -------------------------------------------------------------------------------------------------- 5. optimiser
    optimizer = make_optimizer(
        model, learning_rate, (args.adam_beta1, args.adam_beta2), args.adam_epsilon, args.weight_decay
    )
    scheduler = get_scheduler(args.lr_scheduler_type, optimizer, warmup_steps, total_steps)
    first_step, checkpoint = 0, run.load_checkpoint()
    if checkpoint is not None:
        first_step, state = checkpoint
        model.load_state_dict(state["model"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        restore_random_state(state["random"])

    # ------------------------------------------------------------------------------------------------------- 6. loop
    clock, tokens_seen = time.perf_counter(), 0
    weights_before = weight_sum(optimizer) if first_step == 0 else None
    for step in range(first_step + 1, total_steps + 1):
        # 6.1 Every rank knows the whole step, so all agree on its denominator and on who runs what
        chosen = draw(len(examples), (step - 1) * args.train_batch_size, args.train_batch_size, args.seed)
        step_examples = [examples[i] for i in chosen]
        num_trained_tokens = sum(int(example.loss_mask.sum()) for example in step_examples)  # token mean over the step
        num_tokens = sum(len(example.input_ids) for example in step_examples)
        micro_batches = pack(
            step_examples, args.max_tokens_per_micro_batch, ranks.num_processes, layout_of(model)
        )[ranks.process_index]
        logging = step % args.logging_steps == 0 or step in (1, total_steps)

        # 6.2 Forward and backward, one packed row at a time
        sums = torch.zeros(3, device=device)  # of losses, entropies, right guesses
        for micro in micro_batches:
            batch = collate(step_examples, micro, device)
            if args.inspect:
                return show_batch(run, tokenizer, batch)
            scores = score_tokens(model, batch, statistics=logging)
            loss_N = sft_loss(scores.logprobs_N, args.loss_type)
            weight_N = batch.loss_mask_N / num_trained_tokens
            loss = (weight_N * loss_N).sum()
            loss.backward()
            sums += torch.stack([loss, scores.entropies_N.sum(), scores.correct_N.sum()]).detach()
        sum_over_ranks(sums)

        # 6.3 Gates of step one: is there anything to learn, and will the model learn to stop?
        if step == 1:
            stops = set(stop_ids(tokenizer, model.generation_config.eos_token_id, []))
            ends = [int(e.input_ids[e.loss_mask][-1]) in stops for e in step_examples]
            run.gate("trained tokens in the step", num_trained_tokens, "> 0", num_trained_tokens > 0)
            run.gate(
                "sequences that end in a trained stop token", sum(ends) / len(ends),
                "> 0, and 1 unless rows are truncated", sum(ends) > 0,
            )

        # 6.4 Update
        grad_norm = clip_gradients(optimizer, args.max_grad_norm, sums[0])
        run.require_finite(grad_norm, sums[0], step, (rows.where(e.row) for e in step_examples))
        learning_rate = scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        tokens_seen += num_tokens
        if weights_before is not None and learning_rate > 0:  # warm-up starts at a rate of 0
            moved = abs(weight_sum(optimizer) - weights_before) > 0  # no, if it is no number
            run.gate("weights moved by the first update", float(moved), "1", moved)
            weights_before = None

        # 6.5 Log, save, evaluate
        if logging:
            loss, entropy, correct = sums.tolist()
            seconds = time.perf_counter() - clock
            metrics = {
                "loss": loss, "grad_norm": grad_norm.item(), "learning_rate": learning_rate,
                "entropy": entropy / num_trained_tokens, "mean_token_accuracy": correct / num_trained_tokens,
                "epoch": step * args.train_batch_size / len(examples), "num_tokens": num_tokens,
            }
            run.log(step, metrics, {"tokens_per_second": tokens_seen / seconds})
            run.progress(step, total_steps, {k: metrics[k] for k in ("loss", "mean_token_accuracy", "grad_norm")})
        last = step == total_steps
        if last:  # first of all: nothing that fails from here on costs the model
            save_model(model, tokenizer, run.final_folder)
            run.print(f"saved {run.final_folder}")
        if eval_examples and (last or (args.eval_steps and step % args.eval_steps == 0)):
            metrics = evaluate_sft(
                model, tokenizer, eval_examples, eval_rows, prompts, prompt_ids, rewards, run, args, step
            )
            run.log(step, metrics)
            run.print("  ".join(f"{name} {value:.3f}" for name, value in metrics.items()))
            run.keep_best(step, metrics, lambda folder: save_model(model, tokenizer, folder))
        if not last:
            run.end_step(step, {
                "model": trained_weights(model),
                "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(), "random": random_state(),
            })

    run.finish()


if __name__ == "__main__":
    launch(main, Args)
