"""Train a small CLIP on the same pairs, to rank pictures (paper section 2.6).

python scripts/train_clip.py --config configs/clip/shapes.yaml
"""

from dalle.commands.train_clip import CLIPRun, train_clip
from dalle.config import parse, tell_errors

if __name__ == "__main__":
    with tell_errors():
        train_clip(parse(CLIPRun, description=__doc__))
