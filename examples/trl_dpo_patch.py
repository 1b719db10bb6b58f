"""TRL's DPOTrainer before and after one line: the same losses, the time of a step and the peak of memory.

Every side trains the same Llama on the same pairs, in a process of its own:

    TRL        trl.DPOTrainer as it is
    patch()    the same trainer inside ``fastalign.integrations.trl.patch()``
    packed     ``fastalign.integrations.trl.DPOTrainer``: besides, no padding, and prompts computed once

    python examples/trl_dpo_patch.py
    python examples/trl_dpo_patch.py --hidden 512 --vocab 16384 --steps 12
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

SIDES = {"trl": "TRL", "patch": "patch()", "packed": "packed"}
UNTIMED = 2
"""First steps: memory is allocated, kernels are warmed up, the first packed batch is verified."""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps, the first two not timed")
    parser.add_argument("--pairs", type=int, default=8, help="pairs per step")
    parser.add_argument("--hidden", type=int, default=256, help="hidden size of the four-layer Llama")
    parser.add_argument("--vocab", type=int, default=8192, help="entries of tokenizer and head")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads of each side")
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Train one side in this process: losses and seconds of each step, and the peak of memory over the start in MiB."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from fastalign.data import builtin
    from fastalign.integrations import trl as fast

    times, start = [], []

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            start.append(rss())
            times.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

    def model(seed: int) -> LlamaForCausalLM:
        torch.manual_seed(seed)
        sizes = {"hidden_size": options.hidden, "intermediate_size": 2 * options.hidden, "num_hidden_layers": 4}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 1024}
        return LlamaForCausalLM(LlamaConfig(vocab_size=options.vocab, pad_token_id=0, **sizes, **heads))

    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as directory:
        args = DPOConfig(
            directory,
            max_steps=options.steps,
            per_device_train_batch_size=options.pairs,
            max_length=512,
            learning_rate=1e-4,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        rows = builtin.docstring_pairs().select(range(options.steps * options.pairs))
        trainer = (fast.DPOTrainer if options.side == "packed" else DPOTrainer)(
            model=model(0),
            ref_model=model(1),
            args=args,
            train_dataset=rows.select_columns(["prompt", "chosen", "rejected"]),
            processing_class=builtin.train_tokenizer(options.vocab),
            callbacks=[Clock()],
        )
        with fast.patch() if options.side == "patch" else contextlib.nullcontext():
            trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    seconds = [after - before for before, after in itertools.pairwise(times)]
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    return {"losses": losses, "seconds": seconds, "peak_mib": peak - start[0]}


def rss() -> float:
    """Resident memory of this process in MiB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def run(side: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Train one side in a fresh process."""
    print(f"{SIDES[side]} ...", flush=True)
    command = [sys.executable, __file__, *arguments, "--side", side]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{SIDES[side]} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def show(results: dict[str, dict[str, Any]]) -> None:
    """Each side's median step, peak of memory over the start, and largest distance of its losses from TRL's."""
    table = Table("", "s/step", "faster", "peak MiB", "first loss", "last loss", "apart")
    theirs = results["trl"]
    slow = statistics.median(theirs["seconds"][UNTIMED:])
    for side, result in results.items():
        seconds = statistics.median(result["seconds"][UNTIMED:])
        losses = result["losses"]
        apart = max(abs(a - b) for a, b in zip(losses, theirs["losses"], strict=True))
        numbers = f"{seconds:.3f}", f"{slow / seconds:.2f}x", f"{result['peak_mib']:.0f}"
        table.add_row(SIDES[side], *numbers, f"{losses[0]:.6f}", f"{losses[-1]:.6f}", f"{apart:.1e}")
    Console().print(table)


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Run every side and print the table; returns what was measured."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    if options.side:
        print(json.dumps(train(options)))
        return {}
    if options.steps <= UNTIMED:
        raise SystemExit(f"--steps must be more than the {UNTIMED} that are not timed, got {options.steps}")
    results = {side: run(side, arguments) for side in SIDES}
    show(results)
    return results


if __name__ == "__main__":
    main()
