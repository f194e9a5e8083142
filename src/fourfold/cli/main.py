"""The command `fourfold`: finds the verb and hands over; heavy packages are imported by the verb that needs them."""

from __future__ import annotations

import os
from typing import Any

import typer
from typer.core import TyperGroup

from fourfold.cli import chat, data, env, explain, export, plan, rehearse, train, version

_TAKES_KEYS = {"ignore_unknown_options": True}

_HEADINGS = {
    "Work": ("train", "plan", "rehearse", "chat", "export", "data"),
    "About": ("help", "env", "version"),
}


class _GroupedHelp(TyperGroup):
    """Lists the verbs under their headings."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        for heading, verbs in _HEADINGS.items():
            with formatter.section(heading):
                formatter.write_dl([(verb, self.commands[verb].get_short_help_str(70)) for verb in verbs])


app = typer.Typer(
    name="fourfold",
    cls=_GroupedHelp,
    help="Train and fine-tune language models from one config file.",
    epilog="`fourfold help` lists the config keys, `fourfold help KEY` explains one.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
"""A verb is a line here, its place in the help above, and a file beside this one."""

app.command("train", context_settings=_TAKES_KEYS)(train.train)
app.command("plan", context_settings=_TAKES_KEYS)(plan.plan)
app.command("rehearse", context_settings=_TAKES_KEYS)(rehearse.rehearse)
app.command("chat", context_settings=_TAKES_KEYS)(chat.chat)
app.command("export", context_settings=_TAKES_KEYS)(export.export)
app.command("data", context_settings=_TAKES_KEYS)(data.data)
app.command("help")(explain.explain)
app.command("env")(env.env)
app.command("version")(version.version)


def main() -> None:
    """Entry point of the command line."""
    _let_segments_grow()
    app()


def _let_segments_grow() -> None:
    """Have torch's allocator grow its segments, which leaves fewer holes, unless the user has set it up.

    It is read when torch is imported. The planner's figures assume it (planning/reserved.py).
    """
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
