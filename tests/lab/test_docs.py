"""The examples for clusters: they parse, and every option in them is there."""

import re
import shutil
import subprocess
from argparse import ArgumentParser
from pathlib import Path

import pytest
import tyro
import yaml
from torch.distributed.run import get_args_parser

from ademamix.lab.config import Train

DOCS = Path(__file__).parents[2] / "docs" / "how-to"


def of_slurm() -> list[str]:
    text = (DOCS / "slurm.sh").read_text()
    (command,) = re.findall(r"^srun torchrun (.*?) &$", text.replace("\\\n", ""), re.MULTILINE)
    return str(command).split()


def of_kubernetes() -> list[str]:
    job = yaml.safe_load((DOCS / "pytorchjob.yaml").read_text())
    (container,) = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
    command: list[str] = container["command"]
    assert command[0] == "torchrun"
    return command[1:]


def of_markdown() -> list[list[str]]:
    text = (DOCS / "clusters.md").read_text()
    return [line.split()[1:] for line in re.findall(r"^    (torchrun .*)$", text, re.MULTILINE)]


COMMANDS = {"slurm.sh": of_slurm(), "pytorchjob.yaml": of_kubernetes()}
COMMANDS |= {f"clusters.md, {number}": command for number, command in enumerate(of_markdown())}


@pytest.mark.parametrize("where", COMMANDS)
def test_every_option_of_the_examples_is_there(where):
    launcher: ArgumentParser = get_args_parser()
    options = launcher.parse_args(COMMANDS[where])
    assert (options.module, options.training_script) == (True, "ademamix")
    command, *settings = options.training_script_args
    assert command == "train"
    tyro.cli(Train, args=[word.strip('"') for word in settings])


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash on this machine")
def test_the_batch_script_parses():
    subprocess.run(["bash", "-n", str(DOCS / "slurm.sh")], check=True)


def test_the_kubernetes_example_has_the_fields_that_the_operator_reads():
    job = yaml.safe_load((DOCS / "pytorchjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    fields = {"rdzvBackend", "rdzvId", "minReplicas", "maxReplicas", "maxRestarts"}
    assert job["spec"]["elasticPolicy"].keys() == fields
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    assert worker["replicas"] == job["spec"]["elasticPolicy"]["maxReplicas"]
    (container,) = worker["template"]["spec"]["containers"]
    assert container["name"] == "pytorch"
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in worker["template"]["spec"]["volumes"]}
