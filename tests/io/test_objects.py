"""Buckets on a loopback server, and directories."""

import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest

from pitstop.core.errors import InputError
from pitstop.io.objects import (
    MissingObjectError,
    Object,
    ObjectExistsError,
    ObjectStore,
    Patience,
    open_store,
)

from .faults import faulty_s3

NAMES = ("plain.jpg", "a b/ü%20#?.jpg", "deep/er/*~|.jpg")


@pytest.fixture(params=["bucket", "directory", "file URL"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    """An empty store."""
    (tmp_path / "direct ory").mkdir()
    urls = {
        "directory": str(tmp_path / "direct ory"),
        "file URL": f"file://{tmp_path}/direct%20ory",
    }
    if request.param == "bucket":
        return open_store(request.getfixturevalue("bucket") + "/a folder/")
    return open_store(urls[request.param])


def test_what_is_put_is_listed_and_got(store: ObjectStore) -> None:
    for index, name in enumerate(NAMES):
        store.put(name, name.encode() * (index + 1))
    found = {each.key: each.size for each in store.list()}
    assert found == {name: len(name.encode()) * (i + 1) for i, name in enumerate(NAMES)}
    for index, name in enumerate(NAMES):
        assert store.get(name) == name.encode() * (index + 1)


def test_a_file_is_put(store: ObjectStore, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    store.put("key", tmp_path / "file")
    assert store.get("key") == b"content"


def test_pieces_are_put_as_one_object_or_not_at_all(store: ObjectStore) -> None:
    pieces = [bytes([index]) * 2**20 for index in range(9)]
    store.put("key", iter(pieces))
    assert store.get("key") == b"".join(pieces)
    assert b"".join(store.stream("key")) == b"".join(pieces)

    def broken() -> Iterator[bytes]:
        yield from pieces
        raise InputError("the file was cut short")

    with pytest.raises(InputError, match=r"^the file was cut short$"):
        store.put("other", broken())
    assert [each.key for each in store.list()] == ["key"]


def test_an_empty_object_is_put_and_streamed(store: ObjectStore) -> None:
    store.create("key", b"")
    assert list(store.stream("key")) == []
    assert [each.size for each in store.list()] == [0]


def test_an_object_is_created_once(store: ObjectStore) -> None:
    store.create("a/key", b"first")
    with pytest.raises(ObjectExistsError, match=r"a/key: is there already"):
        store.create("a/key", b"other")
    assert store.get("a/key") == b"first"


def test_what_is_deleted_is_gone_and_nothing_else(store: ObjectStore) -> None:
    for key in ("a/b/1", "a/b/2", "a/3", "4"):
        store.put(key, b"")
    store.delete([])
    store.delete(["a/b/1", "a/b/2", "4"])
    assert [each.key for each in store.list()] == ["a/3"]


def test_what_is_put_into_a_directory_is_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr("pitstop.io.objects.sync", synced.append)
    open_store(str(tmp_path)).create("a/b/key", b"")
    expected = [tmp_path / name for name in ("a/b/key", "a/b", "a", ".")]
    assert synced == expected


def test_a_directory_is_made_in_one_that_is_there(tmp_path: Path) -> None:
    open_store(f"file://{tmp_path}/n%20ew", make_directory=True).put("key", b"")
    assert (tmp_path / "n ew" / "key").exists()
    url = str(tmp_path / "no" / "such")
    message = f"{url}: cannot be made: No such file or directory: make the directory it lies in"
    with pytest.raises(InputError, match=message):
        open_store(url, make_directory=True)


def test_a_range_is_what_it_says_and_ends_with_the_object(store: ObjectStore) -> None:
    store.put("key", bytes(range(100)))
    assert store.get_range("key", 10, 5) == bytes(range(10, 15))
    assert store.get_range("key", 95, 50) == bytes(range(95, 100))
    with pytest.raises(InputError, match=r"key: the object is shorter than expected"):
        store.get_range("key", 100, 1)


def test_a_folder_is_listed_without_its_namesakes(store: ObjectStore) -> None:
    for key in ("a/1", "a/b/2", "ab/3"):
        store.put(key, b"")
    assert {each.key for each in store.list("a")} == {"a/1", "a/b/2"}
    assert list(store.list("none")) == []


def test_a_store_sees_nothing_outside_its_folder(bucket: str) -> None:
    open_store(bucket).put("other/1", b"1")
    open_store(bucket).put("folders/1", b"1")
    store = open_store(f"{bucket}/folder")
    store.put("1", b"1")
    assert [each.key for each in store.list()] == ["1"]


def test_the_etag_changes_with_the_content(store: ObjectStore) -> None:
    store.put("key", b"one")
    (before,) = store.list()
    store.put("key", b"other")
    (after,) = store.list()
    assert isinstance(before, Object)
    assert before.etag
    assert before.etag != after.etag


def test_more_than_one_answer_of_keys_is_listed(bucket: str) -> None:
    from moto.core import DEFAULT_ACCOUNT_ID
    from moto.s3.models import s3_backends

    backend = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
    keys = [f"{index:05d}" for index in range(2500)]
    for key in keys:
        backend.put_object(bucket.removeprefix("s3://"), key, b"")
    assert [each.key for each in open_store(bucket).list()] == keys


def test_a_store_is_pickled_as_its_url(store: ObjectStore) -> None:
    store.put("key", b"content")
    pickled = pickle.dumps(store)
    assert b"a-secret" not in pickled
    assert b"AKIA" not in pickled
    assert pickle.loads(pickled).get("key") == b"content"


def test_what_is_not_there_is_named(store: ObjectStore) -> None:
    with pytest.raises(MissingObjectError, match=r"nix: is not there: check the name"):
        store.get("nix")
    with pytest.raises(InputError, match="cannot be read"):
        store.get("../nix")
    with pytest.raises(InputError, match="cannot be written"):
        store.put("../nix", b"")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://there/x", r"^ftp://there/x: write it as s3://"),
        ("s3://", r"^s3://: write it as s3://BUCKET/FOLDER$"),
        ("/no/such/place", r"^/no/such/place: is not a directory"),
        ("s3://key:hidden@bucket/x", r"^s3://: keep credentials out of the URL: set AWS_ACCESS"),
    ],
)
def test_a_url_that_cannot_be_opened_is_refused(url: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as refused:
        open_store(url)
    assert "hidden" not in str(refused.value)


def test_a_bucket_that_is_not_there_is_named(bucket: str) -> None:
    for use in (lambda s: list(s.list()), lambda s: s.get("k"), lambda s: s.put("k", b"")):
        with pytest.raises(InputError, match=r"^s3://no-such-bucket/.*there is no such bucket"):
            use(open_store("s3://no-such-bucket"))


def test_without_credentials_the_fix_is_named(bucket: str, aws: pytest.MonkeyPatch) -> None:
    aws.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(InputError, match="no credentials were found: set AWS_ACCESS_KEY_ID"):
        open_store(bucket).get("key")


def test_a_public_bucket_needs_no_credentials(bucket: str, aws: pytest.MonkeyPatch) -> None:
    import boto3

    client = boto3.client("s3")
    name = bucket.removeprefix("s3://")
    client.put_object(Bucket=name, Key="key", Body=b"content", ACL="public-read")
    client.close()
    aws.delenv("AWS_ACCESS_KEY_ID")
    aws.delenv("AWS_SECRET_ACCESS_KEY")
    aws.setenv("AWS_SKIP_SIGNATURE", "true")
    assert open_store(bucket).get("key") == b"content"


def test_credentials_come_from_a_profile(
    bucket: str, aws: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    open_store(bucket).put("key", b"content")
    aws.delenv("AWS_ACCESS_KEY_ID")
    aws.delenv("AWS_SECRET_ACCESS_KEY")
    keys = "aws_access_key_id = AKIAOTHER\naws_secret_access_key = other\n"
    (tmp_path / "no-credentials").write_text(f"[mine]\n{keys}")
    aws.setenv("AWS_PROFILE", "mine")
    assert open_store(bucket).get("key") == b"content"
    aws.setenv("AWS_PROFILE", "yours")
    with pytest.raises(InputError, match=r"the AWS profile is of no use: .*yours"):
        open_store(bucket)


def test_a_server_that_is_not_there_is_said_to_be(aws: pytest.MonkeyPatch) -> None:
    aws.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(InputError, match=r"^s3://bucket/key: the server was not reached"):
        open_store("s3://bucket").get("key")


def test_a_server_elsewhere_without_tls_has_to_be_allowed(aws: pytest.MonkeyPatch) -> None:
    aws.setenv("AWS_ENDPOINT_URL", "http://elsewhere.invalid")
    with pytest.raises(InputError, match="has no TLS: set AWS_ALLOW_HTTP=true"):
        open_store("s3://bucket").get("key")


def test_a_certificate_bundle_that_is_missing_is_named(aws: pytest.MonkeyPatch) -> None:
    aws.setenv("AWS_CA_BUNDLE", "/no/such/bundle")
    with pytest.raises(InputError, match="AWS_CA_BUNDLE=/no/such/bundle: cannot be read"):
        open_store("s3://bucket")


def test_the_right_that_lacks_is_named_and_no_secret(
    s3_endpoint: str, bucket: str, aws: pytest.MonkeyPatch
) -> None:
    with faulty_s3(s3_endpoint) as server:
        aws.setenv("AWS_ENDPOINT_URL", server.url)
        server.inject("deny", "")
        store = open_store(bucket)
        for right, use in {
            "list and read": lambda: store.get("key"),
            "write": lambda: store.create("key", b""),
            "delete": lambda: store.delete(["key"]),
        }.items():
            with pytest.raises(InputError) as refused:
                use()
            assert f"access was denied: ask for the right to {right}, or" in str(refused.value)
            assert "AKIA" not in str(refused.value)


def test_a_server_that_fails_is_asked_again_for_as_long_as_the_patience_lasts(
    s3_endpoint: str, bucket: str, aws: pytest.MonkeyPatch
) -> None:
    with faulty_s3(s3_endpoint) as server:
        aws.setenv("AWS_ENDPOINT_URL", server.url)
        store = open_store(bucket, patience=Patience(retries=2))
        server.inject("error", "PUT", times=2)
        store.put("key", b"content")
        server.inject("error", "GET", times=3)
        with pytest.raises(InputError, match="the server failed: try again later"):
            store.get("key")
        assert store.get("key") == b"content"
