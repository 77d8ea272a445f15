"""The images' directory: for root only, with room, and gone in the end."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from quicferry.host import images as module
from quicferry.host.images import COMPLETE, DESCRIBED, OURS, Images, Leftovers, Manifest, on_tmpfs
from quicferry.protocol import wire
from quicferry.protocol.errors import FerryError


@pytest.fixture
def images(tmp_path: Path) -> Images:
    made = Images(tmp_path / "root", "m1", "source")
    made.create()
    return made


def test_every_directory_is_for_its_owner_only(images: Images) -> None:
    for folder in (images.root, images.path, images.work):
        assert folder.stat().st_mode & 0o777 == 0o700
    images.path.chmod(0o755)
    images.create()
    assert images.path.stat().st_mode & 0o777 == 0o700


def test_what_would_not_fit_is_refused_before_anything_is_touched(images: Images) -> None:
    with pytest.raises(FerryError, match="MiB free") as caught:
        images.create(room_for_bytes=2**60)
    assert caught.value.code == "machine_unfit"


def test_a_root_that_can_not_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FerryError) as caught:
        Images(tmp_path / "file" / "root", "m1", "source").create()
    assert caught.value.code == "machine_unfit"
    with pytest.raises(FerryError):
        module.check_root(tmp_path / "file" / "root")


def test_images_that_the_other_side_has_deleted_are_told_as_such(images: Images) -> None:
    """Called off while this side still prepares."""
    images.create()
    images.remove()
    for use in (
        lambda: images.open("images"),
        lambda: images.open("work"),
        images.listen,
        lambda: images.open_view(7),
        lambda: images.fill_view(same_boot=True),
    ):
        with pytest.raises(FerryError) as caught:
            use()
        assert caught.value.code == "too_late"


def test_sizes_and_pages_are_of_the_files(images: Images) -> None:
    page = os.sysconf("SC_PAGE_SIZE")
    (images.path / "pages-1.img").write_bytes(b"x" * page * 3)
    (images.path / "pages-2.img").write_bytes(b"x" * page)
    (images.path / "core-5000.img").write_bytes(b"x" * 100)
    assert images.pages() == 4
    assert images.size_bytes() == 4 * page + 100


def test_the_manifest_reaches_the_other_side(images: Images) -> None:
    other = Images(images.root, "m1", "target")
    with pytest.raises(FerryError, match="manifest"):
        other.manifest()
    images.write_manifest(Manifest(pipes={"1": "pipe:[7]"}, boot_id=module.boot_id()))
    assert other.manifest() == Manifest(pipes={"1": "pipe:[7]"}, boot_id=module.boot_id())


@pytest.mark.parametrize("same_boot", [True, False])
def test_the_view_has_the_images_once_they_are_there_and_the_inventory_from_a_pipe(
    images: Images, same_boot: bool
) -> None:
    read, write = os.pipe()
    view = images.open_view(read)
    assert os.listdir(view) == ["inventory.img"]
    os.close(images.listen())
    images.write_manifest(Manifest())
    for name in ("timens-0.img", "core-5000.img", "inventory.img", "1/pages-1.img"):
        (images.path / name).parent.mkdir(exist_ok=True)
        (images.path / name).write_text(name)
    (images.path / "parent").symlink_to("1")
    os.write(write, images.fill_view(same_boot=same_boot))
    os.close(write)

    def seen(name: str) -> str:
        with open(name, opener=lambda path, flags: os.open(path, flags, dir_fd=view)) as file:
            return file.read()

    names = {"core-5000.img", "inventory.img", "parent", "1"} | (set() if same_boot else {"timens-0.img"})
    assert set(os.listdir(view)) == names
    assert [seen("core-5000.img"), seen("inventory.img")] == ["core-5000.img", "inventory.img"]
    assert seen("parent/pages-1.img") == "1/pages-1.img"
    os.close(view)
    os.close(read)
    images.remove()
    assert not images.path.exists()


@pytest.mark.parametrize("use", ["write_manifest", "open_view", "fill_view"])
def test_a_full_image_directory_is_told(images: Images, monkeypatch: pytest.MonkeyPatch, use: str) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (images.path / "core-5000.img").touch()
    monkeypatch.setattr(Path, "symlink_to", full)
    monkeypatch.setattr(Path, "write_bytes", full)
    uses: dict[str, Callable[[], object]] = {
        "write_manifest": lambda: images.write_manifest(Manifest()),
        "open_view": lambda: images.open_view(9),
        "fill_view": lambda: images.fill_view(same_boot=True),
    }
    with pytest.raises(FerryError, match="No space left") as caught:
        uses[use]()
    assert caught.value.code == "machine_unfit"


def test_a_view_is_made_anew_and_lacks_what_the_dump_lacks(images: Images) -> None:
    (images.path / "core-5000.img").touch()
    for _ in range(2):  # the second restore of a target whose first one died
        view = images.open_view(9)
        assert images.fill_view(same_boot=True) == b""  # CRIU says then that there is no inventory
        assert set(os.listdir(view)) == {"inventory.img", "core-5000.img"}
        os.close(view)


def test_the_target_hears_what_the_source_says(images: Images) -> None:
    images.tell(DESCRIBED)  # nobody listens yet
    fifo = images.listen()
    for word in (DESCRIBED, COMPLETE):
        images.tell(word)
        assert os.read(fifo, 16) == word
    with pytest.raises(BlockingIOError):  # no end of file in between
        os.read(fifo, 16)
    os.close(fifo)


def test_each_side_removes_the_images_and_its_own_work_only(images: Images) -> None:
    other = Images(images.root, "m1", "target")
    other.create()
    other.mark("restore-begun")
    images.remove()
    images.remove()
    assert os.listdir(images.root) == ["m1.target"]
    assert other.marked("restore-begun")
    other.remove()
    assert os.listdir(images.root) == []
    assert not other.marked("restore-begun")


def test_leftovers_are_one_sides_own_and_nothing_else(images: Images) -> None:
    root = images.root
    (root / "m2").mkdir()
    (root / "m3.target").mkdir()  # somebody else's, by such a name
    (root / "m4.target").touch()
    (root / "m.5.target").mkdir()
    (root / "m.5.target" / OURS).touch()
    (root / "m7.target").symlink_to(images.work)
    theirs = sorted(os.listdir(root))
    for name in ("m1", "m6"):
        Images(root, name, "target").create()
    os.utime(root / "m6.target" / OURS, (0, time.time() - 100))
    leftovers = Leftovers(root, "target")
    ages = leftovers.migrations()
    assert sorted(ages) == ["m1", "m6"]
    assert ages["m1"] < 50 < 100 <= ages["m6"]
    Images(root, "m6", "target").create()
    assert leftovers.migrations()["m6"] < 50, "begun again"
    for name in ages:
        (root / name / "pages-1.img").touch()
        leftovers.delete(name)
        leftovers.delete(name)
    assert sorted(os.listdir(root)) == [name for name in theirs if name != "m1"]
    assert list(Leftovers(root, "source").migrations()) == ["m1"]


def test_both_sides_may_delete_the_images_at_once(images: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one of them has listed the other deletes; what is left must go all the same."""
    for number in range(3):
        (images.path / f"pages-{number}.img").touch()
    real, ahead = os.unlink, iter([True])

    def unlink(path: str, **options: int) -> None:
        if next(ahead, False):
            real(path, **options)
        real(path, **options)

    monkeypatch.setattr(os, "unlink", unlink)
    images.remove()
    assert os.listdir(images.root) == []


def test_images_that_are_still_being_written_are_deleted_all_the_same(
    images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dump that was called off puts a file into the directory that has just been emptied (seen in a soak)."""
    real, late = os.rmdir, iter(["pages-1.img", "manifest.json"])

    def rmdir(path: str, **options: int) -> None:
        for name in late:
            (images.path / name).touch()
            break
        real(path, **options)

    monkeypatch.setattr(os, "rmdir", rmdir)
    images.remove()
    assert next(late, None) is None
    assert os.listdir(images.root) == []


def test_a_directory_that_never_stays_empty_is_given_up(images: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.rmdir

    def rmdir(path: str, **options: int) -> None:
        (images.path / "pages-1.img").touch()
        real(path, **options)

    monkeypatch.setattr(os, "rmdir", rmdir)
    with pytest.raises(OSError, match="not empty"):
        images.remove()


def test_a_tmpfs_is_told_from_a_disk() -> None:
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    tmpfs = [point for _, point, kind, *_ in mounts if kind == "tmpfs"]
    if not tmpfs:
        pytest.skip("no tmpfs is mounted here")
    assert on_tmpfs(Path(tmpfs[-1]) / "below")
    assert not on_tmpfs(Path("/proc"))


def test_an_image_that_vanishes_while_sizes_are_taken_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the migration is called off."""
    images = Images(tmp_path, "m1", "source")
    images.create()
    (images.path / "timens-0.img").write_bytes(b"12")
    (images.path / "pages-1.img").write_bytes(b"123")
    real = os.scandir

    def listed_then_deleted(path: Path) -> list[os.DirEntry[str]]:
        entries = list(real(path))
        (images.path / "timens-0.img").unlink(missing_ok=True)
        return entries

    monkeypatch.setattr(os, "scandir", listed_then_deleted)
    assert images.size_bytes() == 3


@pytest.mark.parametrize(
    "manifest",
    [
        b'{"pipes":{"x":"pipe:[1]"}}',
        b'{"pipes":{"1":"/etc/hosts"}}',
        b'{"pipes":{"1":"pipe:[1]\\n"}}',
        b'{"pipes":{},"pad":"' + b"x" * wire.MAX_MESSAGE_BYTES + b'"}',
        b'{"unknown":' + b"[" * 100_000,
        b'{"boot_id":"\xff"}',
    ],
)
def test_a_manifest_of_another_form_is_refused(images: Images, manifest: bytes) -> None:
    (images.path / "manifest.json").write_bytes(manifest)
    with pytest.raises(FerryError, match="no readable manifest") as caught:
        images.manifest()
    assert caught.value.code == "internal"
