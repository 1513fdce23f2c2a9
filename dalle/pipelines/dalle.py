"""DALL-E: caption -> h w image tokens -> N images -> ranked images (paper sections 2 and 2.6)."""

import copy
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Self

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dalle.clip import CLIP, CLIPScorer
from dalle.hub.hub import push_to_hub, resolve_source
from dalle.hub.model_card import Report
from dalle.hub.registry import LoadedModel, load_model, weights_hash, write_model_directory
from dalle.io.files import read_config
from dalle.io.images import ImageSource, load_image, resize_center_crop, to_tensor
from dalle.io.text import VISIBLE
from dalle.layout import check_tokens
from dalle.pipelines.best_of_n import Callback, GenerationProgress, sample_best_of_n
from dalle.pipelines.completion import complete
from dalle.pipelines.generation import Generation, LogLikelihood
from dalle.sampling import MAX_COUNT, SamplingConfig, whole_numbers
from dalle.text import BPETokenizer, text_tokenizer_from_dict
from dalle.train.precision import DTYPES, Precision, copy_to_device, resolve_device, resolve_precision
from dalle.transformer import Transformer
from dalle.transformer.generate import cast_linear_weights, inference_autocast, quantize_int8
from dalle.transformer.losses import log_likelihood
from dalle.types import ImageTokenizer, Scorer


class DALLE:
    """The whole model. `from_pretrained` opens a model directory; `save_pretrained` writes one.

    Args:
        dvae: image tokenizer.
        transformer: generates image tokens from text tokens.
        text: the text tokenizer of the transformer's training.
        scorer: ranks images; without it they come unranked.
    """

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
        self._hash: str | None = None  # of the weights before rounding
        self.precision = "fp32"
        """Of the transformer's matrices, as sample records name it: "bf16", or "bf16, int8 matrices"."""

    push_to_hub = push_to_hub
    complete = complete

    @property
    def device(self) -> torch.device:
        """Device of the transformer."""
        return self.transformer.to_logits.weight.device

    @property
    def hash(self) -> str:
        """Hashes of the weights of the dVAE, the transformer and, if the scorer is ours, its `CLIP`."""
        clip = getattr(self.scorer, "model", None)
        models = [self.dvae, self.transformer, *([clip] if isinstance(clip, CLIP) else [])]
        return self._hash or "-".join(map(weights_hash, models))

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
        config = SamplingConfig(**sampling)
        step = None
        try:
            with tqdm(desc="sampling", unit="image", disable=None if progress else True) as bar:
                for step in self.steps(prompts, n, best_of, seed, config, prefix, truncate, shard):
                    bar.total = step.total
                    bar.update(step.seen - bar.n)
                    if callback is not None and (step.ranked or step.whole_rows):
                        callback(step)
        except KeyboardInterrupt:
            if step is None or not step.seen:
                raise
            warnings.warn(f"interrupted: {step.seen} of {step.total} candidates are ranked", stacklevel=2)
        generations = [top.generation() for top in step.top if top.seen] if step else []
        return generations if several else generations[0]

    def stream(
        self, prompt: str, n: int = 1, seed: int = 0, truncate: bool = False, **sampling
    ) -> Iterator[list[Image.Image]]:
        """Yields n unranked images after each row of tokens, gray below it; arguments as `generate`."""
        for step in self.steps([prompt], n, n, seed, SamplingConfig(**sampling), truncate=truncate):
            if step.batch.wanted < n:
                raise ValueError(f"n must be at most {step.batch.wanted}, got {n}; raise batch_size")
            if step.whole_rows:
                yield step.images

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
        if {type(n), type(best_of), type(seed)} != {int}:
            n, best_of, seed = whole_numbers(n=n, best_of=best_of, seed=seed)
        if not 1 <= n <= best_of <= MAX_COUNT:
            raise ValueError(f"best_of must be n to {MAX_COUNT}, n 1 or more; got best_of={best_of}, n={n}")
        text_tokens = self.text_tokens(prompts, truncate)
        if pieces := [piece for prompt in prompts for piece in self.text.out_of_vocabulary(prompt)]:
            shown = ", ".join(map(repr, pieces[:5]))
            warnings.warn(
                f"the vocabulary lacks letters of {shown}: the model may not know them", stacklevel=3
            )
        if self.scorer is None and best_of > n:
            warnings.warn(f"this model has no scorer: generating {n} images, unranked", stacklevel=3)
            best_of = n
        return sample_best_of_n(self, prompts, n, best_of, seed, sampling, text_tokens, prefix, shard)

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
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"the prompt must be text, got {prompts!r}")
        ids = [self.text.encode(prompt) for prompt in prompts]
        if not all(ids) or not all(map(VISIBLE.search, prompts)):
            raise ValueError("the prompt is empty; describe the image")
        return self.transformer.layout.pad_text(ids, truncate).to(self.device)

    def encode(self, image: ImageSource) -> Tensor:
        """The center square of an image, resized to the model's size, as image tokens int64 (1, h * w)."""
        rows, columns = self.transformer.layout.grid
        if rows != columns:
            raise ValueError(f"images need a model with a square grid, this one has {rows} x {columns}")
        square = resize_center_crop(load_image(image), rows * self.dvae.downsample_factor)
        return self.dvae.encode(to_tensor([square]).to(self.device))

    def decode(self, tokens: Tensor) -> Tensor:
        """Image tokens int64 (N, h * w) -> pixels (N, 3, H, W) in [0, 1]."""
        return self.dvae.decode(tokens, self.transformer.layout.grid)

    def save_pretrained(
        self, directory: Path | str, report: Report | None = None, license: str | None = None
    ) -> None:
        """Writes a model directory (dalle/hub/registry.py), with a model card.

        Raises:
            ValueError: a model that is not one of the library's own, rounded weights, or no right to write.
        """
        if self._hash is not None:
            raise ValueError("the weights were rounded by to_precision; save the original model")
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
        """Opens a model directory written by `save_pretrained`.

        Args:
            source: a path, which never uses the network, or else a Hub id, "owner/name".
            device: as `to`.
            precision, int8: as `to_precision`.
            revision, token: of the Hub, see `dalle.hub.hub.resolve_source`.

        Raises:
            ValueError: no such directory, a damaged file, or models that do not belong together.
        """
        kinds, device = ("dvae", "transformer", "clip"), resolve_device(str(device))
        directory = Path(source)
        if revision is not None or not directory.is_dir():
            directory = resolve_source(source, kinds, revision, token)
        if "clip" not in read_config(directory)["parts"]:
            kinds = kinds[:2]
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
        for part, needed in ((transformer, {"text", "text_hash", "dvae"}), (clip, {"text_hash"})):
            if part and (missing := sorted(needed - part.inputs.keys())):
                raise ValueError(f"{part.source} does not name the {' and '.join(missing)} of its training")
        own, made_by = text_tokenizer_from_dict(transformer.inputs["text"]), transformer.inputs["dvae"]
        other = "was trained with a text tokenizer other than"
        if text and text.hash != transformer.inputs["text_hash"]:
            raise ValueError(f"{transformer.source} {other} the one given")
        if clip and clip.inputs["text_hash"] != transformer.inputs["text_hash"]:
            raise ValueError(f"{clip.source} {other} {transformer.source}")
        if made_by != (found := weights_hash(dvae.model)):
            trained_on = f"{transformer.source} was trained on tokens of dVAE {made_by}"
            raise ValueError(f"{trained_on}, {dvae.source} is {found}: they do not belong together")
        return cls(dvae.model, transformer.model, own, CLIPScorer(clip.model, own) if clip else None)

    def to(self, device: str | torch.device) -> Self:
        """Moves the models to a device; "auto" is the first there is of cuda, mps and cpu. Returns itself.

        Other pipelines that share them stay where they are.
        """
        device = resolve_device(str(device))
        self.dvae, self.transformer = (copy_to_device(m, device) for m in (self.dvae, self.transformer))
        if isinstance(clip := getattr(self.scorer, "model", None), torch.nn.Module):
            self.scorer = copy.copy(self.scorer)
            self.scorer.model = copy_to_device(clip, device)
        return self

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
