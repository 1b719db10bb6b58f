"""The page on drop-in use runs, and so does its example, in miniature."""

import doctest
import importlib.util
from pathlib import Path

import pytest
from wanted import require

ROOT = Path(__file__).resolve().parents[2]


def test_the_loop_of_the_page_runs():
    result = doctest.testfile(str(ROOT / "docs" / "drop-in.md"), module_relative=False)
    assert result.attempted > 20 and result.failed == 0


@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL's own
def test_the_example_measures_equal_losses(capfd):
    require("trl", "1.16")
    spec = importlib.util.spec_from_file_location("trl_dpo_patch", ROOT / "examples" / "trl_dpo_patch.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    sizes = ["--steps", "3", "--pairs", "2", "--hidden", "32", "--vocab", "300", "--threads", "1"]
    results = {side: example.train(example.parse([*sizes, "--side", side])) for side in example.SIDES}
    example.show(results)
    for side in results:
        assert len(results[side]["seconds"]) == 3
        assert max(abs(a - b) for a, b in zip(results[side]["losses"], results["trl"]["losses"], strict=True)) < 1e-5
    assert "packed" in capfd.readouterr().out
