"""VQGAN files of taming-transformers (also minDALL-E's first stage), ruDALL-E and LlamaGen.

One network under two sets of names. The training losses in taming's and ruDALL-E's files (VGG, a
discriminator) are ignored. Gumbel models are recognized by `quantize.proj`, LlamaGen's unit vectors by its
names.
"""

from collections.abc import Collection
from dataclasses import replace
from functools import partial

from dalle.pretrained.family import CheckpointFormat, DetectedCheckpoint, Shapes, count_matches
from dalle.vqgan import VQGAN, VQGANConfig


def infer_config(shapes: Shapes, found: DetectedCheckpoint, quantizer: str = "nearest") -> VQGANConfig:
    """Sizes from the shapes, by taming's names; ValueError for a reduced codebook."""
    if "quantize.used" in shapes:
        raise ValueError("its codes were renumbered after training (quantize.used), which is not supported")
    levels = count_matches(shapes, "encoder.down.*.block.0.conv1.weight")
    blocks = count_matches(shapes, "encoder.down.0.block.*.conv1.weight")
    if not levels or not blocks:
        raise ValueError("the encoder lacks its levels: half a VQGAN, or none")
    vocab_size, codebook_dim = shapes["quantize.embedding.weight"]
    return VQGANConfig(
        widths=tuple(shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)),
        blocks=blocks,
        attention=tuple(i for i in range(levels) if f"encoder.down.{i}.attn.0.q.weight" in shapes),
        latent=shapes["encoder.conv_out.weight"][0],
        codebook_dim=codebook_dim,
        vocab_size=vocab_size,
        quantizer="logits" if "quantize.proj.weight" in shapes else quantizer,
    )


TAMING = CheckpointFormat(
    name="VQGAN of taming-transformers",
    kind="image tokenizer",
    license="not stated for taming's weights (its code is MIT), nor for minDALL-E's first stage (Apache-2.0)",
    key_patterns=(
        "encoder.down.*.block.*.conv1.weight",
        "decoder.up.*.block.*.conv1.weight",
        "quantize.embedding.weight",
    ),
    infer_config=infer_config,
    build=VQGAN,
    ignored=("loss.*",),
)
GUMBEL = replace(
    TAMING,
    name="Gumbel VQGAN of taming-transformers or ruDALL-E",
    license="not stated for taming's weights (its code is MIT); ruDALL-E's Apache-2.0",
    key_patterns=(*TAMING.key_patterns[:2], "quantize.proj.weight", "quantize.embed.weight"),
    renames=lambda names: {r"^quantize\.embed\.": "quantize.embedding."},
)


def _taming_names(names: Collection[str]) -> dict[str, str]:
    """Names of LlamaGen -> taming's. Its decoder counts levels from the coarsest."""
    levels = count_matches(names, "decoder.conv_blocks.*.res.0.conv1.weight")
    ups = {rf"^decoder\.conv_blocks\.{i}\.": f"decoder.up.{levels - 1 - i}." for i in range(levels)}
    middle = {rf"\.mid\.{i}\.": f".mid.{part}." for i, part in enumerate(("block_1", "attn_1", "block_2"))}
    return ups | middle | {r"^encoder\.conv_blocks\.": "encoder.down.", r"\.res\.": ".block."}


LLAMAGEN = replace(
    TAMING,
    name="VQ of LlamaGen",
    license="MIT, of github.com/FoundationVision/LlamaGen",
    key_patterns=("encoder.conv_blocks.*.res.*", "decoder.conv_blocks.*.res.*", "quantize.embedding.weight"),
    infer_config=partial(infer_config, quantizer="cosine"),
    ignored=("quantize.codebook_used",),
    renames=_taming_names,
)
