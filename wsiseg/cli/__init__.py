"""The command line: words to calls. Imports a command's module only when it is run."""

from __future__ import annotations

import difflib
import importlib
import io
import os
import signal
import sys
import warnings
from pathlib import Path
from types import FrameType
from typing import TextIO

import click

from wsiseg import __version__
from wsiseg.errors import WsisegError

COMMANDS: dict[str, tuple[str, str]] = {
    # name: (module, short help). The order is that of the help page.
    "predict": ("wsiseg.cli.predict", "Segment slides: masks, polygons and overviews."),
    "info": ("wsiseg.cli.info", "Show what is known of a slide."),
    "export": ("wsiseg.cli.export", "Make the outputs again from a kept canvas."),
    "report": ("wsiseg.cli.report", "Write one HTML page for the outputs of many slides."),
    "view": ("wsiseg.cli.view", "Look at slides with their masks in a browser."),
    "models": ("wsiseg.cli.models", "List, show and import models."),
    "train": ("wsiseg.cli.train", "Train a model on labelled images."),
    "evaluate": ("wsiseg.cli.evaluate", "Measure a model on labelled images."),
    "pretrain": ("wsiseg.cli.pretrain", "Pretrain extractors on unlabelled tissue."),
    "phantom": ("wsiseg.cli.phantom", "Make a synthetic H&E slide with known truth."),
    "doctor": ("wsiseg.cli.doctor", "Check that everything works on this machine."),
    "qupath-script": ("wsiseg.cli.qupath_script", "Print the QuPath import script."),
}


class LazyGroup(click.Group):
    """A group whose commands are imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All command names, in the order of the help page."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name; each module calls its command `command`."""
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(COMMANDS[cmd_name][0]).command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command of a line; of a name that is none the nearest is said."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as e:
            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise click.UsageError(e.message + hint, ctx) from e

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The command list of the help page, without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="wsiseg")
def cli() -> None:
    """Tissue segmentation of whole-slide images.

    Start with:  wsiseg predict slide.svs --out masks/
    """


class _Terminated(BaseException):
    """The process was asked to end (SIGTERM)."""


def _terminate(number: int, frame: FrameType | None) -> None:
    """End as Ctrl-C does, so that what is half done is removed."""
    raise _Terminated


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Show wsiseg's own warnings, which are for the user, as one line each; none of Pillow's."""
    if "PIL" in Path(filename).parts:
        return  # of odd metadata, say: an image that cannot be used is an error
    own = category is UserWarning and "wsiseg" in Path(filename).parts
    text = f"wsiseg: warning: {message}\n"
    sys.stderr.write(
        text if own else warnings.formatwarning(message, category, filename, lineno, line)
    )


def main() -> None:
    """Run the command line.

    Ends the process with 0, 1 (failed), 2 (usage), 130 (Ctrl-C) or 143 (SIGTERM).
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be in any script
    before = signal.signal(signal.SIGTERM, _terminate)
    plain, warnings.showwarning = warnings.showwarning, show_warning
    try:
        code = cli.main(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.Abort:
        click.echo("wsiseg: stopped", err=True)
        sys.exit(130)
    except KeyboardInterrupt:
        click.echo("wsiseg: stopped", err=True)
        sys.exit(130)
    except _Terminated:
        click.echo("wsiseg: stopped", err=True)
        sys.exit(143)
    except click.ClickException as e:
        e.show()
        sys.exit(e.exit_code)
    except WsisegError as e:
        click.echo(f"wsiseg: error: {e}", err=True)
        sys.exit(e.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    finally:
        signal.signal(signal.SIGTERM, before)
        warnings.showwarning = plain
