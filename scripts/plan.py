"""Memory, FLOPs, traffic, days and cost of a training before it starts."""

from dalle.commands.plan import main

if __name__ == "__main__":
    main()
