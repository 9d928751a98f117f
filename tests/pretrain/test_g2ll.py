"""G2LL's loss is the equations, image by image; its teacher follows, and each view is paired with itself."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from fewmask.models import build_encoder
from fewmask.pretrain.g2ll import G2LL
from fewmask.pretrain.self_distillation import ema_momentum
from fewmask.pretrain.student import Hidden
from fewmask.types import Batch, UserError
from tests.pretrain.pictures import SIZE, SMALL, set_apart, views_of

ENCODERS = ["vit_tiny_patch16", "resnet18"]


def g2ll(encoder: str = "vit_tiny_patch16", **settings) -> G2LL:
    """A student and a teacher that differ, and a centre that is not zero."""
    torch.manual_seed(0)
    subject = G2LL(
        build_encoder(encoder, size=SIZE), decoder_dim=48, decoder_depth=1, decoder_heads=2, **SMALL | settings
    )
    set_apart(subject)
    return subject


@torch.no_grad()
def literal_terms(subject: G2LL, batch: Batch, cross: bool = False) -> tuple[float, float]:
    """Equations 3, 5 and 6 one view of one image at a time; `cross` pairs u with v, as the paper does not."""
    torch.manual_seed(2)
    num = len(batch.image)
    both = torch.cat([batch.image, batch.extra["second"]])
    pair = Batch(both, [""] * 2 * num, extra={"superpixels": torch.cat([batch.extra["superpixels"]] * 2)})
    mask = subject.masking(pair)
    squared, distilled = [], 0.0
    for i in range(num):
        answers, targets = [], []
        for row in (i, num + i):  # u, then v
            view, hidden = both[row][None], Hidden.of(mask[row][None], subject.masking.num_masked)
            tokens = subject.student.tokens(view, hidden)
            squared.append(subject.student.error(view, tokens, hidden).item())
            answers.append((subject.projector(tokens[:, 0])[0] / subject.tau_s).log_softmax(0))
            taught = subject.teacher.encoder
            feature = taught.tokens(view)[:, 0] if taught.kind == "vit" else taught(view)[-1].mean((2, 3))
            scores = subject.teacher.projector(feature)[0]
            targets.append(((scores - subject.centre.value[0]) / subject.tau_t).softmax(0))
        if cross:
            answers.reverse()
        distilled -= sum((p * log_q).sum().item() for p, log_q in zip(targets, answers, strict=True))
    return sum(squared) / len(squared), distilled / num


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("mask", ["random", "semantic", "semantic_focal"])
def test_the_loss_equals_the_equations_with_each_view_paired_with_itself(encoder, mask):
    subject = g2ll(encoder, mask=mask, reconstruction_weight=0.5, distillation_weight=2.0).eval()
    batch = views_of(subject)
    batch.extra["second"] = -batch.image  # so far from u that a pairing of u with v could not go unseen
    reconstruction, distillation = literal_terms(subject, batch)
    torch.manual_seed(2)
    terms = subject(batch)
    assert terms["reconstruction"].item() == pytest.approx(reconstruction, rel=1e-4)
    assert terms["distillation"].item() == pytest.approx(distillation, rel=1e-4)
    assert terms["loss"].item() == pytest.approx(0.5 * reconstruction + 2 * distillation, rel=1e-4)
    crossed = literal_terms(subject, batch, cross=True)[1]
    assert terms["distillation"].item() != pytest.approx(crossed, rel=5e-4)


def test_the_teacher_sees_whole_views_and_takes_no_gradient():
    subject, lengths = g2ll(), []
    subject.teacher.encoder.body.blocks[0].register_forward_hook(lambda m, i, output: lengths.append(output.shape[:2]))
    subject(views_of(subject))["loss"].backward()
    assert lengths == [(6, 17)]
    assert all(p.grad is None for p in subject.teacher.parameters())
    unreached = [
        name for name, p in subject.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.abs().sum() > 0)
    ]  # fmt: skip
    assert unreached == []


def test_a_step_moves_the_centre_and_after_it_the_teacher():
    subject = g2ll(momentum=0.9)
    batch, centre = views_of(subject), subject.centre.value.clone()
    before = copy.deepcopy(subject.teacher)
    subject(batch)
    scores = before.scores(torch.cat([batch.image, batch.extra["second"]]))
    torch.testing.assert_close(subject.centre.value, 0.9 * centre + 0.1 * scores.mean(0, keepdim=True))
    subject.after_step(0.3)
    m = ema_momentum(0.3, 0.9)
    students = dict(subject.student.encoder.named_parameters())
    for name, parameter in subject.teacher.encoder.named_parameters():
        expected = m * before.encoder.get_parameter(name) + (1 - m) * students[name]
        torch.testing.assert_close(parameter, expected)


def test_evaluation_moves_nothing():
    subject = g2ll("resnet18").eval()
    before = {name: value.clone() for name, value in subject.state_dict().items()}
    subject(views_of(subject))
    assert all(torch.equal(before[name], value) for name, value in subject.state_dict().items())


def test_u_and_v_have_masks_of_their_own():
    subject = g2ll()
    batch = views_of(subject)
    masks = []
    original = subject.masking
    subject.masking = lambda b, g=None: masks.append(original(b, g)) or masks[-1]  # type: ignore[assignment]
    subject.masking.num_masked = original.num_masked
    subject(batch)
    u, v = masks[0].chunk(2)
    assert u.sum(1).tolist() == v.sum(1).tolist() == [4, 4, 4]
    assert not torch.equal(u, v)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_training_lowers_the_reconstruction(encoder):
    subject = g2ll(encoder)
    batch, errors = views_of(subject, 2), []
    optimiser = torch.optim.AdamW([p for p in subject.parameters() if p.requires_grad], lr=1e-3)
    for step in range(20):
        torch.manual_seed(5)
        terms = subject(batch)
        optimiser.zero_grad()
        terms["loss"].backward()
        optimiser.step()
        subject.after_step(step / 20)
        errors.append(terms["reconstruction"].item())
    assert errors[-1] < 0.8 * errors[0]


def test_preview_shows_view_superpixels_masked_and_reconstruction():
    subject = g2ll().eval()
    batch = views_of(subject)
    state = torch.get_rng_state()
    strip = subject.preview(batch)["reconstruction"]
    assert torch.equal(state, torch.get_rng_state())
    assert strip.shape == (3, 3, SIZE, 4 * SIZE)
    assert 0 <= strip.min() <= strip.max() <= 1
    view, regions, masked, painted = strip.split(SIZE, dim=3)
    assert (regions == 1).all(1).any()
    hidden = (masked != view).any(1)
    assert torch.equal(view[~hidden[:, None].expand_as(view)], painted[~hidden[:, None].expand_as(view)])


def test_superpixels_are_asked_for_when_the_mask_needs_them():
    assert g2ll().maps()["superpixels"].num_segments == 8
    assert g2ll(mask="random").maps() == {}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"mask_ratio": 1.0}, "leaves nothing visible of the 16 patches"),
        ({"tau_t": 0.0}, r"Temperatures cannot be tau_s = 0\.1 and tau_t = 0\.0"),
        ({"distillation_weight": -1.0}, "weights of the loss cannot be"),
        ({"reconstruction_weight": 0.0, "distillation_weight": 0.0}, "one of them above it"),
        ({"focal_share": 2.0}, "'focal_share' cannot be 2"),
        ({"num_segments": 0}, "'num_segments' cannot be 0"),
    ],
)
def test_bad_settings_are_told(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        g2ll(**settings)


def test_bad_batches_are_told():
    subject = g2ll()
    batch = views_of(subject)
    with pytest.raises(UserError, match=r"this batch holds one image: set pretrain\.batch_size to 2 or more"):
        subject(views_of(subject, 1))
    with pytest.raises(UserError, match="needs the superpixels"):
        subject(replace(batch, extra={"second": batch.extra["second"]}))
    with pytest.raises(UserError, match="pass it through its views"):
        subject(replace(batch, extra={}))
