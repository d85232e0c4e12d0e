"""From sensitivities or learned widths, and costs, to integer widths within a budget.

problem.py     what is chosen                          choices.py    sites, heads, pins, ties and units as a problem
program.py     the integer program                     units.py      budgets: bit operations, bytes, milliseconds
relaxation.py  Lagrangian bounds, exact on forests     frontier.py   the Pareto frontier
rounding.py    learned widths → integers (Q-ViT)       plans.py      a sensitivity and a budget → a plan
latency.py     milliseconds by pairs of widths         tokens.py     groups of tokens as options of an activation
greedy.py      one width lowered at a time
"""

from qvit.allocate.frontier import Point, frontier, frontier_report
from qvit.allocate.plans import allocate_plan
from qvit.allocate.problem import Problem
from qvit.allocate.program import solve
from qvit.allocate.rounding import round_to_budget

__all__ = ["Point", "Problem", "allocate_plan", "frontier", "frontier_report", "round_to_budget", "solve"]
