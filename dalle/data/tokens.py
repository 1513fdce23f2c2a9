"""The token cache: pictures turned into tokens once, before stage two (paper section 2.2).

DIR/tokens.npy       uint16 (count, rows * columns), memory-mapped
DIR/captions.jsonl   the captions of each picture, one JSON list a line
DIR/meta.json        grid, vocabulary, hash of the dVAE, where the pictures came from
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


class TokenCache:
    """Tokens and captions by number."""

    def __init__(self, folder: Path | str):
        folder = Path(folder)
        try:
            self.meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            kind, (rows, columns) = self.meta["kind"], self.meta["grid"]
            self.tokens = np.load(folder / "tokens.npy", mmap_mode="r", allow_pickle=False)
            lines = (folder / "captions.jsonl").read_text(encoding="utf-8").split("\n")
            self.captions: list[list[str]] = [json.loads(line) for line in lines if line]
        except (OSError, EOFError, ValueError, LookupError, TypeError) as error:
            raise ValueError(
                f"{folder} is not a token cache ({error}); make one with scripts/encode_images.py"
            ) from None
        if kind != "tokens":
            raise ValueError(f"{folder} holds {kind!r}, expected a token cache")
        if self.tokens.shape != (len(self.captions), rows * columns):
            raise ValueError(
                f"{folder}: tokens are {self.tokens.shape}, expected ({len(self.captions)}, {rows * columns}) "
                "from captions and grid; the cache is damaged, make it again"
            )
        self.folder = folder

    @property
    def size(self) -> int:
        """Number of pictures."""
        return len(self.captions)

    @property
    def hash(self) -> str:
        """Of tokens and captions, 16 hex characters."""
        digest = hashlib.sha256()
        for name in ("tokens.npy", "captions.jsonl"):
            with (self.folder / name).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()[:16]

    def image_tokens(self, indices: list[int]) -> Tensor:
        """int64 (B, rows * columns)."""
        return torch.from_numpy(self.tokens[indices].astype(np.int64))


def write_tokens(
    folder: Path,
    encode: Callable[[list[int]], tuple[Tensor, list[list[str]]]],
    batches: Iterator[list[int]],
    count: int,
    meta: dict[str, Any],
) -> TokenCache:
    """Fills a cache; it takes its name only when it is whole.

    Args:
        folder: where it shall lie; a cache that lies there is replaced, anything else refused.
        encode: sample numbers -> image tokens int64 (b, rows * columns) and captions.
        batches: sample numbers, `count` in all.
        count: pictures.
        meta: grid, vocab, dvae (hash), data.
    """
    if meta["vocab"] > 65536:
        raise ValueError(f"a token cache holds 16-bit codes; the vocabulary of {meta['vocab']} is too large")
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / "tokens.npy").is_file()):
        raise ValueError(f"{folder} is no token cache; its contents would be lost, choose another place")
    partial = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    shape = (count, meta["grid"][0] * meta["grid"][1])
    tokens = np.lib.format.open_memmap(partial / "tokens.npy", mode="w+", dtype=np.uint16, shape=shape)
    done = 0
    with (partial / "captions.jsonl").open("w", encoding="utf-8") as file:
        for numbers in batches:
            codes, captions = encode(numbers)
            tokens[done : done + len(codes)] = codes.cpu().numpy()
            file.writelines(json.dumps(lines, ensure_ascii=False) + "\n" for lines in captions)
            done += len(codes)
    tokens.flush()
    assert done == count, f"{done} of {count} pictures were encoded"
    (partial / "meta.json").write_text(
        json.dumps({"kind": "tokens", **meta, "count": count}, indent=1), encoding="utf-8"
    )
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    return TokenCache(folder)
