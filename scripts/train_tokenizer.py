"""Learn the text vocabulary from captions (paper section 2.2): the first stage.

python scripts/train_tokenizer.py --config configs/transformer/shapes.yaml
python scripts/train_tokenizer.py --data.path my/pictures --text.vocab-size 4096
"""

from dalle.commands.train_tokenizer import TokenizerRun, train_tokenizer
from dalle.commands.train_transformer import TransformerRun
from dalle.config import parse, tell_errors

if __name__ == "__main__":
    with tell_errors():
        train_tokenizer(parse(TokenizerRun, schema=TransformerRun, description=__doc__))
