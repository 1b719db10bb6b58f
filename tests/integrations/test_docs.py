"""The page on drop-in use runs, and so does its example, in miniature."""

import doctest
import importlib.util
import re
from pathlib import Path

import pytest
from wanted import require

ROOT = Path(__file__).resolve().parents[2]


PAGE = (ROOT / "docs" / "drop-in.md").read_text(encoding="utf-8")


def test_the_loop_of_the_page_runs():
    blocks = re.findall(r"^```pycon\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    page = doctest.DocTestParser().get_doctest("\n".join(blocks), {}, "drop-in.md", None, 0)
    result = doctest.DocTestRunner().run(page)
    assert result.attempted > 20 and result.failed == 0


def test_examples_of_the_page_stand_in_fences():
    """Outside of one, Markdown runs their lines together."""
    prose = re.sub(r"^```.*?^```$", "", PAGE, flags=re.MULTILINE | re.DOTALL)
    assert ">>>" in PAGE and ">>>" not in prose


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
