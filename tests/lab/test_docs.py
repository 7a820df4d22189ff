"""The commands of the pages, and the examples for clusters: they parse, and every option in them is there."""

import re
import shlex
import shutil
import subprocess
from argparse import ArgumentParser
from pathlib import Path

import pytest
import tyro
import yaml
from torch.distributed.run import get_args_parser

from ademamix.lab.cli import _parsed
from ademamix.lab.config import Train
from pages import DOCS, python_blocks

HOW_TO = DOCS / "how-to"


def of_slurm() -> list[str]:
    text = (HOW_TO / "slurm.sh").read_text()
    (command,) = re.findall(r"^srun torchrun (.*?) &$", text.replace("\\\n", ""), re.MULTILINE)
    return str(command).split()


def of_kubernetes() -> list[str]:
    job = yaml.safe_load((HOW_TO / "pytorchjob.yaml").read_text())
    (container,) = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
    command: list[str] = container["command"]
    assert command[0] == "torchrun"
    return command[1:]


def of_markdown() -> list[list[str]]:
    text = (HOW_TO / "clusters.md").read_text()
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
    subprocess.run(["bash", "-n", str(HOW_TO / "slurm.sh")], check=True)


def test_the_kubernetes_example_has_the_fields_that_the_operator_reads():
    job = yaml.safe_load((HOW_TO / "pytorchjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    fields = {"rdzvBackend", "rdzvId", "minReplicas", "maxReplicas", "maxRestarts"}
    assert job["spec"]["elasticPolicy"].keys() == fields
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    assert worker["replicas"] == job["spec"]["elasticPolicy"]["maxReplicas"]
    (container,) = worker["template"]["spec"]["containers"]
    assert container["name"] == "pytorch"
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in worker["template"]["spec"]["volumes"]}


def typed() -> list[str]:
    """The command lines of all pages but the measured ones, whose commands ran. Those that resume need a run."""
    pages = [page for page in DOCS.rglob("*.md") if page.parent.name != "results"]
    lines = re.findall(r"^    ademamix (.*)$", "\n".join(page.read_text("utf-8") for page in pages), re.MULTILINE)
    return sorted({line for line in lines if "--resume" not in line})


@pytest.mark.parametrize("line", typed())
def test_a_command_of_the_pages_parses(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my_file.py").write_text(python_blocks("tutorials/your-own-memory.md")[0] + "\nmy_rule = agreeing\n")
    command, *words = shlex.split(line, comments=True)
    if command == "run":
        command = f"run {words.pop(0)}"
    assert _parsed(command, words)
