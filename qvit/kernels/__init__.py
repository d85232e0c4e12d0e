"""Fast forms of what `functional.py` spells out, and of what surrounds it in a layer: same values, fewer passes.

cpu.py, cpu.cpp      compiled loops for CPUs
"""
