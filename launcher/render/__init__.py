"""Plan -> text and argv, pure: no folder is made, no clock read, nothing probed."""
