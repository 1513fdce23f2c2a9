"""Report of a run as one HTML page: curves, images, attention, codebook, configuration."""

from dalle.commands.report import main

if __name__ == "__main__":
    main()
