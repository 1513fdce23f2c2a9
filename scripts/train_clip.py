"""Train a small CLIP on the same pairs, to rank images (paper section 2.6).

python scripts/train_clip.py --config configs/clip/shapes.yaml
"""

from dalle.commands.train_clip import TrainCLIPArgs, train_clip
from dalle.config import parse, tell_errors

if __name__ == "__main__":
    with tell_errors():
        train_clip(parse(TrainCLIPArgs, description=__doc__))
