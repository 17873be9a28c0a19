"""What has effects: launch, watch, cancel."""
