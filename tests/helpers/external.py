"""What every foreign transformer must do, whoever it is of (dalle/pretrained/external_transformer.py)."""

import torch
from torch import Tensor

from dalle.pretrained.external_transformer import ExternalTransformer
from dalle.sampling import candidate_noise
from dalle.transformer.generate import cast_linear_weights, generate, inference_autocast, quantize_int8


def check_drawing(model: ExternalTransformer, text: Tensor, image: Tensor, read: int) -> None:
    """Candidates differ, and a step may be told its slot by a number or by a tensor.

    Args:
        text: of two captions, as `pad_text` gives them.
        image: tokens of two images, more than `read` + 2.
        read: how many of them are read at once; two more are read one by one.
    """
    noise = torch.stack(
        [candidate_noise(0, str(i), range(3), model.layout.num_image_tokens) for i in range(2)]
    )
    assert len(generate(model, text, noise, guidance=1.5).flatten(0, 1).unique(dim=0)) == 6
    ids = model.layout.shift(model.layout.pack(text, image[:, :read]))
    states = []
    for as_tensor in (False, True):
        caches = model.init_kv_caches(2, 1)
        model.prefill(ids, caches)
        slots = [torch.tensor([slot]) if as_tensor else slot for slot in (read + 1, read + 2)]
        states.append([model.decode_step(image[:, read + i], slot, caches) for i, slot in enumerate(slots)])
    for one, other in zip(*states, strict=True):
        torch.testing.assert_close(one, other)


def check_rounded(model: ExternalTransformer, text: Tensor, image: Tensor) -> None:
    """In bf16 and with matrices in 8 bits it draws, and its states are near those that it has.

    Args:
        text, image: as `check_drawing`.
    """
    noise = torch.rand(2, 2, model.layout.num_image_tokens, dtype=torch.float64)
    ids = model.layout.pack(text, image)
    with torch.inference_mode():
        states = model.hidden(ids)
    for rounded in (cast_linear_weights(model, torch.bfloat16), quantize_int8(model)):
        assert generate(rounded, text, noise).shape == noise.shape
        with torch.inference_mode(), inference_autocast(rounded):
            away = rounded.hidden(ids) - states
        assert 0 < away.norm() < 0.1 * states.norm()
