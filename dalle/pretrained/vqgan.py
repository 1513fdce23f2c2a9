"""VQGAN files: of taming-transformers (also minDALL-E's first stage), ruDALL-E and LlamaGen.

All three are one network under two sets of names. taming's and ruDALL-E's come as Lightning checkpoints with the
losses of their training (VGG, a discriminator), which are left out; sizes come from shapes, for the YAML beside a
file is often lost. Gumbel models are known by `quantize.proj`. A file with another choice of codes under the same
names cannot be told apart: LlamaGen's unit vectors are known by its names alone.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from dalle.pretrained.family import CheckpointFormat, Shapes
from dalle.vqgan import VQGAN, VQGANConfig


def configure(shapes: Shapes, choice: str = "nearest") -> VQGANConfig:
    """Sizes from the shapes, by taming's names; ValueError for a codebook that was cut."""
    if "quantize.used" in shapes:
        raise ValueError(
            "its codes were numbered anew after training (quantize.used), which is not held here"
        )
    levels = _count(shapes, r"encoder\.down\.(\d+)\.block\.0\.conv1\.weight")
    blocks = _count(shapes, r"encoder\.down\.0\.block\.(\d+)\.conv1\.weight")
    if not levels or not blocks:
        raise ValueError("the encoder lacks its levels: half a VQGAN, or none")
    vocab_size, codebook_dim = shapes["quantize.embedding.weight"]
    return VQGANConfig(
        widths=tuple(shapes[f"encoder.down.{level}.block.0.conv1.weight"][0] for level in range(levels)),
        blocks=blocks,
        attention=tuple(
            level for level in range(levels) if f"encoder.down.{level}.attn.0.q.weight" in shapes
        ),
        latent=shapes["encoder.conv_out.weight"][0],
        codebook_dim=codebook_dim,
        vocab_size=vocab_size,
        choice="logits" if "quantize.proj.weight" in shapes else choice,
    )


def _count(names: Iterable[str], pattern: str) -> int:
    return len({match[1] for name in names if (match := re.fullmatch(pattern, name))})


TAMING = CheckpointFormat(
    name="VQGAN of taming-transformers",
    kind="image tokenizer",
    licence="not stated for taming's weights (its code is MIT), nor for minDALL-E's first stage (Apache-2.0)",
    marks=(
        "encoder.down.*.block.*.conv1.weight",
        "decoder.up.*.block.*.conv1.weight",
        "quantize.embedding.weight",
    ),
    configure=configure,
    build=VQGAN,
    vocabulary=lambda config: (
        f"{config.vocab_size} codes, {config.downsample_factor} x {config.downsample_factor} pixels each"
    ),
    ignored=("loss.*",),
)
GUMBEL = replace(
    TAMING,
    name="Gumbel VQGAN of taming-transformers or ruDALL-E",
    licence="not stated for taming's weights (its code is MIT); ruDALL-E's Apache-2.0",
    marks=(*TAMING.marks[:2], "quantize.proj.weight", "quantize.embed.weight"),
    rename=lambda name: "quantize.embedding.weight" if name == "quantize.embed.weight" else name,
)


def _of_llamagen(name: str, levels: int) -> str:
    """LlamaGen's name of a tensor -> taming's. Its decoder counts levels from the coarsest."""
    half, _, rest = name.partition(".")
    if half not in ("encoder", "decoder"):
        return name
    rest = re.sub(r"^mid\.([012])\.", lambda m: f"mid.{('block_1', 'attn_1', 'block_2')[int(m[1])]}.", rest)
    if match := re.match(r"conv_blocks\.(\d+)\.", rest):
        level = int(match[1]) if half == "encoder" else max(0, levels - 1 - int(match[1]))
        rest = f"{'down' if half == 'encoder' else 'up'}.{level}.{rest[match.end() :]}"
        rest = re.sub(r"^(\w+\.\d+)\.res\.", r"\1.block.", rest)
    return f"{half}.{rest}"


def _settle_llamagen(
    family: CheckpointFormat, path: Path, tree: Any, tensors: Mapping[str, Tensor]
) -> CheckpointFormat:
    levels = _count(tensors, r"decoder\.conv_blocks\.(\d+)\.res\.0\.conv1\.weight")
    return replace(family, rename=partial(_of_llamagen, levels=levels))


LLAMAGEN = replace(
    TAMING,
    name="VQ of LlamaGen",
    licence="MIT, of github.com/FoundationVision/LlamaGen",
    marks=("encoder.conv_blocks.*.res.*", "decoder.conv_blocks.*.res.*", "quantize.embedding.weight"),
    configure=partial(configure, choice="cosine"),
    ignored=("quantize.codebook_used",),
    settle=_settle_llamagen,
)
