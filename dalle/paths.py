"""Location of the shipped configurations: configs/ of a checkout, or the copy inside an installed wheel."""

from pathlib import Path

PACKAGE = Path(__file__).parent
CONFIGS = PACKAGE / "configs" if (PACKAGE / "configs").is_dir() else PACKAGE.parent / "configs"


def find_config(path: Path | str) -> Path:
    """The file itself or, if it does not exist, the shipped one: configs/dvae/small.yaml works in any
    directory."""
    path = Path(path)
    if path.parts[:1] != ("configs",) or path.exists():
        return path
    shipped = CONFIGS.joinpath(*path.parts[1:])
    return shipped if shipped.is_file() and ".." not in path.parts else path
