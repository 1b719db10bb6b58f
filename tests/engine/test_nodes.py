"""Several machines: a launcher on each, here two on one machine with a working directory of their own."""

import re
import shlex
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
import yaml
from torch.distributed import run as torchrun

from fastalign.engine.train import train
from runs import ROOT, assert_close, launch, write_yaml


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_two_launchers_train_as_one_process(configure, materials, tmp_path):
    """Data from a copy in each working directory; what the run writes is on the disk that both see."""
    settings = {"run.steps": 4, "run.show_example": False, "parallel.dp_replicate": 2}
    one, two = configure("dpo", "one", **{**settings, "parallel.dp_replicate": 1}), configure("dpo", "two", **settings)
    two.data.path = "rows.jsonl"
    path = write_yaml(two)
    place = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", free_port()]
    agents = []
    for node in range(2):
        home = tmp_path / f"node-{node}"
        home.mkdir()
        shutil.copy(materials / "rows.jsonl", home)
        agents.append(launch(two, path, *place, "--node-rank", node, cwd=home))
    train(one)
    said = [agent.communicate(timeout=120)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert "writes to" in said[0] and "writes to" not in said[1]  # the first machine alone talks
    assert [sorted(p.name for p in (tmp_path / f"node-{n}").iterdir()) for n in range(2)] == [["rows.jsonl"]] * 2
    assert_close(one.run.output_dir, two.run.output_dir, tolerance=1e-5)


def test_the_files_for_clusters_start_what_they_say():
    """Their launch lines are torchrun's options and end in a command of ours; the script is one that bash reads."""
    folder = ROOT / "examples" / "cluster"
    subprocess.run(["bash", "-n", folder / "slurm.sh"], check=True)
    pods = yaml.safe_load((folder / "kubernetes.yaml").read_text())["spec"]["pytorchReplicaSpecs"]
    assert pods["Master"] == pods["Worker"]
    (container,) = pods["Worker"]["template"]["spec"]["containers"]
    script = (folder / "slurm.sh").read_text().replace("\\\n", " ")
    slurm = re.search(r"srun --\S+ (torchrun .*) &", script)
    written = re.findall(r"^torchrun .*?(?= *#|$)", (ROOT / "docs" / "multi-node.md").read_text(), re.MULTILINE)
    assert slurm and len(written) == 2
    for words in (container["command"], shlex.split(slurm[1]), *map(shlex.split, written)):
        options = torchrun.parse_args(words[1:])
        assert options.module and options.training_script == "fastalign"
        assert "--config" in options.training_script_args
    mounted = {Path(mount["mountPath"]) for mount in container["volumeMounts"]}
    assert Path(container["command"][container["command"].index("--config") + 1]).parent in mounted
