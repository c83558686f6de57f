"""What README.md and the scripts tell people to type: the files are there, the flags exist and take those values."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import dpo
import grpo
import kto
import orpo
import ppo
import reward
import rloo
import sft
from common.run import parse_flags

ROOT = Path(grpo.__file__).parent
SCRIPTS = {f"{script.__name__}.py": script for script in (sft, reward, dpo, kto, orpo, ppo, grpo, rloo)}
PAGES = [page for page in (ROOT / "README.md", ROOT / "benchmark" / "README.md") if page.exists()]
TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}


def commands() -> list[str]:
    """Every command of a fenced bash block, and of the docstrings of the scripts, without comments."""
    documented = "\n".join(script.__doc__ for script in SCRIPTS.values())
    lines = re.findall(r"^ {4}((?:python|torchrun) .*)", documented, flags=re.MULTILINE)
    for text in TEXTS.values():
        for block in re.findall(r"^```bash\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
            lines += block.replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return list(dict.fromkeys(part.strip() for line in words for part in shlex.join(line).split(" '&&' ") if part))


def takes(script: str, flags: list[str]) -> bool:
    """Whether the script would take these flags."""
    try:
        parse_flags(SCRIPTS[script].Args, flags, None)
    except SystemExit as stop:
        return stop.code == 0
    return True


@pytest.mark.parametrize("command", commands())
def test_commands_of_code_blocks(command, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["readme"])
    words = shlex.split(command)
    files = [word for word in words if re.fullmatch(r"[\w/.-]+\.(py|sh)", word)]
    if words[0] == "cp" or not files:
        return  # nothing of ours
    assert (ROOT / files[0]).exists(), f"{files[0]} is not there"
    if files[0] in SCRIPTS and "--config" not in words:
        assert takes(files[0], words[words.index(files[0]) + 1 :])


@pytest.mark.parametrize("command", [command for command in commands() if re.search("--(inspect|help)", command)])
def test_commands_that_are_over_in_seconds(command, tmp_path):
    _, script, *flags = shlex.split(command)
    done = subprocess.run([sys.executable, ROOT / script, *flags], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("page", TEXTS)
def test_flags_in_the_text(page, monkeypatch):
    """`--beta 0.04 --kl_estimator k3` between backticks: names that a script has, values that one of them takes."""
    monkeypatch.setattr(sys, "argv", ["readme"])
    known = {"help", "config", "long", "dev", "png", "markdown", "collect", "nproc_per_node"}
    known |= {name for script in SCRIPTS.values() for name in script.Args.__dataclass_fields__}
    for code in re.findall(r"(?<!`)`(--[^`]+)`(?!`)", TEXTS[page]):
        names = re.findall(r"--(?:no-)?(\w+)", code)
        assert set(names) <= known, f"{page}: `{code}` names a flag that no script has"
        owners = [name for name in SCRIPTS if set(names) <= set(SCRIPTS[name].Args.__dataclass_fields__)]
        if " " in code and owners and "..." not in code:
            assert any(takes(name, shlex.split(code)) for name in owners), f"{page}: no script takes `{code}`"


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_in_a_docstring(script, monkeypatch):
    """Names anywhere; where a table sets `RPO      --loss_type sigmoid sft --loss_weights 1 0.005`, values as well."""
    monkeypatch.setattr(sys, "argv", ["readme"])
    text = re.sub(r"^ {4}(python|torchrun) .*", "", SCRIPTS[script].__doc__, flags=re.MULTILINE)
    known = {name for other in SCRIPTS.values() for name in other.Args.__dataclass_fields__}
    assert set(re.findall(r"--(?:no[-_])?(\w+)", text)) <= known
    for recipe in re.findall(r"(?<= {2})--\w+ \w.*?(?=  |$)", text, flags=re.MULTILINE):
        assert takes(script, shlex.split(recipe)), recipe


@pytest.mark.parametrize("page", TEXTS)
def test_links_and_files_in_the_text(page):
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXTS[page])
    missing = [target for target in targets if not (ROOT / page).parent.joinpath(target).exists()]
    named = re.findall(r"`((?:tests|common|benchmark)/[\w/]+\.\w+)`", TEXTS[page])
    missing += [name for name in named if not (ROOT / name).exists()]
    assert not missing, f"{page} points to {missing}"


def test_there_is_something_to_check():
    assert {"demo.sh", "test.sh"} <= {word for command in commands() for word in command.split()}
    assert any(command.startswith("torchrun") for command in commands()) and len(commands()) > 8
