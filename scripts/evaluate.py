"""Measure a model: by the judge of the drawn shapes, or its parts and images on held-out pairs.

python scripts/evaluate.py --model runs/quickstart/model --json report.json
python scripts/evaluate.py --model runs/my-model --parts dvae transformer clip --data.path my/images
python scripts/evaluate.py --parts rerank --clip ViT-B-32.pt --rank-by clip      ranked by a published CLIP
"""

from dalle.commands.evaluate import EvaluateArgs, evaluate
from dalle.config import parse, tell_errors

if __name__ == "__main__":
    with tell_errors():
        evaluate(parse(EvaluateArgs, description=__doc__))
