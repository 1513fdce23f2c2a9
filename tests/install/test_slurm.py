"""scripts/slurm/train.sbatch and torchrun at two processes: SLURM's two commands are replaced by stubs on the
PATH."""

import json
import os
import socket
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from dalle.hub.registry import load_model
from dalle.runs.args import TrainArgs
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
needs_parallel = pytest.mark.skipif(
    "ddp" not in typing.get_args(typing.get_type_hints(TrainArgs)["parallel"]),
    reason="no --parallel ddp here yet",
)


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """slurm(words): runs the batch script as a job of two tasks on one node, in tmp_path."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in {
        "srun": SRUN,
        "scontrol": SCONTROL,
        "python": f'#!/bin/bash\nexec {sys.executable} "$@"\n',
    }.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    job = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
    }
    environment = os.environ | job | {"PATH": f"{commands}:{os.environ['PATH']}", "MASTER_PORT": free_port()}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def run(*words: object) -> subprocess.CompletedProcess:
        command = ["bash", BATCH, *map(str, words)]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )

    return run


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return str(probe.getsockname()[1])


def test_every_process_is_told_who_it_is(slurm, tmp_path):
    (tmp_path / "who.py").write_text(
        "import json, os, sys\n"
        "names = 'RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR'.split()\n"
        "open(f'{os.environ[\"RANK\"]}.json', 'w').write("
        "json.dumps([os.environ[n] for n in names] + sys.argv[1:]))\n"
    )
    done = slurm("who.py", "--caption", "two words")
    assert done.returncode == 0, done.stderr
    for rank in "01":
        told = json.loads((tmp_path / f"{rank}.json").read_text())
        assert told == [rank, rank, "2", "2", "localhost", "--caption", "two words"]
    assert not (tmp_path / "scontrol.txt").exists()


@pytest.mark.parametrize(("status", "requeued"), [(75, True), (1, False)])
def test_a_job_that_asks_to_go_on_is_requeued(slurm, tmp_path, status, requeued):
    (tmp_path / "stop.py").write_text(f"raise SystemExit({status})")
    assert slurm("stop.py").returncode == status
    assert (tmp_path / "scontrol.txt").exists() == requeued
    assert not requeued or (tmp_path / "scontrol.txt").read_text() == "requeue 7\n"


def training(tiny_configs, out) -> list[object]:
    words = ["--config", tiny_configs / "dvae" / "shapes.yaml", "--device", "cpu", "--out", out]
    return [ROOT / "scripts" / "train_dvae.py", *words]


@needs_parallel
def test_a_training_of_two_processes_under_slurm(slurm, tiny_configs, tmp_path):
    done = slurm(*training(tiny_configs, tmp_path / "two"), "--parallel", "ddp")
    assert done.returncode == 0, done.stderr
    check(tmp_path / "two")


@needs_parallel
def test_a_training_of_two_processes_under_torchrun(tiny_configs, tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        free_port(),
    ]
    words = [*training(tiny_configs, tmp_path / "two"), "--parallel", "ddp"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *map(str, words)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    check(tmp_path / "two")


def check(run: Path) -> None:
    """The run is complete and its checkpoint opens."""
    assert json.loads((latest_checkpoint(run) / "meta.json").read_text())["step"] == 2
    load_model(run, "dvae")
