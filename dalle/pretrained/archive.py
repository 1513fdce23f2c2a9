"""Safe extraction of a few named files from a tar.gz.

Member names are compared and never used as paths. The archive is refused if a member leads outside of it, is
a link or a device, or has the name of another, or if it expands like a bomb.
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

MAX_RATIO = 20  # times the archive; weights hardly shrink
SLACK = 2**20  # bytes that are no bomb, however small the archive


class _BoundedStream:
    """A stream of at most `limit` bytes, headers included."""

    def __init__(self, stream: IO[bytes], limit: int, path: Path):
        self.stream, self.left, self.path = stream, limit, path

    def read(self, size: int) -> bytes:
        content = self.stream.read(size)
        self.require(len(content))
        self.left -= len(content)
        return content

    def require(self, size: int) -> None:
        if size > self.left:
            raise ValueError(f"{self.path} expands to more than {MAX_RATIO} times its size: a bomb")


def is_archive(path: Path) -> bool:
    """Whether a file is compressed by gzip."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


@contextmanager
def extract(path: Path, names: Collection[str]) -> Iterator[Path]:
    """A temporary folder with files of a tar.gz, or the path itself if it is none.

    The `names` are at the top of the archive or below one folder; ValueError for an archive that is damaged,
    hostile or lacks one.
    """
    if not is_archive(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="dalle-") as folder:
        try:
            _extract(path, set(names), Path(folder))
        except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
            reason = str(error) or type(error).__name__
            raise ValueError(f"{path} cannot be unpacked: {reason}; if no tar.gz, unpack it") from None
        if missing := [name for name in names if not (Path(folder) / name).is_file()]:
            raise ValueError(f"{path} is an archive without {missing[0]}, not minDALL-E's; unpack it first")
        yield Path(folder)


def _extract(path: Path, names: set[str], folder: Path) -> None:
    """Reads the archive once, from end to end."""
    size = path.stat().st_size
    seen: set[PurePosixPath] = set()
    with (
        path.open("rb") as file,
        tqdm.wrapattr(file, "read", total=size, desc=f"unpacking {path.name}", disable=None) as bar,
        gzip.GzipFile(fileobj=bar) as unzipped,
    ):
        stream = _BoundedStream(unzipped, MAX_RATIO * size + SLACK, path)
        with tarfile.open(fileobj=stream, mode="r|") as tar:
            for member in tar:
                _check_member(path, member, seen)
                stream.require(member.size)  # a sparse member claims bytes that are not there
                parts = PurePosixPath(member.name).parts if member.isfile() else ()
                for name in names & {"/".join(parts), "/".join(parts[1:])}:
                    if (folder / name).exists():
                        raise ValueError(f"{path} is refused: it holds {name} twice")
                    if member.size > (free := shutil.disk_usage(folder).free):
                        raise ValueError(f"{name} takes {member.size} bytes, {free} are free; set TMPDIR")
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    with (folder / name).open("wb") as target:
                        shutil.copyfileobj(tar.extractfile(member), target)
        while stream.read(2**20):  # gzip compares its checksum at the end
            pass


def _check_member(path: Path, member: tarfile.TarInfo, seen: set[PurePosixPath]) -> None:
    """ValueError for a member that no honest archive of weights has."""
    name, shown = PurePosixPath(member.name), ascii(member.name)[:80]
    if name.is_absolute() or ".." in name.parts or "\\" in member.name or ":" in member.name:
        raise ValueError(f"{path} is refused: its member {shown} leads outside of it")
    if not (member.isfile() or member.isdir()):
        raise ValueError(f"{path} is refused: its member {shown} is a link or a device")
    if name in seen and member.isfile():
        raise ValueError(f"{path} is refused: it has two members of the name {shown}")
    seen.add(name)
