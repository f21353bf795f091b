"""Calibration data: what the recipe says of it, where samples come from, and the folder that freezes them.

`settings` is the recipe's part; `sources` and `hub` give conversations one at a time, `exchanges` reads the forms they
are written in; `drawing` chooses and mixes; `frozen` writes and reads the folder.
"""
