"""Starting runs and reading what they leave."""

import json
from pathlib import Path
from typing import Any

import forks
import yaml

from fastalign.config import Config, as_dict
from fastalign.engine.output.metrics import WORK

ROOT = Path(__file__).resolve().parents[2]
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LAYOUT = (
    "num_micro_batches",
    "share_ratio",
    "tokens_computed",
    "flops_model",
    "packing_efficiency",
    "padding_fraction",
)
"""Fields that tell how the work was split; everything else is about the run itself."""
CLOCK = ("t_", "wall_time", "peak_memory", "mfu", *(f"{name}_per_second" for name in WORK))


def override(config: Config, values: dict[str, Any]) -> Config:
    for key, value in values.items():
        section, _, name = key.partition(".")
        if section == "loss":
            config.loss[name] = value
        else:
            assert hasattr(getattr(config, section), name), key
            setattr(getattr(config, section), name, value)
    return config


def write_yaml(config: Config) -> Path:
    """The settings as a file beside the run."""
    Path(config.run.output_dir).parent.mkdir(parents=True, exist_ok=True)
    path = Path(config.run.output_dir + ".yaml")
    settings = yaml.safe_load(json.dumps(as_dict(config)))
    path.write_text(yaml.safe_dump({k: v for k, v in settings.items() if v or k != "loss"}))
    return path


def launch(config: Config, path: Path, *place: object, cwd: Path = ROOT) -> forks.Forked:
    """The same run under torchrun, whose options are ``place`` and whose ranks Python starts."""
    paths = f"{ROOT}:{ROOT / 'kernels'}"
    words = (*place, "-m", "fastalign", config.method, "--config", path)
    return forks.Forked("torch.distributed.run", *words, cwd=cwd, PYTHONPATH=paths)


def fork(config: Config, ranks: int = 1, words: tuple[str, ...] = ()) -> forks.Forked:
    """The same run, or the command that ``words`` name, by processes that start at once."""
    path = write_yaml(config)
    return forks.Forked("fastalign", *(words or (config.method,)), "--config", path, ranks=ranks)


def finish(process: forks.Forked) -> str:
    """Wait for a run to end well; its output."""
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return output


def records(directory: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(directory) / "metrics.jsonl").read_text().splitlines()]


def numbers(directory: str | Path, without: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """The records of a run, clocks left out."""
    return [{k: v for k, v in r.items() if not k.startswith(CLOCK) and k not in without} for r in records(directory)]


def assert_close(run: str | Path, other: str | Path, tolerance: float) -> None:
    """Every metric of every step agrees, relative to the metric's magnitude or to 1."""
    pairs = list(zip(numbers(run, LAYOUT), numbers(other, LAYOUT), strict=True))
    assert pairs
    for mine, theirs in pairs:
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            assert abs(value - theirs[key]) <= tolerance * max(1.0, abs(value)), (mine["step"], key, value, theirs[key])
