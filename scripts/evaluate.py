"""Measure a shapes model: how many pictures show what their caption says, by a judge that reads pixels.

python scripts/evaluate.py --model runs/quickstart/model --json report.json
"""

from dalle.config import parse, tell_errors
from dalle.stages.evaluate import EvaluateRun, evaluate

if __name__ == "__main__":
    with tell_errors():
        evaluate(parse(EvaluateRun, description=__doc__))
