"""``fastalign bench gpu``: what only a GPU can decide, in order of value, in one call of less than nine minutes.

`GPU_QUEUE.md` lists the claims. Each part has a time limit of its own and is recorded when it is done, so that one that
fails or hangs does not lose the others; what no time is left for is worth least. On a machine without this package's
dependencies, ``python bench/gpu.py --wheels FOLDER`` starts with nothing but Python and PyTorch.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REPORT_SECONDS = 25


@dataclass(frozen=True)
class Part:
    """A command that is given at most so many seconds; its output is appended to the log of that name."""

    log: str
    seconds: int
    words: str


def bench(seconds: int, words: str, log: str = "bench") -> Part:
    """A command of `bench` on the device."""
    return Part(log, seconds, f"-m bench {words} --device DEVICE")


RECORD = "--record --results OUT"
HEAD = "linear_loss-131072,linear_loss-qwen3-8b,linear_loss-frozen-131072,linear_logps-*-131072"
LOGITS = "token_logps,policy_loss,preference_loss"
MEMORY = "linear_loss-131072,linear_loss-dpo-long --who fastalign,TRL --enforce"
MORE = "linear_loss-dpo,linear_loss-grpo,linear_loss-masked,linear_loss-adapter,linear_loss-fp16,gemma2,llama3"
LOSSES = "linear_loss-131072,policy_loss-131072"
PARTS = (
    Part("tests", 130, "-m pytest -q -p no:cacheprovider --continue-on-collection-errors tests -m gpu"),
    bench(90, f"ops --only {HEAD} --seconds 3 --no-compile {RECORD}"),
    bench(90, f"train --model 0.5b --dtype bfloat16 --steps 12 {RECORD}"),
    bench(60, f"ops --only {LOGITS} --seconds 2 --no-compile {RECORD}"),
    bench(40, f"memory --only {MEMORY} --no-compile {RECORD}"),
    bench(50, f"ops --only {MORE} --seconds 2 --no-compile {RECORD}"),
    bench(25, f"ops --only divergence --seconds 1 --no-compile {RECORD}"),
    bench(20, f"ops --only gae,segment_scan,attention,forest_decode --seconds 1 --no-compile {RECORD}"),
    bench(40, f"ops --only {LOSSES} --seconds 2 {RECORD}"),
    bench(40, f"ops --only {LOSSES} --rounds 1 --no-compile --profile", "profile"),
)
ON_POLICY = (
    bench(75, f"rollout --model 0.5b --dtype bfloat16 --rounds 2 {RECORD}"),
    bench(50, f"rollout --model 0.5b --dtype bfloat16 --prompts 32 --rounds 1 {RECORD}"),
    bench(100, f"train --task grpo --model 0.5b --dtype bfloat16 --steps 5 {RECORD}"),
)
"""Tokens per second beside transformers' `generate`, 64 and 256 rows at once, and whole GRPO steps beside TRL's."""
QUICK = (
    Part("tests", 130, "-m pytest -q -p no:cacheprovider tests/test_layers.py"),
    bench(60, f"ops --only gae-one --rounds 1 --no-compile {RECORD}"),
    bench(60, f"rollout --prompts 1 --answers 2 --tokens 4 --rounds 1 {RECORD}"),
)


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    new = parser.add_argument
    new("--device", choices=["cpu", "cuda"], default="cuda", help="cpu: to try the script (default cuda)")
    new("--out", type=Path, help="where logs and results go (default: bench/results/gpu-<time>)")
    new("--minutes", type=float, help="time for everything (default 8.5, with --on-policy 3.5)")
    new("--on-policy", action="store_true", help="only sampling and whole GRPO steps, in less than four minutes")
    new("--wheels", type=Path, help="folder of packages that are missing here, to put on the path first")
    new("--quick", action="store_true", help="one small part of each kind, to try the script")


def main(options: argparse.Namespace) -> int:
    """Run the parts, and draw a report of what was recorded; the exit code."""
    out = (options.out or ROOT / "bench" / "results" / f"gpu-{time.strftime('%Y%m%d-%H%M%S')}").resolve()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as spare:
        parts = QUICK if options.quick else ON_POLICY if options.on_policy else PARTS
        minutes = options.minutes if options.minutes is not None else 3.5 if parts is ON_POLICY else 8.5
        call = Call(out, options.device, 60 * minutes, Path(spare, "site"))
        prepare(call, options.wheels)
        done = [call.run(part) for part in parts]
        call.end += REPORT_SECONDS
        if any(out.glob("*.json")):
            call.run(Part("bench", REPORT_SECONDS, f"-m bench report --results OUT --out {out / 'report'}"))
    call.say("done")
    return int(not all(done))


def prepare(call: Call, wheels: Path | None) -> None:
    """Install what is missing, say what is here, and build the extension where it is missing."""
    if wheels is not None:
        files = " ".join(map(str, sorted(wheels.glob("*.whl"))))
        call.run(Part("bench", 60, f"-m pip install -q --no-index --no-deps --target {call.site} {files}"))
    if not any((ROOT / "fastalign").glob("_C*.so")):  # Triton and torch serve where the build fails
        call.run(Part("bench", 150, "setup.py build_ext --inplace"))
    call.run(Part("bench", 60, "-m fastalign info"))


class Call:
    """One call: where the output of its parts goes, and the time that is left."""

    def __init__(self, out: Path, device: str, seconds: float, site: Path) -> None:
        self.out, self.device, self.site = out, device, site
        self.began = time.monotonic()
        self.end = self.began + seconds
        paths = [str(ROOT), str(ROOT / "kernels"), str(site), os.environ.get("PYTHONPATH", "")]
        more = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
        self.environment = {**os.environ, **more, "TOKENIZERS_PARALLELISM": "false"}

    def say(self, text: str) -> None:
        """A line on the terminal and in ``summary.txt``."""
        line = f"[{time.monotonic() - self.began:.0f} s] {text}"
        print(line, flush=True)
        with (self.out / "summary.txt").open("a") as file:
            print(line, file=file)

    def run(self, part: Part) -> bool:
        """Run a part within its limit and the time left; whether it ended well."""
        words = part.words.replace("DEVICE", self.device).replace("OUT", str(self.out)).split()
        limit = min(part.seconds, self.end - time.monotonic())
        if limit < 5:
            self.say(f"no time left: {part.words}")
            return False
        began = time.monotonic()
        with (self.out / f"{part.log}.log").open("a") as log:
            print("+", *words, file=log, flush=True)
            try:
                code = subprocess.run(
                    [sys.executable, *words], cwd=ROOT, env=self.environment, timeout=limit, stdout=log, stderr=log
                ).returncode
            except subprocess.TimeoutExpired:
                self.say(f"STOPPED after {limit:.0f} s: {part.words}")
                return False
        self.say(f"exit {code} in {time.monotonic() - began:.0f} s: {part.words}")
        return code == 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    arguments(parser)
    sys.exit(main(parser.parse_args()))
