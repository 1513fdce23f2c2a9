"""Find a learning rate: the same short training at several multiples of the configured one.

python scripts/sweep.py 0.25 0.5 1 2 4 --config configs/transformer/shapes.yaml --steps 100
"""

import sys
from itertools import takewhile

from dalle.commands.lr_sweep import sweep
from dalle.config import overview, parse, tell_errors
from dalle.runs.kinds import EACH_KIND, TRAININGS, take_kind

if __name__ == "__main__":
    with tell_errors():
        overview(sys.argv[1:], __doc__, EACH_KIND)
        factors = list(takewhile(lambda word: word[:1].isdigit(), sys.argv[1:]))
        kind, words = take_kind(sys.argv[1 + len(factors) :])
        sweep(
            kind, parse(TRAININGS[kind][0], words, description=__doc__), [float(factor) for factor in factors]
        )
