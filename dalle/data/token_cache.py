"""Token cache: the tokens of a dataset's images, encoded once before stage two (paper section 2.2).

DIR/spec.json                   what the tokens depend on: weights, images, transform. Its hash is the key
DIR/shard-000000.safetensors    tokens    uint16 (n, crops, rows * columns)
                                captions  uint8: a JSON list of strings for each image, end to end
                                offsets   int64 (n + 1): where each list starts
DIR/meta.json                   the spec again, with count, size and hash of every shard; written last

A shard holds a fixed range of the dataset without the bad samples. It is renamed when complete, so an
interrupted encoding resumes at its shard, and several processes share the work by taking every n-th shard.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from dalle.io.files import FORMAT, check_meta, read_json, sync
from dalle.io.text import parse_json

MAX_MAPPED = 4096  # a process may map some 65,000 files
ARRAYS = ("tokens", "captions", "offsets")
REPAIR = "remove meta.json and this file, and run encode_images again as before; it makes this shard alone"


@dataclass(frozen=True)
class TokenCacheSpec:
    """Everything that the tokens depend on; caches with the same key are equal."""

    dvae: str
    """Hash of the weights of the image tokenizer."""
    data: str
    """Hash of the dataset."""
    grid: tuple[int, int]
    """Rows and columns of tokens."""
    vocab: int
    images: int
    """Images of the dataset in order, bad samples included."""
    crops: int = 1
    """Per image."""
    shard: int = 8192
    """Images of the dataset per shard."""
    transform: dict[str, Any] = field(default_factory=dict)
    """Preprocessing of an image, and the precision of the encoder."""

    def __post_init__(self):
        if self.vocab > 65536:
            raise ValueError(f"a token cache holds 16-bit codes; the vocabulary of {self.vocab} is too large")

    @property
    def key(self) -> str:
        """16 hex characters."""
        return _key(asdict(self))

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.images // self.shard)

    def numbers(self, shard: int) -> range:
        """Indices of the images of a shard in the dataset."""
        return range(shard * self.shard, min((shard + 1) * self.shard, self.images))


def _key(spec: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:16]


class TokenCache:
    """Tokens and captions by image; memory grows with the number of shards, not of images."""

    def __init__(self, folder: Path | str):
        self.folder = folder = Path(folder)
        if (folder / "spec.json").is_file() and not (folder / "meta.json").is_file():
            done = len(list(folder.glob("shard-*.safetensors")))
            raise ValueError(
                f"{folder} is incomplete, it has {done} shards; run the same command again (of every part, "
                "if there are parts), and it resumes"
            )
        try:
            self.meta = meta = check_meta(read_json(folder / "meta.json"), "tokens", folder)
            counts, sizes = ([shard[name] for shard in meta["shards"]] for name in ("images", "bytes"))
            numbers = (*counts, *sizes, *meta["grid"])
            if not sum(counts) or not all(type(one) is int and 0 <= one < 2**63 for one in numbers):
                raise ValueError("meta.json has sizes that cannot be")
            self._starts = np.cumsum([0, *counts], dtype=np.int64)
            self.key, self.hash, self.crops = meta["key"], meta["hash"], meta["crops"]
            rows, columns = meta["grid"]
            self.grid: tuple[int, int] = (rows, columns)
            sound = _key({name: meta[name] for name in TokenCacheSpec.__dataclass_fields__}) == self.key
            sound = sound and sum(counts) + meta["left_out"] == meta["images"]
        except (LookupError, ValueError, TypeError) as error:
            raise ValueError(f"{folder} is not a token cache: {error}; make one with encode_images") from None
        if not sound:
            raise ValueError(
                f"{folder / 'meta.json'} is damaged: its numbers contradict each other; remove it, and run "
                "encode_images again as before; it makes no shard again"
            )
        for shard, size in enumerate(sizes):
            file = folder / shard_name(shard)
            found = file.stat().st_size if file.is_file() else "no"
            if found != size:
                raise ValueError(f"{file} has {found} bytes, expected {size}: the cache is damaged; {REPAIR}")
        self._shard = lru_cache(MAX_MAPPED)(self._open)
        self._checked: dict[int, tuple[int, int]] = {}  # shard -> size and time of the file that was whole

    def __reduce__(self):
        return TokenCache, (self.folder,)

    @property
    def size(self) -> int:
        """Number of images."""
        return int(self._starts[-1])

    def image_tokens(self, images: Sequence[int], crops: Sequence[int] | None = None) -> Tensor:
        """int64 (B, rows * columns), by default of the first crop."""
        tokens = np.empty((len(images), self.grid[0] * self.grid[1]), np.int64)
        for row, (image, crop) in enumerate(zip(images, crops or [0] * len(images), strict=True)):
            shard, index = self._locate(image)
            tokens[row] = shard["tokens"][index, crop]
        return torch.from_numpy(tokens)

    def captions(self, images: Sequence[int]) -> list[list[str]]:
        """All captions of each image."""
        lists = []
        for image in images:
            shard, index = self._locate(image)
            start, end = shard["offsets"][index : index + 2].tolist()
            lists.append(parse_json(shard["captions"][start:end].tobytes(), str(self.folder)))
        return lists

    def _locate(self, image: int) -> tuple[dict[str, Any], int]:
        """The shard of an image and its index in the shard."""
        if not 0 <= image < self.size:
            raise IndexError(f"{self.folder} holds images 0 .. {self.size - 1}, not {image}")
        shard = int(np.searchsorted(self._starts, image, side="right")) - 1
        return self._shard(shard), int(image - self._starts[shard])

    def _open(self, shard: int) -> dict[str, Any]:
        """Slices of a mapped file by name; its hash is compared once, and again if the file has changed."""
        path = self.folder / shard_name(shard)
        status = path.stat()
        state = status.st_size, status.st_mtime_ns
        file, info = _open_shard(path, self.key, verify=self._checked.get(shard) != state)
        expected = self._starts[shard + 1] - self._starts[shard]
        if info["images"] != expected:
            raise ValueError(f"{path} has {info['images']} images, meta.json says {expected}; {REPAIR}")
        if self.meta["shards"][shard].get("hash", info["hash"]) != info["hash"]:  # older caches have none
            raise ValueError(f"{path} is not the shard that meta.json names; {REPAIR}")
        self._checked[shard] = state
        return {name: file.get_slice(name) for name in ARRAYS}


def shard_name(shard: int) -> str:
    """File name of a shard."""
    return f"shard-{shard:06d}.safetensors"


def _open_shard(path: Path, key: str, verify: bool = True) -> tuple[Any, dict[str, Any]]:
    """A mapped shard and its metadata; ValueError for a damaged or foreign file, or another key."""
    try:
        path.open("rb").close()  # safetensors calls every file missing that it cannot open
        file = safe_open(path, "np")
        info = parse_json(file.metadata()["tokens"], str(path))
        found, images, expected = (info[name] for name in ("key", "images", "hash"))
        if verify:
            digest = hashlib.sha256()
            for name in ARRAYS:
                digest.update(file.get_tensor(name).ravel())
            if digest.hexdigest() != expected or images != file.get_slice("tokens").get_shape()[0]:
                raise ValueError("its hash is another")
    except PermissionError:
        raise
    except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged or no shard ({error}); {REPAIR}") from None
    if found != key:
        raise ValueError(f"{path} holds tokens of key {found!s:.80}, expected {key!s:.80}; {REPAIR}")
    return file, info


class TokenWriter:
    """Writes a cache shard by shard; of `parts` processes that share a folder each takes every n-th shard.

    An incomplete cache of the same spec is resumed; ValueError if the folder holds something else.
    """

    def __init__(self, folder: Path, spec: TokenCacheSpec, part: int = 0, parts: int = 1):
        if not 0 <= part < parts:
            raise ValueError(f"part must lie in 0 .. {parts - 1} for {parts} parts, got {part}")
        self.folder, self.spec, self.part, self.parts = folder, spec, part, parts
        if (folder / "spec.json").is_file():
            other, own = read_json(folder / "spec.json"), json.loads(json.dumps(asdict(spec)))
            if other != own:
                names = [name for name in own if other.get(name) != own[name]]
                changes = "; ".join(f"{name} was {other.get(name)!r}, is {own[name]!r}" for name in names)
                raise ValueError(
                    f"{folder} holds tokens of key {_key(other)}, this run makes {spec.key}: {changes}; "
                    "give another --out, or remove it"
                )
            return
        # a part that starts at the same time may have written its spec just now
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        foreign = [name for name in names if name != "spec.json" and not name.startswith(".partial-")]
        if folder.is_file() or foreign:
            raise ValueError(f"{folder} is no token cache, and holds other files; give another --out")
        folder.mkdir(parents=True, exist_ok=True)
        self._write_json("spec.json", asdict(spec))

    def own(self) -> range:
        """The shards of this part."""
        return range(self.part, self.spec.shards, self.parts)

    def missing(self) -> list[int]:
        """The shards of this part that do not exist yet."""
        return [shard for shard in self.own() if not (self.folder / shard_name(shard)).is_file()]

    def write(self, shard: int, tokens: np.ndarray, captions: Sequence[list[str]]) -> None:
        """Writes tokens (n, crops, rows * columns) and captions of the n usable images of a shard."""
        rows, columns = self.spec.grid
        shape = (len(captions), self.spec.crops, rows * columns)
        if tokens.shape != shape:
            raise ValueError(f"expected tokens {shape} for {len(captions)} images, got {tokens.shape}")
        lines = [json.dumps(texts, ensure_ascii=False).encode("utf-8", "replace") for texts in captions]
        arrays = {
            "tokens": tokens.astype(np.uint16),
            "captions": np.frombuffer(b"".join(lines), np.uint8),
            "offsets": np.cumsum([0, *map(len, lines)], dtype=np.int64),
        }
        digest = hashlib.sha256(b"".join(array.tobytes() for array in arrays.values()))
        info = {"key": self.spec.key, "images": len(captions), "hash": digest.hexdigest()}
        metadata = {"tokens": json.dumps(info)}
        self._write(shard_name(shard), lambda path: path.write_bytes(save(arrays, metadata)))

    def finish(self) -> TokenCache | None:
        """Writes meta.json and returns the cache if the shards of all parts exist; else None."""
        files = [self.folder / shard_name(shard) for shard in range(self.spec.shards)]
        if not all(file.is_file() for file in files):
            return None
        if not (self.folder / "meta.json").is_file():
            infos = [_open_shard(file, self.spec.key)[1] for file in files]
            images = sum(info["images"] for info in infos)
            if not images:
                raise ValueError(f"none of {self.spec.images} images could be read; the cache would be empty")
            digest = hashlib.sha256("".join([self.spec.key, *(info["hash"] for info in infos)]).encode())
            meta = {
                "kind": "tokens",
                "format": FORMAT,
                "key": self.spec.key,
                "hash": digest.hexdigest()[:16],
                **asdict(self.spec),
                "left_out": self.spec.images - images,
                "shards": [
                    {"images": info["images"], "bytes": file.stat().st_size, "hash": info["hash"]}
                    for file, info in zip(files, infos, strict=True)
                ],
            }
            self._write_json("meta.json", meta)
            for leftover in self.folder.glob(".partial-*-shard-*"):
                leftover.unlink(missing_ok=True)
        return TokenCache(self.folder)

    def _write_json(self, name: str, data: Any) -> None:
        text = json.dumps(data, indent=1, ensure_ascii=False) + "\n"
        self._write(name, lambda path: path.write_text(text, encoding="utf-8"))

    def _write(self, name: str, write: Callable[[Path], Any]) -> None:
        """Writes a file of this part under a temporary name, then renames it; ValueError on a full disk."""
        partial = self.folder / f".partial-{self.part}-{name}"
        try:
            write(partial)
            sync(partial)
            os.replace(partial, self.folder / name)
        except OSError as error:
            partial.unlink(missing_ok=True)
            problem = f"cannot write {self.folder / name} ({error.strerror or error})"
            raise ValueError(f"{problem}; free disk space and run again: complete shards are kept") from None
