"""Images per second of a training step: fewmask's MAE and DINO beside `lightly`'s, and every method beside its FLOPs.

    python -m pip install --no-deps --target LIGHTLY lightly==1.6.0 lightning_utilities
    PYTHONPATH=LIGHTLY python -m benchmarks.throughput --threads 1 --out benchmarks/results

lightly (MIT) is not a dependency of fewmask. Its side is the training loop of its documented PyTorch examples (`mae`,
`dino`), with AdamW on both sides and the same ViT, heads, decoder, mask ratio, batch and precision. fewmask's side is
`engine.fit`'s own step, clipping, schedule and checks included. Both get the same augmented float tensors; the
augmentations are timed apart, each side's own on the same pictures at cache size, and added: one process, no workers.
The sides take turns, and medians over the rounds are compared.

The floor of a step is its FLOPs over the rate of a large matrix product in the same precision, measured in the same
process: `share_of_peak` says how near to it the step is.
"""

from __future__ import annotations

import argparse
import copy
import math
import platform
import statistics
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fewmask.config import RunSection, StageSection, load_recipe
from fewmask.data.cache import cache_size
from fewmask.data.superpixels import Slic
from fewmask.data.synthetic import render
from fewmask.engine.device import resolve_precision
from fewmask.engine.fit import Fit
from fewmask.engine.run import Run, versions, write_json
from fewmask.engine.stage import CLOCKS, Stage
from fewmask.models import build_encoder
from fewmask.models.vit import VIT_SHAPES
from fewmask.objective import Objective, identity
from fewmask.pretrain import PRETRAINERS
from fewmask.types import Batch

DECODERS = {
    "mae 512x8": {"decoder_dim": 512, "decoder_depth": 8, "decoder_heads": 16},
    "mae 384x2": {"decoder_dim": 384, "decoder_depth": 2, "decoder_heads": 6},
}
"""The decoder of lightly's example (and of MAE), and the one of G2LL, twice as wide as that of fewmask's recipe."""

EXAMPLE = "mae 512x8"
CELLS = [
    "mae 512x8 on vit_tiny_patch8@128", "mae 384x2 on vit_tiny_patch8@128", "dino on vit_tiny_patch8@128",
    "mae 384x2 on vit_tiny_patch16@224", "dino on vit_tiny_patch16@224", "mae on vit_tiny_patch8@128",
]  # fmt: skip
"""What is compared; "mae" without a decoder is each side as it comes: fewmask's recipe, lightly's example."""

RECIPES = ["mae", "dino", "g2ll", "tedmae", "simmim", "supervised"]

PROTOTYPES, HIDDEN, BOTTLENECK = 4096, 2048, 256
NUM_CLASSES = 7
Step = Callable[[], object]


class Fixed:
    """A loader that always gives the same batch."""

    steps_per_epoch, rounds = 1000, 1.0

    def __init__(self, batch: Batch) -> None:
        self.value, self.num_images = batch, len(batch.image)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """Return the batch; what a step replaces in it is not replaced here."""
        return replace(self.value)


def raw_batch(num: int, size: int, slic: Slic | None = None, masked: bool = False) -> Batch:
    """Return made-up pictures at cache size, as a loader would, with superpixels or masks if asked for."""
    side, rng = cache_size(size), np.random.default_rng(0)
    drawn = [render(rng, (side, side)) for _ in range(num)]
    pictures = np.stack([picture for picture, _ in drawn])
    mask = torch.from_numpy(np.stack([mask for _, mask in drawn]))[:, None].byte() * 255 if masked else None
    extra = {}
    if slic is not None:
        extra["superpixels"] = torch.from_numpy(np.stack([slic(picture) for picture in pictures]))[:, None]
    label = torch.arange(num) % NUM_CLASSES
    names = [str(i) for i in range(num)]
    return Batch(torch.from_numpy(pictures).permute(0, 3, 1, 2), names, mask=mask, label=label, extra=extra)


def build_objective(method: str, encoder: str, size: int, **settings: Any) -> Objective:
    """Return a method on fresh weights, the same ones each time."""
    torch.manual_seed(0)
    given = {"num_classes": NUM_CLASSES} if method == "supervised" else {}
    return PRETRAINERS[method](build_encoder(encoder, size=size), **given, **settings)


def build_loop(objective: Objective, batch: Batch, section: StageSection, precision: str, folder: Path) -> Fit:
    """Return fewmask's loop around an objective, for `step`; the views are the objective's."""
    AcceleratorState._reset_state(True)  # one process, several precisions
    stage = Stage(Run(folder, "pretrain", {}), "pretrain")
    run = RunSection.model_validate({"device": "cpu", "precision": precision})
    loop = Fit(objective, Fixed(batch), section, stage, run)
    objective.train()
    return loop


def one_step(loop: Fit) -> None:
    """Do what `engine.fit` does for each step."""
    loop.step(0.5)
    loop.check_finite()


def without_views(loop: Fit) -> Fit:
    """Return the loop with its batch augmented once and for all."""
    assert isinstance(loop.loader, Fixed)
    with torch.no_grad():
        batch = loop.views(loop.loader.value)
    loop.loader, loop.views = Fixed(batch), identity
    return loop


class LightlyMAE(nn.Module):
    """The model of lightly's MAE example around a ViT of timm."""

    def __init__(self, vit: VisionTransformer, dim: int, depth: int, heads: int) -> None:
        from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM

        super().__init__()
        self.patch = vit.patch_embed.patch_size[0]
        self.backbone = MaskedVisionTransformerTIMM(vit=vit)
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # renamed in 1.7
            self.decoder = MAEDecoderTIMM(
                num_patches=vit.patch_embed.num_patches, patch_size=self.patch, embed_dim=vit.embed_dim,
                decoder_embed_dim=dim, decoder_depth=depth, decoder_num_heads=heads,
            )  # fmt: skip

    def forward(self, views: list[Tensor]) -> Tensor:
        """Return the loss of one view."""
        from lightly.models import utils

        images, length = views[0], self.backbone.sequence_length
        keep, masked = utils.random_token_mask(size=(len(images), length), mask_ratio=0.75, device=images.device)
        embedded = self.decoder.embed(self.backbone.encode(images=images, idx_keep=keep))
        tokens = utils.repeat_token(self.decoder.mask_token, (len(images), length))
        tokens = utils.set_at_index(tokens, keep, embedded.type_as(tokens))
        prediction = self.decoder.predict(utils.get_at_index(self.decoder.decode(tokens), masked))
        target = utils.get_at_index(utils.patchify(images, self.patch), masked - 1)
        return nn.functional.mse_loss(prediction, target)

    def after_step(self) -> None:
        """Do nothing."""


class LightlyDINO(nn.Module):
    """The model, loss and momentum update of lightly's DINO example around a ViT of timm."""

    def __init__(self, vit: VisionTransformer) -> None:
        from lightly.loss import DINOLoss
        from lightly.models.modules import DINOProjectionHead
        from lightly.models.utils import deactivate_requires_grad

        super().__init__()
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # torch's, of weight_norm
            head = DINOProjectionHead(vit.embed_dim, HIDDEN, BOTTLENECK, PROTOTYPES)
            teacher_head = DINOProjectionHead(vit.embed_dim, HIDDEN, BOTTLENECK, PROTOTYPES)
        self.student = nn.ModuleList([vit, head])
        self.teacher = nn.ModuleList([copy.deepcopy(vit), teacher_head])
        deactivate_requires_grad(self.teacher)
        self.criterion = DINOLoss(output_dim=PROTOTYPES)

    def forward(self, views: list[Tensor]) -> Tensor:
        """Return the loss of two global views."""
        taught = [self.teacher[1](self.teacher[0](view)) for view in views]
        answered = [self.student[1](self.student[0](view)) for view in views]
        return self.criterion(taught, answered, epoch=0)

    def after_step(self) -> None:
        """Move the teacher."""
        from lightly.models.utils import update_momentum

        for student, teacher in zip(self.student, self.teacher, strict=True):
            update_momentum(student, teacher, m=0.996)


def plain_vit(encoder: str, size: int, pool: Literal["", "token"]) -> VisionTransformer:
    """Return timm's ViT of the shape of a fewmask encoder."""
    shape = VIT_SHAPES[encoder]
    return VisionTransformer(
        img_size=size, patch_size=shape.patch, embed_dim=shape.dim, depth=shape.depth, num_heads=shape.heads,
        num_classes=0, global_pool=pool,
    )  # fmt: skip


def lightly_step(model: LightlyMAE | LightlyDINO, views: list[Tensor], precision: str) -> Step:
    """Return the body of the example's loop: forward, backward, step, zero_grad."""
    optimiser = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1.5e-4)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = model(views)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        model.after_step()

    return step


def lightly_views(method: str, size: int, raw: Batch) -> Step:
    """Return lightly's augmentation of a batch: image by image, through Pillow, then stacked."""
    from lightly.transforms import DINOTransform, MAETransform

    transform = MAETransform(size) if method == "mae" else DINOTransform(global_crop_size=size, n_local_views=0)
    pictures = [Image.fromarray(picture) for picture in raw.image.permute(0, 2, 3, 1).numpy()]

    def augment() -> list[Tensor]:
        return [torch.stack(same) for same in zip(*(transform(picture) for picture in pictures), strict=True)]

    return augment


def take_turns(sides: Mapping[str, Step], rounds: int, now: Callable[[], float]) -> dict[str, float]:
    """Return the median seconds of each side's call; the sides alternate, after one call each that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, step in sides.items():
            began = now()
            step()
            if number:
                seconds[name].append(now() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def compare(name: str, encoder: str, size: int, precision: str, args: argparse.Namespace, folder: Path) -> dict:
    """Return one cell: both sides' images per second, with and without their augmentation."""
    method, raw, now = name.split()[0], raw_batch(args.batch, size), CLOCKS[args.clock]
    section = StageSection(method={"name": method}, lr=1.5e-4, batch_size=args.batch)
    objective = build_objective(method, encoder, size, **DECODERS.get(name, {}))
    loop = without_views(build_loop(objective, raw, section, precision, folder))
    batch = loop.loader.batch(0)
    if method == "mae":
        shape = DECODERS.get(name, DECODERS[EXAMPLE])
        vit, views = plain_vit(encoder, size, ""), [batch.image]
        model: LightlyMAE | LightlyDINO = LightlyMAE(vit, *shape.values())
    else:
        model, views = LightlyDINO(plain_vit(encoder, size, "token")), [batch.image, batch.extra["second"]]
    views = [view.contiguous() for view in views]
    steps = take_turns(
        {"fewmask": partial(one_step, loop), "lightly": lightly_step(model, views, precision)}, args.rounds, now
    )
    own: dict[str, Step] = {"fewmask": partial(objective.views(), raw), "lightly": lightly_views(method, size, raw)}
    augmentation = take_turns(own, args.rounds, now)
    rates = {side: args.batch / steps[side] for side in steps}
    both = {side: args.batch / (steps[side] + augmentation[side]) for side in steps}
    return {
        "method": name, "encoder": encoder, "size": size, "precision": precision, "batch": args.batch,
        "step_s": steps, "augmentation_s": augmentation, "images_per_s": rates, "images_per_s_augmented": both,
        "ratio": rates["fewmask"] / rates["lightly"], "ratio_augmented": both["fewmask"] / both["lightly"],
    }  # fmt: skip


def matmul_peak(precision: str, now: Callable[[], float]) -> float:
    """Return the best FLOP/s over some large matrix products."""
    best = 0.0
    for side in (1024, 2048):
        a, b = (torch.randn(side, side).to(torch.bfloat16 if precision == "bf16" else torch.float32) for _ in range(2))
        for _ in range(8):
            began = now()
            a @ b
            best = max(best, 2 * side**3 / max(now() - began, 1e-9))
    return best


def convolution_backward_flops(
    grad_shape: list[int], x_shape: list[int], weight_shape: list[int], *rest: Any, **_: Any
) -> int:
    """Return the FLOPs of a convolution's backward: those of its forward for each of the two gradients asked for.

    torch's own count leaves out that a grouped convolution sees its group only.
    """
    *_before, transposed, _padding, _groups, wanted = rest[:8]
    pixels = math.prod(x_shape if transposed else grad_shape)
    return 2 * pixels * math.prod(weight_shape[1:]) * sum(wanted[:2])


def count_flops(step: Step) -> int:
    """Return the FLOPs of the products, convolutions and attentions in a call."""
    custom: dict[Any, Any] = {torch.ops.aten.convolution_backward: convolution_backward_flops}
    with FlopCounterMode(display=False, custom_mapping=custom) as counter:
        step()
    return counter.get_total_flops()


def floor(recipe_name: str, precision: str, peak: float, args: argparse.Namespace, folder: Path) -> dict:
    """Return a shipped recipe's step beside its FLOPs, at the recipe's batch or `--recipe-batch`."""
    recipe, now = load_recipe(recipe_name), CLOCKS[args.clock]
    section = recipe.stage("pretrain")
    settings = {**section.method}
    size, num = recipe.model.size, args.recipe_batch or section.batch_size
    section = section.model_copy(update={"batch_size": num})
    objective = build_objective(settings.pop("name"), recipe.model.encoder, size, **settings)
    raw = raw_batch(num, size, objective.maps().get("superpixels"))
    loop = without_views(build_loop(objective, raw, section, precision, folder))
    flops = count_flops(partial(one_step, loop))
    seconds = take_turns({"step": partial(one_step, loop), "views": partial(objective.views(), raw)}, args.rounds, now)
    return {
        "recipe": recipe_name, "encoder": recipe.model.encoder, "size": size, "precision": precision, "batch": num,
        "step_s": seconds["step"], "views_s": seconds["views"], "images_per_s": num / sum(seconds.values()),
        "gflops_per_image": flops / num / 1e9, "floor_s": flops / peak, "share_of_peak": flops / peak / seconds["step"],
    }  # fmt: skip


def parse_cell(text: str) -> tuple[str, str, int]:
    """Return method, encoder and size of "METHOD on ENCODER@SIZE"."""
    name, _, where = text.partition(" on ")
    encoder, _, size = where.partition("@")
    return name, encoder, int(size)


def own_best(cells: list[dict]) -> list[dict]:
    """Return, for each method and network, fewmask in its best precision beside lightly in fp32 (as its examples)."""
    rows = []
    for plain in (cell for cell in cells if cell["precision"] == "fp32"):
        same = [cell for cell in cells if all(cell[key] == plain[key] for key in ("method", "encoder", "size"))]
        best = max(same, key=lambda cell: cell["images_per_s"]["fewmask"])
        row = {key: plain[key] for key in ("method", "encoder", "size")} | {"precision": best["precision"]}
        for suffix in ("", "_augmented"):
            ours, theirs = best[f"images_per_s{suffix}"]["fewmask"], plain[f"images_per_s{suffix}"]["lightly"]
            row[f"ratio{suffix}"] = ours / theirs
        rows.append(row)
    return rows


def show_cell(cell: dict) -> str:
    """Return one line for a comparison."""
    ours, theirs = (cell["images_per_s"][side] for side in ("fewmask", "lightly"))
    where = f"{cell['method']} {cell['encoder']}@{cell['size']} {cell['precision']}"
    return (
        f"{where}: {ours:.1f} images/s, lightly {theirs:.1f}: {cell['ratio']:.2f}x; "
        f"with own augmentation {cell['ratio_augmented']:.2f}x"
    )


def show_floor(row: dict) -> str:
    """Return one line for a recipe."""
    return (
        f"{row['recipe']} {row['encoder']}@{row['size']} {row['precision']}: {row['images_per_s']:.1f} images/s, "
        f"{row['gflops_per_image']:.2f} GFLOP an image, {row['share_of_peak']:.0%} of peak, "
        f"views {row['views_s'] / (row['views_s'] + row['step_s']):.0%} of the time"
    )


def main() -> None:
    """Measure and write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8, help="of the comparison")
    parser.add_argument("--recipe-batch", type=int, default=16, help="of the recipes; 0: their own")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: on a machine with other work")
    parser.add_argument("--cells", nargs="*", default=CELLS, help="what is compared, as METHOD on ENCODER@SIZE")
    parser.add_argument("--recipes", nargs="*", default=RECIPES)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    best, now = resolve_precision(RunSection(device="cpu")), CLOCKS[args.clock]
    precisions = sorted({"fp32", best}, reverse=True)
    peak = {precision: matmul_peak(precision, now) for precision in precisions}
    cells, rows = [], []
    with tempfile.TemporaryDirectory() as scratch:
        for cell in args.cells:
            for precision in precisions:
                cells.append(compare(*parse_cell(cell), precision, args, Path(scratch)))
                print(show_cell(cells[-1]), flush=True)
        for row in own_best(cells):
            print(f"{row['method']} {row['encoder']}, {row['precision']} beside lightly's fp32: {row['ratio']:.2f}x")
        for name in args.recipes:
            rows.append(floor(name, best, peak[best], args, Path(scratch)))
            print(show_floor(rows[-1]), flush=True)
    result = {
        "threads": args.threads, "rounds": args.rounds, "clock": args.clock, "machine": platform.processor(),
        "versions": versions(), "matmul_flops_per_s": peak, "cells": cells,
        "own_best": own_best(cells), "recipes": rows,
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "throughput.json", result)


if __name__ == "__main__":
    main()
