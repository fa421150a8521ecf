"""The `quantpress` program: global flags, commands found by name, errors turned into one line and an exit code."""

from __future__ import annotations

import contextlib
import gc
import importlib
import itertools
import json
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import NoReturn

import click

from quantpress.pipelines.machine import machine_error
from quantpress.pipelines.progress import Progress, terminal_progress
from quantpress.quant.errors import OutputError, QuantpressError

COMMANDS = {
    "architectures": "model families and what works for each",
    "bench": "measure the GPU kernels, and find their best settings for this GPU",
    "cache": "what batches have kept: list it, check it, make room",
    "convert": "press a model into a file, and prove it",
    "demo": "the main job from end to end on a small model",
    "doctor": "versions, devices and runtimes on this machine",
    "imatrix": "measure how much each input of a model's weights is used, for llama.cpp's types",
    "inspect": "what a model file holds, without reading its weights",
    "merge": "make adapters part of a model, and account for every tensor of them",
    "perplexity": "llama.cpp's perplexity of any model",
    "quantize": "turn a model's weights into integers that transformers and vLLM load",
    "run": "a pipeline file: many models, adapters and outputs, with shared work",
    "schema": "the JSON Schema of pipeline files, for editors",
    "stages": "the installed stages of pipeline files, and their options",
    "verify": "compare a file with the model it was made from",
}
INTERRUPTED, TERMINATED = 130, 143


class Terminated(BaseException):
    """SIGTERM arrived; everything that is open is closed and removed on the way out."""


class _JsonLines(logging.Formatter):
    """One JSON object per message, for `--log-format json`."""

    def format(self, record: logging.LogRecord) -> str:
        line = {"event": "log", "level": record.levelname.lower(), "message": record.getMessage()}
        return json.dumps(line, ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class Session:
    """What the global flags say."""

    quiet: bool
    debug: bool
    log_format: str
    verbose: bool = False

    @contextlib.contextmanager
    def progress(self) -> Iterator[Progress]:
        """Gives the display for one command's work."""
        with terminal_progress(quiet=self.quiet, log_format=self.log_format) as display:
            yield display


class CommandGroup(click.Group):
    """Imports a command's module when it is called, so that `--help` and `--version` start at once."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of all commands."""
        del ctx
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Finds a command by its name."""
        del ctx
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"quantpress.pipelines.commands.{cmd_name}")
        command = module.command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Lists the commands without importing their modules."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name]) for name in self.list_commands(ctx)])


EXAMPLES = """
\b
Examples:
  quantpress convert MODEL model-Q8_0.gguf --outtype q8_0
  quantpress merge MODEL ADAPTER ./merged
  quantpress verify model-Q8_0.gguf --against MODEL
  quantpress COMMAND --help
"""


@click.group(cls=CommandGroup, epilog=EXAMPLES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="quantpress", prog_name="quantpress")
@click.option("-v", "--verbose", is_flag=True, help="Say more about what is done and why.")
@click.option("-q", "--quiet", is_flag=True, help="No progress and no messages but errors.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.option("--log-format", type=click.Choice(["text", "json"]), default="text", help="Form of messages on stderr.")
@click.pass_context
def cli(ctx: click.Context, verbose: bool, quiet: bool, debug: bool, log_format: str) -> None:
    """Press language models into the formats that people run, and prove every file."""
    level = logging.ERROR if quiet else logging.INFO if verbose else logging.WARNING
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines() if log_format == "json" else logging.Formatter("%(levelname)s: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    ctx.obj = Session(quiet=quiet, debug=debug, log_format=log_format, verbose=verbose)


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    del signum, frame
    raise Terminated


def _report(message: str, exit_code: int, arguments: Sequence[str]) -> int:
    line = " ".join(message.split())
    if "--log-format=json" in arguments or ("--log-format", "json") in itertools.pairwise(arguments):
        line = json.dumps({"event": "error", "message": line, "exit_code": exit_code}, ensure_ascii=False)
    else:
        line = f"error: {line}"
    with contextlib.suppress(OSError):  # standard error cannot be written: the exit code still tells
        click.echo(line, err=True)
    return exit_code


def run(arguments: Sequence[str]) -> int:
    """Runs one command line and gives its exit code (INTERFACE: exit codes)."""
    debug = "--debug" in arguments
    try:
        result = cli.main(args=list(arguments), prog_name="quantpress", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.Abort:
        return INTERRUPTED
    except click.ClickException as error:
        return _report(error.format_message(), error.exit_code if error.exit_code != 1 else 2, arguments)
    except QuantpressError as error:
        if debug:
            raise
        return _report(str(error), error.exit_code, arguments)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Terminated:
        return TERMINATED
    except BrokenPipeError:
        # the reader of our output has gone (`| head`): nothing is left to say, and the flush at exit must not say it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (OSError, MemoryError, RuntimeError) as error:
        # the machine gave way where nobody knew which file it was for; what was begun is removed on the way here
        said = machine_error(error)
        if debug or said is None:
            raise
        return _report(said, OutputError.exit_code, arguments)


def main() -> NoReturn:
    """Entry point of the program."""
    # The collector looks through all that imports and tables of tensors leave behind, and finds no garbage there;
    # with Python's own thresholds that is a tenth of the time of a command.
    gc.set_threshold(100_000, 50, 100)
    sys.setswitchinterval(0.0005)  # threads that hash and convert wait less for one that imports
    signal.signal(signal.SIGTERM, _terminate)
    _open_streams()
    _leave(run(sys.argv[1:]))


def _open_streams() -> None:
    """Opens what was closed before the start (`2>&-`), so that no file of an output gets the number of a stream."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)
            if descriptor != number:
                os.dup2(descriptor, number)
                os.close(descriptor)
            os.set_inheritable(number, True)
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


def _leave(code: int) -> NoReturn:
    """Ends the process without taking the interpreter apart, which takes 0.3 s after a merge and changes nothing."""
    logging.shutdown()
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        pass
    except OSError as error:
        code = code or _report(f"standard output: cannot be written: {error.strerror}", OutputError.exit_code, ())
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    os._exit(code)
