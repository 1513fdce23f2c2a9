"""Weights of another run in a fresh model (--init-from), frozen parameters, and overfitting one batch."""

import math
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from dalle.clip import CLIPConfig
from dalle.commands.train_clip import train_clip
from dalle.commands.train_dvae import train_dvae
from dalle.commands.train_transformer import train_transformer
from dalle.dvae import DVAEConfig
from dalle.hub.init_from import GROWING, SAME, freeze, load_pretrained_weights, map_token_ids
from dalle.hub.registry import build_model, load_model, weights_hash
from dalle.io.files import read_json
from dalle.schedules import Schedule
from dalle.train.checkpoint import latest_checkpoint
from dalle.train.loggers import read_log
from dalle.transformer import TransformerConfig
from dalle.unet import DiffusionConfig
from dalle.unet.text import pack_text
from tests.helpers.distributed_work import UNET_CONFIG

STAGES = {"dvae": train_dvae, "transformer": train_transformer, "clip": train_clip}
TRANSFORMER = TransformerConfig(
    depth=2, heads=2, head_dim=8, text_len=5, grid=(3, 3), text_vocab=11, image_vocab=7, conv_kernel=3
)
TOWERS = {"vision_width": 16, "vision_layers": 1, "text_width": 16, "text_layers": 1, "head_dim": 8}
CLIP = CLIPConfig(embed_width=8, image_size=32, patch_size=16, text_len=6, text_vocab=11, **TOWERS)
DVAE = DVAEConfig(widths=(4, 8), blocks_per_group=1, downsample_factor=2, vocab_size=6, codebook_dim=4)
UNET = replace(UNET_CONFIG, inpainting=False)
LARGER = {
    "transformer": replace(TRANSFORMER, text_len=8, grid=(4, 5), text_vocab=13, image_vocab=9),
    "clip": replace(CLIP, text_len=9, text_vocab=14),
    "dvae": replace(DVAE, vocab_size=8),
    "base": replace(UNET, text_vocab=13, inpainting=True),
    "upsampler": replace(UNET, low_resolution=True, text_vocab=13, inpainting=True),
}
UPSAMPLER = replace(UNET, low_resolution=True)
SMALL = {"transformer": TRANSFORMER, "clip": CLIP, "dvae": DVAE, "base": UNET, "upsampler": UPSAMPLER}


def pair(kind: str, config=None):
    """A source, and a fresh model of a larger (or another) configuration."""
    torch.manual_seed(1)
    source = build_model(kind, SMALL[kind])
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter)
    torch.manual_seed(2)
    return source, build_model(kind, config or LARGER[kind])


@pytest.mark.parametrize("kind", SMALL)
def test_the_same_shape_is_copied_and_every_field_of_it_is_either_equal_or_growing(kind):
    source, model = pair(kind, SMALL[kind])
    assert load_pretrained_weights(kind, model, source) == []
    assert weights_hash(model) == weights_hash(source)
    known = {*SAME[kind], *GROWING[kind]}
    free = "conv_kernel sparse full_attention_every init_scale attention_backend activation_checkpointing "
    free += "residual_scale logit_init_scale codebook_init_std min_log_scale "  # no part of the shape
    free += "dropout diffusion"
    if kind in ("base", "upsampler"):  # fully convolutional; what makes the kind; unCLIP's, not trained
        free += " image_size low_resolution image_embedding embedding_width"
    assert set(vars(SMALL[kind])) <= known | set(free.split())


def test_rows_of_a_larger_transformer():
    source, model = pair("transformer")
    fresh = {name: p.clone() for name, p in model.named_parameters()}
    grown = load_pretrained_weights("transformer", model, source)
    assert grown == ["text_len 5 -> 8", "grid (3, 3) -> (4, 5)", "text_vocab 11 -> 13", "image_vocab 7 -> 9"]
    moved = map_token_ids(source.layout, model.layout).tolist()
    text_ids, pads, codes = range(11), range(13, 18), range(21, 28)  # codes behind 13 ids and 8 pads
    assert moved == [*text_ids, *pads, *codes, model.layout.start_of_text, model.layout.start_of_image]
    for name in ("token_embedding", "to_logits"):
        rows, before = (getattr(m, name).weight for m in (model, source))
        kept = moved[: len(before)]
        assert torch.equal(rows[kept], before)
        new = [row for row in range(len(rows)) if row not in kept]
        assert torch.equal(rows[new], fresh[f"{name}.weight"][new])
    assert torch.equal(model.row.weight[:3], source.row.weight)
    assert torch.equal(model.row.weight[3:], fresh["row.weight"][3:])
    assert torch.equal(model.layers[1].mlp.f.expand.weight, source.layers[1].mlp.f.expand.weight)


PIXELS, TOKENS, CAPTIONS = torch.rand(2, 3, 32, 32), torch.randint(6, (2, 16)), [[3, 4, 5], [10]]


def image_logits(model):
    ids = model.layout.pack(model.layout.pad_text([[3, 4], [10]]), TOKENS[:, :9])
    return model(ids)[:, 5:, model.layout.image_offset :]


def predicted(model):
    given = {"text": pack_text([[3, 4], [10]], 5, model.config.text_vocab)}
    if model.config.low_resolution:
        given["low_resolution"] = PIXELS[:, :, ::2, ::2]
    if model.config.inpainting:
        given |= {"known": -PIXELS, "mask": torch.ones(2, 1, 32, 32)}
    return model(PIXELS, torch.tensor([3, 711]), **given)


SAME_OUTPUTS = {
    "transformer, larger vocabulary": (replace(TRANSFORMER, text_vocab=13), image_logits),
    "clip, text": (None, lambda model: model.encode_text(model.pack_text(CAPTIONS))),
    "clip, images": (None, lambda model: model.encode_image(PIXELS)),
    "dvae, decoder": (None, lambda model: model.decode(TOKENS)),
    "base": (None, predicted),
    "upsampler": (None, predicted),
    "dvae, encoder": (None, lambda model: model.codebook_logits(PIXELS)[:, :6]),
}


@pytest.mark.parametrize("case", SAME_OUTPUTS)
def test_a_larger_model_computes_the_same(case):
    config, outputs = SAME_OUTPUTS[case]
    kind = case.split(",")[0]
    source, model = pair(kind, config)
    load_pretrained_weights(kind, model, source)
    torch.testing.assert_close(outputs(model), outputs(source))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("transformer", {"depth": 3}, "depth 2, .*equal"),
        ("transformer", {"heads": 4, "head_dim": 4}, "heads 2"),
        ("transformer", {"text_vocab": 10}, "text_vocab 11, .*may grow"),
        ("transformer", {"grid": (5, 2), "conv_kernel": 1}, "grid"),
        ("clip", {"text_layers": 2}, "text_layers 1"),
        ("base", {"learned_variance": False}, "learned_variance True"),
        ("base", {"diffusion": DiffusionConfig(prediction="v")}, r"diffusion\.prediction noise"),
        ("dvae", {"vocab_size": 5}, "vocab_size 6"),
        ("dvae", {"residual_scale": 0.3}, "residual_scale"),
    ],
)
def test_another_shape_is_refused(kind, changes, message):
    source, model = pair(kind, replace(SMALL[kind], **changes))
    before = weights_hash(model)
    with pytest.raises(ValueError, match=message):
        load_pretrained_weights(kind, model, source)
    assert weights_hash(model) == before


def test_freeze():
    model = build_model("transformer", TRANSFORMER)
    with pytest.raises(ValueError, match=r"'layer\.0\.\*' matches no"):
        freeze(model, ["row.weight", "layer.0.*"])
    with pytest.raises(ValueError, match="nothing to train"):
        freeze(model, ["*"])
    assert all(p.requires_grad for p in model.parameters())
    frozen = freeze(model, ["layers.0.*", "row.weight"])
    assert "row.weight" in frozen
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == set(frozen)
    assert all(name.startswith("layers.0.") or name == "row.weight" for name in frozen)


@pytest.fixture(scope="module")
def start(tiny_runs, chain, with_inputs):
    """start(kind, out, ...): that stage's run on the inputs of `chain`; `train` changes its fields."""

    def run(kind, out, steps=2, lr=None, train=None, **changes):
        base = getattr(tiny_runs, kind)
        optimizer = base.train.optimizer
        if lr is not None:
            optimizer = replace(optimizer, lr=Schedule(lr, lr), warmup_steps=10, weight_decay=0.0)
        train = replace(base.train, optimizer=optimizer, **(train or {}))
        return STAGES[kind](with_inputs(base, chain, out=out, steps=steps, train=train, **changes))

    return run


def meta_of(run):
    return read_json(latest_checkpoint(run) / "meta.json")


@pytest.mark.parametrize("kind", STAGES)
def test_a_run_starts_from_the_averaged_weights_of_another(kind, chain, start, tmp_path, capsys):
    out = start(kind, tmp_path / "tuned", lr=0.0, init_from=chain / kind)
    source = load_model(chain / kind, kind)
    tuned = load_model(out, kind, averaged=False)
    assert tuned.hash == source.hash  # with a learning rate of 0 nothing moves
    assert meta_of(out)["init"] == {"name": kind, "weights": source.hash}
    assert "init_from" not in meta_of(out)["config"]
    assert f"starts from the weights of {chain / kind}" in capsys.readouterr().out


def test_a_run_starts_from_a_smaller_model_directory(chain, start, tiny_runs, tmp_path, capsys):
    model = replace(tiny_runs.transformer.model, text_len=24, text_vocab=450)
    out = start("transformer", tmp_path / "tuned", init_from=chain / "model", model=model)
    assert "text_len 20 -> 24, text_vocab 400 -> 450" in capsys.readouterr().out
    assert load_model(out, "transformer").model.config.text_vocab == 450


def test_resuming_does_not_read_the_source_again(chain, start, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(chain / "clip", source)
    whole = start("clip", tmp_path / "whole", steps=4, init_from=source)
    start("clip", tmp_path / "parts", steps=2, init_from=source)
    shutil.rmtree(source)
    start("clip", tmp_path / "parts", steps=3, init_from=source)
    parts = start("clip", tmp_path / "parts", steps=4)  # the flag may be left out
    assert load_model(parts, "clip").hash == load_model(whole, "clip").hash
    assert meta_of(parts)["init"] == meta_of(whole)["init"]
    with pytest.raises(ValueError, match=r"from source, not from .*other"):
        start("clip", tmp_path / "parts", steps=5, init_from=tmp_path / "other")
    start("clip", tmp_path / "fresh")
    with pytest.raises(ValueError, match=r"from fresh weights, not from .*clip"):
        start("clip", tmp_path / "fresh", steps=3, init_from=chain / "clip")


def test_another_tokenizer_is_noted(chain, change_meta, start, tmp_path, capsys):
    changed = tmp_path / "source"
    shutil.copytree(chain / "transformer", changed)
    change_meta(latest_checkpoint(changed), inputs=meta_of(changed)["inputs"] | {"text_hash": "other"})
    start("transformer", tmp_path / "tuned", init_from=changed)
    assert "the source was trained with another text tokenizer" in capsys.readouterr().out


PATTERNS = {
    "dvae": ("encoder.*",),
    "transformer": ("layers.0.*", "token_embedding.weight"),
    "clip": ("net.visual.*",),
}


@pytest.mark.parametrize("kind", STAGES)
def test_frozen_parameters_keep_their_values_and_have_no_optimizer_state(kind, chain, start, tmp_path):
    out = start(kind, tmp_path / "tuned", init_from=chain / kind, freeze=PATTERNS[kind], steps=4)
    before, after = load_model(chain / kind, kind).model, load_model(out, kind).model
    frozen = set(freeze(load_model(out, kind).model.requires_grad_(True), PATTERNS[kind]))
    for (name, p), q in zip(before.named_parameters(), after.parameters(), strict=True):
        assert torch.equal(p, q) == (name in frozen), name
    folder = latest_checkpoint(out)
    moments = {name.rsplit("/", 1)[0] for name in load_file(folder / "optimizer.safetensors")}
    trained = {name for name, _ in after.named_parameters()} - frozen
    assert moments == trained
    assert set(load_file(folder / "ema.safetensors")) == trained


def test_resuming_with_frozen_parameters_is_exact(start, tmp_path):
    words = {"freeze": PATTERNS["transformer"]}
    whole = start("transformer", tmp_path / "whole", steps=4, **words)
    start("transformer", tmp_path / "parts", steps=2, **words)
    parts = start("transformer", tmp_path / "parts", steps=4, **words)
    for name in ("model", "ema", "optimizer"):
        a, b = (load_file(latest_checkpoint(run) / f"{name}.safetensors") for run in (whole, parts))
        assert all(torch.equal(a[key], b[key]) for key in a.keys() | b.keys())
    with pytest.raises(ValueError, match="freeze was"):
        start("transformer", tmp_path / "parts", steps=5)


@pytest.mark.parametrize(
    ("kind", "name", "batch", "steps", "lr", "drop"),
    [
        ("transformer", "image_loss", 4, 250, 1e-2, math.log(16) - 0.1),
        ("clip", "loss", 4, 150, 1e-2, 1.2),
        ("dvae", "recon_loss", 2, 80, 3e-3, 0.3),
    ],
)
def test_one_batch_is_overfitted(kind, name, batch, steps, lr, drop, start, tmp_path):
    changes = {"bpe_dropout": 0.0} if kind == "transformer" else {}
    rarely = {"save_every": 1000, "eval_every": 1000}
    out = start(kind, tmp_path / kind, steps, lr, overfit_batch=batch, train=rarely, **changes)
    losses = [line[name] for line in read_log(out / "log.jsonl") if name in line]
    assert losses[-1] < losses[0] - drop


def test_every_step_of_overfitting_has_the_same_batch(start, tiny_runs, tmp_path):
    out = start("clip", tmp_path / "clip", steps=3, lr=0.0, overfit_batch=3)
    losses = {line["loss"] for line in read_log(out / "log.jsonl") if "loss" in line}
    assert len(losses) == 1
    assert meta_of(out)["config"]["overfit_batch"] == 3
    with pytest.raises(ValueError, match="overfit_batch must be positive"):
        replace(tiny_runs.clip, overfit_batch=0)
