"""Training as pure functions of arrays and a Config: no clock, file, flag, print or network."""
