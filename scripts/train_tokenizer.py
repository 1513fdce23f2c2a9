"""Learn the text vocabulary from captions (paper section 2.2): the first stage.

python scripts/train_tokenizer.py --config configs/transformer/shapes.yaml
python scripts/train_tokenizer.py --data.path my/images --text.vocab-size 4096
"""

from dalle.commands.train_tokenizer import TrainTokenizerArgs, train_tokenizer
from dalle.commands.train_transformer import TrainTransformerArgs
from dalle.config import parse, tell_errors

if __name__ == "__main__":
    with tell_errors():
        train_tokenizer(parse(TrainTokenizerArgs, schema=TrainTransformerArgs, description=__doc__))
