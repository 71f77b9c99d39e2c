"""What GPUs want of the loader is what they train on in the plan; threads are enough, or not."""

import pytest

from pitstop.core.recipe import parse_recipe
from pitstop.core.timeline import Timeline
from pitstop.plan.cost import GPU, estimate
from pitstop.plan.feeding import SHOWN, need
from pitstop.plan.machines import find_machine

P4D = find_machine("p4d.24xlarge")  # 8 GPUs of 0.95 x 2,470 images/s, 96 threads


def test_threads_are_enough_if_they_load_what_the_gpus_train_on():
    a_thread = 0.95 * 2470 * 8 / 96
    enough, short = need(P4D, 224, a_thread + 1), need(P4D, 224, a_thread - 1)
    assert enough.wanted_images_per_second == pytest.approx(18772)
    assert (enough.enough, enough.workers) == (True, 12)
    assert (short.enough, short.workers) == (False, 12)
    assert need(P4D, 224, 1000).workers == 3


@pytest.mark.parametrize("name", SHOWN)
@pytest.mark.parametrize("resolution", [128, 176, 224])
def test_what_is_wanted_is_what_the_gpus_train_on_in_the_plan_of_a_resnet50(name, resolution):
    stated = {"model": "resnet50", "epochs": 2, "resolution": resolution}
    plan = Timeline.planned(parse_recipe(stated, "r"), 1_281_167)
    machine = find_machine(name)
    planned = estimate(plan, machine).segments[0].rates[GPU]
    wanted = need(machine, resolution, 1)
    assert wanted.wanted_images_per_second == pytest.approx(planned.value, abs=0.1)
    assert wanted.source == planned.source


def test_what_is_published_is_wanted_as_it_is():
    wanted = need(P4D, 160, 1)
    assert wanted.wanted_images_per_second == 8 * 3508
    assert wanted.source == "published: FFCV's logs, ResNet-50 with BlurPool at 160 px"


def test_an_a10g_is_as_much_slower_than_an_rtx_3090_as_lambda_found_an_a10():
    wanted = need(find_machine("g5.xlarge"), 224, 1)
    assert wanted.wanted_images_per_second == pytest.approx(1218 * 638 / 905, rel=0.001)
    assert "derived: Lambda" in wanted.source
