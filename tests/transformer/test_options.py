"""Options that the paper does not have: QK-norm (dalle/nn/blocks.py) and z-loss (transformer/losses.py)."""

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from dalle.compile import compile_layers
from dalle.hub.init_from import load_pretrained_weights
from dalle.nn.attention import attend
from dalle.train.grad_scaler import PerBlockGradScaler
from dalle.transformer.config import TransformerLossConfig
from dalle.transformer.generate import cast_linear_weights, generate, quantize_int8
from dalle.transformer.losses import IGNORED, chunked_nats, cross_entropies, weighted_cross_entropy
from dalle.transformer.objective import TransformerObjective
from dalle.transformer.sizes import parameter_counts
from dalle.viz.attention import attention_weights
from tests.helpers.small_transformer import ids_of, small, text_of
from tests.transformer.test_generate import generate_slowly, noise_for, states_by_steps


@pytest.fixture
def normed():
    return small(qk_norm=True)


def test_queries_and_keys_of_each_head_are_normalized_before_they_meet(normed):
    attention, pattern = normed.layers[0].attention.f, normed.patterns["row"]
    x = 5 * torch.randn(2, normed.layout.seq_len, 16, generator=torch.Generator().manual_seed(1))
    q, k, v = rearrange(attention.qkv(x), "b n (three h d) -> three b h n d", three=3, h=2)

    def norm(x, gain):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt() * gain

    mixed = attend(norm(q, attention.q_norm.weight), norm(k, attention.k_norm.weight), v, pattern, "dense")
    expected = attention.out(rearrange(mixed, "b h n d -> b n (h d)"))
    torch.testing.assert_close(attention(x, pattern, "dense"), expected, rtol=1e-4, atol=1e-4)


def test_off_is_the_default_and_has_no_parameters_and_no_calls(normed, monkeypatch):
    plain = small()
    extra = set(normed.state_dict()) - set(plain.state_dict())
    assert extra == {f"layers.{i}.attention.f.{part}_norm.weight" for i in range(4) for part in "qk"}
    monkeypatch.delattr("dalle.nn.blocks.Attention.normalize")
    cross_entropies(plain, ids_of(plain))
    generate(plain, text_of(plain, 1), noise_for(plain, 1, 1))
    assert sum(p.numel() for p in normed.layers.parameters()) == parameter_counts(normed.config)["layers"]


@torch.no_grad()
@pytest.mark.parametrize("as_tensor", [False, True], ids=["views", "fixed shapes"])
def test_cached_keys_are_normalized_so_that_steps_equal_the_whole(normed, as_tensor):
    ids = ids_of(normed)
    whole = normed.hidden(ids)[:, normed.layout.text_len :]
    for begun in (0, 5):
        torch.testing.assert_close(
            states_by_steps(normed, ids, begun, as_tensor), whole[:, begun:], rtol=1e-4, atol=2e-5
        )
    text, noise = text_of(normed, 1), noise_for(normed, 1, 3)
    assert torch.equal(generate(normed, text, noise)[0], generate_slowly(normed, text, noise[0]))


@torch.no_grad()
def test_sampling_in_16_and_8_bits_has_fp32_norms(normed):
    ids = ids_of(normed)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        whole = normed.hidden(ids)[:, normed.layout.text_len :]
    for model in (cast_linear_weights(normed, torch.bfloat16), quantize_int8(normed)):
        assert model.layers[0].attention.f.q_norm.weight is normed.layers[0].attention.f.q_norm.weight
        error = (states_by_steps(model, ids, 4) - whole[:, 4:]).abs().mean()
        assert error < 0.05 * whole.abs().mean()


def gradients(model):
    text, image = cross_entropies(model, ids_of(model))
    return torch.autograd.grad(text + 7 * image, list(model.parameters()))


def test_no_way_of_computing_changes_the_gradients(normed):
    expected = gradients(normed)
    for backend in ("dense", "sdpa"):
        torch.testing.assert_close(gradients(small(qk_norm=True, attention_backend=backend)), expected)
    for block in normed.resblocks():
        block.activation_checkpointing = True
    torch.testing.assert_close(gradients(normed), expected, rtol=0, atol=0)
    scales = PerBlockGradScaler(normed.resblocks())
    text, image = cross_entropies(normed, ids_of(normed))
    (text + 7 * image).backward()
    assert scales.unscale().all()
    torch.testing.assert_close([p.grad for p in normed.parameters()], list(expected), rtol=1e-4, atol=1e-4)


def test_norms_stay_fp32_under_autocast_and_outside_of_the_groups_of_16_bits(normed):
    seen = []
    normed.layers[0].attention.f.q_norm.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gradients(normed)
    grouped = {id(p) for group in normed.fsdp_groups() for module in group for p in module.parameters()}
    assert seen == [torch.float32]
    assert not any("norm" in name for name, p in normed.named_parameters() if id(p) in grouped)


def test_weights_of_a_model_without_are_refused(normed):
    for model, source in ((normed, small()), (small(), normed)):
        with pytest.raises(ValueError, match=r"source has qk_norm .*, model\.qk_norm is .*; make them equal"):
            load_pretrained_weights("transformer", model, source)


def test_attention_maps_are_those_of_normalized_queries(normed):
    attention, ids = normed.layers[0].attention.f, ids_of(normed)
    first = next(attention_weights(normed, ids)).weights
    with torch.no_grad():
        attention.q_norm.weight.zero_()  # every visible key weighs the same
        even = next(attention_weights(normed, ids)).weights
    assert not torch.allclose(first, even)
    visible = even > 0
    torch.testing.assert_close(even, visible / visible.sum(-1, keepdim=True))


@pytest.mark.slow
def test_layers_with_norms_compile_without_a_break(normed):
    expected = gradients(normed)
    torch.compiler.reset()
    compile_layers(normed, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(normed), expected)


# z-loss.


def both_losses(model, ids, z_weight, chunk=None, plain=False):
    """Weighted loss with z, and gradients; by the formula on whole logits or by the chunks of the library."""
    layout = model.layout
    if plain:
        logits = model(ids)
        counted = layout.loss_mask(ids)
        log_sum = logits.logsumexp(-1)
        each = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view(ids.shape)
        each = each + z_weight * log_sum**2
        parts = ((slice(layout.text_len), 1 / 8), (slice(layout.text_len, None), 7 / 8))
        total = sum(w * each[:, part][counted[:, part]].mean() for part, w in parts)
    else:
        means = cross_entropies(model, ids, chunk, z_weight=z_weight)
        total = weighted_cross_entropy(*means)[0]
    return [total.detach(), *torch.autograd.grad(total, list(model.parameters()))]


@pytest.mark.parametrize("chunk", [None, 40])
def test_the_z_loss_and_its_gradient_are_those_of_the_formula(chunk):
    model = small(1)
    ids = ids_of(model)
    expected = both_losses(model, ids, 0.3, plain=True)
    torch.testing.assert_close(both_losses(model, ids, 0.3, chunk), expected, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, near = both_losses(model, ids, 0.3, chunk), both_losses(model, ids, 0.3, plain=True)
    for one, other in zip(found, near, strict=True):
        assert (one - other).norm() <= 0.02 * other.norm() + 1e-4
    far = both_losses(model, ids, 0.2, plain=True)
    assert not torch.allclose(far[1], expected[1], rtol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("enabled", [False, True])
def test_positions_that_do_not_count_have_no_z_loss(enabled):
    model, targets, positions = small(1), torch.tensor([1, IGNORED, 3, 2, IGNORED]), torch.arange(5)
    states, kept = torch.randn(5, 16, generator=torch.Generator().manual_seed(1)), targets != IGNORED
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
        found = chunked_nats(model, states, targets, 2, positions, 0.3)
        expected = chunked_nats(model, states[kept], targets[kept], 9, positions[kept], 0.3)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_z_loss_is_logged_only_when_on_and_leaves_the_other_losses(dtype):
    model = small(1)
    ids = ids_of(model)
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        off = TransformerObjective()(model, ids, 0)
        on = TransformerObjective(TransformerLossConfig(z_weight=1e-2))(model, ids, 0)
    assert list(off.metrics) == ["text_loss", "image_loss"]
    assert list(on.metrics) == ["text_loss", "image_loss", "z_loss"]
    torch.testing.assert_close(on.total, off.total + on.metrics["z_loss"])
    for name, value in off.metrics.items():
        torch.testing.assert_close(on.metrics[name], value, rtol=1e-5, atol=1e-5)


def test_a_model_that_guesses_evenly_has_the_z_loss_of_the_baseline():
    model, objective = small(1), TransformerObjective(TransformerLossConfig(z_weight=1e-2))
    torch.nn.init.zeros_(model.to_logits.weight)
    loss, expected = objective(model, ids_of(model), 0), objective.random_baseline(model)
    found = {"loss": loss.total.detach(), **loss.metrics}
    assert {name: float(value) for name, value in found.items()} == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match=r"z_weight .* negative, got -1"):
        TransformerLossConfig(z_weight=-1.0)
