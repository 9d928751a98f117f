"""TEDMAE part by part: what each switch adds, and the loss written out image by image."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch.nn import functional as F

from fewmask.data.preprocess import denormalise
from fewmask.models import build_encoder
from fewmask.pretrain.dynamic_features import DynamicFeatures
from fewmask.pretrain.mae import MAE
from fewmask.pretrain.student import Hidden
from fewmask.pretrain.tedmae import TEDMAE
from fewmask.types import Batch, UserError
from tests.pretrain.pictures import SIZE, SMALL, raw_batch, set_apart, views_of

DECODER = {"decoder_dim": 48, "decoder_depth": 1, "decoder_heads": 2}
ROWS = [
    {"teacher": True, "ec": False, "df": False},
    {"teacher": True, "ec": True, "df": False},
    {"teacher": True, "ec": True, "df": True},
]


def tedmae(encoder: str = "vit_tiny_patch16", **settings) -> TEDMAE:
    torch.manual_seed(0)
    subject = TEDMAE(build_encoder(encoder, size=SIZE), **DECODER, **SMALL | settings)
    if subject.teacher is not None:
        set_apart(subject)
    return subject


def tokens_of(encoder, image: torch.Tensor) -> torch.Tensor:
    if encoder.kind == "vit":
        return encoder.tokens(image)
    cells = encoder(image)[-1].flatten(2).transpose(1, 2)
    return torch.cat([cells.mean(1, keepdim=True), cells], 1)


@torch.no_grad()
def literal_terms(subject: TEDMAE, batch: Batch) -> tuple[float, float]:
    torch.manual_seed(2)
    mask = subject.masking(batch)
    squared = distilled = 0.0
    for i in range(len(mask)):
        clean, hidden = batch.image[i][None], Hidden.of(mask[i][None], subject.masking.num_masked)
        student = subject.student.tokens(clean, hidden)
        squared += subject.student.error(clean, student, hidden).item()
        taught = tokens_of(subject.teacher.encoder, clean)
        if subject.ec:
            other = batch.extra["converted"][i][None]
            converted = tokens_of(subject.teacher.encoder, other)
            if subject.merge is None:
                taught = (taught + converted) / 2
            else:
                taught = subject.teacher.copies["merge"](taught, converted)
                student = subject.merge(student, subject.student.tokens(other, hidden))
        if subject.kind == "cosine":
            answer, goal = subject.projector.mlp(student[:, 0]), subject.teacher.projector.mlp(taught[:, 0])
            distilled += 1 - F.cosine_similarity(answer, goal).item()
        else:
            p = ((subject.teacher.projector(taught[:, 0]) - subject.centre.value) / subject.tau_t).softmax(1)
            distilled -= (p * (subject.projector(student[:, 0]) / subject.tau_s).log_softmax(1)).sum().item()
    return squared / len(mask), distilled / len(mask)


@pytest.mark.parametrize("encoder", ["vit_tiny_patch16", "resnet18"])
@pytest.mark.parametrize("distillation", ["cls", "cosine"])
@pytest.mark.parametrize("row", ROWS)
def test_the_loss_equals_its_equations(encoder, distillation, row):
    subject = tedmae(encoder, distillation=distillation, distillation_weight=2.0, **row).eval()
    batch = views_of(subject)
    reconstruction, distilled = literal_terms(subject, batch)
    torch.manual_seed(2)
    terms = subject(batch)
    assert terms["reconstruction"].item() == pytest.approx(reconstruction, rel=1e-4)
    assert terms["distillation"].item() == pytest.approx(distilled, rel=1e-3, abs=1e-5)
    assert terms["loss"].item() == pytest.approx(reconstruction + 2 * distilled, rel=1e-3)


def test_without_its_teacher_it_is_mae():
    subject = tedmae(teacher=False, crop_scale=(0.5, 1.0)).eval()
    mae = MAE(subject.student.encoder, crop_scale=(0.5, 1.0), **DECODER).eval()
    mae.decoder.load_state_dict(subject.student.decoder.state_dict())
    losses = []
    for method in (subject, mae):
        torch.manual_seed(1)
        batch = method.views()(raw_batch())
        losses.append(method(batch)["loss"].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    subject.after_step(0.5)
    assert {name.split(".")[0] for name, _ in subject.named_parameters()} == {"student"}


@pytest.mark.parametrize("distillation", ["cls", "cosine"])
@pytest.mark.parametrize("row", ROWS)
def test_gradient_reaches_all_that_learns_and_nothing_of_the_teacher(distillation, row):
    subject = tedmae(distillation=distillation, **row)
    subject(views_of(subject))["loss"].backward()
    assert all(p.grad is None for p in subject.teacher.parameters())
    unreached = [
        name for name, p in subject.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.abs().sum() > 0)
    ]  # fmt: skip
    assert unreached == []


def test_the_teachers_merge_follows_the_students():
    subject = tedmae(momentum=0.5)
    name = "local_branch.0.weight"
    old = subject.teacher.copies["merge"].get_parameter(name).clone()
    subject.after_step(0.0)
    expected = (old + subject.merge.get_parameter(name)) / 2
    torch.testing.assert_close(subject.teacher.copies["merge"].get_parameter(name), expected)


def test_the_merge_is_the_gate_written_out():
    torch.manual_seed(0)
    merge, x, y = DynamicFeatures(8), torch.randn(2, 5, 8), torch.randn(2, 5, 8)

    def branch(layers, z):
        hidden = F.layer_norm(layers[0].weight @ z + layers[0].bias, (2,))
        return F.layer_norm(layers[3].weight @ hidden.clamp(min=0) + layers[3].bias, (8,))

    merged = merge(x, y)
    for i in range(2):
        for j in range(5):
            both = x[i] + y[i]
            gate = (branch(merge.local_branch, both[j]) + branch(merge.global_branch, both.mean(0))).sigmoid()
            torch.testing.assert_close(merged[i, j], gate * x[i, j] + (1 - gate) * y[i, j])


def test_equal_views_merge_into_themselves():
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(DynamicFeatures(8)(x, x), x)


def test_preview_shows_reconstruction_and_conversion():
    subject = tedmae().eval()
    batch = views_of(subject)
    del batch.extra["superpixels"]  # as the loop has it: random masks ask for none
    state = torch.get_rng_state()
    shown = subject.preview(batch)
    assert torch.equal(state, torch.get_rng_state())
    assert {name: picture.shape[3] // SIZE for name, picture in shown.items()} == {"reconstruction": 3, "conversion": 5}
    assert all(0 <= p.min() <= p.max() <= 1 for p in shown.values())
    image, taught, *more = shown["conversion"].split(SIZE, dim=3)
    assert torch.equal(image, denormalise(batch.image))
    assert torch.equal(taught, denormalise(batch.extra["converted"]))
    kinds = [image, taught, *more]
    assert all(not torch.equal(a, b) for a, b in combinations(kinds, 2))
    assert set(tedmae(ec=False, df=False).eval().preview(batch)) == {"reconstruction"}


def test_preview_shows_the_superpixels_its_masks_follow():
    subject = tedmae(mask="semantic").eval()
    assert subject.preview(views_of(subject))["reconstruction"].shape[3] == 4 * SIZE


def test_bad_settings_and_batches_are_told():
    with pytest.raises(UserError, match="ec=false leaves one: set df=false too"):
        tedmae(ec=False)
    with pytest.raises(UserError, match="'reduction' cannot be 0"):
        tedmae(reduction=0)
    subject = tedmae()
    with pytest.raises(UserError, match="this batch holds one image"):
        subject(views_of(subject, 1))
    with pytest.raises(UserError, match="pass it through its views"):
        subject(Batch(torch.zeros(2, 3, SIZE, SIZE), ["a", "b"]))
