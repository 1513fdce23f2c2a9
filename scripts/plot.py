"""Draw the curves of one or many runs, from their log.jsonl, as one picture.

python scripts/plot.py runs/transformer
python scripts/plot.py runs/small runs/small-muon --labels AdamW Muon --smooth 0.9 --log-x --out compared.png
python scripts/plot.py runs/transformer --metrics gradient_norm step_size skipped tokens_per_second mfu data_wait
"""

from dalle.commands.plot import CurvesPicture, draw_curves
from dalle.config import parse, tell_errors

if __name__ == "__main__":
    with tell_errors():
        draw_curves(parse(CurvesPicture, description=__doc__))
