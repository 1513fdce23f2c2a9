"""Before you rent: memory, operations, traffic, days and cost of a training, without starting it."""

from dalle.commands.plan import main

if __name__ == "__main__":
    main()
