"""DALLE: caption to ranked images, on a tiny model that took two steps (dalle/pipelines/dalle.py)."""

import json
import shutil
from dataclasses import replace
from io import BytesIO

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import dalle as package
from dalle.clip import CLIPScorer, PretrainedScorer
from dalle.hub.model_directory import save_weights, weights_hash
from dalle.hub.registry import LoadedModel, load_model
from dalle.io.images import to_pil, to_tensor
from dalle.pipelines import best_of_n
from dalle.pipelines.best_of_n import (
    CandidateBatch,
    auto_batch_size,
    auto_decode_batch_size,
    candidate_batches,
)
from dalle.pipelines.config import SamplingConfig
from dalle.pipelines.dalle import DALLE
from dalle.pipelines.generation import Generation, merge_generations
from dalle.text import TextTokenizerConfig, train_text_tokenizer
from dalle.types import ImageTokenizer, Scorer

QUIET = {"progress": False}


def images(images: list[Image.Image]) -> list[bytes]:
    return [image.tobytes() for image in images]


def tokens_of(generation: Generation) -> dict[int, list[int]]:
    """Image tokens of each candidate."""
    return dict(zip(generation.candidates, generation.image_tokens.tolist(), strict=True))


@pytest.fixture(scope="module")
def model(chain) -> DALLE:
    """Shared by the tests that only read it."""
    return DALLE.from_pretrained(chain / "model")


@pytest.fixture(scope="module")
def parts(chain) -> dict[str, LoadedModel]:
    return {kind: load_model(chain / kind, kind) for kind in ("dvae", "transformer", "clip")}


class TestGenerate:
    def test_it_gives_n_images_of_the_models_size(self, model, prompt):
        generation = model.generate(prompt, n=3, best_of=5, **QUIET)
        assert [image.size for image in generation.images] == [(32, 32)] * 3
        assert generation.image_tokens.shape == (3, 16)
        assert generation.image_tokens.dtype == torch.int64
        assert (generation.prompt, generation.seed) == (prompt, 0)

    def test_the_best_come_first_by_the_scorer(self, model, prompt):
        generation = model.generate(prompt, n=6, best_of=6, **QUIET)
        assert generation.scores == sorted(generation.scores, reverse=True)
        assert sorted(generation.candidates) == list(range(6))
        scores = model.scorer.score(model.decode(generation.image_tokens), prompt)
        assert scores.tolist() == pytest.approx(generation.scores, abs=1e-5)

    def test_n_of_best_of_are_the_first_of_all(self, model, prompt):
        some, every = (model.generate(prompt, n=n, best_of=6, **QUIET) for n in (2, 6))
        assert some.candidates == every.candidates[:2]
        assert images(some.images) == images(every.images[:2])

    def test_the_same_seed_gives_the_same_images(self, model, prompt):
        one, other = (model.generate(prompt, n=2, best_of=2, seed=7, **QUIET) for _ in range(2))
        assert images(one.images) == images(other.images)

    def test_another_seed_or_caption_gives_others(self, model, prompt):
        found = [
            model.generate(text, n=1, best_of=1, seed=seed, **QUIET).image_tokens.tolist()
            for text, seed in ((prompt, 0), (prompt, 1), ("a small red cross in the middle", 0))
        ]
        assert found[0] != found[1]
        assert found[0] != found[2]

    @pytest.mark.parametrize(
        "settings",
        [
            {"best_of": 2},
            {"decode_batch_size": 1},
            {"decode_batch_size": 4},
            {"best_of": 7, "decode_batch_size": 3},
        ],
    )
    def test_a_candidate_depends_on_seed_caption_and_number_alone(self, model, prompt, settings):
        count = settings.get("best_of", 6)
        six = tokens_of(model.generate(prompt, n=6, best_of=6, **QUIET))
        found = tokens_of(model.generate(prompt, n=count, **{"best_of": 6} | settings, **QUIET))
        assert {i: found[i] for i in range(min(6, count))} == {i: six[i] for i in range(min(6, count))}

    def test_global_random_numbers_neither_matter_nor_change(self, model, prompt):
        torch.manual_seed(1)
        before = torch.get_rng_state()
        one = model.generate(prompt, n=1, best_of=1, **QUIET)
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(2)
        assert torch.equal(model.generate(prompt, n=1, best_of=1, **QUIET).image_tokens, one.image_tokens)

    def test_temperature_0_and_top_k_1_take_the_likeliest_tokens(self, model, prompt):
        for settings in ({"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-6}):
            rows = model.generate(prompt, n=3, best_of=3, **settings, **QUIET).image_tokens
            assert (rows == rows[0]).all()

    def test_guidance_changes_what_is_drawn_and_1_is_the_plain_model(self, dalle, prompt):
        with torch.no_grad():
            dalle.transformer.to_logits.weight.normal_(generator=torch.Generator().manual_seed(0))
        plain, one, guided = (
            dalle.generate(prompt, n=1, best_of=1, guidance=g, **QUIET).image_tokens
            for g in (None, 1.0, 100.0)
        )
        assert torch.equal(plain, one)
        assert not torch.equal(plain, guided)

    def test_the_images_are_the_decoded_tokens(self, model, prompt):
        generation = model.generate(prompt, n=2, best_of=2, **QUIET)
        assert images(generation.images) == images(to_pil(model.decode(generation.image_tokens)))

    def test_without_a_scorer_n_images_come_unranked_and_it_says_so(self, model, prompt):
        plain = DALLE(model.dvae, model.transformer, model.text)
        with pytest.warns(UserWarning, match="no scorer: generating 2 images, unranked"):
            generation = plain.generate(prompt, n=2, best_of=8, **QUIET)
        assert (generation.scores, generation.candidates) == (None, [0, 1])

    def test_any_scorer_ranks(self, model, prompt):
        class Darkness:
            def score(self, pixels, caption):
                return -pixels.mean(dim=(1, 2, 3))

        generation = DALLE(model.dvae, model.transformer, model.text, Darkness()).generate(
            prompt, n=4, best_of=4, **QUIET
        )
        means = model.decode(generation.image_tokens).mean(dim=(1, 2, 3)).tolist()
        assert means == sorted(means)


class TestMistakes:
    @pytest.mark.parametrize(
        ("settings", "said"),
        [
            ({"n": 0}, "n must be at least 1, got 0"),
            ({"n": -1}, "n must be at least 1, got -1"),
            ({"n": 4, "best_of": 3}, "best_of must be at least n, got best_of=3, n=4"),
            ({"temperature": -0.5}, "temperature must be 0 .* or at least 1e-30, got -0.5"),
            ({"temperature": float("nan")}, "temperature must be"),
            ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
            ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
            ({"top_k": 0}, "top_k must be at least 1, got 0"),
            ({"decode_batch_size": 0}, "decode_batch_size must be at least 1, got 0"),
            ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
            ({"guidance": float("inf")}, "guidance must be finite"),
        ],
    )
    def test_settings_that_mean_nothing_are_refused_before_anything_is_drawn(
        self, model, prompt, settings, said, monkeypatch
    ):
        monkeypatch.setattr(best_of_n, "generate_tokens", None)
        with pytest.raises(ValueError, match=said):
            model.generate(prompt, **settings)

    @pytest.mark.parametrize("text", ["", "   ", "\n"])
    def test_an_empty_prompt_is_refused(self, model, text):
        for call in (model.generate, lambda prompt: next(model.stream(prompt))):
            with pytest.raises(ValueError, match="the prompt is empty"):
                call(text)

    def test_a_prompt_too_long_is_refused_unless_it_may_be_cut(self, model, prompt):
        long = " and ".join([prompt] * 4)
        with pytest.raises(ValueError, match=r"has \d+ tokens, the layout has room for 19"):
            model.generate(long, n=1, best_of=1, **QUIET)
        assert len(model.generate(long, n=1, best_of=1, truncate=True, **QUIET).images) == 1

    def test_a_caption_in_any_script_is_read_and_letters_that_the_vocabulary_lacks_are_named(self, model):
        with pytest.warns(UserWarning, match="the vocabulary lacks letters of '円'") as found:
            assert len(model.generate("ein kreis, 円", n=1, best_of=1, truncate=True, **QUIET).images) == 1
        assert found[0].filename == __file__

    def test_a_caption_of_known_letters_gives_no_warning(self, model, prompt, recwarn):
        model.generate(prompt, n=1, best_of=1, **QUIET)
        assert not [one for one in recwarn if "vocabulary" in str(one.message)]


class TestComplete:
    @pytest.fixture
    def image(self) -> Image.Image:
        noise = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(3))
        return to_pil(noise)[0]

    @pytest.mark.parametrize("rows", [1, 2, 3])
    def test_the_top_rows_keep_the_images_tokens(self, model, prompt, image, rows):
        generation = model.complete(prompt, image, rows=rows, n=3, best_of=3, **QUIET)
        kept = model.dvae.encode(to_tensor([image]))[0, : rows * 4]
        assert (generation.image_tokens[:, : rows * 4] == kept).all()
        assert not (generation.image_tokens[0] == generation.image_tokens[1]).all()

    def test_a_file_of_any_size_will_do(self, model, prompt, image, tmp_path):
        image.resize((50, 37)).save(tmp_path / "a.png")
        generation = model.complete(prompt, tmp_path / "a.png", rows=2, n=1, best_of=1, **QUIET)
        assert generation.images[0].size == (32, 32)

    @pytest.mark.parametrize("rows", [0, 4, -1, 100])
    def test_rows_out_of_range_are_refused(self, model, prompt, image, rows):
        with pytest.raises(ValueError, match=f"rows must be 1 to 3, got {rows}"):
            model.complete(prompt, image, rows=rows)

    @pytest.mark.parametrize("box", [(2, 1), (0, 2), (3, 3)])
    def test_all_outside_a_box_keeps_the_images_tokens(self, model, prompt, image, box):
        generation = model.complete(prompt, image, box=box, n=3, best_of=3, **QUIET)
        kept = model.dvae.encode(to_tensor([image])).view(4, 4)
        inside = torch.zeros(4, 4, dtype=torch.bool)
        inside[box[0] :, box[1] :] = True
        drawn = generation.image_tokens.view(3, 4, 4)
        assert (drawn[:, ~inside] == kept[~inside]).all()
        assert len(drawn[:, inside].unique(dim=0)) > 1

    def test_rows_are_a_box_as_wide_as_the_image(self, model, prompt, image):
        rows, box = (
            model.complete(prompt, image, n=2, best_of=2, **keep, **QUIET)
            for keep in ({"rows": 1}, {"box": (1, 0)})
        )
        assert torch.equal(rows.image_tokens, box.image_tokens)

    @pytest.mark.parametrize("box", [(0, 0), (4, 0), (0, 4), (-1, 2)])
    def test_a_box_beyond_the_grid_is_refused(self, model, prompt, image, box):
        with pytest.raises(ValueError, match=r"box must be \(top, left\) within 4 x 4 and not \(0, 0\), got"):
            model.complete(prompt, image, box=box)

    @pytest.mark.parametrize("keep", [{}, {"rows": 1, "box": (1, 1)}])
    def test_rows_or_a_box_are_asked_for(self, model, prompt, image, keep):
        with pytest.raises(ValueError, match="give either rows"):
            model.complete(prompt, image, **keep)

    def test_a_missing_image_is_named(self, model, prompt, tmp_path):
        with pytest.raises(ValueError, match=r"no image at .*none\.png"):
            model.complete(prompt, tmp_path / "none.png", rows=1)

    def test_the_rest_is_what_the_model_draws_there(self, model, prompt, image):
        """The random numbers of the rows below are those of `generate`, so a candidate's own rows give it
        back."""
        own = model.generate(prompt, n=1, best_of=1, **QUIET)
        again = model.complete(prompt, own.image_tokens[:1], rows=2, n=1, best_of=1, **QUIET)
        assert torch.equal(again.image_tokens, own.image_tokens)


class TestSeveralCaptions:
    CAPTIONS = ("a red cross above a blue circle", "a small red cross in the middle", "a blue circle")

    @pytest.mark.parametrize(
        "settings", [{"best_of": 2}, {"best_of": 2, "batch_size": 4}, {"best_of": 3, "batch_size": 2}]
    )
    def test_each_has_the_images_that_it_has_alone(self, model, settings):
        together = model.generate(self.CAPTIONS, n=2, **settings, **QUIET)
        assert [one.prompt for one in together] == list(self.CAPTIONS)
        for caption, one in zip(self.CAPTIONS, together, strict=True):
            alone = model.generate(caption, n=2, **settings, **QUIET)
            assert (alone.candidates, images(alone.images)) == (one.candidates, images(one.images))

    @pytest.mark.parametrize("best_of", [2, 20])
    def test_their_order_does_not_matter(self, model, best_of):
        one, other = (
            model.generate(c, n=2, best_of=best_of, **QUIET) for c in (self.CAPTIONS, self.CAPTIONS[::-1])
        )
        for a, b in zip(one, other[::-1], strict=True):
            assert torch.equal(a.image_tokens, b.image_tokens)

    def test_an_empty_one_among_them_is_refused(self, model):
        with pytest.raises(ValueError, match="the prompt is empty"):
            model.generate(["a circle", " "], n=1, best_of=1)

    def test_none_give_none(self, model):
        assert model.generate([], n=1, best_of=1, **QUIET) == []


class TestBlocks:
    """Bits: every block has the same rows, whatever is wanted of it."""

    def test_a_caption_alone_has_whole_blocks(self):
        assert list(candidate_batches(1, 5, 4)) == [
            CandidateBatch([0], range(4), 4),
            CandidateBatch([0], range(4, 8), 1),
        ]

    def test_captions_with_few_candidates_are_drawn_together_in_one_shape(self):
        assert list(candidate_batches(3, 2, 4)) == [
            CandidateBatch([0, 1], range(2), 2),
            CandidateBatch([2, 2], range(2), 2),
        ]
        assert list(candidate_batches(2, 3, 4)) == [
            CandidateBatch([0], range(4), 3),
            CandidateBatch([1], range(4), 3),
        ]

    def test_told_how_many_captions_every_block_has_so_many(self):
        assert list(candidate_batches(3, 3, 4, 2)) == [
            CandidateBatch([0, 1], range(2), 2),
            CandidateBatch([0, 1], range(2, 4), 1),
            CandidateBatch([2, 2], range(2), 2),
            CandidateBatch([2, 2], range(2, 4), 1),
        ]
        assert list(candidate_batches(1, 1, 4, 2)) == [CandidateBatch([0, 0], range(2), 1)]
        assert list(candidate_batches(2, 1, 4, 1)) == [
            CandidateBatch([0], range(4), 1),
            CandidateBatch([1], range(4), 1),
        ]
        with pytest.raises(ValueError, match="prompts_per_batch must be at most the batch size of 4, got 5"):
            list(candidate_batches(1, 1, 4, 5))

    @pytest.mark.parametrize("together", [1, 2])
    def test_told_so_the_shapes_and_bits_are_one_for_any_number_of_captions(
        self, dalle, together, monkeypatch
    ):
        with torch.no_grad():
            dalle.transformer.to_logits.weight.normal_(generator=torch.Generator().manual_seed(0))
        shapes, plain = set(), best_of_n.generate_tokens

        def watched(model, text, noise, *rest, **options):
            shapes.add(tuple(noise.shape))
            return plain(model, text, noise, *rest, **options)

        monkeypatch.setattr(best_of_n, "generate_tokens", watched)
        captions, shared = TestSeveralCaptions.CAPTIONS, {}
        for some, best_of in ((captions, 1), (captions[::-1], 5), (captions[1:2], 3), (captions[:2], 2)):
            drawn = dalle.generate(
                some, n=best_of, best_of=best_of, batch_size=4, prompts_per_batch=together, **QUIET
            )
            for one in drawn:
                for candidate, row in tokens_of(one).items():
                    assert shared.setdefault((one.prompt, candidate), row) == row
        assert shapes == {(together, 4 // together, 16)}
        assert len(shared) == 3 * 5

    @pytest.mark.parametrize(
        "settings", [{}, {"guidance": 2.0}, {"temperature": 0.7, "top_k": 9, "top_p": 0.9}]
    )
    def test_logits_and_tokens_are_the_same_bits_for_any_number_order_and_chunk(
        self, dalle, prompt, settings, monkeypatch
    ):
        with torch.no_grad():
            dalle.transformer.to_logits.weight.normal_(generator=torch.Generator().manual_seed(0))
        seen, plain = {}, best_of_n.generate_tokens

        def watched(model, text, noise, *rest, **options):
            seen.setdefault(float(noise[0, 0, 0]), []).append(noise.shape)
            return plain(model, text, noise, *rest, **options)

        monkeypatch.setattr(best_of_n, "generate_tokens", watched)
        ways = [
            {"best_of": 9},
            {"best_of": 1},
            {"best_of": 5, "decode_batch_size": 1},
            {"best_of": 9, "decode_batch_size": 3},
            {"best_of": 4},
        ]
        options = {"batch_size": 4, **settings, **QUIET}
        found = [
            tokens_of(dalle.generate(prompt, n=min(4, way["best_of"]), **way, **options)) for way in ways
        ]
        shared = {}
        for tokens in found:
            for candidate, row in tokens.items():
                assert shared.setdefault(candidate, row) == row
        assert {shape for shapes in seen.values() for shape in shapes} == {(1, 4, 16)}

    def test_memory_does_not_grow_with_the_number_of_candidates(self, model, prompt, monkeypatch):
        """No more images than a chunk are decoded at once, and no more than n and a chunk are kept."""
        sizes, plain = [], model.dvae.decode
        monkeypatch.setattr(
            model.dvae, "decode", lambda tokens, grid: sizes.append(len(tokens)) or plain(tokens, grid)
        )
        kept, add = [], best_of_n.TopN.add
        monkeypatch.setattr(
            best_of_n.TopN, "add", lambda self, *new: add(self, *new) or kept.append(len(self.best))
        )
        model.generate(prompt, n=3, best_of=40, batch_size=8, decode_batch_size=4, **QUIET)
        assert sizes == [4] * 10
        assert max(kept) == 3

    def test_rows_and_images_at_once_follow_the_free_memory(self, model, monkeypatch):
        monkeypatch.setattr(best_of_n, "free_memory", lambda device: None)
        assert (auto_batch_size(model.transformer), auto_decode_batch_size(256**2, torch.device("cpu"))) == (
            16,
            64,
        )
        each = model.transformer.kv_bytes_per_sample()
        monkeypatch.setattr(best_of_n, "free_memory", lambda device: 6 * each)
        assert (auto_batch_size(model.transformer), auto_batch_size(model.transformer, 1.5)) == (4, 2)
        monkeypatch.setattr(best_of_n, "free_memory", lambda device: 2**34)
        assert auto_decode_batch_size(256**2, torch.device("cpu")) == 16
        monkeypatch.setattr(best_of_n, "free_memory", lambda device: 1)
        assert auto_batch_size(model.transformer) == auto_decode_batch_size(256**2, torch.device("cpu")) == 1

    def test_free_memory_is_said_or_unknown(self):
        free = best_of_n.free_memory(torch.device("cpu"))
        assert free is None or free > 2**20


class TestShares:
    @pytest.mark.parametrize("world", [1, 2, 3, 5])
    def test_the_best_of_the_shares_are_the_best_of_all(self, model, prompt, world):
        options = {"n": 3, "best_of": 10, "batch_size": 4, **QUIET}
        whole = model.generate(prompt, **options)
        parts = [model.generate([prompt], shard=(rank, world), **options) for rank in range(world)]
        assert sum(one.num_generated for part in parts for one in part) == 10
        joined = merge_generations([one for part in parts for one in part], 3)
        assert (joined.candidates, joined.scores, joined.num_generated) == (
            whole.candidates,
            whole.scores,
            10,
        )
        assert torch.equal(joined.image_tokens, whole.image_tokens)
        assert images(joined.images) == images(whole.images)
        assert not joined.interrupted


class TestInterruption:
    @pytest.fixture
    def interrupt(self, monkeypatch):
        """Control-C comes while block number `at` is drawn."""

        def arrange(at: int) -> None:
            plain, calls = best_of_n.generate_tokens, iter(range(100))

            def some(*words, **options):
                if next(calls) == at:
                    raise KeyboardInterrupt
                return plain(*words, **options)

            monkeypatch.setattr(best_of_n, "generate_tokens", some)

        return arrange

    def test_what_is_ranked_is_kept_and_it_says_so(self, model, prompt, interrupt):
        whole = model.generate(prompt, n=2, best_of=8, batch_size=4, **QUIET)
        assert (whole.interrupted, whole.num_generated, whole.best_of) == (False, 8, 8)
        interrupt(2)
        with pytest.warns(UserWarning, match="interrupted: 8 of 100 candidates are ranked"):
            part = model.generate(prompt, n=2, best_of=100, batch_size=4, **QUIET)
        assert (part.interrupted, part.num_generated, part.best_of) == (True, 8, 100)
        assert (part.candidates, images(part.images)) == (whole.candidates, images(whole.images))

    def test_with_nothing_ranked_the_interruption_goes_on(self, model, prompt, interrupt):
        interrupt(0)
        with pytest.raises(KeyboardInterrupt):
            model.generate(prompt, n=1, best_of=1, **QUIET)

    def test_captions_without_a_image_are_left_out(self, model, prompt, interrupt):
        interrupt(1)
        with pytest.warns(UserWarning, match="interrupted"):
            found = model.generate([prompt, "a blue circle"], n=1, best_of=4, batch_size=4, **QUIET)
        assert [one.prompt for one in found] == [prompt]


class TestLogLikelihood:
    def test_it_is_the_sum_of_what_the_model_says_of_each_token(self, model, prompt):
        tokens = torch.randint(16, (3, 16), generator=torch.Generator().manual_seed(0))
        found = model.log_likelihood(prompt, tokens)
        layout = model.transformer.layout
        ids = layout.pack(model.text_tokens([prompt]).expand(3, -1), tokens)
        with torch.no_grad():
            nats = torch.log_softmax(model.transformer(ids), dim=-1).gather(2, ids[:, :, None])[:, :, 0]
        words = len(model.text.encode(prompt)) + 1  # and the first pad, which ends it
        torch.testing.assert_close(found.text, nats[:, :words].sum(dim=1))
        torch.testing.assert_close(found.image, nats[:, layout.text_len :].sum(dim=1))

    def test_a_image_has_that_of_its_tokens(self, model, prompt, tmp_path):
        image = to_pil(torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(3)))[0]
        image.save(tmp_path / "a.png")
        tokens = model.dvae.encode(to_tensor([image]))
        by_tokens, by_image = (
            model.log_likelihood(prompt, tokens),
            model.log_likelihood(prompt, tmp_path / "a.png"),
        )
        assert isinstance(by_image.image, float)
        assert by_image == pytest.approx([float(part) for part in by_tokens])

    def test_tokens_beyond_the_vocabulary_and_empty_captions_are_refused(self, model, prompt):
        with pytest.raises(ValueError, match=r"image tokens must be in \[0, 16\), got 16"):
            model.log_likelihood(prompt, torch.full((1, 16), 16))
        with pytest.raises(ValueError, match=r"expected .* at most 16 .* got"):
            model.log_likelihood(prompt, torch.zeros(1, 17, dtype=torch.int64))
        with pytest.raises(ValueError, match="the prompt is empty"):
            model.log_likelihood("", torch.zeros(1, 16, dtype=torch.int64))


class TestPrecision:
    def test_matrices_in_bf16_draw_and_keep_the_hash(self, chain, model, prompt, tmp_path):
        half = DALLE.from_pretrained(chain / "model", precision="bf16")
        assert half.hash == model.hash
        assert half.transformer.layers[0].mlp.f.expand.weight.dtype == torch.bfloat16
        assert model.transformer.layers[0].mlp.f.expand.weight.dtype == torch.float32
        assert len(half.generate(prompt, n=2, best_of=2, **QUIET).images) == 2
        tokens = torch.zeros(1, 16, dtype=torch.int64)
        plain, rounded = (m.log_likelihood(prompt, tokens).image for m in (model, half))
        torch.testing.assert_close(rounded, plain, rtol=0.01, atol=0)
        with pytest.raises(ValueError, match="the weights were rounded"):
            half.save_pretrained(tmp_path / "model")
        assert not (tmp_path / "model").exists()

    def test_matrices_in_8_bits_draw_and_keep_the_hash(self, chain, model, prompt, tmp_path):
        small = DALLE.from_pretrained(chain / "model", int8=True)
        assert (small.hash, small.device) == (model.hash, model.device)
        assert small.transformer.layers[0].mlp.f.expand.codes.dtype == torch.int8
        assert len(small.generate(prompt, n=2, best_of=2, **QUIET).images) == 2
        tokens = torch.zeros(1, 16, dtype=torch.int64)
        plain, rounded = (m.log_likelihood(prompt, tokens).image for m in (model, small))
        torch.testing.assert_close(rounded, plain, rtol=0.01, atol=0)
        with pytest.raises(ValueError, match="the weights were rounded"):
            small.save_pretrained(tmp_path / "model")

    def test_fp32_is_the_model_itself(self, model):
        assert model.to_precision("fp32") is model


class TestStream:
    def test_it_yields_after_each_row_and_ends_with_the_candidates(self, model, prompt):
        steps = list(model.stream(prompt, n=2, seed=5))
        assert [len(step) for step in steps] == [2] * 4
        plain = DALLE(model.dvae, model.transformer, model.text)
        assert images(steps[-1]) == images(plain.generate(prompt, n=2, best_of=2, seed=5, **QUIET).images)

    def test_what_is_not_drawn_yet_is_grey(self, model, prompt):
        for row, (image,) in enumerate(model.stream(prompt), start=1):
            assert image.size == (32, 32)
            if row < 4:
                below = image.crop((0, 8 * row, 32, 32))
                assert below.getcolors() == [(below.width * below.height, (128, 128, 128))]

    @pytest.mark.parametrize(
        ("settings", "said"),
        [
            ({"n": 0}, "n must be at least 1"),
            ({"temperature": -1}, "temperature"),
            ({"top_p": 2}, "top_p"),
            ({"n": 5, "batch_size": 4}, "n must be at most the batch size of 4, got 5"),
        ],
    )
    def test_settings_that_mean_nothing_are_refused(self, model, prompt, settings, said):
        with pytest.raises(ValueError, match=said):
            next(model.stream(prompt, **settings))


class TestSteps:
    SAMPLING = SamplingConfig(batch_size=4)

    def test_the_last_state_has_what_generate_returns(self, model, prompt):
        steps = list(model.steps([prompt], 3, 10, 5, self.SAMPLING))
        whole = model.generate(prompt, n=3, best_of=10, seed=5, batch_size=4, **QUIET)
        (last,) = steps[-1].generations
        assert (last.scores, last.candidates) == (whole.scores, whole.candidates)
        assert images(last.images) == images(whole.images)
        assert [step.top[0].seen for step in steps if step.ranked] == [10] * 3  # the list is shared
        assert [step.tokens.shape[2] for step in steps[:17]] == [*range(1, 17), 16]

    def test_a_callback_sees_each_row_of_a_completion_and_each_ranked_batch(self, model, prompt):
        image, seen = Image.new("RGB", (40, 40), "red"), []
        options = {"rows": 2, "n": 2, "best_of": 5, "batch_size": 4, **QUIET}
        whole = model.complete(prompt, image, **options)
        again = model.complete(
            prompt, image, **options, callback=lambda step: seen.append((step.tokens.shape[2], step.ranked))
        )
        assert torch.equal(again.image_tokens, whole.image_tokens)
        assert seen == [(12, False), (16, False), (16, True)] * 2

    def test_each_row_is_the_beginning_of_the_whole_images(self, model, prompt):
        every = tokens_of(model.generate(prompt, n=6, best_of=6, batch_size=4, **QUIET))
        shown = []
        for step in model.steps([prompt], 3, 6, 0, self.SAMPLING):
            if step.whole_rows:
                shown.append((step.batch.candidates, len(step.images)))
                for candidate, tokens in zip(step.batch.candidates, step.tokens[0].tolist(), strict=True):
                    assert tokens == every.get(candidate, tokens)[: len(tokens)]
        assert shown == [(range(4), 3)] * 4 + [(range(4, 8), 2)] * 4

    def test_leaving_the_loop_stops_the_sampling(self, model, prompt, slots_drawn):
        steps = model.steps([prompt], 4, 8, 0, self.SAMPLING)
        for step in steps:
            if step.whole_rows:
                break
        steps.close()
        assert slots_drawn == [1, 2, 3, 4]

    def test_all_is_checked_before_the_first_step(self, model, prompt):
        with pytest.raises(ValueError, match="best_of must be at least n"):
            model.steps([prompt], 4, 2)
        with pytest.raises(ValueError, match="the prompt is empty"):
            model.steps([""], 1, 1)


class TestGeneration:
    def test_a_notebook_shows_a_png(self, model, prompt):
        generation = model.generate(prompt, n=5, best_of=5, **QUIET)
        png = generation._repr_png_()
        assert png.startswith(b"\x89PNG\r\n\x1a\n")
        assert Image.open(BytesIO(png)).size == generation.grid().size

    def test_the_sheet_has_rows_of_at_most_four(self, model, prompt):
        five = model.generate(prompt, n=5, best_of=5, **QUIET)
        wide, tall = five.grid(columns=5).size, five.grid(columns=1).size
        assert wide == tall[::-1]
        assert wide[0] > five.grid().size[0] > tall[0]


class TestSaving:
    def test_a_model_opened_again_draws_the_same(self, dalle, prompt, tmp_path):
        dalle.save_pretrained(tmp_path / "model")
        again = DALLE.from_pretrained(tmp_path / "model")
        assert again.hash == dalle.hash
        one, other = (m.generate(prompt, n=2, best_of=4, **QUIET) for m in (dalle, again))
        assert images(one.images) == images(other.images)
        assert one.scores == other.scores

    def test_the_hash_names_the_weights(self, dalle):
        before = dalle.hash
        with torch.no_grad():
            dalle.dvae.decoder.blocks.input.b[0] += 1
        assert dalle.hash.split("-")[0] != before.split("-")[0]
        assert dalle.hash.split("-")[1] == before.split("-")[1]

    def test_joined_from_runs_it_is_the_same_model(self, parts, model):
        assert DALLE.from_parts(**parts).hash == model.hash

    def test_without_a_scorer_there_is_no_clip_in_the_directory(self, dalle, tmp_path):
        dalle.scorer = None
        dalle.save_pretrained(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "README.md",
            "config.json",
            "dvae.safetensors",
            "text_tokenizer.json",
            "transformer.safetensors",
        ]
        assert DALLE.from_pretrained(tmp_path).scorer is None

    def test_a_scorer_of_elsewhere_is_not_saved_and_nothing_is_written(self, dalle, tmp_path):
        dalle.scorer = PretrainedScorer.__new__(PretrainedScorer)
        dalle.scorer.model = torch.nn.Linear(1, 1)
        with pytest.raises(ValueError, match="only a CLIP of this library can be saved"):
            dalle.save_pretrained(tmp_path / "model")
        assert not (tmp_path / "model").exists()

    def test_a_place_that_cannot_be_written_is_named(self, dalle, tmp_path):
        (tmp_path / "file").write_text("in the way")
        with pytest.raises(ValueError, match=r"cannot write to .*file"):
            dalle.save_pretrained(tmp_path / "file" / "model")

    @pytest.mark.parametrize("kind", ["dvae", "transformer", "clip"])
    def test_a_part_can_be_read_from_a_model_directory(self, chain, parts, kind):
        found = load_model(chain / "model", kind)
        assert found.hash == parts[kind].hash == weights_hash(found.model)
        assert found.inputs["text_hash"] == parts["transformer"].inputs["text_hash"]


class TestOpening:
    @pytest.fixture
    def folder(self, chain, tmp_path):
        shutil.copytree(chain / "model", tmp_path / "model")
        return tmp_path / "model"

    def test_a_directory_of_something_else_is_refused(self, chain, tmp_path):
        for path in (chain / "dvae", tmp_path / "none"):
            with pytest.raises(ValueError, match="is no model directory"):
                DALLE.from_pretrained(path)

    @pytest.mark.parametrize(
        "file", ["dvae.safetensors", "transformer.safetensors", "clip.safetensors", "text_tokenizer.json"]
    )
    def test_a_missing_file_is_named(self, folder, file):
        (folder / file).unlink()
        with pytest.raises(ValueError, match=file):
            DALLE.from_pretrained(folder)

    @pytest.mark.parametrize(
        "file", ["dvae.safetensors", "transformer.safetensors", "config.json", "text_tokenizer.json"]
    )
    def test_a_truncated_file_is_named(self, folder, file):
        (folder / file).write_bytes((folder / file).read_bytes()[:50])
        with pytest.raises(ValueError, match=file):
            DALLE.from_pretrained(folder)

    @pytest.mark.parametrize("part", ["transformer", "clip"])
    def test_other_weights_than_those_saved_are_refused(self, folder, part):
        path = folder / f"{part}.safetensors"
        save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path)
        with pytest.raises(ValueError, match="the weights have hash"):
            DALLE.from_pretrained(folder)

    def test_a_config_without_inputs_is_named(self, folder):
        config = json.loads((folder / "config.json").read_text())
        del config["inputs"]
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"config\.json lacks inputs"):
            DALLE.from_pretrained(folder)

    def test_a_newer_format_is_named(self, folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"format": 99}))
        with pytest.raises(ValueError, match="has format 99, this version reads 1"):
            DALLE.from_pretrained(folder)

    def test_another_dvae_in_the_directory_is_refused(self, folder, parts):
        other = load_model(folder, "dvae").model
        with torch.no_grad():
            other.encoder.blocks.input.b += 1
        save_weights(other, folder / "dvae.safetensors")
        with pytest.raises(ValueError, match="the weights have hash"):
            DALLE.from_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        config["parts"]["dvae"]["hash"] = weights_hash(other)
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="do not belong together"):
            DALLE.from_pretrained(folder)

    def test_another_text_tokenizer_in_the_directory_is_refused(self, folder):
        train_text_tokenizer(["other words"], TextTokenizerConfig(vocab_size=300)).save(
            folder / "text_tokenizer.json"
        )
        with pytest.raises(ValueError, match="do not belong together"):
            DALLE.from_pretrained(folder)


class TestJoining:
    def test_another_dvae_is_refused(self, parts):
        changed = replace(parts["dvae"], model=load_model(parts["dvae"].source, "dvae").model)
        with torch.no_grad():
            changed.model.encoder.blocks.input.b += 1
        with pytest.raises(
            ValueError, match=r"was trained on tokens of dVAE .*: they do not belong together"
        ):
            DALLE.from_parts(changed, parts["transformer"], None)

    def test_another_text_tokenizer_is_refused(self, parts):
        other = train_text_tokenizer(["other words"], TextTokenizerConfig(vocab_size=300))
        with pytest.raises(ValueError, match="was trained with a text tokenizer other than the one given"):
            DALLE.from_parts(parts["dvae"], parts["transformer"], None, other)

    def test_the_same_text_tokenizer_is_taken(self, parts, model):
        assert DALLE.from_parts(parts["dvae"], parts["transformer"], None, model.text).scorer is None

    def test_a_clip_of_another_text_tokenizer_is_refused(self, parts):
        clip = replace(parts["clip"], meta=parts["clip"].meta | {"inputs": {"text_hash": "other"}})
        with pytest.raises(ValueError, match="was trained with a text tokenizer other than"):
            DALLE.from_parts(parts["dvae"], parts["transformer"], clip)

    @pytest.mark.parametrize("kind", ["dvae", "transformer"])
    def test_a_part_from_a_model_directory_joins_too(self, chain, parts, kind, model):
        """`save_pretrained` keeps what the parts were trained with."""
        found = parts | {kind: load_model(chain / "model", kind)}
        assert (
            DALLE.from_parts(found["dvae"], found["transformer"], None).hash == model.hash.rsplit("-", 1)[0]
        )

    def test_codes_that_do_not_fit_are_refused(self, model):
        class Other:
            downsample_factor, vocab_size = 4, 17
            encode = decode = None

        with pytest.raises(ValueError, match="has 17 codes"):
            DALLE(Other(), model.transformer, model.text)

    def test_more_text_ids_than_the_transformer_reads_are_refused(self, model):
        words = [f"{a}{b}" for a in "abcdefghijklmnopqrst" for b in "uvwxyzabcdefghij"]
        text = train_text_tokenizer([" ".join(words)] * 3, TextTokenizerConfig(vocab_size=1000))
        assert text.vocab_size > 400
        with pytest.raises(ValueError, match="they do not belong together"):
            DALLE(model.dvae, model.transformer, text)

    def test_the_parts_keep_their_protocols(self, model):
        assert isinstance(model.dvae, ImageTokenizer)
        assert isinstance(model.scorer, Scorer)
        assert isinstance(model.scorer, CLIPScorer)


# ---------------------------------------------------------------------------------------------
# What importing and sampling need
# ---------------------------------------------------------------------------------------------


def test_the_public_names_are_there():
    for name in package.__all__:
        assert getattr(package, name).__name__ == name
    assert set(package.__all__) <= set(dir(package))


def test_a_wrong_public_name_lists_the_right_ones():
    with pytest.raises(AttributeError, match=r"no attribute 'DALE'; public names: .*DALLE"):
        package.DALE  # noqa: B018


def test_importing_the_package_does_no_work(python, tmp_path):
    code = "import sys, dalle; print([m for m in sys.modules if m.split('.')[0] in ('torch', 'numpy')])"
    assert python(["-c", code], cwd=tmp_path).stdout.strip() == "[]"


SAMPLING = """
import sys, warnings
sys.modules["youtokentome"] = None  # importing it raises
from dalle import DALLE
model = DALLE.from_pretrained(sys.argv[1])
generation = model.generate(sys.argv[2], n=1, best_of=1, progress=False)
print(generation.image_tokens.tolist()[0])
print("open_clip" in sys.modules, "matplotlib" in sys.modules)
"""


def test_sampling_needs_neither_youtokentome_nor_without_a_scorer_open_clip(dalle, prompt, python, tmp_path):
    dalle.scorer = None
    dalle.save_pretrained(tmp_path / "model")
    done = python(["-c", SAMPLING, tmp_path / "model", prompt], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    tokens, imported = done.stdout.splitlines()
    assert imported == "False False"
    assert json.loads(tokens) == dalle.generate(prompt, n=1, best_of=1, **QUIET).image_tokens.tolist()[0]
