"""`--sweep`: many runs of one spec, from their plan to their end."""
