"""A conversation on the command line."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from fourfold.base.errors import DataError, FourfoldError
from fourfold.config.schema import Run
from fourfold.serve.session import ChatSession
from fourfold.serve.speaker import load_speaker

HELP = """\
clear           forget the conversation
exit            leave (so does the end of the input)
/system TEXT    set the system prompt; without a text the default one again
/tools FILE     let the model call the tools of a JSON file; without a file none
//TEXT          ask /TEXT, which is no command then
/help           show this
Ctrl-C          stop the answer; at the prompt, leave
"""
_COMMAND = re.compile(r"/\w+")
"""What looks like a command; a path of several parts is asked as it is."""


@dataclass(frozen=True, slots=True)
class Screen:
    """Where lines come from and where text goes.

    Attributes:
        read: the next line for a prompt to show; raises EOFError at the end.
    """

    read: Callable[[str], str]
    output: TextIO

    def write(self, text: str) -> None:
        """Show text at once."""
        self.output.write(text)
        self.output.flush()


def chat(run: Run) -> None:
    """Load the model of a config and talk with it until the user leaves.

    Raises:
        ConfigError: keys that contradict each other or this machine.
        ModelError: a model or adapter that cannot be loaded.
    """
    speaker = load_speaker(run)
    session = ChatSession(speaker.engine, speaker.renderer, speaker.sampling)
    screen = terminal_screen() if sys.stdin.isatty() else piped_screen(sys.stdin, sys.stdout)
    screen.write("Ask, or say `clear`, `exit` or `/help`.\n")
    converse(session, screen)


def terminal_screen() -> Screen:
    """Reads with line editing and history."""
    with suppress(ImportError):  # not on every system
        import readline  # noqa: F401  # importing it is what turns line editing on

    return Screen(input, sys.stdout)


def piped_screen(source: TextIO, output: TextIO) -> Screen:
    """Reads line by line, and shows each line, so that what is written reads as a conversation."""

    def read(prompt: str) -> str:
        line = source.readline()
        if not line:
            raise EOFError
        output.write(f"{prompt}{line.rstrip()}\n")
        return line.rstrip("\r\n")

    return Screen(read, output)


def converse(session: ChatSession, screen: Screen) -> None:
    """Question and answer in turn, until `exit`, the end of the input, or Ctrl-C at the prompt."""
    while True:
        try:
            line = screen.read("\nTool result: " if session.calls else "\nUser: ").strip()
        except (EOFError, KeyboardInterrupt):
            screen.write("\n")
            return
        if line in ("exit", "/exit"):
            return
        try:
            if line.startswith("//"):
                _answer(session, screen, line[1:])
            elif line and not _command(session, screen, line):
                _answer(session, screen, line)
        except FourfoldError as error:
            screen.write(f"{error}\n")


def _command(session: ChatSession, screen: Screen, line: str) -> bool:
    """Whether the line is a command, which is then obeyed."""
    word, _, rest = line.partition(" ")
    if line in ("clear", "/clear"):
        session.clear()
        screen.write("The conversation is forgotten.\n")
    elif line == "/help":
        screen.write(HELP)
    elif word == "/system":
        session.system = rest.strip()
        screen.write("The system prompt is set.\n" if session.system else "The system prompt is the default one.\n")
    elif word == "/tools":
        session.tools = read_tools(Path(rest.strip()).expanduser()) if rest.strip() else ""
        screen.write("The model may call the tools.\n" if session.tools else "The model has no tools.\n")
    elif _COMMAND.fullmatch(word) and not session.calls:
        screen.write(f"There is no command {word}.\n{HELP}")
    else:
        return False
    return True


def read_tools(path: Path) -> str:
    """A JSON list of tool descriptions.

    Raises:
        DataError: no such file, or not a list of objects.
    """
    try:
        tools = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise DataError(f"/tools: {reason}. Name a file that holds a JSON list of tools.", file=str(path)) from error
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError("/tools: this is no JSON list of objects. Put the tools into a list.", file=str(path))
    return json.dumps(tools, ensure_ascii=False)


def _answer(session: ChatSession, screen: Screen, question: str) -> None:
    pieces = session.ask(question)
    screen.write("Assistant: ")
    try:
        for piece in pieces:
            screen.write(piece)
    except KeyboardInterrupt:
        screen.write(" [stopped]")
    finally:
        pieces.close()
        screen.write("\n")
    for call in session.calls:
        screen.write(f"Tool call: {call.name}({json.dumps(call.arguments, ensure_ascii=False)})\n")
