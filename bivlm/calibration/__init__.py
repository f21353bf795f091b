"""Calibration samples: `sources` gives them one at a time, `drawing` chooses and mixes, `frozen` writes and reads them.

`turns` reads the forms that conversations are written in, and `blocks` sends samples through the model.
"""
