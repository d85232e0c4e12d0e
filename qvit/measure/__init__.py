"""How much the quantization of each tensor costs: four metrics behind one call, one table as the result.

table.py     Sensitivity: predicted loss increase per site, head and width; JSON
measure.py   measure_sensitivity: the call                agreement.py   how well one table predicts another
fisher.py    diagonal Fisher (one backward per image)     probe.py       sites that can be quantized one by one
kl.py        one site at a time (ZeroQ)
hessian.py   Hutchinson trace (HAWQ-V2)
learned.py   learned scales as indicators (LIMPQ)
"""

from qvit.measure.agreement import agreement_of
from qvit.measure.measure import METRICS, MINIMUM_IMAGES, measure_sensitivity
from qvit.measure.table import Sensitivity, site_type

__all__ = ["METRICS", "MINIMUM_IMAGES", "Sensitivity", "agreement_of", "measure_sensitivity", "site_type"]
