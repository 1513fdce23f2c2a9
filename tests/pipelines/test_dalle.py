"""DALLE: prompt to ranked images, on a tiny model trained for two steps (dalle/pipelines/dalle.py)."""

import json
import math
import shutil
from dataclasses import replace
from io import BytesIO
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

import dalle as package
from dalle.clip import PretrainedScorer
from dalle.hub.registry import LoadedModel, load_model, weights_hash
from dalle.io.files import read_json, read_tensors, write_json, write_tensors
from dalle.io.images import to_pil, to_tensor
from dalle.nn.kv_cache import kv_cache_bytes
from dalle.pipelines import best_of_n, pipeline
from dalle.pipelines.best_of_n import CandidateBatch, auto_batch_size, candidate_batches
from dalle.pipelines.dalle import DALLE
from dalle.pipelines.generation import Generation, merge_generations
from dalle.sampling import SamplingConfig
from dalle.text import TextTokenizer, TextTokenizerConfig, train_text_tokenizer
from dalle.train.precision import resolve_device, resolve_precision
from dalle.types import ImageTokenizer, Scorer

WEIGHTS = ["dvae.safetensors", "transformer.safetensors", "clip.safetensors"]
CAPTIONS = ("a red cross above a blue circle", "a small red cross in the middle", "a blue circle")


def generate(model: DALLE, prompts, n: int = 1, best_of: int | None = None, **options):
    return model.generate(prompts, n=n, best_of=best_of or n, progress=False, **options)


def images(images: list[Image.Image]) -> list[bytes]:
    return [image.tobytes() for image in images]


def tokens_of(generation: Generation) -> dict[int, list[int]]:
    """Image tokens of each candidate."""
    return dict(zip(generation.candidates, generation.image_tokens.tolist(), strict=True))


def another_text_tokenizer() -> TextTokenizer:
    return train_text_tokenizer(["other words"], TextTokenizerConfig(vocab_size=300))


@pytest.fixture(scope="module")
def model(chain) -> DALLE:
    """Shared by the tests that only read it."""
    return DALLE.from_pretrained(chain / "model")


@pytest.fixture(scope="module")
def parts(chain) -> dict[str, LoadedModel]:
    return {kind: load_model(chain / kind, kind) for kind in ("dvae", "transformer", "clip")}


@pytest.fixture
def image() -> Image.Image:
    return to_pil(torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(3)))[0]


@pytest.fixture
def random_logits(dalle) -> DALLE:
    """A model whose output layer is random, so that its logits depend on everything."""
    with torch.no_grad():
        dalle.transformer.to_logits.weight.normal_(generator=torch.Generator().manual_seed(0))
    return dalle


@pytest.fixture
def before_each_batch(monkeypatch):
    """before_each_batch(hook): hook(noise) is called before a batch is sampled."""
    plain = best_of_n.generate_tokens

    def arrange(hook) -> None:
        def watched(model, text, noise, *rest, **options):
            hook(noise)
            return plain(model, text, noise, *rest, **options)

        monkeypatch.setattr(best_of_n, "generate_tokens", watched)

    return arrange


@pytest.fixture
def noise_shapes(before_each_batch) -> set[tuple[int, ...]]:
    """(prompts, candidates, positions) of every batch that is sampled."""
    shapes = set()
    before_each_batch(lambda noise: shapes.add(tuple(noise.shape)))
    return shapes


BAD_IMAGES = [
    (np.zeros((8, 8, 3)), "uint8"),
    (np.full((8, 8, 3), np.nan, np.float32), "uint8"),
    (np.zeros((8, 8), np.uint8), "uint8"),
    (np.zeros((8, 8, 4), np.uint8), "uint8"),
    (np.zeros((0, 8, 3), np.uint8), "image"),
    (torch.zeros(1, 3, 32, 32), "image tokens must be int64"),
    (torch.zeros(2, 16, dtype=torch.int64), "one image"),
    (torch.full((1, 16), 10**6), "image tokens must be in"),
    (3, "expected an image"),
    (None, "expected an image"),
]


class TestGenerate:
    def test_n_images_of_the_models_size_best_first(self, model, prompt):
        generation = generate(model, prompt, n=3, best_of=5)
        assert [image.size for image in generation.images] == [(32, 32)] * 3
        assert (generation.image_tokens.shape, generation.image_tokens.dtype) == ((3, 16), torch.int64)
        assert (generation.prompt, generation.seed) == (prompt, 0)
        pixels = model.decode(generation.image_tokens)
        assert images(generation.images) == images(to_pil(pixels))
        assert generation.scores == sorted(generation.scores, reverse=True)
        assert model.scorer.score(pixels, prompt).tolist() == pytest.approx(generation.scores, abs=1e-5)
        every = generate(model, prompt, n=5)
        assert sorted(every.candidates) == list(range(5))
        assert generation.candidates == every.candidates[:3]
        assert images(generation.images) == images(every.images[:3])

    def test_whole_numbers_of_any_type_are_the_same_number(self, model, prompt):
        whole = generate(model, prompt, n=1, best_of=2, seed=3, top_k=4).image_tokens
        for three in (3.0, np.int64(3), np.float32(3), torch.tensor(3)):
            same = model.generate(prompt, 1.0, np.int32(2), three, top_k=4.0, progress=False)
            assert torch.equal(same.image_tokens, whole)
        wrong = [("seed", None), ("seed", torch.tensor(3.0)), ("n", 1.5), ("n", True), ("best_of", "2")]
        for name, value in [*wrong, ("top_k", 1.5)]:
            with pytest.raises(ValueError, match=f"{name} must be a whole number"):
                model.generate(prompt, **{"n": 1, "best_of": 2} | {name: value})
        with pytest.raises(ValueError, match="temperature must be a finite number"):
            model.generate(prompt, temperature="1")

    def test_seed_and_caption_determine_the_images(self, model, prompt):
        ways = ((prompt, 0), (prompt, 0), (prompt, 1), (CAPTIONS[1], 0))
        found = [generate(model, text, seed=seed).image_tokens.tolist() for text, seed in ways]
        assert found[0] == found[1]
        assert found[0] not in found[2:]

    def test_sampling_options_are_used(self, random_logits, prompt):
        plain = generate(random_logits, prompt, n=3).image_tokens
        assert torch.equal(generate(random_logits, prompt, n=3, guidance=1.0).image_tokens, plain)
        assert not torch.equal(generate(random_logits, prompt, n=3, guidance=100.0).image_tokens, plain)
        for settings in ({"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-6}):
            rows = generate(random_logits, prompt, n=3, **settings).image_tokens
            assert (rows == rows[0]).all()
            assert not torch.equal(rows, plain)

    def test_without_a_scorer_n_images_come_unranked_with_a_warning(self, model, prompt):
        plain = DALLE(model.dvae, model.transformer, model.text)
        with pytest.warns(UserWarning, match="no scorer: .* 2 images"):
            generation = generate(plain, prompt, n=2, best_of=8)
        assert (generation.scores, generation.candidates) == (None, [0, 1])


class TestMistakes:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"n": 0}, "n 1 or more.* n=0"),
            ({"n": 4, "best_of": 3}, "best_of must .*best_of=3, n=4"),
            ({"temperature": -0.5}, "temperature must .*-0.5"),
        ],
    )
    def test_settings_are_checked_before_sampling(self, model, prompt, settings, message, monkeypatch):
        monkeypatch.setattr(best_of_n, "generate_tokens", None)
        with pytest.raises(ValueError, match=message):
            model.generate(prompt, **settings)

    @pytest.mark.parametrize("text", ["", "   ", "\n", "\u200b", ["a circle", " "]])
    def test_an_empty_prompt_is_refused(self, model, text):
        with pytest.raises(ValueError, match="prompt is empty"):
            generate(model, text)

    def test_a_prompt_too_long_is_refused_unless_it_may_be_cut(self, model, prompt):
        long = " and ".join([prompt] * 4)
        with pytest.raises(ValueError, match=r"has \d+ tokens, .* 19"):
            generate(model, long)
        assert len(generate(model, long, truncate=True).images) == 1

    def test_letters_that_the_vocabulary_lacks_are_named(self, model, prompt, recwarn):
        generate(model, prompt)
        assert not [one for one in recwarn if "vocabulary" in str(one.message)]
        with pytest.warns(UserWarning, match="vocabulary lacks letters of '円'") as found:
            assert len(model.generate("ein kreis, 円", n=1, best_of=1, truncate=True, progress=False).images)
        assert found[0].filename == __file__


class TestComplete:
    @pytest.fixture
    def complete(self, model, prompt, image):
        def run(image=image, n=1, **options) -> Generation:
            return model.complete(prompt, image, n=n, best_of=n, progress=False, **options)

        return run

    @pytest.mark.parametrize("box", [(1, 0), (2, 0), (3, 0), (2, 1), (0, 2), (3, 3)])
    def test_all_outside_the_box_keeps_the_images_tokens(self, model, complete, image, box):
        generated = complete(n=3, box=box).image_tokens.view(3, 4, 4)
        kept = model.dvae.encode(to_tensor([image])).view(4, 4)
        inside = torch.zeros(4, 4, dtype=torch.bool)
        inside[box[0] :, box[1] :] = True
        assert (generated[:, ~inside] == kept[~inside]).all()
        assert len(generated[:, inside].unique(dim=0)) > 1

    @pytest.mark.parametrize("rows", [1, 2, 3])
    def test_rows_are_a_box_as_wide_as_the_image(self, complete, rows):
        one, other = (complete(n=2, **keep).image_tokens for keep in ({"rows": rows}, {"box": (rows, 0)}))
        assert torch.equal(one, other)

    def test_a_file_of_any_size_will_do(self, complete, image, tmp_path):
        image.resize((50, 37)).save(tmp_path / "a.png")
        assert complete(tmp_path / "a.png", rows=2).images[0].size == (32, 32)
        assert torch.equal(*(complete(one, rows=2).image_tokens for one in (image, np.asarray(image))))
        with pytest.raises(ValueError, match=r"no image at .*none\.png"):
            complete(tmp_path / "none.png", rows=1)

    @pytest.mark.parametrize(
        ("keep", "message"),
        [({"rows": rows}, f"rows must be 1 to 3, got {rows}") for rows in (0, 4, -1, 100)]
        + [({"box": box}, "box must be .* 4 x 4") for box in ((0, 0), (4, 0), (0, 4), (-1, 2))]
        + [({}, "either rows"), ({"rows": 1, "box": (1, 1)}, "either rows")],
    )
    def test_exactly_one_region_within_the_grid_is_required(self, complete, keep, message):
        with pytest.raises(ValueError, match=message):
            complete(**keep)

    @pytest.mark.parametrize(
        ("keep", "message"),
        [({"rows": value}, "rows must be") for value in (1.5, "2", True, math.nan, 10**30)]
        + [({"box": value}, "box must|top must|left must") for value in (3, (1,), (1, 0.5), ("1", 0))]
        + [({"rows": 2, "image": image}, message) for image, message in BAD_IMAGES]
        + [({"rows": 2, "n": 2**30}, "best_of must be n to")],
    )
    def test_what_is_no_whole_number_or_no_image_is_named(self, complete, keep, message):
        with pytest.raises(ValueError, match=message):
            complete(**keep)

    def test_whole_numbers_and_lists_are_rows_and_boxes(self, complete):
        one, other = (complete(rows=2.0), complete(box=[np.int64(2), torch.tensor(0)]))
        assert torch.equal(one.image_tokens, other.image_tokens)

    def test_a_candidates_own_rows_give_it_back(self, model, complete, prompt):
        """The random numbers of the rows below are those of `generate`."""
        own = generate(model, prompt).image_tokens
        assert torch.equal(complete(own[:1], rows=2).image_tokens, own)


class TestSeveralCaptions:
    @pytest.mark.parametrize(
        "settings",
        [{"best_of": 2}, {"best_of": 2, "batch_size": 4}, {"best_of": 3, "batch_size": 2}, {"best_of": 20}],
    )
    def test_each_has_the_images_that_it_has_alone(self, model, settings):
        together = generate(model, CAPTIONS, n=2, **settings)
        assert [one.prompt for one in together] == list(CAPTIONS)
        for caption, one in zip(CAPTIONS, together, strict=True):
            alone = generate(model, caption, n=2, **settings)
            assert (alone.candidates, images(alone.images)) == (one.candidates, images(one.images))
        assert generate(model, []) == []


class TestCandidateBatches:
    """Every batch has the same shape, so that a candidate's bits do not depend on the others."""

    @pytest.mark.parametrize(
        ("counts", "batches"),
        [
            ((1, 5, 4), [([0], range(4), 4), ([0], range(4, 8), 1)]),
            ((3, 2, 4), [([0, 1], range(2), 2), ([2, 2], range(2), 2)]),
            ((2, 3, 4), [([0], range(4), 3), ([1], range(4), 3)]),
            ((2, 3, 4, 2), [([0, 1], range(2), 2), ([0, 1], range(2, 4), 1)]),
            ((1, 1, 4, 2), [([0, 0], range(2), 1)]),
            ((2, 1, 4, 1), [([0], range(4), 1), ([1], range(4), 1)]),
        ],
    )
    def test_prompts_and_candidates_of_each_batch(self, counts, batches):
        assert list(candidate_batches(*counts)) == [CandidateBatch(*batch) for batch in batches]
        with pytest.raises(ValueError, match=r"prompts_per_batch .* 4, got 5"):
            list(candidate_batches(1, 1, 4, 5))

    @pytest.mark.parametrize("together", [1, 2])
    def test_fixed_prompts_per_batch_give_the_same_bits_for_any_number_of_captions(
        self, random_logits, together, noise_shapes
    ):
        shared = {}
        for some, best_of in ((CAPTIONS, 1), (CAPTIONS[::-1], 5), (CAPTIONS[1:2], 3), (CAPTIONS[:2], 2)):
            for one in generate(random_logits, some, best_of, batch_size=4, prompts_per_batch=together):
                for candidate, row in tokens_of(one).items():
                    assert shared.setdefault((one.prompt, candidate), row) == row
        assert noise_shapes == {(together, 4 // together, 16)}
        assert len(shared) == 3 * 5

    @pytest.mark.parametrize(
        "settings", [{}, {"guidance": 2.0}, {"temperature": 0.7, "top_k": 9, "top_p": 0.9}]
    )
    def test_a_candidate_has_the_same_bits_for_any_best_of_and_decode_batch(
        self, random_logits, prompt, settings, noise_shapes
    ):
        shared = {}
        for best_of, decode in ((9, None), (1, None), (5, 1), (9, 3), (4, 4)):
            options = {"batch_size": 4, "decode_batch_size": decode, **settings}
            for candidate, row in tokens_of(generate(random_logits, prompt, best_of, **options)).items():
                assert shared.setdefault(candidate, row) == row
        assert len(shared) == 9
        assert noise_shapes == {(1, 4, 16)}

    def test_memory_does_not_grow_with_the_number_of_candidates(self, model, prompt, monkeypatch):
        """At most a decode batch is decoded at once, and at most n images are kept."""
        kept, add, decode = [], best_of_n.TopN.add, Mock(wraps=model.dvae.decode)

        def counted_add(self, *new):
            add(self, *new)
            kept.append(len(self.best))

        monkeypatch.setattr(model.dvae, "decode", decode)
        monkeypatch.setattr(best_of_n.TopN, "add", counted_add)
        generate(model, prompt, n=3, best_of=40, batch_size=8, decode_batch_size=4)
        monkeypatch.setattr(best_of_n, "free_memory", lambda device: 1)
        generate(model, prompt, n=3, best_of=4, batch_size=2)
        assert [len(call.args[0]) for call in decode.call_args_list] == [4] * 10 + [1] * 4
        assert max(kept) == 3

    def test_batch_sizes_follow_the_free_memory(self, model, monkeypatch):
        free = best_of_n.free_memory(torch.device("cpu"))
        assert free is None or free > 2**20

        def rows(free: int | None, guidance: float | None = None) -> int:
            monkeypatch.setattr(best_of_n, "free_memory", lambda device: free)
            return auto_batch_size(model.transformer, guidance)

        each = kv_cache_bytes(model.transformer.init_kv_caches(1, 1))[1]
        assert (rows(None), rows(6 * each), rows(6 * each, 1.5), rows(1)) == (16, 4, 2, 1)

    @pytest.mark.parametrize(
        ("device", "best_of", "free", "rows"),
        [("cuda", wanted, None, rows) for wanted, rows in ((4, 64), (64, 64), (65, 128), (9999, 512))]
        + [("cuda", 512, 5 * 300, 256), ("cuda", 512, 25, 4), ("mps", 512, None, 64), ("cpu", 512, None, 16)],
    )
    def test_on_cuda_more_candidates_share_a_step_where_memory_holds_them(
        self, monkeypatch, device, best_of, free, rows
    ):
        monkeypatch.setattr(best_of_n, "free_memory", lambda device: free)
        weight, cache = SimpleNamespace(device=torch.device(device)), SimpleNamespace(image=Mock(nbytes=4))
        model = Mock(**{"to_logits.weight": weight, "init_kv_caches.return_value": [cache]})
        assert auto_batch_size(model, None, best_of) == rows


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_the_best_of_all_shards_are_the_best_of_all(model, prompt, world):
    options = {"n": 3, "best_of": 10, "batch_size": 4}
    whole = generate(model, prompt, **options)
    shards = [generate(model, [prompt], shard=(rank, world), **options) for rank in range(world)]
    assert sum(one.num_generated for shard in shards for one in shard) == 10
    joined = merge_generations([one for shard in shards for one in shard], 3)
    assert (joined.candidates, joined.scores) == (whole.candidates, whole.scores)
    assert (joined.num_generated, joined.interrupted) == (10, False)
    assert torch.equal(joined.image_tokens, whole.image_tokens)
    assert images(joined.images) == images(whole.images)


class TestInterruption:
    def test_what_is_ranked_is_kept_with_a_warning(self, model, prompt, before_each_batch):
        whole = generate(model, prompt, n=2, best_of=8, batch_size=4)
        assert (whole.interrupted, whole.num_generated, whole.best_of) == (False, 8, 8)
        before_each_batch(Mock(side_effect=[None, None, KeyboardInterrupt]))
        with pytest.warns(UserWarning, match="interrupted: 8 of 100"):
            part = generate(model, prompt, n=2, best_of=100, batch_size=4)
        assert (part.interrupted, part.num_generated, part.best_of) == (True, 8, 100)
        assert (part.candidates, images(part.images)) == (whole.candidates, images(whole.images))

    def test_prompts_without_an_image_are_left_out_and_with_no_image_it_is_raised(
        self, model, prompt, before_each_batch
    ):
        before_each_batch(Mock(side_effect=[None, KeyboardInterrupt]))
        with pytest.warns(UserWarning, match="interrupted"):
            found = generate(model, [prompt, "a blue circle"], n=1, best_of=4, batch_size=4)
        assert [one.prompt for one in found] == [prompt]
        before_each_batch(Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            generate(model, prompt)


class TestLogLikelihood:
    def test_it_is_the_sum_over_the_tokens(self, model, prompt):
        tokens = torch.randint(16, (3, 16), generator=torch.Generator().manual_seed(0))
        found = model.log_likelihood(prompt, tokens)
        layout = model.transformer.layout
        ids = layout.pack(model.text_tokens([prompt]).expand(3, -1), tokens)
        with torch.no_grad():
            nats = torch.log_softmax(model.transformer(ids), dim=-1).gather(2, ids[:, :, None])[:, :, 0]
        words = len(model.text.encode(prompt)) + 1  # and the first pad, which ends it
        torch.testing.assert_close(found.text, nats[:, :words].sum(dim=1))
        torch.testing.assert_close(found.image, nats[:, layout.text_len :].sum(dim=1))

    def test_an_image_has_that_of_its_tokens(self, model, prompt, image, tmp_path):
        image.save(tmp_path / "a.png")
        by_tokens = model.log_likelihood(prompt, model.dvae.encode(to_tensor([image])))
        by_image = model.log_likelihood(prompt, tmp_path / "a.png")
        assert isinstance(by_image.image, float)
        assert by_image == pytest.approx([float(part) for part in by_tokens])

    def test_tokens_beyond_the_vocabulary_and_empty_captions_are_refused(self, model, prompt):
        zeros = torch.zeros(1, 17, dtype=torch.int64)
        for caption, tokens, message in (
            (prompt, torch.full((1, 16), 16), r"must be in \[0, 16\), got 16"),
            (prompt, zeros, "at most 16"),
            ("", zeros[:, :16], "prompt is empty"),
        ):
            with pytest.raises(ValueError, match=message):
                model.log_likelihood(caption, tokens)


@pytest.mark.parametrize(
    ("options", "attribute", "dtype"),
    [({"precision": "bf16"}, "weight", torch.bfloat16), ({"int8": True}, "codes", torch.int8)],
)
def test_rounded_weights_sample_and_keep_the_hash(chain, model, prompt, tmp_path, options, attribute, dtype):
    rounded = DALLE.from_pretrained(chain / "model", **options)
    assert (rounded.hash, rounded.device) == (model.hash, model.device)
    assert getattr(rounded.transformer.layers[0].mlp.f.expand, attribute).dtype == dtype
    assert model.transformer.layers[0].mlp.f.expand.weight.dtype == torch.float32
    assert model.to_precision("fp32") is model
    assert len(generate(rounded, prompt, n=2).images) == 2
    tokens = torch.zeros(1, 16, dtype=torch.int64)
    plain, found = (m.log_likelihood(prompt, tokens).image for m in (model, rounded))
    torch.testing.assert_close(found, plain, rtol=0.01, atol=0)
    with pytest.raises(ValueError, match="rounded"):
        rounded.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


class TestDevice:
    def test_a_pipeline_moves_and_those_that_share_its_weights_stay(self, model, monkeypatch):
        rounded, copied = model.to_precision("bf16", int8=True), model.to_precision("bf16")
        monkeypatch.setattr(pipeline, "resolve_device", torch.device)
        assert rounded.to("meta") is rounded
        for one, device in ((rounded, "meta"), (copied, "cpu"), (model, "cpu")):
            for part in (one.dvae, one.transformer, one.scorer.model):
                assert {x.device.type for x in (*part.parameters(), *part.buffers())} == {device}
        assert (rounded.hash, rounded.scorer.text) == (model.hash, model.text)
        weights = copied.transformer.state_dict()
        assert {x.dtype for x in weights.values()} == {torch.float32, torch.bfloat16}
        copied.to(torch.device("cpu"))
        again = copied.transformer.state_dict()
        assert all(again[name].data_ptr() == weight.data_ptr() for name, weight in weights.items())

    def test_device_and_precision_follow_the_machine(self, chain, model, prompt):
        found, device = DALLE.from_pretrained(chain / "model", "auto", "auto"), resolve_device("auto")
        assert found.device.type == device.type
        assert found.precision == resolve_precision("auto", device, inference=True)
        assert len(generate(found, prompt, n=1, best_of=2).images) == 1
        with pytest.raises(ValueError, match="unknown device 'tpu'"):
            found.to("tpu")

    @pytest.mark.parametrize(
        ("capability", "training", "sampling"),
        [((9, 0), "bf16", "bf16"), ((7, 5), "fp32", "fp16"), ((6, 1), "fp32", "fp32")],
    )
    def test_precision_by_cuda_card(self, monkeypatch, capability, training, sampling):
        second = torch.device("cuda", 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", {second: capability}.get)
        found = [resolve_precision("auto", second, inference) for inference in (False, True)]
        assert found == [training, sampling]


class TestStream:
    def test_it_yields_after_each_row_with_gray_below(self, model, prompt):
        steps = list(model.stream(prompt, n=2, seed=5))
        assert [len(step) for step in steps] == [2] * 4
        for row, (image, _) in enumerate(steps[:-1], start=1):
            assert image.size == (32, 32)
            below = image.crop((0, 8 * row, 32, 32))
            assert below.getcolors() == [(below.width * below.height, (128, 128, 128))]
        plain = DALLE(model.dvae, model.transformer, model.text)
        assert images(steps[-1]) == images(generate(plain, prompt, n=2, seed=5).images)

    def test_settings_are_checked(self, model, prompt):
        with pytest.raises(ValueError, match=r"n must .* 4, got 5"):
            next(model.stream(prompt, n=5, batch_size=4))


class TestSteps:
    SAMPLING = SamplingConfig(batch_size=4)

    def test_the_last_state_has_what_generate_returns(self, model, prompt):
        steps = list(model.steps([prompt], 3, 10, 5, self.SAMPLING))
        whole = generate(model, prompt, n=3, best_of=10, seed=5, batch_size=4)
        (last,) = [top.generation() for top in steps[-1].top]
        assert (last.scores, last.candidates) == (whole.scores, whole.candidates)
        assert images(last.images) == images(whole.images)
        assert [step.top[0].seen for step in steps if step.ranked] == [10] * 3  # the list is shared
        assert [step.tokens.shape[2] for step in steps[:17]] == [*range(1, 17), 16]

    def test_a_callback_sees_each_row_of_a_completion_and_each_ranked_batch(self, model, prompt, image):
        seen, options = [], {"rows": 2, "n": 2, "best_of": 5, "batch_size": 4, "progress": False}
        whole = model.complete(prompt, image, **options)
        again = model.complete(
            prompt, image, **options, callback=lambda step: seen.append((step.tokens.shape[2], step.ranked))
        )
        assert torch.equal(again.image_tokens, whole.image_tokens)
        assert seen == [(12, False), (16, False), (16, True)] * 2

    def test_each_row_is_the_beginning_of_the_whole_images(self, model, prompt):
        every = tokens_of(generate(model, prompt, n=6, batch_size=4))
        shown = []
        for step in model.steps([prompt], 3, 6, 0, self.SAMPLING):
            if step.has_images:
                shown.append((step.batch.candidates, len(step.images)))
                for candidate, tokens in zip(step.batch.candidates, step.tokens[0].tolist(), strict=True):
                    assert tokens == every.get(candidate, tokens)[: len(tokens)]
        assert shown == [(range(4), 3)] * 4 + [(range(4, 8), 2)] * 4

    def test_leaving_the_loop_stops_the_sampling(self, model, prompt, positions_sampled):
        steps = model.steps([prompt], 4, 8, 0, self.SAMPLING)
        for step in steps:
            if step.has_images:
                break
        steps.close()
        assert positions_sampled == [1, 2, 3, 4]
        with pytest.raises(ValueError, match="best_of must"):  # before the first step
            model.steps([prompt], 4, 2)


def test_a_notebook_shows_a_png_with_at_most_four_images_a_row(model, prompt):
    generation = generate(model, prompt, n=5)
    wide, square, tall = (generation.grid(**c).size for c in ({"columns": 5}, {}, {"columns": 1}))
    assert wide == tall[::-1]
    assert wide[0] > square[0] > tall[0]
    png = generation._repr_png_()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert Image.open(BytesIO(png)).size == square


class TestSaving:
    def test_a_saved_model_samples_the_same_and_its_hash_names_the_weights(self, dalle, prompt, tmp_path):
        dalle.save_pretrained(tmp_path / "model")
        again = DALLE.from_pretrained(tmp_path / "model")
        assert again.hash == dalle.hash
        one, other = (generate(m, prompt, n=2, best_of=4) for m in (dalle, again))
        assert images(one.images) == images(other.images)
        assert one.scores == other.scores
        with torch.no_grad():
            again.dvae.decoder.blocks.input.b[0] += 1
        same = [a == b for a, b in zip(again.hash.split("-"), dalle.hash.split("-"), strict=True)]
        assert same == [False, True, True]

    def test_without_a_scorer_there_is_no_clip_in_the_directory(self, dalle, tmp_path):
        dalle.scorer = None
        dalle.save_pretrained(tmp_path)
        files = {"README.md", "config.json", "text_tokenizer.json", *WEIGHTS[:2]}
        assert {path.name for path in tmp_path.iterdir()} == files
        assert DALLE.from_pretrained(tmp_path).scorer is None

    def test_a_path_that_cannot_be_written_or_an_external_scorer_is_refused(self, dalle, tmp_path):
        (tmp_path / "file").write_text("in the way")
        with pytest.raises(ValueError, match=r"cannot write to .*file"):
            dalle.save_pretrained(tmp_path / "file" / "model")
        dalle.scorer = PretrainedScorer.__new__(PretrainedScorer)
        dalle.scorer.model = torch.nn.Linear(1, 1)
        with pytest.raises(ValueError, match="only a CLIP of this library"):
            dalle.save_pretrained(tmp_path / "model")
        assert not (tmp_path / "model").exists()


class TestOpening:
    @pytest.fixture
    def folder(self, chain, tmp_path):
        shutil.copytree(chain / "model", tmp_path / "model")
        return tmp_path / "model"

    @pytest.mark.parametrize("change", ["missing", "truncated"])
    @pytest.mark.parametrize("file", [*WEIGHTS, "config.json", "text_tokenizer.json"])
    def test_a_damaged_file_is_named(self, folder, file, change):
        content = (folder / file).read_bytes()
        (folder / file).unlink()
        if change == "truncated":
            (folder / file).write_bytes(content[:50])
        with pytest.raises(ValueError, match=f"{file}|no model directory"):
            DALLE.from_pretrained(folder)

    @pytest.mark.parametrize("file", WEIGHTS)
    def test_other_weights_than_those_saved_are_refused(self, folder, file):
        write_tensors(folder / file, {name: t + 1 for name, t in read_tensors(folder / file).items()})
        with pytest.raises(ValueError, match="weights have hash"):
            DALLE.from_pretrained(folder)

    @pytest.mark.parametrize(
        ("kind", "sizes", "words"),
        [
            ("dvae", {"widths": [10**7] * 4}, "lacks 2 tensors"),
            ("dvae", {"vocab_size": 10**12}, r"is \(8, 16, 1, 1\), the model's is \(8, 1000000000000"),
            ("clip", {"text_vocab": 2**63}, "text_vocab: expected a whole number below"),
            ("transformer", {"depth": 1000}, "too few for 1000 layers"),
        ],
    )
    def test_sizes_that_the_weights_have_not_allocate_nothing(self, folder, kind, sizes, words):
        config = read_json(folder / "config.json")
        config["parts"][kind]["model_config"] |= sizes
        write_json(folder / "config.json", config)
        with pytest.raises(ValueError, match=words):
            load_model(folder, kind)

    def test_a_path_without_a_model_is_named(self, tmp_path):
        for path in (tmp_path, tmp_path / "none"):
            with pytest.raises(ValueError, match="no model directory"):
                DALLE.from_pretrained(path)

    def test_another_text_tokenizer_in_the_directory_is_refused(self, folder):
        another_text_tokenizer().save(folder / "text_tokenizer.json")
        with pytest.raises(ValueError, match="do not belong together"):
            DALLE.from_pretrained(folder)


class TestJoining:
    def test_runs_and_parts_of_a_model_directory_are_the_same_model(self, chain, parts, model):
        assert DALLE.from_parts(**parts).hash == model.hash
        for kind, part in parts.items():
            found = load_model(chain / "model", kind)
            assert found.hash == part.hash == weights_hash(found.model)
            assert found.inputs["text_hash"] == parts["transformer"].inputs["text_hash"]
            assert DALLE.from_parts(**parts | {kind: found}).hash == model.hash
        assert isinstance(model.dvae, ImageTokenizer)
        assert isinstance(model.scorer, Scorer)

    def test_another_dvae_is_refused(self, parts):
        changed = load_model(parts["dvae"].source, "dvae")
        with torch.no_grad():
            changed.model.encoder.blocks.input.b += 1
        with pytest.raises(ValueError, match=r"tokens of dVAE .* do not belong together"):
            DALLE.from_parts(changed, parts["transformer"], None)

    def test_another_text_tokenizer_is_refused(self, parts, model):
        assert DALLE.from_parts(parts["dvae"], parts["transformer"], None, model.text).scorer is None
        with pytest.raises(ValueError, match="text tokenizer"):
            DALLE.from_parts(parts["dvae"], parts["transformer"], None, another_text_tokenizer())
        clip = replace(parts["clip"], inputs={"text_hash": "other"})
        with pytest.raises(ValueError, match="text tokenizer"):
            DALLE.from_parts(parts["dvae"], parts["transformer"], clip)

    def test_vocabularies_that_do_not_fit_are_refused(self, model):
        other = Mock(vocab_size=17)
        with pytest.raises(ValueError, match="17 codes"):
            DALLE(other, model.transformer, model.text)
        other.vocab_size = 401
        with pytest.raises(ValueError, match="do not belong together"):
            DALLE(model.dvae, model.transformer, other)


def test_the_public_names_are_there_and_listed_for_a_wrong_one():
    for name in package.__all__:
        assert getattr(package, name).__name__ == name
    assert set(package.__all__) <= set(dir(package))
    with pytest.raises(AttributeError, match=r"'DALE'.*DALLE"):
        package.DALE  # noqa: B018


FRESH = """
import sys
sys.modules["youtokentome"] = None  # importing it raises
import dalle
print("torch" in sys.modules, "numpy" in sys.modules)
model = dalle.DALLE.from_pretrained(sys.argv[1])
generation = model.generate(sys.argv[2], n=1, best_of=1, progress=False)
print(generation.image_tokens.tolist()[0])
print("open_clip" in sys.modules, "matplotlib" in sys.modules)
"""


def test_importing_loads_no_torch_and_sampling_no_youtokentome_or_open_clip(dalle, prompt, python, tmp_path):
    dalle.scorer = None
    dalle.save_pretrained(tmp_path / "model")
    done = python(["-c", FRESH, tmp_path / "model", prompt], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    at_import, tokens, at_end = done.stdout.splitlines()
    assert (at_import, at_end) == ("False False", "False False")
    assert json.loads(tokens) == generate(dalle, prompt).image_tokens.tolist()[0]
