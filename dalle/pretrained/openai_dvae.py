"""OpenAI's dVAE: encoder.pkl and decoder.pkl of github.com/openai/DALL-E, or a state dict of both.

The published files are whole modules, written by an old torch: newer ones refuse them, or fail in Upsample. Here
the modules are read as data. Names of the parameters are those of dalle.dvae, so nothing is renamed; what has no
parameters (poolings, the gain of the residual paths) is compared with what our modules do.

The files hold fp32 weights. OpenAI's code runs most convolutions in half precision on a GPU; this one does not
unless it is under autocast, so that tokens on CPU and GPU agree but for near ties.
"""

import math
from pathlib import Path

from torch import Tensor

from dalle.dvae import DVAE, DVAEConfig
from dalle.pretrained.family import CheckpointFormat, Shapes, load_weights
from dalle.pretrained.torch_file import SavedFile, StandIn, attributes, read_torch_file, weights_of

PARTS = ("encoder", "decoder")
LICENCE = "modified MIT, of github.com/openai/DALL-E"


def configure(shapes: Shapes) -> DVAEConfig:
    """Sizes from the shapes; ValueError for one half alone, or what is no dVAE of this kind."""
    halves = [part for part in PARTS if f"{part}.blocks.input.w" in shapes]
    if halves != list(PARTS):
        raise ValueError(
            f"only the {halves[0]} of OpenAI's dVAE is there; put encoder.pkl and decoder.pkl in one folder"
            if halves
            else "no blocks.input.w: not OpenAI's dVAE"
        )
    groups = 0
    while f"encoder.blocks.group_{groups + 1}.block_1.res_path.conv_4.w" in shapes:
        groups += 1
    blocks = 0
    while f"encoder.blocks.group_1.block_{blocks + 1}.res_path.conv_4.w" in shapes:
        blocks += 1
    if not groups or "encoder.blocks.output.conv.w" not in shapes:
        raise ValueError("the encoder lacks its blocks or its output: not OpenAI's dVAE")
    return DVAEConfig(
        widths=tuple(
            shapes[f"encoder.blocks.group_{i + 1}.block_1.res_path.conv_4.w"][0] for i in range(groups)
        ),
        blocks_per_group=blocks,
        downsample_factor=2 ** (groups - 1),
        vocab_size=shapes["encoder.blocks.output.conv.w"][0],
        codebook_dim=shapes["decoder.blocks.input.w"][0],
    )


FAMILY = CheckpointFormat(
    name="OpenAI dVAE",
    kind="image tokenizer",
    licence=LICENCE,
    marks=("*blocks.group_1.block_1.res_path.conv_1.w",),
    configure=configure,
    build=DVAE,
    vocabulary=lambda config: (
        f"{config.vocab_size} codes, {config.downsample_factor} x {config.downsample_factor} pixels each"
    ),
)


def gather(path: Path) -> dict[str, Tensor]:
    """Tensors of a folder of encoder.pkl and decoder.pkl, or of one file; which half it is, their names tell.

    Raises:
        ValueError: a file that cannot be read, or modules that compute something else than ours.
    """
    files = [path]
    if path.is_dir():
        files = [path / f"{part}.pkl" for part in PARTS]
        if missing := [file.name for file in files if not file.is_file()]:
            raise ValueError(f"{path} has no {missing[0]}; both encoder.pkl and decoder.pkl are needed")
    tensors: dict[str, Tensor] = {}
    for file in files:
        saved = read_torch_file(file)
        _check_module(saved)
        tensors |= whole_names(weights_of(saved.tree))
    return tensors


def load(path: Path) -> DVAE:
    """The dVAE of such a folder or file."""
    return load_weights(FAMILY, gather(path), path)


def whole_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """blocks.* of one half -> encoder.blocks.* or decoder.blocks.*; DALLE-pytorch says enc and dec."""
    if "blocks.input.w" in tensors:
        kernel = tensors["blocks.input.w"].shape[-1]
        return {
            f"{'encoder' if kernel > 1 else 'decoder'}.{name}": tensor for name, tensor in tensors.items()
        }
    full = {"enc": "encoder", "dec": "decoder"}
    words = {name: name.partition(".") for name in tensors}
    return {
        f"{full.get(words[name][0], words[name][0])}.{words[name][2]}": tensor
        for name, tensor in tensors.items()
    }


def _check_module(saved: SavedFile) -> None:
    """A whole module says what it computes: its poolings and gains must be those of the release."""
    if not isinstance(saved.tree, StandIn):
        return
    groups = {
        name: part for name, part in _children(saved.tree, "blocks").items() if name.startswith("group_")
    }
    resizes = sum(inner in ("pool", "upsample") for group in groups.values() for inner in attributes(group))
    if groups and resizes != len(groups) - 1:
        raise ValueError(
            f"{saved.path}: {resizes} poolings in {len(groups)} groups; OpenAI's has one fewer than groups"
        )
    blocks = [
        block
        for group in groups.values()
        for block in attributes(group).values()
        if isinstance(block, StandIn)
    ]
    gains = [block.state["post_gain"] for block in blocks if "post_gain" in (block.state or {})]
    if any(not math.isclose(gain, len(gains) ** -2) for gain in gains):
        raise ValueError(
            f"{saved.path}: a residual gain of {gains[0]}, expected {len(gains) ** -2} for {len(gains)} blocks"
        )


def _children(module: StandIn, name: str) -> dict[str, StandIn]:
    inner = attributes(module).get(name)
    return attributes(inner) if isinstance(inner, StandIn) else {}
