"""Hash of a model's weights, computed by threads and remembered until the weights change."""

import hashlib
import os
from concurrent.futures import Future, ThreadPoolExecutor
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

PIECE = 2**24
"""Bytes of a tensor that one thread hashes at a time; part of the definition of the hash."""
_hashes: WeakKeyDictionary[nn.Module, tuple[list | None, str]] = WeakKeyDictionary()
"""Hash of a model's weights, and the memory and versions of the tensors that had it."""


class WeightsHash:
    """SHA-256 over each tensor's name, dtype, shape and the SHA-256 of each PIECE of it, 16 hex characters.

    The pieces are read and hashed in threads while tensors are added. Use as a context manager.
    """

    def __init__(self):
        self.pool = ThreadPoolExecutor(min(os.cpu_count() or 1, 16))
        self.parts: list[tuple[bytes, list[Future[bytes]]]] = []

    def __enter__(self) -> "WeightsHash":
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.shutdown(cancel_futures=True)

    def add(self, name: str, tensor: Tensor) -> None:
        """Starts on a tensor, of any device, which must not change before `hexdigest`."""
        pieces = tensor.detach().contiguous().flatten().view(torch.uint8).split(PIECE)
        header = f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode()
        self.parts.append((header, [self.pool.submit(_sha256, piece) for piece in pieces]))

    def hexdigest(self) -> str:
        """Of the tensors so far, in the order in which they were added."""
        digest = hashlib.sha256()
        for header, pieces in self.parts:
            digest.update(header + b"".join(piece.result() for piece in pieces))
        return digest.hexdigest()[:16]


def _sha256(piece: Tensor) -> bytes:
    return hashlib.sha256(piece.cpu().numpy()).digest()


def weights_hash(model: nn.Module) -> str:
    """`WeightsHash` of a model's tensors in order of name; remembered until they change."""
    versions = _versions(model)
    known, found = _hashes.get(model, (None, ""))
    if versions is None or versions != known:
        with WeightsHash() as hashing:
            for name, tensor in sorted(model.state_dict().items()):
                hashing.add(name, tensor)
            found = hashing.hexdigest()
        _hashes[model] = versions, found
    return found


def remember_hash(model: nn.Module, found: str) -> None:
    """Notes the hash of a model's weights as they are."""
    _hashes[model] = _versions(model), found


def _versions(model: nn.Module) -> list[tuple[int, int]] | None:
    """Memory and version of each tensor; None for tensors of inference mode, which have no versions."""
    tensors: list[Tensor] = list(model.state_dict(keep_vars=True).values())
    if any(tensor.is_inference() for tensor in tensors):
        return None
    return [(tensor.data_ptr(), tensor._version) for tensor in tensors]
