"""Files of other programs, read without running code; hostile ones refused by name."""

import os
import pickle
import struct
import subprocess
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dalle.io.pickle_scan import Forbidden
from dalle.io.torch_file import StandIn, read_torch_file, weights_of
from tests.helpers.hostile import Call


def example():
    base = torch.arange(24, dtype=torch.float32).view(4, 6)
    state = OrderedDict(
        whole=base, part=base[1:3, 2:], turned=base.T, scalar=torch.tensor(3.5), none=torch.empty(0, 3)
    )
    for name in ("float64", "float16", "bfloat16", "int64", "int32", "int16", "int8"):
        state[name] = torch.arange(-2, 3).to(getattr(torch, name))
    state |= {"bytes": torch.tensor([0, 255], dtype=torch.uint8), "bools": torch.tensor([True, False])}
    state |= {"parameter": nn.Parameter(torch.ones(2)), "shared": base}
    hparams = {"dim": 8, "names": ("a", "b"), "rate": 1e-4, "on": True, "off": None}
    other = {"tags": {"x"}, "big": 2**70, "raw": b"\x00\xff", "size": torch.Size([2, 3])}
    return {"state_dict": state, "hparams": hparams, **other}


assert_equal = partial(torch.testing.assert_close, rtol=0, atol=0)
WRITERS: dict[str, Callable[[Any, Path, int], Any]] = {
    "bare": lambda value, path, protocol: path.write_bytes(pickle.dumps(value, protocol)),
    "zip": lambda value, path, protocol: torch.save(value, path, pickle_protocol=max(protocol, 2)),
    "legacy": lambda value, path, protocol: torch.save(
        value, path, pickle_protocol=max(protocol, 2), _use_new_zipfile_serialization=False
    ),
}


@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_torch_files(tmp_path, container):
    content = example()
    if container == "zip":
        content["state_dict"]["new"] = torch.tensor([1, 65535], dtype=torch.uint16)
    WRITERS[container](content, tmp_path / "file.pt", 2)
    tree = read_torch_file(tmp_path / "file.pt").tree
    state = tree.pop("state_dict")
    assert state["whole"].data_ptr() == state["shared"].data_ptr()
    assert_equal(state, content.pop("state_dict"))
    assert tree == content


@pytest.mark.parametrize("zipped", [True, False])
def test_whole_modules_become_stand_ins(tmp_path, zipped, monkeypatch):
    """A legacy file keeps the source of each class next to it, here once for two modules."""
    module = types.ModuleType("lightning.encoder")
    (tmp_path / "encoder.py").write_text("from torch import nn\nclass Encoder(nn.Sequential):\n    pass\n")
    exec(compile((tmp_path / "encoder.py").read_text(), tmp_path / "encoder.py", "exec"), vars(module))
    module.__file__ = str(tmp_path / "encoder.py")
    for name in ("lightning", "lightning.encoder"):
        monkeypatch.setitem(sys.modules, name, module)
    torch.manual_seed(0)
    whole = module.Encoder(module.Encoder(nn.Upsample(scale_factor=2)), nn.ReLU(), nn.MaxPool2d(2))
    whole.w = whole[0].w = nn.Parameter(torch.randn(3, 2))
    torch.save(whole, tmp_path / "encoder.pkl", _use_new_zipfile_serialization=zipped)
    monkeypatch.delitem(sys.modules, "lightning.encoder")
    saved = read_torch_file(tmp_path / "encoder.pkl")
    assert isinstance(saved.tree, StandIn)
    assert_equal(weights_of(saved.tree), dict(whole.state_dict()))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_the_weights_of_a_torchscript_archive(tmp_path):
    model = nn.Sequential(nn.Linear(2, 3).half(), nn.BatchNorm1d(3))
    torch.jit.save(torch.jit.script(model), tmp_path / "file.pt")
    saved = read_torch_file(tmp_path / "file.pt")
    assert saved.container == "TorchScript"
    assert_equal(weights_of(saved.tree), dict(model.state_dict()))


@pytest.mark.parametrize("key", [None, "state_dict", "weights", "model", "ema", "module"])
def test_weights_under_the_keys_of_other_programs(tmp_path, key):
    state = {"a.weight": torch.ones(2)}
    torch.save({key: state, "epoch": 1} if key else state, tmp_path / "file.pt")
    assert list(weights_of(read_torch_file(tmp_path / "file.pt").tree)) == ["a.weight"]


def rezip(path, code=None, deflated="/", twice=None):
    """A copy of a torch zip with another data.pkl, a member that is deflated, or a second data/0."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(path.with_suffix(".new"), "w") as new:
        for name in old.namelist():
            data = code if code and name.endswith("data.pkl") else old.read(name)
            new.writestr(name, data, zipfile.ZIP_DEFLATED if name.endswith(deflated) else zipfile.ZIP_STORED)
            if twice and name.endswith("data/0"):
                new.writestr(name.replace("data/0", twice), data)
    return path.with_suffix(".new")


def packed(code, path):
    """A torch zip with `code` as its data.pkl."""
    torch.save({"a": torch.zeros(4)}, path)
    return rezip(path, code)


def test_objects_of_trainers_are_data(tmp_path):
    code = (
        b"\x80\x02}(X\x09\x00\x00\x00callbacks}cpytorch_lightning.callbacks.model_checkpoint\n"
        b"ModelCheckpoint\nNsX\x04\x00\x00\x00confcomegaconf.dictconfig\nDictConfig\n)"
        b"\x81}X\x01\x00\x00\x00aK\x01sbX\x02\x00\x00\x00hpclightning.fabric\nAttributeDict\n)\x81X\x01\x00\x00\x00bK\x02su."
    )
    tree = read_torch_file(packed(code, tmp_path / "file.pt")).tree
    assert tree["conf"].state == {"a": 1}
    assert tree["hp"] == {"b": 2}


def attacks(marker):
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
        r"torch\.storage\._load_from_bytes": Call(torch.storage._load_from_bytes, b"another pickle"),
    }


@pytest.mark.parametrize("container", WRITERS)
@pytest.mark.parametrize("protocol", range(6))
def test_a_file_that_would_run_code_is_refused_by_name(tmp_path, container, protocol):
    marker, file = tmp_path / "ran", tmp_path / "file.pt"
    for name, attack in attacks(marker).items():
        WRITERS[container]({"state_dict": {"w": torch.ones(2)}, "x": [attack]}, file, protocol)
        with pytest.raises(Forbidden, match=name):
            read_torch_file(file)
    assert not marker.exists()


@pytest.mark.parametrize("container", WRITERS)
@pytest.mark.parametrize("protocol", [0, 4])
def test_other_protocols(tmp_path, container, protocol):
    """torch.load(weights_only=True) reads protocol 2, which torch.save writes, and no bare pickle."""
    WRITERS[container]({"state_dict": {"w": 1}}, tmp_path / "file.pt", protocol)
    if container != "bare" and protocol < 2:
        assert read_torch_file(tmp_path / "file.pt").tree == {"state_dict": {"w": 1}}
    else:
        with pytest.raises(ValueError, match=r"a pickle (with protocol|that torch.save did not write)"):
            read_torch_file(tmp_path / "file.pt")


BY_HAND = {  # an instruction each; "posix.system" is the name as it stands in the file
    "REDUCE": b"\x80\x02cposix\nsystem\nX\x02\x00\x00\x00ls\x85R.",
    "STACK_GLOBAL": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x02ls\x85R.",
    "STACK_GLOBAL by memo": b"\x80\x04\x8c\x05posix\x940\x8c\x06system\x940h\x00h\x01\x93\x8c\x02ls\x85R.",
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
def test_each_instruction_that_could_call_is_refused(tmp_path, instruction):
    (tmp_path / "file.pkl").write_bytes(BY_HAND[instruction])
    for file in (tmp_path / "file.pkl", packed(BY_HAND[instruction], tmp_path / "file.pt")):
        with pytest.raises(Forbidden, match=r"posix\.system.*nothing of it was run"):
            read_torch_file(file)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (b"\x8c\x08builtins\x8c\x07getattr\x93\x8c\x05torch\x8c\x03hub\x93", r"getattr, torch\.hub"),
        (b"\x8c\x0ctorch._utils\x8c\x22_rebuild_tensor_v2.__globals__.get\x93", r"v2\.__globals__"),
        (b"\x8c\x01m\x8c\x05\x1b[31m\x93", r"m\.\\x1b\[31m"),  # cannot write on the terminal
    ],
)
def test_names_are_read_literally(tmp_path, code, message):
    with pytest.raises(Forbidden, match=message) as caught:
        read_torch_file(packed(b"\x80\x04" + code + b".", tmp_path / "file.pt"))
    assert "\x1b" not in str(caught.value)


NESTED = b"K\x01" + b"q\x00h\x00\x86" * 60  # a tuple of 2 to the 60th values, by 180 instructions


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (b"c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00zip\x86R.", "encoding .*zip"),
        (
            b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x04\x00\x00\x00idnaX\x00\x00\x00\x00tR.",
            "encoding .*idna",
        ),
        (b"cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.", r"asks for builtins\.bytearray"),
        (b"ctorch\nFloatStorage\nJ\xff\xff\xff\x7f\x85R.", "no function"),
        (b"ctorch\nSize\n)\x85R}b.", "attributes"),
        (b"}" + NESTED + b"K\x01s.", "a tuple of more than"),
        (b"cbuiltins\nset\n]" + NESTED + b"a\x85R.", "a tuple of more than"),
        (b")" + b"\x85" * 100_000 + b".", "a tuple of more than"),
        (b"K\x01" + b"2\x86" * 60 + b".", "an empty stack"),
        (b"\x82\x01.", "Unsupported"),
        (b"X\x01\x00\x00\x00aQ.", "outside of the file"),
    ],
)
def test_what_torch_would_hang_on_or_allocate_is_refused(tmp_path, code, message):
    with pytest.raises(ValueError, match=message):
        read_torch_file(packed(b"\x80\x02" + code, tmp_path / "file.pt"))


def test_recursive_values():
    module = StandIn()
    module.state = {"_modules": {"a": module, "b": module}}
    with pytest.raises(ValueError, match="holds itself"):
        weights_of(module)
    tree: dict[str, Any] = {}
    tree["model"] = tree
    assert weights_of(tree) == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"hello, this is a text file\n", "text file"),
        (b"<!DOCTYPE html><html>", "download that failed"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git LFS"),
        (b"\x1f\x8b\x08\x00", "gzip"),
        (b"\x00" * 257 + b"ustar", "tar"),
        (b"PK\x03\x04" + b"\x00" * 40, "zip"),
        (struct.pack("<Q", 20) + b'{"a": not json at all', "invalid JSON"),
        (b"\x80\x02K\x01", "broken pickle"),
        (b"\x80\x02\x82\x01.", "torch.save did not write"),
        (b"\x80\x02(]h\x00", "broken pickle"),
        (None, "no file"),
    ],
)
def test_other_files(tmp_path, content, message):
    if content is not None:
        (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_torch_file(tmp_path / "file")


@pytest.mark.parametrize("size", [5, 8, 9, 40, -1])
def test_a_truncated_safetensors_file_is_named_so(tmp_path, size):
    save_file({"a": torch.zeros(3)}, tmp_path / "file.safetensors")
    (tmp_path / "file.safetensors").write_bytes((tmp_path / "file.safetensors").read_bytes()[:size])
    with pytest.raises(ValueError, match="truncated or damaged"):
        read_torch_file(tmp_path / "file.safetensors")


def test_wrappers_are_not_part_of_a_name():
    names = ["module._orig_mod.a", "model.b._orig_mod.c", "_fsdp_wrapped_module.d._fsdp_wrapped_module.e"]
    assert list(weights_of(dict.fromkeys(names, torch.zeros(1)))) == ["a", "b.c", "d.e"]
    both = {"module.a": torch.zeros(1), "a": torch.ones(1)}
    assert list(weights_of(both)) == ["module.a", "a"]


@pytest.mark.parametrize("container", ["zip", "legacy", "safetensors"])
def test_a_truncated_or_changed_file_is_read_or_refused(tmp_path, container):
    file, broken = tmp_path / "file", tmp_path / "broken"
    state = {"a": torch.arange(6.0), "b": torch.ones(2, 2).half()}
    save_file(state, file) if container == "safetensors" else WRITERS[container](state, file, 2)
    saved, content = read_torch_file(file), file.read_bytes()
    assert saved.container.endswith(container)
    assert_equal(saved.tree, state)

    def read(data):
        broken.write_bytes(data)
        for tensor in weights_of(read_torch_file(broken).tree).values():
            tensor.clone()

    for length in range(1, len(content) - 1, len(content) // 30):
        with pytest.raises(ValueError, match="broken"):
            read(content[:length])
    random = np.random.default_rng(0)
    for _ in range(100):
        changed = bytearray(content)
        for position in random.integers(len(content), size=3):
            changed[position] = random.integers(256)
        message = broken.name
        try:
            read(changed)
        except ValueError as error:
            message = str(error)
        assert broken.name in message


@pytest.mark.filterwarnings("ignore:Duplicate")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"deflated": "data.pkl"}, "zip bomb"),
        ({"deflated": "data/0"}, "zip bomb"),
        ({"twice": "data/0"}, "two members of one name"),
        ({"twice": "DATA/0"}, "two members of one name"),
    ],
)
def test_a_zip_that_torch_save_did_not_write_is_refused(tmp_path, change, message):
    torch.save({"a": torch.zeros(300_000)}, tmp_path / "file.pt")
    with pytest.raises(ValueError, match=message):
        read_torch_file(rezip(tmp_path / "file.pt", **change))


def test_a_changed_storage_is_refused(tmp_path):
    torch.save({"a": torch.full((50,), 7.25)}, tmp_path / "file.pt")
    content = (tmp_path / "file.pt").read_bytes()
    (tmp_path / "file.pt").write_bytes(content.replace(struct.pack("<f", 7.25), struct.pack("<f", 7.5), 1))
    with pytest.raises(ValueError, match="CRC"):
        read_torch_file(tmp_path / "file.pt")


def tensor_pickle(count, *sizes):
    """A data.pkl with one tensor over a storage of `count` numbers."""
    values = ("storage", torch.FloatStorage, "0", "cpu", count), *sizes, False, OrderedDict()
    storage, *rest = (pickle.dumps(value, 2)[2:-1] for value in values)
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"Q" + b"".join(rest) + b"tR."


@pytest.mark.parametrize(
    ("count", "offset", "shape", "stride"),
    [
        (4, 1, (4,), (1,)),
        (4, 0, (2, 3), (3, 1)),
        (4, 0, (2,), (-1,)),
        (4, -1, (2,), (1,)),
        (4, 0, (10**6, 10**6), (0, 0)),
        (4, 0, (2,), ()),
        (3, 0, (3,), (1,)),
        (10**12, 0, (4,), (1,)),
    ],
)
def test_sizes_beyond_the_file_are_refused(tmp_path, count, offset, shape, stride):
    with pytest.raises(ValueError, match=r"file\.new is refused|file\.new cannot be read"):
        read_torch_file(packed(tensor_pickle(count, offset, shape, stride), tmp_path / "file.pt"))


def test_a_legacy_file_that_claims_more_than_it_has_is_refused(tmp_path):
    torch.save({"a": torch.zeros(4)}, tmp_path / "file.pt", _use_new_zipfile_serialization=False)
    content = (tmp_path / "file.pt").read_bytes()
    (tmp_path / "file.pt").write_bytes(content.replace(b"cpuq\x06K\x04", b"cpuq\x06J\xff\xff\xff\x7f"))
    with pytest.raises(ValueError, match=f"a storage of {4 * 2147483647} bytes"):
        read_torch_file(tmp_path / "file.pt")
