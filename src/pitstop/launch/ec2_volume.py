"""EBS volumes: those of the user, and those that `pitstop launch ec2 --prepare` packs data onto."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pitstop.core.errors import InputError

LAUNCH, ROLE, PACKED = "pitstop:launch", "pitstop:role", "pitstop:packed"
"""The keys of tags: whose it is, what it is, and whether the data on it are whole."""

DATA = "data"
"""The role of a volume that holds packed data."""

DEVICE = "/dev/sdf"
"""Under which a volume is attached. What Linux calls it is found by its id."""

DOLLARS_A_GB_AND_MONTH = 0.08
"""gp3, AWS's list price in us-east-1."""

Pause = Callable[[float], None]
"""Waits for so many seconds."""


@dataclass(frozen=True)
class Volume:
    """A volume as it is at the moment."""

    id: str
    zone: str
    gb: int
    state: str
    """`available`, `in-use`, ..."""
    attached_to: str | None
    """The id of a machine."""
    launch: str | None
    """The name of the launch that made it; None: it is the user's own."""
    packed: bool
    """Whether the packer has told that it was through."""

    @property
    def line(self) -> str:
        """What it is and costs."""
        dollars = self.gb * DOLLARS_A_GB_AND_MONTH
        return f"volume {self.id}, {self.gb} GB in {self.zone}, about ${dollars:.2f} a month"


def tags(values: Mapping[str, str]) -> list[dict[str, str]]:
    """Returns tags as EC2 takes them."""
    return [{"Key": key, "Value": value} for key, value in values.items()]


def tags_of(resource: Mapping[str, Any]) -> dict[str, str]:
    """Returns the tags of what EC2 has described."""
    return {tag["Key"]: tag["Value"] for tag in resource.get("Tags", ())}


def find_volume(client: Any, volume_id: str) -> Volume:
    """Returns a volume.

    Raises:
        InputError: there is none of this id in the region.
    """
    from botocore.exceptions import ClientError

    try:
        found = client.describe_volumes(VolumeIds=[volume_id])["Volumes"]
    except ClientError as error:
        if "InvalidVolume" not in error.response["Error"]["Code"]:
            raise
        found = []
    if not found:
        region = client.meta.region_name
        raise InputError(f"--volume {volume_id}: there is none in {region}: check id and --region")
    return _volume(found[0])


def data_volumes(client: Any, name: str | None) -> list[Volume]:
    """Returns the volumes that hold the data of a launch, or of all."""
    filters = [{"Name": f"tag:{ROLE}", "Values": [DATA]}]
    if name is not None:
        filters.append({"Name": f"tag:{LAUNCH}", "Values": [name]})
    pages = client.get_paginator("describe_volumes").paginate(Filters=filters)
    return [_volume(found) for page in pages for found in page["Volumes"]]


def create_volume(client: Any, name: str, zone: str, gb: int, pause: Pause) -> Volume:
    """Makes an empty volume for the data of a launch, and waits until it can be attached."""
    values = {"Name": f"pitstop-{name}", LAUNCH: name, ROLE: DATA}
    made = client.create_volume(
        AvailabilityZone=zone,
        Size=gb,
        VolumeType="gp3",
        TagSpecifications=[{"ResourceType": "volume", "Tags": tags(values)}],
    )
    return wait_until_free(client, made["VolumeId"], pause)


def wait_until_free(client: Any, volume_id: str, pause: Pause) -> Volume:
    """Returns a volume once it can be attached: it is new, or the machine that has it ends.

    Raises:
        InputError: a machine has it, or it is broken.
    """
    while (volume := find_volume(client, volume_id)).state != "available":
        holder = volume.attached_to
        if holder is not None and not _is_ending(client, holder):
            raise InputError(f"volume {volume.id}: is attached to {holder}: end or detach that")
        if volume.state not in ("creating", "in-use"):
            raise InputError(f"volume {volume.id}: is {volume.state}: give another one")
        pause(2)
    return volume


def _is_ending(client: Any, machine_id: str) -> bool:
    answer = client.describe_instances(InstanceIds=[machine_id])
    state = answer["Reservations"][0]["Instances"][0]["State"]["Name"]
    return state in ("shutting-down", "terminated")


def attach(client: Any, volume: Volume, machine_id: str) -> None:
    """Attaches a volume to a machine that runs; it outlives the machine."""
    client.attach_volume(Device=DEVICE, InstanceId=machine_id, VolumeId=volume.id)


def mark_packed(client: Any, volume: Volume) -> None:
    """Notes that the data on a volume are whole."""
    client.create_tags(Resources=[volume.id], Tags=tags({PACKED: "yes"}))


def _volume(found: Mapping[str, Any]) -> Volume:
    values = tags_of(found)
    attachments = [each["InstanceId"] for each in found.get("Attachments", ())]
    return Volume(
        id=found["VolumeId"],
        zone=found["AvailabilityZone"],
        gb=found["Size"],
        state=found["State"],
        attached_to=attachments[0] if attachments else None,
        launch=values.get(LAUNCH) if values.get(ROLE) == DATA else None,
        packed=PACKED in values,
    )
