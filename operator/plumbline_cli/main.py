"""The `plumbline` command: `plumbline …` or, installed as a kubectl plugin, `kubectl plumbline …`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Searching every installed distribution for pydantic plugins costs a third of the start-up time; none are used here.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")

import typer

from plumbline_cli.commands.registry import register
from plumbline_cli.exits import BAD_INPUT, EXIT_CODES_HELP, INTERRUPTED, RUN_FAILED, CommandError

app = typer.Typer(
    name="plumbline",
    help="Train and align language models by manifest: on this machine (`plumbline run`) or on a Kubernetes cluster.",
    epilog=EXIT_CODES_HELP,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
register(app)


@app.callback()
def options(
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error.", envvar="PLUMBLINE_DEBUG"),
) -> None:
    """Train and align language models by manifest."""
    if debug:
        os.environ["PLUMBLINE_DEBUG"] = "1"


def main() -> None:
    """Entry of the command; maps every error to a message and an exit code."""
    is_plugin = Path(sys.argv[0]).name.startswith("kubectl-")
    debug = "--debug" in sys.argv or bool(os.environ.get("PLUMBLINE_DEBUG"))
    try:
        app(prog_name="kubectl plumbline" if is_plugin else "plumbline")
    except CommandError as error:
        if debug:
            raise
        _complain(str(error))
        sys.exit(error.code)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        # The reader has left (`| head`); a second complaint of the interpreter at exit helps nobody.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(RUN_FAILED)
    except (PermissionError, FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        if debug:
            raise
        _complain(f"{error.filename}: {error.strerror}")
        sys.exit(BAD_INPUT)
    except OSError as error:
        if debug:
            raise
        _complain(f"{error.filename or 'this machine'}: {error.strerror or error}")
        sys.exit(RUN_FAILED)
    except Exception as error:  # the last line of defence: words instead of a traceback
        if debug:
            raise
        _complain(f"unexpected {type(error).__name__}: {error}\nThis is a fault of plumbline; run again with --debug")
        sys.exit(RUN_FAILED)


def _complain(message: str) -> None:
    from plumbline_cli.output import err

    err().print(message, style="red" if len(message) < 2000 else None)


if __name__ == "__main__":
    main()
