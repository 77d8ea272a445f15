"""The berth's PID 1 as an ordinary process: starting, reaping, stopping, exit statuses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from quicferry.host import berth_init

PROGRAM = Path(berth_init.__file__)
ANY_PID = ("--pid", "0")  # a chosen PID needs privileges; tests/e2e has that


@contextmanager
def berth(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-IS", str(PROGRAM), *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def line(process: subprocess.Popen[str], containing: str) -> str:
    """Read the log until a line with that text."""
    assert process.stdout is not None
    for text in process.stdout:
        if containing in text:
            return text
    raise AssertionError(f"{containing!r} was never logged")


def server_pid(process: subprocess.Popen[str]) -> int:
    return int(line(process, "server_started").split("pid=")[1].split()[0])


def python(code: str) -> list[str]:
    return ["--", sys.executable, "-c", code]


@pytest.mark.parametrize(
    ("code", "status"),
    [(0, 0), (3, 3), (-signal.SIGTERM, 143), (-signal.SIGSEGV, 139), (-signal.SIGKILL, None)],
)
def test_exit_status_is_the_servers_unless_it_was_killed(code: int, status: int | None) -> None:
    assert berth_init.exit_status(code) == status


def test_a_server_killed_for_lack_of_memory_has_not_left() -> None:
    assert berth_init.exit_status(-signal.SIGKILL, out_of_memory=True) == 137


@pytest.mark.parametrize("code", [0, 7])
def test_a_server_that_ends_ends_the_berth_with_its_status(code: int) -> None:
    with berth(*ANY_PID, *python(f"raise SystemExit({code})")) as process:
        assert process.wait(20) == code


def test_a_killed_server_leaves_an_empty_berth_that_stops_on_sigterm() -> None:
    with berth(*ANY_PID, *python("import signal; signal.pause()")) as process:
        subprocess.run(["kill", "-KILL", str(server_pid(process))], check=True)
        line(process, "server_left")
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def test_sigterm_reaches_the_server_and_its_status_is_returned() -> None:
    code = (
        "import signal, sys\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))\n"
        "print('ready', flush=True)\n"
        "signal.pause()"
    )
    with berth(*ANY_PID, *python(code)) as process:
        line(process, "ready")
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 5


def test_a_server_deaf_to_sigterm_is_killed_after_the_grace_time() -> None:
    code = (
        "import signal\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print('ready', flush=True)\n"
        "while True: signal.pause()"
    )
    with berth(*ANY_PID, "--grace", "0.2", *python(code)) as process:
        line(process, "ready")
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 137


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_an_empty_berth_waits_and_stops_with_success(number: signal.Signals) -> None:
    with berth() as process:
        line(process, "berth_empty")
        assert process.poll() is None
        process.send_signal(number)
        assert process.wait(20) == 0


def test_a_command_that_is_not_there_ends_the_berth_with_127() -> None:
    with berth(*ANY_PID, "--", "/nowhere/server") as process:
        assert "No such file" in line(process, "server_not_started")
        assert process.wait(20) == 127


def test_orphans_are_reaped() -> None:
    # The server's child leaves a grandchild behind, which ends at once; the server then looks for a zombie.
    code = (
        "import os, signal, subprocess, sys, pathlib\n"
        "child = subprocess.run([sys.executable, '-c', \"import subprocess, sys; "
        "print(subprocess.Popen([sys.executable, '-c', 'import sys; sys.stdin.read()'],"
        ' stdin=0, stdout=subprocess.DEVNULL).pid)"], stdin=(r := os.pipe())[0], stdout=subprocess.PIPE)\n'
        "orphan = int(child.stdout)\n"
        "handle = os.pidfd_open(orphan)\n"
        "os.close(r[0]); os.close(r[1])\n"
        "import select; select.select([handle], [], [], 20)\n"
        "while pathlib.Path(f'/proc/{orphan}').exists(): os.sched_yield()\n"
        "print('reaped', flush=True)"
    )
    with berth(*ANY_PID, *python(code)) as process:
        line(process, "reaped")
        assert process.wait(20) == 0


def test_the_server_inherits_nothing_but_its_output_and_no_blocked_signal() -> None:
    code = (
        "import os, signal\n"
        "print('fds', sorted(int(n) for n in os.listdir('/proc/self/fd'))[:-1], os.readlink('/proc/self/fd/0'),"
        " signal.pthread_sigmask(signal.SIG_BLOCK, []), os.getsid(0) == os.getpid(), flush=True)"
    )
    with berth(*ANY_PID, *python(code)) as process:
        assert line(process, "fds").split("fds ")[1].strip() == "[0, 1, 2] /dev/null set() True"


def test_the_program_needs_nothing_of_ours() -> None:
    # It is copied into the image as one file and run with -IS: no site-packages, no PYTHONPATH.
    done = subprocess.run(
        [sys.executable, "-IS", str(PROGRAM), "--help"], capture_output=True, text=True, check=False, timeout=20
    )
    assert done.returncode == 0
    assert "berth" in done.stdout


@pytest.fixture
def heap_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    library = tmp_path / "libheap.so"
    library.touch()
    monkeypatch.setattr(berth_init, "HEAP_LIBRARY", str(library))
    return str(library)


@pytest.mark.parametrize("setting", [{}, {"QUICFERRY_HEAP": ""}, {"QUICFERRY_HEAP": "shared"}])
def test_the_heap_is_shared_unless_told_otherwise(setting: dict[str, str], heap_library: str) -> None:
    environment = {**setting, "LD_PRELOAD": "theirs.so", "PYTHONMALLOC": "debug"}
    berth_init.share_heap(environment)
    assert environment["LD_PRELOAD"] == f"{heap_library}:{berth_init.HEAP_MALLOC}:theirs.so"
    assert environment["PYTHONMALLOC"] == "debug", "what somebody has set is left alone"
    environment = dict(setting)
    berth_init.share_heap(environment)
    assert environment["PYTHONMALLOC"] == "malloc"
    assert environment["QUICFERRY_HEAP_PID"] == str(os.getpid())


@pytest.mark.usefixtures("heap_library")
@pytest.mark.parametrize("setting", ["private", "Shared", "yes"])
def test_the_heap_is_private_if_told_so_and_a_wrong_word_is_told(
    setting: str, capsys: pytest.CaptureFixture[str]
) -> None:
    environment = {"QUICFERRY_HEAP": setting}
    berth_init.share_heap(environment)
    assert environment == {"QUICFERRY_HEAP": setting}
    assert ("heap_setting_unknown" in capsys.readouterr().out) == (setting != "private")


def test_an_image_without_the_library_has_a_private_heap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(berth_init, "HEAP_LIBRARY", "/nowhere/libheap.so")
    environment: dict[str, str] = {}
    berth_init.share_heap(environment)
    assert not environment
