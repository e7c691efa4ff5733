"""Rankings as data: their types, ranks and agreement, the pairs to learn from, and the file formats."""
