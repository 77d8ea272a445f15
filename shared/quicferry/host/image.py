"""The image: built from the project's folder when its inputs changed, and only then.

``python -m quicferry.host.image [PROJECT_DIR]`` does it by hand; ``make setup`` calls that.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from quicferry.host import machine
from quicferry.host.command import attempt, run
from quicferry.protocol.errors import FerryError

IMAGE = "localhost/quicferry:latest"
OWN_BASE = "localhost/quicferry-base:trixie"
BENCH_IMAGE = "localhost/quicferry-bench:latest"
"""Only the benchmark makes it: a podman with a CRIU that works here."""
LABEL = "io.quicferry.image"
INPUTS_LABEL = "io.quicferry.inputs"
BASE_VARIABLE = "QUICFERRY_BASE_IMAGE"
"""Names a stock Debian 13 image to build on, where a registry is at hand."""
PYTHON = "3.13"
"""The Python of Debian 13: wheels are fetched for it, whichever Python runs here."""

BUILD_TIMEOUT = 1_800.0
FETCH_TIMEOUT = 900.0

INPUT_TREES = ("containers", "services", "shared/quicferry")
INPUT_FILES = ("pyproject.toml", "README.md", "LICENSE")
_NOT_INPUTS = ("__pycache__", ".pyc", ".pyo")

Say = Callable[[str], None]


def _quiet(_: str) -> None:
    """Tells nobody."""


def base_image() -> str:
    """What the image is built on: ``QUICFERRY_BASE_IMAGE``, or our own base."""
    return os.environ.get(BASE_VARIABLE) or OWN_BASE


def _hash(parts: Iterable[tuple[str, bytes]]) -> str:
    digest = hashlib.sha256()
    for name, content in parts:
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()[:32]


def _inputs(project: Path) -> list[Path]:
    files = [project / name for name in INPUT_FILES]
    for tree in INPUT_TREES:
        files += [
            path
            for path in (project / tree).rglob("*")
            if path.is_file() and not any(part.endswith(_NOT_INPUTS) for part in path.parts)
        ]
    return sorted(path for path in files if path.exists())


def inputs_hash(project: Path, base: str) -> str:
    """A hash over all that the image is made of, as far as this folder decides it."""
    parts = [(str(path.relative_to(project)), path.read_bytes()) for path in _inputs(project)]
    return _hash([("base", base.encode()), ("python", PYTHON.encode()), *parts])


def dependencies(project: Path) -> list[str]:
    """The requirements of the image: those of the project, without podman-compose, which runs outside."""
    with (project / "pyproject.toml").open("rb") as file:
        listed: list[str] = tomllib.load(file)["project"]["dependencies"]
    return [requirement for requirement in listed if not requirement.startswith("podman-compose")]


def built_inputs(image: str = IMAGE) -> str | None:
    """The inputs' hash of the image that is here; None if none is."""
    result = attempt(
        ["podman", "image", "inspect", "--format", f'{{{{index .Labels "{INPUTS_LABEL}"}}}}', image],
        timeout=30,
        env=machine.environment(),
    )
    return result.out.strip() if result.ok else None


def image_id(image: str = IMAGE) -> str | None:
    """The id of the image that is here; None if none is."""
    result = attempt(["podman", "image", "inspect", "--format", "{{.Id}}", image], timeout=30)
    return result.out.strip() if result.ok else None


def is_current(project: Path) -> bool:
    """Whether the image here is what this folder would build."""
    return built_inputs() == inputs_hash(project, base_image())


def build(project: Path, *, say: Say = _quiet, force: bool = False) -> bool:
    """Build the image if its inputs changed; True if it was built. Needs root.

    Raises FerryError ``setup_failed`` with what the failing step printed.
    """
    project = project.resolve()
    base = base_image()
    wanted = inputs_hash(project, base)
    if not force and built_inputs() == wanted:
        return False
    if not (project / "containers" / "Containerfile").is_file():
        raise FerryError(
            "setup_failed",
            f"{project} is not quicferry's folder: containers/Containerfile is not there.",
            hint="Run this inside a checkout, or name one with --project.",
        )
    with _alone(project):
        if not force and built_inputs() == wanted:  # another process built it while we waited
            return False
        _build(project, base, wanted, say)
    return True


@contextlib.contextmanager
def _alone(project: Path) -> Iterator[None]:
    """One build at a time in a folder; waits for the other, whose own steps all have time limits (flock(2))."""
    folder = project / ".cache"
    folder.mkdir(exist_ok=True)
    with (folder / "build.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(project: Path, base: str, wanted: str, say: Say) -> None:
    _ensure_base(project, base, say)
    wheels, wheels_hash = _wheels(project, say)
    say("building the image")
    with tempfile.TemporaryDirectory(prefix="quicferry-build-") as folder:
        context = Path(folder)
        shutil.copytree(project / "containers", context / "containers")
        shutil.copytree(project / "services", context / "services", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(wheels, context / "wheels")
        (context / "shared/quicferry/host").mkdir(parents=True)
        shutil.copy(project / "shared/quicferry/host/berth_init.py", context / "shared/quicferry/host")
        settings = run([project / "containers/apt-settings"], timeout=30, doing="reading apt's settings")
        (context / "apt.conf").write_text(settings)
        project_wheel = _project_wheel(project, context / "dist")
        run(
            [
                *("podman", "build", "--quiet", "--network", "host", "--layers", "--tag", IMAGE),
                *("--build-arg", f"BASE={base}"),
                *("--build-arg", f"WHEELS_HASH={wheels_hash}"),
                *("--build-arg", f"PROJECT_HASH={_hash([(project_wheel.name, _content(project_wheel))])}"),
                *("--build-arg", f"INPUTS_HASH={wanted}"),
                *("--file", context / "containers/Containerfile", context),
            ],
            timeout=BUILD_TIMEOUT,
            doing="building the image",
            env=machine.environment(project),
        )
    _drop_superseded()


def _ensure_base(project: Path, base: str, say: Say) -> None:
    """Make our own base if it is wanted and not here; a stock one is pulled by the build itself."""
    if base != OWN_BASE:
        return
    env = machine.environment(project)
    if attempt(["podman", "image", "exists", base], timeout=30, env=env).ok:
        return
    say("building the base root from packages")
    run(
        [project / "containers/base", base],
        timeout=BUILD_TIMEOUT,
        doing="building the base root",
        hint=f"With an image registry at hand: {BASE_VARIABLE}=docker.io/library/debian:trixie-slim.",
        env=env,
    )


def _wheels(project: Path, say: Say) -> tuple[Path, str]:
    """The dependencies as wheels for the image's Python, fetched with the host's pip settings and kept."""
    wanted = dependencies(project)
    key = _hash((requirement, PYTHON.encode()) for requirement in wanted)
    folder = project / ".cache" / "wheels" / key
    if not folder.is_dir():
        say("fetching wheels")
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        kind = ["--python-version", PYTHON, "--only-binary=:all:"]
        run(
            [*pip, *kind, "--dest", partial, *wanted],
            timeout=FETCH_TIMEOUT,
            doing="fetching wheels",
            hint="The package index that pip is configured for must be reachable.",
        )
        run(
            [*pip, *kind, "--no-deps", "--dest", partial / "pip", "pip"],
            timeout=FETCH_TIMEOUT,
            doing="fetching pip",
        )
        partial.rename(folder)
    return folder, _hash((wheel.name, _content(wheel)) for wheel in sorted(folder.rglob("*.whl")))


def _project_wheel(project: Path, dest: Path) -> Path:
    """The project's own wheel: what users install is what runs in the image."""
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
    run([*pip, "--wheel-dir", dest, project], timeout=FETCH_TIMEOUT, doing="building quicferry's wheel")
    return next(dest.glob("quicferry-*.whl"))


def _content(file: Path) -> bytes:
    return hashlib.sha256(file.read_bytes()).digest()


def _drop_superseded() -> None:
    """Remove our own images that a new build left without a name and nothing uses."""
    listed = attempt(
        ["podman", "images", "--quiet", "--filter", f"label={LABEL}=1", "--filter", "dangling=true"],
        timeout=30,
        env=machine.environment(),
    )
    for image in listed.out.split():
        # A refusal means that a container still runs on it: `quicferry up` replaces that one later.
        attempt(["podman", "image", "rm", image], timeout=60, env=machine.environment())


def main() -> int:
    """Build if needed; says what it does on standard error."""
    project = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    try:
        machine.install_containers_conf(project)
        build(project, say=lambda text: print(f"quicferry: {text}", file=sys.stderr, flush=True))
    except FerryError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
