"""Serve a web page that draws images for captions, ranks them and completes uploaded ones (paper sections 2.6, 3.3).

python scripts/app.py runs/quickstart/model                        http://127.0.0.1:7860, for this computer alone
python scripts/app.py runs/quickstart/model --host 0.0.0.0         for the whole network; it asks no password

It needs gradio: pip install 'zeroshot-text2image[app]'.
"""

from dalle.commands.app import AppArgs, app
from dalle.config import parse, tell_errors

if __name__ == "__main__":
    with tell_errors():
        app(parse(AppArgs, description=__doc__))
