"""scripts/slurm/train.sbatch, with stubs in place of SLURM's srun and scontrol."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dalle.hub.registry import load_model
from dalle.train.checkpoint import latest_checkpoint

ROOT = Path(__file__).parents[2]
BATCH = ROOT / "scripts" / "slurm" / "train.sbatch"
SRUN = """\
#!/bin/bash
# starts $SLURM_NTASKS processes on this machine and gives the highest status
while [[ $1 == --* ]]; do shift; done
for ((i = 0; i < SLURM_NTASKS; i++)); do
    SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & pids+=($!)
done
highest=0
for pid in "${pids[@]}"; do wait "$pid"; status=$?; ((status > highest)) && highest=$status; done
exit $highest
"""
SCONTROL = """\
#!/bin/bash
if [ "$1" = show ]; then echo localhost; else echo "$@" >> scontrol.txt; fi
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """slurm(words): runs the batch script as a job of two tasks on one node, in tmp_path."""
    commands = tmp_path / "bin"
    commands.mkdir()
    python = f'#!/bin/bash\nexec {sys.executable} "$@"\n'
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("python", python)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    job = {"JOB_ID": "7", "JOB_NODELIST": "n[1-2]", "NTASKS": "2", "NTASKS_PER_NODE": "2"}
    environment = os.environ | {f"SLURM_{name}": value for name, value in job.items()}
    environment |= {"PATH": f"{commands}:{os.environ['PATH']}", "MASTER_PORT": free_port()}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def run(*words: object) -> subprocess.CompletedProcess:
        command = ["bash", BATCH, *map(str, words)]
        options = {"cwd": tmp_path, "env": environment, "timeout": 300}
        return subprocess.run(command, capture_output=True, text=True, **options)

    return run


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return str(probe.getsockname()[1])


def test_every_process_has_its_rank_and_arguments(slurm, tmp_path):
    (tmp_path / "who.py").write_text(
        "import json, os, sys\n"
        "names = 'RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR'.split()\n"
        "open(f'{os.environ[\"RANK\"]}.json', 'w').write("
        "json.dumps([os.environ[n] for n in names] + sys.argv[1:]))\n"
    )
    done = slurm("who.py", "--caption", "two words")
    assert done.returncode == 0, done.stderr
    for rank in "01":
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found == [rank, rank, "2", "2", "localhost", "--caption", "two words"]
    assert not (tmp_path / "scontrol.txt").exists()


@pytest.mark.parametrize(("status", "requeued"), [(75, True), (1, False)])
def test_a_job_that_can_resume_is_requeued(slurm, tmp_path, status, requeued):
    (tmp_path / "stop.py").write_text(f"raise SystemExit({status})")
    assert slurm("stop.py").returncode == status
    assert (tmp_path / "scontrol.txt").exists() == requeued
    assert not requeued or (tmp_path / "scontrol.txt").read_text() == "requeue 7\n"


@pytest.mark.slow
def test_a_training_of_two_processes(slurm, tiny_configs, tmp_path):
    words = ["--config", tiny_configs / "dvae" / "shapes.yaml", "--device", "cpu", "--out", tmp_path / "two"]
    done = slurm(ROOT / "scripts" / "train_dvae.py", *words, "--parallel", "ddp")
    assert done.returncode == 0, done.stderr
    assert json.loads((latest_checkpoint(tmp_path / "two") / "meta.json").read_text())["step"] == 2
    load_model(tmp_path / "two", "dvae")
