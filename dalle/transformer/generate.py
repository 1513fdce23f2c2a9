"""Autoregressive sampling of image tokens: prefill, then one decoding step per token (paper section 3).

C captions, n candidates of each, B = C n rows (2 B under guidance), T text positions, N image positions, D
width
"""

import copy
from collections import deque
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from dalle.compile import compiled
from dalle.nn.int8 import Int8Linear
from dalle.nn.kv_cache import KVCache
from dalle.sampling import sample_tokens
from dalle.transformer.model import Transformer

TO_GENERATE = -1
"""Marks the tokens of a prefix that are to be generated."""

DecodeStep = Callable[[Transformer, Tensor, int | Tensor, list[KVCache]], Tensor]
"""`Transformer.decode_step`, or a compiled or CUDA graph version of it."""


@torch.inference_mode()
def generate_tokens(
    model: Transformer,
    text_tokens: Tensor,
    noise: Tensor,
    prefix: Tensor | None = None,
    guidance: float | None = None,
    step: DecodeStep | None = None,
    **options,
) -> Iterator[Tensor]:
    """Samples image tokens and yields them after each position.

    Args:
        text_tokens: int64 (C, T) from `TokenLayout.pad_text`.
        noise: (C, n, N) in [0, 1), see `sampling.candidate_noise`.
        prefix: int64 (C, p), tokens to keep at the start; those that are TO_GENERATE are sampled.
        guidance: s in unconditional + s (conditional - unconditional) logits, the unconditional ones with an
            empty caption; None or 1 is the plain model.
        step: from `decode_step_of`; None is `Transformer.decode_step`.
        options: temperature, top_k, top_p and min_p, see `sampling.sample_tokens`.

    Yields:
        int64 (C, n, t) for each t up to N, a view that later positions extend; only once if the prefix is a
        whole image. Nothing waits for the device, but at the end.

    Raises:
        ValueError: logits that are not numbers.
    """
    (captions, candidates, length), device = noise.shape, text_tokens.device
    codes = model.layout.image_vocab
    if torch.is_autocast_enabled(device.type):
        model = cast_linear_weights(model, torch.get_autocast_dtype(device.type))
    guided = guidance not in (None, 1)
    positions = torch.arange(length, device=device).split(1)  # the same shapes at each, as a graph needs
    if step is None and device.type == "cpu":
        positions = range(length)  # an int reads fewer keys
    step = step or type(model).decode_step
    noise = noise.reshape(-1, length).to(torch.float64 if device.type == "cpu" else torch.float32).to(device)
    known, first = torch.full((captions, length), TO_GENERATE, device=device), 0
    if prefix is not None:
        known[:, : prefix.shape[1]] = prefix
        first = _first_to_generate(known)
    tokens = known.repeat_interleave(candidates, dim=0)  # (B, N)
    if first == length:
        yield tokens.view(captions, candidates, length)
        return

    inputs = _prefill_inputs(model, text_tokens, known[:, :first], guided)
    caches = model.init_kv_caches(len(inputs), candidates)
    with inference_autocast(model):
        hidden = model.prefill(inputs, caches)[:, -1]
    hidden = hidden.repeat_interleave(candidates, dim=0)  # (B, D)
    for i in range(first, length):
        token = _sample(model, hidden, noise[:, i], guidance if guided else None, options)
        token = torch.where(tokens[:, i] == TO_GENERATE, token, tokens[:, i])
        tokens[:, i] = token
        yield tokens[:, : i + 1].view(captions, candidates, i + 1)
        if i + 1 < length:
            token = token.clamp(max=codes - 1).repeat(2 if guided else 1)
            with torch.autocast(device.type, enabled=False):
                hidden = step(model, token, positions[i + 1], caches)
    if (tokens == codes).any():
        raise ValueError(
            "the logits are not numbers; sample in fp32 or bf16, at lower guidance, or check the weights"
        )


def _prefill_inputs(model: Transformer, text: Tensor, start: Tensor, guided: bool) -> Tensor:
    """Input ids (C, n) of captions and kept tokens; under guidance also with empty captions, (2 C, n)."""
    if guided:
        empty = model.layout.pad_text([[]]).to(text).expand(len(text), -1)
        text, start = torch.cat([text, empty]), start.repeat(2, 1)
    return model.layout.shift(model.layout.pack(text, start))


def _first_to_generate(known: Tensor) -> int:
    """The first position of (C, N) at which a caption has no kept token; N if all have."""
    to_generate = (known == TO_GENERATE).any(dim=0).tolist()
    return to_generate.index(True) if any(to_generate) else len(to_generate)


def _sample(
    model: Transformer, hidden: Tensor, uniform: Tensor, guidance: float | None, options: dict
) -> Tensor:
    """The token (C n,) that states (B, D) predict."""
    with torch.autocast(hidden.device.type, enabled=False):
        logits = model.image_logits(hidden)
        if guidance is not None:
            conditional, unconditional = logits.chunk(2)
            logits = unconditional + guidance * (conditional - unconditional)
        return sample_tokens(logits, uniform, **options)


def generate(model: Transformer, text_tokens: Tensor, noise: Tensor, **options) -> Tensor:
    """All image tokens, int64 (C, n, N); arguments as `generate_tokens`."""
    return deque(generate_tokens(model, text_tokens, noise, **options), maxlen=1).pop()


def decode_step_of(
    model: Transformer, compile: bool = False, cuda_graph: bool | None = None
) -> DecodeStep | None:
    """The decoding step for `generate_tokens`, compiled, as a CUDA graph, or both; None for the plain one.

    Compiling takes half a minute or more, once for each class of model and shape. By default there is a graph
    where the model is on CUDA.

    Raises:
        ValueError: a CUDA graph on another device.
    """
    device = model.to_logits.weight.device
    if cuda_graph and device.type != "cuda":
        raise ValueError(f"cuda_graph needs a CUDA device, the model is on {device.type}; leave it out")
    cuda_graph = device.type == "cuda" if cuda_graph is None else cuda_graph
    if not compile and not cuda_graph:
        return None
    step = type(model).decode_step
    if compile:
        step = compiled(step)
    return CUDAGraphStep(step) if cuda_graph else step


class CUDAGraphStep:
    """A decoding step recorded as a graph of CUDA kernels at its first call and replayed after that.

    One serves a single call of `generate_tokens`: the graph holds the addresses of its caches. CUDA takes the
    kernels of the current device alone, so the model's is made the current one.
    """

    def __init__(self, step: DecodeStep):
        self.step, self.graph = step, None

    def __call__(self, model: Transformer, tokens: Tensor, position: Tensor, caches: list[KVCache]) -> Tensor:
        """The hidden state (B, D), overwritten by the next call."""
        with torch.cuda.device(tokens.device):
            if self.graph is None:
                self._record(model, tokens.clone(), position.clone(), caches)
            self.tokens.copy_(tokens)
            self.position.copy_(position)
            self.graph.replay()
        return self.hidden

    def _record(self, model: Transformer, *inputs) -> None:
        self.tokens, self.position, _ = inputs
        self.graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # warm-up: libraries choose their kernels
            self.step(model, *inputs)
        torch.cuda.current_stream().wait_stream(side)
        # other threads, of the web page, may use the device meanwhile
        with torch.cuda.graph(self.graph, stream=side, capture_error_mode="thread_local"):
            self.hidden = self.step(model, *inputs)


def cast_linear_weights(model: Transformer, dtype: torch.dtype) -> Transformer:
    """The same model with the linear layers of its blocks in another dtype; everything else is shared.

    Norms, embeddings and the output matrix stay as they are (B.2: logits in fp32), and so does an int8 model.
    """
    linear = [module for module in model.layers.modules() if isinstance(module, nn.Linear)]
    if all(module.weight.dtype == dtype for module in linear):
        return model
    shared = {id(t): t for t in (*model.parameters(), *model.buffers(), *model.patterns.values())}
    for module in linear:
        for p in module.parameters():
            shared[id(p)] = nn.Parameter(p.detach().to(dtype), requires_grad=False)
    return copy.deepcopy(model, shared)


def quantize_int8(model: Transformer) -> Transformer:
    """The same model with int8 matrices in blocks and output (dalle/nn/int8.py); the rest is shared.

    A transformer of another library keeps its output matrix, which may be tied to the embedding.
    """
    linear = [module for module in model.layers.modules() if isinstance(module, nn.Linear)]
    if not linear:
        return model
    linear += [model.to_logits] if isinstance(model, Transformer) else []
    shared = {id(t): t for t in (*model.parameters(), *model.buffers(), *model.patterns.values())}
    return copy.deepcopy(model, shared | {id(module): Int8Linear(module) for module in linear})


def inference_autocast(model: Transformer) -> torch.autocast:
    """The autocast context for whole sequences, by the dtype of the blocks."""
    linear = next(module for module in model.layers.modules() if isinstance(module, (nn.Linear, Int8Linear)))
    like = linear.weight
    return torch.autocast(like.device.type, dtype=like.dtype, enabled=like.dtype != torch.float32)
