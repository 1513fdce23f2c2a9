"""Reference of U-Nets of OpenAI over the tensors of their files, and small files; shares no code.

Two levels of 32 and 128 channels, attention at the coarser one; heads are 64 wide.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.reference import RandomState, State

WIDTH, COARSE, EMB = 32, 128, 128
TEXT_LEN, TEXT_VOCAB, TEXT_WIDTH, EMBEDDING = 6, 11, 128, 24


class UNetState(RandomState):
    """Tensors of a U-Net or classifier, all random, also those that begin at zero."""

    def conv(self, name: str, n_in: int, n_out: int, *kernel: int) -> None:
        self.linear(name, n_out, n_in, *kernel)
        self[f"{name}.weight"] /= 0.3 * math.sqrt(n_in * math.prod(kernel))

    def resblock(self, name: str, n_in: int, n_out: int, scale_shift: bool = True) -> None:
        self.norm(f"{name}.in_layers.0", n_in)
        self.conv(f"{name}.in_layers.2", n_in, n_out, 3, 3)
        self.conv(f"{name}.emb_layers.1", EMB, n_out * (2 if scale_shift else 1))
        self.norm(f"{name}.out_layers.0", n_out)
        self.conv(f"{name}.out_layers.3", n_out, n_out, 3, 3)
        if n_in != n_out:
            self.conv(f"{name}.skip_connection", n_in, n_out, 1, 1)

    def attention(self, name: str, context: int | None) -> None:
        self.norm(f"{name}.norm", COARSE)
        self.conv(f"{name}.qkv", COARSE, 3 * COARSE, 1)
        if context:
            self.conv(f"{name}.encoder_kv", context, 2 * COARSE, 1)
        self.conv(f"{name}.proj_out", COARSE, COARSE, 1)

    def encoder(self, n_in: int, blocks: int, context: int | None, scale_shift: bool = True) -> None:
        self.conv("time_embed.0", WIDTH, EMB)
        self.conv("time_embed.2", EMB, EMB)
        self.conv("input_blocks.0.0", n_in, WIDTH, 3, 3)
        for i in range(1, blocks + 1):
            self.resblock(f"input_blocks.{i}.0", WIDTH, WIDTH, scale_shift)
        self.resblock(f"input_blocks.{blocks + 1}.0", WIDTH, WIDTH, scale_shift)
        for i in range(blocks):
            name = f"input_blocks.{blocks + 2 + i}"
            self.resblock(f"{name}.0", COARSE if i else WIDTH, COARSE, scale_shift)
            self.attention(f"{name}.1", context)
        self.resblock("middle_block.0", COARSE, COARSE, scale_shift)
        self.attention("middle_block.1", context)
        self.resblock("middle_block.2", COARSE, COARSE, scale_shift)


def make_unet(
    n_in: int = 3,
    n_out: int = 6,
    context: int | None = None,
    classes: int | None = None,
    scale_shift: bool = True,
) -> State:
    """A U-Net with one block a level."""
    state = UNetState()
    state.encoder(n_in, 1, context, scale_shift)
    outputs = [(2 * COARSE, COARSE), (COARSE + WIDTH, COARSE), (COARSE + WIDTH, WIDTH), (2 * WIDTH, WIDTH)]
    for i, (wide, narrow) in enumerate(outputs):
        state.resblock(f"output_blocks.{i}.0", wide, narrow, scale_shift)
        if narrow == COARSE:
            state.attention(f"output_blocks.{i}.1", context)
    state.resblock("output_blocks.1.2", COARSE, COARSE, scale_shift)
    state.norm("out.0", WIDTH)
    state.conv("out.2", WIDTH, n_out, 3, 3)
    if classes:
        state.put("label_emb.weight", classes, EMB)
    return dict(state)


def make_glide(n_in: int = 3) -> State:
    """A U-Net with GLIDE's text transformer, of two layers."""
    state = UNetState()
    state.put("token_embedding.weight", TEXT_VOCAB, TEXT_WIDTH)
    state.put("positional_embedding", TEXT_LEN, TEXT_WIDTH)
    state.put("padding_embedding", TEXT_LEN, TEXT_WIDTH)
    for i in range(2):
        name, wide = f"transformer.resblocks.{i}", 4 * TEXT_WIDTH
        state.norm(f"{name}.ln_1", TEXT_WIDTH)
        state.conv(f"{name}.attn.c_qkv", TEXT_WIDTH, 3 * TEXT_WIDTH)
        state.conv(f"{name}.attn.c_proj", TEXT_WIDTH, TEXT_WIDTH)
        state.norm(f"{name}.ln_2", TEXT_WIDTH)
        state.conv(f"{name}.mlp.c_fc", TEXT_WIDTH, wide)
        state.conv(f"{name}.mlp.c_proj", wide, TEXT_WIDTH)
    state.norm("final_ln", TEXT_WIDTH)
    state.conv("transformer_proj", TEXT_WIDTH, EMB)
    return make_unet(n_in, context=TEXT_WIDTH) | dict(state)


def make_karlo() -> State:
    """A U-Net that reads a CLIP's image embedding and text."""
    state = UNetState()
    state.conv("text_seq_proj.0", EMBEDDING, TEXT_WIDTH)
    state.norm("text_seq_proj.1", TEXT_WIDTH)
    state.conv("text_feat_proj", EMBEDDING, EMB)
    state.conv("clip_emb", EMBEDDING, EMB)
    state.conv("clip_tok_proj", EMBEDDING, 4 * TEXT_WIDTH)
    state.put("cf_param", EMBEDDING)
    return make_unet(context=TEXT_WIDTH) | dict(state)


def make_classifier(classes: int = 5, side: int = 4) -> State:
    """A classifier with two blocks a level, which ends at side x side."""
    state = UNetState()
    state.encoder(3, 2, None)
    state.norm("out.0", COARSE)
    state.put("out.2.positional_embedding", COARSE, side**2 + 1)
    state.conv("out.2.qkv_proj", COARSE, 3 * COARSE, 1)
    state.conv("out.2.c_proj", COARSE, classes, 1)
    return dict(state)


def _norm(x: Tensor, state: State, name: str) -> Tensor:
    groups = x.reshape(len(x), 32, -1)
    centered = groups - groups.mean(2, keepdim=True)
    normed = (centered / (centered.square().mean(2, keepdim=True) + 1e-5).sqrt()).view(x.shape)
    weight, bias = (state[f"{name}.{part}"].view(1, -1, 1, 1) for part in ("weight", "bias"))
    return normed * weight + bias


def _conv(x: Tensor, state: State, name: str, **options) -> Tensor:
    return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding="same", **options)


def _linear(x: Tensor, state: State, name: str) -> Tensor:
    """(..., n_in) -> (..., n_out), also by a convolution over one position."""
    return x @ state[f"{name}.weight"].flatten(1).T + state[f"{name}.bias"]


def _part(x: Tensor, index: int, parts: int, heads: int, new: bool) -> Tensor:
    """Queries, keys or values of (B, N, channels), (B, H, N, d)."""
    d = x.shape[2] // (parts * heads)
    starts = [index * heads * d + h * d if new else h * parts * d + index * d for h in range(heads)]
    return torch.stack([x[:, :, start : start + d] for start in starts], dim=1)


def _attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> Tensor:
    """(B, H, N, d) three times -> (B, N, H d); seen (B, keys)."""
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(q.shape[3])
    if seen is not None:
        scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
    weights = scores.exp() / scores.exp().sum(3, keepdim=True)
    return torch.cat(torch.einsum("bhqk,bhkd->bhqd", weights, v).unbind(1), dim=2)


def _attention(x: Tensor, state: State, name: str, context, seen, new: bool, heads: int) -> Tensor:
    qkv = _linear(_norm(x, state, f"{name}.norm").flatten(2).mT, state, f"{name}.qkv")
    q, k, v = (_part(qkv, i, 3, heads, new) for i in range(3))
    if context is not None:
        kv = _linear(context, state, f"{name}.encoder_kv")
        k, v = (torch.cat([_part(kv, i, 2, heads, new), own], 2) for i, own in ((0, k), (1, v)))
    if seen is not None:
        seen = torch.cat([seen, torch.ones(len(x), qkv.shape[1], dtype=torch.bool)], 1)
    return x + _linear(_attend(q, k, v, seen), state, f"{name}.proj_out").mT.reshape(x.shape)


def _resample(x: Tensor, way: str) -> Tensor:
    if way == "up":
        return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    return x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).mean((3, 5)) if way == "down" else x


def _resblock(x: Tensor, emb: Tensor, state: State, name: str, way: str) -> Tensor:
    h = _conv(_resample(F.silu(_norm(x, state, f"{name}.in_layers.0")), way), state, f"{name}.in_layers.2")
    shift = _linear(F.silu(emb), state, f"{name}.emb_layers.1")[:, :, None, None]
    if shift.shape[1] == 2 * h.shape[1]:
        width = h.shape[1]
        h = _norm(h, state, f"{name}.out_layers.0") * (shift[:, :width] + 1) + shift[:, width:]
    else:
        h = _norm(h + shift, state, f"{name}.out_layers.0")
    x = _resample(x, way)
    if f"{name}.skip_connection.weight" in state:
        x = _conv(x, state, f"{name}.skip_connection")
    return x + _conv(F.silu(h), state, f"{name}.out_layers.3")


def _block(x: Tensor, emb: Tensor, state: State, name: str, reads: tuple) -> Tensor:
    """All layers of one position; a resblock after the first is on the way up."""
    halving = f"{name[:-1]}{int(name[-1]) + 1}.0.skip_connection.weight" in state  # the next one widens
    for i in range(3):
        layer = f"{name}.{i}"
        if f"{layer}.in_layers.0.weight" in state:
            down = name.startswith("input") and halving
            up = i > 0 and name.startswith("output")
            x = _resblock(x, emb, state, layer, "down" if down else "up" if up else "")
        elif f"{layer}.qkv.weight" in state:
            x = _attention(x, state, layer, *reads)
        elif f"{layer}.weight" in state:
            x = _conv(x, state, layer)
    return x


def _double(state: State) -> State:
    return {name: tensor.double() for name, tensor in state.items()}


def _time(state: State, t: Tensor) -> Tensor:
    rates = [10000 ** (-i / (WIDTH // 2)) for i in range(WIDTH // 2)]
    rows = [[f(time * rate) for f in (math.cos, math.sin) for rate in rates] for time in t.tolist()]
    emb = torch.tensor(rows, dtype=torch.float64)
    return _linear(F.silu(_linear(emb, state, "time_embed.0")), state, "time_embed.2")


def _down(h: Tensor, emb: Tensor, state: State, reads: tuple) -> list[Tensor]:
    """Outputs of the input blocks and of the middle."""
    outputs = []
    while any(name.startswith(f"input_blocks.{len(outputs)}.") for name in state):
        h = _block(h, emb, state, f"input_blocks.{len(outputs)}", reads)
        outputs.append(h)
    h = _resblock(h, emb, state, "middle_block.0", "")
    h = _attention(h, state, "middle_block.1", *reads)
    return [*outputs, _resblock(h, emb, state, "middle_block.2", "")]


def unet(
    state: State,
    inputs: Tensor,
    t: Tensor,
    extra: Tensor | float = 0.0,
    context: Tensor | None = None,
    seen: Tensor | None = None,
    new: bool = False,
    heads: int = 2,
) -> Tensor:
    """All input channels -> all output channels; `extra` joins the embedding of time."""
    state = _double(state)
    emb, reads = _time(state, t) + extra, (context, seen, new, heads)
    *skips, h = _down(inputs.double(), emb, state, reads)
    for i in range(4):
        h = _block(torch.cat([h, skips.pop()], dim=1), emb, state, f"output_blocks.{i}", reads)
    return _conv(F.silu(_norm(h, state, "out.0")), state, "out.2")


def classifier(state: State, x: Tensor, t: Tensor) -> Tensor:
    """Logits; its pooling has the new order."""
    state = _double(state)
    h = _down(x.double(), _time(state, t), state, (None, None, False, 2))[-1]
    h = F.silu(_norm(h, state, "out.0")).flatten(2)
    h = torch.cat([h.mean(2, keepdim=True), h], dim=2) + state["out.2.positional_embedding"]
    qkv = _linear(h.mT, state, "out.2.qkv_proj")
    mixed = _attend(*(_part(qkv, i, 3, 2, new=True) for i in range(3)))
    return _linear(mixed, state, "out.2.c_proj")[:, 0]


def _layer_norm(x: Tensor, state: State, name: str) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])


def text_states(state: State, captions: list[list[int]]) -> Tensor:
    """GLIDE's states of captions, padded: (B, T, D)."""
    state, rows = _double(state), []
    for ids in captions:
        known = state["token_embedding.weight"][ids] + state["positional_embedding"][: len(ids)]
        rows.append(torch.cat([known, state["padding_embedding"][len(ids) :]]))
    x = torch.stack(rows)
    for i in range(2):
        name = f"transformer.resblocks.{i}"
        qkv = _linear(_layer_norm(x, state, f"{name}.ln_1"), state, f"{name}.attn.c_qkv")
        mixed = _attend(*(_part(qkv, part, 3, 2, new=False) for part in range(3)))
        x = x + _linear(mixed, state, f"{name}.attn.c_proj")
        inner = F.gelu(_linear(_layer_norm(x, state, f"{name}.ln_2"), state, f"{name}.mlp.c_fc"))
        x = x + _linear(inner, state, f"{name}.mlp.c_proj")
    return _layer_norm(x, state, "final_ln")


def glide(state: State, inputs: Tensor, t: Tensor, captions: list[list[int]]) -> Tensor:
    """GLIDE's U-Net over all its input channels."""
    states = text_states(state, captions)
    pooled = _linear(states[:, -1], _double(state), "transformer_proj")
    return unet(state, inputs, t, pooled, states)


def karlo(state: State, x: Tensor, t: Tensor, image: Tensor, vector: Tensor, states: Tensor, seen: Tensor):
    """Karlo's decoder: the image's vector as four positions in front of the text's, of which `seen` count."""
    double, image = _double(state), image.double()
    extra = _linear(image, double, "clip_emb") + _linear(vector.double(), double, "text_feat_proj")
    numbers = _linear(image, double, "clip_tok_proj")
    tokens = torch.stack([numbers[:, i::4] for i in range(4)], dim=1)
    text = _layer_norm(_linear(states.double(), double, "text_seq_proj.0"), double, "text_seq_proj.1")
    seen = torch.cat([torch.ones(len(x), 4, dtype=torch.bool), seen], dim=1)
    return unet(state, x, t, extra, torch.cat([tokens, text], dim=1), seen)
