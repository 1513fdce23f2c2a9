"""Benchmarks of training, sampling, data loading, attention and memory."""

from dalle.commands.benchmark import main

if __name__ == "__main__":
    main()
