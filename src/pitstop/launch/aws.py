"""boto3 with errors of one line: what was asked, what is wrong, and the fix; never a secret."""

import os
import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pitstop.core.errors import InputError
from pitstop.io.objects import open_store

_CREDENTIALS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"

_CAUSES = (
    (
        "AccessDenied|UnauthorizedOperation|NotAuthorized",
        "is not allowed",
        "ask for the right to do it (IAM)",
    ),
    ("Expired", "was refused: the credentials are out of date", "renew them"),
    (
        "AuthFailure|InvalidClientTokenId|InvalidAccessKeyId|UnrecognizedClient|Signature|"
        "MissingAuthenticationToken",
        "was refused: the credentials were not accepted",
        _CREDENTIALS,
    ),
    (
        "OptInRequired",
        "was refused: the account is not signed up for it",
        "sign up, or contact AWS",
    ),
    ("Throttl|RequestLimit|TooManyRequests", "was refused: too many requests", "try again later"),
    (
        "LimitExceeded|MaxSpotInstanceCount|ServiceQuota",
        "was refused: the account's quota is used up",
        "ask for more in Service Quotas, or take another machine or region",
    ),
    (
        "Insufficient|CapacityError|SpotMaxPriceTooLow",
        "failed: AWS has no such machine free at this price now",
        "try another zone or machine, or later",
    ),
    ("InternalError|InternalFailure|ServiceUnavailable|Unavailable", "failed at AWS", "try later"),
)
"""What the code of an error holds, what it means, and the fix."""


def session(region: str | None = None) -> Any:
    """Returns a boto3 session that has credentials and a region.

    Args:
        region: `--region`; else AWS_REGION, AWS_DEFAULT_REGION or that of the profile counts.

    Raises:
        InputError: one of these is missing, or boto3 is.
    """
    try:
        import boto3
        from botocore.exceptions import BotoCoreError
    except ImportError:
        raise InputError("this needs boto3: pip install 'pitstop[aws]'") from None
    try:
        made = boto3.Session(region_name=region or os.environ.get("AWS_REGION"))
        credentials = made.get_credentials()
    except BotoCoreError as error:
        raise InputError(f"AWS: {_one_line(str(error))}: {_CREDENTIALS}") from None
    if credentials is None:
        raise InputError(f"AWS: no credentials were found: {_CREDENTIALS}")
    if made.region_name is None:
        raise InputError("AWS: no region is named: give --region, or set AWS_REGION")
    return made


@contextmanager
def client(session: Any, service: str) -> Generator[Any]:
    """Yields a client of a service, such as `ec2`; what it raises in the block is explained.

    Raises:
        InputError: a call failed in the block, and the block did not catch it.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    made: Any = None
    try:
        made = session.client(service)
        yield made
    except ClientError as error:
        raise _explain(service, error) from None
    except BotoCoreError as error:
        fix = "check the network, the region and the options"
        raise InputError(f"{service}: {_one_line(str(error))}: {fix}") from None
    finally:
        if made is not None:
            made.close()


def error_code(error: Any) -> str:
    """Returns the code of a botocore ClientError, such as `InvalidVolume.NotFound`."""
    return str(error.response.get("Error", {}).get("Code", "unknown"))


def _explain(service: str, error: Any) -> InputError:
    asked, code = f"{service}:{error.operation_name}", error_code(error)
    for pattern, what, fix in _CAUSES:
        if re.search(pattern, code):
            return InputError(f"{asked} {what} ({code}): {fix}")
    said = _one_line(str(error.response.get("Error", {}).get("Message", "")))
    return InputError(f"{asked} failed ({code}): {said or 'AWS says no more'}")


def _one_line(text: str) -> str:
    """Returns a message in one line, without access keys and the query of an URL."""
    text = re.sub(r"\b(?:AKIA|ASIA)[A-Z0-9]+", "(an access key)", " ".join(text.split()))
    return re.sub(r"(https?://[^\s?]+)\?\S*", r"\1", text).rstrip(".:")


def upload(url: str, files: Mapping[str, bytes | Path]) -> dict[str, str]:
    """Writes files into a folder of a bucket; returns the URL of each by its name.

    Args:
        url: the folder, such as `s3://bucket/folder`.
        files: names in it to contents, or to the files that have them.

    Raises:
        InputError: the bucket cannot be written.
    """
    store = open_store(url)
    for name, content in files.items():
        store.put(name, content)
    return {name: store.url_of(name) for name in files}
