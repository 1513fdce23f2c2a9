"""Show any run as one page: curves, images, attention, codes, masks, numbers, configuration, hashes.

python scripts/report.py runs/quickstart                            writes runs/quickstart/report.html
python scripts/report.py runs/transformer --no-draw                 what lies in the folder, in a second
python scripts/report.py runs/my-model --prompts "a red cross above a blue circle" --best-of 64
python scripts/report.py evaluation.json                            the numbers of scripts/evaluate.py
"""

from dalle.commands.report import ReportArgs, write_report
from dalle.config import parse, tell_errors

if __name__ == "__main__":
    with tell_errors():
        write_report(parse(ReportArgs, description=__doc__))
