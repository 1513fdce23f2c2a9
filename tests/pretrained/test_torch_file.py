"""Files of other programs, read without running them: equal to torch where torch can, refused where it is hostile."""

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dalle.pretrained.pickle_names import Held, SavedTensor
from dalle.pretrained.safe_pickle import Forbidden, read_pickle
from dalle.pretrained.torch_file import _Storages, read_torch_file, weights_of

# --------------------------------------------------------------------------------- files of torch


def example() -> dict[str, Any]:
    base = torch.arange(24, dtype=torch.float32).view(4, 6)
    state = OrderedDict(
        whole=base, part=base[1:3, 2:], turned=base.T, scalar=torch.tensor(3.5), none=torch.empty(0, 3)
    )
    for dtype in (
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
    ):
        state[str(dtype)] = torch.arange(-2, 3).to(dtype)
    state |= {"bytes": torch.tensor([0, 255], dtype=torch.uint8), "bools": torch.tensor([True, False])}
    state["parameter"] = nn.Parameter(torch.ones(2))
    extra = {"epoch": 3, "hparams": {"dim": 8, "names": ("a", "b"), "rate": 1e-4, "on": True, "off": None}}
    return {
        "state_dict": state,
        **extra,
        "tags": {"x"},
        "big": 2**70,
        "raw": b"\x00\xff",
        "size": torch.Size([2, 3]),
    }


def same(found: Any, expected: Any) -> bool:
    if isinstance(found, SavedTensor):
        value = found.read()
        assert (
            (found.dtype, found.shape)
            == (value.dtype, tuple(value.shape))
            == (expected.dtype, expected.shape)
        )
        assert value.is_contiguous()
        return torch.equal(value, expected.detach())
    if isinstance(found, dict):
        return found.keys() == expected.keys() and all(same(found[key], expected[key]) for key in found)
    return found == expected and type(found) in (type(expected), tuple)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_torch_saved_is_what_torch_loads(tmp_path: Path, zipped: bool, protocol: int) -> None:
    file = tmp_path / "file.pt"
    torch.save(example(), file, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    saved = read_torch_file(file)
    assert saved.container == ("torch zip" if zipped else "torch legacy")
    reference = (
        torch.load(file, weights_only=True) if protocol == 2 else example()
    )  # torch itself reads no other
    assert same(saved.tree, reference)


@pytest.mark.parametrize("protocol", range(6))
def test_a_bare_pickle(tmp_path: Path, protocol: int) -> None:
    (tmp_path / "file.pkl").write_bytes(pickle.dumps(example(), protocol))
    saved = read_torch_file(tmp_path / "file.pkl")
    assert saved.container == "pickle"
    assert same(saved.tree, example())


def test_safetensors(tmp_path: Path) -> None:
    state = {"a.weight": torch.randn(3, 2), "b": torch.tensor([1, 2])}
    save_file(state, tmp_path / "file.safetensors")
    saved = read_torch_file(tmp_path / "file.safetensors")
    assert saved.container == "safetensors"
    assert same(saved.tree, state)


def test_new_number_formats(tmp_path: Path) -> None:
    state = {"a": torch.tensor([1, 65535], dtype=torch.uint16)}
    torch.save(state, tmp_path / "file.pt")
    assert torch.equal(read_torch_file(tmp_path / "file.pt").tree["a"].read(), state["a"])


def test_views_share_their_storage(tmp_path: Path) -> None:
    base = torch.zeros(1000)
    torch.save({"a": base, "b": base}, tmp_path / "file.pt")
    tree = read_torch_file(tmp_path / "file.pt").tree
    assert tree["a"].read().data_ptr() == tree["b"].read().data_ptr()


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 3).half()
        self.register_buffer("resolution", torch.tensor(224))

    def forward(self, x):
        return self.fc(x)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_the_weights_of_a_torchscript_archive(tmp_path: Path) -> None:
    model = nn.Sequential(Inner(), nn.LayerNorm(3))
    torch.jit.save(torch.jit.script(model), tmp_path / "file.pt")
    saved = read_torch_file(tmp_path / "file.pt")
    assert saved.container == "TorchScript"
    assert same(weights_of(saved.tree), model.state_dict())


@pytest.mark.parametrize("key", [None, "state_dict", "weights", "model", "ema", "module"])
def test_weights_are_found_under_the_keys_that_programs_use(tmp_path: Path, key: str | None) -> None:
    state = {"a.weight": torch.ones(2)}
    torch.save({key: state, "epoch": 1} if key else state, tmp_path / "file.pt")
    assert list(weights_of(read_torch_file(tmp_path / "file.pt").tree)) == ["a.weight"]


def test_what_trainers_leave_beside_the_weights_is_held_as_data(tmp_path: Path) -> None:
    code = (
        b"\x80\x02}(X\x09\x00\x00\x00callbacks}cpytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint\nN"
        b"sX\x04\x00\x00\x00confcomegaconf.dictconfig\nDictConfig\n)\x81}X\x01\x00\x00\x00aK\x01sbu."
    )
    tree = read_pickle(io.BytesIO(code))
    assert isinstance(tree["conf"], Held)
    assert (tree["conf"].kind, tree["conf"].state) == ("omegaconf.dictconfig.DictConfig", {"a": 1})


# --------------------------------------------------------------------------------- hostile files


class Call:
    """Pickles as a call."""

    def __init__(self, function: Callable, *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


def attacks(marker: Path) -> dict[str, Any]:
    import subprocess

    command = f"touch {marker}"
    return {
        f"{os.name}.system": Call(os.system, command),
        "eval": Call(eval, f"open({str(marker)!r}, 'w')"),
        "exec": Call(exec, f"open({str(marker)!r}, 'w')"),
        "Popen": Call(subprocess.Popen, command, -1),  # protocols 0 to 2 call its module `commands`
        "torch.hub.load": Call(torch.hub.load, str(marker.parent), "hubconf"),
        "getattr": Call(getattr, str, "join"),
        "torch.serialization.load": Call(torch.load, str(marker)),
        "numpy.load": Call(np.load, str(marker), None, True),
        "open": Call(open, str(marker), "w"),
        "__import__": Call(__import__, "antigravity"),
    }


WRITERS: dict[str, Callable[[Any, Path, int], Any]] = {
    "bare": lambda value, path, protocol: path.write_bytes(pickle.dumps(value, protocol)),
    "zip": lambda value, path, protocol: torch.save(value, path, pickle_protocol=max(protocol, 2)),
    "legacy": lambda value, path, protocol: torch.save(
        value, path, pickle_protocol=max(protocol, 2), _use_new_zipfile_serialization=False
    ),
}


@pytest.mark.parametrize("container", WRITERS)
@pytest.mark.parametrize("protocol", range(6))
def test_a_file_that_would_run_code_is_refused_and_names_it(
    tmp_path: Path, container: str, protocol: int
) -> None:
    marker = tmp_path / "ran"
    for name, attack in attacks(marker).items():
        WRITERS[container](
            {"state_dict": {"w": torch.ones(2)}, "x": [attack]}, tmp_path / "file.pt", protocol
        )
        with pytest.raises(Forbidden, match=name):
            read_torch_file(tmp_path / "file.pt")
    assert not marker.exists()


BY_HAND = {  # an instruction each; "posix.system" is the name as it stands in the file
    "REDUCE": b"\x80\x02cposix\nsystem\nX\x02\x00\x00\x00ls\x85R.",
    "STACK_GLOBAL": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x02ls\x85R.",
    "INST": b"(X\x02\x00\x00\x00lsiposix\nsystem\n.",
    "OBJ": b"(cposix\nsystem\nX\x02\x00\x00\x00lso.",
    "NEWOBJ": b"\x80\x02cposix\nsystem\nX\x02\x00\x00\x00ls\x85\x81.",
    "NEWOBJ_EX": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x02ls\x85}\x92.",
    "BUILD": b"\x80\x02cposix\nsystem\n)\x81}X\x04\x00\x00\x00__x_K\x01sb.",
    "as a value": b"\x80\x02}X\x01\x00\x00\x00acposix\nsystem\ns.",
    "as __setstate__": (
        b"\x80\x02ctorch.nn.modules.container\nSequential\n)\x81}X\x0c\x00\x00\x00__setstate__"
        b"cposix\nsystem\nsbX\x02\x00\x00\x00lsb."
    ),
    "popped": b"\x80\x02cposix\nsystem\nX\x02\x00\x00\x00ls\x85R0N.",
    "before damage": b"\x80\x02cposix\nsystem\nX\x02\x00\x00\x00ls\x85RRRR",
    "through memo": b"\x80\x02cposix\nsystem\nq\x000h\x00X\x02\x00\x00\x00ls\x85R.",
}


@pytest.mark.parametrize("instruction", BY_HAND)
def test_each_instruction_that_could_call_is_refused(tmp_path: Path, instruction: str) -> None:
    (tmp_path / "file.pkl").write_bytes(BY_HAND[instruction])
    with pytest.raises(Forbidden, match=r"posix\.system.*nothing of it was run"):
        read_torch_file(tmp_path / "file.pkl")


def test_chains_of_getattr_and_dotted_names_are_refused() -> None:
    chain = b"\x80\x04\x8c\x08builtins\x8c\x07getattr\x93\x8c\x05torch\x8c\x03hub\x93\x8c\x04load\x86R."
    with pytest.raises(Forbidden, match=r"builtins\.getattr, torch\.hub"):
        read_pickle(io.BytesIO(chain))
    dotted = b"\x80\x04\x8c\x0dtorch._utils\x8c\x2a_rebuild_tensor_v2.__globals__.__getitem__x.93\x93."
    with pytest.raises(ValueError):  # noqa: PT011, no allowed name begins so; whichever refusal
        read_pickle(io.BytesIO(dotted))


def test_a_name_cannot_write_on_the_terminal() -> None:
    with pytest.raises(Forbidden) as caught:
        read_pickle(io.BytesIO(b"\x80\x04\x8c\x01m\x8c\x05\x1b[31m\x93."))
    assert "\x1b" not in str(caught.value)


def test_a_storage_inside_a_bare_pickle_cannot_hide_a_call(tmp_path: Path) -> None:
    inner = io.BytesIO()
    torch.save(Call(os.system, "ls"), inner, _use_new_zipfile_serialization=False)
    outer = pickle.dumps(Call(torch.storage._load_from_bytes, inner.getvalue()))
    (tmp_path / "file.pkl").write_bytes(outer)
    with pytest.raises(Forbidden, match=f"{os.name}.system"):
        read_torch_file(tmp_path / "file.pkl")


def test_encodings_cannot_unpack() -> None:
    with pytest.raises(ValueError, match="encoding 'zip'"):
        read_pickle(io.BytesIO(b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00zip\x86R."))


# --------------------------------------------------------------------------------- broken files


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"hello, this is a text file\n", "text file"),
        (b"<!DOCTYPE html><html>", "download that failed"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git LFS"),
        (b"\x1f\x8b\x08\x00", "gzip"),
        (b"\x00" * 257 + b"ustar", "tar"),
        (b"PK\x03\x04" + b"\x00" * 40, "zip"),
        (struct.pack("<Q", 20) + b'{"a": not json at all', "safetensors"),
        (b"\x80\x02K\x01", "broken pickle"),
        (b"\x80\x02\x82\x01.", "EXT1"),
        (b"\x80\x02}X\x01\x00\x00\x00aQ.", "outside of the file|reference"),
        (b"\x80\x02(]h\x00", "broken pickle"),
    ],
)
def test_what_is_no_file_of_weights_is_told(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=said):
        read_torch_file(tmp_path / "file")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no file"):
        read_torch_file(tmp_path / "nothing.pt")


def everything(path: Path) -> None:
    for tensor in weights_of(read_torch_file(path).tree).values():
        tensor.read()


@pytest.mark.parametrize("container", [*WRITERS, "safetensors"])
def test_truncated_or_changed_it_is_read_or_refused_with_a_sentence(tmp_path: Path, container: str) -> None:
    file, broken = tmp_path / "file", tmp_path / "broken"
    state = {"a": torch.arange(6.0), "b": torch.ones(2, 2).half()}
    if container == "safetensors":
        save_file(state, file)
    else:
        WRITERS[container](state, file, 2)
    content = file.read_bytes()
    for length in range(1, len(content) - 1, max(1, len(content) // 30)):
        broken.write_bytes(content[:length])
        with pytest.raises(ValueError, match="broken"):
            everything(broken)
    draw = np.random.default_rng(0)
    for _ in range(100):
        changed = bytearray(content)
        for place in draw.integers(len(content), size=3):
            changed[place] = draw.integers(256)
        broken.write_bytes(changed)
        assert told(broken) in (None, True)


def told(path: Path) -> bool | None:
    """Whether the refusal names the file; None if it was read."""
    try:
        everything(path)
    except ValueError as error:
        return path.name in str(error)


def rezip(source: Path, target: Path, change: Callable[[zipfile.ZipFile, str, bytes], None]) -> None:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            change(new, name, old.read(name))


def test_a_zip_bomb_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(300_000)}, tmp_path / "file.pt")
    bomb = tmp_path / "bomb.pt"
    for packed in ("data.pkl", "data/0"):
        rezip(
            tmp_path / "file.pt",
            bomb,
            lambda new, name, data, packed=packed: new.writestr(
                name, data, zipfile.ZIP_DEFLATED if name.endswith(packed) else zipfile.ZIP_STORED
            ),
        )
        with pytest.raises(ValueError, match="zip bomb"):
            read_torch_file(bomb)


def test_a_zip_with_two_members_of_one_name_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(3)}, tmp_path / "file.pt")

    def twice(new: zipfile.ZipFile, name: str, data: bytes) -> None:
        new.writestr(name, data)
        if name.endswith("data/0"):
            with pytest.warns(UserWarning, match="Duplicate"):
                new.writestr(name, data)

    rezip(tmp_path / "file.pt", tmp_path / "twice.pt", twice)
    with pytest.raises(ValueError, match="two members of one name"):
        read_torch_file(tmp_path / "twice.pt")


def test_a_changed_storage_is_noticed(tmp_path: Path) -> None:
    torch.save({"a": torch.full((50,), 7.25)}, tmp_path / "file.pt")
    content = (tmp_path / "file.pt").read_bytes()
    place = content.index(struct.pack("<f", 7.25) * 20)
    (tmp_path / "file.pt").write_bytes(content[:place] + b"\x01" + content[place + 1 :])
    with pytest.raises(ValueError, match="CRC"):
        everything(tmp_path / "file.pt")


def storage_call(offset: int, shape: tuple, stride: tuple) -> bytes:
    """A zip's data.pkl with one tensor over a storage of 4 numbers."""

    class Rebuild:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (
                torch.zeros(4),
                offset,
                shape,
                stride,
                False,
                OrderedDict(),
            )

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", 4) if isinstance(value, torch.Tensor) else None

    buffer = io.BytesIO()
    Pickler(buffer, 2).dump({"a": Rebuild()})
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("offset", "shape", "stride"),
    [
        (1, (4,), (1,)),
        (0, (2, 3), (3, 1)),
        (0, (2,), (-1,)),
        (-1, (2,), (1,)),
        (0, (10**6, 10**6), (0, 0)),
        (0, (2,), ()),
    ],
)
def test_a_tensor_beyond_its_storage_is_refused(
    tmp_path: Path, offset: int, shape: tuple, stride: tuple
) -> None:
    torch.save({"a": torch.zeros(4)}, tmp_path / "file.pt")
    hostile = storage_call(offset, shape, stride)
    rezip(
        tmp_path / "file.pt",
        tmp_path / "bad.pt",
        lambda new, name, data: new.writestr(name, hostile if name.endswith("data.pkl") else data),
    )
    with pytest.raises(ValueError, match="tensor"):
        read_torch_file(tmp_path / "bad.pt")


def test_values_that_hold_themselves_end() -> None:
    laughs = b"\x80\x02K\x01" + b"2\x86" * 60 + b"."
    assert read_pickle(io.BytesIO(laughs))
    nested = b")" + b"2\x86" * 60
    for content in (
        nested + b"Q",
        nested + b")R",
        b"}" + nested + b"K\x01s",
        b"\x8f(" + nested + b"\x90",
        b"(" + nested + b"\x91",
        b"cbuiltins\nset\n]" + nested + b"a\x85R",
        b"ctorch\ndevice\n" + nested + b"\x85R",
        b"c_codecs\nencode\nX\x01\x00\x00\x00a" + nested + b"\x86R",
    ):
        with pytest.raises(ValueError, match=r"reference to|call of|tuple of tuples|encoding|a device"):
            read_pickle(
                io.BytesIO(b"\x80\x04" + content + b"."), _Storages(Path("x"), lambda key, size: bytearray())
            )
    module = Held("torch.nn.modules.container.Sequential")
    module.state = {"_modules": {"a": module, "b": module}}
    with pytest.raises(ValueError, match="holds itself"):
        weights_of(module)
    tree: dict[str, Any] = {}
    tree["model"] = tree
    assert weights_of(tree) == {}
