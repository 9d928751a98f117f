"""Which precision a training takes when nobody says: what this processor multiplies."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fewmask.config import RunSection
from fewmask.engine import device
from fewmask.engine.device import accelerator_for, resolve_precision
from fewmask.types import UserError

QUESTIONS = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")


@pytest.mark.parametrize(
    ("answers", "expected"),
    [((False, False), "fp32"), ((True, False), "bf16"), ((False, True), "bf16"), ((None, None), "fp32")],
)
def test_bf16_where_the_processor_multiplies_it(
    monkeypatch: pytest.MonkeyPatch, answers: tuple[bool | None, ...], expected: str
) -> None:
    """AMX or AVX-512 BF16 is enough; a torch without these private questions (None) trains in fp32."""
    for name, answer in zip(QUESTIONS, answers, strict=True):
        if answer is None:
            monkeypatch.delattr(torch.cpu, name, raising=False)
        else:
            monkeypatch.setattr(torch.cpu, name, lambda answer=answer: answer, raising=False)
    assert resolve_precision(RunSection(device="cpu")) == expected
    assert resolve_precision(RunSection(device="cpu", precision="fp32")) == "fp32"


def test_processes_that_cannot_share_a_training_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each would train alone, in one folder."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(device, "Accelerator", lambda **_: SimpleNamespace(num_processes=1, device="mps"))
    with pytest.raises(UserError, match="2 processes train together, and this one found no other on mps"):
        accelerator_for(RunSection())
