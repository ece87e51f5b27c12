"""`sparsekv`: the commands, and how mistakes are told. Imports no torch.

Exit codes: 0 done, 2 a mistake in what was asked (one line on stderr), 130 stopped by Ctrl-C.
SPARSEKV_DEBUG=1 shows the traceback behind a one-line error.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from typing import Any

import typer

from sparsekv import __version__
from sparsekv.cli.evaluate import evaluate, evaluate_alias
from sparsekv.cli.fetch import fetch
from sparsekv.cli.generate import generate
from sparsekv.cli.listing import listing
from sparsekv.cli.merge import merge
from sparsekv.cli.relevance import relevance
from sparsekv.cli.train import train, train_alias
from sparsekv.cli.validate import validate
from sparsekv.errors import ConfigError

USAGE, STOPPED = 2, 130

app = typer.Typer(
    name="sparsekv",
    help="Run large language models over long contexts in a fraction of the KV-cache memory.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sparsekv {__version__}")
        raise typer.Exit()


@app.callback()
def _main(
    version: bool = typer.Option(
        False, "--version", help="Show the version.", callback=_version, is_eager=True
    ),
) -> None:
    pass


app.command("eval")(evaluate)
app.command("train")(train)
app.command("merge")(merge)
app.add_typer(relevance, name="relevance")
app.command("generate")(generate)
app.command("ls")(listing)
app.command("validate")(validate)
app.command("fetch-model")(fetch)


def _alias(command: Callable[..., None]) -> typer.Typer:
    """A program of its own for one command."""
    program = typer.Typer(
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    program.command()(command)
    return program


alias_app = _alias(evaluate_alias)
train_alias_app = _alias(train_alias)


def share_cores() -> None:
    """Let idle OpenMP threads spin only briefly before they sleep; read when torch is loaded.

    The default of GNU's OpenMP (300000 rounds) gains little where the cores are free, and makes torch ten times slower
    where other programs use them too. A user's own setting stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def run() -> None:
    """Entry point of `sparsekv`."""
    share_cores()
    sys.exit(call(app, "sparsekv"))


def run_eval() -> None:
    """Entry point of `sparsekv-eval`."""
    share_cores()
    sys.exit(call(alias_app, "sparsekv-eval"))


def run_train() -> None:
    """Entry point of `sparsekv-train`."""
    share_cores()
    sys.exit(call(train_alias_app, "sparsekv-train"))


def call(command: Callable[..., Any], name: str, arguments: list[str] | None = None) -> int:
    """Run a command line and return its exit code; what the user got wrong becomes one line on stderr."""
    try:
        code = command(args=arguments, prog_name=name, standalone_mode=False)
    except ConfigError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return STOPPED
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f" ({error.filename})" if error.filename else ""
            return _fail(
                f"the disk is full{where}; what was written so far is intact: free space and run again"
            )
        raise
    except typer.Abort:
        return STOPPED
    except Exception as error:
        if not _is_a(error, "ClickException"):
            raise
        if _is_a(error, "NoArgsIsHelpError"):  # no mistake that a line could name: its message is the help
            print(error.format_message(), file=sys.stderr)  # type: ignore[attr-defined]
            return USAGE
        return _fail(error.format_message())  # type: ignore[attr-defined]
    return code if isinstance(code, int) else 0


def _is_a(error: Exception, name: str) -> bool:
    """By name: typer brings its own copy of click or uses the installed one, depending on its version."""
    return any(kind.__name__ == name for kind in type(error).__mro__)


def _fail(message: str) -> int:
    if os.environ.get("SPARSEKV_DEBUG"):
        raise
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return USAGE


if __name__ == "__main__":
    run()
