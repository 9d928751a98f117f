"""The losses that mask nothing, each against its equation written with loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewmask.distill.at import AT
from fewmask.distill.cwd import CWD, channel_divergence
from fewmask.distill.emkd import EMKD, region_contrast
from fewmask.distill.fitnet import FitNet
from fewmask.distill.kd import KD, bernoulli_divergence
from fewmask.types import SegOutput, UserError
from tests.distill.networks import SIZE, STUDENT, TEACHER, batch_of, blobs, random_output

NUM = 3


@pytest.fixture
def pair() -> tuple[SegOutput, SegOutput]:
    return random_output(STUDENT, 1), random_output(TEACHER, 2)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def kd_of(s: np.ndarray, t: np.ndarray, temperature: float) -> float:
    """T^2 KL of two Bernoulli variables, mean over pixels."""
    total = 0.0
    for z_s, z_t in zip(s.ravel(), t.ravel(), strict=True):
        p, q = sigmoid(z_t / temperature), sigmoid(z_s / temperature)
        total += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    return temperature**2 * total / s.size


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kd_is_the_divergence_of_two_bernoulli_variables(pair, temperature):
    student, teacher = pair
    loss = KD(STUDENT, TEACHER, temperature)(student, teacher, batch_of(None))
    each = [kd_of(student.logits[i].numpy(), teacher.logits[i].numpy(), temperature) for i in range(NUM)]
    assert loss.item() == pytest.approx(np.mean(each), rel=1e-5)


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_kd_at_the_boundary_adds_the_mean_over_the_band(pair, weight):
    student, teacher = pair
    mask = blobs()
    mask[-1] = 0  # without a boundary: the mean over the picture stands in
    loss = KD(STUDENT, TEACHER, 2.0, boundary_weight=weight, width=0.1)(student, teacher, batch_of(mask))
    side, expected = mask.shape[2], []
    for i in range(NUM):
        s, t, y = (x[i, 0].numpy() for x in (student.logits, teacher.logits, mask))
        near = []
        for row, column in np.ndindex(side, side):
            reach = round(0.1 * side)
            rows, columns = (slice(max(place - reach, 0), place + reach + 1) for place in (row, column))
            near.append(0 < y[rows, columns].mean() < 1)
        band = np.array(near).reshape(side, side) if any(near) else np.ones((side, side), bool)
        expected.append(kd_of(s, t, 2) + weight * kd_of(s[band], t[band], 2))
    assert loss.item() == pytest.approx(np.mean(expected), rel=1e-5)


def test_kd_is_the_softmax_loss_of_two_classes():
    s, t = torch.tensor([[1.3, 0.0]]), torch.tensor([[-0.4, 0.0]])
    expected = 16 * torch.nn.functional.kl_div((s / 4).log_softmax(1), (t / 4).softmax(1), reduction="sum")
    torch.testing.assert_close(bernoulli_divergence(s[0, 0], t[0, 0], 4.0), expected)


@settings(max_examples=25, deadline=None)
@given(s=st.floats(-200, 200), t=st.floats(-200, 200), temperature=st.floats(0.5, 20))
def test_kd_is_never_negative_nor_infinite(s, t, temperature):
    value = bernoulli_divergence(torch.tensor(s), torch.tensor(t), temperature).item()
    assert -1e-3 <= value < math.inf
    assert bernoulli_divergence(torch.tensor(t), torch.tensor(t), temperature).item() == 0


def shrink(x: np.ndarray, factor: int) -> torch.Tensor:
    """Resizing as the library does it: the loops below are about what follows."""
    size = (x.shape[-1] // factor,) * 2
    return torch.nn.functional.interpolate(torch.tensor(x), size, mode="bilinear", antialias=True)


def gap_of(own: np.ndarray, wanted: np.ndarray) -> float:
    own, wanted = own.ravel() / np.linalg.norm(own), wanted.ravel() / np.linalg.norm(wanted)
    return sum((a - b) ** 2 for a, b in zip(own, wanted, strict=True))


def test_at_compares_normalised_maps_of_squares(pair):
    student, teacher = pair
    # The teacher's levels nearest to strides 4, 8 and 16 are 2 and 3; the student has strides 2 and 8 for them.
    own = [sum(f[:, c].numpy() ** 2 for c in range(f.shape[1])) for f in (student.features[1], student.features[2])]
    wanted = [sum(teacher.features[i][:, c].numpy() ** 2 for c in range(TEACHER.channels[i])) for i in (2, 3)]
    own[0] = shrink(own[0][:, None], 2)[:, 0].numpy()
    each = [np.mean([gap_of(o[i], w[i]) for o, w in zip(own, wanted, strict=True)]) for i in range(NUM)]
    loss = AT(STUDENT, TEACHER)(student, teacher, batch_of(None))
    assert loss.item() == pytest.approx(np.mean(each), rel=1e-4)


def test_at_is_blind_to_sign_and_scale():
    output = random_output(TEACHER, 1)
    other = SegOutput(output.logits, [-3 * f for f in output.features])
    assert AT(TEACHER, TEACHER)(other, output, batch_of(None)).item() == pytest.approx(0, abs=1e-6)


def test_fitnet_is_a_mean_squared_difference(pair):
    student, teacher = pair
    distiller = FitNet(STUDENT, TEACHER, (1, 3))
    each = []
    for i in range(NUM):
        for align, (s, t) in zip(distiller.align.aligns, ((1, 1), (2, 3)), strict=True):
            weight, bias = align.project.weight.detach().numpy()[:, :, 0, 0], align.project.bias.detach().numpy()
            source, target = student.features[s][i].numpy(), teacher.features[t][i].numpy()
            total = 0.0
            for c, y, x in np.ndindex(*target.shape):
                total += (target[c, y, x] - weight[c] @ source[:, y, x] - bias[c]) ** 2
            each.append(total / target.size)
    loss = distiller(student, teacher, batch_of(None))
    assert loss.item() == pytest.approx(np.mean(each), rel=1e-4)


def cwd_of(s: np.ndarray, t: np.ndarray, temperature: float) -> float:
    """T^2 / C sum over channels of the divergence of two distributions over positions; s and t are (c, h, w)."""
    total = 0.0
    for own, wanted in zip(s, t, strict=True):
        q, p = np.exp(own.ravel() / temperature), np.exp(wanted.ravel() / temperature)
        q, p = q / q.sum(), p / p.sum()
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return temperature**2 * total / len(s)


def test_cwd_on_logits_compares_distributions_over_positions(pair):
    student, teacher = pair
    each = [
        cwd_of(student.logits[i].numpy().astype(float), teacher.logits[i].numpy().astype(float), 4) for i in range(NUM)
    ]
    assert CWD(STUDENT, TEACHER)(student, teacher, batch_of(None)).item() == pytest.approx(np.mean(each), rel=1e-4)


def test_cwd_on_features_aligns_them_first(pair):
    student, teacher = pair
    distiller = CWD(STUDENT, TEACHER, "features", temperature=2.0, levels=(1,))
    project = distiller.align.aligns[0].project
    aligned = torch.einsum("oc,bchw->bohw", project.weight[:, :, 0, 0], student.features[1]) + project.bias.view(
        -1, 1, 1
    )
    each = [cwd_of(aligned[i].detach().numpy(), teacher.features[1][i].numpy(), 2) for i in range(NUM)]
    assert distiller(student, teacher, batch_of(None)).item() == pytest.approx(np.mean(each), rel=1e-4)


def test_cwd_is_blind_to_a_constant_in_a_channel():
    x = random_output(TEACHER, 1).features[0]
    moved = x + torch.arange(5.0).view(1, 5, 1, 1)
    torch.testing.assert_close(channel_divergence(moved, x, 4.0), torch.zeros(NUM), atol=1e-5, rtol=0)


def contrast_of(features: np.ndarray, mask: np.ndarray) -> float:
    """Cosine between the mean features (c,) of lesion and background; features (c, h, w), mask (s, s) of 0 and 1."""
    step = len(mask) // features.shape[1]
    sums, areas = np.zeros((2, len(features))), np.zeros(2)
    for y, x in np.ndindex(*mask.shape):
        region = int(mask[y, x])
        sums[region] += features[:, y // step, x // step]
        areas[region] += 1
    a, b = sums / areas[:, None]
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def test_emkd_is_three_terms(pair):
    student, teacher = pair
    mask = blobs()
    # Strides 4 and 16: the teacher's levels 2 and 3, for which the student has its strides 2 and 8.
    levels = (
        (student.features[1].numpy(), teacher.features[2].numpy()),
        (student.features[2].numpy(), teacher.features[3].numpy()),
    )
    each = []
    for i in range(NUM):
        pmd = kd_of(student.logits[i].numpy(), teacher.logits[i].numpy(), 4)
        imd = rad = 0.0
        for own, wanted in levels:
            importance = (own[i] ** 4).mean(0)
            if own.shape[-1] != wanted.shape[-1]:
                importance = shrink(importance[None, None], 2)[0, 0].numpy()
            imd += gap_of(importance, (wanted[i] ** 4).sum(0)) / 2
            rad += (contrast_of(own[i], mask[i, 0].numpy()) - contrast_of(wanted[i], mask[i, 0].numpy())) ** 2 / 2
        each.append(0.1 * pmd + 0.9 * imd + 0.5 * rad)
    loss = EMKD(STUDENT, TEACHER, region=0.5)(student, teacher, batch_of(mask))
    assert loss.item() == pytest.approx(np.mean(each), rel=1e-4)


def test_the_region_term_is_left_out_where_a_region_is_missing():
    features = random_output(TEACHER, 1).features[2]
    mask = blobs()
    mask[0], mask[1] = 0, 1
    _, has_both = region_contrast(features, mask)
    assert has_both.tolist() == [False, False, True]
    distiller = EMKD(STUDENT, TEACHER, prediction=0, importance=0)
    loss = distiller(random_output(STUDENT, 1), random_output(TEACHER, 2), batch_of(mask[:2].repeat(2, 1, 1, 1)[:3]))
    assert loss.item() == 0


def test_regions_are_those_of_the_mask_at_one_half():
    features, mask = random_output(TEACHER, 1).features[2], blobs()
    assert torch.equal(region_contrast(features, 0.49 * mask + 0.25)[0], region_contrast(features, mask)[0])


def test_the_region_term_needs_a_mask():
    with pytest.raises(UserError, match="give every image a mask"):
        EMKD(STUDENT, TEACHER)(random_output(STUDENT, 1), random_output(TEACHER, 2), batch_of(None))


@pytest.mark.parametrize(
    ("factory", "options", "message"),
    [(KD, {"temperature": 0.0}, "temperature"), (KD, {"boundary_weight": -1.0}, "boundary_weight"),
     (KD, {"width": 0.0}, "width"), (CWD, {"temperature": -1.0}, "temperature"),
     (EMKD, {"temperature": 0.0}, "temperature"), (EMKD, {"region": -0.1}, "weights cannot be 0.1, 0.9, -0.1")],
)  # fmt: skip
def test_impossible_settings_are_the_users_mistake(factory, options, message):
    with pytest.raises(UserError, match=message):
        factory(STUDENT, TEACHER, **options)


def test_kd_reads_the_whole_picture():
    student, teacher = random_output(STUDENT, 1), random_output(TEACHER, 2)
    student.logits.requires_grad_()
    KD(STUDENT, TEACHER)(student, teacher, batch_of(None)).backward()
    assert (student.logits.grad != 0).float().mean() > 0.99
    expected = 4 * ((student.logits / 4).sigmoid() - (teacher.logits / 4).sigmoid()) / (NUM * SIZE * SIZE)
    torch.testing.assert_close(student.logits.grad, expected.detach(), atol=1e-7, rtol=1e-4)
