"""Effects: starting, watching and stopping runs. One file a target, the same verbs."""
