"""What loading from a hub on this machine says and how long it takes, as JSON; a process of its own for HF_ENDPOINT."""

import json
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from hub_server import Hub, hub

HERE = Path(sys.argv[1] if __name__ == "__main__" else ".")  # pytest imports every file, for its doctests
README = """---
configs:
- config_name: main
  data_files: [{split: train, path: main/train.jsonl}, {split: test, path: main/test.jsonl}]
- config_name: socratic
  data_files: [{split: train, path: socratic/train.jsonl}]
---
"""
FILES = {
    f"{name}.jsonl": f'{{"prompt": "{name}", "completion": "2024-01-01"}}\n'.encode()
    for name in ("main/train", "main/test", "socratic/train")
}
LLAMA = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 600}
LLAMA |= {"num_attention_heads": 1, "num_key_value_heads": 1}


def run(server: Hub) -> dict[str, object]:
    """Every scenario's answer, seconds and number of requests."""
    from fastalign import hub as asked
    from fastalign.config import ModelConfig
    from fastalign.data.builtin import train_tokenizer
    from fastalign.data.sources import load_rows
    from fastalign.models.load import load_policy, load_tokenizer, save_pretrained

    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    results: dict[str, object] = {}

    def attempt(name: str, work: Callable[[], object], fresh: bool = True) -> None:
        server.asked.clear(), told.clear()
        if fresh:
            asked._attempt.cache_clear()
        began = time.monotonic()
        try:
            answer = str(work())
        except ValueError as error:
            answer = f"error: {error}"
        took = time.monotonic() - began
        results[name] = {"answer": answer, "seconds": took, "requests": len(server.asked), "told": [*told]}

    def rows(**options: str) -> object:
        return load_rows("some/name", **options).to_list()

    def model() -> object:
        return type(load_policy(ModelConfig(path="some/model"))).__name__

    def tokenizer() -> object:
        return len(load_tokenizer(ModelConfig(tokenizer="some/model")))

    kinds: dict[str, Callable[[], object]] = {"dataset": rows, "model": model, "tokenizer": tokenizer}
    for server.mode in ("missing", "gated", "down", "odd"):
        for kind, work in kinds.items():
            attempt(f"{server.mode} {kind}", work)
    server.mode, server.delay = "serve", 1.5
    attempt("silent dataset", rows)
    attempt("silent model", model, fresh=False)
    server.delay = 0.0
    server.files = {"README.md": README.encode(), **FILES}
    attempt("without a configuration", rows)
    attempt("unknown configuration", lambda: rows(name="x"))
    attempt("unknown split", lambda: rows(name="socratic", split="test"))
    attempt("unknown revision", lambda: rows(name="main", revision="v9"))
    attempt("main", lambda: rows(name="main", split="test"))
    saved = save_pretrained(load_policy(ModelConfig(config=LLAMA)), train_tokenizer(), HERE / "saved")
    server.files = {file.name: file.read_bytes() for file in saved.iterdir()}
    server.slow = {"tokenizer.json", "model.safetensors"}  # each takes longer than the hub may to answer
    attempt("slow tokenizer", tokenizer)
    attempt("slow model", model)
    server.shutdown(), server.server_close()
    attempt("cached main", lambda: rows(name="main", split="train"))
    attempt("cached model", model)
    attempt("closed model", lambda: load_policy(ModelConfig(path="some/other")))
    attempt("closed dataset", lambda: load_rows("some/other"))
    return results


if __name__ == "__main__":
    with hub() as server:
        os.environ |= {"HF_ENDPOINT": server.url, "HF_HOME": str(HERE / "hf"), "FASTALIGN_CACHE": str(HERE / "cache")}
        os.environ |= {"HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        os.environ.pop("HF_HUB_OFFLINE", None)
        (HERE / "results.json").write_text(json.dumps(run(server)))
