"""Diffusion models of OpenAI: GLIDE's four files, U-Nets and classifiers of guided-diffusion.

base.pt, upsample.pt, base_inpaint.pt and upsample_inpaint.pt of github.com/openai/glide-text2im, and
64x64_diffusion.pt, 64x64_classifier.pt and their siblings of github.com/openai/guided-diffusion: state dicts
with the names of dalle.unet. Sizes come from shapes, which show neither the number of heads nor the order of
queries, keys and values, nor the schedule; a wrong one gives noise without an error. GLIDE's are always the
same. The published U-Nets of guided-diffusion are known by their sizes, others need a configuration.
"""

from math import isqrt
from typing import Any

from dalle.pretrained.family import CheckpointFormat, DetectedCheckpoint, Shapes, count_matches
from dalle.unet import Classifier, ClassifierConfig, UNet, UNetConfig
from dalle.unet.config import DiffusionConfig

TEXT_HEAD_WIDTH = 64  # GLIDE, as released and in the paper
FIRST_ATTENTION = 32  # side of the finest feature map with attention, in every published model
INPUTS = {3: (False, False), 6: (True, False), 7: (False, True), 10: (True, True)}
"""Input channels -> whether there is a smaller image, and whether there are known pixels."""
COSINE, LINEAR = (DiffusionConfig(schedule, caption_dropout=0.0) for schedule in ("cosine", "linear"))
GUIDED_DIFFUSION: dict[tuple[int, int, bool], dict[str, Any]] = {
    (64, 192, False): {"attention_order": "new", "diffusion": COSINE},
    (128, 256, False): {"heads": 4},
    (256, 256, False): {},
    (512, 256, False): {},
    (256, 192, True): {"heads": 4},
    (512, 192, True): {},
}
"""(image size, width, upsampler) of each published U-Net -> what its shapes do not show (its README)."""


def encoder_sizes(shapes: Shapes, levels: int, blocks: int, image_size: int | None = None) -> dict[str, Any]:
    """Fields of an `EncoderConfig`; the image size is by default that with the first attention at 32 x 32."""
    width = shapes["time_embed.0.weight"][1]
    first = [1 + level * (blocks + 1) for level in range(levels)]  # block of each level
    widths = [shapes[f"input_blocks.{i}.0.out_layers.3.weight"][0] for i in first]
    attends = [level for level, i in enumerate(first) if f"input_blocks.{i}.1.qkv.weight" in shapes]
    if image_size is None:
        image_size = FIRST_ATTENTION << attends[0] if attends else 8 << levels - 1
    return {
        "image_size": image_size,
        "width": width,
        "channel_mult": tuple(channels / width for channels in widths),
        "blocks": blocks,
        "attention": tuple(image_size >> level for level in attends),
        "middle_attention": "middle_block.1.qkv.weight" in shapes,
        "scale_shift": shapes["input_blocks.1.0.emb_layers.1.weight"][0] == 2 * widths[0],
    }


def infer_unet(shapes: Shapes, found: DetectedCheckpoint) -> UNetConfig:
    """Sizes of GLIDE's or guided-diffusion's U-Net from the shapes; ValueError for unknown heads."""
    levels = 1 + count_matches(shapes, "output_blocks.*.[12].in_layers.0.weight")
    blocks = len({name.split(".")[1] for name in shapes if name.startswith("input_blocks.")}) // levels - 1
    sizes = encoder_sizes(shapes, levels, blocks)
    channels = shapes["input_blocks.0.0.weight"][1]
    if channels not in INPUTS:
        raise ValueError(f"it has {channels} input channels, expected {', '.join(map(str, INPUTS))}")
    sizes["low_resolution"], sizes["inpainting"] = INPUTS[channels]
    sizes["learned_variance"] = shapes["out.2.weight"][0] == 6
    if "label_emb.weight" in shapes:
        sizes["classes"] = shapes["label_emb.weight"][0]
    if found.family is GLIDE:
        text_vocab, text_width = shapes["token_embedding.weight"]
        layers = count_matches(shapes, "transformer.resblocks.*.ln_1.weight")
        heads = text_width // TEXT_HEAD_WIDTH
        sizes |= {"text_len": shapes["positional_embedding"][0], "text_vocab": text_vocab}
        sizes["diffusion"] = LINEAR if sizes["low_resolution"] else DiffusionConfig()
        return UNetConfig(**sizes, text_width=text_width, text_layers=layers, text_heads=heads)
    key = (sizes["image_size"], sizes["width"], sizes["low_resolution"])
    if key not in GUIDED_DIFFUSION:
        known = "; ".join(f"{size} pixels, width {width}" for size, width, _ in GUIDED_DIFFUSION)
        found_size = f"{key[0]} pixels, width {key[1]}"
        raise ValueError(f"its heads are unknown: {found_size}, known are {known}; give its configuration")
    return UNetConfig(**sizes, text="none", **({"diffusion": LINEAR} | GUIDED_DIFFUSION[key]))


def infer_classifier(shapes: Shapes, found: DetectedCheckpoint) -> ClassifierConfig:
    """Sizes of a classifier from the shapes. Attention follows each block of a level, none the halving."""
    names = {int(name.split(".")[1]) for name in shapes if name.startswith("input_blocks.")}
    attention = [i for i in sorted(names) if f"input_blocks.{i}.1.qkv.weight" in shapes]
    blocks = next((n for n, i in enumerate(attention) if i != attention[0] + n), len(attention))
    levels = len(names) // (blocks + 1)
    side = isqrt(shapes["out.2.positional_embedding"][1] - 1)
    sizes = encoder_sizes(shapes, levels, blocks, side << levels - 1)
    return ClassifierConfig(**sizes, classes=shapes["out.2.c_proj.weight"][0])


GLIDE = CheckpointFormat(
    name="GLIDE",
    kind="diffusion",
    license="MIT, of github.com/openai/glide-text2im",
    key_patterns=("padding_embedding", "transformer_proj.weight", "input_blocks.*.encoder_kv.weight"),
    infer_config=infer_unet,
    build=UNet,
)
ADM = CheckpointFormat(
    name="U-Net of guided-diffusion",
    kind="diffusion",
    license="MIT, of github.com/openai/guided-diffusion",
    key_patterns=(
        "time_embed.0.weight",
        "input_blocks.*.0.in_layers.2.weight",
        "output_blocks.*.0.in_layers.2.weight",
        "out.2.weight",
    ),
    infer_config=infer_unet,
    build=UNet,
)
CLASSIFIER = CheckpointFormat(
    name="classifier of guided-diffusion",
    kind="classifier",
    license=ADM.license,
    key_patterns=(*ADM.key_patterns[:2], "out.2.positional_embedding", "out.2.c_proj.weight"),
    infer_config=infer_classifier,
    build=Classifier,
)
