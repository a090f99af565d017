"""The launch recipes name flags and fields that exist, and restart what is worth it: run with launchers made up."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from mor_jax.cli.main import _parse
from mor_jax.cli.options import LaunchOptions
from mor_jax.training.config import load_config

FOLDER = Path(__file__).parents[2] / "experiments" / "recipes"
LAUNCHED = ["gke_jobset.yaml", "slurm.sbatch", "tpu_vm.sh", "two_hosts.sh"]


def test_the_run_is_a_configuration():
    config = load_config(FOLDER / "run.yaml")
    assert config.save_every > 0
    assert not config.resume  # the launchers say so


@pytest.mark.parametrize("name", LAUNCHED)
def test_every_recipe_starts_the_same_run_with_flags_that_exist(name):
    words = re.sub(r"[\[\],\"]", " ", (FOLDER / name).read_text())
    commands = re.findall(
        r"^[^#\n]*\bmor\s+train\s+(/SHARED/RUN\.yaml --resume[^;\n]*)", re.sub(" +", " ", words), re.M
    )
    assert commands
    for command in commands:
        text = command.replace('"$PROCESS', "1").replace("$PROCESS", "1").split(" 2> ")[0]
        args = _parse("train", text.split())
        assert args.resume
        assert set(vars(args)) <= {"json", "config", "resume", *LaunchOptions.__dataclass_fields__}


@pytest.mark.parametrize("name", [name for name in LAUNCHED if not name.endswith(".yaml")])
def test_the_shell_parses(name):
    subprocess.run(["bash", "-n", str(FOLDER / name)], check=True)


def test_a_bad_input_is_not_tried_again_on_gke():
    job = yaml.safe_load((FOLDER / "gke_jobset.yaml").read_text())["spec"]["replicatedJobs"][0]["template"]["spec"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [2])
    assert job["template"]["spec"]["containers"][0]["name"] == rule["onExitCodes"]["containerName"]


# As Slurm does: a line for each task that failed, the highest code of all, and one bad exit kills the rest if so asked.
SRUN = """
echo started >> starts; task=0 highest=0
for code in $CODES; do
  [ "$code" = 0 ] || echo "srun: error: node: task $task: Exited with exit code $code" >&2
  [ "$code" -le "$highest" ] || highest=$code
  [[ "$code" = 0 || "$*" != *--kill-on-bad-exit=1* ]] || exit 137
  task=$((task + 1))
done
exit "$highest"
"""
# As gcloud does: the command on every host (here in turn), and the code of the first that failed.
GCLOUD = """
failed=0 HOST=0 last=${!#}
for code in $CODES; do
  HOST=$HOST bash -c "${last#--command=}" || { own=$?; [ "$failed" != 0 ] || failed=$own; }
  HOST=$((HOST + 1))
done
exit "$failed"
"""
MOR = """
echo started >> starts; codes=($CODES)
exit "${codes[${HOST:-0}]}"
"""


@pytest.fixture
def launch(tmp_path):
    """Runs a recipe where tasks, or hosts, end with `codes` at every start -> (exit code, starts, requeued)."""
    commands = {"srun": SRUN, "gcloud": GCLOUD, "mor": MOR, "scontrol": "echo $* > requeued", "sleep": ""}
    commands |= {"pip": "", "uv": ""}
    (tmp_path / "bin").mkdir()
    for name, text in commands.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/usr/bin/env bash\n{text}")
        path.chmod(0o755)

    def run(name, codes, restart="0"):
        (tmp_path / name).write_text((FOLDER / name).read_text().replace("/SHARED", str(tmp_path)))
        own = {"CODES": codes, "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": restart}
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        done = subprocess.run(["bash", name, "0"], cwd=tmp_path, env={**os.environ, **own, "PATH": path}, timeout=60)
        starts = tmp_path / "starts"
        count = len(starts.read_text().split()) if starts.exists() else 0
        return done.returncode, count, (tmp_path / "requeued").exists()

    return run


@pytest.mark.parametrize(
    ("codes", "code", "requeued"),
    [
        ("0 0 0", 0, False),
        ("2 2 2", 2, False),
        ("3 2 3", 2, False),  # one with another file than its peers
        ("2 143 137", 2, False),
        ("3 3 3", 3, True),
        ("143 143 143", 143, True),
        ("0 137 3", 137, True),
        ("1 1 1", 1, False),
    ],
)
def test_slurm_requeues_lost_workers_and_never_bad_input(launch, codes, code, requeued):
    assert launch("slurm.sbatch", codes) == (code, 1, requeued)


@pytest.mark.parametrize(
    ("codes", "restart", "code", "requeued"),
    [("3 3", "19", 3, True), ("3 3", "20", 3, False), ("137 3", "20", 137, False), ("143 143", "20", 143, True)],
)
def test_slurm_requeues_lost_workers_only_so_often(launch, codes, restart, code, requeued):
    assert launch("slurm.sbatch", codes, restart) == (code, 1, requeued)


@pytest.mark.parametrize(("codes", "code", "starts"), [("0", 0, 1), ("2", 2, 1), ("143", 143, 1), ("3", 3, 21)])
def test_a_plain_host_restarts_only_so_often(launch, codes, code, starts):
    assert launch("two_hosts.sh", codes) == (code, starts, False)


def test_a_plain_host_ends_with_its_peer_of_bad_input(launch, tmp_path):
    mine, others = tmp_path / "RUN.bad_input.0", tmp_path / "RUN.bad_input.1"
    assert launch("two_hosts.sh", "2")[0] == 2
    assert mine.exists()
    others.touch()
    assert launch("two_hosts.sh", "0")[0] == 0  # what was mended since
    assert not mine.exists()
    (tmp_path / "starts").unlink()
    assert launch("two_hosts.sh", "3") == (2, 1, False)
    others.unlink()
    (tmp_path / "starts").unlink()
    mine.touch()
    assert launch("two_hosts.sh", "3") == (3, 21, False)


@pytest.mark.parametrize(
    ("codes", "code", "starts"), [("0 0", 0, 2), ("2 2", 2, 1), ("3 2", 2, 2), ("2 3", 2, 1), ("3 3", 3, 42)]
)
def test_no_host_of_a_slice_starts_again_after_bad_input_on_one(launch, codes, code, starts):
    assert launch("tpu_vm.sh", codes) == (code, starts, False)
