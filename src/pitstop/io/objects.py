"""Object stores: s3://, gs:// and az:// buckets, and directories, through obstore.

Credentials come from the environment, as obstore reads it: `AWS_*` (`AWS_ENDPOINT_URL`,
`AWS_SKIP_SIGNATURE=true` for public buckets), `GOOGLE_*`, `AZURE_*`, or the role of the machine;
an AWS profile through boto3, where it is installed. A server without TLS is talked to on loopback,
and elsewhere if `AWS_ALLOW_HTTP=true`. What goes wrong is an InputError of one line, which names
the URL and the fix, and never a secret.
"""

import os
import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import BaseError
from obstore.store import AzureStore, GCSStore, LocalStore, S3Store

from pitstop.core.errors import InputError

SCHEMES = ("s3", "gs", "az", "file")

_RETRY: Any = {
    "max_retries": 6,
    "backoff": {"max_backoff": timedelta(seconds=10)},
    "retry_timeout": timedelta(minutes=2),
}
_TIMEOUTS: Any = {"connect_timeout": "5s", "read_timeout": "30s", "timeout": "1day"}
"""A large object on a slow line may take hours, but never stands still for long."""

_LIST_CHUNK = 1000
"""What S3 answers at once."""

_CHUNK_BYTES = 2**18
"""Of a stream. Larger ones leave the core's cache and are fresh memory each time: 4 MiB took half
as much CPU time again (measured)."""


class MissingObjectError(InputError):
    """There is no object of this key."""


@dataclass(frozen=True)
class Object:
    """An object that was listed."""

    key: str
    """Relative to the store's URL."""
    size: int
    """Bytes."""
    etag: str | None
    """Changes with the content; what it is depends on the store."""


class ObjectStore:
    """What lies under a URL. Thread-safe; pickled, it is its URL and holds no credentials.

    All methods raise InputError when the store cannot be reached or says no, MissingObjectError
    when there is no such object.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        with _explained(self.url):
            self._store = _open(self.url)

    def __reduce__(self) -> tuple[type["ObjectStore"], tuple[str]]:
        return ObjectStore, (self.url,)

    def url_of(self, key: str) -> str:
        """Returns the URL of an object, to show."""
        return f"{self.url.rstrip('/')}/{key}"

    def list(self, prefix: str = "") -> Iterator[Object]:
        """Yields the objects below a folder, its folders' included, a thousand a request.

        Args:
            prefix: the folder's key; "" is all.
        """
        with _explained(self.url_of(prefix)):
            for chunk in obstore.list(self._store, prefix or None, chunk_size=_LIST_CHUNK):
                for found in chunk:
                    yield Object(found["path"], found["size"], found["e_tag"])

    def get(self, key: str) -> bytes:
        """Returns an object's content."""
        with _explained(self.url_of(key)):
            return obstore.get(self._store, key).bytes().to_bytes()

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Returns `length` bytes from byte `start`; fewer where the object ends before."""
        with _explained(self.url_of(key)):
            return obstore.get_range(self._store, key, start=start, length=length).to_bytes()

    def stream(self, key: str, start: int, length: int) -> Iterator[bytes]:
        """Yields `length` bytes from byte `start` as they come, in chunks of 256 KiB and more.

        Fewer where the object ends before.
        """
        with _explained(self.url_of(key)):
            asked: Any = {"range": (start, start + length)}
            yield from obstore.get(self._store, key, options=asked).stream(_CHUNK_BYTES)

    def put(self, key: str, content: bytes | Path) -> None:
        """Writes an object, whole or not at all.

        Args:
            content: bytes, or the file that has them.
        """
        with _explained(self.url_of(key)):
            obstore.put(self._store, key, content)


def open_store(url: str) -> ObjectStore:
    """Opens a bucket or a folder in it (`s3://bucket/folder`), or a directory.

    Nothing is asked of a bucket yet, a directory must exist.

    Raises:
        InputError: another scheme, no bucket's name, no such directory, an unknown AWS profile.
    """
    return ObjectStore(url)


def _open(url: str) -> S3Store | GCSStore | AzureStore | LocalStore:
    scheme, separator, rest = url.partition("://")
    if not separator or scheme == "file":
        path = Path(unquote(rest) if separator else url).expanduser()
        if not path.is_dir():
            raise InputError(f"{url}: is not a directory: name one, or a bucket (s3://...)")
        return LocalStore(path)
    bucket, _, prefix = rest.partition("/")
    if scheme not in SCHEMES:
        raise InputError(f"{url}: write it as s3://..., gs://..., az://... or a directory")
    if "@" in bucket:
        raise InputError(f"{scheme}://: keep credentials out of the URL: {_CREDENTIALS[scheme]}")
    if not bucket:
        raise InputError(f"{url}: write it as {scheme}://BUCKET/FOLDER")
    options: Any = {"client_options": _client_options(), "retry_config": _RETRY}
    folder = prefix.strip("/") or None
    if scheme == "s3":
        return S3Store(bucket, prefix=folder, credential_provider=_aws_profile(url), **options)
    return (GCSStore if scheme == "gs" else AzureStore)(bucket, prefix=folder, **options)


def _client_options() -> dict[str, Any]:
    options = dict(_TIMEOUTS)
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    if urlsplit(endpoint).hostname in ("localhost", "127.0.0.1", "::1"):
        options["allow_http"] = True
    if bundle := os.environ.get("AWS_CA_BUNDLE"):
        try:
            options["root_certificate"] = Path(bundle).read_bytes()
        except OSError as error:
            raise InputError(f"AWS_CA_BUNDLE={bundle}: cannot be read: {error.strerror}") from None
    return options


def _aws_profile(url: str) -> Any:
    """Returns what provides the credentials of an AWS profile, None where obstore finds its own."""
    if {"AWS_ACCESS_KEY_ID", "AWS_SKIP_SIGNATURE"} & os.environ.keys():
        return None
    named = os.environ.get("AWS_PROFILE")
    home = Path("~/.aws").expanduser()
    files = (
        os.environ.get("AWS_SHARED_CREDENTIALS_FILE", home / "credentials"),
        os.environ.get("AWS_CONFIG_FILE", home / "config"),
    )
    if not named and not any(Path(file).exists() for file in files):
        return None
    try:
        from boto3 import Session
        from botocore.exceptions import BotoCoreError
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError:
        if named:
            fix = "pip install 'pitstop[aws]', or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            raise InputError(f"{url}: AWS_PROFILE is read by boto3: {fix}") from None
        return None
    try:
        session = Session()
        return Boto3CredentialProvider(session) if session.get_credentials() else None
    except BotoCoreError as error:
        raise InputError(f"{url}: the AWS profile is of no use: {error}") from None


_CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE; for a public bucket "
    "AWS_SKIP_SIGNATURE=true",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS; for a public bucket GOOGLE_SKIP_SIGNATURE=true",
    "az": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY; for a public container "
    "AZURE_SKIP_SIGNATURE=true",
}

_CAUSES = (
    ("NoSuchBucket|ContainerNotFound", "there is no such bucket", "check its name"),
    (
        r"169\.254\.169\.254|token request|Missing \w+|Account must be specified",
        "no credentials were found",
        "{credentials}",
    ),
    (
        "ExpiredToken|RequestTimeTooSkewed",
        "the credentials are out of date, or the clock is wrong",
        "renew them",
    ),
    (
        "InvalidAccessKeyId|SignatureDoesNotMatch|401 Unauthorized",
        "the credentials were not accepted",
        "{credentials}",
    ),
    ("403 Forbidden", "access was denied", "ask for the right to list and read, or {credentials}"),
    (
        "InvalidRange|range was invalid|object was only",
        "the object is shorter than expected",
        "write it anew",
    ),
    ("Received redirect", "the bucket lies in another region", "set AWS_REGION to it"),
    (
        "HTTP error: builder error",
        "the endpoint has no TLS",
        "set AWS_ALLOW_HTTP=true if you trust the way there",
    ),
    (
        "HTTP error|timed out",
        "the server was not reached",
        "check the network and the endpoint (AWS_ENDPOINT_URL)",
    ),
)
"""What obstore's messages hold, what it means, and the fix. Its exceptions do not tell these."""


@contextmanager
def _explained(url: str) -> Generator[None]:
    """Turns what obstore raises into an InputError."""
    try:
        yield
    except (BaseError, OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise _explain(url, error) from None


def _explain(url: str, error: Exception) -> InputError:
    text = _without_secrets(str(error).partition("\n\nDebug source")[0])
    credentials = _CREDENTIALS.get(url.partition("://")[0], "check the rights of the files")
    for pattern, what, fix in _CAUSES:
        if re.search(pattern, text):
            return InputError(f"{url}: {what}: {fix.format(credentials=credentials)}")
    if isinstance(error, FileNotFoundError):
        return MissingObjectError(f"{url}: is not there: check the name")
    return InputError(f"{url}: cannot be read: {' '.join(text.split())}")


def _without_secrets(text: str) -> str:
    """Returns a message with only the hosts of its URLs: their queries may be signed."""
    return re.sub(r"(https?://[^/\s]+)\S*", r"\1", text)
