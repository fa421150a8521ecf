"""Every family that people press, a line for each set of options: see cases.py for what a line says."""
