"""Object stores: s3://, gs:// and az:// buckets, and directories, through obstore.

Credentials come from the environment, as obstore reads it: `AWS_*` (`AWS_ENDPOINT_URL`,
`AWS_SKIP_SIGNATURE=true` for public buckets), `GOOGLE_*`, `AZURE_*`, or the role of the machine;
an AWS profile through boto3, where it is installed. A server without TLS is talked to on loopback,
and elsewhere if `AWS_ALLOW_HTTP=true`. What goes wrong is an InputError of one line, which names
the URL and the fix, and never a secret.
"""

import os
import re
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import AzureStore, GCSStore, LocalStore, S3Store

from pitstop.core.errors import InputError
from pitstop.io.storage import sync

SCHEMES = ("s3", "gs", "az", "file")

_LIST_CHUNK = 1000
"""What S3 answers at once."""

_CHUNK_BYTES = 2**18
"""Of a stream. Larger ones leave the core's cache and are fresh memory each time: 4 MiB took half
as much CPU time again (measured)."""

_PART_BYTES = 8 * 2**20
_PARTS_AT_ONCE = 4
"""Of a large object that is written. All parts under way share the line, and each has to be through
before the patience ends."""


class MissingObjectError(InputError):
    """There is no object of this key."""


class ObjectExistsError(InputError):
    """There is an object of this key already."""


@dataclass(frozen=True)
class Patience:
    """How long a server is waited for.

    A large object on a slow line may take hours, but never stands still for long.
    """

    retries: int = 6
    retry_seconds: float = 120.0
    """After these no request is begun anew."""
    read_seconds: float = 30.0
    """Without a byte of an answer. What is sent counts as waiting too: a request that writes has to
    be through by then (measured)."""


PATIENCE = Patience()


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

    def __init__(self, url: str, patience: Patience = PATIENCE) -> None:
        self.url = url
        self._patience = patience
        with _explained(self.url):
            self._store = _open(self.url, patience)

    def __reduce__(self) -> tuple[type["ObjectStore"], tuple[str, Patience]]:
        return ObjectStore, (self.url, self._patience)

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

    def stream(self, key: str, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        """Yields `length` bytes from byte `start` as they come, in chunks of 256 KiB and more.

        Fewer where the object ends before; all of them without a length.
        """
        with _explained(self.url_of(key)):
            asked: Any = {"range": {"offset": start} if length is None else (start, start + length)}
            options = asked if start or length is not None else None
            yield from obstore.get(self._store, key, options=options).stream(_CHUNK_BYTES)

    def put(self, key: str, content: bytes | Path | Iterator[bytes]) -> None:
        """Writes an object, whole or not at all; one that is there is replaced.

        Args:
            content: bytes, the file that has them, or pieces of any size. An object of more than 8
                MiB is sent in parts of that size; if it fails, the parts are removed.
        """
        parts: Any = {"chunk_size": _PART_BYTES, "max_concurrency": _PARTS_AT_ONCE}
        with _explained(self.url_of(key), "write"):
            obstore.put(self._store, key, content, **parts)
            self._sync(key)

    def create(self, key: str, content: bytes) -> None:
        """Writes an object that is not there yet, in one request; of two who try, one succeeds.

        On S3 that is a conditional write (`If-None-Match: *`), which some servers do not know and
        some of these ignore. A request whose answer is lost is not repeated: the object may be
        there all the same.

        Raises:
            ObjectExistsError: there is one.
        """
        with _explained(self.url_of(key), "write"):
            obstore.put(self._store, key, content, mode="create", use_multipart=False)
            self._sync(key)

    def delete(self, keys: Sequence[str]) -> None:
        """Removes objects; on some stores one that is not there is an error."""
        if keys:
            with _explained(self.url, "delete"):
                obstore.delete(self._store, keys)

    def _sync(self, key: str) -> None:
        """Puts an object of a directory on disk, with the folders that lead to it."""
        if isinstance(self._store, LocalStore) and self._store.prefix is not None:
            root = self._store.prefix
            folders = [root / parent for parent in PurePosixPath(key).parents]
            for path in (root / key, *folders):
                sync(path)


def open_store(
    url: str, *, make_directory: bool = False, patience: Patience = PATIENCE
) -> ObjectStore:
    """Opens a bucket or a folder in it (`s3://bucket/folder`), or a directory.

    Nothing is asked of a bucket yet, a directory must exist.

    Args:
        make_directory: makes a directory that does not exist, in one that does.

    Raises:
        InputError: another scheme, no bucket's name, no such directory, an unknown AWS profile.
    """
    path = _directory(url)
    if path is not None and make_directory:
        try:
            path.mkdir(exist_ok=True)
        except OSError as error:
            fix = "make the directory it lies in, or name another one"
            raise InputError(f"{url}: cannot be made: {error.strerror}: {fix}") from None
    return ObjectStore(url, patience)


def _directory(url: str) -> Path | None:
    """Returns the directory that a URL means, None where it means a bucket."""
    scheme, separator, rest = url.partition("://")
    if separator and scheme != "file":
        return None
    return Path(unquote(rest) if separator else url).expanduser()


def _open(url: str, patience: Patience) -> S3Store | GCSStore | AzureStore | LocalStore:
    path = _directory(url)
    if path is not None:
        if not path.is_dir():
            raise InputError(f"{url}: is not a directory: name one, or a bucket (s3://...)")
        return LocalStore(path, automatic_cleanup=True)
    scheme, _, rest = url.partition("://")
    bucket, _, prefix = rest.partition("/")
    if scheme not in SCHEMES:
        raise InputError(f"{url}: write it as s3://..., gs://..., az://... or a directory")
    if "@" in bucket:
        raise InputError(f"{scheme}://: keep credentials out of the URL: {_CREDENTIALS[scheme]}")
    if not bucket:
        raise InputError(f"{url}: write it as {scheme}://BUCKET/FOLDER")
    options: Any = {
        "client_options": _client_options(patience),
        "retry_config": {
            "max_retries": patience.retries,
            "backoff": {"max_backoff": timedelta(seconds=10)},
            "retry_timeout": timedelta(seconds=patience.retry_seconds),
        },
    }
    folder = prefix.strip("/") or None
    if scheme == "s3":
        return S3Store(bucket, prefix=folder, credential_provider=_aws_profile(url), **options)
    return (GCSStore if scheme == "gs" else AzureStore)(bucket, prefix=folder, **options)


def _client_options(patience: Patience) -> dict[str, Any]:
    options: dict[str, Any] = {
        "connect_timeout": "5s",
        "read_timeout": timedelta(seconds=patience.read_seconds),
        "timeout": "1day",
    }
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
    ("403 Forbidden", "access was denied", "ask for the right to {right}, or {credentials}"),
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
    (r"status code: 50[0234]", "the server failed", "try again later"),
    (
        "HTTP error|timed out",
        "the server was not reached",
        "check the network and the endpoint (AWS_ENDPOINT_URL)",
    ),
)
"""What obstore's messages hold, what it means, and the fix. Its exceptions do not tell these."""


_PARTICIPLES = {"list and read": "read", "write": "written", "delete": "deleted"}


@contextmanager
def _explained(url: str, right: str = "list and read") -> Generator[None]:
    """Turns what obstore raises into an InputError; `right` is what the block takes."""
    try:
        yield
    except (BaseError, OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise _explain(url, error, right) from None


def _explain(url: str, error: Exception, right: str) -> InputError:
    if isinstance(error, AlreadyExistsError):
        return ObjectExistsError(f"{url}: is there already: give another name")
    text = _without_secrets(str(error).partition("\n\nDebug source")[0])
    credentials = _CREDENTIALS.get(url.partition("://")[0], "check the rights of the files")
    for pattern, what, fix in _CAUSES:
        if re.search(pattern, text):
            fix = fix.format(credentials=credentials, right=right)
            return InputError(f"{url}: {what}: {fix}")
    if isinstance(error, FileNotFoundError):
        return MissingObjectError(f"{url}: is not there: check the name")
    return InputError(f"{url}: cannot be {_PARTICIPLES[right]}: {' '.join(text.split())}")


def _without_secrets(text: str) -> str:
    """Returns a message with only the hosts of its URLs: their queries may be signed."""
    return re.sub(r"(https?://[^/\s]+)\S*", r"\1", text)
