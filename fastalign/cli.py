"""The command line: ``fastalign METHOD --config run.yaml --loss.beta 0.2``.

Nothing heavy is imported before a command needs it. A mistake of the user is answered with one line.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from fastalign.arguments import UsageError, asked_method, nearest, own_flags, parse_config, parse_sections
from fastalign.commands import GenerateConfig, PlanConfig, RlaifConfig, ScoreConfig, SelectConfig
from fastalign.config import DataConfig, ModelConfig, SamplerConfig
from fastalign.disk import kept_from_others
from fastalign.engine.interrupt import handled
from fastalign.engine.methods import METHODS, families
from fastalign.process import is_rank_0, prepare_process
from fastalign.run_commands import compare, export, init, merge, replay, report

LAST_WORDS = "FASTALIGN_LAST_WORDS"
"""Names the file in which rank 0 leaves to ``fastalign torchrun`` what an interrupted run says."""
SECONDS_TO_BE_STOPPED = 10
"""How long a rank whose peer is gone waits for torchrun to notice and stop the others."""


def main(argv: list[str] | None = None) -> int:
    """Run one command and return the exit code.

    0; 1 when the run fails, 2 for bad usage, 128 + the number of the signal that ended it: 130 Ctrl-C, 143 SIGTERM,
    138 SIGUSR1, which Slurm sends to a job that it will start again.
    """
    try:
        with handled(), after_lost_peers(), kept_from_others():
            return run_command(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt as stop:
        return leave(str(stop) or "interrupted", code=getattr(stop, "code", 130))
    except UsageError as error:
        return fail(str(error), code=2)
    except MemoryError as error:
        said = f"out of memory: {error}" if str(error) else "out of memory"
        return fail(f"{said}; lower batch.tokens, batch.size or data.max_length", code=1)
    except (ValueError, OSError, ImportError) as error:
        return fail(str(error), code=1)


def fail(message: str, code: int) -> int:
    """Print an error as one line, after the traceback if FASTALIGN_DEBUG=1."""
    if os.environ.get("FASTALIGN_DEBUG", "0") not in ("", "0"):
        traceback.print_exc()
    line = f"fastalign: error: {' '.join(message.split())}"
    if not is_rank_0():
        # Print an error of all ranks once: while this one sleeps, rank 0's exit makes torchrun stop the others.
        with quiet_end():
            time.sleep(10)
    write_error_file(line)
    print(line, file=sys.stderr, flush=True)
    return code


@contextlib.contextmanager
def quiet_end() -> Iterator[None]:
    """A rank that torchrun stops meanwhile has not failed by itself: torchrun would list it beside the one that has."""
    before = signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def write_error_file(line: str) -> None:
    """Leave the line where torchrun looks for the reason of a failure: its report then ends with it."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        reason = {"message": {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}}
        with contextlib.suppress(OSError):  # the line itself is printed anyway
            Path(path).write_text(json.dumps(reason), encoding="utf-8")


@contextlib.contextmanager
def after_lost_peers() -> Iterator[None]:
    """A collective that fails since another rank has died is no error of this one: torchrun is about to stop it."""
    try:
        yield
    except ConnectionError as error:
        if type(error).__name__ == "LostRank":  # of a module that brings torch
            time.sleep(SECONDS_TO_BE_STOPPED)
        raise


def leave(message: str, code: int) -> int:
    """End an interrupted run: rank 0 reports it and exits first, as torchrun kills whoever is left."""
    if not is_rank_0():
        time.sleep(3)
        return code
    if path := os.environ.get(LAST_WORDS):  # the launcher prints it, with the rank that caused it
        with contextlib.suppress(OSError):
            Path(path).write_text(message, encoding="utf-8")
            return code
    return fail(message, code)


def run_command(argv: list[str]) -> int:
    """Find the command in ``argv`` and run it on the arguments that follow."""
    name, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if name in ("-h", "--help", "help"):
        print(usage())
        return 0
    if name in METHODS:
        return train(name, rest)
    command = COMMANDS.get(name.removeprefix("--"))
    if command is None:
        raise UsageError(f"unknown command {name!r}{nearest(name, [*METHODS, *COMMANDS])} (all: fastalign --help)")
    return command(rest)


def usage() -> str:
    """The text of ``fastalign --help``."""
    lines = [(name, method.help) for name, method in METHODS.items()]
    lines += [(name, str(command.__doc__)) for name, command in COMMANDS.items()]
    commands = "\n".join(f"  {name:13}{text[0].lower()}{text[1:].rstrip('.')}" for name, text in lines)
    return (
        "usage: fastalign COMMAND [--config run.yaml] [--section.key value ...]\n\n"
        f"Align language models.\n\ncommands:\n{commands}\n\n"
        "fastalign COMMAND --help       every setting, with its default\n"
        "fastalign dpo --print_config   the settings as YAML\n"
        "torchrun --nproc-per-node 2 -m fastalign dpo --config run.yaml"
    )


def train(method: str, argv: list[str]) -> int:
    """Train with one method."""
    prepare_process()
    config = parse_config(method, argv)
    from fastalign.engine.train import train as run  # brings transformers and datasets

    note = run(config)
    if is_rank_0():
        made = [
            name for name in ("model/", "metrics.jsonl", "report.html") if Path(config.run.output_dir, name).exists()
        ]
        print(f"done: {config.run.output_dir} holds {', '.join(made)}{f'; but {note}' if note else ''}")
    return 0


def ref_logps(argv: list[str]) -> int:
    """Compute the reference's log-probs ahead of runs: fastalign ref-logps [METHOD] --config run.yaml."""
    named = argv[:1] if argv and argv[0] in METHODS else []
    words = argv[len(named) :]
    prepare_process()
    config = parse_config(named[0] if named else asked_method(words, default="dpo"), words)
    from fastalign.engine.reference.precompute import precompute  # brings transformers and datasets

    summary = precompute(config)
    if is_rank_0():
        print(summary)
    return 0


def plan(argv: list[str]) -> int:
    """Predict a run's memory, communication and time: fastalign plan [METHOD] --config run.yaml --gpus 8."""
    named = argv[:1] if argv and argv[0] in METHODS else []
    asked, words = own_flags("plan", "predict a run's memory, communication and time", argv[len(named) :], PlanConfig)
    prepare_process()
    config = parse_config(named[0] if named else asked_method(words, default="dpo"), words)
    from fastalign.engine.plan.command import plan as run  # brings transformers and datasets

    text, fits = run(config, asked)
    print(text)
    return 0 if fits else 1


def pipeline(name: str, help: str, *kinds: type) -> Callable[[list[str]], int]:
    """A command that trains nothing: the function of a module of `fastalign.pipelines`, both named as it is.

    Args:
        name: of the command.
        help: what it does, and behind a colon an example.
        kinds: its settings, its own first; the function takes them in this order.
    """
    sections = {name: kinds[0], **{section_name(kind): kind for kind in kinds[1:]}}

    def run(argv: list[str]) -> int:
        prepare_process()
        settings = parse_sections(name, (help[0].lower() + help[1:]).partition(": fastalign")[0], argv, sections)
        module = importlib.import_module(f"fastalign.pipelines.{name}")  # brings transformers and datasets
        print(getattr(module, name)(*(settings[section] for section in sections)))
        return 0

    run.__doc__ = help
    return run


def section_name(kind: type) -> str:
    """The section of a configuration that a class describes: `sampler` for `SamplerConfig`."""
    return kind.__name__.removesuffix("Config").lower()


def info(argv: list[str]) -> int:
    """Print versions, devices, and each op's backend with the reason."""
    parser = argparse.ArgumentParser(prog="fastalign info", description=info.__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    as_json = parser.parse_args(argv).json
    from fastalign.info import collect, render  # brings torch

    print(render(collect(), as_json))
    return 0


def methods(argv: list[str]) -> int:
    """Print every loss with formula, source, settings and a command."""
    argparse.ArgumentParser(prog="fastalign methods", description=methods.__doc__).parse_args(argv)
    from fastalign.losses.catalogue import page  # brings torch
    from fastalign.rl import algorithms

    print(page(families()) + algorithms.page(), end="")
    return 0


def version(argv: list[str]) -> int:
    """Print the version of fastalign."""
    argparse.ArgumentParser(prog="fastalign version", description=version.__doc__).parse_args(argv)
    from fastalign import __version__

    print(f"fastalign {__version__}")
    return 0


def bench(argv: list[str]) -> int:
    """Measure fastalign beside its peers: ops, training, memory; see bench --help."""
    root = Path(__file__).resolve().parents[1]  # the package never imports bench, which is no part of it
    if not (root / "bench" / "__main__.py").exists():
        raise UsageError(
            f"no bench/ beside the package in {root}: the benchmarks come with the repository; "
            "clone it, install it with `pip install -e .` and run this again"
        )
    path = os.pathsep.join([str(root), str(root / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])])
    # The folder that the command is given in stays out of the search: it may hold a `bench` of its own.
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    return subprocess.run([sys.executable, "-m", "bench", *argv], env=environment).returncode


def torchrun(argv: list[str]) -> int:
    """Start a command on several ranks, as torchrun does, but end with one line when it fails."""
    if not argv or argv[0] in ("-h", "--help"):
        print(
            "usage: fastalign torchrun --nproc-per-node 2 METHOD --config run.yaml\n\nThe options are torchrun's own."
        )
        return 0 if argv else 2
    from torch.distributed import run

    options = run.parse_args(["-m", *argv])  # takes what is no option for the module to run
    command = [options.training_script, *options.training_script_args]
    command = command[command[0] == "fastalign" :]  # `-m fastalign` may be written out, as for torchrun
    options.training_script, options.training_script_args = "fastalign", command
    options.signals_to_handle += ",SIGUSR1"  # of Slurm: passed on to the ranks
    logging.disable(logging.ERROR)  # of the launcher alone: the ranks are processes of their own
    os.environ.pop("RANK", None)  # which would be that of another launch
    with tempfile.TemporaryDirectory() as folder:
        words = Path(folder, "words")
        os.environ[LAST_WORDS] = str(words)
        code, reason = run_ranks(options)
        del os.environ[LAST_WORDS]
        said = [reason, words.read_text(encoding="utf-8") if words.exists() else ""]
    speaks = code != 0 and any(said)  # after a restart that went well there are words of the launch before
    return fail("; ".join(filter(None, said)), code) if speaks else code  # a rank that failed by itself has said why


def run_ranks(options: argparse.Namespace) -> tuple[int, str]:
    """Start the ranks and wait for them: the exit code, and the reason of a failure that no rank could report."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        run.run(options)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            return 128 - failure.exitcode, f"rank {rank} was stopped by {failure.signal_name()}"
        return failure.exitcode, ""
    except SignalException as error:  # passed on to the ranks
        return 128 + error.sigval, ""
    except KeyboardInterrupt:
        return 130, ""
    return 0, ""


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "init": init,
    "ref-logps": ref_logps,
    "plan": plan,
    "generate": pipeline(
        "generate",
        "Sample completions of prompts into a file: fastalign generate --model.path DIR --prompts FILE.",
        *(GenerateConfig, ModelConfig, SamplerConfig, DataConfig),
    ),
    "score": pipeline(
        "score",
        "Give the completions in a file rewards: fastalign score --model.path DIR --samples FILE --rewards '[...]'.",
        *(ScoreConfig, ModelConfig, DataConfig),
    ),
    "select": pipeline(
        "select",
        "Select rows worth training on, by filters and a core set: fastalign select --data.path FILE --out FILE.",
        *(SelectConfig, DataConfig, ModelConfig),
    ),
    "rlaif": pipeline(
        "rlaif",
        "Make data by AI feedback, revised answers or labelled pairs: fastalign rlaif --stage revise --model.path DIR.",
        *(RlaifConfig, ModelConfig, SamplerConfig, DataConfig),
    ),
    "replay": replay,
    "report": report,
    "compare": compare,
    "export": export,
    "merge": merge,
    "torchrun": torchrun,
    "info": info,
    "methods": methods,
    "bench": bench,
    "version": version,
}
