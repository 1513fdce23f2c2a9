"""Learning rate sweep: short trainings at multiples of the configured learning rate."""

from dalle.commands.lr_sweep import main

if __name__ == "__main__":
    main()
