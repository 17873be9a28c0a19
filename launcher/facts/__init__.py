"""What is there: GPUs, model shape, dataset sample, installed versions.

This floor reads the machine and decides nothing. It writes no file, opens no network
connection and imports neither torch nor any other package of the training stack.
"""
