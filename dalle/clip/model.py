"""CLIP for reranking: open_clip's towers, trained here on our text ids, or a public model.

open_clip is imported when a model is built, not before: it takes seconds.

    B batch, N images, L text length, E embedding width
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dalle.clip.config import CLIPConfig
from dalle.io.images import check_image_shape, check_images
from dalle.io.text import check_text
from dalle.io.torch_file import read_torch_file, weights_of
from dalle.precision import cosines, tf32
from dalle.types import TextTokenizerLike

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)  # Radford et al., released code
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
ATTENTION = SDPBackend.MATH  # on a CPU; torch's fused attention is slower at these lengths
NUMBERS = {"input_resolution", "context_length", "vocab_size"}  # next to the weights in OpenAI's files
MAX_LOGIT_SCALE = 100.0  # Radford et al., section 2.5


class CLIP(nn.Module):
    """open_clip's two towers over our pixels and text ids."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        from open_clip.model import CLIP as OpenCLIP
        from open_clip.model import CLIPTextCfg, CLIPVisionCfg

        vision = CLIPVisionCfg(
            layers=config.vision_layers,
            width=config.vision_width,
            head_width=config.head_dim,
            patch_size=config.patch_size,
            image_size=config.image_size,
            pool_type={"class": "tok", "average": "avg"}[config.vision_pool],
        )
        text = CLIPTextCfg(
            context_length=config.text_len,
            vocab_size=config.text_vocab + 2,
            width=config.text_width,
            heads=config.text_width // config.head_dim,
            layers=config.text_layers,
        )
        self.config = config
        self.net = OpenCLIP(config.embed_width, vision, text)
        self.pad = config.text_vocab
        self.end = config.text_vocab + 1  # the highest id, so that open_clip reads its state
        self.truncated = 0

    def make_text_mask(self, device: torch.device | str) -> None:
        """Causal attention of the text tower, which no state dict holds: for a model of the meta device."""
        length = self.config.text_len
        self.net.attn_mask = torch.full((length, length), -torch.inf, device=device).triu(1)

    def pack_text(self, captions: Sequence[Sequence[int]]) -> Tensor:
        """Text ids of captions -> int64 (B, L): ids, end mark, pads; truncated captions are counted."""
        rows = torch.full((len(captions), self.config.text_len), self.pad)
        for row, ids in zip(rows, captions, strict=True):
            self.truncated += len(ids) > self.config.text_len - 1
            kept = [*ids[: self.config.text_len - 1], self.end]
            row[: len(kept)] = torch.tensor(kept)
        return rows

    @tf32(False)
    def encode_image(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [0, 1] -> fp32 unit vectors (B, E)."""
        check_images(pixels)
        return self.image_vectors(pixels)

    def image_vectors(self, pixels: Tensor) -> Tensor:
        """`encode_image` without a look at the values, for which a GPU would have to be waited for."""
        prepared = prepare_pixels(pixels, self.config.image_size)
        with sdpa_kernel(ATTENTION) if pixels.device.type == "cpu" else nullcontext():
            return F.normalize(self.net.encode_image(prepared).float(), dim=-1)

    def encode_text(self, text: Tensor) -> Tensor:
        """Packed text (B, L) -> fp32 unit vectors (B, E)."""
        with sdpa_kernel(ATTENTION) if text.device.type == "cpu" else nullcontext():
            return F.normalize(self.net.encode_text(text).float(), dim=-1)

    def fsdp_groups(self) -> list[list[nn.Module]]:
        """Groups that sharded training gathers at once, in order of use."""
        towers = self.net.transformer, self.net.visual.transformer
        return [[block.attn, block.mlp] for tower in towers for block in tower.resblocks]

    def logit_scale(self) -> Tensor:
        """The learned factor on cosines, at most 100."""
        return self.net.logit_scale.exp().clamp(max=MAX_LOGIT_SCALE)


def prepare_pixels(pixels: Tensor, size: int, mean=PIXEL_MEAN, std=PIXEL_STD) -> Tensor:
    """Bicubic resize to size x size where needed, then CLIP's normalization; differentiable.

    Callers that do not know the values to be in [0, 1] check them before, by `check_images`.
    """
    check_image_shape(pixels)
    if pixels.shape[2:] != (size, size):
        pixels = F.interpolate(pixels, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)
    channels = zip(pixels.unbind(1), mean, std, strict=True)  # numbers, which no copy brings to the device
    return torch.stack([(channel - shift) / scale for channel, shift, scale in channels], dim=1)


class _CosineScorer:
    """`Scorer.score` from the unit vectors of an `Embedder`."""

    def score(self, pixels: Tensor, caption: str) -> Tensor:
        """Pixels (N, 3, H, W) in [0, 1] -> cosines (N,)."""
        return cosines(self.embed_images(pixels), self.embed_captions([caption]))[:, 0]


class CLIPScorer(_CosineScorer):
    """A `Scorer` and `Embedder`: cosine of images and caption by a CLIP that reads our text ids."""

    def __init__(self, model: CLIP, text: TextTokenizerLike):
        if text.vocab_size > model.config.text_vocab:
            raise ValueError(
                f"the text tokenizer has {text.vocab_size} ids, this CLIP reads {model.config.text_vocab}: "
                "they do not belong together"
            )
        self.model, self.text = model, text

    def embed_images(self, pixels: Tensor) -> Tensor:
        """Pixels (N, 3, H, W) in [0, 1] -> unit vectors (N, E)."""
        return self.model.encode_image(pixels)

    def embed_captions(self, captions: Sequence[str]) -> Tensor:
        """Captions -> unit vectors (N, E)."""
        text = self.model.pack_text(list(map(self.text.encode, captions)))
        return self.model.encode_text(text.to(self.model.net.logit_scale.device))


class OpenClipScorer(_CosineScorer):
    """A `Scorer` and `Embedder` by a model of open_clip and its tokenizer; counts `truncated` captions."""

    def __init__(self, model: nn.Module, tokenizer: Callable[[list[str]], Tensor]):
        self.model, self.tokenizer = model, tokenizer
        preprocess = getattr(model.visual, "preprocess_cfg", {})
        size = model.visual.image_size
        self.size = size if isinstance(size, int) else size[0]
        self.mean, self.std = preprocess.get("mean", PIXEL_MEAN), preprocess.get("std", PIXEL_STD)
        self.truncated = 0

    @tf32(False)
    def embed_images(self, pixels: Tensor) -> Tensor:
        """Pixels (N, 3, H, W) in [0, 1] -> unit vectors (N, E)."""
        check_images(pixels)
        return self.model.encode_image(prepare_pixels(pixels, self.size, self.mean, self.std), normalize=True)

    def embed_captions(self, captions: Sequence[str]) -> Tensor:
        """Captions -> unit vectors (N, E)."""
        for caption in captions:
            check_text(caption)
        self.truncated += sum(map(self._is_cut, captions))
        ids = self.tokenizer(list(captions)).to(self.model.logit_scale.device)
        return self.model.encode_text(ids, normalize=True)

    def _is_cut(self, caption: str) -> bool:
        encode = getattr(self.tokenizer, "encode", None)
        room = getattr(self.tokenizer, "context_length", 77) - 2  # start and end marks
        return bool(encode) and len(encode(caption)) > room


class PretrainedScorer(OpenClipScorer):
    """An open_clip model by its architecture's name and a file of weights.

    Nothing is downloaded unless `download` is set; then `weights` may be one of open_clip's tags. open_clip
    reads a copy of the file's tensors, so that none of its code runs.
    """

    def __init__(self, name: str, weights: str, device: str | torch.device = "cpu", download: bool = False):
        import open_clip

        if not download and not Path(weights).exists():
            raise ValueError(f"no file {weights}; give a file of weights for {name}, or allow the download")
        if name not in open_clip.list_models():
            raise ValueError(f"open_clip knows no model {name!r}; see open_clip.list_models()")
        with TemporaryDirectory() as folder:
            source = weights
            if Path(weights).exists() and Path(weights).suffix not in (".npz", ".npy"):  # big_vision's
                tensors = weights_of(read_torch_file(weights).tree)
                source = str(Path(folder) / "weights.pt")
                torch.save({key: tensors[key] for key in tensors.keys() - NUMBERS}, source)
            try:
                model = open_clip.create_model(name, pretrained=source, device=device).eval()
            except (RuntimeError, LookupError, AttributeError, StopIteration) as error:
                raise ValueError(f"{weights} does not hold the weights of {name}: {error!s:.300}") from None
        super().__init__(model, open_clip.get_tokenizer(name))
