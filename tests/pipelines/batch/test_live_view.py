"""The live view on a terminal: an emulated one says what a user sees."""

from __future__ import annotations

import io
import logging
import re
import threading

import pytest
from rich.console import Console

from quantpress.pipelines.batch.display import batch_display
from quantpress.pipelines.batch.live_view import LiveView
from quantpress.pipelines.batch.results import OutputResult
from quantpress.pipelines.batch.standing import Standing
from quantpress.pipelines.batch.tasks import Estimate, Event, Task, TaskResult

OUTPUT = OutputResult("gguf", "/o/a.gguf", "gguf", "Q8_0", 10**8, "done", {"parity": {"passed": True, "tokens": 9}})


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def screen(written: str) -> list[str]:
    """What a terminal shows of what was written: only what rich uses is understood."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[\d;?]*[a-zA-Z]|\r|\n|[^\x1b\r\n]+", written):
        if part == "\r":
            column = 0
        elif part == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif part.startswith("\x1b["):
            count = int(re.sub(r"\D", "", part) or 1)
            if part.endswith("A"):
                row = max(0, row - count)
            elif part.endswith("K"):
                lines[row] = ""
            else:
                assert part[-1] in "mlh", part
        else:
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + len(part) :]
            column += len(part)
    return lines


def tasks(count: int) -> list[Task]:
    return [Task(str(n), f"smol-{n}", "gguf Q8_0", estimate=Estimate(seconds=10)) for n in range(count)]


def drawn(standing: Standing, *, width: int = 80, height: int = 24) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True, color_system=None)
    with console.capture() as capture:
        console.print(LiveView(standing, console))
    return capture.get().splitlines()


def test_the_view_shows_what_runs_what_waits_and_the_whole() -> None:
    clock = [0.0]
    standing = Standing(tasks(4), lambda: clock[0])
    standing.tell(Event("started", "0"))
    standing.tell(Event("started", "1"))
    clock[0] = 12
    standing.tell(Event("progress", "0", phase="quantizing", done=43, total=100, memory=2_100_000_000))
    first, second, waiting, whole = drawn(standing)
    assert first.split() == ["smol-0", "gguf", "Q8_0", "quantizing", "43", "%", "12", "s", "2.10", "GB"]
    assert second.split() == ["smol-1", "gguf", "Q8_0", "running", "12", "s"]
    assert waiting == "2 waiting: smol-2, smol-3"
    assert "0/4 jobs, 0/4 steps, 12 s, about 10 s left" in whole


@pytest.mark.parametrize("height", [1, 2, 3, 4, 5, 8, 24, 60])
@pytest.mark.parametrize("width", [20, 80, 200])
def test_the_view_never_takes_more_lines_than_the_terminal_has(height: int, width: int) -> None:
    standing = Standing(tasks(100), lambda: 5.0)
    for number in range(30):
        standing.tell(Event("started", str(number), memory=10**9))
        standing.tell(Event("progress", str(number), phase="quantizing " * 9, done=1, total=3))
        lines = drawn(standing, width=width, height=height)
        assert len(lines) <= max(1, height - 1)
        assert all(len(line) <= width for line in lines)
    if height >= 5:
        assert re.search(r"and \d+ more running", "\n".join(lines)) or height > 32


def test_finished_jobs_stay_on_the_screen_and_the_view_goes() -> None:
    terminal = Terminal()
    with batch_display(tasks(3), stream=terminal) as watch:
        for number in range(3):
            watch(Event("started", str(number)))
            watch(Event("progress", str(number), phase="write", done=1, total=2))
            result = TaskResult(str(number), "done", seconds=1.0, output=OUTPUT)
            if number == 1:
                result = TaskResult("1", "failed", error="\x1b]0;owned\x07 no")
            watch(Event("finished", str(number), result=result))
    lines = [line.rstrip() for line in screen(terminal.getvalue()) if line.strip()]
    assert lines == [
        "smol-0: gguf Q8_0 done, 100.0 MB, verified, 1.0 s",
        "smol-1: gguf Q8_0 FAILED: \\x1b]0;owned\\x07 no",
        "smol-2: gguf Q8_0 done, 100.0 MB, verified, 1.0 s",
    ]


def test_steps_that_write_nothing_are_not_told_of_a_job_that_does() -> None:
    both = [Task("1", "a", "gptq"), Task("2", "a", "gguf Q8_0", needs=("1",))]
    terminal = Terminal()
    with batch_display(both, stream=terminal) as watch:
        watch(Event("finished", "1", result=TaskResult("1", "done")))
        watch(Event("finished", "2", result=TaskResult("2", "done", output=OUTPUT, seconds=2.0)))
    lines = [line.rstrip() for line in screen(terminal.getvalue()) if line.strip()]
    assert lines == ["a: gguf Q8_0 done, 100.0 MB, verified, 2.0 s"]


def test_messages_of_the_program_go_above_the_view() -> None:
    terminal = Terminal()
    logger, handler = logging.getLogger(), logging.StreamHandler(terminal)
    logger.addHandler(handler)
    try:
        with batch_display(tasks(1), stream=terminal) as watch:
            watch(Event("started", "0"))
            logger.warning("the disk is nearly full")
            watch(Event("log", "0", level="WARNING", message="layer [bold]1[/bold]"))
            assert handler.stream is not terminal
        assert handler.stream is terminal
    finally:
        logger.removeHandler(handler)
    lines = [line.rstrip() for line in screen(terminal.getvalue()) if line.strip()]
    assert lines == ["the disk is nearly full", "WARNING: smol-0: gguf Q8_0: layer [bold]1[/bold]"]


def test_ctrl_c_gives_the_terminal_back() -> None:
    terminal, before = Terminal(), set(threading.enumerate())

    def interrupted() -> None:
        with batch_display(tasks(2), stream=terminal) as watch:
            watch(Event("started", "0"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert terminal.getvalue().rindex("\x1b[?25h") > terminal.getvalue().rindex("\x1b[?25l")  # the cursor is back
    assert not "".join(screen(terminal.getvalue())).strip()
    for thread in set(threading.enumerate()) - before:
        thread.join(5)
        assert not thread.is_alive()
