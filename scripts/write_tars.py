"""Write a dataset of images and captions as WebDataset tars."""

from dalle.commands.write_tars import main

if __name__ == "__main__":
    main()
