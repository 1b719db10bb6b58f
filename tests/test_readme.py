"""README, docs and examples keep their word: Python and commands run, settings exist, links lead somewhere."""

import functools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import forks
import pytest
import yaml
from torch.distributed import run as torchrun

from fastalign import cli
from fastalign.arguments import parse_config
from fastalign.data import builtin
from fastalign.engine.methods import METHODS
from fastalign.engine.output import report

ROOT = Path(__file__).resolve().parents[1]
PAGES = {path: path.read_text() for path in [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
BLOCKS = FENCE.findall(PAGES[ROOT / "README.md"])
FIRST = [*BLOCKS, *FENCE.findall(PAGES[ROOT / "docs" / "training.md"])]
"""What a newcomer reads and types, in order."""
EXAMPLES = sorted(path for path in (ROOT / "examples").rglob("*.yaml") if path.name != "kubernetes.yaml")
FEW = [
    *("--run.steps", "1", "--data.limit", "24", "--batch.size", "4"),
    *("--data.eval_path", "null", "--data.eval_fraction", "0.2"),
]
"""Enough to come to the end of a run, its evaluation and its export."""
load_once = functools.cache(builtin.load)
"""A second for each of the commands."""
HERE = ("builtin:", "runs/")
"""How data begin that the hub is not needed for."""
ABSENT = ("run.yaml", "PATH")
"""Stand for files and models of the reader."""


def commands(text: str) -> list[list[str]]:
    """The command lines of a text in words, comments left out."""
    lines = re.findall(r"^(?:#? {2,})?((?:fastalign|torchrun) .*)$", re.sub(r"\\\n#?", "", text), re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


README = list({tuple(words): words for language, text in FIRST if not language for words in commands(text)}.values())
WRITTEN = [
    words
    for page in PAGES.values()
    for language, text in FENCE.findall(page)
    if language in ("", "sh")
    for words in commands(text)
]
HEADS = {
    str(path.relative_to(ROOT / "examples")): commands("".join(re.findall(r"^#.*\n", path.read_text(), re.M)))
    for path in EXAMPLES
}


def training(words: list[str]) -> tuple[str, list[str]] | None:
    """The method and the flags of a command that trains, under torchrun too; None for other commands."""
    place = next((i for i, word in enumerate(words) if word in METHODS), None)
    return None if place is None else (words[place], words[place + 1 :])


def needs_hub(words: list[str]) -> bool:
    """Whether a command takes its data from the hub; those examples say so."""
    file = next((word for word in words if word.startswith("examples/") and word.endswith(".yaml")), None)
    return file is not None and not yaml.safe_load((ROOT / file).read_text())["data"]["path"].startswith(HERE)


def is_runnable(words: list[str]) -> bool:
    """Whether a command can run here, as it stands."""
    return not needs_hub(words) and not any(word in ABSENT for word in words) and "--help" not in words


def runs_only_here(words: list[str]) -> bool:
    """Whether a command at the head of an example is not one of the README's, which another test runs."""
    return is_runnable(words) and words not in README


@pytest.fixture
def clone(tmp_path, monkeypatch, new_cache):
    """A directory that looks like a fresh clone, with the examples and no runs; the built-in text is made already."""
    monkeypatch.setattr(builtin, "load", load_once)
    monkeypatch.setenv("FASTALIGN_CACHE", new_cache(tmp_path / "cache"))
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for name in ("HF_HUB_VERBOSITY", "HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, os.environ.get(name, "error" if "VERBOSITY" in name else "1"))
    monkeypatch.setattr(report, "plots", lambda records: "")  # a second of drawing per run
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(words: list[str]) -> forks.Forked | None:
    """Run a command, if it trains with few steps and rows: torchrun's as ranks that go on, others in this process."""
    words = words + (FEW if training(words) or "ref-logps" in words else [])
    if words[0] == "torchrun":
        options = torchrun.parse_args(words[1:])  # what it starts, test_interrupt.py has it start
        assert options.module and options.training_script == "fastalign"
        ranks = int(options.nproc_per_node)
        return forks.Forked("fastalign", *options.training_script_args, ranks=ranks, cwd=Path.cwd())
    try:
        code = cli.main(words[1:])
    except SystemExit as stop:  # --print_config
        code = stop.code
    assert code == 0, shlex.join(words)
    return None


def test_python_blocks_run_in_order():
    namespace = {}
    for number, block in enumerate(text for language, text in BLOCKS if language == "python"):
        exec(compile(block, f"README block {number}", "exec"), namespace)
    assert namespace["loss"].isfinite() and namespace["weight"].grad.isfinite().all()


@pytest.mark.slow
def test_commands_of_the_readme_run_in_order_in_a_fresh_clone(clone):
    ran = [words for words in README if words[1] != "bench" and is_runnable(words)]
    processes = [process for words in ran if (process := run(words))]
    for process in processes:
        output, _ = process.communicate()
        assert process.returncode == 0, output
    assert sum(training(words) is not None for words in ran) >= 9
    assert {"report", "ref-logps"} < {words[1] for words in ran}
    left = [path.parent.name for path in clone.glob("runs/*/report.html")]
    assert {"sft", "distill", "reward", "dpo", "dpo_ranks", "lora", "more"} == {*left}


ALONE = [name for name in HEADS if "/" not in name and any(map(runs_only_here, HEADS[name]))]


@pytest.mark.parametrize("name", ALONE)
def test_commands_at_the_head_of_an_example_run(clone, name):
    for words in filter(runs_only_here, HEADS[name]):
        run(words)


def test_solutions_of_gsm8k_are_ranked_as_the_example_says(clone):
    text = (ROOT / "examples" / "rank_gsm8k.py").read_text()
    rank = re.search(r"^    python (examples/rank_gsm8k.py \S+ \S+)$", text, re.M)[1].split()
    solved = {"solution": "1 + 1 = 2\nA: 2", "is_correct": True}, {"solution": "A: 3", "is_correct": False}
    row = {"question": "1 + 1?", "ground_truth": "It is 2.", "6B": solved[0], "175B": solved[1]}
    Path(rank[1]).write_text(f"{json.dumps(row)}\n" * 30)
    subprocess.run([sys.executable, *rank], check=True)
    (train,) = commands(text.replace(" \\\n       ", ""))
    run([*train, "--data.eval_fraction", "0.2"])


def test_gsm8k_is_learned_from_a_file_of_it(clone):
    shared = Path(os.environ.get("FASTALIGN_SHARED", ROOT.parent / "shared")) / "data" / "gsm8k" / "train.jsonl"
    sums = [{"question": f"What is {i} + 1?", "answer": f"{i} + 1 = {i + 1}\n#### {i + 1}"} for i in range(30)]
    made = map(json.dumps, sums)
    Path("train.jsonl").write_text("\n".join(shared.read_text().splitlines()[:30] if shared.exists() else made))
    local = ["--data.path", "train.jsonl", "--data.name", "null"]
    run([*HEADS["gsm8k/sft.yaml"][0], *local])
    run([*HEADS["gsm8k/grpo.yaml"][-1], *local, "--sampler.max_new_tokens", "8"])
    (record,) = map(json.loads, Path("runs/gsm8k/grpo/metrics.jsonl").read_text().splitlines())
    assert {"rewards/gsm8k/mean", "rewards/format/mean", "eval_reward"} <= record.keys()


def test_training_commands_of_every_page_parse(monkeypatch):
    monkeypatch.chdir(ROOT)
    found = [training(words) for words in WRITTEN if training(words) and "--help" not in words]
    for method, flags in found:
        if all(Path(word).exists() for word in flags if word.endswith(".yaml")):  # others are the reader's
            parse_config(method, [word for word in flags if word != "--print_config"])
    assert len(found) > 20


def test_commands_of_every_page_exist():
    known = {*METHODS, *cli.COMMANDS}
    asked = [words[1] for words in WRITTEN if words[0] == "fastalign"]
    assert [word for word in asked if word not in known and word.isascii() and word.islower()] == []


def headings(page: str) -> set[str]:
    """The anchors of a page, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", FENCE.sub("", page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_lead_to_files_and_headings():
    links = [
        (path, target, anchor)
        for path, page in PAGES.items()
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)", FENCE.sub("", page))
    ]
    for path, target, anchor in links:
        there = (path.parent / target).resolve() if target else path
        assert there.exists(), f"{path.name}: {target}"
        assert not anchor or anchor in headings(there.read_text()), f"{path.name}: {target}#{anchor}"
    assert len(links) > 30


def test_the_files_of_a_task_run_after_its_sft(clone):
    """The commands at their heads parse; an algorithm, and a reward model with what learns from it, run."""
    for words in (words for name in HEADS if "/" in name for words in HEADS[name] if training(words)):
        parse_config(*training(words))
    for name in ("sft", "grpo", "reward", "ppo_reward_model"):
        run(HEADS[f"sort_letters/{name}.yaml"][-1])


@pytest.mark.parametrize("name", HEADS)
def test_an_example_that_needs_the_hub_says_so_and_names_one_that_does_not(name):
    path = ROOT / "examples" / name
    text = path.read_text()
    if not needs_hub([f"examples/{name}"]):
        return
    sibling = re.search(
        r"Needs the Hugging\s(?:# )?Face hub.*?(examples/\S+\.yaml)\s(?:# )?does the\s(?:# )?same", text, re.S
    )
    assert sibling and not needs_hub([sibling[1]])
    lines = [line for line in PAGES[ROOT / "docs" / "training.md"].splitlines() if f"examples/{name}" in line]
    assert lines and all("needs the hub: " in line for line in lines)


def test_yaml_blocks_are_configurations(tmp_path):
    for text in (text for page in PAGES.values() for language, text in FENCE.findall(page) if language == "yaml"):
        if "method:" not in text:
            continue
        (tmp_path / "run.yaml").write_text(text)
        assert parse_config(yaml.safe_load(text)["method"], ["--config", str(tmp_path / "run.yaml")])
