"""Turn the captions of a public set, and the images that you fetched of it, into a table; see docs/data.md.

python scripts/convert_captions.py --format coco --captions annotations/captions_train2017.json \
    --images train2017 --out coco.jsonl
python scripts/convert_captions.py --format redcaps --captions annotations --images images --out redcaps.jsonl
python scripts/convert_captions.py --format narratives --captions narratives --images open_images --out open.jsonl
"""

from dalle.commands.convert_captions import ConvertCaptionsArgs, convert_captions
from dalle.config import parse, tell_errors

if __name__ == "__main__":
    with tell_errors():
        convert_captions(parse(ConvertCaptionsArgs, description=__doc__))
