"""A tar.gz, of which a few files of known names are taken, and nothing that it could do otherwise.

Names of its members are compared and never used as paths. An archive with a member that leads outside of it, with a
link or a device, with one name twice, or that swells like a bomb, is refused whole.
"""

import gzip
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from tqdm import tqdm

SWELLS = 20  # times the archive, at most; weights hardly shrink
SLACK = 2**20  # bytes that are none of a bomb, however small the archive
BLOCK = 2**20
BOMB = f"{{}} swells to more than {SWELLS} times its size: a bomb, no archive of weights"


class _Bounded:
    """The bytes of a stream, so many and no more: headers too can swell."""

    def __init__(self, stream: IO[bytes], room: int, path: Path):
        self.stream, self.room, self.path = stream, room, path

    def read(self, size: int) -> bytes:
        """At most `size` bytes; ValueError once there is no room."""
        content = self.stream.read(size)
        self.room -= len(content)
        if self.room < 0:
            raise ValueError(BOMB.format(self.path))
        return content


def is_archive(path: Path) -> bool:
    """Whether a file is compressed by gzip."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


@contextmanager
def unpacked(path: Path, names: Collection[str]) -> Iterator[Path]:
    """A folder of its own with those files of a tar.gz, removed afterwards.

    Args:
        path: the archive.
        names: of the files, as they are named in it, there perhaps below one folder.

    Raises:
        ValueError: no tar.gz, one that is damaged or hostile, or that lacks a file.
    """
    with tempfile.TemporaryDirectory(prefix="dalle-") as folder:
        try:
            taken = _unpack(path, names, Path(folder))
        except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
            raise ValueError(
                f"{path} cannot be unpacked: {error or type(error).__name__}. If it is no tar.gz of minDALL-E, unpack "
                "it and give the file inside"
            ) from None
        if missing := [name for name in names if name not in taken]:
            raise ValueError(
                f"{path} is an archive without {missing[0]}, so not minDALL-E's; unpack it and give the file inside"
            )
        yield Path(folder)


def _unpack(path: Path, names: Collection[str], folder: Path) -> set[str]:
    """Reads the archive once, from end to end; the files that it took."""
    size = path.stat().st_size
    room = SWELLS * size + SLACK
    seen: set[str] = set()
    taken: set[str] = set()
    with (
        path.open("rb") as file,
        tqdm.wrapattr(file, "read", total=size, desc=f"unpacking {path.name}", disable=None) as bar,
        gzip.GzipFile(fileobj=bar) as swollen,
        tarfile.open(fileobj=(content := _Bounded(swollen, room, path)), mode="r|") as archive,
    ):
        for member in archive:
            _check(path, member, seen)
            if member.size > room:  # also one with holes, whose bytes are not all there
                raise ValueError(BOMB.format(path))
            if member.isfile() and (name := _wanted(member.name, names)):
                if name in taken:
                    raise ValueError(f"{path} holds {name} twice; which one is meant cannot be told")
                taken.add(name)
                _copy(archive.extractfile(member), folder / name, member.size)
        while content.read(
            BLOCK
        ):  # to the end of gzip, beyond that of tar: only there the sum of all is checked
            pass
    return taken


def _check(path: Path, member: tarfile.TarInfo, seen: set[str]) -> None:
    """ValueError for a member that no honest archive of weights has."""
    place = PurePosixPath(member.name)
    shown = ascii(member.name)[:80]
    if place.is_absolute() or ".." in place.parts or "\\" in member.name or ":" in member.name:
        raise ValueError(f"{path} is refused: its member {shown} leads outside of it; nothing was kept")
    if not (member.isfile() or member.isdir()):
        raise ValueError(f"{path} is refused: its member {shown} is a link or a device; nothing was kept")
    if str(place) in seen and member.isfile():
        raise ValueError(f"{path} is refused: it has two members of the name {shown}")
    seen.add(str(place))


def _wanted(name: str, names: Collection[str]) -> str | None:
    """Which of the names a member is, as it stands or below one folder."""
    parts = PurePosixPath(name).parts
    return next((wanted for wanted in names if wanted in ("/".join(parts), "/".join(parts[1:]))), None)


def _copy(source: IO[bytes] | None, target: Path, size: int) -> None:
    assert source is not None, "a file has content"
    target.parent.mkdir(parents=True, exist_ok=True)
    if size > (free := shutil.disk_usage(target.parent).free):
        raise ValueError(
            f"unpacking {target.name} takes {size} bytes, {free} are free; set TMPDIR to a larger disk"
        )
    with target.open("wb") as file:
        shutil.copyfileobj(source, file, BLOCK)
