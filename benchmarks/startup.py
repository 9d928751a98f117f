"""How long a user waits for `--help` and for one mask: whole processes, by the clock.

    python -m benchmarks.startup MODEL.onnx PHOTO.jpg --out benchmarks/results

`predict` runs with torch made unimportable, as on a small computer that has only NumPy, Pillow and ONNX Runtime.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NO_TORCH = "import sys; sys.modules['torch'] = None; sys.argv = {argv!r}; from fewmask.__main__ import main; main()"


def seconds(command: list[str], repeats: int) -> dict[str, float]:
    """Return the median and extremes of a command's wall time, after one run that is not counted."""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - began)
    counted = times[1:]
    return {"median": statistics.median(counted), "min": min(counted), "max": max(counted)}


def main() -> None:
    """Measure both and write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("photo", type=Path)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        argv = ["fewmask", "predict", str(args.model), str(args.photo), "--out", scratch]
        result = {
            "help_s": seconds([sys.executable, "-m", "fewmask", "--help"], args.repeats),
            "predict_s": seconds([sys.executable, "-c", NO_TORCH.format(argv=argv)], args.repeats),
        }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "startup.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
