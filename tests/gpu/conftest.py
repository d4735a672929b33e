"""These tests need a real GPU and are skipped elsewhere, unless KLQ_DEVICE=cpu asks for a rehearsal: the same code at
small sizes, the kernels in Triton's interpreter. Run alone (--confcutdir=tests/gpu) they need torch, triton, pytest and
transformers only."""

import os

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when it is first imported


def pytest_collection_modifyitems(items):
    if not GPU and os.environ.get("KLQ_DEVICE") != "cpu":
        for item in items:
            if "gpu" in item.path.parts:
                item.add_marker(pytest.mark.skip(reason="needs a GPU: run `make gpu` on a machine that has one"))
