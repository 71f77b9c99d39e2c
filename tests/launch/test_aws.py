"""What AWS answers, in one line, without secrets."""

import builtins
from pathlib import Path
from typing import Any

import pytest
from botocore.stub import Stubber

from pitstop.core.errors import InputError
from pitstop.io.objects import open_store
from pitstop.launch import aws as launch_aws


def fail(session: Any, code: str, message: str = "") -> None:
    """Has EC2 answer with an error."""
    with launch_aws.client(session, "ec2") as ec2, Stubber(ec2) as stub:
        stub.add_client_error("run_instances", code, message)
        ec2.run_instances(MinCount=1, MaxCount=1)


def refused(session: Any, code: str, message: str = "") -> str:
    """The one line that becomes of an error of EC2."""
    with pytest.raises(InputError) as caught:
        fail(session, code, message)
    line = str(caught.value)
    assert "\n" not in line
    return line


FIXES = {
    "UnauthorizedOperation": "ask for the right",
    "AccessDeniedException": "ask for the right",
    "ExpiredTokenException": "renew",
    "RequestExpired": "renew",
    "AuthFailure": "AWS_ACCESS_KEY_ID",
    "UnrecognizedClientException": "AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "AWS_ACCESS_KEY_ID",
    "VcpuLimitExceeded": "Service Quotas",
    "ResourceLimitExceeded": "Service Quotas",
    "MaxSpotInstanceCountExceeded": "Service Quotas",
    "InsufficientInstanceCapacity": "another zone",
    "RequestLimitExceeded": "try again later",
    "ThrottlingException": "try again later",
    "Unavailable": "try later",
}


def test_an_error_names_the_action_and_the_fix(aws: pytest.MonkeyPatch) -> None:
    session = launch_aws.session()
    for code, fix in FIXES.items():
        line = refused(session, code)
        assert line.startswith("ec2:RunInstances")
        assert code in line
        assert fix in line


def test_what_is_not_known_is_told_as_aws_says_it_but_without_secrets(
    aws: pytest.MonkeyPatch,
) -> None:
    said = "no image ami-1\nfor AKIAIOSFODNN7EXAMPLE at https://host/path?X-Amz-Signature=secret"
    line = refused(launch_aws.session(), "InvalidAMIID.NotFound", said)
    assert "InvalidAMIID.NotFound" in line
    assert "no image ami-1 for" in line
    assert "AKIA" not in line
    assert "secret" not in line


def test_an_error_that_the_block_catches_is_its_own(aws: pytest.MonkeyPatch) -> None:
    from botocore.exceptions import ClientError

    with launch_aws.client(launch_aws.session(), "ec2") as ec2, Stubber(ec2) as stub:
        stub.add_client_error("run_instances", "InsufficientInstanceCapacity")
        with pytest.raises(ClientError) as caught:
            ec2.run_instances(MinCount=1, MaxCount=1)
    assert launch_aws.error_code(caught.value) == "InsufficientInstanceCapacity"


def test_a_wrong_parameter_and_a_dead_endpoint_are_one_line(aws: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(InputError, match=r"^ec2: Parameter validation failed[^\n]*$"),
        launch_aws.client(launch_aws.session(), "ec2") as ec2,
    ):
        ec2.describe_instances(MaxResults="many")
    aws.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    aws.setenv("AWS_MAX_ATTEMPTS", "1")
    with (
        pytest.raises(InputError, match=r"^ec2: Could not connect[^\n]*check the network"),
        launch_aws.client(launch_aws.session(), "ec2") as ec2,
    ):
        ec2.describe_instances()


# The session


def test_the_region_is_that_of_the_option_or_the_environment(aws: pytest.MonkeyPatch) -> None:
    aws.setenv("AWS_REGION", "eu-west-1")
    assert launch_aws.session().region_name == "eu-west-1"
    assert launch_aws.session("us-west-2").region_name == "us-west-2"
    aws.delenv("AWS_REGION")
    with pytest.raises(InputError, match="--region"):
        launch_aws.session()


def test_no_credentials_are_one_line(aws: pytest.MonkeyPatch) -> None:
    aws.delenv("AWS_ACCESS_KEY_ID")
    aws.delenv("AWS_SECRET_ACCESS_KEY")
    aws.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(InputError, match=r"no credentials.*AWS_PROFILE"):
        launch_aws.session()
    aws.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(InputError, match=r"nobody.*AWS_PROFILE"):
        launch_aws.session()


def test_boto3_that_is_missing_is_named(aws: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *more: Any) -> Any:
        if name == "boto3":
            raise ImportError(name)
        return real(name, *more)

    aws.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"pip install 'pitstop\[aws\]'"):
        launch_aws.session()


# Uploads


def test_files_are_uploaded_and_named(bucket: str, tmp_path: Path) -> None:
    (tmp_path / "wheel").write_bytes(b"wheel")
    urls = launch_aws.upload(f"{bucket}/code", {"a.whl": tmp_path / "wheel", "r.yaml": b"lr: 1"})
    assert urls == {"a.whl": f"{bucket}/code/a.whl", "r.yaml": f"{bucket}/code/r.yaml"}
    store = open_store(bucket)
    assert (store.get("code/a.whl"), store.get("code/r.yaml")) == (b"wheel", b"lr: 1")
