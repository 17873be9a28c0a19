"""What the user asked for: a typed, strict schema and its reader."""
