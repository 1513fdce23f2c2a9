"""GPU data sheets: memory, peak FLOP/s and links."""

from dataclasses import dataclass

from dalle.train.config import PEAK_FLOPS


@dataclass(frozen=True)
class GPU:
    """One GPU of a node; peaks are dense, without sparsity."""

    memory: float
    """GiB."""
    fp32: float
    """FLOP/s of fp32 matrix products, without TF32."""
    half: float
    """FLOP/s of bf16 or fp16 matrix products with fp32 sums."""
    inside: float
    """Bytes/s that it sends to the others of its node."""
    between: float
    """Bytes/s that it sends to other nodes: its share of the node's network."""
    per_node: int = 8
    """GPUs of a node."""
    bf16: bool = True
    """Whether it multiplies bf16 in hardware."""


GPUS: dict[str, GPU] = {
    # data sheets of the GPU and of its DGX: DGX-1 has 4 x 100 Gb/s, A100 8 x 200, H100, H200 and B200 8 x 400
    "v100-16gb": GPU(16, 15.7e12, PEAK_FLOPS["V100"], 150e9, 6.25e9, bf16=False),
    "v100-32gb": GPU(32, 15.7e12, PEAK_FLOPS["V100"], 150e9, 6.25e9, bf16=False),
    "a100-40gb": GPU(40, 19.5e12, PEAK_FLOPS["A100"], 300e9, 25e9),
    "a100-80gb": GPU(80, 19.5e12, PEAK_FLOPS["A100"], 300e9, 25e9),
    "h100": GPU(80, 67e12, PEAK_FLOPS["H100"], 450e9, 50e9),
    "h200": GPU(141, 67e12, PEAK_FLOPS["H200"], 450e9, 50e9),
    "b200": GPU(180, 80e12, PEAK_FLOPS["B200"], 900e9, 50e9),
    # PCIe cards: 16 lanes of the 4th generation (T4: 3rd), one 25 Gb/s network for each
    "t4": GPU(16, 8.1e12, PEAK_FLOPS["T4"], 16e9, 3.125e9, bf16=False),
    "l4": GPU(24, 30.3e12, PEAK_FLOPS["L4"], 32e9, 3.125e9),
    "rtx-4090": GPU(24, 82.6e12, PEAK_FLOPS["RTX 4090"], 32e9, 3.125e9),
}
