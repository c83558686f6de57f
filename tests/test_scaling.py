"""benchmark/scaling.py: the tables of docs/scaling.md are its own, and its memory formula meets what was measured."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmark"))

from scaling import KEPT, LLAMA_70B, QWEN_7B, SMOLLM2, check, communication, H200, measured, states, tables

FAR_OFF = {"grpo U0": 0.18}  # docs/scaling.md says what is known about it


def test_the_page_shows_what_the_script_prints():
    page = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
    assert check() in page and tables() in page and "Nothing on this page was measured" in page
    done = subprocess.run([sys.executable, ROOT / "benchmark/scaling.py"], capture_output=True, text=True)
    assert done.stdout == tables() + "\n"


@pytest.mark.parametrize("name, formula, peak", measured(), ids=[name for name, _, _ in measured()])
def test_memory_meets_what_was_measured(name, formula, peak):
    assert abs(formula / peak - 1) < FAR_OFF.get(name, 0.15)


def test_sizes_are_those_of_the_models():
    """By the model cards; Qwen's biases are left out."""
    for shape, parameters in ((SMOLLM2, 134_515_008), (QWEN_7B, 7_615_616_512), (LLAMA_70B, 70_553_706_496)):
        assert shape.parameters == pytest.approx(parameters, rel=1e-4)


def test_what_is_shared_out_shrinks():
    for sharding in KEPT:
        alone, many = (states(QWEN_7B, sharding, ranks) for ranks in (1, 1024))
        assert (alone == many) == (sharding == "replicated")
        assert communication(QWEN_7B, sharding, 1, 1, H200) == 0
    assert states(QWEN_7B, "replicated", 1) == 18 * QWEN_7B.parameters
