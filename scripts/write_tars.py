"""Pack images and captions of any form into WebDataset tars, which large sets read best from."""

from dalle.commands.write_tars import main

if __name__ == "__main__":
    main()
