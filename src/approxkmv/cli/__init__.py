"""The command line: every step of the pipeline as a separate command, without Snakemake."""

from __future__ import annotations

import sys

from approxkmv.cli import people, pipeline, race, upkeep  # noqa: F401
from approxkmv.cli.app import Command, app, config_app
from approxkmv.progress import LOG, OUT_OF_MEMORY, is_of_memory, reason_of

# The exit code of what Ctrl-C stopped
STOPPED = 130
# Show whole first lines in the list of commands; by default they are cut after 45 characters.
for _command in (*app.registered_commands, *config_app.registered_commands):
    _command.cls = Command
    _command.short_help = (getattr(_command.callback, "__doc__", None) or "").strip().split("\n")[0]


def main() -> None:
    """Run the command line; a user error is one line on stderr (and in the log) and exit code 2."""
    try:
        code = app(standalone_mode=False)
        if code == STOPPED:
            _fail("stopped", STOPPED)
        sys.exit(code if isinstance(code, int) else 0)
    except KeyboardInterrupt:
        _fail("stopped", STOPPED)
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()  # type: ignore[attr-defined]
            sys.exit(2)
        # What typer says of a command or an option, whichever click it brings
        if (said := getattr(error, "format_message", None)) is not None:
            context = getattr(error, "ctx", None)
            more = f" ({context.command_path} --help says more)" if context is not None else ""
            _fail(said().replace("Input should", "it must") + more, 2)
        reason = reason_of(error)
        if reason is None:
            raise
        if reason.startswith(OUT_OF_MEMORY):
            # torch's own work at exit may lack memory too, and would print a traceback.
            sys.unraisablehook = _hide_lack_of_memory
        _fail(reason, 2)


def _hide_lack_of_memory(found: sys.UnraisableHookArgs) -> None:
    if found.exc_value is None or not is_of_memory(found.exc_value):
        sys.__unraisablehook__(found)


def _fail(message: str, code: int) -> None:
    line = f"approxkmv: {' '.join(message.split())}"
    if LOG.handlers:
        LOG.error("%s", line)
    else:
        print(line, file=sys.stderr)
    sys.exit(code)
