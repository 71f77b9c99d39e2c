"""What an hour of a machine costs: `prices.yaml`, over which goes the user's own file.

`refresh` asks AWS and writes that file. Nothing here needs boto3 before it is called.
"""

import datetime
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import Field, ValidationError

from pitstop.core.errors import InputError
from pitstop.core.strict import Strict
from pitstop.io.storage import write_text
from pitstop.plan.machines import SAGEMAKER

if TYPE_CHECKING:  # an extra
    import boto3

PRICING_REGION = "us-east-1"
"""Where AWS answers for the prices of all regions."""


@dataclass(frozen=True)
class Price:
    """Dollars an hour. None: not known."""

    on_demand: float | None
    spot: float | None
    date: str
    region: str
    source: str

    def an_hour(self, *, spot: bool) -> float | None:
        """Returns what the spot market or a machine on demand costs."""
        return self.spot if spot else self.on_demand

    @property
    def stated(self) -> str:
        """Where and when it was the price, in words."""
        return f"{self.source} ({self.date}, {self.region})"


def find_price(machine: str) -> Price | None:
    """Returns the price of a machine by its name; None where it is not known.

    Raises:
        InputError: the user's file is wrong.
    """
    return known_prices().get(machine)


def known_prices() -> dict[str, Price]:
    """Returns every known price by the name of the machine; the user's own take precedence.

    Raises:
        InputError: the user's file is wrong.
    """
    return _bundled() | _read(users_file())


def users_file() -> Path:
    """Returns $PITSTOP_CONFIG/prices.yaml, by default ~/.config/pitstop/prices.yaml."""
    if place := os.environ.get("PITSTOP_CONFIG"):
        return Path(place).expanduser() / "prices.yaml"
    home = os.environ.get("XDG_CONFIG_HOME")
    return (Path(home) if home else Path.home() / ".config") / "pitstop" / "prices.yaml"


# Files


class _Entry(Strict):
    on_demand: float | None = Field(default=None, gt=0)
    spot: float | None = Field(default=None, gt=0)
    date: datetime.date | None = None
    region: str | None = None
    source: str | None = None


class _File(Strict):
    date: datetime.date
    region: str
    source: str = "your own"
    prices: dict[str, _Entry]


@cache
def _bundled() -> dict[str, Price]:
    return _read(Path(__file__).with_name("prices.yaml"))


def _read(path: Path) -> dict[str, Price]:
    """Returns the prices of a file; none where there is no file."""
    try:
        file = _File.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        raise InputError(f"{path}:{line} is not YAML") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"{key}: " for key in [".".join(map(str, first["loc"]))] if key)
        what = first["msg"].removeprefix("Value error, ")
        raise InputError(f"{path}: {where}{what[0].lower()}{what[1:]}") from None
    return {name: _price(entry, file) for name, entry in file.prices.items()}


def _price(entry: _Entry, file: _File) -> Price:
    return Price(
        on_demand=entry.on_demand,
        spot=entry.spot,
        date=str(entry.date or file.date),
        region=entry.region or file.region,
        source=entry.source or file.source,
    )


def _write(path: Path, prices: Mapping[str, Price]) -> None:
    """Writes a user's file that states everything of each entry."""
    latest = max(prices.values(), key=lambda price: price.date)
    entries = {
        name: {key: value for key, value in vars(price).items() if value is not None}
        for name, price in prices.items()
    }
    file = {"date": latest.date, "region": latest.region, "prices": entries}
    write_text(path, yaml.safe_dump(file, sort_keys=False))


# Asking AWS


def refresh(
    names: Iterable[str], region: str, session: "boto3.Session | None" = None
) -> dict[str, Price]:
    """Asks AWS for prices, and puts what it tells into the user's file; returns that.

    The other entries of the file stay. SageMaker (`ml.`) publishes no spot prices: its entries
    have none.

    Args:
        names: of machines.
        region: of AWS, such as `us-east-1`.
        session: of boto3; by default one of the environment's credentials.

    Raises:
        InputError: no boto3, no credentials, AWS refuses, or it knows none of the machines there.
    """
    session = session or _session(region)
    today = datetime.datetime.now(datetime.UTC)
    fresh = {name: _ask(name, region, session, today) for name in names}
    told = {name: price for name, price in fresh.items() if price.on_demand or price.spot}
    if not told:
        raise InputError(f"--region {region}: AWS tells no price of {', '.join(fresh)} there")
    path = users_file()
    try:
        _write(path, _read(path) | told)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
    return told


def _session(region: str) -> "boto3.Session":
    try:
        import boto3
    except ImportError:
        raise InputError("asking AWS needs boto3: pip install 'pitstop[aws]'") from None
    return boto3.Session(region_name=region)


def _ask(name: str, region: str, session: "boto3.Session", now: datetime.datetime) -> Price:
    from botocore.exceptions import BotoCoreError, ClientError

    price = Price(None, None, f"{now:%Y-%m-%d}", region, "published: AWS, asked")
    try:
        price = replace(price, on_demand=_on_demand(name, region, session))
        if not name.startswith(SAGEMAKER):
            price = replace(price, spot=_spot(name, region, session, now))
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code", "an error")
        raise InputError(
            f"AWS refuses {error.operation_name} ({code}): the credentials need "
            "pricing:GetProducts and ec2:DescribeSpotPriceHistory"
        ) from None
    except BotoCoreError as error:
        raise InputError(f"AWS cannot be asked for prices: {error}") from None
    return price


def _on_demand(name: str, region: str, session: "boto3.Session") -> float | None:
    """Returns the lowest positive price an hour of what AWS offers by that name, for Linux."""
    filters = {"regionCode": region}
    if name.startswith(SAGEMAKER):
        service = "AmazonSageMaker"
        filters |= {"instanceName": name, "component": "Training"}
    else:
        service = "AmazonEC2"
        filters |= {"instanceType": name, "operatingSystem": "Linux", "tenancy": "Shared"}
        filters |= {"preInstalledSw": "NA", "capacitystatus": "Used"}
    answer = session.client("pricing", region_name=PRICING_REGION).get_products(
        ServiceCode=service,
        Filters=[{"Type": "TERM_MATCH", "Field": k, "Value": v} for k, v in filters.items()],
    )
    offers = [dollars for text in answer["PriceList"] for dollars in _hourly(json.loads(text))]
    return min(offers, default=None)


def _hourly(product: dict[str, Any]) -> Iterator[float]:
    """Yields the positive prices an hour of a product in AWS's price list."""
    for term in product.get("terms", {}).get("OnDemand", {}).values():
        for dimension in term["priceDimensions"].values():
            dollars = float(dimension["pricePerUnit"].get("USD", 0))
            if dollars > 0 and dimension["unit"].lower() in ("hrs", "hours", "hour"):
                yield dollars


def _spot(name: str, region: str, session: "boto3.Session", now: datetime.datetime) -> float | None:
    """Returns the lowest of the zones' newest prices."""
    answer = session.client("ec2", region_name=region).describe_spot_price_history(
        InstanceTypes=[name],
        ProductDescriptions=["Linux/UNIX"],
        StartTime=now - datetime.timedelta(hours=1),
    )
    newest: dict[str, tuple[Any, float]] = {}
    for entry in answer["SpotPriceHistory"]:
        zone, at = entry["AvailabilityZone"], entry["Timestamp"]
        if zone not in newest or newest[zone][0] < at:
            newest[zone] = at, float(entry["SpotPrice"])
    return min((dollars for _, dollars in newest.values()), default=None)
