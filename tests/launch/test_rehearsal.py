"""Launch, run what was launched on a bare machine, take the machine away, go on, bring it home.

moto is AWS. The machine is a folder and a Python that has all but pitstop, which comes as a wheel.
"""

import base64
import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import Any

import boto3
import pytest

from pitstop import cli
from pitstop.launch.container import BASE
from pitstop.launch.ec2_boot import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

OPTIONS = (
    *("--epochs", "8", "--seed", "3"),
    *("--set", "model.kwargs={layers: [1, 1, 0, 0], channels: [8, 16, 16, 16]}"),
    *("--set", "phases=[{name: a, duration: 50%, resolution: 12}, {name: b, resolution: 16}]"),
    *("--set", "eval.every=1", "--set", "checkpoint.every=1ep", "--workers", "1"),
)
ROLE = "arn:aws:iam::123456789012:role/SageMaker"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "digits"
    assert cli.run(["data", "pack", "digits", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def undisturbed(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The last weights of a run that nobody touched, on the machine at hand."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    command = [sys.executable, "-P", "-m", "pitstop", "train", "demo", *OPTIONS]
    subprocess.run([*command, "--data", packed, "--out", out], check=True, capture_output=True)
    return (out / "last.safetensors").read_bytes()


@pytest.fixture
def s3(bucket: str) -> Generator[Any]:
    with closing(boto3.client("s3", region_name="us-east-1")) as client:
        yield client


def upload(s3: Any, folder: Path, url: str) -> None:
    """Puts the files of a folder below a URL, as SageMaker and the AWS CLI do."""
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    for path in folder.rglob("*"):
        if path.is_file():
            key = f"{prefix.rstrip('/')}/{path.relative_to(folder)}"
            s3.put_object(Bucket=bucket, Key=key, Body=path.read_bytes())


def download(s3: Any, url: str, folder: Path) -> Path:
    """Puts what is below a URL into a folder."""
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    prefix = f"{prefix.rstrip('/')}/"
    folder.mkdir(parents=True, exist_ok=True)
    for page in s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        for found in page.get("Contents", ()):
            path = folder / found["Key"].removeprefix(prefix)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(s3.get_object(Bucket=bucket, Key=found["Key"])["Body"].read())
    return folder


def bare_python(folder: Path) -> Path:
    """Returns a Python of its own that has what this one has, but for pitstop."""
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    site = folder / "site"
    site.mkdir()
    for package in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if "pitstop" not in package.name:
            (site / package.name).symlink_to(package)
    (own,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (own / "site.pth").write_text(f"{site}\n")
    has = subprocess.run([python, "-P", "-c", "import pitstop"], capture_output=True)
    assert b"No module named 'pitstop'" in has.stderr
    return python


def run(command: list[str | Path], folder: Path, *, stop_at: str | None = None) -> tuple[int, str]:
    """Runs a command in a folder; SIGTERM comes with the first line that holds `stop_at`.

    Returns its exit code and what it said.
    """
    folder.mkdir(parents=True, exist_ok=True)
    own = {name: value for name, value in os.environ.items() if name != "PITSTOP_CACHE"}
    with subprocess.Popen(
        command,
        cwd=folder,
        env=own | {"PITSTOP_CACHE": str(folder / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        said: list[str] = []
        for line in process.stdout:
            said.append(line)
            if stop_at is not None and stop_at in line:
                process.send_signal(signal.SIGTERM)
                stop_at = None
    return process.returncode, "".join(said)


def check(home: Path, undisturbed: bytes) -> None:
    """The run that came home is finished, went on at least once, and has the very weights."""
    state = json.loads((home / "run.json").read_text())
    assert (state["status"], state["exit_code"]) == ("finished", 0)
    ledger = [json.loads(line) for line in (home / "ledger.jsonl").read_text().splitlines()]
    codes = [line["exit_code"] for line in ledger if line["kind"] == "end"]
    assert codes[-2:] == [75, 0], codes
    assert (home / "last.safetensors").read_bytes() == undisturbed


def test_sagemaker(tmp_path: Path, s3: Any, bucket: str, packed: Path, undisturbed: bytes) -> None:
    upload(s3, packed, f"{bucket}/digits")
    where = ("--role", ROLE, "--bucket", bucket.removeprefix("s3://"), "--machine", "ml.g5.xlarge")
    data = ("--data", f"{bucket}/digits", "--spot", "--name", "rehearsal", "--yes")
    limit = ("--max-run", "60")  # so small a model is in no table
    assert cli.run(["launch", "sagemaker", "demo", *where, *data, *limit, *OPTIONS]) == 0
    with closing(boto3.client("sagemaker", region_name="us-east-1")) as client:
        job = client.describe_training_job(TrainingJobName="rehearsal")
    kept = job["CheckpointConfig"]["S3Uri"]

    def machine(base: Path) -> list[str | Path]:
        """What SageMaker makes of a job: the files, and the command."""
        for channel in job["InputDataConfig"]:
            url = channel["DataSource"]["S3DataSource"]["S3Uri"]
            download(s3, url, base / "input" / "data" / channel["ChannelName"])
        download(s3, kept, base / "checkpoints")
        config = base / "input" / "config"
        config.mkdir()
        told = {
            "hyperparameters": job["HyperParameters"],
            "inputdataconfig": {c["ChannelName"]: {} for c in job["InputDataConfig"]},
            "resourceconfig": {"current_host": "algo-1", "hosts": ["algo-1"]},
            "checkpointconfig": job["CheckpointConfig"],
        }
        for name, content in told.items():
            (config / f"{name}.json").write_text(json.dumps(content))
        python = bare_python(base.parent)
        program, *arguments = job["AlgorithmSpecification"]["ContainerEntrypoint"]
        assert program == "python3"
        return [python, *(word.replace(str(BASE), str(base)) for word in arguments)]

    first, second = tmp_path / "first" / "ml", tmp_path / "second" / "ml"
    code, said = run(machine(first), first, stop_at="  val ")
    assert code == 75, said
    upload(s3, first / "checkpoints", kept)
    code, said = run(machine(second), second)
    assert code == 0, said
    assert not (second / "output" / "failure").exists()
    upload(s3, second / "checkpoints", kept)
    home = tmp_path / "home"
    assert cli.run(["fetch", "rehearsal", str(home), "--region", "us-east-1"]) == 0
    check(home, undisturbed)


@pytest.fixture
def ec2(bucket: str) -> Generator[Any]:
    """EC2 on moto, with an image and a profile; what the test makes ends with it."""
    with closing(boto3.client("ec2", region_name="us-east-1")) as client:
        yield client


def inventory(ec2: Any) -> dict[str, set[str]]:
    """What EC2 has that somebody pays for."""
    machines = (
        one for found in ec2.describe_instances()["Reservations"] for one in found["Instances"]
    )
    spot = ec2.describe_spot_instance_requests()["SpotInstanceRequests"]
    return {
        "machines": {m["InstanceId"] for m in machines if m["State"]["Name"] != "terminated"},
        "volumes": {volume["VolumeId"] for volume in ec2.describe_volumes()["Volumes"]},
        "spot": {r["SpotInstanceRequestId"] for r in spot if r["State"] in ("open", "active")},
    }


def test_ec2(
    tmp_path: Path, s3: Any, ec2: Any, bucket: str, packed: Path, undisturbed: bytes
) -> None:
    upload(s3, packed, f"{bucket}/digits")
    ami = ec2.register_image(Name="mine (Ubuntu)", RootDeviceName="/dev/sda1")["ImageId"]
    with closing(boto3.client("iam", region_name="us-east-1")) as iam:
        iam.create_instance_profile(InstanceProfileName="machines")
    mine = ec2.create_volume(AvailabilityZone="us-east-1a", Size=10)["VolumeId"]
    before = inventory(ec2)
    assert mine in before["volumes"]
    where = ("--machine", "g5.xlarge", "--ami", ami, "--instance-profile", "machines", "--spot")
    data = ("--data", f"{bucket}/digits", "--remote", f"{bucket}/run", "--name", "rehearsal")
    launch = ["launch", "ec2", "demo", *where, *data, "--yes", *OPTIONS]

    def machine(folder: Path) -> list[str | Path]:
        """What the newest machine does at a start, once it has installed what it was given."""
        user_data = newest_user_data(ec2)
        root = folder / "root"
        text = user_data.replace(f"ROOT={ROOT}\n", f"ROOT={root}\n").replace(f"{ROOT}/", f"{root}/")
        values = dict(re.findall(r"^([A-Z]+)=(\S+)$", text, re.MULTILINE))
        files = download(s3, values["FILES"], root / "files")
        python = bare_python(folder)
        install = [python, "-m", "pip", "install", "--quiet", files / values["WHEEL"]]
        subprocess.run(install, check=True)
        (root / "bin").symlink_to(python.parent)
        script = folder / "boot"
        script.write_text(text)
        return ["bash", script, "run"]

    assert cli.run(launch) == 0
    code, said = run(machine(tmp_path / "first"), tmp_path / "first", stop_at="  val ")
    assert code == 75, said
    assert cli.run(["launch", "ec2", "--stop", "--name", "rehearsal", "--yes"]) == 0
    assert cli.run(launch) == 0
    code, said = run(machine(tmp_path / "second"), tmp_path / "second")
    assert code == 0, said
    home = tmp_path / "home"
    assert cli.run(["fetch", "rehearsal", str(home), "--region", "us-east-1"]) == 0
    check(home, undisturbed)
    assert cli.run(["launch", "ec2", "--cleanup", "--name", "rehearsal", "--yes"]) == 0
    assert inventory(ec2) == before


def newest_user_data(ec2: Any) -> str:
    """The user data of the machine that runs."""
    filters: list[dict[str, Any]] = [{"Name": "instance-state-name", "Values": ["running"]}]
    (found,) = ec2.describe_instances(Filters=filters)["Reservations"]
    machine = found["Instances"][0]["InstanceId"]
    told = ec2.describe_instance_attribute(InstanceId=machine, Attribute="userData")
    return base64.b64decode(told["UserData"]["Value"]).decode()
