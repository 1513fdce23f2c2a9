"""The token cache: images turned into tokens once, before stage two (paper section 2.2).

DIR/plan.json                   what the tokens are made of: weights, images, transform. Its hash is the key
DIR/shard-000000.safetensors    tokens    uint16 (n, crops, rows * columns)
                                numbers   int64 (n): which image of the data each is
                                captions  uint8: a JSON list of strings for each image, end to end
                                offsets   int64 (n + 1): where each list begins
DIR/meta.json                   the plan again, with count, size and hash of every shard; written last

A shard holds a fixed range of the data, less the images that could not be read. It is written under another
name and renamed, so a shard that is there is whole: an encoding that stopped goes on at the shard it stopped in,
and several processes share the work by taking every n-th shard. Only the shards in use are mapped into memory.

B images
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

FORMAT = 1
MAPPED_SHARDS = 4096  # a process may map some 65,000 files
MAKE = "make one with scripts/encode_images.py"


@dataclass(frozen=True)
class TokenCacheSpec:
    """All that tokens depend on. Caches of one key are one cache."""

    dvae: str
    """Hash of the weights that encode."""
    data: str
    """Hash of the images."""
    grid: tuple[int, int]
    """Rows and columns of tokens."""
    vocab: int
    """Codes of the image tokenizer; they are kept in 16 bit."""
    images: int
    """Images of the data, read in their order; those that cannot be read are left out."""
    crops: int = 1
    """Crops of each image."""
    shard: int = 8192
    """Images of the data in a shard."""
    transform: dict[str, Any] = field(default_factory=dict)
    """What is done to an image before it is encoded, and at which precision."""

    def __post_init__(self):
        if self.vocab > 65536:
            raise ValueError(f"a token cache holds 16-bit codes; the vocabulary of {self.vocab} is too large")

    @property
    def key(self) -> str:
        """16 hex characters."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    @property
    def shards(self) -> int:
        """Files in the cache."""
        return -(-self.images // self.shard)

    def numbers(self, shard: int) -> range:
        """The images of the data that a shard is made from."""
        return range(shard * self.shard, min((shard + 1) * self.shard, self.images))

    def require(self, other: dict[str, Any], folder: Path) -> None:
        """ValueError, naming both keys and what differs, unless `other`, found in a folder, is this plan."""
        own = json.loads(json.dumps(asdict(self)))
        if other != own:
            names = [name for name in own if other.get(name) != own[name]]
            changes = "; ".join(f"{name} was {other.get(name)!r}, is {own[name]!r}" for name in names)
            raise ValueError(
                f"{folder} holds tokens of key {_hash(other)}, this run makes {self.key}: {changes or 'another plan'}. "
                "They do not belong together; give another --out, or remove it"
            )


def _hash(plan: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:16]


class TokenCache:
    """Tokens and captions by image. Memory grows with the shards, by a few numbers each, not with the images."""

    def __init__(self, folder: Path | str):
        self.folder = folder = Path(folder)
        self.meta = meta = _read_meta(folder)
        try:
            counts, sizes = ([shard[name] for shard in meta["shards"]] for name in ("images", "bytes"))
            self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
            self.key, self.hash = str(meta["key"]), str(meta["hash"])
            self.crops = int(meta["crops"])
            self.grid = (int(meta["grid"][0]), int(meta["grid"][1]))
        except (LookupError, ValueError, TypeError) as error:
            raise ValueError(f"{folder} is not a token cache (meta.json: {error!r}); {MAKE}") from None
        _check_sizes(folder, sizes)
        self._shard = lru_cache(MAPPED_SHARDS)(self._open)

    def __reduce__(self):
        return TokenCache, (self.folder,)

    @property
    def size(self) -> int:
        """Number of images."""
        return int(self._starts[-1])

    def image_tokens(self, images: Sequence[int], crops: Sequence[int] | None = None) -> Tensor:
        """int64 (B, rows * columns), of the first crop unless told."""
        tokens = np.empty((len(images), self.grid[0] * self.grid[1]), np.int64)
        for row, (image, crop) in enumerate(zip(images, crops or [0] * len(images), strict=True)):
            shard, place = self._locate(image)
            tokens[row] = shard["tokens"][place, crop]
        return torch.from_numpy(tokens)

    def captions(self, images: Sequence[int]) -> list[list[str]]:
        """Every caption of each image."""
        lists = []
        for image in images:
            shard, place = self._locate(image)
            start, end = shard["offsets"][place : place + 2].tolist()
            lists.append(json.loads(shard["captions"][start:end].tobytes()))
        return lists

    def number(self, image: int) -> int:
        """Which image of the data an image of the cache is; they part where one could not be read."""
        shard, place = self._locate(image)
        return int(shard["numbers"][place : place + 1][0])

    def _locate(self, image: int) -> tuple[dict[str, Any], int]:
        """The shard of an image and its place therein."""
        if not 0 <= image < self.size:
            raise IndexError(f"{self.folder} holds images 0 .. {self.size - 1}, not {image}")
        shard = int(np.searchsorted(self._starts, image, side="right")) - 1
        return self._shard(shard), int(image - self._starts[shard])

    def _open(self, shard: int) -> dict[str, Any]:
        """Views into a mapped file, by name."""
        path = self.folder / shard_name(shard)
        info = read_shard_info(path)
        if info["key"] != self.key:
            raise ValueError(
                f"{path} holds tokens of key {info['key']}, the cache is {self.key}; make it again"
            )
        file = safe_open(path, "np")
        return {name: file.get_slice(name) for name in ("tokens", "numbers", "captions", "offsets")}


def shard_name(shard: int) -> str:
    """Its file."""
    return f"shard-{shard:06d}.safetensors"


def read_shard_info(path: Path) -> dict[str, Any]:
    """What a shard says of itself: key, images, hash. ValueError for a file that breaks off or is something else."""
    try:
        with safe_open(path, "np") as file:
            info = json.loads(file.metadata()["tokens"])
            return {name: info[name] for name in ("key", "images", "hash")}
    except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged or no shard of tokens ({error}); remove it and encode again"
        ) from None


def _read_meta(folder: Path) -> dict[str, Any]:
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        kind, found = meta["kind"], meta.get("format")
    except FileNotFoundError as error:
        raise ValueError(_unfinished(folder) or f"{folder} is not a token cache ({error}); {MAKE}") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder} is not a token cache ({error}); {MAKE}") from None
    if kind != "tokens":
        raise ValueError(f"{folder} holds {kind!r}, expected a token cache")
    if found != FORMAT:
        raise ValueError(
            f"{folder} is a token cache of format {found}, this version reads {FORMAT}; remove it and encode again"
        )
    return meta


def _unfinished(folder: Path) -> str | None:
    """What to say of a folder whose encoding has not come to its end."""
    try:
        plan = read_plan(folder)
        shards = -(-plan["images"] // plan["shard"])
    except (ValueError, LookupError, TypeError):
        return None
    there = sum((folder / shard_name(shard)).is_file() for shard in range(shards))
    return (
        f"{folder} is not whole: {there} of {shards} shards are there; give the same command "
        "(of every part, if there are parts) again, and it goes on where it stopped"
    )


def read_plan(folder: Path) -> dict[str, Any]:
    """The plan of a cache, whole or not; ValueError where there is none."""
    try:
        plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / 'plan.json'} cannot be read ({error})") from None
    if not isinstance(plan, dict):
        raise ValueError(f"{folder / 'plan.json'} holds no plan")
    return plan


def _check_sizes(folder: Path, sizes: Sequence[int]) -> None:
    with os.scandir(folder) as entries:
        found = {entry.name: entry.stat().st_size for entry in entries}
    for shard, size in enumerate(sizes):
        if found.get(shard_name(shard)) != size:
            raise ValueError(
                f"{folder / shard_name(shard)} has {found.get(shard_name(shard), 'no')} bytes, expected {size}: the "
                "cache is damaged; remove meta.json and this file, and encode again to mend it"
            )
