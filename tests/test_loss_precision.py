"""What enters the softmax of a loss is fp32 under autocast, and was not rounded to 16 bits before."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dalle.dvae.metrics import dvae_scores
from dalle.precision import cosines, full_precision, tf32
from dalle.transformer import losses
from dalle.transformer.losses import cross_entropies, fp32_product, log_likelihood
from dalle.unet import UNet, UNetConfig
from tests.helpers import distributed_work as cases

UNET = UNetConfig(
    image_size=8, width=32, channel_mult=(1,), blocks=1, attention=(), head_width=32, text="none"
)
SOFTMAX = {"_log_softmax", "logsumexp", "_softmax"}


class SoftmaxInputs(TorchDispatchMode):
    """Collects what enters a softmax."""

    def __init__(self):
        super().__init__()
        self.found = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.overloadpacket.__name__ in SOFTMAX:
            self.found.setdefault(op.overloadpacket.__name__, []).append(args[0].detach().clone())
        return op(*args, **(kwargs or {}))


def loss_of(name):
    case = cases.PLAIN[name]
    return lambda: case.objective(case.model(), case.batch(0), 0).total


LOSSES = {name: loss_of(name) for name in ("transformer", "dvae", "clip")} | {
    "log likelihood": lambda: log_likelihood(cases.transformer()(), cases.token_batch(0)),
    "dvae scores": lambda: dvae_scores(cases.dvae(), cases.pixel_batch(0), 0.5),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_loss_or_metric_rounds_its_logits(name, dtype, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(torch.nn.init, "zeros_", torch.nn.init.normal_)  # logits of 0 show nothing
    with torch.autocast("cpu", dtype=dtype), SoftmaxInputs() as inputs:
        LOSSES[name]()
    if "dvae" not in name:
        inputs.found.pop("_softmax", None)  # of attention
    found = [logits for each in inputs.found.values() for logits in each]
    assert found
    for logits in found:
        assert logits.dtype == torch.float32
        finite = logits[logits.isfinite()]
        assert (finite.to(dtype).float() != finite).float().mean() > 0.5


def test_cosines_of_a_clip_are_exact_and_its_vectors_have_length_one_under_autocast():
    pixels, packed, _ = cases.pair_batch(0)
    model = cases.PLAIN["clip"].model()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        images, texts = model.encode_image(pixels), model.encode_text(packed)
        found = cosines(images, texts)
    for vectors in (images, texts):
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(vectors)))
    assert torch.equal(found, images @ texts.T)


def test_tf32_is_switched_where_a_program_has_used_the_newer_names():
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    matmul.fp32_precision = "tf32"
    try:
        with pytest.raises(RuntimeError, match="mix"):
            _ = matmul.allow_tf32
        with tf32(False):
            assert (matmul.fp32_precision, conv.fp32_precision) == ("ieee", "ieee")
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = "ieee"


@pytest.mark.parametrize("precision", ["medium", "high", "highest"])
def test_tf32_leaves_the_precision_that_a_program_has_set(precision):
    matmul = torch.backends.mkldnn.matmul
    before = torch.get_float32_matmul_precision(), matmul.fp32_precision
    torch.set_float32_matmul_precision(precision)
    try:
        expected = precision, matmul.fp32_precision
        for products in (False, True):
            with tf32(products):
                assert torch.get_float32_matmul_precision() == ("high" if products else "highest")
                assert matmul.fp32_precision == "ieee"
            assert (torch.get_float32_matmul_precision(), matmul.fp32_precision) == expected
    finally:
        torch.set_float32_matmul_precision(before[0])
        matmul.fp32_precision = before[1]


def test_tf32_is_off_for_convolutions_and_follows_the_policy_for_products():
    def switches():
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    before, seen = switches(), {}
    for products in (True, False):
        with tf32(products):
            assert switches() == (products, False)
            with full_precision(torch.device("cpu")):
                assert switches() == (False, False)
            assert switches() == (products, False)
            model, unet = cases.dvae(), UNet(UNET)
            for owner, name in ((model, "encoder"), (model, "decoder"), (unet, "time_embed"), (unet, "out")):
                part = getattr(owner, name)
                part.register_forward_hook(lambda *_, name=name: seen.setdefault(name, []).append(switches()))
            model.decode(model.encode(cases.pixel_batch(0)))
            unet(torch.zeros(1, 3, 8, 8), torch.zeros(1))
    assert seen == {name: [(False, False)] * 2 for name in ("encoder", "decoder", "time_embed", "out")}
    assert switches() == before


def both(chunk: int | None) -> list[torch.Tensor]:
    """Losses and gradients of the transformer's head in bf16."""
    torch.manual_seed(0)
    model = cases.transformer()()
    torch.nn.init.normal_(model.to_logits.weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        text, image = cross_entropies(model, cases.token_batch(0), chunk)
    (text + 3 * image).backward()
    return [text, image, model.to_logits.weight.grad, model.final_norm.weight.grad]


def test_in_bf16_logits_are_made_once_and_chunks_change_neither_losses_nor_gradients(monkeypatch):
    torch.testing.assert_close(both(20), both(None), rtol=1e-4, atol=1e-5)
    calls = []
    monkeypatch.setattr(losses, "fp32_product", lambda a, b: calls.append(a.dtype) or fp32_product(a, b))
    both(None)
    assert calls == 6 * [torch.bfloat16]  # logits and two gradients, of text and of image


def test_in_bf16_operands_are_rounded_and_nothing_else(monkeypatch):
    found = both(None)

    def plain(model, states, targets, chunk, positions=None, z_weight=0.0):
        offset, half = model.layout.image_offset, lambda x: x + (x.bfloat16().float() - x).detach()
        rows = slice(offset, None) if positions is None else slice(offset)
        with torch.autocast("cpu", enabled=False):
            logits = half(states) @ half(model.to_logits.weight[rows]).T
        logits = logits if positions is None else model.hide_pads(logits, positions)
        return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")

    monkeypatch.setattr(losses, "chunked_nats", plain)
    expected = both(None)
    torch.testing.assert_close(found[:2], expected[:2])
    torch.testing.assert_close(found[2:], expected[2:], rtol=2e-2, atol=2e-3)
