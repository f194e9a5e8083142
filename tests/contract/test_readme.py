"""What README.md shows is what happens: its commands run, its output is printed, and both languages say the same.

Blocks are told apart by the word after the fence: `bash` holds commands, `text` what the command before it prints,
`yaml` a config whose first line names its file, `python` a program. A block without a word is not looked at.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import fourfold
from fourfold.config.load import load
from fourfold.config.yaml12 import parse_yaml
from project_copy import ROOT, in_project, make_project, run_command, write_config

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
_LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
_SKIPPED = ("make", "pip")
"""Programs that install; everything else in the documentation is run."""

_README, _CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"
_PAGES = [_README, _CHINESE, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    kind: str
    text: str

    def commands(self) -> list[tuple[str, ...]]:
        """The words of each line; comments are left out."""
        lines = (shlex.split(line, comments=True) for line in self.text.splitlines())
        return [tuple(words) for words in lines if words]


def blocks(page: Path, *kinds: str) -> list[Block]:
    found = [Block(kind, text) for kind, text in _FENCE.findall(page.read_text(encoding="utf-8"))]
    return [block for block in found if not kinds or block.kind in kinds]


def shape(line: str) -> str:
    """A printed line without its figures and its spacing."""
    return " ".join(_NUMBER.sub("#", line).split())


def _run_all(project: Path) -> Iterator[tuple[str, str]]:
    """Run every block in its order; yields what was run and what it printed, or how it failed."""
    for block in blocks(_README, "bash", "yaml", "python"):
        if block.kind == "yaml":
            name = block.text.splitlines()[0].removeprefix("# ")
            write_config(project / name, parse_yaml(block.text))
        elif block.kind == "python":
            with in_project(project):
                exec(block.text, {})
        else:
            for words in block.commands():
                if words[0] in _SKIPPED:
                    continue
                assert words[0] == "fourfold", f"{words[0]} is not run by this test"
                done = run_command(project, *words[1:], typed="Who are you?\nexit\n" if words[1] == "chat" else "")
                assert done.exit_code == 0, f"{shlex.join(words)}: {done.output}"
                yield shlex.join(words), done.output


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Output of every command of the README, run from top to bottom in a copy of the project."""
    return dict(_run_all(make_project(tmp_path_factory.mktemp("project"))))


def test_readme_commands_when_run_in_order_all_succeed(printed: dict[str, str]) -> None:
    verbs = {command.split()[1] for command in printed}
    assert verbs >= {"train", "data", "chat", "export", "help", "env"}


def test_readme_output_when_compared_has_the_lines_that_are_printed(printed: dict[str, str]) -> None:
    last = ""
    shown: dict[str, list[str]] = {}
    for block in blocks(_README, "bash", "text"):
        if block.kind == "text":
            shown.setdefault(last, []).extend(block.text.splitlines())
        else:
            commands = [shlex.join(words) for words in block.commands() if words[0] not in _SKIPPED]
            # a block of several commands is followed by the output of the one that speaks
            exporting = [command for command in commands if " export " in command]
            last = (exporting or commands or [last])[-1]
    assert len(shown) == 2
    for command, lines in shown.items():
        found = {shape(line) for line in printed[command].splitlines()}
        assert [line for line in lines if shape(line) not in found] == [], command


def test_readme_config_when_loaded_as_it_is_has_nothing_wrong() -> None:
    [block] = blocks(_README, "yaml")
    run = load(parse_yaml(block.text), verb="train")
    assert run.notes == ()
    assert run.training.learning_rate == 1e-4


def test_readme_when_translated_shows_the_same_commands_and_output() -> None:
    def content(page: Path) -> list[object]:
        found: list[object] = []
        for block in blocks(page, "bash", "yaml", "python", "text"):
            if block.kind == "yaml":
                found.append(parse_yaml(block.text))
            else:
                found.append(block.text if block.kind in ("text", "python") else block.commands())
        return found

    assert content(_CHINESE) == content(_README)


@pytest.mark.parametrize("page", _PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_when_it_links_to_a_file_the_file_is_there(page: Path) -> None:
    targets = [target for target in _LINK.findall(page.read_text(encoding="utf-8")) if "://" not in target]
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_python_functions_when_listed_are_those_of_the_command_line() -> None:
    assert {"train", "chat", "export", "data", "env", "version"} <= set(fourfold.__all__)
