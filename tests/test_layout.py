"""The joint sequence of text and image tokens (section 2.2, Figure 10; dalle/layout.py)."""

import pytest
import torch

from dalle.layout import TokenLayout

# text ids 0..9, pads 10..15, image ids 16..22, then start-of-text and start-of-image
TOY = TokenLayout(text_len=6, grid=(2, 3), text_vocab=10, image_vocab=7)
CAPTION = [3, 1, 4]
TEXT = torch.tensor([[3, 1, 4, 13, 14, 15]])
IMAGE = torch.tensor([[0, 6, 2, 2, 5, 1]])
IDS = torch.tensor([[3, 1, 4, 13, 14, 15, 16, 22, 18, 18, 21, 17]])


# Lengths and offsets.


def test_lengths_and_offsets_at_paper_size():
    layout = TokenLayout()
    assert (layout.text_len, layout.num_image_tokens, layout.seq_len) == (256, 1024, 1280)
    assert (layout.rows, layout.columns) == layout.grid == (32, 32)
    assert layout.max_caption_len == 255
    assert layout.image_offset == 16384 + 256
    assert layout.vocab == 16384 + 256 + 8192
    assert layout.embedding_size == layout.vocab + 2


def test_lengths_and_offsets_of_an_oblong_grid():
    assert (TOY.image_offset, TOY.vocab, TOY.embedding_size) == (16, 23, 25)
    assert (TOY.start_of_text, TOY.start_of_image) == (23, 24)
    assert (TOY.rows, TOY.columns, TOY.num_image_tokens, TOY.seq_len) == (2, 3, 6, 12)
    assert TokenLayout(6, 3, 10, 7) == TokenLayout(6, (3, 3), 10, 7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grid": (2, 0)}, r"grid must .* got \(2, 0\)"),
        ({"grid": (2, 3, 4)}, r"got \(2, 3, 4\)"),
        ({"text_len": 1}, "text_len .* got 1"),
        ({"text_vocab": 0}, "got 0 and 8192"),
        ({"image_vocab": 0}, "got 16384 and 0"),
    ],
)
def test_an_invalid_layout_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        TokenLayout(**arguments)


# Captions.


def test_captions_are_padded_with_the_pad_of_each_position():
    expected = [[3, 1, 4, 13, 14, 15], [10, 11, 12, 13, 14, 15], [9, 9, 9, 9, 9, 15]]
    assert TOY.pad_text([CAPTION, [], [9] * 5]).tolist() == expected


def test_a_caption_that_is_too_long_is_refused_or_cut_on_request():
    with pytest.raises(ValueError, match=r"caption 1 has 6 tokens, .* 5"):
        TOY.pad_text([CAPTION, [1] * 6])
    assert TOY.pad_text([[1, 2, 3, 4, 5, 6, 7]], truncate=True).tolist() == [[1, 2, 3, 4, 5, 15]]


@pytest.mark.parametrize("value", [10, -1])
def test_a_text_id_outside_the_vocabulary_is_named(value):
    with pytest.raises(ValueError, match=rf"\[0, 10\), got {value} at row 0, position 2"):
        TOY.pad_text([[0, 9, value]])


# Packing.


def test_pack_appends_the_image_in_the_joint_vocabulary():
    assert torch.equal(TOY.pack(TEXT, IMAGE), IDS)


@pytest.mark.parametrize("given", range(7))
def test_unpack_undoes_pack_however_much_of_the_image_there_is(given):
    text, image = TOY.unpack(TOY.pack(TEXT, IMAGE[:, :given]))
    assert torch.equal(text, TEXT)
    assert torch.equal(image, IMAGE[:, :given])


@pytest.mark.parametrize(
    ("text", "image", "message"),
    [
        (TEXT, torch.zeros(1, 9, dtype=torch.int64), r"at most 6 \(2 x 3\) image tokens, got 6 and 9"),
        (TEXT[:, :5], IMAGE, r"\(6\) text tokens .* got 5 and 6"),
        (TEXT + 1, IMAGE, r"text_tokens .*\[0, 16\), got 16 at row 0, position 5"),
        (TEXT, IMAGE + 1, r"image_tokens .*\[0, 7\), got 7 at row 0, position 1"),
        (TEXT, IMAGE - 1, "got -1 at row 0, position 0"),
        (TEXT, IMAGE.int(), "image_tokens must be int64"),
    ],
)
def test_invalid_tokens_are_refused(text, image, message):
    with pytest.raises(ValueError, match=message):
        TOY.pack(text, image)


# What each position reads.


def test_inputs_are_shifted_by_one_and_each_modality_begins_with_its_start():
    ids = IDS.clone()
    assert TOY.shift(ids).tolist() == [[23, 3, 1, 4, 13, 14, 24, 16, 22, 18, 18, 21]]
    assert torch.equal(ids, IDS)


@pytest.mark.parametrize("n", range(12))
def test_a_prefix_is_shifted_as_it_is_in_the_whole(n):
    assert torch.equal(TOY.shift(IDS[:, :n]), TOY.shift(IDS)[:, : n + 1])


# Which targets count.


def test_the_caption_its_first_pad_and_the_whole_image_count():
    text = TOY.pad_text([CAPTION, [], [1] * 4, [1] * 5])
    mask = TOY.loss_mask(TOY.pack(text, IMAGE.repeat(4, 1)))
    assert mask[:, :6].sum(dim=1).tolist() == [4, 1, 5, 6]
    assert (mask[:, :6] == mask[:, :6].cummin(dim=1).values).all()
    assert mask[:, 6:].all()
