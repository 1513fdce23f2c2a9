"""Writing a token cache (dalle/data/token_cache.py): whole shards only, by one process or by several."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from dalle.data.token_cache import FORMAT, TokenCache, TokenCacheSpec, read_plan, read_shard_info, shard_name


class TokenWriter:
    """Fills a cache, shard by shard; one of `parts` processes that share a folder.

    Args:
        folder: where the cache lies or shall lie. One of the same plan is gone on with, anything else refused.
        plan: what the tokens are made of.
        part, parts: this process takes shards part, part + parts, ...
    """

    def __init__(self, folder: Path, plan: TokenCacheSpec, part: int = 0, parts: int = 1):
        if not 0 <= part < parts:
            raise ValueError(f"part must lie in 0 .. {parts - 1} for {parts} parts, got {part}")
        self.folder, self.plan, self.part, self.parts = folder, plan, part, parts
        if folder.is_dir() and (folder / "plan.json").is_file():
            plan.require(read_plan(folder), folder)
            return
        if folder.is_file() or (folder.is_dir() and any(_strangers(folder))):
            raise ValueError(
                f"{folder} is no token cache; its contents would be mixed with one, choose another place"
            )
        folder.mkdir(parents=True, exist_ok=True)
        self._write_json("plan.json", asdict(plan))

    def own(self) -> range:
        """The shards of this part."""
        return range(self.part, self.plan.shards, self.parts)

    def missing(self) -> list[int]:
        """Those of them that are not there yet."""
        return [shard for shard in self.own() if not (self.folder / shard_name(shard)).is_file()]

    def write(
        self, shard: int, tokens: np.ndarray, numbers: Sequence[int], captions: Sequence[list[str]]
    ) -> None:
        """Puts a shard in its place.

        Args:
            shard: which.
            tokens: integers (n, crops, rows * columns).
            numbers: n images of the data, ascending, out of `plan.numbers(shard)`.
            captions: of each.
        """
        rows, columns = self.plan.grid
        shape = (len(numbers), self.plan.crops, rows * columns)
        if tokens.shape != shape or len(captions) != len(numbers):
            raise ValueError(
                f"expected tokens {shape} and as many captions, got {tokens.shape} and {len(captions)}"
            )
        lines = [json.dumps(texts, ensure_ascii=False).encode("utf-8", "replace") for texts in captions]
        arrays = {
            "tokens": tokens.astype(np.uint16),
            "numbers": np.asarray(numbers, np.int64),
            "captions": np.frombuffer(b"".join(lines), np.uint8),
            "offsets": np.cumsum([0, *map(len, lines)], dtype=np.int64),
        }
        digest = hashlib.sha256()
        for array in arrays.values():
            digest.update(array.tobytes())
        info = {"key": self.plan.key, "images": len(numbers), "hash": digest.hexdigest()}
        partial = self._partial(shard_name(shard))
        save_file(arrays, partial, metadata={"tokens": json.dumps(info)})
        self._rename(partial, shard_name(shard))

    def finish(self) -> TokenCache | None:
        """The cache, its meta.json written, if the shards of all parts are there; else None."""
        names = [shard_name(shard) for shard in range(self.plan.shards)]
        if not all((self.folder / name).is_file() for name in names):
            return None
        if not (self.folder / "meta.json").is_file():
            infos = [read_shard_info(self.folder / name) for name in names]
            for name, info in zip(names, infos, strict=True):
                if info["key"] != self.plan.key:
                    raise ValueError(
                        f"{self.folder / name} holds tokens of key {info['key']}, this run makes {self.plan.key}; "
                        "remove it and encode again"
                    )
            self._write_json("meta.json", self._meta(names, infos))
            for leftover in self.folder.glob(".partial-*-shard-*"):
                leftover.unlink(missing_ok=True)
        return TokenCache(self.folder)

    def _meta(self, names: list[str], infos: list[dict[str, Any]]) -> dict[str, Any]:
        images = sum(info["images"] for info in infos)
        if not images:
            raise ValueError(f"none of {self.plan.images} images could be read; the cache would be empty")
        whole = hashlib.sha256("".join([self.plan.key, *(info["hash"] for info in infos)]).encode())
        shards = [
            {"images": info["images"], "bytes": (self.folder / name).stat().st_size}
            for name, info in zip(names, infos, strict=True)
        ]
        head = {"kind": "tokens", "format": FORMAT, "key": self.plan.key, "hash": whole.hexdigest()[:16]}
        return head | asdict(self.plan) | {"left_out": self.plan.images - images, "shards": shards}

    def _write_json(self, name: str, data: Any) -> None:
        partial = self._partial(name)
        partial.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        self._rename(partial, name)

    def _partial(self, name: str) -> Path:
        """Another name, of this part alone, until a file is whole."""
        return self.folder / f".partial-{self.part}-{name}"

    def _rename(self, partial: Path, name: str) -> None:
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, self.folder / name)


def _strangers(folder: Path) -> list[str]:
    """What is in a folder besides leftovers of an encoding that stopped at once, and the plan of a part just ahead."""
    names = (path.name for path in folder.iterdir())
    return [name for name in names if name != "plan.json" and not name.startswith(".partial-")]
