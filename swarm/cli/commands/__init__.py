"""The commands and their options, a file for each group. Each one parses, checks what can be checked at once, and runs.

Own the flags and the help. Import nothing heavy before a command runs.
"""
