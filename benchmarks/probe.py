"""How often the nearest neighbours of an image name its class, by the features of pre-trained encoders as kept.

    python -m benchmarks.probe TABLE/mae-0 TABLE/g2ll-light-0 --data HAM10000 --out benchmarks/results/probe.json

Nothing is trained; an image's neighbours are of other patients or lesions (`fewmask.evaluate.probe`). The first line is
of the same network as it begins.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from fewmask.data.cache import build_cache
from fewmask.data.contents import default_cache_folder
from fewmask.data.manifest import load_cases
from fewmask.engine.run import versions, write_json
from fewmask.evaluate.probe import Probe
from fewmask.models import build_encoder, encoder_of, load_model


def main() -> None:
    """Measure and write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of pre-trainings")
    parser.add_argument("--data", type=Path, required=True, help="a data folder whose manifest has the column 'label'")
    parser.add_argument("--num", type=int, default=2000, help="images, drawn at random, as while training")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    models = {run.name: load_model(run / "pretrain" / "model.safetensors")[0] for run in args.runs}
    first = encoder_of(next(iter(models.values())))
    torch.manual_seed(0)
    models = {"random": build_encoder(first.name, size=first.size), **models}
    labelled = [case for case in load_cases(args.data) if case.label is not None]
    order = torch.randperm(len(labelled), generator=torch.Generator().manual_seed(0))[: args.num].tolist()
    cases = [labelled[i] for i in order]
    dataset = build_cache(cases, first.size, default_cache_folder())
    probe = Probe(dataset, range(len(cases)), first.size, [case.group or case.name for case in cases])
    rows = []
    for name, model in models.items():
        rows.append({"row": name, **probe(model)})
        print(rows[-1], flush=True)
    about = {"data": args.data.resolve().name, "num_images": len(cases), "versions": versions()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, {**about, "rows": rows})


if __name__ == "__main__":
    main()
