"""Show any run as one page: curves, images, attention, codes, masks, numbers, configuration, hashes."""

from dalle.commands.report import main

if __name__ == "__main__":
    main()
