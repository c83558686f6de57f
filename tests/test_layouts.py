"""What accelerate's launcher and a file of configs/ make of a run: the losses and weights of one process, sharded.

A rank of FSDP2 or ZeRO-3 that read a slice for a whole, a mean over ranks where a sum belongs, or a gather that not all
ranks take part in: it fails here, or hangs. benchmark/layouts.py has the cases, and makes the table of docs/layouts.md.
"""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from benchmark.layouts import (
    CASES,
    LAYOUTS,
    LIMIT,
    ROOT,
    SCRIPTS,
    difference_of_metrics,
    difference_of_weights,
    train,
)
from common.run import Sliced, Slices, with_slices, without_slices

SHARDED = ("fsdp2", "zero2", "zero3")


def needs(layout: str, case: str = "") -> None:
    for package, wanted in (("deepspeed", layout.startswith("zero")), ("vllm", "vLLM" in case)):
        if wanted and importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}: bash setup.sh --dev")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Runs of one process, each made once: (lines of metrics.jsonl, folder)."""
    runs = {}

    def get(case, *more):
        if (case, more) not in runs:
            folder = tmp_path_factory.mktemp("alone") / "run"
            runs[case, more] = train(case, "", folder, *more), folder
        return runs[case, more]

    return get


def assert_same(alone, lines, folder):
    assert difference_of_metrics(alone[0], lines) <= LIMIT
    assert difference_of_weights(alone[1] / "final", folder / "final") <= LIMIT


@pytest.mark.parametrize("case, layout", [("sft", "ddp"), ("ppo", "fsdp2"), ("grpo", "zero3")])
def test_two_ranks_end_where_one_process_does(case, layout, alone, tmp_path):
    needs(layout)
    lines = train(case, layout, tmp_path / "run", "--max_steps", "4")
    assert_same(alone(case, "--max_steps", "4"), lines, tmp_path / "run")


@pytest.mark.long
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_every_layout_ends_where_one_process_does(case, layout, alone, tmp_path):
    needs(layout, case)
    lines = train(case, layout, tmp_path / "run", "--max_steps", "20")
    assert_same(alone(case, "--max_steps", "20"), lines, tmp_path / "run")


@pytest.mark.long
@pytest.mark.parametrize("layout", ["ddp", *SHARDED])
@pytest.mark.parametrize("script", [script for script, flags in SCRIPTS.items() if "--train_batch_size" in flags])
def test_a_rank_with_nothing_to_do(script, layout, alone, tmp_path):
    needs(layout)
    more = ("--max_steps", "4", "--train_batch_size", "1")
    assert_same(alone(script, *more), train(script, layout, tmp_path / "run", *more), tmp_path / "run")


def test_the_page_shows_what_was_found():
    results = ROOT / "benchmark/results/layouts"
    assert (results / "table.md").read_text() in (ROOT / "docs/layouts.md").read_text(encoding="utf-8")
    found = json.loads((results / "layouts.json").read_text())
    assert found.keys() == {f"{case} | {layout}" for case in CASES for layout in LAYOUTS}
    assert all(max(differences.values()) <= LIMIT for differences in found.values())


FLAGS = ("--save_steps", "4", "--lr_scheduler_type", "constant", "--warmup_steps", "0", "--max_steps")


@pytest.mark.long
@pytest.mark.parametrize("layout", SHARDED)
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_sharded_run_resumes_to_the_same_bytes(script, layout, tmp_path):
    needs(layout)
    whole = train(script, layout, tmp_path / "whole", *FLAGS, "6")
    train(script, layout, tmp_path / "stopped", *FLAGS, "5")
    assert train(script, layout, tmp_path / "stopped", *FLAGS, "6", "--resume") == whole
    one, two = (load_file(tmp_path / name / "final/model.safetensors") for name in ("whole", "stopped"))
    assert all(two[name].equal(tensor) for name, tensor in one.items())


@pytest.mark.parametrize("script, layout, before, after", [
    ("sft", "fsdp2", 2, 3),
    *(pytest.param(script, layout, *ranks, marks=pytest.mark.long)
      for script in ("sft", "ppo") for layout in SHARDED for ranks in ((3, 2), (2, 3))),
])  # fmt: skip
def test_a_sharded_run_resumes_on_another_number_of_ranks(script, layout, before, after, alone, tmp_path):
    needs(layout)
    train(script, layout, tmp_path / "run", *FLAGS, "5", ranks=before)
    lines = train(script, layout, tmp_path / "run", *FLAGS, "8", "--resume", ranks=after)
    assert_same(alone(script, *FLAGS, "8"), lines, tmp_path / "run")


def test_slices_of_any_number_of_ranks_are_one_tensor():
    whole = {"moments": [torch.arange(14.0).view(7, 2)], "step": 3}
    for ranks, rows in ((1, 7), (2, 4), (3, 3), (5, 2)):  # FSDP2: the last ranks have less, or nothing
        saved = []
        for rank in range(ranks):
            own = whole["moments"][0][rank * rows : (rank + 1) * rows]
            state = without_slices({"moments": [Sliced(own, 7)], "step": 3}, slices := [])
            saved.append(slices)
        loaded = with_slices(state, saved)
        assert loaded["step"] == 3 and loaded["moments"][0].part(0, 7).equal(whole["moments"][0])
        assert loaded["moments"][0].part(2, 3).equal(whole["moments"][0][2:5])
    padded = Slices([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.0])], 3)  # ZeRO: equal slices, the last one padded
    assert padded.part(2, 3).tolist() == [3.0, 0.0, 0.0] and padded.part(4, 0).tolist() == []


@pytest.mark.parametrize("changes, said", [
    ("--num_processes 1", "set num_processes to 2 or more"),
    ("--num_processes 2 --fsdp_reshard_after_forward false", "fsdp_reshard_after_forward is `false`"),
    ("--num_processes 2 --mixed_precision bf16", "accelerate_mixed_precision is `bf16`"),
])  # fmt: skip
def test_a_launch_that_cannot_have_its_layout_says_so(changes, said, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "configs/fsdp2.yaml"]
    command += [*changes.split(), "sft.py", "--output_dir", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and "error: the launcher" in done.stderr and said in done.stderr


def test_a_checkpoint_of_another_layout_is_refused(tmp_path):
    train("sft", "", tmp_path / "run", *FLAGS, "5")
    with pytest.raises(RuntimeError, match="in the layout replicated, this one is FSDP2: launch it as before"):
        train("sft", "fsdp2", tmp_path / "run", *FLAGS, "6", "--resume")
