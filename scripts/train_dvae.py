"""Train the dVAE on images (paper section 2.1): stage one.

python scripts/train_dvae.py                                        the shapes preset
python scripts/train_dvae.py --config configs/dvae/small.yaml --data.path my/images
"""

from dalle.commands.train_dvae import TrainDVAEArgs, train_dvae
from dalle.config import parse, tell_errors
from dalle.runs.args import CONFIGS

if __name__ == "__main__":
    with tell_errors():
        train_dvae(parse(TrainDVAEArgs, preset=CONFIGS / "dvae" / "shapes.yaml", description=__doc__))
