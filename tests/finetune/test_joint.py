"""Joint training: separate batches and heads on one trunk, and nothing but fine-tuning when the tasks weigh nothing."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fewmask.auxiliary import AUXILIARY
from fewmask.config import StageSection
from fewmask.engine.optim import build_optimiser
from fewmask.finetune import FINETUNERS
from fewmask.finetune.gradient_surgery import project
from fewmask.finetune.joint import Joint, split_evenly
from fewmask.finetune.segment import Segment
from fewmask.registry import build
from fewmask.types import Batch, SegOutput, UserError
from tests.auxiliary.tiny import SIZE, TinyTrunk, raw_batch


class TinySegmenter(nn.Module):
    """The tiny trunk and one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = TinyTrunk()
        self.decoder = nn.Conv2d(24, 1, 3, padding=1)

    def forward(self, image: torch.Tensor) -> SegOutput:
        features = self.encoder(image)
        logits = F.interpolate(self.decoder(features[-1].relu()), image.shape[2:], mode="bilinear")
        return SegOutput(logits, features)


def paired_batch(num: int = 4, num_other: int = 6, seed: int = 0) -> Batch:
    """A labelled batch with other images beside it, whose names start with u."""
    other = raw_batch(num_other, seed=seed + 100)
    return replace(raw_batch(num, seed=seed), other=replace(other, names=[f"u{name}" for name in other.names]))


def joint(task: str | list[str] = "rotation", **settings) -> Joint:
    torch.manual_seed(0)
    settings = {"task": task, **settings}
    return build(FINETUNERS["joint"], settings, "finetune.method", segmenter=TinySegmenter(), size=SIZE)


def plain(**settings) -> Segment:
    torch.manual_seed(0)
    return Segment(TinySegmenter(), size=SIZE, **settings)


def seen(subject, seed: int = 1, **sizes) -> Batch:
    torch.manual_seed(seed)
    return subject.views()(paired_batch(**sizes))


def train(objective, num_steps: int = 4, batches=paired_batch) -> list[float]:
    """Train as the loop does: the generator seeded by the step, clipped gradients, AdamW."""
    optimiser = build_optimiser(objective, StageSection(method={"name": "joint"}, lr=1e-2))
    objective.train()
    losses = []
    for step in range(num_steps):
        torch.manual_seed(step)
        terms = objective(objective.views()(batches(seed=step)))
        optimiser.zero_grad()
        terms["loss"].backward()
        nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimiser.step()
        objective.after_step(step / num_steps)
        losses.append(terms["loss"].item())
    return losses


@pytest.mark.parametrize("combine", ["sum", "pcgrad"])
@pytest.mark.parametrize("task", ["rotation", ["restoration", "boundary_distance"]])
def test_with_lambda_zero_it_is_fine_tuning_bit_for_bit(task, combine):
    subject, reference = joint(task, task_weight=0.0, combine=combine, average=0.9), plain(average=0.9)
    reference.load_state_dict(copy.deepcopy(subject.segment.state_dict()))
    assert train(subject) == train(reference)
    after, expected = subject.segment.state_dict(), reference.state_dict()
    assert list(after) == list(expected)
    assert all(torch.equal(after[key], expected[key]) for key in expected)
    assert len(list(subject.parameters())) == len(list(reference.parameters()))
    assert subject.other_images == "none"
    assert train(subject, 1, lambda seed: raw_batch(seed=seed))  # no other images are needed


@pytest.mark.parametrize("task", AUXILIARY)
def test_a_task_does_not_change_what_the_segmenter_sees(task):
    expected = seen(plain())
    found = seen(joint(task))
    assert torch.equal(found.image, expected.image)
    assert torch.equal(found.mask, expected.mask)


def test_loss_is_the_weighted_sum():
    subject = joint(["rotation", "jigsaw"], task_weight=0.7)
    batch = seen(subject)
    terms = subject(batch)
    with torch.no_grad():
        segmentation = subject.segment(batch)["loss"].item()
        rotation = subject.tasks["rotation"](subject.segmenter.encoder, batch.other)["loss"].item()
        jigsaw = subject.tasks["jigsaw"](subject.segmenter.encoder, batch.other.other)["loss"].item()
    assert terms["loss"].item() == pytest.approx(segmentation + 0.7 * rotation + 0.7 * jigsaw, rel=1e-6)
    assert terms["segmentation"].item() == pytest.approx(segmentation)
    assert terms["rotation"].item() == pytest.approx(rotation)
    assert terms["jigsaw"].item() == pytest.approx(jigsaw)
    assert {"cross_entropy", "dice_loss", "rotation_accuracy", "jigsaw_accuracy"} < set(terms)
    assert [key for key, value in terms.items() if value.requires_grad] == ["loss"]


def test_every_task_has_a_batch_and_a_pass_of_its_own():
    subject = joint(["rotation", "restoration", "jigsaw"])
    batch = seen(subject, num=4, num_other=8)
    passes = []
    subject.segmenter.encoder.register_forward_hook(lambda module, inputs, output: passes.append(inputs[0]))
    subject(batch)
    parts = [batch.other, batch.other.other, batch.other.other.other]
    assert parts[-1].other is None
    assert [len(images) for images in passes] == [4, 2, 3, 3]
    assert torch.equal(passes[0], batch.image)
    assert all(torch.equal(images, part.image) for images, part in zip(passes[1:], parts, strict=True))
    # Each image is in one batch, and each batch holds what it should.
    assert batch.names == ["0", "1", "2", "3"]
    assert [part.names for part in parts] == [["u0", "u1"], ["u2", "u3", "u4"], ["u5", "u6", "u7"]]
    assert [set(part.extra) for part in parts] == [{"turn"}, {"clean"}, {"permutation"}]


def test_rows_stay_together_when_a_batch_is_split():
    batch = replace(raw_batch(5), label=torch.arange(5))
    batch.extra["superpixels"] = torch.arange(5)[:, None]
    parts = split_evenly(batch, 2)
    assert [part.label.tolist() for part in parts] == [[0, 1], [2, 3, 4]]
    assert torch.equal(torch.cat([part.extra["superpixels"] for part in parts]), batch.extra["superpixels"])
    for key in ("image", "mask"):
        assert torch.equal(torch.cat([getattr(part, key) for part in parts]), getattr(batch, key))


def test_running_statistics_are_those_of_the_labelled_batches():
    subject, reference = joint("restoration"), plain()
    reference.load_state_dict(copy.deepcopy(subject.segment.state_dict()))
    subject(seen(subject))
    reference(seen(reference))
    mine, expected = subject.segmenter.encoder.norms[0], reference.segmenter.encoder.norms[0]
    assert expected.running_mean.abs().sum() > 0
    assert torch.equal(mine.running_mean, expected.running_mean)
    assert torch.equal(mine.running_var, expected.running_var)
    assert mine.num_batches_tracked == 1
    assert mine.track_running_stats


def test_the_statistics_of_a_pass_are_its_own():
    subject = joint()
    batch = seen(subject)
    alone = subject.tasks["rotation"](subject.segmenter.encoder, batch.other)["loss"].item()
    assert subject(batch)["rotation"].item() == pytest.approx(alone)
    darker = replace(batch, image=batch.image - 1)
    assert subject(darker)["rotation"].item() == pytest.approx(alone)


@pytest.mark.parametrize("combine", ["sum", "pcgrad"])
def test_no_gradient_of_one_head_reaches_another(combine):
    subject = joint(["rotation", "jigsaw"], task_weight=0.5, combine=combine)
    batch = seen(subject)
    subject(batch)["loss"].backward()
    own = {
        "segment.segmenter.decoder": subject.segment(batch)["loss"],
        "tasks.rotation": 0.5 * subject.tasks["rotation"](subject.segmenter.encoder, batch.other)["loss"],
        "tasks.jigsaw": 0.5 * subject.tasks["jigsaw"](subject.segmenter.encoder, batch.other.other)["loss"],
    }
    for head, loss in own.items():
        heads = [(key, p) for key, p in subject.named_parameters() if not key.startswith("segment.segmenter.encoder")]
        grads = torch.autograd.grad(loss, [p for _, p in heads], allow_unused=True)
        for (key, parameter), alone in zip(heads, grads, strict=True):
            assert (alone is not None) == key.startswith(head)
            if alone is not None:
                torch.testing.assert_close(parameter.grad, alone)


def trunk_gradients(subject: Joint, batch: Batch) -> list[torch.Tensor]:
    """The flat gradient of each weighted loss on its own."""
    trunk, part = subject.segmenter.encoder, batch.other
    losses = [subject.segment(batch)["loss"]]
    for task in subject.tasks.values():
        losses.append(subject.task_weight * task(trunk, part)["loss"])
        part = part.other
    grads = [torch.autograd.grad(loss, list(trunk.parameters())) for loss in losses]
    return [torch.cat([g.flatten() for g in each]) for each in grads]


@pytest.mark.parametrize("task", ["rotation", ["rotation", "restoration"]])
@pytest.mark.parametrize(("seed", "conflict"), [(1, False), (4, True)])
def test_the_trunks_gradient_is_the_sum_or_operated_on(task, seed, conflict):
    found, values = {}, {}
    for combine in ("sum", "pcgrad"):
        subject = joint(task, task_weight=2.0, combine=combine)
        batch = seen(subject, seed)
        each = trunk_gradients(subject, batch)
        torch.manual_seed(7)
        loss = subject(batch)["loss"]
        loss.backward()
        found[combine] = torch.cat([p.grad.flatten() for p in subject.segmenter.encoder.parameters()])
        values[combine] = loss.item()
    torch.manual_seed(7)
    torch.testing.assert_close(found["sum"], sum(each), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found["pcgrad"], project(each), atol=1e-5, rtol=1e-4)
    assert values["sum"] == pytest.approx(values["pcgrad"], rel=1e-6)
    assert any(bool((a @ b) < 0) for i, a in enumerate(each) for b in each[:i]) is conflict
    assert torch.allclose(*found.values(), atol=1e-5) is not conflict


@pytest.mark.parametrize("task", AUXILIARY)
def test_a_tiny_batch_overfits_with_every_task(task):
    subject = joint(task, augment="none", average=0.5)
    optimiser = torch.optim.Adam(subject.parameters(), 0.01)
    batch, losses = seen(subject), []
    for step in range(60):
        terms = subject(batch)
        optimiser.zero_grad()
        terms["loss"].backward()
        optimiser.step()
        subject.after_step(step / 60)
        losses.append((terms["segmentation"].item(), terms[task].item()))
    assert losses[-1][0] < 0.5 * losses[0][0]
    assert losses[-1][1] < 0.7 * losses[0][1]
    assert subject.product()(batch.image).logits.shape == (4, 1, SIZE, SIZE)


def test_which_other_images_are_wanted():
    assert joint("rotation").other_images == "all"
    assert joint("boundary_distance").other_images == "labelled"
    assert joint(["rotation", "boundary_distance"]).other_images == "labelled"


def test_settings_reach_their_task():
    subject = joint("jigsaw", task_settings={"num_permutations": 5})
    assert subject.tasks["jigsaw"].head.out_features == 5
    both = joint(["jigsaw", "rotation"], task_settings={"jigsaw": {"num_permutations": 6}})
    assert both.tasks["jigsaw"].head.out_features == 6


def test_the_preview_shows_the_segmentation_and_every_task():
    subject = joint(["rotation", "restoration"]).eval()
    batch = seen(subject)
    before = torch.get_rng_state()
    shown = subject.preview(batch)
    assert torch.equal(before, torch.get_rng_state())
    assert set(shown) == {"augmented", "turned", "restoration"}
    assert all(p.shape[1] == 3 and 0 <= p.min() <= p.max() <= 1 and not p.requires_grad for p in shown.values())


def test_the_state_round_trips_and_holds_each_tensor_once():
    subject = joint(["rotation", "jigsaw"], average=0.9)
    train(subject, 2)
    addresses = [value.data_ptr() for value in subject.state_dict().values()]
    assert len(addresses) == len(set(addresses))
    other = joint(["rotation", "jigsaw"], average=0.9)
    other.load_state_dict(copy.deepcopy(subject.state_dict()))
    assert subject(seen(subject))["loss"].item() == other(seen(other))["loss"].item()


def test_a_batch_moves_with_its_other_batch():
    moved = paired_batch().to("meta")
    assert moved.other.image.device.type == "meta"
    assert moved.other.mask.device.type == "meta"
    assert raw_batch().to("meta").other is None


@pytest.mark.parametrize(("settings", "sentence"), [
    ({"task": "rotate"}, "no auxiliary task named 'rotate'. Did you mean 'rotation'"),
    ({"task": []}, "name at least one task"),
    ({"task": ["rotation", "rotation"]}, "none twice"),
    ({"task": "rotation", "task_weight": -0.1}, "'task_weight' cannot be -0.1"),
    ({"task": "rotation", "task_settings": {"gap": 0.1}}, "Unknown setting 'finetune.method.task_settings.gap'"),
    ({"task": "jigsaw", "task_settings": {"gap": "x"}}, "'finetune.method.task_settings.gap' cannot be 'x'"),
    ({"task": ["jigsaw"], "task_settings": {"gap": 0.1}}, "Unknown setting 'finetune.method.task_settings.gap'"),
    ({"task": ["jigsaw"], "task_settings": {"jigsaw": 0.1}}, "give a table of the task's settings"),
    ({"task": "rotation", "combine": "mean"}, "'finetune.method.combine' cannot be 'mean'"),
    ({"task": "rotation", "task_weight": 0.0, "task_settings": {"gap": 1.0}}, "Unknown setting"),
    ({"task": "rotation", "dice_weight": 1.5}, "dice_weight"),
])  # fmt: skip
def test_bad_settings_are_told_in_a_sentence(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        joint(**settings)


def test_bad_batches_and_segmenters_are_told_in_a_sentence():
    subject = joint(["rotation", "jigsaw"])
    with pytest.raises(UserError, match="needs a second batch"):
        subject.views()(raw_batch())
    with pytest.raises(UserError, match="A batch of 1 other images cannot be shared by 2 auxiliary tasks"):
        subject.views()(paired_batch(num_other=1))
    with pytest.raises(UserError, match="not gone through its views"):
        subject(replace(seen(subject), other=None))
    batch = paired_batch()
    with pytest.raises(UserError, match="needs a mask for every image"):
        joint("boundary_distance").views()(replace(batch, other=replace(batch.other, mask=None)))
    with pytest.raises(UserError, match="Fine-tuning needs a mask"):
        subject(subject.views()(replace(batch, mask=None)))
    with pytest.raises(UserError, match="no encoder to share"):
        Joint(nn.Conv2d(3, 1, 1), size=SIZE, task="rotation")
