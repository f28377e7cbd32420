"""All commands put together; their options and their help are in `commands`.

Imports no torch: a mistyped address is answered before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from swarm.cli.commands import faces, looks, nodes, shows, texts, training

COMMANDS: tuple[tuple[Callable[..., Any], str], ...] = (
    (nodes.bootstrap, "swarm bootstrap --listen /ip4/0.0.0.0/tcp/4001"),
    (nodes.join, "swarm join smollm2-135m-instruct --invite swarm://…"),
    (texts.generate, 'swarm generate smollm2-135m-instruct --invite swarm://… -p "Why is the sky blue?"'),
    (texts.chat, "swarm chat smollm2-135m-instruct --invite swarm://…"),
    (training.finetune, "swarm finetune smollm2-135m-instruct --invite swarm://… --data mine.jsonl --output mine"),
    (faces.gateway, "swarm gateway smollm2-135m-instruct --invite swarm://… --port 8000"),
    (looks.status, "swarm status --invite swarm://…"),
    (faces.dashboard, "swarm dashboard --invite swarm://… --port 8080"),
    (looks.top, "swarm top --invite swarm://…"),
    (looks.route, "swarm route smollm2-135m-instruct --explain --invite swarm://…"),
    (shows.simulate, "swarm simulate --peers 1000 --minutes 10 --plot swarm.html"),
    (shows.demo, 'swarm demo "What is a beehive?"'),
)
"""In the order of the help, each with an example."""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help="Run large language models together: every peer hosts some blocks of a model, and text flows through them.\n\n"
    "Try it on this machine alone with swarm demo.",
)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        import importlib.metadata

        typer.echo(f"hiveswarm {importlib.metadata.version('hiveswarm')}")
        raise typer.Exit


for _function, _text in COMMANDS:
    app.command(epilog=f"Example:  {_text}")(_function)


def spread(arguments: Sequence[str]) -> list[str]:
    """Let several addresses follow one option: `--initial-peers A B` becomes `--initial-peers A --initial-peers B`."""
    spreading, result = "", list[str]()
    for argument in arguments:
        if argument.startswith("-"):
            option = argument.partition("=")[0]
            spreading = option if option in ("--initial-peers", "--listen", "--announce") else ""
        elif spreading and result[-1] != spreading and argument.startswith(("/ip", "/dns")):
            result.append(spreading)
        elif result[-1:] != [spreading]:
            spreading = ""
        result.append(argument)
    return result
