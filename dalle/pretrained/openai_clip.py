"""CLIP for reranking: TorchScript archives and state dicts of OpenAI, checkpoints of open_clip.

The towers are open_clip's; sizes come from shapes, which do not tell the activation: OpenAI's weights were
trained with x sigmoid(1.702 x), most of open_clip's with the exact GELU, and the wrong one ranks worse
without an error. OpenAI's files are recognized by three numbers beside the weights; for others it is an
argument. Other architectures (timm towers, SigLIP) are opened by name, with `PretrainedScorer`.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from dalle.clip import OpenClipScorer
from dalle.pretrained.family import CheckpointFormat, DetectedCheckpoint, Shapes, count_matches, load_weights
from dalle.pretrained.torch_file import read_torch_file, weights_of

HEAD_WIDTH = 64  # Radford et al.: in every published model
NUMBERS = ("input_resolution", "context_length", "vocab_size")
CLIP_VOCAB = 49408  # ids of the byte-pair encoding that all of these read


@dataclass(frozen=True)
class PublishedCLIP:
    """Shape of a published CLIP; a ResNet has no patches, and in `vision_layers` the blocks of each stage."""

    embed_width: int
    image_size: int
    vision_layers: int | tuple[int, ...]
    vision_width: int
    patch_size: int | None
    text_len: int
    text_vocab: int
    text_width: int
    text_layers: int


def infer_config(shapes: Shapes, found: DetectedCheckpoint | None = None) -> PublishedCLIP:
    """Sizes from the shapes."""
    text_vocab, text_width = shapes["token_embedding.weight"]
    if "visual.proj" in shapes:
        width, _, patch, _ = shapes["visual.conv1.weight"]
        scale, positions = patch, shapes["visual.positional_embedding"][0]
        layers = count_matches(shapes, "visual.transformer.resblocks.*.attn.in_proj_weight")
    else:
        width, patch = shapes["visual.layer1.0.conv1.weight"][0], None
        scale, positions = 32, shapes["visual.attnpool.positional_embedding"][0]
        layers = tuple(count_matches(shapes, f"visual.layer{i}.*.conv1.weight") for i in (1, 2, 3, 4))
    return PublishedCLIP(
        embed_width=shapes["text_projection"][1],
        image_size=scale * round((positions - 1) ** 0.5),
        vision_layers=layers,
        vision_width=width,
        patch_size=patch,
        text_len=shapes["positional_embedding"][0],
        text_vocab=text_vocab,
        text_width=text_width,
        text_layers=count_matches(shapes, "transformer.resblocks.*.attn.in_proj_weight"),
    )


def build(config: PublishedCLIP, quick_gelu: bool) -> nn.Module:
    """open_clip's towers; the activation is x sigmoid(1.702 x) with `quick_gelu`, else the exact GELU."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    for name in ("vision_width", "text_width"):
        if getattr(config, name) % HEAD_WIDTH:
            raise ValueError(f"{name} {getattr(config, name)} is no multiple of the head width {HEAD_WIDTH}")
    layers, width, heads = config.vision_layers, config.vision_width, config.text_width // HEAD_WIDTH
    vision = CLIPVisionCfg(layers, width, patch_size=config.patch_size, image_size=config.image_size)
    sizes = {"width": config.text_width, "heads": heads, "layers": config.text_layers}
    text = CLIPTextCfg(context_length=config.text_len, vocab_size=config.text_vocab, **sizes)
    model = CLIP(config.embed_width, vision, text, quick_gelu=quick_gelu)
    with torch.device("cpu"):  # not in a state dict, so computed even in a model without weights
        model.attn_mask = torch.full((config.text_len, config.text_len), -torch.inf).triu(1)
    return model


OPENAI = CheckpointFormat(
    name="OpenAI CLIP",
    kind="scorer",
    license="MIT, of github.com/openai/CLIP",
    key_patterns=("visual.*", "token_embedding.weight", "text_projection", "input_resolution"),
    infer_config=infer_config,
    build=partial(build, quick_gelu=True),
    ignored=NUMBERS,
)
OPEN_CLIP = replace(
    OPENAI,
    name="open_clip CLIP",
    license="unknown; open_clip's own differ by training set",
    key_patterns=("*visual.*", "*token_embedding.weight", "*text_projection"),
    build=partial(build, quick_gelu=False),
    rename=lambda name, names: name.removeprefix("module."),
    ignored=(),
)


def load_scorer(
    path: Path | str, device: str | torch.device = "cpu", quick_gelu: bool | None = None
) -> OpenClipScorer:
    """A `Scorer` by a CLIP from a file.

    Args:
        path: TorchScript archive or state dict of OpenAI; checkpoint of open_clip (.pt, .safetensors).
        quick_gelu: the activation; required for a file that is not OpenAI's.

    Raises:
        ValueError: not a CLIP of this layout, another text tokenizer, or the activation is not given.
    """
    import open_clip

    tensors = weights_of(read_torch_file(path).tree)
    family = OPENAI if OPENAI.matches(tensors) else OPEN_CLIP
    if not family.matches(tensors):
        raise ValueError(f"{path} is no CLIP of OpenAI's layout; use PretrainedScorer(name, file)")
    if family is OPENAI and quick_gelu is False:
        raise ValueError(f"{path} is OpenAI's, which is trained with quick_gelu")
    if family is OPEN_CLIP:
        if quick_gelu is None:
            raise ValueError(
                f"{path} does not hold its activation: give quick_gelu=True for OpenAI's weights and "
                "'-quickgelu' models of open_clip, quick_gelu=False for others"
            )
        family = replace(family, build=partial(build, quick_gelu=quick_gelu))
    model = load_weights(DetectedCheckpoint(Path(path), family, tensors)).to(device)
    if (vocab := model.vocab_size) != CLIP_VOCAB:
        raise ValueError(f"{path} has {vocab} text ids, CLIP's tokenizer {CLIP_VOCAB}: it needs another one")
    return OpenClipScorer(model, open_clip.SimpleTokenizer(context_length=model.context_length))
