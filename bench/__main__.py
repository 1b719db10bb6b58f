"""``python -m bench COMMAND``, which is also ``fastalign bench COMMAND``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

COMMANDS = {
    "ops": ("bench.ops", "time every op beside its peers"),
    "train": ("bench.train", "time whole training steps beside TRL's"),
    "learn": ("bench.learn", "see that every on-policy algorithm learns, and that a collapse is told"),
    "ablation": ("bench.ablation", "time a DPO step with one part after the other: packing, sharing and more"),
    "saves": ("bench.saves", "measure how long a checkpoint holds a run up"),
    "soak": ("bench.soak", "kill ranks of a run again and again, and see that it ends as one that was left alone"),
    "rollout": ("bench.rollout", "sample beside transformers, in tokens per CPU-second"),
    "sharing": ("bench.sharing", "time steps with shared and with repeated prompts"),
    "memory": ("bench.memory", "measure peak memory beside the peers and the planner's figure"),
    "plan": ("bench.plan", "measure what `fastalign plan` predicts of memory"),
    "overlap": ("bench.overlap", "profile what packing and transfers take beside a step, on ranks of this CPU"),
    "scaling": ("bench.scaling", "model steps on 8 to 1024 GPUs; nothing is measured"),
    "ladder": ("bench.ladder", "measure what each setting that saves memory saves, and what it costs"),
    "gpu": ("bench.gpu", "do everything that a GPU is needed for, in less than nine minutes"),
    "report": ("bench.report", "draw the recorded results: plots and one HTML page"),
}
"""Command -> the module with its ``arguments`` and ``main``, and its line of help."""


class Parser(argparse.ArgumentParser):
    """A parser that answers a mistake with one line."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and how to learn more."""
        self.exit(2, f"{self.prog}: error: {message} (all options: {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = Parser(prog="fastalign bench", description="How fastalign stands against its peers.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{" + ",".join(COMMANDS) + "}")
    modules = {}
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name in argv[:1]:  # the others bring torch and more for nothing
            modules[name] = import_module(module)
            modules[name].arguments(command)
    options = parser.parse_args(argv)
    try:
        return modules[options.command].main(options)
    except (ValueError, OSError) as error:
        print(f"fastalign bench: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
