"""``podman``: its own ``container checkpoint`` and ``restore`` of the same server, in a podman inside a container."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import msgspec

import quicferry
from quicferry.app import Connection
from quicferry.bench.load import PATIENCE, SETTLE, Load, no_collections
from quicferry.bench.stand import SERVER, Box, Stand, free_port
from quicferry.bench.variant import Measured
from quicferry.host import image
from quicferry.host.command import run
from quicferry.protocol.errors import FerryError

DIAL_SECONDS: Final = 0.15
"""One attempt of the client that dials again."""
STEP_SECONDS: Final = 30.0
ARCHIVE: Final = "/run/checkpoint.tar"
"""On the box's tmpfs."""
NAME: Final = "server"
RECIPE: Final = ("containers/Containerfile.podman", "containers/containers.conf", "containers/install-packages")

Say = Callable[[str], None]


class _Criu(msgspec.Struct):
    """Microseconds, as CRIU has them."""

    frozen_time: int = 0
    restore_time: int = 0


class _Container(msgspec.Struct):
    criu_statistics: _Criu


class _Printed(msgspec.Struct):
    """What ``--print-stats`` prints."""

    container_statistics: list[_Container]


class Podman:
    """Both on one host and on one address, so the client need not even be told where to."""

    name = "podman"
    what = "podman container checkpoint --export, rm, restore --import; the client resumes or dials again"

    def __init__(self, stand: Stand, cafile: str, tls: str, project: Path, say: Say) -> None:
        self._stand = stand
        self._cafile = cafile
        self._tls = tls
        """The volume with the certificate and its key."""
        self._project = project
        self._say = say
        self._box = Box("", 0)

    async def open(self) -> None:
        """Build the image if need be, and start a podman in it. Raises FerryError ``setup_failed``."""
        await asyncio.to_thread(build, self._project, self._stand.env, self._say)
        store = await self._stand.podman("info", "--format", "{{.Store.GraphRoot}}")
        self._box = self._stand.box("podman")
        await self._stand.container(
            self._box,
            *("--privileged", "--network", "host", "--security-opt", "seccomp=unconfined"),
            *("--tmpfs", "/run", "--tmpfs", "/var/lib/containers", "--volume", f"{store}:/var/lib/shared:ro"),
            *("--volume", f"{self._tls}:/tls", "--entrypoint", '["sleep", "infinity"]', image.BENCH_IMAGE),
        )

    async def close(self) -> None:
        if self._box.name:
            await self._stand.remove(self._box)

    async def move(self, *, bulk: bool = False) -> Measured:
        port = free_port()
        settings = {"CERT": "/tls/cert.pem", "KEY": "/tls/key.pem", "PORT": str(port), "QUIET": "1"}
        await self._podman(
            *("run", "--detach", "--replace", "--name", NAME, "--network", "host", "--volume", "/tls:/tls"),
            *("--security-opt", "seccomp=unconfined", "--tmpfs", "/run"),
            *(option for key, value in settings.items() for option in ("--env", f"QUICFERRY_{key}={value}")),
            *("--entrypoint", msgspec.json.encode(SERVER).decode(), image.IMAGE),
        )
        try:
            return await self._moved(port, Load(bulk=bulk), bulk)
        finally:
            await self._podman("rm", "--force", "--ignore", "--time", "0", NAME)

    async def _moved(self, port: int, load: Load, bulk: bool) -> Measured:
        phases: dict[str, float] = {}
        async with contextlib.AsyncExitStack() as later:
            connection = await self._dialled(port, later)
            later.enter_context(no_collections())
            async with load.on(connection):
                await asyncio.sleep(load.warm)
                lost, since, began = load.packets_lost, time.time(), time.monotonic()
                frozen = await self._step("checkpoint", "--export", ARCHIVE, phases=phases)
                number = len(load.sent)
                second = _Second(self._dialled, port, load)
                echo = asyncio.create_task(load.first_echo_after(number))
                # Noticed at once: podman's command returns long after the server runs.
                echo.add_done_callback(lambda _: second.give_up_unless_there())
                try:
                    await self._podman("rm", "--force", NAME)
                    phases["rm"] = (time.monotonic() - began) * 1000 - phases["checkpoint"]
                    restore = await self._step("restore", "--import", ARCHIVE, phases=phases)
                    ended = time.time()
                    await echo
                    await asyncio.sleep(SETTLE)
                finally:
                    echo.cancel()
                    await second.end()
        phases["first echo"] = max(0.0, load.gap(since).first_after - ended) * 1000
        move = load.move(
            since,
            lost,
            frozen_ms=frozen.frozen_time / 1000,
            restore_ms=restore.restore_time / 1000,
            phases_ms=phases,
        )
        return Measured(move, load.throughput(since) if bulk else None, load.trace(since))

    async def _step(self, verb: str, *arguments: str, phases: dict[str, float]) -> _Criu:
        start = time.monotonic()
        target = (NAME,) if verb == "checkpoint" else ()
        said = await self._podman("container", verb, "--print-stats", *arguments, *target)
        phases[verb] = (time.monotonic() - start) * 1000
        try:
            return msgspec.json.decode(said, type=_Printed).container_statistics[0].criu_statistics
        except (msgspec.DecodeError, IndexError) as error:
            raise FerryError("setup_failed", f"podman's statistics can't be read: {error}.") from None

    async def _dialled(self, port: int, later: contextlib.AsyncExitStack) -> Connection:
        end = time.monotonic() + PATIENCE
        while True:
            try:
                dial = quicferry.connect(
                    "127.0.0.1", port, cafile=self._cafile, server_name="localhost", timeout=DIAL_SECONDS
                )
                return await later.enter_async_context(dial)
            except FerryError:
                if time.monotonic() > end:
                    raise

    async def _podman(self, *arguments: str) -> str:
        """The inner podman, without the outer one's ``exec``, which would cost it a tenth of a second a step."""
        process = await asyncio.create_subprocess_exec(
            *("nsenter", "-t", str(self._box.init_pid), "-m", "-u", "-i", "-n", "-p", "-C", "--"),
            *("podman", *arguments),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "PODMAN_IGNORE_CGROUPSV1_WARNING": "1"},
        )
        try:
            async with asyncio.timeout(STEP_SECONDS):
                said, complaint = await process.communicate()
        except BaseException:  # cancelled too: the command must not outlive who asked for it
            if process.returncode is None:
                process.kill()
                await process.wait()
            raise
        if process.returncode:
            words = complaint.decode(errors="replace").strip()[-600:]
            raise FerryError("setup_failed", f"podman {' '.join(arguments[:2])} in the box failed: {words}")
        return said.decode(errors="replace")


class _Second:
    """Beside the old connection: dials the same address until somebody answers, then pings there too."""

    def __init__(self, dial: Callable[..., Awaitable[Connection]], port: int, load: Load) -> None:
        self._there = False
        self._over = asyncio.Event()
        self._task = asyncio.create_task(self._run(dial, port, load))

    def give_up_unless_there(self) -> None:
        """The old connection was quicker."""
        if not self._there:
            self._task.cancel()

    async def end(self) -> None:
        """Wait for the echoes of what it has sent."""
        self.give_up_unless_there()
        self._over.set()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self, dial: Callable[..., Awaitable[Connection]], port: int, load: Load) -> None:
        async with contextlib.AsyncExitStack() as later:
            connection = await dial(port, later)
            self._there = True
            async with load.on(connection, wait=False):
                await self._over.wait()


def build(project: Path, env: dict[str, str], say: Say) -> None:
    """The box's image, if its recipe changed. Raises FerryError ``setup_failed``."""
    recipe = b"\0".join((project / name).read_bytes() for name in RECIPE) + image.base_image().encode()
    wanted = hashlib.sha256(recipe).hexdigest()[:32]
    if image.built_inputs(image.BENCH_IMAGE) == wanted:
        return
    say("building the image for podman's own checkpoint")
    with tempfile.TemporaryDirectory(prefix="quicferry-build-") as folder:
        context = Path(folder)
        shutil.copytree(project / "containers", context / "containers")
        settings = run([project / "containers/apt-settings"], timeout=30, doing="reading apt's settings")
        (context / "apt.conf").write_text(settings)
        run(
            [
                *("podman", "build", "--quiet", "--network", "host", "--layers", "--tag", image.BENCH_IMAGE),
                *("--build-arg", f"BASE={image.base_image()}", "--build-arg", f"INPUTS_HASH={wanted}"),
                *("--file", context / RECIPE[0], context),
            ],
            timeout=image.BUILD_TIMEOUT,
            doing="building the image for podman's own checkpoint",
            env=env,
        )
