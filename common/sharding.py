"""One model on one rank or over many: how its weights lie, its optimiser, its way out. What torch and DeepSpeed change.

The scripts know nothing of this. They count over the global batch, add up over ranks, and call the same functions in
every layout; `accelerate launch --config_file configs/...` says which it is, by environment variables:

    replicated  a rank holds everything; gradients are added up once a step, in fp32
    FSDP2       a rank holds a slice of every weight, of its gradient and of its optimiser state (torch's `fully_shard`)
    ZeRO-2      a rank holds the weights, and slices of gradients and optimiser state (DeepSpeed)
    ZeRO-3      a rank holds slices of all three (DeepSpeed), in main memory with offload

Losses are sums over tokens divided by counts over the whole step, so gradients are added, never averaged. Whatever is
sharded, it is the same optimiser: AdamW over fp32 weights, for with bf16 compute a step of 1e-6 is smaller than half an
ulp of most weights and rounds away; gradients of all micro-batches are added up in fp32 as well. Weights leave one at a
time (`full_parameters`), to an engine or into a file, and a checkpoint holds slices (`common.run.Sliced`), from which
any number of ranks goes on.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from math import ceil, isfinite
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DeepSpeedPlugin
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from common.models import base_model, is_scorer
from common.run import Sliced, Slices, UserError, layout_asked

# ------------------------------------------------------------------------------------------------ layouts


def join_ranks(timeout: float) -> PartialState:
    """This process and those that the launcher started beside it, in the layout that it asked for or not at all.

    Args:
        timeout: seconds that a rank waits for the others before it takes one for dead.

    Raises:
        UserError: the launcher's file asks for what is not done here, or there are more processes than GPUs.
    """
    asked = layout_asked()
    only = {
        "accelerate_mixed_precision": "no",  # the script has --dtype
        "accelerate_dynamo_backend": "no",  # the script has --torch_compile
        "accelerate_use_megatron_lm": "false", "accelerate_use_parallelism_config": "false",
        "accelerate_deepspeed_config_file": "",
    }
    if asked == "FSDP2":
        only |= {
            "fsdp_version": "2", "fsdp_reshard_after_forward": "true", "fsdp_offload_params": "false",
            "fsdp_activation_checkpointing": "false",  # the script has --gradient_checkpointing
        }
    for name, value in only.items():
        found = os.environ.get(name.upper(), value).lower()
        if found != value:
            raise UserError(f"the launcher's {name} is `{found}`, here it can only be `{value}`: see configs/")
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if asked != "replicated" and ranks == 1:
        raise UserError(f"the launcher asks for {asked}, but this is one process: set num_processes to 2 or more")
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if gpus and here > gpus:
        raise UserError(f"the launcher started {here} processes on a machine with {gpus} GPU(s): set num_processes")
    if timeout < 1:
        raise UserError(f"--ddp_timeout must be at least 1, not {timeout:g}")
    # cpu: else torchrun on a CPU makes several runs of one rank
    state = PartialState(cpu=not gpus, timeout=timedelta(seconds=timeout))
    if state.num_processes < ranks:
        raise UserError(f"the launcher started {ranks} processes, of which {state.num_processes} found each other")
    return state


def shard(model):
    """The model, cut over the ranks where the launcher asks for it. Call it before its optimiser is made.

    FSDP2 is torch's `fully_shard` on every decoder layer and on what is left, embeddings and output head together. A
    rank owns a slice of each weight, fp32 where it is trained; a forward or backward pass gathers one layer at a time,
    in the dtype that the model computes in, and adds each gradient up over ranks in fp32. The head of a scorer stays
    whole. A sharded model can no longer be copied.

    DeepSpeed's engine takes model and optimiser together, so `make_optimizer` starts it; only a frozen model is cut
    here.

    Raises:
        UserError: a model that FSDP2 cannot cut.
    """
    asked = layout_asked()
    if asked == "ZeRO-3" and not any(parameter.requires_grad for parameter in model.parameters()):
        start_zero(model)
    if asked != "FSDP2":
        return model
    core = base_model(model)
    blocks = [module for module in core.modules() if type(module).__name__ in (core._no_split_modules or ())]
    if not blocks or getattr(core, "is_quantized", False):
        raise UserError(f"{type(core).__name__} cannot be sharded, for it is quantised or its layers are not known")
    core.base_model.computes_in = core.dtype
    options = {
        "mesh": dist.init_device_mesh(core.device.type, (world_size(),)),
        "ignored_params": set(core.score.parameters()) if is_scorer(core) else set(),
        "mp_policy": MixedPrecisionPolicy(core.dtype, torch.float32, cast_forward_inputs=False),
        "reshard_after_forward": True,
    }
    for module in [*blocks, core]:
        for parameter in module.parameters():
            if parameter.requires_grad and not isinstance(parameter, DTensor):
                parameter.data = vars(parameter).pop("exact", parameter.data.float())
        fully_shard(module, **options)
        module.set_force_sum_reduction_for_comms(True)  # not the mean: the loss already divides by global counts
        module.set_gradient_divide_factor(1.0)
    # Embeddings and head are gathered when `core` is called. What runs here is never its forward method, but functions
    # of common/models.py that read its weights: they are handed to this method, which counts as one.
    core.run = lambda function, *arguments, **options: function(*arguments, **options)
    register_fsdp_forward_method(core, "run")
    vars(core.base_model)["sharded_call"] = core.run  # of the body: the scorer on a shared body finds it as well
    return model


class _AnyFunction(torch.nn.Module):
    """What DeepSpeed takes for the model: its forward pass is any function that reads the model's weights."""

    def __init__(self, core):
        super().__init__()
        self.core = core

    def forward(self, function, *arguments, **options):
        return function(*arguments, **options)


def start_zero(model, optimizer=None):
    """A DeepSpeed engine over the model; gradients of any number of backward passes add up until `engine.step()`."""
    try:
        import deepspeed
    except ImportError:
        raise UserError("the launcher asks for DeepSpeed, which is not installed: pip install deepspeed")
    deepspeed.utils.logger.setLevel("ERROR")
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # of collectives that it calls
    core = base_model(model)
    if core.device.type == "cpu":  # its shared-memory collectives would first be compiled, for minutes
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    config = dict(DeepSpeedPlugin().deepspeed_config)
    config["zero_optimization"] = {k: v for k, v in config["zero_optimization"].items() if v != "auto"} | {
        "overlap_comm": False, "stage3_param_persistence_threshold": 10 * core.config.get_text_config().hidden_size,
    }
    config |= {
        "train_micro_batch_size_per_gpu": 1, "train_batch_size": world_size(),
        "gradient_accumulation_steps": 1, "managed_gradient_accumulation": False,
        "bf16": {"enabled": core.dtype == torch.bfloat16, "check_grad_overflow": True}, "fp16": {"enabled": False},
        "gradient_clipping": 0.0,
        "communication_data_type": "fp32", "data_types": {"grad_accum_dtype": "fp32"}, "steps_per_print": 2**31,
        "zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True,
    }
    exact = {p: vars(p).pop("exact") for p in core.parameters() if hasattr(p, "exact")}
    core.base_model.computes_in = core.dtype
    engine, *_ = deepspeed.initialize(model=_AnyFunction(core), optimizer=optimizer, config=config)
    for parameter, value in exact.items():
        deepspeed.utils.safe_set_full_fp32_param(parameter, value)
    if optimizer is not None:  # it takes the mean over ranks; the loss already divides by global counts
        engine.optimizer.loss_scaler.cur_scale = 1 / world_size()
    vars(core.base_model)["sharded_call"] = engine
    return engine


@contextmanager
def pieces(parameters):
    """For as long as this lasts, those weights that ZeRO-3 has cut are whole on every rank, to be read."""
    parameters = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not parameters:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters):
        yield


@contextmanager
def gathered(model):
    """The whole model on every rank for as long as it decodes: ranks decode different lengths, so none may wait."""
    core = base_model(model)
    slices = [module for module in core.modules() if isinstance(module, FSDPModule)]
    for module in slices:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    engine = vars(core.base_model).get("sharded_call") if any(hasattr(p, "ds_id") for p in core.parameters()) else None
    if engine:
        hooks = getattr(engine.optimizer, "parameter_offload", engine.optimizer)
        hooks._remove_module_hooks()  # they would cut a layer again as soon as it has run
    try:
        with pieces(core.parameters()):
            yield
    finally:
        for module in slices:
            module.reshard()
            module.set_reshard_after_forward(True, recurse=False)
        if engine:
            hooks.setup_zero_stage3_hooks()


def is_sharded(model) -> bool:
    """Whether each rank has a state of its own: slices of the weights, or of what the optimiser knows of them."""
    return "sharded_call" in vars(base_model(model).base_model)


# ------------------------------------------------------------------------------------------------ optimiser


class MasterAdamW(torch.optim.AdamW):
    """AdamW whose own parameters are fp32 copies of a low-precision model's: what its checkpoint said, before rounding.

    A hook moves each parameter's gradient into its master's fp32 `.grad` as soon as backward has made it, so
    micro-batches add up in fp32 and low-precision gradients never pile up. `step` writes the masters back. The master
    of a sharded weight is this rank's slice of it, fp32 already and in the same memory.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], **options):
        self.compute = parameters
        masters = [torch.nn.Parameter(getattr(p, "exact", local(p.detach()).float())) for p in parameters]
        super().__init__(masters, **options)
        for parameter, master in zip(parameters, masters):
            master.whole_rows = parameter.shape[0] if isinstance(parameter, DTensor) else None
            parameter.register_post_accumulate_grad_hook(partial(self._collect, master))

    @staticmethod
    def _collect(master, parameter):
        if master.grad is None:
            master.grad = local(parameter.grad).float()
        else:
            master.grad += local(parameter.grad)
        parameter.grad = None

    @torch.no_grad()
    def step(self):
        super().step()
        self._write_back()

    def _write_back(self):
        torch._foreach_copy_([local(p.detach()) for p in self.compute], self.param_groups[0]["params"])

    def state_dict(self):
        """Also holds the masters, which a plain optimiser state does not."""
        masters, state = self.param_groups[0]["params"], super().state_dict()
        state["state"] = {
            i: {name: value if name == "step" else cut(value, masters[i]) for name, value in moments.items()}
            for i, moments in state["state"].items()
        }
        return {"optimizer": state, "masters": [cut(p.detach(), p) for p in masters]}

    @torch.no_grad()
    def load_state_dict(self, state):
        masters = self.param_groups[0]["params"]
        for i, moments in state["optimizer"]["state"].items():
            for name in ("exp_avg", "exp_avg_sq"):
                moments[name] = own_slice(moments[name], masters[i])
        super().load_state_dict(state["optimizer"])
        for master, value in zip(masters, state["masters"], strict=True):
            master.copy_(own_slice(value, master))
        self._write_back()


class ZeroAdamW(torch.optim.AdamW):
    """AdamW inside a DeepSpeed engine, which puts its flat fp32 slices in the place of the parameters.

    The engine clips and steps in one, in `clip_gradients`. A step of this object then finds no gradient left.
    """

    def __init__(self, model, parameters: list[torch.nn.Parameter], **options):
        super().__init__(parameters, **options)
        self.engine = start_zero(model, self)

    def masters(self) -> list[torch.Tensor]:
        """This rank's slices, flat, several weights in each."""
        zero = self.engine.optimizer
        return zero.fp32_partitioned_groups_flat if layout_asked() == "ZeRO-3" else zero.single_partition_of_fp32_groups

    def clip_and_step(self, max_norm: float) -> torch.Tensor:
        """The norm before clipping; where it is no number, nothing else has happened."""
        self.engine.optimizer.clip_grad = max(max_norm, 0.0)
        self.engine.step()
        return torch.as_tensor(float("inf") if self.engine.optimizer.overflow else self.engine.get_global_grad_norm())

    def slices(self, flats: list[torch.Tensor]) -> list[Sliced]:
        """Flat tensors, laid out as `masters`, in parts of which each is cut over the ranks the same way."""
        if layout_asked() == "ZeRO-2":  # all weights of a group end to end, then cut
            groups = self.engine.optimizer.bit16_groups
            return [Sliced(flat, sum(p.numel() for p in group)) for flat, group in zip(flats, groups, strict=True)]
        parts = []  # each weight cut, the slices then laid end to end
        for flat, group in zip(flats, self.engine.optimizer.fp16_groups, strict=True):
            start = 0
            for parameter in group:
                parts.append(Sliced(flat.narrow(0, start, parameter.partition_numel()), parameter.ds_numel))
                start += parameter.partition_numel()
        return parts

    def weights(self) -> list[torch.Tensor]:
        """This rank's slices without their padding, which nobody ever sets."""
        slices = self.slices([p.detach() for p in self.masters()])
        return [s.tensor[: max(0, s.rows - dist.get_rank() * len(s.tensor))] for s in slices]

    def state_dict(self):
        state = {"masters": self.slices([p.detach() for p in self.masters()])}
        moments = [self.state[p] for p in self.masters() if p in self.state]
        if moments:  # there are none before the first step
            state |= {name: self.slices([m[name] for m in moments]) for name in ("exp_avg", "exp_avg_sq")}
            state["step"] = moments[0]["step"]
        return state

    @torch.no_grad()
    def load_state_dict(self, state):
        masters = self.masters()
        tensors = {"masters": [p.detach() for p in masters]}
        if "step" in state:
            tensors |= {name: [torch.zeros_like(p) for p in tensors["masters"]] for name in ("exp_avg", "exp_avg_sq")}
            for p, m, v in zip(masters, tensors["exp_avg"], tensors["exp_avg_sq"]):
                self.state[p] = {"step": state["step"].clone(), "exp_avg": m, "exp_avg_sq": v}
        for name, flats in tensors.items():
            for own, saved in zip(self.slices(flats), state[name], strict=True):
                own.tensor.copy_(saved.part(dist.get_rank() * len(own.tensor), len(own.tensor)))
        if layout_asked() == "ZeRO-3":
            slices = self.slices(tensors["masters"])
            for parameter, own in zip((p for g in self.engine.optimizer.fp16_groups for p in g), slices, strict=True):
                parameter.ds_tensor.view(-1).copy_(own.tensor)


def cut(tensor: torch.Tensor, master: torch.nn.Parameter) -> torch.Tensor | Sliced:
    """A tensor like `master` as a checkpoint holds it."""
    return tensor if master.whole_rows is None else Sliced(tensor, master.whole_rows)


def own_slice(saved: torch.Tensor | Slices, master: torch.nn.Parameter) -> torch.Tensor:
    """The inverse of `cut`, on any number of ranks."""
    if master.whole_rows is None:
        return saved
    return saved.part(dist.get_rank() * ceil(master.whole_rows / dist.get_world_size()), len(master))


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's slice of a sharded tensor, in the same memory; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def make_optimizer(model, learning_rate: float, betas: tuple[float, float], eps: float, weight_decay: float):
    """AdamW over the trainable parameters, fused: over themselves where they are whole and fp32, else over masters.

    Raises:
        UserError: nothing to train, or a negative rate.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise UserError("the model has no trainable parameter")
    if learning_rate < 0:
        raise UserError(f"--learning_rate must be at least 0, not {learning_rate:g}")
    options = {"lr": learning_rate, "betas": betas, "eps": eps, "weight_decay": weight_decay, "fused": True}
    lone_head = isinstance(model, torch.nn.Linear)  # of a critic on the policy's body: whole on every rank
    if layout_asked() in ("ZeRO-2", "ZeRO-3") and not lone_head:
        return ZeroAdamW(model, parameters, **options)
    if all(p.dtype == torch.float32 and not isinstance(p, DTensor) for p in parameters):
        return torch.optim.AdamW(parameters, **options)
    return MasterAdamW(parameters, **options)


def weight_sum(optimizer) -> float:
    """A number, the same on all ranks, that changes when any trained weight changes: the first update must move it."""
    weights = optimizer.weights() if isinstance(optimizer, ZeroAdamW) else optimizer.param_groups[0]["params"]
    parts = (part for p in weights for part in p.detach().flatten().split(2**20))  # all in fp64 would be the peak
    return sum_over_ranks(sum(part.double().abs().sum() for part in parts)).item()


def world_size() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The sum of a small tensor over all ranks (itself in a single process)."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def clip_gradients(optimizer, max_norm: float, loss: torch.Tensor | float) -> torch.Tensor:
    """Sum gradients over ranks (the loss already divides by global counts), clip them; the norm before clipping.

    Those of slices are sums already, and their norm is that of the slices of all ranks. ZeRO steps here as well. Where
    the `loss` of the whole step is no number the norm is none either, though the gradients may be (of a term that is
    masked, or has none): one look at the norm tells of both.
    """
    if isinstance(optimizer, ZeroAdamW):
        return optimizer.clip_and_step(max_norm) if isfinite(loss) else torch.tensor(float("nan"))
    parameters = optimizer.param_groups[0]["params"]
    gradients, slices = [], []
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if getattr(parameter, "whole_rows", None) is not None:
            slices.append(parameter.grad)
        else:
            gradients.append(sum_over_ranks(parameter.grad))
    norm = torch.nn.utils.get_total_norm(gradients)
    if slices:
        norm = (norm.to(slices[0]) ** 2 + sum_over_ranks(torch.nn.utils.get_total_norm(slices) ** 2)).sqrt()
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm if max_norm > 0 else float("inf"), norm)
    return norm + 0 * loss


# ------------------------------------------------------------------------------------------------ weights out


@torch.no_grad()
def full_parameters(model, merge: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter under its Hugging Face name, one at a time, for engines and files. LoRA merged, or left out.

    A tied output head comes under its own name as well: a loader that ties it skips the second. Sharded weights are
    gathered one by one, so every rank has to ask for all of them.
    """
    modules = dict(base_model(model).named_modules())
    for name, parameter in base_model(model).named_parameters(remove_duplicate=False):
        if ".lora_" in name or ".original_module." in name:
            continue
        owner, leaf = name.replace(".modules_to_save.default", "").rsplit(".", 1)  # the head of a scorer
        if owner.endswith(".base_layer"):
            layer = modules[owner.removesuffix(".base_layer")]
            if leaf == "weight" and merge:
                with pieces(layer.parameters()):
                    parameter = merged_weight(layer)
            owner = owner.removesuffix(".base_layer")
        yield f"{owner}.{leaf}", whole(parameter, getattr(base_model(model).base_model, "computes_in", None))


def whole(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A sharded weight from all ranks, as `dtype`; any other weight itself."""
    if hasattr(tensor, "ds_id"):
        with pieces([tensor]):
            return tensor.detach().clone()
    tensor = tensor.detach()
    return tensor.to(dtype or tensor.dtype).full_tensor() if isinstance(tensor, DTensor) else tensor


def merged_weight(layer) -> torch.Tensor:
    """W + scaling * B A of one LoRA layer; DoRA (2402.09353 Eq. 5) then rescales each output row to its magnitude."""
    weight = layer.base_layer.weight.detach().float()
    for adapter in layer.active_adapters:
        weight = weight + layer.get_delta_weight(adapter).float()
        if layer.use_dora.get(adapter, False):
            magnitude = layer.lora_magnitude_vector[adapter].weight.detach().float()
            weight = weight * (magnitude / weight.norm(dim=1)).unsqueeze(1)
    return weight.to(layer.base_layer.weight.dtype)


def save_adapter(model, folder: Path) -> None:
    """The LoRA adapter as a folder of PEFT, on every rank that calls it; all have to, for a sharded one is gathered."""
    state = {name: whole(p).cpu() for name, p in model.named_parameters() if p.requires_grad}
    model.save_pretrained(folder, state_dict=state)


def trained_weights(model) -> dict[str, torch.Tensor]:
    """What a checkpoint holds of the model; slices of weights stand in the optimiser's state."""
    named = {name: p for name, p in model.named_parameters() if not (isinstance(p, DTensor) or hasattr(p, "ds_id"))}
    return {name: p.detach() for name, p in named.items() if p.requires_grad}


def save_model(model, tokenizer, folder: Path) -> None:
    """A stock Hugging Face folder (of PEFT under LoRA): safetensors, tokenizer, generation_config untouched.

    Every rank calls it, for sharded weights are gathered one by one; the first keeps them, in main memory, and writes.
    """
    core, state = base_model(model), {}
    is_main = not dist.is_initialized() or dist.get_rank() == 0
    named = ((name, whole(p)) for name, p in model.named_parameters() if p.requires_grad)  # the adapter
    if model is core:
        named, buffers = full_parameters(model), dict(model.named_buffers())
        state = {name: tensor for name, tensor in model.state_dict().items() if name in buffers}
    for name, tensor in named:
        if is_main and name not in core.all_tied_weights_keys:
            state[name] = tensor.cpu()
    if not is_main:
        return
    core.config.use_cache = True
    model.save_pretrained(folder, state_dict=state)
    if model is core and is_sharded(model):  # it noted the dtype of the slices
        core.config.dtype = core.base_model.computes_in
        core.config.save_pretrained(folder)
    core.config.use_cache = False
    tokenizer.save_pretrained(folder)


def describe(model) -> str:
    """One line: class, sizes, dtype, and whether packing is on."""
    core = base_model(model)
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    packing = {
        "shared": "packed, equal prompts computed once", "packed": "packed",
        "single": "NOT packed: its attention mixes sequences of a row, so each runs alone",
    }[core.layout]
    name, dtype, ranks = type(core).__name__, core.dtype, world_size()
    if layout_asked() != "replicated":
        name = f"{name.removeprefix('FSDP')} by {layout_asked()} on {ranks} ranks"
        dtype = getattr(core.base_model, "computes_in", dtype)
    return f"{name}: {total:,} parameters, {trainable:,} trainable, {dtype}, {packing}"
