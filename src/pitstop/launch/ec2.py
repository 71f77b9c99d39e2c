"""EC2: one machine of its own for a run, which ends itself.

A machine is a one-time spot request, or on demand. Its user data (`ec2_boot.sh`) installs pitstop
from a bucket, mounts, stages, trains under systemd, and powers off, which terminates it, when the
run has finished, has diverged, has spent its budget, does not start, or takes too long. What a
machine is and belongs to is in its tags and nowhere else. After an interruption the same launch of
the same name starts the next machine, whose `train` goes on from the bucket or the volume.

Why not persistent requests: after an interruption they start machines until the request itself is
cancelled, also after the machine was terminated by hand or the run has ended.
"""

import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pitstop.core.errors import InputError
from pitstop.io.objects import open_store
from pitstop.launch import aws, ec2_volume
from pitstop.launch.ec2_boot import RECIPE, Boot, compose, compose_packing
from pitstop.launch.ec2_plan import NoMachineError, Offer, Plan
from pitstop.launch.ec2_volume import LAUNCH, ROLE, Pause, Volume, tags, tags_of
from pitstop.launch.request import Request, recipe_yaml
from pitstop.launch.wheel import build_wheel

TRAIN, PREPARE, ROOT_DISK = "train", "prepare", "root"
"""Roles: of machines, and of their disks."""

REMOTE, FILES = "pitstop:remote", "pitstop:files"
"""The keys of tags of a machine: the URL of the run, and of the files that it installs from."""

ALIVE = ("pending", "running", "stopping", "stopped")

TAKEN = "Server.Spot"
"""How the reason begins for which EC2 took a spot machine away."""

NO_CAPACITY = ("InsufficientInstanceCapacity", "SpotMaxPriceTooLow")

RETRY_SECONDS = 300.0
"""From one try to get a machine to the next."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Launched:
    """A machine of a launch, as it is at the moment."""

    id: str
    launch: str
    role: str
    machine: str
    zone: str
    state: str
    spot: bool
    since: str
    address: str | None
    key: str | None
    reason: str
    """Why it ended: EC2's code."""
    remote: str | None
    files: str | None
    volumes: tuple[str, ...]
    """The ids of those that outlive it."""

    @property
    def taken(self) -> bool:
        """Whether EC2 has taken it away."""
        return self.reason.startswith(TAKEN)

    def is_of(self, request: Request) -> bool:
        """Tells whether it belongs to a launch, or writes the same run."""
        same_run = self.remote is not None and self.remote == request.remote
        return self.launch == request.name or same_run

    @property
    def line(self) -> str:
        """What it is and does."""
        kind = "spot" if self.spot else "on demand"
        state = f"{self.state} ({self.reason})" if self.reason else self.state
        what = f"{self.launch}: {self.role}: {self.id}, {self.machine}, {kind}, {self.zone}"
        return f"{what}: {state}, since {self.since}"


def launch(client: Any, plan: Plan, *, say: Say, pause: Pause) -> Launched:
    """Starts a machine that trains; with `--prepare`, packs first, and waits for it.

    Args:
        client: of EC2.
        say: is told what goes on.
        pause: waits for so many seconds.

    Raises:
        InputError: a machine of this launch is at work; or something went wrong, and what was
            begun is gone again.
        NoMachineError: EC2 has none free.
    """
    _refuse_second(client, plan.request, pause)
    volume = plan.volume
    with tempfile.TemporaryDirectory(prefix="pitstop-") as folder:
        wheel = build_wheel(Path(folder))
        files = {wheel.name: wheel, RECIPE: recipe_yaml(plan.request.recipe_name).encode()}
        if plan.settings.prepare is not None and not (volume and volume.packed):
            volume = _prepared(client, plan, files, wheel.name, say, pause)
        if volume is not None:
            ec2_volume.wait_until_free(client, volume.id, pause)
        aws.upload(plan.files, files)

    def boot(offer: Offer) -> Boot:
        return compose(plan, wheel=wheel.name, offer=offer, volume=volume)

    return _start(client, plan, TRAIN, boot, volume, pause)


def _refuse_second(client: Any, request: Request, pause: Pause) -> None:
    """Waits for machines that train the same and are about to end; refuses those at work."""
    while found := [one for one in find(client) if one.role == TRAIN and one.is_of(request)]:
        alive = [one for one in found if one.state in ALIVE]
        if alive:
            stop = f"pitstop launch ec2 --stop --name {alive[0].launch}"
            raise InputError(f"{alive[0].id} trains {alive[0].launch} already: to end it: {stop}")
        if all(one.state == "terminated" for one in found):
            return
        pause(5)


def _prepared(
    client: Any,
    plan: Plan,
    files: Mapping[str, bytes | Path],
    wheel: str,
    say: Say,
    pause: Pause,
) -> Volume:
    """Returns the volume of the launch, with the packed data on it.

    Raises:
        InputError: packing has failed.
    """
    name, settings = plan.request.name, plan.settings
    at_work = [one for one in find(client, name) if one.role == PREPARE and one.state in ALIVE]
    volume = plan.volume
    if at_work and volume is not None:
        packer = at_work[0]
    else:
        zone = plan.offers[0].zone
        assert zone is not None
        assert settings.volume_gb is not None
        aws.upload(plan.files, files)
        made = volume
        if made is None:
            made = ec2_volume.create_volume(client, name, zone, settings.volume_gb, pause)
        boot = compose_packing(plan, wheel=wheel, volume=made)
        try:
            packer = _start(client, plan, PREPARE, lambda offer: boot, made, pause)
        except BaseException:
            if volume is None:
                ec2_volume.wait_until_free(client, made.id, pause)
                client.delete_volume(VolumeId=made.id)
            raise
        volume = made
    say(f"{packer.id} packs {settings.prepare} onto {volume.id}; the same command comes back to it")
    ended = follow(client, packer.id, pause)
    code = exit_code(client, ended.id)
    if code != 0:
        said = f"exit code {code}" if code is not None else ended.reason or "no word"
        fix = f"see `aws ec2 get-console-output --instance-id {ended.id}`; the same command goes on"
        raise InputError(f"packing onto {volume.id} ended with {said}: {fix}")
    ec2_volume.mark_packed(client, volume)
    return volume


def _start(
    client: Any,
    plan: Plan,
    role: str,
    boot: Callable[[Offer], Boot],
    volume: Volume | None,
    pause: Pause,
) -> Launched:
    """Starts a machine in the first zone that has one; returns it when it runs.

    Raises:
        NoMachineError: no zone has one.
    """
    from botocore.exceptions import ClientError

    offers = plan.offers if volume is None else [Offer(volume.zone, plan.offers[0].dollars)]
    for offer in offers:
        try:
            made = client.run_instances(**_asked(plan, role, boot(offer), offer, volume))
        except ClientError as error:
            if aws.error_code(error) not in NO_CAPACITY:
                raise
            continue
        machine_id = made["Instances"][0]["InstanceId"]
        try:
            _wait_until_running(client, machine_id, pause)
            if volume is not None:
                ec2_volume.attach(client, volume, machine_id)
            return _described(client, machine_id)
        except BaseException:
            client.terminate_instances(InstanceIds=[machine_id])
            raise
    zones = ", ".join(offer.zone or plan.region for offer in offers)
    machine = plan.settings.machine if role == TRAIN else plan.settings.prepare_machine
    raise NoMachineError(f"EC2 has no {machine} free in {zones} now: try later, or another machine")


def _asked(
    plan: Plan, role: str, boot: Boot, offer: Offer, volume: Volume | None
) -> dict[str, Any]:
    """Returns the arguments of run_instances."""
    request, settings = plan.request, plan.settings
    trains = role == TRAIN
    common = {"Name": f"pitstop-{request.name}", LAUNCH: request.name}
    own = common | {ROLE: role, FILES: plan.files}
    if request.remote is not None:
        own[REMOTE] = request.remote
    tagged = {"instance": own, "volume": common | {ROLE: ROOT_DISK}}
    disk = {"VolumeSize": plan.root_gb, "VolumeType": "gp3", "DeleteOnTermination": True}
    profile = settings.profile or ""
    asked: dict[str, Any] = {
        "ImageId": plan.image.id,
        "InstanceType": settings.machine if trains else settings.prepare_machine,
        "MinCount": 1,
        "MaxCount": 1,
        "UserData": boot.user_data,
        "InstanceInitiatedShutdownBehavior": "terminate",
        "IamInstanceProfile": {"Arn" if profile.startswith("arn:") else "Name": profile},
        "MetadataOptions": {"HttpTokens": "required"},
        "BlockDeviceMappings": [{"DeviceName": plan.image.root_device, "Ebs": disk}],
    }
    if trains and request.spot:
        tagged["spot-instances-request"] = common
        options = {"SpotInstanceType": "one-time", "InstanceInterruptionBehavior": "terminate"}
        if settings.max_price is not None:
            options["MaxPrice"] = f"{settings.max_price:g}"
        asked["InstanceMarketOptions"] = {"MarketType": "spot", "SpotOptions": options}
    if settings.key is not None:
        asked["KeyName"] = settings.key
    if settings.security_groups:
        asked["SecurityGroupIds"] = list(settings.security_groups)
    if settings.subnet is not None:
        asked["SubnetId"] = settings.subnet
    elif offer.zone is not None:
        asked["Placement"] = {"AvailabilityZone": offer.zone}
    asked["TagSpecifications"] = [
        {"ResourceType": kind, "Tags": tags(values)} for kind, values in tagged.items()
    ]
    return asked


def _wait_until_running(client: Any, machine_id: str, pause: Pause) -> None:
    """Waits until a machine runs.

    Raises:
        InputError: it ended before.
    """
    while (machine := _described(client, machine_id)).state == "pending":
        pause(3)
    if machine.state != "running":
        raise InputError(f"{machine_id} has ended as it began: {machine.reason or machine.state}")


def follow(client: Any, machine_id: str, pause: Pause) -> Launched:
    """Waits until a machine has ended; returns what it was at its end."""
    while (machine := _described(client, machine_id)).state != "terminated":
        pause(15)
    return machine


def restart(
    client: Any,
    machine: Launched,
    again: Callable[[], Plan],
    restarts: int,
    *,
    say: Say,
    pause: Pause,
) -> Launched:
    """Waits until a machine has ended, and starts the next one whenever EC2 took it away.

    Where none is to be had, it is tried again every few minutes.

    Args:
        again: plans the launch anew, at the prices of that moment.
        restarts: so many at most.

    Returns:
        the last machine, as it was at its end.
    """
    while (ended := follow(client, machine.id, pause)).taken and restarts > 0:
        restarts -= 1
        say(f"EC2 has taken {ended.id} away ({ended.reason}); restarts left: {restarts}")
        while True:
            try:
                machine = launch(client, again(), say=say, pause=pause)
                break
            except NoMachineError as error:
                say(f"{error}; tried again in {RETRY_SECONDS / 60:.0f} minutes")
                pause(RETRY_SECONDS)
        say(machine.line)
    return ended


def exit_code(client: Any, machine_id: str) -> int | None:
    """Returns with what a machine's work has ended, as its console tells for about an hour.

    None where it has not ended, was killed, or nothing is known.
    """
    text = client.get_console_output(InstanceId=machine_id).get("Output", "")
    told = re.findall(r"pitstop-launch: exit code (\d+)\b", text)
    return int(told[-1]) if told else None


# What was made


def find(client: Any, name: str | None = None) -> list[Launched]:
    """Returns the machines of a launch, or of all; EC2 forgets those that ended within an hour."""
    key = {"Name": "tag-key", "Values": [LAUNCH]}
    filters = [key if name is None else {"Name": f"tag:{LAUNCH}", "Values": [name]}]
    pages = client.get_paginator("describe_instances").paginate(Filters=filters)
    found = [
        _launched(each)
        for page in pages
        for reservation in page["Reservations"]
        for each in reservation["Instances"]
    ]
    return sorted(found, key=lambda one: one.since)


def _described(client: Any, machine_id: str) -> Launched:
    answer = client.describe_instances(InstanceIds=[machine_id])
    return _launched(answer["Reservations"][0]["Instances"][0])


def _launched(found: Mapping[str, Any]) -> Launched:
    values = tags_of(found)
    disks = [disk["Ebs"] for disk in found.get("BlockDeviceMappings", ()) if "Ebs" in disk]
    return Launched(
        id=found["InstanceId"],
        launch=values.get(LAUNCH, ""),
        role=values.get(ROLE, ""),
        machine=found["InstanceType"],
        zone=found["Placement"]["AvailabilityZone"],
        state=found["State"]["Name"],
        spot=found.get("InstanceLifecycle") == "spot",
        since=found["LaunchTime"].strftime("%Y-%m-%dT%H:%M:%SZ"),
        address=found.get("PublicDnsName") or found.get("PublicIpAddress") or None,
        key=found.get("KeyName"),
        reason=(found.get("StateReason") or {}).get("Code") or "",
        remote=values.get(REMOTE),
        files=values.get(FILES),
        volumes=tuple(disk["VolumeId"] for disk in disks if not disk["DeleteOnTermination"]),
    )


def ssh_line(machine: Launched, user: str) -> str:
    """Returns how to log in, and what to look at there."""
    if machine.key is None:
        return "no --key was given: nobody can log in"
    if machine.address is None:
        return f"{machine.id} has no public address: log in from its network, key {machine.key}"
    command = f"ssh -i ~/.ssh/{machine.key}.pem {user}@{machine.address}"
    return f"{command} journalctl -fu pitstop   # its security group must let you in"


def stop(client: Any, name: str | None) -> list[Launched]:
    """Terminates the machines of a launch, or of all: they get SIGTERM, save, and upload."""
    alive = [one for one in find(client, name) if one.state in ALIVE]
    if alive:
        client.terminate_instances(InstanceIds=[one.id for one in alive])
    return alive


def cleanup(client: Any, name: str | None, *, pause: Pause) -> list[str]:
    """Deletes all that a launch, or all launches, made, save volumes with data.

    Returns:
        lines that say what went, and what stays and costs.
    """
    known = find(client, name)
    lines = [f"terminated {one.id} of {one.launch}" for one in stop(client, name)]
    kept = {volume for one in known for volume in one.volumes}
    for one in known:
        if one.state != "terminated":
            follow(client, one.id, pause)
    lines += [f"deleted volume {volume}" for volume in _delete_root_disks(client, name)]
    for url in sorted({one.files for one in known if one.files}):
        lines += [f"deleted {deleted}" for deleted in _delete_files(url)]
    kept |= {volume.id for volume in ec2_volume.data_volumes(client, name)}
    for volume in (ec2_volume.find_volume(client, each) for each in sorted(kept)):
        delete = f"aws ec2 delete-volume --region {client.meta.region_name} --volume-id {volume.id}"
        lines.append(f"{volume.line}: holds data and is still billed; to delete it: {delete}")
    return lines


def _delete_root_disks(client: Any, name: str | None) -> Iterator[str]:
    """Deletes root disks that a machine left behind; yields their ids."""
    filters = [{"Name": f"tag:{ROLE}", "Values": [ROOT_DISK]}]
    filters.append({"Name": "status", "Values": ["available"]})
    if name is not None:
        filters.append({"Name": f"tag:{LAUNCH}", "Values": [name]})
    pages = client.get_paginator("describe_volumes").paginate(Filters=filters)
    for volume in [each["VolumeId"] for page in pages for each in page["Volumes"]]:
        client.delete_volume(VolumeId=volume)
        yield volume


def _delete_files(url: str) -> list[str]:
    """Deletes what machines install from; returns the URLs."""
    store = open_store(url)
    keys = [found.key for found in store.list()]
    mine = [key for key in keys if key == RECIPE or re.fullmatch(r"pitstop-[^/]+\.whl", key)]
    store.delete(mine)
    return [store.url_of(key) for key in mine]


def run_url(name: str, session: Any) -> str:
    """Returns the URL of the run of a launch, which `pitstop fetch` brings home.

    Args:
        session: of boto3.

    Raises:
        InputError: EC2 knows no such launch any more, or its run is on a volume.
    """
    with aws.client(session, "ec2") as client:
        found = [one for one in find(client, name) if one.role == TRAIN]
        region = client.meta.region_name
    if not found:
        fix = "EC2 forgets a machine within an hour of its end: give the run's URL (--remote)"
        raise InputError(f"{name}: no launch of this name is known in {region}: {fix}")
    if found[-1].remote is None:
        raise InputError(f"{name}: its run is on a volume: mount that, and copy it")
    return found[-1].remote
