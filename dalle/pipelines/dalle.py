"""DALL-E: caption -> h w image tokens -> N images -> ranked images (paper sections 2 and 2.6)."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from dalle.clip import CLIPScorer
from dalle.hub.registry import LoadedModel, load_model, weights_hash
from dalle.io.images import ImageSource, load_image, resize_center_crop, to_tensor
from dalle.layout import check_tokens
from dalle.pipelines.best_of_n import Callback, GenerationProgress, auto_batch_size, sample_best_of_n
from dalle.pipelines.completion import complete
from dalle.pipelines.generation import Generation, LogLikelihood
from dalle.pipelines.pipeline import Pipeline, shared_text
from dalle.sampling import SamplingConfig
from dalle.text import BPETokenizer
from dalle.train.precision import DTYPES, Precision, resolve_device, resolve_precision
from dalle.transformer import Transformer
from dalle.transformer.generate import cast_linear_weights, inference_autocast, quantize_int8
from dalle.transformer.losses import log_likelihood
from dalle.types import ImageTokenizer, Scorer


class DALLE(Pipeline):
    """The whole model. `from_pretrained` opens a model directory; `save_pretrained` writes one.

    Args:
        dvae: image tokenizer.
        transformer: generates image tokens from text tokens.
        text: the text tokenizer of the transformer's training.
        scorer: ranks images; without it they come unranked.
    """

    PARTS, Sampling = ("dvae", "transformer"), SamplingConfig

    def __init__(
        self, dvae: ImageTokenizer, transformer: Transformer, text: BPETokenizer, scorer: Scorer | None = None
    ):
        layout = transformer.layout
        if dvae.vocab_size != layout.image_vocab or text.vocab_size > layout.text_vocab:
            raise ValueError(
                f"the image tokenizer has {dvae.vocab_size} codes, the text tokenizer {text.vocab_size} ids, "
                f"the transformer {layout.image_vocab} and {layout.text_vocab}: they do not belong together"
            )
        self.dvae, self.transformer, self.text, self.scorer = dvae, transformer, text, scorer

    complete = complete

    @property
    def device(self) -> torch.device:
        """Device of the transformer."""
        return self.transformer.to_logits.weight.device

    @property
    def image_size(self) -> int:
        """Pixels on a side; ValueError unless the grid is square."""
        rows, columns = self.transformer.layout.grid
        if rows != columns:
            raise ValueError(f"images need a model with a square grid, this one has {rows} x {columns}")
        return rows * self.dvae.downsample_factor

    def generate(
        self,
        prompt: str | Sequence[str],
        n: int = 4,
        best_of: int = 64,
        seed: int = 0,
        prefix: Tensor | None = None,
        truncate: bool = False,
        progress: bool = True,
        callback: Callback | None = None,
        shard: tuple[int, int] = (0, 1),
        **sampling,
    ) -> Generation | list[Generation]:
        """Generates `best_of` candidates for a prompt and keeps the n that the scorer ranks highest.

        Ctrl-C returns what is ranked so far, with a warning.

        Args:
            prompt: one, or several: then a list comes back, without the prompts that were interrupted.
            n: images to keep.
            best_of: candidates, 512 in the paper. Memory does not depend on it.
            seed: with the prompt and a candidate's index it determines the candidate's random numbers.
            prefix: image tokens to keep, from `dalle.pipelines.completion.prefix_tokens`.
            truncate: cut a prompt that is too long instead of refusing it.
            progress: show a progress bar.
            callback: called with the state after each row of tokens and after each ranked batch.
            shard: see `dalle.pipelines.best_of_n.sample_best_of_n`.
            sampling: temperature, top_k, top_p, min_p, guidance and the other fields of
                `dalle.sampling.SamplingConfig`.

        Raises:
            ValueError: an empty or too long prompt, best_of < n, settings out of range.
        """
        several = isinstance(prompt, Iterable) and not isinstance(prompt, str)
        prompts = list(prompt) if several else [prompt]
        steps = self.steps(prompts, n, best_of, seed, SamplingConfig(**sampling), prefix, truncate, shard)
        generations = self.run(steps, progress, callback)
        return generations if several else generations[0]

    def steps(
        self,
        prompts: Sequence[str],
        n: int,
        best_of: int,
        seed: int = 0,
        sampling: SamplingConfig = SamplingConfig(),
        prefix: Tensor | None = None,
        truncate: bool = False,
        shard: tuple[int, int] = (0, 1),
    ) -> Iterator[GenerationProgress]:
        """The loop behind `generate`: the state after each token and ranked batch; checks all arguments."""
        n, best_of, seed = self.check_counts(n, best_of, seed)
        ids = self.check_prompts(prompts, warn=True)
        text_tokens = self.transformer.layout.pad_text(ids, truncate).to(self.device)
        return sample_best_of_n(self, prompts, n, best_of, seed, sampling, text_tokens, prefix, shard)

    def auto_batch_size(self, sampling: SamplingConfig, best_of: int = 1) -> int:
        """Rows of a batch: as configured, or as fit; see `SamplingConfig`."""
        return sampling.batch_size or auto_batch_size(self.transformer, sampling.guidance, best_of)

    def log_likelihood(
        self, caption: str, image: ImageSource | Tensor, truncate: bool = False
    ) -> LogLikelihood:
        """Log-likelihood in nats of a caption and of an image after it; (N,) each for tokens (N, h * w)."""
        tokens = image.to(self.device) if isinstance(image, Tensor) else self.encode(image)
        check_tokens(tokens, self.transformer.layout.image_vocab, "image tokens")
        text = self.text_tokens([caption], truncate).expand(len(tokens), -1)
        ids = self.transformer.layout.pack(text, tokens)
        with inference_autocast(self.transformer):
            parts = list(map(partial(log_likelihood, self.transformer), ids.split(16)))
        text, image_nats = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
        nats = LogLikelihood(text, image_nats)
        return nats if isinstance(image, Tensor) else LogLikelihood(*map(float, nats))

    def text_tokens(self, prompts: Sequence[str], truncate: bool = False) -> Tensor:
        """Prompts -> int64 (len(prompts), text_len); ValueError for an empty or too long one."""
        ids = self.check_prompts(prompts)
        return self.transformer.layout.pad_text(ids, truncate).to(self.device)

    def encode(self, image: ImageSource) -> Tensor:
        """The center square of an image, resized to the model's size, as image tokens int64 (1, h * w)."""
        square = resize_center_crop(load_image(image), self.image_size)
        return self.dvae.encode(to_tensor([square]).to(self.device))

    def decode(self, tokens: Tensor) -> Tensor:
        """Image tokens int64 (N, h * w) -> pixels (N, 3, H, W) in [0, 1]."""
        return self.dvae.decode(tokens, self.transformer.layout.grid)

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
        """Opens a model directory written by `save_pretrained`.

        Args:
            source: a path, which never uses the network, or else a Hub id, "owner/name".
            device: as `to`.
            precision, int8: as `to_precision`.
            revision, token: of the Hub, see `dalle.hub.hub.resolve_source`.

        Raises:
            ValueError: no such directory, a damaged file, or models that do not belong together.
        """
        device = resolve_device(str(device))
        directory, kinds = cls.open_directory(source, revision, token)
        precision = resolve_precision(precision, device, inference=True)
        at = {"transformer": "cpu"} if int8 or precision != "fp32" else {}  # rounded before it is moved
        model = cls.from_parts(*(load_model(directory, kind, at.get(kind, device)) for kind in kinds))
        model = model.to_precision(precision, int8)
        return model.to(device) if at else model

    @classmethod
    def from_parts(
        cls,
        dvae: LoadedModel,
        transformer: LoadedModel,
        clip: LoadedModel | None = None,
        text: BPETokenizer | None = None,
    ) -> Self:
        """Joins models loaded from runs; ValueError for those that were not trained for one another."""
        own = shared_text(transformer, text, clip, needed=("dvae",))
        made_by = transformer.inputs["dvae"]
        if made_by != (found := weights_hash(dvae.model)):
            trained_on = f"{transformer.source} was trained on tokens of dVAE {made_by}"
            raise ValueError(f"{trained_on}, {dvae.source} is {found}: they do not belong together")
        return cls(dvae.model, transformer.model, own, CLIPScorer(clip.model, own) if clip else None)

    def to_precision(self, precision: Precision, int8: bool = False) -> Self:
        """The same model with smaller matrices in the transformer, for sampling; everything else is shared.

        The hash stays that of the original weights, and an int8 model stays as it is.

        Args:
            precision: of the linear layers; "auto" is bf16 where the device multiplies it in hardware, else
                fp16 on CUDA with tensor cores, else fp32.
            int8: store them and the output matrix in 8 bits, see dalle/nn/int8.py.
        """
        resolved = resolve_precision(precision, self.device, inference=True)
        transformer = cast_linear_weights(self.transformer, DTYPES[resolved])
        transformer = quantize_int8(transformer) if int8 else transformer
        if transformer is self.transformer:
            return self
        rounded = type(self)(self.dvae, transformer, self.text, self.scorer)
        rounded.precision = f"{resolved}, int8 matrices" if int8 else resolved
        rounded._hash = self.hash
        return rounded
