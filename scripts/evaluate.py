"""Evaluate a model: shapes judge, losses, retrieval, FID on held-out captions and images."""

from dalle.commands.evaluate import main

if __name__ == "__main__":
    main()
