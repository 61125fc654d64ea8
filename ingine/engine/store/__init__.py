"""A model on the disk: where it lies, which files it is made of, and how they are read within bounds."""
