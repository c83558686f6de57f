"""One thread, no network, and `--long` for the tests that take minutes."""

import os

# Before anything imports torch: parallel sums in other orders would make bit-for-bit comparisons depend on the machine.
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}

import pytest
import torch

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="also run the tests that take minutes or learn something")
    parser.addoption("--case", type=int, help="of tests/test_fuzz.py, this case alone")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--long"):
        for item in items:
            if "long" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="takes minutes: runs with --long"))
