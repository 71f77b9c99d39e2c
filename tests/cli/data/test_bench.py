import json

import pytest

from pitstop.plan.feeding import SHOWN

QUICK = ("--threads", "1,2", "--seconds", "0.1", "--resolution", "16")


def test_json_has_images_per_second_and_machines(command, place):
    said = command("data", "bench", "digits", *QUICK, "--json")
    assert said.code == 0, said.err
    facts = json.loads(said.out)
    assert set(facts["images_per_second"]) == {"1", "2"}
    assert min(facts["images_per_second"].values()) > 0
    assert sum(facts["share"].values()) == pytest.approx(1, abs=1e-3)
    assert facts["resolution"] == 16
    assert [machine["machine"] for machine in facts["machines"]] == list(SHOWN)
    assert all("16 px" in machine["source"] for machine in facts["machines"])


def test_plain_output_says_whether_it_is_enough(command, place):
    said = command("data", "bench", "digits", *QUICK, "--machine", "p4d.24xlarge")
    assert said.code == 0, said.err
    assert "threads 1 " in said.out
    *_, verdict, empty, source = said.out.splitlines()
    assert verdict.strip().startswith("p4d.24xlarge  8 A100 want ")
    assert " images/s [1], 96 threads give " in verdict
    assert "enough" in verdict
    assert empty == ""
    assert source.startswith("[1] published: FFCV's logs")
    assert "measuring: threads: 2" in said.err


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--threads", "1,x"), "--threads 1,x: write numbers of threads, such as 1,2,4"),
        (("--threads", "0"), "--threads 0: write numbers of threads, such as 1,2,4"),
        (("--machine", "g5.large"), "--machine g5.large is not known; did you mean 'g5.xlarge'?"),
    ],
)
def test_bad_options_are_refused_before_anything_is_packed(refused, place, options, line):
    assert refused("data", "bench", "digits", *options) == line
