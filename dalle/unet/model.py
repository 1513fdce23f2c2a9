"""U-Net of GLIDE and guided diffusion (Dhariwal and Nichol 2021, "ADM"), with OpenAI's parameter names.

Conditions are tensors: class labels, text, an image embedding (unCLIP), a smaller image to upsample, known
pixels to inpaint around. Images are in [-1, 1].

    B batch, H W sides, E width of the embedding of time
    T positions of the context (image embedding and text), D their width
"""

import copy
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle.diffusion.schedule import Denoise, Schedule, denoiser, make_schedule
from dalle.layout import check_tokens
from dalle.nn.blocks import FP32LayerNorm
from dalle.precision import full_precision
from dalle.unet.blocks import Attention, Block, FP32GroupNorm, ResBlock, conv3, timestep_embedding, zeros
from dalle.unet.config import EncoderConfig, UNetConfig
from dalle.unet.text import TextTransformer

EMBEDDING_TOKENS = 4  # positions that an image embedding becomes (unCLIP, section 2.1)


class Encoder(nn.Module):
    """The half that a classifier shares: the embedding of time, the way down, the middle."""

    def __init__(self, config: EncoderConfig, in_channels: int, context_width: int | None = None):
        super().__init__()
        self.config, self.context_width, widths = config, context_width, config.widths
        emb_width, width = 4 * config.width, widths[0]
        self.time_embed = nn.Sequential(
            nn.Linear(config.width, emb_width), nn.SiLU(), nn.Linear(emb_width, emb_width)
        )
        self.input_blocks = nn.ModuleList([Block([conv3(in_channels, width)], config)])
        self.skip_widths = [width]
        for level, n_out in enumerate(widths):
            for _ in range(config.blocks):
                self.input_blocks.append(Block(self.layers(width, n_out, level), config))
                width = n_out
                self.skip_widths.append(width)
            if level < len(widths) - 1:
                half = ResBlock(width, width, config, nn.AvgPool2d(2))
                self.input_blocks.append(Block([half], config))
                self.skip_widths.append(width)
        attention = [Attention(width, config, context_width)] if config.middle_attention else []
        first, last = (ResBlock(width, width, config) for _ in range(2))
        self.middle_block = Block([first, *attention, last], config)

    def layers(self, n_in: int, n_out: int, level: int) -> list[nn.Module]:
        """A residual block, and attention where the level has it."""
        block = ResBlock(n_in, n_out, self.config)
        attends = self.config.attends(level)
        return [block, Attention(n_out, self.config, self.context_width)] if attends else [block]

    def embed_time(self, t: Tensor) -> Tensor:
        """Times (B,) -> fp32 (B, E)."""
        with full_precision(t.device):
            return self.time_embed(timestep_embedding(t, self.config.width))

    def fsdp_groups(self) -> list[list[nn.Module]]:
        """Groups that sharded training gathers at once, in order; norms are in none and stay fp32."""
        groups = []
        for module in self.modules():
            if isinstance(module, ResBlock | Attention):
                kinds = nn.Conv1d | nn.Conv2d | nn.Linear
                groups.append([layer for layer in module.modules() if isinstance(layer, kinds)])
            elif isinstance(module, TextTransformer):
                groups += [[block.attn, block.mlp] for block in module.resblocks]
        return groups


def cast_weights(model: Encoder, dtype: torch.dtype) -> Encoder:
    """The same model with the weights of its blocks in another dtype; everything else is shared.

    Norms, embeddings, the first and the last convolution stay as they are; it runs under autocast.
    """
    layers = [layer for group in model.fsdp_groups() for module in group for layer in module.modules()]
    weights = {id(p): p for layer in layers for p in layer.parameters(recurse=False)}
    if all(p.dtype == dtype for p in weights.values()):
        return model
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    cast = {key: nn.Parameter(p.detach().to(dtype), requires_grad=False) for key, p in weights.items()}
    return copy.deepcopy(model, shared | cast)


class UNet(Encoder):
    """Noised images and their times -> the prediction, and with it the variance if that is learned."""

    def __init__(self, config: UNetConfig):
        super().__init__(config, config.in_channels, config.context_width)
        emb_width, context_width, widths = 4 * config.width, config.text_width, config.widths
        width, skips = widths[-1], [*self.skip_widths]
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(len(widths))):
            for i in range(config.blocks + 1):
                layers = self.layers(width + skips.pop(), widths[level], level)
                width = widths[level]
                if level > 0 and i == config.blocks:
                    layers.append(ResBlock(width, width, config, nn.Upsample(scale_factor=2.0)))
                self.output_blocks.append(Block(layers, config))
        self.out = nn.Sequential(FP32GroupNorm(width), nn.SiLU(), zeros(conv3(width, config.out_channels)))
        if config.classes:
            self.label_emb = nn.Embedding(config.classes, emb_width)
        if config.text == "ids":
            self.token_embedding = nn.Embedding(config.text_vocab, context_width)
            self.positional_embedding = nn.Parameter(torch.empty(config.text_len, context_width))
            self.padding_embedding = nn.Parameter(torch.empty(config.text_len, context_width))
            sizes = context_width, config.text_layers, config.text_heads
            self.transformer = TextTransformer(*sizes, config.activation_checkpointing)
            self.final_ln = FP32LayerNorm(context_width)
            self.transformer_proj = nn.Linear(context_width, emb_width)
            for embedding in (self.positional_embedding, self.padding_embedding):
                nn.init.normal_(embedding, std=0.01)  # as CLIP's (Radford et al., released code)
            nn.init.normal_(self.token_embedding.weight, std=0.02)
        elif config.text == "clip":
            project = nn.Linear(config.embedding_width, context_width)
            self.text_seq_proj = nn.Sequential(project, FP32LayerNorm(context_width))
            self.text_feat_proj = nn.Linear(config.embedding_width, emb_width)
        if config.image_embedding:
            self.clip_emb = nn.Linear(config.embedding_width, emb_width)
            self.clip_tok_proj = nn.Linear(config.embedding_width, EMBEDDING_TOKENS * context_width)
            self.cf_param = nn.Parameter(torch.zeros(config.embedding_width))

    def schedule(self, spacing: str | None = None) -> Schedule:
        """The schedule of its training, respaced if asked; see `dalle.diffusion.respace`."""
        return make_schedule(self.config.diffusion.schedule, self.config.diffusion.steps, spacing)

    def denoiser(self, schedule: Schedule, **conditions: Tensor) -> Denoise:
        """The model as samplers call it, under conditions as `forward` takes them."""
        network, config = partial(self, **conditions), self.config
        return denoiser(network, schedule, config.diffusion.prediction, config.variance)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        *,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        text_embedding: Tensor | None = None,
        image_embedding: Tensor | None = None,
        labels: Tensor | None = None,
        low_resolution: Tensor | None = None,
        known: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Noised images and conditions -> fp32 (B, 3, H, W), or (B, 6, H, W) with a learned variance.

        Args:
            x: float (B, 3, H, W), sides multiples of `config.downsample_factor`.
            t: times (B,), of the schedule in training; whole or fractional.
            text: ids int64 (B, T), `text_vocab` or more for pads, or the states (B, T, D) of `encode_text`;
                of a CLIP's text tower its states (B, T, embedding_width).
            text_mask: bool (B, T), which of CLIP's states are seen; all unless given.
            text_embedding: CLIP's text vectors (B, embedding_width), with its states.
            image_embedding: CLIP's image vectors (B, embedding_width); the learned null vector `cf_param`
                unless given.
            labels: classes int64 (B,).
            low_resolution: smaller images (B, 3, h, w).
            known, mask: images (B, 3, H, W) and where they are known, (B, 1, H, W) of 1 and 0; nowhere
                unless given.

        Raises:
            ValueError: an input that the model does not take, or lacks.
        """
        given = {"text": text, "text_embedding": text_embedding, "image_embedding": image_embedding}
        given |= {"labels": labels, "low_resolution": low_resolution, "known": known, "mask": mask}
        self.check_inputs(x, given | {"text_mask": text_mask})
        inputs = [x]
        if self.config.inpainting:
            mask = torch.zeros_like(x[:, :1]) if mask is None else mask
            inputs += [torch.zeros_like(x) if known is None else known * mask, mask]
        if low_resolution is not None:
            inputs.append(F.interpolate(low_resolution, x.shape[2:], mode="bilinear"))
        emb = self.embed_time(t)
        if labels is not None:
            emb = emb + self.label_emb(labels)
        emb, context, seen = self.condition(emb, text, text_mask, text_embedding, image_embedding)

        h, skips = torch.cat(inputs, dim=1), []  # (B, in_channels, H, W)
        for block in self.input_blocks:
            h = block(h, emb, context, seen)
            skips.append(h)
        h = self.middle_block(h, emb, context, seen)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), emb, context, seen)
        with full_precision(x.device):
            return self.out(h.float())

    def encode_text(self, ids: Tensor, check: bool = True) -> Tensor:
        """Text ids int64 (B, T), pads `text_vocab` or more -> states fp32 (B, T, D), the same for all t."""
        if check and ids.device.type == "cpu":  # those of another device were checked when they were packed
            check_tokens(ids, torch.iinfo(torch.int64).max, "text ids")
        if ids.shape[1] != (length := self.config.text_len):
            raise ValueError(f"text must be of {length} positions, got {ids.shape[1]}; use pack_text")
        pad = ids >= self.config.text_vocab
        tokens = self.token_embedding(ids.masked_fill(pad, 0)) + self.positional_embedding
        x = torch.where(pad[:, :, None], self.padding_embedding, tokens)
        return self.final_ln(self.transformer(x))

    def condition(
        self,
        emb: Tensor,
        text: Tensor | None,
        text_mask: Tensor | None,
        text_embedding: Tensor | None,
        image_embedding: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The embedding with text and image added, their context (B, T, D), and which of it is seen."""
        context = []
        if text is not None and self.config.text == "ids":
            text = text if text.is_floating_point() else self.encode_text(text)
        with full_precision(emb.device):
            if self.config.image_embedding:
                vector = self.cf_param.expand(len(emb), -1) if image_embedding is None else image_embedding
                vector = vector.float()
                emb = emb + self.clip_emb(vector)
                tokens = self.clip_tok_proj(vector)  # Karlo: the four numbers of a channel are side by side
                context.append(tokens.view(len(emb), -1, EMBEDDING_TOKENS).transpose(1, 2))
            if self.config.text == "ids":
                emb = emb + self.transformer_proj(text[:, -1].float())
                context.append(text)
            elif self.config.text == "clip":
                emb = emb + self.text_feat_proj(text_embedding.float())
                context.append(self.text_seq_proj(text.float()))
        if text_mask is not None and self.config.image_embedding:
            text_mask = F.pad(text_mask, (EMBEDDING_TOKENS, 0), value=True)
        return emb, torch.cat(context, dim=1) if context else None, text_mask

    def check_inputs(self, x: Tensor, given: dict[str, Tensor | None]) -> None:
        """ValueError for conditions that do not belong to this model, or images of another shape."""
        config, multiple = self.config, self.config.downsample_factor
        if x.ndim != 4 or x.shape[1] != 3 or x.shape[2] % multiple or x.shape[3] % multiple:
            raise ValueError(f"x must be (B, 3, H, W), sides multiples of {multiple}, got {tuple(x.shape)}")
        taken = {
            "text": config.text != "none",
            "text_embedding": config.text == "clip",
            "labels": config.classes is not None,
            "low_resolution": config.low_resolution,
        }
        optional = {
            "text_mask": config.text == "clip",
            "image_embedding": config.image_embedding,
            "known": config.inpainting,
            "mask": config.inpainting,
        }
        for name, value in given.items():
            if value is None and taken.get(name):
                raise ValueError(f"this U-Net is trained with {name}; give it")
            if value is not None and not (taken | optional)[name]:
                raise ValueError(f"this U-Net is trained without {name}; leave it out")
        sizes = {"known": tuple(x.shape), "mask": (len(x), 1, *x.shape[2:])}
        found = {name: tuple(given[name].shape) for name in sizes if given[name] is not None}
        if found not in ({}, sizes):
            raise ValueError(f"known and mask must both be given, of shapes {sizes}, got {found}")
