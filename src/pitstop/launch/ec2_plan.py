"""What a launch on EC2 will make: the machine, its zone and price, its image, its volume.

Nothing is made here; EC2 is only asked.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pitstop.core.errors import InputError
from pitstop.io.objects import MissingObjectError, open_store
from pitstop.launch import ec2_volume
from pitstop.launch.ec2_volume import Volume
from pitstop.launch.request import Request, cost_lines, refuse_local_files, refuse_unsafe_spot
from pitstop.plan.machines import machines
from pitstop.plan.prices import find_price

MOUNT = "/volume"
"""Where a machine has its volume: `--data /volume/imagenet`."""

LEAST_MINUTES = 60
"""For which a machine may run where the plan limits it: it also installs and stages."""

IMAGES = {
    "p3": "Deep Learning Proprietary Nvidia Driver AMI GPU PyTorch *(Ubuntu*",
    "": "Deep Learning OSS Nvidia Driver AMI GPU PyTorch *(Ubuntu*",
}
"""Names of AWS's Deep Learning AMIs by the beginning of a machine's name: the open driver knows no
V100."""

SMALLEST_DISK, ROOM_FOR_DATA = 60, 100
"""GB of the root disk, and how much more it is on machines without disks of their own."""

NOT_REPEATED = {
    "--no-resume": "give another --remote, or delete that run",
    "--resume": "copy that run to --remote, and leave this out",
}
"""Options of `train` that a machine cannot take, and what to do instead."""

NOT_IN_A_BUCKET = re.compile(r"\.(tar|tar\.\w+|tgz|tbz2|txz|parquet)$")
"""Of what `pitstop data pack` reads on a disk only."""


class NoMachineError(InputError):
    """There is no such machine at this price at the moment."""


@dataclass(frozen=True)
class Settings:
    """How to launch: the options of `pitstop launch ec2`.

    Raises:
        InputError: one of them wants another.
    """

    machine: str
    zone: str | None = None
    max_price: float | None = None
    """Dollars an hour."""
    max_run: float | None = None
    """Minutes after which the machine ends itself; None: what the plan allows."""
    key: str | None = None
    subnet: str | None = None
    security_groups: tuple[str, ...] = ()
    ami: str | None = None
    root_gb: int | None = None
    volume: str | None = None
    """The id of an existing one."""
    stage: bool = False
    """Packed data on the volume are copied to the machine's own disk first."""
    profile: str | None = None
    """The instance profile: the rights of the machine."""
    files: str | None = None
    """The folder of a bucket for what the machine installs from; None: in that of the run."""
    prepare: str | None = None
    """What to pack onto a new volume."""
    volume_gb: int | None = None
    prepare_machine: str = "c6i.4xlarge"

    def __post_init__(self) -> None:
        if self.machine.startswith("ml.") or self.machine == "local":
            raise InputError(f"--machine {self.machine}: name a machine of EC2, such as g5.xlarge")
        if (self.prepare is None) != (self.volume_gb is None):
            raise InputError("--prepare SRC and --volume-gb N go together: give both")
        if self.prepare is not None and self.volume is not None:
            raise InputError("--prepare makes a new volume: leave --volume out")
        if self.stage and self.prepare is None and self.volume is None:
            raise InputError("--stage copies from a volume: give --volume or --prepare")


@dataclass(frozen=True)
class Image:
    """An AMI."""

    id: str
    name: str
    root_device: str
    root_gb: int

    @property
    def user(self) -> str:
        """Who can log in."""
        return "ubuntu" if "ubuntu" in self.name.lower() else "ec2-user"


@dataclass(frozen=True)
class Offer:
    """A zone in which the machine can be had, any for None, at dollars an hour."""

    zone: str | None
    dollars: float | None


@dataclass(frozen=True)
class Plan:
    """What a launch will make."""

    request: Request
    settings: Settings
    region: str
    image: Image
    offers: tuple[Offer, ...]
    """To be tried in this order."""
    volume: Volume | None
    """That of the user, or of an earlier `--prepare` of the same name."""
    staged: bool
    """The data are packed, and copied to the machine's own disk first."""
    downloaded: bool = False
    """What is to be packed is copied from its bucket first."""

    @property
    def files(self) -> str:
        """The URL of the folder for what the machine installs from."""
        remote = (self.request.remote or "").rstrip("/")
        folder = self.settings.files or f"{remote}/launch"
        return f"{folder.rstrip('/')}/{self.request.name}"

    @property
    def max_minutes(self) -> int | None:
        """After which the machine ends itself."""
        if self.settings.max_run is not None:
            return math.ceil(self.settings.max_run)
        expected = self.request.estimate
        return max(LEAST_MINUTES, math.ceil(expected.max_run_seconds / 60)) if expected else None

    @property
    def lines(self) -> list[str]:
        """Says what will be made, and what it costs."""
        settings, request = self.settings, self.request
        offer = self.offers[0]
        kind = "spot" if request.spot else "on demand"
        zone = offer.zone or "any zone"
        price = "its price is not known" if offer.dollars is None else f"${offer.dollars:.4g}/h now"
        limit = "whenever that is (--max-run)"
        if self.max_minutes is not None:
            limit = f"at the latest after {self.max_minutes} minutes (--max-run)"
        kept = request.remote or f"{MOUNT}/runs/{request.name} on the volume"
        return [
            f"launch {request.name} in {self.region}:",
            *(f"  {line}" for line in self._volume_lines()),
            f"  1 x {settings.machine}, {kind}, {zone}: {price}",
            f"  {self.image.id} ({self.image.name}); root disk {self.root_gb} GB, gone with it",
            f"  pitstop's wheel and the recipe in {self.files}, until it has installed them",
            f"  the run is kept in {kept}",
            f"  it ends itself: when finished, diverged or out of budget, in a crash loop, {limit}",
            *(f"  {line}" for line in cost_lines(request.estimate)),
        ]

    @property
    def root_gb(self) -> int:
        """The size of the root disk in GB."""
        if self.settings.root_gb is not None:
            return self.settings.root_gb
        known = {machine.name: machine.disk_gb for machine in machines()}
        smallest = max(self.image.root_gb, SMALLEST_DISK)
        return smallest if known.get(self.settings.machine) else smallest + ROOM_FOR_DATA

    def _volume_lines(self) -> Iterator[str]:
        settings = self.settings
        if self.volume is not None:
            yield f"{self.volume.line}, at {MOUNT}"
        if settings.prepare is None or (self.volume and self.volume.packed):
            return
        if self.volume is None:
            dollars = (settings.volume_gb or 0) * ec2_volume.DOLLARS_A_GB_AND_MONTH
            yield f"a new volume of {settings.volume_gb} GB, about ${dollars:.2f} a month; it stays"
        yield f"first, {settings.prepare} is packed onto it by 1 x {settings.prepare_machine}"


def plan(client: Any, request: Request, settings: Settings) -> Plan:
    """Returns what a launch will make, and makes nothing.

    Args:
        client: of EC2.

    Raises:
        InputError: something is missing, or does not fit together.
        NoMachineError: there is none at `--max-price`.
    """
    _check(request, settings)
    volume = _volume_of(client, request, settings)
    zone = _only_zone(client, settings, volume)
    offers = find_offers(client, settings, zone, spot=request.spot)
    given = {word.partition("=")[0] for word in request.train_options}
    if offers[0].dollars is None and "--max-cost" in given and "--price" not in given:
        raise InputError(f"--max-cost: the price of {settings.machine} is not known: give --price")
    return Plan(
        request=request,
        settings=settings,
        region=client.meta.region_name,
        image=find_image(client, settings.machine, settings.ami),
        offers=tuple(offers),
        volume=volume,
        staged=settings.stage or _is_packed(request.data),
        downloaded=settings.prepare is not None and _needs_a_disk(settings.prepare),
    )


def _check(request: Request, settings: Settings) -> None:
    """Raises InputError where the machine could not do its work, or its work would be lost."""
    if request.nodes > 1:
        raise InputError(f"--nodes {request.nodes}: ec2 launches one: use `pitstop launch sky`")
    kept = request.remote or settings.volume or settings.prepare
    refuse_unsafe_spot(request, kept=kept)
    if kept is None:
        raise InputError(
            "the machine ends itself, and its disk with it: give --remote s3://BUCKET/FOLDER, "
            "or --volume"
        )
    for option, url in (("--remote", request.remote), ("--files", settings.files)):
        if url is not None and not url.startswith("s3://"):
            raise InputError(f"{option} {url}: a machine of EC2 writes to s3://BUCKET/FOLDER")
    if request.remote is None and settings.files is None:
        raise InputError("give --files s3://BUCKET/FOLDER: the machine installs pitstop from there")
    if settings.profile is None:
        raise InputError(
            "give --instance-profile NAME: what lets the machine read and write the bucket "
            "(docs/ec2.md has its policy)"
        )
    for word in (word.partition("=")[0] for word in request.train_options):
        if word in NOT_REPEATED:
            raise InputError(f"{word}: each start of the machine would do it: {NOT_REPEATED[word]}")
    _check_data(request, settings)


def _check_data(request: Request, settings: Settings) -> None:
    if settings.prepare is not None:
        if not settings.prepare.startswith(("s3://", "hf://")):
            raise InputError(f"--prepare {settings.prepare}: give s3://... or hf://OWNER/NAME")
        return
    refuse_local_files(request)
    data = request.data
    if data is None:
        raise InputError(f"recipe {request.recipe.name} names no data: give --data")
    if data.startswith(("gs://", "az://")):
        raise InputError(f"--data {data}: a machine of EC2 has no rights there: copy it to s3://")
    if data.startswith("/") and (settings.volume is None or not data.startswith(f"{MOUNT}/")):
        raise InputError(f"--data {data}: give --volume, and --data {MOUNT}/FOLDER for one on it")


def _volume_of(client: Any, request: Request, settings: Settings) -> Volume | None:
    if settings.volume is not None:
        return ec2_volume.find_volume(client, settings.volume)
    if settings.prepare is None:
        return None
    return next(iter(ec2_volume.data_volumes(client, request.name)), None)


def _only_zone(client: Any, settings: Settings, volume: Volume | None) -> str | None:
    """Returns the zone that zone, subnet and volume agree on, None where all are free.

    Raises:
        InputError: they lie in different ones.
    """
    found: dict[str, str] = {}
    if settings.zone is not None:
        found["--zone"] = settings.zone
    if settings.subnet is not None:
        subnet = client.describe_subnets(SubnetIds=[settings.subnet])["Subnets"][0]
        found[f"--subnet {settings.subnet}"] = subnet["AvailabilityZone"]
    if volume is not None:
        found[f"volume {volume.id}"] = volume.zone
    if len(set(found.values())) > 1:
        where = ", ".join(f"{what} is in {zone}" for what, zone in found.items())
        raise InputError(f"{where}: a machine and its volume lie in one zone")
    return next(iter(found.values()), None)


def _is_packed(data: str | None) -> bool:
    """Tells whether the data are a packed dataset in a bucket."""
    if data is None or not data.startswith("s3://"):
        return False
    try:
        open_store(data).get("manifest.json")
    except MissingObjectError:
        return False
    return True


def _needs_a_disk(source: str) -> bool:
    """Tells whether a bucket holds archives: they are read on a disk only."""
    if not source.startswith("s3://"):
        return False
    return any(NOT_IN_A_BUCKET.search(found.key.lower()) for found in open_store(source).list())


def find_offers(client: Any, settings: Settings, zone: str | None, *, spot: bool) -> list[Offer]:
    """Returns where the machine can be had, the cheapest first.

    Args:
        zone: the only one that will do.

    Raises:
        InputError: nowhere.
        NoMachineError: not at `--max-price`.
    """
    region = client.meta.region_name
    if spot:
        offers = [o for o in _spot_offers(client, settings.machine) if zone in (None, o.zone)]
    else:
        price = find_price(settings.machine)
        dollars = price.on_demand if price else None
        zones = _zones(client, settings.machine) if settings.prepare and zone is None else [zone]
        offers = [Offer(each, dollars) for each in zones]
    if not offers:
        kind = "on the spot market " if spot else ""
        raise InputError(
            f"--machine {settings.machine}: is not offered {kind}in {zone or region}: "
            "take another zone, region or machine"
        )
    if settings.max_price is None:
        return offers
    if offers[0].dollars is None:
        raise InputError(
            "--max-price: the price on demand is not known: `pitstop prices --refresh`"
        )
    if offers[0].dollars > settings.max_price:
        raise NoMachineError(
            f"--max-price {settings.max_price:g}: {settings.machine} costs "
            f"${offers[0].dollars:.4g}/h now in {offers[0].zone or region}: give more, or wait"
        )
    return [o for o in offers if o.dollars is not None and o.dollars <= settings.max_price]


def _spot_offers(client: Any, machine: str) -> list[Offer]:
    """Returns the newest spot price of each zone, the lowest first."""
    from datetime import UTC, datetime

    newest: dict[str, tuple[datetime, float]] = {}
    pages = client.get_paginator("describe_spot_price_history").paginate(
        InstanceTypes=[machine],
        ProductDescriptions=["Linux/UNIX", "Linux/UNIX (Amazon VPC)"],
        StartTime=datetime.now(UTC),
    )
    for entry in (entry for page in pages for entry in page["SpotPriceHistory"]):
        told = (entry["Timestamp"], float(entry["SpotPrice"]))
        zone = entry["AvailabilityZone"]
        newest[zone] = max(told, newest.get(zone, told))
    cheapest = sorted((dollars, zone) for zone, (_, dollars) in newest.items())
    return [Offer(zone, dollars) for dollars, zone in cheapest]


def _zones(client: Any, machine: str) -> list[str]:
    """Returns the zones in which a machine is offered."""
    pages = client.get_paginator("describe_instance_type_offerings").paginate(
        LocationType="availability-zone", Filters=[{"Name": "instance-type", "Values": [machine]}]
    )
    return sorted(found["Location"] for page in pages for found in page["InstanceTypeOfferings"])


def find_image(client: Any, machine: str, ami: str | None) -> Image:
    """Returns an AMI by its id, else the Deep Learning AMI with the newest torch.

    Raises:
        InputError: there is none.
    """
    if ami is not None:
        found = client.describe_images(ImageIds=[ami])["Images"]
        if not found:
            raise InputError(f"--ami {ami}: there is none in {client.meta.region_name}")
        return _image(found[0])
    pattern = next(name for family, name in IMAGES.items() if machine.startswith(family))
    wanted = {"name": pattern, "state": "available", "architecture": "x86_64"}
    filters = [{"Name": name, "Values": [value]} for name, value in wanted.items()]
    found = client.describe_images(Owners=["amazon"], Filters=filters)["Images"]
    if not found:
        raise InputError(f"no {pattern!r} in {client.meta.region_name}: give --ami")
    return _image(max(found, key=_age))


def _age(image: Mapping[str, Any]) -> tuple[list[int], str]:
    """Orders Deep Learning AMIs: by their torch, then by their date."""
    torch = re.search(r"PyTorch ([\d.]+)", image["Name"])
    version = [int(part) for part in torch[1].strip(".").split(".")] if torch else []
    return version, image["CreationDate"]


def _image(found: Mapping[str, Any]) -> Image:
    root = found["RootDeviceName"]
    disks = {
        disk["DeviceName"]: disk.get("Ebs", {}) for disk in found.get("BlockDeviceMappings", ())
    }
    return Image(found["ImageId"], found["Name"], root, disks.get(root, {}).get("VolumeSize", 0))
