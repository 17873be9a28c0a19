"""Inside a rank: the only room that imports torch."""
