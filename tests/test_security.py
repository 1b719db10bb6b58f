"""What is not trusted does nothing: files of models and data, texts, names, programs; see docs/security.md."""

import json
import os
import pickle
import re
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from fastalign import hub, written
from fastalign.arguments import parse_config
from fastalign.config import BatchConfig, Config, DataConfig, ModelConfig, ReferenceConfig, RunConfig
from fastalign.data import builtin, chat
from fastalign.data.sources import load_train_eval
from fastalign.disk import kept_from_others, open_to_all
from fastalign.engine.settings import check_settings
from fastalign.engine.train import train
from fastalign.models.load import check_model, load_policy
from fastalign.pipelines.principles import read_principles
from fastalign.rl.sandbox import Limits, Sandbox, refusal
from fastalign.rl.scoring import Scorer
from fastalign.types import Rollout

LLAMA = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
LLAMA |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64}


@pytest.fixture
def trap(tmp_path: Path) -> Iterator[Path]:
    """A file that is there once code has run that must not."""
    yield (place := tmp_path / "sprung")
    assert not place.exists(), "code of a file that is not trusted has run"


class Spring:
    """What pickle makes of this runs a command."""

    def __init__(self, trap: Path) -> None:
        self.trap = trap

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.trap}",)


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [True, False])
def test_a_pickle_of_weights_is_not_executed(tmp_path, trap, legacy):
    AutoConfig.for_model(**LLAMA).save_pretrained(tmp_path / "model")
    state = {"model.embed_tokens.weight": torch.zeros(2), "x": Spring(trap)}
    torch.save(state, tmp_path / "model" / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"model\.path: .*model' cannot be loaded"):
        load_policy(ModelConfig(path=str(tmp_path / "model")))


def test_a_pickled_adapter_is_not_executed(tmp_path, trap):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**LLAMA)).save_pretrained(base)
    adapter.mkdir()
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": 2, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "task_type": "CAUSAL_LM"}))
    torch.save({"x": Spring(trap)}, adapter / "adapter_model.bin")
    with pytest.raises(
        ValueError, match=r"the adapter .* cannot be loaded: its weights are a pickle of more than tensors"
    ):
        load_policy(ModelConfig(path=str(adapter)))


CODE = """
import os
from transformers import LlamaConfig, LlamaForCausalLM
os.system("touch {trap}")
class OwnConfig(LlamaConfig): model_type = "own"
class Own(LlamaForCausalLM): config_class = OwnConfig
"""


def test_code_that_comes_with_a_model_runs_only_when_asked_and_is_named(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    directory, trap = tmp_path / "model", tmp_path / "sprung"
    directory.mkdir()
    (directory / "own.py").write_text(CODE.format(trap=trap))
    auto = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
    (directory / "config.json").write_text(json.dumps({**LLAMA, "model_type": "own", "auto_map": auto}))
    assert ModelConfig().trust_remote_code is False
    with pytest.raises(ValueError, match=r"model\.path: .*(trust_remote_code|own)"):
        check_model(ModelConfig(path=str(directory)))
    assert not trap.exists() and "trust_remote_code" not in caplog.text
    check_model(ModelConfig(path=str(directory), trust_remote_code=True))
    assert trap.exists()
    assert f"model.path: trust_remote_code is on: Python code that comes with '{directory}' runs in" in caplog.text


# --- names, settings and templates -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../../etc", "/etc/absent", "me/..", "../x", "a/../b", "~/absent", "a\\b", "a//b"])
def test_names_that_lead_out_of_the_hub_are_paths(name, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")  # above which there is no etc
    assert hub.looks_local(name)
    with pytest.raises(ValueError, match=r"model\.path: no directory at"):
        check_settings(Config("sft", model=ModelConfig(path=name), data=DataConfig(path="builtin:sort_letters")))
    with pytest.raises(ValueError, match=r"data\.path"):
        load_train_eval(DataConfig(path=name), 0)


def test_yaml_makes_no_objects(tmp_path, trap):
    text = f"!!python/object/apply:os.system ['touch {trap}']"
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {text}\n")
    with pytest.raises(Exception, match="could not determine a constructor for the tag"):
        parse_config("sft", ["--config", str(file)])
    with pytest.raises(ValueError, match="could not determine a constructor"):
        written.load(text)
    file.write_text(f"principles: {text}\n")
    with pytest.raises(Exception, match="could not determine a constructor"):
        read_principles(str(file), "critique")


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch TRAP') }}",
        "{{ messages.append(1) }}",
    ],
)
def test_a_chat_template_cannot_reach_out(template, trap):
    tokenizer = builtin.TOKENIZERS["builtin:letters"]()
    turns = [{"role": "user", "content": "x"}]
    with pytest.raises(ValueError, match=r"the chat template refuses a conversation: .*(unsafe|undefined)"):
        chat.Chat(tokenizer, template.replace("TRAP", str(trap)), {}).text(turns)


# --- rewards ---------------------------------------------------------------------------------------------------------


def test_columns_of_the_data_name_no_reward_function(tmp_path, trap):
    """They are arguments of what the configuration names, whatever they are called."""
    file = tmp_path / "evil.py"
    file.write_text(f"import os\nos.system('touch {trap}')\ndef f(**_): return [9.0]\n")
    named = ("function", "rewards", "model", "builtin", "environment", "name", "loss", "chat_template")
    columns = {**dict.fromkeys(named, f"{file}:f"), "answer": "b"}
    ids = np.array([3, 4])
    rollout = Rollout(ids, ids, np.zeros(2, np.float32), 0, 0, "eos", 0)
    scorer = Scorer([{"builtin": "exact_match"}], builtin.TOKENIZERS["builtin:letters"]())
    assert scorer.submit([rollout], columns).result().table.tolist() == [[0.0]]


def test_a_program_sees_nothing_of_the_environment(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "do-not-tell")
    program = "import os\nprint(dict(os.environ))\nprint(os.path.exists('/proc/self/environ'))"
    for isolated in (True, False) if refusal() is None else (False,):
        with Sandbox(program, Limits(isolated=isolated)) as sandbox:
            outcome = sandbox.run()
            launcher = Path(f"/proc/{sandbox.process.pid}/environ").read_bytes()
        assert outcome.status == "ok" and "do-not-tell" not in outcome.stdout and b"do-not-tell" not in launcher
        assert set(re.findall(r"'(\w+)':", outcome.stdout)) <= {"LC_CTYPE"}
        assert not isolated or outcome.stdout.endswith("False\n")


# --- files -----------------------------------------------------------------------------------------------------------


PICKLES = (b"\x80", b"PK\x03\x04")
"""How pickles begin, and the archives of them that `torch.save` writes."""


def test_a_run_leaves_no_pickle_and_nothing_that_everybody_may_change(tmp_path):
    """Neither in its directory nor in its caches, whatever the umask."""
    cache = tmp_path / "cache"
    config = Config(
        "dpo",
        model=ModelConfig(config=LLAMA, tokenizer="builtin:letters"),
        reference=ReferenceConfig(cache=str(tmp_path / "references")),
        data=DataConfig(path=str(tmp_path / "pairs.jsonl"), cache_dir=str(cache)),
        batch=BatchConfig(size=2),
        run=RunConfig(output_dir=str(tmp_path / "run"), steps=2, show_example=False),
    )
    rows = [{"prompt": "abc", "chosen": "abd", "rejected": "bad"}] * 4
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    was = os.umask(0)
    try:
        train(config)
    finally:
        os.umask(was)
    found = [path for name in ("run", "cache", "references") for path in (tmp_path / name).rglob("*")]
    files = [path for path in found if path.is_file()]
    assert {path.suffix for path in files} >= {".safetensors", ".json", ".arrow", ".jsonl", ".yaml"}
    assert not [
        path for path in files if path.read_bytes().startswith(PICKLES) or path.suffix in (".pt", ".bin", ".pkl")
    ]
    assert not [path for path in found if path.stat().st_mode & stat.S_IWOTH]


def test_pickles_would_be_found():
    assert all(pickle.dumps(nn.Linear(1, 1), protocol).startswith(PICKLES) for protocol in (2, 3, 4, 5))


def test_a_directory_that_is_open_to_all_is_told(tmp_path, caplog):
    from fastalign.engine.output.rundir import warn_of_open_places
    from fastalign.parallel.mesh import Axis, World

    run, shared = tmp_path / "run", tmp_path / "shared"
    for place, mode in ((run, 0o777), (shared, 0o1777)):  # as /tmp: nobody can replace what others put there
        place.mkdir()
        place.chmod(mode)
    assert open_to_all(run) and not open_to_all(shared) and not open_to_all(tmp_path / "absent")
    config = Config("sft", data=DataConfig(cache_dir=str(shared)), run=RunConfig(output_dir=str(run)))
    warn_of_open_places(config, World(Axis(), torch.device("cpu")))
    assert [record.getMessage() for record in caplog.records] == [
        f"run.output_dir: every user of this machine can write to {run}: chmod o-w {run}"
    ]


def test_the_umask_is_put_back(tmp_path):
    was = os.umask(0)
    try:
        with kept_from_others():
            (tmp_path / "file").touch()
        assert os.umask(0) == 0 and (tmp_path / "file").stat().st_mode & 0o777 == 0o664
    finally:
        os.umask(was)
