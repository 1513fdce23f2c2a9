"""Measure a model: by the judge of the drawn shapes, or its parts and images on held-out pairs."""

from dalle.commands.evaluate import main

if __name__ == "__main__":
    main()
