"""GSM8K's published model solutions as ranked candidates: a right answer scores 1, a wrong one 0.

The reference solution comes first, so that of several right ones it is the one that rrhf imitates. The solutions are
downloaded from GSM8K's repository; ``examples/rrhf.yaml`` by itself ranks built-in text.

    data=https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data
    curl -LO $data/example_model_solutions.jsonl
    python examples/rank_gsm8k.py example_model_solutions.jsonl runs/gsm8k_ranked.jsonl
    fastalign rrhf --config examples/rrhf.yaml --data.path runs/gsm8k_ranked.jsonl --data.max_length 512 \
        --data.eval_path null --data.eval_fraction 0.05 --run.output_dir runs/rrhf_gsm8k
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def main() -> None:
    """Read the file of solutions and write one ranked row per question."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("solutions", type=Path, help="example_model_solutions.jsonl of the GSM8K repository")
    parser.add_argument("output", type=Path, help="the ranked rows, JSON lines")
    paths = parser.parse_args()
    lines = paths.solutions.read_text(encoding="utf-8").splitlines()
    paths.output.parent.mkdir(parents=True, exist_ok=True)
    paths.output.write_text("".join(json.dumps(ranked(json.loads(line))) + "\n" for line in lines), encoding="utf-8")


def ranked(row: dict[str, Any]) -> dict[str, Any]:
    """A row ``{prompt, completions, scores}`` of a question, its reference solution and those of the models."""
    solutions = [value for value in row.values() if isinstance(value, dict)]
    return {
        "prompt": f"{row['question']}\n",
        "completions": [row["ground_truth"], *(solution["solution"] for solution in solutions)],
        "scores": [1, *(int(solution["is_correct"]) for solution in solutions)],
    }


if __name__ == "__main__":
    main()
