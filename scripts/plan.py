"""Before you rent: memory, operations, traffic, days and cost of a training, without starting it.

python scripts/plan.py --config configs/transformer/paper.yaml --gpus 1024 --gpu v100-16gb --train.precision fp16
python scripts/plan.py --config configs/dvae/small.yaml --gpus 1 --gpu rtx-4090 --mfu 0.3 --price 0.5 --json plan.json
"""

import sys

from dalle.commands.plan import PLANS, plan_training
from dalle.config import overview, parse, tell_errors
from dalle.runs.kinds import EACH_KIND, take_kind

if __name__ == "__main__":
    with tell_errors():
        overview(sys.argv[1:], __doc__, EACH_KIND)
        kind, words = take_kind(sys.argv[1:])
        plan_training(kind, parse(PLANS[kind], words, description=__doc__))
