"""Train the transformer on a token cache (paper section 2.2): stage two.

python scripts/train_transformer.py                                 the shapes preset, earlier stages made first
python scripts/train_transformer.py --config configs/transformer/small.yaml --tokens runs/tokens
"""

import sys

from dalle.commands.quickstart import make_missing_stages
from dalle.commands.train_transformer import TrainTransformerArgs, train_transformer
from dalle.config import parse, tell_errors
from dalle.runs.args import CONFIGS

if __name__ == "__main__":
    with tell_errors():
        run = parse(TrainTransformerArgs, preset=CONFIGS / "transformer" / "shapes.yaml", description=__doc__)
        if len(sys.argv) == 1:
            make_missing_stages()
        train_transformer(run)
