"""The objective: its sum, who learns, what is kept, and images without a mask."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from fewmask.data.augment import PlainViews
from fewmask.distill import DISTILLERS
from fewmask.distill.distill import Distill, overlay_heat
from fewmask.distill.distiller import Distiller
from fewmask.distill.kd import KD
from fewmask.distill.supervision import agreement
from fewmask.losses import cross_entropy_dice
from fewmask.registry import build
from fewmask.types import Batch, SegOutput, UserError
from tests.distill.networks import SIZE, STUDENT, raw_batch, segmenter

ALL = {name: {"weight": 0.5} for name in DISTILLERS}


def make(num_teachers: int = 1, **settings) -> Distill:
    teachers = [segmenter(6, seed) for seed in range(1, num_teachers + 1)]
    student = segmenter(4)
    torch.manual_seed(0)
    return Distill(student, teachers, size=SIZE, **settings)


def viewed(has_mask: list[bool] | None = None) -> Batch:
    batch = PlainViews(SIZE)(raw_batch())
    if has_mask is None:
        return batch
    known = torch.tensor(has_mask)
    return replace(batch, mask=batch.mask * known.view(-1, 1, 1, 1), extra={"has_mask": known})


def run(objective: Distill, batch: Batch) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return objective(batch)


def teacher_of(objective: Distill) -> nn.Module:
    return objective.teacher.members[0].segmenter


def test_the_loss_is_the_weighted_sum_of_its_terms():
    weights = {name: 0.1 * (i + 1) for i, name in enumerate(DISTILLERS)}
    objective = make(
        losses={name: {"weight": w} for name, w in weights.items()}, supervised_weight=0.7, pseudo_weight=0.3
    )
    terms = run(objective, viewed([True, False, True, False]))
    assert list(terms) == ["loss", "supervised", "pseudo", *DISTILLERS, "confidence"]
    assert [name for name, value in terms.items() if value.requires_grad] == ["loss"]
    weights |= {"supervised": 0.7, "pseudo": 0.3}
    assert terms["loss"].item() == pytest.approx(sum(w * terms[name].item() for name, w in weights.items()), rel=1e-5)
    assert all(value > 0 for value in terms.values())


def test_with_labels_everywhere_it_is_the_shared_loss_and_kd():
    objective = make(dice_weight=0.3).eval()
    batch = viewed()
    terms = run(objective, batch)
    student, teacher = objective.segmenter(batch.image), teacher_of(objective)(batch.image)
    expected = cross_entropy_dice(student.logits, batch.mask, 0.3)["loss"]
    torch.testing.assert_close(terms["supervised"], expected.detach())
    torch.testing.assert_close(terms["kd"], KD(STUDENT, STUDENT)(student, teacher, batch).detach())
    assert terms["pseudo"] == 0
    assert terms["confidence"] == 1


@pytest.mark.parametrize("target", ["hard", "soft"])
def test_images_without_a_mask_learn_from_the_teachers_prediction_by_confidence(target):
    objective = make(pseudo_weight=1.0, pseudo_target=target).eval()
    batch = viewed([True, False, True, False])
    terms = run(objective, batch)
    logits = objective.segmenter(batch.image).logits
    p = teacher_of(objective)(batch.image).logits.sigmoid()
    trust = agreement(p)
    wanted = (p >= 0.5).float() if target == "hard" else p
    each = [trust[i] * cross_entropy_dice(logits[i : i + 1], wanted[i : i + 1])["loss"] for i in (1, 3)]
    torch.testing.assert_close(terms["pseudo"], torch.stack(each).mean().detach())
    torch.testing.assert_close(terms["confidence"], trust[[1, 3]].mean())
    expected = cross_entropy_dice(logits[[0, 2]], batch.mask[[0, 2]])["loss"]
    torch.testing.assert_close(terms["supervised"], expected.detach())
    divergence = KD(STUDENT, STUDENT).per_image(SegOutput(logits, []), SegOutput(p.logit(), []), batch)
    trust[[0, 2]] = 1
    torch.testing.assert_close(terms["kd"], (trust * divergence).mean().detach(), rtol=1e-4, atol=1e-5)


def test_what_stands_in_place_of_a_missing_mask_is_never_read():
    objective = make(losses=ALL, pseudo_weight=1.0).eval()
    batch = viewed([True, False, True, False])
    poisoned = replace(batch, mask=batch.mask.clone())
    poisoned.mask[[1, 3]] = torch.nan
    gradients = []
    for one in (batch, poisoned):
        objective.zero_grad()
        run(objective, one)["loss"].backward()
        gradients.append([p.grad.clone() for p in objective.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


class Witness(Distiller):
    """A loss that keeps the batch it was given."""

    def per_image(self, student: SegOutput, teacher: SegOutput, batch: Batch) -> torch.Tensor:
        self.seen = batch
        return student.logits.flatten(1).mean(1)


def test_a_loss_is_given_the_teachers_probability_for_a_missing_mask_and_all_extras():
    objective = make().eval()
    objective.distillers["kd"] = witness = Witness()
    batch = viewed([True, False, True, False])
    batch.extra["superpixels"] = torch.arange(4)
    run(objective, batch)
    p = teacher_of(objective)(batch.image).logits.sigmoid()
    torch.testing.assert_close(witness.seen.mask[[1, 3]], p[[1, 3]])
    assert torch.equal(witness.seen.mask[[0, 2]], batch.mask[[0, 2]])
    torch.testing.assert_close(witness.seen.extra["confidence"][[1, 3]], agreement(p)[[1, 3]])
    assert torch.equal(witness.seen.extra["superpixels"], torch.arange(4))
    assert "confidence" not in batch.extra  # the batch itself is not changed


@pytest.mark.parametrize("form", ["no mask", "all rows without"])
def test_a_batch_without_labels_works(form):
    objective = make(losses=ALL)
    batch = replace(viewed(), mask=None) if form == "no mask" else viewed([False] * 4)
    terms = run(objective, batch)
    terms["loss"].backward()
    assert terms["supervised"] == 0
    assert all(value.isfinite() for value in terms.values())
    assert all(p.grad.isfinite().all() for p in objective.segmenter.parameters())


def test_the_gradient_reaches_student_and_adapters_and_the_teacher_stays():
    objective = make(2, losses=ALL)
    before = [copy.deepcopy(member.segmenter.state_dict()) for member in objective.teacher.members]
    objective.train()
    optimiser = torch.optim.SGD(objective.parameters(), 0.1)
    run(objective, viewed())["loss"].backward()
    assert [n for n, p in objective.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
    optimiser.step()
    objective.after_step(0.5)
    for member, state in zip(objective.teacher.members, before, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in member.segmenter.state_dict().items())
        assert all(p.grad is None for p in member.segmenter.parameters())


def test_the_state_holds_no_teacher_and_round_trips():
    objective = make(2, losses=ALL, average=0.9)
    state = objective.state_dict()
    numbers = {value.data_ptr() for m in objective.teacher.members for value in m.segmenter.state_dict().values()}
    assert not numbers & {value.data_ptr() for value in state.values()}
    assert {key.split(".")[0] for key in state} == {"segmenter", "distillers", "averaged"}
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.add_(0.01)
    other = make(2, losses=ALL, average=0.9)
    other.load_state_dict(copy.deepcopy(objective.state_dict()))
    assert torch.equal(run(objective.eval(), viewed())["loss"], run(other.eval(), viewed())["loss"])


def test_the_product_is_the_student_or_its_average():
    assert make().product() is not None
    plain, averaged = make(), make(average=0.9)
    assert plain.product() is plain.segmenter
    with torch.no_grad():
        averaged.segmenter.head.bias += 1
    averaged.after_step(0.0)
    product = averaged.product()
    assert product is not averaged.segmenter
    # The first step of the average moves 9/10 of the way: min(decay, 1 / 10) stays.
    start = plain.segmenter.head.bias
    torch.testing.assert_close(product.head.bias, start + 0.9)


def test_mean_kl_averages_the_losses_on_logits_over_the_teachers():
    losses = {"kd": {"temperature": 2.0}, "cwd": {}, "at": {}}
    batch = viewed()
    mean_kl = run(make(3, losses=losses, ensemble="mean_kl").eval(), batch)
    average = run(make(3, losses=losses, ensemble="average").eval(), batch)
    objective = make(3)
    student = objective.segmenter.eval()(batch.image)
    each = [
        KD(STUDENT, STUDENT, 2.0)(student, member.segmenter(batch.image), batch) for member in objective.teacher.members
    ]
    torch.testing.assert_close(mean_kl["kd"], torch.stack(each).mean().detach())
    assert mean_kl["kd"] > average["kd"]  # a divergence is convex: several doubts cost more than their mean
    assert mean_kl["at"] == average["at"]
    assert mean_kl["cwd"] != average["cwd"]


def test_a_tiny_batch_overfits():
    objective = make(losses={"kd": {"weight": 0.02}, "mbf": {"weight": 0.02}}, augment="none", average=0.5)
    batch = objective.views()(raw_batch())
    optimiser = torch.optim.Adam(objective.parameters(), 0.03)
    for _ in range(80):
        terms = objective(batch)
        optimiser.zero_grad()
        terms["loss"].backward()
        optimiser.step()
        objective.after_step(0.0)
    logits = objective.product().eval()(batch.image).logits
    assert ((logits > 0) == (batch.mask >= 0.5)).float().mean() > 0.97


def test_mixed_precision_works():
    objective = make(2, losses=ALL, pseudo_weight=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        terms = run(objective, viewed([True, True, False, False]))
    terms["loss"].backward()
    assert all(value.dtype == torch.float32 and value.isfinite() for value in terms.values())
    assert all(p.grad.isfinite().all() for p in objective.parameters())


def test_a_teacher_of_another_size_teaches():
    class Larger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network, self.encoder = segmenter(6, 1), nn.Identity()
            self.encoder.size = 2 * SIZE

        def forward(self, image: torch.Tensor) -> SegOutput:
            assert image.shape[2] == 2 * SIZE
            return self.network(image)

    objective = Distill(segmenter(4), [Larger()], size=SIZE, losses=ALL)
    terms = run(objective, viewed())
    assert all(value.isfinite() for value in terms.values())


def test_the_preview_shows_image_teacher_and_student():
    objective = make().eval()
    batch = viewed()
    before = torch.get_rng_state()
    strips = objective.preview(batch)["teacher_and_student"]
    assert torch.equal(before, torch.get_rng_state())
    assert strips.shape == (4, 3, SIZE, 3 * SIZE)
    assert 0 <= strips.min() <= strips.max() <= 1
    assert not strips.requires_grad
    p = teacher_of(objective)(batch.image).logits.sigmoid()
    torch.testing.assert_close(strips[..., SIZE : 2 * SIZE], overlay_heat(strips[..., :SIZE], p))


def test_the_overlay_leaves_the_picture_where_nothing_is_predicted():
    picture = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(overlay_heat(picture, torch.zeros(1, 1, 4, 4)), picture)
    red = overlay_heat(picture, torch.ones(1, 1, 4, 4))
    assert (red[:, 0] >= picture[:, 0]).all()
    assert red[:, 1:].mean() < picture[:, 1:].mean()


@pytest.mark.parametrize(("settings", "message"), [
    ({"losses": {"kdd": {}}}, r"no distillation loss named 'kdd'. Did you mean 'kd'\?"),
    ({"losses": {"kd": {"heat": 4}}}, "Unknown setting 'distill.method.losses.kd.heat'. Valid ones: temperature"),
    ({"losses": {"kd": {"temperature": "hot"}}}, "Setting 'distill.method.losses.kd.temperature' cannot be 'hot'"),
    ({"losses": {"kd": {"weight": "much"}}}, "Setting 'distill.method.losses.kd.weight' cannot be 'much'"),
    ({"losses": {"kd": {"weight": -1}}}, "The weight of 'kd' cannot be -1"),
    ({"losses": {}, "supervised_weight": 0.0}, "All weights of the distillation are zero"),
    ({"pseudo_weight": -1.0}, "The weight of 'pseudo_weight' cannot be -1"),
    ({"dice_weight": 1.5}, "dice_weight"),
    ({"average": 1.0}, "average"),
    ({"augment": "flip"}, "augment"),
    ({"ensemble": "vote"}, "ensemble"),
])  # fmt: skip
def test_impossible_settings_are_the_users_mistake(settings, message):
    with pytest.raises(UserError, match=message):
        build(Distill, settings, "distill.method", segmenter=segmenter(4), teachers=[segmenter(6)], size=SIZE)


def test_a_recipes_settings_build_it():
    settings = {"losses": {"mbf": {"weight": 2, "levels": [1, 2]}, "kd": {}}, "ensemble": "mean_kl"}
    objective = build(Distill, settings, "distill.method", segmenter=segmenter(4), teachers=[segmenter(6)], size=SIZE)
    assert objective.weights == {"mbf": 2.0, "kd": 1.0}
    assert objective.distillers["mbf"].align.channels == [7, 8]


@pytest.mark.parametrize("classes", [(1, 2), (2, 1), (2, 2)])
def test_networks_of_other_than_one_class_are_refused(classes):
    student, teacher = (segmenter(4, num_classes=num) for num in classes)
    with pytest.raises(UserError, match="distillation needs segmenters with one class"):
        Distill(student, [teacher], size=SIZE)


def test_a_student_cannot_be_its_own_teacher():
    student = segmenter(4)
    with pytest.raises(UserError, match="one of its own teachers"):
        Distill(student, [student], size=SIZE)
    assert all(p.requires_grad for p in student.parameters())


def stored(batch: Batch, probability: torch.Tensor) -> Batch:
    """Return the batch with the teacher's probability beside its mask."""
    return replace(batch, mask=torch.cat([batch.mask, probability], dim=1))


@pytest.mark.parametrize("losses", [{}, {"kd": {"weight": 0.5}}])
def test_stored_predictions_teach_what_the_teacher_would(monkeypatch, losses):
    objective = make(losses=losses, pseudo_weight=1.0)
    batch = viewed([True, False, True, False])
    probability = objective.teacher(batch.image).logits.sigmoid()
    asked = run(objective, batch)
    monkeypatch.setattr(objective.teacher, "outputs", lambda image: pytest.fail("the teacher was asked"))
    told = run(objective, stored(batch, probability))
    for name, value in asked.items():
        assert told[name].item() == pytest.approx(value.item(), abs=1e-5)


@pytest.mark.parametrize("losses", [{"mbf": {}}, {"at": {"levels": [0, 2]}, "kd": {}}, {name: {} for name in ALL}])
def test_stored_features_teach_what_the_teacher_would(monkeypatch, losses):
    objective, batch = make(losses=losses), viewed([True, False, True, False])
    with torch.no_grad():
        output = objective.teacher(batch.image)
    asked = run(objective, batch)
    monkeypatch.setattr(objective.teacher, "outputs", lambda image: pytest.fail("the teacher was asked"))
    features = [output.features[level] for level in objective.stored_levels]
    told = run(objective, replace(stored(batch, output.logits.sigmoid()), features=features))
    for name, value in asked.items():
        assert told[name].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-5)


def test_only_the_levels_that_losses_compare_are_stored():
    assert make(losses={"kd": {}, "cwd": {}}).stored_levels == ()
    assert make(losses={"mbf": {"levels": [2]}, "kd": {}, "at": {"levels": [0, 2]}}).stored_levels == (0, 2)


def test_one_softened_answer_teaches_what_the_mean_divergence_from_several_teachers_does(monkeypatch):
    objective = make(3, losses={"kd": {"temperature": 2.0}}, ensemble="mean_kl").eval()
    assert objective.stored_at == 2
    assert make(3, losses={"kd": {"temperature": 2.0}}, ensemble="average").stored_at == 1
    batch = viewed()
    asked = gradient(objective, batch)
    softened = torch.stack([(logits / 2).sigmoid() for logits in objective.teacher.members_logits(batch.image)]).mean(0)
    merged = objective.teacher(batch.image, temperature=2.0).logits
    torch.testing.assert_close((merged / 2).sigmoid(), softened)
    monkeypatch.setattr(objective.teacher, "outputs", lambda image: pytest.fail("the teachers were asked"))
    torch.testing.assert_close(gradient(objective, stored(batch, softened)), asked, rtol=1e-3, atol=1e-6)


def gradient(objective: Distill, batch: Batch) -> torch.Tensor:
    objective.zero_grad()
    run(objective, batch)["loss"].backward()
    return torch.cat([p.grad.flatten() for p in objective.segmenter.parameters() if p.grad is not None])


def test_a_loss_of_features_asks_the_teacher_whatever_is_stored():
    objective, batch = make(losses={"at": {}}), viewed([True, False, True, False])
    asked, told = run(objective, batch), run(objective, stored(batch, torch.rand_like(batch.mask)))
    assert told["at"].item() == pytest.approx(asked["at"].item(), abs=1e-6)


@pytest.mark.parametrize(
    ("has_mask", "settings", "asks"),
    [
        (None, {"losses": {}}, False),
        ([True, False, True, False], {"losses": {}}, False),
        ([True, True, True, True], {"losses": {}, "pseudo_weight": 1.0}, False),
        ([True, False, True, False], {"losses": {}, "pseudo_weight": 1.0}, True),
        (None, {"losses": {"kd": {}}}, True),
    ],
)
def test_the_teacher_is_asked_only_where_somebody_listens(monkeypatch, has_mask, settings, asks):
    objective, calls = make(**settings), []
    answer = objective.teacher.outputs
    monkeypatch.setattr(objective.teacher, "outputs", lambda image: calls.append(1) or answer(image))
    loss = run(objective, viewed(has_mask))["loss"]
    assert bool(calls) == asks
    assert loss.isfinite()


@pytest.mark.parametrize(("name", "weight"), [("kd", 1.0), ("cwd", 1.0), ("mbf", 0.1), ("m2bf", 0.1)])
def test_losses_around_the_boundary_weigh_a_tenth_unless_told(name, weight):
    assert make(losses={name: {}}).weights == {name: weight}
    assert make(losses={name: {"weight": 0.7}}).weights == {name: 0.7}
