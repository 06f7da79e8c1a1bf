"""The command line. Its modules import torch and diffusers only inside of a command, so that `--help` is quick."""
