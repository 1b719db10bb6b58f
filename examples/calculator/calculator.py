"""Sums in words, and a calculator that the policy may use: `python examples/calculator/calculator.py` writes the data.

The policy writes a sum up to `=`, which ends its turn (`sampler.stop`); the calculator writes the result behind it, and
the policy goes on to its answer. The environment is in the habit of gym: init, step, close.
"""

import json
import random
import re
import sys
from pathlib import Path

NAMES, THINGS = ("Ann", "Ben", "Cleo", "Dan"), ("apples", "books", "coins", "shells")


class Calculator:
    """Answers `7+2=` with `9 ####`, and pays 1 for the right answer behind them."""

    def init(self, answer, **row):
        """Begin with the row of a prompt."""
        self.answer, self.paid = answer, 0.0

    def step(self, text):
        """(observation, reward, done) of a turn; done when there is an answer, or no sum to work out."""
        found = re.search(r"(\d+)\s*([+-])\s*(\d+)\s*=\s*$", text)
        if found is None:
            return None, float(text.split("####")[-1].strip() == self.answer), True
        first, sign, second = int(found[1]), found[2], int(found[3])
        return f"{first + second if sign == '+' else first - second} ####", 0.0, False

    def close(self):
        """Nothing is held."""


def problem(draw: random.Random) -> dict[str, str]:
    """One question with its answer, and the way there as a demonstration."""
    first, second, gives = draw.randint(5, 9), draw.randint(1, 4), draw.random() < 0.5
    name, thing = draw.choice(NAMES), draw.choice(THINGS)
    text = f"{name} has {first} {thing} and {'gives away' if gives else 'finds'} {second}. How many now?\n"
    answer = first - second if gives else first + second
    way = f"{first}{'-' if gives else '+'}{second}={answer} #### {answer}"
    return {"prompt": text, "completion": way, "answer": str(answer)}


def main(folder: str = "runs/calculator") -> None:
    """Write train.jsonl and test.jsonl."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, seed, count in (("train", 0, 4000), ("test", 1, 200)):
        draw = random.Random(seed)
        rows = [json.dumps(problem(draw)) for _ in range(count)]
        Path(folder, f"{name}.jsonl").write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
