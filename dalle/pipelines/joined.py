"""The parts of a DALL-E joined: what belongs together, its hash, and how it is saved and opened.

N images, T text slots, h w grid
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from PIL import Image
from torch import Tensor

from dalle.clip import CLIP, CLIPScorer
from dalle.hub.hub import HubMixin, resolve_source
from dalle.hub.model_card import Report
from dalle.hub.model_directory import model_files, write_model_directory
from dalle.hub.registry import LoadedModel, load_model, weights_hash
from dalle.io.format import read_config
from dalle.io.images import load_image, resize_center_crop, to_tensor
from dalle.nn.int8 import weight_like
from dalle.text import BPETokenizer, text_tokenizer_from_dict
from dalle.text.coverage import out_of_vocabulary
from dalle.train.precision import DTYPES, Precision, resolve_precision
from dalle.transformer import Transformer
from dalle.transformer.generate import cast_linear_weights, quantize_int8
from dalle.types import ImageTokenizer, Scorer


class Joined(HubMixin):
    """Image tokenizer, transformer, text tokenizer and scorer; `dalle.pipelines.dalle.DALLE` draws with them.

    Raises:
        ValueError: parts of different vocabularies.
    """

    def __init__(
        self,
        dvae: ImageTokenizer,
        transformer: Transformer,
        text: BPETokenizer,
        scorer: Scorer | None = None,
    ):
        layout = transformer.layout
        if dvae.vocab_size != layout.image_vocab:
            raise ValueError(
                f"the image tokenizer has {dvae.vocab_size} codes, the transformer draws {layout.image_vocab}: "
                "they do not belong together"
            )
        if text.vocab_size > layout.text_vocab:
            raise ValueError(
                f"the text tokenizer has {text.vocab_size} ids, the transformer reads {layout.text_vocab}: "
                "they do not belong together"
            )
        self.dvae, self.transformer, self.text, self.scorer = dvae, transformer, text, scorer
        self._hash: str | None = None  # of the weights before they were rounded

    @property
    def device(self) -> torch.device:
        """Where the transformer is."""
        return weight_like(self.transformer.to_logits).device

    def save_pretrained(
        self, directory: Path | str, report: Report | None = None, license: str | None = None
    ) -> None:
        """Writes a model directory: config.json, text.json, a safetensors file a part, and the card, README.md, anew.

        Args:
            directory: made if there is none.
            report, license: for the card, see `dalle.hub.model_card.write_card`.

        Raises:
            ValueError: an image tokenizer or scorer that is not one of the library's own models, or a
                directory that cannot be made.
        """
        if self._hash is not None:
            raise ValueError("the weights were rounded by to_precision; save the model that it was made from")
        parts: dict[str, torch.nn.Module] = {"dvae": self.dvae, "transformer": self.transformer}
        if self.scorer is not None:
            parts["clip"] = getattr(self.scorer, "model", None)
        write_model_directory(Path(directory), parts, self.text, report=report, license=license)

    @classmethod
    def from_pretrained(
        cls,
        source: Path | str,
        device: str | torch.device = "cpu",
        precision: Precision = "fp32",
        revision: str | None = None,
        token: str | bool | None = None,
        int8: bool = False,
    ) -> Self:
        """Opens a model directory written by `save_pretrained`, here or on the Hub.

        Args:
            source: a path, which is read without the network, or else an id of the Hub, "owner/name".
            device: where the parts go.
            precision: as `to_precision`.
            revision, token: of the Hub, see `dalle.hub.hub.resolve_source`.
            int8: as `to_precision`.

        Raises:
            ValueError: no such directory, a damaged file, or parts that do not belong together; as `dalle.hub.hub.resolve_source`.
        """
        directory = resolve_source(source, model_files("dvae", "transformer", "clip"), revision, token)
        kinds = ["dvae", "transformer", *(["clip"] if "clip" in read_config(directory)["parts"] else [])]
        parts = {kind: load_model(directory, kind, device) for kind in kinds}
        return cls.from_parts(parts["dvae"], parts["transformer"], parts.get("clip")).to_precision(
            precision, int8
        )

    @classmethod
    def from_parts(
        cls,
        dvae: LoadedModel,
        transformer: LoadedModel,
        clip: LoadedModel | None,
        text: BPETokenizer | None = None,
    ) -> Self:
        """Joins parts loaded from runs; refuses parts that were not trained for one another."""
        for part, needed in ((transformer, {"text", "dvae"}), (clip, {"text_hash"})):
            if part and (missing := needed - part.links.keys()):
                raise ValueError(
                    f"{part.source} does not tell the {' and '.join(sorted(missing))} it was trained with"
                )
        own = text_tokenizer_from_dict(transformer.links["text"])
        if text is not None and text.hash != own.hash:
            raise ValueError(
                f"{transformer.source} was trained with another text tokenizer than the one given"
            )
        if transformer.links["dvae"] != dvae.hash:
            raise ValueError(
                f"{transformer.source} was trained on tokens of dVAE {transformer.links['dvae']}, "
                f"{dvae.source} is {dvae.hash}: they do not belong together"
            )
        if clip is not None and clip.links["text_hash"] != own.hash:
            raise ValueError(
                f"{clip.source} was trained with another text tokenizer than {transformer.source}"
            )
        scorer = CLIPScorer(clip.model, own) if clip else None
        return cls(dvae.model, transformer.model, own, scorer)

    @property
    def hash(self) -> str:
        """Names the weights: hashes of the dVAE, the transformer and, if it is our own, the CLIP."""
        if self._hash is not None:
            return self._hash
        clip = getattr(self.scorer, "model", None)
        models = [self.dvae, self.transformer] + [clip] * isinstance(clip, CLIP)
        return "-".join(weights_hash(model) for model in models)

    def to_precision(self, precision: Precision, int8: bool = False) -> Self:
        """The same model with the transformer's matrices in fewer bits, for drawing; all else is shared.

        The hash stays that of the weights before they were rounded.

        Args:
            precision: bf16 or fp16 for those of the layers: half the memory. "auto" takes bf16 where the device
                multiplies it in hardware.
            int8: keep these and the output matrix in 8 bits with a scale a row: a quarter of the memory. The rest is
                computed in `precision`, but for a CPU's products, see dalle/nn/int8.py. A model that has 8 bits
                stays as it is.
        """
        dtype = DTYPES[resolve_precision(precision, self.device)]
        transformer = cast_linear_weights(self.transformer, dtype)
        transformer = quantize_int8(transformer) if int8 else transformer
        if transformer is self.transformer:
            return self
        rounded = type(self)(self.dvae, transformer, self.text, self.scorer)
        rounded._hash = self.hash
        return rounded

    def text_tokens(self, prompts: Sequence[str], truncate: bool = False) -> Tensor:
        """Captions -> int64 (len(prompts), T); ValueError for an empty or too long one."""
        return self._text_tokens(prompts, truncate, stacklevel=None)

    def _text_tokens(self, prompts: Sequence[str], truncate: bool, stacklevel: int | None) -> Tensor:
        """And warns, at the caller so many frames up, of letters that the vocabulary lacks."""
        for prompt in prompts:
            if not isinstance(prompt, str):
                raise ValueError(f"the prompt must be text, got {type(prompt).__name__}")
        ids = [self.text.encode(prompt) for prompt in prompts]
        if not all(ids):
            raise ValueError("the prompt is empty; say what the image shall show")
        for prompt in prompts if stacklevel else ():
            if pieces := out_of_vocabulary(self.text, prompt):
                told = ", ".join(map(repr, pieces[:5])) + ", ..." * (len(pieces) > 5)
                message = f"the vocabulary lacks letters of {told}: the model may not know what they mean"
                warnings.warn(message, stacklevel=stacklevel)
        return self.transformer.layout.pad_text(ids, truncate).to(self.device)

    def encode(self, image: Image.Image | Path | str) -> Tensor:
        """The middle square of an image, resized to the model's size, as image tokens int64 (1, h * w)."""
        square = resize_center_crop(
            load_image(image), self.transformer.layout.rows * self.dvae.downsample_factor
        )
        return self.dvae.encode(to_tensor([square]).to(self.device))

    def decode(self, tokens: Tensor) -> Tensor:
        """Image tokens int64 (N, h * w) -> pixels (N, 3, H, W) in [0, 1]."""
        return self.dvae.decode(tokens, self.transformer.layout.grid)
