"""`run.compile`: torch traces each objective as a whole, and what it traces computes the same."""

from __future__ import annotations

import pytest
import torch

from fewmask.draws import drawing_for
from tests.engine.processes import Pictures, objective_of


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("method", ["mae", "g2ll", "tedmae", "dino"])
def test_a_traced_step_is_the_same_step(method, world):
    """Masks and dropped paths included, also where they are this process's share of what two draw."""
    torch.compiler.reset()  # as in a process of its own: batches of another size would be traced for any size
    plain, traced = objective_of(method), objective_of(method)
    torch.manual_seed(1)
    batch = Pictures().batch(0, 0, world)
    share = batch.share
    with drawing_for(share):
        batch = plain.views()(batch)
    # "eager" runs the traced operations one by one: whether an objective can be traced is ours, the compiler is not.
    for call in (plain, torch.compile(traced, backend="eager", fullgraph=True)):
        torch.manual_seed(2)  # the masks
        with drawing_for(share):
            call(batch)["loss"].backward()
    learnt = 0
    for (name, theirs), ours in zip(plain.named_parameters(), traced.parameters(), strict=True):
        assert (theirs.grad is None) == (ours.grad is None), name
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-7, msg=name)
            learnt += 1
    assert learnt > 10


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("method", ["mae", "simmim", "g2ll", "tedmae", "dino", "figure"])
def test_later_steps_are_traced_no_more(method, world):
    """Each has other images, other names and, where processes share them, other places in the batch of all."""
    torch.compiler.reset()
    subject = objective_of(method)
    traced = torch.compile(subject, backend="eager", fullgraph=True)
    names = set()
    for step in range(4):
        batch = Pictures().batch(step, 0, world)
        share = batch.share
        with drawing_for(share), torch.compiler.set_stance("fail_on_recompile" if step > 1 else "default"):
            batch = subject.views()(batch)
            traced(batch)["loss"].backward()
        names |= {tuple(batch.names)}
        subject.after_step(0.1)
    assert len(names) > 1
