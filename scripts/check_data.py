"""Read all of your data once, before you train: what is in it, what is broken, what is there twice.

python scripts/check_data.py --data.path my/images
python scripts/check_data.py --data.path "my/tars/{000..099}.tar" --tokenizer runs/text --max-broken 0
python scripts/check_data.py --data.path my/images --drop-list twice.txt
python scripts/train_dvae.py --data.path my/images --data.filters.drop-list twice.txt

Writes report.json, skipped.jsonl (every sample that cannot be used, and why), sheet.png (images with their
captions) and duplicates.png to --out. --data.filters are tried out one by one, all of the paper's unless you set
them, and nothing is dropped. Exit status: 0, or 1 when too much is broken, for a script that is to stop there.
"""

from dalle.commands.check_data import CheckDataArgs, check_data
from dalle.config import parse, tell_errors

if __name__ == "__main__":
    with tell_errors():
        check_data(parse(CheckDataArgs, description=__doc__))
