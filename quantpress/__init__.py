"""Press language models into the formats that people run, and prove every file."""
