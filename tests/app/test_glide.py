"""Web page of a GLIDE, over HTTP: previews, results, inpainting."""

from io import BytesIO
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from dalle.commands.app import AppArgs, launch
from tests.app.test_ui import call, error, results, upload
from tests.helpers.glide import PROMPT, glide

pytestmark = [pytest.mark.filterwarnings("ignore::Warning:gradio"), pytest.mark.slow]
FAST = {"caption": PROMPT, "seed": 3, "n": 2, "best_of": 2, "steps": 3, "guidance": 2.0, "sampler": "ddim"}
NO_IMAGE = {"image": None, "mask": None}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("served"), glide(upsampler=False)
    blocks = launch(AppArgs(port=0, device="cpu", precision="fp32"), model, str(folder))
    yield SimpleNamespace(url=blocks.local_url, blocks=blocks, folder=folder, model=model)
    blocks.close(verbose=False)


def png(pixels: np.ndarray) -> bytes:
    file = BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def test_previews_and_the_images_of_generate(server) -> None:
    messages = call(server, "generate", list((FAST | NO_IMAGE).values()))
    summary, labels, files = results(messages)
    assert (summary.partition(",")[0], labels) == ("2 images", ["candidate 0", "candidate 1"])
    options = {name: value for name, value in FAST.items() if name != "caption"}
    expected = server.model.generate(PROMPT, progress=False, **options)
    found = Image.open(BytesIO(files["00.png"])).convert("RGB")
    assert found.tobytes() == expected.images[0].tobytes()
    assert any("step 1 of 3" in str(message) for message in messages)


def test_inpainting(server) -> None:
    pixels = np.random.default_rng(0).integers(256, size=(8, 8, 3), dtype=np.uint8)
    mask = np.zeros((8, 8), np.uint8)
    mask[2:5, 3:8] = 255
    uploaded = {"image": upload(server, png(pixels)), "mask": upload(server, png(mask))}
    _, _, files = results(call(server, "generate", list((FAST | uploaded).values())))
    found = np.asarray(Image.open(BytesIO(files["01.png"])).convert("RGB"))
    assert np.array_equal(found[mask == 0], pixels[mask == 0])
    assert not np.array_equal(found, pixels)
    alone = FAST | NO_IMAGE | {"image": uploaded["image"]}
    assert "both an image and its mask" in error(call(server, "generate", list(alone.values())))
