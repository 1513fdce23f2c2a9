"""CLIP for reranking: OpenAI's TorchScript archives and state dicts, and open_clip's checkpoints of the same layout.

The towers are open_clip's; sizes come from shapes. One thing no shape tells is the activation: OpenAI's weights
want x sigmoid(1.702 x), most of open_clip's want the exact GELU, and the wrong one loads without a word and ranks
worse. OpenAI's files are known by three numbers that they keep beside the weights; for others it must be said.
An architecture that is not this layout (timm towers, SigLIP) is opened by its name, with `PretrainedScorer`.
"""

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import torch
from torch import nn

from dalle.clip import OpenClipScorer
from dalle.pretrained.family import CheckpointFormat, Shapes, load_weights
from dalle.pretrained.torch_file import read_torch_file, weights_of

HEAD_WIDTH = 64  # Radford et al.: in every published model; shapes do not tell
NUMBERS = ("input_resolution", "context_length", "vocab_size")
CLIP_VOCAB = 49408  # ids of the byte-pair encoding that all of these read


@dataclass(frozen=True)
class PublishedCLIP:
    """Shape of a published CLIP, in open_clip's words."""

    embed_width: int
    """Width of the shared space."""
    image_size: int
    """Pixels on a side."""
    vision_layers: int | tuple[int, ...]
    """Layers of the vision transformer, or blocks of each stage of a ResNet."""
    vision_width: int
    """Its width."""
    patch_size: int | None
    """Pixels on a side of a patch; None for a ResNet."""
    text_len: int
    """Text ids, both marks among them."""
    text_vocab: int
    """Ids of the text tokenizer."""
    text_width: int
    """Width of the text transformer."""
    text_layers: int
    """Its layers."""


def configure(shapes: Shapes) -> PublishedCLIP:
    """Sizes from the shapes."""
    text_vocab, text_width = shapes["token_embedding.weight"]
    vision = _vision_transformer(shapes) if "visual.proj" in shapes else _resnet(shapes)
    return PublishedCLIP(
        embed_width=shapes["text_projection"][1],
        **vision,
        text_len=shapes["positional_embedding"][0],
        text_vocab=text_vocab,
        text_width=text_width,
        text_layers=_count(shapes, "transformer.resblocks.*.attn.in_proj_weight"),
    )


def _vision_transformer(shapes: Shapes) -> dict:
    width, _, patch, _ = shapes["visual.conv1.weight"]
    side = round((shapes["visual.positional_embedding"][0] - 1) ** 0.5)
    layers = _count(shapes, "visual.transformer.resblocks.*.attn.in_proj_weight")
    return {"image_size": patch * side, "vision_layers": layers, "vision_width": width, "patch_size": patch}


def _resnet(shapes: Shapes) -> dict:
    blocks = tuple(_count(shapes, f"visual.layer{stage}.*.conv1.weight") for stage in (1, 2, 3, 4))
    side = round((shapes["visual.attnpool.positional_embedding"][0] - 1) ** 0.5)
    width = shapes["visual.layer1.0.conv1.weight"][0]
    return {"image_size": 32 * side, "vision_layers": blocks, "vision_width": width, "patch_size": None}


def _count(shapes: Shapes, pattern: str) -> int:
    return sum(fnmatchcase(name, pattern) for name in shapes)


def build(config: PublishedCLIP, quick_gelu: bool) -> nn.Module:
    """open_clip's towers; the activation is x sigmoid(1.702 x) with `quick_gelu`, else the exact GELU."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    for name in ("vision_width", "text_width"):
        if getattr(config, name) % HEAD_WIDTH:
            raise ValueError(
                f"{name} {getattr(config, name)} is no multiple of {HEAD_WIDTH}, the width of CLIP's heads"
            )
    vision = CLIPVisionCfg(
        layers=config.vision_layers,
        width=config.vision_width,
        patch_size=config.patch_size,
        image_size=config.image_size,
    )
    text = CLIPTextCfg(
        context_length=config.text_len,
        vocab_size=config.text_vocab,
        width=config.text_width,
        heads=config.text_width // HEAD_WIDTH,
        layers=config.text_layers,
    )
    model = CLIP(config.embed_width, vision, text, quick_gelu=quick_gelu)
    with torch.device("cpu"):  # no part of a state dict, so it must have values when the rest is made without
        model.attn_mask = torch.full((config.text_len, config.text_len), -torch.inf).triu(1)
    return model


OPENAI = CheckpointFormat(
    name="OpenAI CLIP",
    kind="scorer",
    licence="MIT, of github.com/openai/CLIP",
    marks=("visual.*", "token_embedding.weight", "text_projection", "input_resolution"),
    configure=configure,
    build=partial(build, quick_gelu=True),
    vocabulary=lambda config: f"{config.text_vocab} text ids, {config.text_len} at a time",
    ignored=NUMBERS,
)
OPEN_CLIP = replace(
    OPENAI,
    name="open_clip CLIP",
    licence="unknown; open_clip's own differ by training set",
    marks=("*visual.*", "*token_embedding.weight", "*text_projection"),
    build=partial(build, quick_gelu=False),
    rename=lambda name: name.removeprefix("module."),
    ignored=(),
)


def load_scorer(
    path: Path | str, device: str | torch.device = "cpu", quick_gelu: bool | None = None
) -> OpenClipScorer:
    """A `Scorer` by a CLIP from a file.

    Args:
        path: TorchScript archive or state dict of OpenAI; checkpoint of open_clip (.pt, .safetensors).
        device: where it runs.
        quick_gelu: the activation; must be given for a file that does not tell whose it is.

    Raises:
        ValueError: not a CLIP of this layout, another text tokenizer, or the activation is not known.
    """
    tensors = weights_of(read_torch_file(path).tree)
    family = OPENAI if OPENAI.recognizes(tensors) else OPEN_CLIP
    if not family.recognizes(tensors):
        raise ValueError(
            f"{path} is no CLIP of OpenAI's layout; open others by name with PretrainedScorer(name, file)"
        )
    if family is OPEN_CLIP:
        if quick_gelu is None:
            raise ValueError(
                f"{path} does not tell its activation: give quick_gelu=True for OpenAI's weights and open_clip's "
                "'-quickgelu' models, quick_gelu=False for others"
            )
        family = replace(family, build=partial(build, quick_gelu=quick_gelu))
    elif quick_gelu is False:
        raise ValueError(f"{path} is OpenAI's, which is trained with quick_gelu")
    if (vocab := tensors[_named(tensors, "token_embedding.weight")].shape[0]) != CLIP_VOCAB:
        raise ValueError(
            f"{path} reads {vocab} text ids, CLIP's tokenizer has {CLIP_VOCAB}: it needs another one"
        )
    return _scorer(load_weights(family, tensors, path), device)


def _named(tensors: dict, ending: str) -> str:
    return next(name for name in tensors if name.removeprefix("module.") == ending)


def _scorer(model: nn.Module, device: str | torch.device) -> OpenClipScorer:
    import open_clip

    return OpenClipScorer(model.to(device), open_clip.SimpleTokenizer(context_length=model.context_length))
