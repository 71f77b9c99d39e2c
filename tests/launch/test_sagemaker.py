"""Requests to SageMaker: held to botocore's model, to the documents, and to moto on loopback."""

import io
import json
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import boto3
import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from pitstop.cli.launch.common import LaunchCommand
from pitstop.cli.launch.sagemaker import sagemaker as command
from pitstop.core.errors import InputError
from pitstop.core.recipe import load_recipe, parse_recipe
from pitstop.core.timeline import Timeline
from pitstop.launch import container, sagemaker
from pitstop.launch.request import Request
from pitstop.launch.sagemaker import (
    METRICS,
    SWITCHES,
    Target,
    as_folder,
    as_hyperparameters,
    check,
    compose,
    run_url,
    stock_image,
    submit,
)
from pitstop.report.progress import Progress

ROLE = "arn:aws:iam::123456789012:role/service-role/Trainer"
PLAN: Any = SimpleNamespace(max_run_seconds=3600, max_wait_seconds=7200)
REQUEST = Request(
    name="fast-1",
    recipe=load_recipe("fast"),
    recipe_name="fast",
    data="s3://data/imagenet",
    train_options=("--epochs", "18", "--no-compile", "--set", "ema.decay=0.9"),
    spot=True,
    estimate=PLAN,
)
TARGET = Target(region="us-east-1", role=ROLE, bucket="bucket", machine="ml.p4d.24xlarge")


def test_a_spot_job_with_a_plan():
    job = compose(REQUEST, TARGET)
    assert job["StoppingCondition"] == {"MaxRuntimeInSeconds": 3600, "MaxWaitTimeInSeconds": 7200}
    assert job["EnableManagedSpotTraining"] is True
    assert job["CheckpointConfig"] == {
        "S3Uri": "s3://bucket/pitstop/fast-1/checkpoints/",
        "LocalPath": "/opt/ml/checkpoints",
    }
    assert job["HyperParameters"] == {
        "recipe": "fast",
        "epochs": "18",
        "set": "ema.decay=0.9",
        "no_compile": "true",
    }
    assert job["ResourceConfig"]["InstanceType"] == "ml.p4d.24xlarge"
    urls = {
        channel["ChannelName"]: channel["DataSource"]["S3DataSource"]["S3Uri"]
        for channel in job["InputDataConfig"]
    }
    assert urls == {
        "training": "s3://data/imagenet/",
        "pitstop": "s3://bucket/pitstop/fast-1/code/",
    }


def test_the_entrypoint_is_a_program_and_no_shell():
    """A shell would not pass SIGTERM on."""
    entry = compose(REQUEST, TARGET)["AlgorithmSpecification"]["ContainerEntrypoint"]
    assert entry == ["python3", "/opt/ml/input/data/pitstop/sagemaker_start.py"]


def test_what_is_stated_goes_before_the_plan():
    target = replace(TARGET, max_run_seconds=600, max_wait_seconds=900)
    stopping = compose(REQUEST, target)["StoppingCondition"]
    assert stopping == {"MaxRuntimeInSeconds": 600, "MaxWaitTimeInSeconds": 900}
    on_demand = compose(replace(REQUEST, spot=False), replace(TARGET, max_run_seconds=600))
    assert on_demand["StoppingCondition"] == {"MaxRuntimeInSeconds": 600}


def test_without_a_plan_max_run_is_wanted():
    unknown = replace(REQUEST, estimate=None)
    with pytest.raises(InputError, match="--max-run"):
        compose(unknown, TARGET)
    stopping = compose(unknown, replace(TARGET, max_run_seconds=600))["StoppingCondition"]
    assert stopping == {"MaxRuntimeInSeconds": 600, "MaxWaitTimeInSeconds": 4200}


def test_data_that_is_not_in_s3_is_an_option():
    job = compose(replace(REQUEST, data="digits"), TARGET)
    assert [channel["ChannelName"] for channel in job["InputDataConfig"]] == ["pitstop"]
    assert job["HyperParameters"]["data"] == "digits"


def test_channels_stand_for_data():
    target = replace(TARGET, channels={"train": "s3://d/train", "val": "s3://d/val/"})
    job = compose(replace(REQUEST, data=None), target)
    urls = [c["DataSource"]["S3DataSource"]["S3Uri"] for c in job["InputDataConfig"]]
    assert urls[:2] == ["s3://d/train/", "s3://d/val/"]
    assert "data" not in job["HyperParameters"]


@pytest.mark.parametrize(
    ("url", "folder"),
    [
        ("s3://b/run-1", "s3://b/run-1/"),
        ("s3://b/run-1/", "s3://b/run-1/"),
        ("s3://b/imagenet-v1.0", "s3://b/imagenet-v1.0/"),
        ("s3://b/cifar.tar.gz", "s3://b/cifar.tar.gz"),
        ("s3://b/x.parquet", "s3://b/x.parquet"),
    ],
)
def test_a_prefix_does_not_take_its_neighbours_along(url, folder):
    assert as_folder(url) == folder


@pytest.mark.parametrize(
    ("region", "machine", "image"),
    [
        ("us-east-1", "ml.p4d.24xlarge", "763104351884.dkr.ecr.us-east-1.amazonaws.com/{gpu}"),
        ("eu-west-1", "ml.m5.large", "763104351884.dkr.ecr.eu-west-1.amazonaws.com/{cpu}"),
        ("eu-south-1", "ml.g5.xlarge", "692866216735.dkr.ecr.eu-south-1.amazonaws.com/{gpu}"),
        ("cn-north-1", "ml.p3.2xlarge", "727897471807.dkr.ecr.cn-north-1.amazonaws.com.cn/{gpu}"),
    ],
)
def test_the_stock_image_is_that_of_the_region_and_the_machine(region, machine, image):
    gpu, cpu = f"pytorch-training:{sagemaker.STOCK_GPU}", f"pytorch-training:{sagemaker.STOCK_CPU}"
    assert stock_image(region, machine) == image.format(gpu=gpu, cpu=cpu)


def test_another_image_may_be_given():
    job = compose(REQUEST, replace(TARGET, image="mine:1"))
    assert job["AlgorithmSpecification"]["TrainingImage"] == "mine:1"


# What SageMaker would refuse


def changed(job: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Returns the job with one value changed; None removes it."""
    key, _, rest = path.partition(".")
    inside = changed(job[key], rest, value) if rest else value
    return {k: v for k, v in (job | {key: inside}).items() if v is not None}


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("StoppingCondition.MaxWaitTimeInSeconds", 3599, "--max-wait .*: includes --max-run"),
        ("StoppingCondition.MaxWaitTimeInSeconds", None, "wants to know --max-wait"),
        ("StoppingCondition.MaxRuntimeInSeconds", 29 * 86400, "at most 40,320 minutes"),
        ("EnableManagedSpotTraining", False, "--max-wait: is for --spot only"),
        ("CheckpointConfig", None, "without a CheckpointConfig"),
        ("RoleArn", "Trainer-without-arn-but-long", "RoleArn .*: must match"),
        ("TrainingJobName", "a_b", "TrainingJobName 'a_b': must match"),
        ("TrainingJobName", "a" * 64, "TrainingJobName: at most 63, not 64"),
        ("ResourceConfig.InstanceType", "ml.p9.huge", "InstanceType 'ml.p9.huge': is unknown"),
        ("ResourceConfig.InstanceCount", "1", "Invalid type for parameter ResourceConfig"),
        ("StoppingCondition.MaxRuntimeInSeconds", 0, "valid min value: 1"),
        ("HyperParameters", {"set": "x" * 2501}, "HyperParameters set: at most 2,500"),
        ("HyperParameters", {f"k{n}": "" for n in range(101)}, "HyperParameters: at most 100"),
        ("Nonsense", 1, "Unknown parameter"),
        ("OutputDataConfig", None, "Missing required parameter"),
        ("Tags", [{"Key": "aws:x", "Value": "y"}], "--tag aws:x"),
    ],
)
def test_what_sagemaker_would_refuse_is_refused_here(path, value, said):
    job = compose(REQUEST, TARGET)
    check(job)
    with pytest.raises(InputError, match=said):
        check(changed(job, path, value))


@pytest.mark.parametrize(
    ("channels", "said"),
    [
        ({"a b": "s3://d/x"}, "ChannelName 'a b': must match"),
        ({"train": "/data/train"}, "write it as NAME=s3://|must match"),
        ({"pitstop": "s3://d/x"}, "--channel pitstop: is there twice"),
    ],
)
def test_channels_that_sagemaker_would_refuse(channels, said):
    with pytest.raises(InputError, match=said):
        compose(REQUEST, replace(TARGET, channels=channels))


def test_a_continuation_has_a_prefix_of_its_own():
    """The run before would be overwritten."""
    target = replace(TARGET, resume="s3://bucket/pitstop/fast-1/checkpoints")
    with pytest.raises(InputError, match="another --name"):
        compose(REQUEST, target)
    other = replace(TARGET, resume="s3://bucket/pitstop/fast-0/checkpoints/")
    assert compose(REQUEST, other)["HyperParameters"]["resume"] == other.resume


# Options that travel as strings

VALUES = st.one_of(
    st.sampled_from(["18", "1e-3", "true", "False", "null", '"x"', "[1]", "{}", "a=b", "--x", ""]),
    st.text(st.characters(codec="utf-8", exclude_categories=["C"]), max_size=8),
)
OPTIONS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(SWITCHES)),
        st.tuples(st.sampled_from(["--epochs", "--set", "--batch-size", "--model"]), VALUES),
    ),
    max_size=6,
)


@given(OPTIONS)
def test_options_arrive_as_they_were_given(given_options):
    """Each option's values in their order; that of different options does not matter to train."""
    words = [word for option in given_options for word in option]
    stated = as_hyperparameters(words)
    assert all(isinstance(value, str) for value in stated.values())
    arrived = container.options(stated)
    expected = ["=".join(option) for option in given_options]
    switches = {option for option in expected if option in SWITCHES}
    valued = [option for option in expected if option not in SWITCHES]
    assert {option for option in arrived if option in SWITCHES} == switches
    by_option = sorted((o for o in arrived if o not in SWITCHES), key=lambda o: o.partition("=")[0])
    assert by_option == sorted(valued, key=lambda option: option.partition("=")[0])


def test_an_option_may_be_written_with_an_equals_sign():
    assert as_hyperparameters(["--epochs=18", "--set=a=b"]) == {"epochs": "18", "set": "a=b"}


# What CloudWatch draws


def test_the_metrics_are_in_the_lines_that_train_prints():
    phases = [{"duration": "2ep", "resolution": 32, "batch_size": 2000, "lr": 0.00012}]
    timeline = Timeline(parse_recipe({"phases": phases}, "test"), num_samples=10_000)
    file = io.StringIO()
    shown = {"phase": "one", "loss": 12345.6, "top1": 61.54, "lr": 0.00001234}
    shown |= {"images_per_second": 23456.0, "wait_share": 0.031, "memory_mb": 2100.0}
    with Progress(Console(file=file), timeline, "fast in /opt/ml/model") as progress:
        progress.update(5, 1.0, **shown)
        progress.update(10, 2.0, **shown, val_top1=71.25, best_top1=72.5)
    before, after = file.getvalue().splitlines()
    found = {name: re.findall(regex, after) for name, regex in METRICS.items()}
    assert {name: [float(text) for text in texts] for name, texts in found.items()} == {
        "epoch": [2.0],
        "learning_rate": [1.23e-05],
        "train:loss": [12350.0],
        "train:top1": [61.5],
        "validation:top1": [71.25],
        "validation:best_top1": [72.5],
        "train:wait": [3],
    }
    assert not re.search(METRICS["validation:top1"], before)


# On moto


@pytest.fixture
def session(bucket, aws) -> Any:
    return boto3.Session(region_name="us-east-1")


def on(bucket: str) -> Target:
    return replace(TARGET, bucket=bucket.removeprefix("s3://"))


def test_a_job_is_submitted_with_its_code(session, bucket, tmp_path):
    job = compose(REQUEST, on(bucket))
    assert ":training-job/fast-1" in submit(session, REQUEST, on(bucket), job, tmp_path)
    described = session.client("sagemaker").describe_training_job(TrainingJobName="fast-1")
    assert described["HyperParameters"] == job["HyperParameters"]
    listed = session.client("s3").list_objects_v2(Bucket=on(bucket).bucket)["Contents"]
    names = {item["Key"].removeprefix("pitstop/fast-1/code/") for item in listed}
    wheel = next(name for name in names if name.endswith(".whl"))
    assert names == {wheel, "recipe.yaml", "sagemaker_start.py"}
    assert run_url("fast-1", session) == f"{bucket}/pitstop/fast-1/checkpoints/"


def test_a_run_with_a_bucket_of_its_own_is_there(session, bucket, tmp_path):
    request = replace(REQUEST, name="fast-2", remote="s3://mine/run")
    submit(session, request, on(bucket), compose(request, on(bucket)), tmp_path)
    assert run_url("fast-2", session) == "s3://mine/run"


def test_a_job_that_is_not_there_is_named(session):
    with pytest.raises(InputError, match=r"nobody: no such job in us-east-1"):
        run_url("nobody", session)


# The command


@pytest.fixture
def invoke(aws) -> Any:
    app = typer.Typer()
    app.command("sagemaker", cls=LaunchCommand)(command)

    def invoke(*arguments: str) -> Any:
        places = ["--role", ROLE, "--bucket", "bucket", "--name", "n-1", "--max-run", "60"]
        return CliRunner().invoke(app, [*arguments, *places])

    return invoke


def test_a_dry_run_prints_what_would_be_made(invoke):
    data = ("--data", "s3://data/imagenet", "--machine", "ml.m5.large")
    done = invoke("fast", *data, "--spot", "--dry-run", "--epochs", "3", "--extend=30")
    assert done.exit_code == 0, done.output
    assert "SageMaker training job n-1 in us-east-1: 1 x ml.m5.large, managed spot" in done.output
    printed = done.stdout[done.stdout.index("{") : done.stdout.rindex("}") + 1]
    job = json.loads(printed)
    assert job["HyperParameters"] == {"recipe": "fast", "epochs": "3", "extend": "30"}
    assert "nothing was created" in done.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "s3://d/x", "--channel", "train=s3://d/y"], "give one of them"),
        (["--channel", "train"], "write it as KEY=VALUE"),
        (["--data", "photos"], "is on this machine"),
        (["--data", "s3://d/x", "--max-wait", "70"], "--max-wait: is for --spot only"),
        (["--data", "s3://d/x"], "nothing was created"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_made(invoke, arguments, said):
    done = invoke("fast", "--machine", "m5.large", *arguments)
    assert isinstance(done.exception, InputError)
    assert said in str(done.exception)
