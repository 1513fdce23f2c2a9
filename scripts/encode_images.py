"""Turn images into tokens with a trained dVAE (paper section 2.2), once, before stage two.

python scripts/encode_images.py --config configs/dvae/shapes.yaml
python scripts/encode_images.py --config configs/dvae/small.yaml --data.path my/images --dvae runs/dvae
torchrun --nproc-per-node 8 scripts/encode_images.py ...            eight processes share the work; so does
python scripts/encode_images.py ... --encode.part 0 --encode.parts 8     each of eight such commands
"""

from dalle.commands.encode_images import EncodeImagesArgs, encode_images
from dalle.commands.train_dvae import TrainDVAEArgs
from dalle.config import parse, tell_errors

if __name__ == "__main__":
    with tell_errors():
        encode_images(parse(EncodeImagesArgs, schema=TrainDVAEArgs, description=__doc__))
