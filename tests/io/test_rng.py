"""Random generators by purpose (dalle/io/rng.py)."""

from dalle.io.rng import generator


def test_purposes_and_keys_have_generators_of_their_own():
    keys = [("scene", 1, 2), ("scene", 2, 1), ("caption", 1, 2), ("crop", 1, 2), ("order", 1, 2)]
    values = [generator(*key).random() for key in keys]
    assert len(set(values)) == len(keys)
    assert [generator(*key).random() for key in keys] == values
