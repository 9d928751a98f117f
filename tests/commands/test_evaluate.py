"""Where a trained network is scored."""

from __future__ import annotations

import pytest
import torch

from fewmask.commands.evaluate import scoring_device


@pytest.mark.parametrize(
    ("asked", "present", "expected"),
    [
        ("auto", True, "cuda"),
        ("cuda", True, "cuda"),
        ("cpu", True, "cpu"),
        ("auto", False, "cpu"),
        ("cuda", False, "cpu"),  # trained on a GPU, scored on a machine without one
        ("mps", False, "cpu"),
    ],
)
def test_a_network_is_scored_on_a_gpu_where_there_is_one_and_it_may_be(
    asked: str, present: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: present)
    assert scoring_device(asked) == expected
