"""Decoding with the KV cache and sampling (dalle/transformer/generate.py), against whole sequences."""

from contextlib import contextmanager
from itertools import islice
from types import SimpleNamespace

import pytest
import torch

from dalle import layout
from dalle.sampling import candidate_noise
from dalle.transformer.generate import (
    TO_GENERATE,
    CUDAGraphStep,
    cast_linear_weights,
    decode_step_of,
    generate,
    generate_tokens,
    inference_autocast,
    quantize_int8,
)
from dalle.transformer.losses import cross_entropies
from tests.helpers.device_work import DeviceWork, step_work
from tests.helpers.small_transformer import CAPTIONS, ids_of, small, text_of

GRIDS = [(4, 4), (2, 5), (5, 3)]


def noise_for(model, captions, candidates):
    shape, generator = (captions, candidates, model.layout.num_image_tokens), torch.Generator().manual_seed(0)
    return torch.rand(shape, generator=generator, dtype=torch.float64)


# With the KV cache and without.


def states_by_steps(model, ids, begun, as_tensor=False):
    """Final states (n, positions, D) of image positions begun .. N: a prefill, then one token a step."""
    layout, caches = model.layout, model.init_kv_caches(len(ids), 1)
    text, image = layout.unpack(ids)
    with inference_autocast(model):
        states = [model.prefill(layout.shift(layout.pack(text, image[:, :begun])), caches)[:, -1]]
    for position in range(begun + 1, layout.num_image_tokens):
        place = torch.tensor([position]) if as_tensor else position
        states.append(model.decode_step(image[:, position - 1], place, caches))
    return torch.stack(states, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("as_tensor", [False, True], ids=["views", "fixed shapes"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_steps_have_the_logits_of_the_whole_at_every_position_after_any_prefill(kind, grid, as_tensor):
    model = small(2, grid)
    ids = ids_of(model)
    whole = model.image_logits(model.hidden(ids)[:, model.layout.text_len :])
    for begun in range(model.layout.num_image_tokens):
        steps = model.image_logits(states_by_steps(model, ids, begun, as_tensor=as_tensor))
        torch.testing.assert_close(steps, whole[:, begun:], rtol=1e-4, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["sdpa", "flex"])
def test_the_cache_is_filled_by_any_backend(backend):
    model = small(grid=(2, 5), attention_backend=backend)
    ids = ids_of(model)
    whole = model.hidden(ids)[:, model.layout.text_len :]
    torch.testing.assert_close(states_by_steps(model, ids, 0), whole, rtol=1e-4, atol=2e-5)


@torch.no_grad()
def test_candidates_share_their_captions_keys_and_have_image_keys_of_their_own():
    model = small(grid=(2, 5))
    caches = model.init_kv_caches(4, 3)
    model.prefill(model.layout.shift(text_of(model)), caches)
    assert caches[0].text.shape == (2, 4 * 2, 6, 8)
    assert caches[0].image.shape == (2, 4 * 2 * 3, 6, 8)


@torch.no_grad()
def test_steps_in_bf16_are_those_of_autocast():
    model = small(grid=(2, 5))
    ids = ids_of(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        whole = model.hidden(ids)[:, model.layout.text_len :]
    half = cast_linear_weights(model, torch.bfloat16)
    for tensor in (half.init_kv_caches(1, 1)[0].image, half.layers[0].mlp.f.expand.weight):
        assert tensor.dtype == torch.bfloat16
    assert half.to_logits.weight is model.to_logits.weight
    assert model.layers[0].mlp.f.expand.weight.dtype == torch.float32
    assert half.patterns["row"] is model.patterns["row"]
    assert cast_linear_weights(half, torch.bfloat16) is half
    torch.testing.assert_close(states_by_steps(half, ids, 4), whole[:, 4:], rtol=0.1, atol=0.1)


@pytest.mark.slow
def test_compiled_steps_sample_the_same_and_compile_once_for_all_batches():
    model, other = small(grid=(2, 5)), small(grid=(2, 5))
    text, noise = text_of(model)[:2], torch.rand(2, 3, 10, dtype=torch.float64)
    plain = generate(model, text, noise)
    torch._dynamo.utils.counters.clear()
    for _ in range(2):  # each with caches of its own
        assert torch.equal(generate(model, text, noise, step=decode_step_of(model, compile=True)), plain)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    tokens = generate(other, text, noise)
    assert not torch.equal(tokens, plain)
    assert torch.equal(generate(other, text, noise, step=decode_step_of(other, compile=True)), tokens)


@torch.no_grad()
def generate_slowly(model, text_tokens, noise, prefix=None, guidance=None):
    """Image tokens (n, N) of candidates of one caption (1, T): every position reads the whole sequence."""
    layout = model.layout
    empty = layout.pad_text([[]])
    rows = []
    for numbers in noise:
        image = prefix if prefix is not None else torch.zeros(1, 0, dtype=torch.int64)
        for position in range(image.shape[1], layout.num_image_tokens):
            unknown = torch.cat([image, torch.zeros(1, 1, dtype=torch.int64)], dim=1)
            logits, unconditional = (
                model(layout.pack(text, unknown))[0, -1, layout.image_offset :]
                for text in (text_tokens, empty)
            )
            if guidance is not None:
                logits = unconditional + guidance * (logits - unconditional)
            token = (torch.softmax(logits, dim=0).double().cumsum(dim=0) <= numbers[position]).sum()
            image = torch.cat([image, token.view(1, 1)], dim=1)
        rows.append(image[0])
    return torch.stack(rows)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_sampling_with_the_cache_equals_sampling_without(kind, grid):
    model = small(2, grid)
    text, noise = text_of(model, 2), noise_for(model, 2, 3)
    fast = generate(model, text, noise)
    for caption in range(2):
        assert torch.equal(fast[caption], generate_slowly(model, text[[caption]], noise[caption]))


@pytest.mark.parametrize("guidance", [None, 0.0, 3.0])
@pytest.mark.parametrize("kept", [0, 1, 4, 7, 15])
def test_any_prefix_is_kept_and_continued(kept, guidance):
    model = small(depth=3)
    text, noise = text_of(model, 2), noise_for(model, 2, 2)
    prefix = torch.randint(13, (2, kept), generator=torch.Generator().manual_seed(5))
    fast = generate(model, text, noise, prefix=prefix, guidance=guidance)
    assert torch.equal(fast[:, :, :kept], prefix[:, None].expand(-1, 2, -1))
    for i in range(2):
        assert torch.equal(fast[i], generate_slowly(model, text[[i]], noise[i], prefix[[i]], guidance))


@pytest.mark.parametrize("guidance", [None, 3.0])
def test_tokens_kept_inside_a_box_stay_and_are_read_by_what_follows(guidance):
    """The lower right quarter of the image is generated."""
    model = small(depth=3)
    text, noise = text_of(model, 2), noise_for(model, 2, 2)
    wanted = torch.randint(13, (2, 16), generator=torch.Generator().manual_seed(5))
    wanted[:, [10, 11, 14, 15]] = TO_GENERATE
    tokens = generate(model, text, noise, prefix=wanted, guidance=guidance)
    kept = wanted != TO_GENERATE
    assert torch.equal(tokens[:, 0][kept], wanted[kept])
    for i in range(2):
        for j in range(2):
            first = generate(model, text[[i]], noise[[i]][:, [j]], prefix=wanted[[i], :10], guidance=guidance)
            both = torch.cat([first[0, :, :12], wanted[[i], 12:14]], dim=1)
            last = generate(model, text[[i]], noise[[i]][:, [j]], prefix=both, guidance=guidance)
            assert torch.equal(tokens[i, j], last[0, 0])


def test_every_position_is_yielded_as_it_is_sampled():
    model = small(grid=(2, 5))
    text, noise, prefix = text_of(model, 2), noise_for(model, 2, 2), torch.zeros(2, 3, dtype=torch.int64)
    parts = [part.clone() for part in generate_tokens(model, text, noise, prefix=prefix)]
    assert [part.shape for part in parts] == [(2, 2, n) for n in range(4, 11)]
    for part in parts:
        assert torch.equal(part, parts[-1][:, :, : part.shape[2]])
    (whole,) = generate_tokens(model, text, noise, prefix=parts[-1][:, 0])
    assert torch.equal(whole, parts[-1][:, :1].expand(-1, 2, -1))


def test_guidance_changes_the_tokens_unless_it_is_one_or_the_caption_is_empty(model):
    for text, guidance, same in (
        (text_of(model), 1.0, True),
        (model.layout.pad_text([[]]), 3.0, True),
        (text_of(model), 3.0, False),
        (text_of(model), 0.0, False),
    ):
        noise = noise_for(model, len(text), 3)
        guided = generate(model, text, noise, guidance=guidance)
        assert torch.equal(guided, generate(model, text, noise)) == same


# Candidates.


def test_candidates_and_captions_sampled_together_equal_those_sampled_alone(model):
    text = text_of(model)
    noise = torch.stack([candidate_noise(0, str(i), range(5), 16) for i in range(len(CAPTIONS))])
    together = generate(model, text, noise)
    for i in range(len(CAPTIONS)):
        assert torch.equal(generate(model, text[[i]], noise[[i]]), together[[i]])
        assert torch.equal(generate(model, text[[i]], noise[[i], :1]), together[[i], :1])


def test_sampling_options_are_used_and_global_state_is_left_alone(model, ids):
    text, noise, before = text_of(model), noise_for(model, len(CAPTIONS), 4), torch.get_rng_state()
    greedy = generate(model, text, noise, temperature=0.0)
    assert greedy.dtype == torch.int64
    assert torch.equal(greedy, greedy[:, :1].expand(-1, 4, -1))
    assert torch.equal(generate(model, text, noise, top_k=1), greedy)
    assert torch.equal(generate(model, text, noise, top_p=1e-9), greedy)
    assert not torch.equal(generate(model, text, noise), greedy)
    assert torch.equal(torch.get_rng_state(), before)
    cross_entropies(model, ids)[1].backward()  # no tensor of the inference stays in the model


def test_logits_that_are_not_numbers_are_an_error(model):
    """fp16, which is the default on older GPUs, may overflow."""
    text, noise = text_of(model), noise_for(model, len(CAPTIONS), 2)
    with torch.no_grad():
        model.row.weight[2] = torch.nan
    with pytest.raises(ValueError, match="not numbers"):
        generate(model, text, noise)


# Off the CPU.


def test_layout_tables_are_read_once_a_step_and_each_layer_adds_22_operations():
    """A CUDA graph records a step: nothing in it waits for the device or is copied there."""
    few, many = (step_work(small(depth), "meta") for depth in (3, 7))
    assert sum((many - few).values()) == 4 * 22 + 1  # a column layer more selects its column
    assert (many - few)["index"] == 0
    assert few["index"] == 2 + 3 * 2 + 1  # row and column; key and mask of three kinds, and the column


@pytest.mark.parametrize("quantize", [lambda model: model, quantize_int8], ids=["fp32", "int8"])
def test_sampling_uses_float64_on_the_cpu_alone(monkeypatch, quantize):
    """On the meta device, which has no values to check."""
    model = quantize(small(2, (1, 3)).requires_grad_(False))
    text, noise = text_of(model, 2), noise_for(model, 2, 3)
    monkeypatch.setattr(layout, "check_tokens", lambda *_: None)
    with DeviceWork() as work:
        options = {"guidance": 2, "top_k": 3, "top_p": 0.9, "min_p": 0.1}
        (*_, tokens) = islice(generate_tokens(model.to("meta"), text.to("meta"), noise, **options), 3)
    assert (tokens.device.type, tokens.shape) == ("meta", (2, 3, 3))
    assert work.counts["searchsorted"] == 2 * 3
    assert model.to_logits.weight.device.type == "meta"


def test_a_cuda_graph_is_recorded_and_replayed_on_the_models_device(monkeypatch):
    """Streams and graphs belong to the current device, which may be another one."""
    current, seen = [], []

    @contextmanager
    def entered(name, *arguments):
        current.append(name)
        yield
        current.pop()

    def made(name):
        seen.append((name, list(current)))
        return SimpleNamespace(wait_stream=lambda _: None, replay=lambda: made("replay"))

    fakes = {
        "device": entered,
        "stream": lambda _: entered("warm-up"),
        "graph": lambda _, stream, **options: entered("recording"),  # torch's own stream has one device
        "CUDAGraph": lambda: made("graph"),
        "Stream": lambda: made("stream"),
        "current_stream": lambda: made("current"),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    step, here = CUDAGraphStep(lambda *_: made("step")), torch.device("cpu")
    for _ in range(2):
        step(None, torch.zeros(3), torch.zeros(1), [])
    assert {tuple(inside)[:1] for _, inside in seen} == {(here,)}
    assert [inside[1:] for name, inside in seen if name == "step"] == [["warm-up"], ["recording"]]
    assert [name for name, _ in seen].count("replay") == 2


def test_a_graph_is_the_default_on_cuda_and_refused_elsewhere(model):
    assert decode_step_of(model) is decode_step_of(model, cuda_graph=False) is None
    with pytest.raises(ValueError, match=r"cuda_graph needs .* CUDA .* cpu"):
        decode_step_of(model, cuda_graph=True)
    weight = SimpleNamespace(device=torch.device("cuda", 1))
    elsewhere = type("Elsewhere", (), {"to_logits": SimpleNamespace(weight=weight), "decode_step": None})()
    assert isinstance(decode_step_of(elsewhere), CUDAGraphStep)
    assert decode_step_of(elsewhere, cuda_graph=False) is None
