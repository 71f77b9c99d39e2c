"""At the shell: what was probably meant, completion, styles. Most ask the program itself."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ..report.running import write_run

PROGRAM = Path(sys.executable).with_name("pitstop")

COLOUR = re.compile("\x1b\\[(?:[0-9]+;)*(?:3[0-8]|9[0-7])[;m]")


def complete(typed: str) -> list[str]:
    """Returns what bash is offered for the last word of a command line."""
    asked = {
        "_PITSTOP_COMPLETE": "complete_bash",
        "COMP_WORDS": typed,
        "COMP_CWORD": str(len(typed.split(" ")) - 1),
    }
    ended = subprocess.run([PROGRAM], env=os.environ | asked, capture_output=True, text=True)
    return ended.stdout.split()


def on_a_terminal(*arguments: str, **variables: str) -> str:
    """Returns what the program prints on a terminal of 256 colours, given these variables too."""
    ours, its = pty.openpty()
    known = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    process = subprocess.Popen(
        [PROGRAM, *arguments],
        env=known | {"TERM": "xterm-256color"} | variables,
        stdin=its,
        stdout=its,
        stderr=its,
    )
    os.close(its)
    said = b""
    try:
        while part := os.read(ours, 65536):
            said += part
    except OSError:  # Linux's end of a terminal that nobody has open any more
        pass
    os.close(ours)
    assert process.wait() == 0
    return said.decode()


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (("trian", "demo"), "'train'"),
        (("data", "pcak"), "'pack'"),
        (("launch", "ec3"), "'ec2'"),
        (("recipes", "shwo"), "'show'"),
        (("train", "demo", "--epoch", "3"), "--epochs"),
    ],
)
def test_a_misspelt_verb_or_option_is_answered_with_the_one_that_was_meant(refused, typed, meant):
    assert re.search(f"(Did you mean|Possible options|did you mean).*{meant}", refused(*typed))


def test_verbs_and_options_complete():
    assert complete("pitstop tr") == ["train"]
    assert complete("pitstop launch sage") == ["sagemaker"]
    assert complete("pitstop train demo --batch") == ["--batch-size"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_gets_its_completion(shell: str):
    asked = os.environ | {"_PITSTOP_COMPLETE": f"source_{shell}"}
    ended = subprocess.run([PROGRAM], env=asked, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert f"_PITSTOP_COMPLETE=complete_{shell}" in ended.stdout


def test_a_terminal_gets_styled_text_and_a_pipe_plain_text():
    assert "\x1b[1m" in on_a_terminal("plan", "demo")
    piped = subprocess.run([PROGRAM, "plan", "demo"], capture_output=True, text=True)
    assert "16 epochs" in piped.stdout
    assert "\x1b" not in piped.stdout


def test_colours_are_for_terminals_and_there_no_color_turns_them_off(tmp_path: Path):
    watch = ("watch", str(write_run(tmp_path / "run", 60)), "--once")
    assert COLOUR.search(on_a_terminal(*watch))
    assert not COLOUR.search(on_a_terminal(*watch, NO_COLOR="1"))
