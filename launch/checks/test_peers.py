"""What the launchers write, held against the tools that read it: `make test-launch`, which installs those tools.

Kubernetes by the models of its own Python client, SkyPilot by its own loader, xpk by its own parser. No account is
needed, and no cloud is asked.
"""

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from kubernetes import client

ROOT = Path(__file__).parent.parent.parent
COMMAND = ["--", "epigone", "run", "configs/quickstart.py", "--run", "/runs/a b"]


def launch(name: str, *arguments: str) -> str:
    command = [sys.executable, "-m", f"launch.{name}", "--dry-run", *arguments, *COMMAND]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def jobset(*arguments: str) -> dict:
    given = ["--name=copies", "--image=i", "--claim=c", "--accelerator=x", "--chips=4", "--hosts=2", *arguments]
    text = launch("gke_jobset", *given)
    return yaml.safe_load(text.partition("<<'EOF'\n")[2].partition("EOF")[0])


JOBSET = {
    "spec": {"failurePolicy", "replicatedJobs"},
    "failurePolicy": {"maxRestarts", "rules"},
    "rules": {"name", "action", "onJobFailureReasons"},
    "replicatedJobs": {"name", "replicas", "template"},
}
"""Fields of JobSet v1alpha2 that are used; its custom resource definition is in no package."""


@pytest.mark.parametrize("arguments", [("--topology=4x4",), ()])
def test_the_job_of_the_jobset_is_one_that_kubernetes_takes(arguments):
    made = jobset(*arguments)
    client.V1ObjectMeta.model_validate(made["metadata"])
    spec = made["spec"]
    [workers], [rule] = spec["replicatedJobs"], spec["failurePolicy"]["rules"]
    given = {"spec": spec, "failurePolicy": spec["failurePolicy"], "rules": rule, "replicatedJobs": workers}
    assert {place: set(value) for place, value in given.items()} == JOBSET
    job = client.V1JobTemplateSpec.model_validate(workers["template"]).spec
    assert job.parallelism == job.completions == 2
    assert job.template.spec.containers[0].command == COMMAND[1:]


def test_a_field_that_kubernetes_does_not_know_is_found():
    job = jobset()["spec"]["replicatedJobs"][0]["template"]
    job["spec"]["backofLimit"] = 0
    with pytest.raises(ValueError, match="backofLimit"):
        client.V1JobTemplateSpec.model_validate(job)


@pytest.mark.parametrize("arguments", [("--spot",), ("--nodes=2",)])
def test_the_task_is_one_that_skypilot_loads(arguments):
    import sky

    text = launch("skypilot", "--name=copies", "--infra=gcp", "--accelerators=H100:8", *arguments)
    task = sky.Task.from_yaml_config(yaml.safe_load(text.rpartition("sky jobs launch")[0]))
    [resources] = task.resources
    assert task.num_nodes == (2 if "--nodes=2" in arguments else 1)
    assert resources.accelerators == {"H100": 8}
    assert resources.use_spot == ("--spot" in arguments)
    assert resources.job_recovery["recover_on_exit_codes"] == [143]
    assert shlex.split(task.envs["EPIGONE_COMMAND"]) == COMMAND[1:]


def test_skypilots_loader_finds_what_is_wrong():
    import sky

    with pytest.raises(ValueError, match=r"[Ii]nvalid"):
        sky.Task.from_yaml_config({"name": "copies", "resourses": {}})


def test_skypilots_client_knows_the_options():
    told = subprocess.run(["sky", "jobs", "launch", "--help"], capture_output=True, text=True).stdout
    line = launch("skypilot", "--name=copies", "--infra=gcp", "--accelerators=H100:8").splitlines()[-1]
    options = re.findall(r"--[a-z-]+", line)
    assert options
    assert [option for option in options if option not in told] == []


def test_xpk_parses_its_commands():
    from xpk.parser.core import set_parser

    parser = argparse.ArgumentParser()
    set_parser(parser)
    given = ["--name=copies", "--cluster=c", "--project=p", "--zone=z", "--tpu-type=v5litepod-16", "--image=i"]
    create, wait, delete = (shlex.split(line)[1:] for line in launch("xpk", *given).splitlines())
    made = parser.parse_args(create)
    assert made.workload == "copies"
    assert made.tpu_type == "v5litepod-16"
    assert int(made.max_restarts) == 10
    assert int(made.termination_grace_period_seconds) == 180
    assert made.restart_on_user_code_failure
    assert "EPIGONE_CLUSTER=tpu" in made.env
    assert shlex.split(made.command) == COMMAND[1:]
    assert parser.parse_args(wait).wait_for_job_completion == "copies"
    assert parser.parse_args(delete).workload == "copies"
    with pytest.raises(SystemExit):
        parser.parse_args([*create, "--no-such-flag=1"])
