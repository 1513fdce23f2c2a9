"""The sparse transformer and its losses (sections 2.2, B.1, B.2): dalle/transformer."""

import math

import pytest
import torch
import torch.nn.functional as F

from dalle.compile import VARIANTS, compile_layers
from dalle.layout import TokenLayout
from dalle.masks import dense_mask
from dalle.nn import ATTENTION_BACKENDS
from dalle.nn.blocks import Attention
from dalle.train.grad_scaler import PerBlockGradScaler
from dalle.train.precision import autocast
from dalle.transformer import Transformer, TransformerConfig
from dalle.transformer.config import SIZES, TransformerLossConfig
from dalle.transformer.losses import LOGITS, cross_entropies, weighted_cross_entropy
from dalle.transformer.objective import TransformerObjective, training_flops
from dalle.transformer.sizes import parameter_counts
from tests.helpers.small_transformer import SMALL, ids_of, small

TRAINABLE = [name for name in ATTENTION_BACKENDS if name != "flex"]  # flex has no gradients on a CPU


# Size.


def parameters_by_formula(config):
    """12 d^2 weights and 13 d biases and norms a layer, embeddings, final norm, output matrix."""
    d, vocab = config.width, config.text_vocab + config.text_len + config.image_vocab
    embedded = vocab + 2 + config.text_len + sum(config.grid)
    return config.depth * (12 * d**2 + 13 * d) + embedded * d + 2 * d + vocab * d


@pytest.mark.parametrize(
    ("name", "width", "millions"),
    [
        ("tiny", 128, 7),
        ("60m", 512, 63),
        ("120m", 768, 123),
        ("350m", 1024, 353),
        ("1.3b", 2048, 1311),
        ("2.8b", 1920, 2929),
        ("5.6b", 2688, 5686),
        ("12b", 3968, 12294),
    ],
)
def test_parameters_of_the_named_sizes_by_module_and_by_formula(name, width, millions, monkeypatch):
    for function in ("normal_", "kaiming_uniform_", "uniform_"):  # slow on the meta device at first
        monkeypatch.setattr(torch.nn.init, function, lambda tensor, *_, **__: tensor)
    config, counts = SIZES[name], parameter_counts(SIZES[name])
    with torch.device("meta"):
        model = Transformer(config)
    found = sum(parameter.numel() for parameter in model.parameters())
    assert config.width == width
    assert sum(counts.values()) == found == parameters_by_formula(config)
    assert round(found / 1e6) == millions
    for part in ("layers", "final_norm", "to_logits"):
        assert counts[part] == sum(p.numel() for p in getattr(model, part).parameters())
    matrices = sum(p.numel() for p in model.layers.parameters() if p.ndim == 2)
    effective = {"2.8b": 2.8e9, "5.6b": 5.6e9, "12b": 12_092_178_432}  # section 2.5, Table 1
    assert matrices == pytest.approx(effective.get(name, matrices), rel=0.02)


def test_the_masks_are_no_part_of_a_checkpoint(model):
    model(ids_of(model))
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize(
    ("backend", "sparse", "made"),
    [
        ("dense", True, {"dense"}),
        ("sdpa", True, {"dense"}),
        ("window", True, {"near"}),
        ("auto", True, {"near"}),
        ("auto", False, set()),  # fused attention is causal without a mask
    ],
)
def test_a_model_builds_only_the_masks_that_its_backend_reads(backend, sparse, made):
    model = small(sparse=sparse, attention_backend=backend)

    def built():
        forms = ("dense", "near", "blocks")
        return {form for m in model.patterns.values() for form in forms if getattr(m, f"_{form}") is not None}

    assert built() == set()
    cross_entropies(model, ids_of(model))
    assert built() == made
    assert sparse or model.backends() == {"causal": "sdpa"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 0}, "depth .* got 0"),
        ({"heads": 0}, "heads .* got 0"),
        ({"head_dim": -8}, "head_dim .* got -8"),
        ({"attention_backend": "flash9"}, "attention_backend 'flash9'"),
        ({"full_attention_every": 0}, "full_attention_every .* got 0"),
        ({"conv_kernel": 4}, "kernel must be odd"),
        ({"grid": (8, 8)}, "8 columns, got 11"),
        ({"grid": (0, 32)}, "both positive"),
    ],
)
def test_an_invalid_configuration_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**change)
    with pytest.raises(ValueError, match=r"width 10 .* 3 heads"):
        Attention(10, 3)


@pytest.mark.parametrize(
    ("every", "kinds"),
    [
        (None, "row column row row row column row conv"),
        (1, "causal causal causal causal causal causal causal causal"),
        (3, "row column causal row row causal row conv"),
        (4, "row column row causal row column row causal"),
        (9, "row column row row row column row conv"),
    ],
)
def test_one_of_every_n_layers_is_causal(every, kinds):
    assert TransformerConfig(depth=8, full_attention_every=every).kinds == kinds.split()
    assert TransformerConfig(depth=3, grid=(2, 2), sparse=False).kinds == ["causal"] * 3


# The start of training.


def test_initial_weights():
    """Child et al. 2019: 0.125 / sqrt(inputs), residual outputs / sqrt(2 depth), rows, columns / sqrt 2."""
    torch.manual_seed(0)
    d, depth = 128, 3
    model = Transformer(TransformerConfig(depth, 4, 32, 64, (32, 32), text_vocab=200, image_vocab=100))
    layer = model.layers[1]
    expected = {
        layer.attention.f.qkv.weight: 0.125 / math.sqrt(d),
        layer.attention.f.out.weight: 0.125 / math.sqrt(d) / math.sqrt(2 * depth),
        layer.mlp.f.expand.weight: 0.125 / math.sqrt(d),
        layer.mlp.f.project.weight: 0.125 / math.sqrt(4 * d) / math.sqrt(2 * depth),
        model.token_embedding.weight: 0.125 / math.sqrt(d),
        model.text_position.weight: 0.125 / math.sqrt(d),
        model.row.weight: 0.125 / math.sqrt(2 * d),
        model.column.weight: 0.125 / math.sqrt(2 * d),
    }
    for parameter, std in expected.items():
        tolerance = 5 / math.sqrt(2 * parameter.numel())  # 5 standard deviations of the estimate
        assert parameter.std().item() == pytest.approx(std, rel=tolerance)
        assert abs(parameter.mean().item()) < 5 * std / math.sqrt(parameter.numel())
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or name == "to_logits.weight":
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name


# Ids out of range.


@pytest.mark.parametrize(
    ("row", "position", "wrong", "message"),
    [
        (1, 2, 17, r"text ids .* \[0, 17\), got 17 at row 1, position 2"),
        (0, 5, -1, r"text ids .*, got -1 at row 0, position 5"),
        (3, 6, 4, r"image ids .* \[0, 13\), got -13 at row 3, position 0"),
        (2, 9, 30, r"image ids .*, got 13 at row 2, position 3"),
    ],
)
def test_an_id_out_of_range_is_named(row, position, wrong, message, model, ids):
    ids[row, position] = wrong
    for call in (model, model.hidden, lambda ids: cross_entropies(model, ids)):
        with pytest.raises(ValueError, match=message):
            call(ids)


# A model depends on what its masks show, and on nothing else.


def reach(model):
    """bool (N, N): [q, k] is whether the logits at q have a gradient with respect to the input at k."""
    ids = ids_of(model)[:1]
    embedded = model.embed(model.layout.shift(ids)).detach().requires_grad_()
    model.embed = lambda inputs: embedded
    rows = [row[torch.isfinite(row)].square().sum() for row in model(ids)[0]]
    gradients = [torch.autograd.grad(row, embedded, retain_graph=True)[0][0] for row in rows]
    return torch.stack([gradient != 0 for gradient in gradients]).any(dim=-1)


@pytest.mark.parametrize("backend", ["dense", "sdpa"])
def test_one_layer_reaches_exactly_what_its_mask_shows(kind, backend):
    model = small(1, attention_backend=backend)
    assert torch.equal(reach(model), dense_mask(kind, model.layout, kernel=3))


def test_layers_of_all_kinds_reach_nothing_later(model):
    reached = reach(model)
    assert not reached.triu(1).any()
    assert reached[6:, :6].all()
    assert reached[-1].all()


# Embeddings (Figure 10).


def test_each_position_reads_its_token_and_its_position_embedding():
    """A pad is its own position."""
    model = small(grid=(2, 5))
    layout, ids = model.layout, ids_of(model)
    embedded = model.embed(layout.shift(ids))[0]
    tokens, ids = model.token_embedding.weight, ids[0]  # caption of 3 tokens, pads at 3, 4 and 5
    assert torch.equal(embedded[0], tokens[layout.start_of_text] + model.text_position.weight[0])
    assert torch.equal(embedded[2], tokens[ids[1]] + model.text_position.weight[2])
    assert torch.equal(embedded[4:6], tokens[11 + 3 : 11 + 5])
    for row in range(2):
        for column in range(5):
            read = ids[6 + 5 * row + column - 1] if row or column else layout.start_of_image
            position = model.row.weight[row] + model.column.weight[column]
            assert torch.equal(embedded[6 + 5 * row + column], tokens[read] + position)


# Logits.


def test_the_other_modality_and_other_positions_pads_have_minus_infinity(model):
    logits = model(ids_of(model))
    finite = torch.zeros(22, 11 + 6 + 13, dtype=torch.bool)
    finite[:6, :11] = True
    finite[range(6), range(11, 17)] = True
    finite[6:, 17:] = True
    assert torch.equal(torch.isfinite(logits), finite.expand(4, -1, -1))
    assert (logits[:, ~finite] == -torch.inf).all()


@pytest.mark.parametrize("n", [1, 4, 6, 7, 15])
def test_a_prefix_has_the_logits_of_the_whole(n, model, ids):
    torch.testing.assert_close(model(ids[:, :n]), model(ids)[:, :n], rtol=1e-4, atol=1e-5)


def test_backends_agree_in_losses_and_gradients():
    expected, *others = (losses_and_gradients(small(attention_backend=backend)) for backend in TRAINABLE)
    for other in others:
        torch.testing.assert_close(other, expected, rtol=1e-4, atol=1e-5)


def test_flex_agrees_in_logits():
    """In the model, column layers exchange rows and columns before q, k and v are made."""
    model, other = small(grid=(2, 5), attention_backend="dense"), small(grid=(2, 5), attention_backend="flex")
    with torch.no_grad():
        torch.testing.assert_close(other(ids_of(other)), model(ids_of(model)), rtol=1e-4, atol=1e-5)


def test_logits_and_final_states_are_fp32_under_autocast(model, ids):
    seen = []
    model.layers[0].attention.f.qkv.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, hidden = model(ids), model.hidden(ids)
        text = model.text_logits(hidden[:, :6], torch.arange(6))
    assert seen == [torch.bfloat16] * 2
    assert logits.dtype == hidden.dtype == text.dtype == torch.float32
    torch.testing.assert_close(text[..., :11], hidden[:, :6] @ model.to_logits.weight[:11].T)


# Losses (2.2, B.2).


def test_losses_equal_cross_entropy_on_the_joint_logits_in_value_and_gradient(model, ids):
    losses = cross_entropies(model, ids)
    logits, counts = model(ids), model.layout.loss_mask(ids)
    expected = []
    for part in (slice(0, 6), slice(6, None)):
        kept = counts[:, part]
        expected.append(F.cross_entropy(logits[:, part][kept], ids[:, part][kept]))
    assert counts[:, :6].sum(dim=1).tolist() == [4, 1, 6, 2]  # the caption and one pad
    torch.testing.assert_close(losses, tuple(expected))
    torch.testing.assert_close(cross_entropies(model, ids.repeat(3, 1)), losses)
    ours, theirs = (
        torch.autograd.grad(text + 3 * image, list(model.parameters())) for text, image in (losses, expected)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "weight"), [(TransformerLossConfig(), 1 / 8), (TransformerLossConfig(0.5), 0.5)]
)
def test_text_weighs_one_eighth_unless_given(config, weight, model, ids):
    text, image = cross_entropies(model, ids)
    loss = TransformerObjective(config)(model, ids, 0)
    torch.testing.assert_close(loss.total, weight * text + (1 - weight) * image)
    assert loss.metrics == {"text_loss": text, "image_loss": image}


@pytest.fixture
def untrained():
    torch.manual_seed(0)
    return Transformer(TransformerConfig(depth=2, grid=(3, 3), **SMALL))


def test_the_loss_starts_at_ln_of_the_vocabulary(untrained):
    """Text chooses among 11 ids and the pad of its position, the image among 13 codes."""
    objective = TransformerObjective()
    loss, known = objective(untrained, ids_of(untrained), 0), objective.random_baseline(untrained)
    expected = {"text_loss": math.log(12), "image_loss": math.log(13)}
    assert known == pytest.approx(expected | {"loss": math.log(12) / 8 + math.log(13) * 7 / 8})
    for name, nats in expected.items():
        assert loss.metrics[name].item() == pytest.approx(nats)
    assert loss.total.item() == pytest.approx(known["loss"])


def test_a_few_steps_learn_a_small_batch(untrained):
    optimizer, ids = torch.optim.Adam(untrained.parameters(), lr=1e-2), ids_of(untrained)
    for _ in range(60):
        loss = weighted_cross_entropy(*cross_entropies(untrained, ids))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * math.log(13)


def test_the_operations_of_a_step_are_those_of_the_formula(model, ids):
    work = TransformerObjective().step_cost(model, ids)
    assert (work.samples, work.tokens) == (4, 4 * 22)
    assert work.flops == 4 * sum(training_flops(model.config).values())


# Memory: chunks of logits, activation checkpointing.


def losses_and_gradients(model: Transformer, logits: int = 10**6) -> list[torch.Tensor]:
    model.zero_grad()
    ids = ids_of(model).to(model.to_logits.weight.device)
    text, image = cross_entropies(model, ids, logits)
    weighted_cross_entropy(text, image).backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [text.detach(), image.detach(), *gradients]


@pytest.mark.parametrize("logits", [1, 40, 100])
def test_chunks_of_logits_change_neither_the_losses_nor_the_gradients(logits, model):
    torch.testing.assert_close(losses_and_gradients(model, logits), losses_and_gradients(model))


def test_no_more_than_a_chunk_of_logits_is_made_at_once(monkeypatch, model):
    made, plain = [], Transformer._logits

    def counted(*args):
        logits = plain(*args)
        made.append(logits.numel())
        return logits

    monkeypatch.setattr(Transformer, "_logits", counted)
    losses_and_gradients(model, 100)
    assert 50 < max(made) <= 100
    assert len(made) > 10
    assert LOGITS // TokenLayout().image_vocab == 1024  # positions at once at paper size


def test_activation_checkpointing_changes_no_gradient(model, monkeypatch):
    """And keeps no state of random numbers, which would be copied from the GPU."""
    monkeypatch.setattr("torch.get_rng_state", pytest.fail)
    expected = losses_and_gradients(model)
    for block in model.resblocks():
        block.activation_checkpointing = True
    calls = []
    model.layers[0].mlp.f.expand.register_forward_pre_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(losses_and_gradients(model), expected, rtol=0, atol=0)
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("precision", "chunk", "recomputed", "tolerance"),
    [
        ("fp32", 10**6, False, 1e-4),
        ("fp32", 40, True, 1e-4),
        ("bf16", 40, True, 0.1),
        ("fp16", 40, False, 0.02),
    ],
)
def test_losses_and_gradients_on_cuda_are_those_of_the_cpu(precision, chunk, recomputed, tolerance, cuda):
    """By another backend; in fp16 with gradient scales. The tolerance is of all gradients together."""
    expected = losses_and_gradients(small(3, attention_backend="dense"))
    model = small(3, activation_checkpointing=recomputed).to(cuda)
    scales = PerBlockGradScaler(model.resblocks()) if precision == "fp16" else None
    with autocast(precision, cuda):
        losses = losses_and_gradients(model, chunk)[:2]
    assert scales is None or scales.unscale().all()
    gradients = torch.cat([p.grad.cpu().flatten() for p in model.parameters()])
    others = torch.cat([gradient.flatten() for gradient in expected[2:]])
    assert {p.grad.device for p in model.parameters()} == {cuda}
    torch.testing.assert_close([x.cpu() for x in losses], expected[:2], rtol=tolerance, atol=0)
    assert (gradients - others).norm() < tolerance * others.norm()


# Compilation.


@pytest.mark.parametrize(
    "backend", ["dense", *(pytest.param(b, marks=pytest.mark.slow) for b in TRAINABLE if b != "dense")]
)
@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_layers_compile_without_a_break_and_keep_their_names(backend, activation_checkpointing):
    model = small(3, attention_backend=backend, activation_checkpointing=activation_checkpointing)
    expected, names = losses_and_gradients(model), list(model.state_dict())
    torch.compiler.reset()
    compile_layers(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(losses_and_gradients(model), expected)
    assert list(model.state_dict()) == names
    assert torch._dynamo.config.recompile_limit >= VARIANTS


@pytest.mark.slow
def test_layers_with_gradient_scales_compile_without_a_break(model):
    scales = PerBlockGradScaler(model.resblocks())
    expected = losses_and_gradients(model)
    torch.compiler.reset()
    compile_layers(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(losses_and_gradients(model), expected, rtol=1e-4, atol=1e-3)
    assert scales.unscale().all()
