"""OpenAI's dVAE: encoder.pkl and decoder.pkl of github.com/openai/DALL-E, or a state dict of both.

The published files are whole modules of an old torch, here read as data. Parameters have the names of
dalle.dvae; what has no parameters (poolings, residual gains) is compared with our modules. OpenAI's code runs
most convolutions in half precision on a GPU, this one only under autocast.
"""

import math
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from dalle.dvae import DVAE, DVAEConfig
from dalle.io.torch_file import SavedFile, attributes, read_torch_file, weights_of
from dalle.pretrained.family import CheckpointFormat, DetectedCheckpoint, Shapes, count_matches

HALVES = ("encoder", "decoder")


def infer_config(shapes: Shapes, found: DetectedCheckpoint) -> DVAEConfig:
    """Sizes from the shapes; ValueError for one half alone, or another model."""
    halves = [half for half in HALVES if f"{half}.blocks.input.w" in shapes]
    if len(halves) == 1:
        raise ValueError(f"only the {halves[0]} is there: put encoder.pkl and decoder.pkl in one folder")
    groups = count_matches(shapes, "encoder.blocks.group_*.block_1.res_path.conv_4.w")
    widths = [shapes[f"encoder.blocks.group_{i + 1}.block_1.res_path.conv_4.w"][0] for i in range(groups)]
    return DVAEConfig(
        widths=tuple(widths),
        blocks_per_group=count_matches(shapes, "encoder.blocks.group_1.block_*.res_path.conv_4.w"),
        downsample_factor=2 ** (groups - 1),
        vocab_size=shapes["encoder.blocks.output.conv.w"][0],
        codebook_dim=shapes["decoder.blocks.input.w"][0],
    )


FAMILY = CheckpointFormat(
    name="OpenAI dVAE",
    kind="image tokenizer",
    license="modified MIT, of github.com/openai/DALL-E",
    key_patterns=("*blocks.group_1.block_1.res_path.conv_1.w",),
    infer_config=infer_config,
    build=DVAE,
    renames=lambda names: {r"^(enc|dec)\.": r"\1oder."},
)


def read_folder(path: Path) -> dict[str, Tensor]:
    """Tensors of a folder with encoder.pkl and decoder.pkl; ValueError for other modules, or one alone."""
    halves = (read_tensors(read_torch_file(path / f"{half}.pkl")) for half in HALVES)
    return {name: tensor for half in halves for name, tensor in half.items()}


def read_tensors(saved: SavedFile) -> Mapping[str, Tensor]:
    """Tensors of one file, named encoder.blocks.* and decoder.blocks.*, or enc and dec (DALLE-pytorch)."""
    _check_module(saved)
    tensors = weights_of(saved.tree)
    if "blocks.input.w" in tensors:
        half = "encoder" if tensors["blocks.input.w"].shape[-1] > 1 else "decoder"
        return {f"{half}.{name}": tensor for name, tensor in tensors.items()}
    return tensors


def _check_module(saved: SavedFile) -> None:
    """ValueError for a whole module whose poolings or gains are not those of the release."""
    blocks = attributes(attributes(saved.tree).get("blocks"))
    groups = [attributes(group) for name, group in blocks.items() if name.startswith("group_")]
    resizes = sum(name in ("pool", "upsample") for group in groups for name in group)
    if groups and resizes != len(groups) - 1:
        raise ValueError(f"{saved.path}: {resizes} poolings in {len(groups)} groups, expected one fewer")
    states = [getattr(block, "state", None) or {} for group in groups for block in group.values()]
    gains = [state["post_gain"] for state in states if "post_gain" in state]
    if any(not math.isclose(gain, len(gains) ** -2) for gain in gains):
        raise ValueError(f"{saved.path}: a residual gain of {gains[0]}, expected {len(gains) ** -2}")
