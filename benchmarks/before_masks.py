"""What is known before any mask: how well `figure`'s threshold, and networks that learnt from it, agree with masks.

    python -m benchmarks.before_masks DATA --manifest manifest_isic2017.csv --split train --num 300 \\
        --weights figure:RUNS/figure-pretrain/pretrain/model.safetensors --out before_masks_train.json

The rule sees each picture as training caches it, whole; where it tells no figure its mask is empty, and its Dice 0.
Networks are EfficientNet-Lite0's U-Net at 128x128, as `pretrain figure` leaves them, with how far their encoder is
from the packaged weights. Dice is at the masks' own size, intervals over patients, lesions or images.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks.plain_unet import SIZE
from fewmask.data.cache import cache_size
from fewmask.data.manifest import load_cases
from fewmask.data.preprocess import predict_probability, resize_image
from fewmask.engine.run import write_json
from fewmask.evaluate.results import Row
from fewmask.evaluate.score import compare, score_cases, summarise
from fewmask.models import Segmenter, build_encoder, build_segmenter
from fewmask.models.weights import load_decoder
from fewmask.pretrain.figure_rule import FigureRule, find_figure
from fewmask.types import Case

ENCODER = "efficientnet_lite0"


def figure_of(image: np.ndarray) -> np.ndarray:
    """Return the figure of a picture uint8 (h, w, 3) as float32 (h, w), empty where there is none."""
    small = torch.from_numpy(resize_image(image, cache_size(SIZE))).permute(2, 0, 1)[None]
    figure, told = find_figure(small, FigureRule())
    cover = F.interpolate((figure & told.view(-1, 1, 1, 1)).float(), image.shape[:2], mode="bilinear")
    return cover[0, 0].numpy()


def some_cases(args: argparse.Namespace) -> list[Case]:
    """Return the cases of the split that have a mask, or so many of them, drawn by the seed."""
    cases = [c for c in load_cases(args.data, Path(args.manifest)) if c.mask and args.split in ("all", c.split)]
    if args.num and args.num < len(cases):
        chosen = np.random.default_rng(args.seed).choice(len(cases), args.num, replace=False)
        cases = [cases[i] for i in sorted(chosen)]
    return cases


def network(weights: str) -> Segmenter:
    """Return the network that a pre-training left, to be used."""
    segmenter = build_segmenter("unet", build_encoder(ENCODER, weights, size=SIZE))
    if not load_decoder(segmenter, weights):
        raise SystemExit(f"{weights} holds an encoder alone, which segments nothing: give what `pretrain figure` left.")
    return segmenter.eval()


@torch.no_grad()
def moved(segmenter: Segmenter) -> float:
    """Return how far the encoder's weights are from the packaged ones, as a share of their norm."""
    start = dict(build_encoder(ENCODER, "packaged", size=SIZE).named_parameters())
    now = dict(segmenter.encoder.named_parameters())
    squares = [((now[name] - start[name]).square().sum(), start[name].square().sum()) for name in start]
    far, norm = (torch.stack(list(parts)).sum() for parts in zip(*squares, strict=True))
    return float((far / norm).sqrt())


def described(rows: Sequence[Row], told: set[str]) -> dict[str, Any]:
    """Return the figures of all rows, of those with a figure and of the others, and the share that is segmented."""
    parts = {
        "all": rows,
        "told": [r for r in rows if r["name"] in told],
        "others": [r for r in rows if r["name"] not in told],
    }
    areas = {key: float(np.mean([r[key] for r in rows])) for key in ("truth_fraction", "prediction_fraction")}
    return {**{name: summarise(part)["dice"] for name, part in parts.items() if part}, **areas}


def main() -> None:
    """Score the rule and the networks, and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--manifest", default="manifest.csv")
    parser.add_argument(
        "--split", default="all", help="train or val; all reads test images too, for data that nothing is tested on"
    )
    parser.add_argument("--num", type=int, default=0, help="so many of the images, 0: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", action="append", default=[], metavar="NAME:FILE")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    cases = some_cases(args)
    rule = score_cases(figure_of, cases)
    told = {row["name"] for row in rule if not row["empty_prediction"]}
    found: dict[str, Any] = {
        "data": args.data.name, "split": args.split, "images": len(cases), "seed": args.seed,
        "told": len(told) / len(cases), "rule": described(rule, told), "networks": {},
    }  # fmt: skip
    for text in args.weights:
        name, colon, path = text.partition(":")
        if not colon:
            raise SystemExit(f"--weights {text} has no name: write NAME:{text}.")
        segmenter = network(path)
        rows = score_cases(partial(predict_probability, segmenter, size=SIZE), cases)
        found["networks"][name] = {
            "moved": moved(segmenter),
            **described(rows, told),
            "against_rule": compare(rows, rule),
        }
        print(f"{name}: {found['networks'][name]['all']}", flush=True)
    write_json(args.out, found)
    print(f"rule: {found['told']:.0%} told, {found['rule']['all']}")


if __name__ == "__main__":
    main()
