"""GLIDE: caption -> N images by diffusion, upsampled -> ranked images (Nichol et al. 2021)."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from dalle.clip import CLIPScorer
from dalle.hub.registry import LoadedModel, load_model
from dalle.io.images import ImageSource, load_image, resize_center_crop, to_tensor
from dalle.pipelines.best_of_n import Callback, TopN, candidate_batches
from dalle.pipelines.diffusion import (
    UPSAMPLER_NOISE,
    DiffusionProgress,
    Stage,
    batch_size_for,
    sample_by_diffusion,
)
from dalle.pipelines.generation import Generation
from dalle.pipelines.inpainting import KnownImage, inpaint
from dalle.pipelines.pipeline import Pipeline, shared_text
from dalle.pretrained.glide import is_glide_folder, load_glide
from dalle.sampling import DiffusionSampling
from dalle.text import BPETokenizer
from dalle.train.precision import DTYPES, Precision, resolve_device, resolve_precision
from dalle.types import Scorer
from dalle.unet import UNet
from dalle.unet.model import cast_weights
from dalle.unet.text import pack_text


class GLIDE(Pipeline):
    """The whole model. `from_pretrained` opens a model directory; `save_pretrained` writes one.

    Args:
        base: generates small images from text ids; it and the upsampler are set to eval mode.
        upsampler: makes them larger; without it they stay small.
        text: the text tokenizer of their training.
        scorer: ranks images; without it they come unranked. For CLIP guidance it has a method `log_prob`, as
            `dalle.pretrained.glide_clip.NoisedCLIPScorer`.

    Raises:
        ValueError: models that do not belong together, or whose conditions are no text.
    """

    PARTS, OPTIONAL = ("base", "upsampler"), ("upsampler", "clip")
    Sampling = DiffusionSampling

    def __init__(
        self, base: UNet, upsampler: UNet | None = None, *, text: BPETokenizer, scorer: Scorer | None = None
    ):
        for kind, unet in (("base", base), ("upsampler", upsampler)):
            config = unet and unet.config
            if config and (config.kind != kind or config.classes or config.image_embedding):
                raise ValueError(f"this U-Net is no {kind} of GLIDE, which reads text alone")
            if config and config.text == "ids" and text.vocab_size > config.text_vocab:
                raise ValueError(
                    f"the text tokenizer has {text.vocab_size} ids, the {kind} {config.text_vocab}: "
                    "they do not belong together"
                )
        if base.config.text != "ids" or (upsampler and upsampler.config.text == "clip"):
            raise ValueError("GLIDE's models read text ids; this one reads none, or the states of a CLIP")
        sides = [unet.config.image_size for unet in (base, upsampler) if unet]
        if sides[-1] <= sides[0] and upsampler:
            raise ValueError(f"the base has {sides[0]} pixels on a side, the upsampler {sides[1]}, not more")
        self.base, self.upsampler = base.eval(), upsampler and upsampler.eval()
        self.text, self.scorer = text, scorer

    inpaint = inpaint

    @property
    def device(self) -> torch.device:
        """Device of the base model."""
        return self.base.out[2].weight.device

    @property
    def image_size(self) -> int:
        """Pixels on a side of the images."""
        return (self.upsampler or self.base).config.image_size

    def generate(
        self,
        prompt: str | Sequence[str],
        n: int = 4,
        best_of: int | None = None,
        seed: int = 0,
        known: KnownImage | None = None,
        low: Tensor | None = None,
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
            best_of: candidates, by default n. Memory does not depend on it.
            seed: with the prompt and a candidate's index it determines the candidate's random numbers.
            known: pixels to keep, from `dalle.pipelines.inpainting.known_image`.
            low: image (1, 3, h, w) in [-1, 1] of the base model's size, to upsample only.
            truncate: cut a prompt that is too long instead of refusing it.
            progress: show a progress bar.
            callback: called with the state after each step and after each ranked batch.
            shard: (rank, world size): every world-size-th batch from the rank-th.
            sampling: steps, guidance, sampler, clip_guidance and the other fields of
                `dalle.sampling.DiffusionSampling`.

        Raises:
            ValueError: an empty or too long prompt, best_of < n, settings out of range or not for this model.
        """
        several = isinstance(prompt, Iterable) and not isinstance(prompt, str)
        prompts = list(prompt) if several else [prompt]
        config = DiffusionSampling(**sampling)
        best_of = n if best_of is None else best_of
        steps = self.steps(prompts, n, best_of, seed, config, known, low, truncate, shard)
        generations = self.run(steps, progress, callback)
        return generations if several else generations[0]

    def upsample(self, image: ImageSource, prompt: str, n: int = 1, **options) -> Generation:
        """The upsampler's images of the center square of an image, resized to the base model's size.

        Of an image of that size, as one that the base model generated, nothing is lost. Arguments as
        `generate`.
        """
        square = resize_center_crop(load_image(image), self.base.config.image_size)
        low = (to_tensor([square]) * 255).round() / 127.5 - 1
        return self.generate(prompt, n, low=low.to(self.device), **options)

    def steps(
        self,
        prompts: Sequence[str],
        n: int,
        best_of: int,
        seed: int = 0,
        sampling: DiffusionSampling = DiffusionSampling(),
        known: KnownImage | None = None,
        low: Tensor | None = None,
        truncate: bool = False,
        shard: tuple[int, int] = (0, 1),
    ) -> Iterator[DiffusionProgress]:
        """The loop behind `generate`: the state after each step and ranked batch; checks all arguments."""
        n, best_of, seed = self.check_counts(n, best_of, seed)
        ids = self.check_prompts(prompts, warn=True)
        if low is not None and self.upsampler is None:
            raise ValueError("this model has no upsampler; give GLIDE one")
        stages = [self.base_stage(ids, sampling, known, truncate)] if low is None else []
        if self.upsampler is not None:
            stages.append(self.upsampler_stage(ids, sampling, known, truncate))
        top = [TopN(n, prompt, self.scorer, seed, best_of) for prompt in prompts]
        rows = self.auto_batch_size(sampling, best_of)
        batches = list(candidate_batches(len(prompts), best_of, rows, sampling.prompts_per_batch))
        return sample_by_diffusion(stages, low, prompts, top, seed, batches[shard[0] :: shard[1]])

    def base_stage(
        self, ids: list[list[int]], sampling: DiffusionSampling, known: KnownImage | None, truncate: bool
    ) -> Stage:
        """How the base is sampled; ValueError for what this model cannot do."""
        config = self.base.config
        if sampling.guidance != 1 and not config.diffusion.caption_dropout:
            raise ValueError(
                "guidance needs a model trained with caption dropout, which this one was not; take guidance 1"
            )
        if sampling.clip_guidance and not hasattr(self.scorer, "log_prob"):
            raise ValueError("clip_guidance needs a scorer trained on noised images; this model has none")
        most = config.diffusion.steps
        if not 2 <= sampling.steps <= most:
            raise ValueError(f"steps must be 2 to {most}, those of the base model, got {sampling.steps}")
        return Stage(
            self.base,
            self.base.schedule(f"{'dpm' if sampling.sampler == 'dpm' else ''}{sampling.steps}"),
            sampling.sampler,
            self.pack(self.base, ids, truncate),
            self.precision,
            known and known.at(config.image_size, self.device),
            sampling.guidance,
            self.scorer,
            sampling.clip_guidance or 0.0,
        )

    def upsampler_stage(
        self, ids: list[list[int]], sampling: DiffusionSampling, known: KnownImage | None, truncate: bool
    ) -> Stage:
        """How the upsampler is sampled: by DDIM without guidance, as in the release."""
        return Stage(
            self.upsampler,
            self.upsampler.schedule(sampling.upsample_steps),
            "ddim",
            self.pack(self.upsampler, ids, truncate),
            self.precision,
            known and known.at(self.image_size, self.device),
            temperature=sampling.upsample_temperature,
            first_time=UPSAMPLER_NOISE,
        )

    def pack(self, unet: UNet, ids: list[list[int]], truncate: bool) -> Tensor | None:
        """Text ids of prompts -> int64 (len(ids), T), None for a model that reads none."""
        if unet.config.text == "none":
            return None
        return pack_text(ids, unet.config.text_len, unet.config.text_vocab, truncate).to(self.device)

    def text_tokens(self, prompts: Sequence[str], truncate: bool = False) -> Tensor:
        """Prompts -> int64 (len(prompts), T) of the base; ValueError for an empty or too long one."""
        return self.pack(self.base, self.check_prompts(prompts), truncate)

    def auto_batch_size(self, sampling: DiffusionSampling, best_of: int = 1) -> int:
        """Rows of a batch: as configured, or as fit; see `DiffusionSampling`."""
        return sampling.batch_size or batch_size_for(list(self.parts.values()), sampling)

    @classmethod
    def from_pretrained(
        cls,
        source: Path | str,
        device: str | torch.device = "cpu",
        precision: Precision = "fp32",
        revision: str | None = None,
        token: str | bool | None = None,
        inpainting: bool = False,
    ) -> Self:
        """Opens a model directory written by `save_pretrained`, or a folder of GLIDE's published files.

        Args:
            source: a path, which never uses the network, or else a Hub id, "owner/name".
            device, precision: as `to` and `to_precision`.
            revision, token: of the Hub, see `dalle.hub.hub.resolve_source`.
            inpainting: of published files prefer those for inpainting.

        Raises:
            ValueError: no such directory, a damaged file, or models that do not belong together.
        """
        device = resolve_device(str(device))
        if is_glide_folder(folder := Path(source)):
            return cls(**load_glide(folder, inpainting, device)).to_precision(precision)
        directory, kinds = cls.open_directory(source, revision, token)
        model = cls.from_parts(**{kind: load_model(directory, kind, device) for kind in kinds})
        return model.to_precision(precision)

    @classmethod
    def from_parts(
        cls,
        base: LoadedModel,
        upsampler: LoadedModel | None = None,
        clip: LoadedModel | None = None,
        text: BPETokenizer | None = None,
    ) -> Self:
        """Joins models loaded from runs; ValueError for those that were not trained for one another."""
        reads = upsampler if upsampler and upsampler.model.config.text != "none" else None
        own = shared_text(base, text, reads, clip)
        scorer = CLIPScorer(clip.model, own) if clip else None
        return cls(base.model, upsampler and upsampler.model, text=own, scorer=scorer)

    def to_precision(self, precision: Precision, int8: bool = False) -> Self:
        """The same model with smaller matrices in its U-Nets, for sampling; everything else is shared.

        The hash stays that of the original weights.

        Args:
            precision: of the layers of their blocks, see `DALLE.to_precision`.
            int8: not possible for convolutions.
        """
        if int8:
            raise ValueError("int8 is for transformers; GLIDE's convolutions take precision bf16 or fp16")
        resolved = resolve_precision(precision, self.device, inference=True)
        if resolved == self.precision:
            return self
        models = {name: cast_weights(model, DTYPES[resolved]) for name, model in self.parts.items()}
        rounded = type(self)(**models, text=self.text, scorer=self.scorer)
        rounded.precision, rounded._hash = resolved, self.hash
        return rounded
