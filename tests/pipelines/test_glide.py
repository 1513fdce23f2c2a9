"""GLIDE: prompt to ranked images by diffusion, on small random models (dalle/pipelines/glide.py)."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import dalle as package
from dalle.clip import CLIP, CLIPConfig, CLIPScorer
from dalle.diffusion.guidance import classifier_free, clip_x0
from dalle.diffusion.samplers import ancestral, ddim, dpm_solver
from dalle.hub.registry import LoadedModel, load_model
from dalle.io.images import to_pil, to_tensor
from dalle.pipelines.dalle import DALLE
from dalle.pipelines.generation import Generation, merge_generations
from dalle.pipelines.glide import GLIDE
from dalle.pipelines.open import open_pipeline
from dalle.sampling import candidate_normals
from dalle.unet.text import pack_text
from tests.helpers.glide import PROMPT, glide, text_tokenizer, unet

FAST = {"steps": 3, "upsample_steps": "2", "batch_size": 2, "progress": False}


class Brightness:
    """A scorer, also of noised images: how bright they are."""

    def score(self, pixels: torch.Tensor, caption: str) -> torch.Tensor:
        return pixels.mean((1, 2, 3))

    def log_prob(self, caption: str):
        return lambda x, times: 300 * x.mean((1, 2, 3))


def small_clip() -> CLIPScorer:
    sizes = {"embed_width": 8, "head_dim": 8, "image_size": 16, "patch_size": 8, "vision_width": 16}
    sizes |= {"vision_layers": 1, "text_len": 16, "text_vocab": 300, "text_width": 16, "text_layers": 1}
    return CLIPScorer(CLIP(CLIPConfig(**sizes)).eval(), text_tokenizer())


def generate(model: GLIDE, n: int = 2, **options) -> Generation:
    return model.generate(options.pop("prompt", PROMPT), n, **FAST | options)


def images(found: list[Image.Image]) -> list[bytes]:
    return [image.tobytes() for image in found]


def difference(one: Image.Image, other: Image.Image) -> np.ndarray:
    return np.abs(np.asarray(one).astype(int) - np.asarray(other))


@pytest.fixture(scope="module")
def model() -> GLIDE:
    return glide()


@pytest.fixture(scope="module")
def base() -> GLIDE:
    return glide(upsampler=False)


@pytest.fixture
def image() -> Image.Image:
    return to_pil(torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(3)))[0]


@pytest.fixture
def mask() -> Image.Image:
    mask = Image.new("L", (16, 16))
    mask.paste(255, (4, 6, 11, 16))
    return mask


def by_hand(model: GLIDE, sampler: str, guidance: float, prediction: str = "noise") -> bytes:
    """Candidate 1 of the base, alone, by two calls of the network in a step."""
    unet, config = model.base, model.base.config
    schedule = unet.schedule(f"{'dpm' if sampler == 'dpm' else ''}4")
    texts = pack_text([model.text.encode(PROMPT), []], config.text_len, config.text_vocab)
    denoise = [unet.denoiser(schedule, text=ids[None]) for ids in texts]
    denoise = clip_x0(classifier_free(*denoise, guidance), schedule)

    def noise(time: int) -> torch.Tensor:
        return candidate_normals(7, PROMPT, range(1, 2), time, (3, 8, 8))

    if sampler == "ancestral":
        steps = ancestral(denoise, noise(60), schedule, lambda t: noise(int(schedule.times[t])))
    else:
        steps = {"ddim": ddim, "dpm": dpm_solver}[sampler](denoise, noise(60), schedule)
    *_, last = steps
    return np.asarray(to_pil((last.x + 1) / 2)[0])


@pytest.mark.parametrize("sampler", ["ancestral", "ddim", "dpm"])
@pytest.mark.parametrize(("prediction", "guidance"), [("noise", 2.5), ("x0", 1.0), ("v", 2.5)])
def test_a_candidate_is_that_of_the_sampler(sampler: str, prediction: str, guidance: float) -> None:
    """Every sampler takes every prediction."""
    diffusion = package.unet.DiffusionConfig(steps=60, prediction=prediction)
    model = GLIDE(unet(8, diffusion=diffusion), text=text_tokenizer())
    found = generate(model, steps=4, sampler=sampler, guidance=guidance, seed=7).images[1]
    assert np.abs(np.asarray(found).astype(int) - by_hand(model, sampler, guidance)).max() <= 1
    if (prediction, sampler) != ("noise", "ddim") and (prediction, sampler) != ("noise", "dpm"):
        assert 20 < np.asarray(found).std() < 120  # neither flat nor clipped


class TestGenerate:
    def test_n_images_of_the_models_size_best_first(self, model):
        model = GLIDE(model.base, model.upsampler, text=model.text, scorer=Brightness())
        best = generate(model, 2, best_of=5)
        assert [image.size for image in best.images] == [(16, 16)] * 2
        assert best.scores == sorted(best.scores, reverse=True)
        assert best.scores == [pytest.approx(to_tensor([image]).mean().item()) for image in best.images]
        every = generate(model, 5)
        assert best.candidates == every.candidates[:2]
        assert images(best.images) == images(every.images[:2])
        assert (best.num_generated, best.image_tokens.shape) == (5, (2, 0))

    def test_a_candidate_depends_on_seed_prompt_and_its_index_alone(self, model):
        whole = images(generate(model, 3).images)
        assert images(generate(model, 1).images) == whole[:1]
        assert images(generate(model, 3, guidance=2.0).images) != whole
        assert images(generate(model, 3, seed=1).images)[0] != whole[0]
        assert images(generate(model, 3, prompt="a blue circle").images)[0] != whole[0]
        several = model.generate([PROMPT, "a blue circle"], 3, prompts_per_batch=1, **FAST)
        assert images(several[0].images) == whole
        shards = [generate(model, 3, best_of=3, shard=(rank, 2)) for rank in (0, 1)]
        assert images(merge_generations(shards, 3).images) == whole
        assert len(set(whole)) == 3

    def test_a_stream_ends_with_the_images_of_generate(self, model):
        streamed = list(model.stream(PROMPT, 2, **{k: v for k, v in FAST.items() if k != "progress"}))
        assert [one[0].size[0] for one in streamed] == [8, 8, 8, 16, 16]
        assert images(streamed[-1]) == images(generate(model).images)
        with pytest.raises(ValueError, match="n must be at most 2"):
            next(model.stream(PROMPT, 3, steps=3, upsample_steps="2", batch_size=2))

    def test_the_callback_has_a_preview_of_each_step(self, model):
        seen = []
        generate(model, 3, callback=lambda step: seen.append((step.done, step.ranked, step.seen)))
        assert [one[0] for one in seen if not one[1]] == [(i, 10) for i in range(1, 11)]
        assert [one[2] for one in seen if one[1]] == [2, 3]

    def test_an_interruption_returns_what_is_ranked(self, model):
        def interrupt(step) -> None:
            if step.seen == 2 and not step.ranked:
                raise KeyboardInterrupt

        with pytest.warns(UserWarning, match="2 of 4 candidates"):
            found = generate(model, 4, callback=interrupt)
        assert found.interrupted
        assert images(found.images) == images(generate(model).images)

    def test_clip_guidance_raises_the_scorers_log_probability(self, base):
        base = GLIDE(base.base, text=base.text, scorer=Brightness())
        for sampler in ("ancestral", "ddim", "dpm"):
            options = {"sampler": sampler, "guidance": 1.0, "steps": 10, "best_of": 2}
            scores = [sum(generate(base, **options, clip_guidance=s).scores) for s in (None, 1.0, 3.0)]
            assert scores[0] < scores[1] < scores[2]

    @pytest.mark.slow
    def test_a_small_number_of_steps_starts_from_the_same_noise(self, base):
        found = [generate(base, 1, sampler="ddim", guidance=1.0, steps=s).images[0] for s in (30, 60)]
        other = generate(base, 1, sampler="ddim", guidance=1.0, steps=60, seed=1).images[0]
        assert difference(*found).mean() < difference(found[1], other).mean() / 3


class TestUpsample:
    def test_an_image_of_the_base_model_is_upsampled_as_by_generate(self, model, base):
        small, whole = generate(base).images, generate(model).images
        found = [model.upsample(image, PROMPT, 2, **FAST).images[i] for i, image in enumerate(small)]
        assert images(found) == images(whole)

    def test_the_upsampler_reads_eight_bits_and_no_guidance(self, model):
        low = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        found = np.asarray(model.upsample(to_pil(low)[0], PROMPT, upsample_temperature=0.5, **FAST).images[0])
        upsampler, config = model.upsampler, model.upsampler.config
        schedule = upsampler.schedule("2")
        text = pack_text([model.text.encode(PROMPT)], config.text_len, config.text_vocab)
        low = (low * 255).round() / 255 * 2 - 1
        denoise = clip_x0(upsampler.denoiser(schedule, text=text, low_resolution=low), schedule)
        x = 0.5 * candidate_normals(0, PROMPT, range(1), 2**16 + 1 + 60, (3, 16, 16))
        *_, last = ddim(denoise, x, schedule)
        assert np.abs(found.astype(int) - np.asarray(to_pil((last.x + 1) / 2)[0])).max() <= 1

    def test_without_an_upsampler(self, base, image):
        with pytest.raises(ValueError, match="has no upsampler"):
            base.upsample(image, PROMPT)

    def test_the_settings_of_the_base_do_not_matter(self, image):
        model = glide(caption_dropout=0.0)
        assert model.upsample(image, PROMPT, upsample_steps="2", progress=False).images  # 100 steps of 60


class TestInpaint:
    @pytest.mark.parametrize("inpainting", [False, True])
    @pytest.mark.parametrize("options", [{}, {"clip_guidance": 2.0, "sampler": "ddim"}])
    def test_known_pixels_are_kept_exactly(self, inpainting, options, image, mask):
        model = glide(inpainting, scorer=Brightness())
        found = model.inpaint(PROMPT, image, mask, n=2, **FAST | options)
        inside = np.asarray(mask) > 127
        for one in found.images:
            assert not difference(one, image)[~inside].any()
            assert difference(one, image)[inside].mean() > 10
        other = model.inpaint(PROMPT, image, inside, n=2, **FAST | options)
        assert images(other.images) == images(found.images)

    @pytest.mark.slow
    def test_what_is_generated_follows_from_what_is_known(self, image, mask):
        inverted, inside = Image.fromarray(255 - np.asarray(image)), np.asarray(mask) > 127
        for inpainting in (False, True):
            model = glide(inpainting)
            found = [model.inpaint(PROMPT, one, mask, n=1, **FAST).images[0] for one in (image, inverted)]
            assert difference(*found)[inside].mean() > 1

    def test_a_small_pixel_is_known_if_all_that_it_is_made_of_is(self, image, mask):
        from dalle.pipelines.inpainting import known_image

        known = known_image(glide(), image, mask)
        inside = torch.from_numpy(np.asarray(mask) > 0).float()[None, None]
        assert torch.equal(known.at(16).mask, 1 - inside)
        assert torch.equal(known.at(8).mask, 1 - F.max_pool2d(inside, 2))
        pixels = (known.at(16).pixels + 1) / 2
        assert np.array_equal(np.asarray(to_pil(pixels)[0]), np.asarray(image))

    def test_masks_that_cannot_be(self, model, image, mask):
        with pytest.raises(ValueError, match="mask is 8 x 4, the image 16 x 16"):
            model.inpaint(PROMPT, image, mask.resize((8, 4)))
        with pytest.raises(ValueError, match="keeps the whole image"):
            model.inpaint(PROMPT, image, Image.new("L", (16, 16)))
        with pytest.raises(ValueError, match="no image at absent"):
            model.inpaint(PROMPT, image, "absent.png")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 61}, "steps must be 2 to 60, those of the base model, got 61"),
        ({"steps": 1}, "steps must be 2 to 60"),
        ({"upsample_steps": "61"}, "spacing must be like"),
        ({"sampler": "euler"}, "sampler must be"),
        ({"guidance": float("nan")}, "guidance"),
        ({"guidance": 1e9}, "guidance must be at most"),
        ({"clip_guidance": 1.0}, "clip_guidance needs a scorer trained on noised images"),
        ({"upsample_temperature": 0.0}, "upsample_temperature must be in"),
        ({"batch_size": 0}, "batch_size must be positive"),
        ({"best_of": 1}, "best_of must be n"),
        ({"prompt": " "}, "prompt is empty"),
        ({"prompt": "circle " * 40}, "at most 16 fit"),
    ],
)
def test_settings_that_cannot_be(model: GLIDE, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(model, **options)


def test_guidance_needs_caption_dropout() -> None:
    model = glide(upsampler=False, caption_dropout=0.0)
    assert generate(model, guidance=1.0).images
    with pytest.raises(ValueError, match="guidance needs a model trained with caption dropout"):
        generate(model)


def test_models_that_do_not_belong_together() -> None:
    for parts, message in (
        ({"base": unet(8, low_resolution=True)}, "no base of GLIDE"),
        ({"base": unet(8, classes=3)}, "no base of GLIDE"),
        ({"base": unet(8, text="none")}, "read text ids"),
        ({"base": unet(8, text_vocab=250)}, "do not belong together"),
        ({"base": unet(8), "upsampler": unet(16)}, "no upsampler of GLIDE"),
        ({"base": unet(8), "upsampler": unet(8, low_resolution=True)}, "the base has 8 pixels on a side"),
    ):
        with pytest.raises(ValueError, match=message):
            GLIDE(**parts, text=text_tokenizer())


class TestDirectory:
    @pytest.fixture(scope="class")
    def whole(self) -> GLIDE:
        return glide(scorer=small_clip())

    @pytest.fixture(scope="class")
    def folder(self, whole, tmp_path_factory):
        folder = tmp_path_factory.mktemp("glide")
        whole.save_pretrained(folder)
        return folder

    def test_an_opened_model_gives_the_same_images_and_scores(self, whole, folder, tmp_path):
        expected = generate(whole, 1, best_of=2)
        for again in (GLIDE.from_pretrained(folder), open_pipeline(folder)):
            assert again.hash == whole.hash
            found = generate(again, 1, best_of=2)
            assert images(found.images) == images(expected.images)
            assert found.scores == expected.scores
        again.upsampler = again.scorer = None
        again.save_pretrained(tmp_path / "base")
        alone = GLIDE.from_pretrained(tmp_path / "base")
        assert (alone.upsampler, alone.scorer, alone.image_size) == (None, None, 8)
        assert "GLIDE.from_pretrained" in (tmp_path / "base" / "README.md").read_text()

    def test_the_wrong_class_is_named(self, folder, chain):
        with pytest.raises(ValueError, match=r"holds a GLIDE; open it with GLIDE\.from_pretrained"):
            DALLE.from_pretrained(folder)
        with pytest.raises(ValueError, match=r"holds a DALLE; open it with DALLE\.from_pretrained"):
            GLIDE.from_pretrained(chain / "model")
        assert isinstance(open_pipeline(chain / "model"), DALLE)

    def test_parts_of_other_trainings_are_refused(self, folder):
        base, clip = (load_model(folder, kind) for kind in ("base", "clip"))
        other = LoadedModel("clip", clip.model, inputs={"text_hash": "other"}, source="runs/clip")
        with pytest.raises(ValueError, match="runs/clip was trained with a text tokenizer other than"):
            GLIDE.from_parts(base, None, other)
        with pytest.raises(ValueError, match="does not name the text"):
            GLIDE.from_parts(LoadedModel("base", base.model))

    def test_precision(self, whole):
        rounded = whole.to_precision("bf16")
        assert (rounded.hash, rounded.precision, whole.precision) == (whole.hash, "bf16", "fp32")
        dtypes = {p.dtype for p in rounded.base.parameters()}
        assert dtypes == {torch.float32, torch.bfloat16}
        assert rounded.to_precision("bf16") is rounded
        close = [generate(one, 1, best_of=1).images[0] for one in (whole, rounded)]
        assert 0 < difference(*close).mean() < 8
        with pytest.raises(ValueError, match="rounded"):
            rounded.save_pretrained("nowhere")
        with pytest.raises(ValueError, match="int8 is for transformers"):
            whole.to_precision("fp32", int8=True)
