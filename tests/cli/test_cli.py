"""What a user notices at the command line: what is said, what is left behind, the exit code."""

import csv
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors import safe_open

import pitstop
from pitstop.io.run_directory import RunDirectory

PROGRAM = Path(sys.executable).with_name("pitstop")
pytestmark = pytest.mark.usefixtures("place")

RECIPES = Path(pitstop.__file__).parent / "recipes"
PNG = b"\x89PNG\r\n\x1a\n"

TIMED = {"images_per_second", "seconds", "wait_seconds", "memory_mb", "wall_seconds"}
"""Columns of the CSV that are other in each run."""

VIT = (
    *("--model", "vit_tiny_patch16_224", "--set", "phases.0.resolution=16"),
    *("--set", "model.kwargs={img_size: 16, embed_dim: 16, depth: 1, num_heads: 2}"),
)
"""A model that takes images of 16 px only."""


def run_json(out: Path | str) -> dict[str, Any]:
    return json.loads((Path(out) / "run.json").read_text())


def log(out: Path | str) -> list[dict[str, str]]:
    with (Path(out) / "training_log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def log_without_times(out: Path | str) -> list[dict[str, str]]:
    return [{k: v for k, v in row.items() if k not in TIMED} for row in log(out)]


def last_weights(out: Path | str) -> bytes:
    return (Path(out) / "last.safetensors").read_bytes()


def checkpoints(out: Path | str) -> list[Path]:
    return sorted((Path(out) / "checkpoints").glob("*.pt"))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Answers that need no engine


def test_help_and_plans_import_nothing_heavy():
    code = """
import sys
from pitstop.cli import run
verbs = ["train", "plan", "eval", "recipes", "devices"]
commands = [["--help"], ["--version"], *([verb, "--help"] for verb in verbs)]
commands += [["plan", "standard", "--samples", "1000"], ["plan", "demo"], ["recipes"]]
assert [run(command) for command in commands] == [0] * len(commands)
heavy = {"torch", "torchvision", "timm", "pyarrow", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_the_program_answers_and_passes_on_its_exit_code():
    version = subprocess.run([PROGRAM, "--version"], capture_output=True, text=True)
    assert (version.returncode, version.stdout) == (0, f"{pitstop.__version__}\n")
    refusal = subprocess.run([PROGRAM, "plan", "dmeo"], capture_output=True, text=True)
    assert (refusal.returncode, refusal.stdout) == (2, "")
    assert refusal.stderr.startswith("pitstop: no recipe 'dmeo'; did you mean 'demo'?")


PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
ALLOCATES = """
import resource, sys
from pitstop.cli import main
sys.argv = ["pitstop", "--version"]
try:
    main()
except SystemExit:
    import torch
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.zeros(64 * 2**20, dtype=torch.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(
    not PAGES.exists() or "[madvise]" not in PAGES.read_text(),
    reason="huge pages are not for who asks for them here",
)
def test_large_tensors_are_in_huge_pages():
    """64 MB are 16,384 pages of 4 kB, and 32 of 2 MB."""
    done = subprocess.run([sys.executable, "-c", ALLOCATES], capture_output=True, text=True)
    assert int(done.stdout.split()[-1]) < 1000, done.stderr


def test_help_names_every_verb_and_what_people_reach_for(command):
    said = command("--help")
    assert (said.code, said.err) == (0, "")
    assert all(verb in said.out for verb in ("train", "plan", "eval", "recipes"))
    options = "data out set epochs batch-size lr seed workers model precision compile no-compile"
    options += " resume no-resume extend rebase target-accuracy"
    helped = command("train", "--help").out
    assert [o for o in options.split() if not re.search(rf"--{o}\b", helped)] == []


def test_recipes_are_listed_with_their_headlines(command):
    said = command("recipes")
    assert said.code == 0
    listed = dict(line.split(maxsplit=1) for line in said.out.splitlines())
    assert set(listed) == {path.stem for path in RECIPES.glob("*.yaml")}
    assert all(len(headline) > 10 for headline in listed.values())


def test_a_recipe_is_shown_as_it_is(command, place):
    assert command("recipes", "show", "demo").out == (RECIPES / "demo.yaml").read_text()
    (place / "own.yaml").write_text("# mine\nextends: demo\n")
    assert command("recipes", "show", "own.yaml").out == "# mine\nextends: demo\n"


# Plans


def test_a_plan_is_a_table_of_its_phases(command):
    said = command("plan", "demo")
    assert (said.code, said.err) == (0, "")
    assert "16 epochs" in said.out
    for cells in (["small", "24", "32"], ["full", "32", "32"]):
        assert any(set(cells) <= set(line.split()) for line in said.out.splitlines()), cells


def test_the_outputs_of_a_plan_agree(command):
    plan = json.loads(command("plan", "demo", "--json").out)
    rows = list(csv.DictReader(command("plan", "demo", "--csv").out.splitlines()))
    assert plan["recipe"] == "demo"
    assert plan["steps"] == plan["segments"][-1]["steps"][1]
    assert [int(row["epoch"]) for row in rows] == list(range(len(rows)))
    for row in rows:
        here = [s for s in plan["segments"] if s["steps"][0] <= int(row["step"]) < s["steps"][1]]
        assert [s["phase"] for s in here] == [row["phase"]]
        assert here[0]["resolution"] == int(row["resolution"])
        assert min(here[0]["lr"]) * 0.999 <= float(row["lr"]) <= max(here[0]["lr"]) * 1.001


def test_the_plan_is_that_of_the_run(command, settings, run):
    plan = json.loads(command("plan", "demo", *settings, "--json").out)
    stated = run_json(run)
    assert plan["steps"] == stated["steps"]
    assert plan["epochs"] == pytest.approx(stated["epochs"], abs=1e-4)
    assert plan["evaluations"] == len(log(run))


def test_a_plan_follows_its_options(command):
    plan = json.loads(
        command("plan", "demo", "--samples", 640, "--epochs", 3, "--set", "lr=0.5", "--json").out
    )
    assert (plan["samples"], plan["epochs"], plan["steps"]) == (640, 3.0, 60)
    assert max(value for s in plan["segments"] for value in s["lr"]) == pytest.approx(0.5, rel=0.1)


def test_a_plan_is_drawn_and_json_stays_pure(command):
    said = command("plan", "demo", "--json", "--plot", "plan.png")
    assert json.loads(said.out)["recipe"] == "demo"
    assert "plan.png" in said.err
    with Image.open("plan.png") as image:
        assert image.format == "PNG"
        assert min(image.size) > 500


def test_a_plot_that_cannot_be_written_is_refused(refused, place):
    (place / "folder").mkdir()
    assert "folder" in refused("plan", "demo", "--plot", "folder")


# Bad input: one line, exit code 2, and nothing is left behind


MISTAKES = {
    "recipe": ((), r"no recipe 'dmeo'; did you mean 'demo'\?"),
    "recipe file": ((), r"nope\.yaml: no such recipe file"),
    "key": (("--set", "batchsize=3"), r"'batchsize'; did you mean 'batch_size'\?"),
    "nested key": (("--set", "eval.crop=1"), r"eval: unknown key 'crop'"),
    "key of a phase": (("--set", "phases.1.resolutoin=8"), r"phases\.1.*'resolution'\?"),
    "index": (("--set", "phases.7.lr=1"), r"phases\.7\.lr: '7' is not an index from 0 to 1"),
    "no index": (("--set", "phases.last.lr=1"), r"phases\.last\.lr: 'last' is not an index"),
    "value": (("--set", "lr=fast"), r"lr: .*'fast'"),
    "range": (("--set", "label_smoothing=1.5"), r"label_smoothing: .*1\.5"),
    "choice": (("--set", "optimizer.name=sdg"), r"did you mean 'sgd'\?"),
    "no value": (("--set", "lr"), r"--set lr: write it as KEY=VALUE"),
    "no key": (("--set", "=3"), r"--set =3: write it as KEY=VALUE"),
    "no YAML": (("--set", "lr=[1"), r"--set lr=\[1: the value is not YAML"),
    "data": (("--data", "missing/photos"), r"missing/photos does not exist"),
    "digits": (("--data", "digts"), r"digts does not exist; did you mean 'digits'\?"),
    "URL": (("--data", "https://host/photos.tar"), r"is a URL that is not read: download it"),
    "model": (("--model", "resnet81"), r"no model 'resnet81'; did you mean 'resnet18'\?"),
    "kwargs": (("--set", "model.kwargs={depth: 3}"), r"model\.kwargs: resnet18 .*'depth'"),
    "no kwargs": (("--set", "model.kwargs=3"), r"model\.kwargs: "),
    "resolution": ((*VIT, "--set", "phases.0.resolution=12"), r"does not take 12 px"),
    "eval resolution": ((*VIT, "--set", "eval.resolution=32"), r"does not take 32 px"),
    "freeze": (("--set", "phases.1.freeze=[layer9]"), r"no module 'layer9'; did you mean"),
    "freeze, no list": (("--set", "phases.1.freeze=layer1"), r"a list, such as \[layer1\]"),
    "extend": (("--extend", 1), r"--extend: there is no run to extend"),
    "extend by 0": (("--extend", 0), r"--extend 0: must be more than 0"),
    "extend by nan": (("--extend", "nan"), r"--extend"),
    "resume": (("--resume", "nothing"), r"--resume nothing: no whole checkpoint there"),
    "resume or not": (("--resume", "x", "--no-resume"), r"--resume and --no-resume exclude"),
    "batch": (("--batch-size", 500), r"batch_size 500 is larger than the phase's 287 images"),
    "batch of 0": (("--batch-size", 0), r"batch_size: .*0"),
    "micro-batches": (("--set", "grad_accum_steps=64"), r"grad_accum_steps 64"),
    "warmup": (
        ("--set", "lr_schedule={name: cosine, warmup: 3ep}"),
        r"lr_schedule: the warmup does not fit the 18 steps",
    ),
    "epochs of 0": (("--epochs", 0), r"epochs 0 must be more than 0"),
    "epochs of nan": (("--epochs", "nan"), r"epochs nan"),
    "lr": (("--lr", -1), r"lr: .*-1"),
    "lr of nan": (("--lr", "nan"), r"lr: .*nan"),
    "seed": (("--seed", -1), r"seed: .*-1"),
    "precision": (("--precision", "fp8"), r"precision: .*'fp8'"),
    "target": (("--target-accuracy", 101), r"target_accuracy: .*101"),
    "threads": (("--threads", 0), r"threads: .*0"),
    "phases": (("--set", "phases=3"), r"phases"),
    "checkpoint": (("--set", "checkpoint.every=never"), r"'never' as '1ep', '500 steps'"),
    # what typer would refuse in its own words
    "no number": (("--epochs", "many"), r"--epochs"),
    "workers": (("--workers", 0), r"--workers"),
    "option": (("--epoch-count", 3), r"--epoch-count"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_line_and_leaves_nothing(refused, tiny, place, mistake):
    options, expected = MISTAKES[mistake]
    verb, recipe, *settings = tiny
    recipe = {"recipe": "dmeo", "recipe file": "nope.yaml"}.get(mistake, recipe)
    line = refused(verb, recipe, *settings, *options, "--out", "out")
    assert re.search(expected, line), line
    assert list(place.iterdir()) == []


def test_a_mistake_leaves_no_run_at_the_default_place_either(refused, tiny):
    refused(*tiny, "--batch-size", 500)
    assert not Path("runs/demo").exists()


def test_a_recipe_without_data_asks_for_it(refused, place):
    assert "--data" in refused("train", "standard")
    assert list(place.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("demo", "--json", "--csv"), "--json and --csv exclude each other"),
        (("demo", "--data", "digts"), "did you mean 'digits'?"),
        (("demo", "--samples", 10), "batch_size 32 is larger than the phase's 10 images"),
        (("demo", "--samples", 0), "--samples"),
        (("demo", "--set", "lrr=1"), "did you mean 'lr'?"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(refused, arguments, expected):
    assert expected in refused("plan", *arguments)


def test_a_verb_that_does_not_exist_is_refused(refused):
    assert "trian" in refused("trian", "demo")


def test_the_name_of_a_recipe_that_is_not_there_is_refused_when_shown(refused):
    assert "did you mean 'demo'?" in refused("recipes", "show", "dmeo")


def test_out_must_be_free(refused, tiny, place, content):
    (place / "file").write_text("mine")
    (place / "folder").mkdir()
    (place / "folder/letter.txt").write_text("mine")
    before = content(place)
    assert "file: is a file, not a directory" in refused(*tiny, "--out", "file")
    for more in ((), ("--no-resume",), ("--resume", "nothing")):
        assert "folder: is not empty" in refused(*tiny, "--out", "folder", *more)
    assert content(place) == before
    assert names(place) == ["file", "folder"]


def test_out_below_a_file_is_refused(refused, tiny, place):
    (place / "file").write_text("mine")
    assert "file" in refused(*tiny, "--out", "file/run")


def test_an_empty_folder_may_be_out(command, tiny, place):
    (place / "out").mkdir()
    assert command(*tiny, "--out", "out").code == 0


def test_a_cache_that_cannot_be_written_is_refused(refused, tiny, place, monkeypatch):
    (place / "file").write_text("mine")
    monkeypatch.setenv("PITSTOP_CACHE", str(place / "file"))
    assert "PITSTOP_CACHE" in refused(*tiny, "--out", "out")
    assert not (place / "out").exists()


# A run from end to end


def test_a_real_process_trains_logs_and_draws(tiny, place):
    (place / "torch.py").write_text("raise SystemExit('the current directory is not imported')")
    ended = subprocess.run(
        [PROGRAM, *tiny, "--epochs", "1"], capture_output=True, text=True, cwd=place
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    out = Path("runs/demo")
    assert run_json(out)["status"] == "finished"
    for name in ("overview", "accuracy_epochs", "accuracy_minutes", "loss_epochs", "lr"):
        assert (out / f"plots/{name}.png").read_bytes().startswith(PNG), name
    lines = ended.stdout.splitlines()
    assert not [line for line in lines if "plots" in line]  # nothing went wrong with them
    assert lines[-1].startswith("total wall time: ")
    assert "\x1b" not in ended.stdout  # no terminal, no colours


def test_run_json_says_how_it_went(run):
    stated = run_json(run)
    assert (stated["status"], stated["exit_code"]) == ("finished", 0)
    assert stated["data"]["source"] == "digits"
    assert Path(stated["data"]["packed"], "manifest.json").exists()
    assert stated["version"] == pitstop.__version__
    assert stated["step"] == stated["steps"] == 18
    assert stated["epoch"] == stated["epochs"] == pytest.approx(2, abs=0.01)
    for evaluation in (stated["metrics"], stated["best"]):
        assert 0 <= evaluation["top1"] <= evaluation["top5"] <= 100
        assert evaluation["loss"] > 0
        assert evaluation["protocol"]["resolution"] == 16
        assert evaluation["protocol"]["images"] == 359
    assert stated["metrics"]["step"] == 18
    highest = max(float(row["val_top1"]) for row in log(run))
    assert stated["best"]["top1"] == pytest.approx(highest, abs=1e-3)
    assert stated["wall_seconds"] > 0
    assert stated["images_per_second"] > 0
    assert stated["recipe"]["model"]["kwargs"]["channels"] == [8, 16, 16, 16]
    assert stated["identity"]["phases.0.lr"] == 0.1
    assert re.fullmatch(r"[0-9a-f]{64}", stated["identity"]["dataset"])
    assert {"device", "precision", "threads", "torch"} <= set(stated["circumstance"])


def test_the_csv_has_a_row_an_epoch_for_any_reader(run):
    rows = log(run)
    assert [(row["step"], row["phase"], row["resolution"]) for row in rows] == [
        ("9", "a", "12"),
        ("18", "b", "16"),
    ]
    for row in rows:
        numbers = {key: float(value) for key, value in row.items() if key != "phase"}
        assert None not in row
        assert numbers["batch_size"] == 32
        assert 0 < numbers["lr"] <= 0.1
        assert 0.85 <= numbers["momentum"] <= 0.95
        assert numbers["train_loss"] > 0
        assert 0 <= numbers["train_top1"] <= numbers["train_top5"] <= 100
        assert numbers["images_per_second"] > 0
    stated = run_json(run)["metrics"]
    assert float(rows[-1]["val_top1"]) == pytest.approx(stated["top1"], abs=1e-3)
    assert float(rows[-1]["val_loss"]) == pytest.approx(stated["loss"], abs=1e-5)


def test_the_text_log_ends_with_best_last_and_the_time(run):
    *_, finished, best, last, time = (run / "training_log.txt").read_text().splitlines()
    top1 = run_json(run)["best"]["top1"]
    assert finished.startswith("finished at step 18")
    assert re.fullmatch(rf"best: \S+/checkpoints/\S+\.pt, top1 {top1:.2f}", best)
    assert re.match(r"last: \S+/checkpoints/\S+-step-00000018\S*\.pt", last)
    assert re.fullmatch(r"total wall time: \d\d:\d\d:\d\d", time)
    for name in (best, last):
        assert (run / "checkpoints" / Path(name.split()[1].rstrip(",")).name).is_file()


def test_the_weights_say_what_they_are(run):
    for which in ("best", "last"):
        with safe_open(run / f"{which}.safetensors", "pt") as file:
            header = json.loads(file.metadata()["pitstop"])
            assert file.get_tensor("fc.weight").shape == (10, 16)
        assert header["classes"] == [str(digit) for digit in range(10)]
        assert header["model"]["name"] == "resnet18"
        assert header["eval"]["resolution"] == 16


# The same command again, and others on the same run


def test_the_same_command_on_a_finished_run_says_so_and_changes_nothing(
    command, tiny, run, content
):
    before = content(run)
    said = command(*tiny, "--out", run)
    assert (said.code, said.err) == (0, "")
    assert said.out == "run: this run has ended: finished; --extend N goes on\n"
    assert content(run) == before


def test_a_change_of_circumstance_is_no_change_of_the_run(command, tiny, run, content):
    before = content(run)
    assert command(*tiny, "--out", run, "--workers", 1, "--threads", 1).code == 0
    assert content(run) == before


def test_another_recipe_is_refused_naming_the_field(refused, tiny, run, content):
    before = content(run)
    line = refused(*tiny, "--out", run, "--lr", 0.05)
    assert "phases.0.lr 0.1 -> 0.05, phases.1.lr 0.1 -> 0.05" in line
    assert "--rebase" in line
    assert "--no-resume" in line
    assert "seed 0 -> 7" in refused(*tiny, "--out", run, "--seed", 7)
    assert content(run) == before


def test_rebase_goes_on_with_the_change(command, tiny, run):
    changed = (*tiny, "--out", run, "--epochs", 3, "--lr", 0.05)
    said = command(*changed, "--rebase")
    assert said.code == 0
    assert "rebased at step 18: epochs 2.0 -> 3.0, phases.0.lr 0.1 -> 0.05" in said.out
    stated = run_json(run)
    assert f"the end moves from step 18 to {stated['steps']}" in said.out
    assert stated["status"] == "finished"
    assert stated["step"] == stated["steps"] > 18
    assert [row["step"] for row in log(run)][:2] == ["9", "18"]
    assert "this run has ended" in command(*changed).out  # from now on it is the recipe


def test_rebase_refuses_what_it_cannot_do(refused, tiny, run, content):
    before = content(run)
    assert "--rebase cannot change" in refused(
        *tiny, "--out", run, "--rebase", "--epochs", 3, "--model", "resnet34"
    )
    assert "epochs" in refused(*tiny, "--out", run, "--rebase", "--epochs", 1)
    assert content(run) == before


def test_extend_goes_on_and_says_where_it_ends(command, tiny, run):
    said = command(*tiny, "--out", run, "--extend", 1)
    assert said.code == 0
    old, new = r"epoch 2\.01 \(step 18\)", r"3\.01 \(step 27\)"
    line = rf"extended by 1 epochs from lr 0\.01: the end moves from {old} to {new}"
    assert re.search(line, said.out)
    assert re.search(line, (run / "training_log.txt").read_text())
    assert run_json(run)["step"] == run_json(run)["steps"] == 27
    assert [row["phase"] for row in log(run)] == ["a", "b", "extension"]
    assert "this run has ended" in command(*tiny, "--out", run).out
    again = command(*tiny, "--out", run, "--extend", 1, "--lr", 0.002)
    assert "from lr 0.002: the end moves from epoch 3.01 (step 27)" in again.out
    assert run_json(run)["status"] == "finished"


@pytest.mark.parametrize("more", [("nan",), ("inf",), (1, "--lr", "nan"), (1, "--lr", "inf")])
def test_an_extension_that_is_not_finite_is_refused(refused, tiny, run, content, more):
    before = content(run)
    assert re.search(r"nan|inf", refused(*tiny, "--out", run, "--extend", *more))
    assert content(run) == before


def test_no_resume_moves_the_run_aside(command, tiny, run, content):
    before = content(run)
    said = command(*tiny, "--out", run, "--no-resume")
    assert said.code == 0
    (aside,) = Path().glob("run-*")
    assert f"moved the run that was there to {aside}" in said.out
    assert content(aside) == before
    assert last_weights(run) == last_weights(aside)  # the same command, the same bits


@pytest.mark.parametrize("more", [("--batch-size", 500), ("--extend", 1), ("--model", "resnet81")])
def test_no_resume_with_a_mistake_leaves_the_run_where_it_is(refused, tiny, run, content, more):
    before = content(run)
    refused(*tiny, "--out", run, "--no-resume", *more)
    assert content(run) == before
    assert names(Path()) == ["run"]


def test_a_second_process_is_refused(refused, tiny, run, content):
    before = content(run)
    with RunDirectory(run).lock():
        for more in ((), ("--no-resume",), ("--extend", 1)):
            assert "another process is writing" in refused(*tiny, "--out", run, *more)
    assert content(run) == before


# Beginning from a checkpoint


def test_a_checkpoint_in_a_new_out_ends_with_the_same_bits(command, tiny, run):
    first, _ = checkpoints(run)
    said = command(*tiny, "--out", "new", "--resume", first)
    assert said.code == 0
    assert "resuming at step 9 of 18" in said.out
    assert last_weights("new") == last_weights(run)
    assert log_without_times("new") == log_without_times(run)
    assert run_json("new")["metrics"] == run_json(run)["metrics"]
    assert run_json(run)["step"] == 18  # as it was
    again = command(*tiny, "--out", "new", "--resume", first)
    assert (again.code, "this run has ended" in again.out) == (0, True)


def test_a_finished_run_in_a_new_out_is_complete(command, tiny, run):
    assert command(*tiny, "--out", "new", "--resume", run).code == 0
    assert run_json("new")["status"] == "finished"
    assert last_weights("new") == last_weights(run)
    assert json.loads(command("eval", "new", "--json").out)["top1"] == run_json(run)["best"]["top1"]


def test_resume_with_another_recipe_leaves_no_half_made_run(refused, tiny, run):
    line = refused(*tiny, "--out", "new", "--resume", run, "--lr", 0.05)
    assert "phases.0.lr 0.1 -> 0.05" in line
    assert names(Path()) == ["run"]


def test_resume_into_a_run_that_is_there_is_refused(refused, tiny, run, content):
    before = content(run)
    assert "holds a run already" in refused(*tiny, "--out", run, "--resume", checkpoints(run)[0])
    assert content(run) == before


# How a run ends otherwise


def test_a_target_that_is_met_ends_the_run(command, tiny):
    said = command(*tiny, "--out", "run", "--target-accuracy", 1)
    assert said.code == 0
    stated = run_json("run")
    assert (stated["status"], stated["exit_code"], stated["step"]) == ("target met", 0, 9)
    assert "target met at step 9" in Path("run/training_log.txt").read_text()
    assert "ended: target met" in command(*tiny, "--out", "run", "--target-accuracy", 1).out
    assert command(*tiny, "--out", "run").code == 0  # without the target it goes on
    assert (run_json("run")["status"], run_json("run")["step"]) == ("finished", 18)


def test_divergence_keeps_the_checkpoints_before_it(command, tiny):
    diverging = (*tiny, "--out", "run", "--set", "phases.1.lr=1e30")
    said = command(*diverging)
    assert (said.code, said.err) == (76, "")
    stated = run_json("run")
    assert (stated["status"], stated["exit_code"]) == ("diverged", 76)
    assert [path.name[:29] for path in checkpoints("run")] == ["epoch-0001.00-step-00000009-t"]
    assert stated["best"]["step"] == 9
    text = Path("run/training_log.txt").read_text()
    assert re.search(
        r"not finite at step \d+: .*lower lr\nbest: .*\nlast: .*\ntotal wall time: ", text
    )
    evaluated = json.loads(command("eval", "run", "--json").out)
    assert evaluated["top1"] == stated["best"]["top1"]
    assert command(*diverging).code == 76
    assert command(*tiny, "--out", "run", "--rebase").code == 0
    assert run_json("run")["status"] == "finished"


def test_divergence_before_any_checkpoint(command, refused, tiny):
    said = command(*tiny, "--out", "run", "--lr", 1e30)
    assert said.code == 76
    assert run_json("run")["status"] == "diverged"
    (retried,) = checkpoints("run")  # with the amendment
    assert retried.name == "epoch-0000.00-step-00000000+.pt"
    assert "has no best weights" in refused("eval", "run")


@pytest.fixture
def at_step(monkeypatch) -> Callable[[int, Callable[[], None]], None]:
    """Has something happen before a step of training."""
    from pitstop.engine import train as engine

    step = engine.train_step

    def at_step(number: int, happens: Callable[[], None]) -> None:
        steps = count(1)

        def train_step(*arguments: Any) -> Any:
            if next(steps) == number:
                happens()
            return step(*arguments)

        monkeypatch.setattr(engine, "train_step", train_step)

    return at_step


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_goes_on(command, tiny, run, at_step, number):
    at_step(12, lambda: signal.raise_signal(number))
    said = command(*tiny, "--out", "stopped")
    assert (said.code, said.err) == (75, "")
    stated = run_json("stopped")
    assert (stated["status"], stated["exit_code"], stated["step"]) == ("interrupted", 75, 12)
    assert "resuming at step 12 of 18" in command(*tiny, "--out", "stopped").out
    assert last_weights("stopped") == last_weights(run)
    assert log_without_times("stopped")[-1]["val_loss"] == log_without_times(run)[-1]["val_loss"]


def test_ctrl_c_twice_ends_at_once_and_the_same_command_goes_on(command, tiny, run, at_step):
    def ctrl_c_twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    at_step(12, ctrl_c_twice)
    said = command(*tiny, "--out", "stopped")
    assert said.code == 130
    assert "Traceback" not in said.err
    assert "resuming at step 9 of 18" in command(*tiny, "--out", "stopped").out
    assert last_weights("stopped") == last_weights(run)


# Evaluation


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--set", "ema={half_life: 5}"),
        ("--set", "eval.flip_average=true"),
        ("--precision", "fp32"),
        ("--precision", "bf16"),
    ],
    ids=["plain", "ema", "flip-average", "fp32", "bf16"],
)
def test_a_run_is_evaluated_as_it_recorded(command, tiny, more):
    assert command(*tiny, "--out", "run", *more).code == 0
    for of, key in (((), "best"), (("--last",), "metrics")):
        said = command("eval", "run", "--json", *of)
        assert (said.code, said.err) == (0, "")
        measured, recorded = json.loads(said.out), run_json("run")[key]
        for protocol in (measured["protocol"], recorded["protocol"]):
            del protocol["weights"]
        assert measured["protocol"] == recorded["protocol"]
        assert measured["top1"] == recorded["top1"]
        assert measured["top5"] == recorded["top5"]
        assert measured["loss"] == pytest.approx(recorded["loss"], abs=1e-6)


def test_weights_are_evaluated_on_data_that_is_named(command, refused, run):
    weights = run / "best.safetensors"
    assert "--data" in refused("eval", weights)
    measured = json.loads(command("eval", weights, "--data", "digits", "--json").out)
    assert measured == json.loads(command("eval", run, "--json").out)
    assert measured["top1"] == run_json(run)["best"]["top1"]


def test_the_figures_come_with_their_protocol(command, run):
    best = run_json(run)["best"]
    figures, protocol = command("eval", run).out.splitlines()
    assert f"top1 {best['top1']:.2f}%" in figures
    assert f"top5 {best['top5']:.2f}%" in figures
    assert "resolution 16, crop_ratio 1.0" in protocol
    assert "images 359" in protocol


def test_the_protocol_can_be_changed(command, run):
    plain = json.loads(command("eval", run, "--json").out)
    other = json.loads(
        command(
            "eval", run, "--json", "--flip-average", "--resolution", 24, "--crop-ratio", 0.9
        ).out
    )
    assert other["protocol"] == plain["protocol"] | {
        "flip_average": True,
        "resolution": 24,
        "crop_ratio": 0.9,
    }
    assert other["loss"] != plain["loss"]


def test_an_evaluation_that_cannot_be_is_refused(refused, run, place):
    (place / "folder").mkdir()
    (place / "letter.txt").write_text("mine")
    assert "nothing: does not exist" in refused("eval", "nothing")
    assert "folder: holds no run.json" in refused("eval", "folder")
    assert "letter.txt" in refused("eval", "letter.txt", "--data", "digits")
    checkpoint = checkpoints(run)[0]
    assert ".safetensors" in refused("eval", checkpoint, "--data", "digits")
    assert "did you mean 'digits'?" in refused("eval", run, "--data", "digts")
    assert "crop_ratio" in refused("eval", run, "--crop-ratio", 5)
    assert "precision" in refused("eval", run, "--precision", "fp8")
    (run / "best.safetensors").unlink()
    assert "has no best weights" in refused("eval", run)


def test_weights_of_other_classes_are_refused(command, refused, run, place):
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            folder = place / "photos" / split / name
            folder.mkdir(parents=True)
            Image.new("RGB", (20, 20), "navy").save(folder / "1.png")
    command("eval", run, "--data", "photos")  # packs them, and says so
    assert "its 2 classes are not the 10" in refused("eval", run, "--data", "photos")


def test_a_resolution_that_the_model_cannot_take_is_refused(refused, command, tiny):
    assert command(*tiny, "--out", "run", *VIT).code == 0
    assert "20 px" in refused("eval", "run", "--resolution", 20)
