"""GLIDE's noised CLIP: small files of its layout, outputs of a reference written out here."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dalle.meta_device import SkipRandomInit
from dalle.pretrained import glide_clip
from dalle.pretrained.family import DetectedCheckpoint, compare_keys
from dalle.pretrained.glide_clip import TowerConfig
from dalle.pretrained.load import detect_checkpoint, load_noised_clip
from tests.helpers.reference import RandomState, State

WIDTH, SHARED, MEAN, STD = 128, 24, (122.77, 116.746, 104.0937), (68.5005, 66.6322, 70.3232)


def make_tower(positions: int, **tables: tuple[int, ...]) -> State:
    state = RandomState()

    def norm(name: str) -> None:
        state.put(f"{name}.g", WIDTH, around=1.0)
        state.put(f"{name}.b", WIDTH)

    def linear(name: str, n_in: int, n_out: int, bias: bool = True) -> None:
        state.put(f"{name}.w", n_out, n_in)
        state[f"{name}.w"] /= 0.3 * n_in**0.5
        if bias:
            state.put(f"{name}.b", n_out)

    for name, shape in ({"w_pos": (positions, WIDTH)} | tables).items():
        state.put(f"blocks.input.{name}", *shape)
    if "w_t" in tables:
        norm("blocks.input.ln")
    for i in range(2):
        attn, mlp = (f"blocks.block_{i}.{part}" for part in ("f_attn", "f_mlp"))
        norm(f"{attn}.ln")
        for part in "qkvc":
            linear(f"{attn}.f_{part}", WIDTH, WIDTH, bias=part != "k")
        norm(f"{mlp}.ln")
        linear(f"{mlp}.f_1", WIDTH, 4 * WIDTH)
        linear(f"{mlp}.f_2", 4 * WIDTH, WIDTH)
    norm("blocks.output.ln")
    linear("blocks.output.f", WIDTH, SHARED, bias=False)
    return dict(state)


def norm(x: torch.Tensor, state: State, name: str) -> torch.Tensor:
    return F.layer_norm(x, (WIDTH,), state[f"{name}.g"], state[f"{name}.b"])


def affine(x: torch.Tensor, state: State, name: str) -> torch.Tensor:
    return x @ state[f"{name}.w"].T + state.get(f"{name}.b", 0)


def unit_vector(x: torch.Tensor, state: State, at: int, causal: bool) -> torch.Tensor:
    """Inputs (N, D) of one example -> (E,)."""
    for i in range(2):
        attn, mlp = (f"blocks.block_{i}.{part}" for part in ("f_attn", "f_mlp"))
        q, k, v = (affine(norm(x, state, f"{attn}.ln"), state, f"{attn}.f_{part}") for part in "qkv")
        heads = []
        for part in (slice(0, 64), slice(64, 128)):
            scores = q[:, part] @ k[:, part].T / 8
            hidden = torch.ones_like(scores).triu(1).bool() & causal
            heads.append(scores.masked_fill(hidden, -torch.inf).softmax(1) @ v[:, part])
        x = x + affine(torch.cat(heads, dim=1), state, f"{attn}.f_c")
        x = x + affine(F.gelu(affine(norm(x, state, f"{mlp}.ln"), state, f"{mlp}.f_1")), state, f"{mlp}.f_2")
    out = affine(norm(x[at], state, "blocks.output.ln"), state, "blocks.output.f")
    return out / out.norm()


IMAGE = make_tower(5, w_t=(10, WIDTH), patch_proj=(WIDTH, 3, 4, 4))
TEXT = make_tower(7, w_voc=(20, WIDTH))


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    paths = tmp_path / "clip_image_enc.pt", tmp_path / "clip_text_enc.pt"
    for path, state in zip(paths, (IMAGE, TEXT), strict=True):
        torch.save(state, path)
    return paths


def test_both_towers(files):
    image, text = load_noised_clip(*files)
    x, t = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([9, 0])
    constants = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    mean, std = constants
    expected = []
    for pixels, time in zip(((x + 1) / 2 * 255 - mean) / std, t, strict=True):
        patches = [pixels[:, i : i + 4, j : j + 4] for i in (0, 4) for j in (0, 4)]
        rows = [(IMAGE["blocks.input.patch_proj"] * patch).sum((1, 2, 3)) for patch in patches]
        inputs = torch.stack([IMAGE["blocks.input.w_t"][time], *rows]) + IMAGE["blocks.input.w_pos"]
        expected.append(unit_vector(norm(inputs, IMAGE, "blocks.input.ln"), IMAGE, 0, causal=False))
    torch.testing.assert_close(image(x, t), torch.stack(expected), atol=1e-4, rtol=1e-4)

    ids, lengths = torch.tensor([[3, 9, 19, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6, 7]]), torch.tensor([3, 7])
    rows = TEXT["blocks.input.w_voc"][ids] + TEXT["blocks.input.w_pos"]
    expected = [unit_vector(row, TEXT, int(n) - 1, causal=True) for row, n in zip(rows, lengths, strict=True)]
    torch.testing.assert_close(text(ids, lengths), torch.stack(expected), atol=1e-4, rtol=1e-4)
    assert torch.equal(text(ids.masked_fill(ids == 0, 5), lengths)[0], text(ids, lengths)[0])

    x.requires_grad_()
    (gradient,) = torch.autograd.grad((image(x, t) * text(ids, lengths)).sum(), x)
    assert (gradient.abs().amax((1, 2, 3)) > 0).all()


@pytest.mark.parametrize(
    ("family", "config"),
    [
        (
            glide_clip.IMAGE,
            TowerConfig(width=768, depth=12, positions=257, embed_width=512, times=1000, patch_size=4),
        ),
        (
            glide_clip.TEXT,
            TowerConfig(width=512, depth=12, positions=77, embed_width=512, text_vocab=65536),
        ),
    ],
)
def test_the_published_size(family, config):
    with torch.device("meta"), SkipRandomInit():
        model = family.build(config)
    comparison = compare_keys(DetectedCheckpoint(Path("published"), family, published_names(model)))
    comparison.check("published")
    assert comparison.config == config
    assert getattr(model, "image_size", 64) == 64


def published_names(model) -> State:
    """Tensors of a tower as its release names them: weights and gains end in w and g."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        weight = "g" if ".ln." in name else "w"
        name = name.replace(".weight", f".{weight}").replace(".bias", ".b").replace("layers.", "block_")
        tensors[f"blocks.{name}"] = tensor
    return tensors


def test_refusals(files, tmp_path):
    image, text = files
    with pytest.raises(ValueError, match="not a published noised CLIP's image tower"):
        load_noised_clip(text, image)
    torch.save(TEXT | {"blocks.block_0.f_attn.f_k.b": torch.zeros(WIDTH)}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"unexpected.*layers\.0\.f_attn\.f_k\.bias"):
        load_noised_clip(image, tmp_path / "x.pt")
    torch.save(TEXT | {"blocks.output.f.w": torch.zeros(5, WIDTH)}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"\[24, 5\] wide"):
        load_noised_clip(image, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="resize"):
        load_noised_clip(image, text)[0](torch.zeros(1, 3, 64, 64), torch.zeros(1))
    assert detect_checkpoint(image).family is glide_clip.IMAGE
