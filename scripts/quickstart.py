"""Train all of DALL-E small on drawn shapes and make images from captions it never saw."""

from dalle.commands.quickstart import main

if __name__ == "__main__":
    main()
