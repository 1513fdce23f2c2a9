"""Draw the curves of one or many runs, from their log.jsonl, as one image.

python scripts/plot.py runs/transformer
python scripts/plot.py runs/small runs/small-muon --labels AdamW Muon --smooth 0.9 --log-x --out compared.png
python scripts/plot.py runs/transformer --metrics grad_norm lr skipped tokens_per_sec mfu data_time_frac
"""

from dalle.commands.plot import CurvesImage, draw_curves
from dalle.config import parse, tell_errors

if __name__ == "__main__":
    with tell_errors():
        draw_curves(parse(CurvesImage, description=__doc__))
