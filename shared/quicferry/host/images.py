"""The images of one migration: a root-only directory on tmpfs, gone after the move.

The images hold the process's memory, TLS keys included. Each side's CRIU writes its log and statistics into a
work directory of its own, so that neither side loses them when the other removes its part.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import shutil
import time
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
import structlog

from quicferry.protocol import wire
from quicferry.protocol.errors import FerryError
from quicferry.protocol.wire import NAME_PATTERN, Name

log = structlog.get_logger(__name__)

DEFAULT_ROOT: Final = Path("/var/lib/quicferry/images")
HEADROOM: Final = 1.25
"""Images are a little larger than the resident memory: page maps, descriptors, mappings."""
MARGIN_BYTES: Final = 16 * 1024 * 1024
PROGRESS: Final = "progress"
"""The FIFO through which the source tells the target how far it is."""
DESCRIBED: Final = b"d"
"""Said there: the manifest is written."""
COMPLETE: Final = b"c"
"""Said there: so are the images."""
MANIFEST: Final = "manifest.json"
VIEW: Final = "view"
INVENTORY: Final = "inventory.img"
MAX_INVENTORY_BYTES: Final = 4096
"""Some 90 are usual; a pipe takes so many at once (pipe(7))."""
DELETE_ATTEMPTS: Final = 1000
"""Each but the last needs a file that came or went meanwhile, and a dump has some dozens."""
OURS: Final = "quicferry"
"""An empty file in every work directory: where others keep things below the same root, they lose nothing."""

Side = Literal["source", "target"]
_NAME: Final = re.compile(NAME_PATTERN)
Descriptor = Annotated[str, msgspec.Meta(pattern=r"^[0-9]{1,7}$(?!\n)")]
Pipe = Annotated[str, msgspec.Meta(pattern=r"^pipe:\[[0-9]{1,20}\]$(?!\n)")]
"""As readlink(2) says it of a descriptor; CRIU is told by it which one to replace."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What the restoring side needs beside the images themselves; ``manifest.json`` in their directory."""

    pipes: dict[Descriptor, Pipe] = {}
    """Descriptor number to ``pipe:[inode]``: the standard streams that lead out of the berth."""
    boot_id: str = ""
    """The boot that the clocks in the images belong to."""
    heap: str = ""
    """CRIU's name for the shared heap, which is not in the images; empty if all memory is."""
    nice: Annotated[int, msgspec.Meta(ge=-20, le=19)] = 0
    """The server's own priority (getpriority(2))."""


class Images:
    """The directory of one migration below ``root``, and one side's work directory beside it."""

    def __init__(self, root: Path, migration: Name, side: Side) -> None:
        self.root = root
        self.migration = migration
        self.path = root / migration
        self.work = root / f"{migration}.{side}"

    def create(self, room_for_bytes: int = 0) -> None:
        """Make both directories, mode 0700. Raises FerryError ``machine_unfit`` if they can't be or lack room."""
        try:
            self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
            for folder in (self.path, self.work):
                folder.mkdir(exist_ok=True, mode=0o700)
                folder.chmod(0o700)
            self.mark(OURS)
            free = shutil.disk_usage(self.root).free
        except OSError as error:
            raise FerryError(
                "machine_unfit",
                f"Images can't be kept at {self.root}: {error.strerror}.",
                hint="Mount a tmpfs there, shared by both agents.",
            ) from None
        needed = int(room_for_bytes * HEADROOM) + MARGIN_BYTES if room_for_bytes else 0
        if free < needed:
            raise FerryError(
                "machine_unfit",
                f"The images need about {needed >> 20} MiB; {self.root} has {free >> 20} MiB free.",
                hint="Give that tmpfs more room (its size= option).",
            )

    def open(self, which: Literal["images", "work"]) -> int:
        """A descriptor of the directory, inheritable by CRIU once passed on; the caller closes it.

        Raises FerryError ``too_late`` if it is gone: either side deletes it when the migration is called off.
        """
        folder = self.path if which == "images" else self.work
        try:
            return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            raise self._deleted() from None

    def _deleted(self) -> FerryError:
        return FerryError("too_late", f"The images of {self.migration} were deleted meanwhile: it was called off.")

    def _unwritable(self, error: OSError) -> FerryError:
        if isinstance(error, FileNotFoundError):
            return self._deleted()
        return FerryError(
            "machine_unfit",
            f"Images can't be written at {self.root}: {error.strerror}.",
            hint="Give that tmpfs more room (its size= option).",
        )

    def listen(self) -> int:
        """For the target: a descriptor that has what the source says with :meth:`tell`.

        A FIFO (fifo(7)): the word is there in tens of microseconds, and waits if nobody reads yet. Opened for
        both, as there would be an end of file after each word otherwise. Raises as :meth:`open`.
        """
        fifo = self.path / PROGRESS
        try:
            with contextlib.suppress(FileExistsError):
                os.mkfifo(fifo, 0o600)
            return os.open(fifo, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            raise self._deleted() from None

    def tell(self, word: bytes) -> None:
        """For the source: DESCRIBED, then COMPLETE. Says it to nobody if no target listens."""
        with contextlib.suppress(OSError):
            fifo = os.open(self.path / PROGRESS, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                os.write(fifo, word)
            finally:
                os.close(fifo)

    def open_view(self, inventory: int) -> int:
        """For a restore that begins before the dump has ended: a directory in which CRIU finds nothing yet but
        its inventory, and that is a pipe, CRIU's descriptor ``inventory``. CRIU reads the inventory first of all.

        :meth:`fill_view` does the rest. Raises as :meth:`write_manifest`.
        """
        view = self.path / VIEW
        try:
            _delete(view)
            view.mkdir(mode=0o700)
            (view / INVENTORY).symlink_to(f"/proc/self/fd/{inventory}")
            return os.open(view, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            raise self._unwritable(error) from None

    def fill_view(self, *, same_boot: bool) -> bytes:
        """Let the images be found in the view; returns the inventory, empty if the dump has left none.

        On the boot that they were dumped on, the time namespace's image stays out, so that the restored clock is
        the berth's own: CRIU would restore into a new time namespace whose CLOCK_MONOTONIC hides the pause, and
        take about 14 ms for it. On another boot, the monotonic clock would jump. Raises as :meth:`write_manifest`.
        """
        view = self.path / VIEW
        try:
            for name in os.listdir(self.path):
                if name in (VIEW, PROGRESS, MANIFEST, INVENTORY) or (same_boot and name.startswith("timens-")):
                    continue
                (view / name).symlink_to(f"../{name}")
        except OSError as error:
            raise self._unwritable(error) from None
        try:
            with (self.path / INVENTORY).open("rb") as file:
                return file.read(MAX_INVENTORY_BYTES)
        except FileNotFoundError:
            return b""

    def size_bytes(self) -> int:
        """What the images take."""
        total = 0
        for entry in os.scandir(self.path) if self.path.exists() else ():  # the migration was called off meanwhile
            with contextlib.suppress(FileNotFoundError):  # the other side deletes an image that it must not use
                total += entry.stat(follow_symlinks=False).st_size if entry.is_file(follow_symlinks=False) else 0
        return total

    def pages(self) -> int:
        """Memory pages in the images themselves; pages of a parent image do not count."""
        total = 0
        for file in self.path.glob("pages-*.img"):
            with contextlib.suppress(FileNotFoundError):  # the migration was called off meanwhile
                total += file.stat().st_size
        return total // os.sysconf("SC_PAGE_SIZE")

    def write_manifest(self, manifest: Manifest) -> None:
        """Raises FerryError ``machine_unfit`` if there is no room for it, and as :meth:`open`."""
        try:
            (self.path / MANIFEST).write_bytes(msgspec.json.encode(manifest))
        except OSError as error:
            raise self._unwritable(error) from None

    def manifest(self) -> Manifest:
        """Raises FerryError ``internal`` if the dump left none."""
        try:
            manifest: Manifest = wire.decode(self._read_manifest(), Manifest)
        except (OSError, FerryError) as error:
            raise FerryError(
                "internal",
                f"The images of {self.migration} have no readable manifest: {error}.",
                hint=f"Both agents must share {self.root}.",
            ) from None
        return manifest

    def _read_manifest(self) -> bytes:
        # One byte more than is allowed is enough to see that it is too large.
        with (self.path / MANIFEST).open("rb") as file:
            return file.read(wire.MAX_MESSAGE_BYTES + 1)

    def mark(self, name: str) -> None:
        """Leave a note to ourselves that survives the agent: a restore was begun."""
        (self.work / name).touch(mode=0o600)

    def marked(self, name: str) -> bool:
        return (self.work / name).exists()

    def remove(self) -> None:
        """Delete this side's work directory and the images. Safe to repeat."""
        _delete(self.path)
        self.remove_work()

    def remove_work(self) -> None:
        """Delete this side's work directory only. Safe to repeat."""
        _delete(self.work)


class Leftovers:
    """Images below ``root`` that belong to nobody's step any more, and one side's work directories beside them."""

    def __init__(self, root: Path, side: Side) -> None:
        self._root = root
        self._side: Side = side

    def migrations(self) -> dict[str, float]:
        """Those with a work directory of this side, and how many seconds ago it was last made. Raises OSError."""
        now = time.time()
        found: dict[str, float] = {}
        for work in os.scandir(self._root):
            migration, dot, side = work.name.rpartition(".")
            if not (dot and side == self._side and _NAME.fullmatch(migration) and work.is_dir(follow_symlinks=False)):
                continue
            with contextlib.suppress(FileNotFoundError):  # not one of ours, or deleted meanwhile
                found[migration] = now - Path(work, OURS).stat().st_mtime
        return found

    def delete(self, migration: str) -> None:
        """Images and work directory. Safe to repeat. Raises OSError."""
        Images(self._root, migration, self._side).remove()


def _delete(folder: Path) -> None:
    # Both agents may be at it, and a dump that was called off may still write: what is gone under our hands the
    # other one has deleted, and what came into an emptied directory goes the next time.
    for attempt in range(DELETE_ATTEMPTS):
        if not folder.exists():
            return
        try:
            shutil.rmtree(folder)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY) or attempt == DELETE_ATTEMPTS - 1:
                raise


def check_root(root: Path) -> Path:
    """See that images can be kept at ``root``, and warn if that is a disk. Raises FerryError ``machine_unfit``."""
    try:
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise FerryError(
            "machine_unfit",
            f"Images can't be kept at {root}: {error.strerror}.",
            hint="Mount a tmpfs there, shared by both agents, or set QUICFERRY_IMAGES.",
        ) from None
    if not on_tmpfs(root):
        log.warning("images_on_disk", path=str(root), hint="They hold TLS keys, and a disk is slower: mount a tmpfs.")
    return root


@functools.cache
def boot_id() -> str:
    """The kernel's identity for this boot (random(4)). Read once: both sides of a move ask for it in the pause."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def on_tmpfs(folder: Path) -> bool:
    """Whether ``folder`` is on a tmpfs: images elsewhere would put keys on a disk."""
    best, kind = "", ""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            left, _, right = line.partition(" - ")
            point = left.split()[4]
            inside = str(folder) == point or str(folder).startswith(point.rstrip("/") + "/")
            if inside and len(point) >= len(best):
                best, kind = point, right.split()[0]
    return kind in ("tmpfs", "ramfs")
