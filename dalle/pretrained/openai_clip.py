"""CLIP for reranking: TorchScript archives and state dicts of OpenAI, checkpoints of open_clip.

The towers are open_clip's; sizes come from shapes, which do not show the activation: OpenAI's weights were
trained with x sigmoid(1.702 x), most of open_clip's with the exact GELU, and the wrong one ranks worse
without an error. OpenAI's files are recognized by three numbers next to the weights; for others it is an
argument. Other architectures (timm towers, SigLIP) are opened by name, with `PretrainedScorer`.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dalle.clip import OpenClipScorer
from dalle.clip.model import NUMBERS
from dalle.io.torch_file import read_torch_file, weights_of
from dalle.pretrained.family import CheckpointFormat, DetectedCheckpoint, Shapes, count_matches, load_weights

HEAD_WIDTH = 64  # Radford et al.: in every published model
MAX_TEXT = 4096  # published are 77; open_clip allocates its square
CLIP_VOCAB = 49408  # ids of the byte-pair encoding that all of these read


def infer_config(shapes: Shapes, found: DetectedCheckpoint | None = None) -> dict[str, Any]:
    """Sizes from the shapes, as in open_clip's model configurations; a ResNet has the blocks of 4 stages."""
    vocab_size, text_width = shapes["token_embedding.weight"]
    if "visual.proj" in shapes:
        width, _, patch, _ = shapes["visual.conv1.weight"]
        scale, positions = patch, shapes["visual.positional_embedding"][0]
        layers = count_matches(shapes, "visual.transformer.resblocks.*.attn.in_proj_weight")
    else:
        width, patch = shapes["visual.layer1.0.conv1.weight"][0], None
        scale, positions = 32, shapes["visual.attnpool.positional_embedding"][0]
        layers = tuple(count_matches(shapes, f"visual.layer{i}.*.conv1.weight") for i in (1, 2, 3, 4))
    if (length := shapes["positional_embedding"][0]) > MAX_TEXT:
        raise ValueError(f"a context of {length} ids, expected {MAX_TEXT} at most")
    image_size = scale * round((positions - 1) ** 0.5)
    text = {
        "context_length": shapes["positional_embedding"][0],
        "vocab_size": vocab_size,
        "width": text_width,
        "heads": text_width // HEAD_WIDTH,
        "layers": count_matches(shapes, "transformer.resblocks.*.attn.in_proj_weight"),
    }
    vision = {"layers": layers, "width": width, "patch_size": patch, "image_size": image_size}
    return {"embed_dim": shapes["text_projection"][1], "vision_cfg": vision, "text_cfg": text}


def build(config: dict[str, Any], quick_gelu: bool) -> nn.Module:
    """open_clip's towers; the activation is x sigmoid(1.702 x) with `quick_gelu`, else the exact GELU."""
    from open_clip.model import CLIP

    for name in ("vision_cfg", "text_cfg"):
        if (width := config[name]["width"]) % HEAD_WIDTH:
            raise ValueError(f"the width {width} of {name} is no multiple of the head width {HEAD_WIDTH}")
    model = CLIP(**config, quick_gelu=quick_gelu)
    length = config["text_cfg"]["context_length"]
    with torch.device("cpu"):  # not in a state dict, so computed even in a model without weights
        model.attn_mask = torch.full((length, length), -torch.inf).triu(1)
    return model


OPENAI = CheckpointFormat(
    name="OpenAI CLIP",
    kind="scorer",
    license="MIT, of github.com/openai/CLIP",
    key_patterns=("visual.*", "token_embedding.weight", "text_projection", "input_resolution"),
    infer_config=infer_config,
    build=partial(build, quick_gelu=True),
    ignored=tuple(NUMBERS),
)
OPEN_CLIP = replace(
    OPENAI,
    name="open_clip CLIP",
    license="unknown; open_clip's own differ by training set",
    key_patterns=OPENAI.key_patterns[:3],
    build=partial(build, quick_gelu=False),
    ignored=(),
)


def load_scorer(
    path: Path | str, device: str | torch.device = "cpu", quick_gelu: bool | None = None
) -> OpenClipScorer:
    """A `Scorer` by a CLIP from a file.

    `quick_gelu` is the activation, required for a file that is not OpenAI's archive or state dict.
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
            which = "True for OpenAI's weights and '-quickgelu' models of open_clip, False for others"
            raise ValueError(f"{path} does not hold its activation; give quick_gelu={which}")
        family = replace(family, build=partial(build, quick_gelu=quick_gelu))
    model = load_weights(DetectedCheckpoint(Path(path), family, tensors)).to(device)
    if (vocab := model.vocab_size) != CLIP_VOCAB:
        raise ValueError(f"{path} has {vocab} text ids, CLIP's tokenizer {CLIP_VOCAB}: it needs another one")
    return OpenClipScorer(model, open_clip.SimpleTokenizer(context_length=model.context_length))
