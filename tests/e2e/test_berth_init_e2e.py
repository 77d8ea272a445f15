"""The berth's init as PID 1 of a real container."""

from __future__ import annotations

import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from quicferry.host.command import run
from quicferry.host.compose import Stack

PROJECT = Path(__file__).resolve().parents[2]
WAIT = "import signal; signal.pause()"


class Berths:
    def __init__(self, image: str) -> None:
        self.image = image
        self.label = f"io.quicferry.test={uuid.uuid4().hex}"
        self.env = Stack(PROJECT).environment

    def podman(self, *arguments: str) -> str:
        return run(["podman", *arguments], timeout=60, doing="podman", env=self.env).strip()

    def start(self, *command: str, options: tuple[str, ...] = ("--cap-add", "CHECKPOINT_RESTORE")) -> str:
        return self.podman(
            *("run", "--detach", "--network", "none", "--label", self.label, *options),
            *("--entrypoint", '["berth-init", "--"]', self.image, *command),
        )

    def logs(self, berth: str, until: str) -> str:
        """Follow the log until a line with that text."""
        with subprocess.Popen(
            ["podman", "logs", "--follow", berth], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as follower:
            assert follower.stdout is not None
            try:
                for line in follower.stdout:
                    if until in line:
                        return line
            finally:
                follower.kill()
        raise AssertionError(f"{until!r} was never logged")


@pytest.fixture
def berths(built_image: str) -> Iterator[Berths]:
    ours = Berths(built_image)
    yield ours
    if left := ours.podman("ps", "--all", "--quiet", "--filter", f"label={ours.label}").split():
        ours.podman("rm", "--force", "--time", "0", *left)


def test_the_server_has_pid_5000_and_the_berth_outlives_it(berths: Berths) -> None:
    berth = berths.start("python3", "-c", WAIT)
    assert "pid=5000" in berths.logs(berth, "server_started")
    assert berths.podman("exec", berth, "cat", "/proc/5000/comm") == "python3"
    berths.podman("exec", berth, "python3", "-c", "import os; os.kill(5000, 9)")
    berths.logs(berth, "server_left")
    assert berths.podman("inspect", "--format", "{{.State.Status}}", berth) == "running"


def test_a_server_that_the_kernel_kills_for_lack_of_memory_ends_the_berth(berths: Berths) -> None:
    greedy = "kept = []\nwhile True: kept.append(bytearray(b'x' * (1 << 20)))"
    berth = berths.start("python3", "-c", greedy, options=("--cap-add", "CHECKPOINT_RESTORE", "--memory", "64m"))
    assert "status=-9" in berths.logs(berth, "server_ended")
    assert berths.podman("wait", berth) == "137"


def test_a_stop_is_graceful_and_gives_the_servers_status(berths: Berths) -> None:
    code = (
        "import signal, sys\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(9))\n"
        "print('ready', flush=True)\n"
        "signal.pause()"
    )
    berth = berths.start("python3", "-c", code)
    berths.logs(berth, "ready")
    berths.podman("stop", "--time", "30", berth)
    assert berths.podman("inspect", "--format", "{{.State.ExitCode}}", berth) == "9"


def test_an_empty_berth_stops_with_success_and_is_not_killed(berths: Berths) -> None:
    berth = berths.start()
    berths.logs(berth, "berth_empty")
    berths.podman("stop", "--time", "30", berth)
    assert berths.podman("inspect", "--format", "{{.State.ExitCode}}", berth) == "0"


def test_pid_1_reaps_what_is_left_to_it(berths: Berths) -> None:
    berth = berths.start()
    # The shell ends before its child does: the child is PID 1's then, and would stay as a zombie.
    berths.podman("exec", berth, "sh", "-c", "sleep 0.01 & exit 0")
    code = (
        "import os, pathlib\n"
        "def zombies():\n"
        "    for entry in pathlib.Path('/proc').iterdir():\n"
        "        if entry.name.isdigit():\n"
        "            try:\n"
        "                if (entry / 'stat').read_text().rpartition(')')[2].split()[0] == 'Z': return True\n"
        "                if (entry / 'comm').read_text() == 'sleep\\n': return True\n"
        "            except OSError: pass\n"
        "    return False\n"
        "while zombies(): os.sched_yield()\n"
    )
    berths.podman("exec", berth, "timeout", "20", "python3", "-c", code)


def test_without_the_capability_it_says_what_is_missing(berths: Berths) -> None:
    berth = berths.start("python3", "-c", WAIT, options=())
    assert "CAP_CHECKPOINT_RESTORE" in berths.logs(berth, "server_not_started")
    assert berths.podman("wait", berth) == "127"
