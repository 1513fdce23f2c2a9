"""Train all of DALL-E small on drawn shapes and make pictures from captions it never saw.

python scripts/quickstart.py                                        about a quarter of an hour on two cores
"""

from dalle.config import parse, tell_errors
from dalle.stages.quickstart import QuickstartRun, quickstart

if __name__ == "__main__":
    with tell_errors():
        quickstart(parse(QuickstartRun, description=__doc__))
