"""`run.compile`: torch traces each objective as a whole, and what it traces computes the same."""

from __future__ import annotations

import pytest
import torch

from tests.engine.processes import Pictures, objective_of


@pytest.mark.parametrize("method", ["mae", "g2ll", "tedmae", "dino"])
def test_a_traced_step_is_the_same_step(method):
    plain, traced = objective_of(method, shared=False), objective_of(method, shared=False)
    torch.manual_seed(1)
    batch = plain.views()(Pictures().batch(0))
    # "eager" runs the traced operations one by one: whether an objective can be traced is ours, the compiler is not.
    for call in (plain, torch.compile(traced, backend="eager", fullgraph=True)):
        torch.manual_seed(2)  # the masks
        call(batch)["loss"].backward()
    learnt = 0
    for (name, theirs), ours in zip(plain.named_parameters(), traced.parameters(), strict=True):
        assert (theirs.grad is None) == (ours.grad is None), name
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-7, msg=name)
            learnt += 1
    assert learnt > 10
