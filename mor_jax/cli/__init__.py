"""The command `mor`: one thin function per command, everything behind it is a Python function too."""
