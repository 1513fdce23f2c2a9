"""Pack images and captions of any form into WebDataset tars, which large sets read best from.

python scripts/write_tars.py --path my/images --out my/tars
python scripts/write_tars.py --path coco.jsonl --out coco-tars --shard-size 5000
"""

from dalle.commands.write_tars import WriteTarsArgs, pack
from dalle.config import parse, tell_errors

if __name__ == "__main__":
    with tell_errors():
        pack(parse(WriteTarsArgs, description=__doc__))
