"""Serve a web page that draws images for captions, ranks them and completes uploaded ones (paper sections
2.6, 3.3)."""

from dalle.commands.app import main

if __name__ == "__main__":
    main()
