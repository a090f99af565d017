"""The launch recipes name flags and fields that exist, and their shell parses."""

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
        text = command.replace('"$PROCESS', "1").replace("$PROCESS", "1").split(" > ")[0]
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
