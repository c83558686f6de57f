"""How a step of pairs is cut is a matter of memory: one gradient for 32 pairs in one row or 64, prompts shared or not.

As test_layout.py, for dpo.py, kto.py and orpo.py: every case runs the script's own main() from end to end. What looks
across pairs (AOT, BCO, z0), what is a mean over tokens (`sft`, ORPO's likelihood) and where the reference comes from
(a second model, the model without its adapter, a file) must not change with it (T1, T11, T13, T14 of the list of known
bugs that this project was planned with). Replies differ in length here, which those of the toy pairs do not.
"""

import copy
import json
import math
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from recording import difference, record
from safetensors.torch import load_file, save_file
from test_layout import compare_cuts
from torch.nn.utils import parameters_to_vector
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import dpo
import kto
import orpo
from common.data import Example, encode_pair, pack
from common.models import load_policy, load_tokenizer
from common.toy import toy_config, toy_pairs, toy_tokenizer

pytest_plugins = ["recording"]

STEP = dict(train_batch_size=32, max_steps=2, learning_rate=0.3)
CUTS = {
    "a few pairs a row": dict(max_tokens_per_micro_batch=90),
    "each reply with its own prompt": dict(max_tokens_per_micro_batch=150, share_prompts=False),
}
ALONE = {"one reply a row, stock attention": dict(max_tokens_per_micro_batch=1, alone=True)}
FINEST = ALONE | {"one pair a row": dict(max_tokens_per_micro_batch=1)}
# These see of a reply what `sigmoid` sees, one sum; they are spared the slowest cut
PER_PAIR = ("hinge", "exo_pair", "nca_pair", "robust", "sppo_hard", "apo_zero", "apo_down", "discopop", "cpo")


def uneven_pairs(count: int) -> list[dict]:
    """Toy pairs of which either side may be longer; every fourth has the prompt of the row before."""
    generator, rows = random.Random(0), toy_pairs("train", count)
    for i, row in enumerate(rows):
        if i % 4 == 3:
            row["prompt"] = rows[i - 1]["prompt"]
        for side in ("chosen", "rejected"):
            row[side] = row[side][: generator.randint(1, 8)] + "." * generator.choice([0, 0, 1, 3])
        if row["chosen"] == row["rejected"]:
            row["rejected"] += "="
    return rows


def labelled(pairs: list[dict]) -> list[dict]:
    """Their replies one by one, and fewer of the rejected."""
    sides = [(row, side) for i, row in enumerate(pairs) for side in ("chosen", "rejected")[: 1 + (i % 3 > 0)]]
    return [{"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"} for row, side in sides]


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def blurred(model):
    """A copy that is noisier and surer of itself: log-ratios of some nats, of both signs, and more often positive."""
    twin, generator = copy.deepcopy(model), torch.Generator().manual_seed(2)
    for parameter in twin.parameters():
        parameter.data += 0.3 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    twin.lm_head.weight.data *= 1.2
    return twin


def watch_copies(monkeypatch, script, make=copy.deepcopy) -> list[tuple]:
    """(policy, reference) of every run from now on; `make` makes the reference."""
    models = []

    def copied(model):
        models.append((model, make(model)))
        return models[-1][1]

    monkeypatch.setattr(script, "copy", SimpleNamespace(deepcopy=copied))
    return models


# -------------------------------------------------------------------------------------------------------------- cuts

LOSSES = {  # name: flags, and the loss of the first step, at which every log-ratio is 0
    "sigmoid": ({}, math.log(2)),
    "cdpo": (dict(label_smoothing=0.2), math.log(2)),
    "hinge": (dict(loss_type=["hinge"]), 1.0),
    "ipo": (dict(loss_type=["ipo"], learning_rate=0.02), 25.0),
    "exo_pair": (
        dict(loss_type=["exo_pair"], label_smoothing=0.1), math.log(0.5) - 0.5 * math.log(0.1) - 0.5 * math.log(0.9)
    ),
    "nca_pair": (dict(loss_type=["nca_pair"]), 2 * math.log(2)),
    "robust": (dict(loss_type=["robust"], label_smoothing=0.1), math.log(2)),
    "bco_pair": (dict(loss_type=["bco_pair"]), 2 * math.log(2)),
    "sppo_hard": (dict(loss_type=["sppo_hard"], learning_rate=0.002), 50.0),
    "aot": (dict(loss_type=["aot"]), math.log(2)),
    "aot_unpaired": (dict(loss_type=["aot_unpaired"], label_smoothing=0.1), math.log(2)),
    "apo_zero": (dict(loss_type=["apo_zero"]), 1.0),
    "apo_down": (dict(loss_type=["apo_down"]), 1.0),
    "discopop": (dict(loss_type=["discopop"], learning_rate=0.1), 0.5 * math.log(2) + 0.5),
    "sft": (dict(loss_type=["sft"]), None),
    "sigmoid_norm": (dict(loss_type=["sigmoid_norm"], beta=5.0, learning_rate=0.02), math.log(2)),
    "simpo": (dict(loss_type=["simpo"], beta=2.0), None),
    "cpo": (dict(loss_type=["cpo"]), None),
    "mpo": (dict(loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0]), None),
    "all that look across": (dict(loss_type=["aot", "sft", "aot_unpaired", "bco_pair"]), None),
    "forward_kl": (dict(f_divergence_type="forward_kl", learning_rate=0.1), math.log(2)),
    "js_divergence": (dict(f_divergence_type="js_divergence", learning_rate=3.0), math.log(2)),
    "alpha_divergence": (dict(f_divergence_type="alpha_divergence", learning_rate=0.1), math.log(2)),
    "ld, ipo, aot": (dict(loss_type=["ipo", "aot"], ld_alpha=0.5, learning_rate=0.02), 25.0 + math.log(2)),
    "wpo": (dict(use_weighting=True, loss_type=["sigmoid", "sft"]), None),
    "sync_ref_model": (dict(sync_ref_model=True, ref_model_sync_steps=1), math.log(2)),
    "lora": (dict(use_peft=True, learning_rate=3.0), math.log(2)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_every_cut_of_a_dpo_step_has_the_same_gradient(name, monkeypatch, tmp_path, policy):
    flags, start = LOSSES[name]
    flags = {**STEP, "dataset_name": write(tmp_path / "train.jsonl", uneven_pairs(40)), **flags}
    cuts = CUTS | FINEST if name == "all that look across" else CUTS if name in PER_PAIR else CUTS | ALONE
    steps, _ = compare_cuts(dpo, monkeypatch, tmp_path, cuts, model_name_or_path=policy, **flags)
    first, last = steps[0].metrics, steps[-1].metrics
    if start is not None:  # T11
        assert first["loss"] == pytest.approx(start, abs=2e-6)
    if name not in ("sft", "simpo", "cpo"):
        assert first["rewards/chosen"] == first["rewards/rejected"] == 0 and first["rewards/accuracies"] == 0.5
        rewards = abs(last["rewards/chosen"]), abs(last["rewards/rejected"])
        assert max(rewards) > 0.05  # it is no longer its own reference


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("form", ["single", "pairs"])
def test_every_cut_of_a_kto_step_has_the_same_gradient(loss_type, form, monkeypatch, tmp_path, policy):
    """The reference is blurred: a policy that just left its reference has a negative mean ratio, and z0 is clamped."""
    watch_copies(monkeypatch, kto, blurred)
    pairs = uneven_pairs(40)
    flags = dict(
        model_name_or_path=policy, loss_type=loss_type, train_batch_size=64, max_steps=2, learning_rate=0.1,
        dataset_name=write(tmp_path / "train.jsonl", labelled(pairs) if form == "single" else pairs),
        desirable_weight=1.5, undesirable_weight=0.7,
    )
    cuts = CUTS | FINEST if (loss_type, form) == ("kto", "single") else CUTS | ALONE
    steps, _ = compare_cuts(kto, monkeypatch, tmp_path, cuts, lambda _: None, **flags)
    for step in steps:
        assert step.metrics["kl"] > 0.1 if loss_type == "kto" else step.metrics["kl"] == 0
    assert steps[0].metrics["count/chosen"] != steps[0].metrics["count/rejected"]


def test_kto_begins_at_half_its_mean_weight(monkeypatch, tmp_path, policy):
    """T11. At a learning rate of 0 every step is a first one, each with its own number of desirable replies."""
    steps, _ = record(
        kto, monkeypatch, tmp_path / "run", model_name_or_path=policy, max_steps=3, learning_rate=0.0,
        train_batch_size=16, dataset_name=write(tmp_path / "train.jsonl", labelled(uneven_pairs(40))),
        desirable_weight=1.5, undesirable_weight=0.5,
    )
    for metrics in (step.metrics for step in steps):
        weight = 1.5 * metrics["count/chosen"] + 0.5 * metrics["count/rejected"]
        assert metrics["loss"] == pytest.approx(weight / 32, abs=1e-6)
        assert metrics["kl"] == pytest.approx(0, abs=1e-5) and metrics["count/chosen"] + metrics["count/rejected"] == 16


@pytest.mark.parametrize("completion_only_loss", [None, False])
def test_every_cut_of_an_orpo_step_has_the_same_gradient(completion_only_loss, monkeypatch, tmp_path, policy):
    compare_cuts(
        orpo, monkeypatch, tmp_path, CUTS | FINEST, model_name_or_path=policy, **STEP, beta=1.0,
        completion_only_loss=completion_only_loss, dataset_name=write(tmp_path / "train.jsonl", uneven_pairs(40)),
    )


@pytest.mark.parametrize("layout", ["single", "packed", "shared"])
def test_a_rank_without_replies_runs_a_forward_and_a_backward_all_the_same(layout, policy):
    """T2: two pairs on three ranks. What the idle one adds to any sum is nothing."""
    model, examples = load_policy(policy, torch.float32, torch.device("cpu")), []
    for row, pair in enumerate(uneven_pairs(2)):
        prompt, replies = encode_pair(pair, load_tokenizer("toy"))
        for ids in replies:
            mask = [False] * len(prompt) + [True] * len(ids)
            examples.append(Example(prompt + ids, mask, row, prompt_length=len(prompt)))
    shares = pack(examples, 1000, 3, layout, together=2)
    assert sorted(sorted(i for micro in share for i in micro) for share in shares) == [[], [0, 1], [2, 3]]
    for script in (dpo, kto, orpo):
        replies = script.score_replies(model, examples, [], layout, statistics=True)
        assert all(len(values_B) == 0 for values_B in vars(replies).values())
        replies.logps_B.sum().backward()
        assert not any(p.grad is None or p.grad.any() for p in model.parameters())


# --------------------------------------------------------------------------------------------------------- reference


@pytest.mark.parametrize("script", [dpo, kto])
def test_without_its_adapter_a_model_is_its_reference(script, monkeypatch, tmp_path, policy):
    """T13: the same steps as with a second copy, which --sync_ref_model holds even if it never comes to move it."""
    flags = {
        **STEP, "use_peft": True, "learning_rate": 3.0, "max_steps": 3, "model_name_or_path": policy,
        "dataset_name": write(tmp_path / "train.jsonl", uneven_pairs(40)),
    }
    models = watch_copies(monkeypatch, script)
    off, _ = record(script, monkeypatch, tmp_path / "off", **flags)
    assert not models
    copied, _ = record(script, monkeypatch, tmp_path / "copy", sync_ref_model=True, **flags)
    assert len(models) == 1
    for one, other in zip(off, copied, strict=True):
        assert difference(one.gradient, other.gradient) < 1e-5
    assert abs(off[2].metrics["rewards/chosen"]) > 0.05


@pytest.mark.parametrize(
    "script, kind", [(dpo, "whole"), (dpo, "tied"), (dpo, "lora"), (dpo, "dora"), (kto, "whole"), (kto, "lora")]
)
def test_tr_dpo_moves_the_reference_by_its_share(script, kind, monkeypatch, tmp_path, policy):
    """2404.09656 Eq. 1, twice: r2 = a p2 + (1 - a) (a p1 + (1 - a) p0), of merged weights, each moved once."""
    if kind == "tied":
        config = toy_config()
        config.tie_word_embeddings = True
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(tmp_path / "tied")
        toy_tokenizer().save_pretrained(tmp_path / "tied")
    flags = {
        **STEP, "model_name_or_path": str(tmp_path / "tied") if kind == "tied" else policy,
        "use_peft": kind in ("lora", "dora"), "use_dora": kind == "dora", "sync_ref_model": True,
        "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.3, "max_steps": 4,
        "learning_rate": 0.3 if kind in ("whole", "tied") else 3.0,
        "dataset_name": write(tmp_path / "train.jsonl", uneven_pairs(40)),
    }
    models, adapted, weights = watch_copies(monkeypatch, script), [], []

    def note(*arguments, real=script.clip_gradients):
        """The weights before each update, an adapter merged by peft."""
        model = copy.deepcopy(adapted[0]).merge_and_unload() if adapted else models[0][0]
        weights.append(parameters_to_vector(model.parameters()).detach().clone())
        return real(*arguments) if arguments else None

    monkeypatch.setattr(script, "clip_gradients", note)
    monkeypatch.setattr(script, "add_lora", lambda *a, real=script.add_lora: adapted.append(real(*a)) or adapted[0])
    steps, _ = record(script, monkeypatch, tmp_path / "run", **flags)
    note()  # and those after the last

    expected = 0.3 * weights[4] + 0.7 * (0.3 * weights[2] + 0.7 * weights[0])
    moved = parameters_to_vector(models[0][1].parameters())
    assert (expected - weights[0]).norm() > 0.01
    torch.testing.assert_close(moved, expected, rtol=1e-5, atol=1e-6)
    assert abs(steps[3].metrics["rewards/chosen"]) > 1e-4


# ------------------------------------------------------------------------------------------------------- precomputed

STORED = {
    "dpo": (dpo, {}),
    "ld, ipo, bco": (dpo, dict(loss_type=["ipo", "bco_pair"], ld_alpha=0.5, learning_rate=0.02)),
    "aot": (dpo, dict(loss_type=["aot"], share_prompts=False)),
    "dpo, lora": (dpo, dict(use_peft=True, learning_rate=3.0)),
    "kto": (kto, {}),
    "apo_zero_unpaired, lora": (kto, dict(loss_type="apo_zero_unpaired", use_peft=True, learning_rate=3.0)),
}


def stored_in(folder: Path) -> dict[Path, torch.Tensor]:
    return {path: load_file(path)["logprobs_A"] for path in sorted(folder.glob("*"))}


@torch.no_grad()
def stock_logprobs(folder: str, rows: list[dict]) -> torch.Tensor:
    """Of every token of every reply, 0 for its prompt's, end to end; float64 and one sequence at a time."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).double(), load_tokenizer("toy")
    found = []
    for row in rows:
        for side in ("chosen", "rejected"):
            prompt = tokenizer(row["prompt"]).input_ids
            ids = torch.tensor(prompt + tokenizer(row[side], add_special_tokens=False).input_ids + [2])
            logprobs = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
            found += [torch.zeros(len(prompt)), logprobs[len(prompt) - 1 :]]
    return torch.cat(found)


@pytest.mark.parametrize("case", STORED)
def test_a_precomputed_reference_is_the_one_of_every_step(case, monkeypatch, tmp_path, policy):
    """T14: the same gradients, from a file whose log-probs are those of stock transformers, and which is read."""
    script, flags = STORED[case]
    rows, cache = uneven_pairs(40), tmp_path / "cache"
    flags = {**STEP, "model_name_or_path": policy, "dataset_name": write(tmp_path / "train.jsonl", rows), **flags}
    models = watch_copies(monkeypatch, script)
    online, _ = record(script, monkeypatch, tmp_path / "online", **flags)
    models.clear()
    flags |= dict(precompute_ref_log_probs=True, ref_log_probs_dir=str(cache))
    stored, _ = record(script, monkeypatch, tmp_path / "stored", **flags)
    assert len(models) == (case == "kto")  # no second model; z0 still needs one
    for one, other in zip(stored, online, strict=True):
        assert difference(one.gradient, other.gradient) < 2e-5
    [(path, logprobs_A)] = stored_in(cache).items()
    torch.testing.assert_close(logprobs_A.double(), stock_logprobs(policy, rows), rtol=0, atol=1e-4)

    # Another run reads the file, cut as it likes: with other numbers in it there are other gradients (TRL #2431)
    save_file({"logprobs_A": 3 * logprobs_A}, path)
    again, _ = record(
        script, monkeypatch, tmp_path / "again", disturb=lambda _: None, max_tokens_per_micro_batch=60, **flags
    )
    assert [*stored_in(cache)] == [path] and torch.equal(load_file(path)["logprobs_A"], 3 * logprobs_A)
    assert difference(again[0].gradient, online[0].gradient) > 1e-3


def test_a_stored_reference_is_not_taken_for_another(monkeypatch, tmp_path, policy):
    """Another weight or another token is another reference; another script is not."""
    rows, cache, saved = uneven_pairs(40), tmp_path / "cache", []
    nudged, number = shutil.copytree(policy, tmp_path / "nudged"), iter(range(9))
    weights = load_file(nudged / "model.safetensors")
    weights["model.norm.weight"][-1] += 1e-6
    save_file(weights, nudged / "model.safetensors", metadata={"format": "pt"})

    def files_after(script, folder, rows, **flags) -> int:
        name = f"{next(number)}"
        data = write(tmp_path / f"{name}.jsonl", rows)
        flags |= dict(precompute_ref_log_probs=True, ref_log_probs_dir=str(cache), dataset_name=data)
        flags = {**STEP, "max_steps": 1, "model_name_or_path": str(folder), **flags}
        record(script, monkeypatch, tmp_path / name, **flags)
        return len(stored_in(cache))

    for script in (dpo, kto):
        monkeypatch.setattr(script, "save_file", lambda *a, real=script.save_file: saved.append(a) or real(*a))
    assert files_after(dpo, policy, rows) == 1
    assert files_after(dpo, policy, rows, learning_rate=0.1, share_prompts=False, loss_type=["ipo"]) == 1
    assert files_after(dpo, policy, rows, use_peft=True) == 1
    assert files_after(kto, policy, rows) == 1
    assert files_after(dpo, nudged, rows) == 2
    rows[17] = {**rows[17], "rejected": rows[17]["rejected"] + "."}
    assert files_after(dpo, policy, rows) == 3
    assert files_after(dpo, policy, rows[::-1]) == 4  # the file holds them in order
    assert len(saved) == 4
