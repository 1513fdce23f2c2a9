"""Find a learning rate: the same short training at several multiples of the configured one."""

from dalle.commands.lr_sweep import main

if __name__ == "__main__":
    main()
