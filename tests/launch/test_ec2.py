"""Launches on EC2, on moto: what is made, what is refused, and that all of it goes again."""

import base64
import json
import re
import uuid
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import boto3
import pytest
from botocore.exceptions import ClientError
from botocore.stub import ANY, Stubber
from typer.main import get_command

from pitstop.cli.launch import app
from pitstop.core.errors import InputError
from pitstop.core.recipe import load_recipe
from pitstop.io.objects import open_store
from pitstop.launch import ec2, ec2_plan
from pitstop.launch.ec2 import Launched
from pitstop.launch.ec2_plan import NoMachineError, Plan, Settings
from pitstop.launch.request import Request
from pitstop.plan.prices import Price

REGION = "us-east-1"
BUCKET = "bucket-of-launches"
PHOTOS = f"s3://{BUCKET}/photos"
POLICY = Path(__file__).parents[2] / "docs" / "ec2.md"
OFFERED = Price(on_demand=1.006, spot=0.4, date="2026-01-01", region=REGION, source="a test")


def tiny_wheel(to: Path) -> Path:
    """Stands for the wheel, which takes its time."""
    path = to / "pitstop-1.0-py3-none-any.whl"
    path.write_bytes(b"a wheel")
    return path


@pytest.fixture(scope="module")
def session(s3_endpoint: str) -> Any:
    """One for all tests: the model of EC2's API takes its time."""
    return boto3.Session("AKIAEXAMPLE", "a-secret", region_name=REGION)


@pytest.fixture(scope="module")
def server(session: Any, s3_endpoint: str) -> Generator[Any]:
    """A client of EC2. moto's instance profiles are those of an IAM that takes its time."""
    made = session.client("ec2", endpoint_url=s3_endpoint)

    def strip(params: dict[str, Any], **_: object) -> dict[str, Any]:
        return {key: value for key, value in params.items() if key != "IamInstanceProfile"}

    made.meta.events.register("provide-client-params.ec2.RunInstances", strip)
    yield made
    made.close()


@pytest.fixture(scope="module")
def s3(session: Any, s3_endpoint: str) -> Generator[Any]:
    made = session.client("s3", endpoint_url=s3_endpoint)
    made.create_bucket(Bucket=BUCKET)
    yield made
    made.close()


@pytest.fixture
def client(server: Any, s3: Any, s3_endpoint: str, aws: pytest.MonkeyPatch) -> Generator[Any]:
    """EC2 on moto; the machines of a test end with it."""
    aws.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    aws.setattr(ec2_plan, "find_price", lambda machine: OFFERED)
    aws.setattr(ec2, "build_wheel", tiny_wheel)
    yield server
    alive = [one.id for one in ec2.find(server) if one.state in ec2.ALIVE]
    if alive:
        server.terminate_instances(InstanceIds=alive)


@pytest.fixture(scope="module")
def ami(server: Any) -> str:
    made = server.register_image(Name="mine (Ubuntu)", RootDeviceName="/dev/sda1")
    return made["ImageId"]


@pytest.fixture
def settings(client: Any, ami: str) -> Settings:
    return Settings("g5.xlarge", ami=ami, profile="machines", key="my-key", max_price=2.0)


@pytest.fixture
def request_(client: Any) -> Request:
    """A launch that nobody else has."""
    name = f"run-{uuid.uuid4().hex}"
    remote = f"s3://{BUCKET}/{name}"
    return Request(name, load_recipe("demo"), "demo", "digits", (), spot=True, remote=remote)


def no_pause(seconds: float) -> None:
    pass


def start(client: Any, request: Request, settings: Settings, **to: Any) -> Launched:
    """Launches at once, and says nothing."""
    plan = ec2_plan.plan(client, request, settings)
    return ec2.launch(client, plan, **({"say": print, "pause": no_pause} | to))


def described(client: Any, machine: Launched) -> dict[str, Any]:
    return client.describe_instances(InstanceIds=[machine.id])["Reservations"][0]["Instances"][0]


def attribute(client: Any, machine: Launched, name: str) -> Any:
    """Returns the value of a machine's attribute."""
    answer = client.describe_instance_attribute(InstanceId=machine.id, Attribute=name)
    return next(value["Value"] for key, value in answer.items() if key.lower() == name.lower())


def end(machine_id: str, reason: str = "Client.InstanceInitiatedShutdown") -> None:
    """Ends a machine as EC2 or the machine itself would."""
    from moto.ec2.models import ec2_backends

    for account in ec2_backends.values():
        for instance in account[REGION].all_instances():
            if instance.id == machine_id:
                instance.terminate()
                instance.state_reason.code = reason


@contextmanager
def noted(client: Any, event: str, note: Callable[..., None]) -> Generator[None]:
    """Has the client tell what it asks."""
    client.meta.events.register(event, note)
    yield
    client.meta.events.unregister(event, note)


def inventory(client: Any) -> dict[str, set[str]]:
    """Returns the ids of all that EC2 has and somebody pays for, or could stumble over."""
    machines = {
        one["InstanceId"]
        for reservation in client.describe_instances()["Reservations"]
        for one in reservation["Instances"]
        if one["State"]["Name"] != "terminated"
    }
    spot = client.describe_spot_instance_requests()["SpotInstanceRequests"]
    return {
        "machines": machines,
        "volumes": {one["VolumeId"] for one in client.describe_volumes()["Volumes"]},
        "spot": {r["SpotInstanceRequestId"] for r in spot if r["State"] in ("open", "active")},
        "groups": {g["GroupId"] for g in client.describe_security_groups()["SecurityGroups"]},
        "keys": {k["KeyName"] for k in client.describe_key_pairs()["KeyPairs"]},
    }


def own_volume(client: Any, zone: str = "us-east-1b") -> str:
    return client.create_volume(AvailabilityZone=zone, Size=10)["VolumeId"]


# What is made


def test_a_spot_machine_ends_itself_and_says_whose_it_is(
    client: Any, request_: Request, settings: Settings
) -> None:
    machine = start(client, request_, settings)
    found = described(client, machine)
    assert found["InstanceLifecycle"] == "spot"
    assert found["InstanceType"] == "g5.xlarge"
    assert found["MetadataOptions"]["HttpTokens"] == "required"
    assert attribute(client, machine, "instanceInitiatedShutdownBehavior") == "terminate"
    tags = {tag["Key"]: tag["Value"] for tag in found["Tags"]}
    assert tags == {
        "Name": f"pitstop-{request_.name}",
        "pitstop:launch": request_.name,
        "pitstop:role": "train",
        "pitstop:remote": request_.remote,
        "pitstop:files": f"{request_.remote}/launch/{request_.name}",
    }
    disk = found["BlockDeviceMappings"][0]["Ebs"]
    assert disk["DeleteOnTermination"]
    volume = client.describe_volumes(VolumeIds=[disk["VolumeId"]])["Volumes"][0]
    assert {"Key": "pitstop:launch", "Value": request_.name} in volume["Tags"]


def test_an_on_demand_machine(client: Any, request_: Request, settings: Settings) -> None:
    machine = start(client, replace(request_, spot=False), settings)
    assert not machine.spot


def test_spot_is_asked_for_once_and_at_the_price_that_was_given(
    client: Any, request_: Request, settings: Settings
) -> None:
    asked: list[dict[str, Any]] = []

    def note(params: dict[str, Any], **_: object) -> None:
        asked.append(params)

    with noted(client, "provide-client-params.ec2.RunInstances", note):
        start(client, request_, settings)
    assert asked[0]["IamInstanceProfile"] == {"Name": "machines"}
    assert asked[0]["InstanceMarketOptions"] == {
        "MarketType": "spot",
        "SpotOptions": {
            "SpotInstanceType": "one-time",
            "InstanceInterruptionBehavior": "terminate",
            "MaxPrice": "2",
        },
    }
    kinds = {spec["ResourceType"] for spec in asked[0]["TagSpecifications"]}
    assert kinds == {"instance", "volume", "spot-instances-request"}


def test_what_the_machine_installs_is_in_the_bucket(
    client: Any, request_: Request, settings: Settings, tmp_path: Path
) -> None:
    machine = start(client, request_, settings)
    assert machine.files is not None
    store = open_store(machine.files)
    recipe, wheel = sorted((found.key for found in store.list()), reverse=True)
    user_data = attribute(client, machine, "userData")
    script = base64.b64decode(user_data).decode()
    assert f"WHEEL={wheel}\n" in script
    assert f"FILES={machine.files}\n" in script
    assert "AKIA" not in script
    path = tmp_path / recipe
    path.write_bytes(store.get(recipe))
    assert load_recipe(str(path)).phases == load_recipe("demo").phases


def test_how_to_log_in_is_told(client: Any, request_: Request, settings: Settings) -> None:
    machine = start(client, request_, settings)
    line = ec2.ssh_line(machine, "ubuntu")
    assert line.startswith(f"ssh -i ~/.ssh/my-key.pem ubuntu@{machine.address} ")


# Again


@pytest.mark.parametrize("change", [{}, {"name": "another-name"}, {"remote": "s3://b/other"}])
def test_a_second_machine_is_refused_while_the_first_is_at_work(
    client: Any, request_: Request, settings: Settings, change: dict[str, str]
) -> None:
    first = start(client, request_, settings)
    before = inventory(client)
    with pytest.raises(InputError, match=f"{first.id} trains {request_.name} already"):
        start(client, replace(request_, **change), settings)
    assert inventory(client) == before


def test_after_an_interruption_the_same_launch_starts_the_next_machine(
    client: Any, request_: Request, settings: Settings
) -> None:
    first = start(client, request_, settings)
    end(first.id, "Server.SpotInstanceTermination")
    second = start(client, request_, settings)
    assert second.id != first.id
    assert second.remote == first.remote


@pytest.mark.parametrize(("restarts", "machines"), [(0, 1), (1, 2), (3, 3)])
def test_restarts(
    client: Any, request_: Request, settings: Settings, restarts: int, machines: int
) -> None:
    """EC2 takes two machines away; the third one finishes."""
    reasons = iter(("Server.SpotInstanceTermination",) * 2 + ("Client.InstanceInitiatedShutdown",))

    def pause(seconds: float) -> None:
        alive = [one for one in ec2.find(client, request_.name) if one.state in ec2.ALIVE]
        end(alive[0].id, next(reasons))

    def again() -> Plan:
        return ec2_plan.plan(client, request_, settings)

    first = start(client, request_, settings)
    last = ec2.restart(client, first, again, restarts, say=print, pause=pause)
    assert len(ec2.find(client, request_.name)) == machines
    assert last.taken is (machines < 3)


def test_where_there_is_no_machine_a_restart_is_tried_again(
    client: Any, request_: Request, settings: Settings
) -> None:
    first = start(client, request_, settings)
    end(first.id, "Server.SpotInstanceTermination")
    prices = iter((1e-9, 1e-9, 2.0))
    pauses: list[float] = []

    def again() -> Plan:
        return ec2_plan.plan(client, request_, replace(settings, max_price=next(prices)))

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if seconds != ec2.RETRY_SECONDS:
            end(ec2.find(client, request_.name)[-1].id)

    last = ec2.restart(client, first, again, 1, say=print, pause=pause)
    assert not last.taken
    assert pauses.count(ec2.RETRY_SECONDS) == 2


# What is refused, before anything is made


def test_a_price_above_the_limit_is_refused(
    client: Any, request_: Request, settings: Settings
) -> None:
    with pytest.raises(NoMachineError, match=r"--max-price 1e-06: g5\.xlarge costs"):
        ec2_plan.plan(client, request_, replace(settings, max_price=1e-6))
    on_demand = replace(request_, spot=False)
    with pytest.raises(NoMachineError, match=r"\$1\.006/h"):
        ec2_plan.plan(client, on_demand, replace(settings, max_price=1.0))


def test_the_cheapest_zone_comes_first(client: Any, request_: Request) -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    before = datetime(2025, 1, 1, tzinfo=UTC)
    prices = [("a", "0.5", now), ("b", "0.9", now), ("b", "0.1", before), ("c", "0.4", now)]
    entries = [
        {"AvailabilityZone": f"{REGION}{zone}", "SpotPrice": price, "Timestamp": time}
        for zone, price, time in prices
    ]
    settings = Settings("g5.xlarge", max_price=0.6)
    for zone, expected in ((None, ["us-east-1c", "us-east-1a"]), ("us-east-1a", ["us-east-1a"])):
        with Stubber(client) as stub:
            stub.add_response("describe_spot_price_history", {"SpotPriceHistory": entries})
            offers = ec2_plan.find_offers(client, settings, zone, spot=True)
        assert [offer.zone for offer in offers] == expected


def test_the_image_with_the_newest_torch_is_taken(client: Any) -> None:
    name = "Deep Learning OSS Nvidia Driver AMI GPU PyTorch {} (Ubuntu 24.04) {}"
    images = [
        {
            "ImageId": f"ami-{torch}-{date}",
            "Name": name.format(torch, date),
            "CreationDate": f"{date}T00:00:00Z",
            "RootDeviceName": "/dev/sda1",
            "BlockDeviceMappings": [{"DeviceName": "/dev/sda1", "Ebs": {"VolumeSize": 75}}],
        }
        for torch, date in (("2.9", "2026-09-09"), ("2.10", "2026-01-01"), ("2.10", "2026-03-03"))
    ]
    with Stubber(client) as stub:
        asked = {"Owners": ["amazon"], "Filters": ANY}
        stub.add_response("describe_images", {"Images": images}, asked)
        image = ec2_plan.find_image(client, "g5.xlarge", None)
    assert (image.id, image.root_gb, image.user) == ("ami-2.10-2026-03-03", 75, "ubuntu")


def test_without_a_deep_learning_image_one_is_asked_for(client: Any) -> None:
    with pytest.raises(InputError, match=r"Proprietary Nvidia Driver.*give --ami"):
        ec2_plan.find_image(client, "p3.2xlarge", None)


REFUSED: dict[str, Callable[[Request, Settings], tuple[Request, Settings]]] = {
    "ec2 launches one: use `pitstop launch sky`": lambda r, s: (replace(r, nodes=2), s),
    "--spot: the machine may be taken away": lambda r, s: (replace(r, remote=None), s),
    "the machine ends itself, and its disk": lambda r, s: (
        replace(r, remote=None, spot=False),
        s,
    ),
    "a machine of EC2 writes to s3://": lambda r, s: (replace(r, remote="gs://b/r"), s),
    "give --files s3://": lambda r, s: (replace(r, remote=None), replace(s, volume="vol-1")),
    "give --instance-profile": lambda r, s: (r, replace(s, profile=None)),
    "--data data/here: is on this machine": lambda r, s: (replace(r, data="data/here"), s),
    "--data gs://b/d: a machine of EC2": lambda r, s: (replace(r, data="gs://b/d"), s),
    "give --volume, and --data /volume/FOLDER": lambda r, s: (replace(r, data="/volume/in"), s),
    "--no-resume: each start": lambda r, s: (replace(r, train_options=("--no-resume",)), s),
    "--resume: each start": lambda r, s: (replace(r, train_options=("--resume=x",)), s),
    "--prepare /data: give s3://": lambda r, s: (r, replace(s, prepare="/data", volume_gb=9)),
    "there is none in us-east-1: check id": lambda r, s: (r, replace(s, volume="vol-12345678")),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_work_is_refused(
    client: Any, request_: Request, settings: Settings, message: str
) -> None:
    with pytest.raises(InputError) as refused:
        ec2_plan.plan(client, *REFUSED[message](request_, settings))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"machine": "ml.g5.xlarge"}, "name a machine of EC2"),
        ({"prepare": "s3://b/x"}, "go together"),
        ({"prepare": "s3://b/x", "volume_gb": 9, "volume": "vol-1"}, "leave --volume out"),
        ({"stage": True}, "give --volume or --prepare"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Settings(**({"machine": "g5.xlarge"} | options))


def test_the_plan_limits_the_time(client: Any, request_: Request, settings: Settings) -> None:
    def minutes(seconds: int, max_run: float | None = None) -> int | None:
        estimate = cast(Any, SimpleNamespace(max_run_seconds=seconds))
        plan = ec2_plan.plan(
            client, replace(request_, estimate=estimate), replace(settings, max_run=max_run)
        )
        return plan.max_minutes

    assert minutes(7201) == 121
    assert minutes(60) == 60
    assert minutes(7200, max_run=30) == 30
    assert ec2_plan.plan(client, request_, settings).max_minutes is None


# Volumes


def test_a_volume_is_attached_in_its_own_zone(
    client: Any, request_: Request, settings: Settings
) -> None:
    volume = own_volume(client)
    on_it = replace(request_, data="/volume/imagenet")
    machine = start(client, on_it, replace(settings, volume=volume))
    assert machine.zone == "us-east-1b"
    held = client.describe_volumes(VolumeIds=[volume])["Volumes"][0]
    assert held["Attachments"][0]["InstanceId"] == machine.id
    assert machine.volumes == (volume,)  # of those that outlive it
    client.terminate_instances(InstanceIds=[machine.id])
    client.delete_volume(VolumeId=volume)


def test_a_volume_of_another_zone_than_the_subnet_is_refused(
    client: Any, request_: Request, settings: Settings
) -> None:
    volume = own_volume(client)
    subnets = client.describe_subnets()["Subnets"]
    subnet = next(s["SubnetId"] for s in subnets if s["AvailabilityZone"] == "us-east-1a")
    apart = replace(settings, volume=volume, subnet=subnet)
    with pytest.raises(InputError, match=f"volume {volume} is in us-east-1b: .* lie in one zone"):
        ec2_plan.plan(client, request_, apart)
    client.delete_volume(VolumeId=volume)


def test_a_volume_that_another_machine_has_is_refused_before_anything_is_made(
    client: Any, request_: Request, settings: Settings
) -> None:
    volume = own_volume(client)
    with_volume = replace(settings, volume=volume)
    holder = start(client, request_, with_volume)
    before = inventory(client)
    other = replace(request_, name=f"{request_.name}-2", remote=f"{request_.remote}-2")
    with pytest.raises(InputError, match=f"is attached to {holder.id}"):
        start(client, other, with_volume)
    assert inventory(client) == before


def test_a_machine_whose_volume_cannot_be_attached_ends_at_once(
    client: Any, request_: Request, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = own_volume(client)
    before = inventory(client)

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ec2.ec2_volume, "attach", fail)
    with pytest.raises(KeyboardInterrupt):
        start(client, request_, replace(settings, volume=volume))
    assert inventory(client) == before


def test_the_next_zone_is_tried_where_one_has_no_machine(
    client: Any, request_: Request, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = ec2_plan.plan(client, request_, settings)
    full = plan.offers[0].zone
    run_instances = client.run_instances

    def run(**asked: Any) -> Any:
        if asked["Placement"]["AvailabilityZone"] == full:
            error = {"Error": {"Code": "InsufficientInstanceCapacity", "Message": "none"}}
            raise ClientError(cast(Any, error), "RunInstances")
        return run_instances(**asked)

    monkeypatch.setattr(client, "run_instances", run)
    assert ec2.launch(client, plan, say=print, pause=no_pause).zone == plan.offers[1].zone
    request_ = replace(request_, name=f"{request_.name}-2", remote=f"{request_.remote}-2")
    one = replace(plan, request=request_, offers=plan.offers[:1])
    with pytest.raises(NoMachineError, match=f"no g5.xlarge free in {full} now"):
        ec2.launch(client, one, say=print, pause=no_pause)


# Packing first


def console(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr("moto.ec2.responses.general.SAMPLE_CONSOLE_OUTPUT", text)


def ends_the_packer(client: Any, name: str, seen: list[Launched]) -> Callable[[float], None]:
    """Returns a pause in which the machine that packs ends."""

    def pause(seconds: float) -> None:
        for one in ec2.find(client, name):
            if one.role == "prepare" and one.state == "running":
                seen.append(one)
                end(one.id)

    return pause


def test_data_are_packed_onto_a_new_volume_first(
    client: Any,
    request_: Request,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    packs = replace(settings, prepare=PHOTOS, volume_gb=50)
    console(monkeypatch, "[ 9.9] boot[7]: pitstop-launch: exit code 0\n")
    packers: list[Launched] = []
    pause = ends_the_packer(client, request_.name, packers)
    trainer = start(client, request_, packs, pause=pause)
    assert [one.machine for one in packers] == ["c6i.4xlarge"]
    assert not packers[0].spot
    volume = ec2_plan.plan(client, request_, packs).volume
    assert volume is not None
    assert (volume.gb, volume.packed, volume.attached_to) == (50, True, trainer.id)
    assert packers[0].volumes == trainer.volumes == (volume.id,)
    end(trainer.id)
    again = start(client, request_, packs, pause=pause)
    assert again.volumes == (volume.id,)
    assert len(packers) == 1
    end(again.id)
    client.delete_volume(VolumeId=volume.id)


def test_packing_that_fails_starts_no_training_and_goes_on_with_the_same_volume(
    client: Any,
    request_: Request,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    packs = replace(settings, prepare=PHOTOS, volume_gb=50)
    console(monkeypatch, "boot[7]: pitstop-launch: exit code 2\n")
    packers: list[Launched] = []
    pause = ends_the_packer(client, request_.name, packers)
    for _ in range(2):
        with pytest.raises(InputError, match="ended with exit code 2"):
            start(client, request_, packs, pause=pause)
    assert {one.role for one in ec2.find(client, request_.name)} == {"prepare"}
    assert len(packers) == 2
    assert packers[0].volumes == packers[1].volumes
    client.delete_volume(VolumeId=packers[0].volumes[0])


def test_a_packer_that_cannot_start_leaves_no_volume(
    client: Any,
    request_: Request,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = inventory(client)
    packs = replace(settings, prepare=PHOTOS, volume_gb=50, key=None)
    with pytest.raises(ClientError):
        start(client, request_, replace(packs, security_groups=("sg-nowhere",)))
    assert inventory(client) == before


# What was made, and that it goes


def test_after_cleanup_only_the_user_s_own_is_left(
    client: Any, request_: Request, settings: Settings
) -> None:
    volume = own_volume(client)
    neighbour = client.run_instances(ImageId=settings.ami, MinCount=1, MaxCount=1)
    before = inventory(client)
    machine = start(client, request_, replace(settings, volume=volume))
    assert inventory(client) != before
    lines = ec2.cleanup(client, request_.name, pause=no_pause)
    assert inventory(client) == before
    assert machine.files is not None
    assert list(open_store(machine.files).list()) == []
    assert any(volume in line and "still billed" in line for line in lines)
    assert any(machine.id in line for line in lines)
    ids = [neighbour["Instances"][0]["InstanceId"]]
    client.terminate_instances(InstanceIds=ids)
    client.delete_volume(VolumeId=volume)


def test_cleanup_keeps_and_names_a_volume_with_data(
    client: Any,
    request_: Request,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = inventory(client)
    console(monkeypatch, "pitstop-launch: exit code 0\n")
    pause = ends_the_packer(client, request_.name, [])
    packs = replace(settings, prepare=PHOTOS, volume_gb=50)
    machine = start(client, request_, packs, pause=pause)
    (volume,) = machine.volumes
    lines = ec2.cleanup(client, request_.name, pause=no_pause)
    after = inventory(client)
    assert after["volumes"] - before["volumes"] == {volume}
    assert after | {"volumes": before["volumes"]} == before
    named = [line for line in lines if volume in line]
    assert named == [
        f"volume {volume}, 50 GB in {machine.zone}, about $4.00 a month: holds data and is still "
        f"billed; to delete it: aws ec2 delete-volume --region {REGION} --volume-id {volume}"
    ]
    client.delete_volume(VolumeId=volume)


def test_cleanup_of_one_launch_leaves_the_others(
    client: Any, request_: Request, settings: Settings
) -> None:
    other = replace(request_, name=f"{request_.name}-2", remote=f"s3://{BUCKET}/other")
    stays = start(client, other, settings)
    start(client, request_, settings)
    ec2.cleanup(client, request_.name, pause=no_pause)
    assert [one.state for one in ec2.find(client, other.name)] == ["running"]
    assert stays.files is not None
    assert len(list(open_store(stays.files).list())) == 2


def test_stop_ends_the_machine_and_keeps_the_rest(
    client: Any, request_: Request, settings: Settings
) -> None:
    machine = start(client, request_, settings)
    assert [one.id for one in ec2.stop(client, request_.name)] == [machine.id]
    assert ec2.stop(client, request_.name) == []
    assert [one.state for one in ec2.find(client, request_.name)] == ["terminated"]


@pytest.mark.usefixtures("connected")
def test_the_run_of_a_launch_is_found_by_its_name(
    client: Any, request_: Request, settings: Settings
) -> None:
    start(client, request_, settings)
    assert ec2.run_url(request_.name, None) == request_.remote
    with pytest.raises(InputError, match="nobody: no launch of this name is known in us-east-1"):
        ec2.run_url("nobody", None)


# On the command line


def command_line(*arguments: str) -> int:
    """Runs `pitstop launch ec2`; what it raises is for the user."""
    return get_command(app).main(["ec2", *arguments], standalone_mode=False) or 0


@pytest.fixture
def connected(client: Any, aws: pytest.MonkeyPatch) -> None:
    """The command line talks to the client of all tests."""
    aws.setattr("pitstop.launch.aws.client", lambda session, service: nullcontext(client))


def options(request: Request, settings: Settings) -> list[str]:
    named = {
        "--name": request.name,
        "--data": request.data,
        "--remote": request.remote,
        "--ami": settings.ami,
        "--instance-profile": settings.profile,
        "--machine": settings.machine,
    }
    return ["demo", "--spot", *(str(word) for pair in named.items() for word in pair)]


def test_a_dry_run_shows_all_and_makes_nothing(
    client: Any, request_: Request, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    before = inventory(client)
    assert command_line(*options(request_, settings), "--dry-run", "--epochs", "7") == 0
    said = capsys.readouterr().out
    assert "1 x g5.xlarge, spot, us-east-1" in said
    assert f"--remote {request_.remote} --price 1e-05 --epochs 7" in said
    assert said.endswith("dry run: nothing was created\n")
    assert inventory(client) == before


@pytest.mark.usefixtures("connected")
def test_nothing_is_made_where_nobody_can_be_asked(
    client: Any, request_: Request, settings: Settings
) -> None:
    before = inventory(client)
    with pytest.raises(InputError, match="nobody is there to ask"):
        command_line(*options(request_, settings))
    assert inventory(client) == before


@pytest.mark.usefixtures("connected")
def test_from_launch_to_cleanup(
    client: Any, request_: Request, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    before = inventory(client)
    name = ("--name", request_.name)
    assert command_line(*options(request_, settings), "--yes") == 0
    (machine,) = ec2.find(client, request_.name)
    assert machine.id in capsys.readouterr().out
    command_line("--status", *name)
    assert f"{machine.id}, g5.xlarge, spot" in capsys.readouterr().out
    with pytest.raises(InputError, match="nobody is there to ask"):
        command_line("--stop", *name)
    command_line("--stop", "--yes", *name)
    command_line("--status", *name)
    assert "terminated (Client.UserInitiatedShutdown)" in capsys.readouterr().out
    command_line("--cleanup", "--yes", *name)
    assert inventory(client) == before


def test_verbs_for_what_was_made_stand_alone() -> None:
    with pytest.raises(InputError, match="give one of them"):
        command_line("--status", "--stop")
    with pytest.raises(InputError, match="take --name, no recipe"):
        command_line("demo", "--cleanup")
    with pytest.raises(InputError, match="name a recipe"):
        command_line("--spot")


def test_the_policy_of_the_document_allows_what_is_asked_and_no_more(
    client: Any,
    request_: Request,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: set[str] = set()

    def note(model: Any, **_: object) -> None:
        asked.add(f"ec2:{model.name}")

    with noted(client, "before-call.ec2", note):
        console(monkeypatch, "pitstop-launch: exit code 0\n")
        pause = ends_the_packer(client, request_.name, [])
        packs = replace(settings, prepare=PHOTOS, volume_gb=50)
        on_demand = replace(request_, spot=False)
        with pytest.raises(NoMachineError):
            ec2_plan.plan(client, request_, replace(settings, max_price=1e-9))
        subnets = [subnet["SubnetId"] for subnet in client.describe_subnets()["Subnets"]]
        ec2_plan.plan(client, request_, replace(settings, subnet=subnets[0]))
        nowhere = replace(packs, security_groups=("sg-nowhere",))
        with pytest.raises(ClientError):
            start(client, on_demand, nowhere)
        machine = start(client, on_demand, packs, pause=pause)
        ec2.cleanup(client, request_.name, pause=no_pause)
        client.delete_volume(VolumeId=machine.volumes[0])
    allowed: set[str] = set()
    for text in re.findall(r"```json\n(.*?)```", POLICY.read_text(), re.DOTALL):
        for statement in json.loads(text)["Statement"]:
            actions = statement["Action"]
            allowed |= {actions} if isinstance(actions, str) else set(actions)
    assert {action for action in allowed if action.startswith("ec2:")} == asked
