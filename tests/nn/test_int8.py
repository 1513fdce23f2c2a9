"""Weights in 8 bits: rounding, sharing, closeness of the model (dalle/nn/int8.py)."""

import pytest
import torch
from torch import nn

from dalle.nn.int8 import ALIGNMENT, MAX_GEMV_ROWS, Int8Linear, int8_linear, scaled_product
from dalle.transformer import Transformer, TransformerConfig
from dalle.transformer.generate import (
    cast_linear_weights,
    generate,
    generate_tokens,
    inference_autocast,
    quantize_int8,
)
from tests.helpers.device_work import DeviceWork

CONFIG = TransformerConfig(2, 2, 32, 6, (2, 5), 11, 13, conv_kernel=3, init_scale=1.0)


@pytest.fixture
def model() -> Transformer:
    torch.manual_seed(0)
    model = Transformer(CONFIG).requires_grad_(False).eval()
    nn.init.normal_(model.to_logits.weight, std=0.1)
    return model


def matrix_of(linear: Int8Linear) -> torch.Tensor:
    return linear.codes.double() * linear.scale.double()[:, None]


def linear(bias: bool = True, dtype: torch.dtype = torch.float32, inputs: int = 24) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, 40, bias, dtype=dtype).requires_grad_(False)


class TestInt8Linear:
    def test_no_weight_is_further_than_half_a_code(self):
        plain = linear()
        plain.weight[3] *= 100  # a row of its own scale
        rounded = Int8Linear(plain)
        away = (matrix_of(rounded) - plain.weight.double()).abs() / rounded.scale.double()[:, None]
        assert away.max() <= 0.75  # the largest weight of a row may be 127 / 2^9 beyond: the scale is bf16
        inside = plain.weight.abs() <= 127 * rounded.scale.float()[:, None]
        assert away[inside].max() <= 0.5 + 1e-6
        assert rounded.codes.abs().amax(dim=1).min() >= 126
        assert rounded.codes.dtype == torch.int8

    def test_a_row_of_zeros_stays_one(self):
        plain = linear()
        plain.weight[3] = 0
        found = Int8Linear(plain)(torch.randn(5, 24))
        assert torch.equal(found[:, 3], plain.bias[3].expand(5))

    @pytest.mark.parametrize("inputs", [24, 127, ALIGNMENT, 3 * ALIGNMENT])
    @pytest.mark.parametrize("rows", [(1,), (2, 3), (MAX_GEMV_ROWS + 1,)])
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_it_multiplies_by_the_rounded_matrix(self, inputs, rows, bias, dtype):
        plain = linear(bias, dtype, inputs)
        rounded, x = Int8Linear(plain), torch.randn(*rows, inputs, dtype=dtype)
        expected = x.double() @ matrix_of(rounded).T + (plain.bias.double() if bias else 0)
        found = rounded(x)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=0.02, atol=0.02)

    @pytest.mark.parametrize("inputs", [24, ALIGNMENT])
    def test_rows_of_the_matrix_and_strided_inputs(self, inputs):
        layer, x = Int8Linear(linear(bias=False, inputs=inputs)), torch.randn(inputs, 5).T
        torch.testing.assert_close(layer(x), layer(x.contiguous()))
        torch.testing.assert_close(int8_linear(x, layer, slice(7, 19)), int8_linear(x, layer)[:, 7:19])
        assert Int8Linear(linear(dtype=torch.bfloat16)).weight.dtype == torch.bfloat16

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_off_the_cpu_the_output_is_scaled_and_no_copy_exceeds_two_bytes_a_weight(self, dtype):
        layer, x = Int8Linear(linear(dtype=dtype, inputs=256)), torch.randn(2, 3, 256, dtype=dtype)
        expected = x.double() @ matrix_of(layer).T
        found = scaled_product(x, layer.codes, layer.scale)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=0.02, atol=0.02)
        large = scaled_product(torch.full_like(x, 50), layer.codes.fill_(127), layer.scale)
        assert torch.isfinite(large).all()  # 256 times 50 times 127 is beyond fp16
        with DeviceWork() as work:
            scaled_product(x, layer.codes, layer.scale)
        assert 0 < work.largest <= 2 * layer.codes.numel()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_on_cuda_it_multiplies_by_the_rounded_matrix(self, dtype, cuda):
        plain, x = linear(dtype=dtype), torch.randn(2, 3, 24, dtype=dtype)
        rounded = Int8Linear(plain.to(cuda))
        found = rounded(x.to(cuda))
        matrix = rounded.codes.cpu().double() * rounded.scale.cpu().double()[:, None]
        assert (found.device, found.dtype) == (cuda, dtype)
        expected = x.double() @ matrix.T + plain.bias.cpu().double()
        torch.testing.assert_close(found.cpu().double(), expected, rtol=0.02, atol=0.02)
        part = int8_linear(x.to(cuda), rounded, slice(7, 19)).cpu().double()
        torch.testing.assert_close(part, x.double() @ matrix[7:19].T, rtol=0.02, atol=0.02)


class TestModel:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_only_the_matrices_are_rounded_and_all_else_is_shared(self, model, dtype):
        rounded = quantize_int8(cast_linear_weights(model, dtype))
        plain = dict(model.named_modules())
        for name, module in rounded.named_modules():
            assert not isinstance(module, nn.Linear)
            if isinstance(module, Int8Linear):
                assert isinstance(plain[name], nn.Linear)
                assert module.weight.dtype == (torch.float32 if name == "to_logits" else dtype)
        shared = {name for name, p in rounded.named_parameters() if p is model.get_parameter(name)}
        names = ("token_embedding.weight", "row.weight", "final_norm.weight", "layers.0.mlp.norm.bias")
        assert shared.issuperset(names)
        assert ("layers.1.mlp.f.expand.bias" in shared) == (dtype == torch.float32)
        assert rounded.patterns["row"] is model.patterns["row"]
        assert model.layers[0].mlp.f.expand.weight.dtype == torch.float32

    def test_it_is_the_plain_model_with_rounded_matrices(self, model):
        rounded, same = quantize_int8(model), Transformer(CONFIG).requires_grad_(False).eval()
        same.load_state_dict(model.state_dict())
        for name, module in rounded.named_modules():
            if isinstance(module, Int8Linear):
                same.get_submodule(name).weight.copy_(matrix_of(module))
        image = torch.randint(13, (2, 10), generator=torch.Generator().manual_seed(0))
        ids = model.layout.pack(model.layout.pad_text([[1, 2, 3], []]), image)
        torch.testing.assert_close(rounded(ids), same(ids), rtol=0.05, atol=0.05)
        assert (rounded(ids) - model(ids)).abs().nan_to_num().max() < 0.2

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("guidance", [None, 1.5])
    def test_steps_with_caches_take_the_tokens_of_whole_passes(self, model, dtype, guidance):
        rounded = quantize_int8(cast_linear_weights(model, dtype))
        text, noise = model.layout.pad_text([[1, 2], [3]]), torch.rand(2, 3, 10, dtype=torch.float64)
        assert rounded.layers[0].mlp.f.expand.weight.dtype == dtype
        assert rounded.init_kv_caches(1, 1)[0].image.dtype == dtype
        tokens = generate(rounded, text, noise, guidance=guidance, temperature=0)
        with inference_autocast(rounded):
            logits = rounded(model.layout.pack(text, tokens[:, 0]))[:, 6:, -13:]
            empty = model.layout.pad_text([[]]).expand(2, -1)
            other = rounded(model.layout.pack(empty, tokens[:, 0]))[:, 6:, -13:]
        logits = logits if guidance is None else other + guidance * (logits - other)
        missed = logits.amax(dim=2) - logits.gather(2, tokens[:, 0, :, None])[..., 0]
        assert missed.max() < 0.05  # a tie within the rounding of bf16, else the likeliest

    def test_under_autocast_it_stays_as_it_is(self, model):
        rounded = quantize_int8(model)
        text, noise = model.layout.pad_text([[1, 2]]), torch.rand(1, 3, 10, dtype=torch.float64)
        *_, plain = generate_tokens(rounded, text, noise)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            *_, tokens = generate_tokens(rounded, text, noise)
        assert torch.equal(tokens, plain)
        assert cast_linear_weights(rounded, torch.bfloat16) is quantize_int8(rounded) is rounded
