"""`lamina bench`: how fast rounds are, here and in other simulators, with the same weights out."""
