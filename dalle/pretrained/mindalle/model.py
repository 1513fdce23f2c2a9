"""minDALL-E 1.3B (Kakao Brain): 1.3B.tar.gz, or the folder that it unpacks to.

    config.yaml                        heads, and the kind of GELU
    tokenizer/bpe-16k-vocab.json       text ids, [PAD] among them; with bpe-16k-merges.txt a CharBPETokenizer
    stage1_last.ckpt                   the image tokenizer, a VQGAN (dalle/pretrained/vqgan.py)
    stage2_last.ckpt                   the transformer

What config.yaml omits is as in the published model. The transformer reads 64 text ids and 256 image tokens,
each of which sees all before it. There is no start: the state of the last text id predicts the first image
token, and no state predicts the first text id. Every pad is [PAD].
"""

from math import isqrt
from pathlib import Path
from reprlib import repr as shown
from typing import Any

from torch import Tensor, nn

from dalle.config import configuration, read_yaml
from dalle.io.files import read_json
from dalle.io.text import parse_json
from dalle.nn.blocks import FP32LayerNorm
from dalle.pretrained.external_transformer import ExternalConfig, ExternalLayout, ExternalTransformer
from dalle.pretrained.family import CheckpointFormat, DetectedCheckpoint, Shapes, count_matches, hparam
from dalle.text.external.huggingface import HuggingFaceTokenizer, import_tokenizers


@configuration(kw_only=True)
class MinDalleConfig(ExternalConfig):
    """Shape of the transformer; the defaults are the published model's. `text_vocab` counts [PAD]."""

    width: int = 1536
    heads: int = 24
    text_len: int = 64
    grid: tuple[int, int] = (16, 16)
    text_vocab: int = 16384
    image_vocab: int = 16384
    qkv_matrices: int = 3
    depth: int = 42  # layers
    pad: int = 0  # the id of [PAD]

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kind of mask of each layer."""
        return ("causal",) * self.depth

    @property
    def layout(self) -> ExternalLayout:
        sizes = self.text_len, self.grid, self.text_vocab, self.image_vocab
        return ExternalLayout(*sizes, start=None, pad=self.pad)


class MinDalle(ExternalTransformer):
    """`to_logits` is the output matrix of image tokens, `to_text_logits` that of text."""

    def __init__(self, config: MinDalleConfig):
        super().__init__(config)
        layout, width = self.layout, config.width
        self.text_position = nn.Embedding(layout.text_len, width)
        self.image_position = nn.Embedding(layout.num_image_tokens, width)
        self.final = FP32LayerNorm(width)
        self.to_text_logits = nn.Linear(width, layout.text_vocab, bias=False)
        self.to_logits = nn.Linear(width, layout.image_vocab, bias=False)

    def embed_image(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.image_embedding(tokens) + self.image_position(positions)

    def text_logits(self, hidden: Tensor, positions: Tensor | None = None) -> Tensor:
        return self.fp32_logits(hidden, self.to_text_logits)

    def image_logits(self, hidden: Tensor) -> Tensor:
        return self.fp32_logits(hidden, self.to_logits)


CONFIG, STAGE1, STAGE2 = "config.yaml", "stage1_last.ckpt", "stage2_last.ckpt"
VOCABULARY, MERGES = "tokenizer/bpe-16k-vocab.json", "tokenizer/bpe-16k-merges.txt"
FILES = (CONFIG, VOCABULARY, MERGES, STAGE1, STAGE2)
UNKNOWN, PAD = "[UNK]", "[PAD]"

RENAMES = {
    r"^blocks\.": "layers.",
    r"\.ln1\.": ".attention.norm.",
    r"\.ln2\.": ".mlp.norm.",
    r"\.attn\.query\.": ".attention.f.qkv.0.",
    r"\.attn\.key\.": ".attention.f.qkv.1.",
    r"\.attn\.value\.": ".attention.f.qkv.2.",
    r"\.attn\.proj\.": ".attention.f.out.",
    r"\.mlp\.0\.": ".mlp.f.expand.",
    r"\.mlp\.2\.": ".mlp.f.project.",
    r"^tok_emb_txt\.": "text_embedding.",
    r"^tok_emb_img\.": "image_embedding.",
    r"^pos_emb_txt\.": "text_position.",
    r"^pos_emb_img\.": "image_position.",
    r"^ln_f\.": "final.",
    r"^head_txt\.": "to_text_logits.",
    r"^head_img\.": "to_logits.",
}


def is_folder(path: Path) -> bool:
    """Whether a folder is the unpacked archive."""
    return (path / STAGE2).is_file()


def read_hparams(folder: Path) -> dict[str, Any]:
    """The hyper-parameters of the transformer in config.yaml; ValueError if of another model."""
    if not (folder / CONFIG).is_file():
        raise ValueError(f"no {CONFIG} in {folder}, which has heads and biases")
    config = read_yaml(folder / CONFIG)
    stage2 = config.get("stage2", {}) if isinstance(config, dict) else None
    hparams = stage2.get("hparams", {}) if isinstance(stage2, dict) else None
    if not isinstance(hparams, dict):
        raise ValueError(f"{CONFIG} has no mapping of the name stage2")
    if (kind := stage2.get("type", "transformer1d")) != "transformer1d":
        raise ValueError(f"{CONFIG} has a model of type {shown(kind):.40}; only transformer1d reads captions")
    return hparams


def infer_config(shapes: Shapes, found: DetectedCheckpoint) -> MinDalleConfig:
    """Sizes from the shapes, heads, biases and GELU from config.yaml of the folder."""
    folder = found.path.parent
    hparams = read_hparams(folder)
    pad = read_vocabulary(folder / VOCABULARY)[PAD]
    text_vocab, width = shapes["text_embedding.weight"]
    if not 0 <= pad < text_vocab:
        raise ValueError(f"{VOCABULARY} numbers {PAD} {pad}, the tensors are of {text_vocab} text ids")
    attention_bias = hparam(hparams, "attn_bias", True)
    return MinDalleConfig(
        width=width,
        depth=count_matches(shapes, "layers.*.attention.norm.weight"),
        heads=hparam(hparams, "n_heads", 24 if width == MinDalleConfig.width else None),
        text_len=shapes["text_position.weight"][0],
        grid=(isqrt(shapes["image_position.weight"][0]),) * 2,
        text_vocab=text_vocab,
        image_vocab=shapes["image_embedding.weight"][0],
        pad=pad,
        qkv_bias=attention_bias,
        out_bias=attention_bias,
        mlp_bias=hparam(hparams, "mlp_bias", True),
        gelu="sigmoid" if hparam(hparams, "gelu_use_approx", False) else "exact",
    )


def read_vocabulary(path: Path) -> dict[str, int]:
    """Tokens and their ids; ValueError for another file, or one without [UNK] and [PAD]."""
    if not path.is_file():
        raise ValueError(f"no {VOCABULARY} in {path.parents[1]}; keep all its files together")
    vocabulary = read_json(path)
    if any(type(token) is not int for token in vocabulary.values()):
        raise ValueError(f"{path} is no vocabulary: expected tokens and their numbers")
    if missing := [token for token in (UNKNOWN, PAD) if token not in vocabulary]:
        raise ValueError(f"{path} lacks {missing[0]}, which minDALL-E's has")
    return vocabulary


def load_tokenizer(folder: Path) -> HuggingFaceTokenizer:
    """Its text tokenizer, `tokenizers.CharBPETokenizer` with lowercase; ValueError for other files."""
    tokenizers, files = import_tokenizers(), (str(folder / VOCABULARY), str(folder / MERGES))
    read_vocabulary(folder / VOCABULARY)
    try:
        theirs = tokenizers.CharBPETokenizer.from_file(*files, unk_token=UNKNOWN, lowercase=True)
    except Exception as error:  # tokenizers raises no narrower class
        raise ValueError(f"{folder / MERGES} cannot be read: {error}") from None
    theirs.add_special_tokens([UNKNOWN, PAD])
    return HuggingFaceTokenizer(parse_json(theirs.to_str(), str(folder)))


FAMILY = CheckpointFormat(
    name="minDALL-E",
    kind="transformer",
    license="CC-BY-NC-SA 4.0 for the transformer (no commercial use); not stated for its image tokenizer",
    key_patterns=(
        "tok_emb_txt.weight",
        "tok_emb_img.weight",
        "head_img.weight",
        "blocks.*.attn.query.weight",
    ),
    infer_config=infer_config,
    build=MinDalle,
    renames=lambda names: RENAMES,
    ignored=("blocks.*.attn.mask",),
)
