"""The tests, in the order of the module's parts: `python -m unittest` in the folder above."""
