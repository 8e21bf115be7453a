"""Images of any size and kind to the uint8 batch that a model wants, by its own library's transforms."""
