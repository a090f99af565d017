"""What launchers put into the environment is enough for processes to find each other, as jax reads it."""

import json
import os
import subprocess
import sys

import pytest
from two_processes import COMMAND, ROOT, Pair, free_port, without_launchers

JOIN = """
import json, jax
from mor_jax.training.distributed import first_decides, join, together
joined = join()
with together():
    decided = first_decides(lambda: "by %d" % jax.process_index())
print(json.dumps([joined, jax.process_index(), jax.process_count(), decided]))
"""


def slurm(number, port, tasks=2):
    """What `srun` gives a task, as Slurm 22.05 does; jax makes the port of the job's number."""
    return {
        "SLURM_JOB_ID": str(port - 61440),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": str(tasks),
        "SLURM_PROCID": str(number),
        "SLURM_LOCALID": str(number),
    }


def open_mpi_4(number, port):
    """What `mpirun` of Open MPI 4.1 gives a rank; jax makes the port of the job's number, of which 4096 is a factor."""
    return {
        "OMPI_MCA_orte_hnp_uri": f"{(port - 61440) * 4096}.0;tcp://127.0.0.1:47259;tcp6://[::1]:52937",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": str(number),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(number),
    }


def gke(number, port):
    """What GKE gives a pod of a TPU slice of two hosts, and what makes jax look at it where there are no chips."""
    return {
        "TPU_WORKER_HOSTNAMES": "localhost,localhost",
        "TPU_WORKER_ID": str(number),
        "MEGASCALE_COORDINATOR_ADDRESS": "localhost",  # these three it would ask a server of Google's for
        "MEGASCALE_NUM_SLICES": "1",
        "MEGASCALE_SLICE_ID": "0",
        "JAX_COORDINATOR_PORT": str(port),  # else the same for all runs
        "JAX_FORCE_TPU_INIT": "1",
        "TPU_LIBRARY_PATH": sys.executable,  # any file: with JAX_PLATFORMS=cpu it is not opened
    }


@pytest.fixture
def port():
    return free_port(61440, 65535)  # where those lie that jax makes of a job's number


@pytest.mark.parametrize("launcher", [open_mpi_4, gke])
def test_processes_find_each_other(launcher, port, tmp_path):
    pair = Pair(tmp_path, "-c", JOIN, launched=[launcher(number, port) for number in range(2)])
    assert pair.wait(seconds=120) == [0, 0], pair.errors(0) + pair.errors(1)
    assert [json.loads(pair.output(number)) for number in range(2)] == [[True, 0, 2, "by 0"], [True, 1, 2, "by 0"]]


def test_mor_train_joins_under_slurm_unless_told_not_to(port, tmp_path):
    """Process 0 finds its folder full: one that has joined it says so too, one on its own gets to the model."""
    (tmp_path / "run0" / "something").mkdir(parents=True)
    train = (*COMMAND, "train", "--model", tmp_path, "--data", tmp_path / "none.jsonl")
    launched = [slurm(number, port) for number in range(2)]
    pair = Pair(tmp_path / "logs", *train, "--output-dir", tmp_path / "run{number}", launched=launched)
    alone = _python(*train, "--output-dir", tmp_path / "run1", "--distributed", "off", launched=launched[1])
    assert pair.wait(seconds=120) == [2, 2]
    for number in range(2):
        (line,) = pair.messages(number)
        assert line.startswith(f"mor: output_dir='{tmp_path / 'run0'}' exists and is not empty")
    assert alone.returncode == 2
    assert alone.stderr == f"mor: {tmp_path / 'config.json'}: no such file\n"


def _python(*words, launched):
    own = {**without_launchers(os.environ), **launched, "PYTHONPATH": str(ROOT), "USE_TORCH": "0"}
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, timeout=120, env=own)


ALONE = """
import json, os, sys, jax
from mor_jax.training.distributed import DistributedError, join
step = json.loads(sys.argv[1])
os.environ.update(step)
assert not join() and not jax.distributed.is_initialized(), "a step of one task took a port"
for name in step:
    del os.environ[name]
os.environ["OMPI_COMM_WORLD_SIZE"] = "2"
try:
    join()
except DistributedError as error:
    print(error)
del os.environ["OMPI_COMM_WORLD_SIZE"]
assert not join()
print(jax.process_count())
"""


def test_a_process_stays_alone_without_others_and_never_where_jax_misses_them(port):
    """One task of `srun`, of which a host may have several; Open MPI 5, which jax 0.10 does not know; no launcher."""
    done = _python("-c", ALONE, json.dumps(slurm(0, port, tasks=1)), launched={})
    assert done.returncode == 0, done.stderr
    missed, count = done.stdout.splitlines()
    assert missed.startswith("not joined")
    assert missed.endswith("name the processes, or use --distributed off")
    assert count == "1"
