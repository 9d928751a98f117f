"""What every distillation loss promises; a new line in the table is tested for free."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewmask.distill import DISTILLERS
from fewmask.distill.distill import Distill
from fewmask.distill.widths import widths_of
from fewmask.registry import build
from fewmask.types import SegOutput, UserError
from tests.distill.networks import (
    SIZE,
    STUDENT,
    TEACHER,
    batch_of,
    blobs,
    identity_align,
    random_output,
    raw_batch,
    segmenter,
)

CASES = [(name, {}) for name in DISTILLERS] + [
    ("cwd", {"on": "features"}),
    ("kd", {"boundary_weight": 1.0}),
    ("m2bf", {"form": "parallel"}),
    *[("mbf", {"region": region}) for region in ("whole", "inside", "outside", "none")],
]
ON_FEATURES = [case for case in CASES if case[0] != "kd" and case != ("cwd", {})]
GUESSING = ("mgd", "mbf", "m2bf")  # identical features do not make these zero: what is dropped has to be guessed


def make(name: str, options: dict | None = None, student=STUDENT, teacher=TEACHER):
    torch.manual_seed(0)
    return build(DISTILLERS[name], options or {}, "distill.method.losses", student=student, teacher=teacher)


def value(distiller, *arguments) -> torch.Tensor:
    torch.manual_seed(7)
    return distiller(*arguments)


def with_gradient(output: SegOutput) -> SegOutput:
    return SegOutput(output.logits.requires_grad_(), [f.requires_grad_() for f in output.features])


def gradients(output: SegOutput) -> list[float]:
    leaves = [output.logits, *output.features]
    return [0.0 if leaf.grad is None else leaf.grad.abs().sum().item() for leaf in leaves]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_the_loss_is_a_finite_float32_scalar_above_zero(name, options):
    loss = make(name, options)(random_output(STUDENT, 1), random_output(TEACHER, 2), batch_of(blobs()))
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert 0 < loss.item() < float("inf")


@pytest.mark.parametrize(("name", "options"), CASES)
def test_the_gradient_reaches_student_and_adapters_and_never_the_teacher(name, options):
    distiller = make(name, options)
    student, teacher = with_gradient(random_output(STUDENT, 1)), with_gradient(random_output(TEACHER, 2))
    distiller(student, teacher, batch_of(blobs())).backward()
    assert sum(gradients(student)) > 0
    assert all(torch.isfinite(leaf.grad).all() for leaf in [student.logits, *student.features] if leaf.grad is not None)
    assert sum(gradients(teacher)) == 0
    assert [n for n, p in distiller.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize(("name", "options"), CASES)
def test_what_a_loss_says_it_reads_is_what_moves_it(name, options):
    distiller = make(name, options)
    student = with_gradient(random_output(STUDENT, 1))
    distiller(student, random_output(TEACHER, 2), batch_of(blobs())).backward()
    assert bool(distiller.pairs) == any(gradients(student)[1:])


@pytest.mark.parametrize(("name", "options"), [case for case in CASES if case[0] not in GUESSING])
def test_identical_outputs_cost_nothing(name, options):
    distiller = make(name, options, TEACHER, TEACHER)
    if hasattr(distiller, "align") and distiller.align is not None:
        identity_align(distiller)
    output = random_output(TEACHER, 2)
    assert distiller(output, output, batch_of(blobs())).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_confidence_weighs_each_image(name, options):
    distiller = make(name, options)
    student, teacher = random_output(STUDENT, 1), random_output(TEACHER, 2)
    each = [value(distiller, student, teacher, batch_of(blobs(), confidence=torch.eye(3)[i])).item() for i in range(3)]
    confidence = torch.tensor([0.2, 1.0, 0.6])
    weighed = value(distiller, student, teacher, batch_of(blobs(), confidence=confidence)).item()
    assert weighed == pytest.approx(0.2 * each[0] + each[1] + 0.6 * each[2], rel=1e-5)
    assert value(distiller, student, teacher, batch_of(blobs())).item() == pytest.approx(sum(each), rel=1e-5)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_mixed_precision_changes_nothing_but_the_inputs(name, options):
    distiller = make(name, options)
    student, teacher = random_output(STUDENT, 1), random_output(TEACHER, 2)
    rounded = [SegOutput(o.logits.bfloat16(), [f.bfloat16() for f in o.features]) for o in (student, teacher)]
    full = [SegOutput(o.logits.float(), [f.float() for f in o.features]) for o in rounded]
    expected = value(distiller, *full, batch_of(blobs()))
    with torch.autocast("cpu", torch.bfloat16):
        got = value(distiller, *rounded, batch_of(blobs()))
    assert torch.equal(got, expected)


@pytest.mark.parametrize("mask", [torch.zeros, torch.ones], ids=["empty", "full"])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_masks_without_a_boundary_are_no_trouble(name, options, mask):
    student = with_gradient(random_output(STUDENT, 1))
    loss = make(name, options)(student, random_output(TEACHER, 2), batch_of(mask(3, 1, SIZE, SIZE)))
    loss.backward()
    assert loss.isfinite()
    assert all(leaf.grad.isfinite().all() for leaf in [student.logits, *student.features] if leaf.grad is not None)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_dead_features_are_no_trouble(name, options):
    student = with_gradient(
        SegOutput(torch.zeros(3, 1, SIZE, SIZE), [torch.zeros_like(f) for f in random_output(STUDENT, 1).features])
    )
    loss = make(name, options)(student, random_output(TEACHER, 2), batch_of(blobs()))
    loss.backward()
    assert loss.isfinite()
    assert all(leaf.grad.isfinite().all() for leaf in [student.logits, *student.features] if leaf.grad is not None)


@pytest.mark.parametrize(("name", "options"), ON_FEATURES)
def test_a_network_without_features_is_told_of(name, options):
    for pair in (
        (STUDENT._replace(channels=(), strides=()), TEACHER),
        (STUDENT, TEACHER._replace(channels=(), strides=())),
    ):
        with pytest.raises(UserError, match="no usable layer"):
            make(name, options, *pair)


@pytest.mark.parametrize(("name", "options"), ON_FEATURES)
def test_levels_may_be_chosen(name, options):
    student, teacher = with_gradient(random_output(STUDENT, 1)), random_output(TEACHER, 2)
    make(name, {**options, "levels": [3]})(student, teacher, batch_of(blobs())).backward()
    assert [g > 0 for g in gradients(student)[1:]] == [False, False, True]  # stride 8 is the student's coarsest
    with pytest.raises(UserError, match="usable layers are 0 to 3"):
        make(name, {**options, "levels": [4]})


@pytest.mark.parametrize(("name", "options"), CASES)
@settings(max_examples=5, deadline=None)
@given(scale=st.floats(1e-3, 1e3), seed=st.integers(0, 1000))
def test_no_scale_of_the_features_breaks_a_loss(name, options, scale, seed):
    outputs = [
        SegOutput(o.logits * scale, [f * scale for f in o.features])
        for o in (random_output(STUDENT, seed), random_output(TEACHER, seed + 1))
    ]
    loss = make(name, options)(*outputs, batch_of(blobs()))
    assert loss.isfinite()
    assert loss >= -1e-4


@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_student_comes_nearer_to_its_teacher(name, options):
    """One tiny batch, no labels at all: the loss alone must pull the student, adapters included."""
    teacher = segmenter(6, seed=1)
    objective = Distill(
        segmenter(4), [teacher], size=SIZE, losses={name: options}, supervised_weight=0.0, augment="none"
    )
    batch = objective.views()(raw_batch())
    optimiser = torch.optim.Adam(objective.parameters(), 0.03)
    losses = []
    for _ in range(25):
        torch.manual_seed(3)  # the same masks in every step
        loss = objective(batch)["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_widths_are_those_of_the_outputs():
    network = segmenter(4).train()
    widths = widths_of(network, 32)
    assert widths == ((4, 5, 6), (1, 2, 4))
    assert all(module.training for module in network.modules())
    assert network.levels[0][1].num_batches_tracked == 0
