"""Train all of DALL-E small on drawn shapes and make images from captions it never saw.

python scripts/quickstart.py                                        about twenty minutes on two cores
"""

from dalle.commands.quickstart import QuickstartArgs, quickstart
from dalle.config import parse, tell_errors

if __name__ == "__main__":
    with tell_errors():
        quickstart(parse(QuickstartArgs, description=__doc__))
