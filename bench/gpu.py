"""``fastalign bench gpu``: `gpu.sh`, which does everything that a GPU is needed for in one call."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path

from bench import common, run


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    run.device_argument(parser)
    parser.add_argument("--out", type=Path, help="where the logs go (default: bench/results/gpu-<time>)")
    parser.add_argument("--minutes", type=float, default=8.5, help="time for everything (default 8.5)")
    parser.add_argument("--quick", action="store_true", help="one round of a few cases of each part, to try the script")


def main(options: argparse.Namespace) -> int:
    """Run the script; its exit code."""
    run.setting_of(options)
    out = (options.out or common.RESULTS / f"gpu-{datetime.now():%Y%m%d-%H%M%S}").resolve()
    settings = {"OUT": str(out), "DEVICE": options.device, "SECONDS_IN_ALL": str(int(60 * options.minutes))}
    settings |= {"PYTHON": sys.executable} | ({"QUICK": "1"} if options.quick else {})
    script = Path(__file__).with_suffix(".sh")
    return subprocess.run(["bash", str(script)], cwd=common.ROOT, env={**os.environ, **settings}).returncode
