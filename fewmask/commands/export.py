"""fewmask export: one file that takes any photo, its size, its speed, and how closely it agrees with torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fewmask.deploy.latency import measure_latency
from fewmask.deploy.run_files import describe_run, find_segmenter, input_size
from fewmask.engine.run import write_json


def export(run: Path, out: Path | None, as_json: bool) -> int:
    """Write the run's segmenter as ONNX to `out` (default RUN/model.onnx) and print its facts, latency among them.

    Raises UserError where the run has no segmenter or the exported file does not agree with torch.
    """
    find_segmenter(run)  # before torch has started, so that a mistyped folder is answered at once
    facts = export_run(run, out or run / "model.onnx")
    facts["latency"] = measure_latency(Path(facts["file"]))
    if out is None:  # the report tells of the run's own file, and of no copy elsewhere
        write_json(run / "export.json", facts)
    print(json.dumps(facts, indent=1) if as_json else "\n".join(_lines(facts)))
    return 0


def export_run(run: Path, out: Path, stage: str | None = None) -> dict[str, Any]:
    """Write the run's segmenter, or a stage's, as ONNX to `out`; return what `deploy.export.export_onnx` returns."""
    from fewmask.deploy.export import export_onnx
    from fewmask.models import load_model

    path = find_segmenter(run, stage)
    segmenter, spec = load_model(path)
    metadata = describe_run(run, spec, stage)
    return export_onnx(segmenter, input_size(spec, path), out, metadata, float(metadata["threshold"]))


def _lines(facts: dict[str, Any]) -> list[str]:
    parity = facts["parity"]
    return [
        f"{facts['file']}: {facts['megabytes']:.2f} MB, {_short(facts['num_parameters'] / 1e6)} M parameters, "
        f"network input {facts['size']}x{facts['size']}, threshold {facts['threshold']:g}",
        _costs(facts),
        f"Against torch on {parity['num_images']} probe images: probabilities differ by at most "
        f"{parity['exact_difference']:.1e} where the resize is exact, {parity['max_difference']:.1e} elsewhere "
        f"(mean {parity['mean_difference']:.1e}), "
        f"{100 * parity['mask_disagreement']:.4f} % of mask pixels differ",
        *map(_time, facts["latency"]),
    ]


def _costs(facts: dict[str, Any]) -> str:
    own = f"{_short(facts['gmacs'])} GMac at {facts['size']}x{facts['size']}"
    if facts["size"] == 256 or facts["gmacs_256"] is None:
        return f"{own} (multiplications and additions of one image)"
    return f"{own}, {_short(facts['gmacs_256'])} at 256x256 (multiplications and additions of one image)"


def _time(row: dict[str, Any]) -> str:
    what = "network alone" if row["network_only"] else "photo"
    return (
        f"{row['width']}x{row['height']} {what}, {row['threads']} thread{'s' if row['threads'] > 1 else ''}: "
        f"p50 {row['p50_ms']:.1f} ms, p95 {row['p95_ms']:.1f} ms"
    )


def _short(value: float) -> str:
    """Return two decimals, or two digits of what is below 0.1."""
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"
