"""Vivace beside other engines, each in a process and an environment of its own, on the same prompts in turn."""
