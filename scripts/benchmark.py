"""Benchmarks of training, sampling, data loading, attention and memory: see dalle/commands/benchmark.py."""

from dalle.commands.benchmark import main

if __name__ == "__main__":
    main()
