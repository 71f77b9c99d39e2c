"""Trains on SageMaker: one request (CreateTrainingJob), and a folder in the user's bucket.

s3://BUCKET/PREFIX/NAME/code/         the wheel of this pitstop, the recipe, the script that starts
                        checkpoints/  the run, which SageMaker brings there while it trains
                        output/       model.tar.gz: the run directory, at the end

`container` is what runs there.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, cast

from pitstop.core.errors import InputError
from pitstop.launch.aws import client
from pitstop.launch.container import BASE, CODE, RECIPE, values
from pitstop.launch.request import Request, cost_lines, recipe_yaml
from pitstop.launch.wheel import build_wheel

START = "sagemaker_start.py"

SWITCHES = ("--compile", "--no-compile", "--deterministic", "--no-resume", "--rebase")
"""The options of `train` that take no value."""

STOCK_GPU = "2.6.0-gpu-py312-cu126-ubuntu22.04-sagemaker"
STOCK_CPU = "2.6.0-cpu-py312-ubuntu22.04-sagemaker"
"""Tags of AWS's deep learning image for PyTorch. Of later ones, CUDA no longer knows p3's V100."""

STOCK_ACCOUNT = "763104351884"
OTHER_ACCOUNTS = {
    "af-south-1": "626614931356",
    "ap-east-1": "871362719292",
    "ap-northeast-3": "364406365360",
    "ap-southeast-3": "907027046896",
    "cn-north-1": "727897471807",
    "cn-northwest-1": "727897471807",
    "eu-south-1": "692866216735",
    "il-central-1": "780543022126",
    "me-central-1": "914824155844",
    "me-south-1": "217643126080",
    "us-gov-west-1": "442386744353",
}
"""Of AWS, where another one offers it (image_uri_config in aws/sagemaker-python-sdk)."""

TRAINING = "training"
"""The channel of `--data`."""

METRICS = {
    "epoch": r"  epoch ([0-9.]+)/",
    "learning_rate": r"  lr ([0-9.e+-]+)  ",
    "train:loss": r"  loss ([0-9.e+-]+)  ",
    "train:top1": r"  top-1 ([0-9.]+)%  ",
    "validation:top1": r"  val ([0-9.]+)%  ",
    "validation:best_top1": r"  best ([0-9.]+)%  ",
    "train:wait": r"  wait ([0-9]+)%  ",
}
"""What CloudWatch draws, from the lines that `train` prints where there is no terminal."""

LONGEST_RUN = 28 * 24 * 3600
"""Seconds that SageMaker lets a job run; an account's quota may be lower."""

WAIT_SECONDS = 3600
"""For a spot machine, where no plan says how long to wait."""

_FILES = re.compile(r".*\.(tar|tar\.\w+|tgz|tbz2|txz|parquet)", re.IGNORECASE)


@dataclass(frozen=True)
class Target:
    """Where SageMaker is to run it, and how."""

    region: str
    role: str
    """The ARN of the role that the job has."""
    bucket: str
    machine: str
    """`ml.p4d.24xlarge`"""
    prefix: str = "pitstop"
    volume_gb: int = 200
    """For the data, the packed data and the run, on machines without disks of their own."""
    image: str | None = None
    """None is AWS's; another one may have pitstop, or the wheel is installed."""
    checkpoints: str | None = None
    """A folder of a bucket; None is the run's own."""
    channels: Mapping[str, str] = field(default_factory=dict[str, str])
    """S3 folders by the names of their channels, instead of `--data`."""
    input_mode: str = "File"
    max_run_seconds: int | None = None
    max_wait_seconds: int | None = None
    """None is what the plan says."""
    resume: str | None = None
    """The URL of the run to begin from."""
    tags: Mapping[str, str] = field(default_factory=dict[str, str])


def folder(request: Request, target: Target) -> str:
    """Returns the URL of the run's folder in the bucket, with a `/` at its end."""
    return f"s3://{'/'.join(filter(None, [target.bucket, target.prefix, request.name]))}/"


def compose(request: Request, target: Target) -> dict[str, Any]:
    """Returns the arguments of create_training_job, checked.

    Raises:
        InputError: SageMaker would not take it, or it would write over the run that it begins from.
    """
    home = folder(request, target)
    kept = as_folder(target.checkpoints or f"{home}checkpoints")
    if target.resume is not None and as_folder(target.resume) == kept:
        raise InputError(f"--resume {target.resume}: is where this run goes: give another --name")
    job = {
        "TrainingJobName": request.name,
        "RoleArn": target.role,
        "AlgorithmSpecification": {
            "TrainingImage": target.image or stock_image(target.region, target.machine),
            "TrainingInputMode": "File",
            "ContainerEntrypoint": ["python3", str(BASE / "input" / "data" / CODE / START)],
            "MetricDefinitions": [{"Name": n, "Regex": regex} for n, regex in METRICS.items()],
            "EnableSageMakerMetricsTimeSeries": True,
        },
        "HyperParameters": hyperparameters(request, target),
        "InputDataConfig": [
            *(_channel(n, url, target.input_mode) for n, url in channels(request, target).items()),
            _channel(CODE, f"{home}code/", "File"),
        ],
        "OutputDataConfig": {"S3OutputPath": f"{home}output/"},
        "CheckpointConfig": {"S3Uri": kept, "LocalPath": str(BASE / "checkpoints")},
        "ResourceConfig": {
            "InstanceType": target.machine,
            "InstanceCount": request.nodes,
            "VolumeSizeInGB": target.volume_gb,
        },
        "StoppingCondition": _stopping(request, target),
        "EnableManagedSpotTraining": request.spot,
        "ProfilerConfig": {"DisableProfiler": True},
        "Tags": [
            {"Key": key, "Value": value}
            for key, value in {"pitstop:launch": request.name, **target.tags}.items()
        ],
    }
    check(job)
    return job


def stock_image(region: str, machine: str) -> str:
    """Returns AWS's deep learning image for PyTorch, of a machine (`ml.g5.xlarge`) in a region."""
    family = machine.removeprefix("ml.")
    tag = STOCK_GPU if family[:1] in ("g", "p") else STOCK_CPU
    account = OTHER_ACCOUNTS.get(region, STOCK_ACCOUNT)
    domain = "amazonaws.com.cn" if region.startswith("cn-") else "amazonaws.com"
    return f"{account}.dkr.ecr.{region}.{domain}/pytorch-training:{tag}"


def as_folder(url: str) -> str:
    """Returns the URL with a `/` at its end: without, SageMaker takes `run-10` along for `run-1`.

    That of a tar or a Parquet file stays as it is.
    """
    return url if _FILES.fullmatch(url) else f"{url.rstrip('/')}/"


def channels(request: Request, target: Target) -> dict[str, str]:
    """Returns the S3 folders of the data, by channel."""
    if target.channels:
        return {name: as_folder(url) for name, url in target.channels.items()}
    url = request.data or ""
    return {TRAINING: as_folder(url)} if url.startswith("s3://") else {}


def hyperparameters(request: Request, target: Target) -> dict[str, str]:
    """Returns what the container reads: the options of `train` as strings."""
    stated = {"recipe": request.recipe_name, **as_hyperparameters(request.train_options)}
    if request.remote is not None:
        stated["remote"] = request.remote
    if request.data is not None and not channels(request, target):
        stated["data"] = request.data
    if target.resume is not None:
        stated["resume"] = target.resume
    return stated


def as_hyperparameters(options: Sequence[str]) -> dict[str, str]:
    """Returns options of `train` as strings by name, of which `container.options` makes options.

    Switches become "true"; several values of an option, and what JSON would take for something
    else than a text, become a JSON list.
    """
    found: dict[str, list[str]] = {}
    words = iter(options)
    switches: dict[str, str] = {}
    for word in words:
        option, equals, value = word.partition("=")
        name = option.removeprefix("--").replace("-", "_")
        if option in SWITCHES:
            switches[name] = "true"
        else:
            found.setdefault(name, []).append(value if equals else next(words))
    return {name: _text(stated) for name, stated in found.items()} | switches


def _text(stated: list[str]) -> str:
    return stated[0] if [*values(stated[0])] == stated else json.dumps(stated)


def _channel(name: str, url: str, mode: str) -> dict[str, Any]:
    source = {
        "S3DataType": "S3Prefix",
        "S3Uri": url,
        "S3DataDistributionType": "FullyReplicated",
    }
    return {"ChannelName": name, "DataSource": {"S3DataSource": source}, "InputMode": mode}


def _stopping(request: Request, target: Target) -> dict[str, int]:
    """Returns the StoppingCondition: what was given, else what the plan says."""
    plan, run, wait = request.estimate, target.max_run_seconds, target.max_wait_seconds
    if run is None and plan is not None:
        run = plan.max_run_seconds
    if run is None:
        raise InputError(f"--max-run: no plan for {target.machine} says it: give it, in minutes")
    if wait is None and request.spot:
        room = plan.max_wait_seconds - plan.max_run_seconds if plan else WAIT_SECONDS
        wait = run + room
    stated = {"MaxRuntimeInSeconds": run}
    return stated if wait is None else stated | {"MaxWaitTimeInSeconds": wait}


def check(job: Mapping[str, Any]) -> None:
    """Raises InputError for what SageMaker would refuse, or would charge for in vain.

    By the model of the service in botocore, types, lengths, patterns and known values; and by what
    is documented besides (API reference, CreateTrainingJob and StoppingCondition).
    """
    from botocore.validate import ParamValidator

    shape = _shape()
    report: Any = ParamValidator().validate(job, shape)
    if report.has_errors():
        raise InputError(f"SageMaker: {' '.join(report.generate_report().split())}")
    for problem in (*_beyond_model(shape, job, ""), *_against_rules(job)):
        raise InputError(problem)


@cache
def _shape() -> Any:
    """Returns botocore's model of the request: 2 MB of JSON."""
    import botocore.session

    service: Any = botocore.session.get_session().get_service_model("sagemaker")
    return service.operation_model("CreateTrainingJob").input_shape


def _beyond_model(shape: Any, value: Any, where: str) -> Iterator[str]:
    """Yields what botocore's validation leaves to the service: lengths, patterns, known values."""
    limits = shape.metadata
    size = value if isinstance(value, int) else len(value)
    if size > limits.get("max", size):
        yield f"{where}: at most {limits['max']:,}, not {size:,}"
    if isinstance(value, str):
        pattern = limits.get("pattern", ".*")
        if r"\p" not in pattern and not re.fullmatch(pattern, value, re.DOTALL):
            yield f"{where} {value!r}: must match {pattern}"
        if value not in limits.get("enum", (value,)):
            yield f"{where} {value!r}: is unknown to SageMaker, or to this boto3: upgrade it then"
    elif shape.type_name == "list":
        for one in cast("list[Any]", value):
            yield from _beyond_model(shape.member, one, where)
    elif shape.type_name == "map":
        for key, one in cast("dict[str, Any]", value).items():
            yield from _beyond_model(shape.key, key, f"{where} {key}")
            yield from _beyond_model(shape.value, one, f"{where} {key}")
    elif shape.type_name == "structure":
        for key, one in cast("dict[str, Any]", value).items():
            yield from _beyond_model(shape.members[key], one, f"{where}.{key}".lstrip("."))


def _against_rules(job: Mapping[str, Any]) -> Iterator[str]:
    """Yields what the documents forbid."""
    stopping, spot = job["StoppingCondition"], job.get("EnableManagedSpotTraining", False)
    run, wait = stopping["MaxRuntimeInSeconds"], stopping.get("MaxWaitTimeInSeconds")
    if max(run, wait or 0) > LONGEST_RUN:
        yield f"--max-run and --max-wait: at most {LONGEST_RUN // 60:,} minutes (28 days)"
    if spot and "CheckpointConfig" not in job:
        yield "--spot: without a CheckpointConfig an interruption loses all"
    if spot and wait is None:
        yield "--spot: SageMaker wants to know --max-wait"
    if wait is not None and not spot:
        yield "--max-wait: is for --spot only: leave it out"
    if spot and wait is not None and wait < run:
        yield f"--max-wait {wait / 60:g}: includes --max-run {run / 60:g}: give more"
    names = [channel["ChannelName"] for channel in job["InputDataConfig"]]
    for name in names:
        if names.count(name) > 1:
            yield f"--channel {name}: is there twice"
    for channel in job["InputDataConfig"]:
        url = channel["DataSource"]["S3DataSource"]["S3Uri"]
        if not url.startswith("s3://"):
            yield f"--channel {channel['ChannelName']}={url}: write it as NAME=s3://BUCKET/FOLDER"
    for tag in job.get("Tags", ()):
        if tag["Key"].lower().startswith("aws:"):
            yield f"--tag {tag['Key']}: names that begin with aws: are AWS's own"


def lines(request: Request, target: Target, job: Mapping[str, Any]) -> list[str]:
    """Returns what will be made, and what it costs, to be printed before it is."""
    stopping = job["StoppingCondition"]
    minutes = {key: -(-seconds // 60) for key, seconds in stopping.items()}
    limit = f"stopped after {minutes['MaxRuntimeInSeconds']} min of training"
    if request.spot:
        limit += f", and {minutes['MaxWaitTimeInSeconds']} min with waiting for machines"
    kind = "managed spot" if request.spot else "on demand"
    continued = [] if target.resume is None else [f"begins from {target.resume}"]
    return [
        f"SageMaker training job {request.name} in {target.region}: {request.nodes} x "
        f"{target.machine}, {kind}, {target.volume_gb} GB of storage each",
        f"image: {job['AlgorithmSpecification']['TrainingImage']}",
        f"code and model: {folder(request, target)}",
        f"checkpoints: {job['CheckpointConfig']['S3Uri']}",
        *continued,
        limit,
        *cost_lines(request.estimate),
    ]


def next_steps(name: str, region: str) -> list[str]:
    """Returns what to do with a job that was submitted."""
    at = f"--region {region}"
    return [
        f"watch it:     aws logs tail /aws/sagemaker/TrainingJobs --follow {at} "
        f"--log-stream-name-prefix {name}/",
        f"stop it:      aws sagemaker stop-training-job --training-job-name {name} {at}",
        f"bring it home: pitstop fetch {name} DIR {at}",
        f"go on with it: pitstop launch sagemaker RECIPE --resume {name} ...",
    ]


def submit(
    session: Any, request: Request, target: Target, job: Mapping[str, Any], scratch: Path
) -> str:
    """Uploads the code and creates the job; returns its ARN.

    Args:
        session: of boto3.
        request, target: what `job` was composed of.
        scratch: a directory for the wheel.
    """
    wheel = build_wheel(scratch)
    contents = {
        wheel.name: wheel.read_bytes(),
        START: Path(__file__).with_name(START).read_bytes(),
        RECIPE: recipe_yaml(request.recipe_name).encode(),
    }
    key = folder(request, target).removeprefix(f"s3://{target.bucket}/")
    with client(session, "s3") as s3:
        for name, content in contents.items():
            s3.put_object(Bucket=target.bucket, Key=f"{key}code/{name}", Body=content)
    with client(session, "sagemaker") as sagemaker:
        return sagemaker.create_training_job(**job)["TrainingJobArn"]


def run_url(job: str, session: Any) -> str:
    """Returns where the run of a training job is kept.

    Raises:
        InputError: there is no such job, or it keeps nothing.
    """
    from botocore.exceptions import ClientError

    with client(session, "sagemaker") as sagemaker:
        try:
            found = sagemaker.describe_training_job(TrainingJobName=job)
        except ClientError as error:
            if "not found" not in str(error) and "not find" not in str(error):
                raise
            where = f"no such job in {session.region_name}"
            raise InputError(f"{job}: {where}: check its name and --region") from None
    own = str(next(values(found.get("HyperParameters", {}).get("remote", ""))))
    kept = own or found.get("CheckpointConfig", {}).get("S3Uri")
    model = found.get("ModelArtifacts", {}).get("S3ModelArtifacts")
    if kept is None and model is None:
        raise InputError(f"{job}: has no checkpoints and no model yet")
    return kept or model
