"""The command group, and the one place that turns refusals into exit codes."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import click

from launcher import __version__
from launcher.errors import ExitCode, Refusal

# Command -> module:function, imported when it is called: `--help` must stay fast.
COMMANDS = {
    "run": ("launcher.cli.run", "run"),
    "plan": ("launcher.cli.run", "plan"),
    "cancel": ("launcher.cli.cancel", "cancel"),
    "data": ("launcher.cli.data", "data"),
    "doctor": ("launcher.cli.doctor", "doctor"),
    "generate": ("launcher.cli.after", "generate"),
    "image": ("launcher.cli.image", "image"),
    "init": ("launcher.cli.start", "init"),
    "logs": ("launcher.cli.logs", "logs"),
    "recipes": ("launcher.cli.start", "recipes"),
    "resume": ("launcher.cli.run", "resume"),
    "schema": ("launcher.cli.start", "schema"),
    "status": ("launcher.cli.watch", "status"),
}
SHORT_HELP = {
    "run": "Plan, then launch (also without the word run).",
    "plan": "Say what would happen; starts nothing, needs no GPU.",
    "cancel": "Stop a run, with a checkpoint unless told otherwise.",
    "data": "Look at a run's rows, tokenise them ahead of it (data check, data prepare).",
    "doctor": "Say whether this machine, or a cluster's nodes, are ready.",
    "generate": "Ask a finished run's model.",
    "image": "Build the container image (image build).",
    "init": "Write a first sft.yaml.",
    "logs": "Show a run's logs.",
    "recipes": "List the recipes that come with the launcher.",
    "resume": "Go on with a run from its last whole checkpoint.",
    "schema": "Print the JSON schema of the spec.",
    "status": "Show where a run stands.",
}


class DefaultRun(click.Group):
    """A group whose first argument, where it is no command, belongs to `run`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command when it is needed."""
        if cmd_name not in COMMANDS:
            return None
        from importlib import import_module

        module, function = COMMANDS[cmd_name]
        command: click.Command = getattr(import_module(module), function)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, SHORT_HELP[name]) for name in COMMANDS])

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put `run` in front of anything that is no command."""
        own = {"--help", "-h", "--version"}
        if not args or (args[0] not in COMMANDS and args[0] not in own):
            args = ["run", *args]
        return super().parse_args(ctx, args)


@click.group(
    cls=DefaultRun,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="sftlaunch")
def cli() -> None:
    """Plan and launch supervised fine-tuning: DDP, DeepSpeed ZeRO or FSDP from one spec.

    `sftlaunch [SPEC] [OPTIONS]` is `sftlaunch run`. Without a SPEC it takes ./sft.yaml,
    else the built-in recipe tiny. Exit codes: 0 done, 1 the run failed, 2 wrong spec or
    command line, 3 plan refused, 4 environment not ready, 75 stopped with a checkpoint.
    """


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `sftlaunch`; always exits with a code of the table."""
    arguments = sys.argv[1:] if arguments is None else arguments
    sys.exit(_run(arguments))


def _run(arguments: list[str]) -> int:
    as_json = "--json" in arguments
    try:
        code: Any = cli.main(
            arguments, prog_name="sftlaunch", standalone_mode=False, color=_color()
        )
    except Refusal as refusal:
        return _refuse(refusal.as_json(), str(refusal), refusal.exit_code, as_json)
    except click.exceptions.Exit as leave:
        return leave.exit_code
    except click.Abort:
        return _refuse({}, "interrupted", ExitCode.RUN_FAILED, as_json=False)
    except click.ClickException as error:
        return _usage(error, as_json)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return ExitCode.DONE
    except Exception as error:
        return _defect(error, as_json)
    return int(code or 0)


def _color() -> bool | None:
    """False under NO_COLOR; None leaves it to Click, which asks whether it is a terminal."""
    return False if os.environ.get("NO_COLOR") else None


def _refuse(record: dict[str, str], text: str, code: ExitCode, as_json: bool) -> int:
    # Outside a command's context, which would know the colour.
    click.secho("error: ", fg="red", nl=False, err=True, color=_color())
    click.echo(" ".join(text.split()), err=True)
    if as_json:
        click.echo(json.dumps({"error": record}))
    return code


def _usage(error: click.ClickException, as_json: bool) -> int:
    command = getattr(getattr(error, "ctx", None), "command_path", "sftlaunch")
    message = error.format_message().rstrip(".").replace("\n", " ")
    fix = f"see {command} --help"
    record = {"code": "usage", "message": message, "fix": fix, "source": ""}
    return _refuse(record, f"{message}; {fix}", ExitCode.BAD_SPEC, as_json)


def _defect(error: Exception, as_json: bool) -> int:
    if os.environ.get("SFTLAUNCH_TRACEBACK"):
        raise error
    what = f"{type(error).__name__}: {error}"
    fix = "this is a defect of sftlaunch; set SFTLAUNCH_TRACEBACK=1 and report what it prints"
    record = {"code": "defect", "message": what, "fix": fix, "source": ""}
    return _refuse(record, f"{what}; {fix}", ExitCode.RUN_FAILED, as_json)
