"""Prices: what is bundled, the user's own over it, and what AWS is asked."""

import datetime
import json
import sys
from typing import Any

import pytest

from pitstop.core.errors import InputError
from pitstop.plan.prices import find_price, known_prices, refresh, users_file

TODAY = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}"


@pytest.fixture(autouse=True)
def _own_config(tmp_path, monkeypatch):
    monkeypatch.setenv("PITSTOP_CONFIG", str(tmp_path / "config"))


def write(text: str) -> None:
    users_file().parent.mkdir(parents=True, exist_ok=True)
    users_file().write_text(text)


@pytest.mark.parametrize(
    ("name", "on_demand", "spot"),
    [
        ("p4d.24xlarge", 32.77, 11.00),
        ("p3.8xlarge", 12.24, 3.94),
        ("g5.xlarge", 1.006, 0.35),
        ("g5.12xlarge", 5.67, 2.00),
        ("g6.12xlarge", 4.6016, 1.20),
        ("p5.48xlarge", 55.06, 19.27),
    ],
)
def test_the_snapshot_is_there_with_its_date(name, on_demand, spot):
    price = find_price(name)
    assert price is not None
    assert (price.on_demand, price.spot) == (on_demand, spot)
    assert (price.an_hour(spot=False), price.an_hour(spot=True)) == (on_demand, spot)
    assert price.date.startswith("2025-06-")
    assert price.region == "us-east-1"
    assert price.source in price.stated
    assert price.date in price.stated


def test_every_price_says_where_it_is_from():
    words = ("published: ", "derived: ", "assumed: ")
    assert all(price.source.startswith(words) for price in known_prices().values())


def test_the_users_file_wins_entry_by_entry():
    write(
        "date: 2026-11-01\nregion: eu-west-1\n"
        "prices: {p4d.24xlarge: {on_demand: 21.96}, local: {on_demand: 0.05, source: the plug}}\n"
    )
    price, local = find_price("p4d.24xlarge"), find_price("local")
    assert price is not None
    assert (price.on_demand, price.spot) == (21.96, None)
    assert (price.date, price.region, price.source) == ("2026-11-01", "eu-west-1", "your own")
    assert local is not None
    assert local.stated == "the plug (2026-11-01, eu-west-1)"
    assert find_price("g5.xlarge") is not None
    assert find_price("x1.large") is None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("prices: {", "not YAML"),
        ("", "valid dictionary"),
        ("date: 2026-11-01\nregion: x\nprices: {a: {on_demand: -1}}", "prices.a.on_demand"),
        ("date: 2026-11-01\nregion: x\nprices: {a: {spots: 1}}", "did you mean 'spot'"),
        ("date: yesterday\nregion: x\nprices: {}", "date"),
        ("region: x\nprices: {}", "date"),
    ],
)
def test_a_wrong_file_is_refused_by_its_name_and_key_in_one_line(text, told):
    write(text)
    with pytest.raises(InputError) as refused:
        find_price("p4d.24xlarge")
    message = str(refused.value)
    assert message.startswith(f"{users_file()}:")
    assert told in message
    assert "\n" not in message


# Asking AWS: botocore's stubs check both the request and the answer against AWS's own model.


class StubbedSession:
    """Hands out clients that expect these calls, and no others."""

    def __init__(self, answers: dict[str, list[tuple[str, dict[str, Any], Any]]]) -> None:
        import boto3
        from botocore.stub import Stubber

        real = boto3.Session("key", "secret", region_name="us-east-1")
        self.regions: dict[str, str] = {}
        self._clients: dict[str, Any] = {}
        self.stubs: list[Any] = []
        for service, calls in answers.items():
            self._clients[service] = real.client(service)  # pyright: ignore
            stub = Stubber(self._clients[service])
            for operation, expected, answer in calls:
                if isinstance(answer, str):
                    stub.add_client_error(operation, answer)
                else:
                    stub.add_response(operation, answer, expected)
            stub.activate()
            self.stubs.append(stub)

    def client(self, service: str, region_name: str) -> Any:
        self.regions[service] = region_name
        return self._clients[service]


def product(*dollars: str, unit: str = "Hrs") -> str:
    """Returns a product in the form of AWS's price list."""
    dimensions = {
        str(number): {"unit": unit, "pricePerUnit": {"USD": usd}}
        for number, usd in enumerate(dollars)
    }
    return json.dumps({"terms": {"OnDemand": {"offer": {"priceDimensions": dimensions}}}})


def spot(zone: str, minute: int, dollars: str) -> dict[str, Any]:
    at = datetime.datetime(2026, 11, 22, 12, minute, tzinfo=datetime.UTC)
    return {
        "AvailabilityZone": zone,
        "Timestamp": at,
        "SpotPrice": dollars,
        "InstanceType": "g5.xlarge",
    }


def terms(**filters: str) -> list[dict[str, str]]:
    return [{"Type": "TERM_MATCH", "Field": k, "Value": v} for k, v in filters.items()]


LINUX = {"operatingSystem": "Linux", "tenancy": "Shared", "preInstalledSw": "NA"}


def test_refresh_asks_aws_and_keeps_what_it_says():
    pytest.importorskip("boto3")
    from botocore.stub import ANY

    write("date: 2024-01-01\nregion: here\nprices: {local: {on_demand: 0.05}}\n")
    session = StubbedSession(
        {
            "pricing": [
                (
                    "get_products",
                    {
                        "ServiceCode": "AmazonEC2",
                        "Filters": terms(
                            regionCode="eu-west-1",
                            instanceType="g5.xlarge",
                            **LINUX,
                            capacitystatus="Used",
                        ),
                    },
                    {"PriceList": [product("0.0"), product("1.123", "9.9")]},
                ),
                (
                    "get_products",
                    {
                        "ServiceCode": "AmazonSageMaker",
                        "Filters": terms(
                            regionCode="eu-west-1",
                            instanceName="ml.g5.xlarge",
                            component="Training",
                        ),
                    },
                    {"PriceList": [product("1.6", unit="Hours"), product("3", unit="Quantity")]},
                ),
            ],
            "ec2": [
                (
                    "describe_spot_price_history",
                    {
                        "InstanceTypes": ["g5.xlarge"],
                        "ProductDescriptions": ["Linux/UNIX"],
                        "StartTime": ANY,
                    },
                    {
                        "SpotPriceHistory": [
                            spot("a", 1, "0.10"),
                            spot("a", 9, "0.50"),
                            spot("b", 5, "0.45"),
                        ]
                    },
                )
            ],
        }
    )
    told = refresh(["g5.xlarge", "ml.g5.xlarge"], "eu-west-1", session)  # pyright: ignore
    for stub in session.stubs:
        stub.assert_no_pending_responses()
    assert session.regions == {"pricing": "us-east-1", "ec2": "eu-west-1"}
    own, theirs = told["g5.xlarge"], told["ml.g5.xlarge"]
    assert (own.on_demand, own.spot) == (1.123, 0.45)  # the lowest zone's newest price
    assert (theirs.on_demand, theirs.spot) == (1.6, None)
    assert (own.date, own.region, own.source) == (TODAY, "eu-west-1", "published: AWS, asked")
    assert find_price("g5.xlarge") == own
    assert find_price("ml.g5.xlarge") == theirs
    local = find_price("local")
    assert local is not None
    assert (local.on_demand, local.date) == (0.05, "2024-01-01")


def test_what_aws_refuses_is_told_in_one_line_and_changes_nothing():
    pytest.importorskip("boto3")
    session = StubbedSession({"pricing": [("get_products", {}, "AccessDeniedException")]})
    with pytest.raises(InputError, match=r"GetProducts \(AccessDeniedException\).*pricing:Get"):
        refresh(["g5.xlarge"], "us-east-1", session)  # pyright: ignore
    assert not users_file().exists()


def test_a_region_without_the_machines_changes_nothing():
    pytest.importorskip("boto3")
    from botocore.stub import ANY

    history = {"InstanceTypes": ANY, "ProductDescriptions": ANY, "StartTime": ANY}
    session = StubbedSession(
        {
            "pricing": [("get_products", {"ServiceCode": ANY, "Filters": ANY}, {"PriceList": []})],
            "ec2": [("describe_spot_price_history", history, {"SpotPriceHistory": []})],
        }
    )
    with pytest.raises(InputError, match=r"no price of g5\.xlarge"):
        refresh(["g5.xlarge"], "mars-1", session)  # pyright: ignore
    assert not users_file().exists()


def test_without_boto3_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(InputError, match=r"pip install 'pitstop\[aws\]'"):
        refresh(["g5.xlarge"], "us-east-1")


def test_without_credentials_it_is_told_in_one_line(tmp_path, monkeypatch):
    pytest.importorskip("boto3")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(InputError, match="credentials") as refused:
        refresh(["g5.xlarge"], "us-east-1")
    assert "\n" not in str(refused.value)
