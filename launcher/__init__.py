"""sftlaunch: plan and launch supervised fine-tuning from one spec."""

__version__ = "0.1.0"
